"""Multi-label losses that treat the positive and the negative term of a class differently, and a sample weight."""

import torch
import torch.nn.functional as F

from detloss_plugins.base import Rule, Upstream, check_use_sigmoid, one_of, rules
from detloss_plugins.execution import Analytic, pointwise, scaled
from detloss_plugins.families import ClassificationLoss
from detloss_plugins.losses.classification import common
from detloss_plugins.registry import MODELS


def modified_cross_entropy_loss(pred, target, *, activation="sigmoid", alpha=None, gamma=0.0):
    """``-alpha t (1 - p)^gamma ln p - (1 - alpha) (1 - t) p^gamma ln(1 - p)`` of each class; the class sums them.

    ``p`` is the sigmoid of the logits or their softmax; ``alpha=None`` leaves both factors out.

    >>> modified_cross_entropy_loss(torch.zeros(3), torch.tensor([1.0, 0.0, 0.0]), activation="softmax")  # ln 3, ln 3/2
    tensor([1.0986, 0.4055, 0.4055])
    """
    if activation == "sigmoid" and gamma == 0 and alpha is None:
        return common.bce(pred, target)
    # As p_c = sigmoid(margin_c), one stable form serves both activations.
    logit = pred if activation == "sigmoid" else _margin(pred)
    alpha = common.class_vector(alpha, pred)
    return two_sided_ce(logit, target, gamma, gamma, alpha=alpha)


def two_sided_ce(pred, target, gamma_pos, gamma_neg, clip=0.0, alpha=None, detach=False):
    """``-a y (1 - p)^gamma_pos ln p - b (1 - y) p_m^gamma_neg ln(1 - p_m)`` of logits; ``p_m = max(p - clip, 0)``.

    ``a = alpha`` and ``b = 1 - alpha``, or 1 if there is none. ``detach`` makes constants of the powers.
    """
    return pointwise(_TwoSidedCE, pred, target, gamma_pos, gamma_neg, clip, alpha, detach)


class _TwoSidedCE(Analytic):
    """See :func:`two_sided_ce`. Its derivative is worked out along with the value, and is all that is kept."""

    @staticmethod
    def plain(pred, target, gamma_pos, gamma_neg, clip, alpha, detach):
        p, q = pred.sigmoid(), (-pred).sigmoid()
        positive, negative = common.power(q, gamma_pos), common.power((p - clip).clamp(min=0), gamma_neg)
        if detach:
            positive, negative = positive.detach(), negative.detach()
        # 1 - p_m = min(1 - p + clip, 1) stays above clip; without a clip the logarithm of the sigmoid is the exact one.
        log_negative = (q + clip).clamp(max=1).log() if clip else F.logsigmoid(-pred)
        positive, negative = -target * positive * F.logsigmoid(pred), -(1 - target) * negative * log_negative
        return positive + negative if alpha is None else alpha * positive + (1 - alpha) * negative

    @staticmethod
    def value(ctx, pred, target, gamma_pos, gamma_neg, clip, alpha, detach):
        small, p, q = common.logistic_terms(pred)
        pq = p * q
        positive, of_positive = _powered(q, -pq, small + (-pred).relu(), -q, gamma_pos, detach)
        if clip:
            margin = (p - clip).relu()
            inside = margin.sign().mul_(pq)
            rest = (q + clip).clamp(max=1)  # 1 - p_m, which stays above clip
            negative = _powered(margin, inside, -rest.log(), inside / rest, gamma_neg, detach)
        else:
            negative = _powered(p, pq, small + pred.relu(), p, gamma_neg, detach)
        weights = (target, 1 - target) if alpha is None else (alpha * target, (1 - alpha) * (1 - target))
        ctx.slope = (weights[0] * of_positive).addcmul_(weights[1], negative[1])
        return (weights[0] * positive).addcmul_(weights[1], negative[0])

    @staticmethod
    def gradients(ctx, outer):
        return [scaled(ctx.slope, outer)]


def _powered(base, slope_of_base, ce, slope_of_ce, gamma, detach):
    """``base^gamma ce`` and its slope, in which the power may count as a constant."""
    if gamma == 0:
        return ce, slope_of_ce
    slope = base * slope_of_ce
    if not detach:
        slope.addcmul_(slope_of_base, ce, value=gamma)
    if gamma == 1:
        return base * ce, slope
    lower = common.power(base, gamma - 1)
    return base * ce * lower, slope.mul_(lower)


def _margin(pred):
    """``z_c - LSE of the other logits``, that is ``ln(p_c / (1 - p_c))`` for ``p = softmax(z)``.

    Only the largest logit can have ``p_c > 1/2``, so only there would ``1 - p_c`` cancel; its sum is taken without it.
    A single class has p = 1 whatever its logit: its margin is cut at 100, torch's bound on a logarithm.
    """
    classes = pred.shape[-1]
    if classes == 1:
        return 0 * pred + 100
    largest = pred.argmax(-1, keepdim=True) == torch.arange(classes, device=pred.device)
    pred = pred - pred.detach().amax(-1, keepdim=True)
    of_largest = pred - pred.masked_fill(largest, float("-inf")).logsumexp(-1, keepdim=True)
    log_p = pred.log_softmax(-1)
    # The largest is not taken from this branch; -1 keeps its logarithm and gradient finite.
    of_others = log_p - torch.log1p(-log_p.masked_fill(largest, -1.0).exp())
    return torch.where(largest, of_largest, of_others)


@MODELS.register_module()
class ModifiedCrossEntropyLoss(ClassificationLoss):
    """Cross entropy that also pushes the other classes down, with hard, soft or multi-label targets.

    A sum over the classes: ``reduction="none"`` gives ``(...)``. The sigmoid form without ``gamma`` is the sum of the
    binary cross entropies. The focal factors are those of hard targets, so with soft ones the optimum is not ``p = t``.
    With multi-label targets the softmax form has no zero.

    Args:
        activation: "sigmoid" or "softmax".
        alpha: weight of the positive terms, ``1 - alpha`` that of the negative ones; None for no weights.
        gamma: focusing power; 0 for none.
        use_sigmoid: may be given because mmdet's heads read it from the config; it must fit ``activation``.

    Raises:
        ValueError: for another activation, or a ``use_sigmoid`` that does not fit.
    """

    fn = staticmethod(modified_cross_entropy_loss)
    allowed = rules(activation=one_of("sigmoid", "softmax"))
    sums_classes = True
    sigmoid_only = False
    upstream = (
        Upstream("torch.nn.functional.binary_cross_entropy_with_logits"),
        Upstream("torchvision.ops.sigmoid_focal_loss", {"alpha": 0.25, "gamma": 2.0}, {"alpha": 0.25, "gamma": 2.0}),
    )

    def __init__(self, *, activation="sigmoid", use_sigmoid=None, **kwargs):
        super().__init__(use_sigmoid=activation == "sigmoid", activation=activation, **kwargs)
        self.keeps_little = self.use_sigmoid and self.gamma == 0 and self.alpha is None
        check_use_sigmoid(self, use_sigmoid)


def asymmetric_loss(pred, target, *, gamma_neg=4.0, gamma_pos=1.0, clip=0.05, detach_focusing=True):
    """``-y (1 - p)^gamma_pos ln p - (1 - y) p_m^gamma_neg ln(1 - p_m)`` with ``p_m = max(p - clip, 0)``.

    The two powers are constants unless ``detach_focusing`` is False.

    >>> asymmetric_loss(torch.zeros(2), torch.tensor([1.0, 0.0]))  # ln 2 / 2 and -0.45^4 ln 0.55
    tensor([0.3466, 0.0245])
    """
    return two_sided_ce(pred, target, gamma_pos, gamma_neg, clip, detach=detach_focusing)


@MODELS.register_module()
class AsymmetricLoss(ClassificationLoss):
    """Ridnik et al., Asymmetric Loss for Multi-Label Classification, 2020 (ASL).

    The authors' code returns the sum; here that is ``reduction="sum"``.

    Args:
        gamma_neg, gamma_pos: focusing powers of the negatives and the positives.
        clip: a negative with a probability below it costs nothing.
        detach_focusing: treat the powers as constants, as the authors' default does.

    Raises:
        ValueError: if ``clip`` is not in [0, 1).
    """

    fn = staticmethod(asymmetric_loss)
    allowed = rules(clip=Rule("in [0, 1)", lambda clip: 0 <= clip < 1))
    paper = "https://arxiv.org/abs/2009.14119"
    yolo_gain = 64.0
    needs_mining = False
    true_gradient = False
    upstream = (
        Upstream(
            "torchvision.ops.sigmoid_focal_loss",
            {"gamma_neg": 2.0, "gamma_pos": 2.0, "clip": 0.0, "detach_focusing": False},
            {"alpha": -1, "gamma": 2.0},
        ),
    )


def confidence_weight(q_fg, q_bg, power, *, detach=True):
    """``(1 - q_fg)^power q_bg``: a sample's weight from its foreground and background confidence, a constant.

    It is large where the background is sure and the foreground is not. ``detach=False`` lets gradient through.

    >>> confidence_weight(torch.tensor([0.3]), torch.tensor([0.6]), 2.0)  # 0.7^2 * 0.6
    tensor([0.2940])
    """
    weight = common.power(1 - q_fg, power) * q_bg
    return weight.detach() if detach else weight


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
