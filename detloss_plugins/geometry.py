"""Geometry shared by the box losses: plain functions on aligned boxes ``(..., 4)`` in ``(x1, y1, x2, y2)``.

Where a denominator vanishes beside the size of the hull (the smallest enclosing box), its quotient counts as zero; eps
is that relative bound and is never added: pixels, stride units and normalised coordinates give the same answer.
"""

import torch


def wh(boxes):
    """Signed sides ``(..., 2)``; negative where a box is inverted, so that a loss on the sides can right it."""
    return boxes[..., 2:] - boxes[..., :2]


def center(boxes):
    """Centres ``(..., 2)``."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def area(boxes):
    """Areas ``(...)``; an inverted box has none.

    >>> area(torch.tensor([[0.0, 0, 3, 2], [3, 2, 0, 0]]))
    tensor([6., 0.])
    """
    w, h = wh(boxes).clamp(min=0).unbind(-1)
    return w * h


def hull(pred, target):
    """Sides ``(..., 2)`` of the smallest box that encloses both, whatever the order of the corners."""
    low = torch.minimum(pred, target)
    high = torch.maximum(pred, target)
    # An inverted box has its high corner first; for a valid one these two lines change nothing.
    low = torch.minimum(low[..., :2], low[..., 2:])
    high = torch.maximum(high[..., :2], high[..., 2:])
    return high - low


def diagonal2(sides):
    """Squared diagonal ``(...)`` of sides ``(..., 2)``."""
    return sides.square().sum(-1)


def ratio(numerator, denominator, scale, eps):
    """``numerator / denominator``, and zero without a gradient where the denominator is below ``eps * scale``.

    ``scale`` is the size of the hull in the denominator's unit: below that the quotient is the 0/0 of boxes without
    extent, whose gradient would be rounding noise times a huge number.
    """
    vanishes = denominator <= (eps * scale).detach()  # false for NaN, which is not ours to hide
    return torch.where(vanishes, 0.0, numerator / torch.where(vanishes, 1.0, denominator))


def intersection(pred, target):
    """Area of the intersection ``(...)``."""
    sides = torch.minimum(pred[..., 2:], target[..., 2:]) - torch.maximum(pred[..., :2], target[..., :2])
    w, h = sides.clamp(min=0).unbind(-1)
    return w * h


def iou_union(pred, target, eps):
    """IoU in [0, 1] and area of the union, both ``(...)``.

    >>> iou_union(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]), 1e-7)
    (tensor(0.3333), tensor(6.))
    """
    overlap = intersection(pred, target)
    union = area(pred) + area(target) - overlap
    return ratio(overlap, union, diagonal2(hull(pred, target)), eps), union


def center_gap(pred, target, eps):
    """Squared distance of the centres over the squared diagonal of the hull, ``(...)``, in [0, 1).

    >>> center_gap(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), 1e-7)  # 1 / (16 + 4)
    tensor(0.0500)
    """
    distance2 = (center(pred) - center(target)).square().sum(-1)
    diagonal = diagonal2(hull(pred, target))
    return ratio(distance2, diagonal, diagonal, eps)


def side_gap(pred, target, eps):
    """Squared differences of width and height, each over the squared side of the hull, summed: ``(...)``.

    >>> side_gap(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), 1e-7)  # 2^2 / 4^2 + 0
    tensor(0.2500)
    """
    sides = hull(pred, target)
    scale = diagonal2(sides).unsqueeze(-1)
    return ratio((wh(pred) - wh(target)).square(), sides.square(), scale, eps**2).sum(-1)


def aspect_gap(pred, target, eps):
    """CIoU's v: ``4 / pi^2 * (atan(w_g / h_g) - atan(w / h))^2``, ``(...)``, in [0, 1).

    >>> aspect_gap(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), 1e-7)  # (atan 2 - atan 1) / (pi / 2)
    tensor(0.0420)
    """
    floor = eps * diagonal2(hull(pred, target)).detach().sqrt().unsqueeze(-1)
    floor = floor.clamp(min=torch.finfo(pred.dtype).tiny)
    # A side of no length has no aspect ratio: kept at the floor, it gets no gradient instead of an exploding one.
    angle_pred, angle_target = (torch.atan2(*torch.maximum(wh(b), floor).unbind(-1)) for b in (pred, target))
    return 4 / torch.pi**2 * (angle_target - angle_pred).square()
