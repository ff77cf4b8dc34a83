"""The focal family.

Logits and targets have one shape, which is that of the losses, where a function does not say another.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from detloss_plugins.facts import (
    ARXIV,
    MMDET,
    TORCH,
    Interval,
    NonNegative,
    NotWeighed,
    PerClass,
    Share,
    Upstream,
    alike,
    at_least,
)
from detloss_plugins.families import ClassificationLoss, RegressionLoss, check_same_shape, of_one_type
from detloss_plugins.loss import Loss
from detloss_plugins.losses.classification.common import SoftmaxOrSigmoid, bce, class_vector, is_zero, power
from detloss_plugins.precision import float32
from detloss_plugins.registry import MODELS

__all__ = [
    "FocalLoss", "GaussianFocalLoss", "GeneralizedFocalLoss", "PolyLoss", "QualityFocalLoss", "VarifocalLoss",
    "focal_loss", "gaussian_focal_loss", "generalized_focal_loss", "poly_loss", "quality_focal_loss",
    "varifocal_loss",
]  # fmt: skip


def focal_loss(
    pred: Tensor,
    target: Tensor,
    *,
    gamma: NonNegative = 2.0,
    alpha: Share | PerClass | NotWeighed = 0.25,
    use_sigmoid: bool = True,
    activated: bool = False,
) -> Tensor:
    """``alpha_t (1 - p_t)^gamma CE`` of logits, or of probabilities if ``activated``; the factor carries gradient.

    Sigmoid form: a loss per class, ``(..., C)`` as pred and target, ``alpha_t = alpha`` for positives and
    ``1 - alpha`` for negatives. Softmax form: one per row, where a scalar alpha is a mere scale. None leaves it out.

    >>> focal_loss(torch.tensor([0.8, -0.4, 3.0]), torch.tensor([1.0, 0.0, 0.0]))
    tensor([0.0089, 0.0620, 2.0747])
    """
    return _poly_focal(pred, target, gamma, alpha, use_sigmoid, activated)


def _poly_focal(pred, target, gamma, alpha, use_sigmoid, activated=False, epsilon=0.0):
    """``alpha_t (1 - p_t)^gamma (CE + epsilon (1 - p_t))``: the focal loss, and Poly-1."""
    pred = float32(pred)
    alpha = class_vector(alpha, pred)
    if use_sigmoid:
        target = target.to(pred.dtype)
        ce = bce(pred, target, activated)
        gap = None if is_zero(gamma) and is_zero(epsilon) else miss(pred, target, activated)
        return balance(alpha, target) * _focused(ce, gap, gamma, epsilon)
    ce = -(pred.clamp(min=torch.finfo(pred.dtype).tiny).log() if activated else pred.log_softmax(-1))
    if target.is_floating_point():  # distributions
        loss = target * _focused(ce, -torch.expm1(-ce), gamma, epsilon)
        return (loss if alpha is None else alpha * loss).sum(-1)
    ce = ce.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if isinstance(alpha, Tensor) and alpha.dim():
        alpha = alpha.expand(pred.shape[-1])[target]
    loss = _focused(ce, -torch.expm1(-ce), gamma, epsilon)
    return loss if alpha is None else alpha * loss


def _focused(ce, gap, gamma, epsilon):
    loss = ce if is_zero(epsilon) else ce + epsilon * gap
    return loss if is_zero(gamma) else power(gap, gamma) * loss


def miss(pred, target, activated=False):
    """``1 - p_t = y (1 - p) + (1 - y) p``, exact where it is small: ``1 - p`` is the sigmoid of the negative logit."""
    p, rest = (pred, 1 - pred) if activated else (pred.sigmoid(), (-pred).sigmoid())
    return torch.lerp(p, rest, target)


def balance(alpha, target):
    """``alpha`` for positives, ``1 - alpha`` for negatives, in between for soft targets; 1 for no ``alpha``."""
    return 1.0 if alpha is None else (2 * alpha - 1) * target + (1 - alpha)


@MODELS.register_module()
class FocalLoss(
    SoftmaxOrSigmoid,
    fn=focal_loss,
    paper=ARXIV + "1708.02002",
    row_wise=True,
    needs_mining=False,
    upstream=(
        Upstream(MMDET + "FocalLoss", theirs={"use_sigmoid": True}),
        Upstream(MMDET + "FocalLoss", {"activated": True}, {"use_sigmoid": True, "activated": True}),
        *alike("torchvision.ops.sigmoid_focal_loss"),
        Upstream("torchvision.ops.sigmoid_focal_loss", {"alpha": None, "gamma": 1.5}, {"alpha": -1, "gamma": 1.5}),
        *alike("ultralytics.utils.loss.FocalLoss", {"gamma": 1.5}),
    ),
):
    """Lin et al., Focal Loss for Dense Object Detection, 2017.

    Args:
        gamma: focusing power, 0 or at least 1 for a bounded second derivative.
        alpha: weight of the positives in [0, 1], or one a class, of any size in the softmax form; None for no balance.
        use_sigmoid: False for the softmax form.
        activated: ``pred`` holds probabilities.
    """


def quality_focal_loss(
    pred: Tensor, target: Tensor, *, beta: NonNegative = 2.0, alpha: Share | NotWeighed = None, activated: bool = False
) -> Tensor:
    """``|y - p|^beta BCE`` with a quality ``y`` in [0, 1]; the factor carries gradient.

    ``alpha`` (a number) multiplies ``alpha y + (1 - alpha)(1 - y)``, the form of YOLOv5 and not of the paper.
    ``activated`` says that ``pred`` holds probabilities.

    >>> quality_focal_loss(torch.tensor([0.8, -0.4, 1.5]), torch.tensor([0.6, 0.0, 1.0]))
    tensor([0.0056, 0.0826, 0.0067])
    """
    pred, target = of_one_type(pred, target)
    loss = bce(pred, target, activated)
    if not is_zero(beta):
        loss = power((target - (pred if activated else pred.sigmoid())).abs(), beta) * loss
    return loss if alpha is None else balance(alpha, target) * loss


@MODELS.register_module()
class QualityFocalLoss(
    ClassificationLoss,
    fn=quality_focal_loss,
    paper=ARXIV + "2006.04388",
    row_wise=True,
    needs_mining=False,
    takes_quality=True,
    sums_classes=True,
    upstream=alike(MMDET + "QualityFocalLoss", {}, {"activated": True}),
):
    """Li et al., Generalized Focal Loss, 2020 (QFL).

    The class sums over the classes: ``reduction="none"`` gives ``(...)``.
    """


def varifocal_loss(
    pred: Tensor,
    target: Tensor,
    *,
    alpha: Share = 0.75,
    gamma: NonNegative = 2.0,
    iou_weighted: bool = True,
    detach_weight: bool = False,
) -> Tensor:
    """``y BCE`` where the quality ``y > 0``, ``alpha p^gamma BCE`` where it is 0; ``iou_weighted=False`` drops the y.

    The weight ``p^gamma`` carries gradient unless ``detach_weight`` makes it a constant.

    >>> varifocal_loss(torch.tensor([0.8, -0.4, 1.5]), torch.tensor([0.6, 0.0, 1.0]))
    tensor([0.4147, 0.0620, 0.2014])
    """
    pred, target = of_one_type(pred, target)
    p = (pred.detach() if detach_weight else pred).sigmoid()
    weight = torch.where(target > 0, target if iou_weighted else 1.0, alpha * power(p, gamma))
    return weight * bce(pred, target)


@MODELS.register_module()
class VarifocalLoss(
    ClassificationLoss,
    fn=varifocal_loss,
    paper=ARXIV + "2008.13367",
    row_wise=True,
    needs_mining=False,
    takes_quality=True,
    marks_positives=True,
    upstream=(
        *alike(MMDET + "VarifocalLoss", {}, {"iou_weighted": False}),
        *alike("ultralytics.utils.loss.VarifocalLoss"),
    ),
):
    """Zhang et al., VarifocalNet, 2020 (VFL).

    A positive whose quality is 0 counts as a negative.

    Args:
        alpha, gamma: weight and focusing power of the negatives.
        iou_weighted: weigh a positive by its quality.
        detach_weight: treat the weight of the negatives as a constant, as the code of RT-DETR, DEIM and D-FINE does.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.facts = self.facts.but(true_gradient=not self.detach_weight)


def poly_loss(
    pred: Tensor,
    target: Tensor,
    *,
    epsilon: Annotated[float, at_least(-1)] = 1.0,
    gamma: NonNegative = 0.0,
    alpha: Share | PerClass | NotWeighed = None,
    use_sigmoid: bool = True,
) -> Tensor:
    """Poly-1: ``alpha_t [(1 - p_t)^gamma CE + epsilon (1 - p_t)^(gamma + 1)]``; ``alpha=None`` leaves it out.

    Shapes as in :func:`focal_loss`.

    >>> poly_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))  # ln 2 + 1/2
    tensor([[1.1931, 1.1931]])
    """
    return _poly_focal(pred, target, gamma, alpha, use_sigmoid, epsilon=epsilon)


@MODELS.register_module()
class PolyLoss(
    SoftmaxOrSigmoid,
    fn=poly_loss,
    paper=ARXIV + "2204.12511",
    row_wise=True,
    upstream=(
        Upstream(TORCH + "cross_entropy", {"epsilon": 0.0, "use_sigmoid": False}),
        Upstream("torchvision.ops.sigmoid_focal_loss", {"epsilon": 0.0, "gamma": 2.0, "alpha": 0.25}),
    ),
):
    """Leng et al., PolyLoss, 2022 (Poly-1).

    Args:
        epsilon: what is added to the first polynomial coefficient, at least -1, as less would reward a wrong
            prediction; the paper tunes it for each task.
        gamma, alpha, use_sigmoid: as in FocalLoss.
    """


def generalized_focal_loss(
    pred: Tensor, target: Tensor, *, beta: NonNegative = 2.0, values: tuple = (0.0, 1.0)
) -> Tensor:
    """``|y - m|^beta [(r - y) (-ln p_l) + (y - l) (-ln p_r)]``: a target ``y`` between two values ``l`` and ``r``.

    ``p_r = sigmoid(pred)``, ``p_l = 1 - p_r`` and ``m = l p_l + r p_r`` is the predicted value.

    >>> generalized_focal_loss(torch.tensor([0.0]), torch.tensor([3.0]), values=(1.0, 3.0))  # 1^2 * 2 ln 2
    tensor([1.3863])
    """
    left, right = values
    width = right - left
    # In units of the width, bracket and factor are a cross entropy and a quality focal factor of the share of r.
    loss = quality_focal_loss(pred, (target - left) / width, beta=beta)
    return loss if width == 1 else width ** (1 + beta) * loss


@MODELS.register_module()
class GeneralizedFocalLoss(
    ClassificationLoss,
    fn=generalized_focal_loss,
    paper=ARXIV + "2006.04388",
    row_wise=True,
    needs_mining=False,
    takes_quality=True,
    upstream=(Upstream(TORCH + "binary_cross_entropy_with_logits", {"beta": 0.0}),),
):
    """Li et al., Generalized Focal Loss, 2020 (GFL).

    ``pred`` is the logit of the right value, in any shape; the per-element losses have its shape. With the values 0 and
    1 it is the quality focal loss of every class on its own and takes every form of target; otherwise only a dense one.
    """

    def __init__(self, *, values: Interval = (0.0, 1.0), **settings):
        super().__init__(values=tuple(values), **settings)
        if self.label_smoothing and self.values != (0.0, 1.0):
            raise ValueError("label_smoothing of GeneralizedFocalLoss is for the values (0.0, 1.0).")

    def prepare(self, pred, target):
        dense = isinstance(target, Tensor) and target.shape == pred.shape
        if self.values != (0.0, 1.0) and not dense:
            raise ValueError(
                f"GeneralizedFocalLoss between the values {self.values} takes targets of the shape of pred, "
                f"{tuple(pred.shape)}; class indices and qualities have a meaning for the values (0.0, 1.0) only."
            )
        # Only between values of which one is negative can a target be, and is not ignored.
        return super().prepare(pred, target) if self.values[0] >= 0 else Loss.prepare(self, pred, target)


def gaussian_focal_loss(
    pred: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    *,
    alpha: NonNegative = 2.0,
    gamma: NonNegative = 4.0,
    pos_weight: NonNegative = 1.0,
    neg_weight: NonNegative = 1.0,
) -> Tensor:
    """``-(1 - p)^alpha ln p`` where the target is 1, else ``-(1 - t)^gamma p^alpha ln(1 - p)``, of a probability p.

    The first is times ``pos_weight``, the second ``neg_weight``. As upstream, logarithms are of what is 1e-12 larger.
    Beside the target there may be how often each cell counts as a positive: all have the second term then too.

    >>> gaussian_focal_loss(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.5]))  # ln 2 / 4, and that / 16
    tensor([0.1733, 0.0108])
    """
    target, counts = target if isinstance(target, tuple) else (target, None)
    pred, target = of_one_type(pred, target)
    if counts is not None:
        hit = counts * power(1 - pred, alpha) * (pred + 1e-12).log()
        return -pos_weight * hit - neg_weight * power(1 - target, gamma) * power(pred, alpha) * (1 - pred + 1e-12).log()
    peak = target == 1
    # What should be 1, and what should be 0. Each is exact where it is small.
    right, wrong = torch.where(peak, pred, 1 - pred), torch.where(peak, 1 - pred, pred)
    weight = torch.where(peak, pos_weight, neg_weight * power(1 - target, gamma))
    return -weight * power(wrong, alpha) * (right + 1e-12).log()


@MODELS.register_module()
class GaussianFocalLoss(
    Loss,
    fn=gaussian_focal_loss,
    family="heatmap",
    takes_pairs=True,  # made in its forward, which refuses any other
    paper=ARXIV + "1808.01244",
    row_wise=True,
    one_per_row=False,
    upstream=alike(
        MMDET + "GaussianFocalLoss", {}, {"alpha": 1.5, "gamma": 3.0}, {"pos_weight": 0.25, "neg_weight": 0.75}
    ),
):
    """Law and Deng, CornerNet, 2018.

    Call with a heatmap of probabilities and one of targets, of one shape (else a ``ValueError``), as the heads of
    CornerNet and CenterNet do; a target of exactly 1 is a positive, and less means a smaller penalty the nearer to 1 it
    is. Above 1 it counts as 0: mmdet's CenterNetUpdateHead fills the heatmap of an image without objects with the
    number of classes, its label of the background.
    """

    leading = RegressionLoss.leading

    def prepare(self, pred, target):
        if isinstance(target, tuple):
            heatmap, counts = target
            return pred, (self.prepare(pred, heatmap)[1], counts), None
        check_same_shape(pred, target, "heatmaps of one shape")
        return super().prepare(pred, torch.where(target > 1, 0, target))

    def forward(
        self, pred, target, weight=None, avg_factor=None, reduction_override=None, *, pos_inds=None, pos_labels=None
    ):
        """The loss; ``pos_inds`` and ``pos_labels`` are the rows and columns of the positives, if they are not those
        whose target is 1 (CenterNetUpdateHead)."""
        if isinstance(target, (tuple, list)):
            raise ValueError("GaussianFocalLoss takes a heatmap of the shape of pred as its target, not a tuple.")
        if pos_inds is not None:
            one = pred.new_ones((), dtype=torch.float32)
            counts = torch.zeros_like(pred, dtype=torch.float32).index_put((pos_inds, pos_labels), one, accumulate=True)
            target = target, counts
        return super().forward(pred, target, weight, avg_factor, reduction_override)
