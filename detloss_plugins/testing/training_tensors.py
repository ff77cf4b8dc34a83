"""Real inputs for losses: what a YOLO training step and an mmdet training step hand to them on the digits set."""

import io
import logging
import tempfile
import warnings
from collections import defaultdict
from contextlib import contextmanager, redirect_stdout, suppress

import numpy as np
import torch

from detloss_plugins.nested import each_tensor
from detloss_plugins.testing.digits import NAMES, build_digits

STEPS = 3  # optimiser steps before the capture, so that the tensors are not those of an untouched initialisation


@contextmanager
def quiet():
    """Keep the frameworks' logs to themselves, but for errors; none of them is needed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _yolo_step(model_yaml, captured):
    """Capture the inputs of the stock criterion's parts in a few steps of a YOLO model; boxes in pixels."""
    from ultralytics import YOLO
    from ultralytics.utils.tal import bbox2dist

    yolo = YOLO(model_yaml)
    oriented = yolo.task == "obb"

    def on_class(module, args):
        scores, target = args
        captured["classification"] = (scores.flatten(0, 1), target.flatten(0, 1))

    def on_box(module, args):
        dist, boxes, anchors, target, _, _, positive, imgsz, stride = args
        unit = stride[positive.nonzero(as_tuple=True)[1]]
        pixels = (torch.cat([b[positive][:, :4] * unit, b[positive][:, 4:]], -1) for b in (boxes, target))
        captured["rotated" if oriented else "box"] = tuple(pixels)
        if oriented:
            return
        bins = dist.shape[-1] // 4
        if bins > 1:
            sides = bbox2dist(anchors, target, bins - 1)[positive]
            captured["distribution"] = (dist[positive].view(-1, bins), sides.flatten())
        else:
            share = stride / imgsz[[1, 0, 1, 0]]
            captured["regression"] = ((dist * share)[positive], (bbox2dist(anchors, target) * share)[positive])

    class Captured(Exception):
        pass

    class Capture(yolo.task_map[yolo.task]["trainer"]):
        def _setup_train(self):
            super()._setup_train()
            self.model.criterion = criterion = self.model.init_criterion()
            part = getattr(criterion, "one2many", criterion)
            part.bce.register_forward_pre_hook(on_class)
            part.bbox_loss.register_forward_pre_hook(on_box)

        def optimizer_step(self):
            super().optimizer_step()
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps > STEPS:
                raise Captured

    settings = {"imgsz": 128, "batch": 8, "nbs": 8, "device": "cpu", "plots": False, "verbose": False}
    data = str(build_digits(yolo.task) / "digits.yaml")
    with tempfile.TemporaryDirectory() as folder, suppress(Captured):
        yolo.train(trainer=Capture, data=data, project=folder, pretrained=False, warmup_epochs=0, **settings)


def _mmdet_step(config, captured):
    """Capture the inputs of every loss of an mmdet detector, by family, in a few steps."""
    from mmdet.structures.mask import BitmapMasks
    from mmengine.runner import Runner

    from detloss_plugins.loss import Loss

    root = build_digits()
    dataset = {
        "type": "CocoDataset",
        "data_root": f"{root}/",
        "ann_file": "annotations/train.json",
        "data_prefix": {"img": "images/train/"},
        "metainfo": {"classes": tuple(NAMES)},
        "pipeline": [
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations", "with_bbox": True},
            {"type": "Resize", "scale": (128, 128)},
            {"type": "PackDetInputs"},
        ],
    }
    loader = {"batch_size": 8, "sampler": {"type": "DefaultSampler", "shuffle": False}, "dataset": dataset}
    model = config.model
    model.backbone.update(depth=18, init_cfg=None)
    model.neck.in_channels = [64, 128, 256, 512]
    (model.get("bbox_head") or model.mask_head).num_classes = len(NAMES)
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector = MODELS.build(model)
        batches = iter(Runner.build_dataloader(loader, seed=0))

    def hook(module, args, kwargs):
        captured[module.family].append((args, kwargs))

    for module in detector.modules():
        if isinstance(module, Loss):
            module.register_forward_pre_hook(hook, with_kwargs=True)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    for _ in range(STEPS + 1):
        captured.clear()
        data = detector.data_preprocessor(next(batches), training=True)
        for sample in data["data_samples"]:  # the digits have no masks; their boxes make good ones
            height, width = sample.img_shape
            masks = [_filled(box, height, width) for box in sample.gt_instances.bboxes.round().int().tolist()]
            sample.gt_instances.masks = BitmapMasks(masks, height, width)
        losses = detector(**data, mode="loss")
        total, _ = detector.parse_losses(losses)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()


def _filled(box, height, width):
    mask = np.zeros((height, width), np.uint8)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = 1
    return mask


def _join(calls):
    """One (pred, target) from the calls a head makes, one a feature level."""
    preds, targets = zip(*(args[:2] for args, _ in calls), strict=True)
    if isinstance(targets[0], tuple):
        return torch.cat(preds), tuple(torch.cat(parts) for parts in zip(*targets, strict=True))
    return torch.cat(preds), torch.cat(targets)


@quiet()
def training_tensors():
    """``{source: {family: (pred, target)}}`` captured from yolov8n, yolov8n-obb, yolo26n and three mmdet detectors."""
    from mmengine.hub import get_config

    yolo, oriented, yolo26 = {}, {}, {}
    _yolo_step("yolov8n.yaml", yolo)
    _yolo_step("yolov8n-obb.yaml", oriented)
    _yolo_step("yolo26n.yaml", yolo26)
    yolo["rotated"] = oriented["rotated"]
    yolo["regression"] = yolo26["regression"]

    mmdet = {}
    for name in (
        "gfl/gfl_r50_fpn_1x_coco.py",
        "retinanet/retinanet_r50_fpn_1x_coco.py",
        "solo/solo_r50_fpn_1x_coco.py",
    ):
        config = get_config(f"mmdet::{name}")
        head = config.model.get("bbox_head") or config.model.mask_head
        for key, loss in head.items():
            if key.startswith("loss_"):
                loss["type"] = f"detloss_plugins.{loss['type']}"
        calls = defaultdict(list)
        _mmdet_step(config, calls)
        for family, group in calls.items():
            mmdet.setdefault(family, _join(group))
    return each_tensor(torch.Tensor.detach, {"yolo step": yolo, "mmdet step": mmdet})
