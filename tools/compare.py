"""Compare every loss with every upstream counterpart, value and gradient, on random and on real training tensors.

Prints a table: PASS, FAIL, DIFFERS (two losses that only share a name; the reason is given) or NO REFERENCE.
Exit status 1 if any comparison fails.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from command import check_files, finish
from rich.console import Console
from rich.progress import track
from rich.table import Table

from detloss_plugins.cli._common import RunError
from detloss_plugins.registry import loss_class, registered_losses
from detloss_plugins.testing import parity
from detloss_plugins.testing.twins import in_words, load


def settings(upstream):
    """The settings under which the two are the same loss, in words."""
    given = {"ours": upstream.ours, "theirs": upstream.theirs}
    return "; ".join(f"{who} {in_words(values)}" for who, values in given.items() if values) or "defaults"


def rows(names, captured, progress=lambda x, **_: x):
    """One dict for each loss and counterpart (and one for a loss without any).

    ``captured`` is ``{source: {family: (pred, target)}}``; random tensors are compared in any case.
    """
    found = []
    for cls in progress([loss_class(name) for name in names], description="comparing"):
        family = cls.facts.family
        tensors = {"random": parity.random_tensors(cls)}
        tensors |= {source: by_family[family] for source, by_family in captured.items() if family in by_family}
        if not cls.facts.upstream:
            found.append({"loss": cls.__name__, "upstream": "", "verdict": "NO REFERENCE"})
        for upstream in cls.facts.upstream:
            row = {"loss": cls.__name__, "upstream": upstream.path, "settings": settings(upstream)}
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
        names = [loss_class(name).__name__ for name in args.loss or registered_losses()]
    except ValueError as error:
        parser.error(str(error))
    check_files(parser, args.json)
    return finish(compare, names, args)


def compare(names, args):
    """Compare, print and write; returns the exit status."""
    for host in ("mmdet", "ultralytics"):  # whose trainings the tensors are of
        if importlib.util.find_spec(host) is None:
            raise RunError(f"{host} is not installed: uv run --all-groups tools/compare.py ...")
    from detloss_plugins.testing.training_tensors import training_tensors

    found = rows(names, training_tensors(), progress=track)
    print_table(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if any(row["verdict"] == "FAIL" for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
