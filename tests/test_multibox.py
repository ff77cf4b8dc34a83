"""SSD's loss against a plain loop over images and anchors, written from the formula; the mining; what it refuses."""

import math

import pytest
import torch

from detloss_plugins import build_loss
from detloss_plugins.losses import CrossEntropyLoss, FocalLoss, MultiBoxLoss, hard_negatives

# One image of five priors; in the book the background is class 0, here it is the last.
LOGITS = torch.tensor([[1.0, -0.5, 0.2], [0.1, 0.0, 1.5], [0.3, 0.2, 0.0], [-1.0, -1.0, 2.0], [0.5, 0.1, 0.4]])
OFFSETS = torch.tensor([0.3, -1.4, 0.05, 2.0]).expand(5, 4)
LABELS = torch.tensor([0, 2, 2, 2, 2])


def scene(use_sigmoid=False, images=5, anchors=12, classes=3, seed=0):
    """Random logits, boxes, labels and true boxes; the first image has no positive, the second nothing but."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, anchors, classes + (not use_sigmoid), generator=generator, dtype=torch.float64)
    boxes, true_boxes = torch.randn(2, images, anchors, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5 * classes, (images, anchors), generator=generator).clamp(max=classes)
    labels[0], labels[1] = classes, labels[1] % classes
    return (logits.requires_grad_(), boxes.requires_grad_()), (labels, true_boxes)


def by_hand(pred, target, ratio, use_sigmoid=False, weight=None, avg_factor=None):
    """Class and box loss by a loop: which negatives of an image count is decided by sorting them."""
    (logits, boxes), (labels, true_boxes) = pred, target
    background = logits.shape[-1] - (not use_sigmoid)
    cls_loss = FocalLoss(reduction="none") if use_sigmoid else CrossEntropyLoss(reduction="none")
    total_cls, total_box, count = 0, 0, 0
    for image in range(len(labels)):
        rows, positives, negatives = [], [], []
        for anchor, label in enumerate(labels[image].tolist()):
            row = cls_loss(logits[image, anchor : anchor + 1], labels[image, anchor : anchor + 1]).sum()
            rows.append(row if weight is None else row * weight[image, anchor])
            if 0 <= label < background:
                positives.append(anchor)
            elif label == background:
                negatives.append(anchor)
        negatives.sort(key=lambda anchor: -rows[anchor].item())  # of equal ones the first stays first
        if ratio is not None:
            negatives = negatives[: int(ratio * len(positives))]
        total_cls += sum(rows[anchor] for anchor in positives + negatives)
        for anchor in positives:
            error = (boxes[image, anchor] - true_boxes[image, anchor]).abs()
            row = torch.where(error < 1, error**2 / 2, error - 0.5).sum()
            total_box += row if weight is None else row * weight[image, anchor]
        count += max(len(positives), 1)
    factor = count if avg_factor is None else avg_factor
    return dict(loss_cls=total_cls / factor, loss_bbox=total_box / factor)


def agree(pred, target, ratio, use_sigmoid=False, **kwargs):
    """The class and the loop have the same values and gradients."""
    cls = dict(type="FocalLoss") if use_sigmoid else None
    loss = MultiBoxLoss(loss_cls=cls, neg_pos_ratio=ratio, return_dict=True)
    found, expected = loss(pred, target, **kwargs), by_hand(pred, target, ratio, use_sigmoid, **kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    grads = [torch.autograd.grad(sum(parts.values()), pred, retain_graph=True) for parts in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-12)
    return found


def test_worked_example():
    pred, target = (LOGITS.unsqueeze(0), OFFSETS.unsqueeze(0)), (LABELS.unsqueeze(0), torch.zeros(1, 5, 4))
    parts = MultiBoxLoss(neg_pos_ratio=2, return_dict=True)(pred, target)
    torch.testing.assert_close(parts, dict(loss_cls=torch.tensor(2.833125), loss_bbox=torch.tensor(2.446250)))
    rows = MultiBoxLoss(neg_pos_ratio=2, reduction="none")(pred, target)
    torch.testing.assert_close(rows, torch.tensor([[0.514295 + 2.446250, 0, 1.272919, 0, 1.045911]]))
    assert MultiBoxLoss(neg_pos_ratio=2)(pred, target).item() == pytest.approx(5.279375, abs=1e-6)


@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize("ratio", [3, 1, 0, 0.5, 1.9, 100, None])
def test_loop(ratio, use_sigmoid):
    found = agree(*scene(use_sigmoid), ratio, use_sigmoid)
    assert all(value > 0 for value in found.values())


@pytest.mark.parametrize("ratio", [3, None])
def test_ignored_anchors_weights_and_avg_factor(ratio):
    pred, (labels, true_boxes) = scene()
    labels = torch.where(torch.rand(labels.shape, generator=torch.Generator().manual_seed(3)) < 0.3, -1, labels)
    agree(pred, (labels, true_boxes), ratio)
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weight[:, ::4] = 0
    agree(pred, (labels, true_boxes), ratio, weight=weight, avg_factor=7.5)


def test_weights_decide_what_is_hard():
    """As in mmdet, where the weight of a label comes before the choice."""
    pred, target = (LOGITS.unsqueeze(0), OFFSETS.unsqueeze(0)), (LABELS.unsqueeze(0), torch.zeros(1, 5, 4))
    rows = MultiBoxLoss(neg_pos_ratio=1, reduction="none")
    assert rows(pred, target)[0].nonzero().flatten().tolist() == [0, 2]
    assert rows(pred, target, torch.tensor([[1, 1, 0.5, 1, 1]]))[0].nonzero().flatten().tolist() == [0, 4]


def test_ties():
    """Of equal negatives the first have a part, and no more than there should be."""
    logits = torch.zeros(2, 9, 4, dtype=torch.float64, requires_grad=True)
    boxes = torch.zeros(2, 9, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.full((2, 9), 3)
    labels[0, 4], labels[1, :3] = 1, 2
    agree((logits, boxes), (labels, boxes.detach() + 1), 2)
    rows = MultiBoxLoss(neg_pos_ratio=2, reduction="none")((logits, boxes), (labels, boxes.detach()))
    assert rows[0].nonzero().flatten().tolist() == [0, 1, 4]
    assert rows[1].nonzero().flatten().tolist() == list(range(9))


def test_an_image_without_positives_costs_nothing():
    pred, target = scene()
    rows = MultiBoxLoss(reduction="none")(pred, target)
    assert (rows[0] == 0).all()
    alone = MultiBoxLoss()((pred[0][:1], pred[1][:1]), (target[0][:1], target[1][:1]))
    assert alone == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(alone, pred))
    # But it counts as one in the normaliser, as in mmdet.
    rest = MultiBoxLoss()((pred[0][1:], pred[1][1:]), (target[0][1:], target[1][1:]))
    count = (target[0] < 3).sum()
    torch.testing.assert_close(MultiBoxLoss()(pred, target), rest * count / (count + 1), rtol=1e-6, atol=0)


def test_no_anchors_and_no_images():
    for shape in ((0, 5), (3, 0), (0, 0)):
        pred = [torch.zeros(*shape, n, requires_grad=True) for n in (4, 4)]
        for reduction in ("mean", "sum", "none"):
            value = MultiBoxLoss(reduction=reduction)(pred, (torch.zeros(shape).long(), torch.zeros(*shape, 4)))
            assert value.sum() == 0
            value.sum().backward()


def test_one_tensor_in_place_of_a_pair():
    pred, (labels, true_boxes) = scene()
    loss = MultiBoxLoss()
    joined = torch.cat(pred, -1), torch.cat([labels.unsqueeze(-1), true_boxes], -1)
    assert loss(*joined) == loss(pred, (labels, true_boxes))


def test_sum_of_the_parts():
    pred, target = scene()
    settings = dict(loss_cls=dict(type="CrossEntropyLoss", loss_weight=0.5), loss_weight=3.0)
    parts = MultiBoxLoss(**settings, return_dict=True)(pred, target)
    assert parts.keys() == {"loss_cls", "loss_bbox"}
    assert MultiBoxLoss(**settings)(pred, target) == sum(parts.values())
    plain = MultiBoxLoss(return_dict=True)(pred, target)
    torch.testing.assert_close(parts["loss_cls"], 1.5 * plain["loss_cls"])
    torch.testing.assert_close(parts["loss_bbox"], 3 * plain["loss_bbox"])


def test_the_choice_is_a_constant():
    """Gradients of what was left out are zero, those of the rest are those without mining."""
    pred, target = scene()
    rows = MultiBoxLoss(reduction="none")(pred, target)
    out = rows == 0
    assert 0 < out[2:].sum() < out[2:].numel()
    (gradient,) = torch.autograd.grad(rows.sum(), pred[0])
    (whole,) = torch.autograd.grad(MultiBoxLoss(neg_pos_ratio=None, reduction="sum")(pred, target), pred[0])
    assert (gradient[out] == 0).all()
    assert torch.equal(gradient[~out], whole[~out])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pairs(dtype):
    pred, (labels, true_boxes) = scene()
    half = [x.detach().to(dtype).requires_grad_() for x in pred]
    value = MultiBoxLoss()(half, (labels, true_boxes.float()))
    assert value.dtype == torch.float32
    wide = [x.detach().float() for x in half]
    assert value == MultiBoxLoss()(wide, (labels, true_boxes.float()))
    assert all(gradient.dtype == dtype for gradient in torch.autograd.grad(value, half))


def test_huge_logits_are_finite():
    pred, target = scene()
    for size in (1e4, 1e30):
        logits = (pred[0].detach().float() * size).requires_grad_()
        for loss in (MultiBoxLoss(), MultiBoxLoss(loss_cls=dict(type="FocalLoss"))):
            few = logits if loss.loss_cls.use_sigmoid is False else logits[..., :3]
            value = loss((few, pred[1].float()), target)
            assert value.isfinite()
            assert torch.autograd.grad(value, logits)[0].isfinite().all()


def test_box_losses_compare_corners():
    pred, (labels, _) = scene()
    corners = torch.tensor([10.0, 10, 20, 30]).expand(5, 12, 4)
    boxes = (corners + pred[1].detach().float()).requires_grad_()
    loss = MultiBoxLoss(loss_bbox=dict(type="GIoULoss", loss_weight=2.0), return_dict=True)
    value = loss((pred[0], boxes), (labels, corners))["loss_bbox"]
    positive = labels < 3
    rows = build_loss(dict(type="GIoULoss", reduction="none"))(boxes[positive], corners[positive])
    torch.testing.assert_close(value, 2 * rows.sum() / (positive.sum() + 1))  # one image has no positive


RATIOS = {"CrossEntropyLoss": 3, "BinaryCrossEntropyLoss": 3, "SlideLoss": 3, "ConfidenceWeightedLoss": 3}
RATIOS["AdaptiveThresholdFocalLoss"] = 3
RATIOS |= dict.fromkeys(["FocalLoss", "QualityFocalLoss", "VarifocalLoss", "GeneralizedFocalLoss", "AsymmetricLoss"])
RATIOS |= dict.fromkeys(["MALoss", "IABCELoss", "EqualizedFocalLoss", "EqualizedQualityFocalLoss"])
RATIOS |= dict.fromkeys(["GHMC", "BalancedCrossEntropyLoss", "APLoss", "RankSortLoss", "ALRPLoss", "DRLoss"])


@pytest.mark.parametrize("name", RATIOS)
def test_which_losses_are_mined(name):
    """By default; and a number given is what counts."""
    assert MultiBoxLoss(loss_cls=dict(type=name)).neg_pos_ratio == RATIOS[name]
    assert MultiBoxLoss(loss_cls=dict(type=name), neg_pos_ratio=None).neg_pos_ratio is None
    if RATIOS[name] or not name.endswith(("APLoss", "RPLoss", "SortLoss", "DRLoss")):
        assert MultiBoxLoss(loss_cls=dict(type=name), neg_pos_ratio=1.5).neg_pos_ratio == 1.5


def test_a_composite_is_mined_as_its_parts():
    def ratio(**cfg):
        return MultiBoxLoss(loss_cls=cfg).neg_pos_ratio

    focal, bce = dict(type="FocalLoss"), dict(type="BinaryCrossEntropyLoss")
    assert ratio(type="ConfidenceWeightedLoss", base=focal) is None
    assert ratio(type="SlideLoss", base=focal) is None
    assert ratio(type="JointLoss", losses=[focal, focal]) is None
    assert ratio(type="JointLoss", losses=[focal, bce]) == 3


def test_a_loss_keeps_its_own_normaliser():
    """GHM-C divides by the anchors that count, whatever the number of positives."""
    pred, (labels, true_boxes) = scene(use_sigmoid=True)
    parts = MultiBoxLoss(loss_cls=dict(type="GHMC"), return_dict=True)(pred, (labels, true_boxes))
    expected = build_loss(dict(type="GHMC"))(pred[0].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(parts["loss_cls"], expected)


def test_state_moves_once_a_call():
    """The look at all negatives that mining takes is not a step of training."""
    pred, target = scene(use_sigmoid=True)
    target[0][:, 0] = 0  # a positive in every image, so that all negatives are mined
    losses = [MultiBoxLoss(loss_cls=dict(type="GHMC", momentum=0.5), neg_pos_ratio=ratio) for ratio in (100, None)]
    for loss in losses:
        loss(pred, target)
    states = [loss.loss_cls.acc_sum for loss in losses]
    assert states[0].sum() > 0
    assert torch.equal(*states)


def test_hard_negatives_of_one_row():
    loss = torch.tensor([5.0, 4.0, math.nan, 1.0, 3.0])
    positive = torch.tensor([True, False, False, False, False])
    negative = torch.tensor([False, True, False, True, True])
    assert hard_negatives(loss, positive, negative, 2).tolist() == [False, True, False, False, True]
    assert hard_negatives(loss, positive, negative, 0.9).sum() == 0
    assert torch.equal(hard_negatives(loss, positive, negative, 9), negative)
    assert hard_negatives(loss, positive, ~positive, 1).tolist() == [False, False, True, False, False], "NaN is seen"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(neg_pos_ratio=-1), "neg_pos_ratio of MultiBoxLoss must be .* at least 0 .*, not -1"),
        (dict(neg_pos_ratio="3"), "neg_pos_ratio of MultiBoxLoss must be"),
        (dict(loss_cls=dict(type="GIoULoss")), "loss_cls .* classification or ranking loss, not GIoULoss"),
        (dict(loss_bbox=dict(type="FocalLoss")), "loss_bbox .* regression or box loss, not FocalLoss"),
        (dict(loss_cls=dict(type="APLoss"), neg_pos_ratio=3), "APLoss ranks all negatives; write neg_pos_ratio=None"),
        (dict(loss_cls=dict(type="SeesawLoss", num_classes=3)), "SeesawLoss has channels of its own"),
        (dict(loss_cls=dict(type="FocalLos")), "did you mean FocalLoss"),
    ],
)
def test_what_it_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiBoxLoss(**settings)


def test_wrong_shapes():
    (logits, boxes), (labels, true_boxes) = scene()
    for pred, target in (
        ((logits, boxes[:, :5]), (labels, true_boxes)),
        ((logits, boxes), (labels[:, :5], true_boxes)),
        ((logits, boxes), (labels, true_boxes[..., :3])),
        ((logits[0], boxes[0]), (labels[0], true_boxes[0])),
    ):
        with pytest.raises(ValueError, match=r"takes logits \(B, A, K\)"):
            MultiBoxLoss()(pred, target)


@pytest.mark.parametrize("use_sigmoid", [False, True])
def test_background_first(use_sigmoid):
    """The order of the authors' code and ssd.pytorch: the same loss and gradients, channel by channel."""
    (logits, boxes), (labels, true_boxes) = scene(use_sigmoid)
    labels[2, :2] = -1
    cls = dict(type="FocalLoss") if use_sigmoid else None
    expected = MultiBoxLoss(loss_cls=cls)((logits, boxes), (labels, true_boxes))
    first = MultiBoxLoss(loss_cls=cls, background="first")
    moved = logits.detach() if use_sigmoid else logits.detach().roll(1, -1)
    theirs = torch.where(labels == 3, 0, torch.where(labels < 0, labels, labels + 1))
    found = first((moved.requires_grad_(), boxes), (theirs, true_boxes))
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, moved)
    torch.testing.assert_close(
        gradient if use_sigmoid else gradient.roll(-1, -1), torch.autograd.grad(expected, logits)[0]
    )
    theirs[0, 0] = 4
    with pytest.raises(ValueError, match="takes labels up to"):
        first((moved, boxes), (theirs, true_boxes))
