"""What a loss of ours says in the moment in which a head of MMDetection takes it, if the two do not fit.

Such a mistake trains without an error: channels for the background beside a sigmoid loss, a loss of classes on boxes, a
ranking loss that ranks each level for itself. torch tells of every module that becomes part of another, so the head is
looked at where it is built, in any program. A training's log then names the losses that run. This module imports no
framework.
"""

import inspect
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from detloss_plugins.families import has_bins
from detloss_plugins.loss import Loss
from detloss_plugins.losses import ScheduledLoss
from detloss_plugins.precision import is_compiling
from detloss_plugins.registry import loss_class, runner_progress

_BOXES = ("box", "regression", "rotated", "uncertainty")
# The families that an attribute of a head takes.
FAMILIES = {
    "loss_cls": ("classification", "ranking", "heatmap", "soft label", "regression"),  # YOLOv3's takes the last two
    "loss_bbox": _BOXES,
    "loss_bbox_init": _BOXES,
    "loss_bbox_refine": _BOXES,
    "loss_bbox_reg": ("regression",),
    "loss_bbox_cls": ("classification",),
    "loss_centerness": ("classification", "regression"),
    "loss_center_heatmap": ("heatmap",),
    "loss_dfl": ("distribution",),
    "loss_dice": ("region",),
    "loss_ld": ("soft label",),
    "loss_mask": ("region", "classification"),
}
# mmdet's heads that hand over boxes in units of their level's stride (those with ``norm_on_bbox`` if it is True), and
# what is based on them and hands over pixels.
_IN_STRIDES = {
    "BoxInstBboxHead", "CenterNetUpdateHead", "CondInstBboxHead", "FCOSHead", "GFLHead", "LDHead", "NASFCOSHead",
    "RepPointsHead", "TOODHead",
}  # fmt: skip
_IN_PIXELS = {"AutoAssignHead", "VFNetHead", "_PixelLevels", "_PixelPoints"}
_KNOWN = {family for families in FAMILIES.values() for family in families}
_SWITCHES = {"loss_cls": "with_cls", "loss_bbox": "with_reg"}  # of a head that may have no such branch


class _Use(NamedTuple):
    """What a method of a head of mmdet's does with some losses: it goes on with what they give, or never calls them."""

    head: str
    slots: tuple[str, ...]
    reduction: str = ""  # that they must have; "" for those that are never called
    does: str = ""
    method: str = "loss_by_feat"  # a head of one's own that has another is not meant


_BOTH = ("loss_cls", "loss_bbox")
_USES = (
    _Use("YOLOXHead", (*_BOTH, "loss_obj", "loss_l1"), "sum", "divides the sum by its number of positives"),
    _Use("FSAFHead", _BOTH, "none", "chooses the level of an object by the loss of each anchor"),
    _Use("YOLACTHead", ("loss_cls",), "none", "mines the negatives by the loss of each anchor"),
    _Use(
        "MultiInstanceBBoxHead",
        _BOTH,
        "none",
        "chooses between two orders of its boxes by the loss of each",
        "emd_loss",
    ),
    _Use("FreeAnchorRetinaHead", ("loss_cls",)),
    _Use("AutoAssignHead", ("loss_cls", "loss_centerness")),
    _Use("RTMDetHead", ("loss_centerness",), method="loss_by_feat_single"),
    _Use("TOODHead", ("loss_centerness",), method="loss_by_feat_single"),
    _Use("RepPointsHead", ("loss_bbox",), method="loss_by_feat_single"),
)
# What mmdet's heads call with ``avg_factor``, which only a mean is divided by: all that they have but for masks, other
# than in these.
_AVERAGED = tuple(slot for slot in FAMILIES if slot != "loss_mask")
_NOT_AVERAGED = {
    **dict.fromkeys(("YOLOV3Head", "LinearReIDHead", "SSDHead", "_Ranking"), _AVERAGED),
    **dict.fromkeys(("AutoAssignHead", "FreeAnchorRetinaHead"), ("loss_bbox",)),
}


def kept_settings(kind: str | type, before: Mapping[str, Any]) -> dict[str, Any]:
    """What a loss of a type takes over from the settings of the one that it replaces, as the head relies on it.

    A head counts its channels by ``use_sigmoid``, and what it does with a sum (YOLOX, YOLOv3) or with the loss of each
    row (FSAF, YOLACT) makes no sense of a mean.

    >>> kept_settings("FocalLoss", {"use_sigmoid": True, "reduction": "sum", "gamma": 1.0, "num_classes": 3})
    {'use_sigmoid': True, 'reduction': 'sum'}
    """
    takes = inspect.signature(loss_class(kind)).parameters
    names = [name for name in ("use_sigmoid", "num_classes", "reduction") if name in takes and name in before]
    return {name: before[name] for name in names if (name, before[name]) != ("reduction", "mean")}  # the default


class MisfitWarning(UserWarning):
    """A head and a loss of ours train together, but not as they are meant to."""


def check_fit(head: nn.Module, name: str, loss: nn.Module, whole: nn.Module | None = None) -> None:
    """Raise ``ValueError`` if a loss of ours does not fit the attribute ``name`` of a head based on mmdet's.

    Of a ScheduledLoss, the ``whole``, each must. A :class:`MisfitWarning` says where the two train, and not as meant.
    """
    if not isinstance(loss, Loss) or not _of_mmdet(head):
        return
    if isinstance(loss, ScheduledLoss):
        for part in loss.losses:
            check_fit(head, name, part, loss)
        return
    where = f"{name} of {type(head).__name__}"
    _check_family(name, loss, where)
    if _is_stock(head):
        _check_columns(head, loss, where)
    _check_reduction(head, name, whole or loss, where)
    _check_called(head, name, loss, where)
    _check_classes(head, name, loss, where)
    _check_unit(head, name, loss, where)
    if name == "loss_cls":
        _check_sigmoid(head, loss, whole or loss, where)
        _check_class_weights(head, loss, where)
        _check_level(head, loss, where)
    if _is_skipped(head, name):
        for part in (part for part in loss.modules() if isinstance(part, Loss)):
            part.facts = part.facts.but(every_rank=False)
    if not loss.facts.every_rank and any(True for _ in loss.buffers()):
        loss.register_forward_pre_hook(_is_it_averaged)


def _check_family(name, loss, where):
    """Raise ``ValueError`` for a loss of a family that an attribute does not take."""
    families = FAMILIES.get(name, ())
    if families and loss.family in _KNOWN and loss.family not in families:
        kind, takes = type(loss).__name__, ", ".join(families)
        raise ValueError(f"{where} is no place for {kind}, a {loss.family} loss: it takes {takes} losses.")


def _check_sigmoid(head, loss, whole, where):
    """Raise ``ValueError`` for a head that has the channels of another kind of class loss."""
    use_sigmoid, written = getattr(loss, "use_sigmoid", None), getattr(head, "use_sigmoid_cls", None)
    if None not in (use_sigmoid, written) and bool(written) != use_sigmoid:
        raise ValueError(
            f"Write use_sigmoid={use_sigmoid} in the config of {where}: the head chooses the number of channels by it, "
            f"and {type(whole).__name__} is a loss with use_sigmoid={use_sigmoid}."
        )


def _check_level(head, loss, where):
    """Raise ``ValueError`` for a ranking loss that is called level by level."""
    if loss.family == "ranking" and _goes_by_level(head):
        raise ValueError(
            f"{where} is called level by level, where {type(loss).__name__} would rank each level for itself: take "
            "RankingRetinaHead or RankingATSSHead of detloss_plugins.adapters.mmdetection, or PluginSSDHead."
        )


def _check_columns(head, loss, where):
    """Raise ``ValueError`` for a loss that wants other columns of logits or boxes than a head predicts."""
    kind = type(loss).__name__
    if has_bins(loss):
        raise ValueError(f"{where} decodes by bins 0, 1, 2 and so on; leave bins out of {kind}.")
    if getattr(loss, "custom_cls_channels", False) and _based_on(head, "BBoxHead", "DIIHead", "SABLHead") != "BBoxHead":
        raise ValueError(
            f"{where} is no place for {kind}, which has channels of its own: only heads based on mmdet's BBoxHead make "
            "them, such as Shared2FCBBoxHead."
        )
    # MMRotate puts mmdet's heads around a coder of rotated boxes; anchor-free ones have theirs later, and 4 columns.
    if loss.family == "rotated" and getattr(getattr(head, "bbox_coder", None), "encode_size", 4) == 4:
        raise ValueError(f"{where} predicts boxes without an angle, and {kind} compares rotated ones.")


def _check_unit(head, name, loss, where):
    """Warn, once, of a loss whose value depends on the unit of the boxes in a head that does not hand over pixels."""
    nearest = _based_on(head, *_IN_STRIDES, *_IN_PIXELS)
    if not name.startswith("loss_bbox") or nearest not in _IN_STRIDES or not getattr(head, "norm_on_bbox", True):
        return
    for part in loss.modules():
        if isinstance(part, Loss) and type(part).facts.family == "box" and not type(part).facts.scale_invariant:
            other = " or norm_on_bbox=False" if hasattr(head, "norm_on_bbox") else ""
            sentence = (
                f"{where} hands over boxes in units of each level's stride, and {type(part).__name__} is meant for "
                f'pixels: take type="detloss_plugins.adapters.mmdetection.Pixel{nearest}"{other}.'
            )
            if sentence not in _told:
                _told.add(sentence)
                warnings.warn(sentence, MisfitWarning, stacklevel=2)


def _check_class_weights(head, loss, where):
    classes = getattr(head, "num_classes", None)
    # Which have a channel for it beside a sigmoid loss too, but for that of Sparse R-CNN and QueryInst.
    background = bool(_based_on(head, "BBoxHead", "SABLHead")) and not (
        _based_on(head, "DIIHead") and getattr(loss, "use_sigmoid", False)
    )
    has = f"{classes} classes" + " and one for the background" * background
    for part in loss.modules():
        weights = getattr(part, "class_factors", None)
        if weights is not None and classes is not None and len(weights) != classes + background:
            raise ValueError(f"{where} has {len(weights)} class weights, and the head {has}.")
        if background and weights is None and getattr(part, "class_weight", None) == "effective":
            raise ValueError(
                f'class_weight="effective" has no meaning for {where}, as the head has {has}: '
                f"write {classes + 1} numbers."
            )


def _use_of(head, name):
    """The :class:`_Use` that a head makes of a loss, or None."""
    use = next((use for use in _USES if name in use.slots and _based_on(head, use.head, method=use.method)), None)
    mines = getattr(head, "use_ohem", True)  # YOLACT's, without which the reduction does not matter
    return use if use and (mines or not use.reduction) else None


def _check_called(head, name, loss, where):
    """Raise ``ValueError`` for a loss that a head never calls."""
    use = _use_of(head, name)
    if (use and not use.reduction) or getattr(head, _SWITCHES.get(name, ""), True) is False:
        raise ValueError(f"{type(loss).__name__} has no effect as {where}, which the head never calls: leave it out.")


def _check_reduction(head, name, loss, where):
    """Raise ``ValueError`` for a reduction that a head reduces further, or cannot divide."""
    use, given = _use_of(head, name), f'reduction="{loss.reduction}"'
    if use and use.reduction not in ("", loss.reduction):
        raise ValueError(
            f'Write reduction="{use.reduction}" in the config of {where}: the head {use.does}, and '
            f"{type(loss).__name__} is given {given}."
        )
    averaged = name in _AVERAGED and name not in _NOT_AVERAGED.get(_based_on(head, *_NOT_AVERAGED), ())
    if averaged and not use and loss.reduction != "mean" and _is_stock(head):
        raise ValueError(
            f"Leave {given} out of the config of {where}: the head gives the number to divide by (avg_factor), and "
            "only a mean is divided by it."
        )


def _check_classes(head, name, loss, where):
    """Raise ``ValueError`` for a class loss of logits that is given probabilities, or a row's that is added up."""
    whole = [part for part in loss.modules() if isinstance(part, Loss) and _is_whole(part)]
    logits = [part for part in whole if not getattr(part, "activated", False)]
    if name in ("loss_cls", "initial_loss_cls") and _based_on(head, "TOODHead") and logits:
        do = "write activated=True" if hasattr(logits[0], "activated") else "take one with activated=True"
        raise ValueError(f"{where} is given probabilities, and {type(logits[0]).__name__} takes logits: {do}.")
    of_rows = any(part.facts.sums_classes or part.facts.one_per_row for part in whole)
    if name == "loss_cls" and _based_on(head, "PAAHead", method="get_pos_loss") and of_rows:
        raise ValueError(
            f"{where} is no place for {type(loss).__name__}, which has one loss an anchor: the head adds up those of "
            "its classes. Take one that has a loss for each class, such as FocalLoss."
        )


def _is_whole(loss):
    """Whether a loss is not made of others."""
    return not any(isinstance(other, Loss) for other in loss.modules() if other is not loss)


def _based_on(head, *names, method=""):
    """The nearest of mmdet's classes of these names that a head is, or is based on; "" if there is none.

    With a ``method``, the one whose method of that name the head runs.
    """
    bases = type(head).__mro__
    if method:
        own = (base for base in bases if method in vars(base))
        bases = [base for base in own if not base.__module__.startswith("detloss_plugins.")][:1]
    return next((base.__name__ for base in bases if base.__name__ in names), "")


def _is_skipped(head, name):
    """Whether a head calls a loss of classes in steps with positives only, which are not those of the other ranks.

    DINO's does so for the denoising queries, which are made of objects.
    """
    skipped = ("loss_centerness", "loss_iou", "loss_mask", "loss_point")
    return name in skipped or (name == "loss_cls" and _based_on(head, "YOLOXHead", "DINOHead"))


_told = set()  # sentences, once in a process
_asked = set()  # types of losses, once in a process


def _is_it_averaged(loss, _):
    """Warn, at the first step of a distributed run, of a state that each rank would keep for itself.

    The loss cannot average it: a head may not call it on a rank without positives, and the others would wait for ever.
    """
    if is_compiling() or type(loss) in _asked or not loss.learning or _ranks() < 2:
        return
    _asked.add(type(loss))
    callers = (frame.frame.f_locals.get("self") for frame in inspect.stack(0))
    hooks = next((loop.runner.hooks for loop in callers if hasattr(getattr(loop, "runner", None), "hooks")), [])
    if not any(type(hook).__name__ == "SyncBuffersHook" for hook in hooks):
        warnings.warn(
            f"Each rank keeps a state of {type(loss).__name__} of its own, and they drift apart: write "
            'custom_hooks=[dict(type="SyncBuffersHook")] in the config, or call detloss_plugins.loss.average_state of '
            "it on every rank in every step.",
            stacklevel=2,
        )


def _ranks():
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _is_stock(head):
    """Whether a head is one of mmdet or ours: what others make of their losses is not known."""
    return type(head).__module__.startswith(("mmdet.models.", "detloss_plugins."))


def _of_mmdet(head):
    return any(base.__module__.startswith("mmdet.models.") for base in type(head).__mro__)


def _goes_by_level(head):
    """Whether ``loss_by_feat`` of an mmdet head takes its predictions level by level, or image by image."""
    if _based_on(head, "DETRHead", "GathersLevels"):  # layers of a decoder; all at once
        return False
    for base in type(head).__mro__:
        code = getattr(vars(base).get("loss_by_feat"), "__code__", None)
        if code and any(name.startswith("loss") and name.endswith("by_feat_single") for name in code.co_names):
            return True
        if code and "loss_by_feat" not in code.co_names:  # it does not go on to its base's
            return False
    return False


_watched: weakref.WeakSet = weakref.WeakSet()  # losses, each once: mmengine puts them into their heads again


def announce(head: nn.Module, name: str, loss: nn.Module) -> None:
    """Let the log of mmengine's Runner name a loss of ours in a head based on mmdet's at its first call in training."""
    if isinstance(loss, Loss) and _of_mmdet(head) and loss not in _watched:
        _watched.add(loss)
        _Announcement(f"{name} of {type(head).__name__}", loss)


class _Announcement:
    def __init__(self, where, loss):
        self.where, self.handle = where, loss.register_forward_pre_hook(self)

    def __call__(self, loss, _):
        if not is_compiling() and runner_progress("iter"):
            self.handle.remove()
            print_log(f"detloss_plugins: {self.where}: {loss}", "current")


register_module_module_registration_hook(check_fit)
register_module_module_registration_hook(announce)
