"""The families of losses: what pred and target of each look like."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from detloss_plugins.facts import PerClass, Share, between, plain
from detloss_plugins.loss import Loss
from detloss_plugins.precision import float32, is_asynchronous, is_compiling, without_autocast
from detloss_plugins.reduction import check_reduction, fit_weight, reduce


def check_same_shape(pred: Tensor, target: Tensor, what: str, columns: int | None = None) -> None:
    """Raise ``ValueError`` if the two shapes differ, or do not end in ``columns``."""
    if pred.shape != target.shape or columns not in (None, *pred.shape[-1:]):
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} must both be {what}.")


def may_be_negative(target: Tensor) -> bool:
    """Whether a value of a target is below 0, or may be as far as can be told without waiting for a GPU."""
    if not is_compiling() and not is_asynchronous(target.device):
        with contextlib.suppress(RuntimeError):  # empty, or of torch.vmap or the meta device, which show no values
            return not target.min().item() >= 0
    return True


def of_one_type(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Half precision up-cast, and the target in the type of ``pred``."""
    pred = float32(pred)
    return pred, target.to(pred.dtype)


def effective_weights(counts: Sequence[float], beta: float = 0.999) -> list[float]:
    """``(1 - beta) / (1 - beta^n)`` of each class with ``n`` objects, scaled to a mean of 1; without objects, 1.

    Cui et al., Class-Balanced Loss Based on Effective Number of Samples, 2019, https://arxiv.org/abs/1901.05555.

    >>> [round(weight, 6) for weight in effective_weights([1, 2, 0], beta=0.5)]  # 1 and 2/3, times 6/5
    [1.2, 0.8, 1.0]
    """
    weights = [(1 - beta) / (1 - beta**n) for n in counts if n > 0]
    scaled = iter([weight * len(weights) / sum(weights) for weight in weights])
    return [next(scaled) if n > 0 else 1.0 for n in counts]


class _Boxes(Loss):
    """Encoded deltas in place of boxes train without an error, and to no purpose: they have sides below zero."""

    form: ClassVar[str]
    columns: ClassVar[int]
    _sides: ClassVar[Callable]  # width and height of boxes

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.inverted = self.boxes = 0  # targets seen so far

    def check(self, pred, target):
        if target.shape != pred.shape or target.shape[-1] != self.columns:
            return
        self.inverted += int((self._sides(target) < 0).any(-1).sum())
        self.boxes += int((target != 0).any(-1).sum())
        # An annotation or two may be wrong; of deltas, most have a side below zero.
        if self.inverted >= 4 and self.inverted > self.boxes / 4:
            raise ValueError(
                f"{type(self).__name__} takes {self.form}, but many targets have sides below zero: set "
                "reg_decoded_bbox=True in the MMDetection head, so that it hands over boxes, not encoded deltas. A "
                "head that has no such setting (FoveaHead) takes a point-wise loss such as SmoothL1Loss."
            )

    def prepare(self, pred, target):
        check_same_shape(pred, target, self.form, self.columns)
        return super().prepare(pred, target)


class BoxLoss(_Boxes, family="box"):
    """Losses between aligned boxes.

    Call with ``pred`` and ``target`` of shape ``(..., 4)``, corners ``(x1, y1, x2, y2)`` in any one unit; the
    per-element losses have shape ``(...)``. ``weight`` may be ``(N,)``, ``(N, 1)`` or mmdet's ``(N, 4)``. Other shapes,
    and targets of the first calls that are no boxes, are a ``ValueError``.
    """

    form, columns = "boxes of 4 coordinates (x1, y1, x2, y2)", 4
    _sides = staticmethod(lambda boxes: boxes[..., 2:] - boxes[..., :2])


class ClassificationLoss(
    Loss, family="classification", every_rank=True, needs_mining=True, one_per_row=False, takes_pairs=True
):
    """Losses on class logits ``(..., C)``.

    Targets: class index ``(...)`` (integers; ``C`` is background in a sigmoid form), dense ``(..., C)`` hard, soft or
    multi-hot, in [0, 1], or mmdet's ``(label, quality)`` tuple, which puts the quality, ``(...)`` or ``(..., 1)``, on
    the label's channel. What is negative is ignored, a label or an element of a dense target. A label that is too large
    is an error on a CPU; on a GPU the loss would have to wait for it.

    Args:
        use_sigmoid: True of a loss with a sigmoid form only, which takes it as mmdet's heads read it from the config.
        class_weight: one factor a class on its channel's loss, or "effective", :func:`effective_weights` of
            ``class_counts``. Of sigmoid forms only; "mean" divides by what it would without.
        class_counts: how many objects of each class the data set has; the adapters fill it in for "effective".
        effective_beta: the beta of the effective number.
        label_smoothing: s; a target t becomes ``(1 - s) t + s / 2``. Of sigmoid forms only, and not where every
            target above 0 is a positive.

    Raises:
        ValueError: for a target of none of these forms, and for settings where they have no meaning; weights for
            another number of classes and "effective" without counts when it is called.
    """

    sigmoid_only: ClassVar[bool] = True
    instead: ClassVar[str] = ""  # of class_weight and label_smoothing, where they have no meaning
    outside_kernel = Loss.outside_kernel | {"class_weight", "class_counts", "effective_beta"}
    class_weight: Any  # set in __init__, as is all that is in ``hyper``
    may_ignore = True  # False where no element of a dense target is negative, so that nobody has to look

    def __init__(
        self,
        *,
        use_sigmoid: bool = True,
        class_weight: PerClass | Literal["effective"] | None = None,
        class_counts: PerClass | None = None,
        effective_beta: Annotated[float, between(0, 1, "[0, 1)")] = 0.999,
        label_smoothing: Share = 0.0,
        **settings,
    ):
        if self.sigmoid_only and not use_sigmoid:
            raise ValueError(f"{type(self).__name__} has a sigmoid form only; write use_sigmoid=True.")
        given: dict[str, Any] = {"class_weight": class_weight, "label_smoothing": label_smoothing}
        super().__init__(**settings, **{name: given[name] for name in given if name in self.hyper})
        self.use_sigmoid, self.effective_beta = use_sigmoid, effective_beta
        for name, value in given.items():
            setattr(self, name, value)
            self.check_setting_of_classes(name, value)
        self.register_buffer("class_factors", None, persistent=False)  # what a setting says is no state
        self.count_classes(class_counts)

    def check_setting_of_classes(self, name: str, value: Any) -> None:
        """Raise ``ValueError`` for a ``class_weight`` or ``label_smoothing`` that has no meaning."""
        own = name in self.hyper and value != "effective"  # a term of the formula
        if not value or own:
            return
        reason = self.instead or ("" if self.use_sigmoid else "its softmax form has no terms of single classes")
        if not reason and name == "label_smoothing" and self.facts.marks_positives:
            reason = "it takes every target above 0 for a positive"
        if reason:
            raise ValueError(f"{name} has no meaning for {type(self).__name__}: {reason}.")

    def __setattr__(self, name: str, value: Any) -> None:
        later = name == "class_weight" and hasattr(self, "class_counts")  # than in __init__
        if later:
            value = plain(value)
            self.check_setting_of_classes(name, value)
        super().__setattr__(name, value)
        if later and (name not in self.hyper or value == "effective"):
            self.count_classes(self.class_counts)

    def count_classes(self, counts: Sequence[float] | None) -> None:
        """Say how many objects of each class the data set has, for ``class_weight="effective"``.

        The weights are then on the CPU: call it before the loss is moved to a device, or move it again.
        """
        self.class_counts, weights = counts, self.class_weight
        if weights == "effective":
            weights = counts and effective_weights(counts, self.effective_beta)
        if "class_weight" not in self.hyper:
            self.class_factors = torch.tensor(weights, dtype=torch.float32) if weights else None
        elif weights:
            self.class_weight = weights

    def blueprint(self):
        return *super().blueprint(), self.may_ignore

    def observe(self, pred, target, weight):
        if self.class_weight == "effective" and self.class_counts is None:
            raise ValueError(f'class_weight="effective" of {type(self).__name__} needs class_counts, one a class.')
        seen = super().observe(pred, target, weight)
        if self.class_factors is None:
            return seen
        if self.class_factors.shape[-1] != pred.shape[-1]:
            raise ValueError(f"{self.class_factors.shape[-1]} class weights were given for {pred.shape[-1]} classes.")
        return {**seen, "class_factors": self.class_factors.to(pred.device)}  # where it was, unless it was set later

    def unweighted(self, pred, target, seen):
        seen = dict(seen)
        factors = seen.pop("class_factors", None)
        loss, valid = super().unweighted(pred, target, seen)
        return loss if factors is None else loss * factors, valid

    def last_label(self, pred: Tensor) -> int:
        """The largest label that these logits can have."""
        return pred.shape[-1]

    def look(self, pred, target):
        super().look(pred, target)
        label = target if isinstance(target, Tensor) else target[0]
        if not is_compiling() and not is_asynchronous(label.device):
            with contextlib.suppress(RuntimeError):  # torch.vmap and the meta device have no values to look at
                self.check_labels(pred, label)

    def check_labels(self, pred: Tensor, label: Tensor) -> None:
        """Raise ``ValueError`` for a label that is too large; nothing for what is no label."""
        if label.shape != pred.shape[:-1] or label.is_floating_point() or not label.numel():
            return
        largest, last = int(label.max()), self.last_label(pred)
        if largest > last:
            of = f"{type(self).__name__} with logits {tuple(pred.shape)}"
            raise ValueError(f"{of} takes labels up to {last}, not {largest}; a negative label is ignored.")

    def prepare(self, pred, target):
        if not self.may_ignore and isinstance(target, Tensor) and target.shape == pred.shape:
            target, valid = target.to(pred.dtype), None
        else:
            target, valid = self.dense(pred, target)
        smoothing = 0 if "label_smoothing" in self.hyper else self.label_smoothing
        if smoothing:
            target = (1 - smoothing) * target + smoothing / 2  # and what is ignored is not in ``valid``
        return pred, target, valid

    @classmethod
    def dense(cls, pred: Tensor, target: Any) -> tuple[Tensor, Tensor | None]:
        """The dense form of a target of any form, and the mask of its valid rows or elements, or None for all."""
        label, quality = target if isinstance(target, (tuple, list)) else (target, None)
        if label is target and target.shape == pred.shape:
            # True for NaN, which is not ours to hide.
            return target.to(pred.dtype), ~(target < 0) if may_be_negative(target) else None
        if quality is None:
            return cls.one_hot(pred, label, pred.new_ones(()))
        if quality.shape not in (label.shape, (*label.shape, 1)):
            given = tuple(quality.shape)
            raise ValueError(f"{cls.__name__} takes one quality a label, {tuple(label.shape)}, not {given}.")
        return cls.one_hot(pred, label, quality.to(pred.dtype).reshape(label.shape))

    @classmethod
    def one_hot(cls, pred: Tensor, label: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """``value`` on the label's channel, in its type, and the mask of the rows that are not ignored."""
        if label.shape != pred.shape[:-1] or label.is_floating_point():
            *rows, _ = shape = tuple(pred.shape)
            raise ValueError(
                f"{cls.__name__} with logits {shape} takes class indices {tuple(rows)} as integers, a dense target "
                f"{shape} or a (label, quality) tuple, not {label.dtype} {tuple(label.shape)}."
            )
        classes = torch.arange(pred.shape[-1], device=label.device)
        return torch.where(label.unsqueeze(-1) == classes, value.unsqueeze(-1), 0), label >= 0


def above_zero(target: tuple, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A ``(label, quality)`` target with every quality above 0, if only just: so a positive of quality 0 stays one."""
    label, quality = target
    return label, None if quality is None else quality.to(dtype).clamp(min=torch.finfo(dtype).tiny)


class RankingLoss(ClassificationLoss, family="ranking", needs_mining=False, counts_positives=True, one_per_row=True):
    """Losses on the order of the scores: every positive against every negative of all that ``pred`` holds.

    Call once a step, with the logits ``(..., C)`` of all levels and images of a batch. Each class score is a cell of
    its own: positive if its target is above 0 (the value is its IoU, for the losses that read it), negative if it is 0,
    ignored if it is below. Targets have the forms of a classification loss; a positive of quality 0 stays one.

    The per-element losses are one per positive, ``(P,)``, in the order of ``pred.flatten()``; their mean is over the
    positives. ``weight`` 0 takes a row or a cell out of the ranking; any other weight multiplies the loss of a positive
    and has no effect on a negative. Without positives the loss is zero.

    With ``torch.use_deterministic_algorithms(True)`` torch refuses running sums on a GPU, which all but DRLoss take.

    Args:
        delta: half the width of the step by which all but DRLoss compare scores, in logits.
    """

    instead = "it ranks scores, and its targets say no more than which are positives"

    def prepare(self, pred, target):
        if isinstance(target, (tuple, list)):
            target, valid = self.dense(pred, above_zero(target, pred.dtype))
        elif target.shape == pred.shape:
            # What is ignored will be below 0.
            return pred, target if target.dtype.is_signed else target.to(pred.dtype), None
        else:
            target, valid = self.one_hot(pred, target, torch.ones((), dtype=torch.int8, device=pred.device))
        return pred, target.masked_fill(~valid.unsqueeze(-1), -1), None

    def reduced(self, pred, target, weight, avg_factor, reduction, factor, **inputs):
        reduction = check_reduction(self.reduction if reduction is None else reduction, avg_factor)
        self.look(pred, target)
        with without_autocast(pred.device):
            pred, target, _ = self.prepare(float32(pred), target)
            if weight is not None:
                weight = fit_weight(weight, pred).expand_as(pred)
                target = target.masked_fill(weight == 0, -1)
                weight = weight.masked_select(target > 0)
            found = self.elements(pred, target, inputs)
            parts = found if isinstance(found, tuple) else (found,)
            parts = tuple(factor * reduce(part, weight, avg_factor, reduction) for part in parts)
        return parts if isinstance(found, tuple) else parts[0]


class DistributionLoss(Loss, family="distribution"):
    """Losses on a distribution over bins: logits ``(..., bins)``, target distance ``(...)`` in units of a bin."""

    def prepare(self, pred, target):
        if pred.shape[:-1] != target.shape or pred.shape[-1] < 2:
            raise ValueError(
                f"{type(self).__name__} takes logits (N, bins) with at least 2 bins and one distance per row, "
                f"not {tuple(pred.shape)} and {tuple(target.shape)}."
            )
        return super().prepare(pred, target)


def has_bins(loss: Loss) -> bool:
    """Whether a loss, or a part of it, has other bins than 0, 1, 2 and so on, by which the stock heads decode."""
    return any(isinstance(x, DistributionLoss) and getattr(x, "bins", None) is not None for x in loss.modules())


class RegressionLoss(Loss, family="regression", one_per_row=False):
    """Point-wise losses between tensors of one shape, any shape; a ``ValueError`` if the shapes differ."""

    def leading(self, pred):
        return max(pred.dim() - 1, min(pred.dim(), 1))

    def prepare(self, pred, target):
        check_same_shape(pred, target, "tensors of one shape")
        return super().prepare(pred, target)


class RegionLoss(Loss, family="region", bounds=(0.0, 1.0)):
    """Losses between masks ``(N, ...)``, one loss a mask: ``(N,)``.

    Call with logits, which go through a sigmoid, and targets in [0, 1] of the same shape (else a ``ValueError``) and
    any type. Nothing is ignored; targets such as masks of 0 and 255 are a ``ValueError`` in the first calls on a CPU.

    Args:
        use_sigmoid: True, or False beside ``activate=False``; accepted because mmdet's configs write it.
        activate: False if ``pred`` is a probability already, as QueryInst's and decoupled SOLO's heads give it.
    """

    def __init__(self, *, use_sigmoid: bool = True, activate: bool = True, **settings):
        if activate and not use_sigmoid:
            raise ValueError(
                f"{type(self).__name__} has a sigmoid form only; write use_sigmoid=True, "
                "or activate=False if the head hands over probabilities."
            )
        super().__init__(**settings)
        self.use_sigmoid, self.activate = use_sigmoid, activate

    def leading(self, pred):
        return min(pred.dim(), 1)

    def check(self, pred, target):
        if target.shape == pred.shape and not is_asynchronous(target.device):
            low, high = target.min().item(), target.max().item()
            if low < 0 or high > 1:
                name = type(self).__name__
                raise ValueError(f"{name} takes masks of values in [0, 1], not from {low:g} to {high:g}.")

    def prepare(self, pred, target):
        if pred.shape != target.shape or pred.dim() < 2:
            raise ValueError(
                f"{type(self).__name__} takes predictions and masks of one shape (N, ...), not {tuple(pred.shape)} and "
                f"{tuple(target.shape)}; for mmdet's FCNMaskHead, which hands over a mask for every class, "
                "use CrossEntropyLoss with use_mask=True."
            )
        return super().prepare(pred.sigmoid() if self.activate else pred, target)


class RotatedLoss(_Boxes, family="rotated"):
    """Losses between aligned rotated boxes.

    Call with ``pred`` and ``target`` of shape ``(..., 5)``: ``(cx, cy, w, h, theta)``, the first four in any one unit,
    the angle in radians, any angle, turning the x axis towards the y axis. The per-element losses have shape ``(...)``.
    ``weight`` may be ``(N,)``, ``(N, 1)`` or ``(N, 5)``. Other shapes, and targets of the first calls that are no
    boxes, are a ``ValueError``.

    Args:
        eps: the shortest side, as a share of the longest of both boxes or of the gap between their centers.
    """

    form, columns = "rotated boxes of 5 values (cx, cy, w, h, theta in radians)", 5
    _sides = staticmethod(lambda boxes: boxes[..., 2:4])
