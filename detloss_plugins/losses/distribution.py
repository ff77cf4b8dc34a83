"""Losses on a distribution over distance bins."""

import torch

from detloss_plugins.base import Upstream
from detloss_plugins.families import DistributionLoss
from detloss_plugins.registry import MODELS


def distribution_focal_loss(pred, target):
    """Cross entropy with the two bins around the target, weighted by their nearness.

    ``-[(l + 1 - y) log S_l + (y - l) log S_(l+1)]`` with ``l = floor(y)`` and ``S = softmax(pred)``. A target outside
    ``[0, bins - 1]`` counts as the nearest bin.

    >>> distribution_focal_loss(torch.tensor([[0.2, 0.5, 1.5, 0.3, -0.7]]), torch.tensor([2.3]))
    tensor([1.0790])
    """
    last = pred.shape[-1] - 1
    # A NaN target is the caller's and gives NaN; as an index it would stop the program or the device.
    left = target.detach().nan_to_num(0.0).floor().clamp(0, last - 1)
    of_right = (target - left).clamp(0, 1)
    left = left.long()
    at_left, at_right = pred.log_softmax(-1).gather(-1, torch.stack([left, left + 1], -1)).unbind(-1)
    return torch.lerp(at_left, at_right, of_right).neg()


@MODELS.register_module()
class DistributionFocalLoss(DistributionLoss):
    """Li et al., Generalized Focal Loss, 2020 (DFL).

    Its minimum is the entropy of the target, not zero.
    """

    fn = staticmethod(distribution_focal_loss)
    paper = "https://arxiv.org/abs/2006.04388"
    upstream = (
        Upstream("mmdet.models.losses.DistributionFocalLoss"),
        Upstream("ultralytics.utils.loss.DFLoss"),
    )


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
