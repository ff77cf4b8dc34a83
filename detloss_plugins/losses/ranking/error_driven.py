"""AP, aLRP and Rank & Sort loss at the price of a sort of the positives.

Their functions take logits and targets of one shape, any: a target above 0 is a positive (for some, its quality), 0 a
negative, below 0 ignored. They return one loss a positive, ``(P,)``.

They compare scores by a step with a slope, ``H(x) = clamp(x / (2 delta) + 1 / 2, 0, 1)``, and hand back an
error-driven update in place of a derivative: what a positive loses by the negatives above it is taken from them and
given to it. Their authors loop over the positives, ``O(P (P + N))``. Seen from one score, a sum of steps over
the positives is piecewise linear with kinks at ``s_i - delta`` and ``s_i + delta``. So the kinks are sorted, every
negative is looked up among them once, and all sums over either side come from running sums over the kinks, in
``O((P + N) log P)``. They are float64 where a device has it, and of terms that are not negative. Rank & Sort also
compares the qualities of the positives, see ``_sums_by_quality``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from detloss_plugins.facts import ARXIV, NonNegative, Positive
from detloss_plugins.families import RankingLoss
from detloss_plugins.precision import float32, longest, outside_graph
from detloss_plugins.registry import MODELS

__all__ = ["ALRPLoss", "APLoss", "RankSortLoss", "alrp_loss", "ap_loss", "rank_sort_errors", "rank_sort_loss"]

ALRP_EPS = 1e-5  # a positive that is outranked by less gives no update
RANK_SORT_EPS = 1e-10  # the same, for both parts


def _from_the_top(values):
    """Running sums from the end."""
    return values.flip(0).cumsum(0).flip(0)


def _from_zero(values):
    return torch.cat([values.new_zeros(1), values])


class _Steps(NamedTuple):
    """``H(t - s_i)`` of positive scores ``s_i``, to be summed over queries ``t`` or over the positives."""

    kinks: torch.Tensor  # (2P,), ascending
    low: torch.Tensor  # (P,) the place of s_i - delta among them, where the slope of a positive begins
    high: torch.Tensor  # (P,) that of s_i + delta, where it ends

    @classmethod
    def of(cls, scores, delta):
        kinks, order = torch.cat([scores - delta, scores + delta]).sort()
        return cls(kinks, *order.argsort().chunk(2))

    def places(self, queries, delta):
        """On which linear piece each query lies, how many kinks are below it, in int32; and how far from its start."""
        # With delta = 0, a query on the step has passed it.
        pieces = torch.searchsorted(self.kinks, queries, right=delta == 0, out_int32=True)
        start = torch.cat([self.kinks[:1], self.kinks]).index_select(0, pieces)
        return pieces, torch.sub(queries, start, out=start).clamp_(0, 2 * delta)  # no slope is longer

    def lengths(self, delta):
        """Of the pieces between two kinks."""
        return longest(self.kinks).diff().clamp(max=2 * delta)

    def over_queries(self, pieces, along, delta, weight=None):
        """``sum_j w_j H(t_j - s_i)`` for every positive, ``(P,)``; exactly 0 where no step has begun."""
        table = longest(along.new_zeros(len(self.kinks) + 1))
        size = len(table)
        on_piece = torch.bincount(pieces, minlength=size) if weight is None else table.index_add(0, pieces, weight)
        passed = _from_the_top(longest(on_piece))[1:]  # the weight of the queries beyond each kink
        if delta == 0:
            return passed[self.low]
        # sum_j w_j max(t_j - kink, 0): H is the difference of two ramps.
        along = longest(along)
        beyond = table.index_add_(0, pieces, along if weight is None else along.mul_(weight))[1:]
        beyond[:-1] += passed[1:] * self.lengths(delta)
        beyond = _from_the_top(beyond)
        sums = (beyond[self.low] - beyond[self.high]) / (2 * delta)
        return torch.where(passed[self.low] == 0, 0.0, sums)

    def over_positives(self, pieces, along, delta, weight):
        """``sum_i w_i H(t_j - s_i)`` for every query, in the type of the scores."""
        table = weight.new_zeros(len(self.kinks))
        begun = table.index_add(0, self.low, weight)
        if delta == 0:
            return _from_zero(begun.cumsum(0)).to(along.dtype).index_select(0, pieces)
        slope = (begun - table.index_add(0, self.high, weight)).cumsum(0) / (2 * delta)
        value = _from_zero((slope[:-1] * self.lengths(delta)).cumsum(0))  # at each kink
        slope, value = (_from_zero(t).to(along.dtype).index_select(0, pieces) for t in (slope, value))
        return value.addcmul_(slope, along)


class _Ranking(NamedTuple):
    """What places the positives and negatives of a batch, ``M`` scores in one row, beside one another."""

    positive: torch.Tensor  # (P,) where the positives are
    scores: torch.Tensor  # (P,) theirs
    pieces: torch.Tensor  # (M,) the negatives' linear pieces; 0, where all steps are zero, for the other scores
    along: torch.Tensor  # (M,)
    steps: _Steps

    @classmethod
    def of(cls, pred, target, delta):
        scores, target = pred.detach().flatten(), target.flatten()
        positive = (target > 0).nonzero().squeeze(-1)
        if not len(positive):
            return None
        steps = _Steps.of(scores[positive], delta)
        pieces, along = steps.places(scores, delta)
        return cls(positive, scores[positive], pieces.masked_fill_(target != 0, 0), along, steps)

    def above(self, delta, weight=None):
        """``sum_k w_k H(s_k - s_i)`` over the positives, i itself included with ``H(0)``."""
        return self.steps.over_queries(*self.steps.places(self.scores, delta), delta, weight)

    def outranked(self, delta):
        """``sum_j H(t_j - s_i)`` over the negatives."""
        return self.steps.over_queries(self.pieces, self.along, delta)


class _Update(NamedTuple):
    """What backward gives the logits for each positive's loss, each ``(P,)``."""

    own: torch.Tensor  # how much the positive itself is pushed up
    share: torch.Tensor  # times H(t_j - s_i): how much each negative is pushed down
    quality: torch.Tensor | None = None  # with the next: Rank & Sort pushes positives of lower quality down too
    sorting: torch.Tensor | None = None  # times H(s_k - s_i)


class _ErrorDriven(torch.autograd.Function):
    """Hands out one loss a positive; backward gives its update, scaled by what comes in, in place of a derivative."""

    @staticmethod
    def forward(ctx, pred, losses, update, ranking, delta):
        *places, steps = ranking
        ctx.save_for_backward(*update, *places, *steps)
        ctx.shape, ctx.delta = pred.shape, delta
        return losses.to(pred.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, incoming):
        (*update, positive, scores, pieces, along, kinks, low, high), delta = ctx.saved_tensors, ctx.delta
        update, incoming = _Update(*update), longest(incoming)
        steps = _Steps(kinks, low, high)
        up = -incoming * update.own
        if update.sorting is not None:
            # A positive of lower quality is pushed down by sum_i c_i H(s_k - s_i) over y_i > y_k.
            up += _sums_by_quality(-scores, -update.quality, delta, (incoming * update.sorting)[None])[0][0]
        gradient = steps.over_positives(pieces, along, delta, incoming * update.share)
        gradient[positive] = up.to(gradient.dtype)
        return gradient.reshape(ctx.shape), None, None, None, None


@outside_graph  # the shapes depend on the data; the rest of a compiled model stays compiled
def _error_driven(pred: Tensor, target: Tensor, delta: float, errors: Callable) -> Tensor:
    """Losses of the positives; ``errors(ranking)`` gives them with their update."""
    pred = float32(pred)
    ranking = _Ranking.of(pred, target, delta)
    if ranking is None:
        return pred.flatten()[:0]
    return _ErrorDriven.apply(pred, *errors(ranking), ranking, delta)


def ap_loss(pred: Tensor, target: Tensor, *, delta: Positive = 1.0) -> Tensor:
    """One minus the interpolated precision of every positive; backward is the error-driven update.

    With ``a_i = 1 + sum_k H(s_k - s_i)`` over the other positives and ``b_i = sum_j H(t_j - s_i)`` over the negatives,
    the error is ``b_i / (a_i + b_i)``, and the loss its least value at or below the score. A positive is pushed up by
    its loss, and as much is taken from the negatives, each by its share ``H(t_j - s_i)`` of ``b_i``.

    >>> ap_loss(torch.tensor([0.0, 0.0, -3.0]), torch.tensor([1, 0, 0]))  # a = 1, b = 1/2
    tensor([0.3333])
    """

    def errors(ranking):
        outranked = ranking.outranked(delta)
        error = outranked / (ranking.above(delta) + 0.5 + outranked)
        order = ranking.scores.argsort()
        least = torch.empty_like(error).index_copy_(0, order, error[order].cummin(0).values)
        return least, _Update(least, least / outranked.where(outranked != 0, 1.0))

    return _error_driven(pred, target, delta, errors)


@MODELS.register_module()
class APLoss(RankingLoss, fn=ap_loss, paper=ARXIV + "1904.06373", bounds=(0.0, 1.0), true_gradient=False):
    """Chen et al., Towards Accurate One-Stage Object Detection with AP-Loss, 2019."""


def alrp_loss(
    pred: Tensor, target: Tensor, *, delta: Positive = 1.0, loc_error: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """``1 -`` precision of every positive, updated by what its rank costs in precision and in localisation.

    With ``rank_i = a_i + b_i`` as in :func:`ap_loss` and ``E_i = sum_k H(s_k - s_i) e_k`` over the other positives, the
    value is ``b_i / rank_i`` and the update ``(E_i + b_i) / rank_i``; none where ``b_i`` is below 1e-5.

    ``loc_error`` is the localisation error ``e_i`` of each positive in [0, 1], ``(P,)``, else a ``ValueError``; without
    it, that is one minus a soft target. With it, what is returned is a pair with the localisation component:
    ``sum_k e_k / rank_i`` over the positives with ``s_k >= s_i``, whose gradient goes to ``loc_error`` only.

    >>> logits, target = torch.tensor([0.0, 0.0, 3.0]), torch.tensor([1, 0, 1])  # a = 2 and 1, b = 1/2 and 0
    >>> alrp_loss(logits, target, loc_error=torch.tensor([0.5, 0.3]))  # 0.5 / 2.5, 0; 0.8 / 2.5, 0.3 / 1
    (tensor([0.2000, 0.0000]), tensor([0.3200, 0.3000]))
    """
    localisation = []

    def errors(ranking):
        outranked = ranking.outranked(delta)
        rank = ranking.above(delta) + 0.5 + outranked
        if loc_error is None:
            own_error = 1 - longest(target.flatten()[ranking.positive])
        else:
            _check_one_a_positive(loc_error, len(rank))
            own_error = longest(loc_error.detach())
            localisation.append(_cumulated(loc_error, ranking.scores) / rank)
        others = ranking.above(delta, own_error) - own_error / 2
        own = torch.where(outranked > ALRP_EPS, (others + outranked) / rank, 0.0)
        return outranked / rank, _Update(own, own / outranked.clamp(min=ALRP_EPS))

    losses = _error_driven(pred, target, delta, errors)
    if loc_error is None:
        return losses
    if not localisation:
        _check_one_a_positive(loc_error, 0)
    return losses, (localisation[0] if localisation else loc_error).to(losses.dtype)


def _check_one_a_positive(loc_error, count):
    if loc_error.shape != (count,):
        shape = tuple(loc_error.shape)
        raise ValueError(f"loc_error must have one value for each of {count} positives, ({count},), not {shape}.")


def _cumulated(values, scores):
    """``sum_k v_k`` over ``s_k >= s_i``, equal scores included whatever their order."""
    ascending, order = scores.sort()
    sums = _from_the_top(longest(values)[order])
    return sums[torch.searchsorted(ascending, scores).clamp(max=len(scores) - 1)]  # a NaN is beyond all


@MODELS.register_module()
class ALRPLoss(
    RankingLoss, fn=alrp_loss, paper=ARXIV + "2009.13592", bounds=(0.0, 1.0), true_gradient=False, filled=("loc_error",)
):
    """Oksuz et al., A Ranking-based, Balanced Loss Function Unifying Classification and Localisation, 2020 (aLRP).

    Called with ``loc_error``, the localisation error of each positive in the order of ``pred.flatten()``, it returns
    the pair (classification, localisation), both weighed and reduced; the gradient of the second goes to ``loc_error``
    only. The authors' error is the GIoU loss, and their self-balancing factor for the second is left to the head.
    Without ``loc_error`` it returns the first alone, with the error ``1 - quality`` of a soft target.
    """

    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None, loc_error=None):
        """Compute the loss; with ``loc_error``, both components."""
        given = {} if loc_error is None else {"loc_error": float32(loc_error)}
        weight = self.tensor_or_none(weight)
        return self.reduced(pred, target, weight, avg_factor, reduction_override, self.loss_weight, **given)


def _sums_by_quality(scores, quality, delta, terms):
    """``sum_k v_k H(s_k - s_i)`` for every positive i, over the k of lower quality than i and over the other k.

    ``terms`` are any number of ``v``, ``(C, P)``, and the sums two of that shape. In the order of the scores, a step is
    a range of positives where it rises and another where it is 1. Bit by bit of the qualities' ranks, from the highest,
    positives are parted into a low and a high half that keep this order (a wavelet matrix): each range is one in either
    half, and what is in the half where i is not, differs from i in quality. So it takes ``O(P log P)``.
    """
    scores, order = longest(scores).sort()
    qualities, rank = quality.unique(return_inverse=True)
    own = rank = rank[order]
    if delta > 0:  # no gap counts beyond the width of a step, so that sums of scores stay small
        scores = _from_zero(scores.diff().clamp(max=2 * delta).cumsum(0))
    begins, terms = scores - delta, terms[:, order]
    columns = torch.cat([terms, terms * scores])
    edges = torch.searchsorted(scores, begins, right=True), torch.searchsorted(scores, scores + delta)
    edges = torch.stack([*edges, torch.full_like(order, len(order))])
    lower = others = columns.new_zeros(len(columns), 2, len(order))
    for bit in reversed(range((len(qualities) - 1).bit_length())):
        high, own_high = (rank >> bit) % 2 > 0, (own >> bit) % 2 > 0
        low_before = _from_zero((~high).cumsum(0))
        in_low, parted = low_before[edges], high.argsort(stable=True)
        in_high = low_before[-1] + edges - in_low
        rank, columns = rank[parted], columns[:, parted]
        lower = lower + torch.where(own_high, _over_ranges(columns, in_low), 0.0)
        others = others + torch.where(own_high, 0.0, _over_ranges(columns, in_high))
        edges = torch.where(own_high, in_high, in_low)
    others = others + _over_ranges(columns, edges)  # what is left has the same quality

    def steps(sums):
        (count, moment), above = sums[:, 0].chunk(2), sums[: len(terms), 1]
        found = above if delta == 0 else above + (moment - begins * count) / (2 * delta)
        return torch.empty_like(found).index_copy_(1, order, found)

    return steps(lower), steps(others)


def _over_ranges(columns, edges):
    """Sums of ``(C, P)`` between each edge and the next, of ``(E + 1, Q)``: ``(C, E, Q)``."""
    return F.pad(columns.cumsum(1), (1, 0))[:, edges].diff(dim=1)


def rank_sort_errors(pred: Tensor, target: Tensor, *, delta: float = 0.5) -> tuple[Tensor, Tensor]:
    """The ranking and the sorting error of every positive, as constants: the two parts of :func:`rank_sort_loss`."""
    ranking = _Ranking.of(pred, target, delta)
    return (pred.detach().flatten()[:0],) * 2 if ranking is None else _rank_sort(ranking, target, delta)[:2]


def _rank_sort(ranking, target, delta):
    """Ranking error, sorting error and the update of both."""
    quality = longest(target.flatten()[ranking.positive])
    above, outranked = ranking.above(delta), ranking.outranked(delta)
    rank = above + outranked
    ranked = outranked / rank
    terms = torch.stack([torch.ones_like(quality), 1 - quality])
    (weight, wrong), (right_weight, right) = _sums_by_quality(ranking.scores, quality, delta, terms)
    # The mean badness of all above minus that of those which belong there, without its cancellation.
    sorted_ = (wrong - weight * right / right_weight) / above
    missorted = weight > RANK_SORT_EPS
    misranked = outranked > RANK_SORT_EPS
    own = torch.where(misranked, ranked, 0.0) + torch.where(missorted, sorted_, 0.0)
    sorting = torch.where(missorted, sorted_ / weight.clamp(min=RANK_SORT_EPS), 0.0)
    return ranked, sorted_, _Update(own, torch.where(misranked, 1 / rank, 0.0), quality, sorting)


def rank_sort_loss(pred: Tensor, target: Tensor, *, delta: NonNegative = 0.5) -> Tensor:
    """Ranking plus sorting error of every positive; backward is the error-driven update of both.

    With ``r_i = sum_k H(s_k - s_i)`` over all positives (``H(0)`` for itself) and ``b_i`` as in :func:`ap_loss`, the
    ranking error is ``b_i / (r_i + b_i)``. The sorting error is the mean of ``1 - y_k`` over the positives above i less
    that over those of them with ``y_k >= y_i``, both weighted by ``H(s_k - s_i)``.

    A target above 0 is the IoU ``y``. With ``delta=0``, the hard step ``s_k >= s_i``, a positive counts itself whole.

    >>> logits, target = torch.tensor([0.0, 0.0, 3.0]), torch.tensor([0.8, 0.0, 0.4])
    >>> rank_sort_loss(logits, target)  # 0.5 / (1.5 + 0.5) + (0.5 * 0.2 + 0.6) / 1.5 - 0.2; 0
    tensor([0.5167, 0.0000])
    """

    def errors(ranking):
        ranked, sorted_, update = _rank_sort(ranking, target, delta)
        return ranked + sorted_, update

    return _error_driven(pred, target, delta, errors)


@MODELS.register_module()
class RankSortLoss(RankingLoss, fn=rank_sort_loss, paper=ARXIV + "2107.11669", bounds=(0.0, 2.0), true_gradient=False):
    """Oksuz et al., Rank & Sort Loss for Object Detection and Instance Segmentation, 2021.

    The IoU of each positive is a soft target or the quality of a ``(label, quality)`` tuple; hard targets leave the
    ranking error alone. The value is the sum of the authors' two; :func:`rank_sort_errors` gives them apart.
    """
