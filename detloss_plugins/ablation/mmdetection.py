"""Trainings with MMDetection: the losses of a config are swapped, one is trained, its detections are measured."""

import json
import os
import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detloss_plugins import configs
from detloss_plugins.ablation.data import digits_folder
from detloss_plugins.ablation.files import seconds_between, write_whole
from detloss_plugins.ablation.grid import Run, family_of, plain
from detloss_plugins.adapters.heads import kept_settings
from detloss_plugins.registry import SCOPE, build_loss, portable, registered_losses

SLOTS = {"cls": "loss_cls", "box": "loss_bbox", "dfl": "loss_dfl"}
OF_FAMILY = {"classification": "cls", "ranking": "cls", "box": "box", "regression": "box", "distribution": "dfl"}
DETECTIONS = "val.bbox.json"
CONFIG = Path("given", "config.py")  # mmengine writes the whole of it into the folder itself


def is_config(model: str) -> bool:
    """Whether a model is a config of MMDetection: a ``.py`` file, or the name of one that comes with the package."""
    return Path(model).suffix == ".py" or model in configs.names("mmdetection")


def places(node: Any, path: str = "") -> Iterator[tuple[str, Mapping]]:
    """``(dotted key, dict)`` of each loss in a detector's config."""
    listed = enumerate(node) if isinstance(node, list | tuple) else ()  # the stages of a cascade
    for key, value in node.items() if isinstance(node, Mapping) else listed:
        where = f"{path}.{key}" if path else str(key)
        if str(key).startswith("loss_") and isinstance(value, Mapping) and "type" in value:
            yield where, value
        else:
            yield from places(value, where)


def place(slot: str, there: Mapping[str, Mapping]) -> list[str]:
    """The dotted keys of a slot, which is "cls", "box" or "dfl", a key such as "loss_cls", or a dotted one.

    Those of the stages of a cascade are one place, ``roi_head.bbox_head.loss_cls``; a stage alone has its number.

    >>> stages = {"roi_head.bbox_head.0.loss_cls": {}, "roi_head.bbox_head.1.loss_cls": {}}
    >>> place("cls", stages)
    ['roi_head.bbox_head.0.loss_cls', 'roi_head.bbox_head.1.loss_cls']
    >>> place("roi_head.bbox_head.1.loss_cls", stages)
    ['roi_head.bbox_head.1.loss_cls']

    Raises:
        ValueError: if the detector has none of that name, or several.
    """
    if slot in there:
        return [slot]
    last, found = SLOTS.get(slot, slot), {}
    for key in there:
        if slot == of_all_stages(key) or key.rpartition(".")[2] == last:
            found.setdefault(of_all_stages(key), []).append(key)
    if len(found) != 1:
        which = "has several of them" if found else "has none"
        names = dict.fromkeys(map(of_all_stages, there))
        raise ValueError(f"The detector {which} for {slot!r}: name one of {', '.join(names)}.")
    return found.popitem()[1]


def of_all_stages(key: str) -> str:
    """A dotted key without the numbers of list items."""
    return re.sub(r"\.\d+(?=\.)", "", key)


def short(key: str) -> str:
    """The slot of a key: "cls", "box", "dfl", or the last part of another.

    >>> short("bbox_head.loss_bbox"), short("dfl"), short("bbox_head.loss_centerness"), short("loss_class")
    ('box', 'dfl', 'loss_centerness', 'cls')
    """
    last = key.rpartition(".")[2]
    return {"loss_class": "cls", **{name: slot for slot, name in SLOTS.items()}}.get(last, last)


def slots_of(losses: Mapping, model: Mapping) -> dict:
    """Losses by their dotted keys in a detector's config, each by its full name.

    Args:
        losses: ``{slot: config}``, or the config of one loss, which goes where its family fits.
        model: the detector's config.
    """
    there = dict(places(model))
    if "type" in losses:
        family = family_of(losses)
        if family not in OF_FAMILY:
            raise ValueError(f"{losses['type']} is a {family} loss: say which it replaces, of {', '.join(there)}.")
        # Of a DETR, whose loss_bbox is point-wise; DDOD's loss_iou is one of classes.
        of_iou = [of_all_stages(key) for key, cfg in there.items() if key.endswith(".loss_iou") and is_of_boxes(cfg)]
        losses = {of_iou[0] if of_iou and family == "box" else OF_FAMILY[family]: losses}
    found = {}
    for slot, cfg in losses.items():
        own = portable(cfg)
        kind = own["type"] if "." in own["type"] else f"{SCOPE}.{own['type']}"
        for where in place(slot, there):
            found[where] = {**kept_settings(cfg["type"], there[where]), **own, "type": kind}
            build_loss(found[where])  # raises for an unknown setting
    return plain(found)


def is_of_boxes(cfg: Mapping) -> bool:
    """Whether a config, of a loss of ours or of mmdet's that has the name of one, is of a box loss."""
    kind = cfg["type"]
    same = registered_losses().get(kind.__name__ if isinstance(kind, type) else kind.rpartition(".")[2])
    return same is not None and same.facts.family == "box"


def check_model(model: str, losses: Mapping) -> dict:
    """Label -> losses by dotted key, of a config.

    Raises:
        ValueError, TypeError: if there is no such config, or a loss does not suit it.
    """
    from detloss_plugins.cli._common import UsageError, require

    require("mmdet")
    from detloss_plugins.adapters.mmdetection.check import check_config
    from detloss_plugins.cli._mmdet import read_config

    resolved = {}
    for label, own in losses.items():
        try:
            cfg = read_config(configs.path_of(model))
            resolved[label] = slots_of(own, cfg.model)
            swap(cfg, resolved[label])
            problems = check_config(cfg)
        except (TypeError, ValueError, UsageError) as error:
            problems = [str(error)]
        if problems:
            raise ValueError(f"{label} with {model}: {problems[0]}")
    return resolved


def swap(cfg: Any, losses: Mapping) -> None:
    """Put losses, of :func:`slots_of`, into a config."""
    cfg.merge_from_dict({f"model.{key}": {"_delete_": True, **loss} for key, loss in losses.items()})


def check_arguments(args: Mapping) -> None:
    """``ValueError`` if the arguments of a config are none; their keys are checked when the training begins."""
    for key in ("train_cfg.max_epochs", "randomness.seed", "work_dir"):
        if key in args:
            raise ValueError(f"{key} belongs to the grid: leave it out.")


def config_text(run: Run, folder: Path) -> str:
    """The config of a run: its base with other losses, its seed, and a file for the detections."""
    model = {}
    for key, loss in run.losses.items():
        whole = re.split(r"\.\d+\.", key)[0]
        node = model
        *parents, last = whole.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = {"_delete_": True, **loss} if whole == key else list_with(run, whole)
    evaluator = {"outfile_prefix": str((folder / DETECTIONS.removesuffix(".bbox.json")).absolute())}
    base = str(configs.path_of(run.model).absolute())
    return (
        f"_base_ = {base!r}\nmodel = {model!r}\nrandomness = {{'seed': {run.seed}}}\n"
        f"val_evaluator = {evaluator!r}\ntest_evaluator = {evaluator!r}\n"
    )


def list_with(run: Run, key: str) -> list:
    """A list of the detector's config with the losses of a run, as a file cannot override an item of its base's."""
    from detloss_plugins.adapters.mmdetection.check import at
    from detloss_plugins.cli._mmdet import read_config

    cfg = read_config(configs.path_of(run.model))
    swap(cfg, run.losses)
    return at(cfg.model, key)


def data_folder(run: Run) -> Path:
    """The folder of a run's data set in COCO layout; the digits are built if they are not there."""
    if not run.path:
        return digits_folder(run.data)
    path = Path(run.path)
    return path if path.is_dir() else path.parent


def train(run: Run, folder: Path, resume_after: float) -> dict:
    """As :func:`detloss_plugins.ablation.yolo.train`; the weights are those of the last epoch, and measured by COCO's
    metrics."""
    from detloss_plugins.ablation.measure import evaluate_coco
    from detloss_plugins.cli._coco import coco_split
    from detloss_plugins.cli._mmdet import train_mmdet
    from detloss_plugins.cli.train import Arguments

    resumed = goes_on(run, folder, resume_after)
    (folder / DETECTIONS).unlink(missing_ok=True)
    if not resumed:
        (folder / "last_checkpoint").unlink(missing_ok=True)
        (folder / CONFIG).parent.mkdir(exist_ok=True)
        write_whole(folder / CONFIG, config_text(run, folder))
    overrides = {"train_cfg.max_epochs": run.epochs, **run.args, **({"resume": True} if resumed else {})}
    data, lite = data_folder(run), os.environ.get("DETLOSS_LITE") == "1"
    words = {key: str(value) for key, value in overrides.items()}
    train_mmdet(Arguments(folder / CONFIG, True, words, data, folder, lite=lite))

    found = json.loads((folder / DETECTIONS).read_text(encoding="utf-8"))
    metrics = evaluate_coco(str(data / coco_split(data, "val")[0]), found, most=100)
    per_class = metrics.pop("per_class")
    metrics["seconds_per_epoch"], curve = logged(folder, run.epochs)
    return {"metrics": metrics, "per_class": per_class, "curve": curve, "resumed": resumed}


def goes_on(run: Run, folder: Path, resume_after: float) -> bool:
    """Whether a training that was cut off goes on: it has been at it for long enough, and has not finished."""
    begun_and_not_finished = 0 < epochs_done(folder) < run.epochs
    return begun_and_not_finished and seconds_between(folder / CONFIG, folder / "last_checkpoint") >= resume_after


def epochs_done(folder: Path) -> int:
    """The epoch of the last checkpoint; 0 if there is none."""
    last = folder / "last_checkpoint"
    found = re.search(r"epoch_(\d+)\.pth", last.read_text(encoding="utf-8")) if last.exists() else None
    return int(found[1]) if found else 0


def logged(folder: Path, epochs: int) -> tuple[float | None, dict]:
    """Seconds of an epoch without validation, and AP50 and AP by epoch, None where there was no validation."""
    lines = []
    for file in sorted(folder.glob("*/vis_data/scalars.json")):
        lines += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line and "time" in line]
    curve = {"AP50": [None] * epochs, "AP": [None] * epochs}
    for line in lines:
        for name, key in (("AP50", "coco/bbox_mAP_50"), ("AP", "coco/bbox_mAP")):
            if key in line and 1 <= line["step"] <= epochs:
                curve[name][line["step"] - 1] = line[key]
    if not steps:
        return None, curve
    per_epoch = max(line["iter"] for line in steps) / max(line["epoch"] for line in steps)
    return round(statistics.median(line["time"] for line in steps) * per_epoch, 2), curve
