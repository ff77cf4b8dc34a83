"""Regress anchors onto targets by plain gradient descent with losses of ours, and print how the error falls.

The experiment by which DIoU, CIoU and EIoU were argued for. Seven targets of unit area with aspect ratios 1:4 to 4:1
lie at (10, 10). Anchors have 5000 centers, uniform in the disc of radius 3 around it, seven areas and the same seven
ratios: 1 715 000 cases. Each box (cx, cy, w, h) takes 200 steps down the exact gradient of its own loss: step 0.1, from
the 161st 0.01, from the 181st 0.001, times (2 - IoU), a constant. The error is |dx| + |dy| + |dw| + |dh|, summed over
the cases.

  tools/simulate.py                                          IoU (linear), GIoU, DIoU, CIoU, EIoU, SIoU
  tools/simulate.py --quick --loss all                       every box loss with its defaults, a tenth of the centers
  tools/simulate.py --loss GIoULoss --loss "{type: CIoULoss, alpha_gate: 0.5}"

Nothing is clamped: a step may turn a side negative, and the next one goes on from there. A loss with state stays as it
was built (WIoU's running mean at its start), so that every case is on its own. Constants in pixels have their meaning
in this world of unit boxes unless you give them: NWDLoss has constant=1, the size of the targets, and MPDIoULoss an
image of 20 x 20 around them.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from command import check_files, check_picture
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import detloss_plugins
from detloss_plugins.losses import iou_loss
from detloss_plugins.registry import loss_class, registered_losses

RADIUS, CENTERS = 3.0, 5000
RATIOS = (1 / 4, 1 / 3, 1 / 2, 1.0, 2.0, 3.0, 4.0)  # width over height
AREAS = (0.5, 0.67, 0.75, 1.0, 1.33, 1.5, 2.0)
ITERATIONS = 200
STEPS = {1: 0.1, 161: 0.01, 181: 0.001}  # first iteration: step
PRINTED = (0, 50, 100, 160, 200)
CHUNK = 16384  # cases: few enough for the cache, many enough that an operator's overhead does not count
DEFAULT_LOSSES = ("{type: IoULoss, mode: linear}", "GIoULoss", "DIoULoss", "CIoULoss", "EIoULoss", "SIoULoss")
PIXEL_CONSTANTS = {"NWDLoss": {"constant": 1.0}, "MPDIoULoss": {"image_size": (20, 20)}}


def parse_loss(word):
    """The config dicts of a ``--loss``: a name, a dict in YAML's or Python's form, or "all".

    Raises:
        TypeError: for an unknown hyper-parameter.
        ValueError: for anything that is not a box loss.
    """
    try:
        cfg = yaml.safe_load(word)
    except yaml.YAMLError:
        cfg = None
    if cfg == "all":
        return [complete({"type": name}) for name, cls in registered_losses().items() if cls.facts.family == "box"]
    cfg = {"type": cfg} if isinstance(cfg, str) else cfg
    if not isinstance(cfg, dict) or "type" not in cfg:
        raise ValueError(
            f'--loss takes a name, a dict such as "{{type: CIoULoss, alpha_gate: 0.5}}" or all, not {word!r}.'
        )
    return [complete(cfg)]


def complete(cfg):
    """The config with the settings that the loss has here when none are given; see :func:`parse_loss` for errors."""
    cls = loss_class(cfg["type"])
    cfg = {**cls.facts.example, **PIXEL_CONSTANTS.get(cls.__name__, {}), **cfg, "type": cls.__name__}
    if build(cfg).family != "box":
        raise ValueError(
            f"{cls.__name__} is not a loss between boxes (x1, y1, x2, y2); see the README's table for those."
        )
    return cfg


def build(cfg):
    """The loss of a config, in evaluation mode so that its state stays as it is."""
    return loss_class(cfg["type"])(**{k: v for k, v in cfg.items() if k != "type"}).eval()


def label(cfg):
    """A config in one line."""
    return f"{cfg['type']}({', '.join(f'{k}={v!r}' for k, v in cfg.items() if k != 'type')})"


def anchor_centers(count, seed):
    """Centers ``(count, 2)``, uniform in the disc, relative to that of the targets."""
    share, turn = np.random.default_rng(seed).random((2, count))
    direction = np.stack([np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)], -1)
    return RADIUS * np.sqrt(share)[:, None] * direction


def grid(centers):
    """The extents of the grid of cases: targets, centers, areas, ratios."""
    return len(RATIOS), len(centers), len(AREAS), len(RATIOS)


def cases(centers, start, stop):
    """Anchors and targets ``(4, stop - start)`` as rows cx, cy, w, h, of the cases with these numbers.

    The center of the targets is the origin: no loss depends on where it is, and at (10, 10) float32 is too coarse for
    the last steps (EIoU's error ends 5 % too high; here it agrees with float64 within 0.2 %).
    """
    target, center, area, ratio = np.unravel_index(np.arange(start, stop), grid(centers))
    areas, ratios = np.array(AREAS)[area], np.array(RATIOS)[ratio]
    anchors = np.stack([*centers[center].T, np.sqrt(areas * ratios), np.sqrt(areas / ratios)])
    width = np.sqrt(np.array(RATIOS)[target])
    targets = np.stack([0 * width, 0 * width, width, 1 / width])
    return torch.from_numpy(anchors), torch.from_numpy(targets)


def corners(boxes):
    """Rows cx, cy, w, h to boxes ``(n, 4)`` in corners; a view of rows, along which every operator is fast."""
    center, half = boxes[:2], boxes[2:] / 2
    return torch.cat([center - half, center + half]).t()


def step_size(iteration):
    """The step of an iteration, counted from 1."""
    return STEPS[max(first for first in STEPS if first <= iteration)]


def step(loss, boxes, goal, size):
    """One step of gradient descent of boxes (rows) towards the corners ``goal``."""
    boxes = boxes.detach().requires_grad_()
    pred = corners(boxes)
    total = loss(pred, goal, reduction_override="none").sum()  # a box's gradient is then that of its own loss
    (gradient,) = torch.autograd.grad(total, boxes)
    with torch.no_grad():
        return boxes - size * (1 + iou_loss(pred, goal, mode="linear")) * gradient  # 2 - IoU


def descend(loss, boxes, targets):
    """The errors ``(ITERATIONS + 1,)`` of boxes on their way to the targets (rows both), the initial one first."""
    goal, errors = corners(targets), []
    for iteration in range(ITERATIONS + 1):
        if iteration:
            boxes = step(loss, boxes, goal, step_size(iteration))
        errors.append((boxes - targets).abs().sum(dtype=torch.float64))
    return torch.stack(errors).numpy()


def descend_chunk(cfg, centers, dtype, span):
    """:func:`descend` for the cases of a span; what a worker process does."""
    return descend(build(cfg), *(boxes.to(dtype) for boxes in cases(centers, *span)))


def simulate(cfg, centers, *, dtype=torch.float32, apply=map, advance=lambda: None):
    """The error curve of a loss, summed over all cases.

    ``apply`` maps a function over the chunks, in their order; ``advance`` is called after each.
    """
    count = math.prod(grid(centers))
    spans = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    curve = np.zeros(ITERATIONS + 1)
    for errors in apply(partial(descend_chunk, cfg, centers, dtype), spans):
        curve += errors
        advance()
    return curve


def run(configs, centers, workers):
    """One row a loss, with a progress bar."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    count = math.prod(grid(centers))
    rows = []
    # Fresh processes: a fork of one in which torch has started threads may hang.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        Progress(*columns, TimeRemainingColumn()) as progress,
    ):
        deque(pool.map(build, configs * workers), 0)  # so that no loss is timed with the start of the processes
        task = progress.add_task("", total=len(configs) * math.ceil(count / CHUNK))
        for cfg in configs:
            progress.update(task, description=cfg["type"])
            began = time.perf_counter()
            curve = simulate(cfg, centers, apply=pool.map, advance=partial(progress.advance, task))
            seconds = time.perf_counter() - began
            rows.append({"loss": label(cfg), "config": cfg, "seconds": seconds, "curve": curve.tolist()})
    return rows


def print_table(rows, count):
    """The error of every loss at some iterations."""
    table = Table(
        "loss", *(f"error at {i}" for i in PRINTED), "cases/s", title=f"{count:,} cases of {ITERATIONS} steps"
    )
    for row in rows:
        errors = (f"{row['curve'][i]:,.1f}" for i in PRINTED)
        table.add_row(row["loss"], *errors, f"{count / row['seconds']:,.0f}")
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def write_picture(rows, count, path):
    """The error curves of all losses."""
    axes = (figure := Figure(figsize=(9, 6), layout="constrained")).subplots()
    for index, row in enumerate(rows):
        style = ("-", "--", ":", "-.")[index // 10 % 4]  # colours repeat after ten
        axes.plot(row["curve"], style, label=row["loss"])
    axes.set(yscale="log", xlabel="iteration", ylabel="sum of |dx| + |dy| + |dw| + |dh|", title=f"{count:,} cases")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def write_json(rows, count, seed, path):
    """The curves and what they were made with."""
    content = {
        "cases": count,
        "seed": seed,
        "radius": RADIUS,
        "areas": AREAS,
        "ratios": RATIOS,
        "steps": STEPS,
        "versions": {
            "detloss_plugins": detloss_plugins.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "losses": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def parse(argv):
    """The options, with ``losses`` as config dicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", action="append", metavar="LOSS", help="a name, a dict or all (repeat for more)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--centers", type=int, default=CENTERS, metavar="N", help="anchor centers (default 5000)")
    size.add_argument("--quick", action="store_const", dest="centers", const=CENTERS // 10, help="a tenth of them")
    parser.add_argument("--seed", type=int, default=0, help="of the anchor centers")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: all cores)"
    )
    for name, suffix, what in (("--json", "json", "the curves"), ("--picture", "png", "their picture")):
        path = Path(f"runs/simulate.{suffix}")
        parser.add_argument(name, type=Path, default=path, metavar="FILE", help=f"{what} (default {path})")
    args = parser.parse_args(argv)
    for name, least in (("centers", 1), ("workers", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    try:
        args.losses = [cfg for word in args.loss or DEFAULT_LOSSES for cfg in parse_loss(word)]
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    check_picture(parser, args.picture)
    check_files(parser, args.json, args.picture)
    return args


def main(argv=None):
    """Run the command; returns the exit status."""
    args = parse(argv)
    centers = anchor_centers(args.centers, args.seed)
    count = math.prod(grid(centers))
    rows = run(args.losses, centers, args.workers)
    print_table(rows, count)
    write_json(rows, count, args.seed, args.json)
    write_picture(rows, count, args.picture)
    print(f"curves: {args.json}\npicture: {args.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
