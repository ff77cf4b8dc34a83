"""What the classification losses share."""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from detloss_plugins.execution import Analytic, analytic, compiling, differentiated_once, pointwise, scaled, waits
from detloss_plugins.families import ClassificationLoss, negatives
from detloss_plugins.reduction import reduce


def power(base, exponent):
    """``base ** exponent`` for ``base >= 0`` with a finite gradient at zero for exponents below 1 too."""
    if exponent in (1, 2):
        return base if exponent == 1 else base.square()
    return base.clamp(min=torch.finfo(base.dtype).tiny).pow(exponent)


def bce(pred, target, activated=False, pos_weight=None, reduction="none"):
    """Binary cross entropy of each class, of logits or, if ``activated``, of probabilities."""
    if differentiated_once() and not activated and pos_weight is None:
        loss = focused_ce(pred, target, "soft", 0)
        return reduce(loss, reduction=reduction)
    return _bce(pred, target, activated, pos_weight, reduction)


def _bce(pred, target, activated, pos_weight=None, reduction="none"):
    if activated:
        return F.binary_cross_entropy(pred, target, reduction=reduction)
    return F.binary_cross_entropy_with_logits(pred, target, reduction=reduction, pos_weight=pos_weight)


def logistic_terms(pred, both=True):
    """``ln(1 + e^-|z|)``, ``sigmoid(z)`` and, if ``both``, ``sigmoid(-z)``."""
    if differentiated_once() and compiling():
        return logistic(pred)
    return F.softplus(pred.abs().neg_()), pred.sigmoid(), (-pred).sigmoid_() if both else None


def logistic(pred):
    """``ln(1 + e^-|z|)``, ``sigmoid(z)`` and ``sigmoid(-z)`` by one exponential, for a compiler.

    >>> logistic(torch.tensor([0.0]))
    (tensor([0.6931]), tensor([0.5000]), tensor([0.5000]))
    """
    power = pred.abs().neg().exp()
    larger = 1 / (1 + power)
    smaller = power * larger
    return log1p(power), torch.where(pred >= 0, larger, smaller), torch.where(pred >= 0, smaller, larger)


def log1p(x):
    """``ln(1 + x)`` for x in [0, 1]; of float32, by a series that takes a compiler a fraction of a logarithm's time.

    >>> log1p(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.0000, 0.4055, 0.6931])
    """
    if x.dtype != torch.float32:
        return x.log1p()
    s = x / (2 + x)  # ln(1 + x) = 2 artanh(s), and s is at most 1/3: eight terms are exact to the last digit or two
    square = s * s
    series = 0
    for k in range(15, 1, -2):
        series = (series + 1 / k) * square
    return 2 * s + 2 * s * series


def balance(alpha, target):
    """``alpha`` for positives, ``1 - alpha`` for negatives, in between for soft targets; None for no ``alpha``."""
    return None if alpha is None else (2 * alpha - 1) * target + (1 - alpha)


def focused_ce(pred, target, gap, gamma, weight=None, epsilon=0.0, activated=False):
    """``weight gap^gamma (BCE + epsilon gap)``, the form that the focal losses share.

    Args:
        pred, target: logits, or probabilities if ``activated``, and dense targets of one shape; the number 0 for zeros.
        gap: how far the probability p is from the target y: "hard", ``y (1 - p) + (1 - y) p``; "soft", ``|y - p|``;
            "negative", p, and 1 where the target is above 0.
        gamma: a number of at least 0.
        weight: a constant that broadcasts with ``pred``, or None.
    """
    if gamma == 0 and not epsilon and not differentiated_once():
        ce = _bce(pred, target, activated)
        return ce if weight is None else weight * ce
    if activated:
        return _FocusedCE.plain(pred, target, gap, gamma, weight, epsilon, activated)
    return pointwise(_FocusedCE, pred, target, gap, gamma, weight, epsilon)


class _FocusedCE(Analytic):
    """See :func:`focused_ce`. Its derivative is worked out along with the value, and is all that is kept."""

    @staticmethod
    def plain(pred, target, gap, gamma, weight, epsilon, activated=False):
        p = pred if activated else pred.sigmoid()
        if gap == "hard":
            gap = torch.lerp(p, 1 - p if activated else (-pred).sigmoid(), target)
        else:
            gap = (target - p).abs() if gap == "soft" else torch.where(target > 0, 1.0, p)
        ce = _bce(pred, target, activated)
        loss = power(gap, gamma) * (ce + epsilon * gap if epsilon else ce)
        return loss if weight is None else weight * loss

    @staticmethod
    def value(ctx, pred, target, gap, gamma, weight, epsilon):
        focused = gamma or epsilon
        if negatives(target):
            ce, p = F.softplus(pred), pred.sigmoid()
            gap, slope, surplus = p, torch.addcmul(p, p, p, value=-1) if focused else None, p
        else:
            small, p, q = logistic_terms(pred, gap == "hard" and focused)
            # max(z, 0) - y z, which for a hard target is exact, and ln(1 + e^-|z|)
            ce = small.add_(pred.relu().addcmul_(pred, target, value=-1))
            gap, slope, surplus = _gap(target, p, q, gap) if focused else (None, None, p.sub_(target))
        if epsilon:
            ce.add_(gap, alpha=epsilon)
            surplus = surplus.add(slope, alpha=epsilon)
        if gamma == 0:
            ctx.slope = surplus
        else:
            base = power(gap, gamma - 1)  # one power less, for the slope
            ctx.slope = slope.mul_(ce).mul_(gamma).addcmul_(gap, surplus).mul_(base)
            ce.mul_(gap).mul_(base)
        if weight is None:
            return ce
        ctx.slope.mul_(weight)
        return ce.mul_(weight)

    @staticmethod
    def gradients(ctx, outer):
        return [scaled(ctx.slope, outer)]


def _gap(target, p, q, kind):
    """The gap, its derivative, and ``p - y``, the derivative of BCE; all for their owner to change."""
    surplus = p - target
    if kind == "hard":
        return torch.lerp(p, q, target), q.mul_(p).mul_(1 - 2 * target), surplus
    slope = torch.addcmul(p, p, p, value=-1)
    if kind == "soft":
        return surplus.abs(), slope.mul_(surplus.sign()), surplus
    negative = (target <= 0).to(p.dtype)
    return (p - 1).mul_(negative).add_(1), slope.mul_(negative), surplus


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


def softmax_ce(pred, target, ignore_index=-100):
    """Softmax cross entropy of logits ``(N, C)`` and class indices ``(N,)``."""
    if differentiated_once() and not compiling():
        return analytic(_SoftmaxCE, pred, target, ignore_index)
    return _SoftmaxCE.plain(pred, target, ignore_index)


class _SoftmaxCE(Analytic):
    """See :func:`softmax_ce`. The softmax gives both the value and the gradient, and is all that is kept."""

    @staticmethod
    def plain(pred, target, ignore_index):
        return F.cross_entropy(pred, target, reduction="none", ignore_index=ignore_index)

    @staticmethod
    def value(ctx, pred, target, ignore_index):
        ctx.counts = target != ignore_index
        index = torch.where(ctx.counts, target, 0).unsqueeze(-1)
        p = pred.softmax(-1)
        of_target = p.gather(-1, index)
        if waits(pred.device) or not (of_target > 1e-30).all():  # its logarithm would be off
            log_p = pred.gather(-1, index).squeeze(-1) - pred.amax(-1) + p.amax(-1).log()
        else:
            log_p = of_target.squeeze(-1).log()
        ctx.slope = p.scatter_(-1, index, of_target - 1)
        return torch.where(ctx.counts, -log_p, 0)

    @staticmethod
    def gradients(ctx, outer):
        return [scaled(ctx.slope, (outer * ctx.counts).unsqueeze(-1))]


class SoftmaxOrSigmoid(ClassificationLoss):
    """A loss with both forms: the softmax form takes indices or distributions as they are."""

    sigmoid_only = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if not self.use_sigmoid:
            self.larger_parts = 2

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
