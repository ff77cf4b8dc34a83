"""What a criterion is built from: a model's task and gains, the losses, and whether they suit the model."""

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from ultralytics.cfg import get_cfg
from ultralytics.models.utils.loss import RTDETRDetectionLoss
from ultralytics.nn.tasks import guess_model_task
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER

from detloss_plugins.adapters.ultralytics import compat
from detloss_plugins.adapters.ultralytics.config import SLOTS, check_task, counted, filled
from detloss_plugins.adapters.ultralytics.ignore import ignored_classes
from detloss_plugins.families import ClassificationLoss
from detloss_plugins.loss import average_state
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
        gains = RTDETRDetectionLoss().loss_gain  # of some versions more than there are losses
        return {slot: gains[slot.removeprefix("loss_")] for slot in SLOTS[task]}
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
    """Raise ``ValueError`` if a loss has weights, or another setting, for another number of classes than the model.

    Of a model whose channels are those of the texts of an image, for any number.
    """
    head = model.model[-1]
    classes, texts = head.nc, hasattr(model, "set_classes") and not getattr(head, "is_fused", False)
    losses = counted(losses, [1] * classes)  # which may not be known yet
    for loss in build_losses(losses, classes, "cpu").values():
        for part in loss.modules():
            for name in ("class_weight", "alpha", "pos_weight"):
                if texts and isinstance(getattr(part, name, None), list | tuple | str):
                    refuse_for_texts(name)
            weights = getattr(part, "class_factors", None)
            if weights is not None and len(weights) != classes:
                raise ValueError(
                    f"{type(part).__name__} has {len(weights)} class weights, and the model {classes} classes."
                )
            if isinstance(part, ClassificationLoss):
                part.eval()(torch.zeros(1, classes), torch.zeros(1, classes))  # it says itself what does not fit


def refuse_for_texts(name):
    """Say that something has no meaning for World and YOLOE."""
    raise ValueError(f"The classes of World and YOLOE are texts, which differ from image to image: leave {name} out.")


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
        refuse_for_texts("ignore")
    return ignored_classes(losses, model.names)


def build_losses(losses, num_classes, device):
    """The losses of a checked dict on a device; one that must know the number of classes is told."""
    ignores = "ignore" in losses
    slots = {slot: cfg for slot, cfg in losses.items() if slot != "ignore"}
    built = {slot: build_loss(filled(cfg, num_classes=num_classes)).to(device) for slot, cfg in slots.items()}
    for part in (part for loss in built.values() for part in loss.modules()):
        part.unchecked, part.may_ignore = 0, ignores  # what the criterion hands over needs no look, which would wait
    return built
