"""The focal family."""

import torch

from detloss_plugins.base import Loss, Upstream, at_least, rules
from detloss_plugins.families import RegressionLoss, check_same_shape, negatives
from detloss_plugins.losses.classification.common import (
    QualityLoss,
    SoftmaxOrSigmoid,
    balance,
    class_vector,
    focused_ce,
    index_target,
    power,
    softmax_ce,
)
from detloss_plugins.registry import MODELS


def focal_loss(pred, target, *, gamma=2.0, alpha=0.25, use_sigmoid=True, activated=False):
    """``alpha_t (1 - p_t)^gamma CE``; the factor carries gradient.

    Sigmoid form: a loss per class, ``alpha_t = alpha`` for positives and ``1 - alpha`` for negatives. Softmax form: one
    per row, where a scalar alpha is a mere scale and a per-class one balances. ``alpha=None`` leaves it out.

    >>> focal_loss(torch.tensor([0.8, -0.4, 3.0]), torch.tensor([1.0, 0.0, 0.0]))
    tensor([0.0089, 0.0620, 2.0747])
    """
    form = _sigmoid_focal_loss if use_sigmoid else _softmax_focal_loss
    return form(pred, target, gamma, class_vector(alpha, pred), activated)


def _sigmoid_focal_loss(pred, target, gamma, alpha, activated=False, epsilon=0.0):
    """``alpha_t (1 - p_t)^gamma (CE + epsilon (1 - p_t))`` of each class."""
    return focused_ce(pred, target, "hard", gamma, balance(alpha, target), epsilon, activated)


def _softmax_focal_loss(pred, target, gamma, alpha, activated=False, epsilon=0.0):
    """The same of each row; a distribution sums over its classes."""
    if not activated and index_target(target):
        ce = softmax_ce(pred.flatten(0, -2), target.flatten()).unflatten(0, target.shape)
    else:
        ce = -(pred.clamp(min=torch.finfo(pred.dtype).tiny).log() if activated else pred.log_softmax(-1))
        if index_target(target):
            ce = ce.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    loss = ce
    if gamma or epsilon:
        miss = -torch.expm1(-ce)
        loss = power(miss, gamma) * (ce + epsilon * miss)
    if not index_target(target):
        loss = target * loss
        return (loss if alpha is None else alpha * loss).sum(-1)
    if isinstance(alpha, torch.Tensor) and alpha.dim():
        alpha = alpha.expand(pred.shape[-1])[target]
    return loss if alpha is None else alpha * loss


@MODELS.register_module()
class FocalLoss(SoftmaxOrSigmoid):
    """Lin et al., Focal Loss for Dense Object Detection, 2017.

    Args:
        gamma: focusing power, 0 or at least 1 for a bounded second derivative.
        alpha: weight of the positives, a number or one a class; None for no balance.
        use_sigmoid: False for the softmax form.
        activated: ``pred`` holds probabilities.

    In Ultralytics' ``cls`` slot the default ``loss_weight`` is 16, measured as the README tells.
    """

    fn = staticmethod(focal_loss)
    apart_without = ("activated",)
    paper = "https://arxiv.org/abs/1708.02002"
    yolo_gain = 16.0
    needs_mining = False
    upstream = (
        Upstream("mmdet.models.losses.FocalLoss", theirs={"use_sigmoid": True}),
        Upstream("mmdet.models.losses.FocalLoss", {"activated": True}, {"use_sigmoid": True, "activated": True}),
        Upstream("torchvision.ops.sigmoid_focal_loss"),
        Upstream("torchvision.ops.sigmoid_focal_loss", {"alpha": None, "gamma": 1.5}, {"alpha": -1, "gamma": 1.5}),
        Upstream("ultralytics.utils.loss.FocalLoss", {"gamma": 1.5}, {"gamma": 1.5}),
    )

    def __init__(self, *, use_sigmoid=True, **kwargs):
        super().__init__(use_sigmoid=use_sigmoid, **kwargs)


def quality_focal_loss(pred, target, *, beta=2.0, alpha=None, activated=False):
    """``|y - p|^beta BCE`` with a quality ``y`` in [0, 1]; the factor carries gradient.

    ``alpha`` (a number) multiplies ``alpha y + (1 - alpha)(1 - y)``, the form of YOLOv5 and not of the paper.

    >>> quality_focal_loss(torch.tensor([0.8, -0.4, 1.5]), torch.tensor([0.6, 0.0, 1.0]))
    tensor([0.0056, 0.0826, 0.0067])
    """
    return focused_ce(pred, target, "soft", beta, balance(alpha, target), activated=activated)


@MODELS.register_module()
class QualityFocalLoss(QualityLoss):
    """Li et al., Generalized Focal Loss, 2020 (QFL).

    The class sums over the classes: ``reduction="none"`` gives ``(...)``. In Ultralytics' ``cls`` slot the default
    ``loss_weight`` is 16, measured as the README tells.
    """

    fn = staticmethod(quality_focal_loss)
    apart_without = ("activated",)
    paper = "https://arxiv.org/abs/2006.04388"
    yolo_gain = 16.0
    sums_classes = True
    upstream = (
        Upstream("mmdet.models.losses.QualityFocalLoss"),
        Upstream("mmdet.models.losses.QualityFocalLoss", {"activated": True}, {"activated": True}),
    )


def varifocal_loss(pred, target, *, alpha=0.75, gamma=2.0, iou_weighted=True):
    """``y BCE`` where the quality ``y > 0``, ``alpha p^gamma BCE`` where it is 0; ``iou_weighted=False`` drops the y.

    >>> varifocal_loss(torch.tensor([0.8, -0.4, 1.5]), torch.tensor([0.6, 0.0, 1.0]))
    tensor([0.4147, 0.0620, 0.2014])
    """
    weight = alpha
    if not negatives(target):
        weight = torch.where(target > 0, target if iou_weighted else 1.0, alpha)
    return focused_ce(pred, target, "negative", gamma, weight)


@MODELS.register_module()
class VarifocalLoss(QualityLoss):
    """Zhang et al., VarifocalNet, 2020 (VFL).

    A positive whose quality is 0 counts as a negative. In Ultralytics' ``cls`` slot the default ``loss_weight`` is 16,
    measured as the README tells.
    """

    fn = staticmethod(varifocal_loss)
    apart_without = ()
    paper = "https://arxiv.org/abs/2008.13367"
    yolo_gain = 16.0
    upstream = (
        Upstream("mmdet.models.losses.VarifocalLoss"),
        Upstream("mmdet.models.losses.VarifocalLoss", {"iou_weighted": False}, {"iou_weighted": False}),
        Upstream("ultralytics.utils.loss.VarifocalLoss"),
    )


def poly_loss(pred, target, *, epsilon=1.0, gamma=0.0, alpha=None, use_sigmoid=True):
    """Poly-1: ``alpha_t [(1 - p_t)^gamma CE + epsilon (1 - p_t)^(gamma + 1)]``; ``alpha=None`` leaves it out.

    >>> poly_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))  # ln 2 + 1/2
    tensor([[1.1931, 1.1931]])
    """
    form = _sigmoid_focal_loss if use_sigmoid else _softmax_focal_loss
    return form(pred, target, gamma, class_vector(alpha, pred), epsilon=epsilon)


@MODELS.register_module()
class PolyLoss(SoftmaxOrSigmoid):
    """Leng et al., PolyLoss, 2022 (Poly-1).

    Args:
        epsilon: what is added to the first polynomial coefficient, at least -1; the paper tunes it for each task.
        gamma: power of the focal loss; 0 is cross entropy.
        alpha: as in FocalLoss; it weighs both terms.
        use_sigmoid: False for the softmax form.

    Raises:
        ValueError: if ``epsilon`` is below -1, which would reward a wrong prediction.
    """

    fn = staticmethod(poly_loss)
    apart_without = ()
    paper = "https://arxiv.org/abs/2204.12511"
    allowed = rules(epsilon=at_least(-1))
    upstream = (
        Upstream("torch.nn.functional.cross_entropy", {"epsilon": 0.0, "use_sigmoid": False}),
        Upstream("torchvision.ops.sigmoid_focal_loss", {"epsilon": 0.0, "gamma": 2.0, "alpha": 0.25}),
    )

    def __init__(self, *, use_sigmoid=True, **kwargs):
        super().__init__(use_sigmoid=use_sigmoid, **kwargs)


def generalized_focal_loss(pred, target, *, beta=2.0, values=(0.0, 1.0)):
    """``|y - m|^beta [(r - y) (-ln p_l) + (y - l) (-ln p_r)]``: a target ``y`` between two values ``l`` and ``r``.

    ``p_r = sigmoid(pred)``, ``p_l = 1 - p_r`` and ``m = l p_l + r p_r`` is the predicted value.

    >>> generalized_focal_loss(torch.tensor([0.0]), torch.tensor([3.0]), values=(1.0, 3.0))  # 1^2 * 2 ln 2
    tensor([1.3863])
    """
    left, right = values
    if tuple(values) == (0.0, 1.0):
        return focused_ce(pred, target, "soft", beta)
    width = right - left
    share = (target - left) / width  # the best p_r
    # Bracket and factor in units of the width: a cross entropy and a quality focal factor.
    return width ** (1 + beta) * focused_ce(pred, share, "soft", beta)


@MODELS.register_module()
class GeneralizedFocalLoss(QualityLoss):
    """Li et al., Generalized Focal Loss, 2020 (GFL).

    ``pred`` is the logit of the right value, in any shape; the per-element losses have its shape. With the values 0 and
    1 it is the quality focal loss of every class on its own and takes every form of target; otherwise only a dense one.

    Args:
        beta: focusing power.
        values: the two values that the target lies between.

    Raises:
        ValueError: if ``values`` are not two increasing numbers.
    """

    fn = staticmethod(generalized_focal_loss)
    yolo_gain = 16.0  # the quality focal loss's, which it equals there
    paper = "https://arxiv.org/abs/2006.04388"
    upstream = (Upstream("torch.nn.functional.binary_cross_entropy_with_logits", {"beta": 0.0}),)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.values = tuple(self.values)
        if len(self.values) != 2 or not self.values[0] < self.values[1]:
            raise ValueError(f"values of GeneralizedFocalLoss must be two increasing numbers, not {self.values}.")

    def prepare(self, pred, target):
        dense = isinstance(target, torch.Tensor) and target.shape == pred.shape
        if self.values != (0.0, 1.0) and not dense:
            raise ValueError(
                f"GeneralizedFocalLoss between the values {self.values} takes targets of the shape of pred, "
                f"{tuple(pred.shape)}; class indices and qualities have a meaning for the values (0.0, 1.0) only."
            )
        return super().prepare(pred, target)


def gaussian_focal_loss(pred, target, *, alpha=2.0, gamma=4.0):
    """``-(1 - p)^alpha ln p`` where the target is 1, else ``-(1 - t)^gamma p^alpha ln(1 - p)``, of a probability p.

    1e-12 is added to the arguments of the logarithms, as upstream does.

    >>> gaussian_focal_loss(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.5]))  # ln 2 / 4, and that / 16
    tensor([0.1733, 0.0108])
    """
    # With t = 1 at a peak and 0 elsewhere: what should be 1, and what should be 0. Each is exact where it is small.
    peak = (target == 1).to(pred.dtype)
    rest = 1 - pred
    right, wrong = torch.lerp(rest, pred, peak), torch.lerp(pred, rest, peak)
    return power(1 - target + peak, gamma).neg() * power(wrong, alpha) * (right + 1e-12).log()


@MODELS.register_module()
class GaussianFocalLoss(Loss):
    """Law and Deng, CornerNet, 2018.

    Call with a heatmap of probabilities and one of targets, both of one shape, as the heads of CornerNet and CenterNet
    do; a target of exactly 1 is a positive, and less means a smaller penalty the nearer to 1 it is.

    Raises:
        ValueError: if the shapes differ.
    """

    fn = staticmethod(gaussian_focal_loss)
    family = "heatmap"
    leading = RegressionLoss.leading
    paper = "https://arxiv.org/abs/1808.01244"
    upstream = (
        Upstream("mmdet.models.losses.GaussianFocalLoss"),
        Upstream("mmdet.models.losses.GaussianFocalLoss", {"alpha": 1.5, "gamma": 3.0}, {"alpha": 1.5, "gamma": 3.0}),
    )

    def prepare(self, pred, target):
        if not isinstance(target, torch.Tensor):
            raise ValueError("GaussianFocalLoss takes a heatmap of the shape of pred as its target, not a tuple.")
        check_same_shape(pred, target, "heatmaps of one shape")
        return super().prepare(pred, target)

    @classmethod
    def sample(cls, n=64, seed=0, dtype=torch.float32):
        """Heatmaps ``(n, 16)`` of one bell each, with its peak of 1 in every second row, and probabilities."""
        generator = torch.Generator().manual_seed(seed)
        pred = 2 * torch.randn(n, 16, generator=generator, dtype=torch.float64)
        center = 15 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
        center[::2] = center[::2].round()
        target = (-(torch.arange(16) - center).square() / 8).exp()
        return pred.sigmoid().to(dtype), target.to(dtype)


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
