"""The losses of a training as a dict: slot -> config of a loss."""

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detloss_plugins.configs import path_of, read_yaml
from detloss_plugins.families import has_bins
from detloss_plugins.loss import AUTO, Loss
from detloss_plugins.losses import JointLoss, ScheduledLoss
from detloss_plugins.registry import MODELS, build_loss, loss_class, loss_path

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
# The loss_weight that a loss has by default in a slot: with it, one that is swapped in and nothing else trains well
# under the gains of the stock losses. Of the classes that are not here it is 1.
GAINS = {
    "FocalLoss": 16.0,
    "QualityFocalLoss": 16.0,
    "VarifocalLoss": 16.0,
    "GeneralizedFocalLoss": 16.0,  # the quality focal loss's, which it equals there
    "MALoss": 16.0,
    "IABCELoss": 16.0,
    "EqualizedFocalLoss": 16.0,
    "EqualizedQualityFocalLoss": 16.0,
    "AsymmetricLoss": 64.0,
    "EQLV2Loss": 4.0,
    "ConfidenceWeightedLoss": 4.0,
    "APLoss": 20.0,
    "ALRPLoss": 30.0,
    "RankSortLoss": 20.0,
    "DRLoss": 20.0,
    "BoundedIoULoss": 0.25,  # a box counts as the mean of its four, as in the dfl slot
    "GCDLoss": 2.0,
    "MGIoULoss": 3.0,
    "GWDLoss": 0.5,
    "KLDLoss": 0.25,
    "KFIoULoss": 0.5,
}
# The score of every class that a new head starts with; the stock heads' own, which assumes few objects, for the rest.
PRIORS = {"RankingLoss": 0.01, "ALRPLoss": 0.1, "DRLoss": 0.1}


def default_gain(loss: Loss | type[Loss]) -> float:
    """The ``loss_weight`` by default of a loss or its class: its ``yolo_gain``, or that of the nearest class known.

    A loss around another one, its ``base``, that has a default of its own and is not weighed, has the base's.

    >>> from detloss_plugins.losses import FocalLoss
    >>> class Own(FocalLoss): ...
    >>> default_gain(Own)
    16.0
    """
    base = getattr(loss, "base", None)
    of_base = default_gain(base) if isinstance(base, Loss) and base.loss_weight == 1 else 1.0
    return _stated(loss, "yolo_gain", GAINS if of_base == 1 else {}, of_base)


def default_weight(loss: Loss | type[Loss], slot: str) -> float:
    """The ``loss_weight`` by default in a slot: :func:`default_gain`, but 1 where RT-DETR's stock loss has that."""
    return 1.0 if slot == "loss_class" else default_gain(loss)


def default_prior(loss: Loss | type[Loss]) -> float | None:
    """The class score that a new head should start with; None for the stock one.

    It is the ``yolo_prior`` of a loss or its class, or that of the nearest class known; of a joint or scheduled loss,
    its first part's.
    """
    of_parts = default_prior(loss.losses[0]) if isinstance(loss, JointLoss | ScheduledLoss) else None
    return _stated(loss, "yolo_prior", PRIORS, of_parts)


def _stated(loss, attribute, known, default):
    if hasattr(loss, attribute):
        return getattr(loss, attribute)
    cls = loss if isinstance(loss, type) else type(loss)
    return next((known[base.__name__] for base in cls.__mro__ if base.__name__ in known), default)


def check_task(task):
    """Raise ``ValueError`` if there is no such task."""
    if task not in SLOTS:
        raise ValueError(f"Losses can be swapped for the tasks {', '.join(SLOTS)}, not for {task!r}.")


def load_losses(
    losses: Mapping[str, Any] | str | Path, task: str = "detect", auto: bool = False, compile: bool = False
) -> dict[str, Any]:
    """A losses dict from a dict or a YAML file, checked and with every default gain written out.

    Args:
        losses: ``{"cls": {"type": ...}, "box": {...}, "dfl": {...}}``, every slot optional, the path of such a YAML,
            or the name of one that comes with this package, such as "qfl". Beside the slots,
            ``"ignore": {"classes": [...]}`` names classes, or has their indices, whose boxes are neither objects nor
            background.
        task: "detect", "segment", "pose", "obb" or "rtdetr", whose slots are ``loss_class``, ``loss_bbox`` and
            ``loss_giou``.
        auto: whether a ``loss_weight`` may be "auto", of the loss of a slot or one that a ScheduledLoss there has; it
            stays, for :func:`with_weights` to replace.
        compile: compile all of the losses, as ``compile=True`` in the dict of each does.

    Returns:
        A new dict of plain Python values. ``loss_weight``, where absent, is that of :func:`default_gain`, also of each
        loss of a ScheduledLoss, but 1 for RT-DETR's class loss, whose stock is a varifocal loss of that weight;
        ``image_size``, where a loss takes one and has none, is "batch", the size of the network's input.

    Raises:
        TypeError: if it is not a dict of dicts, or a hyper-parameter is unknown.
        ValueError: for an unknown task, slot, loss or name, or a loss of a family that the slot does not take.
        FileNotFoundError: if there is no such file.
    """
    check_task(task)
    if isinstance(losses, str | Path):
        if losses in MODELS.module_dict:
            slots = ", ".join(SLOTS[task])
            raise ValueError(f"{losses} is a loss: give {{slot: {{'type': {losses!r}}}}}; the slots are {slots}.")
        path = path_of(losses)
        if path.suffix == ".py":
            raise ValueError(f"{losses} is a config of MMDetection, and no YAML file of losses.")
        losses = read_yaml(path)
    if not isinstance(losses, Mapping):
        raise TypeError(f"losses must be a dict such as {{'cls': {{'type': 'VarifocalLoss'}}}}, not {losses!r}.")
    if unknown := [slot for slot in losses if slot not in (*SLOTS[task], "ignore")]:
        elsewhere = _tasks(lambda slots: unknown[0] in slots)
        hint = f" of task={task!r}; it is one of task={elsewhere}" if elsewhere else ""
        raise ValueError(f"There is no slot {unknown[0]!r}{hint}; the slots are {', '.join(SLOTS[task])}.")
    check = functools.partial(_checked, auto=auto)
    losses = {slot: (_checked_ignore if slot == "ignore" else check)(task, slot, cfg) for slot, cfg in losses.items()}
    return {slot: {**cfg, "compile": True} if compile and slot != "ignore" else cfg for slot, cfg in losses.items()}


def filled(cfg, **values):
    """A copy of a config in which every loss, also a nested one, has those ``values`` that it takes and lacks.

    It is plain data, which any process can read: numbers of numpy, arrays and tensors become numbers and lists, and a
    class given as the type, or one from outside this package, is named by its path.
    """
    if getattr(cfg, "requires_grad", False):
        raise ValueError("A setting in a config of losses is not learnt, as no optimizer sees it: give a number.")
    if hasattr(cfg, "tolist"):
        cfg = cfg.tolist()
    if isinstance(cfg, type):
        return f"{cfg.__module__}.{cfg.__name__}"
    if isinstance(cfg, Sequence) and not isinstance(cfg, str):
        return (tuple if isinstance(cfg, tuple) else list)(filled(part, **values) for part in cfg)
    if not isinstance(cfg, Mapping):
        return copy.deepcopy(cfg)
    if "type" not in cfg:
        return {name: filled(value, **values) for name, value in cfg.items()}
    takes = inspect.signature(loss_class(cfg["type"])).parameters
    lacks = {name: value for name, value in values.items() if name in takes and name not in cfg}
    cfg = {**cfg, "type": loss_path(cfg["type"])}
    return {**lacks, **{name: filled(value, **values) for name, value in cfg.items()}}


def counted(cfg, counts):
    """A copy of a config in which every loss with ``class_weight="effective"`` has ``class_counts``.

    >>> counted({"cls": {"type": "FocalLoss", "class_weight": "effective"}}, [3, 1])["cls"]["class_counts"]
    [3, 1]
    """
    if isinstance(cfg, Mapping):
        own = {"class_counts": counts} if cfg.get("class_weight") == "effective" else {}
        return {**own, **{name: counted(value, counts) for name, value in cfg.items()}}
    return type(cfg)(counted(part, counts) for part in cfg) if isinstance(cfg, list | tuple) else cfg


def unlike(before, losses):
    """The slots whose losses differ between two checked dicts, and those that differ in more than their weight.

    >>> unlike({"cls": {"type": "GHMC", "loss_weight": 1.0}}, {"cls": {"type": "GHMC", "loss_weight": 2.0}})
    (['cls'], [])
    """
    slots = sorted(before.keys() | losses.keys())
    pairs = {slot: [_with_lists(found.get(slot, {})) for found in (before, losses)] for slot in slots}
    differ = [slot for slot, (a, b) in pairs.items() if a != b]
    for cfg in (cfg for pair in pairs.values() for cfg in pair):
        for name in ("loss_weight", "compile"):
            cfg.pop(name, None)
    return differ, [slot for slot in differ if pairs[slot][0] != pairs[slot][1]]


def waiting(losses):
    """The places of the weights that are "auto" in a checked dict: slot, or slot and number in a ScheduledLoss.

    >>> waiting({"cls": {"type": "FocalLoss", "loss_weight": "auto"}, "box": {"type": "CIoULoss", "loss_weight": 1.0}})
    [('cls',)]
    """
    found = [(slot,) for slot, cfg in losses.items() if cfg.get("loss_weight") == AUTO]
    for slot, cfg in losses.items():
        parts = cfg.get("losses", ()) if slot != "ignore" else ()
        found += [(slot, number) for number, part in enumerate(parts) if part.get("loss_weight") == AUTO]
    return found


def at(losses, place):
    """The config at a place of :func:`waiting`; None if there is none."""
    slot, *number = place
    cfg = losses.get(slot, {})
    parts = cfg.get("losses", ())
    return (parts[number[0]] if number[0] < len(parts) else None) if number else cfg or None


def without_weight(cfg):
    """A config without its ``loss_weight``."""
    return {name: value for name, value in cfg.items() if name != "loss_weight"}


def with_weights(losses, weights):
    """A copy of a checked dict with weights in the places that wait for one.

    Args:
        losses: of :func:`load_losses`.
        weights: place -> number; a place that is not there goes on waiting.
    """
    losses = copy.deepcopy(losses)
    for place in waiting(losses):
        if place in weights:
            at(losses, place)["loss_weight"] = weights[place]
    return losses


def default_weights(losses):
    """The weights by default in the places that wait for one: place -> number."""
    found = {place: build_loss(without_weight(at(losses, place))) for place in waiting(losses)}
    return {place: default_weight(loss, place[0]) for place, loss in found.items()}


def weights_of(losses, before):
    """The weights that a dict of losses waits for and that ``before``, a checked dict, has: place -> number.

    Those of losses that are the same there but for the weight.
    """
    found = {}
    for place in waiting(losses):
        then, now = at(before, place), at(losses, place)
        if then and not unlike({"": then}, {"": now})[1]:
            found[place] = then["loss_weight"]
    return found


def _with_lists(cfg):
    """A copy of a config with lists for its tuples, as a YAML file gives it back, and without a data set's counts."""
    if isinstance(cfg, Mapping):
        return {name: _with_lists(value) for name, value in cfg.items() if name != "class_counts"}
    return [_with_lists(part) for part in cfg] if isinstance(cfg, list | tuple) else cfg


def _checked(task, slot, cfg, auto):
    if not isinstance(cfg, Mapping) or "type" not in cfg:
        raise TypeError(f"{slot} needs a dict such as {{type: NAME}}, not {cfg!r}; left out, it keeps the stock loss.")
    cfg = filled(cfg, image_size="batch")
    loss = build_loss(_weighed(cfg) if auto else cfg)  # raises for an unknown loss or hyper-parameter
    if isinstance(loss, ScheduledLoss):
        cfg["losses"] = [_checked(task, slot, part, auto) for part in cfg["losses"]]
    if loss.family not in SLOTS[task][slot]:
        raise ValueError(_wrong_family(task, slot, loss))
    of_classes = "classification" in SLOTS[task][slot]
    if of_classes and getattr(loss, "custom_cls_channels", False):
        raise ValueError(
            f"{type(loss).__name__} needs a head with a softmax and channels of its own, such as mmdet's two-stage "
            "heads; the class scores of YOLO are independent sigmoids."
        )
    if of_classes and not loss.use_sigmoid:
        raise ValueError(
            f"The class scores of YOLO are independent sigmoids; write use_sigmoid=True for {type(loss).__name__}."
        )
    if has_bins(loss):
        raise ValueError("The heads of YOLO decode by bins 0, 1, 2 and so on; leave bins out of DistributionFocalLoss.")
    if activated := [type(part).__name__ for part in loss.modules() if getattr(part, "activated", False)]:
        raise ValueError(f"YOLO hands logits to its loss; leave activated=True out of {activated[0]}.")
    for part in loss.modules():
        if getattr(part, "reduction", "mean") != "mean":
            raise ValueError(
                f'A slot sums its loss and divides the sum itself; leave reduction="{part.reduction}" out of '
                f"{type(part).__name__}."
            )
    return {"loss_weight": default_weight(loss, slot), **cfg}


def _weighed(cfg):
    """A config without "auto" where it may stand."""
    if not isinstance(cfg, Mapping):
        return cfg
    if "type" in cfg and loss_class(cfg["type"]) is ScheduledLoss:
        parts = cfg.get("losses")
        return {**cfg, "losses": list(map(_weighed, parts))} if isinstance(parts, list | tuple) else cfg
    return without_weight(cfg) if cfg.get("loss_weight") == AUTO else cfg


def _checked_ignore(task, _, cfg):
    cfg = filled(cfg)
    classes = cfg["classes"] if isinstance(cfg, Mapping) and cfg.keys() == {"classes"} else None
    if not classes or not isinstance(classes, list | tuple) or not all(type(x) in (str, int) for x in classes):
        raise TypeError(f"ignore must be {{'classes': [...]}} with names or indices of classes, not {cfg!r}.")
    if task == "rtdetr":
        raise ValueError("RT-DETR matches queries, not anchors, so its losses cannot ignore regions: leave ignore out.")
    return {"classes": list(classes)}


def _tasks(fits):
    """The tasks whose slots fit, in words."""
    return " or ".join(repr(task) for task, slots in SLOTS.items() if fits(slots))


def _wrong_family(task, slot, loss):
    families = SLOTS[task][slot]
    names = sorted({cls.__name__ for cls in MODELS.module_dict.values() if cls.facts.family in families})
    elsewhere = _tasks(lambda slots: loss.family in slots.get(slot, ()))
    hint = f", for task={elsewhere}" if elsewhere else ""
    return (
        f"The {slot!r} slot of task={task!r} takes a {' or '.join(families)} loss ({', '.join(names)}), but "
        f"{type(loss).__name__} is a {loss.family} loss{hint}."
    )
