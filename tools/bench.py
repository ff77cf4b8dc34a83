"""Time every loss beside every upstream counterpart, eager and compiled, from 1k boxes to the logits of a RetinaNet.

A figure is the median of forward and backward over many rounds after a warm-up; in each round everybody has one turn,
in any order. Both sides get their modules, and their target in the form that they take, before the clock starts. Beside
it: quartiles, the largest memory beyond what was there before, with gradients and without, the number of kernels and
the bandwidth, which is the time of a copy of as many bytes as must move at least (pred and target read, the gradient
written) over the median (on a GPU over the time that its kernels ran). The ranking losses have a plain loop over the
positives and the focal loss on the same logits beside them.

  tools/bench.py --json docs/speed/MACHINE.json            measure all, and keep the figures with the others
  tools/bench.py --from docs/speed/MACHINE.json --page --picture    their page and picture, build/speed.md and .png
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path

import torch
from cases import cases, contests, our_losses, participants, size_of
from command import check_files, check_picture
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from speed_page import check_bars, write_page, write_picture
from timing import copier, interleaved, named_loops, observe, peak_memory, spread

from detloss_plugins.registry import loss_class, registered_losses
from detloss_plugins.testing.twins import in_words

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGES = ("torchvision", "mmdet", "mmcv", "mmengine", "ultralytics")
COPY = "copy"


def forward_backward(call, pred, target):
    """A function of no arguments that does both and returns the gradient, so that it is freed off the clock."""
    pred = pred.detach().requires_grad_()

    def run():
        value = call(pred, target)
        if not isinstance(value, torch.Tensor):  # the plain loop has its gradient already
            return value
        return torch.autograd.grad(value, pred)

    return run


def forward_only(call, pred, target):
    """A function of no arguments that gives the value alone, as a validation does."""

    def run():
        with torch.no_grad():
            return call(pred, target)

    return run


def runs_of(contest, case, ours, device, dtype):
    """``{who: function}`` of a contest and of the copy, and those without gradients; pred, and the bytes that move."""
    pred, target, found = participants(contest, case, ours, device, dtype)
    calls = {who: forward_backward(call, pred, given) for who, (call, given) in found.items()}
    without = {who: forward_only(call, pred, given) for who, (call, given) in found.items()}
    bytes_moved = 2 * size_of(pred) + size_of(target)
    return calls | {COPY: copier(bytes_moved, device)}, without, pred, bytes_moved


def able(calls):
    """The functions that run, and ``{who: what went wrong}`` of the others and of losses that run uncompiled."""
    working, notes, failed = {}, {}, {}
    for who, call in calls.items():
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                call()
            except Exception as error:  # a counterpart may not take the dtype; the table says so
                failed[who] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
                continue
        working[who] = call
        if any("runs uncompiled" in str(warning.message) for warning in seen):
            notes[who] = "runs uncompiled"
    return working, notes, failed


def measure(contest, case, ours, device, dtype, options):
    """The rows of one contest at one size."""
    calls, without, pred, bytes_moved = runs_of(contest, case, ours, device, dtype)
    working, notes, failed = able(calls)
    times = interleaved(working, device, options.runs, options.seconds, options.limit)
    facts = {
        "loss": contest.cls.__name__,
        "family": contest.cls.facts.family,
        "settings": in_words(contest.ours),
        "form": contest.form,
        "case": case.name,
        "shape": list(pred.shape),
        "dtype": in_short(pred.dtype),
        "device": device.type,
        "bytes": bytes_moved,
    }
    settings = {upstream.path: in_words(upstream.theirs) for upstream in contest.twins}
    found = [{**facts, "who": who, "theirs": settings.get(who, ""), "error": why} for who, why in failed.items()]
    copied = {**spread(times.pop(COPY)), **observe(working[COPY], device)}
    for who, taken in times.items():
        row = {**facts, "who": who, "theirs": settings.get(who, ""), **spread(taken), **observe(working[who], device)}
        without[who]()  # which may compile
        row["memory_without"] = peak_memory(without[who], device)
        row["of_pred"], row["of_pred_without"] = (row[key] / size_of(pred) for key in ("memory", "memory_without"))
        row["copy_ms"] = copied.get("device_ms", copied["ms"])
        row["bandwidth"] = row["copy_ms"] / row.get("device_ms", row["ms"])
        note = notes.get(who, "one run: it takes too long" if len(taken) == 1 != options.runs else "")
        found.append({**row, "note": note})
    return with_ratios(found)


def with_ratios(found):
    """The rows of one contest, those that are not ours with how many times faster ours are."""
    ours = {row["who"].split()[1]: row["ms"] for row in found if row["who"].startswith("ours ") and "ms" in row}
    for row in found:
        if not row["who"].startswith("ours ") and "ms" in row:
            row["faster"] = {mode: row["ms"] / ms for mode, ms in ours.items()}
    return found


def chosen_cases(contest, options):
    """The sizes to run: a loss with nobody beside it has only the second, the middle one, unless told otherwise."""
    found = cases(contest.cls)
    if options.case:
        return [case for case in found if any(word in case.name for word in options.case)]
    if options.quick:
        found = found[:-1] or found
    beside = contest.twins or contest.cls.facts.family == "ranking"
    return found if beside or options.every_case else found[:2][-1:]


def plan(names, options):
    """``[(contest, cases), ...]`` of some losses."""
    found = [contest for name in names for contest in contests(loss_class(name), options.every_setting)]
    return [(contest, chosen) for contest in found if (chosen := chosen_cases(contest, options))]


def rows(names, options, progress=None):
    """One dict for everybody in each contest at each size, in each dtype and on each device."""
    if "compiled" in options.mode:
        named_loops()
    work = plan(names, options)
    places = [(torch.device(device), DTYPES[dtype]) for device in options.device for dtype in options.dtype]
    task = progress and progress.add_task("", total=sum(len(chosen) for _, chosen in work) * len(places))
    found = []
    for device, dtype in places:
        for contest, chosen in work:
            ours = our_losses(contest, chosen[0], options.mode, device)
            for case in chosen:
                if progress:
                    progress.update(task, description=f"{contest.cls.__name__} {case.name} {in_short(dtype)}")
                torch.manual_seed(0)
                found += measure(contest, case, ours, device, dtype, options)
                if progress:
                    progress.advance(task)
            torch._dynamo.reset()  # as if each loss had a process of its own
            gc.collect()
    return found


def in_short(dtype):
    """A dtype's short name."""
    return str(dtype).removeprefix("torch.")


def print_table(found):
    """The rows as a table."""
    figures = ("ms", "quartiles", "memory", "memory without", "kernels", "of copy", "ours faster: eager", "compiled")
    table = Table("loss", "who", "size", *figures)
    for row in found:
        name = f"{row['loss']}({row['settings']})" if row["settings"] else row["loss"]
        size = f"{row['case']}, {row['dtype']}, {row['device']}"
        if "error" in row:
            table.add_row(name, row["who"], size, row["error"])
            continue
        quartiles = f"{row['low']:.3g} to {row['high']:.3g}"
        faster = [
            f"{row['faster'][mode]:.2f}" if mode in row.get("faster", {}) else "" for mode in ("eager", "compiled")
        ]
        memory = (f"{row[key]:.1f}" for key in ("of_pred", "of_pred_without"))
        figures = (f"{row['ms']:.3g}", quartiles, *memory, str(row["kernels"]))
        who = f"{row['who']} ({row['note']})" if row["note"] else row["who"]
        table.add_row(name, who, size, *figures, f"{100 * row['bandwidth']:.0f} %", *faster)
    Console(width=None if sys.stdout.isatty() else 190).print(table)


def version(package):
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor():
    """The name of the CPU where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(devices):
    """What the figures were taken on."""
    names = {"cpu": processor()}
    if "cuda" in devices:
        names["cuda"] = torch.cuda.get_device_name()
    return {
        "device": {device: names[device] for device in devices},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in PACKAGES},
        "system": platform.system(),
        "date": time.strftime("%Y-%m-%d"),
    }


def parse(argv):
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    add = parser.add_argument
    add("--loss", action="append", metavar="NAME", help="only this loss (repeat for more)")
    add(
        "--case", action="append", metavar="TEXT", help="only sizes whose name has TEXT, such as 100k (repeat for more)"
    )
    add("--device", action="append", choices=("cpu", "cuda"), help="default: all there are")
    add("--dtype", action="append", choices=DTYPES, help="default: float32 and bfloat16 (repeat for more)")
    add("--mode", action="append", choices=("eager", "compiled"), help="of our losses; default: both")
    add("--runs", type=int, help="counted rounds (default: as many as fit in --seconds, 5 to 50)")
    add("--seconds", type=float, default=1.0, help="for the rounds of one size (%(default)s)")
    add("--limit", type=float, default=5.0, help="who takes more seconds than this runs once (%(default)s)")
    add("--every-setting", action="store_true", help="each counterpart under all its settings, not the first only")
    add("--every-case", action="store_true", help="all sizes for losses without a counterpart too")
    add("--quick", action="store_true", help="without the largest sizes, half a second each")
    add("--from", dest="stored", type=Path, metavar="FILE", help="take the rows from FILE and measure nothing")
    add("--json", type=Path, metavar="FILE", help="write the rows and the machine to FILE")
    made = {"type": Path, "metavar": "FILE", "nargs": "?"}
    add("--picture", **made, const=Path("build/speed.png"), help="draw how many times faster ours are (%(const)s)")
    add("--page", **made, const=Path("build/speed.md"), help="write the page (%(const)s)")
    args = parser.parse_args(argv)
    try:
        args.names = [loss_class(name).__name__ for name in args.loss or registered_losses()]
    except ValueError as error:
        parser.error(str(error))
    if args.runs is not None and args.runs < 1:
        parser.error("--runs must be at least 1")
    if "cuda" in (args.device or ()) and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    if args.stored:
        try:
            args.report = read_report(args.stored)
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{args.stored} is no report of this command: {error}")
    check_picture(parser, args.picture)
    check_files(parser, args.json, args.picture, args.page)
    args.device, args.dtype = args.device or here, args.dtype or ["float32", "bfloat16"]
    args.mode = args.mode or ["eager", "compiled"]
    args.seconds = min(args.seconds, 0.5) if args.quick else args.seconds
    if args.case and not args.stored and not plan(args.names, args):
        sizes = dict.fromkeys(case.name for name in args.names for case in cases(loss_class(name)))
        parser.error(f"no size has {' or '.join(args.case)} in its name; there are {', '.join(sizes)}")
    return args


def rounded(value):
    """A figure to eight digits, also in a dict: with fewer, a bar that is missed by a hair would seem to hold."""
    if isinstance(value, dict):
        return {key: rounded(figure) for key, figure in value.items()}
    return float(f"{value:.8g}") if isinstance(value, float) else value


def as_json(report):
    """A report as it is kept: the names of the columns once, a row a line, figures to eight digits."""
    columns = [*dict.fromkeys(key for row in report["rows"] for key in row)]
    lines = ",\n".join(json.dumps([rounded(row.get(key)) for key in columns]) for row in report["rows"])
    head = f'"machine": {json.dumps(report["machine"])},\n"columns": {json.dumps(columns)}'
    return f'{{{head},\n"rows": [\n{lines}\n]}}\n'


def read_report(path):
    """A report that was kept."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    named = [dict(zip(kept["columns"], row, strict=True)) for row in kept["rows"]]
    rows = [{key: value for key, value in row.items() if value is not None} for row in named]
    return {"machine": kept["machine"], "rows": rows}


def measured(args):
    """The report of a new run."""
    with Progress(disable=not sys.stderr.isatty(), console=Console(stderr=True)) as progress:
        return {"machine": machine(args.device), "rows": rows(args.names, args, progress)}


def main(argv=None):
    """Run the command; returns the exit status: 1 if a loss of ours failed."""
    args = parse(argv)
    report = args.report if args.stored else measured(args)
    print_table(report["rows"])
    if args.json:
        args.json.write_text(as_json(report), encoding="utf-8")
    if args.picture:
        write_picture(report, args.picture)
    if args.page:
        write_page(report, args.page, args.picture)
    for bar in check_bars(report["rows"]):
        print(f"{bar['verdict']:13} {bar['bar']}: {bar['figure']}")
    return 1 if any("error" in row and row["who"].startswith("ours ") for row in report["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
