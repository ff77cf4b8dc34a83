"""What a loss of ours says in the moment in which a head of MMDetection takes it, if the two do not fit.

Such a mistake trains without an error: channels for the background beside a sigmoid loss, a loss of classes on boxes, a
ranking loss that ranks each level for itself. torch tells of every module that becomes part of another, so the head is
looked at where it is built, in any program. This module imports no framework.
"""

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from detloss_plugins.loss import Loss

_BOXES = ("box", "regression", "rotated", "uncertainty")
# The families that an attribute of a head takes.
FAMILIES = {
    "loss_cls": (
        "classification",
        "ranking",
        "heatmap",
        "soft label",
        "regression",
    ),  # YOLOv3's head takes the last two
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
_KNOWN = {family for families in FAMILIES.values() for family in families}


def check_fit(head: nn.Module, name: str, loss: nn.Module) -> None:
    """Raise ``ValueError`` if a loss of ours does not fit the attribute ``name`` of a head based on mmdet's."""
    if not isinstance(loss, Loss) or not _of_mmdet(head):
        return
    where, kind = f"{name} of {type(head).__name__}", type(loss).__name__
    families = FAMILIES.get(name, ())
    if families and loss.family in _KNOWN and loss.family not in families:
        raise ValueError(
            f"{where} is no place for {kind}, a {loss.family} loss: it takes {', '.join(families)} losses."
        )
    if name != "loss_cls":
        return
    use_sigmoid = getattr(loss, "use_sigmoid", None)
    if None not in (use_sigmoid, written := getattr(head, "use_sigmoid_cls", None)) and bool(written) != use_sigmoid:
        raise ValueError(
            f"Write use_sigmoid={use_sigmoid} in the config of {where}: the head chooses the number of channels by it, "
            f"and {kind} is a loss with use_sigmoid={use_sigmoid}."
        )
    if loss.family == "ranking" and _goes_by_level(type(head)):
        raise ValueError(
            f"{where} is called level by level, where {kind} would rank each level for itself: take RankingRetinaHead "
            "or RankingATSSHead of detloss_plugins.adapters.mmdetection, or PluginSSDHead."
        )


def _of_mmdet(head):
    return any(base.__module__.startswith("mmdet.models.") for base in type(head).__mro__)


def _goes_by_level(head):
    """Whether ``loss_by_feat`` of an mmdet head takes its predictions level by level, or image by image."""
    if {"DETRHead", "GathersLevels"} & {base.__name__ for base in head.__mro__}:  # layers of a decoder; all at once
        return False
    for base in head.__mro__:
        code = getattr(vars(base).get("loss_by_feat"), "__code__", None)
        if code and any(name.startswith("loss") and name.endswith("by_feat_single") for name in code.co_names):
            return True
        if code and "loss_by_feat" not in code.co_names:  # it does not go on to its base's
            return False
    return False


register_module_module_registration_hook(check_fit)
