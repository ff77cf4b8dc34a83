"""DR loss: the distributions of the hard positives and of the hard negatives, ranked."""

import math

import torch
from torch import Tensor

from detloss_plugins.facts import ARXIV, NonNegative, Number, Positive
from detloss_plugins.families import RankingLoss
from detloss_plugins.precision import float32
from detloss_plugins.registry import MODELS

__all__ = ["DR_LAMBDA", "DRLoss", "distributional_ranking", "dr_loss"]

DR_LAMBDA = 0.1 / math.log(3.5)  # the authors' temperature of the negatives


def distributional_ranking(
    positives: Tensor, negatives: Tensor, *, pos_lambda: float, neg_lambda: float, margin: float, L: float, tau: float
) -> Tensor:
    """The DR loss of two sets of probabilities: ``tau / L ln(1 + exp(L (d- - d+ + margin)))``.

    ``d-`` is the mean of the negatives under the weights ``softmax(p / neg_lambda)``, the hardest first, and ``d+``
    that of the positives under ``softmax(-p / pos_lambda)``. An empty set of positives has ``d+ = 1``, one of negatives
    ``d- = 0``.
    """
    high = ((negatives / neg_lambda).softmax(0) * negatives).sum()
    low = ((-positives / pos_lambda).softmax(0) * positives).sum() if len(positives) else 1.0
    return tau / L * torch.nn.functional.softplus(L * (high - low + margin))


def dr_loss(
    pred: Tensor,
    target: Tensor,
    *,
    pos_lambda: Positive = 1.0,
    neg_lambda: Positive = DR_LAMBDA,
    margin: Number = 0.5,
    L: Positive = 6.0,
    tau: NonNegative = 4.0,
) -> Tensor:
    """Distributional ranking: the hard negatives' mean probability must lie ``margin`` below the hard positives'.

    Of logits and targets of one shape, any (above 0 positive, 0 negative, below 0 ignored), the one loss of
    :func:`distributional_ranking`, once for each positive, ``(P,)``.

    >>> dr_loss(torch.tensor([0.0, 0.0]), torch.tensor([1, 0]))  # d+ = d- = 1/2: 4 / 6 ln(1 + e^3)
    tensor([2.0324])
    """
    pred = float32(pred)
    sets = [pred.masked_select(mask).sigmoid() for mask in (target > 0, target == 0)]
    if not len(sets[0]):
        return pred.flatten()[:0]
    loss = distributional_ranking(*sets, pos_lambda=pos_lambda, neg_lambda=neg_lambda, margin=margin, L=L, tau=tau)
    return loss.expand(len(sets[0]))


@MODELS.register_module()
class DRLoss(RankingLoss, fn=dr_loss, paper=ARXIV + "1907.10156", bounds=(0.0, 6.1)):
    """Qian et al., DR Loss: Improving Object Detection by Distributional Ranking, 2019.

    One value for all that ``pred`` holds, with the true derivative. Without positives it is zero, where the authors'
    code goes on pushing the negatives down. By default it is at most ``4 / 6 ln(1 + exp(6 * 1.5))``.

    Args:
        pos_lambda, neg_lambda: temperature of the distribution of the positives, the negatives; small for the hardest.
        margin: by how much the positives' mean must exceed the negatives'.
        L, tau: steepness of the logistic loss, and factor on it.
    """
