"""Ultralytics YOLO: swap the classification, box and distribution loss of a training by one dict.

``make_trainer(losses)`` gives a trainer for ``YOLO(...).train(trainer=...)``. Nothing of Ultralytics is edited: the
stock criterion is subclassed, its class loss and its box criterion are replaced on the instance, and the model is told
to build this criterion. The instance attribute that tells it so is taken off while a checkpoint is written, so that
``best.pt`` holds stock classes only.

Ultralytics is AGPL-3.0; this module is imported only by those who use it.
"""

import copy
import functools
import inspect
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import torch
import yaml
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOGGER
from ultralytics.utils.loss import BboxLoss, E2ELoss, v8DetectionLoss
from ultralytics.utils.tal import bbox2dist
from ultralytics.utils.torch_utils import unwrap_model

from detloss_plugins.base import Loss
from detloss_plugins.registry import build_loss, loss_class

# Slot -> what it is called in the stock criterion's arguments, and the families of losses it takes.
SLOTS = {
    "cls": ("classification",),
    "box": ("box",),
    "dfl": ("distribution", "regression"),
}
RECORD = "detloss_plugins"  # attribute of the model, and so of the checkpoint, that records the losses


def load_losses(losses):
    """A losses dict from a dict or the path of a YAML file, checked and with every default gain written out.

    Args:
        losses: ``{"cls": {"type": ...}, "box": {...}, "dfl": {...}}``, every slot optional, or a path to such a YAML.

    Returns:
        A new plain dict. ``loss_weight``, where absent, is the ``yolo_gain`` of the loss's class.

    Raises:
        TypeError: if it is not a dict of dicts, or a hyper-parameter is unknown.
        ValueError: for an unknown slot or loss, or a loss of a family that the slot does not take.
    """
    if isinstance(losses, str | Path):
        losses = yaml.safe_load(Path(losses).read_text(encoding="utf-8"))
    if not isinstance(losses, Mapping):
        raise TypeError(f"losses must be a dict such as {{'cls': {{'type': 'VarifocalLoss'}}}}, not {losses!r}.")
    if unknown := [slot for slot in losses if slot not in SLOTS]:
        raise ValueError(f"There is no slot {unknown[0]!r}; the slots are {', '.join(SLOTS)}.")
    return {slot: _checked(slot, cfg) for slot, cfg in losses.items()}


def _checked(slot, cfg):
    loss = build_loss(cfg)  # raises for an unknown loss or hyper-parameter
    if loss.family not in SLOTS[slot]:
        raise ValueError(
            f"The {slot!r} slot takes a {' or '.join(SLOTS[slot])} loss, "
            f"but {type(loss).__name__} is a {loss.family} loss."
        )
    if slot == "cls" and not loss.use_sigmoid:
        raise ValueError(
            f"The class scores of YOLO are independent sigmoids; write use_sigmoid=True for {type(loss).__name__}."
        )
    if getattr(loss, "activated", False):
        raise ValueError(f"YOLO hands logits to its loss; leave activated=True out of {type(loss).__name__}.")
    return {"loss_weight": loss_class(cfg["type"]).yolo_gain, **copy.deepcopy(dict(cfg))}


class _ClassSlot:
    """Stands in for the stock criterion's element-wise BCE; the criterion weights, sums and normalises the result."""

    def __init__(self, loss):
        self.loss = loss

    def __call__(self, pred_scores, target_scores):
        elements, valid = self.loss.elements(pred_scores, target_scores)
        if self.loss.self_normalized:
            # The criterion divides the sum by the scores; a loss with a normaliser of its own keeps that.
            own = self.loss.normalizer(None, elements, valid, None, "mean")
            elements = elements * (target_scores.sum().clamp(min=1) / own)
        return self.loss.loss_weight * elements


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
            return loss(pred[positive], target[positive], weight, reduction_override="sum") / scores_sum

        if self.box is not None:
            loss_box = total(self.box, boxes, target, weight)
        if self.dfl is not None:
            pred_sides, target_sides = self.sides(dist, anchors, target, imgsz, stride)
            # One loss a side; a box counts as the mean of its four.
            loss_dfl = total(self.dfl, pred_sides, target_sides, weight.unsqueeze(-1).expand(-1, 4) / 4)
        return loss_box, loss_dfl

    def sides(self, dist, anchors, target, imgsz, stride):
        """What the head predicts for the four sides of a box, and the distances it should predict."""
        if self.reg_max > 1:
            return dist.unflatten(-1, (4, self.reg_max)), bbox2dist(anchors, target, self.reg_max - 1)
        # A head without bins regresses the distances themselves, here as shares of the image's sides.
        to_share = stride / imgsz[[1, 0, 1, 0]]
        return dist * to_share, bbox2dist(anchors, target) * to_share


class PluginDetectionLoss(v8DetectionLoss):
    """The stock detection criterion with losses of ours in its slots.

    Class losses are summed over anchors and classes and divided by ``target_scores_sum``, as stock BCE is; box and
    distribution losses are weighted by the target scores and divided by the same sum. The gains ``box``, ``cls`` and
    ``dfl`` of the training arguments apply on top of each loss's ``loss_weight``.

    Args:
        model: a detection model with ``args``.
        tal_topk, tal_topk2: as in the stock class.
        losses: see :func:`load_losses`; a slot that is absent keeps the stock loss.

    Raises:
        ValueError: also if the head has no distribution (``reg_max=1``) and the ``dfl`` slot holds a distribution loss,
            or the reverse.
    """

    def __init__(self, model, tal_topk=10, tal_topk2=None, losses=None):
        super().__init__(model, tal_topk, tal_topk2)
        self.losses = load_losses(losses or {})
        check_head(model, self.losses)
        self.built = {slot: self._build(cfg) for slot, cfg in self.losses.items()}
        if "cls" in self.built:
            self.bce = _ClassSlot(self.built["cls"])
        if self.built.keys() & {"box", "dfl"}:
            self.bbox_loss = _BoxCriterion(self.reg_max, self.built.get("box"), self.built.get("dfl")).to(self.device)

    def _build(self, cfg):
        """A loss on the model's device; one that must know the number of classes is told."""
        if "num_classes" in inspect.signature(loss_class(cfg["type"])).parameters:
            cfg = {"num_classes": self.nc, **cfg}
        return build_loss(cfg).to(self.device)


def _branches(criterion):
    """The criteria of a head, by name: an end-to-end head has two, each with losses and state of its own."""
    if isinstance(criterion, E2ELoss):
        return {"one2many": criterion.one2many, "one2one": criterion.one2one}
    return {"criterion": criterion}


def criterion_state(criterion):
    """The state of a criterion's losses as nested dicts of tensors; empty for losses without state."""
    state = {}
    for branch, part in _branches(criterion).items():
        for slot, loss in part.built.items():
            if buffers := loss.state_dict():
                state.setdefault(branch, {})[slot] = {name: value.cpu().clone() for name, value in buffers.items()}
    return state


def load_criterion_state(criterion, state):
    """Give a criterion's losses the state that :func:`criterion_state` took."""
    for branch, part in _branches(criterion).items():
        for slot, buffers in state.get(branch, {}).items():
            part.built[slot].load_state_dict(buffers)


def check_head(model, losses):
    """Raise ``ValueError`` if the loss of the ``dfl`` slot does not suit the model's head."""
    if "dfl" not in losses:
        return
    name, bins = losses["dfl"]["type"], model.model[-1].reg_max
    family = loss_class(name).family
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


def _init_criterion(model):
    """What ``model.init_criterion()`` does on a model of ours; the stock choice of class, with our losses."""
    record = getattr(model, RECORD)
    make = functools.partial(PluginDetectionLoss, losses=record["losses"])
    criterion = E2ELoss(model, make) if getattr(model.model[-1], "one2one_cv2", None) is not None else make(model)
    load_criterion_state(criterion, record["state"])
    return criterion


def install(model, losses, state=None):
    """Make ``model.loss`` use ``losses``, also on deep copies of the model such as the EMA.

    Args:
        model: a ``DetectionModel``; its criterion, if it has one, is dropped.
        losses: see :func:`load_losses`.
        state: what :func:`criterion_state` took of an earlier training, to go on with.

    Raises:
        ValueError, TypeError: as :class:`PluginDetectionLoss`.
    """
    from detloss_plugins import __version__

    losses = load_losses(losses)
    check_head(model, losses)
    setattr(model, RECORD, {"version": __version__, "losses": losses, "state": state or {}})
    # On the instance, so that the class in the checkpoint stays the stock one; a bound method follows a deep copy.
    model.init_criterion = MethodType(_init_criterion, model)
    model.criterion = None


@contextmanager
def _stock_classes_only(model):
    """Take off a model what only a process with this package can unpickle."""
    method, criterion = vars(model).pop("init_criterion", None), getattr(model, "criterion", None)
    model.criterion = None
    try:
        yield
    finally:
        model.criterion = criterion
        if method is not None:
            model.init_criterion = method


def trained_losses(model):
    """What a model or checkpoint of ours records: ``{"version": ..., "losses": {...}, "state": {...}}``, or None.

    Args:
        model: a ``YOLO``, a model, or the path of a ``.pt`` file.
    """
    if isinstance(model, str | Path):
        checkpoint = torch.load(model, map_location="cpu", weights_only=False)
        model = checkpoint.get("ema") or checkpoint["model"]
    return getattr(getattr(model, "model", model), RECORD, None) or getattr(model, RECORD, None)


def describe(losses, args):
    """One line per slot: the active loss, its settings, its weight and the training's gain for the slot."""
    lines = []
    for slot in SLOTS:
        line = "stock loss"
        if slot in losses:
            loss = build_loss(losses[slot])
            line = f"{_in_words(loss)}, weight {loss.loss_weight:g}"
        lines.append(f"{slot}: {line} x gain {getattr(args, slot):g}")
    return lines


def _in_words(loss):
    """A loss with all its settings, and with those of the losses it is made of."""
    words = [f"{name}={value!r}" for name, value in loss.settings.items()]
    words += [_in_words(part) for part in loss.modules() if isinstance(part, Loss) and part is not loss]
    return f"{type(loss).__name__}({', '.join(words)})"


def make_trainer(losses):
    """A trainer class for ``YOLO(...).train(trainer=make_trainer(losses))``.

    Args:
        losses: a dict ``{"cls": {"type": "VarifocalLoss"}, "box": {...}, "dfl": {...}}`` or the path of a YAML file
            with one; absent slots keep the stock loss bit for bit.

    Returns:
        A subclass of Ultralytics' ``DetectionTrainer``. It is made here so that multi-GPU workers, which receive it
        pickled by value, receive the losses with it.

    Raises:
        ValueError, TypeError: for a misspelt slot, loss or hyper-parameter, before any data is read.
    """
    losses = load_losses(losses)

    class PluginTrainer(DetectionTrainer):
        plugin_losses = losses
        plugin_state = None

        def get_model(self, cfg=None, weights=None, verbose=True):
            model = super().get_model(cfg, weights, verbose)
            check_head(model, self.plugin_losses)
            before = getattr(weights, RECORD, None)
            if self.resume and before is not None:
                if before["losses"] == self.plugin_losses:
                    self.plugin_state = before["state"]
                else:
                    LOGGER.warning(f"This run resumes with other losses than it was started with ({before['losses']}).")
            return model

        def set_model_attributes(self):
            super().set_model_attributes()
            # Every path to training comes through here: new, resumed, and in a worker that was handed its model.
            install(getattr(self.model, "student_model", self.model), self.plugin_losses, self.plugin_state)
            for line in describe(self.plugin_losses, self.args):
                LOGGER.info(f"detloss_plugins: {line}")

        def validate(self):
            self.hand_state_to_ema().criterion = None  # built again, from the record
            return super().validate()

        def hand_state_to_ema(self):
            """Validation and the checkpoint are the EMA model's; the state is the training criterion's."""
            model, ema = (getattr(m, "student_model", m) for m in (unwrap_model(self.model), self.ema.ema))
            getattr(ema, RECORD)["state"] = criterion_state(model.criterion)
            return ema

        def save_model(self):
            with _stock_classes_only(self.hand_state_to_ema()):
                return super().save_model()

    return PluginTrainer
