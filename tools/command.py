"""What the commands share: errors in one sentence, and files that can be written before anything is measured."""

import os
import sys
from pathlib import Path


class UsageError(Exception):
    """Something the user can put right; its message is a sentence or some, a line each."""

    status = 2


class RunError(UsageError):
    """What went wrong while the command was at work, in a sentence."""

    status = 1


def finish(work, *args):
    """Run a command's work and return its exit status; an error of the classes above is printed, not traced."""
    try:
        return work(*args) or 0
    except UsageError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.status


def check_files(parser, *paths):
    """Make the folders of the files that a command is to write, None for no file, or stop with a sentence."""
    for path in filter(None, paths):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8"):
                pass
        except OSError as error:
            parser.error(f"cannot write {path}: {error.strerror}")


def check_picture(parser, path):
    """Stop with a sentence if a picture's name does not end as one that can be drawn; None is no picture."""
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if path and path.suffix[1:] not in formats:
        parser.error(f"the picture's name must end in one of .{', .'.join(sorted(formats))}, not {path}")


def check_folder(path):
    """Raise :class:`UsageError` if a folder is not there and cannot be made; makes nothing."""
    path = Path(path).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write {path}: {there} is no folder that you may write in")


def cache_folder():
    """The folder of the data sets that the tools build, ``$DETLOSS_PLUGINS_CACHE`` or ``~/.cache/detloss_plugins``."""
    return Path(os.environ.get("DETLOSS_PLUGINS_CACHE") or Path.home() / ".cache" / "detloss_plugins")


def put(new, place):
    """Rename a finished folder to ``place``, whole or not at all, also when two processes build it at once."""
    try:
        new.rename(place)
    except OSError:
        if not place.exists():
            raise


def check_device(parser, name):
    """Stop with a sentence if torch has no device of that name here."""
    import torch

    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError):
        parser.error(f"there is no device {name} here")
