"""Multi-label losses that treat the positive and the negative term of a class differently, and a sample weight."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detloss_plugins.facts import ARXIV, TORCH, NonNegative, NotWeighed, Share, SharePerClass, Upstream, alike, between
from detloss_plugins.families import ClassificationLoss, of_one_type
from detloss_plugins.loss import check_use_sigmoid
from detloss_plugins.losses.classification.common import bce, class_vector, is_zero
from detloss_plugins.losses.classification.common import power as to_the
from detloss_plugins.precision import float32
from detloss_plugins.registry import MODELS

__all__ = [
    "AsymmetricLoss", "ModifiedCrossEntropyLoss", "asymmetric_loss", "confidence_weight",
    "modified_cross_entropy_loss",
]  # fmt: skip


def modified_cross_entropy_loss(
    pred: Tensor,
    target: Tensor,
    *,
    activation: Literal["sigmoid", "softmax"] = "sigmoid",
    alpha: Share | SharePerClass | NotWeighed = None,
    gamma: NonNegative = 0.0,
) -> Tensor:
    """``-alpha t (1 - p)^gamma ln p - (1 - alpha) (1 - t) p^gamma ln(1 - p)`` of each class; the class sums them.

    ``p`` is the sigmoid of the logits ``(..., C)`` or their softmax; ``alpha=None`` leaves both factors out.

    >>> modified_cross_entropy_loss(torch.zeros(3), torch.tensor([1.0, 0.0, 0.0]), activation="softmax")  # ln 3, ln 3/2
    tensor([1.0986, 0.4055, 0.4055])
    """
    pred, target = of_one_type(pred, target)
    if activation == "sigmoid" and alpha is None and is_zero(gamma):
        return bce(pred, target)
    # As p_c = sigmoid(margin_c), one stable form serves both activations.
    logit = pred if activation == "sigmoid" else _margin(pred)
    positive, negative = _terms(logit, target, gamma, gamma)
    share = class_vector(alpha, pred)
    return positive + negative if share is None else share * positive + (1 - share) * negative


def _terms(pred, target, gamma_pos, gamma_neg, clip=0.0, detach=False):
    """``-y (1 - p)^gamma_pos ln p`` and ``-(1 - y) p_m^gamma_neg ln(1 - p_m)`` of logits; ``p_m = max(p - clip, 0)``.

    ``detach`` makes constants of the powers.
    """
    p, rest = pred.sigmoid(), (-pred).sigmoid()
    of_positive, of_negative = to_the(rest, gamma_pos), to_the((p - clip).clamp(min=0), gamma_neg)
    if detach:
        of_positive, of_negative = of_positive.detach(), of_negative.detach()
    # 1 - p_m = min(1 - p + clip, 1) stays above clip; without a clip the logarithm of the sigmoid is the exact one.
    log_negative = (rest + clip).clamp(max=1).log() if clip else F.logsigmoid(-pred)
    return -target * of_positive * F.logsigmoid(pred), -(1 - target) * of_negative * log_negative


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
class ModifiedCrossEntropyLoss(
    ClassificationLoss,
    fn=modified_cross_entropy_loss,
    row_wise=True,
    sums_classes=True,
    upstream=(
        *alike(TORCH + "binary_cross_entropy_with_logits"),
        *alike("torchvision.ops.sigmoid_focal_loss", {"alpha": 0.25, "gamma": 2.0}),
    ),
):
    """Cross entropy that also pushes the other classes down, with hard, soft or multi-label targets.

    A sum over the classes: ``reduction="none"`` gives ``(...)``. The sigmoid form without ``gamma`` is the sum of the
    binary cross entropies. The focal factors are those of hard targets, so with soft ones the optimum is not ``p = t``.
    With multi-label targets the softmax form has no zero.

    Args:
        use_sigmoid: may be given because mmdet's heads read it from the config; it must fit ``activation``.
    """

    sigmoid_only = False

    def __init__(
        self, *, activation: Literal["sigmoid", "softmax"] = "sigmoid", use_sigmoid: bool | None = None, **settings
    ):
        super().__init__(use_sigmoid=activation == "sigmoid", activation=activation, **settings)
        check_use_sigmoid(self, use_sigmoid)


_FOCAL = {"gamma_neg": 2.0, "gamma_pos": 2.0, "clip": 0.0, "detach_focusing": False}


def asymmetric_loss(
    pred: Tensor,
    target: Tensor,
    *,
    gamma_neg: NonNegative = 4.0,
    gamma_pos: NonNegative = 1.0,
    clip: Annotated[float, between(0, 1, "[0, 1)")] = 0.05,
    detach_focusing: bool = True,
) -> Tensor:
    """``-y (1 - p)^gamma_pos ln p - (1 - y) p_m^gamma_neg ln(1 - p_m)`` with ``p_m = max(p - clip, 0)``.

    The two powers are constants, as by the authors' default, unless ``detach_focusing`` is False. All have one shape.

    >>> asymmetric_loss(torch.zeros(2), torch.tensor([1.0, 0.0]))  # ln 2 / 2 and -0.45^4 ln 0.55
    tensor([0.3466, 0.0245])
    """
    positive, negative = _terms(*of_one_type(pred, target), gamma_pos, gamma_neg, clip, detach_focusing)
    return positive + negative


@MODELS.register_module()
class AsymmetricLoss(
    ClassificationLoss,
    fn=asymmetric_loss,
    paper=ARXIV + "2009.14119",
    row_wise=True,
    needs_mining=False,
    true_gradient=False,
    upstream=(Upstream("torchvision.ops.sigmoid_focal_loss", _FOCAL, {"alpha": -1, "gamma": 2.0}),),
):
    """Ridnik et al., Asymmetric Loss for Multi-Label Classification, 2020 (ASL).

    The authors' code returns the sum; here that is ``reduction="sum"``.
    """


def confidence_weight(q_fg: Tensor, q_bg: Tensor, power: float, *, detach: bool = True) -> Tensor:
    """``(1 - q_fg)^power q_bg``: a sample's weight from its foreground and background confidence, a constant.

    Both are in [0, 1], of one shape. It is large where only the background is sure; without ``detach``, no constant.

    >>> confidence_weight(torch.tensor([0.3]), torch.tensor([0.6]), 2.0)  # 0.7^2 * 0.6
    tensor([0.2940])
    """
    rest = 1 - float32(q_fg)
    weight = to_the(rest, power) * float32(q_bg)
    return weight.detach() if detach else weight
