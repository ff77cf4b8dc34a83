"""The stock criteria with losses of ours in their slots, for every task of YOLO and for RT-DETR."""

import functools
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from ultralytics.cfg import get_cfg
from ultralytics.models.utils.loss import RTDETRDetectionLoss
from ultralytics.nn.tasks import guess_model_task
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER
from ultralytics.utils.loss import BboxLoss, RotatedBboxLoss, v8DetectionLoss
from ultralytics.utils.ops import xywh2xyxy
from ultralytics.utils.tal import bbox2dist

from detloss_plugins.adapters.curves import part_values
from detloss_plugins.adapters.ultralytics import compat
from detloss_plugins.adapters.ultralytics.assigner import (
    FastAssigner,
    FastTargets,
    Scene,
    Targets,
    boxes_of,
    can_replace,
    padded,
    sides_of,
    sum_of_head,
)
from detloss_plugins.adapters.ultralytics.config import SLOTS, check_task, counted, filled, load_losses
from detloss_plugins.adapters.ultralytics.ignore import Regions, StockClassLoss, ignored_classes
from detloss_plugins.adapters.ultralytics.per_image import LossesByImage, per_image
from detloss_plugins.families import ClassificationLoss
from detloss_plugins.loss import average_state
from detloss_plugins.losses import ScheduledLoss, in_turn
from detloss_plugins.precision import float32, is_asynchronous, without_autocast
from detloss_plugins.reduction import apply_weight
from detloss_plugins.registry import build_loss


def model_task(model: torch.nn.Module | Mapping[str, Any]) -> str:
    """The task of a model, or of the dict of its YAML file; RT-DETR's is "rtdetr".

    Raises:
        ValueError: if losses cannot be swapped for it.
    """
    cfg = model if isinstance(model, dict) else model.yaml
    task = "rtdetr" if cfg["head"][-1][2] == "RTDETRDecoder" else guess_model_task(cfg)
    check_task(task)
    return task


def slot_gains(args, task="detect"):
    """The gains on top of each loss's ``loss_weight``: the training arguments', or those of RT-DETR's criterion."""
    if task == "rtdetr":
        return {f"loss_{name}": gain for name, gain in RTDETRDetectionLoss().loss_gain.items()}
    return {slot: getattr(args, slot) for slot in SLOTS[task]}


@contextmanager
def training_args(model):
    """While a criterion is built, give a model that was never trained Ultralytics' defaults for its ``args``.

    A model of a checkpoint has the few arguments it was saved with, as a dict. The gains are logged in both cases.
    """
    given = vars(model).get("args", {})
    if not isinstance(given, dict):
        yield
        return
    model.args = get_cfg(overrides={name: value for name, value in given.items() if name in DEFAULT_CFG_DICT})
    gains = ", ".join(f"{slot} {gain:g}" for slot, gain in slot_gains(model.args).items())
    LOGGER.info(f"detloss_plugins: this model is not in training; its losses have the gains {gains}")
    try:
        yield
    finally:
        del model.args
        if given:
            model.args = given


def average_states(losses):
    """Average the state of those losses that a rank without positives does not call; for every step of training."""
    if torch.is_grad_enabled():  # validation is of one rank
        for loss in losses:
            if not loss.facts.every_rank:
                average_state(loss)


def tell_image_size(loss, image_size):
    """Hand the size ``(height, width)`` of this batch to the losses that take one, also nested ones."""
    for part in loss.modules():
        if hasattr(part, "batch_image_size"):
            part.batch_image_size = image_size


class _ClassSlot:
    """Stands in for the stock criterion's element-wise BCE; the criterion weights, sums and normalises the result.

    Where nothing weights the classes, the sum is all that it needs, and gets: faster, and in a fraction of the memory.
    What the ``regions``, if there are any, leave out is a negative target, which every class loss ignores.
    """

    def __init__(self, loss, weighs, regions=None):
        self.loss, self.regions = loss, regions
        self.weighs = weighs  # whether the criterion weights the classes
        self.of_elements = weighs or loss.family == "ranking" or loss.facts.self_normalized

    def __call__(self, pred_scores, target_scores):
        if isinstance(self.loss, ScheduledLoss):
            found = ((slot(pred_scores, target_scores), share) for slot, share in self.in_turn())
            return sum(share * (values if self.weighs else values.sum()) for values, share in found)
        target = self.wanted(target_scores)
        if not self.of_elements:
            return self.loss(pred_scores, target, reduction_override="sum")
        # Under autocast the sum of the scores would be rounded to half precision.
        target_scores, target = float32(target_scores), float32(target)
        with without_autocast(pred_scores.device):
            rows = pred_scores.flatten(0, -2), target.flatten(0, -2)
            seen = self.loss.observe(*rows, None)
            elements, valid = self.loss.unweighted(*rows, seen)
        if self.loss.family == "ranking":
            elements = self.in_their_places(elements, target_scores)
        elif valid is not None:
            elements = apply_weight(elements, valid)
        if self.loss.facts.self_normalized:
            # The criterion divides the sum by the scores; a loss with a normaliser of its own keeps that.
            own = self.loss.normalizer(elements.numel(), seen)
            elements = elements * (target_scores.sum().clamp(min=1) / own)
        return self.loss.loss_weight * elements.view_as(pred_scores)

    def in_turn(self):
        """Of a ScheduledLoss, the losses that count now, each in such a slot, and the share of each."""
        return [(_ClassSlot(loss, self.weighs, self.regions), share) for loss, share in in_turn(self.loss)]

    def wanted(self, target_scores):
        """The targets, negative in what is left out."""
        return target_scores if self.regions is None else target_scores.masked_fill(self.regions.left_out(), -1)

    def parts(self, pred_scores, target_scores):
        """What each loss that the slot's is made of has in the sum."""
        if not isinstance(self.loss, ScheduledLoss):
            return part_values(self.loss, pred_scores, self.wanted(target_scores), reduction_override="sum")
        values = {slot.loss: share * slot(pred_scores, target_scores).sum() for slot, share in self.in_turn()}
        return [values.get(part, torch.zeros(())) for part in self.loss.losses]

    @staticmethod
    def in_their_places(losses, target_scores):
        """The losses of the positives where class weights find them, so scaled that the criterion gives their mean."""
        share = target_scores.sum().clamp(min=1) / max(len(losses), 1)
        nothing = torch.zeros(target_scores.shape, dtype=losses.dtype, device=losses.device)
        return nothing.masked_scatter(target_scores > 0, losses * share)


def _in_pixels(boxes, stride):
    """Boxes ``(..., 4)`` or ``(..., 5)`` of stride units in pixels of the input; an angle stays what it is."""
    boxes = float32(boxes)
    return boxes * stride if boxes.shape[-1] == 4 else torch.cat([boxes[..., :4] * stride, boxes[..., 4:]], -1)


class _BoxCriterion(BboxLoss):
    """The stock box criterion with the box loss, the distribution (or distance) loss, or both replaced."""

    def __init__(self, reg_max, box, dfl):
        super().__init__(reg_max)
        self.reg_max, self.box, self.dfl = reg_max, box, dfl

    def forward(self, *inputs):
        dist, boxes, anchors, target, scores, scores_sum, positive, imgsz, stride = compat.box_inputs(self, inputs)
        stock = super().forward(*inputs) if None in (self.box, self.dfl) else (None, None)
        places = torch.cat([anchors, stride], -1).expand(len(dist), -1, -1)
        dist, boxes, target, scores, places = self.rows_of(positive, dist, boxes, target, scores, places)
        pixels = _in_pixels(boxes, places[..., 2:]), _in_pixels(target, places[..., 2:])
        found = self.sums(*pixels, dist, target, places, scores.sum(-1), imgsz)
        return tuple(of_stock if own is None else own / scores_sum for own, of_stock in zip(found, stock, strict=True))

    def takes_all_anchors(self, device):
        """Whether the losses get all anchors, those that are not positive with weight 0, in place of the positive."""
        own = [loss for loss in (self.box, self.dfl) if loss is not None]
        return is_asynchronous(device) and all(loss.compiled and loss.facts.row_wise for loss in own)

    def rows_of(self, positive, *tensors):
        """Those rows of tensors ``(B, A, ...)`` that the losses get."""
        if self.takes_all_anchors(positive.device):
            return tensors
        index = positive.nonzero(as_tuple=True)
        return tuple(x[index] for x in tensors)

    def sums(self, boxes, target_boxes, dist, target, places, weight, imgsz):
        """The summed losses of the two slots; None for a stock one.

        Args:
            boxes, target_boxes: in pixels, ``(..., 4 or 5)``.
            dist: what the head predicts, ``(..., 4 * bins)``.
            target: boxes ``(..., 4 or 5)`` in stride units.
            places: anchors and strides ``(..., 3)``.
            weight: the scores ``(...)`` of the anchors' classes, 0 for those that are not positive.
            imgsz: as in the stock criterion.
        """
        loss_box = loss_dfl = None
        if self.box is not None:
            tell_image_size(self.box, float32(imgsz))
            loss_box = self.box(boxes, target_boxes, weight, reduction_override="sum")
        if self.dfl is not None:
            loss_dfl = self.sum_of_sides(dist, target, places, weight, imgsz)
        return loss_box, loss_dfl

    def sums_of_head(self, dist, target, places, weight, imgsz):
        """The same of both slots, of boxes in pixels and what the head predicts, in a kernel each."""
        tell_image_size(self.box, imgsz)
        loss_box = sum_of_head(self.box, boxes_of, self.reg_max, dist, target, places, weight)
        if self.reg_max > 1:
            return loss_box, sum_of_head(self.dfl, sides_of, self.reg_max, dist, target, places, weight)
        return loss_box, self.sum_of_sides(dist, target / places[..., 2:], places, weight, imgsz)

    def sum_of_sides(self, dist, target, places, weight, imgsz):
        """The summed loss of the ``dfl`` slot; a box counts as the mean of its four sides."""
        each = (weight / 4).unsqueeze(-1).expand(*weight.shape, 4)
        return self.dfl(*self.sides(dist, target, places, imgsz), each, reduction_override="sum")

    def sides(self, dist, target, places, imgsz):
        """What the head predicts for the four sides of a box, and the distances it should predict."""
        anchors, stride = places.split((2, 1), -1)
        if self.reg_max > 1:
            return dist.unflatten(-1, (4, self.reg_max)), self.distances(anchors, target, self.reg_max - 1)
        # A head without bins regresses the distances themselves, here as shares of the image's sides.
        to_share = stride / imgsz[[1, 0, 1, 0]]
        return dist * to_share, self.distances(anchors, target) * to_share

    def distances(self, anchors, target, largest=None):
        """Distances of the sides of the target boxes from the anchor points, in stride units."""
        return bbox2dist(anchors, target, largest)


class _RotatedBoxCriterion(_BoxCriterion, RotatedBboxLoss):
    """The same for oriented boxes ``(cx, cy, w, h, theta)``, whose sides are measured in the box's own axes."""

    def distances(self, anchors, target, largest=None):
        return compat.rbox2dist(target, anchors, largest)


def check_head(model: torch.nn.Module, losses: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if the loss of the ``dfl`` slot does not suit the model.

    It must be a distribution loss if the head has a distribution over bins, and a point-wise loss if it has none
    (``reg_max=1``).
    """
    if "dfl" not in losses:
        return
    name, bins, family = losses["dfl"]["type"], model.model[-1].reg_max, build_loss(losses["dfl"]).family
    if bins == 1 and family == "distribution":
        raise ValueError(
            f"{name} needs a distribution over bins, but this model's head has none (reg_max=1): it regresses the four "
            "distances directly. Use a point-wise loss such as L1Loss in the 'dfl' slot, or leave it out."
        )
    if bins > 1 and family == "regression":
        raise ValueError(
            f"{name} regresses distances, but this model's head predicts a distribution over {bins} bins. "
            "Use DistributionFocalLoss in the 'dfl' slot, or leave it out."
        )


def check_class_weights(model, losses):
    """Raise ``ValueError`` if a loss has weights, or another setting, for another number of classes than the model."""
    classes = model.model[-1].nc
    losses = counted(losses, [1] * classes)  # which may not be known yet
    for loss in build_losses(losses, classes, "cpu").values():
        for part in loss.modules():
            weights = getattr(part, "class_factors", None)
            if weights is not None and len(weights) != classes:
                raise ValueError(
                    f"{type(part).__name__} has {len(weights)} class weights, and the model {classes} classes."
                )
            if isinstance(part, ClassificationLoss):
                part.eval()(torch.zeros(1, classes), torch.zeros(1, classes))  # it says itself what does not fit


def check_ignored(model, losses):
    """The indices of the classes that the losses ignore.

    Raises:
        ValueError: for a class that the model has not, or a model whose classes are texts.
        RuntimeError: if this version of Ultralytics cannot leave them out of validation.
    """
    if "ignore" not in losses:
        return []
    compat.require("ignore")
    if hasattr(model, "set_classes"):
        raise ValueError(
            "The classes of World and YOLOE are texts, which differ from image to image: leave ignore out."
        )
    return ignored_classes(losses, model.names)


def build_losses(losses, num_classes, device):
    """The losses of a checked dict on a device; one that must know the number of classes is told."""
    ignores = "ignore" in losses
    slots = {slot: cfg for slot, cfg in losses.items() if slot != "ignore"}
    built = {slot: build_loss(filled(cfg, num_classes=num_classes)).to(device) for slot, cfg in slots.items()}
    for part in (part for loss in built.values() for part in loss.modules()):
        part.unchecked, part.may_ignore = 0, ignores  # what the criterion hands over needs no look, which would wait
    return built


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
    ) -> None:
        self.losses = load_losses(losses or {}, model_task(model))
        check_head(model, self.losses)
        with training_args(model):
            super().__init__(model, tal_topk, tal_topk2)
        self.built = build_losses(self.losses, self.nc, self.device)
        regions = None
        if ignored := check_ignored(model, self.losses):
            regions = Regions(self.assigner, ignored, self.nc, self.device)
            self.bce = StockClassLoss(self.bce, regions)
        if "cls" in self.built:
            self.bce = _ClassSlot(self.built["cls"], compat.class_weights(self) is not None, regions)
        if self.built.keys() & {"box", "dfl"}:
            kind = _RotatedBoxCriterion if isinstance(self.bbox_loss, RotatedBboxLoss) else _BoxCriterion
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


class PluginRTDETRLoss(RTDETRDetectionLoss):
    """RT-DETR's criterion with losses of ours for ``loss_class``, ``loss_bbox`` and ``loss_giou``.

    Every loss is summed and divided by the number of objects, in every layer of the decoder and for the denoising
    queries, and multiplied by the stock gains (class 1, bbox 5, giou 2). A class loss whose target is a quality (MAL,
    IA-BCE, VFL, QFL, GFL, Slide, the ranking losses) gets the IoU of the matched boxes, any other the classes.
    ``loss_bbox`` gets ``(cx, cy, w, h)`` as shares of the image, ``loss_giou`` corners in pixels of the network's
    input. The costs of the matching stay stock.

    Args:
        model: an RT-DETR model.
        losses: see :func:`load_losses`; a slot that is absent keeps the stock loss.
    """

    curves = None  # which look at nothing here but the state
    image_size = None  # (height, width) of the batch, which the criterion is not given: set it before a call

    def __init__(self, model: torch.nn.Module, losses: Mapping[str, Any] | None = None) -> None:
        super().__init__(nc=model.model[-1].nc, use_vfl=True)
        self.losses = load_losses(losses or {}, "rtdetr")
        # In a dict, so that no state of a loss becomes a part of the model's own.
        self.built = build_losses(self.losses, self.nc, next(model.parameters()).device)

    def forward(self, *args, **kwargs):
        """The stock losses; the state of its losses is averaged over the ranks."""
        found = super().forward(*args, **kwargs)
        average_states(self.built.values())
        return found

    def _get_loss_class(self, pred_scores, targets, gt_scores, num_gts, postfix=""):
        if "loss_class" not in self.built:
            return super()._get_loss_class(pred_scores, targets, gt_scores, num_gts, postfix)
        value = 0
        for loss, share in in_turn(self.built["loss_class"]):
            of_quality = loss.facts.takes_quality or loss.family == "ranking"
            target = (targets, gt_scores) if of_quality else targets
            value = value + share * loss(pred_scores, target, avg_factor=max(num_gts, 1))
        return {f"loss_class{postfix}": self.loss_gain["class"] * value}

    def _get_loss_bbox(self, pred_bboxes, gt_bboxes, postfix=""):
        both = self.built.keys() >= {"loss_bbox", "loss_giou"}
        found = {} if both else super()._get_loss_bbox(pred_bboxes, gt_bboxes, postfix)
        objects = max(len(gt_bboxes), 1)
        if "loss_bbox" in self.built:
            value = self.built["loss_bbox"](pred_bboxes, gt_bboxes, reduction_override="sum")
            found[f"loss_bbox{postfix}"] = self.loss_gain["bbox"] * value / objects
        if "loss_giou" in self.built:
            value = self.built["loss_giou"](*map(self.corners, (pred_bboxes, gt_bboxes)), reduction_override="sum")
            found[f"loss_giou{postfix}"] = self.loss_gain["giou"] * value / objects
        return found

    def corners(self, boxes: Tensor) -> Tensor:
        """Corners in pixels of boxes ``(cx, cy, w, h)`` that are shares of the image."""
        if self.image_size is None:
            raise ValueError("Set criterion.image_size to (height, width) of the batch; model.loss does it by itself.")
        size = torch.tensor(self.image_size, dtype=torch.float32, device=boxes.device)
        tell_image_size(self.built["loss_giou"], size)
        return xywh2xyxy(float32(boxes)) * size[[1, 0, 1, 0]]


@functools.cache
def criterion_class(stock: type) -> type:
    """A stock criterion such as ``v8OBBLoss`` with the constructor and the slots of :class:`PluginDetectionLoss`."""
    if issubclass(PluginDetectionLoss, stock):
        return PluginDetectionLoss
    return type(f"Plugin{stock.__name__.removeprefix('v8')}", (PluginDetectionLoss, stock), {})


def branches(criterion):
    """The criteria of a head, by name: an end-to-end head has two, each with losses and state of its own."""
    if isinstance(criterion, compat.E2ELoss):
        return {"one2many": criterion.one2many, "one2one": criterion.one2one}
    return {"criterion": criterion}


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
