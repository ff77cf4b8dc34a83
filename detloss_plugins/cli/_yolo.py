"""What the subcommands do with Ultralytics: its data, models, losses and training arguments, and a training."""

import pickle
import traceback
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from detloss_plugins.cli._common import (
    DataSet,
    RunError,
    UsageError,
    as_usage_error,
    average_precision,
    check_folder,
    first_line,
)

UNREADABLE = (EOFError, RuntimeError, pickle.UnpicklingError)  # what torch makes of a file that is no checkpoint


def values(overrides):
    """The values of ``KEY=VALUE``; ``UsageError`` if one is no YAML."""
    from detloss_plugins.ablation.grid import value_of

    with as_usage_error(ValueError):
        return {key: value_of(text, f"{key}={text}") for key, text in overrides.items()}


def opened(model):
    """A model of Ultralytics, by the name or path that ``YOLO(...)`` takes, and its task."""
    from detloss_plugins.adapters.ultralytics import model_task, open_model

    with as_usage_error(OSError, TypeError, ValueError, *UNREADABLE):
        yolo = open_model(model)
        return yolo, model_task(yolo.model)


def yolo_losses(losses, overrides):
    """A dict of losses, or that of a YAML file, with ``slot.key`` overrides taken out of ``overrides``."""
    from detloss_plugins.ablation.grid import read_mapping
    from detloss_plugins.adapters.ultralytics import SLOTS

    with as_usage_error(ValueError):
        losses = dict(losses) if isinstance(losses, dict) else read_mapping(losses)
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
    from detloss_plugins.ablation.yolo import check_arguments

    with as_usage_error(ValueError):
        check_arguments(settings["data"], settings)


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
    from detloss_plugins.testing.digits import DIGITS_ARGS, build_digits, cache_folder, digits_dir

    if isinstance(data, str):
        return data, {}
    with as_usage_error(ValueError):
        if data is None or data == digits_dir():
            return build_digits("detect" if task == "rtdetr" else task) / "digits.yaml", DIGITS_ARGS
        data = yaml_in(data) if data.is_dir() else data
    of_digits = data.name == "digits.yaml" and data.resolve().parents[1] == cache_folder().resolve()  # their scenarios
    return data, DIGITS_ARGS if of_digits else {}


@contextmanager
def refusals():
    """While Ultralytics trains: what it, or our part of it, refuses then is said in a sentence."""
    from detloss_plugins.adapters.ultralytics.compat import TooOldError
    from detloss_plugins.adapters.ultralytics.ignore import UnknownClassError
    from detloss_plugins.adapters.ultralytics.trainer import NoWeightError

    try:
        yield
    except (NoWeightError, TooOldError, UnknownClassError, SyntaxError) as error:  # the last of an unknown argument
        raise UsageError(first_line(error)) from error
    except RuntimeError as error:  # of labels and images, or out of memory
        raise RunError(f"{type(error).__name__}: {first_line(error)}") from error
    except ValueError as error:
        if not is_of_data(error):
            raise
        raise RunError(f"Ultralytics refuses the data set: {first_line(error)}") from error


def is_of_data(error):
    """Whether it was raised where Ultralytics reads data sets, whose labels it then refuses."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].startswith("ultralytics.data.")


def train_yolo(args):
    """Train with Ultralytics; returns AP50 and AP in words, the checkpoint and what was active."""
    from detloss_plugins.adapters.ultralytics import check_head, describe, make_trainer
    from detloss_plugins.adapters.ultralytics.compat import box_aps

    overrides = values(args.overrides)
    args = replace(args, data=given_data(args.data, overrides))
    last = yolo_checkpoint(args, overrides)
    model = str(last or overrides.pop("model", "yolov8n.yaml"))
    yolo, task = opened(model)
    with as_usage_error(OSError, TypeError, ValueError):
        losses = losses_to_resume_with(args, overrides, last, task) if last else yolo_losses(args.config, overrides)
        trainer = make_trainer(losses, task)
        check_head(yolo.model, trainer.plugin_losses)
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
    with refusals():
        metrics = yolo.train(trainer=trainer, **settings)
    active = describe(yolo.trainer.plugin_losses, yolo.trainer.args, task)
    return average_precision(*box_aps(metrics)), yolo.trainer.best, active
