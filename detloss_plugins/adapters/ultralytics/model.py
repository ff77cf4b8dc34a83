"""A model with our losses: its criterion, its record of them, and how it is copied, saved and loaded.

Such a model is of a subclass of its stock class, which only the process knows: ``model.__class__``, pickles and
checkpoints name the stock class. What they hold of us is the record, plain data in an attribute. So they load where
this package is not installed, as stock, and with our losses where this adapter is imported: it gives Ultralytics'
``BaseModel`` a ``__setstate__`` that finds the record.
"""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ultralytics import RTDETR, YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import BaseModel, torch_safe_load
from ultralytics.utils import LOGGER

from detloss_plugins.adapters.ultralytics import compat
from detloss_plugins.adapters.ultralytics.building import (
    check_class_weights,
    check_head,
    check_ignored,
    model_task,
    training_args,
)
from detloss_plugins.adapters.ultralytics.config import load_losses
from detloss_plugins.adapters.ultralytics.criterion import (
    branches,
    criterion_class,
    criterion_state,
    load_criterion_state,
)
from detloss_plugins.adapters.ultralytics.rtdetr import PluginRTDETRLoss

RECORD = "detloss_plugins"  # the attribute of the model, and so of the checkpoint, that records the losses


class _WithLosses:
    """What a model with our losses does that its stock class, which stands behind this one, does otherwise."""

    stock: type

    @torch.compiler.disable  # it reads signatures, which no compiler can
    def init_criterion(self):
        """The stock choice of a criterion, with our losses and their state."""
        record = getattr(self, RECORD)
        if model_task(self) == "rtdetr":
            criterion = PluginRTDETRLoss(self, record["losses"])
        else:
            with training_args(self):
                stock = super().init_criterion()
                (kind,) = {type(part) for part in branches(stock).values()}
                make = functools.partial(criterion_class(kind), losses=record["losses"])
                criterion = compat.end_to_end(self, make) if isinstance(stock, compat.E2ELoss) else make(self)
                first, *others = branches(criterion).values()
                for other in others:
                    other.scene = first.scene
        load_criterion_state(criterion, record["state"])
        return criterion

    def loss(self, batch, preds=None):
        """The stock loss; a criterion that lacks the image's size is told it."""
        if batch.get("visuals") is not None:
            raise ValueError("YOLOE's visual prompts have a criterion of their own, in which no loss can be swapped.")
        if self.criterion is None:
            self.criterion = self.init_criterion()
        if hasattr(self.criterion, "image_size"):
            self.criterion.image_size = tuple(batch["img"].shape[2:])
        return super().loss(batch, preds)

    @property
    def __class__(self):
        """The stock class: a pickle names what this says, and loads where there is no other."""
        return type(self).stock

    def __reduce_ex__(self, protocol):
        """As the stock class pickles; in place of the criterion the record has the state of its losses."""
        function, arguments, state, *rest = super().__reduce_ex__(protocol)
        if self.criterion is not None:
            state[RECORD]["state"] = criterion_state(self.criterion)
        modules = state["_modules"].copy()
        modules.pop("criterion", None)  # RT-DETR's is a module
        state = {**state, "_modules": modules, "criterion": None}
        return function, (self.stock, *arguments[1:]), state, *rest

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin


def open_model(model: str | Path) -> YOLO | RTDETR:
    """``RTDETR(model)`` if the file's name says so, as ``YOLO`` knows such a checkpoint, but no such YAML."""
    return (RTDETR if "rtdetr" in Path(model).stem else YOLO)(model)


@functools.cache
def _with_losses(stock):
    return type(stock.__name__, (_WithLosses, stock), {"__module__": stock.__module__, "stock": stock})


def _give_losses(model):
    if not issubclass(type(model), _WithLosses):
        model.__class__ = _with_losses(type(model))


def install(
    model: torch.nn.Module,
    losses: Mapping[str, Any],
    state: Mapping[str, Any] | None = None,
    compile: bool = False,
) -> None:
    """Make ``model.loss`` use ``losses``, also on copies of the model such as the EMA and in what is saved of it.

    Args:
        model: any model of a task of YOLO's, World and YOLOE included, or an RT-DETR; its criterion, if it has one, is
            dropped.
        losses: see :func:`load_losses`.
        state: what :func:`criterion_state` took of an earlier training, to go on with.
        compile: compile all of the losses, as ``compile=True`` in the dict of each does.

    Raises:
        ValueError, TypeError: as :class:`PluginDetectionLoss`.
    """
    from detloss_plugins import __version__

    losses = load_losses(losses, model_task(model), compile=compile)
    check_head(model, losses)
    check_ignored(model, losses)
    check_class_weights(model, losses)
    setattr(model, RECORD, {"version": __version__, "losses": losses, "state": state or {}})
    _give_losses(model)
    model.criterion = None


def student(model):
    """The model that is trained: of a distillation the student, else the model itself."""
    return getattr(model, "student_model", model)


def trained_losses(model: torch.nn.Module | str | Path) -> dict[str, Any] | None:
    """What a model or checkpoint of ours records: ``{"version": ..., "losses": {...}, "state": {...}}``, or None.

    Args:
        model: a ``YOLO``, a model, or the path of a ``.pt`` file, which Ultralytics' own loader reads: with
            ``ULTRALYTICS_SAFE_LOAD=1`` in the environment it refuses what is no plain checkpoint.
    """
    if isinstance(model, str | Path):
        checkpoint, _ = torch_safe_load(model)
        model = checkpoint.get("ema") or checkpoint["model"]
    for part in (getattr(model, "model", None), model):
        if (record := getattr(student(part), RECORD, None)) is not None:
            return record
    return None


def _setstate(self, state):
    """``BaseModel.__setstate__``: that of its base, and a model with a record of losses has them again."""
    torch.nn.Module.__setstate__(self, state)
    if RECORD in state:
        _give_losses(self)


def _check_resume(self, overrides, stock=BaseTrainer.check_resume):
    """``BaseTrainer.check_resume``, and a warning if a run with losses of ours goes on with stock ones."""
    stock(self, overrides)
    if self.resume and not hasattr(self, "plugin_losses") and (record := trained_losses(self.args.model)):
        LOGGER.warning(
            f"detloss_plugins: {self.args.model} was trained with {record['losses']}, and goes on with Ultralytics' "
            f"own losses: to keep them, give trainer=make_trainer(trained_losses({self.args.model!r})['losses'])."
        )


BaseModel.__setstate__ = _setstate
BaseTrainer.check_resume = _check_resume
