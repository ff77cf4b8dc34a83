"""Whether a loss keeps this package's promises: ``check_loss(YourLoss)``, much as scikit-learn's check_estimator."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detloss_plugins import precision
from detloss_plugins.facts import Facts
from detloss_plugins.loss import Loss
from detloss_plugins.nested import each_tensor, flatten
from detloss_plugins.reduction import AVG_FACTOR_EPS, REDUCTIONS
from detloss_plugins.testing import parity
from detloss_plugins.testing.samples import sample
from detloss_plugins.testing.twins import in_words, load

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALF)
PLACES = {torch.float64: 1e-10, torch.float32: 1e-5}  # how far two are equal, of the largest number; see `same`
NONE, MEAN, SUM = ({"reduction_override": reduction} for reduction in REDUCTIONS)
_CHECKS: list[Callable] = []


def check_loss(cls: type[Loss], *, device: str = "cpu", compile: bool = False, **settings: Any) -> None:
    """Check every promise of a loss class, registered or not, on what :func:`~detloss_plugins.testing.sample` gives.

    Args:
        cls: a subclass of :class:`detloss_plugins.loss.Loss`.
        device: where to run it, such as "cuda".
        compile: try the compiler too, which takes up to half a minute.
        settings: of the class. Without any, the default loss is checked, and one for each settings in its facts.

    Raises:
        AssertionError: naming the first promise that does not hold, and how to keep it.
        TypeError: if it is no loss class.

    >>> from detloss_plugins.losses import L1Loss
    >>> check_loss(L1Loss)
    """
    if not (isinstance(cls, type) and issubclass(cls, Loss)):
        raise TypeError(f"check_loss takes a subclass of detloss_plugins.loss.Loss, not {cls!r}.")
    for check in checks(cls):
        check(cls, device=device, compile=compile, **settings)


def checks(cls: type[Loss] | None = None) -> list[Callable]:
    """All checks in their order, or those that say something of a class; each is called as :func:`check_loss` is."""
    return [check for check in _CHECKS if cls is None or check.applies(cls.facts)]


def instances(cls: type[Loss]) -> list[Loss]:
    """The default loss and one for each settings that its facts state, in evaluation mode."""
    return [subject.make() for subject in subjects(cls)]


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
        loss = self.make()
        probabilities = getattr(loss, "activated", False) or not getattr(loss, "activate", True)
        return pred.sigmoid() if probabilities else pred

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
        _CHECKS.append(check)
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


@promise(
    "derive it from a family or give it a method sample(n, seed, dtype), and state fitting settings in facts.example"
)
def usable(s: Subject) -> None:
    """It can be built, and called with what ``sample`` gives."""
    s.make()(*s.input())


@promise("write a docstring with the formula, in this package with an example worked by hand")
def documented(s: Subject) -> None:
    """The function says what it computes, and for a loss of this package shows it on a number."""
    require(s.cls.fn.__doc__, "its function fn has no docstring")
    if s.cls.__module__.startswith("detloss_plugins."):
        require(s.cls.__doc__ and ">>>" in s.cls.fn.__doc__, "it lacks a docstring or a worked number")


@promise("annotate each setting with what it may be, such as detloss_plugins.facts.Positive")
def settings(s: Subject) -> None:
    """A setting that is misspelt, NaN, infinite, of a wrong type or out of its range raises, and the error names it."""
    refuses(TypeError, "misspelt", s.make, misspelt=1)
    for name, rule in s.cls.rules.items():
        require(hasattr(s.make(), name), f"the setting {name} is no attribute")
        if rule is None:
            refuses((TypeError, ValueError), "", s.make, **{name: math.nan})
            continue
        for value in (math.nan, math.inf, -math.inf, None, True, -1, -1e9, 1e9, "no such word", [math.nan], {}):
            if not rule.holds(value):
                refuses((TypeError, ValueError), name, s.make, **{name: value})


@promise("return what Loss.forward gives: a scalar in float32, or in float64 for float64")
def result(s: Subject) -> None:
    """The result is a scalar with a gradient, in float32, or in float64 for such an input."""
    for dtype in (torch.float32, torch.float64):
        value, gradient = both(s.make(), *s.input(dtype=dtype))
        require(value.shape == (), f"the result has the shape {tuple(value.shape)}")
        require(value.dtype == dtype, f"the result for {dtype} is {value.dtype}")
        require(gradient.isfinite().all(), "the gradient is not finite")


@promise("correct the formula, or state other bounds in its facts")
def bounds(s: Subject) -> None:
    """The per-element losses are finite and within the bounds that the facts state."""
    rows = s.make()(*s.input(500, torch.float64), **NONE)
    (low, high), least, most = s.cls.facts.bounds, rows.min().item(), rows.max().item()
    require(rows.isfinite().all(), "a loss is not finite")
    require(least >= low - 1e-12, f"a loss is {least:.6g}, below its bound {low}")
    require(most <= high + 1e-12, f"a loss is {most:.6g}, above its bound {high}")


@promise("use plain operators, which autograd follows")
def incoming_gradient(s: Subject) -> None:
    """The gradient is multiplied by the incoming one, the second time through a graph too."""
    loss, (pred, target) = s.make(), s.input(dtype=torch.float64)
    for way in s.ways():
        with way:
            expected, value = 3 * both(loss, pred, target)[1], 3 * loss(pred, target)
            found = [torch.autograd.grad(value, pred, retain_graph=True)[0] for _ in range(2)]
        same(found, [expected] * 2, "3 times the loss must have 3 times the gradient")


@promise("change no tensor in place that a call is given")
def unmodified_input(s: Subject) -> None:
    """Neither a call nor its backward changes what it is given."""
    for dtype in (torch.float32, torch.float64):
        pred, target = s.input(dtype=dtype)
        given = pred, target, s.random(len(pred)), s.random()
        before = each_tensor(lambda x: x.detach().clone(), given)
        s.make().train()(pred, target, weight=given[2], avg_factor=given[3]).backward()
        same(given, before, "the input must stay as it is", exact=True)


@promise("leave the reduction to Loss.forward")
def reductions(s: Subject) -> None:
    """ "mean" and "sum" are those of "none", ``avg_factor`` divides the sum, and what has no meaning is refused."""
    loss, (pred, target) = s.make(), s.input()
    call = functools.partial(linear(loss), pred, target)
    rows, mean, total = (call(reduction_override=reduction) for reduction in REDUCTIONS)
    same(total, rows.sum(), '"sum" must be the sum of "none"')
    if loss.facts.mean_of_rows:
        same(mean, rows.mean(), '"mean" must be the mean of "none"')
    for factor in (3.0, 0.0, torch.tensor(3.0, device=s.device)):
        expected = mean if loss.facts.self_normalized else total / (factor + AVG_FACTOR_EPS)
        same(call(avg_factor=factor), expected, '"mean" with avg_factor must be sum / (avg_factor + eps)')
    same(call(avg_factor=3.0, **NONE), rows, '"none" must ignore avg_factor')
    for reduction, expected in zip(REDUCTIONS, (rows, mean, total), strict=True):
        built = linear(s.make(reduction=reduction))
        same(built(pred, target), expected, f'a loss built with reduction="{reduction}" must use it')
    refuses(ValueError, "avg_factor", call, avg_factor=3.0, **SUM)
    refuses(ValueError, "reduction", call, reduction_override="average")
    refuses((TypeError, ValueError), "reduction", s.make, reduction="average")


@promise("state row_wise=True only if a row's loss depends on that row, the settings and the statistics alone")
def chunks(s: Subject) -> None:
    """In chunks of a few rows, everything is as on the whole batch: values, all gradients, and the state."""
    loss = s.make().train()
    whole, weight = on_the_whole(loss), s.random(25)
    calls = (NONE, MEAN, SUM, {"weight": weight, "avg_factor": 3.0}, {"weight": weight.unsqueeze(-1)})

    def run(loss, pred, target, kwargs):
        value = loss(pred, target, **kwargs)
        leaves = [x for x in (pred, *flatten(target)[0], *loss.parameters()) if x.requires_grad]
        slopes = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        with torch.no_grad():
            return value, loss(pred, target, **kwargs), [x for x in slopes if x is not None]

    for pred, target in s.forms(25, torch.float64):
        learned = each_tensor(lambda x: x.clone().requires_grad_(x.is_floating_point()), target)
        # A target may want its gradient too.
        for given, kwargs in (*((target, kwargs) for kwargs in calls), (learned, calls[3])):
            expected = run(whole, pred, given, kwargs)
            with small_chunks(s.device):
                found = run(loss, pred, given, kwargs)
            same(found, expected, "chunks must give what the whole batch gives")
    same(list(loss.buffers()), list(whole.buffers()), "the state must move in chunks as on the whole batch")


@promise("leave the weight to Loss.weigh, and take what a row needs of the others from Loss.statistics")
def weights(s: Subject) -> None:
    """A weight a row or an element multiplies, a row of weight 0 might not be there, and other shapes are refused."""
    loss, (pred, target) = s.make(), s.input()
    call, facts, n = linear(loss), loss.facts, len(pred)
    weight = torch.arange(n, device=s.device).float() % 3
    kept = weight > 0
    weight = kept.float() if facts.self_normalized else weight  # where it is a mask
    rows = call(pred[kept], rows_of(target, kept), **NONE)
    if facts.counts_positives:
        expected = rows * weight.unsqueeze(-1).expand_as(target)[(target > 0) & kept.unsqueeze(-1)]
    else:
        expected = rows.new_zeros(n, *rows.shape[1:])
        expected[kept] = rows * weight[kept].reshape(-1, *[1] * (rows.dim() - 1))
    boxes, column = loss.family in ("box", "rotated"), weight.unsqueeze(-1)
    each = [pred] if boxes or facts.sums_classes or facts.counts_positives else [rows] if rows.dim() == 2 else []
    for form in (weight, column, *(column.expand(n, x.shape[-1]) for x in each)):
        found = call(pred, target, weight=form, **NONE)
        same(found, expected, f"a weight {tuple(form.shape)} must multiply, and 0 leave a row out")
        summed = both(lambda x, form=form: call(x, target, weight=form, **NONE).sum(), pred)
        same(both(call, pred, target, weight=form, **SUM), summed, 'the weighted "sum" must be that of "none"')
        nothing = both(loss, pred, target, weight=0 * form)
        require(not any(x.count_nonzero() for x in nothing), "weights of 0 must give 0 and no gradient")
    if (boxes or rows.dim() == 2) and facts.mean_of_rows and not facts.self_normalized:
        several, whole = s.random(n, each[0].shape[-1]), call(pred, target, **NONE)
        expected = whole * (several if whole.dim() == 2 else several.mean(-1))
        same(call(pred, target, weight=several, **NONE), expected, "a weight an element must multiply")
    for shape in ((n + 1,), (1, n), (n, 1, 1, 1)):
        refuses(ValueError, "weight", lambda weight: loss(pred, target, weight=s.random(*weight)), weight=shape)


@promise("multiply the reduced loss by loss_weight once, as Loss.forward does")
def loss_weight(s: Subject) -> None:
    """``loss_weight`` scales value and gradient, whatever the reduction."""
    once = s.make()
    twice = s.make(loss_weight=2 * once.loss_weight)
    for kwargs in (NONE, MEAN, SUM):
        expected = [2 * x for x in both(once, *s.input(), **kwargs)]
        same(both(twice, *s.input(), **kwargs), expected, "twice the loss_weight must double value and gradient")


@promise("let autograd save what the backward needs")
def late_changes(s: Subject) -> None:
    """``pred`` changed in place before the backward raises, or has no influence any more."""
    loss, (pred, target) = s.make(), s.input(dtype=torch.float64)
    for way in s.ways():
        with way, contextlib.suppress(RuntimeError):
            expected, given = both(loss, pred, target)[1], 1 * pred
            value = loss(given, target)
            given.detach().add_(1)
            same(torch.autograd.grad(value, pred), (expected,), "a change after the call must not reach the gradient")


@promise("sum over the rows there are, and divide by what is at least 1 or has an eps")
def empty_input(s: Subject) -> None:
    """No rows cost zero, with a graph, in every reduction."""
    loss, (pred, target) = s.make(), rows_of(s.input(), slice(0))
    for kwargs, weight in itertools.product((NONE, MEAN, SUM, {"avg_factor": 0.0}), (None, s.random(0))):
        value, _ = both(loss, pred.detach().requires_grad_(), target, weight=weight, **kwargs)
        require(value.sum() == 0, f"no rows must cost 0, not {value.sum().item()}, with {in_words(kwargs)}")


@promise("compute in what Loss.unweighted gives, which is float32 for half precision")
def half_precision(s: Subject) -> None:
    """float16 and bfloat16 give exactly what the same numbers give in float32, and a small gradient survives."""
    loss = s.make()
    for dtype in HALF:
        pred, target = cast(s.input(), dtype)
        exact, wide = cast((pred, target), torch.float32)
        value, gradient = both(loss, pred.requires_grad_(), target)
        require(value.dtype == torch.float32, f"{dtype} must give float32, not {value.dtype}")
        expected, slope = both(loss, exact.requires_grad_(), wide)
        same((value, gradient), (expected, slope.to(dtype)), f"{dtype} must give what float32 gives", exact=True)
        for way in s.ways():  # a loss scaler multiplies what is too small for the type
            with way:
                found, slope = (
                    both(lambda x, t=t: 1e5 * loss(x, t, avg_factor=1e8), x)[1]
                    for x, t in ((pred, target), (exact, wide))
                )
            same(found, slope.to(dtype), f"a small gradient in {dtype} must survive until it is scaled")


@promise("leave the work to Loss.forward, which switches autocast off")
def autocast(s: Subject) -> None:
    """Autocast changes nothing, and is off where the function runs."""
    loss, (pred, target) = s.make(), s.input()
    expected, function = loss(pred, target), loss.fn

    def spy(*args, **kwargs):
        require((s.random(1, 1) @ s.random(1, 1)).dtype == torch.float32, "autocast must be off inside")
        return function(*args, **kwargs)

    loss.fn = spy
    for dtype in HALF:
        with torch.autocast(torch.device(s.device).type, dtype=dtype):
            same(loss(pred, target), expected, "autocast must change nothing", exact=True)


@promise("let NaN through, and count finite numbers only in a state")
def nan(s: Subject) -> None:
    """A NaN is not hidden, and the next call knows nothing of it."""
    loss, (pred, target) = s.make().train(), s.input()
    if getattr(loss, "activated", False):
        return  # torch refuses a probability that is NaN
    spoilt = pred.detach().clone()
    spoilt[0] = math.nan
    require(loss(spoilt.requires_grad_(), target).isnan(), "a NaN in pred must make the loss NaN")
    require(loss(pred, target).isfinite(), "a NaN of one call must not spoil the next")


@promise("check the shapes in prepare, as the families do")
def wrong_target(s: Subject) -> None:
    """A target that is no tensor, or has a row too few, is refused."""
    loss, (pred, target) = s.make(), s.input()
    refuses(Exception, "", lambda target: loss(pred, target), target=5)
    refuses(Exception, "", lambda rows: loss(pred, rows_of(target, slice(rows))), rows=len(pred) - 1)


@promise("state true_gradient=False in its facts if a factor is detached, and only then")
def gradient(s: Subject) -> None:
    """The gradient is the derivative, or the facts say that a factor is detached, and it is."""
    loss, (pred, target) = s.make(), s.input(6, torch.float64)
    true = torch.autograd.gradcheck(lambda x: loss(x, target, **NONE), (pred,), raise_exception=False)
    if loss.facts.true_gradient:
        require(true, "the gradient is not the derivative")
    elif not s.settings:
        require(not true, "the gradient is the derivative, though the facts say true_gradient=False")


@promise("count all dimensions but those of one row as rows, as the families do", only=lambda facts: facts.row_wise)
def several_images(s: Subject) -> None:
    """Rows of several images, ``(B, N, ...)``, cost what they cost one below the other."""
    loss, (pred, target) = s.make(), s.input(dtype=torch.float64)
    if loss.leading(pred.unflatten(0, (4, -1))) == loss.leading(pred):
        return  # it has one dimension of rows

    def fold(x):
        return each_tensor(lambda x: x.detach().unflatten(0, (4, -1)), x)

    def run(pred, target, weight):
        value, slope = both(loss, pred.requires_grad_(), target, weight=weight, avg_factor=3.0)
        return value, slope.reshape(-1), loss(pred, target, **NONE).reshape(-1)

    weight = s.random(len(pred))
    for form in (weight, weight.unsqueeze(-1)):
        with small_chunks(s.device):
            found = run(fold(pred), fold(target), fold(form))
        same(found, run(pred, target, weight), "images must cost what their rows cost")


@promise("use plain operators, and detach() for constants", only=lambda facts: not facts.counts_positives)
def derivatives(s: Subject) -> None:
    """In chunks, second derivatives and those of forward mode are what ``torch.func`` gives."""
    loss, (pred, target) = s.make(), s.input(30, torch.float64)
    direction = s.random(*pred.shape).double()
    once = torch.func.grad(lambda x: loss(x, target))
    expected = torch.func.grad(lambda x: (once(x) * direction).sum())(pred.detach())
    with small_chunks(s.device):
        (first,) = torch.autograd.grad(loss(pred, target), pred, create_graph=True)
        along = (first * direction).sum()
        second = torch.autograd.grad(along, pred)[0] if first.requires_grad else torch.zeros_like(pred)
        forward = torch.func.jvp(lambda x: loss(x, target), (pred.detach(),), (direction,))[1]
    same(first, once(pred.detach()), "the gradient must be that of torch.func")
    same(second, expected, "the second derivative must be that of torch.func")
    same(forward, along, "forward mode must give the derivative")


@promise("move it in summarise() while self.learning, by finite numbers only")
def state(s: Subject) -> None:
    """State moves in training with gradients only, by rows that are finite, and goes on from where it was saved."""
    loss = s.make().train()
    if not list(loss.buffers()):
        return

    def after(loss, rows=None, bad=None, seed=0):
        pred, target = rows_of(s.input(64, seed=seed), slice(rows))
        for x in flatten((pred, target))[0] if bad else ():
            x.data[3] = bad if x.is_floating_point() else x[3]
        loss(pred, target)
        return [x.clone() for x in loss.buffers()]

    start = [x.clone() for x in loss.buffers()]
    with torch.no_grad():
        same(after(loss), start, "validation must not move the state", exact=True)
    same(after(loss.eval()), start, "evaluation mode must not move the state", exact=True)
    moved = after(loss.train())
    same(after(loss, rows=0), moved, "no rows must not move the state", exact=True)
    require(all(x.isfinite().all() for x in after(loss, bad=math.nan)), "a NaN must not get into the state")
    restored, copied = s.make().train(), copy.deepcopy(loss)
    restored.load_state_dict(loss.state_dict())
    expected = after(loss, seed=5)
    for other in (restored, copied):
        same(after(other, seed=5), expected, "a copy must go on as the loss does", exact=True)


@promise("define the class at the top level of a module, and keep its settings as attributes")
def copies(s: Subject) -> None:
    """Copies and pickles have the same settings and the same value."""
    loss, (pred, target) = s.make(loss_weight=0.7), s.input()
    expected = loss(pred, target)
    require("loss_weight=0.7" in repr(loss), "the repr must show the settings that are not the defaults")
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        require(repr(twin) == repr(loss), f"a copy is {twin!r} and not {loss!r}")
        same(twin(pred, target), expected, "a copy must have the same value", exact=True)


class NoWaiting(TorchDispatchMode):
    """Raise at the operators that make the host wait for the device."""

    def __init__(self, *allowed):
        super().__init__()
        self.forbidden = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"} - {*allowed}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        masked = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        require(name not in self.forbidden and not masked, f"{name} makes the host wait for the device")
        return function(*args, **(kwargs or {}))


@promise("use torch.where and weights in place of indices, or state counts_positives=True in its facts")
def no_waiting(s: Subject) -> None:
    """The host does not wait for a GPU, but to count the positives of a loss that says so."""
    loss, (pred, target) = s.make(), s.input()
    for part in loss.modules():
        part.unchecked = 0  # box losses look at the targets of the first calls
    with contextlib.ExitStack() as on_a_gpu:  # on a CPU too, it is to do as there
        for name, module in list(sys.modules.items()):
            if name.startswith("detloss_plugins.") and hasattr(module, "is_asynchronous"):
                on_a_gpu.enter_context(mock.patch.object(module, "is_asynchronous", return_value=True))
        with NoWaiting(*("nonzero", "masked_select") * loss.facts.counts_positives):
            loss(pred, target, weight=s.random(len(pred)), avg_factor=s.random()).backward()


@promise("use operators that torch.compile knows, and ask for no number of a tensor")
def compiled(s: Subject) -> None:
    """Compiled, alone and in a model, it is the same loss; tried only if ``compile=True`` is asked for."""
    if not s.compile:
        return
    loss, eager = s.make(compile=True), s.make()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs uncompiled")
        for n, kwargs in itertools.product((40, 23, 1, 0), (NONE, MEAN, {"avg_factor": 2.5})):
            expected = both(eager, *s.input(n), **kwargs)
            same(both(loss, *s.input(n), **kwargs), expected, f"{n} rows must cost the same compiled")
    model = torch.compile(eager, fullgraph=not loss.facts.counts_positives)
    same(both(model, *s.input()), both(eager, *s.input()), "in a compiled model it must be the same")


@promise("correct the formula, or what the facts state of upstream", only=lambda facts: facts.upstream)
def upstream(s: Subject) -> None:
    """Each counterpart that is installed has the same value and gradient, or differs as stated."""
    for twin in s.cls.facts.upstream:
        if dict(twin.ours) == dict(s.settings) and load(twin.path) is not None:
            worst = parity.compare(s.cls, twin, [parity.random_tensors(s.cls)])
            how = "agrees" if worst.agree else f"differs by {worst.value:.2g}, its gradient by {worst.gradient:.2g}"
            require(parity.verdict(twin, worst) != "FAIL", f"{twin.path} {how}")


EXTREME_BOXES = {
    "identical": ((10.0, 10, 20, 20), (10.0, 10, 20, 20)),
    "disjoint": ((0.0, 0, 10, 10), (500.0, 500, 600, 600)),
    "nested": ((12.0, 12, 15, 15), (10.0, 10, 20, 20)),
    "touching": ((0.0, 0, 10, 10), (10.0, 0, 20, 10)),
    "zero-size": ((5.0, 5, 5, 5), (3.0, 3, 9, 9)),
    "both the same point": ((5.0, 5, 5, 5), (5.0, 5, 5, 5)),
    "no height": ((5.0, 5, 9, 5), (3.0, 3, 9, 9)),
    "no height, both": ((5.0, 5, 9, 5), (5.0, 5, 9, 5)),
    "thin": ((5.0, 5, 6, 900), (5.0, 5, 900, 6)),
    "inverted": ((20.0, 20, 10, 10), (10.0, 10, 20, 20)),
    "normalised": ((1e-3, 1e-3, 2e-3, 2e-3), (1e-3, 1e-3, 2e-3, 2.1e-3)),
    "huge": ((0.0, 0, 1e5, 1e5), (1e3, 0, 1e5, 9e4)),
}


def of_boxes(facts: Facts) -> bool:
    """Whether a loss is one between boxes."""
    return facts.family == "box"


@promise("divide by what vanishes as detloss_plugins.geometry.ratio does", only=of_boxes)
def extreme_boxes(s: Subject) -> None:
    """Boxes that are the same, apart, flat, thin, inverted, tiny or huge cost a finite number with such a gradient."""
    for (case, boxes), dtype in itertools.product(EXTREME_BOXES.items(), DTYPES):
        pred, target = s.moved(torch.tensor(boxes).clamp(max=6e4).to(dtype).unsqueeze(1).unbind())
        value, slope = both(s.make(), pred.requires_grad_(), target)
        require(value.isfinite() and slope.isfinite().all(), f"{case} boxes in {dtype} must cost a finite number")


@promise("correct the formula, or state minimum, symmetric or scale_invariant in its facts", only=of_boxes)
def invariances(s: Subject) -> None:
    """Identical boxes cost the minimum; moving, transposing, swapping and scaling both boxes changes what it may."""
    loss, facts, (pred, target) = s.make(), s.cls.facts, s.input(200)
    cost = functools.partial(loss, **NONE)

    def near(found, expected, words, places):
        require(((found - expected).abs() <= places).all(), words)

    for scale, dtype in itertools.product((1e-3, 1.0, 1e4) if facts.scale_invariant else (1.0, 1e4), DTYPES):
        box = (target.detach() * scale).to(dtype)
        box = box[box.isfinite().all(-1)]
        near(cost(box.clone(), box), facts.minimum, "identical boxes must cost the minimum", 1e-5)
    rows = cost(pred, target)
    require(rows.min() >= facts.minimum - 1e-6, "nothing may cost less than the minimum")
    near(cost(pred + 64, target + 64), rows, "moving both boxes must change nothing", 1e-4)
    turned = cost(pred[:, [1, 0, 3, 2]], target[:, [1, 0, 3, 2]])
    near(turned if rows.dim() == 1 else turned[:, [1, 0, 3, 2]], rows, "x and y must be treated alike", 1e-4)
    if facts.symmetric:
        near(cost(target, pred), rows, "swapping the boxes must change nothing", 1e-4)
    for scale in (1e-3, 1 / 32, 1e3) if facts.scale_invariant else ():
        near(cost(pred * scale, target * scale), rows, "scaling both boxes must change nothing", 1e-4)


@promise("correct the formula, or leave attracts=True out of its facts", only=lambda f: of_boxes(f) and f.attracts)
def attraction(s: Subject) -> None:
    """A disjoint box of the target's size costs the less the nearer it is, and the gradient points at the target."""
    loss, target = s.make(), torch.tensor([0.0, 0, 16, 24], device=s.device)
    steps = torch.arange(40, 8, -1, device=s.device).unsqueeze(-1)  # whole pixels, which bfloat16 has up to 256
    for direction, dtype in itertools.product(((2, 0), (0, 3), (2, 3), (-2, 3), (-4, -3), (3, 1)), DTYPES):
        away = torch.tensor(direction * 2, device=s.device)
        pred = (target + steps * away).to(dtype).requires_grad_()
        rows = loss(pred, target.to(dtype).expand_as(pred), **NONE)
        uphill = (torch.autograd.grad(rows.sum(), pred)[0] * away).sum(-1)
        # An exponential saturates, so that float32 may repeat a value far away.
        less = (rows.diff()[-16:] < 0).all() if dtype == torch.float64 else rows[-1] < rows[0]
        require((rows.diff() <= 0).all() and less, "a nearer box must cost less")
        require((uphill >= 0).all() and (uphill[-8:] > 0).all(), "the gradient must point at the target")


@promise("use log_sigmoid, softplus and log_softmax", only=lambda facts: facts.family == "classification")
def extreme_logits(s: Subject) -> None:
    """Logits of any size cost a finite number with a finite gradient."""
    classes = s.input(1)[0].shape[-1]
    signs = 1 - 2.0 * (torch.arange(classes, device=s.device) % 2)
    for size, label in itertools.product((1e4, 60.0, 0.0), range(min(3, classes))):
        pred = s.activated(size * signs).unsqueeze(0).requires_grad_()
        value, slope = both(s.make(), pred, torch.full((1,), label, device=s.device))
        require(value.isfinite() and slope.isfinite().all(), f"logits of {size} must cost a finite number")
