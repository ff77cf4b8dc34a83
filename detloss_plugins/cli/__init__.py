"""The command ``detloss``. Each module here is a subcommand, imported when it is called.

A module ``NAME.py`` holds a click command called ``command``. What needs mmdet, Ultralytics, scikit-learn and the like
is imported by the functions that use it, so that ``detloss --help`` is quick and works without them.
"""

import importlib
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from detloss_plugins import __version__
from detloss_plugins.cli._common import INSTALL, RunError, UsageError

__all__ = ["main"]


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn what click refuses, and a package that is not installed, into a sentence: for all subcommands, here."""
    try:
        yield
    except click.UsageError as error:
        hint = f" Try: {error.ctx.command_path} --help" if error.ctx else ""
        raise UsageError(" ".join(error.format_message().split()) + hint) from error
    except ModuleNotFoundError as error:
        if error.name not in INSTALL:  # a fault of ours, or of the user's own file
            raise
        raise RunError(INSTALL[error.name]) from error


class Subcommands(click.Group):
    """A group whose subcommands are the modules of this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        return importlib.import_module(f"{__name__}.{cmd_name}").command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _one_sentence():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_sentence():
            return super().invoke(ctx)


def _without_torchscript(show: Callable[..., None]) -> Callable[..., None]:
    """What shows warnings but torch's of its functional optimizers, which it gives whatever the filters are."""

    def show_others(message, *where, **more):
        if not str(message).startswith("`TorchScript` support for functional optimizers"):
            show(message, *where, **more)

    return show_others


COMPLETION = """A shell completes subcommands, options and the names of losses and configs after
eval "$(_DETLOSS_COMPLETE=bash_source detloss)" in ~/.bashrc, zsh_source in ~/.zshrc, or
_DETLOSS_COMPLETE=fish_source detloss | source in fish."""


@click.command(
    cls=Subcommands,
    epilog=COMPLETION,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    no_args_is_help=False,
)
@click.version_option(__version__, prog_name="detloss")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Detection losses for MMDetection and Ultralytics: look, check, train, compare.

    \b
      detloss train                    the default losses on the embedded digits set
      detloss show CIoULoss            formula, settings, and what others compute
      detloss COMMAND --help           each with examples
    """
    # Of imports of mmengine's, which nobody who types a command can change.
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")
    warnings.showwarning = _without_torchscript(warnings.showwarning)
    # Losses of the user's are in the working directory, where ``python -m`` looks; a command has its own folder there.
    if "" not in sys.path:
        sys.path.append("")  # behind what is installed
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
