"""Losses between masks, one a mask.

With probabilities ``p`` and targets ``t``, both in [0, 1], and sums over the pixels of one mask: ``TP = sum p t``,
``FP = sum p (1 - t)``, ``FN = sum (1 - p) t``. Every loss is the share ``wrong / (wrong + right)``, which is
the ``1 - right / all`` of the papers without its cancellation near a perfect mask.
"""

import torch

from detloss_plugins.base import Upstream, above, at_least, rules
from detloss_plugins.execution import Analytic, analytic
from detloss_plugins.families import RegionLoss
from detloss_plugins.geometry import power, ratio
from detloss_plugins.registry import MODELS


def _overlap(pred, target, of_fp=1.0, of_fn=1.0):
    """TP, and FP and FN times their weights, summed: each ``(N,)``."""
    return analytic(_Overlap, pred.flatten(1), target.flatten(1), of_fp, of_fn)


class _Overlap(Analytic):
    """See :func:`_overlap`."""

    @staticmethod
    def plain(pred, target, of_fp, of_fn):
        return (pred * target).sum(1), torch.lerp(of_fp * pred, of_fn * (1 - pred), target).sum(1)

    @staticmethod
    def value(ctx, pred, target, of_fp, of_fn):
        ctx.call = target, of_fp, of_fn
        pixels = pred * target
        tp = pixels.sum(1)
        torch.sub(of_fn, pred, alpha=of_fn, out=pixels)  # memory that is warm
        torch.lerp(pred if of_fp == 1 else of_fp * pred, pixels, target, out=pixels)
        return tp, pixels.sum(1)

    @staticmethod
    def gradients(ctx, of_tp, of_wrong):
        target, of_fp, of_fn = ctx.call
        of_target = -(of_fp + of_fn) * of_wrong if of_tp is None else of_tp - (of_fp + of_fn) * of_wrong
        return [torch.addcmul((of_fp * of_wrong).unsqueeze(1), target, of_target.unsqueeze(1))]


class _Squares(Analytic):
    """TP, and the sum of the squared differences: each ``(N,)``."""

    @staticmethod
    def plain(pred, target):
        return (pred * target).sum(1), (pred - target).square().sum(1)

    @staticmethod
    def value(ctx, pred, target):
        ctx.call = pred, target
        return (pred * target).sum(1), (pred - target).square_().sum(1)

    @staticmethod
    def gradients(ctx, of_tp, of_squares):
        pred, target = ctx.call
        of_squares = 2 * of_squares.unsqueeze(1)
        return [(pred * of_squares).addcmul_(target, of_tp.unsqueeze(1) - of_squares)]


def _share(wrong, right):
    """``wrong / (wrong + right)``; zero, without a gradient, where an empty mask is predicted to be empty."""
    # A sum of pixels has no scale but one; below the smallest normal number its inverse is infinite.
    return ratio(wrong, wrong + right, torch.ones_like(right), torch.finfo(right.dtype).tiny)


def dice_loss(pred, target, *, naive_dice=False, eps=1e-3):
    """``1 - 2 TP / (sum p^2 + sum t^2 + 2 eps)`` (V-Net), or ``1 - (2 TP + eps) / (sum p + sum t + eps)`` ("naive").

    The two are equal for masks of zeros and ones. An empty mask that is predicted to be empty costs 1 in the first form
    and 0 in the second, as in mmdet.

    Args:
        pred: probabilities ``(N, ...)`` in [0, 1].
        target: masks ``(N, ...)`` in [0, 1].

    Returns:
        One loss a mask, ``(N,)``.

    >>> pred, target = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    >>> dice_loss(pred, target, eps=0.0), dice_loss(pred, target, naive_dice=True, eps=0.0)  # 1 - 1 / 1.5, 1 - 1 / 2
    (tensor([0.3333]), tensor([0.5000]))
    """
    if naive_dice:
        tp, wrong = _overlap(pred, target)
        return _share(wrong, 2 * tp + eps)
    tp, squares = analytic(_Squares, pred.flatten(1), target.flatten(1))  # sum p^2 + sum t^2 - 2 TP
    return _share(squares + 2 * eps, 2 * tp)


@MODELS.register_module()
class DiceLoss(RegionLoss):
    """Milletari et al., V-Net, 2016.

    Args:
        naive_dice: first powers in the denominator instead of squares; MaskFormer and Mask2Former use it.
        eps: in pixels; in the V-Net form it keeps small masks from ever costing nothing.

    Raises:
        ValueError: if ``eps`` is negative.
    """

    fn = staticmethod(dice_loss)
    paper = "https://arxiv.org/abs/1606.04797"
    upstream = (
        Upstream("mmdet.models.losses.DiceLoss"),
        Upstream("mmdet.models.losses.DiceLoss", {"eps": 5e-6}, {"eps": 5e-6}),
        Upstream("mmdet.models.losses.DiceLoss", {"naive_dice": True}, {"naive_dice": True}),
        Upstream("mmdet.models.losses.DiceLoss", {"naive_dice": True, "eps": 1.0}, {"naive_dice": True, "eps": 1.0}),
        Upstream("ultralytics.utils.loss.MultiChannelDiceLoss", {"naive_dice": True, "eps": 1e-6}),
        Upstream("ultralytics.utils.loss.MultiChannelDiceLoss", {"naive_dice": True, "eps": 1.0}, {"smooth": 1.0}),
    )
    allowed = rules(eps=at_least(0))


def jaccard_loss(pred, target, *, smooth=0.0):
    """Soft IoU: ``1 - (TP + smooth) / (TP + FP + FN + smooth)``.

    An empty mask costs 1 whatever is predicted, unless nothing is: that costs 0. ``smooth`` (in pixels) makes this
    step a slope.

    Args:
        pred: probabilities ``(N, ...)`` in [0, 1].
        target: masks ``(N, ...)`` in [0, 1].

    Returns:
        One loss a mask, ``(N,)``.

    >>> jaccard_loss(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))  # 1 - .5 / (.5 + .5 + .5)
    tensor([0.6667])
    """
    tp, wrong = _overlap(pred, target)
    return _share(wrong, tp + smooth)


@MODELS.register_module()
class JaccardLoss(RegionLoss):
    """Rahman and Wang, Optimizing Intersection-Over-Union in Deep Neural Networks for Image Segmentation, 2016.

    Raises:
        ValueError: if ``smooth`` is negative.
    """

    fn = staticmethod(jaccard_loss)
    paper = "https://doi.org/10.1007/978-3-319-50835-1_22"
    allowed = rules(smooth=at_least(0))


def tversky_loss(pred, target, *, alpha=0.3, beta=0.7, gamma=1.0):
    """``L = 1 - TP / (TP + alpha FP + beta FN)``, and with ``gamma`` the focal form ``L^(1 / gamma)``.

    ``alpha = beta = 0.5`` is the naive Dice loss, 1 and 1 the Jaccard loss. ``gamma > 1`` (its paper: 4 / 3) raises
    the losses of masks that are nearly right. An empty mask costs 1 unless nothing is predicted, which costs 0.

    Args:
        pred: probabilities ``(N, ...)`` in [0, 1].
        target: masks ``(N, ...)`` in [0, 1].

    Returns:
        One loss a mask, ``(N,)``.

    >>> tversky_loss(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))  # 1 - .5 / (.5 + .15 + .35)
    tensor([0.5000])
    """
    tp, wrong = _overlap(pred, target, alpha, beta)
    return power(_share(wrong, tp), 1 / gamma, torch.finfo(tp.dtype).tiny)


@MODELS.register_module()
class TverskyLoss(RegionLoss):
    """Salehi et al., Tversky loss function for image segmentation, 2017; Abraham and Khan, 2018, for the focal form.

    Args:
        alpha: weight of false positives. Some libraries swap it with ``beta``.
        beta: weight of false negatives; above ``alpha`` it favours recall.
        gamma: 1 is the plain form.

    Raises:
        ValueError: if ``alpha`` or ``beta`` is negative, or ``gamma`` is not positive.
    """

    fn = staticmethod(tversky_loss)
    paper = "https://arxiv.org/abs/1706.05721"
    allowed = rules(alpha=at_least(0), beta=at_least(0), gamma=above(0))


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
