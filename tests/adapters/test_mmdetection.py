"""Real MMDetection detectors with our losses: every shipped config, mmdet's own train.py, resume, equality with mmdet.

Every config of configs/mmdetection is found by globbing and made small, so that a detector takes a step in a second.
"""

import copy
import functools
import itertools
import re
import time

import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import set_random_seed
from support.commands import python
from support.mmdetection import (
    BOX_LOSSES,
    CONFIG_DIR,
    DIGITS,
    FORMS,
    REGRESSION,
    TRAIN,
    backward,
    box_loss_cfg,
    branches,
    build,
    loss_dicts,
    scalars,
    settings_of,
    small,
    stopped_and_resumed,
    twin_configs,
)

from detloss_plugins.families import BoxLoss
from detloss_plugins.loss import Loss
from detloss_plugins.losses import BoundedIoULoss, CIoULoss, InnerIoULoss, NWDLoss, WIoULoss
from detloss_plugins.registry import MODELS, loss_class
from detloss_plugins.testing.digits import build_digits

pytestmark = pytest.mark.usefixtures("mmdet_scope")

CONFIGS = sorted(CONFIG_DIR.glob("*.py"))
RETINANET = CONFIG_DIR / "retinanet_r50_fpn_1x_coco.py"
FASTER_RCNN = CONFIG_DIR / "faster-rcnn_r50_fpn_1x_coco.py"

every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@every_config
def test_every_loss_of_a_config_is_ours(path):
    """And says use_sigmoid: mmdet's heads read it from the config, and without it make one channel too many."""
    cfg = small(path)
    configured = sorted(loss_class(loss["type"]).__name__ for loss in loss_dicts(cfg))
    modules = dict(build(cfg).named_modules())
    built = {name: module for name, module in modules.items() if "losses" in type(module).__module__.split(".")}
    built.pop("roi_head.mask_head.loss_mask", None)  # mmdet's, see loss_dicts
    assert configured
    for loss in loss_dicts(cfg):
        assert loss["type"].startswith("detloss_plugins.")
        assert loss_class(loss["type"]).facts.family != "classification" or "use_sigmoid" in loss
    assert all(isinstance(module, Loss) for module in built.values())
    assert sorted(type(loss).__name__ for name, loss in built.items() if not name.endswith(".base")) == configured


@every_config
def test_two_optimiser_steps(path, batch):
    """A box loss gets boxes, not encoded deltas: the corners of its targets are in order."""
    called = []

    def check(loss, arguments):
        called.append(loss)
        top_left, bottom_right = arguments[1].split(2, -1)
        assert (top_left <= bottom_right).all()

    cfg = small(path)
    model = build(cfg)
    box_losses = [module for module in model.modules() if isinstance(module, BoxLoss)]
    for loss in box_losses:
        loss.register_forward_pre_hook(check)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    for _ in range(2):
        optimizer.zero_grad()
        losses = backward(model, batch)
        for name, value in losses.items():
            assert value.isfinite(), name
            assert value > 0 or "loss" not in name, name
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
        assert all(parameter.grad.abs().sum() > 0 for parameter in branches(model))
        optimizer.step()
    assert {*called} == {*box_losses}


def test_any_box_loss_by_one_override():
    for loss in BOX_LOSSES:
        cfg = small(RETINANET)
        cfg.merge_from_dict({f"model.bbox_head.loss_bbox.{key}": value for key, value in box_loss_cfg(loss).items()})
        built = MMDET_MODELS.build(cfg.model.bbox_head.loss_bbox)
        assert type(built) is loss
        assert built.loss_weight == 2.0


def test_an_auxiliary_box_loss_is_added_at_its_ratio(batch):
    """Wise-Inner-EIoU and NWD as parts of a JointLoss: each level's loss is the sum of what they give alone."""
    wise = dict(type="WIoULoss", loss_weight=0.7, base=dict(type="InnerIoULoss", base=dict(type="EIoULoss")))
    parts = [wise, dict(type="NWDLoss", loss_weight=0.3)]
    cfg = small(CONFIG_DIR / "atss-gcd_r50_fpn_1x_coco.py")
    model, found = build(cfg), []
    for loss in (dict(type="JointLoss", losses=parts), *parts):
        model.bbox_head.loss_bbox = MMDET_MODELS.build({**loss, "type": f"detloss_plugins.{loss['type']}"})
        found.append([value for name, value in backward(model, batch).items() if "bbox" in name])
        model.zero_grad()
    joint, *alone = (torch.stack(values).flatten() for values in found)
    assert (joint > 0).any()
    torch.testing.assert_close(joint, sum(alone))


# The heads with a box loss of each detector, and the layers that predict their boxes.
BOX_HEADS = {
    "RetinaNet": (RETINANET, {"bbox_head": "retina_reg"}),
    "FCOS": (CONFIG_DIR / "fcos_r50_fpn_1x_coco.py", {"bbox_head": "conv_reg"}),
    "ATSS": (CONFIG_DIR / "atss_r50_fpn_1x_coco.py", {"bbox_head": "atss_reg"}),
    "Faster R-CNN": (FASTER_RCNN, {"rpn_head": "rpn_reg", "roi_head.bbox_head": "fc_reg"}),
}


@pytest.fixture(scope="module")
def headless_body(batch):
    """``get(detector, decoded)``: a detector without its body, which gives the same features for the batch always."""

    @functools.cache
    def get(detector, decoded):
        path, heads = BOX_HEADS[detector]
        cfg = small(path)
        if path in (RETINANET, FASTER_RCNN):
            cfg.merge_from_dict({f"model.{name}.reg_decoded_bbox": decoded for name in heads})
        if path == FASTER_RCNN:  # the regions are most of the time of a step
            cfg.merge_from_dict({"model.train_cfg.rpn_proposal.nms_pre": 200, "model.train_cfg.rcnn.sampler.num": 64})
        model = build(cfg)
        with torch.no_grad():
            data = model.data_preprocessor(copy.deepcopy(batch), training=True)
            features = model.extract_feat(data["inputs"])
        model.backbone = model.neck = None
        return model, features

    return get


@pytest.fixture
def with_box_loss(headless_body, monkeypatch):
    """``get(detector, loss, decoded, heads)``: a fresh detector with that box loss in its heads."""

    def get(detector, loss, decoded, heads):
        stock, features = headless_body(detector, decoded)
        model = copy.deepcopy(stock)
        monkeypatch.setattr(model, "extract_feat", lambda inputs: features)
        for name in heads:
            head = model.get_submodule(name)
            head.loss_bbox = MMDET_MODELS.build(box_loss_cfg(loss))
            assert type(head.loss_bbox) is loss
        return model

    return get


# Every loss in one of them; in the others those with a number a coordinate, with a state, in pixels, over another.
STEPS = [("RetinaNet", loss) for loss in BOX_LOSSES]
STEPS += itertools.product([*BOX_HEADS][1:], [BoundedIoULoss, WIoULoss, NWDLoss, InnerIoULoss])


@pytest.mark.parametrize(("detector", "loss"), STEPS, ids=lambda x: getattr(x, "__name__", x))
def test_any_box_loss_takes_steps(detector, loss, with_box_loss, batch):
    heads = BOX_HEADS[detector][1]
    model = with_box_loss(detector, loss, True, heads)
    # Adam, for a step of a size: an alpha-IoU of FCOS's first boxes, a pixel in size, is nearly flat.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(2):
        optimizer.zero_grad()
        losses = backward(model, batch)
        assert all(value.isfinite() for value in losses.values())
        seen.append([value.item() for key, value in losses.items() if "bbox" in key])
        for name, layer in heads.items():
            for parameter in model.get_submodule(f"{name}.{layer}").parameters():
                assert parameter.grad.isfinite().all()
                assert parameter.grad.abs().sum() > 0
        optimizer.step()
    before, after = seen
    assert len(before) == len(heads)
    assert all(value > 0 for value in before)
    assert all(one != other for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("detector", "name", "losses"),
    [
        ("RetinaNet", "bbox_head", BOX_LOSSES),
        ("Faster R-CNN", "rpn_head", [CIoULoss]),
        ("Faster R-CNN", "roi_head.bbox_head", [CIoULoss]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_encoded_deltas_are_refused(detector, name, losses, with_box_loss, batch):
    """In the first step, and with what to do about it."""
    for loss in losses:
        model = with_box_loss(detector, loss, False, [name])
        with pytest.raises(ValueError, match=rf"{loss.__name__} takes boxes .*reg_decoded_bbox=True"):
            backward(model, batch)


def classifier(name, use_sigmoid):
    """A detector with that loss for its classes: RetinaNet, or Faster R-CNN for a softmax; and its head."""
    cfg = small(RETINANET if use_sigmoid else FASTER_RCNN)
    if not use_sigmoid:  # the regions are most of the time of a step
        cfg.merge_from_dict({"model.train_cfg.rpn_proposal.nms_pre": 200, "model.train_cfg.rcnn.sampler.num": 64})
    head = cfg.model.bbox_head if use_sigmoid else cfg.model.roi_head.bbox_head
    head.loss_cls = dict(type=f"detloss_plugins.{name}", **settings_of(loss_class(name), use_sigmoid))
    model = build(cfg)
    return model, model.bbox_head if use_sigmoid else model.roi_head.bbox_head


def class_losses(losses):
    """The part of a loss dict that the classification loss gave, but not that of region proposals."""
    return {name: value for name, value in losses.items() if name.startswith("loss_cls")}


def test_every_classification_loss_has_a_form():
    assert {name for name, _ in FORMS} == {
        n for n, cls in MODELS.module_dict.items() if cls.facts.family == "classification"
    }
    assert {name for name, use_sigmoid in FORMS if not use_sigmoid} >= {"CrossEntropyLoss", "FocalLoss", "SeesawLoss"}


@pytest.mark.parametrize(("name", "use_sigmoid"), FORMS)
def test_any_classification_loss_takes_a_step(name, use_sigmoid, batch):
    model, head = classifier(name, use_sigmoid)
    last = head.retina_cls if use_sigmoid else head.fc_cls
    assert type(head.loss_cls) is loss_class(name)
    if use_sigmoid:  # otherwise the head adds a channel for the background and scores with a softmax
        assert head.use_sigmoid_cls
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = class_losses(backward(model, batch))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert last.weight.grad.abs().sum() > 0
    optimizer.step()
    second = class_losses(backward(model, batch))
    for losses in (first, second):
        assert losses
        assert all(value.isfinite() and value > 0 for value in losses.values()), losses
    assert sum(second.values()) != sum(first.values())
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_heatmap_loss_in_a_centernet_head(batch):
    """Ours and mmdet's give one head the same losses and gradients on real boxes; ours takes a step."""
    preprocess = build(small(RETINANET)).data_preprocessor
    samples = preprocess(copy.deepcopy(batch), training=True)["data_samples"]
    results = []
    for scope in ("mmdet", "detloss_plugins"):
        set_random_seed(0)
        heatmap = dict(type=f"{scope}.GaussianFocalLoss", loss_weight=1.0)
        head = MMDET_MODELS.build(
            dict(type="CenterNetHead", in_channels=8, feat_channels=8, num_classes=10, loss_center_heatmap=heatmap)
        )
        head.init_weights()
        losses = head.loss(torch.randn(len(samples), 8, 32, 32).unsqueeze(0), samples)
        sum(losses.values()).backward()
        results.append(({k: v.detach() for k, v in losses.items()}, [p.grad for p in head.parameters()]))
    stock, ours = results
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)
    assert isinstance(head.loss_center_heatmap, Loss)
    torch.optim.SGD(head.parameters(), lr=0.01).step()
    assert all(parameter.isfinite().all() for parameter in head.parameters())


@every_config
def test_equal_to_the_stock_losses(path, batch):
    """The same weights and batch give the same losses and gradients with mmdet's own classes."""
    ours, stock = map(build, twin_configs(path))
    for parameter in branches(ours):  # fresh heads all predict one box, around every target: many terms would be zero
        torch.nn.init.normal_(parameter, std=0.1)
    stock.load_state_dict(ours.state_dict(), strict=True)
    assert any(type(module).__module__.startswith("mmdet.models.losses") for module in stock.modules())
    torch.testing.assert_close(backward(ours, batch), backward(stock, batch), rtol=1e-5, atol=1e-6)
    for (name, our_one), stock_one in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if stock_one.grad is not None:
            scale = stock_one.grad.abs().max()
            assert (our_one.grad - stock_one.grad).abs().max() <= 1e-4 * scale + 1e-7, name


def test_registry_of_mmdet_is_left_alone(tmp_path):
    """With custom_imports, and imported again: our prefix gives ours, a bare name still gives mmdet's class."""
    config = tmp_path / "config.py"
    config.write_text(
        f"_base_ = {str(DIGITS)!r}\ncustom_imports = dict(imports=['detloss_plugins'], allow_failed_imports=False)\n",
        encoding="utf-8",
    )
    printed = python(
        "-c",
        f"""
import importlib, sys
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings
from mmdet.registry import MODELS
MODELS.import_from_location()
before = dict(MODELS.module_dict)
assert "detloss_plugins" not in sys.modules
cfg = Config.fromfile({str(config)!r})
assert "detloss_plugins.losses" in sys.modules
init_default_scope(cfg.default_scope)
importlib.reload(import_modules_from_strings("detloss_plugins"))
assert dict(MODELS.module_dict) == before
print(*(type(MODELS.build(dict(type=t))).__module__ for t in ("CIoULoss", "detloss_plugins.CIoULoss")))
""",
    )
    assert printed.split() == ["mmdet.models.losses.iou_loss", "detloss_plugins.losses.box.iou"]


def test_mmdet_train_command_without_custom_imports(tmp_path):
    """mmdet's own train.py on the digits config, the box loss swapped by --cfg-options: train, validate, save.

    Its log names the losses of ours that run, once each.
    """
    build_digits()
    swap = "model.bbox_head.loss_bbox.type=detloss_plugins.DIoULoss"
    # The threshold keeps the detections of a model that has learnt nothing, so that there is something to evaluate.
    short = ["train_cfg.max_epochs=1", "train_dataloader.dataset.indices=16", "val_dataloader.dataset.indices=8"]
    options = [swap, *short, "model.test_cfg.score_thr=0.0"]
    python(TRAIN, DIGITS, "--work-dir", tmp_path, "--cfg-options", *options)
    used = Config.fromfile(tmp_path / DIGITS.name)
    assert "custom_imports" not in used
    assert used.model.bbox_head.loss_bbox.type == "detloss_plugins.DIoULoss"
    assert (tmp_path / "epoch_1.pth").exists()
    assert "coco/bbox_mAP_50" in scalars(tmp_path)[-1]
    (log,) = tmp_path.glob("*/*.log")
    said = re.findall(r"detloss_plugins: (\w+) of GFLHead: (\w+)", log.read_text(encoding="utf-8"))
    assert sorted(said) == [
        ("loss_bbox", "DIoULoss"),
        ("loss_cls", "QualityFocalLoss"),
        ("loss_dfl", "DistributionFocalLoss"),
    ]


def test_resume_continues_as_if_never_stopped(tmp_path):
    """And what it has learnt fits the stock model."""
    weights, _ = stopped_and_resumed(tmp_path)
    build(twin_configs(DIGITS)[1]).load_state_dict(weights, strict=True)


def balanced_retinanet():
    """A small RetinaNet whose classification loss keeps a moving average."""
    model = small(RETINANET).model
    model.bbox_head.loss_cls = dict(type="detloss_plugins.GHMC", use_sigmoid=True, momentum=0.75)
    return model


STATE = "bbox_head.loss_cls.acc_sum"


def test_state_of_a_loss_is_saved_and_resumed(tmp_path):
    weights, runner = stopped_and_resumed(tmp_path, balanced_retinanet())
    half = torch.load(tmp_path / "stopped" / "epoch_1.pth", weights_only=False)["state_dict"][STATE]
    assert 0 < half.sum() < weights[STATE].sum()  # the average starts at zero and grows
    last = torch.load(tmp_path / "stopped" / "epoch_2.pth", weights_only=False)["state_dict"][STATE]
    assert torch.equal(runner.model.state_dict()[STATE], last)  # the run validates after it has saved


def test_validation_does_not_move_the_state_of_a_loss(batch):
    model = build(Config(dict(model=balanced_retinanet())))
    state = model.state_dict()[STATE]
    data = model.data_preprocessor(copy.deepcopy(batch), training=False)
    for training, moves in ((False, False), (True, True)):
        before = state.clone()
        with torch.no_grad():
            model.train(training)(**data, mode="loss")
        assert torch.equal(state, before)
        model(**data, mode="loss")
        assert torch.equal(state, before) != moves


CLASSIFICATION = ["CrossEntropyLoss", "BinaryCrossEntropyLoss", "BalancedCrossEntropyLoss", "FocalLoss"]
CLASSIFICATION += ["ModifiedCrossEntropyLoss", "QualityFocalLoss", "VarifocalLoss", "GeneralizedFocalLoss"]
CLASSIFICATION += ["ConfidenceWeightedLoss", "JointLoss"]


def train(model, batch, part):
    """Thirty steps on one batch; the first value of a part of the loss dict and the largest of the last five."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        values.append(sum(part(backward(model, batch)).values()).item())
        optimizer.step()
    return values[0], max(values[-5:])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "use_sigmoid"), [form for form in FORMS if form[0] in CLASSIFICATION])
def test_classification_losses_of_the_documents_decrease(name, use_sigmoid, batch):
    model, _ = classifier(name, use_sigmoid)
    start, end = train(model, batch, class_losses)
    assert end < 0.9 * start


@pytest.mark.slow
@pytest.mark.parametrize("name", REGRESSION)
def test_regression_losses_of_the_documents_decrease(name, batch):
    """On encoded deltas, where they belong."""
    cfg = small(RETINANET)
    cfg.model.bbox_head.reg_decoded_bbox = False
    cfg.model.bbox_head.loss_bbox = dict(type=f"detloss_plugins.{name}")
    model = build(cfg)
    assert type(model.bbox_head.loss_bbox) is loss_class(name)
    start, end = train(model, batch, lambda losses: {"loss_bbox": losses["loss_bbox"]})
    assert end < 0.9 * start


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bar"), [("gfl", 0.25), ("atss-rs", 0.5)])
def test_digits_config_learns(name, bar, tmp_path):
    """From scratch on two cores to that mAP50, and far above, within five minutes."""
    build_digits()
    start = time.monotonic()
    python(TRAIN, CONFIG_DIR / f"{name}_r18_fpn_digits.py", "--work-dir", tmp_path)
    assert time.monotonic() - start < 300
    assert scalars(tmp_path)[-1].get("coco/bbox_mAP_50", 0) >= bar  # absent if nothing was detected
