"""A distributed training in which one rank has no objects: nobody waits for ever, and the state becomes one."""

import warnings

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.dist import all_reduce_params
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from support.mmdetection import CONFIG_DIR, Interrupt, build, run, small
from support.ranks import two_ranks
from support.ultralytics import detector
from torch.nn.parallel import DistributedDataParallel

from detloss_plugins.adapters import heads
from detloss_plugins.adapters.ultralytics import install
from detloss_plugins.testing.digits import build_digits

STEPS = 2
WARNING = 'write custom_hooks=[dict(type="SyncBuffersHook")]'
WIOU = {"type": "WIoULoss", "momentum": 0.5}


BOXES = torch.tensor([[10.0, 12, 58, 76], [60, 70, 110, 104]])


def mmdet_rank(rank):
    """The running mean after some steps of FCOS, whose head skips the box loss without positives, and once averaged;
    how many warnings there were."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        cfg = small(CONFIG_DIR / "fcos_r50_fpn_1x_coco.py")
        cfg.model.bbox_head.loss_bbox = {**WIOU, "type": "detloss_plugins.WIoULoss"}
        model = build(cfg)
        ranks = DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
        sample = DetDataSample(metainfo=dict(img_shape=(128, 128), ori_shape=(128, 128), pad_shape=(128, 128)))
        boxes = BOXES[: 2 * (rank == 0)]
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.arange(len(boxes)))
        image = torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(STEPS):
                data = model.data_preprocessor({"inputs": [image] * 2, "data_samples": [sample] * 2}, training=True)
                model.parse_losses(ranks(**data, mode="loss"))[0].backward()
    mean = model.bbox_head.loss_bbox.mean
    own = mean.clone()
    all_reduce_params(mean.unsqueeze(0), op="mean")  # what mmengine's SyncBuffersHook does with every buffer
    return own, mean, sum(WARNING in str(warning.message) for warning in seen)


def yolo_rank(rank):
    """The running mean after each step of yolov8n."""
    model = detector("yolov8n")
    install(model, {"box": WIOU})
    boxes = torch.tensor([[0.3, 0.4, 0.4, 0.5], [0.7, 0.7, 0.4, 0.3]])[: 2 * (rank == 0)]
    batch = {"img": torch.rand(1, 3, 64, 64), "bboxes": boxes, "cls": torch.zeros(len(boxes), 1)}
    batch["batch_idx"] = torch.zeros(len(boxes))
    means = []
    for _ in range(STEPS):
        model(batch)[0].sum().backward()
        means.append(model.criterion.built["box"].mean.clone())
    return means


@pytest.mark.slow
def test_mmdet_head_without_positives_on_a_rank(tmp_path):
    (busy, first, warned), (idle, second, quiet) = two_ranks(mmdet_rank, tmp_path)
    assert (warned, quiet) == (1, 0), "once, by the rank that moves a state"
    assert busy < 1, "it has seen boxes"
    assert idle == 1, "it has seen none"
    torch.testing.assert_close(first, (busy + idle) / 2)
    assert first == second


@pytest.mark.parametrize("hooks", [[], pytest.param([dict(type="SyncBuffersHook")], marks=pytest.mark.slow)])
def test_a_runner_without_the_hook_is_warned(hooks, tmp_path, monkeypatch):
    """In its first step, of each type of loss once; one with it, or without other ranks, is not."""
    build_digits()
    with DefaultScope.overwrite_default_scope("mmdet"):
        cfg = small(CONFIG_DIR / "retinanet_r50_fpn_1x_coco.py")
        cfg.model.bbox_head.loss_bbox = {**WIOU, "type": "detloss_plugins.WIoULoss"}
        for ranks in (1, 2):
            monkeypatch.setattr(heads, "_ranks", lambda ranks=ranks: ranks)
            monkeypatch.setattr(heads, "_asked", set())
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                run(tmp_path / str(ranks), Interrupt(at=1), model=cfg.model, custom_hooks=hooks)
            found = [str(warning.message) for warning in seen if WARNING in str(warning.message)]
            assert len(found) == (ranks == 2 and not hooks)
            assert all("state of WIoULoss" in message for message in found)


def waits(loss, monkeypatch):
    """Whether a training step of a loss of classes waits for the other rank."""
    waited = []
    with monkeypatch.context() as two:
        two.setattr(torch.distributed, "is_initialized", lambda: True)
        two.setattr(torch.distributed, "get_world_size", lambda: 2)
        two.setattr(torch.distributed, "all_reduce", waited.append)
        loss(torch.zeros(4, 3, requires_grad=True), torch.rand(4, 3))
    return bool(waited)


OF_STATE = [
    {"type": "SlideLoss"},
    {"type": "SlideLoss", "decay": 0.9},
    {"type": "GHMC", "momentum": 0.5},
    {"type": "EqualizedFocalLoss", "num_classes": 3},
    {"type": "JointLoss", "losses": [{"type": "SlideLoss"}, {"type": "FocalLoss"}]},
]


def test_a_class_loss_of_ious_that_is_skipped_without_positives():
    """DDODHead's loss_iou, a sigmoid cross entropy, is called in steps with positives only."""
    loss = {"type": "detloss_plugins.SlideLoss", "use_sigmoid": True}
    with DefaultScope.overwrite_default_scope("mmdet"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = MODELS.build({"type": "DDODHead", "num_classes": 3, "in_channels": 8, "loss_iou": loss})
    assert not head.loss_iou.facts.every_rank


@pytest.mark.parametrize("cfg", OF_STATE, ids=str)
def test_a_head_that_skips_its_class_loss_without_positives(cfg, monkeypatch):
    """YOLOX's, and DINO's of its denoising queries: a state of a class loss is averaged as that of a box loss there."""
    cfg = {**cfg, "type": f"detloss_plugins.{cfg['type']}", "use_sigmoid": True}
    dense = {"num_classes": 3, "in_channels": 8, "feat_channels": 8, "stacked_convs": 1}
    layers = {"num_classes": 3, "embed_dims": 8, "share_pred_layer": False, "num_pred_layer": 1}
    monkeypatch.setattr(heads, "_ranks", lambda: 2)
    for name, options, skips in (("YOLOXHead", dense, True), ("RetinaHead", dense, False), ("DINOHead", layers, True)):
        with DefaultScope.overwrite_default_scope("mmdet"), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            monkeypatch.setattr(heads, "_asked", set())
            reduction = "sum" if name == "YOLOXHead" else "mean"
            loss = MODELS.build({"type": name, **options, "loss_cls": {**cfg, "reduction": reduction}}).loss_cls
            assert waits(loss, monkeypatch) != skips
        assert any(WARNING in str(warning.message) for warning in seen) == skips


@pytest.mark.slow
def test_yolo_without_objects_on_a_rank(tmp_path):
    first, second = two_ranks(yolo_rank, tmp_path)
    assert first == second, "averaged in every step"
    assert 1 > first[0] > first[1]
