"""Slide loss: positives about the mean IoU weigh more."""

import torch

from detloss_plugins.base import rank_mean
from detloss_plugins.execution import float32, parts
from detloss_plugins.families import ClassificationLoss
from detloss_plugins.losses.classification.common import bce
from detloss_plugins.registry import MODELS, build_loss


def slide_weight(iou, mean_iou, authors_code=False):
    """1 for an IoU up to ``mean - 0.1``, ``e^(1 - mean)`` up to the mean, ``e^(1 - IoU)`` above it.

    ``authors_code=True`` has ``e^mean`` in the middle, as the released code and not the paper.

    >>> slide_weight(torch.tensor([0.1, 0.55, 0.9]), torch.tensor(0.6))
    tensor([1.0000, 1.4918, 1.1052])
    """
    middle = mean_iou.exp() if authors_code else (1 - mean_iou).exp()
    weight = torch.where(iou < mean_iou, middle, (1 - iou).exp())
    return torch.where(iou <= mean_iou - 0.1, 1.0, weight)


def slide_loss(pred, target, *, authors_code=False, mean_iou=None, base=None):
    """:func:`slide_weight` of the target times a base loss (a module; None for BCE), per element.

    The mean is that of the call's positives unless it is given.

    >>> slide_loss(torch.tensor([[0.8], [-0.4], [1.5]]), torch.tensor([[0.1], [0.55], [0.9]])).squeeze(-1)
    tensor([1.0911, 1.1496, 0.3884])
    """
    mean_iou = mean_of_positives(*positives(target)) if mean_iou is None else mean_iou
    if base is None:
        elements = bce(pred, target)
    else:
        elements = base.loss_weight * base.elements(pred, target)[0]
    return slide_weight(target, mean_iou, authors_code) * elements


def positives(target):
    """The sum of the IoU of the rows that have one, and their number. NaN rows do not count."""
    iou = target.amax(-1) if target.shape[-1] else target.sum(-1)
    positive = iou > 0
    return torch.where(positive, iou, 0.0).sum(), positive.sum()


def mean_of_positives(total, count, otherwise=0.5):
    """Their mean IoU, at least 0.2; ``otherwise`` if there are none."""
    return torch.where(count > 0, (total / count.clamp(min=1)).clamp(min=0.2), otherwise)


@MODELS.register_module()
class SlideLoss(ClassificationLoss):
    """Yu et al., YOLO-FaceV2, 2022.

    Hard samples, whose IoU is about the mean, weigh more. The target is the IoU on the label's channel: dense, or
    mmdet's ``(label, quality)``. The mean is that of the batch in training, and the last one seen in validation.

    Args:
        base: config of a classification loss whose terms are weighted.
        authors_code: see :func:`slide_weight`.
    """

    fn = staticmethod(slide_loss)
    inputs = ("mean_iou", "base")
    paper = "https://arxiv.org/abs/2208.02019"

    def __init__(self, *, base=None, **kwargs):
        super().__init__(**kwargs)
        base = {"type": "BinaryCrossEntropyLoss"} if base is None else base
        self.base = build_loss(base)
        if self.base.family != "classification" or not self.base.use_sigmoid:
            raise ValueError(f"base of SlideLoss must be a sigmoid classification loss, not {base['type']}.")
        self.sums_classes, self.needs_mining = self.base.sums_classes, self.base.needs_mining
        self.by_rows = self.base.by_rows and not self.base.surveys
        self.register_buffer("mean_iou", torch.tensor(0.5))

    def survey(self, pred, target, weight):
        if self.learning:
            total = count = 0
            for _, x, t, _ in parts(self, pred.detach(), target, None):
                of_part = positives(self.prepare(float32(x), t)[1])
                total, count = total + of_part[0], count + of_part[1]
            self.mean_iou.copy_(rank_mean(mean_of_positives(total, count, self.mean_iou)))
        return {"mean_iou": self.mean_iou.to(float32(pred).dtype)}

    def compute(self, pred, target, valid, weight, *, mean_iou):
        return self.fn(pred, target, mean_iou=mean_iou, base=self.base, **self.settings)


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
