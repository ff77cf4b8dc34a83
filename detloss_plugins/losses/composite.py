"""Losses made of other losses."""

from types import MappingProxyType

import torch

from detloss_plugins.base import Loss, check_use_sigmoid
from detloss_plugins.execution import float32
from detloss_plugins.families import ClassificationLoss
from detloss_plugins.losses.classification import confidence_weight
from detloss_plugins.reduction import apply_weight
from detloss_plugins.registry import MODELS, build_loss


def joint_loss(pred, target, *, losses):
    """The sum of several losses (modules) of the same input, per element.

    >>> from detloss_plugins.losses import L1Loss, SmoothL1Loss
    >>> joint_loss(torch.tensor([3.0]), torch.tensor([0.0]), losses=[L1Loss(), SmoothL1Loss(loss_weight=2.0)])
    tensor([8.])
    """
    return sum(loss.loss_weight * loss.elements(pred, target)[0] for loss in losses)


@MODELS.register_module()
class JointLoss(Loss):
    """Weighted sum of losses on the same input, each with its own ``loss_weight`` and reduction.

    Args:
        losses: config dicts of losses of one family.
        use_sigmoid: may be given because mmdet's heads read it from the config; it must fit the parts.

    Raises:
        ValueError: if there is none, or they are of different families.
    """

    fn = staticmethod(joint_loss)
    inputs = ("losses",)
    family, needs_mining = "classification", True  # of the example; an instance has those of its parts
    example = MappingProxyType(
        {"losses": ({"type": "BinaryCrossEntropyLoss"}, {"type": "FocalLoss", "loss_weight": 2.0})}
    )

    def __init__(self, *, losses=(), use_sigmoid=None, **kwargs):
        super().__init__(**kwargs)
        self.losses = torch.nn.ModuleList(build_loss(cfg) for cfg in losses)
        families = {loss.family for loss in self.losses}
        if len(families) != 1:
            raise ValueError("losses of JointLoss must be one or more config dicts of losses of one family.")
        (self.family,) = families
        self.every_rank, self.yolo_prior = self.losses[0].every_rank, self.losses[0].yolo_prior
        self.use_sigmoid = all(getattr(loss, "use_sigmoid", True) for loss in self.losses)
        self.needs_mining = any(getattr(loss, "needs_mining", True) for loss in self.losses)
        self.by_rows = all(loss.by_rows and not (loss.surveys or loss.self_normalized) for loss in self.losses)
        self.keeps_little = all(loss.keeps_little for loss in self.losses)
        self.by_columns = self.losses[0].by_columns
        check_use_sigmoid(self, use_sigmoid)

    def leading(self, pred):
        return self.losses[0].leading(pred)

    def elements(self, pred, target, weight=None, seen=None):
        return self.fn(pred, target, losses=self.losses), None

    def total(self, pred, target, weight, avg_factor, reduction, seen=None):
        """The sum of the parts, each called with the same arguments."""
        pred = float32(pred)  # once, so that half-precision gradients are not added up in half precision
        given = {"weight": weight, "avg_factor": avg_factor, "reduction_override": reduction}
        return self.loss_weight * sum(loss(pred, target, **given) for loss in self.losses)

    sample = ClassificationLoss.sample


def confidence_weighted_loss(pred, target, *, power=2.0, base):
    """``(1 - Q_fg)^power Q_bg``, a constant of the row, times a base loss (a module), per element.

    Q_fg and Q_bg are the confidences that the row is an object or background. Sigmoid base: the largest class
    probability and one minus it. Softmax base: the largest of the classes, and the background, which is last.

    >>> from detloss_plugins.losses import BinaryCrossEntropyLoss
    >>> logit = torch.tensor([[0.5]]).logit()  # (1 - 1/2)^2 * 1/2 * ln 2
    >>> confidence_weighted_loss(logit, torch.ones(1, 1), base=BinaryCrossEntropyLoss())
    tensor([[0.0866]])
    """
    scores = pred.detach().sigmoid() if base.use_sigmoid else pred.detach().softmax(-1)
    foreground = scores if base.use_sigmoid else scores[..., :-1]
    q_fg = foreground.amax(-1) if foreground.shape[-1] else scores.new_zeros(scores.shape[:-1])
    weight = confidence_weight(q_fg, 1 - q_fg if base.use_sigmoid else scores[..., -1], power)
    elements, _ = base.elements(pred, target)
    return apply_weight(base.loss_weight * elements, weight)


@MODELS.register_module()
class ConfidenceWeightedLoss(ClassificationLoss):
    """A classification loss weighted by how sure the model is that a sample is background.

    The weight of the third source document; no paper is known. It is not focal loss: it favours whatever is confidently
    background, positives that the model misses among them.

    Args:
        base: config of a classification loss.
        power: at least 0.
        use_sigmoid: may be given because mmdet's heads read it from the config; it must fit the base.
    """

    fn = staticmethod(confidence_weighted_loss)
    inputs = ("base",)
    yolo_gain = 4.0
    true_gradient = False
    sigmoid_only = False

    def __init__(self, *, base=None, use_sigmoid=None, **kwargs):
        base = build_loss({"type": "BinaryCrossEntropyLoss"} if base is None else base)
        if base.family != "classification":
            raise ValueError(f"base of ConfidenceWeightedLoss must be a classification loss, not {base}.")
        super().__init__(use_sigmoid=base.use_sigmoid, **kwargs)
        check_use_sigmoid(self, use_sigmoid)
        self.base = base
        self.sums_classes, self.needs_mining = base.sums_classes, base.needs_mining
        self.by_rows = base.by_rows and not base.surveys

    def prepare(self, pred, target):
        return self.base.prepare(pred, target)

    def compute(self, pred, target, valid, weight):
        return self.fn(pred, target, base=self.base, **self.settings)


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
