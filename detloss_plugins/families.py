"""The families of losses: what pred and target of each look like, and how to sample them for a test."""

from typing import ClassVar

import torch

from detloss_plugins.base import Loss
from detloss_plugins.execution import Labels, compiling
from detloss_plugins.reduction import apply_weight, fit_weight


def check_same_shape(pred, target, what):
    """Raise ``ValueError`` if the two shapes differ."""
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} must both be {what}.")


class BoxLoss(Loss):
    """Losses between aligned boxes.

    Call with ``pred`` and ``target`` of shape ``(..., 4)``, corners ``(x1, y1, x2, y2)`` in any one unit; the
    per-element losses have shape ``(...)``. ``weight`` may be ``(N,)``, ``(N, 1)`` or mmdet's ``(N, 4)``.

    Raises:
        ValueError: if the shapes differ or do not end in 4, or the targets of the first calls are not boxes.
    """

    family = "box"
    minimum: ClassVar[float] = 0.0  # the loss of identical boxes
    symmetric: ClassVar[bool] = True  # in pred and target
    scale_invariant: ClassVar[bool] = True
    attracts: ClassVar[bool] = False  # True: falls as a disjoint box of the target's size comes nearer
    by_columns = True
    larger_parts = 2  # columns are worked on one by one
    aside = ("unchecked", "inverted", "boxes")
    values_per_box: ClassVar[int] = 1  # 4: per-element losses (..., 4)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.unchecked = 20  # calls in which to look at the targets: each look waits for the device
        self.inverted = self.boxes = 0  # seen so far

    def prepare(self, pred, target):
        check_same_shape(pred, target, "boxes (N, 4) as (x1, y1, x2, y2)")
        if pred.shape[-1] != 4:
            raise ValueError(f"Boxes have 4 coordinates (x1, y1, x2, y2), not {pred.shape[-1]}.")
        return super().prepare(pred, target)

    def look(self, target):
        if self.unchecked and target.numel() and target.shape[-1] == 4 and not compiling():
            self.unchecked -= 1
            self._check_corners(target)

    def _check_corners(self, target):
        """Encoded deltas in place of boxes train without an error, and to no purpose."""
        self.inverted += int((target[..., 2:] < target[..., :2]).any(-1).sum())
        self.boxes += int((target != 0).any(-1).sum())
        # An annotation or two may be wrong; of deltas, most have their third number below the first or so.
        if self.inverted >= 4 and self.inverted > self.boxes / 4:
            raise ValueError(
                f"{type(self).__name__} takes boxes (x1, y1, x2, y2), but many targets have x2 < x1 or y2 < y1: "
                "set reg_decoded_bbox=True in the MMDetection head, so that it hands over boxes, not encoded deltas."
            )

    @classmethod
    def sample(cls, n=64, seed=0, dtype=torch.float32):
        """``n`` predictions and targets in pixels: overlapping ones mostly, disjoint and nested ones too."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(low, high):
            return torch.rand(n, 2, generator=generator, dtype=torch.float64) * (high - low) + low

        center, sides = uniform(100, 500), uniform(10, 120)
        # Pixel coordinates only: the conditioning of a loss at a scale is a property test of its own.
        moved = center + sides * uniform(-0.8, 0.8)
        resized = sides * uniform(0.4, 1.6)
        target = torch.cat([center - sides / 2, center + sides / 2], -1)
        pred = torch.cat([moved - resized / 2, moved + resized / 2], -1)
        return pred.to(dtype), target.to(dtype)


def negatives(target):
    """Whether a target is the number 0, for a batch of nothing but negatives."""
    return isinstance(target, int)


class ClassificationLoss(Loss):
    """Losses on class logits ``(..., C)``.

    Targets: class index ``(...)`` (integers; ``C`` is background, a negative one is ignored), dense ``(..., C)`` hard,
    soft or multi-hot, or mmdet's ``(label, quality)`` tuple, which puts the quality on the label's channel.

    Args:
        use_sigmoid: accepted by the losses that have only a sigmoid form because mmdet's heads read it from the config
            to choose the number of channels; it must be True there.

    Raises:
        ValueError: if ``use_sigmoid`` is False for such a loss, or the target has none of these forms.
    """

    family = "classification"
    every_rank = True
    sigmoid_only: ClassVar[bool] = True
    needs_mining: ClassVar[bool] = True  # False: stands the many easy negatives of a dense detector by itself
    # The settings that must be off for ``fn`` to take each class on its own, and the number 0 for a dense target of
    # nothing but negatives, which costs nothing where a logit is very low; None: it does not.
    apart_without: ClassVar[tuple[str, ...] | None] = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        own = vars(cls).keys()
        if "apart_without" not in own and own & {"fn", "prepare", "dense", "one_hot"}:
            cls.apart_without = None  # that of the loss it derives from need not hold any more

    def __init__(self, *, use_sigmoid=True, **kwargs):
        if self.sigmoid_only and not use_sigmoid:
            raise ValueError(f"{type(self).__name__} has a sigmoid form only; write use_sigmoid=True.")
        super().__init__(**kwargs)
        self.use_sigmoid = use_sigmoid

    def prepare(self, pred, target):
        if negatives(target):
            return pred, target, None
        return pred, *self.dense(pred, self.labelled(pred, target) or target)

    def labelled(self, pred, target):
        """The class indices, and the qualities or None, of a target in such a form; None for a dense one."""
        if isinstance(target, (tuple, list)):
            return tuple(target)
        return None if target.shape == pred.shape else (target, None)

    def labels_apart(self, pred, target, weight):
        given = self.labelled(pred, target) if self._takes_apart() else None
        if given is None:
            return None
        label, quality = given
        if label.shape != pred.shape[:-1] or label.is_floating_point():
            return None  # which is a mistake that "one_hot" tells
        if weight is not None and weight.shape != label.shape:
            return None
        channel, found = self.channel_of(pred, label)
        rest = label >= 0
        value = torch.ones_like(found) if quality is None else quality
        weights = (found, rest) if weight is None else (found * weight, rest * weight)
        return Labels(channel, value.unsqueeze(-1), found, *weights)

    @staticmethod
    def channel_of(pred, label):
        """The channel of each label as an index ``(N, 1)``, and whether it is one; the index is any where not."""
        last = pred.shape[-1] - 1
        return label.clamp(0, last).long().unsqueeze(-1), (label >= 0) & (label <= last)

    def _takes_apart(self):
        if self.apart_without is None or not self.use_sigmoid or any(getattr(self, x) for x in self.apart_without):
            return False
        return all(value is None or isinstance(value, (int, float)) for value in self.settings.values())

    def reduces(self, pred, target, weight, reduction):
        # The sigmoid form of labels has a mask of valid rows.
        return super().reduces(pred, target, weight, reduction) and (target.shape == pred.shape or not self.use_sigmoid)

    @classmethod
    def dense(cls, pred, target):
        """The dense form of a target of any form, and the mask of its valid rows or None."""
        if isinstance(target, (tuple, list)):
            label, quality = target
            return cls.one_hot(pred, label, pred.new_ones(()) if quality is None else quality.to(pred.dtype))
        if target.shape == pred.shape:
            return target.to(pred.dtype), None
        return cls.one_hot(pred, target, pred.new_ones(()))

    @classmethod
    def one_hot(cls, pred, label, value):
        """``value`` on the label's channel, in its type, and the mask of rows that are not ignored."""
        if label.shape != pred.shape[:-1] or label.is_floating_point():
            raise ValueError(
                f"{cls.__name__} with logits {tuple(pred.shape)} takes class indices {tuple(pred.shape[:-1])} "
                f"as integers, a dense target {tuple(pred.shape)} or a (label, quality) tuple, "
                f"not {label.dtype} {tuple(label.shape)}."
            )
        if compiling():  # which makes no tensor of it
            channel = label.unsqueeze(-1) == torch.arange(pred.shape[-1], device=label.device)
            return torch.where(channel, value.unsqueeze(-1), 0), label >= 0
        channel, found = cls.channel_of(pred, label)
        value = torch.where(found, value, torch.zeros_like(value))
        empty = torch.zeros(pred.shape, dtype=value.dtype, device=pred.device)
        return empty.scatter_(-1, channel, value.unsqueeze(-1)), label >= 0

    @classmethod
    def sample(cls, n=64, seed=0, dtype=torch.float32, classes=10):
        """Logits ``(n, classes)`` and dense soft targets: a quality on at most one channel, a third of them empty."""
        generator = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
        label = torch.randint(0, classes + classes // 2, (n, 1), generator=generator)
        quality = torch.rand(n, 1, generator=generator, dtype=torch.float64)
        target = torch.where(label == torch.arange(classes), quality, 0.0)
        return logits.to(dtype), target.to(dtype)


class RankingLoss(ClassificationLoss):
    """Losses on the order of the scores: every positive against every negative of all that ``pred`` holds.

    Call once a step, with the logits ``(..., C)`` of all levels and images of a batch. Each class score is a cell of
    its own: positive if its target is above 0 (the value is its IoU, for the losses that read it), negative if it is 0,
    ignored if it is below. Targets have the forms of a classification loss; a positive of quality 0 stays one.

    The per-element losses are one per positive, ``(P,)``, in the order of ``pred.flatten()``; their mean is over the
    positives. ``weight`` 0 takes a row or a cell out of the ranking; any other weight multiplies the loss of a positive
    and has no effect on a negative. Without positives the loss is zero.
    """

    family = "ranking"
    counts_positives = True
    needs_mining = False
    # Order is all that these losses see. From the stock scores, which are a thousandth and less and differ from level
    # to level, objects would stay below the thresholds of validation.
    yolo_prior = 0.01

    def prepare(self, pred, target):
        tiny = torch.finfo(pred.dtype).tiny
        if isinstance(target, (tuple, list)):
            label, quality = target
            target, valid = self.dense(pred, (label, quality.to(pred.dtype).clamp(min=tiny)))
        elif target.shape == pred.shape:
            return pred, target, None
        else:
            target, valid = self.one_hot(pred, target, torch.ones((), dtype=torch.int8, device=pred.device))
        return pred, target.masked_fill(~valid.unsqueeze(-1), -1), None

    def weighed(self, pred, target, weight):
        """The target with the cells of weight 0 ignored, and the weights of the positives or None."""
        if weight is None:
            return target, None
        weight = fit_weight(weight, pred).expand_as(pred)
        target = target.masked_fill(weight == 0, -1)
        return target, weight.masked_select(target > 0)

    def compute(self, pred, target, valid, weight):
        target, weight = self.weighed(pred, target, weight)
        return apply_weight(self.fn(pred, target, **self.settings), weight)

    def weigh(self, loss, weight, valid):
        return loss


class DistributionLoss(Loss):
    """Losses on a distribution over bins: logits ``(..., bins)``, target distance ``(...)`` in units of a bin."""

    family = "distribution"
    keeps_little = True
    larger_parts = 2

    def prepare(self, pred, target):
        if pred.shape[:-1] != target.shape or pred.shape[-1] < 2:
            raise ValueError(
                f"{type(self).__name__} takes logits (N, bins) with at least 2 bins and one distance per row, "
                f"not {tuple(pred.shape)} and {tuple(target.shape)}."
            )
        return super().prepare(pred, target)

    @classmethod
    def sample(cls, n=64, seed=0, dtype=torch.float32, bins=16):
        """Logits ``(n, bins)`` and distances inside the bins."""
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(n, bins, generator=generator, dtype=torch.float64)
        target = torch.rand(n, generator=generator, dtype=torch.float64) * (bins - 1.02)
        return logits.to(dtype), target.to(dtype)


class RegressionLoss(Loss):
    """Point-wise losses between tensors of one shape, any shape.

    Raises:
        ValueError: if the shapes differ.
    """

    family = "regression"
    keeps_little = True

    def leading(self, pred):
        return max(pred.dim() - 1, min(pred.dim(), 1))

    def prepare(self, pred, target):
        check_same_shape(pred, target, "tensors of one shape")
        return super().prepare(pred, target)

    @classmethod
    def sample(cls, n=64, seed=0, dtype=torch.float32):
        """Predictions and targets ``(n, 4)`` such as encoded box offsets."""
        generator = torch.Generator().manual_seed(seed)
        pred, target = torch.randn(2, n, 4, generator=generator, dtype=torch.float64).unbind(0)
        return pred.to(dtype), target.to(dtype)


class RegionLoss(Loss):
    """Losses between masks ``(N, ...)``, one loss a mask: ``(N,)``.

    Call with logits, which go through a sigmoid, and targets in [0, 1] of the same shape and any type.

    Args:
        use_sigmoid: accepted because mmdet's configs write it; there is no other activation.
        activate: False if ``pred`` is a probability already, as QueryInst's and decoupled SOLO's heads give it.

    Raises:
        ValueError: if ``use_sigmoid`` is False and ``activate`` is not, or the shapes differ or have no pixels'
            dimension.
    """

    family = "region"
    keeps_little = True
    larger_parts = 2
    bounds = (0.0, 1.0)

    def __init__(self, *, use_sigmoid=True, activate=True, **kwargs):
        if activate and not use_sigmoid:
            raise ValueError(
                f"{type(self).__name__} has a sigmoid form only; write use_sigmoid=True, "
                "or activate=False if the head hands over probabilities."
            )
        super().__init__(**kwargs)
        self.use_sigmoid, self.activate = use_sigmoid, activate

    def leading(self, pred):
        return min(pred.dim(), 1)

    def prepare(self, pred, target):
        if pred.shape != target.shape or pred.dim() < 2:
            raise ValueError(
                f"{type(self).__name__} takes predictions and masks of one shape (N, ...), not {tuple(pred.shape)} and "
                f"{tuple(target.shape)}; for mmdet's FCNMaskHead, which hands over a mask for every class, "
                "use CrossEntropyLoss with use_mask=True."
            )
        return super().prepare(pred.sigmoid() if self.activate else pred, target)

    @classmethod
    def sample(cls, n=64, seed=0, dtype=torch.float32, side=8):
        """Logits and rectangular masks ``(n, side, side)`` that they fit more or less; some masks are empty."""
        generator = torch.Generator().manual_seed(seed)
        pixel = torch.arange(side)
        low, high = torch.randint(0, side + 1, (2, n, 2, 1), generator=generator).sort(0).values
        rows, columns = ((low <= pixel) & (pixel < high)).unbind(1)
        target = (rows.unsqueeze(-1) & columns.unsqueeze(-2)).double()
        noise = torch.randn(n, side, side, generator=generator, dtype=torch.float64)
        fit = 6 * torch.rand(n, 1, 1, generator=generator, dtype=torch.float64) - 1
        return ((target - 0.5) * fit + 1.5 * noise).to(dtype), target.to(dtype)


class RotatedLoss(Loss):
    """Losses between aligned rotated boxes.

    Call with ``pred`` and ``target`` of shape ``(..., 5)``: ``(cx, cy, w, h, theta)``, the first four in any one unit,
    the angle in radians, any angle, turning the x axis towards the y axis. The per-element losses have shape ``(...)``.
    ``weight`` may be ``(N,)``, ``(N, 1)`` or ``(N, 5)``.

    Raises:
        ValueError: if the shapes differ or do not end in 5.
    """

    family = "rotated"
    by_columns = True
    larger_parts = BoxLoss.larger_parts
    minimum: ClassVar[float] = 0.0  # the loss of identical boxes; this and the next two with the default settings
    symmetric: ClassVar[bool] = True  # in pred and target
    scale_invariant: ClassVar[bool] = True

    def prepare(self, pred, target):
        check_same_shape(pred, target, "rotated boxes (N, 5) as (cx, cy, w, h, theta)")
        if pred.shape[-1] != 5:
            raise ValueError(f"Rotated boxes have 5 values (cx, cy, w, h, theta in radians), not {pred.shape[-1]}.")
        return super().prepare(pred, target)

    @classmethod
    def sample(cls, n=64, seed=0, dtype=torch.float32):
        """``n`` predictions and targets in pixels, at all angles: most overlap, a quarter is turned at will."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(low, high, columns=2):
            return torch.rand(n, columns, generator=generator, dtype=torch.float64) * (high - low) + low

        center, sides, angle = uniform(100, 500), uniform(10, 120), uniform(-torch.pi, torch.pi, 1)
        moved, resized = center + sides * uniform(-0.8, 0.8), sides * uniform(0.4, 1.6)
        turn, anyhow = uniform(-0.6, 0.6, 1), uniform(-torch.pi, torch.pi, 1)
        turned = angle + torch.where(uniform(0, 1, 1) < 0.25, anyhow, turn)
        target, pred = torch.cat([center, sides, angle], -1), torch.cat([moved, resized, turned], -1)
        return pred.to(dtype), target.to(dtype)
