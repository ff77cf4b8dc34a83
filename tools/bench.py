"""Time the ranking losses beside a plain loop over the positives and the focal loss, on the same logits.

Each figure is the median of forward and backward over several runs, after a warm-up, the losses in turn; with it the
largest memory beyond what was there before, as a multiple of the logits'. The loop, AP loss written as its authors do,
runs once.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from compare import registered
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from detloss_plugins import build_loss
from detloss_plugins.registry import loss_class

SIZES = ((500, 100_000), (2000, 1_000_000))
YARDSTICK = "FocalLoss"


def scene(positives, negatives, seed=0):
    """Logits and soft targets in one row: negatives mostly below, but all of them near enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(positives + negatives, generator=generator) - 4
    logits[:positives] += 3
    target = torch.zeros_like(logits)
    target[:positives] = torch.rand(positives, generator=generator).clamp(min=0.01)
    order = torch.randperm(len(logits), generator=generator)
    return logits[order], target[order]


def plain_ap_loss(logits, target, delta=1.0):
    """AP loss and its update by a loop over the positives, from the lowest: what the fast form replaces."""
    scores, negatives = logits[target > 0], logits[target == 0]
    near = negatives >= scores.min() - delta
    others = negatives[near]
    up, down = torch.zeros_like(scores), torch.zeros_like(others)
    best = torch.zeros(())
    for i in scores.argsort():
        above = ((scores - scores[i]) / (2 * delta) + 0.5).clamp(0, 1).sum() + 0.5
        step = ((others - scores[i]) / (2 * delta) + 0.5).clamp(0, 1)
        precision = above / (above + step.sum())
        step /= above + step.sum()
        if precision >= best:
            best = precision
        else:
            step *= (1 - best) / (1 - precision)
        down += step
        up[i] = best - 1
    pushed = torch.zeros_like(negatives)
    pushed[near] = down
    return -up.mean(), up / len(up), pushed / len(up)


def forward_backward(loss, logits, target):
    """A function of no arguments that does both and forgets the gradient."""
    logits = logits.clone().requires_grad_()

    def run():
        loss(logits, target).backward()
        logits.grad = None

    return run


def milliseconds(run):
    """How long one call takes."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def peak_memory(run, device):
    """Bytes at the highest, above what there was before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def rows(names, sizes, runs, device, progress=lambda x, **_: x):
    """One dict for each loss at each size."""
    found = []
    for positives, negatives in sizes:
        logits, target = (x.to(device) for x in scene(positives, negatives))
        calls = {name: forward_backward(build_loss({"type": name}), logits, target) for name in (YARDSTICK, *names)}
        times = {name: [] for name in calls}
        for turn in progress(range(runs + 2), description=f"{positives} x {negatives}"):
            for name, call in calls.items():
                took = milliseconds(call)
                if turn > 1:  # the first two warm up
                    times[name].append(took)
        median = {name: statistics.median(values) for name, values in times.items()}
        if "APLoss" in names:
            loop = milliseconds(functools.partial(plain_ap_loss, logits, target))
        for name, values in times.items():
            row = {"loss": name, "positives": positives, "negatives": negatives, "ms": median[name]}
            row |= {"least": min(values), "most": max(values), "of_focal": median[name] / median[YARDSTICK]}
            row["memory"] = peak_memory(calls[name], device) / (logits.numel() * logits.element_size())
            if name == "APLoss":
                row |= {"loop_ms": loop, "faster": loop / median[name]}
            found.append(row)
    return found


def print_table(found):
    """The rows as a table."""
    header = (
        "loss",
        "positives",
        "negatives",
        "ms",
        "least to most",
        "of focal",
        "memory / logits",
        "loop ms",
        "faster",
    )
    table = Table(*header)
    for row in found:
        loop = (f"{row['loop_ms']:.0f}", f"{row['faster']:.0f} x") if "faster" in row else ("", "")
        spread = f"{row['least']:.1f} to {row['most']:.1f}"
        numbers = (f"{row['ms']:.1f}", spread, f"{row['of_focal']:.2f}", f"{row['memory']:.1f}")
        table.add_row(row["loss"], str(row["positives"]), str(row["negatives"]), *numbers, *loop)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def machine(device):
    """What the figures were taken on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def main(argv=None):
    """Run the command; returns the exit status."""
    ranking = [name for name, cls in registered().items() if cls.family == "ranking"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", action="append", metavar="NAME", help="only this ranking loss (repeat for more)")
    parser.add_argument("--runs", type=int, default=15, help="counted runs of each (%(default)s)")
    parser.add_argument("--device", default="cpu", help="such as cuda (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the machine to FILE too")
    args = parser.parse_args(argv)
    try:
        names = [loss_class(name).__name__ for name in args.loss or ranking]
    except ValueError as error:
        parser.error(str(error))
    if others := [name for name in names if name not in ranking]:
        parser.error(f"{others[0]} is not a ranking loss; there are {', '.join(ranking)}")
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    device = torch.device(args.device)
    found = rows(names, SIZES, args.runs, device, progress=track)
    print_table(found)
    if args.json:
        report = {"machine": machine(device), "rows": found}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
