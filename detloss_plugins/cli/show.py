"""The subcommand that tells all there is to know of a loss."""

import importlib.util
import inspect
import re
import textwrap
from pathlib import Path

import click

from detloss_plugins.cli import _facts
from detloss_plugins.cli._common import UsageError, as_usage_error, check_folder, complete_loss, loss_class_of
from detloss_plugins.registry import SCOPE

WIDTH = 100


def plain(text):
    """A docstring as text for a terminal."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)  # a reference, by its last part
    return text.replace("``", "`")


def wrapped(text, indent):
    """A paragraph in lines."""
    return textwrap.wrap(plain(text), WIDTH, initial_indent=indent, subsequent_indent=indent)


def formula(cls):
    """The lines of what the loss's function says, under its name."""
    arguments = [p.name for p in inspect.signature(cls.fn).parameters.values() if p.kind != p.KEYWORD_ONLY]
    doc = textwrap.indent(plain(inspect.getdoc(cls.fn) or ""), "  ")
    return ["Formula", f"  {cls.fn.__name__}({', '.join(arguments)}, ...)", *doc.splitlines()]


def about(cls):
    """The lines of what the class says beside its first line, and of what its family takes."""
    _, _, rest = _facts.body(vars(cls).get("__doc__")).partition("\n")
    family = next((base for base in cls.__mro__[1:] if base.__module__ == f"{SCOPE}.families"), None)
    texts = [rest, _facts.body(vars(family)["__doc__"]) if family else ""]
    return [line for text in texts if text.strip() for line in [*plain(text.strip()).splitlines(), ""]]


def setting_lines(cls):
    """The lines of the settings: default, allowed values, meaning."""
    lines = ["Settings, with their defaults"]
    for setting in _facts.settings(cls):
        lines.append(f"  {setting!s:<28} {setting.allowed}".rstrip())
        lines += wrapped(setting.meaning, " " * 6)
    names, shared = [setting.name for setting in _facts.settings(cls)], _facts.shared(cls)
    also = ", ".join(str(s) for s in _facts.every_setting(cls) if s.name in shared and s.name not in names)
    return [*lines, *wrapped(f"and as its kind has: {also}", "  ")]


def upstream_lines(cls):
    """The lines of where others have the same loss, and where they differ and why."""
    lines = ["Elsewhere"]
    for upstream in cls.facts.upstream:
        under = _facts.same_under(upstream)
        under = "" if under == "defaults" else f", with {under}"
        if not upstream.differs:
            lines += wrapped(f"equal to {upstream.path}{under}", "  ")
            continue
        where = " for pred {} and target {}".format(*upstream.at) if upstream.at else ""
        lines += wrapped(f"differs from {upstream.path}{under}{where}: {upstream.differs}", "  ")
    return lines if cls.facts.upstream else [*lines, "  no package that this one is compared with has it"]


def use_lines(cls):
    """The lines of how it is written in a config, and its weight in YOLO if Ultralytics is installed."""
    lines = ["In a config", f"  MMDetection: {_facts.as_dict(cls, f'{SCOPE}.')}"]
    if importlib.util.find_spec("ultralytics") is None:
        return [*lines, "  Ultralytics: not installed here"]
    from detloss_plugins.adapters.ultralytics.config import default_weight

    slots = _facts.yolo_slots(cls)
    for slot, tasks in slots.items():
        how = f"for {', '.join(tasks)}, with loss_weight {default_weight(cls, slot):g}"
        lines.append(f"  Ultralytics: {slot}: {{type: {cls.__name__}}}, {how}")
    return lines if slots else [*lines, "  Ultralytics: it fits no slot there"]


def text(cls):
    """All that there is to know of a loss class, as text."""
    facts = cls.facts
    names = ", ".join([cls.__name__, *_facts.aliases(cls)])
    head = [f"{names} ({facts.family} loss)", _facts.title(cls), *filter(None, [facts.paper]), "", *about(cls)]
    parts = [formula(cls), setting_lines(cls), upstream_lines(cls), use_lines(cls)]
    return "\n".join([*head, *("\n".join([*part, ""]) for part in parts)])


def draw(cls, path):
    """Write a picture of value and gradient of the loss with its defaults.

    Raises:
        UsageError: if there is none of such a loss, or the file cannot be written, or not in a format of this name.
    """
    from detloss_plugins.cli._plot import figure, save

    if not path.suffix:  # matplotlib would add one
        raise UsageError(f"{path} has no suffix: name a .png, .svg or .pdf")
    check_folder(path.parent)
    with as_usage_error(OSError, ValueError):
        picture = figure(cls.make(), cls.__name__)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(picture, path)


@click.command()
@click.argument("name", shell_complete=complete_loss)
@click.option("--plot", type=Path, metavar="FILE", help="Draw value and gradient into FILE, a .png, .svg or .pdf.")
def command(name, plot):
    """Show all there is to know of a loss.

    \b
      detloss show CIoULoss
      detloss show FocalLoss --plot focal.png
      detloss show my_losses.py:MyLoss

    That is the formula, the settings with their defaults and the values that they may have, the paper, which packages
    have an equal loss and which differ, where and why, and its weight in YOLO.
    """
    cls = loss_class_of(name)
    if plot:
        draw(cls, plot)
    click.echo(text(cls))
    if plot:
        click.echo(f"picture: {plot}")
