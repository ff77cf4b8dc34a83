"""One training in a process of its own: ``python -m detloss_plugins.ablation.worker FOLDER SECONDS``.

A training that was cut off goes on if it has been at it for so many seconds, else it begins again. The folder has
``run.json``; it gets ``metrics.json``, or ``error.txt`` with the reason why there is none.
"""

import os
import sys
import threading
import traceback
from pathlib import Path

from detloss_plugins.ablation.files import locked, read_json, write_json, write_whole
from detloss_plugins.ablation.grid import Run
from detloss_plugins.ablation.machine import machine, versions


def end_with_parent() -> None:
    """End this process when the one that started it ends, however it does: then its end of the pipe is closed."""

    def wait():
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def work(folder: Path, resume_after: float) -> None:
    """Train what ``run.json`` says and write ``metrics.json``, unless it is there; no two processes do at once."""
    with locked(folder / ".lock"):
        if (folder / "metrics.json").exists():
            return
        run = Run(**read_json(folder / "run.json"))
        found = train(run, folder, resume_after)
        write_json(folder / "metrics.json", {**found, "versions": versions(run.model), "machine": machine()})


def train(run: Run, folder: Path, resume_after: float) -> dict:
    """Train with the run's framework."""
    import torch

    from detloss_plugins.ablation import mmdetection, yolo

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    return (mmdetection if mmdetection.is_config(run.model) else yolo).train(run, folder, resume_after)


def last_line(error: BaseException) -> str:
    """What a traceback ends with, in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"


def main() -> None:
    """The process; its exit status is 1 if the training failed."""
    folder = Path(sys.argv[1])
    if not sys.stdin.isatty():
        end_with_parent()
    try:
        work(folder, float(sys.argv[2]))
    except Exception as error:
        traceback.print_exc()
        write_whole(folder / "error.txt", last_line(error) + "\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
