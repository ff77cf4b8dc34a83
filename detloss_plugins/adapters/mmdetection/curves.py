"""Curves of the losses of a training with mmengine's Runner, for its log and every visualizer that is on."""

import inspect
import math
from collections.abc import Callable

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from detloss_plugins.adapters.curves import part_names, part_values, state_scalars, still
from detloss_plugins.loss import Loss

SQUARES = "squares of the gradient"


class LossCurvesHook(Hook):
    """Writes scalars of each loss of ours into the message hub, where LoggerHook and all visualizers find them.

    In every so many iterations, under ``train/curves/``, the loss's place in the model and a name: ``gradient``, the
    norm of the gradient of the training loss for what the loss is called with (logits, boxes or deltas), and
    ``positives``, the rows with an object, both over all calls of the iteration (levels, layers, images); the value of
    each part of a JointLoss or ScheduledLoss; and the state. A number that is not finite is left out, such as the
    gradient in a step that a loss scaler skips. It costs a wait for the device and, of a loss made of parts, another
    call of these::

        custom_hooks = [dict(type="detloss_plugins.adapters.mmdetection.LossCurvesHook", interval=50)]

    Args:
        interval: number of iterations from one look to the next, best that of LoggerHook or a divisor of it.
    """

    priority = "NORMAL"  # before LoggerHook

    def __init__(self, interval: int = 50) -> None:
        self.interval = interval
        self.hooks, self.seen, self.scale = [], {}, 1.0

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        """Have the calls of this iteration noted, if it is one of those."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        self.seen = {}
        scaler = getattr(runner.optim_wrapper, "loss_scaler", None)  # of mixed precision; the step changes its scale
        self.scale = scaler.get_scale() if scaler else 1.0
        for name, loss, head in losses_of(runner.model):
            noting = self.noting(name, getattr(head, "num_classes", None))
            self.hooks.append(loss.register_forward_hook(noting, with_kwargs=True))

    def noting(self, name: str, classes: int | None) -> Callable:
        """What is run after each call of the loss of that name, in a head of so many classes."""
        seen = self.seen.setdefault(name, {})

        def note(loss, args, kwargs, _):
            given = inspect.signature(loss.forward).bind(*args, **kwargs).arguments
            pred = given["pred"]
            others = given.get("weight"), classes, given.get("pos_inds")
            found = {"positives": positives(loss, pred, given["target"], *others)}
            with still(loss):
                found.update(zip(part_names(loss), part_values(loss, **given), strict=True))
            for key, value in found.items():
                seen[key] = seen.get(key, 0) + value
            if isinstance(pred, torch.Tensor) and pred.requires_grad:
                pred.register_hook(add)

        def add(slope):
            seen[SQUARES] = seen.get(SQUARES, 0) + slope.float().square().sum()

        return note

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Write down what was noted, and the state."""
        if not self.hooks:
            return
        while self.hooks:
            self.hooks.pop().remove()
        for name, loss, _ in losses_of(runner.model):
            found = {**self.seen[name], **state_scalars(loss)}
            found["gradient"] = found.pop(SQUARES, torch.zeros(())).sqrt() / self.scale
            for key, value in found.items():
                if math.isfinite(number := float(value)):
                    runner.message_hub.update_scalar(f"train/curves/{name}/{key}", number)


def losses_of(model):
    """The losses of ours in a model that are no part of another: place without "loss_", loss and what it is part of."""
    # LoggerHook takes the mean of the last values of what has "loss" in its name.
    model = model.module if is_model_wrapper(model) else model
    return _outermost(model, "")


def _outermost(module, place):
    for name, child in module.named_children():
        where = f"{place}.{name.removeprefix('loss_')}".removeprefix(".")
        yield from [(where, child, module)] if isinstance(child, Loss) else _outermost(child, where)


def positives(loss, pred, target, weight, classes=None, pos_inds=None):
    """How many rows of a call have an object: a class above the background, or of other losses a weight above 0.

    ``classes``: of the head, whose logits may have a channel for the background beside a sigmoid loss too, or several
    that are of no class. Of the logits of a map of classes, ``(N, C, H, W)``, pixels are counted; of a heatmap its
    peaks, or ``pos_inds``, the rows of objects that CenterNetUpdateHead gives.
    """
    if loss.family == "heatmap":
        return len(pos_inds) if pos_inds is not None else (target == 1).sum()
    if getattr(loss, "use_mask", False):  # a mask for each object
        return len(pred)
    if loss.family in ("classification", "ranking"):
        of_map = pred.dim() == 4 and torch.is_tensor(target) and target.dim() == 3
        channels = pred.shape[1 if of_map else -1]
        same = pred.dim() == 2 and torch.is_tensor(target) and target.shape == pred.shape
        if same and classes is not None and channels not in (classes, classes + 1):
            return (target > 0).sum()  # images by anchors, as YOLOv3's confidence is
        foreground = channels - (not loss.use_sigmoid) if classes is None else min(classes, channels)
        return object_rows(pred, target, foreground).sum()
    if weight is None:
        return len(pred)
    found = weight > 0
    if found.dim() > 1:  # of boxes (..., 4), or of a map (N, 2, H, W)
        found = found.any(1 if found.dim() == 4 else -1)
    return found.sum()


def object_rows(pred, target, classes):
    """Which rows of the logits ``(N, C)`` or ``(N,)`` of a call have an object, a mask ``(N,)``.

    ``classes``: without the background.
    """
    label = target[0] if isinstance(target, (tuple, list)) else target
    if label.shape == pred.shape:
        return label > 0 if label.dim() == 1 else (label > 0).any(-1)
    return (label >= 0) & (label < classes)
