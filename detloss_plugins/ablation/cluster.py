"""The trainings of a study on a Ray cluster, each a task with its cores or a GPU.

Every node needs the same Python environment, and the study's folder, as well as any data set but the digits, must be on
a file system that all nodes share. A task whose node or worker is lost is started again on another one, where it goes
on as a training does that was cut off.
"""

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from detloss_plugins.ablation.grid import Run
from detloss_plugins.ablation.study import POLL, RESUME_AFTER, Study, note_end, start
from detloss_plugins.ablation.worker import last_line

RETRIES = 10


def train_there(folder: str, cores: int, resume_after: float) -> None:
    """What a task does: the training of a folder, in a process that ends when the task's does."""
    import ray

    place, node = Path(folder), ray.get_runtime_context().get_node_id()
    with (place / "train.log").open("a", encoding="utf-8") as log:
        log.write(f"on {socket.gethostname()}, node {node} of Ray\n")
    process = start(place, {**os.environ, "OMP_NUM_THREADS": str(cores), "PYTHONUNBUFFERED": "1"}, resume_after)
    note_end(place, process.wait())


def train(
    study: Study,
    runs: Sequence[Run],
    address: str,
    cores: int = 1,
    tick: Callable[[list[Run]], None] = lambda running: None,
    resume_after: float = RESUME_AFTER,
) -> None:
    """Train those of the runs that have not finished on a cluster.

    Args:
        study, runs, tick, resume_after: as for :meth:`Study.train`.
        address: of the cluster, as for ``ray.init``; "auto" for the one that this machine belongs to.
        cores: of each training; where the cluster has GPUs, it has one of them too.

    Raises:
        ConnectionError: if there is no cluster at the address.
    """
    import ray

    waiting = [run for run in runs if not study.is_done(run)]
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        how = {"num_cpus": cores, "num_gpus": gpus, "max_retries": RETRIES, "scheduling_strategy": "SPREAD"}
        task = ray.remote(**how)(train_there)
        pending = {task.remote(str(study.of(run).absolute()), cores, resume_after): run for run in waiting}
        while pending:
            for done in ray.wait(list(pending), timeout=POLL)[0]:
                note_lost(study.of(pending.pop(done)), done)
            tick([run for run in pending.values() if (study.of(run) / "train.log").exists()])
    finally:
        ray.shutdown()


def note_lost(folder: Path, done) -> None:
    """Write down why a task has come to nothing, if it has."""
    import ray

    try:
        ray.get(done)
    except ray.exceptions.RayError as error:
        # What the task itself raised, if it was that: in Ray's own words the reason comes last.
        (folder / "error.txt").write_text(last_line(getattr(error, "cause", error)) + "\n", encoding="utf-8")
