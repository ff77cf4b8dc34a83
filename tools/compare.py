"""Compare every loss with every upstream counterpart, value and gradient, on random and on real training tensors.

Prints a table: PASS, FAIL, DIFFERS (two losses that only share a name; the reason is given) or NO REFERENCE.
Exit status 1 if any comparison fails.
"""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from twins import in_words, load, twin_of

from detloss_plugins import MODELS
from detloss_plugins.families import ClassificationLoss
from detloss_plugins.registry import loss_class

# Both sides compute in float64; what remains is where each upstream adds its eps (1e-6 or 1e-7, to areas in square
# pixels or square stride units), and the float32 that some cast to.
RTOL, ATOL = 1e-5, 5e-6
# Two that agree for targets of 0 and 1 only: they weigh soft ones differently.
HARD_TARGETS = {
    ("ModifiedCrossEntropyLoss", "torchvision.ops.sigmoid_focal_loss"),
    ("AsymmetricLoss", "torchvision.ops.sigmoid_focal_loss"),
}


class Difference(NamedTuple):
    """The largest differences over all inputs and ways of calling."""

    value: float = 0.0
    gradient: float = 0.0
    relative: float = 0.0
    agree: bool = True

    def join(self, other):
        """The worse of two."""
        worse = (max(a, b) for a, b in zip(self[:3], other[:3], strict=True))
        return Difference(*worse, self.agree and other.agree)


def random_tensors():
    """``{family: (pred, target)}`` from the families' own samplers."""
    return {cls.family: cls.sample(256, seed=1) for cls in registered().values()}


def registered():
    """Each loss class once, by its own name, in order of registration."""
    MODELS.import_from_location()
    return {cls.__name__: cls for cls in MODELS.module_dict.values()}


def inputs_for(loss, pred, target):
    """The input in the forms that the loss takes: ``[(form, pred, target), ...]`` in float64."""

    def double(x):
        return x.double() if x.is_floating_point() else x

    pred = double(pred)
    if loss.family != "classification":
        return [("", pred, double(target))]
    if hasattr(loss, "num_classes"):  # the columns beyond are the background's, and a label is all they take
        return [("index", pred, _labels(target).clamp(max=loss.num_classes))]
    if isinstance(target, tuple):
        target = ClassificationLoss.dense(pred, tuple(map(double, target)))[0]
    dense, label = double(target), target.argmax(-1)
    positive = target.sum(-1) > 0
    if getattr(loss, "activated", False):
        pred = pred.sigmoid()
    if not loss.use_sigmoid:
        distribution = (dense + 0.1)[positive]
        return [
            ("index", pred[positive], label[positive]),
            ("distribution", pred[positive], distribution / distribution.sum(-1, keepdim=True)),
        ]
    background = torch.where(positive, label, pred.shape[-1])
    return [("soft", pred, dense), ("index", pred, background)]


def _labels(target):
    """Class indices from any form of target; a row without a class has one beyond all."""
    if isinstance(target, tuple):
        return target[0]
    if target.dim() == 1:
        return target
    return torch.where(target.sum(-1) > 0, target.argmax(-1), target.shape[-1])


def calls(loss, pred):
    """Ways of calling a loss under mmdet's contract: keyword arguments by name."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(len(pred), generator=generator, dtype=pred.dtype)
    found = {
        "none": {"reduction_override": "none"},
        "mean": {},
        "sum": {"reduction_override": "sum"},
        "weight": {"weight": rows},
        "weight, avg_factor": {"weight": rows, "avg_factor": 7.5},
        "weight, sum": {"weight": rows, "reduction_override": "sum"},
    }
    if loss.family in ("box", "regression"):
        found["weight (N, 4)"] = {"weight": rows.unsqueeze(-1).expand_as(pred), "avg_factor": 7.5}
    per_row = loss.family not in ("regression", "heatmap") and getattr(loss, "values_per_box", 1) == 1
    if not per_row:  # mmdet's broadcast, so a row weight must be a column
        for kwargs in found.values():
            if "weight" in kwargs:
                kwargs["weight"] = kwargs["weight"].reshape(len(pred), -1)
    return found


def upstream_call(upstream, loss):
    """``call(pred, target, **kwargs)`` for one counterpart, built anew in each call, and the ways that it knows."""
    twin = twin_of(upstream.path)

    def call(pred, target, **kwargs):
        call, given = twin.ready(upstream, loss, pred, target)
        return call(pred, given, kwargs)

    return call, twin.ways


def value_and_gradient(call, pred, target, kwargs):
    """The result and the gradient of a fixed random projection of it."""
    pred = pred.detach().clone().requires_grad_()
    result = call(pred, target, **kwargs).double()  # some counterparts compute in float32
    projection = torch.rand(result.shape, generator=torch.Generator().manual_seed(2), dtype=result.dtype) + 0.5
    (gradient,) = torch.autograd.grad((result * projection).sum(), pred)
    return result.detach(), gradient


def difference(ours, theirs):
    """Largest absolute and relative difference of two (value, gradient) pairs."""
    gaps, relative, agree = [], 0.0, True
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"ours has shape {tuple(a.shape)}, theirs {tuple(b.shape)}")
        gap, size = (a - b).abs(), b.abs()
        gaps.append(gap.max().item() if gap.numel() else 0.0)
        largest = size.max().item() if size.numel() else 0.0
        share = gaps[-1] / max(largest, 1e-12)
        relative = relative if share <= relative else share  # a NaN is the largest
        # `<=` so that a NaN disagrees.
        agree = agree and bool((gap <= ATOL + RTOL * size.clamp(min=largest)).all())
    return Difference(*gaps, relative, agree)


def compare(cls, upstream, tensors):
    """The worst difference between a loss and one counterpart on the given ``{source: (pred, target)}``."""
    loss = cls.make(**upstream.ours)
    call, known = upstream_call(upstream, loss)
    worst = Difference()
    if upstream.at:
        pred, target = (torch.tensor([box], dtype=torch.float32) for box in upstream.at)
        none = {"reduction_override": "none"}
        return difference(*(value_and_gradient(f, pred, target, none) for f in (loss, call)))
    for pred, target in tensors.values():
        for _, p, t in inputs_for(loss, pred, target):
            if (cls.__name__, upstream.path) in HARD_TARGETS and t.is_floating_point():
                t = (t > 0).to(t.dtype)
            for way, kwargs in calls(loss, p).items():
                if known is not None and way not in known:
                    continue
                ours = value_and_gradient(copy.deepcopy(loss), p, t, kwargs)  # state starts anew, as theirs does
                theirs = value_and_gradient(call, p, t, kwargs)
                worst = worst.join(difference(ours, theirs))
    return worst


def verdict(upstream, worst):
    """PASS, FAIL or DIFFERS; a documented difference that is not there is a failure of the documentation."""
    if not upstream.differs:
        return "PASS" if worst.agree else "FAIL"
    return "FAIL" if worst.agree else "DIFFERS"


def settings(upstream):
    """The settings under which the two are the same loss, in words."""
    given = {"ours": upstream.ours, "theirs": upstream.theirs}
    return "; ".join(f"{who} {in_words(values)}" for who, values in given.items() if values) or "defaults"


def rows(names, sources, progress=lambda x, **_: x):
    """One dict for each loss and counterpart (and one for a loss without any)."""
    found = []
    for cls in progress([loss_class(name) for name in names], description="comparing"):
        tensors = {source: by_family[cls.family] for source, by_family in sources.items() if cls.family in by_family}
        if not cls.upstream:
            found.append({"loss": cls.__name__, "upstream": "", "verdict": "NO REFERENCE"})
        for upstream in cls.upstream:
            row = {"loss": cls.__name__, "upstream": upstream.path, "settings": settings(upstream)}
            if load(upstream.path) is None:
                found.append({**row, "verdict": "NOT INSTALLED"})
                continue
            worst = compare(cls, upstream, tensors)
            found.append(
                {
                    **row,
                    "inputs": [] if upstream.at else list(tensors),
                    "value": worst.value,
                    "gradient": worst.gradient,
                    "relative": worst.relative,
                    "verdict": verdict(upstream, worst),
                    "reason": upstream.differs,
                    "at": upstream.at,
                }
            )
    return found


def print_table(found):
    """The rows as a table."""
    table = Table("loss", "upstream", "same under", "|value|", "|gradient|", "relative", "verdict")
    for row in found:
        numbers = [f"{row[key]:.1e}" if key in row else "" for key in ("value", "gradient", "relative")]
        same = row.get("reason") or row.get("settings", "")
        if row.get("at"):
            same += ": {} and {}".format(*row["at"])
        table.add_row(row["loss"], row["upstream"], same, *numbers, row["verdict"])
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def main(argv=None):
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", action="append", metavar="NAME", help="only this loss (repeat for more)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE too")
    args = parser.parse_args(argv)
    try:
        names = [loss_class(name).__name__ for name in args.loss or registered()]
    except ValueError as error:
        parser.error(str(error))
    from training_tensors import training_tensors

    found = rows(names, {"random": random_tensors(), **training_tensors()}, progress=track)
    print_table(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if any(row["verdict"] == "FAIL" for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
