"""Losses between masks, one a mask.

Every function takes probabilities ``p`` and targets ``t`` in [0, 1], both ``(N, ...)``, and returns losses ``(N,)``.
With sums over the pixels of one mask, ``TP = sum p t``, ``FP = sum p (1 - t)`` and ``FN = sum (1 - p) t``. Every loss
is the share ``wrong / (wrong + right)``: the papers' ``1 - right / all`` without its cancellation near a perfect mask.
"""

import torch
from torch import Tensor

from detloss_plugins.facts import ARXIV, MMDET, NonNegative, Positive, Upstream, alike
from detloss_plugins.families import RegionLoss, of_one_type
from detloss_plugins.geometry import power, ratio
from detloss_plugins.losses.regression import mse_loss
from detloss_plugins.registry import MODELS

__all__ = ["DiceLoss", "JaccardLoss", "TverskyLoss", "dice_loss", "jaccard_loss", "tversky_loss"]


def _overlap(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """TP, FP and FN, each ``(N,)``."""
    p, t = of_one_type(pred.flatten(1), target.flatten(1))
    both = p * t
    return both.sum(1), (p - both).sum(1), (t - both).sum(1)


def _share(wrong: Tensor, right: Tensor) -> Tensor:
    """``wrong / (wrong + right)``; zero, without a gradient, where an empty mask is predicted to be empty."""
    # The inverse of a number below the smallest normal one is infinite.
    return ratio(wrong, wrong + right, torch.finfo(right.dtype).tiny)


def dice_loss(pred: Tensor, target: Tensor, *, naive_dice: bool = False, eps: NonNegative = 1e-3) -> Tensor:
    """``1 - 2 TP / (sum p^2 + sum t^2 + 2 eps)`` (V-Net), or ``1 - (2 TP + eps) / (sum p + sum t + eps)`` ("naive").

    The two are equal for masks of zeros and ones. An empty mask that is predicted to be empty costs 1 in the first form
    and 0 in the second, as in mmdet. ``eps`` is in pixels.

    >>> pred, target = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    >>> dice_loss(pred, target, eps=0.0), dice_loss(pred, target, naive_dice=True, eps=0.0)  # 1 - 1 / 1.5, 1 - 1 / 2
    (tensor([0.3333]), tensor([0.5000]))
    """
    if naive_dice:
        tp, fp, fn = _overlap(pred, target)
        return _share(fp + fn, 2 * tp + eps)
    p, t = of_one_type(pred.flatten(1), target.flatten(1))
    return _share(mse_loss(p, t).sum(1) + 2 * eps, 2 * (p * t).sum(1))


@MODELS.register_module()
class DiceLoss(
    RegionLoss,
    fn=dice_loss,
    paper=ARXIV + "1606.04797",
    row_wise=True,
    upstream=(
        *alike(MMDET + "DiceLoss", {}, {"eps": 5e-6}, {"naive_dice": True}, {"naive_dice": True, "eps": 1.0}),
        Upstream("ultralytics.utils.loss.MultiChannelDiceLoss", {"naive_dice": True, "eps": 1e-6}),
        Upstream("ultralytics.utils.loss.MultiChannelDiceLoss", {"naive_dice": True, "eps": 1.0}, {"smooth": 1.0}),
    ),
):
    """Milletari et al., V-Net, 2016.

    Args:
        naive_dice: first powers in the denominator instead of squares; MaskFormer and Mask2Former use it.
        eps: in pixels; in the V-Net form it keeps small masks from ever costing nothing.
    """


def jaccard_loss(pred: Tensor, target: Tensor, *, smooth: NonNegative = 0.0) -> Tensor:
    """Soft IoU: ``1 - (TP + smooth) / (TP + FP + FN + smooth)``.

    An empty mask costs 1 unless nothing is predicted, which costs 0. ``smooth`` (in pixels) makes this step a slope.

    >>> jaccard_loss(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))  # 1 - .5 / (.5 + .5 + .5)
    tensor([0.6667])
    """
    tp, fp, fn = _overlap(pred, target)
    return _share(fp + fn, tp + smooth)


@MODELS.register_module()
class JaccardLoss(RegionLoss, fn=jaccard_loss, paper="https://doi.org/10.1007/978-3-319-50835-1_22", row_wise=True):
    """Rahman and Wang, Optimizing Intersection-Over-Union in Deep Neural Networks for Image Segmentation, 2016."""


def tversky_loss(
    pred: Tensor, target: Tensor, *, alpha: NonNegative = 0.3, beta: NonNegative = 0.7, gamma: Positive = 1.0
) -> Tensor:
    """``L = 1 - TP / (TP + alpha FP + beta FN)``, and with ``gamma`` the focal form ``L^(1 / gamma)``.

    ``alpha = beta = 0.5`` is the naive Dice loss, 1 and 1 the Jaccard loss. ``gamma > 1`` (its paper: 4 / 3) raises
    the losses of masks that are nearly right. An empty mask costs 1 unless nothing is predicted, which costs 0.

    >>> tversky_loss(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))  # 1 - .5 / (.5 + .15 + .35)
    tensor([0.5000])
    """
    tp, fp, fn = _overlap(pred, target)
    return power(_share(alpha * fp + beta * fn, tp), 1 / gamma, torch.finfo(tp.dtype).tiny)


@MODELS.register_module()
class TverskyLoss(RegionLoss, fn=tversky_loss, paper=ARXIV + "1706.05721", row_wise=True):
    """Salehi et al., Tversky loss function for image segmentation, 2017; Abraham and Khan, 2018, for the focal form.

    Args:
        alpha, beta: weights of false positives and of false negatives (some libraries swap them); a larger ``beta``
            favours recall.
    """
