"""The forms of a classification target, and the options of the losses that a property test does not reach."""

import math

import pytest
import torch

from detloss_plugins import build_loss
from detloss_plugins.losses import (
    BalancedCrossEntropyLoss,
    CrossEntropyLoss,
    DistributionFocalLoss,
    FocalLoss,
    GeneralizedFocalLoss,
    KLDivLoss,
    MultiBoxLoss,
    PolyLoss,
    UncertaintyKLLoss,
    balanced_cross_entropy_loss,
)
from detloss_plugins.registry import registered_losses
from detloss_plugins.testing import sample
from detloss_plugins.testing.check.subject import small_chunks

LABEL = torch.tensor([0, 2, 3, 1])  # 3 is background
QUALITY = torch.tensor([0.4, 0.9, 0.0, 1.0])
DENSE = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]])
SIGMOID = [
    {"type": name, **{key: value for key, value in cls.facts.example.items() if key != "num_classes"}}
    for name, cls in registered_losses().items()
    if cls.facts.family == "classification" and cls.make().use_sigmoid
]
SOFTMAX = [
    {"type": "CrossEntropyLoss"},
    {"type": "FocalLoss", "use_sigmoid": False},
    {"type": "PolyLoss", "use_sigmoid": False},
    {"type": "ModifiedCrossEntropyLoss", "activation": "softmax"},
    {"type": "ModifiedCrossEntropyLoss", "activation": "softmax", "alpha": 0.25, "gamma": 2.0},
]
EVERY = [*SIGMOID, *SOFTMAX]


def build(cfg, classes=3, **settings):
    """A frozen loss for so many classes; one with state gives the same result twice only when it is frozen."""
    known = {"num_classes": classes} if hasattr(registered_losses()[cfg["type"]].make(), "num_classes") else {}
    return build_loss({**cfg, **known, **settings}).eval()


@pytest.fixture
def logits():
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cfg", SIGMOID, ids=lambda cfg: cfg["type"])
def test_forms_agree(cfg, logits):
    loss = build(cfg, reduction="none")
    assert torch.equal(loss(logits, LABEL), loss(logits, DENSE))
    assert torch.equal(loss(logits, (LABEL, QUALITY)), loss(logits, DENSE * QUALITY[:, None]))
    assert torch.equal(loss(logits, DENSE.bool()), loss(logits, DENSE))
    images = loss(logits.reshape(2, 2, 3), LABEL.reshape(2, 2))
    assert torch.equal(images.flatten(0, 1), loss(logits, LABEL))


@pytest.mark.parametrize("cfg", SIGMOID, ids=lambda cfg: cfg["type"])
def test_negative_labels_are_ignored(cfg, logits):
    loss = build(cfg, reduction="sum")
    ignored = torch.tensor([0, -1, 3, -100])
    torch.testing.assert_close(loss(logits, ignored), loss(logits[[0, 2]], ignored[[0, 2]]))


@pytest.mark.parametrize("cfg", SIGMOID, ids=lambda cfg: cfg["type"])
def test_a_form_without_meaning(cfg, logits):
    loss = build(cfg)
    for target in (LABEL.float(), LABEL[:3], torch.rand(4, 2)):
        with pytest.raises(ValueError, match="takes class indices"):
            loss(logits, target)
    with pytest.raises(ValueError, match=r"sigmoid form only|softmax|use_sigmoid"):
        build(cfg, use_sigmoid=False)(logits, (LABEL, QUALITY))


def finite(loss, pred, target):
    """The value of the call, which must be finite, as its gradient must."""
    pred = pred.detach().requires_grad_()
    value = loss(pred, target)
    assert value.isfinite()
    assert torch.autograd.grad(value, pred)[0].isfinite().all()
    return value.detach()


@pytest.mark.parametrize("cfg", EVERY, ids=str)
def test_all_ignored_and_empty(cfg, logits):
    loss = build(cfg)
    assert finite(loss, logits, torch.full((4,), -1)) == 0
    assert finite(loss, logits[:0], LABEL[:0]) == 0


@pytest.mark.parametrize("cfg", EVERY, ids=str)
def test_single_class(cfg):
    """A softmax over one class is 1 whatever the logit: its loss cannot depend on it."""
    loss = build(cfg, classes=1, reduction="sum")
    for size in (1e4, 2.0, -1e4):
        pred = torch.tensor([[size]])
        finite(loss, pred, torch.tensor([0]))
        finite(loss, pred, torch.tensor([[0.3]]))
        if cfg in SOFTMAX:
            assert finite(loss, pred, torch.tensor([0])) < 1e-6
        if cfg not in SOFTMAX or cfg["type"] == "ModifiedCrossEntropyLoss":  # which take background
            finite(loss, pred, torch.tensor([1]))


@pytest.mark.parametrize("cfg", EVERY, ids=str)
def test_confident_logits(cfg):
    loss = build(cfg)
    pred = torch.tensor([[1e4, -1e4, 0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4], [-1e4, 20, 0]])
    targets = [torch.tensor([k] * 4) for k in range(3)]
    dense = [torch.tensor(t).expand(4, 3) for t in ([1.0, 0, 0], [0, 0.5, 0.5], [0.8, 0, 0.3], [0.0, 1, 1])]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for target in (*targets, *dense):
            finite(loss, pred.to(dtype), target)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_modified_softmax_is_stable(gamma, logits):
    """Against the formula as it is written, in float64, and where that one breaks: a logit gap of 100 in float32."""
    target = torch.rand(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = build_loss({"type": "ModifiedCrossEntropyLoss", "activation": "softmax", "gamma": gamma})
    p = (3 * logits.double()).softmax(-1)
    written = -(target * (1 - p) ** gamma * p.log() + (1 - target) * p**gamma * (1 - p).log())
    torch.testing.assert_close(loss(3 * logits.double(), target), written.sum(-1).mean())
    # ln(1 - p_0) = ln 2 - 100 for a wrong class that is sure, and the right one has p = e^-100.
    value = finite(loss, torch.tensor([[100.0, 0.0, 0.0]]), torch.tensor([1]))
    torch.testing.assert_close(value, torch.tensor(200 - math.log(2)))


def test_modified_cross_entropy_takes_mmdets_use_sigmoid(logits):
    short = build_loss({"type": "ModifiedCrossEntropyLoss", "activation": "softmax"})
    long = build_loss({"type": "ModifiedCrossEntropyLoss", "activation": "softmax", "use_sigmoid": False})
    assert short(logits, LABEL) == long(logits, LABEL)
    assert not short.use_sigmoid
    alpha = torch.tensor([0.3, 0.5, 0.9])
    per_class = build_loss({"type": "ModifiedCrossEntropyLoss", "alpha": alpha.tolist()})
    torch.testing.assert_close(
        per_class(logits, DENSE),
        (alpha * DENSE + (1 - alpha) * (1 - DENSE))
        .mul(torch.nn.functional.binary_cross_entropy_with_logits(logits, DENSE, reduction="none"))
        .sum(-1)
        .mean(),
    )


def test_automatic_balance(logits):
    """alpha = n / (m + n) of the elements that count; 1/2 where there are no positives or no negatives."""

    def fixed(alpha, pred, target):
        return BalancedCrossEntropyLoss(alpha=alpha, reduction="sum")(pred, target)

    loss = BalancedCrossEntropyLoss(reduction="sum")
    torch.testing.assert_close(loss(logits, LABEL), fixed(9 / 12, logits, LABEL))
    torch.testing.assert_close(loss(logits, (LABEL, QUALITY)), fixed(9.7 / 12, logits, (LABEL, QUALITY)))
    ignored = torch.tensor([0, -1, 3, -1])
    torch.testing.assert_close(loss(logits, ignored), fixed(5 / 6, logits, ignored))
    weight = torch.tensor([2.0, 0, 1, 0])
    torch.testing.assert_close(
        loss(logits, LABEL, weight), BalancedCrossEntropyLoss(alpha=5 / 6, reduction="sum")(logits, LABEL, weight)
    )
    for one_sided in (torch.zeros(4, 3), torch.ones(4, 3)):
        value = finite(loss, logits, one_sided)
        assert value > 0
        torch.testing.assert_close(value, fixed(0.5, logits, one_sided))
    assert loss(logits, torch.full((4, 3), float("nan"))).isnan()


@pytest.mark.parametrize(("positives", "cells"), [(5, 10_752_000), (1, 10_000_001)])
def test_automatic_balance_of_few_among_millions(positives, cells):
    """``1 - n / (m + n)`` in float32 would be off by 2.5 and 19 percent; it is ``m / (m + n)``."""
    target = torch.zeros(cells, 1)
    target[:positives] = 1
    pred = torch.zeros(cells, 1, requires_grad=True)
    rows = BalancedCrossEntropyLoss(reduction="none")(pred, target)
    (gradient,) = torch.autograd.grad(rows.sum(), pred)
    share = positives / cells
    for found, scale in ((rows.detach(), math.log(2)), (gradient.abs(), 0.5)):
        torch.testing.assert_close(found[:1].double() / scale, torch.tensor([[1 - share]]).double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(found[-1:].double() / scale, torch.tensor([[share]]).double(), rtol=1e-6, atol=0)


def test_automatic_balance_of_one_among_thirty_millions():
    counts = {"positives": torch.tensor(1.0), "negatives": torch.tensor(3e7)}
    rows = balanced_cross_entropy_loss(torch.zeros(2), torch.tensor([1.0, 0.0]), **counts).double()
    torch.testing.assert_close(rows[1] / math.log(2), torch.tensor(1 / (3e7 + 1)).double(), rtol=1e-6, atol=0)


def test_kl_divergence_takes_distributions_only(logits):
    loss = KLDivLoss()
    for target in (LABEL, DENSE.long(), torch.rand(4, 2)):
        with pytest.raises(ValueError, match="takes one distribution a row"):
            loss(logits, target)
    for pred in (torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]]), torch.zeros(1, 2)):
        finite(loss, pred, torch.tensor([[1.0, 0.0]]))
    assert finite(loss, torch.tensor([[3.0]]), torch.tensor([[1.0]])) == 0


def test_kl_divergence_of_a_teachers_logits(logits):
    """Equal to mmdet's in the parity tests; here what the other mode does with them."""
    teacher = 3 * logits.flip(0)
    for wrong in (teacher, teacher.abs() + 1, teacher - 9):
        with pytest.raises(ValueError, match='write target="logits"'):
            KLDivLoss()(logits, wrong)
    KLDivLoss()(logits, DENSE)  # a row of zeros is one that a head leaves out
    loss, teacher = KLDivLoss(target="logits", temperature=2.0), teacher.requires_grad_()
    pred = logits.clone().requires_grad_()
    value = loss(pred, teacher)
    expected = KLDivLoss(temperature=2.0)(logits, (teacher / 2).softmax(-1)) / 3
    torch.testing.assert_close(value, expected)
    wide = KLDivLoss(temperature=2.0)(logits.double(), (teacher.double() / 2).softmax(-1)) / 3
    torch.testing.assert_close(loss(logits.double(), teacher), wide, rtol=1e-12, atol=0)
    assert torch.autograd.grad(value, teacher, allow_unused=True, retain_graph=True)[0] is None
    assert loss(teacher.detach(), teacher).abs() < 1e-6


@pytest.mark.parametrize("cls", registered_losses().values(), ids=lambda cls: cls.__name__)
def test_a_tuple_is_refused_where_it_has_no_meaning(cls):
    """In one sentence: a pair where the loss takes none, and any other number of parts."""
    loss, (pred, target) = cls.make(), sample(cls, 8)
    takes = loss.family in ("classification", "ranking", "multibox") and getattr(loss, "use_sigmoid", True)
    label = torch.zeros(pred.shape[:-1], dtype=torch.long)
    pair = (target[..., 0].long(), target[..., 1:]) if cls is MultiBoxLoss else (label, torch.rand(label.shape))
    if takes:
        assert loss(pred, pair).isfinite()
    for parts in [(*pair, label), pair[:1], (), (None, label)] + ([] if takes else [pair, (target, target)]):
        for form in (parts, list(parts)):
            with pytest.raises(ValueError, match=r"must be a tensor or a pair|not a tuple"):
                loss(pred, form)


def test_a_tuple_is_refused_beside_a_third_argument():
    pred, target = torch.rand(2, 3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="UncertaintyKLLoss must be one tensor, not a tuple"):
        UncertaintyKLLoss()(pred, (target, target), pred)


def test_gaussian_focal_loss_on_heatmaps():
    loss = build_loss({"type": "GaussianFocalLoss"})
    maps = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert loss(maps, maps, reduction_override="none").shape == maps.shape
    for sure in (torch.zeros(1, 2), torch.ones(1, 2)):
        finite(loss, sure, torch.tensor([[1.0, 0.5]]))
    with pytest.raises(ValueError, match="heatmaps of one shape"):
        loss(maps, maps[0])
    with pytest.raises(ValueError, match="not a tuple"):
        loss(maps, (LABEL, QUALITY))


def test_generalized_focal_loss_between_other_values(logits):
    """Without its factor it is the distribution focal loss of two bins, and it has the shape of pred, any shape."""
    loss = GeneralizedFocalLoss(beta=0.0, values=(2.0, 3.0), reduction="none")
    target = torch.tensor([2.0, 2.3, 2.9, 3.0])
    bins = torch.stack([torch.zeros(4), logits[:, 0]], -1)
    torch.testing.assert_close(loss(logits[:, 0], target), DistributionFocalLoss(reduction="none")(bins, target - 2.0))
    # |y - m| in the unit of the values: twice the width, 2^(1 + beta) times the loss.
    wide, unit = (GeneralizedFocalLoss(values=v, reduction="sum") for v in ((0.0, 2.0), (0.0, 1.0)))
    torch.testing.assert_close(wide(logits, 2 * DENSE), 8 * unit(logits, DENSE))
    for form in (LABEL, (LABEL, QUALITY)):
        with pytest.raises(ValueError, match="targets of the shape of pred"):
            loss(logits, form)


def test_gradient_of_asymmetric_loss_with_focusing():
    pred, target = (x.double() for x in sample(build_loss({"type": "AsymmetricLoss"}), 6))
    for clip in (0.0, 0.05):
        loss = build_loss({"type": "AsymmetricLoss", "clip": clip, "detach_focusing": False, "reduction": "none"})
        assert torch.autograd.gradcheck(lambda p, loss=loss: loss(p, target), pred.requires_grad_())


def test_root_mean_squared_error_without_an_error():
    loss, target = build_loss({"type": "RMSELoss"}), torch.tensor([1.0, 2.0])
    for reduction in ("mean", "sum", "none"):
        pred = target.clone().requires_grad_()
        value = loss(pred, target, reduction_override=reduction).sum()
        assert value == 0
        assert torch.equal(torch.autograd.grad(value, pred)[0], torch.zeros(2))
    assert loss(torch.full((2,), float("nan")), target).isnan()


@pytest.mark.parametrize("name", ["L1Loss", "MSELoss", "RMSELoss", "SmoothL1Loss", "HuberLoss", "BalancedL1Loss"])
def test_extreme_regression(name):
    loss = build_loss({"type": name})
    for size in (0.0, 1e-30, 1.0, 1e4):
        for dtype in (torch.float64, torch.float32, torch.float16):
            finite(loss, torch.tensor([size, -size]).to(dtype), torch.zeros(2))
    with pytest.raises(ValueError, match="one shape"):
        loss(torch.zeros(2), torch.zeros(3))


def test_activated_equals_logits(logits):
    for name in ("BinaryCrossEntropyLoss", "FocalLoss", "QualityFocalLoss"):
        from_logits = build_loss({"type": name})(logits, DENSE)
        torch.testing.assert_close(build_loss({"type": name, "activated": True})(logits.sigmoid(), DENSE), from_logits)
    softmax = FocalLoss(use_sigmoid=False, activated=True)(logits.softmax(-1), LABEL % 3)
    torch.testing.assert_close(softmax, FocalLoss(use_sigmoid=False)(logits, LABEL % 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["BinaryCrossEntropyLoss", "FocalLoss", "QualityFocalLoss"])
def test_activated_in_half_precision(name, dtype, logits):
    """The one form that torch's autocast refuses: probabilities. It computes in float32 like every other."""
    loss = build_loss({"type": name, "activated": True})
    scores = logits.sigmoid().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(scores, DENSE)
    assert value.dtype == torch.float32
    assert value == loss(scores.float(), DENSE)
    assert torch.autograd.grad(value, scores)[0].isfinite().all()


@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_ignoring_is_mmdets(use_sigmoid, avg_non_ignore, logits):
    from mmdet.models.losses import CrossEntropyLoss as UPSTREAM

    settings = {"use_sigmoid": use_sigmoid, "avg_non_ignore": avg_non_ignore, "ignore_index": 1}
    weight = torch.tensor([1.0, 0.5, 2.0, 0.3])
    for label in (torch.tensor([0, 1, 2, 1]), torch.tensor([0, 2, 2, 0]), torch.ones(4, dtype=torch.long)):
        for kwargs in ({}, {"weight": weight}, {"weight": weight, "avg_factor": 3.0}, {"reduction_override": "sum"}):
            ours = CrossEntropyLoss(**settings)(logits, label, **kwargs)
            torch.testing.assert_close(ours, UPSTREAM(**settings)(logits, label, **kwargs))


@pytest.mark.parametrize("use_sigmoid", [False, True])
def test_ignore_index(use_sigmoid, logits):
    label = torch.tensor([0, 1, 2, 1])
    kept = label != 1
    everywhere = CrossEntropyLoss(use_sigmoid=use_sigmoid, ignore_index=1)
    valid_only = CrossEntropyLoss(use_sigmoid=use_sigmoid, ignore_index=1, avg_non_ignore=True)
    plain = CrossEntropyLoss(use_sigmoid=use_sigmoid)
    torch.testing.assert_close(valid_only(logits, label), plain(logits[kept], label[kept]))
    torch.testing.assert_close(everywhere(logits, label), plain(logits[kept], label[kept]) / 2)
    if use_sigmoid:
        quality = torch.full((4,), 0.5)
        torch.testing.assert_close(
            valid_only(logits, (label, quality)), plain(logits[kept], (label[kept], quality[kept]))
        )
    nothing = torch.ones(4, dtype=torch.long)
    assert valid_only(logits.requires_grad_(), nothing) == 0
    valid_only(logits, nothing).backward()


def test_labels_below_zero_and_the_ignored_one_cost_nothing(logits):
    label = torch.tensor([0, -1, 255, -100])
    rows = CrossEntropyLoss(ignore_index=255)(logits, label, reduction_override="none")
    assert (rows == 0).tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    "cfg",
    [
        {"type": "FocalLoss", "gamma": 0.5},
        {"type": "FocalLoss", "gamma": 0.5, "use_sigmoid": False},
        {"type": "FocalLoss", "gamma": 0.0},
        {"type": "VarifocalLoss", "gamma": 0.5},
        {"type": "QualityFocalLoss", "beta": 0.5},
        {"type": "GeneralizedFocalLoss", "beta": 0.5},
        {"type": "PolyLoss", "gamma": 0.5},
        {"type": "PolyLoss", "gamma": 0.5, "use_sigmoid": False},
        {"type": "ModifiedCrossEntropyLoss", "gamma": 0.5},
        {"type": "ModifiedCrossEntropyLoss", "gamma": 0.5, "activation": "softmax"},
        {"type": "AsymmetricLoss", "gamma_neg": 0.5, "gamma_pos": 0.5, "clip": 0.0, "detach_focusing": False},
        {"type": "AsymmetricLoss", "clip": 1e-9, "detach_focusing": False},
    ],
    ids=str,
)
def test_powers_below_one_have_finite_gradients(cfg):
    """Where the base of the power is exactly zero its slope is infinite: confident logits, a quality met exactly."""
    pred = torch.tensor([[1e4, -1e4, -1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    dense = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]])
    target = torch.tensor([0, 1]) if cfg.get("use_sigmoid") is False else dense
    value = build_loss(cfg)(pred, target)
    assert value.isfinite()
    assert torch.autograd.grad(value, pred)[0].isfinite().all()


def test_alpha_per_class(logits):
    alpha = torch.tensor([0.5, 1.0, 2.0])
    plain = FocalLoss(use_sigmoid=False, alpha=None, reduction="none")
    balanced = FocalLoss(use_sigmoid=False, alpha=[0.5, 1.0, 2.0], reduction="none")
    label = LABEL % 3
    torch.testing.assert_close(balanced(logits, label), alpha[label] * plain(logits, label))
    torch.testing.assert_close(balanced(logits, DENSE[[0, 1, 3, 3]]), balanced(logits, torch.tensor([0, 2, 1, 1])))
    sigmoid = FocalLoss(alpha=[0.3, 0.5, 0.9], reduction="none")(logits, LABEL)
    for column, value in enumerate([0.3, 0.5, 0.9]):
        torch.testing.assert_close(
            sigmoid[:, column], FocalLoss(alpha=value, reduction="none")(logits, LABEL)[:, column]
        )
    with pytest.raises(ValueError, match="2 values were given for 3 classes"):
        FocalLoss(alpha=[0.3, 0.5])(logits, LABEL)


def test_softmax_form_refuses_quality(logits):
    for loss in (CrossEntropyLoss(), FocalLoss(use_sigmoid=False), PolyLoss(use_sigmoid=False)):
        with pytest.raises(ValueError, match="use_sigmoid=True"):
            loss(logits, (LABEL, QUALITY))


def test_bad_settings_fail_at_construction():
    for cfg, words in (
        ({"type": "SmoothL1Loss", "beta": -1.0}, "at least 0"),
        ({"type": "BinaryCrossEntropyLoss", "activated": True, "pos_weight": 2.0}, "pos_weight"),
        ({"type": "BalancedCrossEntropyLoss", "alpha": "automatic"}, '"auto" or a number'),
        ({"type": "BalancedCrossEntropyLoss", "alpha": 2}, r"in \[0, 1\]"),
        ({"type": "BalancedCrossEntropyLoss", "alpha": None}, r"in \[0, 1\]"),
        ({"type": "KLDivLoss", "temperature": 0}, "above 0"),
        ({"type": "ModifiedCrossEntropyLoss", "activation": "tanh"}, '"sigmoid" or "softmax"'),
        ({"type": "ModifiedCrossEntropyLoss", "activation": "softmax", "use_sigmoid": True}, "use_sigmoid=False"),
        ({"type": "PolyLoss", "epsilon": -1.5}, "at least -1"),
        ({"type": "AsymmetricLoss", "clip": 1.0}, r"\[0, 1\)"),
        ({"type": "HuberLoss", "delta": 0.0}, "delta"),
        ({"type": "BalancedL1Loss", "beta": 0.0}, "beta"),
        ({"type": "BalancedL1Loss", "alpha": -0.5}, "alpha"),
        ({"type": "BalancedL1Loss", "alpha": 0.01}, "gamma of BalancedL1Loss must be at most 80 alpha, 0.8, not 1.5"),
        ({"type": "FocalLoss", "alpha": [0.5, 1.0, 2.0]}, r"alpha of FocalLoss must be in \[0, 1\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            build_loss(cfg)


def test_distribution_targets_are_clamped_not_changed():
    pred = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([-3.0, 0.0, 7.0, 7.9, float("inf")])
    before = target.clone()
    rows = DistributionFocalLoss(reduction="none")(pred, target)
    assert torch.equal(target, before)
    log_p = pred.log_softmax(-1)
    torch.testing.assert_close(rows, -torch.stack([log_p[0, 0], log_p[1, 0], log_p[2, 7], log_p[3, 7], log_p[4, 7]]))
    assert DistributionFocalLoss()(pred, target.fill_(float("nan"))).isnan()
    with pytest.raises(ValueError, match="bins"):
        DistributionFocalLoss()(pred, torch.rand(5, 4))


# ---- what a target may hold ----

CLASS_LOSSES = {str(cfg): cfg for cfg in EVERY} | {
    name: {"type": name} for name, cls in registered_losses().items() if cls.facts.family == "ranking"
}


@pytest.mark.parametrize("cfg", CLASS_LOSSES.values(), ids=CLASS_LOSSES)
def test_what_is_negative_in_a_dense_target_is_ignored(cfg, logits):
    """Value and gradient are those of a call in which its weight is zero; of a softmax, the row's."""
    loss = build(cfg, reduction="sum", **({"momentum": 0.0} if cfg["type"] == "GHMC" else {}))
    rows = cfg in SOFTMAX and cfg["type"] != "ModifiedCrossEntropyLoss"
    for value in (-1.0, -100.0):
        dense = DENSE[[0, 1, 3, 3]].clone()
        dense[1, 0] = dense[3, 1] = value
        weight = (dense >= 0).all(-1, keepdim=True).expand_as(dense) if rows else dense >= 0
        found = []
        for target, kwargs in ((dense, {}), (dense.clamp(min=0), {"weight": weight[:, 0] if rows else weight})):
            pred = logits.clone().requires_grad_()
            if kwargs and not rows and loss.facts.sums_classes:  # they are weighed by row: here class by class
                total = masked_sum(loss, pred, target, weight)
            else:
                total = loss(pred, target, **{k: w.float() for k, w in kwargs.items()})
            found.append((total.detach(), torch.autograd.grad(total, pred)[0]))
        torch.testing.assert_close(*found)
        if rows or loss.use_sigmoid:  # a softmax has all logits in every element
            assert (found[0][1][~weight] == 0).all()


def masked_sum(loss, pred, target, weight):
    """The sum of the elements that count, of a loss that sums over the classes."""
    seen = loss.observe(pred, target, None)
    elements, _ = loss.unweighted(pred, target, seen)
    return (loss.loss_weight * elements * weight).sum()


@pytest.mark.parametrize("name", ["BinaryCrossEntropyLoss", "FocalLoss", "QualityFocalLoss"])
def test_what_is_negative_is_ignored_beside_probabilities(name, logits):
    """Torch itself refuses such a target there."""
    loss = build_loss({"type": name, "activated": True, "reduction": "sum"})
    dense = torch.where(torch.arange(4).unsqueeze(-1) == 1, -1.0, DENSE)
    kept = [0, 2, 3]
    torch.testing.assert_close(loss(logits.sigmoid(), dense), loss(logits[kept].sigmoid(), DENSE[kept]))


def test_negatives_between_other_values_are_numbers():
    loss = GeneralizedFocalLoss(values=(-1.0, 1.0), reduction="none")
    assert loss(torch.zeros(1), torch.tensor([-0.5])) > 0
    loss = GeneralizedFocalLoss(values=(0.0, 2.0), reduction="none")  # between these none is, and one is ignored
    assert (loss(torch.zeros(2), torch.tensor([-1.0, 0.5])) != 0).tolist() == [False, True]


@pytest.mark.parametrize("cfg", CLASS_LOSSES.values(), ids=CLASS_LOSSES)
def test_a_label_that_is_too_large(cfg, logits):
    loss = build(cfg)
    last = 2 if cfg in SOFTMAX and cfg["type"] != "ModifiedCrossEntropyLoss" else 3
    loss(logits, torch.tensor([0, last, -1, -100]))
    for label in (torch.tensor([0, last + 1, 1, 2]), torch.tensor([0, 255, 1, 2], dtype=torch.uint8)):
        for _ in range(25):  # in every call, and not in the first alone
            with pytest.raises(ValueError, match=f"takes labels up to {last}, not {label.max()}"):
                loss(logits, label)
    if last == 3:
        with pytest.raises(ValueError, match="labels up to 3, not 4"):
            loss(logits, (torch.tensor([0, 4, 1, 2]), QUALITY))


def test_labels_of_losses_with_channels_of_their_own():
    logits = torch.randn(2, 5)
    seesaw = build_loss({"type": "SeesawLoss", "num_classes": 3, "return_dict": False})
    seesaw(logits, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="labels up to 3, not 4"):
        seesaw(logits, torch.tensor([0, 4]))
    over = build_loss({"type": "ConfidenceWeightedLoss", "base": {"type": "CrossEntropyLoss", "ignore_index": 255}})
    over(logits, torch.tensor([4, 255]))
    with pytest.raises(ValueError, match=r"CrossEntropyLoss .* labels up to 4, not 5"):
        over(logits, torch.tensor([0, 5]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("use_sigmoid", [False, True])
def test_an_ignored_label_may_be_any(use_sigmoid, dtype, logits):
    loss = CrossEntropyLoss(use_sigmoid=use_sigmoid, ignore_index=255, reduction="none")
    rows = loss(logits, torch.tensor([0, 255, 1, 255], dtype=dtype)).reshape(4, -1).sum(-1)
    assert (rows == 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("cls", [c for c in registered_losses().values() if c.facts.family == "region"])
def test_masks_of_0_and_255(cls):
    pred, target = sample(cls, 8)
    for wrong in (255 * target, (255 * target).byte(), target - 1):
        with pytest.raises(ValueError, match=r"masks of values in \[0, 1\], not from"):
            cls()(pred, wrong)


@pytest.mark.parametrize("cls", [c for c in registered_losses().values() if c.facts.family == "rotated"])
def test_encoded_deltas_of_rotated_boxes(cls):
    deltas = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="reg_decoded_bbox=True"):
        cls()(deltas, deltas.flip(0))
    pred, target = sample(cls, 64)
    target[:3, 2] *= -1  # an annotation or two may be wrong
    cls()(pred, target)


@pytest.mark.parametrize("name", ["QualityFocalLoss", "VarifocalLoss", "GeneralizedFocalLoss", "RankSortLoss"])
def test_a_quality_a_row(name, logits):
    loss = build_loss({"type": name})
    assert loss(logits, (LABEL, QUALITY.unsqueeze(-1))) == loss(logits, (LABEL, QUALITY))
    for wrong in (QUALITY[:3], QUALITY.reshape(2, 2), QUALITY.expand(4, 4), torch.tensor(0.5)):
        with pytest.raises(ValueError, match=r"one quality a label, \(4,\), not"):
            loss(logits, (LABEL, wrong))


WHOLE = {name: cls for name, cls in registered_losses().items() if cls.facts.family in ("box", "regression", "rotated")}


@pytest.mark.parametrize("cls", WHOLE.values(), ids=WHOLE)
def test_predictions_of_whole_numbers(cls):
    pred, target = sample(cls, 16)
    pred = pred.round()
    torch.testing.assert_close(cls.make()(pred.long(), target), cls.make()(pred, target))


def test_vmap_from_the_first_call_on():
    for name in ("CIoULoss", "FocalLoss", "ProbIoULoss"):
        pred, target = sample(registered_losses()[name], 6)
        pred, target = pred.unflatten(0, (2, 3)), target.unflatten(0, (2, 3))
        found = torch.vmap(lambda p, t, name=name: build_loss({"type": name})(p, t))(pred, target)
        torch.testing.assert_close(
            found, torch.stack([build_loss({"type": name})(*x) for x in zip(pred, target, strict=True)])
        )


@pytest.mark.parametrize("use_sigmoid", [False, True])
def test_where_nothing_is_ignored_the_count_is_that_of_all(use_sigmoid):
    """A dense target, whole and in chunks, some of which have rows that are ignored."""
    torch.manual_seed(0)
    pred, target = torch.randn(100, 10), torch.rand(100, 10).softmax(-1)
    counting, plain = (CrossEntropyLoss(use_sigmoid=use_sigmoid, avg_non_ignore=flag) for flag in (True, False))
    torch.testing.assert_close(counting(pred, target), plain(pred, target))
    target[:7] = -1
    expected = plain(pred[7:], target[7:])
    torch.testing.assert_close(counting(pred, target), expected)
    with small_chunks("cpu", 160):
        torch.testing.assert_close(counting(pred, target), expected)
