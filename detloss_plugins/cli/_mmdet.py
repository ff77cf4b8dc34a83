"""What the subcommands do with MMDetection: its configs and their overrides, and a training."""

import copy
import importlib
import os
import pickle
from pathlib import Path

from detloss_plugins.cli._coco import evaluators, provide_data, type_name
from detloss_plugins.cli._common import (
    INSTALL,
    RunError,
    UsageError,
    as_usage_error,
    average_precision,
    check_folder,
    first_line,
    require,
)

SCHEDULE_KEYS = {"begin", "end", "milestones", "step_size", "T_max"}  # of mmengine's schedulers, in epochs
LOAD_ALL = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's own switch, from 2.6 on


def import_mmdet(lite=False):
    """Import our adapter, with torchvision's operators if ``lite``; ``RunError`` says what to install."""
    require("mmdet")
    if lite:
        os.environ["DETLOSS_LITE"] = "1"
    with as_usage_error(AssertionError, kind=RunError):  # how mmdet refuses a version of mmcv or mmengine
        importlib.import_module("detloss_plugins.adapters.mmdetection")


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

    words = " ".join(f"{key}={value}" for key, value in overrides.items())
    with as_usage_error(AssertionError, RecursionError, what=f"{words}: "):
        return {key: DictAction._parse_iterable(value) for key, value in overrides.items()}


def refuse(problems):
    """Raise ``UsageError`` if there are any, a line each."""
    if problems:
        raise UsageError("\n".join(problems))


def train_mmdet(args):
    """Train with mmengine's Runner; returns what was measured in words, the checkpoint and what was active."""
    import_mmdet(args.lite)
    import mmengine
    import torch
    from mmengine.runner import Runner

    from detloss_plugins.adapters.mmdetection import ClassCountsHook, StockConfigHook
    from detloss_plugins.adapters.mmdetection.check import build_alone, check_config, our_losses, unknown_keys
    from detloss_plugins.adapters.mmdetection.lite import MissingOperatorError

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
    return measured(found, cfg), checkpoint, active


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
