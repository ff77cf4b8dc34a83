"""The IoU and its penalties: what is added to ``1 - IoU`` for the distance, the sides or the hull of two boxes."""

import torch

from detloss_plugins.base import Rule, Upstream, above, at_least, one_of, rules
from detloss_plugins.families import BoxLoss
from detloss_plugins.geometry import Pair, both, each, iou_loss_with, power, wh
from detloss_plugins.registry import MODELS

# Inputs on which upstream is wrong, and why.
_INVERTED = "an inverted box has a positive area there: this one, fully inverted, costs nothing"
_FULLY_INVERTED = ((20, 20, 10, 10), (10, 10, 20, 20))
_ABSOLUTE_EPS = "eps is added to areas there, so identical boxes in normalised coordinates cost something"
_NORMALISED = ((1e-3, 1e-3, 2e-3, 2e-3), (1e-3, 1e-3, 2e-3, 2e-3))


def iou_loss(pred, target, *, mode="log", eps=1e-6):
    """``-ln IoU`` (mode "log"), ``1 - IoU`` ("linear") or ``1 - IoU^2`` ("square").

    "log" keeps the IoU above ``eps`` (a pure number): disjoint boxes cost 13.8 and, as in every mode, get no gradient.

    >>> iou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), mode="square")  # 1 - (1/2)^2
    tensor(0.7500)
    """
    return iou_loss_with(pred, target, eps, mode)


@MODELS.register_module()
class IoULoss(BoxLoss):
    """Yu et al., UnitBox, 2016.

    The logarithmic form is the paper's; the linear and the square one are mmdet's.

    Raises:
        ValueError: if ``mode`` is not "log", "linear" or "square".
    """

    fn = staticmethod(iou_loss)
    paper = "https://arxiv.org/abs/1608.01471"
    allowed = rules(mode=one_of("log", "linear", "square"))
    upstream = tuple(
        Upstream("mmdet.models.losses.IoULoss", {"mode": mode}, {"mode": mode}) for mode in ("log", "linear", "square")
    )


def giou_loss(pred, target, *, eps=1e-7):
    """``1 - IoU + (hull - union) / hull`` with areas.

    >>> giou_loss(torch.tensor([0.0, 0, 1, 1]), torch.tensor([1.0, 1, 2, 2]))  # 1 - 0 + (4 - 2) / 4
    tensor(1.5000)
    """
    return iou_loss_with(pred, target, eps, penalty="hull")


@MODELS.register_module()
class GIoULoss(BoxLoss):
    """Rezatofighi et al., Generalized Intersection over Union, 2019."""

    fn = staticmethod(giou_loss)
    attracts = True
    paper = "https://arxiv.org/abs/1902.09630"
    bounds = (0.0, 2.0)
    upstream = (
        Upstream("mmdet.models.losses.GIoULoss"),
        Upstream("torchvision.ops.generalized_box_iou_loss"),
        Upstream("ultralytics.utils.metrics.bbox_iou", theirs={"xywh": False, "GIoU": True}),
        Upstream("mmdet.models.losses.GIoULoss", differs=_INVERTED, at=_FULLY_INVERTED),
        Upstream("torchvision.ops.generalized_box_iou_loss", differs=_INVERTED, at=_FULLY_INVERTED),
    )


def diou_loss(pred, target, *, eps=1e-7):
    """``1 - IoU`` plus the squared distance of the centres over the squared diagonal of the hull.

    >>> diou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # 1 - 1/2 + 1/20
    tensor(0.5500)
    """
    return iou_loss_with(pred, target, eps, penalty="center")


@MODELS.register_module()
class DIoULoss(BoxLoss):
    """Zheng et al., Distance-IoU Loss, 2019."""

    fn = staticmethod(diou_loss)
    attracts = True
    paper = "https://arxiv.org/abs/1911.08287"
    bounds = (0.0, 2.0)
    upstream = (
        Upstream("mmdet.models.losses.DIoULoss"),
        Upstream("torchvision.ops.distance_box_iou_loss"),
        Upstream("ultralytics.utils.metrics.bbox_iou", theirs={"xywh": False, "DIoU": True}),
        Upstream("mmdet.models.losses.DIoULoss", differs=_ABSOLUTE_EPS, at=_NORMALISED),
        Upstream("torchvision.ops.distance_box_iou_loss", differs=_ABSOLUTE_EPS, at=_NORMALISED),
    )


def ciou_loss(pred, target, *, alpha_gate=None, eps=1e-7):
    """DIoU plus ``alpha * v``: v compares the aspect ratios, ``alpha = v / (1 - IoU + v)`` is a constant (detached).

    ``alpha_gate=0.5`` sets alpha to zero unless IoU exceeds 0.5, as the authors' code and mmdet do; None (the paper's
    formula, torchvision, Ultralytics) does not.

    >>> pred, target = torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2])
    >>> ciou_loss(pred, target)  # v = (4 / pi^2) (atan 2 - atan 1)^2 = 0.04196, alpha = v / (1/2 + v) = 0.07742
    tensor(0.5532)
    """
    return iou_loss_with(pred, target, eps, penalty="aspect", alpha_gate=alpha_gate)


@MODELS.register_module()
class CIoULoss(BoxLoss):
    """Zheng et al., Distance-IoU Loss, 2019 (CIoU)."""

    fn = staticmethod(ciou_loss)
    attracts = True
    paper = "https://arxiv.org/abs/1911.08287"
    bounds = (0.0, 2.5)
    true_gradient = False
    upstream = (
        Upstream("mmdet.models.losses.CIoULoss", {"alpha_gate": 0.5}),
        Upstream("torchvision.ops.complete_box_iou_loss"),
        Upstream("ultralytics.utils.metrics.bbox_iou", theirs={"xywh": False, "CIoU": True}),
        Upstream(
            "mmdet.models.losses.CIoULoss",
            {"alpha_gate": 0.5},
            differs="mmdet's alpha is 0/0 = NaN for identical boxes",
            at=((10, 10, 20, 20), (10, 10, 20, 20)),
        ),
        Upstream(
            "torchvision.ops.complete_box_iou_loss",
            differs="torchvision's aspect ratio is 0/0 = NaN for a box without extent",
            at=((5, 5, 5, 5), (3, 3, 9, 9)),
        ),
        Upstream(
            "ultralytics.utils.metrics.bbox_iou",
            theirs={"xywh": False, "CIoU": True},
            differs="Ultralytics' aspect term has a gradient of a million for a box without extent",
            at=((6, 6, 6, 6), (3, 3, 9, 9)),
        ),
    )


def eiou_loss(pred, target, *, eps=1e-7):
    """DIoU plus the squared differences of width and height over the hull's squared sides.

    >>> eiou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # 1 - 1/2 + 1/20 + 4/16
    tensor(0.8000)
    """
    pair = Pair(pred, target, eps)
    return 1 - pair.iou + pair.center_gap() + pair.side_gap()


@MODELS.register_module(name=["EfficientIoULoss", "EIoULoss"])
class EfficientIoULoss(BoxLoss):
    """Zhang et al., Focal and Efficient IOU Loss, 2021 (EIoU).

    mmdet's EIoULoss is another loss, Extended-IoU.
    """

    fn = staticmethod(eiou_loss)
    attracts = True
    paper = "https://arxiv.org/abs/2101.08158"
    bounds = (0.0, 4.0)
    upstream = (
        Upstream(
            "mmdet.models.losses.EIoULoss",
            differs="mmdet's EIoULoss is Extended-IoU (smooth, libfacedetection), not Efficient-IoU",
        ),
    )


EIoULoss = EfficientIoULoss


def focal_eiou_loss(pred, target, *, gamma=0.5, detach_weight=True, floor=0.0, eps=1e-7):
    """``max(IoU^gamma, floor) * EIoU``. The weight is a constant unless ``detach_weight`` is False.

    The published weight (``floor=0``) is zero for disjoint boxes: they cost nothing and get no gradient. A floor in
    (0, 1], such as 0.1, keeps that share of EIoU's gradient for them.

    >>> focal_eiou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # sqrt(1/2) * 0.8
    tensor(0.5657)
    """
    pair = Pair(pred, target, eps)
    weight = power(pair.iou, gamma, eps).clamp(min=floor)
    weight = weight.detach() if detach_weight else weight
    return weight * (1 - pair.iou + pair.center_gap() + pair.side_gap())


@MODELS.register_module(name=["FocalEfficientIoULoss", "FocalEIoULoss"])
class FocalEfficientIoULoss(BoxLoss):
    """Zhang et al., Focal and Efficient IOU Loss, 2021 (Focal-EIoU).

    Raises:
        ValueError: if ``floor`` is not in [0, 1].
    """

    fn = staticmethod(focal_eiou_loss)
    allowed = rules(floor=Rule("in [0, 1]", lambda floor: 0 <= floor <= 1))
    paper = "https://arxiv.org/abs/2101.08158"
    bounds = (0.0, 4.0)
    true_gradient = False


FocalEIoULoss = FocalEfficientIoULoss


def siou_loss(pred, target, *, theta=4.0, eps=1e-7):
    """``1 - IoU + (distance cost + shape cost) / 2``; the distance costs more along an axis than on a diagonal.

    Distance: ``sum over x, y of 1 - exp((slant - 2) (offset / side of the hull)^2)``, ``slant = |sin 2a|`` of the angle
    between the centres. Shape: ``sum over w, h of (1 - exp(-|difference| / longer))^theta``.

    >>> siou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]))  # 1 - 1/3 + (1 - exp(-2 / 9)) / 2
    tensor(0.7663)
    """
    pair = Pair(pred, target, eps)
    slant = pair.slant()

    def cost(offset2, change):
        """Of the distance and the shape along one axis."""
        return 1 - torch.exp((slant - 2) * offset2) + (1 - torch.exp(-change)).pow(theta)

    return 1 - pair.iou + both(each(cost, pair.over_hull2(pair.offset), pair.side_change())) / 2


@MODELS.register_module()
class SIoULoss(BoxLoss):
    """Gevorgyan, SIoU Loss, 2022.

    Args:
        theta: how much a small difference of the sides is forgiven, at least 1; 2 to 6 are usual.

    Raises:
        ValueError: if ``theta`` is below 1.
    """

    fn = staticmethod(siou_loss)
    paper = "https://arxiv.org/abs/2205.12740"
    allowed = rules(theta=at_least(1))
    bounds = (0.0, 2.1)
    attracts = True
    upstream = (
        Upstream("mmdet.models.losses.SIoULoss", theirs={"neg_gamma": True}),
        Upstream(
            "mmdet.models.losses.SIoULoss",
            theirs={"neg_gamma": True},
            differs="mmdet's is 0/0 = NaN for two boxes without extent",
            at=((5, 5, 5, 5), (5, 5, 5, 5)),
        ),
        Upstream(
            "mmdet.models.losses.SIoULoss",
            differs="mmdet's default has the distance term's sign reversed: far boxes cost less and are pushed away",
            at=((0, 0, 2, 2), (4, 3, 6, 7)),
        ),
    )


def alpha_iou_loss(pred, target, *, alpha=3.0, penalty="iou", eps=1e-7):
    """``1 - IoU^alpha`` plus the powers of the terms of GIoU, DIoU or CIoU, as ``penalty`` says.

    CIoU's trade-off factor is inside the power, and a constant.

    >>> alpha_iou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # 1 - (1/2)^3
    tensor(0.8750)
    """
    pair = Pair(pred, target, eps)
    terms = []
    if penalty == "giou":
        terms = [pair.hull_gap()]
    elif penalty != "iou":
        terms = [pair.center_gap()]
    if penalty == "ciou":
        terms.append(pair.weighted_aspect_gap())
    return 1 - power(pair.iou, alpha, eps) + sum(power(term, alpha, eps) for term in terms)


@MODELS.register_module()
class AlphaIoULoss(BoxLoss):
    """He et al., Alpha-IoU, 2021.

    A power above 1 favours boxes that fit well already; the IoU term is flat where boxes barely overlap.

    Args:
        alpha: the power, above 0.
        penalty: "iou" for none, "giou", "diou" or "ciou".

    Raises:
        ValueError: for another ``penalty``, or an ``alpha`` that is not above 0.
    """

    fn = staticmethod(alpha_iou_loss)
    paper = "https://arxiv.org/abs/2110.13675"
    allowed = rules(alpha=above(0), penalty=one_of("iou", "giou", "diou", "ciou"))
    bounds = (0.0, 3.0)


def shape_iou_loss(pred, target, *, scale=0.0, theta=4.0, eps=1e-7):
    """``1 - IoU + weighted centre distance + shape cost / 2``, weighted by the shape of the target.

    The horizontal terms weigh ``2 h^s / (w^s + h^s)`` and the vertical ones ``2 w^s / (w^s + h^s)``, s being ``scale``
    and w, h the target's sides; at 0 both are 1.

    >>> shape_iou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]))  # 1 - 1/3 + 1 / 13
    tensor(0.7436)
    """
    pair = Pair(pred, target, eps)
    floor = pair.floor()
    width, height = each(lambda side: side.clamp(min=floor), wh(pair.target))
    # The powers' shares: a sigmoid of the logarithms, which neither overflows nor divides by zero.
    tilt = scale * (height.log() - width.log())
    (dx, dy), (change_w, change_h) = pair.offset, pair.side_change()
    weight_x, weight_y = 2 * tilt.sigmoid(), 2 * (-tilt).sigmoid()
    distance = pair.ratio(weight_x * dx.square() + weight_y * dy.square(), pair.diagonal2)
    shape = sum((1 - torch.exp(-w * change)).pow(theta) for w, change in ((weight_x, change_w), (weight_y, change_h)))
    return 1 - pair.iou + distance + shape / 2


@MODELS.register_module()
class ShapeIoULoss(BoxLoss):
    """Zhang and Zhang, Shape-IoU, 2023.

    Args:
        scale: exponent of the target's sides in the weights; larger for data sets of larger objects, 0 to switch off.
        theta: as in SIoU, at least 1.

    Raises:
        ValueError: if ``theta`` is below 1.
    """

    fn = staticmethod(shape_iou_loss)
    paper = "https://arxiv.org/abs/2312.17663"
    allowed = rules(theta=at_least(1))
    bounds = (0.0, 4.0)
    symmetric = False
    attracts = True


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
