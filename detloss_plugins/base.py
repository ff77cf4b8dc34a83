"""The one forward of every loss, and its families.

A family says what pred and target look like and how to sample them for a test.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from detloss_plugins.execution import float32, run
from detloss_plugins.reduction import apply_weight, check_reduction, fit_weight, of_rows, reduce


class Upstream(NamedTuple):
    """An upstream counterpart of a loss: where it is, and the settings under which the two are the same loss."""

    path: str  # dotted path of a class or function
    ours: Mapping = MappingProxyType({})  # hyper-parameters
    theirs: Mapping = MappingProxyType({})
    differs: str = ""  # why the two are *not* the same loss although they share a name; empty: they must agree
    at: tuple = ()  # the boxes (pred, target), in float32, on which they differ; empty: on any


class Rule(NamedTuple):
    """Which values a hyper-parameter may have."""

    words: str
    holds: Callable


def rules(**rules):
    """What a class states as ``allowed``."""
    return MappingProxyType(rules)


def at_least(low):
    """Numbers from ``low`` on."""
    return Rule(f"at least {low}", lambda value: value >= low)


def above(low):
    """Numbers greater than ``low``."""
    return Rule(f"above {low}", lambda value: value > low)


def one_of(*choices):
    """Any of these."""
    words = [f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices]
    return Rule(f"{', '.join(words[:-1])} or {words[-1]}", lambda value: value in choices)


def _keyword_only(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


class Loss(nn.Module):
    """What every loss shares: hyper-parameters, float32 inside, weight, avg_factor and reduction.

    A subclass binds ``fn(pred, target, *, hyper-parameters) -> per-element losses`` and states facts about it. The
    keyword-only arguments of ``fn`` are the constructor's hyper-parameters and become attributes of the module.

    Args:
        reduction: "none", "mean" or "sum".
        loss_weight: factor on the result.
        compile: run as one kernel of ``torch.compile``; the attribute is ``compiled``. Where the compiler fails, a
            warning says so and the loss runs uncompiled, as one whose shapes depend on the number of positives does.

    Raises:
        TypeError: for an unknown hyper-parameter (the message lists the accepted ones), or a string where a number is
            expected and the reverse.
        ValueError: for a value that the class does not allow.
    """

    fn: ClassVar
    family: ClassVar[str]
    paper: ClassVar[str] = ""  # link
    upstream: ClassVar[tuple[Upstream, ...]] = ()
    bounds: ClassVar[tuple[float, float]] = (0.0, float("inf"))  # of a per-element loss, on valid input
    true_gradient: ClassVar[bool] = True  # False: a factor is detached, so finite differences disagree by design
    sums_classes: ClassVar[bool] = False  # True: the per-element losses are summed over the last axis
    mean_of_rows: ClassVar[bool] = True  # "mean" is the mean of what "none" gives
    every_rank: ClassVar[bool] = False  # True: called in every step on every rank of a distributed run
    self_normalized: ClassVar[bool] = False  # True: "mean" has a normaliser of its own, whatever avg_factor says
    counts_positives: ClassVar[bool] = False  # True: their number decides shapes, so the host waits for the device
    by_rows: ClassVar[bool] = True  # a row's loss depends on that row alone; set below, False for what might not
    keeps_little: ClassVar[bool] = False  # True: for its backward, so that to run it in parts gains nothing
    by_columns: ClassVar[bool] = False  # True: pred and target hold a few unlike columns, such as x1, y1, x2, y2
    yolo_gain: ClassVar[float] = 1.0  # default loss_weight in a slot of the Ultralytics adapter
    yolo_prior: ClassVar[float | None] = None  # class score that a new head of theirs starts with; None: as stock
    hyper: ClassVar[tuple[str, ...]] = ()
    allowed: ClassVar[Mapping[str, Rule]] = rules()  # values of hyper-parameters
    inputs: ClassVar[tuple[str, ...]] = ()  # keyword-only arguments of fn that the class computes: its state
    example: ClassVar[Mapping] = MappingProxyType({})  # settings that suit the sample where the defaults do not

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        parameters = {}
        if hasattr(cls, "fn"):  # its own, or that of the loss it derives from
            parameters.update((k, v) for k, v in _keyword_only(cls.fn).items() if k not in cls.inputs)
            cls.hyper = tuple(parameters)
        for base in reversed(cls.__mro__):  # a subclass's default wins
            if issubclass(base, Loss) and "__init__" in vars(base):
                parameters.update(_keyword_only(base.__init__))
        if "by_rows" not in vars(cls):
            across = ("forward", "total", "elements", "compute", "normalizer", "weigh")
            cls.by_rows = all(getattr(cls, name) is getattr(Loss, name) for name in across)
        cls.__signature__ = inspect.Signature(list(parameters.values()))

    @classmethod
    def make(cls, **settings):
        """A valid instance, on the input that ``sample`` gives: the defaults, or those of ``example``."""
        return cls(**{**cls.example, **settings})

    def __init__(self, *, reduction="mean", loss_weight=1.0, compile=False, **hyper):
        super().__init__()
        self.compiled = compile
        accepted = inspect.signature(type(self)).parameters
        for name in hyper:
            if name not in self.hyper:
                raise TypeError(
                    f"{type(self).__name__} has no hyper-parameter {name!r}; it accepts {', '.join(sorted(accepted))}."
                )
        values = {name: hyper.get(name, accepted[name].default) for name in self.hyper}
        for name, value in {**values, "loss_weight": loss_weight}.items():
            if isinstance(value, str) != isinstance(accepted[name].default, str):
                raise TypeError(
                    f"{name}={value!r} of {type(self).__name__} has the wrong type; the default is {accepted[name]}."
                )
            setattr(self, name, value)
        for name, rule in self.allowed.items():
            self.check(name, rule)
        self.reduction = check_reduction(reduction)

    def check(self, name, rule):
        """Raise ``ValueError`` if a setting breaks a rule."""
        value = getattr(self, name)
        if not rule.holds(value):
            raise ValueError(f"{name} of {type(self).__name__} must be {rule.words}, not {value!r}.")

    def extra_repr(self):
        """The settings that differ from the defaults."""
        defaults = inspect.signature(type(self)).parameters
        settings = {name: getattr(self, name) for name in defaults if hasattr(self, name) and name != "compile"}
        settings["compile"] = self.compiled  # modules have a method of that name
        changed = {k: v for k, v in settings.items() if isinstance(v, torch.Tensor) or v != defaults[k].default}
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())

    def prepare(self, pred, target):
        """Bring the target to the form that ``fn`` takes; returns pred, target and a mask of valid rows or None."""
        return pred, target.to(pred.dtype), None

    @property
    def settings(self):
        """The hyper-parameters as they are now."""
        return {name: getattr(self, name) for name in self.hyper}

    @property
    def learning(self):
        """Whether a loss with state may update it: in training mode, and not while gradients are off (validation)."""
        return self.training and torch.is_grad_enabled()

    def compute(self, pred, target, valid, weight):
        """Per-element losses of prepared input; a loss with state overrides this."""
        return self.fn(pred, target, **self.settings)

    def elements(self, pred, target, weight=None):
        """Per-element losses before weight, class sum, ``loss_weight`` and reduction, and the mask of valid ones."""
        with torch.autocast(pred.device.type, enabled=False):
            pred, target, valid = self.prepare(float32(pred), target)
            return self.compute(pred, target, valid, weight), valid

    def normalizer(self, avg_factor, loss, valid, weight, reduction):
        """The avg_factor to use; a loss with a normaliser of its own overrides this."""
        return avg_factor

    def weigh(self, loss, weight, valid):
        """Per-element losses times their weights; zero where they are not valid."""
        return apply_weight(apply_weight(loss, weight), valid)

    def leading(self, pred):
        """How many dimensions of ``pred`` count rows."""
        return pred.dim() - 1

    def look(self, target):
        """A look at the target of a call before it is run."""

    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        """Compute the loss; see :func:`detloss_plugins.reduction.reduce` for ``weight`` and ``avg_factor``.

        Returns:
            A float32 (or float64) scalar, or the per-element losses for ``reduction="none"``.
        """
        return self._run(pred, target, weight, avg_factor, reduction_override)

    def _run(self, pred, target, weight, avg_factor, reduction_override, **extra):
        """``total``, in the fastest way; what a ``forward`` with more arguments calls."""
        reduction = check_reduction(self.reduction if reduction_override is None else reduction_override)
        self.look(target)
        return run(self, pred, target, weight, avg_factor, reduction, **extra)

    def total(self, pred, target, weight, avg_factor, reduction):
        """The loss as it is written: weighed and reduced."""
        loss, valid = self.elements(pred, target, weight)
        avg_factor = self.normalizer(avg_factor, loss, valid, weight, reduction)
        count = None if self.sums_classes else loss.numel()
        # Rows are added up before they are weighed, if they can be: there is less to weigh.
        rows_first = (self.sums_classes or reduction != "none") and of_rows(loss, weight, valid)
        loss = self.weigh(loss.sum(-1) if rows_first else loss, weight, valid)
        if self.sums_classes and not rows_first:
            loss = loss.sum(-1)
        value = reduce(loss, None, avg_factor, reduction, count)
        return value if self.loss_weight == 1 else self.loss_weight * value


def average_state(loss):
    """Average the state of a loss on positives over the ranks; to be called in every step on every rank.

    The loss itself cannot: a head may not call it on a rank without positives, and the others would wait for ever.
    """
    for buffer in loss.buffers():
        buffer.copy_(rank_mean(buffer))


def rank_mean(tensor):
    """The mean of a tensor over the ranks of a distributed run; the tensor itself in a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def check_same_shape(pred, target, what):
    """Raise ``ValueError`` if the two shapes differ."""
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} must both be {what}.")


def check_use_sigmoid(loss, given):
    """Raise ``ValueError`` if a config's ``use_sigmoid`` is not what the loss's other settings make it."""
    if given not in (None, loss.use_sigmoid):
        raise ValueError(
            f"use_sigmoid={given} of {type(loss).__name__} does not fit its other settings, which are those of a loss "
            f"with use_sigmoid={loss.use_sigmoid}."
        )


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
        if self.unchecked and target.numel() and target.shape[-1] == 4 and not torch.compiler.is_compiling():
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

    def __init__(self, *, use_sigmoid=True, **kwargs):
        if self.sigmoid_only and not use_sigmoid:
            raise ValueError(f"{type(self).__name__} has a sigmoid form only; write use_sigmoid=True.")
        super().__init__(**kwargs)
        self.use_sigmoid = use_sigmoid

    def prepare(self, pred, target):
        return pred, *self.dense(pred, target)

    @classmethod
    def dense(cls, pred, target):
        """The dense form of a target of any form, and the mask of its valid rows or None."""
        if isinstance(target, (tuple, list)):
            label, quality = target
            return cls.one_hot(pred, label, quality.to(pred.dtype))
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
        if torch.compiler.is_compiling():  # which makes no tensor of it
            channel = label.unsqueeze(-1) == torch.arange(pred.shape[-1], device=label.device)
            return torch.where(channel, value.unsqueeze(-1), 0), label >= 0
        last = pred.shape[-1] - 1
        value = torch.where((label >= 0) & (label <= last), value, torch.zeros_like(value))
        empty = torch.zeros(pred.shape, dtype=value.dtype, device=pred.device)
        return empty.scatter_(-1, label.clamp(0, last).long().unsqueeze(-1), value.unsqueeze(-1)), label >= 0

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
