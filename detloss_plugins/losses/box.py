"""Losses between axis-aligned boxes ``(x1, y1, x2, y2)``."""

import torch

from detloss_plugins.base import BoxLoss, Upstream
from detloss_plugins.geometry import aspect_gap, center_gap, diagonal2, hull, iou_union, ratio, side_gap
from detloss_plugins.registry import MODELS


def iou_loss(pred, target, *, mode="log", eps=1e-6):
    """``-ln IoU`` (mode "log"), ``1 - IoU`` ("linear") or ``1 - IoU^2`` ("square").

    "log" keeps the IoU above ``eps`` (a pure number): disjoint boxes cost 13.8 and, as in every mode, get no gradient.

    >>> iou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), mode="square")  # 1 - (1/2)^2
    tensor(0.7500)
    """
    iou, _ = iou_union(pred, target, eps)
    if mode == "log":
        return -iou.clamp(min=eps).log()
    return 1 - (iou if mode == "linear" else iou.square())


@MODELS.register_module()
class IoULoss(BoxLoss):
    """Yu et al., UnitBox, 2016.

    The logarithmic form is the paper's; the linear and the square one are mmdet's.

    Raises:
        ValueError: if ``mode`` is not "log", "linear" or "square".
    """

    fn = staticmethod(iou_loss)
    paper = "https://arxiv.org/abs/1608.01471"
    upstream = tuple(
        Upstream("mmdet.models.losses.IoULoss", {"mode": mode}, {"mode": mode}) for mode in ("log", "linear", "square")
    )

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.mode not in ("log", "linear", "square"):
            raise ValueError(f'mode of IoULoss must be "log", "linear" or "square", not {self.mode!r}.')


def giou_loss(pred, target, *, eps=1e-7):
    """``1 - IoU + (hull - union) / hull`` with areas.

    >>> giou_loss(torch.tensor([0.0, 0, 1, 1]), torch.tensor([1.0, 1, 2, 2]))  # 1 - 0 + (4 - 2) / 4
    tensor(1.5000)
    """
    iou, union = iou_union(pred, target, eps)
    sides = hull(pred, target)
    width, height = sides.unbind(-1)
    return 1 - iou + ratio(width * height - union, width * height, diagonal2(sides), eps)


@MODELS.register_module()
class GIoULoss(BoxLoss):
    """Rezatofighi et al., Generalized Intersection over Union, 2019."""

    fn = staticmethod(giou_loss)
    paper = "https://arxiv.org/abs/1902.09630"
    bounds = (0.0, 2.0)
    upstream = (
        Upstream("mmdet.models.losses.GIoULoss"),
        Upstream("torchvision.ops.generalized_box_iou_loss"),
        Upstream("ultralytics.utils.metrics.bbox_iou", theirs={"xywh": False, "GIoU": True}),
    )


def diou_loss(pred, target, *, eps=1e-7):
    """``1 - IoU`` plus the squared distance of the centres over the squared diagonal of the hull.

    >>> diou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # 1 - 1/2 + 1/20
    tensor(0.5500)
    """
    iou, _ = iou_union(pred, target, eps)
    return 1 - iou + center_gap(pred, target, eps)


@MODELS.register_module()
class DIoULoss(BoxLoss):
    """Zheng et al., Distance-IoU Loss, 2019."""

    fn = staticmethod(diou_loss)
    paper = "https://arxiv.org/abs/1911.08287"
    bounds = (0.0, 2.0)
    upstream = (
        Upstream("mmdet.models.losses.DIoULoss"),
        Upstream("torchvision.ops.distance_box_iou_loss"),
        Upstream("ultralytics.utils.metrics.bbox_iou", theirs={"xywh": False, "DIoU": True}),
    )


def ciou_loss(pred, target, *, alpha_gate=None, eps=1e-7):
    """DIoU plus ``alpha * v``: v compares the aspect ratios, ``alpha = v / (1 - IoU + v)`` is a constant (detached).

    ``alpha_gate=0.5`` sets alpha to zero unless IoU exceeds 0.5, as the authors' code and mmdet do; None (the paper's
    formula, torchvision, Ultralytics) does not.

    >>> pred, target = torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2])
    >>> ciou_loss(pred, target)  # v = (4 / pi^2) (atan 2 - atan 1)^2 = 0.04196, alpha = v / (1/2 + v) = 0.07742
    tensor(0.5532)
    """
    iou, _ = iou_union(pred, target, eps)
    v = aspect_gap(pred, target, eps)
    with torch.no_grad():
        alpha = v / (1 - iou + v).clamp(min=eps)
        if alpha_gate is not None:
            alpha = alpha * (iou > alpha_gate)
    return 1 - iou + center_gap(pred, target, eps) + alpha * v


@MODELS.register_module()
class CIoULoss(BoxLoss):
    """Zheng et al., Distance-IoU Loss, 2019 (CIoU)."""

    fn = staticmethod(ciou_loss)
    paper = "https://arxiv.org/abs/1911.08287"
    bounds = (0.0, 2.5)
    true_gradient = False
    upstream = (
        Upstream("mmdet.models.losses.CIoULoss", {"alpha_gate": 0.5}),
        Upstream("torchvision.ops.complete_box_iou_loss"),
        Upstream("ultralytics.utils.metrics.bbox_iou", theirs={"xywh": False, "CIoU": True}),
    )


def eiou_loss(pred, target, *, eps=1e-7):
    """DIoU plus the squared differences of width and height over the hull's squared sides.

    >>> eiou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # 1 - 1/2 + 1/20 + 4/16
    tensor(0.8000)
    """
    iou, _ = iou_union(pred, target, eps)
    return 1 - iou + center_gap(pred, target, eps) + side_gap(pred, target, eps)


@MODELS.register_module(name=["EfficientIoULoss", "EIoULoss"])
class EfficientIoULoss(BoxLoss):
    """Zhang et al., Focal and Efficient IOU Loss, 2021 (EIoU).

    mmdet's EIoULoss is another loss, Extended-IoU.
    """

    fn = staticmethod(eiou_loss)
    paper = "https://arxiv.org/abs/2101.08158"
    bounds = (0.0, 4.0)
    upstream = (
        Upstream(
            "mmdet.models.losses.EIoULoss",
            differs="mmdet's EIoULoss is Extended-IoU (smooth, libfacedetection), not Efficient-IoU",
        ),
    )


EIoULoss = EfficientIoULoss


def focal_eiou_loss(pred, target, *, gamma=0.5, detach_weight=True, eps=1e-7):
    """``IoU^gamma * EIoU``. The weight is a constant unless ``detach_weight`` is False.

    The published weight is zero for disjoint boxes: they cost nothing and get no gradient.

    >>> focal_eiou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # sqrt(1/2) * 0.8
    tensor(0.5657)
    """
    iou, _ = iou_union(pred, target, eps)
    # A power below 1 has an infinite slope at zero, so the zero of disjoint boxes is put in afterwards.
    weight = torch.where(iou > eps, iou.clamp(min=eps).pow(gamma), 0.0)
    return (weight.detach() if detach_weight else weight) * eiou_loss(pred, target, eps=eps)


@MODELS.register_module(name=["FocalEfficientIoULoss", "FocalEIoULoss"])
class FocalEfficientIoULoss(BoxLoss):
    """Zhang et al., Focal and Efficient IOU Loss, 2021 (Focal-EIoU)."""

    fn = staticmethod(focal_eiou_loss)
    paper = "https://arxiv.org/abs/2101.08158"
    bounds = (0.0, 4.0)
    true_gradient = False


FocalEIoULoss = FocalEfficientIoULoss

# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
