"""The command ``detloss``. Each module here is a subcommand, imported when it is called.

A module ``NAME.py`` holds a click command called ``command``. What needs mmdet, Ultralytics, scikit-learn and the like
is imported by the functions that use it, so that ``detloss --help`` is quick and works without them.
"""

import importlib
import pkgutil

import click

from .. import __version__

__all__ = ["main"]


class Subcommands(click.Group):
    """A group whose subcommands are the modules of this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        return importlib.import_module(f"{__name__}.{cmd_name}").command


@click.command(cls=Subcommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="detloss")
def main() -> None:
    """Detection losses for MMDetection and Ultralytics: look, check, train, compare."""
