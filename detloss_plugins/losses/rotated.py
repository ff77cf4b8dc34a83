"""Losses between rotated boxes ``(cx, cy, w, h, theta)``, each box read as a Gaussian; MGIoU, the last, compares edges.

Every function takes boxes ``(..., 5)``, the first four in any one unit and the angle in radians, and returns losses
``(...)``. The mean of a box is its center, its covariance ``S = R diag(k w^2, k h^2) R^T``, k = 1/4 or, for ProbIoU,
1/12. Hence ``theta + pi`` and ``(h, w, theta + pi/2)`` are the same box, and the angle of a square has no gradient.
Every distance is a sum of terms that are not negative, each zero for identical boxes: in float32 nothing cancels.

``eps`` is a share of the longest side of the two boxes, or of the gap between their centers where that is longer. A
side shorter than that (none, or a negative one) counts as one of that length and gets no gradient.
"""

import math
from functools import reduce
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from detloss_plugins.facts import ARXIV, NonNegative, Positive, Rule, alike, between, is_number
from detloss_plugins.families import RotatedLoss
from detloss_plugins.geometry import coordinates
from detloss_plugins.geometry import root as square_root
from detloss_plugins.losses.regression import smooth_l1_loss
from detloss_plugins.registry import MODELS

__all__ = [
    "GWDLoss", "KFIoULoss", "KLDLoss", "ProbIoULoss", "RotatedMGIoULoss", "gwd_loss", "kfiou_loss", "kld_loss",
    "probiou_loss", "rotated_mgiou_loss",
]  # fmt: skip

ShareOfSide = Annotated[float, between(0, 1, "(0, 1)")]
Tau = Annotated[float, Rule("0 or at least 1", lambda tau: is_number(tau) and (tau == 0 or tau >= 1))]
Function = Literal["log1p", "sqrt", "none"]


class _Box(NamedTuple):
    """Long and short side, area, difference of the squared sides, and the gap along and across: all ``(...)``."""

    long: Tensor
    short: Tensor
    area: Tensor
    elongation: Tensor
    along: Tensor
    across: Tensor


class _Pair(NamedTuple):
    """Two boxes in the unit ``scale``, their squared gap, and the angle between their long sides: all ``(...)``."""

    pred: _Box
    target: _Box
    gap2: Tensor
    turn: Tensor
    scale: Tensor


def _pair(pred: Tensor, target: Tensor, eps: float, floor: float = 0.0) -> _Pair:
    """Measure two boxes; ``floor`` is added to their squared sides."""
    (x_p, y_p, *sides_p, angle_p), (x_t, y_t, *sides_t, angle_t) = coordinates(pred), coordinates(target)
    if floor:
        sides_p, sides_t = ([(side.relu().square() + floor).sqrt() for side in sides] for sides in (sides_p, sides_t))
    dx, dy = x_t - x_p, y_t - y_p
    longest = reduce(torch.maximum, (length.detach() for length in (*sides_p, *sides_t, dx.abs(), dy.abs())))
    scale = longest.clamp(min=torch.finfo(dx.dtype).tiny)  # for twice the same point
    dx, dy = dx / scale, dy / scale
    p, tall_p = _box(sides_p, angle_p, dx, dy, scale, eps)
    t, tall_t = _box(sides_t, angle_t, dx, dy, scale, eps)
    turn = angle_p - angle_t + math.pi / 2 * (tall_p - tall_t).abs()
    return _Pair(p, t, dx.square() + dy.square(), turn, scale)


def _box(sides: list[Tensor], angle: Tensor, dx: Tensor, dy: Tensor, scale: Tensor, eps: float) -> tuple[_Box, Tensor]:
    """The box, and 1 where its long side is the height, else 0."""
    w, h = ((side / scale).clamp(min=eps) for side in sides)
    # Not maximum and minimum, which would mix the gradients of a square's two sides; nor where, which takes a CPU long.
    tall = (w < h).to(w.dtype)
    long, short = torch.lerp(w, h, tall), torch.lerp(h, w, tall)
    cos, sin = angle.cos(), angle.sin()
    cos, sin = torch.lerp(cos, -sin, tall), torch.lerp(sin, cos, tall)  # of the long side
    area, elongation = long * short, (long - short) * (long + short)
    return _Box(long, short, area, elongation, dx * cos + dy * sin, dy * cos - dx * sin), tall


def _skew(pair: _Pair) -> Tensor:
    """``(sin turn)^2`` times the elongations: what the turn changes a trace or a determinant by."""
    return pair.turn.sin().square() * (pair.pred.elongation * pair.target.elongation)


def _mismatch(pair: _Pair) -> tuple[Tensor, Tensor]:
    """``4 a b (det M / sqrt(det S_p det S_t) - 1)`` with ``M = (S_p + S_t) / 2``, and ``4 a b``, of areas a and b.

    The former is zero for boxes of one shape.
    """
    p, t = pair.pred, pair.target
    longs, shorts = 2 * p.long * t.long, 2 * p.short * t.short
    along, across = (p.long - t.long).square(), (p.short - t.short).square()
    return along * (across + shorts) + across * longs + _skew(pair), longs * shorts


def _adjugate_form(box: _Box, gap2: Tensor) -> Tensor:
    """``gap^T adj(S) gap / k``; over ``k area^2`` it is the squared Mahalanobis distance."""
    # Not by both offsets: so the angle of a square has no gradient to the last digit.
    return box.short.square() * gap2 + box.elongation * box.across.square()


def _settle(distance: Tensor, fun: Function, tau: float) -> Tensor:
    """``1 - 1 / (tau + fun(distance))``, or ``fun(distance)`` for ``tau=0``."""
    value = torch.log1p(distance) if fun == "log1p" else square_root(distance) if fun == "sqrt" else distance
    return 1 - 1 / (tau + value) if tau else value


def probiou_loss(
    pred: Tensor, target: Tensor, *, mode: Literal["l1", "l2"] = "l1", floor: NonNegative = 0.0, eps: ShareOfSide = 1e-4
) -> Tensor:
    """The Hellinger distance ``H = sqrt(1 - e^-B)`` (mode "l1") or the Bhattacharyya distance ``B`` ("l2") itself.

    ``B = 1/8 gap^T M^-1 gap + 1/2 ln(det M / sqrt(det S_p det S_t))``, with ``M = (S_p + S_t) / 2`` and k = 1/12.

    >>> pred, target = torch.tensor([0.0, 0, 2, 2, 0]), torch.tensor([2.0, 0, 2, 2, 0.7])
    >>> probiou_loss(pred, target, mode="l2")  # S = M = I / 3: B = 1/8 * 2^2 * 3, and ln 1 = 0
    tensor(1.5000)
    >>> probiou_loss(pred, target)  # sqrt(1 - e^-1.5) = sqrt(1 - 0.22313)
    tensor(0.8814)
    """
    pair = _pair(pred, target, eps, 12 * floor)
    mismatch, areas = _mismatch(pair)
    forms = _adjugate_form(pair.pred, pair.gap2) + _adjugate_form(pair.target, pair.gap2)
    distance = 3 * forms / (areas + mismatch) + torch.log1p(mismatch / areas) / 2
    if mode == "l2":
        return distance
    # expm1 is exact near 0; far from it, its derivative, which autograd takes of its value, has lost its digits.
    return square_root(torch.where(distance < 1, -torch.expm1(-distance), 1 - torch.exp(-distance)))


@MODELS.register_module()
class ProbIoULoss(
    RotatedLoss,
    fn=probiou_loss,
    paper=ARXIV + "2106.06072",
    row_wise=True,
    upstream=alike("ultralytics.utils.metrics.probiou", {"floor": 0.0}, {"floor": 0.01}),
):
    """Llerena et al., Gaussian Bounding Boxes and Probabilistic Intersection-over-Union, 2021.

    Zero for identical boxes. Mode "l1" is at most 1 and saturates: squares 3 sides apart keep 5 millionths of the
    gradient that they have when close, 9 sides apart none in float32. "l2", unbounded, is for boxes that start so.

    Args:
        floor: added to ``w^2 / 12`` and ``h^2 / 12`` of both boxes, in their squared unit. It bounds the gradient of
            boxes smaller than that, and the loss has a scale then. Ultralytics trains with 0.01, in stride units.
    """


def gwd_loss(
    pred: Tensor,
    target: Tensor,
    *,
    fun: Function = "log1p",
    tau: Tau = 2.0,
    normalize: bool = False,
    eps: ShareOfSide = 1e-4,
) -> Tensor:
    """``1 - 1 / (tau + fun(d^2))`` of the Wasserstein distance d of the Gaussians, k = 1/4.

    ``d^2 = |gap|^2 + tr S_p + tr S_t - 2 tr((S_p^1/2 S_t S_p^1/2)^1/2)``. With ``normalize`` it is
    ``d / (w_p h_p w_t h_t)^(1/4)`` in place of ``d^2``: the distance over the geometric mean of the sides.

    >>> pred, target = torch.tensor([0.0, 0, 4, 2, 0]), torch.tensor([1.0, 0, 6, 2, 0])
    >>> gwd_loss(pred, target)  # axes in line: d^2 = 1 + (6 - 4)^2 / 4 = 2; 1 - 1 / (2 + ln 3)
    tensor(0.6773)
    """
    pair = _pair(pred, target, eps)
    p, t = pair.pred, pair.target
    # The last trace is half the hypotenuse of these two, the first its value for axes in line.
    straight, crossed = p.long * t.long + p.short * t.short, p.long * t.short + p.short * t.long
    trace = ((straight * pair.turn.cos()).square() + (crossed * pair.turn.sin()).square()).sqrt()
    sides = (p.long - t.long).square() + (p.short - t.short).square()
    distance2 = pair.gap2 + (sides + 2 * _skew(pair) / (straight + trace)) / 4
    if normalize:
        return _settle(square_root(distance2) / (p.area * t.area).pow(1 / 4), fun, tau)
    return _settle(pair.scale.square() * distance2, fun, tau)


@MODELS.register_module()
class GWDLoss(RotatedLoss, fn=gwd_loss, paper=ARXIV + "2101.11952", row_wise=True, minimum=0.5, scale_invariant=False):
    """Yang et al., Rethinking Rotated Object Detection with Gaussian Wasserstein Distance Loss, 2021.

    The minimum, for identical boxes, is ``1 - 1 / tau``, the bound 1; ``tau=0`` is ``fun(d^2)`` itself, from 0 on
    without a bound. ``d^2`` has the squared unit of the boxes, and the loss is meant for pixels; with ``normalize`` it
    is scale-invariant. mmrotate's ``GDLoss("gwd")`` is ``normalize=True, tau=0``, its ``GDLoss_v1("gwd")`` is
    ``fun="sqrt", tau=1``.
    """


def kld_loss(
    pred: Tensor,
    target: Tensor,
    *,
    direction: Literal["pred||target", "target||pred"] = "pred||target",
    fun: Function = "log1p",
    tau: Tau = 1.0,
    root: bool = False,
    factor: Positive = 1.0,
    eps: ShareOfSide = 1e-4,
) -> Tensor:
    """``1 - 1 / (tau + fun(KL))`` of the Kullback-Leibler divergence of the Gaussians, k = 1/4.

    ``KL(a || b) = 1/2 gap^T S_b^-1 gap + 1/2 tr(S_b^-1 S_a) + 1/2 ln(det S_b / det S_a) - 1``, times ``factor``; with
    ``root`` the square root of that, before ``fun``.

    >>> pred, target = torch.tensor([0.0, 0, 4, 2, 0]), torch.tensor([1.0, 0, 4, 2, 0])
    >>> kld_loss(pred, target)  # S = diag(4, 1): KL = 1/2 * 1^2 / 4 = 1/8; 1 - 1 / (1 + ln 9/8)
    tensor(0.1054)
    """
    pair = _pair(pred, target, eps)
    a, b = (pair.pred, pair.target) if direction == "pred||target" else (pair.target, pair.pred)
    gap = (4 * _adjugate_form(b, pair.gap2) + _skew(pair)) / (2 * b.area.square())
    divergence = factor * (gap + _side_divergence(a.long, b.long) + _side_divergence(a.short, b.short))
    return _settle(square_root(divergence) if root else divergence, fun, tau)


def _side_divergence(a: Tensor, b: Tensor) -> Tensor:
    """``(r^2 - 1) / 2 - ln r`` for the ratio r of two sides."""
    excess = (a - b) / b
    return excess + excess.square() / 2 - torch.log1p(excess)


@MODELS.register_module()
class KLDLoss(RotatedLoss, fn=kld_loss, paper=ARXIV + "2106.01883", row_wise=True, symmetric=False):
    """Yang et al., Learning High-Precision Bounding Box via Kullback-Leibler Divergence, 2021.

    The minimum, for identical boxes, is ``1 - 1 / tau``, the bound 1; ``tau=0`` is ``fun(KL)`` itself, from 0 on
    without a bound. The authors' code has ``direction="target||pred"``, as has mmrotate's ``GDLoss("kld")`` with
    ``root=True, tau=0``; its ``GDLoss_v1("kld", fun="log1p")`` has ``factor=2``, for it leaves the 1/2 out.
    """


def kfiou_loss(
    pred: Tensor,
    target: Tensor,
    *,
    mode: Literal["linear", "log", "exp"] = "linear",
    center_weight: NonNegative = 1.0,
    eps: ShareOfSide = 1e-4,
) -> Tensor:
    """``1 - KFIoU`` (mode "linear"), ``-ln KFIoU`` ("log") or ``e^(1 - KFIoU) - 1`` ("exp"), plus the center term.

    ``KFIoU = V / (V_p + V_t - V)`` with the boxes' areas and the area V of the Gaussians' product, whose covariance is
    ``S_p (S_p + S_t)^-1 S_t``, k = 1/4. The center term is ``center_weight`` times the smooth L1 (beta = 1/9) of the
    gap along the target's sides, each offset over its side.

    >>> pred, target = torch.tensor([0.0, 0, 2, 2, 0.7]), torch.tensor([1.0, 0, 4, 2, 0])
    >>> kfiou_loss(pred, target, center_weight=0)  # V = 4 * 8 / sqrt((4 + 16)(4 + 4)) = 2.5298; 1 - V / (12 - V)
    tensor(0.7329)
    >>> kfiou_loss(pred, target)  # an offset of 1/4: + 1/4 - 1/18
    tensor(0.9273)
    """
    pair = _pair(pred, target, eps)
    t, a, b = pair.target, pair.pred.area, pair.target.area
    mismatch, areas = _mismatch(pair)
    overlap = (a * b / (1 + mismatch / areas)).sqrt() / 2
    kfiou = overlap / (a + b - overlap)
    loss = -kfiou.log() if mode == "log" else torch.expm1(1 - kfiou) if mode == "exp" else 1 - kfiou
    if not center_weight:
        return loss
    offsets = t.along / t.long, t.across / t.short
    return loss + center_weight * sum(smooth_l1_loss(x, torch.zeros_like(x), beta=1 / 9) for x in offsets)


@MODELS.register_module()
class KFIoULoss(RotatedLoss, fn=kfiou_loss, paper=ARXIV + "2201.12558", row_wise=True, minimum=2 / 3, symmetric=False):
    """Yang et al., The KFIoU Loss for Rotated Object Detection, 2022.

    KFIoU compares shapes only, so the paper adds a loss on the centers. Here that is on the offsets that a rotated box
    coder with the target as its anchor would give: the loss needs nothing but the boxes. KFIoU is at most 1/3:
    identical boxes give the minimum, 2/3 (mode "linear"), ln 3 = 1.0986 ("log") or e^(2/3) - 1 = 0.9477 ("exp").

    Args:
        center_weight: 0 for the plain form, whose centers another loss must move: mmrotate's ``kfiou_loss`` where its
            offsets are zero. The plain form is symmetric in the two boxes.
    """


def rotated_mgiou_loss(pred: Tensor, target: Tensor, *, eps: ShareOfSide = 1e-4) -> Tensor:
    """``(1 - the mean GIoU of the boxes' shadows) / 2``, on the four normals of the edges of both boxes.

    A GIoU in one dimension is overlap over enclosing length, the overlap negative for boxes apart. For shadows with
    half-lengths r and s, d apart, half of one minus it is ``m / (r + s + m)`` with ``m = max(d, |r - s|)``.

    >>> pred, target = torch.tensor([1.0, 1, 2, 2, 0]), torch.tensor([2.0, 1, 4, 2, 0])
    >>> rotated_mgiou_loss(pred, target)  # m = 1 of 1 + 2 + 1 along x, twice, and 0 along y
    tensor(0.1250)
    """
    pair = _pair(pred, target, eps)
    p, t, cos, sin = pair.pred, pair.target, pair.turn.cos().abs(), pair.turn.sin().abs()
    shadows = []  # along the normals of one box: its own length, that of the other, and the gap
    for box, other in ((p, t), (t, p)):
        shadows.append((box.long, other.long * cos + other.short * sin, box.along))
        shadows.append((box.short, other.long * sin + other.short * cos, box.across))
    apart = [(torch.maximum(gap.abs(), (own - its).abs() / 2), (own + its) / 2) for own, its, gap in shadows]
    return sum(m / (halves + m) for m, halves in apart) / 4  # type: ignore[return-value]


@MODELS.register_module()
class RotatedMGIoULoss(
    RotatedLoss, fn=rotated_mgiou_loss, paper=ARXIV + "2504.16443", row_wise=True, bounds=(0.0, 1.0)
):
    """Le et al., Marginalized Generalized IoU, 2025 (MGIoU), for rotated boxes.

    At angle 0 it is ``MGIoULoss``. Boxes far apart keep a gradient, and so does the angle of a square.
    """
