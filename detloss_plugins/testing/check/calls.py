"""Checks of a call: settings, results, reductions, weights, precision, and what is refused."""

import contextlib
import functools
import itertools
import math

import torch

from detloss_plugins.facts import Facts
from detloss_plugins.loss import takes_probabilities
from detloss_plugins.nested import each_tensor, flatten
from detloss_plugins.reduction import AVG_FACTOR_EPS, REDUCTIONS
from detloss_plugins.testing.check.subject import (
    HALF,
    MEAN,
    NONE,
    SUM,
    Subject,
    both,
    cast,
    linear,
    on_the_whole,
    promise,
    refuses,
    require,
    rows_of,
    same,
    small_chunks,
)
from detloss_plugins.testing.twins import in_words


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
    low, high = (side * s.make().loss_weight for side in (low, high))
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
        one = loss.facts.one_per_row or loss.facts.sums_classes or loss.facts.counts_positives
        wanted = rows.numel() if loss.facts.counts_positives else len(pred) if one else pred.numel()
        words = f'"none" must give {wanted} losses, not {rows.numel()}, or its facts state one_per_row={not one}'
        require(rows.numel() == wanted, words)
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


def of_classes(facts: Facts) -> bool:
    """Whether a loss takes the targets of a class loss."""
    return facts.family in ("classification", "ranking")


@promise("take the mask of what is valid from the family's prepare, and leave it to Loss.weigh", only=of_classes)
def ignored(s: Subject) -> None:
    """A row whose label, or whose dense target, is negative costs nothing and has no gradient."""
    pred, target = s.input()
    forms = [target] if target.shape != pred.shape else [target, target.max(-1).indices]
    for form in forms:
        form = form.clone()
        form[0] = -1
        _, gradient = both(s.make(), pred, form, **SUM)
        require(not gradient[0].count_nonzero(), f"a negative target {tuple(form.shape)} must have no gradient")


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
    device = torch.device(s.device).type
    for dtype in (torch.bfloat16,) if device == "cpu" else HALF:  # a CPU has no other before torch 2.3
        with torch.autocast(device, dtype=dtype):
            same(loss(pred, target), expected, "autocast must change nothing", exact=True)


@promise("let NaN through, and count finite numbers only in a state")
def nan(s: Subject) -> None:
    """A NaN is not hidden, and the next call knows nothing of it."""
    loss, (pred, target) = s.make().train(), s.input()
    if takes_probabilities(loss):
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
