"""Focal losses whose focusing power grows for classes that get little positive gradient."""

import torch
from torch import Tensor

from detloss_plugins.facts import ARXIV, MMDET, NonNegative, NotWeighed, Positive, Share, Upstream
from detloss_plugins.families import of_one_type
from detloss_plugins.losses.balancing.long_tail import GradientRatio
from detloss_plugins.losses.classification.common import KeepsPositives, bce, power
from detloss_plugins.losses.classification.focal import balance, focal_loss, miss, quality_focal_loss
from detloss_plugins.reduction import apply_weight
from detloss_plugins.registry import MODELS

__all__ = [
    "EqualizedFocalLoss", "EqualizedQualityFocalLoss", "equalized_focal_loss", "equalized_quality_focal_loss",
]  # fmt: skip


def _focus(pred, gamma, scale, ratio):
    """The focusing power of each class, ``(C,)``, or ``gamma`` without a ratio."""
    return gamma if ratio is None else gamma + scale * (1 - ratio[: pred.shape[-1]].to(pred.dtype))


def equalized_focal_loss(
    pred: Tensor,
    target: Tensor,
    *,
    gamma: Positive = 2.0,
    alpha: Share | NotWeighed = 0.25,
    scale: NonNegative = 8.0,
    ratio: Tensor | None = None,
) -> Tensor:
    """``(gamma_j / gamma)`` times the focal loss of power ``gamma_j = gamma + scale (1 - ratio_j)`` of each class j.

    Logits, dense targets and losses are ``(..., C)``. ``ratio`` is the accumulated positive over negative gradient of
    each class, in [0, 1], ``(C,)``; None for ones, with which this is the focal loss.

    >>> pred, target = torch.tensor([[0.8, -0.4]]), torch.tensor([[1.0, 0.0]])
    >>> equalized_focal_loss(pred, target, ratio=torch.tensor([0.5, 1.0]))  # 3 * 1/4 * .3100^6 * .3711, and focal loss
    tensor([[0.0002, 0.0620]])
    """
    pred, target = of_one_type(pred, target)
    focus = _focus(pred, gamma, scale, ratio)
    return focus / gamma * focal_loss(pred, target, gamma=focus, alpha=alpha)


def equalized_quality_focal_loss(
    pred: Tensor, target: Tensor, *, gamma: Positive = 2.0, scale: NonNegative = 8.0, ratio: Tensor | None = None
) -> Tensor:
    """``(gamma_j / gamma)`` times the quality focal loss of power ``gamma_j``; see :func:`equalized_focal_loss`.

    >>> pred, target = torch.tensor([[0.8, -0.4]]), torch.tensor([[0.6, 0.0]])
    >>> equalized_quality_focal_loss(pred, target, ratio=torch.tensor([0.75, 1.0]))  # 2 * .08997^4 * .6911, and QFL
    tensor([[9.0583e-05, 8.2622e-02]])
    """
    pred, target = of_one_type(pred, target)
    focus = _focus(pred, gamma, scale, ratio)
    return focus / gamma * quality_focal_loss(pred, target, beta=focus)


_EXAMPLE = {"num_classes": 10}
_FOCAL = {"scale": 0.0, **_EXAMPLE}  # with which the powers do not move


class _Equalized(GradientRatio, paper=ARXIV + "2201.02593", needs_mining=False, example=_EXAMPLE):
    """What both take from their state: its ratio is at most 1."""

    start = largest = 1.0

    def prepare(self, pred, target):
        if pred.shape[-1] > self.num_classes:
            of = f"{type(self).__name__} with num_classes={self.num_classes}"
            raise ValueError(f"{of} takes no more logits than that, not {pred.shape[-1]}.")
        return super().prepare(pred, target)

    def statistics(self, pred, target, valid, weight):
        focus, p = _focus(pred, self.gamma, self.scale, self.pos_neg), pred.sigmoid()
        gap, sign = self.gap(pred, target)  # and its derivative for p
        slope = sign * p * (-pred).sigmoid()
        # The derivative of gap^focus BCE, as the head gets it.
        size = focus * power(gap, focus - 1) * slope * bce(pred, target) + power(gap, focus) * (p - target)
        size = (focus / self.gamma * balance(getattr(self, "alpha", None), target) * size).abs()
        size = apply_weight(apply_weight(size, weight), valid)
        positive = target > self.label_smoothing / 2  # what a target of 0 is after smoothing
        parts = {"positive": torch.where(positive, size, 0.0), "negative": torch.where(positive, 0.0, size)}
        return {name: part.flatten(0, -2).nansum(0) for name, part in parts.items()}


@MODELS.register_module()
class EqualizedFocalLoss(
    _Equalized,
    fn=equalized_focal_loss,
    row_wise=True,
    upstream=(
        Upstream(MMDET + "FocalLoss", _FOCAL, {"use_sigmoid": True}),
        Upstream("torchvision.ops.sigmoid_focal_loss", _FOCAL),
    ),
):
    """Li et al., Equalized Focal Loss for Dense Long-Tailed Object Detection, 2022 (EFL).

    The ratio of each class starts at 1 and follows the sizes of this loss's own gradients, weights included, which are
    worked out in the forward pass: a head that calls it level by level moves it at each level.
    """

    def gap(self, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return miss(pred, target), 1 - 2 * target


@MODELS.register_module()
class EqualizedQualityFocalLoss(
    _Equalized,
    KeepsPositives,
    fn=equalized_quality_focal_loss,
    row_wise=True,
    takes_quality=True,
    sums_classes=True,
    upstream=(Upstream(MMDET + "QualityFocalLoss", _FOCAL),),
):
    """Li et al., Equalized Focal Loss, 2022, on the quality focal loss (EQFL).

    The class sums over the classes, as QualityFocalLoss does. A positive of quality 0 counts as a positive in the
    ratio if the target is ``(label, quality)``; a dense target cannot tell it from a negative.
    """

    def gap(self, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        excess = pred.sigmoid() - target
        return excess.abs(), excess.sign()
