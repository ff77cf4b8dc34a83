"""Gradient harmonising: samples weigh less where many have the same gradient."""

import torch

from detloss_plugins.base import Rule, Upstream, rank_mean
from detloss_plugins.execution import float32, parts
from detloss_plugins.families import ClassificationLoss, RegressionLoss
from detloss_plugins.losses.classification.common import bce
from detloss_plugins.reduction import apply_weight
from detloss_plugins.registry import MODELS


def bin_counts(norm, mask, bins):
    """How many samples have their gradient norm in each of ``bins`` unit regions of [0, 1], in float64.

    ``mask`` is 1 for the samples that count, in the shape of ``norm``, or None.

    >>> bin_counts(torch.tensor([0.1, 0.12, 1.0, float("nan")]), None, 2)
    tensor([2., 1.], dtype=torch.float64)
    """
    counts, counted = torch.zeros(bins, dtype=torch.float64, device=norm.device), norm.isfinite()
    counted = counted if mask is None else mask * counted
    return counts.scatter_add(0, _bin_of(norm, bins).flatten(), counted.flatten().double())


def _bin_of(norm, bins):
    return (norm * bins).nan_to_num(0.0).clamp(0, bins - 1).long()


def harmony(counts, total, average=None):
    """Gradient harmonising weight of each unit region: inverse to the number of samples in it.

    Args:
        counts: see :func:`bin_counts`, ``(bins,)``.
        total: what the weights of all samples add up to.
        average: counts to use in place of those of this call where they are not zero, ``(bins,)``.

    >>> harmony(torch.tensor([0.0, 2.0, 0.0, 1.0]), 3)[[1, 3]]  # 3 / (2 bins), shared by 2 and by 1
    tensor([0.7500, 1.5000])
    """
    occupied = (counts > 0).sum().clamp(min=1)
    density = counts if average is None else torch.where(average > 0, average, counts)
    # What does not count may be alone in its region, and has no weight.
    return torch.where(density > 0, total / (density.clamp(min=torch.finfo(torch.float32).tiny) * occupied), 0.0)


def ghmc_norm(pred, target):
    """The gradient norm of BCE, ``|p - y|``, a constant."""
    return (pred.detach().sigmoid() - target).abs()


def ghmc_loss(pred, target, *, bins=10, weight=None):
    """BCE with gradient harmonising weights, from the bins of this call unless ``weight`` is given.

    >>> ghmc_loss(torch.tensor([0.8, -0.4, 1.5, 0.7]), torch.tensor([1.0, 0.0, 0.0, 1.0])).mean()
    tensor(0.8672)
    """
    if weight is None:
        weight = _weight_in(ghmc_norm(pred, target), bins)
    return weight * bce(pred, target)


def _weight_in(norm, bins):
    """The weights of a call without a past."""
    return _weights(harmony(bin_counts(norm, None, bins), norm.numel()), norm)


def _weights(table, norm):
    """Those that a table has for some norms."""
    return table.to(norm.dtype)[_bin_of(norm, len(table))]


def _at_least_one(count):
    return count.clamp(min=1) if torch.is_tensor(count) else max(count, 1)


class _Harmonised:
    """State and normaliser that GHM-C and GHM-R share. A sample's weight is a mask: only its sign is used."""

    self_normalized = True

    def _init_state(self, momentum):
        self.momentum = momentum
        self.check("momentum", Rule("in [0, 1)", lambda value: 0 <= value < 1))
        # None keeps a loss without a moving average free of state, as mmdet's.
        self.register_buffer("acc_sum", torch.zeros(self.bins, dtype=torch.float64) if momentum else None)

    def survey(self, pred, target, weight):
        counts = total = 0
        for _, x, t, w in parts(self, pred.detach(), target, weight):
            x, t, valid = self.prepare(float32(x), t)
            norm = self.norm(x, t)
            counts = counts + bin_counts(norm, self._mask(norm, valid, w), self.bins)
            total = total + self._total(norm, valid, w)
        if self.acc_sum is not None and self.learning:
            seen = rank_mean(counts) if self.every_rank else counts
            moved = self.momentum * self.acc_sum + (1 - self.momentum) * seen
            self.acc_sum.copy_(torch.where(seen > 0, moved, self.acc_sum))
        total = _at_least_one(total)
        return {"table": harmony(counts, total, self.acc_sum), "total": total}

    def compute(self, pred, target, valid, weight, *, table, total):
        norm = self.norm(pred, target)
        weights, mask = _weights(table, norm), self._mask(norm, valid, weight)
        return self.fn(pred, target, weight=weights if mask is None else weights * mask, **self.settings)

    @staticmethod
    def _mask(norm, valid, weight):
        """1 for the samples that count; None for all."""
        if valid is None and weight is None:
            return None
        ones = torch.ones_like(norm)
        return apply_weight((apply_weight(ones, weight) > 0).to(norm.dtype), valid)

    def _total(self, norm, valid, weight):
        """How many count."""
        mask = self._mask(norm, valid, weight)
        return norm.numel() if mask is None else mask.sum()

    def weigh(self, loss, weight, valid):
        return loss  # the mask is in the harmonising weights already

    def normalizer(self, avg_factor, loss, valid, weight, reduction, seen=None):
        if reduction != "mean":
            return avg_factor
        return seen["total"] if seen else _at_least_one(self._total(loss, valid, weight))


@MODELS.register_module()
class GHMC(_Harmonised, ClassificationLoss):
    """Li et al., Gradient Harmonized Single-stage Detector, 2018 (GHM-C).

    As in mmdet, "mean" divides by the number of samples that count whatever ``avg_factor`` says, and a sample's weight
    is a mask. The moving average starts at zero without a correction: the first steps are inflated by
    ``1 / (1 - momentum)``.

    Args:
        bins: number of unit regions of the gradient norm.
        momentum: of the moving average of the counts, in [0, 1); 0 keeps no state.
    """

    fn = staticmethod(ghmc_loss)
    norm = staticmethod(ghmc_norm)
    inputs = ("weight",)
    by_rows = True
    paper = "https://arxiv.org/abs/1811.05181"
    needs_mining = False
    upstream = (Upstream("mmdet.models.losses.GHMC"), Upstream("mmdet.models.losses.GHMC", {"bins": 30}, {"bins": 30}))

    def __init__(self, *, momentum=0.0, **kwargs):
        super().__init__(**kwargs)
        self._init_state(momentum)


def ghmr_loss(pred, target, *, mu=0.02, bins=10, weight=None):
    """``sqrt(d^2 + mu^2) - mu`` with gradient harmonising weights, from this call's bins unless ``weight`` is given.

    >>> ghmr_loss(torch.tensor([0.01, -0.5, 0.005, 1.0]), torch.zeros(4)).mean()
    tensor(0.2444)
    """
    length = ((pred - target).square() + mu**2).sqrt()
    if weight is None:
        weight = _weight_in(ghmr_norm(pred, target, mu), bins)
    return weight * (length - mu)


def ghmr_norm(pred, target, mu):
    """The gradient norm of :func:`ghmr_loss`'s root, a constant."""
    distance = (pred - target).detach()
    return (distance / (distance.square() + mu**2).sqrt()).abs()


@MODELS.register_module()
class GHMR(_Harmonised, RegressionLoss):
    """Li et al., Gradient Harmonized Single-stage Detector, 2018 (GHM-R).

    As in mmdet, "mean" divides by the sum of the weights whatever ``avg_factor`` says; otherwise a weight is a mask.

    Args:
        mu: width of the smooth part, in the unit of the input.
        bins: number of unit regions of the gradient norm.
        momentum: of the moving average of the counts, in [0, 1); 0 keeps no state.
    """

    fn = staticmethod(ghmr_loss)
    inputs = ("weight",)
    by_rows = True
    keeps_little = False
    paper = "https://arxiv.org/abs/1811.05181"
    upstream = (Upstream("mmdet.models.losses.GHMR"),)

    def __init__(self, *, momentum=0.0, **kwargs):
        super().__init__(**kwargs)
        self._init_state(momentum)

    def norm(self, pred, target):
        return ghmr_norm(pred, target, self.mu)

    def _total(self, norm, valid, weight):
        return norm.numel() if weight is None else apply_weight(torch.ones_like(norm), weight).sum()


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
