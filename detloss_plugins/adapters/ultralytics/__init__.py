"""Ultralytics YOLO: swap the classification, box and distribution loss of a training by one dict.

For detection, segmentation, pose and oriented boxes, with every head of these (end-to-end ones, World, YOLOE), and for
RT-DETR.

``make_trainer(losses)`` gives a trainer for ``YOLO(...).train(trainer=...)``. The stock criterion is subclassed, its
class loss and its box criterion are replaced on the instance, and the model is told to build this criterion. What is
saved of a model, such as ``best.pt``, holds stock classes only, and a record of the losses. To find it again, the
import of this package changes two methods of Ultralytics: ``BaseModel.__setstate__`` gives a model that is loaded the
losses of its record, and ``BaseTrainer.check_resume`` warns if a run of ours is resumed without them.

Ultralytics is AGPL-3.0; this module is imported only by those who use it.
"""

from detloss_plugins.adapters.ultralytics.building import check_head, model_task
from detloss_plugins.adapters.ultralytics.config import SLOTS, default_gain, default_prior, load_losses
from detloss_plugins.adapters.ultralytics.criterion import (
    PluginDetectionLoss,
    criterion_class,
    criterion_state,
    load_criterion_state,
)
from detloss_plugins.adapters.ultralytics.ignore import make_validator
from detloss_plugins.adapters.ultralytics.model import install, open_model, trained_losses
from detloss_plugins.adapters.ultralytics.per_image import LossesByImage, per_image
from detloss_plugins.adapters.ultralytics.rtdetr import PluginRTDETRLoss
from detloss_plugins.adapters.ultralytics.trainer import TRAINERS, make_trainer, tune
from detloss_plugins.adapters.ultralytics.words import describe

__all__ = [
    "SLOTS",
    "TRAINERS",
    "LossesByImage",
    "PluginDetectionLoss",
    "PluginRTDETRLoss",
    "check_head",
    "criterion_class",
    "criterion_state",
    "default_gain",
    "default_prior",
    "describe",
    "install",
    "load_criterion_state",
    "load_losses",
    "make_trainer",
    "make_validator",
    "model_task",
    "open_model",
    "per_image",
    "trained_losses",
    "tune",
]
