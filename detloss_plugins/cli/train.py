"""The subcommand that trains a detector with losses of ours."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import click

from detloss_plugins.cli._common import UsageError, check_there, complete_config, data_option
from detloss_plugins.cli._mmdet import train_mmdet
from detloss_plugins.cli._yolo import train_yolo
from detloss_plugins.configs import path_of
from detloss_plugins.registry import loss_class

DEFAULT_CONFIG = "atfl_mpdiou"


@dataclass
class Arguments:
    """What the command was given."""

    config: Path
    config_given: bool
    overrides: dict  # of strings
    data: Path | str | None = None
    work_dir: Path | None = None
    new_losses: bool = False
    lite: bool = False


def how_to_train(name):
    """How the loss of that name is trained, for who gives it where a CONFIG stands; None if there is no such loss."""
    from detloss_plugins.cli._facts import yolo_slots
    from detloss_plugins.cli.check import MODELS

    try:
        cls = loss_class(name)
    except ValueError:
        return None
    whole = cls.facts.example.keys() <= {"image_size"}  # which YOLO fills in
    slots = yolo_slots(cls) if whole and importlib.util.find_spec("ultralytics") else {}
    if cls.facts.family == "regression":
        slots.pop("dfl", None)  # which has bins in most models
    if not slots:
        return f"{name} is a loss, and no config: detloss show {name} says how it is written in one."
    slot, (task, *_) = next(iter(slots.items()))
    model = "" if task == "detect" else f"model={MODELS[task]} "
    return f"{name} is a loss, and no config: detloss train stock {model}{slot}.type={name}"


def parsed_words(words):
    """The config's file, whether it was given, and the overrides, of ``CONFIG`` and ``KEY=VALUE`` in any order."""
    configs = [word for word in words if "=" not in word]
    if len(configs) > 1:
        raise UsageError(f"give one CONFIG, not {' and '.join(configs)}")
    try:
        config = path_of(configs[0] if configs else DEFAULT_CONFIG)
    except ValueError as error:
        raise UsageError(how_to_train(configs[0]) or error) from error
    if config.suffix not in {".yaml", ".yml", ".py"}:
        raise UsageError(f"CONFIG must be a .yaml of losses for Ultralytics or a .py for MMDetection, not {config}")
    return config, bool(configs), dict(word.split("=", 1) for word in words if "=" in word)


def with_model(overrides, model, config):
    """The overrides with the model of ``--model`` in them, which may be None.

    Raises:
        UsageError: if they have another one, or the config is MMDetection's.
    """
    if model is None:
        return overrides
    if config.suffix == ".py":
        raise UsageError("--model is for Ultralytics; a config of MMDetection has its own")
    if (word := overrides.get("model", model)) != model:
        raise UsageError(f"The model is given twice: leave model={word} or --model {model} out.")
    return {**overrides, "model": model}


def check(args):
    """Raise ``UsageError`` for options that do not go together, or a file that is not there."""
    if args.lite and args.config.suffix != ".py":
        raise UsageError("--lite is for MMDetection, so for a .py config")
    if args.new_losses and (args.config.suffix == ".py" or "resume" not in args.overrides):
        raise UsageError("--new-losses is for a run of Ultralytics that resumes: resume=runs/x/weights/last.pt")
    for path in filter(None, (args.config, args.data)):
        check_there(path)


def train(args):
    """Train with the framework that the config is for, and print the three things a training is asked for."""
    measured, checkpoint, active = (train_mmdet if args.config.suffix == ".py" else train_yolo)(args)
    print(f"\n{measured}\ncheckpoint: {checkpoint}\nactive losses:")
    for line in active:
        print(f"  {line}")


@click.command()
@click.argument("words", nargs=-1, metavar="[CONFIG] [KEY=VALUE ...]", shell_complete=complete_config)
@click.option("--model", metavar="M", help="What YOLO takes, a YAML file or a checkpoint; or model=M.")
@data_option
@click.option("--work-dir", type=Path, metavar="DIR", help="Where checkpoints and logs go.")
@click.option("--new-losses", is_flag=True, help="Resume with other losses than the run was started with.")
@click.option("--lite", is_flag=True, help="torchvision's operators where mmcv has no compiled ones.")
def command(words, model, data, work_dir, new_losses, lite):
    """Train a detector with the losses of CONFIG.

    \b
      detloss train                                    the default losses on the embedded digits set with yolov8n
      detloss train my_losses.yaml                     a .yaml of losses goes to Ultralytics
      detloss train my_config.py                       a .py config goes to mmengine's Runner
      detloss train retinanet_r18_fpn_digits           a config of this package, by its name
      detloss train --data data.yaml --model yolo11n.yaml epochs=50 cls.loss_weight=2
      detloss train obb model=yolov8n-obb.yaml         oriented boxes, here of turned digits
      detloss train resume=runs/x/weights/last.pt      goes on with the losses of that run; others: --new-losses

    A .yaml of losses has the slots of the model, each optional, such as box: {type: CIoULoss}; what is not named stays
    stock. detloss list has the losses.

    KEY=VALUE overrides: for Ultralytics a training argument (epochs=3) or a setting of a slot's loss
    (box.type=CIoULoss, box.base.ratio=0.8, cls.losses.0.gamma=1); for mmengine a dotted key that the config has
    (train_cfg.max_epochs=2, which stretches the schedule of the learning rate too).

    --lite (or DETLOSS_LITE=1 in the environment) trains MMDetection with mmcv-lite: torchvision's operators for mmcv's.
    """
    config, given, overrides = parsed_words(words)
    args = Arguments(config, given, with_model(overrides, model, config), data, work_dir, new_losses, lite)
    check(args)
    train(args)
