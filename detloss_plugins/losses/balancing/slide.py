"""Slide loss: positives about the mean IoU weigh more."""

from collections.abc import Mapping

import torch
from torch import Tensor

from detloss_plugins.facts import ARXIV, Positive, Share
from detloss_plugins.families import of_one_type
from detloss_plugins.loss import rank_mean
from detloss_plugins.losses.classification.common import OverBase, bce
from detloss_plugins.losses.classification.focal import GeneralizedFocalLoss
from detloss_plugins.precision import float32
from detloss_plugins.reduction import counts
from detloss_plugins.registry import MODELS, build_part

__all__ = ["SlideLoss", "slide_loss", "slide_weight"]


def slide_weight(iou: Tensor, mean_iou: Tensor, authors_code: bool = False) -> Tensor:
    """1 for an IoU up to ``mean - 0.1``, ``e^(1 - mean)`` up to the mean, ``e^(1 - IoU)`` above it.

    ``authors_code=True`` has ``e^mean`` in the middle, as the released code and not the paper.

    >>> slide_weight(torch.tensor([0.1, 0.55, 0.9]), torch.tensor(0.6))
    tensor([1.0000, 1.4918, 1.1052])
    """
    middle = mean_iou.exp() if authors_code else (1 - mean_iou).exp()
    weight = torch.where(iou < mean_iou, middle, (1 - iou).exp())
    return torch.where(iou <= mean_iou - 0.1, 1.0, weight)


def slide_loss(
    pred: Tensor,
    target: Tensor,
    *,
    authors_code: bool = False,
    mean_iou: Tensor | None = None,
    elements: Tensor | None = None,
) -> Tensor:
    """:func:`slide_weight` of the target times per-element losses, which are BCE if ``elements`` gives no others.

    Logits and targets, which are IoUs, are ``(..., C)``. The mean is that of the call's positives unless it is given.

    >>> slide_loss(torch.tensor([[0.8], [-0.4], [1.5]]), torch.tensor([[0.1], [0.55], [0.9]])).squeeze(-1)
    tensor([1.0911, 1.1496, 0.3884])
    """
    pred, target = of_one_type(pred, target)
    mean_iou = _mean(*_positives(target)) if mean_iou is None else mean_iou.to(pred.dtype)
    elements = bce(pred, target) if elements is None else elements
    return slide_weight(target, mean_iou, authors_code) * elements


def _positives(target):
    """The sum of the IoU of the rows that have one, and their number. NaN rows do not count."""
    iou = target.amax(-1) if target.shape[-1] else target.sum(-1)
    return torch.where(iou > 0, iou, 0.0).sum(), (iou > 0).sum()


def _mean(total, count, otherwise=0.5):
    """The mean IoU, at least 0.2; ``otherwise`` if there are no positives."""
    return torch.where(count > 0, (total / count.clamp(min=1)).clamp(min=0.2), otherwise)


@MODELS.register_module()
class SlideLoss(
    OverBase,
    fn=slide_loss,
    paper=ARXIV + "2208.02019",
    row_wise=True,
    takes_quality=True,
    filled=("mean_iou", "elements"),
):
    """Yu et al., YOLO-FaceV2, 2022.

    Hard samples, whose IoU is about the mean, weigh more. The target is the IoU on the label's channel: dense, or
    mmdet's ``(label, quality)``. The mean is that of the batch in training, and the last one seen in validation.

    Args:
        base: config of a sigmoid classification loss of IoUs (of a JointLoss, parts that are alike) whose terms are
            weighted, else a ``ValueError``; binary cross entropy if it is not given.
        decay: None, or the decay of a moving mean in place of the batch's, in [0, 1]; 0.999 in the code known as
            EMASlide, which has no paper. The mean starts at 1, and the decay at 0: at the n-th batch with positives it
            is ``decay (1 - e^(-n / tau))``.
        tau: in how many batches the decay grows.
    """

    def __init__(self, *, base: Mapping | None = None, decay: Share | None = None, tau: Positive = 2000.0, **settings):
        super().__init__(**settings)
        self.decay, self.tau = decay, tau
        part = build_part({"type": "BinaryCrossEntropyLoss"} if base is None else base)
        if part.family != "classification" or not part.use_sigmoid:
            raise ValueError(f"base of SlideLoss must be a sigmoid classification loss, not {part}.")
        generalized = [inner for inner in part.modules() if isinstance(inner, GeneralizedFocalLoss)]
        if any(inner.values != (0.0, 1.0) for inner in generalized):
            raise ValueError("base of SlideLoss must be a loss of IoUs: leave values out of GeneralizedFocalLoss.")
        self.take(part)
        self.register_buffer("mean_iou", torch.tensor(0.5 if decay is None else 1.0))
        self.register_buffer("updates", None if decay is None else torch.tensor(0.0))

    @property
    def observes(self):
        return self.learning

    def statistics(self, pred, target, valid, weight):
        total, count = _positives(target * counts(target, weight))
        return {"total": total, "count": count}

    def summarise(self, sums):
        if sums:
            mean = _mean(sums["total"], sums["count"], self.mean_iou) if self.decay is None else self.moved(**sums)
            self.mean_iou.copy_(rank_mean(mean, self.facts.every_rank))
        return {"mean_iou": self.mean_iou.clamp(min=0.2)}

    def moved(self, total: Tensor, count: Tensor) -> Tensor:
        """The moving mean after another batch, whose positives count as one update."""
        updates = self.updates + (count > 0)
        decay = -self.decay * torch.expm1(-updates / self.tau)  # type: ignore[operator]  # it is not None here
        self.updates.copy_(rank_mean(updates, self.facts.every_rank))
        moved = decay * self.mean_iou + (1 - decay) * total / count.clamp(min=1)
        return torch.where(count > 0, moved, self.mean_iou)

    def unweighted(self, pred, target, seen):
        elements, valid = self.of_base(pred, target, seen)  # the target in its form, which may say more
        given = {"mean_iou": seen["mean_iou"], "elements": elements}
        pred, iou, _ = self.prepare(float32(pred), target)
        return self.elements(pred, iou, given), valid
