"""The trainer: it gives a model our criterion, keeps its state and writes checkpoints of stock classes only."""

import functools
import math
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import torch
from ultralytics.nn.tasks import guess_model_task
from ultralytics.utils import DEFAULT_CFG, LOGGER
from ultralytics.utils.loss import E2ELoss
from ultralytics.utils.torch_utils import unwrap_model

from detloss_plugins.adapters.ultralytics.config import SLOTS, load_losses
from detloss_plugins.adapters.ultralytics.criterion import (
    TASKS,
    branches,
    check_head,
    check_task,
    criterion_class,
    criterion_state,
    load_criterion_state,
)
from detloss_plugins.base import Loss
from detloss_plugins.registry import build_loss

RECORD = "detloss_plugins"  # attribute of the model, and so of the checkpoint, that records the losses


def _init_criterion(model):
    """What ``model.init_criterion()`` does on a model of ours; the stock choice of class, with our losses."""
    record = getattr(model, RECORD)
    stock = type(model).init_criterion(model)
    (kind,) = {type(part) for part in branches(stock).values()}
    make = functools.partial(criterion_class(kind), losses=record["losses"])
    criterion = E2ELoss(model, make) if isinstance(stock, E2ELoss) else make(model)
    load_criterion_state(criterion, record["state"])
    return criterion


def install(model, losses, state=None):
    """Make ``model.loss`` use ``losses``, also on deep copies of the model such as the EMA.

    Args:
        model: a ``DetectionModel`` or ``OBBModel``; its criterion, if it has one, is dropped.
        losses: see :func:`load_losses`.
        state: what :func:`criterion_state` took of an earlier training, to go on with.

    Raises:
        ValueError, TypeError: as :class:`PluginDetectionLoss`.
    """
    from detloss_plugins import __version__

    losses = load_losses(losses)
    check_head(model, losses)
    setattr(model, RECORD, {"version": __version__, "losses": losses, "state": state or {}})
    # On the instance, so that the class in the checkpoint stays the stock one; a bound method follows a deep copy.
    model.init_criterion = MethodType(_init_criterion, model)
    model.criterion = None


@contextmanager
def _stock_classes_only(model):
    """Take off a model what only a process with this package can unpickle."""
    method, criterion = vars(model).pop("init_criterion", None), getattr(model, "criterion", None)
    model.criterion = None
    try:
        yield
    finally:
        model.criterion = criterion
        if method is not None:
            model.init_criterion = method


def trained_losses(model):
    """What a model or checkpoint of ours records: ``{"version": ..., "losses": {...}, "state": {...}}``, or None.

    Args:
        model: a ``YOLO``, a model, or the path of a ``.pt`` file.
    """
    if isinstance(model, str | Path):
        checkpoint = torch.load(model, map_location="cpu", weights_only=False)
        model = checkpoint.get("ema") or checkpoint["model"]
    return getattr(getattr(model, "model", model), RECORD, None) or getattr(model, RECORD, None)


def start_at_prior(model, losses):
    """Give a new head the class scores that its class loss should start with, if that has a preference."""
    prior = build_loss(losses["cls"]).yolo_prior if "cls" in losses else None
    if prior is None:
        return
    head = model.model[-1]
    for branch in (*head.cv3, *(getattr(head, "one2one_cv3", None) or ())):
        torch.nn.init.constant_(branch[-1].bias, math.log(prior / (1 - prior)))
    LOGGER.info(f"detloss_plugins: class scores start at {prior:g}, unless weights are loaded")


def describe(losses, args):
    """One line per slot: the active loss, its settings, its weight and the training's gain for the slot."""
    lines = []
    for slot in SLOTS:
        line = "stock loss"
        if slot in losses:
            loss = build_loss(losses[slot])
            line = f"{_in_words(loss)}, weight {loss.loss_weight:g}"
        lines.append(f"{slot}: {line} x gain {getattr(args, slot):g}")
    return lines


def _in_words(loss):
    """A loss with all its settings, and with those of the losses it is made of."""
    words = [f"{name}={value!r}" for name, value in loss.settings.items()]
    words += [_in_words(part) for part in loss.modules() if isinstance(part, Loss) and part is not loss]
    return f"{type(loss).__name__}({', '.join(words)})"


def make_trainer(losses, task="detect"):
    """A trainer class for ``YOLO(...).train(trainer=make_trainer(losses))``.

    Args:
        losses: a dict ``{"cls": {"type": "VarifocalLoss"}, "box": {...}, "dfl": {...}}`` or the path of a YAML file
            with one; absent slots keep the stock loss bit for bit.
        task: "detect", or "obb" for a model of oriented boxes, whose ``box`` slot takes losses of the rotated family
            and whose angle loss stays stock.

    Returns:
        A subclass of Ultralytics' trainer for the task. It is made here so that multi-GPU workers, which receive it
        pickled by value, receive the losses with it.

    Raises:
        ValueError, TypeError: for a misspelt slot, loss or hyper-parameter, an unknown task or a loss that does not
            suit it, before any data is read. The trainer raises ``ValueError`` for a model of another task.
    """
    losses = load_losses(losses)
    check_task(task, losses)

    class PluginTrainer(TASKS[task].trainer):
        plugin_losses = losses
        plugin_state = None

        def __init__(self, cfg=DEFAULT_CFG, overrides=None, _callbacks=None):
            self.check_same_task((overrides or {}).get("task", task))
            super().__init__(cfg, overrides, _callbacks)

        @staticmethod
        def check_same_task(given):
            if given != task:
                raise ValueError(f"The model's task is {given!r}; write make_trainer(losses, task={given!r}).")

        def get_model(self, cfg=None, weights=None, verbose=True):
            model = super().get_model(cfg, None, verbose)
            self.check_same_task(guess_model_task(model))
            check_head(model, self.plugin_losses)
            start_at_prior(model, self.plugin_losses)
            if weights:
                model.load(weights)
            before = getattr(weights, RECORD, None)
            if self.resume and before is not None:
                if before["losses"] == self.plugin_losses:
                    self.plugin_state = before["state"]
                else:
                    LOGGER.warning(f"This run resumes with other losses than it was started with ({before['losses']}).")
            return model

        def set_model_attributes(self):
            super().set_model_attributes()
            # Every path to training comes through here: new, resumed, and in a worker that was handed its model.
            install(getattr(self.model, "student_model", self.model), self.plugin_losses, self.plugin_state)
            for line in describe(self.plugin_losses, self.args):
                LOGGER.info(f"detloss_plugins: {line}")

        def validate(self):
            self.hand_state_to_ema().criterion = None  # built again, from the record
            return super().validate()

        def hand_state_to_ema(self):
            """Validation and the checkpoint are the EMA model's; the state is the training criterion's."""
            model, ema = (getattr(m, "student_model", m) for m in (unwrap_model(self.model), self.ema.ema))
            getattr(ema, RECORD)["state"] = criterion_state(model.criterion)
            return ema

        def save_model(self):
            with _stock_classes_only(self.hand_state_to_ema()):
                return super().save_model()

    return PluginTrainer
