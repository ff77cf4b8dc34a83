"""Weights by gradients beside the losses of a dense head of MMDetection."""

import copy
import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from mmdet.registry import MODELS
from mmengine.hooks import Hook
from mmengine.structures import InstanceData
from support.mmdetection import CONFIG_DIR, DIGITS, run, small

from detloss_plugins.adapters.calibrate import STOCK
from detloss_plugins.adapters.mmdetection.calibrate import (
    CalibrationHook,
    Finished,
    build_head,
    calibrate,
    candidate,
    fitting,
)
from detloss_plugins.cli import main
from detloss_plugins.registry import runner_progress
from detloss_plugins.testing import training_tensors
from detloss_plugins.testing.digits import build_digits

pytestmark = pytest.mark.usefixtures("mmdet_scope")
RETINANET = CONFIG_DIR / "retinanet_r18_fpn_digits.py"


def config(path=DIGITS, **head):
    build_digits()
    cfg = small(path)
    for slot, loss in head.items():
        cfg.model.bbox_head[slot] = loss
    cfg.merge_from_dict({"train_cfg.max_epochs": 2, "train_dataloader.batch_size": 4})
    cfg.merge_from_dict({"train_dataloader.dataset.indices": 8})
    return cfg


class Outputs(Hook):
    """The L1 norms of the gradients of the first iteration at what the head gives, one for each kind of output."""

    def before_train(self, runner):
        self.norms = {}
        runner.model.bbox_head.register_forward_hook(self.watch)

    def watch(self, head, args, outputs):
        for kind, levels in enumerate(outputs):
            self.norms[kind] = []
            for level in levels:
                level.register_hook(lambda slope, kind=kind: self.norms[kind].append(slope.abs().sum()))

    def after_train_iter(self, *_, **__):
        raise KeyboardInterrupt  # which ends the run

    def norm(self, kind):
        return torch.stack(self.norms[kind]).sum().item()


@pytest.mark.parametrize("path", [DIGITS, RETINANET], ids=lambda path: path.stem)
def test_the_losses_of_the_config_have_their_own_weights(path):
    """Level by level, through the decoding of boxes; nothing of the training changes. Classes are counted in both."""
    cfg = config(path)
    effective = {"class_weight": "effective"}
    cfg.model.bbox_head.loss_cls.update(effective)
    head = build_head(cfg)
    wanted = [candidate({"type": type(head.loss_cls).__name__, **effective}, head), candidate("GIoULoss", head)]
    cls, bbox = calibrate(cfg, wanted, steps=3)
    assert runner_progress("epoch") is None  # no ScheduledLoss takes itself for trained
    assert (cls.weight, bbox.weight) == (1.0, 2.0)
    assert sorted(cls.ratios) == [1, 2, 3]
    assert 0 < cls.positives == cls.stock_positives < 1
    assert bbox.losses == {"loss_bbox": {"type": "detloss_plugins.GIoULoss", "loss_weight": 2.0}}
    assert cls.losses["loss_cls"]["use_sigmoid"] is True


def test_the_gradients_are_those_of_a_training_with_the_loss(tmp_path):
    """At class scores and box outputs of the first step, where both trainings have the same predictions."""
    losses = {"loss_cls": dict(type="detloss_plugins.VarifocalLoss", use_sigmoid=True)}
    losses["loss_bbox"] = dict(type="detloss_plugins.NWDLoss")
    cfg = config(RETINANET)
    stock, swapped = Outputs(), Outputs()
    run(tmp_path / "stock", stock, model=cfg.model)
    run(tmp_path / "swapped", swapped, model=config(RETINANET, **copy.deepcopy(losses)).model)
    looks = CalibrationHook([candidate(loss, build_head(cfg), slot) for slot, loss in losses.items()], steps=1)
    with pytest.raises(Finished):
        run(tmp_path / "looked", looks, model=cfg.model)
    for kind, (slot, loss) in enumerate(losses.items()):
        for label, training in ((STOCK, stock), (loss["type"].partition(".")[2], swapped)):
            total, _ = looks.found.found[slot, label][1].tolist()
            assert total == pytest.approx(training.norm(kind), rel=1e-4)


def test_a_head_whose_losses_are_sums():
    """YOLOX's divides them itself, so that a mean would be next to nothing there."""
    torch.manual_seed(0)
    assigner = dict(type="SimOTAAssigner", center_radius=2.5)
    own = dict(type="GIoULoss", reduction="sum", loss_weight=5.0)
    options = dict(num_classes=10, in_channels=16, feat_channels=16, stacked_convs=1, loss_bbox=own)
    head = MODELS.build(dict(type="YOLOXHead", **options, train_cfg=dict(assigner=assigner), test_cfg=dict()))
    cls, box = (candidate(loss, head) for loss in ("CrossEntropyLoss", "GIoULoss"))
    with pytest.raises(ValueError, match='Write reduction="sum" in the config of loss_bbox of YOLOXHead'):
        candidate(dict(type="GIoULoss", reduction="mean"), head)
    looks = CalibrationHook([cls, box], steps=2)
    model = torch.nn.Module()
    model.bbox_head = head
    looks.before_train(SimpleNamespace(model=model))
    meta = dict(img_shape=(128, 128), pad_shape=(128, 128), scale_factor=(1, 1))
    for looks.step, number in ((1, 2), (2, 20)):
        corners = torch.rand(number, 2) * 90
        boxes = torch.cat([corners, corners + 10 + torch.rand(number, 2) * 25], 1)
        outputs = head([torch.randn(1, 16, 128 // stride, 128 // stride) for stride in (8, 16, 32)])
        head.loss_by_feat(*outputs, [InstanceData(bboxes=boxes, labels=torch.arange(number) % 10)], [meta])
    of_class, of_box = looks.found.suggestions([cls, box])
    assert (of_class.weight, of_box.weight) == (1.0, 5.0)
    assert of_box.losses["loss_bbox"] == {"type": "detloss_plugins.GIoULoss", "reduction": "sum", "loss_weight": 5.0}


def test_what_fits():
    head = build_head(config())
    classes = {each.label for each in fitting("loss_cls", head)}
    assert classes >= {"FocalLoss", "EqualizedFocalLoss", "GHMC"}
    assert not classes & {"APLoss", "SeesawLoss", "JointLoss", "KLDivLoss"}, "APLoss would rank each level for itself"
    boxes = {each.label for each in fitting("loss_bbox", head)}
    assert boxes >= {"CIoULoss", "WIoULoss"}
    assert "L1Loss" not in boxes, "the head hands over boxes"


@pytest.mark.parametrize(
    ("loss", "slot", "says"),
    [
        ("SmoothL1Loss", None, "hands its loss_bbox, GIoULoss, what a box loss takes"),
        ("APLoss", None, "would rank each level for itself"),
        ("KLDLoss", None, "KLDLoss is a rotated loss, which no slot takes that can be calibrated"),
        ("FocalLoss", "cls", "no slot 'cls' to calibrate in a dense head; the slots are loss_cls, loss_bbox"),
        ({"type": "ScheduledLoss", "losses": [{"type": "FocalLoss"}]}, None, "a weight for each of its losses"),
    ],
)
def test_what_does_not_fit(loss, slot, says):
    with pytest.raises(ValueError, match=says):
        candidate(loss, build_head(config()), slot)


def test_detectors_without_a_dense_head_are_refused():
    with pytest.raises(ValueError, match="dense heads that have loss_cls and loss_bbox, which FasterRCNN has not"):
        build_head(config(CONFIG_DIR / "faster-rcnn_r18_fpn_digits.py"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["FocalLoss", "--verify"], "are for Ultralytics"),
        (["epochs=1"], "The config has no key epochs"),
        (["mine=box: {type: GIoULoss, epss: 1}"], "has no hyper-parameter 'epss'"),
        (["mine=dfl: {type: DistributionFocalLoss}"], "which no slot takes that can be calibrated"),
    ],
)
def test_mistakes_are_said_before_anything_is_trained(words, says):
    done = CliRunner().invoke(main, ["calibrate", "gfl_r18_fpn_digits", *words])
    assert done.exit_code == 2, done.output
    assert says in done.output


def test_auto_has_no_meaning_in_a_config():
    with pytest.raises(ValueError, match='loss_weight="auto" of FocalLoss has no meaning here'):
        MODELS.build(dict(type="detloss_plugins.FocalLoss", loss_weight="auto"))


def test_it_is_quiet_without_ultralytics(monkeypatch, caplog):
    """Who has MMDetection alone was told to install the other."""
    monkeypatch.setitem(sys.modules, "ultralytics.utils", None)
    logger = logging.getLogger("some.framework")
    with training_tensors.quiet():
        logger.warning("within")
        logger.error("wrong")
    logger.warning("after")
    assert caplog.messages == ["wrong", "after"]


@pytest.mark.slow
def test_the_command(tmp_path):
    words = ["retinanet_r18_fpn_digits", "QualityFocalLoss", "mine=box: {type: CIoULoss}", "--steps", "4"]
    done = CliRunner().invoke(main, ["calibrate", *words, "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["suggestions"]
    assert [each["slot"] for each in found] == ["loss_cls", "loss_bbox"]
    weight = found[1]["weight"]
    assert f"loss_bbox=dict(type='detloss_plugins.CIoULoss', loss_weight={weight})" in done.output
    assert 1.5 < weight < 3, "beside GIoU of weight 2"
