"""Geometry shared by the box losses; each quantity is here once.

Aligned boxes ``(..., 4)`` are measured as rows ``(4, ...)``: x1, y1, x2, y2, each contiguous, so faster than columns.
For a compiler the rows are a tuple, which it measures in one loop over the boxes; of one tensor it makes several.

Where a denominator vanishes beside the size of the hull (the smallest enclosing box), its quotient counts as zero; eps
is that relative bound and is never added: pixels, stride units and normalised coordinates give the same answer.
"""

import math

import torch

from detloss_plugins.execution import Analytic, Notes, analytic, transforming

threshold_backward = torch.ops.aten.threshold_backward  # the gradient of relu


def rows(boxes):
    """Boxes ``(..., 4)`` as rows ``(4, ...)``; rotated ones ``(..., 5)`` likewise."""
    moved = boxes.movedim(-1, 0)
    if transforming() or moved.is_contiguous():
        return moved.contiguous()
    return torch.stack(boxes.unbind(-1))  # several times faster than to copy the transposed


def coordinates(boxes):
    """The rows of boxes ``(..., 4)``; for a compiler, a tuple of the four."""
    return boxes.unbind(-1) if transforming() else rows(boxes)


def each(function, *values):
    """``function`` of values that have two rows, one an axis: of both rows at once, or of each row of tuples.

    >>> each(torch.neg, torch.tensor([1, 2])), each(torch.neg, (torch.tensor(1), torch.tensor(2)))
    (tensor([-1, -2]), (tensor(-1), tensor(-2)))
    """
    if torch.is_tensor(values[0]):
        return function(*values)
    found = tuple(function(*row) for row in zip(*values, strict=True))
    return tuple(zip(*found, strict=True)) if isinstance(found[0], tuple) else found  # several values, two rows each


def along(function, pred, target):
    """``function(p1, p2, t1, t2)`` of the corners along each axis; see :func:`each`."""
    return each(function, pred[:2], pred[2:], target[:2], target[2:])


def both(values):
    """The sum of two rows."""
    return values.sum(0) if torch.is_tensor(values) else values[0] + values[1]


def wh(boxes):
    """Signed sides ``(2, ...)`` of rows; negative where a box is inverted, so that a loss on the sides can right it."""
    return each(torch.sub, boxes[2:], boxes[:2])


def center(boxes):
    """Centres ``(2, ...)`` of rows."""
    return each(lambda low, high: (low + high) / 2, boxes[:2], boxes[2:])


def area(boxes):
    """Areas ``(...)`` of rows; an inverted box has none.

    >>> area(rows(torch.tensor([[0.0, 0, 3, 2], [3, 2, 0, 0]])))
    tensor([6., 0.])
    """
    w, h = each(torch.relu, wh(boxes))
    return w * h


@torch.no_grad()
def hull_diagonal2(pred, target):
    """Squared diagonal ``(...)`` of the hull of rows, a constant.

    >>> hull_diagonal2(rows(torch.tensor([0.0, 0, 2, 2])), rows(torch.tensor([3.0, 4, 1, 1])))
    tensor(25.)
    """

    def side(p1, p2, t1, t2):
        first, last = torch.minimum(p1, p2), torch.maximum(p1, p2)
        return torch.maximum(last, torch.maximum(t1, t2)) - torch.minimum(first, torch.minimum(t1, t2))

    return both(each(torch.square, along(side, pred, target)))


def resized(boxes, factor):
    """Boxes ``(..., 4)`` with sides ``factor`` times as long about the same centres.

    >>> resized(torch.tensor([0.0, 0, 4, 2]), 0.5)
    tensor([1.0000, 0.5000, 3.0000, 1.5000])
    """
    boxes = rows(boxes)
    middle, half = center(boxes), factor / 2 * wh(boxes)
    return torch.cat([middle - half, middle + half]).movedim(0, -1)


def ratio(numerator, denominator, scale, eps):
    """``numerator / denominator``, and zero without a gradient where the denominator is at most ``eps * scale``.

    ``scale`` is the size of the hull in the denominator's unit: below that the quotient is the 0/0 of boxes without
    extent, whose gradient would be rounding noise times a huge number.
    """
    vanishes = denominator <= (eps * scale).detach()  # false for NaN, which is not ours to hide
    return analytic(_Ratio, numerator, denominator, vanishes)


class _Ratio(Analytic):
    """A quotient, and zero without a gradient where the denominator vanishes."""

    known = 2

    @staticmethod
    def plain(numerator, denominator, vanishes):
        return torch.where(vanishes, 0.0, numerator / torch.where(vanishes, 1.0, denominator))

    @staticmethod
    def value(ctx, numerator, denominator, vanishes):
        ctx.safe = denominator.masked_fill(vanishes, math.inf)
        ctx.quotient = numerator / ctx.safe
        return ctx.quotient.detach()

    @staticmethod
    def gradients(ctx, outer):
        of_numerator = outer / ctx.safe
        of_denominator = (of_numerator * ctx.quotient).neg_() if ctx.needs_input_grad[1] else None
        return of_numerator, of_denominator


def power(base, exponent, eps):
    """``base ** exponent`` for a base in [0, inf), and zero without a gradient where the base is at most ``eps``.

    A power below one has an infinite slope at zero.
    """
    bounded = base.clamp(min=eps)
    return torch.where(base <= eps, 0.0, bounded.sqrt() if exponent == 0.5 else bounded.pow(exponent))


def ordered(a, b):
    """The smaller and the larger of two tensors, element by element."""
    return analytic(_Ordered, a, b)


class _Ordered(Analytic):
    """The smaller and the larger; of equal ones, each has half of the gradient."""

    known = 2

    @staticmethod
    def plain(a, b):
        return torch.minimum(a, b), torch.maximum(a, b)

    @staticmethod
    def value(ctx, a, b):
        ctx.sign = (b - a).sign_()
        return torch.minimum(a, b), torch.maximum(a, b)

    @staticmethod
    def gradients(ctx, of_smaller, of_larger):
        if of_larger is None:
            share, skew = of_smaller / 2, ctx.sign * of_smaller
        elif of_smaller is None:
            share, skew = of_larger / 2, ctx.sign * -of_larger
        else:
            share, skew = (of_smaller + of_larger).div_(2), (of_smaller - of_larger).mul_(ctx.sign)
        return share.add(skew, alpha=0.5), share.sub(skew, alpha=0.5) if ctx.needs_input_grad[1] else None


class _AspectGap(Analytic):
    """CIoU's v from the sides of the prediction and of the target, ``(2, ...)``, not below ``floor``."""

    @staticmethod
    def plain(pred, target, floor):
        pred, target = (each(lambda side: side.clamp(min=floor), sides) for sides in (pred, target))
        angle_pred, angle_target = torch.atan2(*pred), torch.atan2(*target)
        return 4 / torch.pi**2 * (angle_target - angle_pred).square()

    @staticmethod
    def value(ctx, pred, target, floor):
        ctx.pred, ctx.floor, ctx.sides = pred, floor, pred.clamp(min=floor)
        ctx.turn = torch.atan2(*target.clamp(min=floor)).sub_(torch.atan2(*ctx.sides))
        return ctx.turn.square().mul_(4 / torch.pi**2)

    @staticmethod
    def gradients(ctx, outer):
        width, height = ctx.sides
        factor = (outer * ctx.turn).div_(ctx.sides.square().sum(0)).mul_(-8 / torch.pi**2)
        # A side of no length has no aspect ratio: kept at the floor, it gets no gradient instead of an exploding one.
        return [threshold_backward(torch.stack([height, -width]).mul_(factor), ctx.pred - ctx.floor, 0)]


class _Measures(Analytic):
    """Hull, offset, sides of the prediction, union and IoU from rows of predictions and targets."""

    @staticmethod
    def plain(pred, target, eps):
        def sides(p1, p2, t1, t2):
            """Along one axis: of the hull, from centre to centre, of the overlap."""
            (low1, high1), (low2, high2) = ordered(p1, t1), ordered(p2, t2)
            # An inverted box has its high corner first; for a valid one the outer minimum and maximum change nothing.
            hull = torch.maximum(high1, high2) - torch.minimum(low1, low2)
            return hull, ((t1 - p1) + (t2 - p2)) / 2, (low2 - high1).relu()

        hull, offset, (width, height) = along(sides, pred, target)
        overlap = width * height
        union = area(pred) + area(target) - overlap
        iou = ratio(overlap, union, both(each(torch.square, hull)), eps)
        return hull, offset, wh(pred), union, iou

    @staticmethod
    def value(ctx, pred, target, eps):
        hull, union = _Measures.measure(ctx, pred, target, eps)
        return hull, _Measures.offset(ctx), ctx.spans[1].clone(), union, ctx.iou.detach()

    @staticmethod
    def measure(ctx, pred, target, eps):
        """Hull and union; the rest is on ``ctx``."""
        (p1, p2), (t1, t2), shift = pred.chunk(2), target.chunk(2), target - pred
        (low1, low2), (high1, high2) = torch.minimum(pred, target).chunk(2), torch.maximum(pred, target).chunk(2)
        spans = torch.stack([low2, p2, t2]) - torch.stack([high1, p1, t1])  # of the overlap, pred and target
        ctx.sides = spans.relu()
        overlap, *areas = (ctx.sides[:, 0] * ctx.sides[:, 1]).unbind(0)
        union = (areas[0] + areas[1]).sub_(overlap)
        hull = torch.maximum(high2, high1).sub_(torch.minimum(low1, low2))
        ctx.safe = union.masked_fill(union <= hull.square().sum(0).mul_(eps), math.inf)
        ctx.iou = overlap.div_(ctx.safe)
        ctx.spans, ctx.shift, ctx.corners = spans, shift, (low1, low2, high1, high2)
        return hull, union

    @staticmethod
    def offset(ctx):
        """From centre to centre."""
        first, last = ctx.shift.chunk(2)
        return (first + last).div_(2)

    @staticmethod
    def gradients(ctx, of_hull, of_offset, of_sides, of_union, of_iou):
        # Signs, not masks: a masked operator branches at every element. Of two equal corners, each counts half.
        first, last = ctx.shift.sign().chunk(2)  # 1 where pred's corner is the lower of the two
        of_overlap, of_area = 0, 0
        if of_iou is not None:
            share = of_iou / ctx.safe
            of_area = (share * ctx.iou).neg_()
            of_overlap = share.sub_(of_area)
        if of_union is not None:
            of_overlap, of_area = of_overlap - of_union, of_area + of_union
        low = high = 0  # gradients of x1, y1 and of x2, y2
        if of_iou is not None or of_union is not None:
            areas, spans = torch.stack([of_overlap, of_area]).unsqueeze(1), ctx.spans[:2]
            of_overlap, of_area = threshold_backward(areas * ctx.sides[:2].flip(1), spans, 0).unbind(0)
            of_sides = of_area if of_sides is None else of_sides + of_area
            of_overlap.div_(2)
            low, high = (first - 1).mul_(of_overlap), (last + 1).mul_(of_overlap)
        if of_sides is not None:
            low, high = low - of_sides, high + of_sides
        if of_offset is not None:
            half = of_offset / 2
            low, high = low - half, high - half
        if of_hull is not None:
            # The sides of the hull are high corners and low corners, 1 and 1, unless a box is inverted.
            low1, low2, high1, high2 = ctx.corners
            upper, lower = (high2 - high1).sign_(), (low2 - low1).sign_()
            of_hull, both, skew = of_hull / 4, upper + lower, upper - lower
            high = high + (both - (skew + 2).mul_(last)).mul_(of_hull)
            low = low - (both + (2 - skew).mul_(first)).mul_(of_hull)
        return [torch.cat([low, high])]


class _IoULoss(Analytic):
    """See :func:`iou_loss_with`: what :class:`Pair` composes of its quantities, in as few operators as there can be."""

    @staticmethod
    def plain(pred, target, mode, penalty, alpha_gate, eps):
        pair = Pair(pred, target, eps)
        loss = _IoULoss.of_iou(pair.iou, mode, eps)[0]
        if penalty == "hull":
            return loss + pair.hull_gap()
        if penalty in ("center", "aspect"):
            loss = loss + pair.center_gap()
        return loss + pair.weighted_aspect_gap(alpha_gate) if penalty == "aspect" else loss

    @staticmethod
    def of_iou(iou, mode, eps):
        """The loss of an IoU, and a function that gives its slope."""
        if mode == "linear":
            return 1 - iou, lambda: -1
        if mode == "square":
            return 1 - iou.square(), lambda: -2 * iou
        kept = iou.clamp(min=eps)
        return -kept.log(), lambda: threshold_backward(kept.reciprocal().neg_(), iou, eps)

    @staticmethod
    def value(ctx, pred, target, mode, penalty, alpha_gate, eps):
        pred, target = rows(pred), rows(target)
        ctx.measures = measures = Notes()
        hull, union = _Measures.measure(measures, pred, target, eps)
        loss, ctx.slope_of_iou = _IoULoss.of_iou(measures.iou, mode, eps)
        ctx.penalty, ctx.hull, ctx.ratio = penalty, hull, Notes()
        if penalty:
            diagonal2 = hull.square().sum(0)
        if penalty == "hull":
            area = hull[0] * hull[1]
            loss = loss.add_(_Ratio.value(ctx.ratio, area - union, area, area <= eps * diagonal2))
        elif penalty:
            ctx.offset = _Measures.offset(measures)
            loss = loss.add_(
                _Ratio.value(ctx.ratio, ctx.offset.square().sum(0), diagonal2, diagonal2 <= eps * diagonal2)
            )
        if penalty == "aspect":
            ctx.aspect, floor = Notes(), side_floor(diagonal2, eps)
            v = _AspectGap.value(ctx.aspect, measures.spans[1], measures.spans[2], floor)
            ctx.alpha = aspect_weight(v, measures.iou, alpha_gate, eps)
            loss = loss.addcmul_(ctx.alpha, v)
        return loss

    @staticmethod
    def gradients(ctx, outer):
        of_hull = of_offset = of_sides = of_union = None
        if ctx.penalty == "hull":
            of_union, of_area = _Ratio.gradients(ctx.ratio, outer)
            of_hull = ctx.hull.flip(0).mul_(of_area.add_(of_union))
            of_union = of_union.neg_()
        elif ctx.penalty:
            of_distance2, of_diagonal2 = _Ratio.gradients(ctx.ratio, 2 * outer)
            of_offset, of_hull = ctx.offset * of_distance2, ctx.hull * of_diagonal2
        if ctx.penalty == "aspect":
            (of_sides,) = _AspectGap.gradients(ctx.aspect, ctx.alpha * outer)
        of_iou = ctx.slope_of_iou() * outer
        (found,) = _Measures.gradients(ctx.measures, of_hull, of_offset, of_sides, of_union, of_iou)
        return [found.movedim(0, -1)]


def iou_loss_with(pred, target, eps, mode="linear", penalty=None, alpha_gate=None):
    """``1 - IoU`` of boxes ``(..., 4)`` plus a penalty.

    Args:
        mode: "linear", "square" (``1 - IoU^2``) or "log" (``-ln IoU``, of an IoU of at least ``eps``).
        penalty: None, "hull" (GIoU), "center" (DIoU) or "aspect" (CIoU).
        alpha_gate: the IoU up to which CIoU's alpha is zero; None for no such bound.

    >>> iou_loss_with(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), 1e-7, penalty="center")  # 1/2 + 1/20
    tensor(0.5500)
    """
    return analytic(_IoULoss, pred, target, mode, penalty, alpha_gate, eps)


def side_floor(diagonal2, eps):
    """What counts as a side of no length beside a hull's squared diagonal, without a gradient."""
    return (eps * diagonal2.detach().sqrt()).clamp(min=torch.finfo(diagonal2.dtype).tiny)


def aspect_weight(v, iou, alpha_gate, eps):
    """CIoU's alpha of its v: ``v / (1 - IoU + v)``, a constant; zero up to an IoU of ``alpha_gate``, if that is given.

    >>> aspect_weight(torch.tensor(0.5), torch.tensor(0.5), None, 1e-7)
    tensor(0.5000)
    """
    v, iou = v.detach(), iou.detach()
    alpha = v / (1 - iou + v).clamp(min=eps)
    return alpha if alpha_gate is None else alpha * (iou > alpha_gate)


class Pair:
    """Aligned predictions and targets, and what the losses measure between them; all quantities ``(...)``.

    Args:
        pred, target: boxes ``(..., 4)``.
        eps: see above.

    Attributes:
        pred, target: the boxes as rows ``(4, ...)``.
        hull: sides ``(2, ...)`` of the smallest box that encloses both, whatever the order of the corners.
        diagonal2: squared diagonal of the hull.
        offset: from the predicted centre to the target's, ``(2, ...)``.
        union: area.
        iou: in [0, 1].
        sides: signed width and height of the prediction, ``(2, ...)``.

    >>> pair = Pair(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]), 1e-7)
    >>> pair.iou, pair.union, pair.hull
    (tensor(0.3333), tensor(6.), tensor([3., 2.]))
    """

    def __init__(self, pred, target, eps):
        self.pred, self.target, self.eps = coordinates(pred), coordinates(target), eps
        self.hull, self.offset, self.sides, self.union, self.iou = analytic(_Measures, self.pred, self.target, eps)
        self.diagonal2 = both(each(torch.square, self.hull))

    def ratio(self, numerator, denominator):
        """A quotient of areas; see :func:`ratio`."""
        return ratio(numerator, denominator, self.diagonal2, self.eps)

    @property
    def distance2(self):
        """Squared distance of the centres."""
        return both(each(torch.square, self.offset))

    def floor(self):
        """What counts as a side of no length, without a gradient."""
        return side_floor(self.diagonal2, self.eps)

    def hull_gap(self):
        """Share of the hull that is outside the union, in [0, 1).

        >>> Pair(torch.tensor([0.0, 0, 1, 1]), torch.tensor([1.0, 1, 2, 2]), 1e-7).hull_gap()  # (4 - 2) / 4
        tensor(0.5000)
        """
        width, height = self.hull
        return self.ratio(width * height - self.union, width * height)

    def center_gap(self):
        """Squared distance of the centres over the squared diagonal of the hull, in [0, 1).

        >>> Pair(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), 1e-7).center_gap()  # 1 / (16 + 4)
        tensor(0.0500)
        """
        return self.ratio(self.distance2, self.diagonal2)

    def over_hull2(self, lengths):
        """Squares of horizontal and vertical lengths ``(2, ...)`` over the squared sides of the hull."""
        return each(
            lambda length, side: ratio(length.square(), side.square(), self.diagonal2, self.eps**2), lengths, self.hull
        )

    def side_gap(self):
        """Squared differences of width and height, each over the squared side of the hull, summed.

        >>> Pair(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), 1e-7).side_gap()  # 2^2 / 4^2 + 0
        tensor(0.2500)
        """
        return both(self.over_hull2(each(torch.sub, self.sides, wh(self.target))))

    def side_change(self):
        """Differences of width and height, each over the longer of the two: ``(2, ...)``, in [0, 1] for valid boxes.

        >>> Pair(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), 1e-7).side_change()
        tensor([0.5000, 0.0000])
        """
        floor = self.floor()

        def change(pred, target):
            shorter, longer = ordered(pred, target)
            return ratio(longer - shorter, longer, floor, 1.0)

        return each(change, self.sides, wh(self.target))

    def corner_distance2(self):
        """Squared distances of the two upper left and of the two lower right corners, summed.

        >>> Pair(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 3]), 1e-7).corner_distance2()
        tensor(5.)
        """
        return both(along(lambda p1, p2, t1, t2: (p1 - t1).square() + (p2 - t2).square(), self.pred, self.target))

    def slant(self):
        """``|sin 2a|`` of the angle a of the line between the centres: 0 along an axis, 1 on a diagonal.

        >>> Pair(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 3, 3, 5]), 1e-7).slant()  # 2 * 1 * 3 / (1 + 9)
        tensor(0.6000)
        """
        dx, dy = self.offset
        return self.ratio(2 * (dx * dy).abs(), self.distance2)

    def aspect_gap(self):
        """CIoU's v: ``4 / pi^2 * (atan(w_g / h_g) - atan(w / h))^2``, in [0, 1).

        >>> pair = Pair(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2]), 1e-7)
        >>> pair.aspect_gap()  # (atan 2 - atan 1)^2 / (pi / 2)^2
        tensor(0.0420)
        """
        return analytic(_AspectGap, self.sides, wh(self.target), self.floor())

    def weighted_aspect_gap(self, alpha_gate=None):
        """CIoU's v times its alpha; see :func:`aspect_weight`."""
        v = self.aspect_gap()
        return aspect_weight(v, self.iou, alpha_gate, self.eps) * v
