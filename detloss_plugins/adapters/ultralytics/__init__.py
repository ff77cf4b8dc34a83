"""Ultralytics YOLO: swap the classification, box and distribution loss of a training by one dict.

For detection and for oriented boxes (``task="obb"``).

``make_trainer(losses)`` gives a trainer for ``YOLO(...).train(trainer=...)``. Nothing of Ultralytics is edited: the
stock criterion is subclassed, its class loss and its box criterion are replaced on the instance, and the model is told
to build this criterion. The instance attribute that tells it so is taken off while a checkpoint is written, so that
``best.pt`` holds stock classes only.

Ultralytics is AGPL-3.0; this module is imported only by those who use it.
"""

from detloss_plugins.adapters.ultralytics.config import SLOTS, load_losses
from detloss_plugins.adapters.ultralytics.criterion import (
    TASKS,
    PluginDetectionLoss,
    check_head,
    check_task,
    criterion_class,
    criterion_state,
    load_criterion_state,
)
from detloss_plugins.adapters.ultralytics.trainer import describe, install, make_trainer, trained_losses

__all__ = [
    "SLOTS",
    "TASKS",
    "PluginDetectionLoss",
    "check_head",
    "check_task",
    "criterion_class",
    "criterion_state",
    "describe",
    "install",
    "load_criterion_state",
    "load_losses",
    "make_trainer",
    "trained_losses",
]
