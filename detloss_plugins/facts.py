"""What a loss class states about itself, and what its settings may be."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import torch


class Upstream(NamedTuple):
    """An upstream counterpart of a loss: where it is, and the settings under which the two are the same loss."""

    path: str  # dotted path of a class or function
    ours: Mapping = {}  # settings of ours, and of theirs
    theirs: Mapping = {}
    differs: str = ""  # why the two are *not* the same loss although they share a name; empty: they must agree
    at: tuple = ()  # the boxes (pred, target), in float32, on which they differ; empty: on any


ARXIV = "https://arxiv.org/abs/"  # where most papers are
MMDET, TORCH = "mmdet.models.losses.", "torch.nn.functional."  # and most counterparts


def alike(path: str, *settings: Mapping, differs: str = "") -> tuple[Upstream, ...]:
    """A counterpart with each of some settings that both sides have by the same name; without any, as it is."""
    return tuple(Upstream(path, same, same, differs) for same in settings or ({},))


def alike_except(path: str, differs: str, at: tuple, ours: Mapping = {}, theirs: Mapping = {}) -> tuple[Upstream, ...]:
    """A counterpart that is the same loss but on the boxes ``at``, and why."""
    return Upstream(path, ours, theirs), Upstream(path, ours, theirs, differs, at)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of every instance of a loss class; a class states what differs from its family's facts.

    >>> Facts(family="box").but(bounds=(0.0, 2.0)).bounds
    (0.0, 2.0)
    """

    family: str = ""
    paper: str = ""  # link
    upstream: tuple[Upstream, ...] = ()
    # Settings that suit the family's sample where the defaults do not.
    example: Mapping = dataclasses.field(default_factory=dict)
    filled: tuple[str, ...] = ()  # keyword-only arguments of fn that the class gives it, which are no settings
    bounds: tuple[float, float] = (0.0, math.inf)  # of a per-element loss, on valid input
    true_gradient: bool = True  # False: a factor is detached, so finite differences disagree by design
    # How it is run. A class that does not state row_wise itself is run on the whole batch: slower, and right.
    row_wise: bool = False  # the loss of a row depends on that row, the settings and the batch statistics alone
    keeps_little: bool = False  # its operators do so for their backward, so that chunks gain nothing
    counts_positives: bool = False  # their number decides shapes, so the host waits for the device
    # How it is reduced.
    one_per_row: bool = True  # one loss a row of pred; False: one an element
    sums_classes: bool = False  # the per-element losses are summed over the classes
    self_normalized: bool = False  # "mean" has a normaliser of its own, whatever avg_factor says
    mean_of_rows: bool = True  # "mean" is the mean of what "none" gives
    root: bool = False  # "sum" and "mean" are roots of those of the squares of what "none" gives
    # Where it is used.
    every_rank: bool = False  # called in every step on every rank of a distributed run
    needs_mining: bool = False  # the many easy negatives of a dense detector would drown its positives
    takes_pairs: bool = False  # its target may be a pair of tensors, such as (label, quality)
    takes_quality: bool = False  # its target for a positive is a quality, such as an IoU
    marks_positives: bool = False  # a target above 0, however small, makes a positive, so that none can be smoothed
    # Of a loss between boxes.
    minimum: float = 0.0  # of identical boxes
    symmetric: bool = True  # in pred and target
    scale_invariant: bool = True
    attracts: bool = False  # falls as a disjoint box of the target's size comes nearer

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"bounds must be two increasing numbers, not {self.bounds}.")
        if self.paper and not self.paper.startswith("https://"):
            raise ValueError(f"paper must be a link that starts with https://, not {self.paper!r}.")
        if not all(isinstance(upstream, Upstream) for upstream in self.upstream):
            raise TypeError("upstream must be a tuple of Upstream.")

    def but(self, **changes: Any) -> "Facts":
        """These facts with some of them changed; ``TypeError`` for a fact that there is not."""
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(changes.keys() - known):
            raise TypeError(f"A loss class states fn and the facts {', '.join(known)}, not {', '.join(unknown)}.")
        return dataclasses.replace(self, **changes)


class Rule(NamedTuple):
    """Which values a setting may have."""

    words: str  # completes "must be"
    holds: Callable[[Any], bool]
    kinds: tuple[type, ...] = (int, float, torch.Tensor)  # of another type, a value is a TypeError


def is_number(value: Any) -> bool:
    """Whether a value is one finite number."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and bool(value.isfinite())
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(words: str, holds: Callable[[Any], bool] = lambda value: True) -> Rule:
    return Rule(words, lambda value: is_number(value) and bool(holds(value)))


def at_least(low: float) -> Rule:
    """Numbers from ``low`` on."""
    return _numbers(f"a number of at least {low}", lambda value: value >= low)


def above(low: float) -> Rule:
    """Numbers greater than ``low``."""
    return _numbers(f"a number above {low}", lambda value: value > low)


def between(low: float, high: float, words: str = "") -> Rule:
    """Numbers in ``[low, high]``; ``words`` describe another interval whose ends these are, such as "(0, 1]"."""
    inside = {"(": lambda v: v > low, "[": lambda v: v >= low, ")": lambda v: v < high, "]": lambda v: v <= high}
    words = words or f"[{low}, {high}]"
    return _numbers(f"a number in {words}", lambda value: inside[words[0]](value) and inside[words[-1]](value))


def one_of(*choices: Any) -> Rule:
    """Any of these."""
    named = [f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices]
    words = f"{', '.join(named[:-1])} or {named[-1]}" if len(named) > 1 else named[0]
    return Rule(words, lambda value: value in choices and not isinstance(value, bool), tuple(set(map(type, choices))))


def _any_of(rules: Sequence[Rule]) -> Rule:
    kinds = tuple(kind for rule in rules for kind in rule.kinds)
    words = list(dict.fromkeys(rule.words for rule in rules))
    return Rule(" or ".join(words), lambda value: any(rule.holds(value) for rule in rules), kinds)


def _each(rule: Rule, words: str, fits: Callable[[Any], Any] = len) -> Rule:
    def holds(value):
        return isinstance(value, list | tuple) and all(rule.holds(v) for v in value) and bool(fits(value))

    return Rule(words, holds, (list, tuple))


def _increase(values: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


# Types for the settings of a loss: what a keyword-only argument is annotated with is what it may be.
_NUMBER = _numbers("a number")
Number = Annotated[float, _NUMBER]
Positive = Annotated[float, above(0)]
NonNegative = Annotated[float, at_least(0)]
Share = Annotated[float, between(0, 1)]
Count = Annotated[int, Rule("a whole number above 0", lambda v: type(v) is int and v > 0, (int,))]
NotWeighed = Annotated[None, Rule("None (which is torchvision's -1)", lambda value: value is None, (NoneType,))]
PerClass = Annotated[list, _each(at_least(0), "a list of numbers of at least 0, one a class")]
Increasing = Annotated[list, _each(at_least(0), "increasing numbers of at least 0", _increase)]
Bins = Annotated[tuple, _each(_NUMBER, "increasing numbers, 2 or more", lambda v: len(v) > 1 and _increase(v))]
Interval = Annotated[tuple, _each(_NUMBER, "two increasing numbers", lambda v: len(v) == 2 and v[0] < v[1])]
Size = Annotated[tuple, _each(above(0), "(height, width) of the network's input in pixels", lambda v: len(v) == 2)]
Parts = Annotated[list, Rule("a list of config dicts of losses", lambda v: isinstance(v, list | tuple), (list, tuple))]
SharePerClass = Annotated[list, _each(between(0, 1), "a list of numbers in [0, 1], one a class")]

_OF_TYPES = {
    bool: Rule("True or False", lambda value: isinstance(value, bool), (bool,)),
    NoneType: Rule("None", lambda value: value is None, (NoneType,)),
    int: Rule("a whole number", lambda value: type(value) is int, (int,)),
    float: _NUMBER,
    str: Rule("a string", lambda value: isinstance(value, str), (str,)),
}


def rule_of(annotation: Any, default: Any) -> Rule | None:
    """The rule that an annotation states, or else the type of the default; None if there is neither."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return next(extra for extra in arguments[1:] if isinstance(extra, Rule))
    if origin is Literal:
        return one_of(*arguments)
    if origin in (Union, UnionType):
        rules = [rule for argument in arguments if (rule := rule_of(argument, None)) is not None]
        return _any_of(rules) if len(rules) == len(arguments) else None
    if annotation not in _OF_TYPES and isinstance(default, int | float | str):
        annotation = bool if isinstance(default, bool) else str if isinstance(default, str) else float
    return _OF_TYPES.get(annotation)


def checked(owner: str, name: str, value: Any, rule: Rule | None) -> Any:
    """A setting as a plain value; ``TypeError`` or ``ValueError``, with one sentence, if it breaks its rule."""
    if rule is None:
        return value
    value = plain(value)
    for found in (value, number_in(value)):
        if rule.holds(found):
            return found
    fits = isinstance(value, rule.kinds) and (bool in rule.kinds or not isinstance(value, bool))
    error = ValueError if fits else TypeError
    raise error(f"{name} of {owner} must be {rule.words}, not {value!r}.")


def number_in(value: Any) -> Any:
    """The number that a string such as "1e-3" means, also in a list: in YAML, that is no number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+\.?\d*[eE][-+]?\d+", value):
        number = float(value)
        return int(number) if number.is_integer() else number
    return type(value)(map(number_in, value)) if type(value) in (list, tuple) else value


def plain(value: Any) -> Any:
    """Numbers of numpy and tensors as plain Python values; what is learned stays as it is."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
