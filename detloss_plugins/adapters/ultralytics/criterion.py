"""The stock criteria with losses of ours in their slots, for every task of YOLO and for RT-DETR."""

import functools
import os
from contextlib import contextmanager

import torch
from ultralytics.cfg import get_cfg
from ultralytics.models.utils.loss import RTDETRDetectionLoss
from ultralytics.nn.tasks import guess_model_task
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER
from ultralytics.utils.loss import BboxLoss, RotatedBboxLoss, v8DetectionLoss
from ultralytics.utils.ops import xywh2xyxy
from ultralytics.utils.tal import bbox2dist

from detloss_plugins.adapters.ultralytics import compat
from detloss_plugins.adapters.ultralytics.assigner import (
    Decoded,
    FastAssigner,
    FastTargets,
    Scene,
    can_replace,
    decode,
    padded,
)
from detloss_plugins.adapters.ultralytics.config import SLOTS, check_task, filled, load_losses
from detloss_plugins.loss import Loss, average_state
from detloss_plugins.nested import each_tensor
from detloss_plugins.precision import float32, is_asynchronous, without_autocast
from detloss_plugins.registry import build_loss


def model_task(model):
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
    """

    def __init__(self, loss, of_elements):
        self.loss = loss
        self.of_elements = of_elements or loss.family == "ranking" or loss.facts.self_normalized

    def __call__(self, pred_scores, target_scores):
        if not self.of_elements:
            return self.loss(pred_scores, target_scores, reduction_override="sum")
        target_scores = float32(target_scores)  # under autocast their sum would be rounded to half precision
        with without_autocast(pred_scores.device):
            rows = pred_scores.flatten(0, -2), target_scores.flatten(0, -2)
            seen = self.loss.observe(*rows, None)
            elements, _ = self.loss.unweighted(*rows, seen)
        if self.loss.family == "ranking":
            elements = self.in_their_places(elements, target_scores)
        if self.loss.facts.self_normalized:
            # The criterion divides the sum by the scores; a loss with a normaliser of its own keeps that.
            own = self.loss.normalizer(elements.numel(), seen)
            elements = elements * (target_scores.sum().clamp(min=1) / own)
        return self.loss.loss_weight * elements.view_as(pred_scores)

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


def counts_waits(device):
    """Whether kernels and waits are what a criterion costs on a device; ``DETLOSS_ASYNC=1`` says so of a CPU too."""
    return is_asynchronous(device) or os.environ.get("DETLOSS_ASYNC") == "1"


def takes_all_anchors(loss, device):
    """Whether a loss gets all anchors, those that are not positive with weight 0, in place of the positive ones."""
    return counts_waits(device) and loss.compiled and loss.facts.row_wise


class _BoxCriterion(BboxLoss):
    """The stock box criterion with the box loss, the distribution (or distance) loss, or both replaced."""

    def __init__(self, reg_max, box, dfl):
        super().__init__(reg_max)
        self.reg_max, self.box, self.dfl = reg_max, box, dfl

    def forward(self, *inputs):
        dist, boxes, anchors, target, scores, scores_sum, positive, imgsz, stride = compat.box_inputs(self, inputs)
        stock = super().forward(*inputs) if None in (self.box, self.dfl) else (None, None)
        of_boxes = self.box, _in_pixels(boxes, stride), _in_pixels(target, stride)
        found = self.sums(of_boxes, dist, anchors, target, scores.sum(-1), positive, imgsz, stride)
        return tuple(of_stock if own is None else own / scores_sum for own, of_stock in zip(found, stock, strict=True))

    def on_dist(self, dist, target, places):
        """The box loss, and its pred and target, by what the head predicts; see :class:`Decoded`."""
        places = places.expand(len(dist), -1, -1)
        if type(self.box).reduced is Loss.reduced:
            return Decoded(self.box, self.reg_max), dist, (target, places)
        return self.box, decode(self.reg_max, dist, places), target

    def sums(self, of_boxes, dist, anchors, target, weight, positive, imgsz, stride):
        """The summed losses of the two slots; None for a stock one.

        Args:
            of_boxes: the box loss, or one in its place, and its pred and target for all anchors ``(B, A, ...)``.
            weight: the scores ``(B, A)`` of the anchors' classes, 0 for those that are not positive.
            dist, anchors, target, positive, imgsz, stride: as in the stock criterion.
        """
        loss_box = loss_dfl = None
        chosen = functools.cache(lambda: positive.nonzero(as_tuple=True))
        weight_of_chosen = functools.cache(lambda: weight[chosen()])

        def total(loss, pred, target, sides=None):
            if takes_all_anchors(loss, weight.device):
                each = weight
            else:
                (pred, target), each = each_tensor(lambda x: x[chosen()], (pred, target)), weight_of_chosen()
            if sides:  # one loss a side; a box counts as their mean
                each = (each / sides).unsqueeze(-1).expand(*each.shape, sides)
            return loss(pred, target, each, reduction_override="sum")

        if self.box is not None:
            tell_image_size(self.box, float32(imgsz))
            loss_box = total(*of_boxes)
        if self.dfl is not None:
            loss_dfl = total(self.dfl, *self.sides(dist, anchors, target, imgsz, stride), sides=4)
        return loss_box, loss_dfl

    def sides(self, dist, anchors, target, imgsz, stride):
        """What the head predicts for the four sides of a box, and the distances it should predict."""
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


def check_head(model, losses):
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


def build_losses(losses, num_classes, device):
    """The losses of a checked dict on a device; one that must know the number of classes is told."""
    built = {slot: build_loss(filled(cfg, num_classes=num_classes)).to(device) for slot, cfg in losses.items()}
    for part in (part for loss in built.values() for part in loss.modules() if hasattr(part, "unchecked")):
        part.unchecked = 0  # the criterion hands over boxes; to look at them, the host would wait
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
        ValueError: also if a loss does not suit the model; see :func:`check_head`.
    """

    def __init__(self, model, tal_topk=10, tal_topk2=None, losses=None):
        self.losses = load_losses(losses or {}, model_task(model))
        check_head(model, self.losses)
        with training_args(model):
            super().__init__(model, tal_topk, tal_topk2)
        self.built = build_losses(self.losses, self.nc, self.device)
        if "cls" in self.built:
            self.bce = _ClassSlot(self.built["cls"], of_elements=compat.class_weights(self) is not None)
        if self.built.keys() & {"box", "dfl"}:
            kind = _RotatedBoxCriterion if isinstance(self.bbox_loss, RotatedBboxLoss) else _BoxCriterion
            self.bbox_loss = kind(self.reg_max, self.built.get("box"), self.built.get("dfl")).to(self.device)
        self.scene, self.targets = Scene(), None
        compiled = any(loss.compiled for loss in self.built.values())
        if compiled and counts_waits(self.device) and can_replace(self.assigner):
            self.targets = FastTargets(self.assigner, self.reg_max)
            self.assigner = FastAssigner(self.assigner)

    def get_assigned_targets_and_loss(self, preds, batch, **extra):
        """The stock method; where waits count, with all before the losses in fewer kernels."""
        stock = super().get_assigned_targets_and_loss
        if (
            extra
            or not counts_waits(self.device)
            or stock.__func__ is not v8DetectionLoss.get_assigned_targets_and_loss
        ):
            return stock(preds, batch, **extra)
        dist, scores = (preds[name].permute(0, 2, 1) for name in ("boxes", "scores"))
        scene = self.scene
        scene.resize(preds["feats"], self.stride)
        objects = scene.objects(batch, len(scores))
        own_boxes = self.built.keys() >= {"box", "dfl"}
        boxes = None if own_boxes and self.targets else self.bbox_decode(scene.anchors, dist)
        if self.targets:
            found = self.targets(scores.detach(), dist.detach(), scene.places, *objects)
            target, in_strides, target_scores, positive, index, weight = found
            dist, total = dist.contiguous(), weight.sum()
        else:
            pixels = boxes * scene.strides
            _, target, target_scores, positive, index = self.assigner(
                scores.detach().sigmoid(), float32(pixels.detach()), scene.points, *padded(*objects)
            )
            in_strides, weight, total = target / scene.strides, target_scores.sum(-1), target_scores.sum()
        total = total.clamp(min=1)
        loss_cls = self.bce(scores, target_scores)
        if (weights := compat.class_weights(self)) is not None:
            loss_cls = loss_cls * weights
        loss_cls = loss_cls.sum() if loss_cls.dim() else loss_cls
        gains = scene.constant(self.hyp.box, self.hyp.cls, self.hyp.dfl)
        geometry = positive, scene.image_size, scene.strides
        if own_boxes:
            of_boxes = (
                self.bbox_loss.on_dist(dist, target, scene.places)
                if boxes is None
                else (self.built["box"], float32(pixels), target)
            )
            loss_box, loss_dfl = self.bbox_loss.sums(of_boxes, dist, scene.anchors, in_strides, weight, *geometry)
            loss = torch.stack([loss_box, loss_cls, loss_dfl]) * (gains / total)
        else:
            inputs = dist, boxes, scene.anchors, in_strides, target_scores, total, *geometry
            loss_box, loss_dfl = self.bbox_loss(*inputs)
            loss = torch.stack([loss_box, loss_cls / total, loss_dfl]) * gains
        return (positive, index, target, scene.anchors, scene.strides), loss, compat.named(self, loss.detach())

    def loss(self, preds, batch):
        """The stock loss; the state of its losses is averaged over the ranks."""
        found = super().loss(preds, batch)
        average_states(self.built.values())
        return found


class PluginRTDETRLoss(RTDETRDetectionLoss):
    """RT-DETR's criterion with losses of ours for ``loss_class``, ``loss_bbox`` and ``loss_giou``.

    Every loss is summed and divided by the number of objects, in every layer of the decoder and for the denoising
    queries, and multiplied by the stock gains (class 1, bbox 5, giou 2). A class loss whose target is a quality (VFL,
    QFL, GFL, the ranking losses) gets the IoU of the matched boxes, any other the classes. ``loss_bbox`` gets
    ``(cx, cy, w, h)`` as shares of the image, ``loss_giou`` corners in pixels of the network's input. The costs of the
    matching stay stock.

    Args:
        model: an RT-DETR model.
        losses: see :func:`load_losses`; a slot that is absent keeps the stock loss.
    """

    image_size = None  # (height, width) of the batch, which the criterion is not given: set it before a call

    def __init__(self, model, losses=None):
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
        loss = self.built["loss_class"]
        of_quality = loss.facts.takes_quality or loss.family == "ranking"
        value = loss(pred_scores, (targets, gt_scores) if of_quality else targets, avg_factor=max(num_gts, 1))
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

    def corners(self, boxes):
        """Corners in pixels of boxes ``(cx, cy, w, h)`` that are shares of the image."""
        if self.image_size is None:
            raise ValueError("Set criterion.image_size to (height, width) of the batch; model.loss does it by itself.")
        size = torch.tensor(self.image_size, dtype=torch.float32, device=boxes.device)
        tell_image_size(self.built["loss_giou"], size)
        return xywh2xyxy(float32(boxes)) * size[[1, 0, 1, 0]]


@functools.cache
def criterion_class(stock):
    """A stock criterion such as ``v8OBBLoss`` with the constructor and the slots of :class:`PluginDetectionLoss`."""
    if issubclass(PluginDetectionLoss, stock):
        return PluginDetectionLoss
    return type(f"Plugin{stock.__name__.removeprefix('v8')}", (PluginDetectionLoss, stock), {})


def branches(criterion):
    """The criteria of a head, by name: an end-to-end head has two, each with losses and state of its own."""
    if isinstance(criterion, compat.E2ELoss):
        return {"one2many": criterion.one2many, "one2one": criterion.one2one}
    return {"criterion": criterion}


def criterion_state(criterion):
    """The state of a criterion's losses as nested dicts of tensors; empty for losses without state."""
    state = {}
    for branch, part in branches(criterion).items():
        for slot, loss in part.built.items():
            if buffers := loss.state_dict():
                state.setdefault(branch, {})[slot] = {name: value.cpu().clone() for name, value in buffers.items()}
    return state


def load_criterion_state(criterion, state):
    """Give a criterion's losses the state that :func:`criterion_state` took."""
    for branch, part in branches(criterion).items():
        for slot, buffers in state.get(branch, {}).items():
            part.built[slot].load_state_dict(buffers)
