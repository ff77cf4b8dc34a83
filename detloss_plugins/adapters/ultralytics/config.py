"""The losses of a training as a dict: slot -> config of a loss."""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path

import yaml

from detloss_plugins.registry import MODELS, build_loss, loss_class

YOLO_SLOTS = {
    "cls": ("classification", "ranking"),
    "box": ("box",),
    "dfl": ("distribution", "regression"),
}
# Task -> slot -> the families of losses it takes. RT-DETR is no task of Ultralytics' own; its losses have other names.
SLOTS = {
    "detect": YOLO_SLOTS,
    "segment": YOLO_SLOTS,
    "pose": YOLO_SLOTS,
    "obb": {**YOLO_SLOTS, "box": ("rotated",)},
    "rtdetr": {
        "loss_class": ("classification", "ranking"),
        "loss_bbox": ("regression",),
        "loss_giou": ("box",),
    },
}


def check_task(task):
    """Raise ``ValueError`` if there is no such task."""
    if task not in SLOTS:
        raise ValueError(f"Losses can be swapped for the tasks {', '.join(SLOTS)}, not for {task!r}.")


def load_losses(losses, task="detect"):
    """A losses dict from a dict or the path of a YAML file, checked and with every default gain written out.

    Args:
        losses: ``{"cls": {"type": ...}, "box": {...}, "dfl": {...}}``, every slot optional, or a path to such a YAML.
        task: "detect", "segment", "pose", "obb" or "rtdetr", whose slots are ``loss_class``, ``loss_bbox`` and
            ``loss_giou``.

    Returns:
        A new plain dict. ``loss_weight``, where absent, is the ``yolo_gain`` of the loss's class, but 1 for RT-DETR's
        class loss, whose stock is a varifocal loss of that weight; ``image_size``, where a loss takes one and has none,
        is "batch", the size of the network's input.

    Raises:
        TypeError: if it is not a dict of dicts, or a hyper-parameter is unknown.
        ValueError: for an unknown task, slot or loss, or a loss of a family that the slot does not take.
    """
    check_task(task)
    if isinstance(losses, str | Path):
        losses = yaml.safe_load(Path(losses).read_text(encoding="utf-8"))
    if not isinstance(losses, Mapping):
        raise TypeError(f"losses must be a dict such as {{'cls': {{'type': 'VarifocalLoss'}}}}, not {losses!r}.")
    if unknown := [slot for slot in losses if slot not in SLOTS[task]]:
        elsewhere = _tasks(lambda slots: unknown[0] in slots)
        hint = f" of task={task!r}; it is one of task={elsewhere}" if elsewhere else ""
        raise ValueError(f"There is no slot {unknown[0]!r}{hint}; the slots are {', '.join(SLOTS[task])}.")
    return {slot: _checked(task, slot, cfg) for slot, cfg in losses.items()}


def filled(cfg, **values):
    """A copy of a config in which every loss, also a nested one, has those ``values`` that it takes and lacks."""
    if isinstance(cfg, list | tuple):
        return type(cfg)(filled(part, **values) for part in cfg)
    if not isinstance(cfg, Mapping):
        return copy.deepcopy(cfg)
    takes = inspect.signature(loss_class(cfg["type"])).parameters if "type" in cfg else ()
    lacks = {name: value for name, value in values.items() if name in takes and name not in cfg}
    return {**lacks, **{name: filled(value, **values) for name, value in cfg.items()}}


def _checked(task, slot, cfg):
    cfg = filled(cfg, image_size="batch")
    loss = build_loss(cfg)  # raises for an unknown loss or hyper-parameter
    if loss.family not in SLOTS[task][slot]:
        raise ValueError(_wrong_family(task, slot, loss))
    of_classes = "classification" in SLOTS[task][slot]
    if of_classes and not loss.use_sigmoid:
        raise ValueError(
            f"The class scores of YOLO are independent sigmoids; write use_sigmoid=True for {type(loss).__name__}."
        )
    if getattr(loss, "activated", False):
        raise ValueError(f"YOLO hands logits to its loss; leave activated=True out of {type(loss).__name__}.")
    return {"loss_weight": 1.0 if task == "rtdetr" and of_classes else loss.yolo_gain, **cfg}


def _tasks(fits):
    """The tasks whose slots fit, in words."""
    return " or ".join(repr(task) for task, slots in SLOTS.items() if fits(slots))


def _wrong_family(task, slot, loss):
    families = SLOTS[task][slot]
    names = sorted({cls.__name__ for cls in MODELS.module_dict.values() if cls.family in families})
    elsewhere = _tasks(lambda slots: loss.family in slots.get(slot, ()))
    hint = f", for task={elsewhere}" if elsewhere else ""
    return (
        f"The {slot!r} slot of task={task!r} takes a {' or '.join(families)} loss ({', '.join(names)}), but "
        f"{type(loss).__name__} is a {loss.family} loss{hint}."
    )
