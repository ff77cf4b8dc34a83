"""What the classification losses share."""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from detloss_plugins.base import ClassificationLoss
from detloss_plugins.execution import Analytic, analytic


def power(base, exponent):
    """``base ** exponent`` for ``base >= 0`` with a finite gradient at zero for exponents below 1 too."""
    if exponent in (1, 2):
        return base if exponent == 1 else base.square()
    return base.clamp(min=torch.finfo(base.dtype).tiny).pow(exponent)


def bce(pred, target, activated, pos_weight=None):
    if activated:
        return F.binary_cross_entropy(pred, target, reduction="none")
    return F.binary_cross_entropy_with_logits(pred, target, reduction="none", pos_weight=pos_weight)


def sigmoid_terms(pred, target):
    """``p = sigmoid(pred)``, ``1 - p`` without its cancellation, and the binary cross entropy."""
    return analytic(_SigmoidTerms, pred, target)


class _SigmoidTerms(Analytic):
    """See :func:`sigmoid_terms`; the cross entropy is ``max(z, 0) - y z + ln(1 + e^-|z|)``, which never cancels."""

    @staticmethod
    def plain(pred, target):
        return pred.sigmoid(), (-pred).sigmoid(), bce(pred, target, activated=False)

    @staticmethod
    def value(ctx, pred, target):
        p, q = pred.sigmoid(), (-pred).sigmoid_()
        ctx.terms = p.detach(), q.detach(), target
        return p, q, pred.relu().addcmul_(pred, target, value=-1).add_(F.softplus(pred.abs().neg_()))

    @staticmethod
    def gradients(ctx, of_p, of_q, of_ce):
        p, q, target = ctx.terms
        gradient = 0 if of_ce is None else (p - target).mul_(of_ce)
        if of_p is not None or of_q is not None:
            outer = of_p if of_q is None else -of_q if of_p is None else of_p - of_q
            gradient = gradient + (p * q).mul_(outer)
        return [gradient]


def class_vector(values, pred):
    """Per-class values (number, list, tensor or None) beside ``pred``."""
    if values is None or isinstance(values, (int, float)):
        return values
    vector = torch.as_tensor(values, dtype=pred.dtype, device=pred.device)
    if vector.dim() and vector.shape[-1] not in (1, pred.shape[-1]):
        raise ValueError(f"{vector.shape[-1]} values were given for {pred.shape[-1]} classes.")
    return vector


def index_target(target):
    """Whether a target of a softmax loss is class indices rather than a distribution."""
    return not target.is_floating_point()


class SoftmaxOrSigmoid(ClassificationLoss):
    """A loss with both forms: the softmax form takes indices or distributions as they are."""

    sigmoid_only = False

    def prepare(self, pred, target):
        if self.use_sigmoid:
            return super().prepare(pred, target)
        if isinstance(target, torch.Tensor) and target.shape == pred.shape:
            return pred, target.to(pred.dtype), None
        if isinstance(target, torch.Tensor) and target.shape == pred.shape[:-1] and index_target(target):
            valid = target >= 0
            return pred, torch.where(valid, target, 0).long(), valid
        raise ValueError(
            f"The softmax form of {type(self).__name__} with logits {tuple(pred.shape)} takes class indices "
            f"{tuple(pred.shape[:-1])} as integers or distributions {tuple(pred.shape)}; "
            "a (label, quality) target has a meaning for use_sigmoid=True only."
        )


class QualityLoss(ClassificationLoss):
    """A loss whose target for a positive is a quality.

    mmdet's DETR-type heads hand over the IoU to instances of mmdet's QualityFocalLoss only, and class labels to any
    other loss. So this class takes that one, where it is loaded, as a further base, of which nothing is used.
    """

    needs_mining = False

    def __new__(cls, *args, **kwargs):  # not __init__, which unpickling skips
        theirs = getattr(sys.modules.get("mmdet.models.losses"), "QualityFocalLoss", None)
        if theirs is not None and not issubclass(QualityLoss, theirs):
            base = type("WhatMMDetAsksFor", (theirs,), {"__init__": nn.Module.__init__})
            QualityLoss.__bases__ = (*QualityLoss.__bases__, base)
        return super().__new__(cls)
