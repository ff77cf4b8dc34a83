"""Cross entropies between a score and the quality of the box it goes with, for heads that match boxes one to one.

Logits and targets have one shape, which is that of the losses.
"""

import torch
from torch import Tensor

from detloss_plugins.facts import ARXIV, MMDET, NonNegative, Share, Upstream
from detloss_plugins.families import of_one_type
from detloss_plugins.losses.classification.common import KeepsPositives, bce, power
from detloss_plugins.registry import MODELS

__all__ = ["IABCELoss", "MALoss", "iabce_loss", "ma_loss"]

_PLAIN = {"alpha": 1.0, "iou_weighted": False}  # of mmdet's varifocal loss


def ma_loss(pred: Tensor, target: Tensor, *, gamma: NonNegative = 1.5, detach_weight: bool = True) -> Tensor:
    """``BCE(x, q^gamma)`` where the quality ``q > 0``, ``p^gamma BCE(x, 0)`` where it is 0.

    The weight ``p^gamma`` is a constant, as in the authors' code, whose configs have ``gamma=1.5``, unless
    ``detach_weight`` is False.

    >>> ma_loss(torch.tensor([0.8, -0.4, 1.5]), torch.tensor([0.6, 0.0, 1.0]))
    tensor([0.7993, 0.1304, 0.2014])
    """
    pred, target = of_one_type(pred, target)
    quality = torch.where(target > 0, power(target, gamma), 0.0)
    return _negative_weight(pred, target, gamma, detach_weight) * bce(pred, quality)


def _negative_weight(pred, target, gamma, detach_weight):
    """``p^gamma`` where the target is 0, and 1 where it is above."""
    p = (pred.detach() if detach_weight else pred).sigmoid()
    return torch.where(target > 0, 1.0, power(p, gamma))


@MODELS.register_module()
class MALoss(
    KeepsPositives,
    fn=ma_loss,
    paper=ARXIV + "2412.04234",
    row_wise=True,
    needs_mining=False,
    marks_positives=True,
    true_gradient=False,
    upstream=(Upstream(MMDET + "VarifocalLoss", {"gamma": 1.0, "detach_weight": False}, {"gamma": 1.0, **_PLAIN}),),
):
    """Huang et al., DEIM, 2024 (MAL, the matchability-aware loss).

    For heads that match each object with one box. With a ``(label, quality)`` target, as the heads of DETR's kind hand
    it over, a positive of quality 0 stays a positive, with a target of 0; a dense target, as YOLO's, cannot tell it
    from a negative.
    """


def iabce_loss(
    pred: Tensor, target: Tensor, *, alpha: Share = 0.25, gamma: NonNegative = 2.0, detach_weight: bool = False
) -> Tensor:
    """``BCE(x, t)`` with ``t = max(p^alpha q^(1 - alpha), 0.01)`` where the quality ``q > 0``, else ``p^gamma BCE``.

    ``t`` is a constant; the weight ``p^gamma`` carries gradient as in the authors' code, unless ``detach_weight``.

    >>> iabce_loss(torch.tensor([0.8, -0.4, 1.5]), torch.tensor([0.6, 0.0, 1.0]))  # t = .6213 and .9509
    tensor([0.6740, 0.0826, 0.2751])
    """
    pred, target = of_one_type(pred, target)
    wanted = (power(pred.sigmoid(), alpha) * power(target, 1 - alpha)).clamp(min=0.01).detach()
    weight = _negative_weight(pred, target, gamma, detach_weight)
    return weight * bce(pred, torch.where(target > 0, wanted, 0.0))


@MODELS.register_module()
class IABCELoss(
    KeepsPositives,
    fn=iabce_loss,
    paper=ARXIV + "2304.07527",
    row_wise=True,
    needs_mining=False,
    marks_positives=True,
    true_gradient=False,
    upstream=(Upstream(MMDET + "VarifocalLoss", {"alpha": 0.0}, _PLAIN),),
):
    """Cai et al., Align-DETR, 2023 (IA-BCE, the IoU-aware BCE; the class loss of RF-DETR).

    A positive of quality 0 stays one as in MALoss. Align-DETR's many-to-one matching lowers ``t`` by the rank of a box
    among those of its object; heads that match one to one have no such rank, and it is left out.
    """
