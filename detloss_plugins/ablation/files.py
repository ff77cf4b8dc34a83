"""Files that are written whole or not at all, and locks."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and move it there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if there is none. ``ValueError`` names a file that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def seconds_between(older: Path, younger: Path) -> float:
    """How much later a file was written than another; 0 if one is not there."""
    return younger.stat().st_mtime - older.stat().st_mtime if older.exists() and younger.exists() else 0.0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While no other process has the lock of a file: wait until it has given it back, or has ended, however it did."""
    try:
        import fcntl
    except ImportError:  # there is none on Windows
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
