"""Losses on the distances of corners, edges, centres and sides; some with constants in pixels."""

from collections.abc import Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F

from detloss_plugins.base import Rule, Upstream, above, one_of, rules
from detloss_plugins.families import BoxLoss
from detloss_plugins.geometry import (
    Pair,
    along,
    area,
    both,
    center,
    coordinates,
    each,
    hull_diagonal2,
    ordered,
    power,
    ratio,
    rows,
    wh,
)
from detloss_plugins.registry import MODELS


def mpdiou_loss(pred, target, *, image_size, eps=1e-7):
    """``1 - IoU`` plus the squared distances of the two corners over the squared diagonal of the image.

    >>> mpdiou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), image_size=(6, 8))  # 1 - 1/2 + 4/100
    tensor(0.5400)
    """
    pair = Pair(pred, target, eps)
    height, width = image_size
    return 1 - pair.iou + pair.corner_distance2() / (height**2 + width**2)


def _is_size(value):
    return value == "batch" or (isinstance(value, Sequence) and len(value) == 2 and min(value) > 0)


@MODELS.register_module()
class MPDIoULoss(BoxLoss):
    """Ma and Xu, MPDIoU, 2023.

    Args:
        image_size: ``(height, width)`` of the network's input in the unit of the boxes, pixels; or "batch", which the
            Ultralytics adapter fills in for each batch, and assumes where nothing is given.

    Raises:
        ValueError: for any other ``image_size``, or if it is "batch" and nobody has set ``batch_image_size``.
    """

    fn = staticmethod(mpdiou_loss)
    paper = "https://arxiv.org/abs/2307.07662"
    scale_invariant = False
    attracts = True
    by_rows = True
    example = MappingProxyType({"image_size": (640, 640)})

    def __init__(self, *, image_size=None, **kwargs):
        super().__init__(**kwargs)
        self.image_size = image_size
        self.check("image_size", Rule("(height, width) of the network's input in pixels", _is_size))
        self.batch_image_size = None

    def compute(self, pred, target, valid, weight):
        settings = self.settings
        if self.image_size == "batch":
            settings["image_size"] = self.batch_image_size
        if settings["image_size"] is None:
            raise ValueError('Nothing sets the size that image_size="batch" asks for; give MPDIoULoss (height, width).')
        return self.fn(pred, target, **settings)


def powerful_iou_loss(pred, target, *, version=1, lambda_=1.3, eps=1e-7):
    """``2 - IoU - exp(-P^2)``, P the mean distance of the four edges in sides of the target.

    Version 2 weighs it by ``3 x exp(-x^2)``, ``x = lambda_ exp(-P)``: most for boxes of medium quality. The weight is
    not detached, as in the authors' code.

    >>> powerful_iou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # P = 1/8: 2 - 1/2 - exp(-1/64)
    tensor(0.5155)
    """
    pair = Pair(pred, target, eps)
    floor = pair.floor()

    def shift(p1, p2, t1, t2):
        """Of the two edges along one axis, in sides of the target."""
        return ratio((p1 - t1).abs() + (p2 - t2).abs(), t2 - t1, floor, 1.0)

    p = both(along(shift, pair.pred, pair.target)) / 4
    loss = 2 - pair.iou - torch.exp(-p.square())
    if version == 1:
        return loss
    quality = lambda_ * torch.exp(-p)
    return 3 * quality * torch.exp(-quality.square()) * loss


@MODELS.register_module()
class PowerfulIoULoss(BoxLoss):
    """Liu et al., Powerful-IoU, 2024 (PIoU).

    Args:
        version: 1, or 2 for the focusing weight.
        lambda_: of the focusing weight.

    Raises:
        ValueError: for another ``version``.
    """

    fn = staticmethod(powerful_iou_loss)
    paper = "https://www.sciencedirect.com/science/article/pii/S0893608023006640"
    allowed = rules(version=one_of(1, 2))
    bounds = (0.0, 2.0)
    symmetric = False
    attracts = True


def nwd_loss(pred, target, *, constant=12.8):
    """``1 - exp(-W / constant)``, W the Wasserstein distance of the boxes' Gaussians.

    ``W^2 = dx^2 + dy^2 + (dw^2 + dh^2) / 4``. Its gradient has length ``1 / constant`` however close two boxes are, and
    is zero where they are the same.

    >>> nwd_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([3.0, 4, 5, 6]), constant=10.0)  # 1 - exp(-5 / 10)
    tensor(0.3935)
    """
    pred, target = coordinates(pred), coordinates(target)

    def squares(center, side, true_center, true_side):
        return (center - true_center).square() + (side - true_side).square() / 4

    distance2 = both(each(squares, center(pred), wh(pred), center(target), wh(target)))
    distance = power(distance2, 0.5, torch.finfo(distance2.dtype).tiny)
    return -torch.expm1(-distance / constant)


@MODELS.register_module()
class NWDLoss(BoxLoss):
    """Wang et al., Normalized Gaussian Wasserstein Distance, 2021.

    Args:
        constant: in the unit of the boxes, pixels; about the mean size of the data set's objects. A box much further
            away than that gets hardly any gradient. 12.8 is that of AI-TOD, a data set of tiny objects.

    Raises:
        ValueError: if ``constant`` is not above 0.
    """

    fn = staticmethod(nwd_loss)
    paper = "https://arxiv.org/abs/2110.13389"
    allowed = rules(constant=above(0))
    bounds = (0.0, 1.0)
    scale_invariant = False
    attracts = True


def bounded_iou_loss(pred, target, *, beta=0.2, eps=1e-3):
    """Smooth L1 of one minus the largest IoU that x, y, w and h each leave possible: ``(..., 4)``.

    ``x: (w_g - 2 |dx|) / (w_g + 2 |dx| + eps)``, not below 0; ``w: min(w_g / (w + eps), w / (w_g + eps))``; y and h
    likewise. ``eps`` is in the unit of the boxes.

    >>> bounded_iou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), eps=0.0)  # 2/3 and 1/2, minus .1
    tensor([0.5667, 0.0000, 0.4000, 0.0000])
    """
    pred, target = rows(pred), rows(target)
    gap, sides = 2 * (center(pred) - center(target)).abs(), wh(target).clamp(min=0)
    own = wh(pred)
    position = ((sides - gap) / (sides + gap + eps)).relu()
    # A prediction of no length, or inverted, is on the right-hand branch, whose gradient rights it.
    size, _ = ordered(sides / (own.relu() + eps), own / (sides + eps))
    bound = torch.cat([position, size]).movedim(0, -1)
    return F.smooth_l1_loss(bound, torch.ones_like(bound), beta=beta, reduction="none")


@MODELS.register_module()
class BoundedIoULoss(BoxLoss):
    """Tychsen-Smith and Petersson, Fitness NMS and Bounded IoU Loss, 2017.

    Four losses a box, ``(..., 4)``: a mean over them is a quarter of their sum. A centre further away than half the
    target gets no gradient.

    Args:
        beta: where smooth L1 turns linear.
        eps: in the unit of the boxes, pixels.
    """

    fn = staticmethod(bounded_iou_loss)
    paper = "https://arxiv.org/abs/1711.00164"
    allowed = rules(beta=above(0), eps=above(0))
    symmetric = False
    scale_invariant = False
    values_per_box = 4
    yolo_gain = 0.25  # a box counts as the mean of its four, as in the dfl slot
    upstream = (Upstream("mmdet.models.losses.BoundedIoULoss"),)


def extended_iou_loss(pred, target, *, smooth_point=0.1, eps=1e-7):
    """``1 - I / U``, smooth below ``smooth_point``, with an intersection that goes below zero for disjoint boxes.

    >>> extended_iou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # 1 - 1/2 - .1 / 2
    tensor(0.4500)
    """
    pred, target = coordinates(pred), coordinates(target)

    def ends(p1, p2, t1, t2):
        """Along one axis, of the overlap, from the outer corner; the near and the far one swap if the boxes part."""
        origin, start = ordered(p1, t1)
        start, end = start - origin, ordered(p2, t2)[0] - origin
        return start, end, *ordered(start, end)

    (start_x, start_y), (end_x, end_y), (near_x, near_y), (far_x, far_y) = along(ends, pred, target)
    overlap = end_x * end_y + near_x * near_y - start_x * far_y - far_x * start_y
    union = area(pred) + area(target) - overlap
    loss = 1 - ratio(overlap, union, hull_diagonal2(pred, target), eps)
    beyond = (loss - smooth_point).relu()
    return (loss - beyond).square() / (2 * smooth_point) + beyond


@MODELS.register_module()
class ExtendedIoULoss(BoxLoss):
    """Peng and Yu, A Systematic IoU-Related Method, 2021 (mmdet's EIoULoss).

    Args:
        smooth_point: below it the loss is quadratic, above 0.

    Raises:
        ValueError: if ``smooth_point`` is not above 0.
    """

    fn = staticmethod(extended_iou_loss)
    paper = "https://ieeexplore.ieee.org/document/9429909"
    allowed = rules(smooth_point=above(0))
    bounds = (0.0, 2.0)
    attracts = True
    upstream = (Upstream("mmdet.models.losses.EIoULoss"),)


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
