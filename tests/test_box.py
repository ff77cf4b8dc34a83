"""What is particular to one box loss: options, state, and errors that come before a training starts."""

import itertools

import pytest
import torch

from detloss_plugins import build_loss
from detloss_plugins.loss import average_state
from detloss_plugins.losses import CIoULoss, FocalEfficientIoULoss, IoULoss, MPDIoULoss, NWDLoss, WIoULoss
from detloss_plugins.registry import registered_losses
from detloss_plugins.testing import sample

BOX_LOSSES = [cls for cls in registered_losses().values() if cls.facts.family == "box"]


def boxes(dtype=torch.float64, n=32, seed=0):
    pred, target = sample(CIoULoss, n, seed, dtype)
    return pred.requires_grad_(), target


def gradient(loss, pred, target):
    return torch.autograd.grad(loss(pred, target, reduction_override="sum"), pred)[0]


def test_gradients_of_the_iou_modes():
    pred, target = boxes()
    iou = 1 - IoULoss(mode="linear", reduction="none")(pred, target).detach().unsqueeze(-1)
    linear = gradient(IoULoss(mode="linear"), pred, target)
    overlap = (iou > 0).squeeze()
    torch.testing.assert_close(gradient(IoULoss(mode="square"), pred, target), 2 * iou * linear)
    torch.testing.assert_close(gradient(IoULoss(), pred, target)[overlap], (linear / iou)[overlap])


@pytest.mark.parametrize("cls", BOX_LOSSES, ids=lambda cls: cls.__name__)
def test_encoded_deltas_are_refused(cls):
    """Deltas of a box coder hover about zero; boxes with a wrong annotation or two, and small batches, go through."""
    loss = cls.make()
    pred, target = sample(cls, 64)
    wrong = target.clone()
    wrong[:3] = wrong[:3, [2, 3, 0, 1]]
    loss(pred, wrong)
    deltas = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    cls.make()(pred[:3], wrong[:3])
    with pytest.raises(
        ValueError, match=r"reg_decoded_bbox=True.*no such setting \(FoveaHead\) takes a point-wise loss"
    ):
        cls.make()(deltas, deltas.flip(0))
    few = cls.make()
    with pytest.raises(ValueError, match="reg_decoded_bbox=True"):
        [few(row[None], row[None]) for row in deltas]  # a head that finds one positive a batch


def test_encoded_deltas_are_refused_by_the_parts_of_a_joint_loss():
    deltas = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    for reduction in ("none", "mean", "sum"):
        joint = build_loss({"type": "JointLoss", "losses": [{"type": "CIoULoss"}, {"type": "NWDLoss"}]})
        with pytest.raises(ValueError, match="reg_decoded_bbox=True"):
            joint(deltas, deltas.flip(0), reduction_override=reduction)


def test_targets_are_looked_at_in_the_first_calls_only():
    """Each look makes the host wait for the device."""
    loss = CIoULoss()
    pred, target = sample(CIoULoss, 64)
    for _ in range(30):
        loss(pred[:1], target[:1])
    loss(pred, target[:, [2, 3, 0, 1]])
    loss = CIoULoss()
    for _ in range(100):
        loss(pred[:0], target[:0])
    with pytest.raises(ValueError, match="reg_decoded_bbox"):
        loss(pred, target[:, [2, 3, 0, 1]])


def test_focal_eiou_floor_keeps_disjoint_boxes_alive():
    pred = torch.tensor([[0.0, 0, 2, 2]], requires_grad=True)
    target = torch.tensor([[4.0, 3, 6, 7]])
    assert (gradient(FocalEfficientIoULoss(), pred, target) == 0).all(), "as published"
    pull = gradient(FocalEfficientIoULoss(floor=0.1), pred, target)
    torch.testing.assert_close(pull, 0.1 * gradient(build_loss({"type": "EIoULoss"}), pred, target))


def running_mean(loss):
    return loss.mean.item()


def iou_losses(pred, target):
    return IoULoss(mode="linear", reduction="none")(pred, target).detach()


def test_wiou_mean_moves_before_it_is_used():
    pred, target = boxes(torch.float32)
    loss = WIoULoss(momentum=0.25)
    value = loss(pred, target)
    assert running_mean(loss) == pytest.approx(0.75 + 0.25 * iou_losses(pred, target).mean().item())
    frozen = WIoULoss().eval()
    frozen.mean.copy_(loss.mean)
    assert value == frozen(pred, target)


@pytest.mark.parametrize("form", ["row", "column", "four"])
def test_wiou_counts_boxes_of_weight_above_zero_only(form):
    """mmdet's dense heads hand over every anchor, with weight 0 for the negatives."""
    pred, target = boxes(torch.float32)
    weight = (torch.arange(len(pred)) % 4 == 0).float()
    loss = WIoULoss(momentum=1.0)
    loss(pred, target, {"row": weight, "column": weight[:, None], "four": weight[:, None].expand(-1, 4)}[form])
    assert running_mean(loss) == pytest.approx(iou_losses(pred, target)[::4].mean().item())
    before = running_mean(loss)
    loss(pred, target, torch.zeros(len(pred)))
    assert running_mean(loss) == before, "nothing counts"


def test_wiou_inside_another_loss_keeps_its_state():
    loss = build_loss({"type": "InnerIoULoss", "base": {"type": "WIoULoss", "momentum": 1.0}})
    pred, target = boxes(torch.float32)
    weight = (torch.arange(len(pred)) % 2).float()
    loss(pred, target, weight)
    expected = iou_losses(pred, target)[1::2].mean().item()
    assert loss.state_dict()["base.mean"].item() == pytest.approx(expected)
    loss.eval()
    loss(pred, target)
    assert loss.state_dict()["base.mean"].item() == pytest.approx(expected)


@pytest.mark.parametrize("version", [2, 3])
def test_the_focusing_of_wiou_is_a_constant(version):
    """Its gradient is that of version 1, times the factor."""
    pred, target = boxes()
    plain, focused = WIoULoss(version=1, reduction="none"), WIoULoss(version=version, reduction="none").eval()
    factor = (focused(pred, target) / plain(pred, target)).detach().unsqueeze(-1)
    assert factor.std() > 0.1
    torch.testing.assert_close(gradient(focused, pred, target), factor * gradient(plain, pred, target))


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("base", ["GCDLoss", "EIoULoss", "NWDLoss"])
def test_wise_over_a_base_multiplies_it_by_the_focusing_of_wiou(version, base):
    pred, target = boxes()
    base = {"type": base, "loss_weight": 0.7}
    losses = [{"type": "WIoULoss", "version": version, "base": base}, base, {"type": "WIoULoss", "version": version}]
    over, base, wise = (build_loss({**cfg, "reduction": "none"}).eval() for cfg in losses)
    factor = (wise(pred, target) / WIoULoss(version=1, reduction="none")(pred, target)).detach()
    torch.testing.assert_close(over(pred, target), factor * base(pred, target))
    expected = factor.unsqueeze(-1) * gradient(base, pred, target)
    torch.testing.assert_close(gradient(over, pred, target), expected)


def test_nested_wise_losses_have_a_state_each():
    """The outer and the inner mean move by their own momentum, by the same boxes."""
    within = {"type": "InnerIoULoss", "base": {"type": "WIoULoss", "momentum": 1.0, "base": {"type": "GIoULoss"}}}
    loss = build_loss({"type": "WIoULoss", "momentum": 0.5, "base": within})
    pred, target = boxes(torch.float32)
    loss(pred, target)
    mean = iou_losses(pred, target).mean().item()
    state = {name: value.item() for name, value in loss.state_dict().items()}
    assert state == pytest.approx({"mean": (1 + mean) / 2, "base.base.mean": mean})
    other = build_loss({"type": "WIoULoss", "momentum": 0.5, "base": within})
    other.load_state_dict(loss.state_dict())
    assert other.eval()(pred, target) == loss.eval()(pred, target)


def test_mpdiou_deep_inside_is_told_the_size_of_the_batch():
    inside = {"type": "InnerIoULoss", "base": {"type": "MPDIoULoss", "image_size": "batch"}}
    loss, pair = build_loss({"type": "WIoULoss", "version": 1, "base": inside}), boxes()
    with pytest.raises(ValueError, match=r"give MPDIoULoss \(height, width\)"):
        loss(*pair)
    loss.base.base.batch_image_size = torch.tensor([480.0, 640.0])
    inside["base"]["image_size"] = (480, 640)
    assert loss(*pair) == build_loss(inside)(*pair)


def test_wiou_version_1_has_no_state():
    assert not WIoULoss(version=1).state_dict()
    average_state(WIoULoss(version=1))


def test_mpdiou_must_know_the_image():
    for wrong in (640, (640, 0), (640, 640, 3), "input", None):
        with pytest.raises((TypeError, ValueError), match=r"image_size of MPDIoULoss must be \(height, width\)"):
            MPDIoULoss(image_size=wrong)
    with pytest.raises(ValueError, match=r"Give MPDIoULoss image_size=\(height, width\)"):
        MPDIoULoss()
    loss = MPDIoULoss(image_size="batch")
    pred, target = boxes()
    with pytest.raises(ValueError, match=r"give MPDIoULoss \(height, width\)"):
        loss(pred, target)
    loss.batch_image_size = torch.tensor([480.0, 640.0])
    assert loss(pred, target) == MPDIoULoss(image_size=(480, 640))(pred, target)


CIOU_AND_BOUNDED = {"type": "JointLoss", "losses": [{"type": "CIoULoss"}, {"type": "BoundedIoULoss"}]}


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"type": "AlphaIoULoss", "penalty": "eiou"}, '"iou", "giou", "diou" or "ciou"'),
        ({"type": "AlphaIoULoss", "alpha": 0}, "above 0"),
        ({"type": "WIoULoss", "version": 4}, "1, 2 or 3"),
        ({"type": "WIoULoss", "momentum": 0}, r"\(0, 1\]"),
        ({"type": "PowerfulIoULoss", "version": "2"}, "1 or 2, not '2'"),
        ({"type": "PowerfulIoULoss", "version": 3}, "1 or 2"),
        ({"type": "InnerIoULoss", "ratio": 0}, "above 0"),
        ({"type": "InnerIoULoss", "base": {"type": "FocalLoss"}}, "one value a box, not FocalLoss"),
        ({"type": "FocalerIoULoss", "base": {"type": "BoundedIoULoss"}}, "one value a box, not BoundedIoULoss"),
        ({"type": "FocalerIoULoss", "d": 0.5, "u": 0.5}, "below u=0.5"),
        ({"type": "WIoULoss", "base": {"type": "BoundedIoULoss"}}, "base of WIoULoss .* one value a box, not Bounded"),
        ({"type": "WIoULoss", "base": CIOU_AND_BOUNDED}, "base of WIoULoss .* one value a box, not JointLoss"),
        ({"type": "InterpIoULoss", "alpha": 1.5}, r"\[0, 1\]"),
        ({"type": "ScaleDynamicIoULoss", "area": 0}, "above 0"),
        ({"type": "FocalEIoULoss", "floor": 2.0}, r"\[0, 1\]"),
        ({"type": "SIoULoss", "theta": 0.5}, "at least 1"),
        ({"type": "ShapeIoULoss", "theta": 0.5}, "at least 1"),
        ({"type": "ExtendedIoULoss", "smooth_point": 0}, "above 0"),
        ({"type": "NWDLoss", "constant": 0}, "above 0"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_a_bad_setting_fails_when_the_loss_is_built(cfg, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build_loss(cfg)


BASES = [cls for cls in BOX_LOSSES if cls.facts.one_per_row]


@pytest.mark.parametrize("cls", BASES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("around", ["InnerIoULoss", "FocalerIoULoss"])
def test_inner_and_focaler_over_any_base(around, cls):
    """``base + IoU - other``, where the plain form is ``1 - other``."""
    pred, target = boxes()
    base = {"type": cls.__name__, "loss_weight": 0.7, **cls.facts.example}
    rows = lambda cfg: build_loss({**cfg, "reduction": "none"}).eval()(pred, target)  # noqa: E731
    combined, plain = rows({"type": around, "base": base}), rows({"type": around, "base": None})
    torch.testing.assert_close(combined, rows(base) + plain - iou_losses(pred, target))


def test_focaler_iou_stays_between_0_and_1():
    pred, target = torch.tensor([[0.0, 0, 2, 2]] * 3), torch.tensor([[4.0, 3, 6, 7], [0, 0, 2, 2], [0, 0, 4, 2]])
    loss = build_loss({"type": "FocalerIoULoss", "base": None, "d": 0.25, "u": 0.75, "reduction": "none"})
    assert loss(pred, target).tolist() == [1.0, 0.0, 0.5]


def test_bounded_iou_rights_an_inverted_box():
    target = torch.tensor([[0.0, 0, 8, 8]])
    for width in (-1e-3, -1.0, -5.0):  # the first is minus eps
        pred = torch.tensor([[4 - width / 2, 0, 4 + width / 2, 8]], requires_grad=True)
        pull = gradient(build_loss({"type": "BoundedIoULoss"}), pred, target)
        assert pull.isfinite().all()
        assert pull[0, 0] > 0 > pull[0, 2], "x1 falls and x2 grows"


def test_plain_forms_have_a_true_gradient():
    pred, target = boxes(n=6)
    for cfg in (
        {"type": "InnerIoULoss", "base": None},
        {"type": "InnerIoULoss", "base": {"type": "EIoULoss"}},
        {"type": "FocalerIoULoss", "base": None, "d": 0.01},
        {"type": "AlphaIoULoss", "penalty": "giou", "alpha": 0.5},
        {"type": "AlphaIoULoss", "penalty": "diou"},
        {"type": "PowerfulIoULoss", "version": 2},
        {"type": "ShapeIoULoss", "scale": 1.5},
        {"type": "InterpIoULoss", "alpha": 0.6},
        {"type": "WIoULoss", "version": 1, "base": {"type": "MGIoULoss"}},
    ):
        loss = build_loss({**cfg, "reduction": "none"})
        assert torch.autograd.gradcheck(lambda p, loss=loss: loss(p, target), pred)


@pytest.mark.parametrize("gap", [1e-3, 1e-1])
def test_gcd_pulls_as_hard_however_near(gap):
    """D is gap / side for boxes of one size: 1 / side is the slope about the target, and zero at it."""
    target = torch.tensor([[0.0, 0, 8, 8]], dtype=torch.float64)
    pred = (target + torch.tensor([gap, 0, gap, 0])).requires_grad_()
    loss = build_loss({"type": "GCDLoss"})
    assert gradient(loss, pred, target)[0, ::2].sum().item() == pytest.approx(1 / 8, rel=2e-2)
    assert (gradient(loss, target.clone().requires_grad_(), target) == 0).all()


def test_gcd_mgiou_and_interpiou_right_an_inverted_box():
    target = torch.tensor([[0.0, 0, 8, 8]])
    for kind, width in itertools.product(("GCDLoss", "MGIoULoss", "InterpIoULoss"), (-1e-3, -1.0, -5.0)):
        pred = torch.tensor([[4 - width / 2, 0, 4 + width / 2, 8]], requires_grad=True)
        pull = gradient(build_loss({"type": kind}), pred, target)
        assert pull.isfinite().all()
        assert pull[0, 0] > 0 > pull[0, 2], "x1 falls and x2 grows"


def test_what_interpiou_pulls_in():
    """A box of its target's size, apart by less than 1 / (1 - alpha) sides, and no other."""
    target = torch.tensor([[0.0, 0, 8, 8]])
    for alpha, reach in ((0.98, 50), (0.9, 10), (1.0, 0)):
        for sides in (0.5 * reach + 1, 0.99 * reach, 1.01 * reach + 1):
            pred = (target + torch.tensor([8 * sides, 0, 8 * sides, 0])).requires_grad_()
            pull = gradient(build_loss({"type": "InterpIoULoss", "alpha": alpha}), pred, target)
            assert (pull[0, ::2].sum() > 0) == (sides < reach)


def test_the_dynamic_alpha_of_interpiou_is_a_constant():
    pred, target = (torch.tensor([box], dtype=torch.float64) for box in ([1.0, 2, 5, 7], [2.0, 1, 7, 6]))
    pred.requires_grad_()
    dynamic, fixed = (build_loss({"type": "InterpIoULoss", **how}) for how in ({"dynamic": True}, {"alpha": 7 / 11}))
    assert dynamic(pred, target).item() == pytest.approx(fixed(pred, target).item())  # their IoU is 12 / 33
    torch.testing.assert_close(gradient(dynamic, pred, target), gradient(fixed, pred, target))


def test_scale_dynamic_iou_is_ciou_but_for_small_targets():
    pred, target = boxes()
    area = (target[:, 2:] - target[:, :2]).prod(-1)
    rows = lambda cfg: build_loss({**cfg, "reduction": "none"})(pred, target)  # noqa: E731
    ciou, cfg = rows({"type": "CIoULoss"}), {"type": "ScaleDynamicIoULoss", "area": area.median().item()}
    same = (rows(cfg) - ciou).abs() < 1e-12
    assert (same == (area >= area.median())).all()
    torch.testing.assert_close(rows({**cfg, "delta": 0}), ciou)


def test_nwd_pulls_as_hard_however_near():
    """Its slope is 1 / constant about the target, where a squared distance would vanish."""
    target = torch.tensor([[0.0, 0, 8, 8]])
    for gap in (1e-3, 1e-1):
        pred = (target + torch.tensor([gap, 0, gap, 0])).requires_grad_()
        assert gradient(NWDLoss(), pred, target)[0, ::2].sum() == pytest.approx(1 / 12.8, rel=1e-2)
    assert (gradient(NWDLoss(), target.clone().requires_grad_(), target) == 0).all()
