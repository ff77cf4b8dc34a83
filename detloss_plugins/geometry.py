"""Geometry shared by the box losses; each quantity is here once, on coordinates ``x1, y1, x2, y2`` of shape ``(...)``.

Where a denominator vanishes beside the size of the enclosing box, its quotient counts as zero; eps is that relative
bound and is never added: pixels, stride units and normalised coordinates give the same answer.
"""

import math

import torch
from torch import Tensor

from detloss_plugins.precision import float32


def coordinates(boxes: Tensor) -> tuple[Tensor, ...]:
    """The columns of boxes ``(..., 4)`` or ``(..., 5)``, half precision up-cast: areas of pixels overflow it."""
    return float32(boxes).unbind(-1)


def ratio(numerator: Tensor, denominator: Tensor, tiny: Tensor | float) -> Tensor:
    """``numerator / denominator``, and zero without a gradient where the denominator is at most ``tiny``.

    That is the 0 / 0 of boxes without extent, whose gradient would be rounding noise times a huge number.

    >>> ratio(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]), 1e-7)
    tensor([0.5000, 0.0000])
    """
    vanishes = denominator <= tiny  # false for NaN, which is not ours to hide
    return numerator / denominator.masked_fill(vanishes, math.inf)


def power(base: Tensor, exponent: float | Tensor, tiny: float) -> Tensor:
    """``base ** exponent`` for a base in [0, inf), and zero without a gradient where the base is at most ``tiny``.

    A power below one has an infinite slope at zero; the power 0 is 1 everywhere.

    >>> power(torch.tensor([4.0, 0.0]), 0.5, 1e-7)
    tensor([2., 0.])
    """
    if not isinstance(exponent, Tensor) and exponent == 0:
        return torch.ones_like(base)
    vanishes = torch.logical_and(base <= tiny, exponent > 0) if isinstance(exponent, Tensor) else base <= tiny
    return torch.where(vanishes, 0.0, base.clamp(min=tiny).pow(exponent))


def root(x: Tensor) -> Tensor:
    """The square root, with a slope of zero at zero."""
    return power(x, 0.5, torch.finfo(x.dtype).tiny)


def resized(boxes: Tensor, factor: float) -> Tensor:
    """Boxes ``(..., 4)`` with sides ``factor`` times as long about the same centers.

    >>> resized(torch.tensor([0.0, 0, 4, 2]), 0.5)
    tensor([1.0000, 0.5000, 3.0000, 1.5000])
    """
    low, high = float32(boxes).split(2, -1)
    center, half = (low + high) / 2, factor / 2 * (high - low)
    return torch.cat([center - half, center + half], -1)


class Box:
    """Boxes ``(..., 4)`` by their corners ``x1, y1, x2, y2``.

    ``width`` and ``height`` are negative where a box is inverted, so that their loss can right it; its ``area`` is 0.

    >>> Box(torch.tensor([[0.0, 0, 3, 2], [3, 2, 0, 0]])).area
    tensor([6., 0.])
    """

    def __init__(self, boxes: Tensor) -> None:
        self.x1, self.y1, self.x2, self.y2 = coordinates(boxes)
        self.width, self.height = self.x2 - self.x1, self.y2 - self.y1
        self.area = self.width.relu() * self.height.relu()

    @property
    def center(self) -> tuple[Tensor, Tensor]:
        """x and y."""
        return (self.x1 + self.x2) / 2, (self.y1 + self.y2) / 2


class Pair:
    """Aligned boxes ``(..., 4)``, in any one unit, and what the losses measure between them, each of shape ``(...)``.

    Attributes:
        pred, target: each a :class:`Box`.
        enclosing_width, enclosing_height, diagonal2: of the smallest box that encloses both; the diagonal is squared.
        union, iou: area, and in [0, 1].

    >>> pair = Pair(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]), 1e-7)
    >>> pair.iou, pair.union, pair.enclosing_width
    (tensor(0.3333), tensor(6.), tensor(3.))
    """

    def __init__(self, pred: Tensor, target: Tensor, eps: float) -> None:
        self.pred, self.target, self.eps = Box(pred), Box(target), eps
        p, t = self.pred, self.target
        width = torch.minimum(p.x2, t.x2) - torch.maximum(p.x1, t.x1)
        height = torch.minimum(p.y2, t.y2) - torch.maximum(p.y1, t.y1)
        overlap = width.relu() * height.relu()
        self.enclosing_width = p.width + t.width - width  # signed as the overlap is, this holds for boxes apart too
        self.enclosing_height = p.height + t.height - height
        self.diagonal2 = self.enclosing_width.square() + self.enclosing_height.square()
        self.tiny = eps * self.diagonal2.detach()
        self.union = p.area + t.area - overlap
        self.iou = self.ratio(overlap, self.union)

    def ratio(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """A quotient of areas; see :func:`ratio`."""
        return ratio(numerator, denominator, self.tiny)

    @property
    def shortest_side(self) -> Tensor:
        """What counts as a side of no length, without a gradient."""
        return (self.eps * self.diagonal2.detach().sqrt()).clamp(min=torch.finfo(self.diagonal2.dtype).tiny)

    @property
    def enclosing_penalty(self) -> Tensor:
        """Share of the enclosing box that is outside the union, in [0, 1)."""
        area = self.enclosing_width * self.enclosing_height
        return self.ratio(area - self.union, area)

    @property
    def center_offset(self) -> tuple[Tensor, Tensor]:
        """From the predicted center to the target's, along x and y."""
        p, t = self.pred, self.target
        return ((t.x1 - p.x1) + (t.x2 - p.x2)) / 2, ((t.y1 - p.y1) + (t.y2 - p.y2)) / 2

    @property
    def center_distance2(self) -> Tensor:
        """Squared distance of the centers; by :attr:`center_offset` it would take two operators more."""
        p, t = self.pred, self.target
        twice_dx, twice_dy = (t.x1 - p.x1) + (t.x2 - p.x2), (t.y1 - p.y1) + (t.y2 - p.y2)
        return (twice_dx.square() + twice_dy.square()) / 4

    @property
    def center_penalty(self) -> Tensor:
        """Squared distance of the centers over the squared diagonal of the enclosing box, in [0, 1)."""
        return self.ratio(self.center_distance2, self.diagonal2)

    def over_enclosing2(self, horizontal: Tensor, vertical: Tensor) -> tuple[Tensor, Tensor]:
        """Squares of a horizontal and a vertical length over the squared sides of the enclosing box."""
        width2, height2, tiny = self.enclosing_width.square(), self.enclosing_height.square(), self.eps * self.tiny
        return ratio(horizontal.square(), width2, tiny), ratio(vertical.square(), height2, tiny)

    @property
    def side_penalty(self) -> Tensor:
        """Squared differences of width and height, each over the squared side of the enclosing box, summed."""
        p, t = self.pred, self.target
        width, height = self.over_enclosing2(p.width - t.width, p.height - t.height)
        return width + height

    @property
    def side_change(self) -> tuple[Tensor, Tensor]:
        """Differences of width and height, each over the longer of the two, in [0, 1] for valid boxes.

        >>> Pair(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), 1e-7).side_change
        (tensor(0.5000), tensor(0.))
        """
        p, t, tiny = self.pred, self.target, self.shortest_side
        width, height = torch.maximum(p.width, t.width), torch.maximum(p.height, t.height)
        return ratio((p.width - t.width).abs(), width, tiny), ratio((p.height - t.height).abs(), height, tiny)

    @property
    def aspect_ratio_term(self) -> Tensor:
        """CIoU's v: ``4 / pi^2 * (atan(w_t / h_t) - atan(w / h))^2``, in [0, 1).

        A side of no length has no aspect ratio: it gets no gradient instead of an exploding one.
        """
        low = self.shortest_side
        angles = (torch.atan2(box.width.clamp(low), box.height.clamp(low)) for box in (self.target, self.pred))
        return 4 / math.pi**2 * torch.sub(*angles).square()

    def aspect_ratio_penalty(self, alpha_gate: float | None = None) -> Tensor:
        """CIoU's ``alpha v`` with the constant ``alpha = v / (1 - IoU + v)``; zero up to an IoU of ``alpha_gate``."""
        v, iou = self.aspect_ratio_term, self.iou.detach()
        alpha = v.detach() / (1 - iou + v.detach()).clamp(min=self.eps)
        return (alpha if alpha_gate is None else alpha * (iou > alpha_gate)) * v
