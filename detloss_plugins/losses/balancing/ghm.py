"""Gradient harmonising: samples weigh less where many have the same gradient."""

from typing import Annotated

import torch
from torch import Tensor

from detloss_plugins.facts import ARXIV, MMDET, Count, Positive, alike, between
from detloss_plugins.families import ClassificationLoss, RegressionLoss, of_one_type
from detloss_plugins.loss import rank_mean
from detloss_plugins.losses.classification.common import bce
from detloss_plugins.precision import float32
from detloss_plugins.reduction import apply_weight, counts
from detloss_plugins.registry import MODELS

__all__ = ["GHMC", "GHMR", "bin_counts", "ghmc_loss", "ghmr_loss", "harmony"]

Momentum = Annotated[float, between(0, 1, "[0, 1)")]


def bin_counts(norm: Tensor, mask: Tensor | None, bins: int) -> Tensor:
    """How many samples have their gradient norm in each of ``bins`` unit regions of [0, 1], ``(bins,)``.

    ``mask`` is 1 for the samples that count, in the shape of ``norm``, or None.

    >>> bin_counts(torch.tensor([0.1, 0.12, 1.0, float("nan")]), None, 2)
    tensor([2., 1.])
    """
    counted = norm.isfinite() if mask is None else mask * norm.isfinite()
    # Whole numbers: a float32 stops counting at 2^24, and not every device has a float64.
    found = torch.zeros(bins, dtype=torch.int64, device=norm.device)
    return found.scatter_add(0, _bin_of(norm, bins).flatten(), counted.flatten().long()).to(norm.dtype)


def _bin_of(norm, bins):
    return (norm * bins).nan_to_num(0.0).clamp(0, bins - 1).long()


def harmony(counts: Tensor, total: Tensor | float, average: Tensor | None = None) -> Tensor:
    """Gradient harmonising weight of each unit region: inverse to the number of samples in it, all ``(bins,)``.

    The weights of all samples add up to ``total``. ``average`` counts where it is not zero, in the place of the
    ``counts`` of this call, which are those of :func:`bin_counts`.

    >>> harmony(torch.tensor([0.0, 2.0, 0.0, 1.0]), 3)[[1, 3]]  # 3 / (2 bins), shared by 2 and by 1
    tensor([0.7500, 1.5000])
    """
    occupied = (counts > 0).sum().clamp(min=1)
    density = counts if average is None else torch.where(average > 0, average.to(counts.dtype), counts)
    # What does not count may be alone in its region, and has no weight.
    return torch.where(density > 0, total / (density.clamp(min=torch.finfo(torch.float32).tiny) * occupied), 0.0)


def _weights_of(norm, bins, table):
    """The weights that a table of the unit regions has for some norms; None: their own, as without a past."""
    table = harmony(bin_counts(norm, None, bins), norm.numel()) if table is None else table
    return table.to(norm.dtype)[_bin_of(norm, len(table))]


def ghmc_loss(pred: Tensor, target: Tensor, *, bins: Count = 10, table: Tensor | None = None) -> Tensor:
    """BCE with gradient harmonising weights, from the bins of this call unless ``table`` gives one for each bin.

    Logits, targets and losses have one shape. The gradient norm of BCE is ``|p - y|``.

    >>> ghmc_loss(torch.tensor([0.8, -0.4, 1.5, 0.7]), torch.tensor([1.0, 0.0, 0.0, 1.0])).mean()
    tensor(0.8672)
    """
    pred, target = of_one_type(pred, target)
    norm = (pred.detach().sigmoid() - target).abs()
    return _weights_of(norm, bins, table) * bce(pred, target)


def ghmr_loss(
    pred: Tensor, target: Tensor, *, mu: Positive = 0.02, bins: Count = 10, table: Tensor | None = None
) -> Tensor:
    """``sqrt(d^2 + mu^2) - mu`` with gradient harmonising weights, of this call's bins unless ``table`` gives them.

    ``d = pred - target`` in any one unit, which is that of ``mu``.

    >>> ghmr_loss(torch.tensor([0.01, -0.5, 0.005, 1.0]), torch.zeros(4)).mean()
    tensor(0.2444)
    """
    pred = float32(pred)
    length = ((pred - target).square() + mu**2).sqrt()
    norm = ((pred - target) / length).detach().abs()
    return _weights_of(norm, bins, table) * (length - mu)


class _Harmonised:
    """State and normaliser that GHM-C and GHM-R share. A sample's weight is a mask: only its sign is used."""

    observes = True

    def __init__(self, *, momentum: Momentum = 0.0, **settings):
        super().__init__(**settings)
        self.momentum = momentum
        # None keeps a loss without a moving average free of state, as mmdet's.
        self.register_buffer("acc_sum", torch.zeros(self.bins) if momentum else None)  # type: ignore[attr-defined]

    def statistics(self, pred, target, valid, weight):
        norm = self.norm(pred, target)
        counted = counts(norm, valid, weight)
        return {"bins": bin_counts(norm, counted, self.bins), "total": self._total(counted, weight)}

    def summarise(self, sums):
        if self.acc_sum is not None and self.learning:
            seen = rank_mean(sums["bins"], self.facts.every_rank)
            moved = self.momentum * self.acc_sum + (1 - self.momentum) * seen
            self.acc_sum.copy_(torch.where(seen > 0, moved, self.acc_sum))
        total = sums["total"].clamp(min=1)
        return {"table": harmony(sums["bins"], total, self.acc_sum), "total": total}

    def elements(self, pred, target, seen):
        return super().elements(pred, target, {"table": seen["table"]})

    def weigh(self, loss, valid, weight):
        return loss * counts(loss, valid, weight)

    def normalizer(self, count, seen):
        return seen["total"]


@MODELS.register_module()
class GHMC(
    _Harmonised,
    ClassificationLoss,
    fn=ghmc_loss,
    paper=ARXIV + "1811.05181",
    row_wise=True,
    needs_mining=False,
    self_normalized=True,
    filled=("table",),
    upstream=alike(MMDET + "GHMC", {}, {"bins": 30}),
):
    """Li et al., Gradient Harmonized Single-stage Detector, 2018 (GHM-C).

    As in mmdet, "mean" divides by the number of samples that count whatever ``avg_factor`` says, and a sample's weight
    is a mask. The moving average starts at zero, which inflates the first steps by ``1 / (1 - momentum)``.

    Args:
        bins: number of unit regions of the gradient norm.
        momentum: of the moving average of the counts, in [0, 1); 0 keeps no state.
    """

    def norm(self, pred: Tensor, target: Tensor) -> Tensor:
        return (pred.sigmoid() - target).abs()

    def _total(self, counted, weight):
        return counted.sum()


@MODELS.register_module()
class GHMR(
    _Harmonised,
    RegressionLoss,
    fn=ghmr_loss,
    paper=ARXIV + "1811.05181",
    row_wise=True,
    self_normalized=True,
    filled=("table",),
    upstream=alike(MMDET + "GHMR"),
):
    """Li et al., Gradient Harmonized Single-stage Detector, 2018 (GHM-R).

    As in mmdet, "mean" divides by the sum of the weights whatever ``avg_factor`` says; otherwise a weight is a mask.

    Args:
        mu: width of the smooth part, in the unit of the input.
        bins, momentum: as in GHMC.
    """

    def norm(self, pred: Tensor, target: Tensor) -> Tensor:
        gap = pred - target
        return (gap / (gap.square() + self.mu**2).sqrt()).abs()

    def _total(self, counted, weight):
        return apply_weight(torch.ones_like(counted), weight).sum()
