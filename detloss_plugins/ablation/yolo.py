"""Trainings with Ultralytics: what a grid says about them is checked, one is run, its labels are read beforehand."""

import csv
import itertools
import math
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path

from detloss_plugins.ablation.data import digits_folder
from detloss_plugins.ablation.files import locked, seconds_between
from detloss_plugins.ablation.grid import Run, slots_of

TASKS = ("detect", "rtdetr")  # whose results are boxes and nothing else
LAST = Path("weights", "last.pt")
BEGUN = "begun"  # a file as old as the training
BEST = Path("weights", "best.pt")


def model_name(word: str) -> str:
    """A model as ``YOLO(...)`` takes it: a word without a suffix is one of Ultralytics' pretrained ones, as there.

    >>> model_name("yolov8n")
    'yolov8n.pt'
    """
    return word if Path(word).suffix in {".yaml", ".yml", ".pt"} else f"{word}.pt"


def check_model(model: str, losses: Mapping) -> dict:
    """Label -> losses by slot, of a model.

    Raises:
        ValueError, TypeError: if there is no such model, or it is for another task, or a loss does not suit it.
    """
    from detloss_plugins.adapters.ultralytics import check_head, model_task, open_model
    from detloss_plugins.adapters.ultralytics.config import without_weight

    try:
        built = open_model(model).model
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{model} is no model: {error}") from error
    task = model_task(built)
    if task not in TASKS:
        raise ValueError(f"{model} is for the task {task}; an ablation is for {' and '.join(TASKS)}.")
    resolved = {}
    for label, own in losses.items():
        try:
            resolved[label] = slots_of(own, task)
            check_head(built, {slot: without_weight(cfg) for slot, cfg in resolved[label].items()})  # it may be "auto"
        except (TypeError, ValueError) as error:
            raise type(error)(f"{label} with {model}: {error}") from error
    return resolved


def check_arguments(path: str, args: Mapping) -> None:
    """``ValueError`` if Ultralytics would refuse the arguments of a training or its data YAML."""
    from ultralytics.cfg import get_cfg
    from ultralytics.data.utils import check_det_dataset

    from detloss_plugins.testing.training_tensors import quiet

    try:
        with quiet():  # it prints pages on its command for an unknown argument
            get_cfg(overrides=dict(args))
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(str(error).strip().splitlines()[0]) from error
    if not path:
        return
    if Path(path).is_dir():
        raise ValueError(f"{path} has no data YAML, which Ultralytics needs.")
    try:
        check_det_dataset(path)
    except Exception as error:  # of the user's own file
        raise ValueError(f"{path} is no data set: {error}") from error


def data_yaml(run: Run) -> str:
    """The data YAML of a run; the digits are built if they are not there."""
    return run.path or str(digits_folder(run.data) / "digits.yaml")


def read_labels(run: Run) -> None:
    """Have Ultralytics read the labels and write its list of them beside the data.

    Trainings that find the list only read it; without one, those that begin at the same time would write it at once.
    """
    from ultralytics.cfg import get_cfg
    from ultralytics.data import build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    from detloss_plugins.ablation.measure import has_test

    cfg, data = get_cfg(overrides={**run.args, "task": "detect", "cache": False}), check_det_dataset(data_yaml(run))
    for split in ["train", "val"] + ["test"] * has_test(data):
        build_yolo_dataset(cfg, data[split], 1, data, mode=split)


def train(run: Run, folder: Path, resume_after: float) -> dict:
    """Train in a folder, or go on there, and return what is measured of ``best.pt``, as Ultralytics itself does at
    the end: ``metrics``, ``per_class``, ``curve`` and ``weights`` of the results, and ``resumed``, whether the training
    was cut off and went on.

    A training that was cut off goes on with its last checkpoint if it has been at it for ``resume_after`` seconds.
    Otherwise it starts again: what Ultralytics stores (weights in half precision, no state of the random numbers) does
    not make the training that would have been without the interruption, and then nothing differs.
    """
    from detloss_plugins.ablation.measure import measure, measure_on_test
    from detloss_plugins.adapters.ultralytics import model_task, open_model
    from detloss_plugins.testing.digits import made_cache

    resumed = prepare(folder, resume_after)
    epoch = stored_epoch(folder / LAST)
    try:
        place = made_cache()
    except ValueError:
        place = folder.parent  # the lock is for the trainings of this study then
    with locked(place / ".labels.lock"):
        read_labels(run)
    if epoch is None or epoch >= 0:
        start(run, folder, resume=epoch is not None)
    best = folder / BEST if (folder / BEST).exists() else folder / LAST
    columns = read_curves(folder / "results.csv")
    model = open_model(str(best))
    how = model, model_task(model.model), data_yaml(run), run.args, folder
    metrics, per_class = measure(*how)
    metrics.update(measure_on_test(*how))
    metrics["seconds_per_epoch"] = seconds_per_epoch(columns.get("time", []))
    curve = {"AP50": columns.get("metrics/mAP50(B)", []), "AP": columns.get("metrics/mAP50-95(B)", [])}
    weights = weights_found(run.losses, best)
    return {"metrics": metrics, "per_class": per_class, "curve": curve, "weights": weights, "resumed": resumed}


def weights_found(losses: Mapping, checkpoint: Path) -> dict[str, float]:
    """The weights that a training has found for those of its losses whose weight is "auto", by slot."""
    from detloss_plugins.adapters.ultralytics import trained_losses
    from detloss_plugins.adapters.ultralytics.config import waiting, weights_of

    if not waiting(losses):
        return {}
    found = weights_of(losses, trained_losses(checkpoint)["losses"])
    return {".".join(map(str, place)): weight for place, weight in found.items()}


def start(run: Run, folder: Path, resume: bool) -> None:
    """The training itself, to its end."""
    from detloss_plugins.adapters.ultralytics import make_trainer, model_task, open_model

    model = open_model(str(folder / LAST) if resume else run.model)
    settings = {
        "data": data_yaml(run),
        "pretrained": bool(model.ckpt),
        "project": str(folder.parent.absolute()),
        "name": folder.name,
        "exist_ok": True,
        "plots": False,
        **run.args,
        "epochs": run.epochs,
        "seed": run.seed,
    }
    trainer = make_trainer(run.losses, model_task(model.model))
    model.train(trainer=trainer, **({"resume": True, "data": settings["data"]} if resume else settings))


def prepare(folder: Path, resume_after: float) -> bool:
    """Empty a folder of what a training that starts again has left; returns whether one goes on instead."""
    epoch = stored_epoch(folder / LAST)
    if epoch == -1:
        return (folder / "resumed").exists()
    if epoch is not None and seconds_between(folder / BEGUN, folder / LAST) >= resume_after:
        (folder / "resumed").touch()
        return True
    shutil.rmtree(folder / "weights", ignore_errors=True)
    for name in ("results.csv", "resumed"):
        (folder / name).unlink(missing_ok=True)
    (folder / BEGUN).write_bytes(b"")
    return False


def epochs_done(folder: Path) -> int:
    """The epochs that ``results.csv`` has."""
    file = folder / "results.csv"
    return max(0, len(file.read_text(encoding="utf-8").splitlines()) - 1) if file.exists() else 0


def stored_epoch(checkpoint: Path) -> int | None:
    """The epoch of a checkpoint, -1 if the training has ended, None if there is none that can be read."""
    import torch

    if not checkpoint.exists():
        return None
    import detloss_plugins.adapters.ultralytics  # noqa: F401 - classes that a checkpoint may have

    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=False).get("epoch", -1)
    except Exception:  # cut off while it was written
        return None


def read_curves(path: Path) -> dict[str, list]:
    """The columns of ``results.csv``; empty if there is none. What is no number is None."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{(key or "").strip(): value for key, value in row.items()} for row in csv.DictReader(file)]
    return {key: [_number(row[key]) for row in rows] for key in (rows[0] if rows else ())}


def _number(text):
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def durations(times: list) -> list[float]:
    """Seconds of each epoch, of the seconds since the training began, or began again.

    >>> durations([10.0, 21.0, 8.0, 17.0])
    [10.0, 11.0, 8.0, 9.0]
    """
    times = [0.0, *(time for time in times if time is not None)]
    return [now - before if now > before else now for before, now in itertools.pairwise(times)]


def seconds_per_epoch(times: list) -> float | None:
    """The median of the epochs' seconds, validation included; None for a version of Ultralytics that has no times."""
    return round(statistics.median(found), 2) if (found := durations(times)) else None
