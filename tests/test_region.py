"""Mask losses: worked numbers, gradients from the papers' formulas, identities, and masks at the ends."""

import pytest
import torch

from detloss_plugins import build_loss
from detloss_plugins.losses import DiceLoss, JaccardLoss, TverskyLoss
from detloss_plugins.testing import sample

P, T = [0.9, 0.2, 0.6, 0.1], [1.0, 0.0, 1.0, 0.0]
# settings and the loss of P and T, computed from the papers' formulas outside this package, to 6 digits
WORKED = [
    ({"type": "JaccardLoss"}, 0.347826),
    ({"type": "DiceLoss", "eps": 0.0}, 0.068323),
    ({"type": "DiceLoss"}, 0.068901),
    ({"type": "DiceLoss", "eps": 0.0, "naive_dice": True}, 0.210526),
    ({"type": "DiceLoss", "naive_dice": True}, 0.210471),
    ({"type": "TverskyLoss"}, 0.226804),
    ({"type": "TverskyLoss", "alpha": 0.5, "beta": 0.5}, 0.210526),
    ({"type": "TverskyLoss", "alpha": 1.0, "beta": 1.0}, 0.347826),
    ({"type": "TverskyLoss", "gamma": 4 / 3}, 0.328653),
]
LOSSES = [{"type": "DiceLoss"}, {"type": "DiceLoss", "naive_dice": True}, {"type": "JaccardLoss"}]
LOSSES += [{"type": "JaccardLoss", "smooth": 1.0}, {"type": "TverskyLoss"}, {"type": "TverskyLoss", "gamma": 4 / 3}]

every_loss = pytest.mark.parametrize("cfg", LOSSES, ids=lambda cfg: "-".join(map(str, cfg.values())))


def double(*masks):
    return [torch.tensor([mask], dtype=torch.float64) for mask in masks]


def result(cfg, pred, target):
    """The losses of each mask and the gradient of their sum."""
    pred = pred.detach().requires_grad_()
    value = build_loss({**cfg, "reduction": "none"})(pred, target)
    return value.detach(), torch.autograd.grad(value.sum(), pred)[0]


@pytest.mark.parametrize(("cfg", "expected"), WORKED, ids=str)
def test_worked_number(cfg, expected):
    pred, target = double(P, T)
    for given, activate in ((pred, False), (pred.logit(), True)):
        value, _ = result({**cfg, "activate": activate}, given, target)
        assert value.item() == pytest.approx(expected, abs=6e-7)  # half a unit of the sixth printed decimal


def gradient_formula(cfg, p, t):
    """dL/dp as the papers' formulas give it, for soft masks too."""
    tp, fp, fn = (p * t).sum(), (p * (1 - t)).sum(), ((1 - p) * t).sum()
    if cfg["type"] == "JaccardLoss":
        s, u = cfg.get("smooth", 0.0), tp + fp + fn
        return -(t * (u + s) - (tp + s) * (1 - t)) / (u + s) ** 2
    if cfg["type"] == "TverskyLoss":
        d = tp + 0.3 * fp + 0.7 * fn
        plain = -(t * d - tp * (t + 0.3 * (1 - t) - 0.7 * t)) / d**2
        return plain if "gamma" not in cfg else 0.75 * (1 - tp / d) ** -0.25 * plain
    if cfg.get("naive_dice"):
        d = p.sum() + t.sum() + 1e-3
        return -2 * t / d + (2 * tp + 1e-3) / d**2
    d = (p * p).sum() + (t * t).sum() + 2e-3
    return -2 * t / d + 4 * p * tp / d**2


@every_loss
@pytest.mark.parametrize("soft", [False, True])
def test_gradient_formula(cfg, soft):
    pred, target = double(P, [0.8, 0.1, 1.0, 0.3] if soft else T)
    _, gradient = result({**cfg, "activate": False}, pred, target)
    torch.testing.assert_close(gradient, gradient_formula(cfg, pred, target))


def test_tversky_weighs_false_positives_by_alpha():
    """Some libraries swap the two: a mask twice too large has FP only, one half too small FN only."""
    large, small = double([1.0, 1.0], [1.0, 0.0])
    loss = TverskyLoss(activate=False)
    assert loss(large, small).item() == pytest.approx(0.3 / 1.3)
    assert loss(small, large).item() == pytest.approx(0.7 / 1.7)


@pytest.mark.parametrize(
    ("ours", "same"),
    [
        (TverskyLoss(alpha=0.5, beta=0.5), DiceLoss(naive_dice=True, eps=0.0)),
        (TverskyLoss(alpha=1.0, beta=1.0), JaccardLoss()),
    ],
    ids=["Dice", "Jaccard"],
)
def test_tversky_contains_the_others(ours, same):
    pred, target = sample(TverskyLoss, 64, dtype=torch.float64)
    # Σp + Σt = 2 TP + FP + FN holds for soft masks too.
    for masks in (target, 0.8 * target + 0.1):
        torch.testing.assert_close(
            *(loss(pred, masks, reduction_override="none") for loss in (ours, same)), rtol=1e-12, atol=1e-12
        )


def test_jaccard_is_a_function_of_dice():
    pred, target = sample(JaccardLoss, 64, dtype=torch.float64)
    dice = DiceLoss(naive_dice=True, eps=0.0)(pred, target, reduction_override="none")
    torch.testing.assert_close(JaccardLoss()(pred, target, reduction_override="none"), 2 * dice / (1 + dice))


def test_sums_run_over_all_dimensions_but_the_first():
    for cfg in LOSSES:
        pred, target = sample(DiceLoss, 6)
        loss = build_loss({**cfg, "reduction": "none"})
        rows = loss(pred, target)
        assert rows.shape == (6,)
        torch.testing.assert_close(loss(pred.reshape(6, 2, 32), target.reshape(6, 2, 32)), rows)
        torch.testing.assert_close(torch.cat([loss(pred[i : i + 1], target[i : i + 1]) for i in range(6)]), rows)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
@every_loss
def test_targets_of_any_type(cfg, dtype):
    """SOLO's masks are bytes, MaskFormer's whole numbers."""
    pred, target = sample(DiceLoss, 6)
    loss = build_loss(cfg)
    assert loss(pred, target.to(dtype)) == loss(pred, target)


# Logits and masks at the ends: what the loss is there, by the formula.
SURE = 1e4
ENDS = {
    "perfect": ([SURE, -SURE], [1.0, 0.0]),
    "all ones, perfect": ([SURE, SURE], [1.0, 1.0]),
    "all wrong": ([-SURE, SURE], [1.0, 0.0]),
    "nothing predicted": ([-SURE, -SURE], [1.0, 0.0]),
    "empty mask": ([SURE, -SURE], [0.0, 0.0]),
    "both empty": ([-SURE, -SURE], [0.0, 0.0]),
    "empty mask, undecided": ([0.0, 0.0], [0.0, 0.0]),
    "empty mask, nearly nothing": ([-88.0, -88.0], [0.0, 0.0]),
    "infinite logits": ([float("inf"), -float("inf")], [1.0, 0.0]),
}


@pytest.mark.parametrize("case", ENDS)
@every_loss
def test_finite_at_the_ends(cfg, case):
    pred, target = ENDS[case]
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for activate in (True, False):
            given = torch.tensor([pred])
            given = given.clamp(-6e4, 6e4).to(dtype) if activate else given.sigmoid().to(dtype)
            value, gradient = result({**cfg, "activate": activate}, given, torch.tensor([target]))
            assert 0 <= value <= 1
            assert gradient.isfinite().all()


@every_loss
def test_a_denormal_probability_of_an_empty_mask(cfg):
    """Its inverse is infinite."""
    value, gradient = result({**cfg, "activate": False}, torch.tensor([[1e-42, 0.0]]), torch.zeros(1, 2))
    assert value.isfinite()
    assert gradient.isfinite().all()


@every_loss
def test_value_at_the_ends(cfg):
    dice = cfg["type"] == "DiceLoss"
    vnet = dice and not cfg.get("naive_dice")
    smooth = cfg.get("smooth", 1e-3 if dice and not vnet else 0.0)  # in numerator and denominator
    eps = 2e-3 if vnet else 0.0  # in the denominator only
    wrong = {"perfect": 0, "all ones, perfect": 0, "both empty": 0, "all wrong": 2, "nothing predicted": 1}
    right = {"perfect": 1, "all ones, perfect": 2}
    for case, error in {**wrong, "empty mask": 1}.items():
        true = (2 if dice else 1) * right.get(case, 0)
        if cfg["type"] == "TverskyLoss":
            error = {"all wrong": 1.0, "nothing predicted": 0.7, "empty mask": 0.3}.get(case, 0)
        total = error + true + smooth + eps
        expected = (error + eps) / total if total else 0.0
        expected **= 1 / cfg.get("gamma", 1.0)
        pred, target = double(*ENDS[case])
        assert result(cfg, pred, target)[0].item() == pytest.approx(expected, abs=1e-12), case


def test_empty_masks_are_as_in_mmdet():
    """An empty prediction of an empty mask costs 1 in the V-Net form and 0 in the other."""
    pred, target = double(*ENDS["both empty"])
    assert DiceLoss()(pred, target) == 1
    assert DiceLoss(naive_dice=True)(pred, target) == 0


@pytest.mark.parametrize("gamma", [4 / 3, 4.0, 0.5])
def test_focal_power_at_no_loss(gamma):
    """The slope of a root is infinite at zero."""
    target = torch.tensor([[1.0, 0.0]])
    value, gradient = result({"type": "TverskyLoss", "gamma": gamma, "activate": False}, target.clone(), target)
    assert value == 0
    assert gradient.isfinite().all()


def test_nearly_perfect_masks_keep_their_digits():
    """``1 - TP / all`` in float32 is rounding noise where the loss is small; the root of it would be far off."""
    # float32's last number below 1, so that FN is exact.
    pred, target = torch.full((1, 10000), 1 - 2**-24), torch.ones(1, 10000)
    loss = TverskyLoss(activate=False)(pred, target)
    assert loss.item() == pytest.approx(0.7 * 2**-24, rel=1e-5)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_half_precision_masks(cfg, dtype):
    """640 x 640 pixels: the sums overflow float16 and vanish beside each other in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand(1, 640, 640, generator=generator) < 0.5).to(dtype)
    pred = (4 * target - 2 + torch.randn(1, 640, 640, generator=generator)).to(dtype)
    value, gradient = result(cfg, pred, target)
    expected, _ = result(cfg, pred.double(), target.double())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradient.isfinite().all()
    if dtype is torch.float16:
        assert target.sum().isinf(), "the trap is there"


@every_loss
def test_no_pixels_and_no_masks(cfg):
    for shape in ((0, 4, 4), (3, 0)):
        value, gradient = result(cfg, torch.zeros(shape), torch.zeros(shape))
        assert value.shape == shape[:1]
        assert gradient.shape == shape
        assert value.isfinite().all()


@every_loss
def test_a_step_down_the_gradient_lowers_the_loss(cfg):
    pred, target = sample(DiceLoss, 64, dtype=torch.float64)
    some = target.flatten(1).sum(1) > 0
    value, gradient = result(cfg, pred, target)
    after, _ = result(cfg, pred - 0.1 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None], target)
    assert (after < value)[some].all()


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ({"type": "DiceLoss", "use_sigmoid": False}, "use_sigmoid=True, or activate=False"),
        ({"type": "DiceLoss", "eps": -1.0}, "eps of DiceLoss must be a number of at least 0"),
        ({"type": "JaccardLoss", "smooth": -1.0}, "smooth of JaccardLoss must be a number of at least 0"),
        ({"type": "TverskyLoss", "alpha": -0.1}, "alpha of TverskyLoss must be a number of at least 0"),
        ({"type": "TverskyLoss", "gamma": 0.0}, "gamma of TverskyLoss must be a number above 0"),
    ],
    ids=str,
)
def test_wrong_settings(cfg, words):
    with pytest.raises(ValueError, match=words):
        build_loss(cfg)


def test_probabilities_need_no_activation():
    loss = build_loss({"type": "DiceLoss", "use_sigmoid": False, "activate": False})
    assert loss(*double(T, T)) == build_loss({"type": "DiceLoss"})(1e4 * double(T, T)[0] - 5e3, double(T)[0])


@every_loss
@pytest.mark.parametrize(("pred", "target"), [((2, 10, 4, 4), (2, 4, 4)), ((2, 1, 4, 4), (2, 4, 4)), ((2,), (2,))])
def test_wrong_shapes(cfg, pred, target):
    with pytest.raises(ValueError, match=r"one shape \(N, \.\.\.\).*use_mask=True"):
        build_loss(cfg)(torch.zeros(pred), torch.zeros(target))
