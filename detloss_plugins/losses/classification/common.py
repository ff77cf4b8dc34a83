"""What the classification losses share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detloss_plugins.families import ClassificationLoss, above_zero
from detloss_plugins.loss import Loss


def power(base: Tensor, exponent: Any) -> Tensor:
    """``base ** exponent`` for ``base >= 0`` with a finite gradient at zero for exponents below 1 too."""
    if not isinstance(exponent, Tensor) and exponent in (0, 1, 2):
        return torch.ones_like(base) if exponent == 0 else base if exponent == 1 else base.square()
    return base.clamp(min=torch.finfo(base.dtype).tiny).pow(exponent)


def is_zero(setting: Any) -> bool:
    """Whether a setting is the number 0, so that its term can be left out; what is learned is not."""
    return not isinstance(setting, Tensor) and setting == 0


def bce(pred: Tensor, target: Tensor, activated: bool = False, pos_weight: Tensor | None = None) -> Tensor:
    """Binary cross entropy of each class, of logits or, if ``activated``, of probabilities."""
    if activated:
        # What is negative is ignored, but torch refuses it.
        return F.binary_cross_entropy(pred, target.clamp(min=0), reduction="none")
    return F.binary_cross_entropy_with_logits(pred, target, reduction="none", pos_weight=pos_weight)


def class_vector(values: Any, pred: Tensor) -> Any:
    """Per-class values (number, list, tensor or None) beside ``pred``."""
    if values is None or isinstance(values, (int, float)):
        return values
    vector = torch.as_tensor(values, dtype=pred.dtype, device=pred.device)
    if vector.dim() and vector.shape[-1] not in (1, pred.shape[-1]):
        raise ValueError(f"{vector.shape[-1]} values were given for {pred.shape[-1]} classes.")
    return vector


class KeepsPositives(ClassificationLoss, takes_quality=True):
    """A loss for which a positive of quality 0 is no negative: a ``(label, quality)`` target tells the two apart."""

    def prepare(self, pred, target):
        pair = isinstance(target, (tuple, list))
        return super().prepare(pred, above_zero(target, pred.dtype) if pair else target)


class SoftmaxOrSigmoid(ClassificationLoss):
    """A loss with both forms: the softmax form takes indices or distributions as they are."""

    sigmoid_only = False

    def last_label(self, pred):
        return pred.shape[-1] - (not self.use_sigmoid)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.facts = self.facts.but(one_per_row=not self.use_sigmoid, takes_pairs=self.use_sigmoid)
        alpha = getattr(self, "alpha", None)
        if self.use_sigmoid and isinstance(alpha, list | tuple) and max(alpha) > 1:
            raise ValueError(f"alpha of {type(self).__name__} must be in [0, 1], as 1 - alpha weighs the negatives.")

    def prepare(self, pred, target):
        if self.use_sigmoid:
            return super().prepare(pred, target)
        if target.shape == pred.shape:
            target, valid = self.dense(pred, target)
            return pred, target, None if valid is None else valid.all(-1)
        if target.shape == pred.shape[:-1] and not target.is_floating_point():
            valid = target >= 0
            return pred, torch.where(valid, target, 0).long(), valid
        raise ValueError(
            f"The softmax form of {type(self).__name__} with logits {tuple(pred.shape)} takes class indices "
            f"{tuple(pred.shape[:-1])} as integers or distributions {tuple(pred.shape)}."
        )


class OverBase(ClassificationLoss):
    """A loss that weighs the per-element losses of another one, its ``base``, which reduces them in its own way."""

    instead = "write it in the dict of its base"
    base: Loss

    def take(self, base: Loss) -> None:
        """Make a loss the base; ``ValueError`` for one whose elements are not all that there is to it, or not alike."""
        parts = [part for part in base.modules() if isinstance(part, Loss) and part is not base]
        own_mean = any(part.facts.self_normalized or getattr(part, "avg_non_ignore", False) for part in parts)
        kinds = {
            (part.facts.one_per_row, part.facts.sums_classes, max(getattr(part, "ignore_index", -1), -1))
            for part in parts
            if not hasattr(part, "losses") and not hasattr(part, "base")
        }
        mixed = hasattr(base, "losses") and (own_mean or len(kinds) > 1)
        if mixed or getattr(base, "custom_cls_channels", False):
            raise ValueError(
                f"base of {type(self).__name__} must be a loss with one mean, one ignore_index and a channel for each "
                f"class, not this {type(base).__name__}; of a JointLoss, put a {type(self).__name__} around each part."
            )
        self.base, theirs = base, base.facts
        self.couples = base.couples
        of_base = ("sums_classes", "one_per_row", "mean_of_rows", "self_normalized", "needs_mining")
        self.facts = self.facts.but(
            **{name: getattr(theirs, name) for name in of_base},
            row_wise=self.facts.row_wise and theirs.row_wise,
            true_gradient=self.facts.true_gradient and theirs.true_gradient,
            takes_quality=self.facts.takes_quality or theirs.takes_quality,
        )

    def arranged(self, pred, target, weight):
        return self.base.arranged(pred, target, weight)

    def without_ignored(self, pred, target):
        return self.base.without_ignored(pred, target)

    def prepare(self, pred, target):
        return super().prepare(pred, self.without_ignored(pred, target))

    def look(self, pred, target):
        self.base.look(pred, target)

    def observe(self, pred, target, weight):
        return {**super().observe(pred, target, weight), "base": self.base.observe(pred, target, weight)}

    def of_base(self, pred: Tensor, target: Any, seen: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """What the base gives ``unweighted``, times its weight."""
        loss, valid = self.base.unweighted(pred, target, seen["base"])
        return self.base.loss_weight * loss, valid

    def weigh(self, loss, valid, weight):
        return self.base.weigh(loss, valid, weight)

    def normalizer(self, count, seen):
        return self.base.normalizer(count, seen["base"])
