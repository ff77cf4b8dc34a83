"""Measure functions of no arguments: time in turns, memory at its highest, kernels, and how fast bytes are copied."""

import functools
import gc
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

LEAST, MOST = 5, 50  # rounds, where their number goes by the time
# Operators that allocate, look at a tensor in another way or ask for a number, by how their names begin.
NO_KERNEL = ("empty", "new_empty", "resize_", "set_", "_unsafe_view", "as_strided_", "squeeze_", "unsqueeze_")
NO_KERNEL += ("result_type", "item", "is_nonzero", "_local_scalar_dense")
# Operators for whose result, a number or a shape, the host waits on a device that runs asynchronously.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount")


def synchronize(device):
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(run, device):
    """How long one call takes, until the device is done; what it returns is freed after that."""
    synchronize(device)
    start = time.perf_counter()
    kept = run()
    synchronize(device)
    took = 1000 * (time.perf_counter() - start)
    del kept
    return took


def turns(names, rounds):
    """The order of each round: all names once, in any order, as who comes next finds what the last one left behind."""
    shuffle = random.Random(0)
    for _ in range(rounds):
        yield shuffle.sample(names, len(names))


def rounds_in(seconds, each):
    """How many rounds of ``each`` milliseconds to make."""
    return int(min(max(1000 * seconds / max(each, 1e-3), LEAST), MOST))


def warmed(call, device, calls):
    """How long the last of so many calls took, or of as many as fit in a tenth of a second."""
    took = []
    while not took or (len(took) < calls and sum(took) < 100):
        took.append(milliseconds(call, device))
    return took[-1]


def interleaved(calls, device, rounds=None, seconds=2.0, limit=5.0, warm_up=25):
    """``{name: [milliseconds, ...]}`` of ``{name: function}``, the functions taking turns.

    Each is called ``warm_up`` times first, or fewer if they take a tenth of a second, on top of a call before that
    which may compile: a box loss looks at the targets of its first calls. If the last of these takes longer than
    ``limit`` seconds, this is the only time that it has. ``rounds``, if not given, is as many as fit in ``seconds``,
    within bounds. The garbage collector runs before and not in between.
    """
    gc.collect()
    gc.disable()
    try:
        warm = {name: warmed(call, device, warm_up) for name, call in calls.items()}
        slow = {name: [took] for name, took in warm.items() if took > 1000 * limit}
        names = [name for name in calls if name not in slow]
        times = {name: [] for name in names}
        rounds = rounds or rounds_in(seconds, sum(warm[name] for name in names))
        for order in turns(names, rounds) if names else ():
            for name in order:
                times[name].append(milliseconds(calls[name], device))
    finally:
        gc.enable()
    return times | slow


def spread(times):
    """Median and quartiles."""
    if len(times) == 1:
        return {"ms": times[0], "low": times[0], "high": times[0], "runs": 1}
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"ms": median, "low": low, "high": high, "runs": len(times)}


def peak_memory(run, device):
    """Bytes at the highest, above what there was before; on a CPU of those that PyTorch allocates."""
    if device.type != "cuda":
        return peak_of(profiled(run, device))
    synchronize(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated() - before


def _start(event):
    return event.start_ns() if hasattr(event, "start_ns") else event.start_us()  # before torch 2.2


def peak_of(seen):
    """The highest sum of the allocations and releases that a profile has recorded."""
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=_start):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def profiled(run, device):
    """The profile of one call."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    synchronize(device)
    with profile(activities=activities, profile_memory=not on_gpu) as seen:
        kept = run()
        synchronize(device)
    del kept
    return seen


def is_view(name):
    """Whether an operator such as ``aten::t`` only looks at its input in another way."""
    namespace, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    if packet is None:
        return False
    returns = [value for overload in packet.overloads() for value in getattr(packet, overload)._schema.returns]
    return any(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def working(events):
    """How many of a CPU's events compute something: see :func:`observe`."""
    own = {event.id: event for event in events if may_work(event.name)}
    outer = set()  # operators with such an operator inside
    for event in own.values():
        parent = event.cpu_parent
        while parent is not None and parent.id not in outer:
            outer.add(parent.id)
            parent = parent.cpu_parent
    return len(own.keys() - outer)


@functools.cache
def may_work(name):
    """Whether it is an operator, and neither a view nor an allocation, or a loop of the compiler's."""
    namespace, _, operator = name.partition("::")
    if namespace not in ("aten", "torchvision", "mmcv"):
        return "_cpp_fused" in name
    return not operator.startswith(NO_KERNEL) and not is_view(name)


def device_events(seen, kinds=("kernel", "gpu_memcpy", "gpu_memset")):
    """What ran on a GPU, ``[(name, microseconds), ...]``: kernels, copies and fills; or what else a trace has."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return [(event["name"], event["dur"]) for event in events if event.get("cat") in kinds]


def kernels_and_waits(run, device):
    """How many kernels one call launches, and how often the host waits for the device.

    On a GPU as the profiler sees them there. On a CPU, which has neither, they are the operators that would be a kernel
    (see :func:`observe`) and those that would make the host wait, but for copies to the device.
    """
    seen = profiled(run, device)
    if device.type == "cuda":
        calls = device_events(seen, ("cuda_runtime", "cuda_driver"))
        return len(device_events(seen)), sum("StreamSynchronize" in name for name, _ in calls)
    names = [event.name.removeprefix("aten::") for event in seen.events()]
    return working(seen.events()), sum(name in WAITS for name in names)


def observe(run, device):
    """Peak memory, number of kernels, and on a GPU the milliseconds of these, of one call: ``{name: number}``.

    Kernels on a GPU are what the profiler saw run there, copies and fills included. On a CPU they are the operators
    that do work, that is the innermost ones that are neither views nor mere allocations, and the loops that
    ``torch.compile`` generates, which show up with :func:`named_loops` only.
    """
    if device.type != "cuda":
        seen = profiled(run, device)
        return {"memory": peak_of(seen), "kernels": working(seen.events())}
    found = device_events(profiled(run, device))
    busy = sum(duration for _, duration in found) / 1000
    return {"memory": peak_memory(run, device), "kernels": len(found), "device_ms": busy}


def named_loops():
    """Make what ``torch.compile`` generates for a CPU from now on visible to the profiler; it costs next to nothing."""
    import torch._inductor.config

    torch._inductor.config.cpp.enable_kernel_profile = True


def copier(size, device):
    """A function that moves ``size`` bytes: half of them read, half of them written."""
    source = torch.ones(max(size // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
