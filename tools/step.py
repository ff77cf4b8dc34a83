"""How much of a training step is spent in the loss, and in how many kernels and waits, with stock losses and with ours.

  tools/step.py                                     yolov8n: stock losses, ours that equal them, and others
  tools/step.py --model yolo26n.yaml --losses stock any model of Ultralytics
  tools/step.py --config a.py --config b.py         configs of MMDetection, side by side

A step is what the trainer does with a batch that is loaded: forward, criterion, backward and optimiser. After each step
the criterion (of MMDetection the dense head's loss_by_feat) runs once more, on the same batch and on the detached
outputs of the model, forward and backward by itself: a faster loss can only gain what the losses take. The share is
that over the step. Medians and quartiles, after a warm-up. Kernels and waits for the device are counted once, on a CPU
as operators that would be one; DETLOSS_ASYNC=1 in the environment shows there what a GPU would be given.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench import machine
from command import check_device, check_files, finish
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import kernels_and_waits, named_loops, spread, synchronize

from detloss_plugins.cli._common import UsageError
from detloss_plugins.nested import each_tensor
from detloss_plugins.testing.digits import DIGITS_ARGS, build_digits
from detloss_plugins.testing.training_tensors import quiet

STOCK = {
    "cls": {"type": "BinaryCrossEntropyLoss"},
    "box": {"type": "CIoULoss"},
    "dfl": {"type": "DistributionFocalLoss"},
}
OTHERS = {**STOCK, "cls": {"type": "VarifocalLoss"}, "box": {"type": "EIoULoss"}}
# None: Ultralytics' own trainer and losses.
LOSSES = {"stock": (None, False)} | {
    f"{name}, {mode}": (losses, mode == "compiled")
    for name, losses in (("BCE + CIoU + DFL", STOCK), ("VFL + EIoU + DFL", OTHERS))
    for mode in ("eager", "compiled")
}
# Name here: attributes of the criterion, of which those that it has are timed; none calls another.
PARTS = {"assigner": ("targets", "assigner"), "class": ("bce",), "boxes": ("own_box_losses", "bbox_loss.forward")}
FIGURES = ("step", "forward", *PARTS, "backward")


class Done(Exception):
    """Enough steps."""


class Stopwatch:
    """Sums of milliseconds by name."""

    def __init__(self, device):
        self.device, self.sums = device, {}

    @contextlib.contextmanager
    def time(self, name):
        """Add the time of what is done inside."""
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.sums[name] = self.sums.get(name, 0.0) + 1000 * (time.perf_counter() - start)

    def watched(self, name, function):
        """The function, timed."""

        def call(*args, **kwargs):
            with self.time(name):
                return function(*args, **kwargs)

        return call


class Kept:
    """A criterion that keeps what it was last called with."""

    def __init__(self, criterion):
        self.criterion, self.given = criterion, None

    def __call__(self, *args, **kwargs):
        self.given = args, kwargs
        return self.criterion(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(vars(self)["criterion"], name)


@contextlib.contextmanager
def parts_watched(criterion, watch):
    """While the parts of the branches of a YOLO criterion are timed; of any other, nothing is."""
    with contextlib.ExitStack() as undo:
        branches = [getattr(criterion, name) for name in ("one2many", "one2one") if hasattr(criterion, name)]
        for branch in branches or [criterion]:
            for name, places in PARTS.items():
                for place in places:
                    *of, attribute = place.split(".")
                    owner = getattr(branch, *of, None) if of else branch
                    part = getattr(owner, attribute, None)
                    if part is not None:
                        setattr(owner, attribute, watch.watched(name, part))
                        undo.callback(setattr, owner, attribute, part)
        yield


def detached(given, leaves):
    """What a criterion was given, with leaves in place of what has a gradient; these are added to ``leaves``."""

    def of(tensor):
        leaf = tensor.detach()  # a new tensor each time, as a new batch is
        if tensor.requires_grad:
            leaves.append(leaf.requires_grad_())
        return leaf

    return each_tensor(of, given)


def total(found):
    """The sum of what a criterion gives: the first of a tuple, or what a dict has by name."""
    if isinstance(found, dict):
        return sum(total(part) for part in found.values())
    if isinstance(found, list):
        return sum(map(total, found))
    return (found[0] if isinstance(found, tuple) else found).sum()


def once_more(kept, watch):
    """A kept criterion's last call again, forward and backward, on detached outputs."""
    leaves = []
    args, kwargs = detached(kept.given, leaves)
    with watch.time("forward"):
        value = total(kept.criterion(*args, **kwargs))
    with watch.time("backward"):
        torch.autograd.grad(value, leaves, allow_unused=True)


def alone(kept, device):
    """Milliseconds of a kept criterion's forward, its parts and its backward."""
    watch = Stopwatch(device)
    with parts_watched(kept.criterion, watch):
        once_more(kept, watch)
    return watch.sums


def counted(kept, device):
    """``{"kernels": number, "waits": number}`` of a kept criterion's forward and backward."""
    kernels, waits = kernels_and_waits(lambda: once_more(kept, Stopwatch(torch.device("cpu"))), device)
    return {"kernels": kernels, "waits": waits}


def timed_trainer(base, steps, warm_up, found):
    """A trainer that times ``steps`` steps after a warm-up, appends a dict of each to ``found`` and stops."""

    class Timed(base):
        def _setup_train(self):
            super()._setup_train()
            self.count = 0
            self.kept = self.model.criterion = Kept(self.model.init_criterion())
            self.add_callback("on_train_batch_start", Timed.start)
            self.add_callback("on_train_batch_end", Timed.end)

        def start(self):
            synchronize(self.device)
            self.begun = time.perf_counter()

        def end(self):
            synchronize(self.device)
            step = 1000 * (time.perf_counter() - self.begun)
            self.count += 1
            times = alone(self.kept, self.device)
            if self.count > warm_up:
                found.append({"step": step, **times})
            if len(found) == steps:
                found[-1] |= counted(self.kept, self.device)
                raise Done

    return Timed


def measure_config(config, args):
    """A dict for each timed step of a training by MMDetection with a config, whose head is dense or has an RPN."""
    from mmengine.config import Config
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner

    from detloss_plugins.registry import MODELS

    build_digits()
    device, found = torch.device(args.device), []
    init_default_scope("mmdet")
    with quiet():
        cfg = Config.fromfile(config)
        cfg.train_dataloader.batch_size = args.batch
        model = MODELS.build(cfg.model).to(device).train()
        head = getattr(model, "bbox_head", None) or model.rpn_head
        kept = head.loss_by_feat = Kept(head.loss_by_feat)
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
        loader = iter(Runner.build_dataloader(cfg.train_dataloader))
        for step in range(args.warm_up + args.steps):
            batch = next(loader)
            synchronize(device)
            begun = time.perf_counter()
            model.train_step(batch, optimizer)
            synchronize(device)
            took = 1000 * (time.perf_counter() - begun)
            times = alone(kept, device)
            if step >= args.warm_up:
                found.append({"step": took, **times})
        found[-1] |= counted(kept, device)
    return found


def trainer_of(losses, compiled, bins):
    """The trainer class for the losses of :data:`LOSSES`; a head without bins regresses the distances themselves."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    from detloss_plugins.adapters.ultralytics import make_trainer

    if losses is None:
        return DetectionTrainer
    return make_trainer({**losses, **({"dfl": {"type": "L1Loss"}} if bins == 1 else {})}, compile=compiled)


def measure(name, args):
    """A dict for each timed step of a training with the losses of that name."""
    from ultralytics import YOLO

    found = []
    settings = {**DIGITS_ARGS, "imgsz": args.imgsz, "batch": args.batch, "nbs": args.batch, "device": args.device}
    # Loaded in this process, off the clock; workers would compete for the cores.
    settings |= {"workers": 0, "amp": args.amp, "epochs": 100, "val": False, "verbose": False, "pretrained": False}
    try:
        with quiet():
            model = YOLO(args.model)
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise UsageError(f"{args.model} is no model of Ultralytics: {error}") from error
    trainer = trainer_of(*LOSSES[name], bins=getattr(model.model.model[-1], "reg_max", 1))
    trainer = timed_trainer(trainer, args.steps, args.warm_up, found)
    with tempfile.TemporaryDirectory() as folder, quiet(), contextlib.suppress(Done):
        model.train(trainer=trainer, data=str(build_digits() / "digits.yaml"), project=folder, **settings)
    return found


def summary(name, found):
    """One row: median and quartiles of each figure and of the share."""
    shares = [(step["forward"] + step["backward"]) / step["step"] for step in found]
    row = {key: spread([step[key] for step in found]) for key in FIGURES if key in found[0]}
    share = spread(shares)
    row["share"] = {"median": share["ms"], "low": share["low"], "high": share["high"]}
    return {"losses": name, "steps": len(found), "kernels": found[-1]["kernels"], "waits": found[-1]["waits"], **row}


def print_table(rows):
    """The rows as a table."""
    figures = [key for key in FIGURES if key in rows[0]]
    table = Table("losses", *(f"{key}, ms" for key in figures), "share of the step", "kernels", "waits")
    for row in rows:
        cells = [f"{row[key]['ms']:.1f} ({row[key]['low']:.1f} to {row[key]['high']:.1f})" for key in figures]
        low, median, high = (100 * row["share"][key] for key in ("low", "median", "high"))
        counts = str(row["kernels"]), str(row["waits"])
        table.add_row(row["losses"], *cells, f"{median:.1f} % ({low:.1f} to {high:.1f})", *counts)
    Console(width=None if sys.stdout.isatty() else 190).print(table)


def parse(argv):
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--losses", action="append", choices=LOSSES, help="only these (repeat for more)")
    add("--config", action="append", metavar="FILE", help="a config of MMDetection on the digits (repeat for more)")
    add("--model", default="yolov8n.yaml", help="a YAML of Ultralytics (%(default)s)")
    add("--imgsz", type=int, default=128, help="pixels; the images of the set have 128 (%(default)s)")
    add("--batch", type=int, default=16, help="images a step (%(default)s)")
    add("--device", default="cpu", help="such as cuda (%(default)s)")
    add("--amp", action="store_true", help="mixed precision, on a GPU")
    add("--steps", type=int, default=30, help="counted steps (%(default)s)")
    add("--warm-up", type=int, default=4, help="steps before these (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the rows and the machine to FILE too")
    args = parser.parse_args(argv)
    for name in ("imgsz", "batch", "steps", "warm_up"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    check_device(parser, args.device)
    check_files(parser, args.json)
    return args


def main(argv=None):
    """Run the command; returns the exit status."""
    return finish(report, parse(argv))


def report(args):
    """Train, print and write."""
    named_loops()
    names, run = (args.config, measure_config) if args.config else (args.losses or list(LOSSES), measure)
    rows = [summary(name, run(name, args)) for name in track(names, description="training")]
    print_table(rows)
    if args.json:
        about = {**machine([torch.device(args.device).type]), "imgsz": args.imgsz, "batch": args.batch, "amp": args.amp}
        found = {"machine": {**about, "model": args.model}, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
