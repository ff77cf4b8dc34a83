"""Weights for losses in the dense heads of MMDetection; see :mod:`detloss_plugins.adapters.calibrate`."""

import contextlib
import copy
import functools
import inspect
import tempfile

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from detloss_plugins.adapters.calibrate import (
    LOOKS,
    STOCK,
    Candidate,
    Finished,
    Gradients,
    Looks,
    amounts_at,
    look_steps,
    losses_of,
)
from detloss_plugins.adapters.curves import gradients
from detloss_plugins.adapters.heads import check_fit, kept_settings
from detloss_plugins.adapters.mmdetection.check import build_detector
from detloss_plugins.adapters.mmdetection.counts import ClassCountsHook, count_for
from detloss_plugins.adapters.mmdetection.curves import object_rows
from detloss_plugins.losses import ScheduledLoss
from detloss_plugins.nested import flatten
from detloss_plugins.registry import SCOPE, build_loss, loss_path, registered_losses

# Slot -> the families of losses that a dense head calls with what it calls its own with.
SLOTS = {"loss_cls": ("classification", "ranking"), "loss_bbox": ("box", "regression")}


class CalibrationHook(Hook):
    """Looks, at some iterations, at what the losses of a head and candidates for their places have for gradients.

    Candidates are called with what the head calls its own losses with, level by level. Those with a state are so in
    every iteration. Nothing of the training changes.

    Args:
        candidates: of :func:`candidate`.
        steps, looks, told: see :func:`calibrate`.
    """

    priority = "VERY_LOW"

    def __init__(self, candidates, steps, looks=LOOKS, told=None):
        self.candidates, self.steps, self.at, self.told = candidates, steps, look_steps(steps, looks), told
        self.found, self.step, self.outputs = Gradients(), 1, []

    def before_train(self, runner):
        """Have the calls of the head and of its losses told."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        head = model.bbox_head
        self.classes = head.num_classes
        head.register_forward_hook(self.keep_outputs)
        losses = torch.nn.ModuleList(build_loss(candidate.cfg) for candidate in self.candidates)
        count_for(losses, runner)
        losses.to(next(head.parameters()).device)
        self.looks = Looks(self.candidates, losses, self.found, self.at)
        for slot in {candidate.slot for candidate in self.candidates}:
            getattr(head, slot).register_forward_hook(functools.partial(self.look, slot), with_kwargs=True)

    def keep_outputs(self, head, args, outputs):
        """What the head gives: class scores, boxes and the like, of each level."""
        self.outputs = [x for x in flatten(outputs)[0] if x.requires_grad]

    def look(self, slot, loss, args, kwargs, value):
        """What is run after each call of the loss in a slot."""
        pred, target, *_ = inspect.signature(loss.forward).bind(*args, **kwargs).arguments.values()
        for _, label, own in self.looks.turns(self.step, [slot]):
            found = value if own is None else own(*args, **kwargs)
            if slot == "loss_cls":
                amount = amounts_at(pred, found, object_rows(pred, target, self.classes))
            else:  # through the decoding of boxes, which are those of positives
                total = sum((x.abs().sum().cpu() for x in gradients(found, self.outputs)), torch.zeros(()))
                amount = torch.stack([total, total])
            self.looks.add(self.step, slot, label, amount)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Count, and end the training."""
        if self.told:
            self.told(self.step)
        if self.step >= self.steps:
            raise Finished
        self.step += 1


def build_head(cfg):
    """The dense head of a config, as it is built there.

    Raises:
        ValueError: if the detector has none whose losses can be calibrated.
    """
    model = build_detector(cfg)
    head = getattr(model, "bbox_head", None)
    has_both = all(isinstance(getattr(head, slot, None), torch.nn.Module) for slot in SLOTS)
    if not isinstance(head, BaseDenseHead) or not has_both:
        raise ValueError(
            "Of MMDetection, losses are calibrated for dense heads that have loss_cls and loss_bbox, which "
            f"{type(model).__name__} has not: write their weights."
        )
    return head


def candidate(loss, head, slot=None, label=None):
    """A loss as a :class:`~detloss_plugins.adapters.calibrate.Candidate`.

    Args:
        loss: the name of a loss of ours, or a config; its ``loss_weight`` is left out.
        head: of :func:`build_head`.
        slot: "loss_cls" or "loss_bbox"; by default the first that takes its family.
        label: its name; by default the type that is given.

    Raises:
        ValueError, TypeError: if the loss does not fit the head, or is a ScheduledLoss.
    """
    cfg = {"type": loss} if isinstance(loss, str) else {k: v for k, v in loss.items() if k != "loss_weight"}
    name = loss_path(cfg["type"]).removeprefix(f"{SCOPE}.")
    of_head = kept_settings(name, {"use_sigmoid": head.use_sigmoid_cls, "num_classes": head.num_classes})
    cfg = {**of_head, **cfg, "type": name if "." in name else f"{SCOPE}.{name}"}
    built = build_loss(cfg)
    if isinstance(built, ScheduledLoss):
        raise ValueError("A ScheduledLoss has a weight for each of its losses: calibrate those.")
    fits = [name for name, families in SLOTS.items() if built.family in families]
    if not fits:
        raise ValueError(f"{name} is a {built.family} loss, which no slot takes that can be calibrated.")
    slot = slot or fits[0]
    check_slot(slot)
    cfg = {**kept_settings(name, vars(getattr(head, slot))), **cfg}
    check_fit(head, slot, build_loss(cfg))
    stock = type(getattr(head, slot)).__name__
    same = registered_losses().get(stock)  # ours, or mmdet's of that name
    if slot == "loss_bbox" and same and same.facts.family != built.family:
        raise ValueError(
            f"{name} is a {built.family} loss, and this head hands its loss_bbox, {stock}, what a {same.facts.family} "
            f"loss takes: calibrate beside a config whose loss_bbox is a {built.family} loss (reg_decoded_bbox says "
            "which, in heads that have it)."
        )
    order = {"type": cfg.pop("type"), **cfg, "loss_weight": 1.0}
    return Candidate(label or name, slot, order)


def check_slot(slot):
    """Raise ``ValueError`` if there is no such slot."""
    if slot not in SLOTS:
        raise ValueError(f"There is no slot {slot!r} to calibrate in a dense head; the slots are {', '.join(SLOTS)}.")


def fitting(slot, head):
    """A :class:`~detloss_plugins.adapters.calibrate.Candidate` of every loss of ours that needs no settings there."""
    check_slot(slot)
    found = []
    for name in losses_of(SLOTS[slot]):
        with contextlib.suppress(TypeError, ValueError):
            found.append(candidate(name, head, slot))
    return found


def calibrate(cfg, candidates, steps=100, looks=LOOKS, told=None):
    """The weights that suit some losses in a dense head, by a short training with the losses of its config.

    Args:
        cfg: the config of a training.
        candidates: of :func:`candidate` or :func:`fitting`, each label once a slot.
        steps: how long the training is, in iterations; its last is the last look.
        looks: how many there are.
        told: a function that is called with each step that is done.

    Returns:
        A :class:`~detloss_plugins.adapters.calibrate.Suggestion` for each candidate, in their order: beside the stock
        loss with the weight that the config gives it.

    Raises:
        ValueError: if a loss gets what it cannot take, or the training ends before the first look.
    """
    cfg = copy.deepcopy(cfg)
    for split in ("val", "test"):
        for part in ("dataloader", "cfg", "evaluator"):
            cfg[f"{split}_{part}"] = None
    cfg.default_hooks = {**cfg.get("default_hooks", {}), "checkpoint": None}
    cfg.log_level, cfg.resume = "ERROR", False
    cfg.visualizer = {"type": "Visualizer", "name": "calibration", "vis_backends": []}  # which writes nothing
    hook = CalibrationHook(candidates, steps, looks, told)
    with tempfile.TemporaryDirectory() as cfg.work_dir, contextlib.suppress(Finished):
        runner = Runner.from_cfg(cfg)
        runner.register_hook(ClassCountsHook())
        runner.register_hook(hook)
        try:
            runner.train()
        finally:  # left before its end; a ScheduledLoss would go on believing that a runner trains
            runner.message_hub.pop_info("loop_stage", None)
    if silent := [slot for slot in {c.slot for c in candidates} if (slot, STOCK) not in hook.found.found]:
        raise ValueError(
            f"{silent[0]} was not called in {hook.step} steps: the head works out this loss by itself, or the training "
            "is too short."
        )
    return hook.found.suggestions(candidates)
