"""How every upstream counterpart of a loss is called: once here, for the comparison and for the benchmark."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from torch import nn


def load(path):
    """The object at a dotted path, or None where its package is absent."""
    module, name = path.rsplit(".", 1)
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def in_words(settings):
    """Settings as they are written in a call."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def reduce_rows(rows, reduction):
    """A plain reduction of one loss a row."""
    return {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction]


def module(found, theirs, pred):
    """A class with its settings."""
    return found(**theirs)


def bare(found, theirs, pred):
    """A function, which gets its settings in the call."""
    return lambda *args, **kwargs: found(*args, **theirs, **kwargs)


def as_given(loss, theirs, pred, target):
    """No conversion."""
    return target


def dense(loss, theirs, pred, target):
    """The dense form of the target of a class loss."""
    return loss.prepare(pred, target)[1]


def dense_if_indexed(loss, theirs, pred, target):
    """The dense form of class indices; other targets as they are."""
    indexed = loss.family == "classification" and (isinstance(target, tuple) or target.dim() < pred.dim())
    return dense(loss, theirs, pred, target) if indexed else target


def quality_pair(loss, theirs, pred, target):
    """The (label, score) tuple for class indices, and for probabilities."""
    if isinstance(target, tuple):
        return target
    if target.dim() == 1:
        return target, (target < pred.shape[-1]).to(pred.dtype)
    if theirs.get("activated"):
        score, label = target.max(-1)
        return label.where(score > 0, pred.shape[-1]), score
    return target


def with_label(loss, theirs, pred, target):
    """The dense quality, and the label beside it."""
    target = dense(loss, theirs, pred, target)
    return target, (target > 0).to(pred.dtype)


def with_ones(loss, theirs, pred, target):
    """The target and a weight of ones in its shape, for those that must have one."""
    return target, pred.new_ones(target.shape)


def teacher_logits(loss, theirs, pred, target):
    """The teacher's logits for its distribution."""
    return loss.temperature * target.log()


def column(loss, theirs, pred, target):
    """A trailing dimension; a copy, because its target is clamped in place."""
    return target.clone().unsqueeze(-1)


def channel(loss, theirs, pred, target):
    """Masks of one channel."""
    return target.unsqueeze(1)


def mmdet(built, loss, pred, target, kwargs):
    """A class of mmdet's, under our own contract."""
    if "weight" in kwargs and loss.family == "classification" and loss.use_sigmoid and not loss.sums_classes:
        kwargs = {**kwargs, "weight": kwargs["weight"].unsqueeze(-1)}  # theirs broadcasts as torch does
    return built(pred, target, **kwargs)


def mmdet_ghm(built, loss, pred, target, kwargs):
    """They must have a weight, in the target's shape."""
    target, ones = target
    kwargs = dict(kwargs)
    weight = kwargs.pop("weight", ones)
    if weight.shape != (shape := target.shape):
        weight = weight.reshape(len(pred), -1)[:, :1].expand(len(pred), shape[1:].numel()).reshape(shape)
    return built(pred, target, label_weight=weight, **kwargs)


def mmdet_seesaw(built, loss, pred, target, kwargs):
    """Another name for the weight."""
    kwargs = {"label_weights" if name == "weight" else name: value for name, value in kwargs.items()}
    return built(pred, target, **kwargs)


def mmdet_distillation(built, loss, pred, target, kwargs):
    """It averages over the classes."""
    return pred.shape[-1] * built(pred, target, **kwargs)


def function(built, loss, pred, target, kwargs):
    """A function of torch's or torchvision's."""
    reduction = kwargs.get("reduction_override", "mean")
    if loss.sums_classes:
        return reduce_rows(built(pred, target, reduction="none").sum(-1), reduction)
    return built(pred, target, reduction=reduction)


def kl_div(built, loss, pred, target, kwargs):
    """It takes the model's logarithms."""
    rows = built(pred.log_softmax(-1), target, reduction="none").sum(-1)
    return reduce_rows(rows, kwargs.get("reduction_override", "mean"))


def similarity(built, loss, pred, target, kwargs):
    """A function that returns the similarity of boxes, not the loss."""
    return reduce_rows(1 - built(pred, target).reshape(len(pred)), kwargs.get("reduction_override", "mean"))


def ultralytics(built, loss, pred, target, kwargs):
    """They average over dim 1 and sum over the rest; ours is the sum."""
    return built(pred, target) * pred.shape[1]


def ultralytics_varifocal(built, loss, pred, target, kwargs):
    """The same, with the label beside the quality."""
    return built(pred, *target) * pred.shape[1]


def ultralytics_dfl(built, loss, pred, target, kwargs):
    """One loss a row."""
    return reduce_rows(built(pred, target).squeeze(-1), kwargs.get("reduction_override", "mean"))


def ultralytics_dice(built, loss, pred, target, kwargs):
    """It averages over the channels: here one. The reduction is a setting of the module."""
    built.reduction = kwargs.get("reduction_override", "mean")
    return built(pred.unsqueeze(1), target)


class Twin(NamedTuple):
    """How to call a counterpart: what is made once, and what each call does."""

    call: Callable  # (what is built, loss, pred, converted target, mmdet's keyword arguments) -> the loss
    ways: set | None = None  # of calling, by the names in tools/compare.py; None: all
    convert: Callable = as_given  # (loss, their settings, pred, target) -> the target that it takes
    build: Callable = module  # (class or function, their settings, pred) -> what is called
    form: str = ""  # of a class loss's target that it takes by nature: "index", "quality" or "dense"

    def ready(self, upstream, loss, pred, target):
        """``call(pred, target, kwargs)`` of a new instance, and the target in the form that it takes."""
        built = self.build(load(upstream.path), upstream.theirs, pred)
        if isinstance(built, nn.Module):
            built = built.to(pred.device)
        given = self.convert(loss, upstream.theirs, pred, target)
        return lambda pred, given, kwargs: self.call(built, loss, pred, given, kwargs), given


PLAIN = {"none", "mean", "sum"}
# By package, or by package and name where that is called otherwise.
TWINS = {
    "mmdet": Twin(mmdet, form="index"),
    "mmdet QualityFocalLoss": Twin(mmdet, convert=quality_pair, form="quality"),
    "mmdet VarifocalLoss": Twin(mmdet, convert=dense, form="dense"),
    "mmdet KnowledgeDistillationKLDivLoss": Twin(mmdet_distillation, convert=teacher_logits),
    "mmdet EQLV2Loss": Twin(mmdet, {"mean"}, form="index"),
    # They have a normaliser always, which they refuse to combine with a sum.
    "mmdet GHMC": Twin(mmdet_ghm, {"none", "mean", "weight", "weight, avg_factor"}, with_ones, form="dense"),
    "mmdet GHMR": Twin(mmdet_ghm, {"none", "mean", "weight", "weight, avg_factor", "weight (N, 4)"}, with_ones),
    # Its class part leaves the rows of background out, and so cannot give its rows.
    "mmdet SeesawLoss": Twin(
        mmdet_seesaw, {"mean", "sum", "weight", "weight, avg_factor", "weight, sum"}, form="index"
    ),
    "torch": Twin(function, PLAIN, dense_if_indexed, bare, "dense"),
    "torch cross_entropy": Twin(function, PLAIN, build=bare, form="index"),
    "torch kl_div": Twin(kl_div, PLAIN, build=bare),
    "torchvision": Twin(function, PLAIN, dense_if_indexed, bare, "dense"),
    "ultralytics": Twin(ultralytics, {"sum"}, dense, form="dense"),
    "ultralytics VarifocalLoss": Twin(ultralytics_varifocal, {"sum"}, with_label, form="dense"),
    "ultralytics DFLoss": Twin(ultralytics_dfl, PLAIN, column, lambda found, theirs, pred: found(pred.shape[-1])),
    "ultralytics MultiChannelDiceLoss": Twin(ultralytics_dice, PLAIN, channel),
    "ultralytics bbox_iou": Twin(similarity, PLAIN, build=bare),
    "ultralytics probiou": Twin(similarity, PLAIN, build=bare),
}


def twin_of(path):
    """How the counterpart at a dotted path is called."""
    package, *_, name = path.split(".")
    return TWINS.get(f"{package} {name}") or TWINS[package]
