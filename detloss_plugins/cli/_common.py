"""What the subcommands share: errors in one sentence, folders, and what to install."""

import importlib
import importlib.util
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from detloss_plugins import configs
from detloss_plugins.loss import Loss
from detloss_plugins.registry import loss_class, registered_losses

# What to do if a module is missing, said wherever an import of it fails in a subcommand.
INSTALL = {
    "cv2": "OpenCV is not installed: pip install opencv-python-headless.",
    "matplotlib": "matplotlib, which draws, is not installed: pip install 'detloss_plugins[tools]'.",
    "mmcv": "mmcv is not installed: see the README, or give --lite with mmcv-lite.",
    "mmcv._ext": "mmcv has no compiled operators here: install mmcv with them, or give --lite.",
    "mmdet": "MMDetection is not installed: pip install 'detloss_plugins[mmdet]', see the README for mmcv.",
    "pkg_resources": "mmengine needs the package pkg_resources of older setuptools: pip install 'setuptools<81'.",
    "PIL": "Pillow is not installed: pip install 'detloss_plugins[tools]'.",
    "pycocotools": "pycocotools, which measures, is not installed: pip install 'detloss_plugins[tools]'.",
    "ray": "Ray is not installed: pip install 'detloss_plugins[ray]', on every node.",
    "rich": "rich, which prints the tables, is not installed: pip install 'detloss_plugins[tools]'.",
    "scipy": "SciPy, which the digits need, is not installed: pip install 'detloss_plugins[tools]'.",
    "sklearn": "scikit-learn, which the digits come from, is not installed: pip install 'detloss_plugins[tools]'.",
    "torchvision": "torchvision is not installed: see pytorch.org for the one that goes with your torch.",
    "ultralytics": "Ultralytics is not installed: pip install 'detloss_plugins[ultralytics]'.",
}


class UsageError(click.ClickException):
    """Something the user can put right; its message is a sentence or some, a line each."""

    exit_code = 2

    def __init__(self, message: object):
        super().__init__(str(message))

    def show(self, file=None) -> None:
        """Print each line of the message as an error."""
        for line in self.message.splitlines():
            click.echo(f"error: {line}", err=True)


class RunError(UsageError):
    """What went wrong while the command was at work, in a sentence."""

    exit_code = 1


@contextmanager
def as_usage_error(*errors: type[Exception], what: str = "", kind: type[UsageError] = UsageError) -> Iterator[None]:
    """Turn errors of these types into one that is printed: ``what``, and their first line."""
    try:
        yield
    except errors as error:
        raise kind(f"{what}{first_line(error)}") from error


def require(*modules: str) -> None:
    """Raise :class:`RunError` with what to install if one of these modules is missing, before anything is done."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise RunError(INSTALL[module])


def check_folder(path: str | Path) -> None:
    """Raise :class:`UsageError` if a folder is not there and cannot be made; makes nothing."""
    path = Path(path).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write {path}: {there} is no folder that you may write in")


class DataSet(click.ParamType):
    """The path of a data set, or its address, a text, which Ultralytics knows how to read.

    "digits" and "digits:SCENARIO" mean the embedded one's folder, which is built.
    """

    name = "path"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """The path that was meant, or the address."""
        if "://" in str(value):  # of which a path would lose a slash
            return str(value)
        path = Path(value)
        if str(value).partition(":")[0] != "digits" or path.exists():
            return path
        from detloss_plugins.ablation.data import digits_folder

        with as_usage_error(ValueError):
            return digits_folder(str(value))


data_option = click.option(
    "--data",
    type=DataSet(),
    metavar="PATH",
    help="A data.yaml, its folder or its address; for mmengine a folder in COCO layout; digits or digits:SCENARIO.",
)


def check_there(path: Path | str) -> None:
    """Raise :class:`UsageError` if a file or folder is not there; of an address, Ultralytics will say so."""
    if isinstance(path, Path) and not path.exists():
        raise UsageError(f"there is no {path}")


def check_file(path: Path | None) -> None:
    """Make the folder of a file that a command is to write, None for no file, or raise :class:`UsageError`."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        with path.open("a", encoding="utf-8"):
            pass
        if not there:  # until there is something to write
            path.unlink()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def complete_loss(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of losses, for a shell that completes words."""
    return [name for name in registered_losses() if name.startswith(incomplete)]


def complete_config(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of this package's configs, for a shell that completes words."""
    return [name for name in configs.names() if name.startswith(incomplete)]


def loss_class_of(word: str) -> type[Loss]:
    """The loss class that a word means: a registered name, a dotted path, or ``MODULE:CLASS``.

    The module is a dotted name, also of a file in the working directory, or the path of a ``.py`` file.

    Raises:
        UsageError: if there is no such loss.
    """
    module, colon, name = word.rpartition(":")
    with as_usage_error(AttributeError, ValueError):
        return loss_class(getattr(_module(module), name) if colon else name)


def _module(name):
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        check_there(Path(name))
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses and pickles look for what it defines
        spec.loader.exec_module(module)
        return module
    except UsageError:
        raise
    except Exception as error:  # of the user's own file, which is run
        raise UsageError(f"cannot import {name}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: object) -> str:
    """What an error says first, without the pictures that Ultralytics puts into its messages."""
    words = "".join(char for char in str(error) if unicodedata.category(char) != "So" and char != "\ufe0f").strip()
    return (words or type(error).__name__).splitlines()[0].strip()


def average_precision(map50: float, map_: float | None = None) -> str:
    """A mAP50, and a mAP of COCO's IoUs if it was measured, in words."""
    return f"mAP50 {map50:.3f}" + ("" if map_ is None else f"   mAP50-95 {map_:.3f}")
