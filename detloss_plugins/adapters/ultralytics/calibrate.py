"""Weights for losses in the slots of Ultralytics; see :mod:`detloss_plugins.adapters.calibrate`."""

import contextlib
import copy
import functools
import logging
import random
import tempfile

import numpy as np
import torch
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import init_seeds

from detloss_plugins.adapters.calibrate import (
    FACTORS,
    LOOKS,
    STEPS,
    Candidate,
    Finished,
    Gradients,
    Looks,
    Verified,
    amounts_at,
    look_steps,
    losses_of,
)
from detloss_plugins.adapters.ultralytics import compat
from detloss_plugins.adapters.ultralytics.building import check_head, model_task
from detloss_plugins.adapters.ultralytics.config import SLOTS, at, counted, filled, load_losses, waiting, without_weight
from detloss_plugins.adapters.ultralytics.criterion import branches
from detloss_plugins.adapters.ultralytics.curves import Slots, as_leaves
from detloss_plugins.adapters.ultralytics.ignore import ignored_classes
from detloss_plugins.adapters.ultralytics.model import open_model, student
from detloss_plugins.adapters.ultralytics.per_image import branch_weight
from detloss_plugins.adapters.ultralytics.trainer import class_counts, criterion_of, make_trainer
from detloss_plugins.losses import ScheduledLoss
from detloss_plugins.nested import each_tensor
from detloss_plugins.precision import without_autocast
from detloss_plugins.registry import build_loss

# Training arguments of trainings of which nothing is kept.
QUICK = {"val": False, "save": False, "plots": False, "exist_ok": True, "name": "run"}

# Training arguments that a training on the side has of its own.
OF_A_RUN = ("project", "name", "exist_ok", "save_dir", "resume", "mode", "task", "time")


def again(slots, slot, criterion):
    """The slots of another criterion, of which one is called with what it is called with in these."""
    other = Slots(criterion)
    compat.share_sizes(slots.stock.bbox_loss, criterion.bbox_loss)
    if slot in slots.called:  # without positives, not every box criterion is
        other.normalizer = slots.normalizer
        (other.class_loss if slot == "cls" else other.box_loss)(*slots.called[slot])
    return other


class Look:
    """Looks, at some steps, at what a criterion and candidates for its slots have for gradients.

    It is the ``curves`` of a criterion with stock losses, which calls it in every step of a training, and changes
    nothing of that. Candidates with a state see every batch, as they would in a training of their own.

    Args:
        model: the model that is trained.
        criterion: its criterion, of an end-to-end head a branch.
        candidates: of :func:`candidate`, with ``class_counts`` where they are asked for.
        found: where to write.
        at: the steps, from 1 on.
        weight: a function without arguments, the weight of the branch.
    """

    def __init__(self, model, criterion, candidates, found, at, weight=lambda: 1.0):
        self.weight, self.step = weight, 0
        ignore = {"ignore": criterion.losses["ignore"]} if "ignore" in criterion.losses else {}
        criteria = [type(criterion)(model, losses={c.slot: c.cfg, **ignore}) for c in candidates]
        for own in criteria:
            if ignore and "cls" in own.built:
                own.bce.regions = criterion.bce.regions
        self.looks = Looks(candidates, criteria, found, at)

    def look(self, criterion, preds, batch):
        """To be called in every step of training."""
        self.step += 1
        if not (turns := self.looks.turns(self.step, SLOTS["detect"])):
            return
        with without_autocast(criterion.device):
            observer = Slots(criterion)
            # In half precision small gradients would be 0.
            preds = each_tensor(lambda x: x.float() if x.is_floating_point() else x, preds)
            observer.criterion.loss(as_leaves(preds), batch)
            for slot, label, own in turns:
                slots, amount = observer if own is None else again(observer, slot, own), torch.zeros(2)
                if slot in observer.called:
                    amount = amounts_at(observer.called[slot][0], slots.values[slot], observer.positive)
                self.looks.add(self.step, slot, label, self.weight() * amount)


class RTDETRLook:
    """The same beside RT-DETR's stock losses, which it calls layer by layer on what it has matched.

    Gradients are those at the class scores and the matched boxes of each layer, denoising queries included.

    Args:
        model, criterion, candidates, found, at: as of :class:`Look`.
        step: a function without arguments, the step that runs.
    """

    def __init__(self, model, criterion, candidates, found, at, step):
        self.step, self.criterion = step, criterion
        self.looks = Looks(candidates, [type(criterion)(model, {c.slot: c.cfg}) for c in candidates], found, at)
        for name, slots in (("_get_loss_class", ("loss_class",)), ("_get_loss_bbox", ("loss_bbox", "loss_giou"))):
            setattr(criterion, name, self.watched(getattr(criterion, name), name, slots))

    def watched(self, method, name, slots):
        """A method of the criterion that looks at each of its calls."""

        def call(pred, *rest):
            found = method(pred, *rest)
            positive = rest[0] != self.criterion.nc if slots == ("loss_class",) else True
            for slot, label, own in self.looks.turns(self.step(), slots):
                values = found
                if own is not None:
                    own.image_size = self.criterion.image_size
                    values = getattr(own, name)(pred, *rest)
                (value,) = (value for key, value in values.items() if key.startswith(slot))
                self.looks.add(self.step(), slot, label, amounts_at(pred, value, positive))
            return found

        return call


def candidate(loss, task="detect", slot=None, label=None):
    """A loss as a :class:`Candidate`.

    Args:
        loss: the name of a loss, or a config; its ``loss_weight`` is left out.
        task: see :func:`load_losses`.
        slot: where it is to stand; by default the first that takes its family.
        label: its name; by default the type that is given.

    Raises:
        ValueError, TypeError: as :func:`load_losses`, and for a ScheduledLoss, which has a weight a part.
    """
    cfg = {"type": loss} if isinstance(loss, str) else without_weight(loss)
    built = build_loss(filled(cfg, image_size="batch"))
    if isinstance(built, ScheduledLoss):
        raise ValueError("A ScheduledLoss has a weight for each of its losses: calibrate those.")
    slot = slot or _slot_for(built.family, task)
    default = load_losses({slot: cfg}, task)[slot]["loss_weight"]
    cfg = load_losses({slot: {**cfg, "loss_weight": 1.0}}, task)[slot]
    return Candidate(label or cfg["type"], slot, cfg, default)


def _slot_for(family, task):
    """The slot of a task for a family; if none takes it, the one that does for another task, or the first."""
    slots = [slot for of_task in (SLOTS[task], *SLOTS.values()) for slot, fits in of_task.items() if family in fits]
    return next((slot for slot in slots if slot in SLOTS[task]), next(iter(SLOTS[task])))


def fitting(slot, task="detect"):
    """A :class:`Candidate` of every loss of ours that a slot takes, with the settings of its example if it needs some.

    Left out are those that are made of others (JointLoss, ScheduledLoss), and those that need a head of their own.
    """
    if slot not in SLOTS[task]:
        raise ValueError(f"There is no slot {slot!r}; the slots are {', '.join(SLOTS[task])}.")
    found = (_first_that_fits(name, cls, slot, task) for name, cls in losses_of(SLOTS[task][slot]).items())
    return [candidate for candidate in found if candidate]


def _first_that_fits(name, cls, slot, task):
    """A candidate with the fewest settings that it needs; None if it does not fit with any."""
    example = {key: value for key, value in cls.facts.example.items() if key != "num_classes"}
    for settings in ({}, {"use_sigmoid": True}, example):
        try:
            return candidate({"type": name, **settings}, task, slot, name)
        except (TypeError, ValueError):
            pass
    return None


def warm_up(trainer, share, batches):
    """Set a trainer for a step of the warm-up, of which a share is over, as Ultralytics does.

    Args:
        trainer: one of Ultralytics.
        share: from 0 to 1.
        batches: how many an update of the weights is made of after the warm-up.
    """

    def between(start, end):
        return (1 - share) * start + share * end

    for place, group in enumerate(trainer.optimizer.param_groups):
        # Older versions have no names, and take the first group for that of the biases.
        has_biases = group.get("param_group", "bias" if place == 0 else None) == "bias"
        start = trainer.args.warmup_bias_lr if has_biases else 0.0
        group["lr"] = between(start, group["initial_lr"] * trainer.lf(trainer.epoch))
        if "momentum" in group:
            group["momentum"] = between(trainer.args.warmup_momentum, trainer.args.momentum)
    trainer.accumulate = round(between(1, batches))


def calibrate(
    candidates, model="yolov8n.yaml", steps=STEPS, looks=LOOKS, told=None, ignore=None, trainer=None, **settings
):
    """The weights that suit some losses, by a short training with stock losses.

    Args:
        candidates: of :func:`candidate` or :func:`fitting`, each label once a slot.
        model: a YAML file or checkpoint of Ultralytics, or a model, of which a copy is trained.
        steps: how long the training is; its last is the last look.
        looks: how many there are.
        told: a function that is called with each step that is done.
        ignore: what ``ignore`` of a losses dict has.
        trainer: the class to start from, as in :func:`make_trainer`.
        settings: training arguments, ``data`` among them.

    Returns:
        A :class:`~detloss_plugins.adapters.calibrate.Suggestion` for each candidate, in their order.

    Raises:
        ValueError: if a loss does not suit the model, or for several devices.
    """
    if compat.device_count(settings.get("device")) > 1:  # what their processes find would stay there
        raise ValueError("Weights are found by a training on one device: name one, such as device=0.")
    yolo = None if isinstance(model, torch.nn.Module) else open_model(model)
    given = yolo.model if yolo else model
    task = model_task(given)
    for each in candidates:
        check_head(given, {each.slot: each.cfg})
    found, when = Gradients(), look_steps(steps, looks)
    base = make_trainer({} if ignore is None else {"ignore": ignore}, task, trainer)

    class Calibrating(base):
        """Trains with stock losses for some steps; nobody's callbacks are called."""

        def run_callbacks(self, event):
            if event == "on_pretrain_routine_end":
                # What the weights are for comes after the warm-up, of which there may be thousands of steps. Before
                # Ultralytics 8.4.103 its own has a hundred at least, so it has none.
                self.warmup = round(min(self.args.warmup_epochs * len(self.train_loader), steps / 4))
                self.args.warmup_epochs = 0
            if event == "on_train_start":
                self.begin()
            if event == "on_train_batch_start" and self.done <= self.warmup > 0:
                warm_up(self, self.done / self.warmup, self.batches)
            if event == "on_train_batch_end":
                self.done += 1
                if told:
                    told(self.done)
                if self.done >= steps:
                    raise Finished

        def begin(self):
            self.done, self.batches = 0, self.accumulate
            self.epochs = max(self.epochs, -(-steps // len(self.train_loader)))  # of a small set
            trained = student(compat.unwrap_model(self.model))
            ignored = ignored_classes(self.plugin_losses, trained.names)
            counts = class_counts(self.train_loader.dataset, self.data["nc"], ignored)
            ready = [Candidate(c.label, c.slot, counted(c.cfg, counts), c.default) for c in candidates]
            criterion = criterion_of(self)
            if task == "rtdetr":
                RTDETRLook(trained, criterion, ready, found, when, lambda: self.done + 1)
                return
            for name, branch in branches(criterion).items():
                weight = functools.partial(branch_weight, criterion, name)
                branch.curves = Look(trained, branch, ready, found, when, weight)

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Finished):
        settings = {**settings, **QUICK, "project": folder}
        if yolo:
            yolo.train(trainer=Calibrating, **settings)
        else:
            name = model.yaml.get("yaml_file", "model.yaml")  # nothing is read there
            run = Calibrating(overrides={**settings, "model": name, "task": "detect" if task == "rtdetr" else task})
            run.model = copy.deepcopy(model)
            run.train()
    return found.suggestions(candidates)


def auto_weights(trainer, losses, task, base=None):
    """The weights that a dict of losses waits for, by a short training of a copy of a trainer's model.

    The random numbers of the trainer go on as if nothing had been.

    Args:
        trainer: one of :func:`make_trainer`, before it trains.
        losses: of :func:`load_losses`, with weights "auto".
        task, base: as ``task`` and ``trainer`` of :func:`make_trainer`.

    Returns:
        Place, see :func:`waiting`, -> number. What was found is logged.
    """
    wanted = {place: candidate(at(losses, place), task, place[0], str(place)) for place in waiting(losses)}
    settings = {name: value for name, value in vars(trainer.args).items() if name not in OF_A_RUN}
    path = settings.pop("model")
    model = trainer.model if isinstance(trainer.model, torch.nn.Module) else path
    ignore = losses.get("ignore")
    with _as_if_nothing_had_been(trainer):
        found = calibrate(list(wanted.values()), model, STEPS, ignore=ignore, trainer=base, **settings)
    weights = {}
    for place, each in zip(wanted, found, strict=True):
        weights[place] = each.default if each.weight is None else each.weight
        low_high = (
            f"{each.range[0]:.3g} to {each.range[1]:.3g}"
            if each.range
            else "no gradient or no objects there, so the default"
        )
        LOGGER.info(
            f"detloss_plugins: {place[0]}: weight {weights[place]:g} for {at(losses, place)['type']}, found in {STEPS} "
            f"steps with stock losses ({low_high})"
        )
        if each.moves:
            LOGGER.warning("detloss_plugins: it has moved all along: detloss calibrate with more --steps is better")
    return weights


@contextlib.contextmanager
def _as_if_nothing_had_been(trainer):
    """Another training in the middle of one: what it says is not logged, and random numbers go on as they were."""
    logged, python, numpy = logging.root.manager.disable, random.getstate(), np.random.get_state()
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
            init_seeds(trainer.args.seed, trainer.args.deterministic)  # it has left the deterministic mode
    finally:
        logging.disable(logged)
        random.setstate(python)
        np.random.set_state(numpy)


def verify(suggestion, model="yolov8n.yaml", seeds=2, factors=FACTORS, told=None, **settings):
    """Train with a suggested weight, and with others around it.

    Args:
        suggestion: of :func:`calibrate`.
        model: a YAML file or checkpoint of Ultralytics.
        seeds: how many trainings there are with each weight, at least 2.
        factors: of the weight, 1 among them.
        told: a function that is called after each training.
        settings: training arguments, ``data`` and ``epochs`` among them.

    Returns:
        A :class:`~detloss_plugins.adapters.calibrate.Verified`.
    """
    found = {factor: [] for factor in factors}
    for seed in range(seeds):
        for factor, values in found.items():
            ((slot, cfg),) = suggestion.losses.items()
            yolo = open_model(model)
            trainer = make_trainer({slot: {**cfg, "loss_weight": cfg["loss_weight"] * factor}}, model_task(yolo.model))
            with tempfile.TemporaryDirectory() as folder:
                quick = {**QUICK, "save": True, "project": folder, "seed": seed}
                values.append(compat.box_aps(yolo.train(trainer=trainer, **{**settings, **quick}))[0])
            if told:
                told()
    return Verified(suggestion, yolo.trainer.epochs, found)
