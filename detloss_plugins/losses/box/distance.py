"""Losses on the distances of corners, edges, centers and sides; some with constants in pixels."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detloss_plugins.facts import ARXIV, MMDET, Positive, Share, Size, alike
from detloss_plugins.families import BoxLoss
from detloss_plugins.geometry import Box, Pair, ratio, root
from detloss_plugins.registry import MODELS

__all__ = [
    "BoundedIoULoss", "ExtendedIoULoss", "GCDLoss", "MGIoULoss", "MPDIoULoss", "NWDLoss", "PowerfulIoULoss",
    "ScaleDynamicIoULoss", "bounded_iou_loss", "extended_iou_loss", "gcd_loss", "mgiou_loss", "mpdiou_loss",
    "nwd_loss", "powerful_iou_loss", "scale_dynamic_iou_loss",
]  # fmt: skip


def mpdiou_loss(pred: Tensor, target: Tensor, *, image_size: Any, eps: Positive = 1e-7) -> Tensor:
    """``1 - IoU`` plus the squared distances of the two corners over the squared diagonal of the image.

    >>> mpdiou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), image_size=(6, 8))  # 1 - 1/2 + 4/100
    tensor(0.5400)
    """
    pair, (height, width) = Pair(pred, target, eps), image_size
    p, t = pair.pred, pair.target
    distance2 = (p.x1 - t.x1).square() + (p.y1 - t.y1).square() + (p.x2 - t.x2).square() + (p.y2 - t.y2).square()
    return 1 - pair.iou + distance2 / (height**2 + width**2)


@MODELS.register_module()
class MPDIoULoss(
    BoxLoss,
    fn=mpdiou_loss,
    paper=ARXIV + "2307.07662",
    row_wise=True,
    attracts=True,
    scale_invariant=False,
    example={"image_size": (640, 640)},
    filled=("image_size",),
):
    """Ma and Xu, MPDIoU, 2023.

    Args:
        image_size: ``(height, width)`` of the network's input in the unit of the boxes, pixels; or "batch", which the
            Ultralytics adapter fills in for each batch (``batch_image_size``, else a ``ValueError``) and assumes where
            nothing is given.
    """

    def __init__(self, *, image_size: Size | Literal["batch"] = None, **settings):  # type: ignore[assignment]
        super().__init__(**settings)
        if image_size is None:
            raise ValueError("Give MPDIoULoss image_size=(height, width) of the network's input in pixels.")
        self.image_size = image_size
        self.batch_image_size = None

    def summarise(self, sums):
        size = self.batch_image_size if self.image_size == "batch" else self.image_size
        if size is None:
            raise ValueError('Nothing sets the size that image_size="batch" asks for; give MPDIoULoss (height, width).')
        return {"image_size": torch.as_tensor(size, dtype=torch.float32)}

    def elements(self, pred, target, seen):
        return super().elements(pred, target, {"image_size": seen["image_size"].to(pred.device).unbind()})


def powerful_iou_loss(
    pred: Tensor, target: Tensor, *, version: Literal[1, 2] = 1, lambda_: Positive = 1.3, eps: Positive = 1e-7
) -> Tensor:
    """``2 - IoU - exp(-P^2)``, P the mean distance of the four edges in sides of the target.

    Version 2 weighs it by ``3 x exp(-x^2)``, ``x = lambda_ exp(-P)``, with its gradient: most for medium quality.

    >>> powerful_iou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # P = 1/8: 2 - 1/2 - exp(-1/64)
    tensor(0.5155)
    """
    pair = Pair(pred, target, eps)
    p, t, shortest = pair.pred, pair.target, pair.shortest_side
    horizontal = ratio((p.x1 - t.x1).abs() + (p.x2 - t.x2).abs(), t.width, shortest)
    vertical = ratio((p.y1 - t.y1).abs() + (p.y2 - t.y2).abs(), t.height, shortest)
    mean = (horizontal + vertical) / 4
    loss = 2 - pair.iou - torch.exp(-mean.square())
    if version == 1:
        return loss
    quality = lambda_ * torch.exp(-mean)
    return 3 * quality * torch.exp(-quality.square()) * loss


@MODELS.register_module()
class PowerfulIoULoss(
    BoxLoss,
    fn=powerful_iou_loss,
    paper="https://www.sciencedirect.com/science/article/pii/S0893608023006640",
    row_wise=True,
    attracts=True,
    bounds=(0.0, 2.6),
    symmetric=False,
):
    """Liu et al., Powerful-IoU, 2024 (PIoU)."""


def nwd_loss(pred: Tensor, target: Tensor, *, constant: Positive = 12.8) -> Tensor:
    """``1 - exp(-W / constant)``, W the Wasserstein distance of the boxes' Gaussians.

    ``W^2 = dx^2 + dy^2 + (dw^2 + dh^2) / 4``. Its gradient has length ``1 / constant`` however close two boxes are, and
    is zero where they are the same.

    >>> nwd_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([3.0, 4, 5, 6]), constant=10.0)  # 1 - exp(-5 / 10)
    tensor(0.3935)
    """
    p, t = Box(pred), Box(target)
    (x, y), (true_x, true_y) = p.center, t.center
    distance2 = (x - true_x).square() + (y - true_y).square()
    distance2 = distance2 + ((p.width - t.width).square() + (p.height - t.height).square()) / 4
    return -torch.expm1(-root(distance2) / constant)


@MODELS.register_module()
class NWDLoss(
    BoxLoss,
    fn=nwd_loss,
    paper=ARXIV + "2110.13389",
    row_wise=True,
    attracts=True,
    bounds=(0.0, 1.0),
    scale_invariant=False,
):
    """Wang et al., Normalized Gaussian Wasserstein Distance, 2021.

    Args:
        constant: in the unit of the boxes, pixels; about the mean size of the data set's objects. A box much further
            away than that gets hardly any gradient. 12.8 is that of AI-TOD, a data set of tiny objects.
    """


def gcd_loss(pred: Tensor, target: Tensor, *, eps: Positive = 1e-7) -> Tensor:
    """``1 - exp(-D)``: D compares the boxes' Gaussians in the sides of both, so it has no unit.

    ``D^2 = (M(w, h) + M(w_t, h_t)) / 2``, with ``M(a, b) = (dx^2 + dw^2 / 4) / a^2 + (dy^2 + dh^2 / 4) / b^2``. Its
    gradient vanishes at the target, not near it. A side that is not above 0 measures nothing.

    >>> gcd_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]))  # D^2 = 1/4: 1 - exp(-1/2)
    tensor(0.3935)
    """
    pair = Pair(pred, target, eps)
    p, t, shortest = pair.pred, pair.target, pair.shortest_side
    dx, dy = pair.center_offset
    dw, dh = p.width - t.width, p.height - t.height
    measured = [(dx, p.width), (dw / 2, p.width), (dy, p.height), (dh / 2, p.height)]
    measured += [(dx, t.width), (dw / 2, t.width), (dy, t.height), (dh / 2, t.height)]
    distance2: Tensor = sum(ratio(length, side, shortest).square() for length, side in measured) / 2  # type: ignore
    return -torch.expm1(-root(distance2))


@MODELS.register_module()
class GCDLoss(BoxLoss, fn=gcd_loss, paper=ARXIV + "2510.27649", row_wise=True, attracts=True, bounds=(0.0, 1.0)):
    """Guan et al., Gaussian Combined Distance, 2025.

    NWD without a constant in pixels; a box many sides away gets hardly any gradient. The root, the logarithm and the
    distance of the authors' code are not here, as they have the sign of a similarity.
    """


def mgiou_loss(pred: Tensor, target: Tensor, *, eps: Positive = 1e-7) -> Tensor:
    """``(1 - the mean of the GIoUs along x and y) / 2``, a GIoU in one dimension being overlap over enclosing length.

    The overlap is that between the ends, negative for boxes apart. One minus the GIoU along x is then
    ``(|x1 - x1_t| + |x2 - x2_t|) / enclosing width``, of which nothing cancels for boxes that nearly fit.

    >>> mgiou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # GIoUs 2/4 and 2/2: (1 - 3/4) / 2
    tensor(0.1250)
    """
    pair = Pair(pred, target, eps)
    p, t, shortest = pair.pred, pair.target, pair.shortest_side
    horizontal = ratio((p.x1 - t.x1).abs() + (p.x2 - t.x2).abs(), pair.enclosing_width, shortest)
    vertical = ratio((p.y1 - t.y1).abs() + (p.y2 - t.y2).abs(), pair.enclosing_height, shortest)
    return (horizontal + vertical) / 4


@MODELS.register_module()
class MGIoULoss(BoxLoss, fn=mgiou_loss, paper=ARXIV + "2504.16443", row_wise=True, attracts=True, bounds=(0.0, 1.0)):
    """Le et al., Marginalized Generalized IoU, 2025 (MGIoU).

    The boxes are compared along the normals of their edges, here x and y.
    """


def scale_dynamic_iou_loss(
    pred: Tensor, target: Tensor, *, delta: Share = 0.5, area: Positive = 81.0, eps: Positive = 1e-7
) -> Tensor:
    """``1 - (delta - b) - (1 - delta + b) (IoU - alpha v) + (1 + delta - b) d^2 / c^2``: CIoU, weighed anew.

    ``b = delta * min(target's area / area, 1)``: for targets of at least ``area``, in the squared unit of the boxes, it
    is CIoU; for small ones the IoU counts less and the distance of the centers more. alpha is a constant, as in CIoU.

    >>> pred, target = torch.tensor([0.0, 0, 3, 3]), torch.tensor([3.0, 0, 6, 3])
    >>> scale_dynamic_iou_loss(pred, target, area=18.0)  # b = 1/4: 1 - 1/4 + 5/4 * 9 / 45
    tensor(1.)
    """
    pair = Pair(pred, target, eps)
    less = delta * (1 - (pair.target.area.detach() / area).clamp(max=1))
    of_iou = (1 - less) * (1 - pair.iou + pair.aspect_ratio_penalty())
    return of_iou + (1 + less) * pair.center_penalty


@MODELS.register_module()
class ScaleDynamicIoULoss(
    BoxLoss,
    fn=scale_dynamic_iou_loss,
    paper=ARXIV + "2412.16986",
    row_wise=True,
    attracts=True,
    bounds=(0.0, 2.5),
    true_gradient=False,
    symmetric=False,
    scale_invariant=False,
):
    """Yang et al., Pinwheel-shaped Convolution and Scale-based Dynamic Loss, 2025 (SD loss, the part on boxes).

    Args:
        delta: how much the weights move for the smallest targets, in [0, 1]; 0 is CIoU.
        area: of a target that is small no more, in the squared unit of the boxes; 81 is 9 x 9 pixels.
    """


def bounded_iou_loss(pred: Tensor, target: Tensor, *, beta: Positive = 0.2, eps: Positive = 1e-3) -> Tensor:
    """Smooth L1 of one minus the largest IoU that x, y, w and h each leave possible: ``(..., 4)``.

    ``x: (w_t - 2 |dx|) / (w_t + 2 |dx| + eps)``, not below 0; ``w: min(w_t / (w + eps), w / (w_t + eps))``; y and h
    likewise. ``eps`` is in the unit of the boxes, pixels; smooth L1 turns linear at ``beta``.

    >>> bounded_iou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), eps=1e-9)  # 2/3 and 1/2, minus .1
    tensor([0.5667, 0.0000, 0.4000, 0.0000])
    """
    p, t = Box(pred), Box(target)

    def bounds(center, side, true_center, true_side):
        gap, true_side = 2 * (center - true_center).abs(), true_side.relu()
        of_center = ((true_side - gap) / (true_side + gap + eps)).relu()
        # A prediction of no length, or inverted, is on the right-hand branch, whose gradient rights it.
        return of_center, torch.minimum(true_side / (side.relu() + eps), side / (true_side + eps))

    (x, y), (true_x, true_y) = p.center, t.center
    (of_x, of_w), (of_y, of_h) = bounds(x, p.width, true_x, t.width), bounds(y, p.height, true_y, t.height)
    bound = torch.stack([of_x, of_y, of_w, of_h], -1)
    return F.smooth_l1_loss(bound, torch.ones_like(bound), beta=beta, reduction="none")


@MODELS.register_module()
class BoundedIoULoss(
    BoxLoss,
    fn=bounded_iou_loss,
    paper=ARXIV + "1711.00164",
    row_wise=True,
    one_per_row=False,
    symmetric=False,
    scale_invariant=False,
    upstream=alike(MMDET + "BoundedIoULoss"),
):
    """Tychsen-Smith and Petersson, Fitness NMS and Bounded IoU Loss, 2017.

    Four losses a box, ``(..., 4)``: a mean over them is a quarter of their sum. A center further away than half the
    target gets no gradient.
    """


def extended_iou_loss(pred: Tensor, target: Tensor, *, smooth_point: Positive = 0.1, eps: Positive = 1e-7) -> Tensor:
    """``1 - I / U``, a square below ``smooth_point``, with an intersection that goes below zero for disjoint boxes.

    >>> extended_iou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]))  # 1 - 1/2 - .1 / 2
    tensor(0.4500)
    """
    pair = Pair(pred, target, eps)
    p, t = pair.pred, pair.target

    def ends(p1, p2, t1, t2):
        """Of the overlap along one axis, from the outer corner; also in order, as they swap if the boxes part."""
        origin = torch.minimum(p1, t1)
        start, end = torch.maximum(p1, t1) - origin, torch.minimum(p2, t2) - origin
        return start, end, torch.minimum(start, end), torch.maximum(start, end)

    start_x, end_x, near_x, far_x = ends(p.x1, p.x2, t.x1, t.x2)
    start_y, end_y, near_y, far_y = ends(p.y1, p.y2, t.y1, t.y2)
    overlap = end_x * end_y + near_x * near_y - start_x * far_y - far_x * start_y
    loss = 1 - pair.ratio(overlap, p.area + t.area - overlap)
    beyond = (loss - smooth_point).relu()
    return (loss - beyond).square() / (2 * smooth_point) + beyond


@MODELS.register_module()
class ExtendedIoULoss(
    BoxLoss,
    fn=extended_iou_loss,
    paper="https://ieeexplore.ieee.org/document/9429909",
    row_wise=True,
    attracts=True,
    bounds=(0.0, 2.0),
    upstream=alike(MMDET + "EIoULoss"),
):
    """Peng and Yu, A Systematic IoU-Related Method, 2021 (mmdet's EIoULoss)."""
