"""Heads that hand pixels to their box loss: the same head but for the unit.

Heads only, on random features: what a head hands to a box loss does not depend on the body.
"""

import inspect
import warnings

import pytest
import torch
from mmdet.models import dense_heads
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope
from mmengine.runner import set_random_seed
from mmengine.structures import InstanceData

from detloss_plugins.adapters import heads, mmdetection
from detloss_plugins.losses import NWDLoss
from detloss_plugins.registry import registered_losses

STRIDES = [8, 16, 32]
ANCHORS = dict(type="AnchorGenerator", ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=STRIDES)
ATSS = dict(assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1)
RANGES = ((-1, 32), (32, 64), (64, 1e8))
POINTS = dict(norm_on_bbox=True, strides=STRIDES, regress_ranges=RANGES, loss_centerness="BinaryCrossEntropyLoss")
QUALITY = dict(reg_max=8, loss_cls="QualityFocalLoss", loss_dfl="DistributionFocalLoss")
MAX_IOU = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1)
TOOD = dict(
    initial_epoch=0,  # its second phase at once
    initial_assigner=ATSS["assigner"],
    assigner=dict(type="TaskAlignedAssigner", topk=13),
    alpha=1,
    beta=6,
    allowed_border=-1,
    pos_weight=-1,
)
REPPOINTS = dict(
    init=dict(assigner=dict(type="PointAssigner", scale=4, pos_num=1), allowed_border=-1, pos_weight=-1),
    refine=dict(assigner=MAX_IOU, allowed_border=-1, pos_weight=-1),
)
# What every head needs beside the number of channels.
HEADS = {
    "GFLHead": dict(QUALITY, anchor_generator=ANCHORS, train_cfg=ATSS),
    "LDHead": dict(QUALITY, anchor_generator=ANCHORS, train_cfg=ATSS, loss_ld="mmdet.KnowledgeDistillationKLDivLoss"),
    "TOODHead": dict(
        anchor_type="anchor_free",
        num_dcn=0,
        stacked_convs=2,
        anchor_generator=ANCHORS,
        initial_loss_cls=dict(type="detloss_plugins.FocalLoss", activated=True, use_sigmoid=True),
        loss_cls=dict(type="detloss_plugins.QualityFocalLoss", activated=True, use_sigmoid=True),
        train_cfg=TOOD,
    ),
    "RepPointsHead": dict(
        point_feat_channels=32,
        point_strides=STRIDES,
        transform_method="minmax",
        loss_bbox_init="GIoULoss",
        loss_bbox_refine="GIoULoss",
        train_cfg=REPPOINTS,
    ),
    "FCOSHead": POINTS,
    "NASFCOSHead": dict(POINTS, norm_cfg=dict(type="GN", num_groups=32)),
    "CondInstBboxHead": dict(POINTS, num_params=169),
    "BoxInstBboxHead": dict(POINTS, num_params=169),
    "CenterNetUpdateHead": dict(
        strides=STRIDES, regress_ranges=RANGES, loss_cls=dict(type="mmdet.GaussianFocalLoss", pos_weight=0.25)
    ),
}
IN_PIXELS = [cls for cls in registered_losses().values() if cls.facts.family == "box" and not cls.facts.scale_invariant]
SIGMOID = dict(use_sigmoid=True)
every_head = pytest.mark.parametrize("name", HEADS)


@pytest.fixture(scope="module", autouse=True)
def mmdet_scope():
    MessageHub.get_current_instance().update_info("epoch", 0)  # TOOD asks the runner
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


BOXES = [[[10.0, 12, 50, 60], [60, 70, 90, 84]], [[30.0, 20, 118, 120], [5, 90, 40, 110]]]


@pytest.fixture(scope="module")
def samples():
    """Two images with two objects each, in pixels."""
    found = []
    for boxes in BOXES:
        shape = dict(img_shape=(128, 128), pad_shape=(128, 128), batch_input_shape=(128, 128), ori_shape=(128, 128))
        found.append(DetDataSample(metainfo=shape))
        found[-1].gt_instances = InstanceData(bboxes=torch.tensor(boxes), labels=torch.tensor([1, 2]))
    return found


def box_losses(head):
    return [getattr(head, key) for key in ("loss_bbox", "loss_bbox_init", "loss_bbox_refine") if hasattr(head, key)]


def head(name, prefix, box):
    """The stock head (prefix "") or ours, with a box loss; their weights are the same."""
    settings = dict(num_classes=4, in_channels=32, feat_channels=32, stacked_convs=1, loss_cls="FocalLoss")
    settings.update(HEADS[name])
    if "loss_bbox_init" not in settings:
        settings["loss_bbox"] = None
    for key, value in settings.items():
        if key.startswith("loss_bbox"):
            settings[key] = box
        elif key.startswith("loss_") and isinstance(value, str):
            scope = "" if "." in value else "detloss_plugins."
            settings[key] = dict(type=f"{scope}{value}", **({} if key in ("loss_dfl", "loss_ld") else SIGMOID))
    place = "detloss_plugins.adapters.mmdetection.Pixel" if prefix else "mmdet."
    set_random_seed(0)
    model = MMDET_MODELS.build(ConfigDict(type=f"{place}{name}", **settings))
    model.init_weights()
    for module in model.modules():  # a fresh head predicts one box everywhere
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.1)
    return model.train()


def backward(model, samples):
    """The losses by name after the backward pass, and all gradients."""
    set_random_seed(1)
    features = [torch.randn(len(samples), 32, 128 // stride, 128 // stride) for stride in STRIDES]
    if "LD" in type(model).__name__:
        teacher = [[level.detach() for level in part] for part in model(features)]
        losses = model.loss(features, teacher, samples)
    else:
        losses = model.loss(features, samples)
    losses = losses[0] if isinstance(losses, tuple) else losses
    losses = {key: sum(value) if isinstance(value, list) else value for key, value in losses.items()}
    model.zero_grad()
    sum(losses.values()).backward()
    return {key: value.detach() for key, value in losses.items()}, {
        key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None
    }


def handed(model, samples):
    """What reaches the box losses of a head: predictions and targets of all calls."""
    calls = []

    def spy(forward):  # not a hook: the heads use one themselves
        def call(pred, target, *args, **kwargs):
            calls.append((pred.detach(), target))
            return forward(pred, target, *args, **kwargs)

        return call

    for loss in box_losses(model):
        loss.forward = spy(loss.forward)
    backward(model, samples)
    pred, target = (torch.cat(parts) for parts in zip(*calls, strict=True))
    assigned = target.any(-1)  # RepPoints hands over all points, those without an object at no weight
    return pred[assigned], target[assigned]


def test_no_pixel_head_is_forgotten():
    ours = {name for name, cls in vars(mmdetection).items() if name.startswith("Pixel") and inspect.isclass(cls)}
    assert ours == {f"Pixel{name}" for name in HEADS}


@every_head
def test_a_scale_invariant_loss_does_not_notice(name, samples):
    stock, pixel = (head(name, prefix, dict(type="detloss_plugins.GIoULoss")) for prefix in ("", "Pixel"))
    assert pixel.state_dict().keys() == stock.state_dict().keys()
    assert isinstance(pixel, getattr(dense_heads, name))
    pixel.load_state_dict(stock.state_dict())
    expected, found = backward(stock, samples), backward(pixel, samples)
    assert any("bbox" in key or "pts" in key for key in found[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_localisation_distillation_of_ld_heads(samples):
    """Equal to mmdet's own loss, the mean over 9 bins; without target="logits" the head's teacher is refused."""
    model = head("LDHead", "", dict(type="detloss_plugins.GIoULoss"))
    features = [torch.randn(2, 32, 128 // stride, 128 // stride) for stride in STRIDES]
    teacher = [[torch.randn_like(level) for level in part] for part in model(features)]
    found = []
    for loss in (
        dict(type="mmdet.KnowledgeDistillationKLDivLoss", T=10, loss_weight=0.25),
        dict(type="detloss_plugins.KLDivLoss", target="logits", temperature=10.0, loss_weight=0.25),
        dict(type="detloss_plugins.DistributionDistillationLoss", temperature=10.0, loss_weight=0.25 / 9),
    ):
        model.loss_ld = MMDET_MODELS.build(loss)
        losses = model.loss(features, teacher, samples)["loss_ld"]
        found.append((losses, torch.autograd.grad(sum(losses), model.gfl_reg.weight)))
    assert sum(found[0][0]) > 0
    for ours in found[1:]:
        torch.testing.assert_close(ours, found[0])
    model.loss_ld = MMDET_MODELS.build(dict(type="detloss_plugins.KLDivLoss"))
    with pytest.raises(ValueError, match='write target="logits"'):
        model.loss(features, teacher, samples)


def test_bins_that_the_head_does_not_decode_by_are_refused():
    loss = MMDET_MODELS.build(dict(type="detloss_plugins.DistributionFocalLoss", bins=[-4, -2, -1, 0, 1, 2, 4, 8, 9]))
    model = head("GFLHead", "", dict(type="detloss_plugins.GIoULoss"))
    with pytest.raises(ValueError, match=r"loss_dfl of GFLHead decodes by bins 0, 1, 2 and so on; leave bins out"):
        model.loss_dfl = loss


@every_head
def test_boxes_are_the_images(name, samples):
    """Every target is an object's box in pixels, and the predictions are in the same unit."""
    box = dict(type="detloss_plugins.GIoULoss")
    units, pixels = (handed(head(name, prefix, box), samples) for prefix in ("", "Pixel"))
    objects = torch.tensor(BOXES).reshape(-1, 4)

    def is_an_object(target):
        return (target[:, None] - objects).abs().amax(-1).amin(-1) < 1e-3

    # CenterNet also tries candidates for additional positives: with distances cut off at zero, and beside the map.
    known = is_an_object(pixels[1])
    assert known.sum() > 4
    assert known.all() or name == "CenterNetUpdateHead"
    assert not is_an_object(units[1]).any(), "the trap is there"
    sides = [target[:, 2:] - target[:, :2] for target in (units[1], pixels[1])]
    unit = (sides[1] / sides[0]).nanmean(-1, keepdim=True)  # a cut side may be 0 / 0
    solid = unit.isfinite().squeeze(-1)
    assert solid.sum() >= known.sum()
    length = 4 if name == "RepPointsHead" else 1
    assert set(unit[solid].flatten().round(decimals=2).tolist()) <= {length * stride for stride in STRIDES}
    assert unit[solid].round().unique().numel() > 1, "more than one level"
    # As seen from the target, for FCOS's boxes stand around a pixel of the image in either unit.
    torch.testing.assert_close(
        (pixels[0] - pixels[1])[known], ((units[0] - units[1]) * unit)[known], rtol=1e-3, atol=1e-2
    )


@every_head
@pytest.mark.parametrize("loss", IN_PIXELS, ids=lambda cls: cls.__name__)
def test_a_step_with_a_constant_in_pixels(name, loss, samples):
    if (name, loss.__name__) == ("CenterNetUpdateHead", "BoundedIoULoss"):
        pytest.skip("this head takes one loss a box only, not one a coordinate")
    box = dict(type=f"detloss_plugins.{loss.__name__}", **loss.facts.example)
    (expected, _), (found, gradients) = (backward(head(name, prefix, box), samples) for prefix in ("", "Pixel"))
    changed = {key for key in found if found[key] != expected[key]}
    assert changed
    # CenterNet's additional positives are those of the smallest box loss.
    assert all("bbox" in key or "pts" in key for key in changed) or name == "CenterNetUpdateHead"
    assert all(value.isfinite() for value in found.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    branch = [gradient for key, gradient in gradients.items() if "reg" in key or "pts" in key]
    assert branch
    assert all(gradient.abs().sum() > 0 for gradient in branch)


def test_the_value_is_that_of_pixels(samples):
    """NWD of a GFL head, from what the stock head hands over times the stride of the level."""
    cfg = dict(type="detloss_plugins.NWDLoss")
    stock, pixel = (head("GFLHead", prefix, cfg) for prefix in ("", "Pixel"))
    calls = []

    def note(loss, args, kwargs):
        calls.append((*args, kwargs["weight"]))

    stock.loss_bbox.register_forward_pre_hook(note, with_kwargs=True)
    backward(stock, samples)
    assert len(calls) == len(STRIDES)
    total = sum(NWDLoss()(p * s, t * s, w, avg_factor=1.0) for (p, t, w), s in zip(calls, STRIDES, strict=True))
    weight = max(sum(w.sum() for _, _, w in calls), 1)
    torch.testing.assert_close(backward(pixel, samples)[0]["loss_bbox"], total.detach() / weight)


def test_fcos_in_pixels_from_the_start_is_left_alone(samples, monkeypatch):
    """Without ``norm_on_bbox`` the stock head hands over pixels."""
    monkeypatch.setitem(HEADS, "FCOSHead", {**POINTS, "norm_on_bbox": False})
    cfg = dict(type="detloss_plugins.NWDLoss")
    expected, found = (backward(head("FCOSHead", prefix, cfg), samples) for prefix in ("", "Pixel"))
    torch.testing.assert_close(found, expected)


def test_nothing_is_left_behind_by_an_error(samples):
    model = head("GFLHead", "Pixel", dict(type="detloss_plugins.GIoULoss"))

    def fail(loss, args):
        raise RuntimeError

    before = dict(model.loss_bbox._forward_pre_hooks)
    hook = model.loss_dfl.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        backward(model, samples)
    hook.remove()
    assert dict(model.loss_bbox._forward_pre_hooks) == before


@every_head
def test_prediction_is_the_stock_heads(name):
    stock, pixel = (head(name, prefix, dict(type="detloss_plugins.GIoULoss")).eval() for prefix in ("", "Pixel"))
    features = [torch.randn(1, 32, 128 // stride, 128 // stride) for stride in STRIDES]
    with torch.no_grad():
        torch.testing.assert_close(pixel(features), stock(features))


@every_head
def test_the_stock_head_warns_once_of_a_constant_in_pixels(name, monkeypatch, recwarn):
    nwd, plain = dict(type="detloss_plugins.NWDLoss"), dict(type="detloss_plugins.CIoULoss")
    wise = dict(type="detloss_plugins.WIoULoss", base=nwd)

    def told(prefix, box):
        monkeypatch.setattr(heads, "_told", set())
        recwarn.clear()
        warnings.simplefilter("always")
        for _ in range(2):
            head(name, prefix, box)
        return [str(found.message) for found in recwarn if found.category is heads.MisfitWarning]

    joint = dict(type="detloss_plugins.JointLoss", losses=[plain, wise])
    slots = 2 if name == "RepPointsHead" else 1
    for box in (joint, dict(type="detloss_plugins.ScheduledLoss", losses=[plain, nwd], at=[1])):
        found = told("", box)
        assert len(found) == slots
        for sentence in found:
            assert f" of {name} hands over boxes in units of each level's stride, and NWDLoss is meant" in sentence
            assert f".Pixel{name}" in sentence
            assert ("norm_on_bbox=False" in sentence) == ("norm_on_bbox" in HEADS[name])
    assert told("", plain) == told("Pixel", nwd) == []
    if "norm_on_bbox" in HEADS[name]:
        monkeypatch.setitem(HEADS, name, {**HEADS[name], "norm_on_bbox": False})
        assert told("", nwd) == []


def test_heads_in_pixels_do_not_warn(monkeypatch):
    """Also those that are based on one in stride units."""
    monkeypatch.setattr(heads, "_told", set())
    box = dict(type="detloss_plugins.NWDLoss")
    for name, settings in (("VFNetHead", {}), ("AutoAssignHead", {}), ("ATSSHead", dict(reg_decoded_bbox=True))):
        MMDET_MODELS.build(ConfigDict(type=name, num_classes=4, in_channels=8, loss_bbox=box, **settings))
    assert not heads._told


def test_losses_with_a_constant_in_pixels_say_so():
    assert {cls.__name__ for cls in IN_PIXELS} >= {"NWDLoss", "MPDIoULoss", "BoundedIoULoss"}
