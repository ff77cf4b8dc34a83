"""In which precision the losses are worked out, and what differs between devices."""

import contextlib
import functools
import os
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def float32(tensor: Tensor) -> Tensor:
    """Half precision and whole numbers up-cast to float32; float32 and float64 as they are."""
    return tensor if tensor.is_floating_point() and tensor.element_size() >= 4 else tensor.float()


def _knows_autocast(device: str) -> bool:
    # torch 2.1 has no torch.xpu to ask.
    with contextlib.suppress(RuntimeError, AttributeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.autocast(device, enabled=False)
        return True
    return False


_AUTOCAST = frozenset(filter(_knows_autocast, ("cpu", "cuda", "xpu", "mps")))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which nothing is cast."""
    known = device.type in _AUTOCAST
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


WITHOUT_FLOAT64 = {"mps"}  # devices, Apple's GPUs


def longest(tensor: Tensor) -> Tensor:
    """The same in float64, for sums over a whole batch; in float32 on a device that has nothing longer."""
    return tensor.to(torch.float32 if tensor.device.type in WITHOUT_FLOAT64 else torch.float64)


def is_asynchronous(device: torch.device) -> bool:
    """Whether the host waits for the device when it asks for a number; ``DETLOSS_ASYNC=1`` says so of a CPU too."""
    return device.type not in ("cpu", "meta") or os.environ.get("DETLOSS_ASYNC") == "1"


COMPILES_FROM = "2.4"  # before it, torch.compile does not know all that the kernels need


def can_compile() -> bool:
    """Whether ``compile=True`` has an effect with this torch."""
    return torch.__version__ >= COMPILES_FROM


# Whether a model that holds the loss is being compiled; torch before 2.3 does not tell.
is_compiling = getattr(torch.compiler, "is_compiling", lambda: False)


def with_own_code(function: Any) -> types.FunctionType:
    """A copy to compile: the compiler has room for few graphs by code object, which closures of one place share."""
    code, name = function.__code__.replace(), function.__name__
    return types.FunctionType(code, function.__globals__, name, None, function.__closure__)


def uncompiled(name: str, error: Exception) -> str:
    """The warning that something runs uncompiled, by what the compiler raised."""
    lines = (line.strip() for line in str(error).splitlines())
    reason = next((line for line in lines if line and not line.endswith("raised:")), "")
    return f"{name} runs uncompiled: torch.compile failed with {type(error).__name__}: {reason}"


def outside_graph(function: Callable) -> Callable:
    """A function that breaks the graph of a compiled model, as ``torch.compiler.disable`` makes it.

    That one imports the compiler at once, which takes as long as the import of torch; here whoever compiles does.
    """
    if not hasattr(torch.compiler, "is_compiling"):
        return torch.compiler.disable(function)
    disabled = None  # made once, as a compiled model is compiled again for each other one

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal disabled
        if not is_compiling():
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return call


# Elements of pred in a chunk: few enough for a cache or a bit of a GPU, enough to keep all cores busy.
CHUNK, LARGE_CHUNK = {"cpu": 350_000}, 2**23
AT_ONCE = {"cpu": 4}  # so many chunks are as fast at once, and still small


def is_large(pred: Tensor) -> bool:
    """Whether chunks pay."""
    return pred.numel() > CHUNK.get(pred.device.type, LARGE_CHUNK) * AT_ONCE.get(pred.device.type, 1)


def rows_in_chunk(pred: Tensor) -> int:
    """How many rows of ``pred`` make a chunk."""
    return max(CHUNK.get(pred.device.type, LARGE_CHUNK) * len(pred) // pred.numel(), 1)
