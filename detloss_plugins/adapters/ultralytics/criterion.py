"""The stock criteria with losses of ours in their slots, for each task."""

import functools
from typing import NamedTuple

import torch
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.nn.tasks import guess_model_task
from ultralytics.utils.loss import BboxLoss, E2ELoss, RotatedBboxLoss, v8DetectionLoss
from ultralytics.utils.tal import bbox2dist, rbox2dist

from detloss_plugins.adapters.ultralytics.config import filled, load_losses
from detloss_plugins.base import average_state, float32
from detloss_plugins.registry import MODELS, build_loss


class _ClassSlot:
    """Stands in for the stock criterion's element-wise BCE; the criterion weights, sums and normalises the result."""

    def __init__(self, loss):
        self.loss = loss

    def __call__(self, pred_scores, target_scores):
        elements, valid = self.loss.elements(pred_scores, target_scores)
        if self.loss.family == "ranking":
            elements = self.in_their_places(elements, target_scores)
        if self.loss.self_normalized:
            # The criterion divides the sum by the scores; a loss with a normaliser of its own keeps that.
            own = self.loss.normalizer(None, elements, valid, None, "mean")
            elements = elements * (target_scores.sum().clamp(min=1) / own)
        return self.loss.loss_weight * elements

    @staticmethod
    def in_their_places(losses, target_scores):
        """The losses of the positives where class weights find them, so scaled that the criterion gives their mean."""
        share = target_scores.sum().clamp(min=1) / max(len(losses), 1)
        nothing = torch.zeros(target_scores.shape, dtype=losses.dtype, device=losses.device)
        return nothing.masked_scatter(target_scores > 0, losses * share)


def _in_pixels(boxes, stride):
    """Boxes ``(N, 4)`` or ``(N, 5)`` of stride units in pixels of the network's input; an angle stays what it is."""
    boxes = float32(boxes)
    return torch.cat([boxes[:, :4] * stride, boxes[:, 4:]], -1)


class _BoxCriterion(BboxLoss):
    """The stock box criterion with the box loss, the distribution (or distance) loss, or both replaced."""

    def __init__(self, reg_max, box, dfl):
        super().__init__(reg_max)
        self.reg_max, self.box, self.dfl = reg_max, box, dfl

    def forward(self, *inputs):
        dist, boxes, anchors, target, scores, scores_sum, fg_mask, imgsz, stride = inputs
        loss_box, loss_dfl = super().forward(*inputs) if None in (self.box, self.dfl) else (None, None)
        positive = fg_mask.nonzero(as_tuple=True)
        weight = scores[positive].sum(-1)

        def total(loss, pred, target, weight):
            return loss(pred, target, weight, reduction_override="sum") / scores_sum

        if self.box is not None:
            for part in self.box.modules():
                if hasattr(part, "batch_image_size"):
                    part.batch_image_size = float32(imgsz)
            pred_pixels, target_pixels = (_in_pixels(b[positive], stride[positive[1]]) for b in (boxes, target))
            loss_box = total(self.box, pred_pixels, target_pixels, weight)
        if self.dfl is not None:
            pred_sides, target_sides = self.sides(dist, anchors, target, imgsz, stride)
            # One loss a side; a box counts as the mean of its four.
            per_side = weight.unsqueeze(-1).expand(-1, 4) / 4
            loss_dfl = total(self.dfl, pred_sides[positive], target_sides[positive], per_side)
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
        return rbox2dist(target[..., :4], anchors, target[..., 4:], reg_max=largest)


class Task(NamedTuple):
    """What differs between the tasks of Ultralytics; the criterion to subclass is the model's own."""

    trainer: type
    box_criterion: type
    family: str  # of box losses


TASKS = {
    "detect": Task(DetectionTrainer, _BoxCriterion, "box"),
    "obb": Task(OBBTrainer, _RotatedBoxCriterion, "rotated"),
}
BOXES = {"box": "axis-aligned boxes", "rotated": "oriented boxes"}


def check_task(task, losses):
    """Raise ``ValueError`` if there is no such task, or the loss of the ``box`` slot is for other boxes than its."""
    if task not in TASKS:
        raise ValueError(f"Losses can be swapped for the tasks {', '.join(TASKS)}, not for {task!r}.")
    if "box" not in losses:
        return
    family, wanted = build_loss(losses["box"]).family, TASKS[task].family
    if family != wanted:
        names = sorted({cls.__name__ for cls in MODELS.module_dict.values() if cls.family == wanted})
        tasks = " or ".join(f"task={name!r}" for name in TASKS if TASKS[name].family == family)
        raise ValueError(
            f"{losses['box']['type']} is a loss for {BOXES[family]} ({tasks}); "
            f"the task {task!r} takes {', '.join(names[:-1])} or {names[-1]}."
        )


def check_head(model, losses):
    """Raise ``ValueError`` if a loss does not suit the model.

    The loss of the ``box`` slot must be for the boxes of the model's task. The one of the ``dfl`` slot must be a
    distribution loss if the head has a distribution over bins, and a point-wise loss if it has none (``reg_max=1``).
    """
    check_task(guess_model_task(model), losses)
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


class PluginDetectionLoss(v8DetectionLoss):
    """The stock detection criterion with losses of ours in its slots; see :func:`criterion_class` for other tasks.

    Class losses are summed over anchors and classes and divided by ``target_scores_sum``, as stock BCE is; box and
    distribution losses are weighted by the target scores and divided by the same sum. The box loss gets boxes in
    pixels of the network's input, where the stock one gets stride units. The gains ``box``, ``cls`` and ``dfl`` of the
    training arguments apply on top of each loss's ``loss_weight``.

    Args:
        model: a model with ``args``.
        tal_topk, tal_topk2: as in the stock class.
        losses: see :func:`load_losses`; a slot that is absent keeps the stock loss.

    Raises:
        ValueError: also if a loss does not suit the model; see :func:`check_head`.
    """

    def __init__(self, model, tal_topk=10, tal_topk2=None, losses=None):
        super().__init__(model, tal_topk, tal_topk2)
        self.losses = load_losses(losses or {})
        check_head(model, self.losses)
        self.built = {slot: self._build(cfg) for slot, cfg in self.losses.items()}
        if "cls" in self.built:
            self.bce = _ClassSlot(self.built["cls"])
        if self.built.keys() & {"box", "dfl"}:
            box_criterion = TASKS[guess_model_task(model)].box_criterion
            self.bbox_loss = box_criterion(self.reg_max, self.built.get("box"), self.built.get("dfl")).to(self.device)

    def loss(self, preds, batch):
        """The stock loss; the state of losses that a rank without positives does not call is averaged here."""
        found = super().loss(preds, batch)
        if torch.is_grad_enabled():  # validation is of one rank
            for loss in self.built.values():
                if not loss.every_rank:
                    average_state(loss)
        return found

    def _build(self, cfg):
        """A loss on the model's device; one that must know the number of classes is told."""
        return build_loss(filled(cfg, num_classes=self.nc)).to(self.device)


@functools.cache
def criterion_class(stock):
    """A stock criterion such as ``v8OBBLoss`` with the constructor and the slots of :class:`PluginDetectionLoss`."""
    if issubclass(PluginDetectionLoss, stock):
        return PluginDetectionLoss
    return type(f"Plugin{stock.__name__.removeprefix('v8')}", (PluginDetectionLoss, stock), {})


def branches(criterion):
    """The criteria of a head, by name: an end-to-end head has two, each with losses and state of its own."""
    if isinstance(criterion, E2ELoss):
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
