"""How much of a yolov8n training step is spent in the loss, with the stock losses and with ours, on the digits set.

A step is what Ultralytics' trainer does with a batch that is loaded: forward, criterion, backward and optimiser. After
each step the criterion runs once more, on the same batch and on the detached outputs of the model, forward and backward
by itself, and its assigner and its losses are timed inside it: a faster loss can only gain what the losses take.
The share is the criterion's forward and backward over the step. Medians and quartiles, after a warm-up.
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
from command import UsageError, check_device, check_files, finish
from digits import build_digits
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import spread, synchronize
from train import DIGITS_ARGS
from training_tensors import quiet

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
PARTS = {"assigner": "assigner", "class": "bce", "boxes": "bbox_loss"}  # name here: attribute of the criterion
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


@contextlib.contextmanager
def parts_watched(criterion, watch):
    """While the parts of a criterion are timed."""
    before = {attribute: getattr(criterion, attribute) for attribute in PARTS.values()}
    for name, attribute in PARTS.items():
        setattr(criterion, attribute, watch.watched(name, before[attribute]))
    try:
        yield
    finally:
        for attribute, part in before.items():
            setattr(criterion, attribute, part)


def detached(preds):
    """The model's outputs as leaves that require a gradient, and these leaves."""
    leaves = {name: preds[name].detach().requires_grad_() for name in ("boxes", "scores")}
    return {**preds, **leaves}, list(leaves.values())


def criterion_alone(criterion, loss, preds, batch, device):
    """Milliseconds of a criterion's forward, its parts and its backward, on detached outputs."""
    watch = Stopwatch(device)
    preds, leaves = detached(preds)
    with parts_watched(criterion, watch), watch.time("forward"):
        value, _ = loss(preds, batch)
    with watch.time("backward"):
        torch.autograd.grad(value.sum(), leaves)
    return watch.sums


def timed_trainer(base, steps, warm_up, found):
    """A trainer that times ``steps`` steps after a warm-up, appends a dict of each to ``found`` and stops."""

    class Timed(base):
        def _setup_train(self):
            super()._setup_train()
            self.seen, self.count = {}, 0
            criterion = self.model.criterion = self.model.init_criterion()
            self.plain_loss = criterion.loss
            criterion.loss = self.keep
            self.add_callback("on_train_batch_start", Timed.start)
            self.add_callback("on_train_batch_end", Timed.end)

        def keep(self, preds, batch):
            """The criterion's own call, whose input is kept."""
            self.seen = {"preds": preds, "batch": batch}
            return self.plain_loss(preds, batch)

        def start(self):
            synchronize(self.device)
            self.begun = time.perf_counter()

        def end(self):
            synchronize(self.device)
            step = 1000 * (time.perf_counter() - self.begun)
            alone = criterion_alone(self.model.criterion, self.plain_loss, **self.seen, device=self.device)
            self.count += 1
            if self.count > warm_up:
                found.append({"step": step, **alone})
            if len(found) == steps:
                raise Done

    return Timed


def trainer_of(losses, compiled):
    """The trainer class for the losses of :data:`LOSSES`."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    from detloss_plugins.adapters.ultralytics import make_trainer

    if losses is None:
        return DetectionTrainer
    return make_trainer(losses, compile=compiled)


def measure(name, args):
    """A dict for each timed step of a training with the losses of that name."""
    from ultralytics import YOLO

    found = []
    settings = {**DIGITS_ARGS, "imgsz": args.imgsz, "batch": args.batch, "nbs": args.batch, "device": args.device}
    # Loaded in this process, off the clock; workers would compete for the cores.
    settings |= {"workers": 0, "amp": args.amp, "epochs": 100, "val": False, "verbose": False, "pretrained": False}
    trainer = timed_trainer(trainer_of(*LOSSES[name]), args.steps, args.warm_up, found)
    try:
        with quiet():
            model = YOLO(args.model)
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise UsageError(f"{args.model} is no model of Ultralytics: {error}") from error
    with tempfile.TemporaryDirectory() as folder, quiet(), contextlib.suppress(Done):
        model.train(trainer=trainer, data=str(build_digits() / "digits.yaml"), project=folder, **settings)
    return found


def summary(name, found):
    """One row: median and quartiles of each figure and of the share."""
    shares = [(step["forward"] + step["backward"]) / step["step"] for step in found]
    row = {key: spread([step[key] for step in found]) for key in FIGURES}
    share = spread(shares)
    row["share"] = {"median": share["ms"], "low": share["low"], "high": share["high"]}
    return {"losses": name, "steps": len(found), **row}


def print_table(rows):
    """The rows as a table."""
    table = Table("losses", *(f"{key}, ms" for key in FIGURES), "share of the step")
    for row in rows:
        cells = [f"{row[key]['ms']:.1f} ({row[key]['low']:.1f} to {row[key]['high']:.1f})" for key in FIGURES]
        low, median, high = (100 * row["share"][key] for key in ("low", "median", "high"))
        table.add_row(row["losses"], *cells, f"{median:.1f} % ({low:.1f} to {high:.1f})")
    Console(width=None if sys.stdout.isatty() else 190).print(table)


def parse(argv):
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--losses", action="append", choices=LOSSES, help="only these (repeat for more)")
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
    names = args.losses or list(LOSSES)
    rows = [summary(name, measure(name, args)) for name in track(names, description="training")]
    print_table(rows)
    if args.json:
        about = {**machine([torch.device(args.device).type]), "imgsz": args.imgsz, "batch": args.batch, "amp": args.amp}
        found = {"machine": {**about, "model": args.model}, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
