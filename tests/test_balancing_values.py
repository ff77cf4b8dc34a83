"""Worked numbers of the losses with state: computed from the papers' formulas outside this package, to 6 digits."""

import math

import pytest
import torch

from detloss_plugins import build_loss
from detloss_plugins.losses import (
    GHMC,
    GHMR,
    EQLV2Loss,
    SeesawLoss,
    SlideLoss,
    bin_counts,
    confidence_weighted_loss,
    ghmc_loss,
    ghmr_loss,
    harmony,
    slide_loss,
    slide_weight,
)
from detloss_plugins.testing import sample

X = torch.tensor([0.8, -0.4, 1.5, 0.7], dtype=torch.float64)
Z = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, -0.3]], dtype=torch.float64)


def close(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach(), expected, atol=6e-7, rtol=0)


def test_ghmc():
    pred = X.clone().unsqueeze(-1).requires_grad_()
    target = torch.tensor([1.0, 0, 0, 1], dtype=torch.float64).unsqueeze(-1)
    value = GHMC()(pred, target)
    close(value, 0.867191)
    # Bins .3, .4, .8 and .3 of the norms .310, .401, .818, .332: two share a bin of the three that are occupied.
    weight = torch.tensor([[1 / 6], [1 / 3], [1 / 3], [1 / 6]], dtype=torch.float64)
    close(torch.autograd.grad(value, pred)[0], weight * (pred.detach().sigmoid() - target))


def test_ghmc_moving_average_starts_from_zero():
    """As upstream: the first step with momentum 0.75 is four times the plain value."""
    target = torch.tensor([1.0, 0, 0, 1], dtype=torch.float64).unsqueeze(-1)
    close(GHMC(momentum=0.75)(X.unsqueeze(-1), target), 4 * GHMC()(X.unsqueeze(-1), target))


def test_ghmr():
    pred = torch.tensor([[0.01, -0.5, 0.005, 1.0]], dtype=torch.float64, requires_grad=True)
    value = GHMR()(pred, torch.zeros(1, 4, dtype=torch.float64))
    close(value, 0.244425)
    norm = torch.tensor([[0.447214, 0.999201, 0.242536, 0.999800]], dtype=torch.float64)
    weight = torch.tensor([[1 / 3, 1 / 6, 1 / 3, 1 / 6]], dtype=torch.float64)
    close(torch.autograd.grad(value, pred)[0], weight * norm * pred.detach().sign())


def test_ghm_agrees_with_upstream_over_calls_with_a_moving_average():
    from mmdet.models.losses import GHMC as UPSTREAM

    ours, theirs = GHMC(bins=30, momentum=0.75), UPSTREAM(bins=30, momentum=0.75)
    for seed in range(4):
        pred, target = sample(GHMC, 200, seed=seed)
        torch.testing.assert_close(ours(pred, target), theirs(pred, target, torch.ones_like(pred)))


def test_harmonising_weights_average_one():
    counts = torch.randint(0, 5, (10,), generator=torch.Generator().manual_seed(0)).double()
    weight = harmony(counts, counts.sum())
    torch.testing.assert_close((weight * counts).sum() / counts.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_a_table_of_weights_in_place_of_the_own():
    """One weight for each bin of the norms .310, .401, .818 and .332 of GHM-C."""
    target = torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
    table = torch.zeros(10)
    table[[3, 4, 8]] = torch.tensor([2.0, 3.0, 5.0])
    bce = torch.nn.functional.binary_cross_entropy_with_logits(X, target, reduction="none")
    close(ghmc_loss(X, target, table=table), torch.tensor([2, 3, 5, 2]) * bce)
    # GHM-R's norms .447, .999 and .243, and sqrt(d^2 + .02^2) - .02.
    errors, table = torch.tensor([0.01, -0.5, 0.005], dtype=torch.float64), torch.arange(10.0)
    smooth = (errors.square() + 0.02**2).sqrt() - 0.02
    close(ghmr_loss(errors, torch.zeros(3), table=table), torch.tensor([4, 9, 2]) * smooth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_have_the_type_of_the_norms(dtype):
    counts = bin_counts(torch.tensor([0.1, 0.12, 1.0], dtype=dtype), torch.tensor([1, 0, 1]), 2)
    assert counts.dtype == dtype
    assert counts.tolist() == [1, 1]


def test_nothing_counts_as_one():
    """The Ultralytics adapter divides by it."""
    loss, rows = GHMC(), torch.zeros(2, 3)
    for pred, target in ((rows, torch.tensor([-1, -1])), (rows[:0], rows[:0])):
        seen = loss.observe(pred, target, None)
        assert loss.normalizer(pred.numel(), seen) == 1


def test_seesaw():
    loss = SeesawLoss(num_classes=3, return_dict=False, reduction="none").eval()
    loss.cum_samples[:3] = torch.tensor([100.0, 10, 1])
    pred = torch.cat([Z, torch.zeros(2, 2, dtype=torch.float64)], -1).requires_grad_()
    value = loss(pred, torch.tensor([0, 2]))
    close(value - math.log(2), [0.013405, 2.174957])  # ln 2 is the objectness of two equal logits
    weights = torch.tensor([[1.0, 0.158489, 0.025119], [2.225541, 2.718282, 1.0]], dtype=torch.float64)
    one_hot = torch.tensor([[1.0, 0, 0], [0, 0, 1]], dtype=torch.float64)
    close(torch.autograd.grad(value.sum(), pred)[0][:, :3], (Z + weights.log()).softmax(-1) - one_hot)


def test_seesaw_agrees_with_upstream_over_calls():
    from mmdet.models.losses import SeesawLoss as UPSTREAM

    ours, theirs = SeesawLoss(num_classes=8), UPSTREAM(num_classes=8)
    for seed in range(3):
        pred, label = sample(SeesawLoss, 40, seed=seed)
        torch.testing.assert_close(ours(pred, label), theirs(pred, label))
        torch.testing.assert_close(ours.get_activation(pred), theirs.get_activation(pred))
        for name, value in theirs.get_accuracy(pred, label).items():
            torch.testing.assert_close(ours.get_accuracy(pred, label)[name], value.squeeze())
    torch.testing.assert_close(ours.cum_samples, theirs.cum_samples)
    assert ours.get_cls_channels(8) == 10
    with pytest.raises(ValueError, match="num_classes=8"):
        ours.get_cls_channels(9)


def test_eqlv2():
    loss = EQLV2Loss(num_classes=2).eval()
    loss.pos_neg.copy_(torch.tensor([0.5, 1.2]))
    pred = Z.clone().requires_grad_()
    value = loss(pred, torch.tensor([0, 2]))
    close(value, 1.785848)
    weight = torch.tensor([[4.893612, 0.991837, 1.0], [0.026597, 0.991837, 1.0]], dtype=torch.float64)
    one_hot = torch.tensor([[1.0, 0, 0], [0, 0, 1]], dtype=torch.float64)
    close(torch.autograd.grad(value, pred)[0], weight * (Z.sigmoid() - one_hot) / 2)


def test_eqlv2_agrees_with_upstream_over_calls():
    from mmdet.models.losses import EQLV2Loss as UPSTREAM

    ours, theirs = EQLV2Loss(num_classes=9), UPSTREAM(num_classes=9)
    for seed in range(4):
        pred, target = sample(EQLV2Loss, 100, seed=seed)
        label = torch.where(target.sum(-1) > 0, target.argmax(-1), 9)
        torch.testing.assert_close(ours(pred, label), theirs(pred, label))
        torch.testing.assert_close(ours.pos_neg, theirs.pos_neg)


def test_slide():
    iou = torch.tensor([0.1, 0.55, 0.9], dtype=torch.float64)
    mean = torch.tensor(0.6, dtype=torch.float64)
    close(slide_weight(iou, mean), [1.0, 1.491825, 1.105171])
    close(slide_weight(iou, mean, authors_code=True), [1.0, 1.822119, 1.105171])
    loss = SlideLoss(reduction="none").eval()
    loss.mean_iou.copy_(mean)
    pred = torch.tensor([[0.8], [-0.4], [1.5]], dtype=torch.float64, requires_grad=True)
    value = loss(pred, iou.unsqueeze(-1))
    # The state is float32, which moves the mean of 0.6 by 2e-8.
    close(value.squeeze(-1), [1.091101, 1.093530, 0.388372])
    weight = torch.tensor([[1.0], [1.491825], [1.105171]], dtype=torch.float64)
    close(torch.autograd.grad(value.sum(), pred)[0], weight * (pred.detach().sigmoid() - iou.unsqueeze(-1)))


def test_slide_weighs_any_elements():
    iou, mean = torch.tensor([[0.1], [0.55], [0.9]], dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    elements = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    close(slide_loss(iou, iou, mean_iou=mean, elements=elements), [[1.0], [2 * math.exp(0.4)], [3 * math.exp(0.1)]])


def test_slide_mean_is_that_of_the_positives_and_at_least_a_fifth():
    loss = SlideLoss()
    loss(torch.zeros(4, 2), torch.tensor([[0.6, 0], [0, 0.8], [0, 0], [0, 0]]))
    torch.testing.assert_close(loss.mean_iou, torch.tensor(0.7))
    loss(torch.zeros(1, 2), torch.tensor([[0.05, 0]]))
    torch.testing.assert_close(loss.mean_iou, torch.tensor(0.2))
    loss(torch.zeros(1, 2), torch.zeros(1, 2))
    torch.testing.assert_close(loss.mean_iou, torch.tensor(0.2))  # no positives: the mean stays


def test_a_moving_mean_of_slide():
    """It starts at 1, its decay at 0: after means of .6 and .8 it is .600200 and .799800, by hand in numpy."""
    loss = SlideLoss(decay=0.999)
    assert loss.mean_iou == 1
    for iou, expected in ((0.6, 0.600200), (0.8, 0.799800)):
        seen = loss.observe(torch.zeros(2, 2), torch.tensor([[iou, 0], [0, 0]]), None)
        close(loss.mean_iou.double(), expected)
        assert seen["mean_iou"] == loss.mean_iou
    loss(torch.zeros(1, 2), torch.zeros(1, 2))
    assert loss.updates == 2, "a batch without positives is none"
    quick = SlideLoss(decay=0.9, tau=0.01)  # whose decay is 0.9 from the start: .9 + .1 mean
    quick(torch.zeros(1, 1), torch.tensor([[0.5]]))
    close(quick.mean_iou.double(), 0.95)


def test_a_moving_mean_of_slide_beside_a_rank_without_positives(monkeypatch):
    """Whose mean is still 1 and which has counted no update: half of both is one state."""
    loss, others = SlideLoss(decay=0.9, tau=0.01), iter([0.0, 1.0])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(next(others)))
    loss.observe(torch.zeros(1, 1), torch.tensor([[0.5]]), None)
    assert loss.updates == 0.5
    close(loss.mean_iou.double(), (0.95 + 1) / 2)


def test_a_moving_mean_of_slide_counts_from_a_fifth():
    """Not what is kept, but what is used of it."""
    pred, target = torch.zeros(2, 1), torch.tensor([[0.05], [0.15]])
    loss = SlideLoss(decay=0.0, reduction="none")
    rows = loss(pred, target)
    torch.testing.assert_close(loss.mean_iou, torch.tensor(0.1))
    torch.testing.assert_close(rows, SlideLoss(reduction="none")(pred, target))
    assert not SlideLoss().state_dict().keys() & {"updates"}, "a checkpoint of the plain one is what it was"


def test_slide_over_another_base():
    pred, target = sample(SlideLoss, 50)
    for base in ({"type": "FocalLoss"}, {"type": "QualityFocalLoss", "loss_weight": 2.0}):
        slide = SlideLoss(base=base, reduction="none")
        rows = slide(pred, target)
        assert rows.shape == build_loss({**base, "reduction": "none"})(pred, target).shape
    with pytest.raises(ValueError, match="base"):
        SlideLoss(base={"type": "CIoULoss"})


def test_confidence_weighted():
    loss = build_loss({"type": "ConfidenceWeightedLoss", "reduction": "none", "power": 2.0})
    pred = torch.tensor([[0.3, 0.1]], dtype=torch.float64).logit().requires_grad_()
    target = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    value = loss(pred, target)
    weight = 0.7**2 * 0.7  # Q_fg = 0.3, Q_bg = 1 - 0.3
    close(value, [[-weight * math.log(0.7), -weight * math.log(0.1)]])
    close(torch.autograd.grad(value.sum(), pred)[0], [[weight * 0.3, weight * -0.9]])
    of_function = confidence_weighted_loss(pred, target, power=1.0, elements=torch.tensor([[2.0, 1.0]]).double())
    close(of_function, [[2 * 0.7**2, 0.7**2]])  # (1 - Q_fg) Q_bg
    softmax = build_loss({"type": "ConfidenceWeightedLoss", "base": {"type": "CrossEntropyLoss"}, "reduction": "none"})
    p = torch.tensor([[0.3, 0.1, 0.6]], dtype=torch.float64)  # background last: Q_fg = 0.3, Q_bg = 0.6
    close(softmax(p.log(), torch.tensor([1])), [-0.294 * math.log(0.1)])
    of_function = confidence_weighted_loss(p.log(), None, use_sigmoid=False, elements=torch.tensor([2.0]).double())
    close(of_function, [2 * 0.294])


OF_SCORES = [{"type": "FocalLoss"}, {"type": "QualityFocalLoss"}, {"type": "BinaryCrossEntropyLoss"}]


@pytest.mark.parametrize("cfg", [*OF_SCORES, {"type": "FocalLoss", "use_sigmoid": False}], ids=str)
def test_confidence_weighted_of_probabilities(cfg):
    """Which are confidences as they are, also where only a part of the base takes them."""
    pred, label = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0])
    sigmoid = cfg.get("use_sigmoid", True)
    ways = [lambda part: part, lambda part: {"type": "JointLoss", "losses": [part]}]
    ways += [lambda part: {"type": "SlideLoss", "base": part}] * sigmoid
    for way in ways:
        of_logits, of_scores = (
            build_loss({"type": "ConfidenceWeightedLoss", "base": way(part), "reduction": "none"})
            for part in (cfg, {**cfg, "activated": True})
        )
        scores = pred.sigmoid() if sigmoid else pred.softmax(-1)
        torch.testing.assert_close(of_scores(scores, label), of_logits(pred, label))


def test_confidence_weighted_beside_a_column_of_the_background():
    """Whose score is no class's."""
    pred, label = torch.tensor([[0.5, -1.0, 9.0], [-3.0, 0.0, 9.0]]), torch.tensor([1, 2])
    base = {"type": "EQLV2Loss", "num_classes": 2}
    loss = build_loss({"type": "ConfidenceWeightedLoss", "base": base, "reduction": "none"})
    q_fg = torch.tensor([0.5, 0.0]).sigmoid()
    of_base = build_loss({**base, "reduction": "none"})(pred, label)
    torch.testing.assert_close(loss(pred, label), (1 - q_fg) ** 3 * of_base)


def test_joint():
    parts = [{"type": "FocalLoss", "loss_weight": 2.0}, {"type": "QualityFocalLoss"}]
    joint = build_loss({"type": "JointLoss", "losses": parts, "loss_weight": 3.0})
    pred, target = sample(SlideLoss, 20)
    weight = torch.rand(20)
    expected = 3 * sum(build_loss(part)(pred, target, weight, 5.0) for part in parts)
    torch.testing.assert_close(joint(pred, target, weight, 5.0), expected)
    nested = build_loss({"type": "JointLoss", "losses": [{"type": "JointLoss", "losses": parts}, {"type": "GHMC"}]})
    for way, factor in (("mean", 5.0), ("sum", None), ("none", None)):
        inputs = pred, target, weight, factor, way
        each = (build_loss(part)(*inputs) for part in (*parts, {"type": "GHMC"}))
        expected = sum(x.sum(-1) if x.dim() == 2 else x for x in each)  # QFL's is one a row
        torch.testing.assert_close(nested(*inputs), expected)
    boxes = build_loss({"type": "JointLoss", "losses": [{"type": "CIoULoss"}, {"type": "IoULoss"}]})
    assert boxes.family == "box"
    for bad in ([], [{"type": "CIoULoss"}, {"type": "FocalLoss"}]):
        with pytest.raises(ValueError, match="one family"):
            build_loss({"type": "JointLoss", "losses": bad})
