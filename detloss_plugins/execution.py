"""How a loss is run: as it is written, in one pass over parts of its rows, or compiled; the value is the same.

As it is written, autograd keeps every intermediate result until the backward: ten or twenty times the logits of a dense
detector. In one pass, a row's gradient is worked out along with its value, and nothing else is kept.
"""

import contextlib
import copy
import inspect
import types
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.func import grad_and_value

# Elements of a part: few enough for what is worked out on the way to stay in a CPU's cache, or to take little of a
# GPU's memory; enough to keep all its cores busy.
PART = {"cpu": 350_000}
LARGER_PART = 2**23
# Beyond this a loss that keeps little for its backward gains by parts too: the C library takes a tensor of more than
# 32 MiB from the system anew each time. Of half precision, it saves the copies in float32.
MUCH, MUCH_OF_HALF = 2**23, 2**21


def float32(tensor):
    """Half precision up-cast to float32; anything else as it is."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def without_autocast(device):
    """A context in which nothing is cast."""
    if compiling() or torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()  # the other takes as long as an operator on a thousand boxes


def waits(device):
    """Whether the host waits for the device when it asks for a number."""
    return device.type != "cpu"


def run(loss, pred, target, weight, avg_factor, reduction, **extra):
    """``loss.total`` of these arguments, in the way that suits them; ``extra`` is what only some losses take."""
    call = (pred, target, weight, avg_factor, reduction)
    if transforming():
        return loss.total(*call, **extra)
    if loss.compiled and loss not in _not_compiled and loss.compiles(next(tensors(pred)).device):
        return _run_compiled(loss, *call, **extra)
    if torch.is_tensor(pred) and pred.numel() > part_of(loss, pred) and not _runs_whole(loss, *call):
        rows = as_rows(loss, pred, target, weight)
        if rows is not None and one_pass(loss, *call):
            seen = loss.survey(pred, target, weight)
            return _OnePass.apply(rows[0], in_parts, loss, *rows[1:], avg_factor, reduction, seen)
    return loss.total(*call, **extra)


def _runs_whole(loss, pred, target, weight, avg_factor, reduction):
    """Whether parts would gain nothing."""
    little = loss.keeps_little or (_dense(pred, target) and loss.reduces(pred, target, weight, reduction))
    return little and pred.numel() <= (MUCH if pred.dtype == float32(pred[:0]).dtype else MUCH_OF_HALF)


_tracing = False  # whether ``_traced`` runs


def compiling():
    """Whether what runs is being compiled, here or in a model that is itself compiled."""
    return _tracing or torch.compiler.is_compiling()


def transforming():
    """Whether a compiler or ``torch.func`` looks on, which both want the plain operators."""
    return compiling() or torch._C._are_functorch_transforms_active()


def part_of(loss, pred):
    """How many elements of ``pred`` a part has."""
    return PART.get(pred.device.type, LARGER_PART) * loss.larger_parts


def one_pass(loss, pred, target, weight, avg_factor, reduction):
    """Whether the gradient for ``pred`` is all that a backward can ask for."""
    return (
        loss.by_rows
        and reduction != "none"
        and torch.is_grad_enabled()
        and pred.requires_grad
        and not any(x.requires_grad for x in tensors(target, weight, avg_factor))
    )


def as_rows(loss, pred, target, weight):
    """pred, target and weight with one leading dimension, the rows; None if they cannot be told apart."""
    leading = loss.leading(pred) if loss.by_rows else 0
    if not leading:
        return None
    shape = pred.shape[:leading]
    if any(x.shape[:leading] != shape for x in tensors(target, weight)):
        return None
    if leading == 1:
        return pred, target, weight
    return each_tensor(lambda x: x.flatten(0, leading - 1), (pred, target, weight))


def tensors(*values):
    """The tensors among values, and among those that are tuples of tensors."""
    for value in values:
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors(*value)


def each_tensor(function, values):
    """``function`` of those tensors, in their places."""
    if torch.is_tensor(values):
        return function(values)
    return tuple(each_tensor(function, x) for x in values) if isinstance(values, (tuple, list)) else values


def analytic(formula, *inputs):
    """The value of an :class:`Analytic` function, or values."""
    if transforming() or any(x.requires_grad for x in inputs[formula.known :] if torch.is_tensor(x)):
        return formula.plain(*inputs)
    return formula.apply(*inputs)


class Analytic(torch.autograd.Function):
    """A function whose backward is a formula, which keeps less and is faster than that of its operators.

    A subclass has ``plain(*inputs)``, the function in differentiable operators; ``value(ctx, *inputs)``, the same,
    which notes on ``ctx`` what ``gradients(ctx, *outer)`` needs, but nothing that it returns, as that holds on to
    ``ctx``; and how many inputs get a gradient there.
    """

    known = 1

    @classmethod
    def forward(cls, ctx, *inputs):
        ctx.set_materialize_grads(False)
        ctx.inputs = inputs[cls.known :]
        ctx.save_for_backward(*inputs[: cls.known])
        return cls.value(ctx, *inputs)

    @classmethod
    def backward(cls, ctx, *outer):
        if all(out is None for out in outer):
            return (None,) * len(ctx.needs_input_grad)
        found = cls._differentiable(ctx, outer) if torch.is_grad_enabled() else cls.gradients(ctx, *outer)
        return *found, *[None] * len(ctx.inputs)

    @classmethod
    def _differentiable(cls, ctx, outer):
        """The gradients of a backward that is to be differentiated itself."""
        inputs = [x.view_as(x) for x in ctx.saved_tensors]  # one may be worked out of another: not through that
        values = cls.plain(*inputs, *ctx.inputs)
        values = values if isinstance(values, tuple) else (values,)
        values, outer = zip(*((v, out) for v, out in zip(values, outer, strict=True) if out is not None), strict=True)
        needed = ctx.needs_input_grad[: cls.known]
        wanted = [x for x, needs in zip(inputs, needed, strict=True) if needs]
        found = iter(torch.autograd.grad(values, wanted, outer, create_graph=True, allow_unused=True))
        return [next(found) if needs else None for needs in needed]


def scaled(slope, outer):
    """A slope that a formula has noted, times the gradient from outside; in its place, where there is one use of it."""
    return slope.mul_(outer) if differentiated_once() and not compiling() else slope * outer


class Notes:
    """Takes the place of ``ctx`` where a formula is part of another one."""

    needs_input_grad = (True, True)


def pointwise(formula, x, *others):
    """The value of an :class:`Analytic` function in which each number of ``x`` decides one number of the value."""
    if not (differentiated_once() and compiling()):
        return analytic(formula, x, *others)
    # What a compiler would make of the operators' slopes takes longer.
    notes, known = Notes(), x.detach()
    value = formula.value(notes, known, *others)
    (slope,) = formula.gradients(notes, 1)
    return value.detach() + slope.detach() * (x - known)


class _OnePass(torch.autograd.Function):
    """A loss whose ``kernel`` gives the gradient for pred along with the value."""

    @staticmethod
    def forward(ctx, pred, kernel, loss, *call):
        ctx.gradient, value = kernel(loss, pred.detach(), *call)
        ctx.save_for_backward(pred)
        ctx.loss, ctx.call = loss, call
        return value

    @staticmethod
    def backward(ctx, outer):
        gradient, ctx.gradient = ctx.gradient, None  # it is changed in place, so there is one use of it
        (pred,) = ctx.saved_tensors
        again = torch.is_grad_enabled()  # this backward is to be differentiated
        if gradient is None or again:
            with torch.enable_grad():
                value = ctx.loss.total(pred, *ctx.call)
                (gradient,) = torch.autograd.grad(value, pred, outer, create_graph=again)
        elif waits(outer.device) or outer.item() != 1:
            gradient.mul_(outer)
        return gradient.to(pred.dtype), *[None] * (2 + len(ctx.call))


def parts(loss, pred, target, weight):
    """``(rows, pred, target, weight)`` of some rows at a time, and which; of all, where they cannot be told apart."""
    tensors = as_rows(loss, pred, target, weight)
    if tensors is None or transforming() or not pred.numel():
        yield slice(None), pred, target, weight
        return
    rows = len(tensors[0])
    number = -(-pred.numel() // part_of(loss, pred))
    step = -(-rows // number)  # as even as can be: a last part of one row would be compiled for itself
    for start in range(0, rows, step):
        part = slice(start, start + step)
        yield part, *each_tensor(lambda x, part=part: x[part], tensors)


def in_parts(loss, pred, target, weight, avg_factor, reduction, seen):
    """The gradient for pred and the value, some rows at a time."""
    # It waits for what it is multiplied by, which a loss scaler makes large because float16 lacks the range.
    dtype = torch.float32 if pred.dtype == torch.float16 else pred.dtype
    gradient = pred.new_empty(pred.shape, dtype=dtype)
    averages = _averages_rows(loss, avg_factor, reduction, seen)

    def differentiated(x, target, weight, share):
        x = x.detach().requires_grad_()
        with torch.enable_grad(), once():
            value = loss.total(x, target, weight, avg_factor, reduction, seen)
            value = value * share if averages else value
            return torch.autograd.grad(value, x)[0], value.detach()

    def rest_differentiated(x, labels, weight, share):
        channel, hidden, of_labels = labels
        slope, value = differentiated(x.scatter(-1, channel, hidden), 0, weight, share)
        return slope.scatter_add_(-1, channel, of_labels), value

    labels = loss.labels_apart(pred, target, weight)
    if labels is None:
        return gradient, part_by_part(differentiated, gradient, loss, pred, target, weight)
    chosen = float32(pred.gather(-1, labels.channel))
    share = 1 if loss.sums_classes else 1 / pred.shape[-1]
    of_labels, value = differentiated(chosen, labels.value, labels.weight, share)
    # Without its labels a batch has nothing but negatives, and one of such a logit costs nothing.
    hidden = torch.where(labels.found.unsqueeze(-1), -1e4, chosen)
    rest = (labels.channel, hidden, of_labels)
    return gradient, value + part_by_part(rest_differentiated, gradient, loss, pred, rest, labels.rest)


def part_by_part(differentiated, gradient, loss, pred, *call):
    """The value, the gradient written to ``gradient``; ``differentiated`` gives both of a part, and has its share."""
    value = 0
    for part, x, *of_part in parts(loss, pred, *call):
        gradient[part], of_value = differentiated(float32(x), *of_part, len(x) / len(pred))
        value = value + of_value
    return value


class Labels(NamedTuple):
    """A target of at most one positive a row."""

    channel: torch.Tensor  # (N, 1): the positive's, or any
    value: torch.Tensor  # (N, 1)
    found: torch.Tensor  # (N,): whether there is one
    weight: torch.Tensor  # (N,): of the positive, 0 where there is none
    rest: torch.Tensor  # (N,): of the other channels


def total(loss, pred, target, *call, **extra):
    """What is compiled where autograd is to differentiate it, or nobody."""
    pred, target = in_columns(loss, pred, target)
    return loss.total(pred, target, *call, **extra)


_once = False  # as below


def differentiated_once():
    """Whether a gradient is worked out along with the value, whose slope need not be differentiable itself."""
    return _once


@contextlib.contextmanager
def once():
    """What :func:`differentiated_once` tells of."""
    global _once
    _once = True
    try:
        yield
    finally:
        _once = False


def value_and_gradient(loss, pred, target, *call):
    """What is compiled for one pass: the gradient for pred and the value."""
    global _once
    pred, target = in_columns(loss, pred, target)
    _once = True  # not by "once", which a compiler that watches the loss does not follow
    try:
        gradient, value = grad_and_value(lambda x: loss.total(x, target, *call))(float32(pred))
    finally:
        _once = False
    return gradient.to(pred.dtype) if pred.dtype == torch.bfloat16 else gradient, value


def in_columns(loss, pred, target):
    """The same, on a CPU with each of their few columns contiguous: one vector load then reads x1 of many boxes."""
    if not loss.by_columns or next(tensors(pred)).device.type != "cpu":
        return pred, target
    return tuple(torch.stack(x.unbind(-1)).movedim(0, -1) for x in (pred, target))


class _Graph(NamedTuple):
    """The compiled form of a function, and what it was made with; it holds no loss, which could not be freed then."""

    settings: dict | None  # of the loss; None if the compiler watches it
    call: Callable  # of the loss and its arguments, if the compiler watches it, else of the arguments


_graphs = weakref.WeakKeyDictionary()  # loss -> {function: _Graph}; a loss with these could not be pickled
_by_name = weakref.WeakValueDictionary()  # losses that are compiled, by what ``_traced`` knows them by
_not_compiled = weakref.WeakSet()  # losses with which the compiler has failed
_told = set()


def compiled(loss, function):
    """The compiled form of ``function`` for ``loss`` with its present settings."""
    graphs = _graphs.setdefault(loss, {})
    if function not in graphs or not _unchanged(loss, graphs[function].settings or {}):
        graphs[function] = _compile(loss, function)
    settings, call = graphs[function]
    return partial(call, loss) if settings is None else call


def _compile(loss, function):
    settings = _settings(loss)
    if settings is None:
        return _Graph(None, _compile_alone(function))
    torch.compiler.allow_in_graph(_traced)
    name = str(id(loss))
    _by_name[name] = loss
    return _Graph(settings, partial(_compile_alone(_call_traced), name, function is total))


def _compile_alone(function):
    """The compiler has room for few graphs by code object, which all losses would share: a copy has its own."""
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    # It decides by the first call's size whether to use threads: this bids it to, as the next may be larger.
    return torch.compile(own, dynamic=True, fullgraph=True, options={"cpp.min_chunk_size": 1})


def _settings(loss):
    """All that a loss and its parts are made of, if that is settings: ``{name of the part: {name: value}}``.

    None if there is more that ``total`` may read and that may change from call to call.
    """
    found = {}
    for name, part in loss.named_modules():
        own = {k: v for k, v in vars(part).items() if k not in _BY_ITSELF and k not in getattr(part, "aside", ())}
        known = all(hasattr(type(part), k) or k in inspect.signature(type(part)).parameters for k in own)
        state = (part._buffers or part._parameters) and not (part is loss and loss.surveys)  # the survey reads it
        if not known or state or next(tensors(*own.values()), None) is not None:
            return None
        found[name] = copy.deepcopy(own)
    return found


def _unchanged(loss, settings):
    for name, values in settings.items():
        own = vars(loss.get_submodule(name))
        if any(own.get(k) != v for k, v in values.items()):
            return False
    return True


_BY_ITSELF = vars(nn.Module()).keys() | {"compiled"}  # what a module has that holds none of its settings


def _call_traced(name, as_it_is, *call, **extra):
    """What is compiled instead of the function: a compiler reads what it is given, and takes what that calls."""
    return _traced(name, as_it_is, *call, **extra)


def _traced(name, as_it_is, *call, **extra):
    """A function of a loss, which the compiler is told to follow tensors through and not to read.

    What it reads it checks before each call, and that takes longer than the loss of ten thousand boxes.
    """
    global _tracing
    _tracing = True
    try:
        return (total if as_it_is else value_and_gradient)(_by_name[name], *call, **extra)
    finally:
        _tracing = False


def _run_compiled(loss, pred, target, weight, avg_factor, reduction, **extra):
    call = (pred, target, weight, avg_factor, reduction)
    shape = pred.shape[: loss.leading(pred)] if torch.is_tensor(pred) else ()
    if shape and shape.numel() < 2:
        return loss.total(*call, **extra)  # each of the sizes 0 and 1 would be compiled for itself
    try:
        value = _compiled(loss, *call, **extra)
    except Exception as error:
        value = loss.total(*call, **extra)  # if the arguments are at fault, this says it
        _give_up(loss, error)
        return value
    return value.unflatten(0, shape) if reduction == "none" and loss.by_rows and len(shape) > 1 else value


def _compiled(loss, pred, target, weight, avg_factor, reduction, **extra):
    pred, target, weight = as_rows(loss, pred, target, weight) or (pred, target, weight)
    device = next(tensors(pred)).device
    cpu = device.type == "cpu"
    if avg_factor is not None and not torch.is_tensor(avg_factor):
        avg_factor = torch.tensor(float(avg_factor)).to(device, non_blocking=True)  # a number would be compiled in
    call = (pred, target, weight, avg_factor, reduction)
    with without_autocast(device):
        seen = loss.survey(pred, target, weight) if loss.surveys else None
        # On a GPU, where memory takes the time, this moves no less than autograd's forward and backward.
        if cpu and one_pass(loss, *call):
            return _OnePass.apply(pred, compiled_kernel, loss, *call[1:], seen)
        if loss.surveys:
            extra["seen"] = seen
        return compiled(loss, total)(*call, **extra)


def compiled_kernel(loss, pred, target, weight, *call):
    """The compiled form of :func:`value_and_gradient`."""
    kernel = compiled(loss, value_and_gradient)
    if pred.dtype != torch.bfloat16 or _dense(pred, target):
        return kernel(pred, target, weight, *call)
    # Beside labels, which are 64 bits long, the compiler works out some numbers of 16 bits one by one.
    gradient, averages = torch.empty_like(pred), _averages_rows(loss, *call)

    def differentiated(x, target, weight, share):
        slope, value = kernel(x, target, weight, *call)
        return (slope.mul_(share), value * share) if averages else (slope, value)

    return gradient, part_by_part(differentiated, gradient, loss, pred, target, weight)


def _dense(pred, target):
    return torch.is_tensor(target) and target.shape == pred.shape


def _averages_rows(loss, avg_factor, reduction, seen):
    """Whether the value is a mean over the rows, to which some of them contribute their share."""
    return reduction == "mean" and avg_factor is None and not loss.self_normalized


def _give_up(loss, error):
    _not_compiled.add(loss)
    if type(error) not in _told:
        _told.add(type(error))
        reason = next(iter(str(error).strip().splitlines()), "")
        warnings.warn(
            f"{type(loss).__name__} runs uncompiled: torch.compile failed with {type(error).__name__}: {reason}",
            stacklevel=5,
        )
