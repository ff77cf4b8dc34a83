"""The IoU and its penalties: what is added to ``1 - IoU`` for the distance, the sides or the enclosing box.

Every function takes boxes ``(..., 4)`` as corners ``(x1, y1, x2, y2)`` in any one unit and returns losses ``(...)``.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor

from detloss_plugins.facts import ARXIV, MMDET, NonNegative, Positive, Share, Upstream, alike, alike_except, at_least
from detloss_plugins.families import BoxLoss
from detloss_plugins.geometry import Pair, power
from detloss_plugins.registry import MODELS

__all__ = [
    "AlphaIoULoss", "CIoULoss", "DIoULoss", "EIoULoss", "EfficientIoULoss", "FocalEIoULoss",
    "FocalEfficientIoULoss", "GIoULoss", "IoULoss", "SIoULoss", "ShapeIoULoss", "alpha_iou_loss", "ciou_loss",
    "diou_loss", "eiou_loss", "focal_eiou_loss", "giou_loss", "iou_loss", "shape_iou_loss", "siou_loss",
]  # fmt: skip

AtLeastOne = Annotated[float, at_least(1)]
_BBOX_IOU = "ultralytics.utils.metrics.bbox_iou"
# Why upstream is another loss, and the boxes on which it is.
_INVERTED = "an inverted box has a positive area there: this one, fully inverted, costs nothing"
_FULLY_INVERTED = ((20, 20, 10, 10), (10, 10, 20, 20))
_ABSOLUTE_EPS = "eps is added to areas there, so identical boxes in normalised coordinates cost something"
_NORMALISED = ((1e-3, 1e-3, 2e-3, 2e-3), (1e-3, 1e-3, 2e-3, 2e-3))
_NAN_ALPHA = "mmdet's alpha is 0/0 = NaN for identical boxes"
_NAN_ASPECT = "torchvision's aspect ratio is 0/0 = NaN for a box without extent"
_HUGE_GRADIENT = "Ultralytics' aspect term has a gradient of a million for a box without extent"
_EXTENDED = "mmdet's EIoULoss is Extended-IoU (smooth, libfacedetection), not Efficient-IoU"
_NAN_SIOU = "mmdet's is 0/0 = NaN for two boxes without extent"
_REVERSED = "mmdet's default has the distance term's sign reversed: far boxes cost less, are pushed away"


def iou_loss(
    pred: Tensor, target: Tensor, *, mode: Literal["log", "linear", "square"] = "log", eps: Positive = 1e-6
) -> Tensor:
    """``-ln IoU`` (mode "log"), ``1 - IoU`` ("linear") or ``1 - IoU^2`` ("square").

    "log" keeps the IoU above ``eps`` (a pure number): disjoint boxes cost 13.8 and, as in every mode, get no gradient.

    >>> iou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), mode="square")  # 1 - (1/2)^2
    tensor(0.7500)
    """
    iou = Pair(pred, target, eps).iou
    if mode == "log":
        return -iou.clamp(min=eps).log()
    return 1 - (iou if mode == "linear" else iou.square())


@MODELS.register_module()
class IoULoss(
    BoxLoss,
    fn=iou_loss,
    paper=ARXIV + "1608.01471",
    row_wise=True,
    upstream=alike(MMDET + "IoULoss", {"mode": "log"}, {"mode": "linear"}, {"mode": "square"}),
):
    """Yu et al., UnitBox, 2016.

    The logarithmic form is the paper's; the linear and the square one are mmdet's.

    Args:
        linear: mmdet's older way to write ``mode="linear"``.
    """

    mode: str

    def __init__(self, *, linear: bool = False, **settings):
        super().__init__(**settings)
        self.linear, self.mode = linear, "linear" if linear else self.mode


def giou_loss(pred: Tensor, target: Tensor, *, eps: Positive = 1e-7) -> Tensor:
    """``1 - IoU + (C - U) / C``: C the area of the enclosing box, U that of the union.

    >>> giou_loss(torch.tensor([0.0, 0, 1, 1]), torch.tensor([1.0, 1, 2, 2]))  # 1 - 0 + (4 - 2) / 4
    tensor(1.5000)
    """
    pair = Pair(pred, target, eps)
    return 1 - pair.iou + pair.enclosing_penalty


@MODELS.register_module()
class GIoULoss(
    BoxLoss,
    fn=giou_loss,
    paper=ARXIV + "1902.09630",
    row_wise=True,
    attracts=True,
    bounds=(0.0, 2.0),
    upstream=(
        *alike_except(MMDET + "GIoULoss", _INVERTED, _FULLY_INVERTED),
        *alike_except("torchvision.ops.generalized_box_iou_loss", _INVERTED, _FULLY_INVERTED),
        Upstream(_BBOX_IOU, theirs={"xywh": False, "GIoU": True}),
    ),
):
    """Rezatofighi et al., Generalized Intersection over Union, 2019."""


def diou_loss(pred: Tensor, target: Tensor, *, eps: Positive = 1e-7) -> Tensor:
    """``1 - IoU + d^2 / c^2``: d the distance of the centers, c the diagonal of the enclosing box.

    >>> diou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # 1 - 1/2 + 1/20
    tensor(0.5500)
    """
    pair = Pair(pred, target, eps)
    return 1 - pair.iou + pair.center_penalty


@MODELS.register_module()
class DIoULoss(
    BoxLoss,
    fn=diou_loss,
    paper=ARXIV + "1911.08287",
    row_wise=True,
    attracts=True,
    bounds=(0.0, 2.0),
    upstream=(
        *alike_except(MMDET + "DIoULoss", _ABSOLUTE_EPS, _NORMALISED),
        *alike_except("torchvision.ops.distance_box_iou_loss", _ABSOLUTE_EPS, _NORMALISED),
        Upstream(_BBOX_IOU, theirs={"xywh": False, "DIoU": True}),
    ),
):
    """Zheng et al., Distance-IoU Loss, 2019."""


def ciou_loss(pred: Tensor, target: Tensor, *, alpha_gate: Share | None = None, eps: Positive = 1e-7) -> Tensor:
    """DIoU plus ``alpha * v``: v compares the aspect ratios, ``alpha = v / (1 - IoU + v)`` is a constant (detached).

    ``alpha_gate=0.5`` sets alpha to zero unless IoU exceeds 0.5, as the authors' code and mmdet do; None (the paper's
    formula, torchvision, Ultralytics) does not.

    >>> pred, target = torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2])
    >>> ciou_loss(pred, target)  # v = (4 / pi^2) (atan 2 - atan 1)^2 = 0.04196, alpha = v / (1/2 + v) = 0.07742
    tensor(0.5532)
    """
    pair = Pair(pred, target, eps)
    return 1 - pair.iou + pair.center_penalty + pair.aspect_ratio_penalty(alpha_gate)


@MODELS.register_module()
class CIoULoss(
    BoxLoss,
    fn=ciou_loss,
    paper=ARXIV + "1911.08287",
    row_wise=True,
    attracts=True,
    bounds=(0.0, 2.5),
    true_gradient=False,
    upstream=(
        *alike_except(MMDET + "CIoULoss", _NAN_ALPHA, ((10, 10, 20, 20), (10, 10, 20, 20)), {"alpha_gate": 0.5}),
        *alike_except("torchvision.ops.complete_box_iou_loss", _NAN_ASPECT, ((5, 5, 5, 5), (3, 3, 9, 9))),
        *alike_except(_BBOX_IOU, _HUGE_GRADIENT, ((6, 6, 6, 6), (3, 3, 9, 9)), theirs={"xywh": False, "CIoU": True}),
    ),
):
    """Zheng et al., Distance-IoU Loss, 2019 (CIoU)."""


def eiou_loss(pred: Tensor, target: Tensor, *, eps: Positive = 1e-7) -> Tensor:
    """DIoU plus the squared differences of width and height over the squared sides of the enclosing box.

    >>> eiou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # 1 - 1/2 + 1/20 + 4/16
    tensor(0.8000)
    """
    pair = Pair(pred, target, eps)
    return 1 - pair.iou + pair.center_penalty + pair.side_penalty


@MODELS.register_module(name=["EfficientIoULoss", "EIoULoss"])
class EfficientIoULoss(
    BoxLoss,
    fn=eiou_loss,
    paper=ARXIV + "2101.08158",
    row_wise=True,
    attracts=True,
    bounds=(0.0, 4.0),
    upstream=(Upstream(MMDET + "EIoULoss", differs=_EXTENDED),),
):
    """Zhang et al., Focal and Efficient IOU Loss, 2021 (EIoU).

    mmdet's EIoULoss is another loss, Extended-IoU.
    """


EIoULoss = EfficientIoULoss


def focal_eiou_loss(
    pred: Tensor,
    target: Tensor,
    *,
    gamma: NonNegative = 0.5,
    detach_weight: bool = True,
    floor: Share = 0.0,
    eps: Positive = 1e-7,
) -> Tensor:
    """``max(IoU^gamma, floor) * EIoU``. The weight is a constant unless ``detach_weight`` is False.

    The published weight (``floor=0``) is zero for disjoint boxes: they cost nothing and get no gradient. A floor in
    (0, 1], such as 0.1, keeps that share of EIoU's gradient for them.

    >>> focal_eiou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # sqrt(1/2) * 0.8
    tensor(0.5657)
    """
    pair = Pair(pred, target, eps)
    weight = power(pair.iou.detach() if detach_weight else pair.iou, gamma, eps).clamp(min=floor)
    return weight * (1 - pair.iou + pair.center_penalty + pair.side_penalty)


@MODELS.register_module(name=["FocalEfficientIoULoss", "FocalEIoULoss"])
class FocalEfficientIoULoss(
    BoxLoss, fn=focal_eiou_loss, paper=ARXIV + "2101.08158", row_wise=True, bounds=(0.0, 4.0), true_gradient=False
):
    """Zhang et al., Focal and Efficient IOU Loss, 2021 (Focal-EIoU)."""


FocalEIoULoss = FocalEfficientIoULoss


def siou_loss(pred: Tensor, target: Tensor, *, theta: AtLeastOne = 4.0, eps: Positive = 1e-7) -> Tensor:
    """``1 - IoU + (distance cost + shape cost) / 2``; the distance costs more along an axis than on a diagonal.

    Distance: ``sum over x, y of 1 - exp((|sin 2a| - 2) (offset / side of the enclosing box)^2)``, a the angle of the
    line between the centers. Shape: ``sum over w, h of (1 - exp(-|difference| / longer))^theta``.

    >>> siou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]))  # 1 - 1/3 + (1 - exp(-2 / 9)) / 2
    tensor(0.7663)
    """
    pair = Pair(pred, target, eps)
    dx, dy = pair.center_offset
    sin_2a = pair.ratio(2 * (dx * dy).abs(), dx.square() + dy.square())
    cost = sum(1 - torch.exp((sin_2a - 2) * share) for share in pair.over_enclosing2(dx, dy))
    cost = cost + sum((1 - torch.exp(-change)).pow(theta) for change in pair.side_change)
    return 1 - pair.iou + cost / 2


@MODELS.register_module()
class SIoULoss(
    BoxLoss,
    fn=siou_loss,
    paper=ARXIV + "2205.12740",
    row_wise=True,
    attracts=True,
    bounds=(0.0, 2.1),
    upstream=(
        *alike_except(MMDET + "SIoULoss", _NAN_SIOU, ((5, 5, 5, 5), (5, 5, 5, 5)), theirs={"neg_gamma": True}),
        Upstream(MMDET + "SIoULoss", differs=_REVERSED, at=((0, 0, 2, 2), (4, 3, 6, 7))),
    ),
):
    """Gevorgyan, SIoU Loss, 2022.

    Args:
        theta: how much a small difference of the sides is forgiven, at least 1; 2 to 6 are usual.
    """


def alpha_iou_loss(
    pred: Tensor,
    target: Tensor,
    *,
    alpha: Positive = 3.0,
    penalty: Literal["iou", "giou", "diou", "ciou"] = "iou",
    eps: Positive = 1e-7,
) -> Tensor:
    """``1 - IoU^alpha`` plus the powers of the terms of GIoU, DIoU or CIoU as ``penalty`` says; "iou" has none.

    CIoU's trade-off factor is inside the power, and a constant.

    >>> alpha_iou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # 1 - (1/2)^3
    tensor(0.8750)
    """
    pair = Pair(pred, target, eps)
    loss = 1 - power(pair.iou, alpha, eps)
    if penalty == "giou":
        loss = loss + power(pair.enclosing_penalty, alpha, eps)
    if penalty in ("diou", "ciou"):
        loss = loss + power(pair.center_penalty, alpha, eps)
    if penalty == "ciou":
        loss = loss + power(pair.aspect_ratio_penalty(), alpha, eps)
    return loss


@MODELS.register_module()
class AlphaIoULoss(BoxLoss, fn=alpha_iou_loss, paper=ARXIV + "2110.13675", row_wise=True, bounds=(0.0, 3.0)):
    """He et al., Alpha-IoU, 2021.

    A power above 1 favours boxes that fit well already; the IoU term is flat where boxes barely overlap.
    """

    def __init__(self, **settings):
        super().__init__(**settings)
        self.facts = self.facts.but(true_gradient=self.facts.true_gradient and self.penalty != "ciou")


def shape_iou_loss(
    pred: Tensor, target: Tensor, *, scale: NonNegative = 0.0, theta: AtLeastOne = 4.0, eps: Positive = 1e-7
) -> Tensor:
    """``1 - IoU + weighted center distance + shape cost / 2``, weighted by the shape of the target.

    The horizontal terms weigh ``2 h^s / (w^s + h^s)`` and the vertical ones ``2 w^s / (w^s + h^s)``, s being ``scale``
    and w, h the target's sides; at 0 both are 1.

    >>> shape_iou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]))  # 1 - 1/3 + 1 / 13
    tensor(0.7436)
    """
    pair = Pair(pred, target, eps)
    shortest = pair.shortest_side
    width, height = pair.target.width.clamp(min=shortest), pair.target.height.clamp(min=shortest)
    # The powers' shares: a sigmoid of the logarithms, which neither overflows nor divides by zero.
    tilt = scale * (height.log() - width.log())
    weight_x, weight_y = 2 * tilt.sigmoid(), 2 * (-tilt).sigmoid()
    (dx, dy), (change_w, change_h) = pair.center_offset, pair.side_change
    distance = pair.ratio(weight_x * dx.square() + weight_y * dy.square(), pair.diagonal2)
    shape = (1 - torch.exp(-weight_x * change_w)).pow(theta) + (1 - torch.exp(-weight_y * change_h)).pow(theta)
    return 1 - pair.iou + distance + shape / 2


@MODELS.register_module()
class ShapeIoULoss(
    BoxLoss,
    fn=shape_iou_loss,
    paper=ARXIV + "2312.17663",
    row_wise=True,
    attracts=True,
    bounds=(0.0, 4.0),
    symmetric=False,
):
    """Zhang and Zhang, Shape-IoU, 2023.

    Args:
        scale: exponent of the target's sides in the weights; larger for data sets of larger objects, 0 to switch off.
        theta: as in SIoU, at least 1.
    """
