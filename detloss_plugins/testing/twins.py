"""How each upstream counterpart of a loss is called: what it is built from, and in which form it takes the target.

Only :func:`load` imports an upstream package, and only when it is asked for something of it.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from detloss_plugins.facts import Upstream
from detloss_plugins.loss import Loss


def load(path: str) -> Any:
    """The object at a dotted path, or None where its package, or one that it needs, is absent.

    ``ImportError`` or ``AttributeError`` if the package is there, and nothing at that path.
    """
    module, name = path.rsplit(".", 1)
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        if (error.name or "").startswith(f"{module.partition('.')[0]}."):
            raise
        return None


def in_words(settings: Mapping) -> str:
    """Settings as they are written in a call."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


# Built once, of (class or function, their settings, pred).


def module(found, theirs, pred):
    """A class with its settings."""
    return found(**theirs)


def bare(found, theirs, pred):
    """A function, which gets its settings in the call."""
    return lambda *args, **kwargs: found(*args, **theirs, **kwargs)


# The target that it takes, of (loss, their settings, pred, target).


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


def teacher_logits(loss, theirs, pred, target):
    """The logits of distributions, where the target is no logits already."""
    return loss.temperature * target.log() if getattr(loss, "target", "logits") == "distribution" else target


def with_ones(loss, theirs, pred, target):
    """The target, and a weight of ones in its shape."""
    target = dense_if_indexed(loss, theirs, pred, target)
    return target, pred.new_ones(target.shape)


def with_label(loss, theirs, pred, target):
    """The dense quality, and the label beside it."""
    target = dense(loss, theirs, pred, target)
    return target, (target > 0).to(pred.dtype)


# The loss, of (what is built, loss, pred, converted target, mmdet's keyword arguments).


def rows(losses, kwargs):
    """A plain reduction of one loss a row."""
    reduction = kwargs.get("reduction_override", "mean")
    return losses if reduction == "none" else getattr(losses, reduction)()


def mmdet(built, loss, pred, target, kwargs):
    """A class of mmdet's, under our own contract."""
    if "weight" in kwargs and loss.family == "classification" and loss.use_sigmoid and not loss.facts.sums_classes:
        kwargs = {**kwargs, "weight": kwargs["weight"].unsqueeze(-1)}  # theirs broadcasts as torch does
    return built(pred, target, **kwargs)


def mmdet_ghm(built, loss, pred, target, kwargs):
    """It must have a weight, in the target's shape."""
    (target, ones), kwargs = target, dict(kwargs)
    weight = kwargs.pop("weight", ones)
    if weight.shape != target.shape:
        weight = weight.reshape(len(pred), -1)[:, :1].expand(target.shape)
    return built(pred, target, label_weight=weight, **kwargs)


def mmdet_seesaw(built, loss, pred, target, kwargs):
    """Another name for the weight."""
    kwargs = {"label_weights" if name == "weight" else name: value for name, value in kwargs.items()}
    return built(pred, target, **kwargs)


def mmdet_distillation(built, loss, pred, target, kwargs):
    """It averages over the classes; ours sums over them, but for KLDivLoss where the target is logits."""
    return built(pred, target, **kwargs) * (1 if getattr(loss, "target", "") == "logits" else pred.shape[-1])


def function(built, loss, pred, target, kwargs):
    """A function of torch's or torchvision's."""
    if loss.facts.sums_classes:
        return rows(built(pred, target, reduction="none").sum(-1), kwargs)
    return built(pred, target, reduction=kwargs.get("reduction_override", "mean"))


def ultralytics(built, loss, pred, target, kwargs):
    """It averages over dim 1 and sums over the rest; ours is the sum. A target may have the label beside it."""
    return built(pred, *(target if isinstance(target, tuple) else (target,))) * pred.shape[1]


def ultralytics_dice(built, loss, pred, target, kwargs):
    """It averages over the channels: here one. The reduction is a setting of the module."""
    built.reduction = kwargs.get("reduction_override", "mean")
    return built(pred.unsqueeze(1), target)


class Twin(NamedTuple):
    """How to call a counterpart: what is made once, and what each call does."""

    call: Callable  # (what is built, loss, pred, converted target, mmdet's keyword arguments) -> the loss
    ways: set[str] | None = None  # of calling, by the names in :func:`detloss_plugins.testing.parity.calls`; None: all
    convert: Callable = as_given  # (loss, their settings, pred, target) -> the target that it takes
    build: Callable = module  # (class or function, their settings, pred) -> what is called
    form: str = ""  # of a class loss's target that it takes by nature: "index", "quality" or "dense"

    def ready(self, upstream: Upstream, loss: Loss, pred: Tensor, target: Any) -> tuple[Callable, Any]:
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
    "torch kl_div": Twin(  # it takes the model's logarithms
        lambda built, loss, pred, target, kwargs: rows(
            built(pred.log_softmax(-1), target, reduction="none").sum(-1), kwargs
        ),
        PLAIN,
        build=bare,
    ),
    "torchvision": Twin(function, PLAIN, dense_if_indexed, bare, "dense"),
    "ultralytics": Twin(ultralytics, {"sum"}, dense, form="dense"),
    "ultralytics VarifocalLoss": Twin(ultralytics, {"sum"}, with_label, form="dense"),
    "ultralytics DFLoss": Twin(  # it takes a trailing dimension, here of a copy because it clamps it in place
        lambda built, loss, pred, target, kwargs: rows(built(pred, target).squeeze(-1), kwargs),
        PLAIN,
        convert=lambda loss, theirs, pred, target: target.clone().unsqueeze(-1),
        build=lambda found, theirs, pred: found(pred.shape[-1]),
    ),
    "ultralytics MultiChannelDiceLoss": Twin(
        ultralytics_dice, PLAIN, convert=lambda loss, theirs, pred, target: target.unsqueeze(1)
    ),
} | dict.fromkeys(
    ("ultralytics bbox_iou", "ultralytics probiou"),  # the similarity of boxes, not the loss
    Twin(
        lambda built, loss, pred, target, kwargs: rows(1 - built(pred, target).reshape(len(pred)), kwargs),
        PLAIN,
        build=bare,
    ),
)


def twin_of(path: str) -> Twin:
    """How the counterpart at a dotted path is called."""
    package, *_, name = path.split(".")
    return TWINS.get(f"{package} {name}") or TWINS[package]
