"""What the subcommands share: errors in one sentence, folders, and what to install."""

import os
from pathlib import Path

import click

# What to do if a module is missing.
INSTALL = {
    "cv2": "OpenCV is not installed: pip install opencv-python-headless.",
    "mmcv": "mmcv is not installed: see the README, or give --lite with mmcv-lite.",
    "mmcv._ext": "mmcv has no compiled operators here: install mmcv with them, or give --lite.",
    "mmdet": "MMDetection is not installed: pip install 'detloss_plugins[mmdet]', see the README for mmcv.",
    "pkg_resources": "mmengine needs the package pkg_resources of older setuptools: pip install 'setuptools<81'.",
    "sklearn": "scikit-learn, which the digits come from, is not installed: pip install scikit-learn.",
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


def check_folder(path: str | Path) -> None:
    """Raise :class:`UsageError` if a folder is not there and cannot be made; makes nothing."""
    path = Path(path).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write {path}: {there} is no folder that you may write in")


def first_line(error: object) -> str:
    """What an error says first, in plain characters."""
    return (str(error).encode("ascii", "ignore").decode().strip() or type(error).__name__).splitlines()[0].strip()
