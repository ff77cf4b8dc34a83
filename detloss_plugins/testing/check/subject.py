"""What a check is: a function of a loss class under some settings, and what such functions share."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from detloss_plugins import precision
from detloss_plugins.facts import Facts
from detloss_plugins.loss import Loss, takes_probabilities
from detloss_plugins.nested import each_tensor, flatten
from detloss_plugins.reduction import REDUCTIONS
from detloss_plugins.testing.samples import sample
from detloss_plugins.testing.twins import in_words

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALF)
PLACES = {torch.float64: 1e-10, torch.float32: 1e-5}  # how far two are equal, of the largest number; see `same`
NONE, MEAN, SUM = ({"reduction_override": reduction} for reduction in REDUCTIONS)
CHECKS: list[Callable] = []


@dataclasses.dataclass(frozen=True)
class Subject:
    """A loss class under some settings."""

    cls: type[Loss]
    settings: Mapping = dataclasses.field(default_factory=dict)
    device: str = "cpu"
    compile: bool = False  # whether the compiler is to be tried

    def __str__(self) -> str:
        return self.cls.__name__ + (f"({in_words(self.settings)})" if self.settings else "")

    def make(self, **more: Any) -> Loss:
        """An instance whose state does not move, so that each call gives the same."""
        return self.cls.make(**{**self.settings, **more}).to(self.device).eval()

    def input(self, n: int = 32, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Any]:
        """``pred``, a leaf with a gradient, and ``target``, in a form that the loss takes."""
        loss = self.make()
        pred, target = self.moved(sample(loss, n, seed, dtype))
        if loss.family == "classification" and not loss.use_sigmoid and target.shape == pred.shape:
            target = target.argmax(-1)
        return self.activated(pred).requires_grad_(), target

    def activated(self, pred: Tensor) -> Tensor:
        """Logits, as probabilities where the loss takes those."""
        return pred.sigmoid() if takes_probabilities(self.make()) else pred

    def forms(self, n: int, dtype: torch.dtype) -> list[tuple[Tensor, Any]]:
        """The input with each form of target that a loss of its family takes."""
        pred, target = self.input(n, dtype)
        if self.make().family != "classification" or target.shape != pred.shape:
            return [(pred, target)]
        quality, label = target.max(-1)
        label = label.where(quality > 0, pred.shape[-1])  # the background
        label[3] = -1  # ignored
        return [(pred, target), (pred, label), (pred, (label, quality))]

    def random(self, *shape: int) -> Tensor:
        """Numbers in [0, 1), such as weights."""
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def moved(self, x: Any) -> Any:
        """Tensors on the device."""
        return each_tensor(lambda x: x.to(self.device), x)

    def ways(self) -> list[contextlib.AbstractContextManager]:
        """To run a loss: all rows at once, or in chunks of a few."""
        return [contextlib.nullcontext(), small_chunks(self.device)]


def subjects(cls: type[Loss], **options: Any) -> list[Subject]:
    """The class under its defaults, and under each settings that its facts state."""
    found = [{}]
    for upstream in cls.facts.upstream:
        found += [dict(upstream.ours)] if upstream.ours not in found else []
    return [Subject(cls, settings, **options) for settings in found]


def promise(fix: str, only: Callable[[Facts], Any] = lambda facts: True) -> Callable:
    """Register a check of a :class:`Subject`: whatever it raises becomes one sentence, which ends in how to fix it.

    It says something of those classes alone for whose facts ``only`` is true.
    """

    def register(function):
        name = function.__name__.replace("_", " ")

        @functools.wraps(function)
        def check(cls, *, device="cpu", compile=False, **settings):
            options = {"device": device, "compile": compile}
            for subject in [Subject(cls, settings, **options)] if settings else subjects(cls, **options):
                try:
                    function(subject)
                except Exception as error:
                    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                    what = " ".join(f"{kind}{error}".split()).rstrip(".")
                    raise AssertionError(f'{subject} breaks the promise "{name}": {what}; {fix}.') from error

        check.applies = only
        CHECKS.append(check)
        return check

    return register


def same(found: Any, expected: Any, words: str, exact: bool = False) -> None:
    """Raise ``AssertionError`` with ``words`` unless tensors are equal, but for rounding if not ``exact``."""
    for a, b in zip(flatten(found)[0], flatten(expected)[0], strict=True):
        require(a.shape == b.shape, f"{words}, but the shapes are {tuple(a.shape)} and {tuple(b.shape)}")
        x, y = a.detach().double(), b.detach().double()
        gap = (x - y).abs().masked_fill((x == y) | (x.isnan() & y.isnan()), 0)
        if gap.numel():
            bound = 0.0 if exact else PLACES.get(b.dtype, 1e-2) * y.nan_to_num(0, 0, 0).abs().max()
            require((gap <= bound).all(), f"{words}, but they differ by up to {gap.max().item():.2g}")


def require(holds: Any, words: str) -> None:
    """Raise ``AssertionError`` with ``words`` unless something holds."""
    if not bool(holds):
        raise AssertionError(words)


def refuses(kinds: Any, name: str, call: Callable, **given: Any) -> None:
    """Require an exception whose message has ``name`` in it."""
    try:
        call(**given)
    except kinds as error:
        return require(name in str(error), f'the error for {in_words(given)} must name "{name}", but says "{error}"')
    raise AssertionError(f"{in_words(given)} must be refused")


def both(call: Callable, pred: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    value = call(pred, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value.sum(), pred)[0]


def rows_of(x: Any, rows: Any) -> Any:
    """Some rows of each tensor."""
    return each_tensor(lambda x: x[rows], x)


def cast(x: Any, dtype: torch.dtype) -> Any:
    """The tensors of floating point in another type."""
    return each_tensor(lambda x: x.detach().to(dtype) if x.is_floating_point() else x, x)


@contextlib.contextmanager
def small_chunks(device: str, elements: int = 16) -> Iterator[None]:
    """While chunks are so small that a few rows take several."""
    with mock.patch.dict(precision.CHUNK, {torch.device(device).type: elements}):
        yield


def on_the_whole(loss: Loss) -> Loss:
    """A copy that is run on the whole batch, in plain operators."""
    loss = copy.deepcopy(loss)
    for part in loss.modules():
        if isinstance(part, Loss):
            part.facts, part.compiled = part.facts.but(row_wise=False), False
    return loss


def linear(loss: Loss) -> Callable:
    """What is weighed and summed up: the square of a loss that is the root of that."""
    return (lambda *args, **kwargs: loss(*args, **kwargs) ** 2) if loss.facts.root else loss
