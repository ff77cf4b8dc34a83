"""One training in a process of its own: ``python -m detloss_plugins.ablation.worker FOLDER``.

The folder has ``run.json``; it gets ``metrics.json``, or ``error.txt`` with the reason why there is none.
"""

import os
import platform
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from detloss_plugins.ablation.files import read_json, write_json, write_text
from detloss_plugins.ablation.grid import Run
from detloss_plugins.ablation.mmdetection import is_config


def versions(model: str) -> dict[str, str]:
    """Versions of Python and of what trains a model."""
    import detloss_plugins

    found = {"detloss_plugins": detloss_plugins.__version__, "python": platform.python_version()}
    for name in ("torch", *(("mmdet", "mmcv") if is_config(model) else ("ultralytics",))):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def count_gpus() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """This machine in words."""
    import torch

    gpus = [torch.cuda.get_device_name(n) for n in range(count_gpus())]
    return ", ".join([f"{count_cores()} cores", platform.machine(), platform.system(), *gpus])


def end_with_parent() -> None:
    """End this process when the one that started it ends, however it does: then its end of the pipe is closed."""

    def wait():
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While no other process trains in a folder: wait until such a one has ended."""
    try:
        import fcntl
    except ImportError:  # there is none on Windows
        yield
        return
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def work(folder: Path) -> None:
    """Train what ``run.json`` says and write ``metrics.json``, unless it is there."""
    with alone(folder):
        if (folder / "metrics.json").exists():
            return
        run = Run(**read_json(folder / "run.json"))
        found = train(run, folder)
        write_json(folder / "metrics.json", {**found, "versions": versions(run.model), "machine": machine()})


def train(run: Run, folder: Path) -> dict:
    """Train with the run's framework."""
    import torch

    from detloss_plugins.ablation import mmdetection, yolo

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    return (mmdetection if mmdetection.is_config(run.model) else yolo).train(run, folder)


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
