"""The subcommand that looks at losses before a training, and at what is installed."""

import importlib.metadata
import importlib.util
import math
import os
import platform
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import click

from detloss_plugins import __version__
from detloss_plugins.cli import _coco, _mmdet, _yolo
from detloss_plugins.cli._common import (
    RunError,
    UsageError,
    as_usage_error,
    check_there,
    complete_config,
    data_option,
    first_line,
    loss_class_of,
)
from detloss_plugins.configs import find
from detloss_plugins.registry import registered_losses

# Without --model, that of the first of these tasks into whose slots the losses fit.
MODELS = {"detect": "yolov8n.yaml", "obb": "yolov8n-obb.yaml", "rtdetr": "rtdetr-l.yaml"}
LABEL_FILES = 1000  # that are read of a data set, at most
# What a bug may depend on, by the module's name, which a fork shares.
MODULES = ("torch", "torchvision", "numpy", "mmengine", "mmcv", "mmdet", "mmrotate", "ultralytics")


@dataclass
class Found:
    """What is active, in lines, and what does not suit, a sentence each."""

    lines: list = field(default_factory=list)
    problems: list = field(default_factory=list)


def check_yolo(path, model=None, data=None):
    """What a YAML file of losses is in a model of Ultralytics, which may be trained on a data set.

    Raises:
        UsageError: if one of them cannot be read.
    """
    from ultralytics.utils import DEFAULT_CFG

    from detloss_plugins.adapters.ultralytics import describe, load_losses
    from detloss_plugins.adapters.ultralytics.config import waiting, with_weights

    given, losses, found = _yolo.yolo_losses(path, {}), {}, Found()
    name = model or MODELS[fitting_task(given)]
    yolo, task = _yolo.opened(name)
    model = yolo.model
    for slot, cfg in given.items():
        try:
            losses |= load_losses({slot: cfg}, task, auto=True)
        except (TypeError, ValueError) as error:
            found.problems.append(str(error))
    refused = tuple(f"{slot}: stock" for slot in given if slot not in losses)
    places = waiting(losses)
    active = [line for line in describe(losses, DEFAULT_CFG, task) if not line.startswith(refused)]
    active += [f"{where_of(place)}: its weight is found by a short stock training first" for place in places]
    losses = with_weights(losses, dict.fromkeys(places, 1.0))
    found.lines = [f"{path} in {name} ({task}):", *(f"  {line}" for line in active)]
    if not given:
        found.lines.append("  no slot is changed: this is the stock training")
    if data is not None:
        content = yolo_content(data, task)
        found.lines.append(f"data: {content['yaml_file']}, {len(content['names'])} classes")
        found.problems += yolo_faults(content, task)
        model.model[-1].nc, model.names = len(content["names"]), content["names"]  # as the training will make it
    found.problems += misfits(model, losses)
    return found


def where_of(place):
    """A place of a weight in words."""
    slot, *number = place
    return slot if not number else f"{slot}, loss {number[0] + 1}"


def fitting_task(losses):
    """The task into whose slots losses fit; "detect" or "rtdetr", by the slots' names, if there is none."""
    from detloss_plugins.adapters.ultralytics import load_losses

    for task in MODELS:
        try:
            load_losses(losses, task, auto=True)
        except (TypeError, ValueError):
            continue
        return task
    return "rtdetr" if any(str(slot).startswith("loss_") for slot in losses) else "detect"


def misfits(model, losses):
    """What in checked losses does not suit a model, its head or its number of classes."""
    from detloss_plugins.adapters.ultralytics import check_head
    from detloss_plugins.adapters.ultralytics.building import check_class_weights, check_ignored

    found = []
    for fits in (check_head, check_class_weights, check_ignored):
        try:
            fits(model, losses)
        except (TypeError, ValueError, RuntimeError) as error:
            found.append(str(error))
    return found


def yolo_content(data, task):
    """The content of a data YAML of Ultralytics, or of the one in a folder, its paths made absolute."""
    from ultralytics.data.utils import check_det_dataset

    path, _ = _yolo.yolo_data(data, task)
    with as_usage_error(Exception, what=f"{path} is no data set: "):  # of the user's own file
        return check_det_dataset(str(path), autodownload=False)


def yolo_faults(content, task):
    """What is wrong with the images and labels of a data set of Ultralytics for a task, as far as a look tells."""
    from ultralytics.data.utils import IMG_FORMATS, img2label_paths

    found, points = [], 0
    if task == "pose":
        shape = content.get("kpt_shape")
        if not isinstance(shape, list | tuple) or [type(number) for number in shape] != [int, int]:
            return [f"{content['yaml_file']} needs a kpt_shape, such as [17, 3] for 17 keypoints of x, y and visible."]
        points = math.prod(shape)
    for split in ("train", "val"):
        places = content[split] if isinstance(content[split], list) else [content[split]]
        folders = [Path(place) for place in places if Path(place).is_dir()]
        images = sorted(p for folder in folders for p in folder.rglob("*") if p.suffix[1:].lower() in IMG_FORMATS)
        if len(folders) == len(places) and not images:
            found.append(f"There is no image for {split} in {', '.join(map(str, places))}.")
        labels = [Path(path) for path in img2label_paths([str(image) for image in images[:LABEL_FILES]])]
        there = [path for path in labels if path.is_file()]
        if labels and not there:
            found.append(f"No image for {split} has a file of labels such as {labels[0]}.")
        found += filter(None, [wrong_label(there, len(content["names"]), task, points)])
    return found


def wrong_label(files, classes, task="detect", points=0):
    """The first label in files of YOLO's form that is none, or of a class that there is not; None if all are well.

    A box has 4 coordinates, a polygon 6 or more, an oriented box 8, and one with keypoints 4 and ``points`` numbers.
    """
    from detloss_plugins.adapters.ultralytics.compat import LABELS

    least = {"segment": 6, "obb": 8, "pose": 4 + points}.get(task, 4)
    for file in files:
        for number, line in enumerate(file.read_text(encoding=LABELS, errors="replace").splitlines(), 1):
            if not line.split():
                continue
            try:
                index, *box = map(float, line.split())
                if len(box) < 4 or not all(map(math.isfinite, (index, *box))):
                    raise ValueError
                index = int(index)
            except ValueError:
                return f"{file}, line {number} is no label: {line[:40]!r}."
            if len(box) < least or (task == "pose" and len(box) > least):
                many = "" if task == "pose" else " or more"
                return f"{file}, line {number} has {len(box)} coordinates; for task={task!r} it needs {least}{many}."
            if not 0 <= index < classes:
                return f"{file}, line {number} is of class {index}, and the data set has classes 0 to {classes - 1}."
    return None


def check_mmdet(path, data=None):
    """What a config of MMDetection has of ours, which may be trained on a folder in COCO layout.

    Raises:
        UsageError: if one of them cannot be read.
    """
    _mmdet.import_mmdet()
    from detloss_plugins.adapters.heads import MisfitWarning
    from detloss_plugins.adapters.mmdetection.check import at, build_alone, check_config, our_losses

    cfg = _mmdet.read_config(path)
    found = Found([f"{path}:"])
    if data is not None:
        _coco.point_at(cfg, data)
    with warnings.catch_warnings(record=True) as told:
        found.problems = check_config(cfg)
    for each in told:
        if each.category is MisfitWarning:
            found.problems.append(str(each.message))
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    for key, loss in our_losses(cfg.model):
        try:
            built = build_alone(loss)
        except (TypeError, ValueError):
            continue  # which is among the problems
        weight = getattr(built, "loss_weight", 1.0)
        found.lines.append(f"  {key}: {built}, weight {weight:g}")
        head = at(cfg.model, key.rpartition(".")[0])
        classes, known = head.get("num_classes"), getattr(built, "num_classes", None)
        if None not in (classes, known) and classes != known:
            found.problems.append(f"{key} has num_classes={known}, and its head has {classes} classes.")
    if len(found.lines) == 1:
        found.lines.append("  no loss of this package")
    if data is not None:
        names = _coco.coco_content(Path(data) / _coco.coco_split(Path(data), "train")[0])["categories"]
        found.lines.append(f"data: {data}, {len(names)} classes")
    return found


def check_class(cls):
    """Whether a loss class keeps the promises of :func:`detloss_plugins.testing.check_loss`."""
    from detloss_plugins.testing import checks

    found, kept = Found(), 0
    for promise in checks(cls):
        try:
            promise(cls)
            kept += 1
        except AssertionError as error:
            found.problems.append(str(error))
            break  # what comes later may follow from it
    found.lines = [f"{cls.__name__} keeps {kept} of {len(checks(cls))} promises"]
    return found


def subject(word):
    """The file or the loss class that is to be checked: a path, a config's name, ``MODULE:CLASS`` or a loss's name."""
    suffixes = {".yaml", ".yml", ".py"}
    if ":" in word and Path(word).suffix not in suffixes:
        return loss_class_of(word)
    if Path(word).suffix in suffixes:
        if not Path(word).is_file():
            raise UsageError(f"there is no {word}")
        return Path(word)
    try:
        return find(word)
    except ValueError as error:
        if word not in registered_losses() and "." not in word:
            raise UsageError(f"{first_line(error)} Nor is there a loss of this name.") from error
        return loss_class_of(word)


def report():
    """What a report of a bug needs: versions, the device and the losses, in lines."""
    import torch

    distributions = importlib.metadata.packages_distributions()
    rows = {
        "detloss_plugins": f"{__version__}, {len(registered_losses())} losses",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()}",
    }
    for module in MODULES:
        names = distributions.get(module, [])
        rows[module] = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) or "not installed"
    rows["torch"] += f", CUDA {torch.version.cuda or 'not built in'}, cuDNN {torch.backends.cudnn.version() or 'none'}"
    if importlib.util.find_spec("mmcv"):
        rows["mmcv"] += f", operators {'' if importlib.util.find_spec('mmcv._ext') else 'not '}compiled"
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    rows["device"] = ", ".join(gpus) or "cpu"
    rows["environment"] = ", ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("DETLOSS")) or "-"
    return [f"{name + ':':<17}{value}" for name, value in rows.items()]


def check(what, model=None, data=None):
    """What is active in a file of losses, a config or a loss class, and what does not suit."""
    if isinstance(what, type):
        if model or data:
            raise UsageError("a loss class is checked by itself: leave --model and --data out")
        return check_class(what)
    if data is not None:
        check_there(data)
    if what.suffix == ".py":
        if model:
            raise UsageError("--model is for Ultralytics; a config of MMDetection has its own")
        return check_mmdet(what, data)
    return check_yolo(what, model, data)


@click.command()
@click.argument("what", required=False, metavar="[FILE | NAME | MODULE:CLASS]", shell_complete=complete_config)
@click.option("--model", metavar="M", help="The model that losses of Ultralytics are for, such as yolo26n.yaml.")
@data_option
@click.option("--lite", is_flag=True, help="torchvision's operators where mmcv has no compiled ones.")
@click.option("--report", "wants_report", is_flag=True, help="Versions and device: what a report of a bug needs.")
@click.pass_context
def command(ctx, what, model, data, lite, wants_report):
    """Look at losses before a training, or at what is installed.

    \b
      detloss check my_losses.yaml --model yolo11n.yaml --data data.yaml
      detloss check retinanet_r18_fpn_digits           a config of this package, or a file of one's own
      detloss check my_losses.py:MyLoss                a loss class: does it keep what is promised of losses?
      detloss check --report

    Says what would be active, with which weight and gain, and what does not suit the model or the data; the exit
    status is 1 if anything does not.
    """
    if not what and not wants_report:
        raise click.UsageError("say what to check, or give --report.", ctx)
    for line in report() if wants_report else ():
        click.echo(line)
    if not what:
        return
    if lite:
        os.environ["DETLOSS_LITE"] = "1"
    found = check(subject(what), model, data)
    for line in found.lines:
        click.echo(line)
    if found.problems:
        raise RunError("\n".join(" ".join(problem.split()) for problem in found.problems))
    click.echo("nothing is amiss")
