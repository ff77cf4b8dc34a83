"""The subcommand that trains a detector with losses of ours."""

import copy
import importlib.util
import os
import pickle
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import click

from detloss_plugins.cli._coco import evaluators, provide_data, type_name
from detloss_plugins.cli._common import (
    INSTALL,
    DataSet,
    RunError,
    UsageError,
    check_folder,
    check_there,
    complete_config,
    data_option,
    first_line,
    require,
)
from detloss_plugins.configs import path_of, read_yaml
from detloss_plugins.facts import number_in
from detloss_plugins.registry import loss_class

DEFAULT_CONFIG = "atfl_mpdiou"
# Small images, few of them, glyphs that must not be mirrored: enough for a detector that works after 12 epochs.
DIGITS_ARGS = {
    "imgsz": 128,
    "epochs": 12,
    "batch": 16,
    "nbs": 16,
    "optimizer": "AdamW",
    "lr0": 0.002,
    "warmup_epochs": 1,
    "mosaic": 0.0,
    "fliplr": 0.0,
    "plots": False,
}
UNREADABLE = (EOFError, RuntimeError, pickle.UnpicklingError)  # what torch makes of a file that is no checkpoint
SCHEDULE_KEYS = {"begin", "end", "milestones", "step_size", "T_max"}  # of mmengine's schedulers, in epochs
LOAD_ALL = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's own switch, from 2.6 on


def values(overrides):
    """The values of ``KEY=VALUE``; ``UsageError`` if one is no YAML."""
    from detloss_plugins.ablation.grid import value_of

    try:
        return {key: value_of(text, f"{key}={text}") for key, text in overrides.items()}
    except ValueError as error:
        raise UsageError(error) from error


def yaml_file(path):
    """The content of a YAML file; ``UsageError`` if it is none."""
    try:
        return number_in(read_yaml(path))
    except (OSError, ValueError) as error:
        raise UsageError(error) from error


def yolo_losses(losses, overrides):
    """A dict of losses, or that of a YAML file, with ``slot.key`` overrides taken out of ``overrides``."""
    from detloss_plugins.adapters.ultralytics import SLOTS

    if not isinstance(losses, dict):
        path, losses = losses, yaml_file(losses) or {}
        if not isinstance(losses, dict):
            raise UsageError(f"{path} must hold a dict of losses such as {{cls: {{type: VarifocalLoss}}}}.")
    losses = dict(losses)
    slots = {"ignore", *(slot for of_task in SLOTS.values() for slot in of_task)}
    of_slots = [key for key in overrides if key.split(".")[0] in slots and "." in key]
    # From the outside to the inside; first the type, which begins a loss anew.
    for key in sorted(of_slots, key=lambda key: (key.count("."), not key.endswith(".type"))):
        losses = with_setting(losses, key.split("."), overrides.pop(key), key)
    return losses


def with_setting(node, names, value, key):
    """A copy of a dict of losses, or of a list in it, with a value at some names; a list's are its indices.

    >>> with_setting({"box": {"type": "WIoULoss"}}, ["box", "base", "type"], "CIoULoss", "box.base.type")
    {'box': {'type': 'WIoULoss', 'base': {'type': 'CIoULoss'}}}
    """
    name, *rest = names
    if isinstance(node, list):
        if name not in map(str, range(len(node))):
            raise UsageError(f"{key}: there is no {name} in a list of {len(node)}, which counts from 0")
        index = int(name)
        return [*node[:index], with_setting(node[index], rest, value, key) if rest else value, *node[index + 1 :]]
    node = node if isinstance(node, dict) else {}
    if not rest:
        return {"type": value} if name == "type" else {**node, name: value}
    return {**node, name: with_setting(node.get(name), rest, value, key)}


def yolo_checkpoint(args, overrides):
    """The checkpoint that ``resume`` names, which is taken out of ``overrides``; None for a new training."""
    resume = overrides.pop("resume", None)
    if not resume:
        return None
    if resume is True and args.work_dir is None:
        raise UsageError("resume=true needs --work-dir, or name the checkpoint: resume=runs/x/weights/last.pt.")
    last = args.work_dir / "weights" / "last.pt" if resume is True else Path(str(resume))
    last = last / "weights" / "last.pt" if last.is_dir() else last
    if last.suffix != ".pt" or not last.is_file():
        raise UsageError(f"There is no checkpoint {last} to resume.")
    if args.work_dir is not None and not last.resolve().is_relative_to(args.work_dir.resolve()):
        raise UsageError(f"A run that resumes goes on in its own folder, {last.parents[1]}: leave --work-dir out.")
    if "model" in overrides:
        raise UsageError(f"A run that resumes keeps its model: leave model={overrides['model']} out.")
    return last


def losses_to_resume_with(args, overrides, last, task):
    """The losses of a run that resumes: those of its record, unless other ones are asked for."""
    from detloss_plugins.adapters.ultralytics import load_losses, trained_losses
    from detloss_plugins.adapters.ultralytics.config import unlike, weights_of, with_weights

    before = load_losses((trained_losses(last) or {"losses": {}})["losses"], task)
    losses = load_losses(yolo_losses(args.config if args.config_given else before, overrides), task, auto=True)
    losses = with_weights(losses, weights_of(losses, before))
    differ, _ = unlike(before, losses)
    if differ and not args.new_losses:
        were = "; ".join(f"{slot}: {before.get(slot, 'the stock loss')}" for slot in differ)
        raise UsageError(f"{last} was trained with other losses ({were}): to resume it with yours, give --new-losses.")
    if not losses and not args.new_losses:
        raise UsageError(f"{last} was trained with stock losses only: give a CONFIG and --new-losses to resume it.")
    return losses


def resuming_with(settings, trainer):
    """A trainer that refuses those settings which Ultralytics, on a resume, leaves as the run was started with."""

    class Resuming(trainer):
        def check_resume(self, overrides):
            super().check_resume(overrides)
            for key, value in settings.items():
                if (kept := getattr(self.args, key)) != value:
                    raise UsageError(f"A run that resumes keeps its {key}={kept}: leave {key}={value} out.")

    return Resuming


def check_yolo(settings):
    """Raise ``UsageError`` if Ultralytics would refuse the training arguments or the data YAML."""
    from ultralytics.cfg import get_cfg
    from ultralytics.data.utils import check_det_dataset

    from detloss_plugins.ablation.yolo import quiet

    try:
        with quiet():
            get_cfg(overrides=settings)
    except (SyntaxError, TypeError, ValueError) as error:
        raise UsageError(first_line(error)) from error
    try:
        check_det_dataset(settings["data"])
    except Exception as error:  # of the user's own file
        raise UsageError(f"{settings['data']} is no data set: {first_line(error)}") from error


def given_data(data, args):
    """The data set of ``--data``, or of ``data=``, which is taken out of the training arguments."""
    if "data" not in args:
        return data
    word = args.pop("data")
    if data is not None:
        raise UsageError(f"The data set is given twice: leave data={word} or --data {data} out.")
    return DataSet().convert(str(word), None, None)


def yolo_data(data, task):
    """Path of the data YAML and the training arguments that go with it."""
    from detloss_plugins.ablation.data import yaml_in
    from detloss_plugins.testing.digits import build_digits, cache_folder, digits_dir

    if data is None or data == digits_dir():
        return build_digits("detect" if task == "rtdetr" else task) / "digits.yaml", DIGITS_ARGS
    if isinstance(data, str):
        return data, {}
    if data.is_dir():
        try:
            data = yaml_in(data)
        except ValueError as error:
            raise UsageError(error) from error
    of_digits = data.name == "digits.yaml" and data.resolve().parents[1] == cache_folder().resolve()  # their scenarios
    return data, DIGITS_ARGS if of_digits else {}


def is_of_data(error):
    """Whether it was raised where Ultralytics reads data sets, whose labels it then refuses."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].startswith("ultralytics.data.")


def train_yolo(args):
    """Train with Ultralytics and print what came out."""
    from detloss_plugins.adapters.ultralytics import check_head, describe, make_trainer, model_task, open_model
    from detloss_plugins.adapters.ultralytics.compat import TooOldError, box_aps
    from detloss_plugins.adapters.ultralytics.ignore import UnknownClassError
    from detloss_plugins.adapters.ultralytics.trainer import NoWeightError

    overrides = values(args.overrides)
    args = replace(args, data=given_data(args.data, overrides))
    last = yolo_checkpoint(args, overrides)
    model = str(last or overrides.pop("model", "yolov8n.yaml"))
    try:
        yolo = open_model(model)
        task = model_task(yolo.model)
        losses = losses_to_resume_with(args, overrides, last, task) if last else yolo_losses(args.config, overrides)
        trainer = make_trainer(losses, task)
        check_head(yolo.model, trainer.plugin_losses)
    except (OSError, TypeError, ValueError, *UNREADABLE) as error:
        raise UsageError(error) from error
    place = args.work_dir or Path("runs") / args.config.stem
    if last is None:
        data, defaults = yolo_data(args.data, task)
        settings = {
            "data": str(data),
            "pretrained": bool(yolo.ckpt),  # a YAML has nothing to load
            "project": str(place.parent.resolve()),
            "name": place.name,
            "exist_ok": args.work_dir is not None,
            **defaults,
            **overrides,
        }
        check_folder(place)
        check_yolo(settings)
    elif yolo.ckpt.get("epoch", -1) < 0:
        raise UsageError(f"The training of {last} has ended: start a new one with model={last}.")
    else:
        data = {} if args.data is None else {"data": str(yolo_data(args.data, task)[0])}
        trainer = resuming_with({**data, **overrides}, trainer)
        settings = {"resume": True, **data, **overrides}
    try:
        metrics = yolo.train(trainer=trainer, **settings)
    except (NoWeightError, TooOldError, UnknownClassError) as error:
        raise UsageError(error) from error
    except SyntaxError as error:  # how Ultralytics refuses an unknown argument
        raise UsageError(first_line(error)) from error
    except RuntimeError as error:  # how it refuses labels and images, or runs out of memory
        raise RunError(f"{type(error).__name__}: {first_line(error)}") from error
    except ValueError as error:
        if not is_of_data(error):
            raise
        raise RunError(f"Ultralytics refuses the data set: {first_line(error)}") from error
    active = describe(yolo.trainer.plugin_losses, yolo.trainer.args, task)
    report(average_precision(*box_aps(metrics)), yolo.trainer.best, active)


def scale_schedule(cfg, stock):
    """Stretch the learning rate's schedule to a number of epochs that is not the ``stock`` config's; says so.

    What it counts in iterations, such as a warm-up, stays.
    """
    old, new = (config.get("train_cfg", {}).get("max_epochs") for config in (stock, cfg))
    schedule = cfg.get("param_scheduler") or []
    by_epoch = [part for part in (schedule if isinstance(schedule, list) else [schedule]) if part.get("by_epoch", True)]
    if old in (None, new) or not by_epoch:
        return []
    if not isinstance(new, int) or new < 1:
        raise UsageError(f"train_cfg.max_epochs must be a whole number above 0, not {new!r}.")

    def scaled(epoch):
        return max(1, round(epoch * new / old)) if epoch else 0

    for part in by_epoch:
        for key in SCHEDULE_KEYS & part.keys():
            part[key] = [*map(scaled, part[key])] if isinstance(part[key], list) else scaled(part[key])
        part["end"] = max(part.get("end", new), part.get("begin", 0) + 1)
    return [f"the schedule of the learning rate is scaled from {old} to {new} epochs: {cfg.param_scheduler}"]


def read_config(path):
    """The config of a file; ``UsageError`` if it is none, or none of a training."""
    from mmengine.config import Config

    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # of the user's own file, which is run
        if isinstance(error, ModuleNotFoundError) and error.name in INSTALL:
            raise
        raise UsageError(f"{path} is no config: {type(error).__name__}: {first_line(error)}") from error
    if missing := [key for key in ("model", "train_dataloader", "train_cfg", "optim_wrapper") if not cfg.get(key)]:
        raise UsageError(f"{path} is no config of a training: it has no {' and no '.join(missing)}.")
    return cfg


def parsed(overrides):
    """The values of overrides of a config."""
    from mmengine.config import DictAction

    try:
        return {key: DictAction._parse_iterable(value) for key, value in overrides.items()}
    except (AssertionError, RecursionError) as error:
        raise UsageError(f"{' '.join(f'{k}={v}' for k, v in overrides.items())}: {first_line(error)}") from error


def refuse(problems):
    """Raise ``UsageError`` if there are any, a line each."""
    if problems:
        raise UsageError("\n".join(problems))


def train_mmdet(args):
    """Train with mmengine's Runner and print what came out."""
    require("mmdet")
    import mmengine
    import torch
    from mmengine.runner import Runner

    if args.lite:
        os.environ["DETLOSS_LITE"] = "1"
    try:
        from detloss_plugins.adapters.mmdetection.check import build_alone, check_config, our_losses, unknown_keys
        from detloss_plugins.adapters.mmdetection.counts import ClassCountsHook
        from detloss_plugins.adapters.mmdetection.lite import MissingOperatorError
        from detloss_plugins.adapters.mmdetection.stock import StockConfigHook
    except AssertionError as error:  # how mmdet refuses a version of mmcv or mmengine
        raise RunError(error) from error

    cfg = read_config(args.config)
    provide_data(cfg, args.data)
    stock, overrides = copy.deepcopy(cfg), parsed(args.overrides)
    refuse(unknown_keys(cfg, overrides))
    cfg.merge_from_dict(overrides)
    cfg.work_dir = str(args.work_dir or Path("work_dirs") / args.config.stem)
    check_folder(cfg.work_dir)
    refuse(check_config(cfg, stock, overrides))
    active = [f"{key}: {build_alone(loss)}" for key, loss in our_losses(cfg.model)]
    notes = [] if any(key.startswith("param_scheduler") for key in overrides) else scale_schedule(cfg, stock)
    work_dir = Path(cfg.work_dir).resolve()
    # What a training of ours has written there holds more than tensors.
    if cfg.get("resume") and Path(cfg.get("load_from") or work_dir).resolve().is_relative_to(work_dir):
        os.environ.setdefault(LOAD_ALL, "1")
    runner = Runner.from_cfg(cfg)
    runner.register_hook(StockConfigHook())
    runner.register_hook(ClassCountsHook())
    # A loss names itself at its first call, but not one in a graph.
    for line in [*(active if cfg.get("compile") else ()), *notes]:
        runner.logger.info(f"detloss_plugins: {line}")
    try:
        runner.train()
    except MissingOperatorError as error:
        raise RunError(error) from error
    except pickle.UnpicklingError as error:
        if "eights only" not in str(error):
            raise
        raise RunError(
            f"torch {torch.__version__} with mmengine {mmengine.__version__} does not load {cfg.load_from}, as it has "
            f"more than tensors: install onedl-mmengine in place of mmengine or, if you trust it, set {LOAD_ALL}=1."
        ) from error
    found = {key: history.current() for key, history in runner.message_hub.log_scalars.items()}
    checkpoint = Path(cfg.work_dir, "last_checkpoint").read_text(encoding="utf-8")
    report(measured(found, cfg), checkpoint, active)


def measured(found, cfg):
    """What the last validation of a config's training has measured, of all scalars of its log, in words."""
    found = {key.removeprefix("val/"): value for key, value in found.items() if key.startswith("val/")}
    if "dota/AP50" in found:  # DOTAMetric's mAP is of the IoUs that the config lists
        return average_precision(found["dota/AP50"])
    of_coco = [part for part in evaluators(cfg, "val") if type_name(part) == "CocoMetric"]
    of_boxes = any("bbox" in part.get("metric", "bbox") for part in of_coco)
    if of_boxes and found:  # CocoMetric logs nothing when nothing was detected
        return average_precision(*(found.get(f"coco/bbox_{name}", 0.0) for name in ("mAP_50", "mAP")))
    others = [f"{key} {value:.3f}" for key, value in found.items() if key not in ("time", "data_time")]
    return "   ".join(others) or "not measured"


def average_precision(map50, map_=None):
    """A mAP50, and a mAP of COCO's IoUs if it was measured, in words."""
    return f"mAP50 {map50:.3f}" + ("" if map_ is None else f"   mAP50-95 {map_:.3f}")


def report(measured, checkpoint, active):
    """The three things a training is asked for."""
    print(f"\n{measured}")
    print(f"checkpoint: {checkpoint}")
    print("active losses:")
    for line in active:
        print(f"  {line}")


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
    """Train with the framework that the config is for."""
    (train_mmdet if args.config.suffix == ".py" else train_yolo)(args)


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
