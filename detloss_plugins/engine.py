"""The value and the gradient of a sum over rows: in chunks of rows, or by one compiled kernel.

Autograd keeps every intermediate of every row until the backward: ten or twenty times a dense detector's logits. Here a
row's gradient is worked out along with its value. The engine differentiates pure functions and knows nothing of losses.
"""

import inspect
import types
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from detloss_plugins.precision import float32, is_compiling, is_large, rows_in_chunk


class Call(NamedTuple):
    """``function(*rows, *shared)`` gives the weighted losses of some rows, one or more a row."""

    function: Callable[..., Tensor]
    rows: tuple[Tensor, ...]  # pred, which alone is differentiated here, and what else has a row for each of its rows
    shared: tuple[Tensor, ...] = ()  # what every row needs
    row_wise: bool = False  # whether the losses of a row depend on that row and on what is shared alone
    # To compile it once: what is equal for equal functions, what makes one that cannot change, its name in a warning.
    kernel: tuple[Hashable, Callable[[], Callable[..., Tensor]], str] | None = None

    def losses(self) -> Tensor:
        """The losses of all rows, in plain operators."""
        return self.function(*self.rows, *self.shared)

    def filled(self, flat: tuple[Tensor, ...]) -> "Call":
        """The same with other tensors."""
        count = len(flat) - len(self.shared)
        return self._replace(rows=tuple(flat[:count]), shared=tuple(flat[count:]))

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
    """The sum of the losses of all rows; only ``pred`` gets its gradient by chunks or a kernel."""
    pred, *others = *call.rows, *call.shared
    backward = torch.is_grad_enabled()
    if not call.row_wise or is_compiling() or (backward and any(x.requires_grad for x in others)):
        return call.losses().sum()
    backward = backward and pred.requires_grad
    # 0 and 1 rows would be compiled for themselves.
    if call.kernel and len(pred) > 1 and (value := _by_kernel(call, backward)) is not None:
        return value
    if not call.in_chunks():
        return call.losses().sum()
    if backward:
        return _GradientInForward.apply(_chunk_by_chunk, call, pred, *others)[0]
    return torch.stack([chunk.losses().sum() for _, chunk in call.chunks()]).sum()


def _chunk_by_chunk(call: Call) -> tuple[Tensor, Tensor]:
    pred, sums = call.rows[0], []
    # It waits for what it is multiplied by, which a loss scaler makes large because float16 lacks the range.
    gradient = torch.empty_like(pred, dtype=torch.float32 if pred.dtype == torch.float16 else pred.dtype)
    for part, chunk in call.chunks():
        x, *others = *chunk.rows, *chunk.shared
        with torch.enable_grad():
            x = float32(x.detach()).requires_grad_()
            value = chunk.function(x, *others).sum()
        (gradient[part],) = torch.autograd.grad(value, x)
        sums.append(value.detach())
    return torch.stack(sums).sum(), gradient


class _GradientInForward(torch.autograd.Function):
    """A sum with its gradient for ``pred``, as ``way(call)`` gives them; differentiated again, the plain function's."""

    @staticmethod
    def forward(*inputs):
        return inputs[0](inputs[1].filled(inputs[2:]))

    forward.__func__.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # torch asks each call

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, call, *flat = inputs
        ctx.call = call._replace(rows=(), shared=(None,) * len(call.shared))  # their tensors are saved below
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # there would be one of zeros beside it
        ctx.save_for_backward(output[1], *flat)
        ctx.save_for_forward(output[1], *flat)

    @staticmethod
    def gradient(ctx, outer):
        gradient, pred, *others = ctx.saved_tensors  # once in a backward, as torch.utils.checkpoint wants it
        if torch.is_grad_enabled():
            return torch.func.vjp(lambda x: ctx.call.filled((x, *others)).losses().sum(), pred)[1](outer)[0]
        if gradient.dtype == pred.dtype:
            return gradient * outer
        found = torch.empty_like(pred)
        for part, _ in Call(torch.mul, (gradient,)).chunks():
            torch.mul(gradient[part], outer, out=found[part])
        return found

    @staticmethod
    def backward(ctx, outer, _):
        return None, None, _GradientInForward.gradient(ctx, outer), *[None] * (len(ctx.needs_input_grad) - 3)

    @staticmethod
    def jvp(ctx, *tangents):
        return (_GradientInForward.gradient(ctx, float32(ctx.saved_tensors[1].new_ones(()))) * tangents[2]).sum(), None

    @staticmethod
    def vmap(info, in_dims, way, call, *flat):
        value = torch.vmap(lambda *flat: call.filled(flat).losses().sum(), in_dims[2:])(*flat)
        return (value, value.detach()), (0, 0)


_kernels: dict[Hashable, Callable] = {}  # for the whole process
_failed: set[Hashable] = set()


def _by_kernel(call: Call, backward: bool) -> Tensor | None:
    """The sum by a compiled kernel; None where there is none."""
    key, make, name = call.kernel  # type: ignore[misc]  # a call without one does not come here
    if key in _failed:
        return None

    def run(call):
        place = key, len(call.rows), backward, call.rows[0].device.type == "cpu" and not _is_narrow(call.rows[0])
        kernel = _kernels.get(place) or _kernels.setdefault(place, _compile(make(), *place[2:]))
        flat = [_contiguous(x.detach()) for x in (*call.rows, *call.shared)]
        one = flat[0].new_ones(1 if _is_narrow(flat[0]) else len(flat[0]))
        sums, *gradient = kernel(one, *flat)
        return sums.sum(), *gradient

    try:
        with torch.set_grad_enabled(backward):
            return _GradientInForward.apply(run, call, *call.rows, *call.shared)[0] if backward else run(call)[0]
    except (MemoryError, torch.cuda.OutOfMemoryError):
        return None  # chunks take less
    except Exception as error:
        with torch.no_grad():
            call.of_each_chunk()  # if the arguments are at fault, this says it
        _failed.add(key)
        reason = next((line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")), "")
        told = f"{name} runs uncompiled: torch.compile failed with {type(error).__name__}: {reason.strip()}"
        warnings.warn(told, stacklevel=6)
        return None


def _is_narrow(x: Tensor) -> bool:
    return x.numel() <= 5 * len(x)


def _contiguous(x: Tensor) -> Tensor:
    """The same; on a CPU a few columns with each contiguous, as a vector load then reads x1 of many boxes."""
    few = x.device.type == "cpu" and x.dim() == 2 and _is_narrow(x)
    return torch.stack(x.unbind(-1)).t() if few else x.contiguous()


def _compile(function: Callable[..., Tensor], backward: bool, one_loop: bool) -> Callable:
    """A kernel that gives a sum for each row, as a full one would run in one block of a GPU, and maybe the gradient.

    A 1 for each row comes first: without a number a row, the compiler makes a loop over all and another over the rows.
    """

    def sums(one, *flat):
        of_rows = function(*flat)
        of_rows = one * (of_rows.flatten(1).sum(1) if of_rows.dim() > 1 else of_rows)
        return of_rows.sum(), of_rows

    def plain(one, pred, *others):
        if not backward:
            return (sums(one, pred, *others)[1],)
        gradient, of_rows = torch.func.grad(sums, argnums=1, has_aux=True)(one, float32(pred), *others)
        return of_rows, gradient if pred.dtype == torch.float16 else gradient.to(pred.dtype)

    # The compiler follows tensors through it and does not read it, as it would check all that it has read at each call.
    torch.compiler.allow_in_graph(plain)

    def kernel(*flat):
        return plain(*flat)

    # It has room for few graphs by code object, which all kernels would share: a copy has its own.
    own = types.FunctionType(kernel.__code__.replace(), globals(), kernel.__name__, None, kernel.__closure__)
    # It is to use threads whatever the size of the first call; and on a CPU to work out again what value and gradient
    # share, not keep it between two loops. Of boxes, and through a GPU's cat, each operator doubles that, for ever.
    limits = {f"realize_{what}_threshold": 500 for what in ("opcount", "reads", "acc_reads") if backward and one_loop}
    return torch.compile(own, dynamic=True, fullgraph=True, options={"cpp.min_chunk_size": 1, **limits})
