"""A focal loss whose focusing power follows the batch."""

import math
from typing import Any

import torch
from torch import Tensor

from detloss_plugins import engine
from detloss_plugins.facts import ARXIV
from detloss_plugins.families import ClassificationLoss, of_one_type
from detloss_plugins.losses.classification.common import bce, power
from detloss_plugins.precision import float32
from detloss_plugins.reduction import counts
from detloss_plugins.registry import MODELS

__all__ = ["AdaptiveThresholdFocalLoss", "adaptive_threshold_focal_loss"]

# Smaller p_t count as this one in the exponent of the hard: their factor, up to 1.5^88, would overflow.
LEAST = math.exp(-20)


def adaptive_threshold_focal_loss(pred: Tensor, target: Tensor, *, mean: Tensor | None = None) -> Tensor:
    """BCE times ``(1.000001 - p_t)^gamma`` where ``p_t > 0.5``, else times ``(1.5 - p_t)^(-ln p_t)``.

    ``gamma = -ln(mean of p_t)``, of this call unless ``mean`` gives it, and ``p_t = y p + (1 - y) (1 - p)``; all have
    one shape. The factor of the hard grows no more below ``p_t = e^-20``.

    >>> adaptive_threshold_focal_loss(torch.tensor([0.8, -0.4, 1.5, -2.0]), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    tensor([0.1260, 0.2210, 2.7202, 4.2247])
    """
    pred, target = of_one_type(pred, target)
    p_t = _p_t(pred, target)
    mean = p_t.mean() if mean is None else mean
    easy = power(1.000001 - p_t, -mean.clamp(min=torch.finfo(pred.dtype).tiny).log())
    hard = (1.5 - p_t).pow(-p_t.clamp(min=LEAST).log())
    return torch.where(p_t > 0.5, easy, hard) * bce(pred, target)


def _p_t(pred, target):
    # What is negative is ignored, but its power would be NaN.
    return torch.lerp((-pred).sigmoid(), pred.sigmoid(), target.clamp(min=0))


@MODELS.register_module()
class AdaptiveThresholdFocalLoss(
    ClassificationLoss, fn=adaptive_threshold_focal_loss, paper=ARXIV + "2307.14723", row_wise=True, filled=("mean",)
):
    """Yang et al., EFLNet, 2024 (ATFL).

    The mean is that of what counts in the call: rows that are ignored or have a weight of 0 do not.

    Args:
        detach_gamma: treat the focusing power as a constant; in the authors' code its gradient couples all elements.
    """

    observes = True

    def __init__(self, *, detach_gamma: bool = False, **settings):
        super().__init__(**settings)
        self.detach_gamma = detach_gamma
        self.facts = self.facts.but(true_gradient=not detach_gamma)
        self.couples = not detach_gamma

    def sums(self, pred, target, weight):
        seen = pred.detach() if self.detach_gamma else pred
        total = engine.weighted_sum(self._call(self.counted, seen, target, weight, {}))
        return {**super().sums(pred, target, weight), "total": total}

    def counted(self, pred: Tensor, target: Any, weight: Tensor | None, _: Any) -> Tensor:
        """The ``p_t`` of what counts in the mean."""
        pred, target, valid = self.prepare(float32(pred), target)
        return torch.where(counts(pred, valid, weight) > 0, _p_t(pred, target), 0.0)

    def statistics(self, pred, target, valid, weight):
        return {"count": counts(pred, valid, weight).sum()}

    def summarise(self, sums):
        return {"mean": torch.where(sums["count"] > 0, sums["total"] / sums["count"].clamp(min=1), 1.0)}
