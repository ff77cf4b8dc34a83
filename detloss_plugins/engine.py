"""The value and the gradient of a sum over rows: in chunks of rows, or by one compiled kernel.

Autograd keeps every intermediate of every row until the backward: ten or twenty times a dense detector's logits. Here a
row's gradient is worked out along with its value. The engine differentiates pure functions and knows nothing of losses.
"""

import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks

from detloss_plugins.precision import float32, is_compiling, is_large, rows_in_chunk, uncompiled, with_own_code
from detloss_plugins.reduction import times


class Call(NamedTuple):
    """``function(*rows, *shared)`` gives the weighted losses of some rows, one or more a row."""

    function: Callable[..., Tensor]
    rows: tuple[Tensor, ...]  # pred, and what else has a row for each of its rows, without a gradient
    shared: tuple[Tensor, ...] = ()  # what every row needs
    row_wise: bool = False  # whether the losses of a row depend on that row and on what is shared alone
    # To compile it once: what is equal for equal functions, what makes one that cannot change, its name in a warning.
    kernel: tuple[Hashable, Callable[[], Callable[..., Tensor]], str] | None = None
    factor: float = 1.0  # of the sum of the losses

    def losses(self) -> Tensor:
        """The losses of all rows, in plain operators."""
        return self.function(*self.rows, *self.shared)

    def total(self) -> Tensor:
        """The sum of the losses of all rows, times the factor."""
        return times(self.losses().sum(), self.factor)

    def filled(self, flat: Sequence[Tensor]) -> "Call":
        """The same with other tensors."""
        count = len(flat) - len(self.shared)
        return self._replace(rows=tuple(flat[:count]), shared=tuple(flat[count:]))

    def learned(self) -> tuple[int, ...]:
        """The places, in rows and shared, of the tensors that require a gradient."""
        return tuple(i for i, x in enumerate((*self.rows, *self.shared)) if x.requires_grad)

    def in_chunks(self) -> bool:
        """Whether it is run in chunks."""
        return self.row_wise and not is_compiling() and is_large(self.rows[0])

    def chunks(self) -> Iterator[tuple[slice, "Call"]]:
        """The call some rows at a time."""
        pred = self.rows[0]
        step = rows_in_chunk(pred)
        for start in range(0, len(pred), step):
            part = slice(start, start + step)
            yield part, self._replace(rows=tuple(x[part] for x in self.rows))

    def of_each_chunk(self) -> list:
        """What the function gives for each chunk, or for all rows in a list of one."""
        return [chunk.losses() for _, chunk in self.chunks()] if self.in_chunks() else [self.losses()]


def weighted_sum(call: Call) -> Tensor:
    """The call's :meth:`~Call.total`; ``pred`` and what is shared get their gradients by chunks or a kernel."""
    learned = call.learned() if torch.is_grad_enabled() else ()
    others = any(i < len(call.rows) for i in learned[1:]) or (learned and learned[0] > 0)
    if not call.row_wise or is_compiling() or others or any(map(_is_transformed, (*call.rows, *call.shared))):
        return call.total()
    # 0 and 1 rows would be compiled for themselves.
    if call.kernel and len(call.rows[0]) > 1 and (value := _by_kernel(call, learned)) is not None:
        return value
    if not call.in_chunks():
        return call.total()
    if learned:
        return _GradientInForward.apply(_chunk_by_chunk, call, learned, *call.rows, *call.shared)[0]
    return torch.stack([chunk.total() for _, chunk in call.chunks()]).sum()


def _is_transformed(x: Tensor) -> bool:
    """Whether a tensor is one of a transform of ``torch.func``, or has a derivative in forward mode."""
    try:
        x.data_ptr()  # which a tensor of a transform has not
        return forward_ad.unpack_dual(x).tangent is not None
    except RuntimeError:
        return True


def _chunk_by_chunk(call: Call, learned: tuple[int, ...]) -> tuple[Tensor, ...]:
    pred, sums = call.rows[0], []
    # It waits for what it is multiplied by, which a loss scaler makes large because float16 lacks the range.
    gradient = torch.empty_like(pred, dtype=torch.float32 if pred.dtype == torch.float16 else pred.dtype)
    for part, chunk in call.chunks():
        flat = [x.detach() for x in (*chunk.rows, *chunk.shared)]
        with torch.enable_grad():
            for i in learned:
                flat[i] = float32(flat[i]).requires_grad_()
            value = chunk.filled(flat).total()
        gradient[part], *of_shared = torch.autograd.grad(value, [flat[i] for i in learned])
        sums.append((value.detach(), *of_shared))
    value, *of_shared = (torch.stack(x).sum(0) for x in zip(*sums, strict=True))
    return value, gradient, *of_shared


class _GradientInForward(torch.autograd.Function):
    """A sum with its gradients, as ``way(call, learned)`` gives them; differentiated again, the plain function's."""

    @staticmethod
    def forward(*inputs):
        way, call, learned, *flat = inputs
        return way(call.filled(flat), learned)

    forward.__func__.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # torch asks each call

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, call, ctx.learned, *flat = inputs
        ctx.call = call._replace(rows=(), shared=(None,) * len(call.shared))  # their tensors are saved below
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # there would be one of zeros beside each
        ctx.save_for_backward(*output[1:], *flat)

    @staticmethod
    def backward(ctx, outer, *_):
        saved = ctx.saved_tensors  # once in a backward, as torch.utils.checkpoint wants it
        found, flat = saved[: len(ctx.learned)], saved[len(ctx.learned) :]

        def total(*given):
            given = dict(zip(ctx.learned, given, strict=True))
            return ctx.call.filled([given.get(i, x) for i, x in enumerate(flat)]).total()

        if torch.is_grad_enabled():
            found = torch.func.vjp(total, *(flat[i] for i in ctx.learned))[1](outer)
        else:
            found = (_times(x, outer, flat[i].dtype) for i, x in zip(ctx.learned, found, strict=True))
        found = dict(zip(ctx.learned, found, strict=True))
        return None, None, None, *(found.get(i) for i in range(len(flat)))

    @staticmethod
    def vmap(info, in_dims, *inputs):  # of tensors that it knows nothing of; others do not come here
        return _GradientInForward.apply(*inputs), (None,) * (1 + len(inputs[2]))


def _times(gradient: Tensor, outer: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient times a number, in the type of what it is of."""
    if gradient.dtype == dtype:
        return gradient * outer
    found = torch.empty_like(gradient, dtype=dtype)
    for part, _ in Call(torch.mul, (gradient,)).chunks():
        torch.mul(gradient[part], outer, out=found[part])
    return found


_kernels: dict[Hashable, Callable] = {}  # for the whole process
_failed: set[Hashable] = set()


def _by_kernel(call: Call, learned: tuple[int, ...]) -> Tensor | None:
    """The sum by a compiled kernel; None where there is none."""
    key, make, name = call.kernel  # type: ignore[misc]  # a call without one does not come here
    flat = *call.rows, *call.shared
    if key in _failed or any(flat[i].dim() for i in learned[1:]) or _are_hooked():
        return None

    def run(call, learned):
        one_loop = call.rows[0].device.type == "cpu" and not _is_narrow(call.rows[0])
        place = key, len(call.rows), learned, one_loop
        kernel = _kernels.get(place) or _kernels.setdefault(place, _compile(make(), learned, one_loop))
        flat = [_contiguous(x.detach()) for x in (*call.rows, *call.shared)]
        sums, *found = kernel(_factor_of_rows(flat[0], call.factor, one_loop), *flat)
        return sums.sum(), *found[:1], *(x.sum() for x in found[1:])

    try:
        with torch.set_grad_enabled(bool(learned)):
            return _GradientInForward.apply(run, call, learned, *flat)[0] if learned else run(call, ())[0]
    except (MemoryError, torch.cuda.OutOfMemoryError):
        return None  # chunks take less
    except Exception as error:
        with torch.no_grad():
            call.of_each_chunk()  # if the arguments are at fault, this says it
        _failed.add(key)
        warnings.warn(uncompiled(name, error), stacklevel=6)
        return None


def _are_hooked() -> bool:
    """Whether what is saved for a backward goes through hooks, as in a checkpoint, where no kernel can be made."""
    try:
        with disable_saved_tensors_hooks(""):
            return False
    except RuntimeError:
        return True


def _factor_of_rows(pred: Tensor, factor: float, of_each: bool) -> Tensor:
    """A factor as a kernel takes it, a number on the host, which costs a GPU no launch; or one of each row."""
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    return torch.full((len(pred),) if of_each else (), factor, dtype=dtype, device="cpu")


def _is_narrow(x: Tensor) -> bool:
    return x.numel() <= 5 * len(x)


def _contiguous(x: Tensor) -> Tensor:
    """The same; on a CPU a few columns with each contiguous, as a vector load then reads x1 of many boxes."""
    few = x.device.type == "cpu" and x.dim() == 2 and _is_narrow(x)
    return torch.stack(x.unbind(-1)).t() if few else x.contiguous()


def _compile(function: Callable[..., Tensor], learned: tuple[int, ...], one_loop: bool) -> Callable:
    """A kernel that gives a sum for each row, as a full one would run in one block of a GPU, and maybe the gradients.

    The factor comes first: on a CPU one for each row, without which the compiler makes a loop over all and another over
    the rows.
    """

    def sums(factor, *flat):
        of_rows = function(*flat)
        of_rows = factor * (of_rows.flatten(1).sum(1) if of_rows.dim() > 1 else of_rows)
        return of_rows.sum(), of_rows

    def slopes(place, of_rows, *flat):
        """The derivative of each row's sum for a number that is shared: the derivative of v J, for v."""

        def along(v):
            return torch.func.vjp(lambda x: sums(*flat[:place], x, *flat[place + 1 :])[1], flat[place])[1](v)[0]

        return torch.func.grad(along)(torch.ones_like(of_rows))

    def plain(factor, pred, *others):
        if not learned:
            return (sums(factor, pred, *others)[1],)
        flat = factor, float32(pred), *others
        gradient, of_rows = torch.func.grad(sums, argnums=1, has_aux=True)(*flat)
        gradient = gradient if pred.dtype == torch.float16 else gradient.to(pred.dtype)
        return of_rows, gradient, *(slopes(1 + place, of_rows, *flat) for place in learned[1:])

    # The compiler follows tensors through it and does not read it, as it would check all that it has read at each call.
    torch.compiler.allow_in_graph(plain)

    def kernel(*flat):
        return plain(*flat)

    # It is to use threads whatever the size of the first call; and on a CPU to work out again what value and gradient
    # share, not keep it between two loops. Of boxes, and through a GPU's cat, each operator doubles that, for ever.
    limits = {f"realize_{what}_threshold": 500 for what in ("opcount", "reads", "acc_reads") if learned and one_loop}
    own = with_own_code(kernel)
    return torch.compile(own, dynamic=True, fullgraph=True, options={"cpp.min_chunk_size": 1, **limits})
