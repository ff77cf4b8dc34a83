"""One training in a process of its own: ``python -m detloss_plugins.ablation.worker FOLDER``.

The folder has ``run.json``; it gets ``metrics.json``, or ``error.txt`` with the reason why there is none.
"""

import os
import platform
import sys
import threading
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from detloss_plugins.ablation.files import read_json, write_json, write_text
from detloss_plugins.ablation.grid import Run

PACKAGES = ("torch", "ultralytics")


def versions() -> dict[str, str]:
    """Versions of Python and of what trains."""
    import detloss_plugins

    found = {"detloss_plugins": detloss_plugins.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def end_with_parent() -> None:
    """End this process when the one that started it ends, however it does: then its end of the pipe is closed."""

    def wait():
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def work(folder: Path) -> None:
    """Train what ``run.json`` says and write ``metrics.json``."""
    import torch

    from detloss_plugins.ablation import yolo

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    run = Run(**read_json(folder / "run.json"))
    write_json(folder / "metrics.json", {**yolo.train(run, folder), "versions": versions()})


def last_line(error: BaseException) -> str:
    """What a traceback ends with, in a line."""
    return (str(error).strip().splitlines() or [""])[-1].join((f"{type(error).__name__}: ", ""))


def main() -> None:
    """The process; its exit status is 1 if the training failed."""
    folder = Path(sys.argv[1])
    if not sys.stdin.isatty():
        end_with_parent()
    try:
        work(folder)
    except Exception as error:
        traceback.print_exc()
        write_text(folder / "error.txt", last_line(error) + "\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
