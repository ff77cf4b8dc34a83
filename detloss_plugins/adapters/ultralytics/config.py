"""The losses of a training as a dict: slot -> config of a loss."""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path

import yaml

from detloss_plugins.registry import build_loss, loss_class

# Slot -> the families of losses it takes.
SLOTS = {
    "cls": ("classification", "ranking"),
    "box": ("box", "rotated"),
    "dfl": ("distribution", "regression"),
}


def load_losses(losses):
    """A losses dict from a dict or the path of a YAML file, checked and with every default gain written out.

    Args:
        losses: ``{"cls": {"type": ...}, "box": {...}, "dfl": {...}}``, every slot optional, or a path to such a YAML.

    Returns:
        A new plain dict. ``loss_weight``, where absent, is the ``yolo_gain`` of the loss's class; ``image_size``, where
        a loss takes one and has none, is "batch", the size of the network's input.

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


def filled(cfg, **values):
    """A copy of a config in which every loss, also a nested one, has those ``values`` that it takes and lacks."""
    if isinstance(cfg, list | tuple):
        return type(cfg)(filled(part, **values) for part in cfg)
    if not isinstance(cfg, Mapping):
        return copy.deepcopy(cfg)
    takes = inspect.signature(loss_class(cfg["type"])).parameters if "type" in cfg else ()
    lacks = {name: value for name, value in values.items() if name in takes and name not in cfg}
    return {**lacks, **{name: filled(value, **values) for name, value in cfg.items()}}


def _checked(slot, cfg):
    cfg = filled(cfg, image_size="batch")
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
    return {"loss_weight": loss.yolo_gain, **cfg}
