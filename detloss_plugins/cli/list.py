"""The subcommand that lists the losses."""

import json

import click

from detloss_plugins.cli import _facts
from detloss_plugins.cli._common import UsageError
from detloss_plugins.configs import FRAMEWORKS, names


def losses(family=None):
    """The losses of a family, or all, as dicts of plain values, sorted by family.

    Raises:
        UsageError: for an unknown family.
    """
    by_family = _facts.losses_by_family()
    if family is not None and family not in by_family:
        raise UsageError(f"There is no family {family!r}; there are {', '.join(by_family)}.")
    return [
        {
            "type": name,
            "aliases": _facts.aliases(cls),
            "family": cls.facts.family,
            "title": _facts.title(cls),
            "paper": cls.facts.paper,
            "equal_to": _facts.equals(cls),
            "settings": [{"name": s.name, "default": s.default, "allowed": s.allowed} for s in _facts.settings(cls)],
            "defaults": _facts.in_one_line(cls),
        }
        for found in (by_family if family is None else [family])
        for name, cls in by_family[found].items()
    ]


def lines(rows):
    """The losses as columns, a line each."""
    columns = [("family", "loss", "equal to", "paper", "settings")]
    for row in rows:
        names = ", ".join([row["type"], *row["aliases"]])
        columns.append((row["family"], names, ", ".join(row["equal_to"]), row["paper"], row["defaults"]))
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    return ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in columns]


@click.command()
@click.option("--family", metavar="F", help="Only the losses of this family, such as box.")
@click.option("--configs", is_flag=True, help="The configs that come with the package, in place of losses.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, with the values that each setting may have.")
def command(family, configs, as_json):
    """List the losses, one a line.

    \b
      detloss list
      detloss list --family box
      detloss list --configs
      detloss list --json | jq -r '.[].type'

    A line has the family, the names, the packages that have an equal loss, the paper, and the settings with their
    defaults.
    """
    if configs and family is not None:
        raise UsageError("--family is of losses, and --configs lists none")
    if configs:
        rows = {framework: names(framework) for framework in FRAMEWORKS}
        text = [f"{framework:<13}{name}" for framework, found in rows.items() for name in found]
    else:
        rows = losses(family)
        text = lines(rows)
    click.echo(json.dumps(rows, indent=1) if as_json else "\n".join(text))
