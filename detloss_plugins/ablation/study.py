"""A folder of trainings: what is planned, what has finished, what failed; and the results of all."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from detloss_plugins.ablation import mmdetection, yolo
from detloss_plugins.ablation.files import read_json, write_json
from detloss_plugins.ablation.grid import Run, contradiction
from detloss_plugins.ablation.machine import count_cores, count_gpus, machine

POLL = 0.5  # seconds
RESUME_AFTER = 600.0  # seconds


class Study:
    """The trainings below a folder.

    Each has a folder ``runs/<label>-<model>-<data>-<seed>`` with ``run.json``, what is to be trained, and, once it has
    finished, ``metrics.json``. A training without it is begun again, or goes on, by the next :meth:`train`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def of(self, run: Run) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / run.name

    def runs(self) -> list[Run]:
        """The runs that are planned here, finished or not."""
        return [Run(**read_json(path)) for path in sorted((self.folder / "runs").glob("*/run.json"))]

    def add(self, runs: Sequence[Run]) -> None:
        """Plan runs; those that are here already stay as they are.

        Raises:
            ValueError: if they contradict the runs that have finished here.
        """
        before = [run for run in self.runs() if self.is_done(run)]
        if problem := contradiction(before, runs):
            raise ValueError(f"{self.folder} has results of another grid: {problem}, or take another folder.")
        for run in runs:
            if not self.is_done(run):
                self.of(run).mkdir(parents=True, exist_ok=True)
                if read_json(self.of(run) / "run.json") not in (None, run.as_dict()):
                    for last in ("weights/last.pt", "last_checkpoint"):  # of another training
                        (self.of(run) / last).unlink(missing_ok=True)
                write_json(self.of(run) / "run.json", run.as_dict())

    def is_done(self, run: Run) -> bool:
        """Whether a run has finished."""
        return (self.of(run) / "metrics.json").exists()

    def epochs_done(self, run: Run) -> int:
        """The epochs that a run has behind it."""
        if self.is_done(run):
            return run.epochs
        return (mmdetection if mmdetection.is_config(run.model) else yolo).epochs_done(self.of(run))

    def train(
        self,
        runs: Sequence[Run],
        jobs: int,
        tick: Callable[[list[Run]], None] = lambda running: None,
        resume_after: float = RESUME_AFTER,
    ) -> None:
        """Train those of the runs that have not finished, so many side by side, each in a process of its own.

        Args:
            runs: what :meth:`add` was given.
            jobs: number of processes, which share the cores. A training is the same, bit for bit, only with the same
                number of threads, so with the same number of jobs.
            tick: called twice a second with the runs that are trained at the moment.
            resume_after: seconds: a training that was cut off before begins again; later, it goes on from its last
                checkpoint, which does not give quite the same numbers.
        """
        waiting = [run for run in runs if not self.is_done(run)]
        places, running = Places(jobs), {}
        try:
            while waiting or running:
                while waiting and places.free:
                    run, place = waiting.pop(0), places.free.pop(0)
                    running[run.name] = run, place, start(self.of(run), places.environment(place), resume_after)
                for name, (run, place, process) in list(running.items()):
                    if process.poll() is not None:
                        process.stdin.close()
                        note_end(self.of(run), process.returncode)
                        places.free.append(place)
                        del running[name]
                tick([run for run, _, _ in running.values()])
                if running:
                    time.sleep(POLL)
        finally:
            for _, _, process in running.values():
                process.kill()
                process.wait()

    def failed(self) -> dict[str, str]:
        """Name -> the last line of the error of runs that failed."""
        files = sorted((self.folder / "runs").glob("*/error.txt"))
        return {
            file.parent.name: file.read_text(encoding="utf-8").strip()
            for file in files
            if not (file.parent / "metrics.json").exists()
        }

    def results(self) -> dict:
        """All that has finished, as plain data: the content of ``results.json``."""
        runs, failed = self.runs(), self.failed()
        done = [(run, read_json(self.of(run) / "metrics.json")) for run in runs if self.is_done(run)]
        done.sort(key=lambda pair: (pair[0].data, pair[0].model, pair[0].label != "stock", pair[0].label, pair[0].seed))
        return {
            "name": self.folder.absolute().name,
            "data": ", ".join(dict.fromkeys(run.data for run, _ in done)),
            "epochs": max((run.epochs for run, _ in done), default=None),
            "versions": joined([found.get("versions", {}) for _, found in done]),
            "machine": "; ".join(dict.fromkeys(found.get("machine") or machine() for _, found in done)),
            "runs": [as_result(run, found) for run, found in done],
            "failed": [{"run": run, "error": error} for run, error in failed.items()],
            "unfinished": [run.name for run in runs if not self.is_done(run) and run.name not in failed],
        }


class Places:
    """Shares of the machine, and which are ``free``: a GPU each, or the cores by the number of jobs."""

    def __init__(self, jobs: int):
        self.gpus = count_gpus()
        self.free = list(range(jobs))
        self.threads = max(1, count_cores() // jobs)

    def environment(self, place: int) -> dict[str, str]:
        """The environment of a process at a place."""
        own = {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        if self.gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else [str(n) for n in range(self.gpus)]
            own["CUDA_VISIBLE_DEVICES"] = names[place % self.gpus]
        return {**os.environ, **own}


def default_jobs() -> int:
    """One for each GPU, or for each core where there is none."""
    return count_gpus() or count_cores()


def start(folder: Path, environment: dict, resume_after: float) -> subprocess.Popen:
    """Start the training of a folder; it ends when this process does, as that closes the pipe to it."""
    (folder / "error.txt").unlink(missing_ok=True)
    with (folder / "train.log").open("ab") as log:
        command = [sys.executable, "-m", "detloss_plugins.ablation.worker", str(folder), str(resume_after)]
        # Where this process finds modules, that one finds losses from outside this package.
        environment = {**environment, "PYTHONPATH": os.pathsep.join(map(str, filter(None, sys.path)))}
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment)


def note_end(folder: Path, status: int) -> None:
    """Write down why a training has no results, if it has not done so itself."""
    if status and not (folder / "error.txt").exists():
        how = f"it was ended by signal {-status}" if status < 0 else f"its process ended with exit status {status}"
        (folder / "error.txt").write_text(f"{how}; see train.log\n", encoding="utf-8")


def joined(versions: Sequence[dict]) -> dict[str, str]:
    """The versions of all runs; several of one package side by side.

    >>> joined([{"torch": "2.5.1"}, {"torch": "2.5.1"}, {"torch": "2.6.0"}])
    {'torch': '2.5.1, 2.6.0'}
    """
    names = dict.fromkeys(name for found in versions for name in found)
    return {name: ", ".join(sorted({found[name] for found in versions if name in found})) for name in names}


def as_result(run: Run, found: dict) -> dict:
    """A run and what came out, as ``results.json`` has them."""
    return {
        "label": run.label,
        "slot": "+".join(dict.fromkeys(map(mmdetection.short, run.losses))),
        "losses": run.losses,
        "model": run.model,
        "data": run.data,
        "epochs": run.epochs,
        "seed": run.seed,
        "args": run.setting["args"],
        **{key: found[key] for key in ("metrics", "per_class", "curve")},
        **{key: found[key] for key in ("weights", "resumed") if found.get(key)},
    }
