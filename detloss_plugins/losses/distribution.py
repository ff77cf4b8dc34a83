"""Losses on a distribution over distance bins."""

import torch
from torch import Tensor

from detloss_plugins.facts import MMDET, alike
from detloss_plugins.families import DistributionLoss, of_one_type
from detloss_plugins.registry import MODELS

__all__ = ["DistributionFocalLoss", "distribution_focal_loss"]


def distribution_focal_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Cross entropy with the two bins around the target, weighted by their nearness.

    ``-[(l + 1 - y) log S_l + (y - l) log S_(l+1)]`` with ``l = floor(y)`` and ``S = softmax(pred)``. ``pred`` holds
    logits ``(..., bins)``, ``target`` distances ``(...)`` in units of a bin, and the losses have its shape. A target
    outside ``[0, bins - 1]`` counts as the nearest bin.

    >>> distribution_focal_loss(torch.tensor([[0.2, 0.5, 1.5, 0.3, -0.7]]), torch.tensor([2.3]))
    tensor([1.0790])
    """
    pred, target = of_one_type(pred, target)
    # A NaN target is the caller's and gives NaN; as an index it would stop the program or the device.
    left = target.detach().nan_to_num(0.0).floor().clamp(0, pred.shape[-1] - 2)
    of_right = (target - left).clamp(0, 1)
    bins = torch.stack([left, left + 1], -1).long()
    at_left, at_right = pred.log_softmax(-1).gather(-1, bins).unbind(-1)
    return -torch.lerp(at_left, at_right, of_right)


@MODELS.register_module()
class DistributionFocalLoss(
    DistributionLoss,
    fn=distribution_focal_loss,
    paper="https://arxiv.org/abs/2006.04388",
    row_wise=True,
    keeps_little=True,
    upstream=(*alike(MMDET + "DistributionFocalLoss"), *alike("ultralytics.utils.loss.DFLoss")),
):
    """Li et al., Generalized Focal Loss, 2020 (DFL).

    Its minimum is the entropy of the target, not zero.
    """
