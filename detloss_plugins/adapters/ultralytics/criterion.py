"""The stock criterion of every task of YOLO with losses of ours in its slots."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from ultralytics.utils.loss import RotatedBboxLoss, v8DetectionLoss

from detloss_plugins.adapters.ultralytics import compat
from detloss_plugins.adapters.ultralytics.assigner import FastAssigner, FastTargets, Scene, Targets, can_replace, padded
from detloss_plugins.adapters.ultralytics.building import (
    average_states,
    build_losses,
    check_head,
    check_ignored,
    model_task,
    training_args,
)
from detloss_plugins.adapters.ultralytics.config import load_losses
from detloss_plugins.adapters.ultralytics.ignore import Regions, StockClassLoss
from detloss_plugins.adapters.ultralytics.per_image import LossesByImage, branches, per_image
from detloss_plugins.adapters.ultralytics.slots import BoxCriterion, ClassSlot, RotatedBoxCriterion
from detloss_plugins.precision import float32, is_asynchronous


class PluginDetectionLoss(compat.DetectionCriterion):
    """The stock detection criterion with losses of ours in its slots; see :func:`criterion_class` for other tasks.

    Class losses are summed over anchors and classes and divided by ``target_scores_sum``, as stock BCE is; box and
    distribution losses are weighted by the target scores and divided by the same sum. The box loss gets boxes in
    pixels of the network's input, where the stock one gets stride units. The gains ``box``, ``cls`` and ``dfl`` of the
    training arguments apply on top of each loss's ``loss_weight``.

    Args:
        model: a model of one of YOLO's tasks. One without training arguments (``args``) gets Ultralytics' default
            gains, which are logged.
        tal_topk, tal_topk2: as in the stock class.
        losses: see :func:`load_losses`; a slot that is absent keeps the stock loss.
        compile: compile all of the losses, as ``compile=True`` in the dict of each does.

    Raises:
        ValueError: also if a loss does not suit the model; see :func:`check_head` and :func:`check_ignored`.
    """

    observed = False  # whether its parts are observed, by per_image or curves
    curves = None  # what looks at it in training

    def __init__(
        self,
        model: torch.nn.Module,
        tal_topk: int = 10,
        tal_topk2: int | None = None,
        losses: Mapping[str, Any] | None = None,
        compile: bool = False,
    ) -> None:
        self.losses = load_losses(losses or {}, model_task(model), compile=compile)
        check_head(model, self.losses)
        with training_args(model):
            super().__init__(model, tal_topk, tal_topk2)
        self.built = build_losses(self.losses, self.nc, self.device)
        regions = None
        if ignored := check_ignored(model, self.losses):
            regions = Regions(self.assigner, ignored, self.nc, self.device)
            self.bce = StockClassLoss(self.bce, regions)
        if "cls" in self.built:
            self.bce = ClassSlot(self.built["cls"], compat.class_weights(self) is not None, regions)
        if self.built.keys() & {"box", "dfl"}:
            kind = RotatedBoxCriterion if isinstance(self.bbox_loss, RotatedBboxLoss) else BoxCriterion
            self.bbox_loss = kind(self.reg_max, self.built.get("box"), self.built.get("dfl")).to(self.device)
        self.scene, self.targets = Scene(), None
        compiled = any(loss.compiled for loss in self.built.values())
        if compiled and is_asynchronous(self.device) and can_replace(self.assigner):
            self.targets = FastTargets(self.assigner, self.reg_max) if regions is None else None
            self.assigner = FastAssigner(self.assigner)
        if regions is not None:
            regions.assigner, self.assigner = self.assigner, regions

    def get_assigned_targets_and_loss(self, preds, batch, **extra):
        """The stock method; where waits count, with all before the losses in fewer kernels."""
        stock = super().get_assigned_targets_and_loss
        of_task = stock.__func__ is not v8DetectionLoss.get_assigned_targets_and_loss
        if of_task or extra or self.observed or not is_asynchronous(self.device):
            return stock(preds, batch, **extra)
        dist, scores = (preds[name].permute(0, 2, 1) for name in ("boxes", "scores"))
        own_boxes = self.built.keys() >= {"box", "dfl"}
        # In the order in which the stock losses add up, where they do.
        dist = dist if own_boxes else dist.contiguous()
        scores = scores if "cls" in self.built else scores.contiguous()
        scene = self.scene
        scene.resize(preds["feats"], self.stride)
        objects = scene.objects(batch, len(scores))
        boxes = None if own_boxes and self.targets else self.bbox_decode(scene.anchors, dist)
        if self.targets:
            found, pixels = self.targets(scores.detach(), dist.detach(), scene.places, *objects), None
            dist = dist.contiguous()
        else:
            pixels = float32(boxes) * scene.strides
            found = self.assigner(scores.detach().sigmoid(), pixels.detach(), scene.points, *padded(*objects))
            found = Targets(*found[1:], found[2].sum(-1))
        total = found.scores.sum().clamp(min=1) if pixels is not None else found.weight.sum().clamp(min=1)
        loss_cls = self.class_loss(scores, found.scores)
        gains = scene.constant(self.hyp.box, self.hyp.cls, self.hyp.dfl)
        if own_boxes:
            loss_box, loss_dfl = self.own_box_losses(dist, pixels, found)
            loss = torch.stack([loss_box, loss_cls, loss_dfl]) * (gains / total)
        else:
            inputs = dist, boxes, scene.anchors, found.boxes / scene.strides, found.scores, total, found.positive
            loss_box, loss_dfl = self.bbox_loss(*inputs, scene.image_size, scene.strides)
            loss = torch.stack([loss_box, loss_cls / total, loss_dfl]) * gains
        # The losses of a pose write into the boxes that they get, and the backward needs these.
        targets = found.boxes if type(self) is PluginDetectionLoss else found.boxes.clone()
        assigned = found.positive, found.index, targets, scene.anchors, scene.strides
        return assigned, loss, compat.named(self, loss.detach())

    def class_loss(self, scores: Tensor, target_scores: Tensor) -> Tensor:
        """The summed class loss, with the weights of the classes if there are any."""
        loss, weights = self.bce(scores, target_scores), compat.class_weights(self)
        loss = loss if weights is None else loss * weights
        return loss.sum() if loss.dim() else loss

    def own_box_losses(self, dist: Tensor, pixels: Any, found: Any) -> tuple[Tensor, Tensor]:
        """The summed losses of both slots; of boxes in pixels, or where these are None of what the head predicts."""
        places, criterion = self.scene.places_of(len(dist)), self.bbox_loss
        if pixels is None:
            rows = criterion.rows_of(found.positive, dist, found.boxes, places, found.weight)
            return criterion.sums_of_head(*rows, self.scene.image_size)
        rows = criterion.rows_of(found.positive, dist, found.boxes, places, found.weight, pixels)
        dist, target, places, weight, pixels = rows
        return criterion.sums(pixels, target, dist, target / places[..., 2:], places, weight, self.scene.image_size)

    def per_image(self, preds: Any, batch: Mapping[str, Any]) -> LossesByImage:
        """The losses of each image and each object; see :func:`per_image`."""
        return per_image(self, preds, batch)

    def loss(self, preds, batch):
        """The stock loss; the state of its losses is averaged over the ranks."""
        found = super().loss(preds, batch)
        if not self.observed:
            average_states(self.built.values())
            if self.curves is not None and torch.is_grad_enabled():
                self.curves.look(self, preds, batch)
        return found


@functools.cache
def criterion_class(stock: type) -> type:
    """A stock criterion such as ``v8OBBLoss`` with the constructor and the slots of :class:`PluginDetectionLoss`."""
    if issubclass(PluginDetectionLoss, stock):
        return PluginDetectionLoss
    return type(f"Plugin{stock.__name__.removeprefix('v8')}", (PluginDetectionLoss, stock), {})


def criterion_state(criterion: Any) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The state of a criterion's losses as nested dicts of tensors; empty for losses without state."""
    state = {}
    for branch, part in branches(criterion).items():
        for slot, loss in part.built.items():
            if buffers := loss.state_dict():
                state.setdefault(branch, {})[slot] = {name: value.cpu().clone() for name, value in buffers.items()}
    return state


def load_criterion_state(criterion: Any, state: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> None:
    """Give a criterion's losses the state that :func:`criterion_state` took."""
    for branch, part in branches(criterion).items():
        for slot, buffers in state.get(branch, {}).items():
            part.built[slot].load_state_dict(buffers)
