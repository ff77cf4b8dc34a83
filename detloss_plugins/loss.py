"""The one forward of every loss."""

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from detloss_plugins import engine
from detloss_plugins.facts import Facts, NonNegative, Rule, checked, plain, rule_of
from detloss_plugins.nested import each_tensor, flatten, unflatten
from detloss_plugins.precision import COMPILES_FROM, can_compile, float32, is_compiling, is_large, without_autocast
from detloss_plugins.reduction import apply_weight, check_reduction, divisor_of, scaled, times

AUTO = "auto"  # in the place of a weight that is found out when a training starts
_ANY_KIND = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _settings_of(function: Callable, kinds: tuple = (inspect.Parameter.KEYWORD_ONLY,)) -> dict:
    try:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
    except NameError:  # an annotation that only a type checker can read
        parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind in kinds and p.name != "self"}


class _Checked(type):  # of nn.Module too the metaclass
    """Checks the settings of all losses in one place, before any ``__init__``, which gets them as plain values."""

    def __call__(cls, *args, **settings):
        for name in settings:
            if name not in cls.rules:
                accepted = ", ".join(sorted(cls.rules))
                raise TypeError(f"{cls.__name__} has no hyper-parameter {name!r}; it accepts {accepted}.")
        if isinstance(weight := settings.get("loss_weight"), str) and weight == AUTO:
            raise ValueError(
                f'loss_weight="{AUTO}" of {cls.__name__} has no meaning here: it is for trainings with Ultralytics by '
                "make_trainer, there for the loss of a slot or each loss of a ScheduledLoss; detloss calibrate finds a "
                "number."
            )
        settings = {name: checked(cls.__name__, name, value, cls.rules[name]) for name, value in settings.items()}
        return super().__call__(*args, **settings)


class Loss(nn.Module, metaclass=_Checked):
    """What every loss shares: settings, float32 inside, weight, avg_factor and reduction.

    A subclass states ``fn(pred, target, *, settings) -> per-element losses`` and its facts as keywords of its class
    statement, ``class MyLoss(BoxLoss, fn=my_loss, row_wise=True)``, or as the attributes ``fn`` (a staticmethod) and
    ``facts``. The keyword-only arguments of ``fn`` and the arguments of ``__init__`` are the settings; what they are
    annotated with (see :mod:`detloss_plugins.facts`) is what they may be. They become attributes of the module.

    Args:
        reduction: "none", "mean" or "sum".
        loss_weight: factor on the result, at least 0.
        compile: run "mean" and "sum" as one kernel of ``torch.compile``; the attribute is ``compiled``. Where the
            compiler fails or torch is older than 2.4, a warning says so and the loss runs uncompiled, as one does whose
            shapes depend on the number of positives.

    Raises:
        TypeError: for an unknown setting (the message lists the accepted ones), or one of a wrong type.
        ValueError: for a value that a setting cannot have.
    """

    fn: ClassVar[Callable]
    __signature__: ClassVar[inspect.Signature]  # of the settings
    facts: Facts = Facts()  # an instance made of other losses has facts of its own
    hyper: ClassVar[tuple[str, ...]] = ()  # the settings that fn takes
    rules: ClassVar[Mapping[str, Rule | None]] = {}  # of all settings
    outside_kernel: ClassVar[frozenset] = frozenset({"reduction", "loss_weight", "compile"})  # settings that it has not
    couples = False  # whether what it observes carries a gradient, which is added to that of the rows
    can_be_part: ClassVar[bool] = True  # of a loss that is made of others
    seen_as: ClassVar[Callable | None] = None  # of a loss's type, the class that isinstance is told: set by adapters

    def __init_subclass__(cls, *, fn: Callable | None = None, **facts: Any) -> None:
        super().__init_subclass__()
        if fn is not None:
            cls.fn = staticmethod(fn)
        if "facts" not in vars(cls):  # what the class changes besides is not known
            facts = {"row_wise": False, "upstream": (), **facts}
        cls.facts = cls.facts.but(**facts)
        parameters = {}
        if hasattr(cls, "fn"):
            parameters = {k: v for k, v in _settings_of(cls.fn).items() if k not in cls.facts.filled}
            cls.hyper = tuple(parameters)
        for base in reversed(cls.__mro__):  # a subclass's default wins
            if "__init__" in vars(base):
                parameters.update(_settings_of(vars(base)["__init__"], _ANY_KIND))
        settings = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters.values()]
        cls.__signature__ = inspect.Signature(settings)
        cls.rules = {p.name: rule_of(p.annotation, p.default) for p in settings}

    def __init__(
        self, *, reduction: str = "mean", loss_weight: NonNegative = 1.0, compile: bool = False, **hyper: Any
    ) -> None:
        super().__init__()
        self.facts = self.facts  # as torch 2.4 compiles no model that reads an object of a class
        self.unchecked = 20  # calls in which ``check`` still looks at the values, for which the host waits for a GPU
        self.reduction = check_reduction(reduction)
        self.loss_weight, self.compiled = loss_weight, bool(compile) and can_compile()
        if compile and not self.compiled and not self.facts.counts_positives:
            warnings.warn(
                f"{type(self).__name__} runs uncompiled: compile=True needs torch {COMPILES_FROM} or newer, "
                f"and this is {torch.__version__}.",
                stacklevel=2,
            )
        for name in self.hyper:
            setattr(self, name, hyper.get(name, inspect.signature(type(self)).parameters[name].default))

    @classmethod
    def make(cls, **settings: Any) -> "Loss":
        """A valid instance, on the input that ``sample`` gives: the defaults, or those of ``facts.example``."""
        return cls(**{**cls.facts.example, **settings})

    @property
    def family(self) -> str:
        """What pred and target look like; see :mod:`detloss_plugins.families`."""
        return self.facts.family

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of ``fn`` as they are now."""
        return {name: getattr(self, name) for name in self.hyper}

    def extra_repr(self) -> str:
        """The settings that differ from the defaults."""
        changed = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = self.compiled if name == "compile" else getattr(self, name, parameter.default)  # a module's method
            if isinstance(value, Tensor) or (not isinstance(value, nn.Module) and value != parameter.default):
                changed.append(f"{name}={value!r}")
        return ", ".join(changed)

    @property  # type: ignore[misc]
    def __class__(self):
        """What ``isinstance`` asks for where the type is not the answer; see ``seen_as``."""
        return type(self) if Loss.seen_as is None else Loss.seen_as(self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, plain(value) if name in type(self).rules else value)

    def _get_name(self):
        return type(self).__name__  # in repr

    def __reduce__(self):
        return _blank, (type(self),), vars(self)

    # What a family or a loss may state.

    def arranged(self, pred: Tensor, target: Any, weight: Tensor | None) -> tuple[Tensor, Any, Tensor | None]:
        """The input of a call in the form that the rest takes."""
        return pred, target, weight

    def prepare(self, pred: Tensor, target: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Some rows in the form that ``fn`` takes: pred, target, and a mask of the valid rows or elements, or None."""
        return pred, target.to(pred.dtype), None

    def without_ignored(self, pred: Tensor, target: Any) -> Any:
        """A target in which what is ignored is negative, of a class loss that has another sign for it."""
        return target

    def leading(self, pred: Tensor) -> int:
        """How many dimensions of ``pred`` count rows."""
        return pred.dim() - 1

    def look(self, pred: Any, target: Any) -> None:
        """A look at the input of a call before it is run."""
        several = isinstance(target, (tuple, list))
        parts = target if several else (target,)
        if not all(part is None or isinstance(part, Tensor) for part in parts) or target is None:
            raise TypeError(
                f"The target of {type(self).__name__} must be a tensor, or a tuple of some, not {target!r}."
            )
        if several and not self.facts.takes_pairs:
            raise ValueError(
                f"The target of {type(self).__name__} must be one tensor, not a tuple: a pair, (label, quality), has a "
                "meaning for class losses with use_sigmoid=True."
            )
        if several and (len(parts) != 2 or parts[0] is None):
            raise ValueError(f"The target of {type(self).__name__} must be a tensor or a pair, not {len(parts)} parts.")
        if self.unchecked and isinstance(pred, Tensor) and pred.numel() and not is_compiling():
            self.unchecked -= 1
            with contextlib.suppress(RuntimeError):  # torch.vmap and the meta device have no values to look at
                self.check(pred, target)

    def check(self, pred: Tensor, target: Any) -> None:
        """Raise ``ValueError`` for a target, not empty, whose values are not of the family's kind."""

    @property
    def observes(self) -> bool:
        """Whether the batch is looked at now, by ``statistics``."""
        return False

    def statistics(
        self, pred: Tensor, target: Tensor, valid: Tensor | None, weight: Tensor | None
    ) -> dict[str, Tensor]:
        """Sums over some prepared rows, by name."""
        raise TypeError(f"{type(self).__name__} observes the batch, but has no method statistics.")

    def summarise(self, sums: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """What ``fn`` gets of the sums over the batch, by argument: the sums; they are None if nothing was observed.

        A loss with state moves it here if it is ``learning``.
        """
        return sums or {}

    def elements(self, pred: Tensor, target: Tensor, seen: dict[str, Any]) -> Tensor:
        """Per-element losses of prepared rows; ``seen`` is what ``observe`` gave."""
        return self.fn(pred, target, **{**self.settings, **seen})

    def weigh(self, loss: Tensor, valid: Tensor | None, weight: Tensor | None) -> Tensor:
        """Per-element losses times weight and mask, summed over the classes if that is the loss's way."""
        summed = not self.facts.sums_classes
        factors = weight, valid
        if weight is not None and valid is not None and weight.dim() < valid.dim():
            factors = valid, weight  # what is of classes first, as there are none after the sum
        for factor in factors:
            if not summed and factor is not None and factor.dim() < loss.dim():
                loss, summed = loss.sum(-1), True  # there is less to weigh
            loss = apply_weight(loss, factor)
        return loss if summed else loss.sum(-1)

    def normalizer(self, count: int, seen: dict[str, Any]) -> Tensor | int:
        """What "mean" divides by if not by ``avg_factor``; ``count`` is the number of per-element losses."""
        return count

    def compiles(self, device: torch.device) -> bool:
        """Whether ``compile=True`` has a meaning on a device."""
        return not self.facts.counts_positives

    # What is the same for all.

    @property
    def learning(self) -> bool:
        """Whether a loss with state may move it: in training mode, and not while gradients are off (validation)."""
        return self.training and torch.is_grad_enabled()

    def observe(self, pred: Tensor, target: Any, weight: Tensor | None) -> dict[str, Any]:
        """What a row needs to know of the whole batch; it moves the state of a loss that has one."""
        return self.summarise(self.sums(pred, target, weight) if self.observes else None)

    def sums(self, pred: Tensor, target: Any, weight: Tensor | None) -> dict[str, Tensor]:
        """The ``statistics`` of all rows."""

        def of_rows(pred, target, weight, _):
            pred, target, valid = self.prepare(float32(pred.detach()), target)
            return self.statistics(pred, target, valid, weight)

        with torch.no_grad():
            found = self._call(of_rows, pred, target, weight, {}).of_each_chunk()
        return {name: sum(of_chunk[name] for of_chunk in found) for name in found[0]}

    def unweighted(self, pred: Tensor, target: Any, seen: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Per-element losses of some rows before weight, class sum and reduction, and the mask of the valid ones."""
        pred, target, valid = self.prepare(float32(pred), target)
        return self.elements(pred, target, seen), valid

    def weighted(self, pred: Tensor, target: Any, weight: Tensor | None, seen: dict[str, Any]) -> Tensor:
        """What is summed up: the per-element losses of some rows times their weights."""
        return self.weigh(*self.unweighted(pred, target, seen), weight)

    def forward(
        self,
        pred: Tensor,
        target: Any,
        weight: Tensor | None = None,
        avg_factor: Tensor | float | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            pred, target: as the class says.
            weight: one for each element or row; see :func:`detloss_plugins.reduction.apply_weight`.
            avg_factor: for "mean", what the sum is divided by in place of the number of elements.
            reduction_override: in place of ``reduction``.

        Returns:
            A float32 (or float64) scalar, or the per-element losses for "none".
        """
        pred, target, weight = self.arranged(pred, target, self.tensor_or_none(weight))
        return self.reduced(pred, target, weight, avg_factor, reduction_override, self.loss_weight)

    def reduced(
        self,
        pred: Tensor,
        target: Any,
        weight: Tensor | None,
        avg_factor: Tensor | float | None,
        reduction: str | None,
        factor: Tensor | float,
    ) -> Tensor:
        """The loss times a factor."""
        reduction = check_reduction(self.reduction if reduction is None else reduction, avg_factor)
        pred = self.added_up(pred)
        self.look(pred, target)
        shape, given = pred.shape[: self.leading(pred)], pred.dim()
        with without_autocast(pred.device):
            pred, target, weight = self.as_rows(pred, target, weight)
            seen = self.observe(pred, target, weight)
            if reduction == "none":
                call = self._call(self.weighted, pred, target, weight, seen)
                # The backward of a chunk would be as long as the batch.
                whole = torch.is_grad_enabled() and call.learned()
                found = [call.losses()] if whole else call.of_each_chunk()
                loss = torch.cat(found) if len(found) > 1 else found[0]
                loss = loss.unflatten(0, shape) if pred.dim() < given else loss
                return times(loss, factor)
            return self.summed(pred, target, weight, seen, self.divisor(pred, seen, avg_factor, reduction), factor)

    def added_up(self, pred: Tensor) -> Tensor:
        """What gets several gradients, which are not to be added up in half precision."""
        return float32(pred) if self.couples else pred

    def summed(
        self,
        pred: Tensor,
        target: Any,
        weight: Tensor | None,
        seen: dict[str, Any],
        divisor: Tensor | float | None = None,
        factor: Tensor | float = 1.0,
    ) -> Tensor:
        """The sum of the weighted losses, scaled, by the engine where chunks or a kernel gain something."""
        if not self.compiled and (self.facts.keeps_little or not is_large(pred)):
            return scaled(self.weighted(pred, target, weight, seen).sum(), divisor, factor)
        call = self._call(self.weighted, pred, target, weight, seen)
        if call.kernel and not isinstance(divisor, Tensor) and not isinstance(factor, Tensor):  # its kernel scales it
            return engine.weighted_sum(call._replace(factor=factor if divisor is None else factor / divisor))
        return scaled(engine.weighted_sum(call), divisor, factor)

    def divisor(
        self, pred: Tensor, seen: dict[str, Any], avg_factor: Tensor | float | None, reduction: str
    ) -> Tensor | float | None:
        """What the sum over the rows of ``pred`` is divided by; None for "sum"."""
        one_per_row = self.facts.one_per_row or self.facts.sums_classes
        count = pred.shape[: self.leading(pred)].numel() if one_per_row else pred.numel()
        avg_factor = None if self.facts.self_normalized else avg_factor
        return divisor_of(self.normalizer(max(count, 1), seen), avg_factor, reduction)

    def as_rows(self, pred: Tensor, target: Any, weight: Tensor | None) -> tuple[Tensor, Any, Tensor | None]:
        """The same with one leading dimension, the rows, if the loss is row-wise and the shapes fit."""
        leading = self.leading(pred)
        if leading < 2:
            return pred, target, weight
        shape = pred.shape[:leading]
        if weight is not None and weight.dim() < leading and weight.shape == shape[: weight.dim()]:
            weight = weight.reshape(*weight.shape, *[1] * (leading - weight.dim())).expand(shape)
        fit = all(x.shape[:leading] == shape for x in flatten((target, weight))[0])
        if not fit or not self.facts.row_wise:
            return pred, target, weight
        return each_tensor(lambda x: x.flatten(0, leading - 1), (pred, target, weight))

    def _call(self, function: Callable, pred: Tensor, target: Any, weight: Tensor | None, seen: dict) -> engine.Call:
        rows, of_rows = flatten((pred, target, weight))
        shared, of_shared = flatten(seen)
        count = len(rows)  # what is made below must not keep the tensors themselves

        def on_flat(function):
            return lambda *flat: function(*unflatten(of_rows, flat), unflatten(of_shared, flat[count:]))

        row_wise = self.facts.row_wise and all(x.shape[:1] == pred.shape[:1] != () for x in rows) and not self.learns()
        kernel = None
        if self.compiled and row_wise and self.compiles(pred.device) and not is_compiling():
            with contextlib.suppress(TypeError):
                name = function.__name__
                key = name, self.blueprint(), of_rows, of_shared
                kernel = key, lambda: on_flat(getattr(copy.deepcopy(self), name)), type(self).__name__
        return engine.Call(on_flat(function), tuple(rows), tuple(shared), row_wise, kernel)

    def tensor_or_none(self, weight: Any) -> Tensor | None:
        """The weight of a call; ``TypeError`` if it is anything else."""
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"The weight of {type(self).__name__} must be a tensor or None, not {weight!r}.")
        return weight

    def learns(self) -> bool:
        """Whether the loss itself has something to learn, which then gets its gradient from autograd."""
        return any(x.requires_grad for x in (*self.parameters(), *flatten(self.settings)[0]))

    def blueprint(self) -> Hashable:
        """What is equal for losses whose rows have equal losses: the type and its settings.

        Raises:
            TypeError: for a tensor among them, which may change in place.
        """
        names = sorted(self.rules.keys() - self.outside_kernel)
        return type(self), self.fn, tuple((name, _hashable(getattr(self, name, None))) for name in names)


def _blank(cls):
    """An instance of a loss class without attributes, for copies and pickles."""
    return cls.__new__(cls)


def _hashable(value):
    if isinstance(value, Loss):
        value = value.blueprint(), value.loss_weight
    if isinstance(value, dict):
        value = sorted(value.items())
    if isinstance(value, (list, tuple, nn.ModuleList)):
        return tuple(map(_hashable, value))
    if isinstance(value, Tensor):
        raise TypeError("a tensor may change in place")
    hash(value)
    return value


def average_state(loss: nn.Module) -> None:
    """Average the state of a loss on positives over the ranks; to be called in every step on every rank.

    The loss itself cannot: a head may not call it on a rank without positives, and the others would wait for ever.
    """
    for buffer in loss.buffers():
        buffer.copy_(rank_mean(buffer))


def rank_mean(tensor: Tensor, every_rank: bool = True) -> Tensor:
    """The mean of a tensor over the ranks of a distributed run.

    The tensor itself in a single process, or if not ``every_rank`` gets here.
    """
    if not (every_rank and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def takes_probabilities(loss: nn.Module) -> bool:
    """Whether a loss, or one that it is made of, takes probabilities in the place of logits."""
    return any(getattr(part, "activated", False) or not getattr(part, "activate", True) for part in loss.modules())


def check_use_sigmoid(loss: Loss, given: bool | None) -> None:
    """Raise ``ValueError`` if a config's ``use_sigmoid`` is not what the loss's other settings make it."""
    if given not in (None, loss.use_sigmoid):
        raise ValueError(
            f"use_sigmoid={given} of {type(loss).__name__} does not fit its other settings, which are those of a loss "
            f"with use_sigmoid={loss.use_sigmoid}."
        )
