"""The YOLO head: the stock one but for a softmax of the classes, and small detectors with it on real digits."""

import copy

import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config
from mmengine.structures import InstanceData
from support.commands import python
from support.mmdetection import (
    CONFIG_DIR,
    FORMS,
    TRAIN,
    backward,
    build,
    scalars,
    settings_of,
    small,
    stopped_and_resumed,
    twin_configs,
)

from detloss_plugins.registry import loss_class
from detloss_plugins.testing.digits import build_digits

pytestmark = pytest.mark.usefixtures("mmdet_scope")

YOLOV1 = CONFIG_DIR / "yolov1_r18_fpn_digits.py"
YOLOV3 = CONFIG_DIR / "yolov3_r18_digits.py"
STOCK = "mmdet.YOLOV3Head"
SOFTMAX = dict(type="detloss_plugins.CrossEntropyLoss", use_sigmoid=False, reduction="sum")
SIGMOID = {
    "ours": dict(type="detloss_plugins.ModifiedCrossEntropyLoss", use_sigmoid=True, reduction="sum"),
    "mmdet's": dict(type="mmdet.CrossEntropyLoss", use_sigmoid=True, reduction="sum"),
    "no use_sigmoid": dict(type="mmdet.MSELoss", reduction="sum"),
}
# The head hands over one-hot targets, and Seesaw loss takes labels only.
DENSE_FORMS = [form for form in FORMS if form[0] != "SeesawLoss"]
# Every prediction that there is.
ALL = dict(nms_pre=100000, score_thr=-1, conf_thr=-1, nms=dict(type="nms", iou_threshold=1.0), max_per_img=100000)


def detector(loss_cls, path=YOLOV3, **head):
    """A small one with that class loss and weights that make it predict something everywhere."""
    cfg = small(path)
    for key, value in dict(loss_cls=loss_cls, **head).items():  # update() would merge the dicts
        cfg.model.bbox_head[key] = value
    model = build(cfg)
    for conv in model.bbox_head.convs_pred:
        torch.nn.init.normal_(conv.weight, std=0.1)
        torch.nn.init.normal_(conv.bias)
    return model


def pair(loss_cls):
    """The detector with our head and the one with mmdet's."""
    return detector(loss_cls), detector(loss_cls, type=STOCK)


def predict(model, batch):
    data = model.data_preprocessor(copy.deepcopy(batch), training=False)
    for sample in data["data_samples"]:
        sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))
    with torch.no_grad():
        return [sample.pred_instances for sample in model.eval()(**data, mode="predict")]


def grads(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("loss", [*SIGMOID.values(), SOFTMAX], ids=[*SIGMOID, "softmax"])
def test_trains_as_the_stock_head(loss, batch):
    """Bit for bit."""
    ours, stock = pair(loss)
    torch.testing.assert_close(backward(ours, batch), backward(stock, batch), rtol=0, atol=0)
    torch.testing.assert_close(grads(ours), grads(stock), rtol=0, atol=0)
    assert all(grad.abs().sum() > 0 for name, grad in grads(ours).items() if "convs_pred" in name)


@pytest.mark.parametrize("loss", SIGMOID.values(), ids=SIGMOID)
def test_predicts_as_the_stock_head_with_a_sigmoid_loss(loss, batch):
    """Bit for bit."""
    for ours, stock in zip(*(predict(model, batch) for model in pair(loss)), strict=True):
        assert len(ours) > 10
        for key in ("bboxes", "scores", "labels"):
            assert torch.equal(ours[key], stock[key])


def maps_of(model, batch):
    """The head's maps for a batch, and what ``predict_by_feat`` needs besides."""
    data = model.data_preprocessor(copy.deepcopy(batch), training=False)
    with torch.no_grad():
        (maps,) = model.bbox_head(model.extract_feat(data["inputs"]))
    return maps, [sample.metainfo for sample in data["data_samples"]]


@pytest.mark.parametrize("name", ["FocalLoss", "ModifiedCrossEntropyLoss", "KLDivLoss"])
def test_scores_are_the_softmax_times_the_confidence(name):
    """Of every class of every box; from the maps, which are not changed."""
    form = {} if name == "KLDivLoss" else settings_of(loss_class(name), False)  # it has no other form
    head = detector(dict(type=f"detloss_plugins.{name}", reduction="sum", **form)).eval().bbox_head
    sides = (4, 8, 16)
    maps = [torch.randn(2, 3 * 15, side, side) for side in sides]
    rows = torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, 15) for level in maps], 1)
    priors = torch.cat(head.prior_generator.grid_priors([(side, side) for side in sides], device="cpu"))
    strides = torch.cat([torch.full((3 * side**2, 1), 128 / side) for side in sides])
    before = copy.deepcopy(maps)
    found = head.predict_by_feat(maps, [{}, {}], cfg=Config(ALL), with_nms=False)
    torch.testing.assert_close(maps, before, rtol=0, atol=0)
    for row, one in zip(rows, found, strict=True):
        boxes = head.bbox_coder.decode(priors, torch.cat([row[:, :2].sigmoid(), row[:, 2:4]], 1), strides)
        places, index = boxes.unique(dim=0, return_inverse=True)
        assert len(places) == 3 * (4**2 + 8**2 + 16**2)
        found_places, found_index = one.bboxes.unique(dim=0, return_inverse=True)
        torch.testing.assert_close(found_places, places, rtol=0, atol=0)
        table = torch.zeros(len(places), 10).index_put((found_index, one.labels), one.scores)
        torch.testing.assert_close(table[index], row[:, 4:5].sigmoid() * row[:, 5:].softmax(1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_softmax_of_any_logits_is_finite(dtype):
    """In float32, however sure the logits are."""
    head = detector(SOFTMAX).bbox_head
    maps = 30 * torch.randn(2, 3 * 15, 4, 4).to(dtype)
    maps[0, :, 0, 0] = torch.tensor([6e4, -6e4] * 22 + [0]).to(dtype)
    classes = head.sigmoid_form(maps).reshape(2, 3, 15, 4, 4)[:, :, 5:].sigmoid()
    expected = maps.float().reshape(2, 3, 15, 4, 4)[:, :, 5:].softmax(2)
    assert classes.dtype == torch.float32
    torch.testing.assert_close(classes, expected, rtol=1e-5, atol=1e-7)
    rest = head.sigmoid_form(maps).reshape(2, 3, 15, 4, 4)[:, :, :5]
    assert torch.equal(rest, maps.float().reshape(2, 3, 15, 4, 4)[:, :, :5])


def test_takes_the_first_levels():
    """As one level of a pyramid; the stock head refuses more than it has."""
    head = detector(SOFTMAX, YOLOV1).bbox_head
    levels = [torch.randn(2, 32, side, side) for side in (16, 8, 4)]
    ((found,),), ((expected,),) = head(levels), head(tuple(levels[:1]))
    assert found.shape == (2, 15, 16, 16)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("name", "use_sigmoid"), [*DENSE_FORMS, ("KLDivLoss", None)])
def test_any_classification_loss_takes_steps(name, use_sigmoid, batch):
    form = {} if use_sigmoid is None else settings_of(loss_class(name), use_sigmoid)
    model = detector(dict(type=f"detloss_plugins.{name}", reduction="sum", **form), YOLOV1)
    assert model.bbox_head.softmax_classes is not bool(use_sigmoid)
    take_steps(model, batch, "loss_cls")


def take_steps(model, batch, name):
    """Two; the losses and gradients are finite and the named loss is positive and moves."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(2):
        optimizer.zero_grad()
        losses = backward(model, batch)
        assert all(value.isfinite() for value in losses.values())
        assert all(grad.isfinite().all() for grad in grads(model).values() if grad is not None)
        seen.append(losses[name].item())
        optimizer.step()
    assert min(seen) > 0
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    "loss_conf",
    [
        dict(type="MSELoss", use_sigmoid=True),
        dict(type="BinaryCrossEntropyLoss"),
        dict(type="FocalLoss", use_sigmoid=True),
        dict(type="VarifocalLoss"),
        dict(type="BalancedCrossEntropyLoss"),
    ],
    ids=lambda loss: loss["type"],
)
def test_confidence_losses_take_steps(loss_conf, batch):
    loss_conf = {**loss_conf, "type": f"detloss_plugins.{loss_conf['type']}", "reduction": "sum"}
    take_steps(detector(SOFTMAX, YOLOV1, loss_conf=loss_conf), batch, "loss_conf")


@pytest.mark.parametrize("loss", [SOFTMAX, SIGMOID["ours"]], ids=["softmax", "sigmoid"])
def test_no_object_in_the_batch(loss, batch):
    batch = copy.deepcopy(batch)
    for sample in batch["data_samples"]:
        sample.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    model = detector(loss, YOLOV1)
    losses = backward(model, batch)
    assert losses.pop("loss_conf") > 0
    assert losses.pop("loss") > 0
    assert losses.keys() == {"loss_cls", "loss_xy", "loss_wh"}
    assert all(value == 0 for value in losses.values())
    assert all(grad.isfinite().all() for grad in grads(model).values() if grad is not None)


def test_class_losses_that_no_score_goes_with_are_refused():
    for loss in (dict(type="MSELoss"), dict(type="L1Loss"), dict(type="MSELoss", use_sigmoid=False)):
        with pytest.raises(ValueError, match=rf"{loss['type']} is .*; take MSELoss with use_sigmoid=True"):
            detector({**loss, "type": f"detloss_plugins.{loss['type']}"})
    assert not detector(dict(type="detloss_plugins.MSELoss", use_sigmoid=True)).bbox_head.softmax_classes


@pytest.mark.slow
def test_stopped_and_resumed(tmp_path):
    """And what it has learnt fits mmdet's head."""
    weights, _ = stopped_and_resumed(tmp_path, small(YOLOV1).model)
    cfg = twin_configs(YOLOV1)[1]
    cfg.model.bbox_head.type = STOCK
    MMDET_MODELS.build(cfg.model).load_state_dict(weights, strict=True)


@pytest.mark.slow
def test_digits_config_learns(tmp_path):
    """Half of its schedule."""
    build_digits()
    python(
        TRAIN, YOLOV1, "--work-dir", tmp_path, "--cfg-options", "train_cfg.max_epochs=12", "train_cfg.val_interval=12"
    )
    assert scalars(tmp_path)[-1].get("coco/bbox_mAP_50", 0) >= 0.2  # absent if nothing was detected
