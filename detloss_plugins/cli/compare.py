"""The subcommand that compares every loss with every upstream counterpart, value and gradient."""

import json
import sys
from pathlib import Path

import click

from detloss_plugins.cli._common import check_file, complete_loss, loss_class_of, require
from detloss_plugins.cli._facts import same_under
from detloss_plugins.registry import registered_losses
from detloss_plugins.testing import parity
from detloss_plugins.testing.twins import load


def rows(classes, captured, progress=lambda x, **_: x):
    """One dict for each loss and counterpart (and one for a loss without any).

    ``captured`` is ``{source: {family: (pred, target)}}``; random tensors are compared in any case.
    """
    found = []
    for cls in progress(classes, description="comparing"):
        family = cls.facts.family
        tensors = {"random": parity.random_tensors(cls)}
        tensors |= {source: by_family[family] for source, by_family in captured.items() if family in by_family}
        if not cls.facts.upstream:
            found.append({"loss": cls.__name__, "upstream": "", "verdict": "NO REFERENCE"})
        for upstream in cls.facts.upstream:
            row = {"loss": cls.__name__, "upstream": upstream.path, "settings": same_under(upstream)}
            if load(upstream.path) is None:
                found.append({**row, "verdict": "NOT INSTALLED"})
                continue
            worst = parity.compare(cls, upstream, tensors.values())
            found.append(
                {
                    **row,
                    "inputs": [] if upstream.at else list(tensors),
                    "value": worst.value,
                    "gradient": worst.gradient,
                    "relative": worst.relative,
                    "verdict": parity.verdict(upstream, worst),
                    "reason": upstream.differs,
                    "at": upstream.at,
                }
            )
    return found


def print_table(found):
    """The rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("loss", "upstream", "same under", "|value|", "|gradient|", "relative", "verdict")
    for row in found:
        numbers = [f"{row[key]:.1e}" if key in row else "" for key in ("value", "gradient", "relative")]
        same = row.get("reason") or row.get("settings", "")
        if row.get("at"):
            same += ": {} and {}".format(*row["at"])
        table.add_row(row["loss"], row["upstream"], same, *numbers, row["verdict"])
    Console(width=None if sys.stdout.isatty() else 180, markup=False, emoji=False).print(table)


@click.command()
@click.option(
    "--loss",
    "names",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_loss,
    help="Only this loss; give it again for more.",
)
@click.option("--json", "file", type=Path, metavar="FILE", help="Write the rows to FILE too.")
@click.pass_context
def command(ctx, names, file):
    """Compare the losses with their upstream counterparts.

    \b
      detloss compare
      detloss compare --loss CIoULoss --loss FocalLoss --json parity.json

    Value and gradient, on random tensors and on those of real training steps, for which MMDetection and
    Ultralytics must be installed. Prints a table: PASS, FAIL, DIFFERS (two losses that only share a name; the reason is
    given), NO REFERENCE or NOT INSTALLED. Exit status 1 if any fails.
    """
    classes = [loss_class_of(name) for name in names] or [*registered_losses().values()]
    check_file(file)
    require("mmdet", "ultralytics")  # whose trainings the tensors are of
    from rich.progress import track

    from detloss_plugins.testing.training_tensors import training_tensors

    found = rows(classes, training_tensors(), progress=track)
    print_table(found)
    if file:
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if any(row["verdict"] == "FAIL" for row in found):
        ctx.exit(1)
