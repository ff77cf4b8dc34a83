"""Point-wise regression losses: of each number and its target alone.

Every function takes two tensors of one shape, in any one unit, and returns losses of that shape.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detloss_plugins.facts import ARXIV, MMDET, TORCH, NonNegative, Positive, Upstream, alike
from detloss_plugins.families import RegressionLoss, of_one_type
from detloss_plugins.geometry import root
from detloss_plugins.precision import float32, without_autocast
from detloss_plugins.reduction import reduce
from detloss_plugins.registry import MODELS

__all__ = [
    "BalancedL1Loss", "HuberLoss", "L1Loss", "MSELoss", "RMSELoss", "SmoothL1Loss", "UncertaintyKLLoss",
    "balanced_l1_loss", "huber_loss", "l1_loss", "mse_loss", "rmse_loss", "smooth_l1_loss", "uncertainty_kl_loss",
]  # fmt: skip


def l1_loss(pred: Tensor, target: Tensor) -> Tensor:
    """``|pred - target|``; the gradient at zero is zero.

    >>> l1_loss(torch.tensor([2.5, 0.0]), torch.tensor([3.0, -0.5]))
    tensor([0.5000, 0.5000])
    """
    return torch.sub(*of_one_type(pred, target)).abs()


@MODELS.register_module()
class L1Loss(
    RegressionLoss,
    fn=l1_loss,
    row_wise=True,
    keeps_little=True,
    upstream=(*alike(TORCH + "l1_loss"), *alike(MMDET + "L1Loss")),
):
    """Absolute error; its mean is the MAE."""


def mse_loss(pred: Tensor, target: Tensor, *, use_sigmoid: bool = False) -> Tensor:
    """``(pred - target)^2``, or ``(sigmoid(pred) - target)^2``.

    >>> mse_loss(torch.tensor([2.5, 0.0]), torch.tensor([3.0, 2.0]))
    tensor([0.2500, 4.0000])
    """
    pred, target = of_one_type(pred, target)
    return F.mse_loss(pred.sigmoid() if use_sigmoid else pred, target, reduction="none")


@MODELS.register_module()
class MSELoss(
    RegressionLoss,
    fn=mse_loss,
    row_wise=True,
    keeps_little=True,
    upstream=(*alike(TORCH + "mse_loss"), *alike(MMDET + "MSELoss")),
):
    """Squared error; its sum is the "L2 loss" of the textbooks.

    mmdet's L2Loss is another loss, which clamps and edits its inputs.

    Args:
        use_sigmoid: ``pred`` is a logit and the error that of its sigmoid, to regress a confidence.
    """


def rmse_loss(pred: Tensor, target: Tensor) -> Tensor:
    """The root of one squared error, ``|pred - target|``; the class takes the root after the reduction.

    >>> rmse_loss(torch.tensor([2.5, 0.0]), torch.tensor([3.0, 2.0]))
    tensor([0.5000, 2.0000])
    """
    return l1_loss(pred, target)


@MODELS.register_module()
class RMSELoss(RegressionLoss, fn=rmse_loss, row_wise=True, keeps_little=True, root=True):
    """Root of the mean squared error.

    Every reduction is the root of the one of :class:`MSELoss`: "mean" is ``sqrt(sum(w d^2) / n)``, or over the
    ``avg_factor``; "sum" is the Euclidean norm, "none" ``sqrt(w) |d|``. Weights are therefore those of squared errors,
    and the mean of the values of several calls is not the value of all. The gradient of no error is zero.
    """

    def weigh(self, loss, valid, weight):
        return super().weigh(loss.square(), valid, weight)

    def reduced(self, pred, target, weight, avg_factor, reduction, factor):
        return factor * root(super().reduced(pred, target, weight, avg_factor, reduction, 1.0))


def smooth_l1_loss(pred: Tensor, target: Tensor, *, beta: NonNegative = 1.0) -> Tensor:
    """``d^2 / (2 beta)`` where ``|d| < beta``, else ``|d| - beta / 2``, with ``d = pred - target``; ``beta=0`` is L1.

    >>> smooth_l1_loss(torch.tensor([0.3, -1.4]), torch.zeros(2), beta=0.5)  # .09 / 1 and 1.4 - .25
    tensor([0.0900, 1.1500])
    """
    return F.smooth_l1_loss(*of_one_type(pred, target), reduction="none", beta=beta)


@MODELS.register_module()
class SmoothL1Loss(
    RegressionLoss,
    fn=smooth_l1_loss,
    paper=ARXIV + "1504.08083",
    row_wise=True,
    keeps_little=True,
    upstream=(
        *alike(TORCH + "smooth_l1_loss", {"beta": 1.0}, {"beta": 1 / 9}),
        *alike(MMDET + "SmoothL1Loss", {"beta": 1.0}, {"beta": 1 / 9}),
    ),
):
    """Girshick, Fast R-CNN, 2015.

    ``beta`` has the unit of the input; Detectron's sigma is ``beta = 1 / sigma^2``.
    """


def huber_loss(pred: Tensor, target: Tensor, *, delta: Positive = 1.0) -> Tensor:
    """``d^2 / 2`` where ``|d| <= delta``, else ``delta (|d| - delta / 2)``, with ``d = pred - target``.

    >>> huber_loss(torch.tensor([0.3, -1.4]), torch.zeros(2), delta=0.5)  # .09 / 2 and .5 (1.4 - .25)
    tensor([0.0450, 0.5750])
    """
    return F.huber_loss(*of_one_type(pred, target), reduction="none", delta=delta)


@MODELS.register_module()
class HuberLoss(
    RegressionLoss,
    fn=huber_loss,
    row_wise=True,
    keeps_little=True,
    upstream=(
        *alike(TORCH + "huber_loss", {}, {"delta": 0.5}),
        Upstream(MMDET + "SmoothL1Loss", {"delta": 0.5}, {"beta": 0.5, "loss_weight": 0.5}),
    ),
):
    """Huber, Robust Estimation of a Location Parameter, 1964.

    It is ``delta`` times the smooth L1 loss with ``beta = delta``.
    """


def balanced_l1_loss(
    pred: Tensor,
    target: Tensor,
    *,
    alpha: Positive = 0.5,
    gamma: Positive = 1.5,
    beta: Positive = 1.0,
    upstream_form: bool = False,
) -> Tensor:
    """L1 whose slope is ``alpha ln(b d / beta + 1)`` up to ``d = |pred - target| = beta`` and ``gamma`` beyond.

    ``b = e^(gamma / alpha) - 1`` joins the two. The value is ``alpha / b (b d + beta) ln(b d / beta + 1) - alpha d``
    inside and ``gamma d + gamma beta / b - alpha beta`` outside. Upstream's form has ``b d + 1`` and ``gamma / b``
    instead: the same for ``beta=1``; otherwise it has a kink at zero, and for ``beta > 1`` it is negative near zero.

    >>> balanced_l1_loss(torch.tensor([2.0]), torch.tensor([0.0]))  # b = e^3 - 1: 3 + 1.5 / b - .5
    tensor([2.5786])
    """
    d = l1_loss(pred, target)
    b = math.e ** (gamma / alpha) - 1
    near = d.clamp(max=beta)
    inside = alpha / b * (b * near + (1.0 if upstream_form else beta)) * torch.log1p(b * near / beta) - alpha * near
    return inside + gamma * (d - near)  # what is outside begins where the inside ends


_KINK = "mmdet's form for beta != 1 has a kink at zero; upstream_form=True gives it"


@MODELS.register_module()
class BalancedL1Loss(
    RegressionLoss,
    fn=balanced_l1_loss,
    paper=ARXIV + "1904.02701",
    row_wise=True,
    upstream=(
        *alike(MMDET + "BalancedL1Loss"),
        Upstream(MMDET + "BalancedL1Loss", {"upstream_form": True, "beta": 0.11}, {"beta": 0.11}),
        *alike(MMDET + "BalancedL1Loss", {"beta": 0.11}, differs=_KINK),
    ),
):
    """Pang et al., Libra R-CNN, 2019.

    Args:
        alpha: smaller means more gradient for accurate samples.
        gamma: slope of the outliers, at most ``80 alpha``, as float32 has no room for ``e`` to a larger power.
        beta: where they begin, in the unit of the input.
        upstream_form: the released code's formula, which for ``beta != 1`` has not the slope that the paper asks for.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.gamma > 80 * self.alpha:
            raise ValueError(f"gamma of BalancedL1Loss must be at most 80 alpha, {80 * self.alpha}, not {self.gamma}.")


def uncertainty_kl_loss(
    pred: Tensor, target: Tensor, *, clamp: Positive = 10.0, log_variance: Tensor | None = None
) -> Tensor:
    """``e^-a SmoothL1(pred - target) + a / 2`` with ``a`` the logarithm of the variance of ``pred``.

    ``a`` outside ``[-clamp, clamp]`` counts as the nearer end, and gets the gradient of that end, so that it does not
    stay where the clamp alone would leave it without one. ``log_variance`` has the shape of ``pred``; None is 0.

    >>> d, a = torch.tensor([0.3, -1.4, 0.05, 2.0]), torch.tensor([0.0, 0.5, -1.0, -0.2])
    >>> uncertainty_kl_loss(d, torch.zeros(4), log_variance=a)
    tensor([ 0.0450,  0.7959, -0.4966,  1.7321])
    """
    error = smooth_l1_loss(pred, target)
    if log_variance is None:
        return error
    log_variance = float32(log_variance)
    constant = log_variance.detach()
    slope = (log_variance - constant).nan_to_num(0.0)  # 0 with a gradient, also of what half precision has as infinite
    log_variance = constant.clamp(-clamp, clamp) + slope
    return torch.exp(-log_variance) * error + log_variance / 2


@MODELS.register_module()
class UncertaintyKLLoss(
    RegressionLoss,
    fn=uncertainty_kl_loss,
    family="uncertainty",  # of its own: what takes a regression loss has no log variance to give
    paper=ARXIV + "1809.08545",
    row_wise=True,
    bounds=(-math.inf, math.inf),
    filled=("log_variance",),
):
    """He et al., Bounding Box Regression with Uncertainty for Accurate Object Detection, 2018 (KL loss).

    Called ``loss(pred, target, log_variance, weight=None, avg_factor=None, reduction_override=None)``: the model
    predicts the logarithm of a variance beside each number. Large where errors are large, it makes the loss flat there;
    the loss can be negative. With variances ``compile=True`` has no effect. It needs a head that predicts them:
    ``UncertaintyBBoxHead`` and ``UncertaintyRetinaHead`` of the MMDetection adapter do. A ``ValueError`` for a
    ``log_variance`` without a gradient while ``pred`` has one: other heads pass their weights there.
    """

    def forward(self, pred, target, log_variance=None, weight=None, avg_factor=None, reduction_override=None):
        """Compute the loss; without ``log_variance``, the smooth L1 loss."""
        if log_variance is None:
            return super().forward(pred, target, weight, avg_factor, reduction_override)
        if log_variance.shape != pred.shape or (pred.requires_grad and not log_variance.requires_grad):
            raise ValueError(
                f"The third argument of {type(self).__name__} is the predicted log variance, in the shape of pred "
                f"{tuple(pred.shape)} and with a gradient, not weights {tuple(log_variance.shape)}; in MMDetection use "
                "UncertaintyBBoxHead or UncertaintyRetinaHead, which predict it."
            )
        weight = self.tensor_or_none(weight)
        reduction = self.reduction if reduction_override is None else reduction_override
        self.look(pred, target)
        with without_autocast(pred.device):
            pred, target, _ = self.prepare(float32(pred), target)
            loss = self.elements(pred, target, {"log_variance": log_variance})
        return self.loss_weight * reduce(loss, weight, avg_factor, reduction)
