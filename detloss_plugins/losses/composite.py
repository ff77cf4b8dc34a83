"""Losses made of other losses."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from detloss_plugins.facts import NonNegative
from detloss_plugins.families import ClassificationLoss
from detloss_plugins.loss import Loss, check_use_sigmoid
from detloss_plugins.losses.classification import confidence_weight
from detloss_plugins.losses.classification.common import over_base
from detloss_plugins.precision import float32, without_autocast
from detloss_plugins.reduction import apply_weight, check_reduction, times
from detloss_plugins.registry import MODELS, build_loss

__all__ = ["ConfidenceWeightedLoss", "JointLoss", "confidence_weighted_loss", "joint_loss"]


def joint_loss(pred: Tensor, target: Tensor, *, losses: Sequence[Loss]) -> Tensor:
    """The sum of several losses (modules) of the same input, per element.

    >>> from detloss_plugins.losses import L1Loss, SmoothL1Loss
    >>> joint_loss(torch.tensor([3.0]), torch.tensor([0.0]), losses=[L1Loss(), SmoothL1Loss(loss_weight=2.0)])
    tensor([8.])
    """
    return sum(loss(pred, target, reduction_override="none") for loss in losses)


@MODELS.register_module()
class JointLoss(Loss, fn=joint_loss):
    """Weighted sum of losses on the same input, each with its own ``loss_weight`` and normaliser.

    Args:
        losses: config dicts of losses of one family.
        use_sigmoid: may be given because mmdet's heads read it from the config; it must fit the parts.

    Raises:
        ValueError: if there is none, or they are of different families.
    """

    facts = ClassificationLoss.facts.but(  # of the example; an instance has those of its parts
        row_wise=True,
        filled=("losses",),
        example={"losses": [{"type": "BinaryCrossEntropyLoss"}, {"type": "FocalLoss", "loss_weight": 2.0}]},
    )

    def __init__(self, *, losses: Sequence[Mapping] = (), use_sigmoid: bool | None = None, **settings):
        super().__init__(**settings)
        self.losses = torch.nn.ModuleList(build_loss(cfg) for cfg in losses)
        families = {loss.family for loss in self.losses}
        if len(families) != 1:
            raise ValueError("losses of JointLoss must be one or more config dicts of losses of one family.")
        facts = [loss.facts for loss in self.losses]
        self.facts = facts[0].but(
            row_wise=all(f.row_wise for f in facts),
            one_per_row=all(f.one_per_row for f in facts),
            keeps_little=all(f.keeps_little for f in facts),
            counts_positives=any(f.counts_positives for f in facts),
            true_gradient=all(f.true_gradient for f in facts),
            needs_mining=any(f.needs_mining for f in facts),
            takes_quality=any(f.takes_quality for f in facts),
            self_normalized=False,
            paper="",
            upstream=(),
            filled=self.facts.filled,
        )
        self.use_sigmoid = all(getattr(loss, "use_sigmoid", True) for loss in self.losses)
        check_use_sigmoid(self, use_sigmoid)

    def reduced(self, pred, target, weight, avg_factor, reduction, factor):
        """The sum of the parts, each called with the same arguments; of rows in one pass, which keeps one gradient."""
        reduction = check_reduction(self.reduction if reduction is None else reduction, avg_factor)
        if reduction == "none" or not self.facts.row_wise:
            pred = float32(pred)  # once, so that half-precision gradients are not added up in half precision
            parts = (loss(pred, target, weight, avg_factor, reduction) for loss in self.losses)
            return times(sum(parts), factor)
        self.look(pred, target)
        with without_autocast(pred.device):
            pred, target, weight = self.as_rows(pred, target, weight)
            seen = self.observe(pred, target, weight)
            one = float32(pred.new_ones(()))
            for loss, of_loss in zip(self.losses, seen.values(), strict=True):
                of_loss["scale"] = loss.normalized(one, pred, of_loss, avg_factor, reduction, loss.loss_weight)
            total = self.summed(pred, target, weight, seen)
        return times(total, factor)

    def look(self, pred, target):
        for loss in self.losses:
            loss.look(pred, target)

    def observe(self, pred, target, weight):
        return {str(i): loss.observe(pred, target, weight) for i, loss in enumerate(self.losses)}

    def weighted(self, pred, target, weight, seen):
        pred, total = float32(pred), 0  # half-precision gradients are not to be added up in half precision
        for loss, of_loss in zip(self.losses, seen.values(), strict=True):
            of_loss = dict(of_loss)
            scale = of_loss.pop("scale")
            of_rows = loss.weighted(pred, target, weight, of_loss)
            total = total + scale * (of_rows.flatten(1).sum(1) if of_rows.dim() > 1 else of_rows)
        return total

    def unweighted(self, pred, target, seen):
        parts = [
            (loss.loss_weight, *loss.unweighted(pred, target, of_loss))
            for loss, of_loss in zip(self.losses, seen.values(), strict=True)
        ]
        return sum(factor * loss for factor, loss, _ in parts), parts[0][2]


def confidence_weighted_loss(
    pred: Tensor, target: Tensor, *, power: NonNegative = 2.0, use_sigmoid: bool = True, elements: Tensor
) -> Tensor:
    """``(1 - Q_fg)^power Q_bg``, a constant of the row, times per-element losses, ``(..., C)`` or ``(...)``.

    Q_fg and Q_bg are the confidences that the row of logits ``(..., C)`` is an object or background. With
    ``use_sigmoid`` they are the largest class probability and one minus it; else the largest of the classes in the
    softmax, and the background, which is last.

    >>> logit = torch.tensor([[0.5]]).logit()  # (1 - 1/2)^2 * 1/2 * ln 2
    >>> confidence_weighted_loss(logit, torch.ones(1, 1), elements=torch.tensor([[2.0]]).log())
    tensor([[0.0866]])
    """
    logits = float32(pred).detach()
    scores = logits.sigmoid() if use_sigmoid else logits.softmax(-1)
    foreground = scores if use_sigmoid else scores[..., :-1]
    q_fg = foreground.amax(-1) if foreground.shape[-1] else scores.new_zeros(scores.shape[:-1])
    weight = confidence_weight(q_fg, 1 - q_fg if use_sigmoid else scores[..., -1], power)
    return apply_weight(elements, weight)


@MODELS.register_module()
class ConfidenceWeightedLoss(
    ClassificationLoss,
    fn=confidence_weighted_loss,
    row_wise=True,
    true_gradient=False,
    filled=("use_sigmoid", "elements"),
):
    """A classification loss weighted by how sure the model is that a sample is background.

    The weight of the third source document; no paper is known. It is not focal loss: it favours whatever is confidently
    background, positives that the model misses among them.

    Args:
        base: config of a classification loss; binary cross entropy if it is not given.
        power: at least 0.
        use_sigmoid: may be given because mmdet's heads read it from the config; it must fit the base.

    Raises:
        ValueError: if ``base`` is no classification loss, or ``use_sigmoid`` does not fit it.
    """

    instead = "write it in the dict of its base"
    sigmoid_only = False

    def __init__(self, *, base: Mapping | None = None, use_sigmoid: bool | None = None, **settings):
        base = build_loss({"type": "BinaryCrossEntropyLoss"} if base is None else base)
        if base.family != "classification":
            raise ValueError(f"base of ConfidenceWeightedLoss must be a classification loss, not {base}.")
        super().__init__(use_sigmoid=base.use_sigmoid, **settings)
        check_use_sigmoid(self, use_sigmoid)
        self.base = base
        self.facts = over_base(self.facts, base)

    def look(self, pred, target):
        self.base.look(pred, target)

    def observe(self, pred, target, weight):
        return self.base.observe(pred, target, weight)

    def unweighted(self, pred, target, seen):
        elements, valid = self.base.unweighted(pred, target, seen)
        elements = self.base.loss_weight * elements
        return self.fn(pred, elements, **self.settings, use_sigmoid=self.use_sigmoid, elements=elements), valid
