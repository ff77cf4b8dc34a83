"""The one forward of every loss, and what a class can state about itself."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from detloss_plugins.execution import compiling, float32, run, without_autocast
from detloss_plugins.reduction import AVG_FACTOR_EPS, apply_weight, check_reduction, of_rows, reduce


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
    surveys: ClassVar[bool] = False  # that holds once ``survey`` has seen the batch; set below
    keeps_little: ClassVar[bool] = False  # True: for its backward, so that to run it in parts gains nothing
    larger_parts: ClassVar[int] = 1  # how many times: the less is worked with on the way, the more rows fit a cache
    aside: ClassVar[tuple[str, ...]] = ()  # attributes of an instance that change and that ``total`` does not read
    by_columns: ClassVar[bool] = False  # True: pred and target hold a few unlike columns, such as x1, y1, x2, y2
    yolo_gain: ClassVar[float] = 1.0  # default loss_weight in a slot of the Ultralytics adapter
    yolo_prior: ClassVar[float | None] = None  # class score that a new head of theirs starts with; None: as stock
    hyper: ClassVar[tuple[str, ...]] = ()
    allowed: ClassVar[Mapping[str, Rule]] = rules()  # values of hyper-parameters
    # Keyword-only arguments of fn that the class fills in: its state, and "reduction" if fn can reduce by itself.
    inputs: ClassVar[tuple[str, ...]] = ()
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
        cls.surveys = cls.survey is not Loss.survey
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

    def survey(self, pred, target, weight):
        """What the rows of a batch need to know of all of them, ``{name: number}``; it updates the loss's state.

        Given that, the loss of a row depends on that row alone: see ``by_rows``.
        """
        return {}

    def compute(self, pred, target, valid, weight, **seen):
        """Per-element losses of prepared input; ``seen`` is what ``survey`` gave."""
        return self.fn(pred, target, **{**self.settings, **seen})

    def elements(self, pred, target, weight=None, seen=None):
        """Per-element losses before weight, class sum, ``loss_weight`` and reduction, and the mask of valid ones."""
        with without_autocast(pred.device):
            seen = self.survey(pred, target, weight) if seen is None else seen
            pred, target, valid = self.prepare(float32(pred), target)
            return self.compute(pred, target, valid, weight, **seen), valid

    def normalizer(self, avg_factor, loss, valid, weight, reduction, seen=None):
        """The avg_factor to use; a loss with a normaliser of its own overrides this."""
        return avg_factor

    def weigh(self, loss, weight, valid):
        """Per-element losses times their weights; zero where they are not valid."""
        return apply_weight(apply_weight(loss, weight), valid)

    def labels_apart(self, pred, target, weight):
        """The :class:`Labels` of a target, if all other channels can then be given the target 0; else None."""

    def leading(self, pred):
        """How many dimensions of ``pred`` count rows."""
        return pred.dim() - 1

    def compiles(self, device):
        """Whether ``compile=True`` has a meaning on a device."""
        return not self.counts_positives

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

    def total(self, pred, target, weight, avg_factor, reduction, seen=None):
        """The loss as it is written: weighed and reduced. ``seen`` is what ``survey`` gave, if it has been called."""
        value = self._reduced(pred, target, weight, avg_factor, reduction)
        if value is not None:
            return value if self.loss_weight == 1 else self.loss_weight * value
        seen = self.survey(pred, target, weight) if seen is None else seen
        loss, valid = self.elements(pred, target, weight, seen)
        avg_factor = self.normalizer(avg_factor, loss, valid, weight, reduction, seen)
        count = loss.numel() // max(loss.shape[-1], 1) if self.sums_classes else loss.numel()
        # Rows are added up before they are weighed, if they can be: there is less to weigh.
        rows_first = (self.sums_classes or reduction != "none") and of_rows(loss, weight, valid)
        loss = self.weigh(loss.sum(-1) if rows_first else loss, weight, valid)
        if self.sums_classes and reduction == "none" and not rows_first:
            loss = loss.sum(-1)
        value = reduce(loss, None, avg_factor, reduction, count)
        return value if self.loss_weight == 1 else self.loss_weight * value

    def reduces(self, pred, target, weight, reduction):
        """Whether an operator of torch's may give the reduced loss, which keeps little for the backward."""
        return "reduction" in self.inputs and weight is None and reduction != "none" and torch.is_tensor(target)

    def _reduced(self, pred, target, weight, avg_factor, reduction):
        """The loss by an operator that reduces too, where there is one and nothing is in its way; else None."""
        if compiling() or not self.reduces(pred, target, weight, reduction):
            return None  # a compiled sum is taken in float64
        if not pred.numel() or (avg_factor is not None and reduction == "sum"):
            return None  # the latter is a mistake, which "reduce" tells
        with without_autocast(pred.device):
            pred, target, valid = self.prepare(float32(pred), target)
            if valid is not None:
                return None
            if avg_factor is None:
                return self.fn(pred, target, **self.settings, reduction=reduction)
            return self.fn(pred, target, **self.settings, reduction="sum") / (avg_factor + AVG_FACTOR_EPS)


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


def check_use_sigmoid(loss, given):
    """Raise ``ValueError`` if a config's ``use_sigmoid`` is not what the loss's other settings make it."""
    if given not in (None, loss.use_sigmoid):
        raise ValueError(
            f"use_sigmoid={given} of {type(loss).__name__} does not fit its other settings, which are those of a loss "
            f"with use_sigmoid={loss.use_sigmoid}."
        )
