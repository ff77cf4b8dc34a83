"""The trainer: it gives a model our losses, keeps their state and says what they are."""

import functools
import math
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from ultralytics.models.rtdetr.train import RTDETRTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import DEFAULT_CFG, LOGGER

from detloss_plugins.adapters.ultralytics import compat, config
from detloss_plugins.adapters.ultralytics.building import check_head, model_task
from detloss_plugins.adapters.ultralytics.criterion import branches, criterion_state
from detloss_plugins.adapters.ultralytics.curves import EVERY, Curves, append, scalars
from detloss_plugins.adapters.ultralytics.ignore import ignored_classes, make_validator
from detloss_plugins.adapters.ultralytics.model import RECORD, install, student
from detloss_plugins.adapters.ultralytics.per_image import branch_weight
from detloss_plugins.adapters.ultralytics.words import describe
from detloss_plugins.facts import Rule, checked
from detloss_plugins.losses import ScheduledLoss, set_progress
from detloss_plugins.registry import build_loss, portable

LOSSES_FILE = "losses.yaml"  # in the folder of the run, beside args.yaml
CURVES_FILE = "losses.csv"  # beside results.csv
HOW_OFTEN = Rule("True, False or a number of steps", lambda value: type(value) in (bool, int) and value >= 0, (int,))
LOSSES_HEAD = """\
# The losses of this training. To resume it with them: YOLO("weights/last.pt").train(resume=True,
# trainer=make_trainer("losses.yaml")); without that trainer Ultralytics goes on with its own losses.
"""
TRAINERS = {
    "detect": DetectionTrainer,
    "segment": SegmentationTrainer,
    "pose": PoseTrainer,
    "obb": OBBTrainer,
    "rtdetr": RTDETRTrainer,
}


class NoWeightError(ValueError):
    """A weight that is to be found, and cannot be."""


def class_biases(head):
    """The biases that set the class scores of a new head: of its last layers, or of the similarities to texts."""
    if hasattr(head, "dec_score_head"):  # RT-DETR
        layers = (head.enc_score_head, *head.dec_score_head)
    else:
        name = "cv4" if hasattr(getattr(head, "cv4", [None])[0], "logit_scale") else "cv3"
        levels = (*getattr(head, name), *(getattr(head, f"one2one_{name}", None) or ()))
        layers = levels if name == "cv4" else [level[-1] for level in levels]
    return [layer.bias for layer in layers]


def start_at_prior(model, prior, weights=None):
    """Give a new head the class scores that its class loss should start with, and load weights if there are any.

    If the model of the weights has another number of classes, loading them makes the layers of the classes anew and
    calls the head's ``bias_init``: those start at the prior too.
    """
    head = model.model[-1]

    def set_biases():
        for bias in class_biases(head):
            torch.nn.init.constant_(bias, math.log(prior / (1 - prior)))

    set_biases()
    LOGGER.info(f"detloss_plugins: class scores start at {prior:g}, unless weights are loaded")
    if weights:
        head.bias_init = lambda: (type(head).bias_init(head), set_biases())
        try:
            model.load(weights)
        finally:
            del head.bias_init


def class_counts(dataset, classes, ignored=()):
    """How many objects of each class the labels of a data set of Ultralytics have, a list; 0 of an ignored class."""
    labels = [label["cls"] for part in getattr(dataset, "datasets", [dataset]) for label in part.labels]
    found = [torch.bincount(torch.as_tensor(of_image).long().view(-1), minlength=classes) for of_image in labels]
    return [0 if index in ignored else count for index, count in enumerate(sum(found).tolist())]


@contextmanager
def whole_files(trainer):
    """Let a trainer write its checkpoints beside their places, and move each there when all are written.

    Ultralytics writes over the last one, so that a run which is killed meanwhile would have none to resume.
    """
    places = {name: getattr(trainer, name) for name in ("wdir", "last", "best")}
    beside = trainer.wdir / "unfinished"
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
    beside.mkdir(parents=True)
    trainer.wdir, trainer.last, trainer.best = beside, beside / trainer.last.name, beside / trainer.best.name
    try:
        yield
        for file in beside.iterdir():
            file.replace(places["wdir"] / file.name)
    finally:
        vars(trainer).update(places)
        shutil.rmtree(beside)


def tell(trainer, **progress):
    """:func:`set_progress` of every loss of the model that is trained."""
    for branch in branches(criterion_of(trainer)).values():
        set_progress(torch.nn.ModuleList(branch.built.values()), **progress)


def criterion_of(trainer):
    """The criterion of the model that is trained."""
    model = student(compat.unwrap_model(trainer.model))
    if model.criterion is None:
        model.criterion = model.init_criterion()
    return model.criterion


def add_curves(trainer, every):
    """Have the losses of the model that is trained looked at in every so many steps."""
    criterion = criterion_of(trainer)
    for name, branch in branches(criterion).items():
        branch.curves = branch.curves or Curves(every, functools.partial(branch_weight, criterion, name))
        branch.curves.seen = []  # those of an epoch that Ultralytics begins again do not count


def make_trainer(
    losses: Mapping[str, Any] | str | Path,
    task: str = "detect",
    trainer: type | None = None,
    compile: bool = False,
    curves: bool | int = False,
) -> type:
    """A trainer class for ``YOLO(...).train(trainer=make_trainer(losses))``.

    Args:
        losses: a dict ``{"cls": {"type": "VarifocalLoss"}, "box": {...}, "dfl": {...}}``, the path of a YAML file with
            one, or the name of one that comes with this package, such as "qfl"; absent slots keep the stock loss bit
            for bit. ``"ignore": {"classes": ["crowd"]}`` beside them leaves boxes of these classes, and what lies in
            them, out of training and validation. A ``loss_weight`` may be "auto", of the loss of a slot or of one in a
            ScheduledLoss: the weight is then found when training starts, by ``calibrate`` with a copy of the model,
            which a run that resumes does not repeat.
        task: "detect", "segment", "pose", "obb" for oriented boxes, whose ``box`` slot takes losses of the rotated
            family, or "rtdetr", whose slots are ``loss_class``, ``loss_bbox`` and ``loss_giou``. The losses that a task
            has besides (masks, keypoints, angle) stay stock.
        trainer: the class to start from, if not Ultralytics' own for the task: ``WorldTrainer``, a ``YOLOETrainer``, or
            a subclass of yours.
        compile: compile all of the losses, as ``compile=True`` in the dict of each does.
        curves: give every logger of Ultralytics that is on, and ``losses.csv`` in the folder of the run, the state of
            the losses at the end of each epoch and, as the means of a look in every 50th step (or so many as the number
            that is given), how many anchors are positive, the norm of each slot's gradient at the head's outputs, and
            the parts of a JointLoss or ScheduledLoss. A look costs another call of the criterion and its backward.
            RT-DETR has the state alone. The columns of ``results.csv`` stay.

    Returns:
        A subclass of that trainer. It is made here so that multi-GPU workers, which receive it pickled by value,
        receive the losses with it. It writes ``losses.yaml`` into the folder of the run; a run that resumes keeps the
        state of each loss that is the same, but for its weight, as before, and says which are not.

    Raises:
        ValueError, TypeError: for a misspelt slot, loss or hyper-parameter, an unknown task or a loss that does not
            suit it, before any data is read. The trainer raises ``ValueError`` for a model of another task, and
            ``RuntimeError`` for training arguments that need a newer Ultralytics.
    """
    losses = config.load_losses(losses, task, auto=True, compile=compile)
    curves = checked("make_trainer", "curves", curves, HOW_OFTEN)
    every = EVERY if curves is True else int(curves)
    base = trainer or TRAINERS[task]
    asked, places = losses, config.waiting(losses)  # for what, and where, weights are to be found
    losses = config.with_weights(losses, config.default_weights(losses))  # until they are
    scheduled = any(isinstance(build_loss(cfg), ScheduledLoss) for slot, cfg in losses.items() if slot != "ignore")
    of_classes = losses.get("cls") or losses.get("loss_class")
    # Linear probing must have weights, and trains on with them.
    prior = config.default_prior(build_loss(of_classes)) if of_classes and not compat.probes(base) else None
    waits_for_counts = config.counted(losses, []) != losses

    class PluginTrainer(base):
        plugin_losses = losses
        plugin_state = plugin_epoch = None

        def __init__(self, cfg=DEFAULT_CFG, overrides=None, _callbacks=None):
            given = (overrides or {}).get("task", task)
            if (given, task) != ("detect", "rtdetr"):  # to Ultralytics, RT-DETR detects
                self.check_same_task(given)
            self.check_arguments(overrides or {})
            if waits_for_counts:
                compat.require("class_counts")
            super().__init__(cfg, overrides, _callbacks)
            self.check_arguments(vars(self.args))  # some versions take the devices from the environment
            if "ignore" in losses and (self.args.single_cls or self.args.classes is not None):
                raise ValueError("single_cls and classes change the labels that ignore reads: leave one of them out.")
            if compat.rank() in {-1, 0}:
                self.write_losses(asked)
                if not self.resume:  # what is there is another run's, as it is of results.csv
                    (self.save_dir / CURVES_FILE).unlink(missing_ok=True)

        def write_losses(self, losses):
            text = LOSSES_HEAD + yaml.safe_dump(losses, sort_keys=False)
            (self.save_dir / LOSSES_FILE).write_text(text, encoding="utf-8")

        def train(self):
            if places and not self.resume:
                from detloss_plugins.adapters.ultralytics.calibrate import auto_weights

                LOGGER.info("detloss_plugins: finding the weights of the losses by a short training with stock ones")
                self.settle(auto_weights(self, asked, task, base))
            return super().train()

        def settle(self, weights):
            """Take the weights that were waited for: place -> number."""
            self.plugin_losses = config.with_weights(asked, weights)
            self.write_losses(self.plugin_losses)

        def check_resume(self, overrides):
            super().check_resume(overrides)
            self.check_arguments(vars(self.args))  # of a run that resumes, those of its checkpoint

        @staticmethod
        def check_arguments(arguments):
            several = compat.device_count(arguments.get("device")) > 1
            if places and (compat.rank() != -1 or several):
                raise NoWeightError(
                    'loss_weight "auto" is for a training on one device: find the weights with detloss calibrate, and '
                    "write them for one on several."
                )
            if several:
                portable(losses)  # raises for a loss that their processes cannot import
            compat.check_arguments(arguments)

        @staticmethod
        def check_same_task(given):
            if given != task:
                config.check_task(given)
                raise ValueError(f"The model's task is {given!r}; write make_trainer(losses, task={given!r}).")

        def get_model(self, cfg=None, weights=None, verbose=True):
            self.check_same_task(model_task(cfg if isinstance(cfg, dict) else yaml_model_load(cfg)))
            model = super().get_model(cfg, weights if prior is None else None, verbose)
            check_head(model, self.plugin_losses)
            if prior is not None:
                start_at_prior(model, prior, weights)
            if self.resume:
                record = getattr(weights, RECORD, {"losses": {}, "state": {}})
                if places:
                    self.settle(self.weights_to_go_on_with(record))
                self.plugin_state = self.state_to_go_on_with(record)
            return model

        @staticmethod
        def weights_to_go_on_with(record):
            """The weights that were found when the run that resumes was started."""
            found = config.weights_of(asked, record["losses"])
            if missing := [place for place in places if place not in found]:
                raise NoWeightError(
                    f'This run resumes with another loss for {missing[0][0]}, and loss_weight "auto" is found when a '
                    "training starts: write a number."
                )
            return found

        def state_to_go_on_with(self, record):
            """The state of those losses that a run which resumes still has; what it has no longer is said."""
            before, now = config.filled(record["losses"]), self.plugin_losses
            differ, others = config.unlike(before, now)
            for slot in differ:
                none, what = ("nothing", "ignore") if slot == "ignore" else ("the stock loss", f"{slot} loss")
                was, is_ = (losses.get(slot, none) for losses in (before, now))
                LOGGER.warning(f"detloss_plugins: this run resumes with another {what}: {is_}, not {was}.")
            return {
                branch: {slot: state for slot, state in slots.items() if slot not in others}
                for branch, slots in record["state"].items()
            }

        def get_validator(self):
            validator = super().get_validator()
            validator.__class__ = make_validator(self.plugin_losses, task, type(validator))
            return validator

        def set_model_attributes(self):
            super().set_model_attributes()
            # Every path to training comes through here: new, resumed, and in a worker that was handed its model.
            install(student(self.model), self.plugin_losses, self.plugin_state)
            for line in describe(self.plugin_losses, self.args, task):
                LOGGER.info(f"detloss_plugins: {line}")

        def set_class_weights(self):
            super().set_class_weights()
            if waits_for_counts:
                model = student(compat.unwrap_model(self.model))
                ignored = ignored_classes(self.plugin_losses, model.names)
                counts = class_counts(self.train_loader.dataset, self.data["nc"], ignored)
                install(model, config.counted(self.plugin_losses, counts), self.plugin_state)
                LOGGER.info(f"detloss_plugins: class weights by the effective numbers of {counts} objects")
            if task == "rtdetr" and self.args.cls_pw:
                LOGGER.warning(
                    "RT-DETR's criterion has no class weights, stock or with our losses: cls_pw does nothing."
                )

        def run_callbacks(self, event):
            """What a loss or its curves must know comes first; as callbacks, workers would be handed them twice.

            Loggers read the metrics of an epoch when it ends: they have the curves then, and results.csv has not.
            """
            if scheduled and event == "on_train_epoch_start":
                self.plugin_iteration = self.epoch * len(self.train_loader) - 1
                tell(self, epoch=self.epoch, epochs=self.epochs)
            if scheduled and event == "on_train_batch_start":
                self.plugin_iteration += 1
                tell(self, iteration=self.plugin_iteration)
            if every and compat.rank() in {-1, 0}:
                if event == "on_train_epoch_start":
                    add_curves(self, every)
                if event == "on_train_epoch_end":
                    self.plugin_epoch = self.epoch
            if event != "on_fit_epoch_end" or self.plugin_epoch is None:  # it comes once more when all is over
                return super().run_callbacks(event)
            self.plugin_epoch, metrics = None, self.metrics
            found = scalars(criterion_of(self))
            append(self.save_dir / CURVES_FILE, self.epoch + 1, found)
            self.metrics = {**metrics, **found}
            try:
                return super().run_callbacks(event)
            finally:
                self.metrics = metrics

        def validate(self):
            self.hand_state_to_ema()
            return super().validate()

        def hand_state_to_ema(self):
            """Validation and the checkpoint are the EMA model's; the state is the training criterion's.

            So are the losses: before Ultralytics 8.4.140, that model is copied before the objects are counted.
            """
            model, ema = student(compat.unwrap_model(self.model)), student(self.ema.ema)
            losses, state = getattr(model, RECORD)["losses"], criterion_state(model.criterion)
            getattr(ema, RECORD).update(losses=losses, state=state)
            if ema.criterion is not None:  # of the validation before
                ema.criterion = ema.init_criterion()

        def save_model(self):
            self.hand_state_to_ema()
            with whole_files(self):
                return super().save_model()

    return PluginTrainer


def tune(model: Any, trainer: type, iterations: int = 10, **settings: Any) -> Any:
    """Ultralytics' search for hyper-parameters, ``model.tune(...)``, with the trainings of a trainer of ours.

    ``model.tune`` itself starts them by the command line, where there is no trainer to choose: it would tune the stock
    losses without a word.

    Args:
        model: a ``YOLO`` or ``RTDETR``.
        trainer: what :func:`make_trainer` returned.
        iterations: number of trainings.
        settings: as for ``model.tune``: ``data``, ``space``, ``epochs`` and so on.

    Raises:
        RuntimeError: if this version of Ultralytics is older than 8.4.129, whose tuner takes no trainer.
        ValueError: for ``use_ray``: that search trains the stock losses.
    """
    compat.require("tune")
    if settings.get("use_ray"):
        raise ValueError("Ray's search takes no trainer and would tune the stock losses: leave use_ray out.")
    from ultralytics.engine import trainer as engine

    stock = engine.MultiTrainer
    # The tuner looks the class up when it is called, and gives it no trainer.
    engine.MultiTrainer = lambda _, args, base: stock(trainer, args, base)
    try:
        return model.tune(iterations=iterations, **settings)
    finally:
        engine.MultiTrainer = stock
