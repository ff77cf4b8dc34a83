"""Point-wise regression losses."""

import math

import torch
import torch.nn.functional as F

from detloss_plugins.base import Upstream, above, at_least, rules
from detloss_plugins.execution import Analytic, float32, pointwise, without_autocast
from detloss_plugins.families import RegressionLoss
from detloss_plugins.reduction import reduce
from detloss_plugins.registry import MODELS


def l1_loss(pred, target, *, reduction="none"):
    """``|pred - target|``; the gradient at zero is zero.

    >>> l1_loss(torch.tensor([2.5, 0.0]), torch.tensor([3.0, -0.5]))
    tensor([0.5000, 0.5000])
    """
    return F.l1_loss(pred, target, reduction=reduction)


@MODELS.register_module()
class L1Loss(RegressionLoss):
    """Absolute error; its mean is the MAE."""

    fn = staticmethod(l1_loss)
    inputs = ("reduction",)
    upstream = (Upstream("torch.nn.functional.l1_loss"), Upstream("mmdet.models.losses.L1Loss"))


def mse_loss(pred, target, *, use_sigmoid=False, reduction="none"):
    """``(pred - target)^2``, or ``(sigmoid(pred) - target)^2``.

    >>> mse_loss(torch.tensor([2.5, 0.0]), torch.tensor([3.0, 2.0]))
    tensor([0.2500, 4.0000])
    """
    return F.mse_loss(pred.sigmoid() if use_sigmoid else pred, target, reduction=reduction)


@MODELS.register_module()
class MSELoss(RegressionLoss):
    """Squared error; its sum is the "L2 loss" of the textbooks.

    mmdet's L2Loss is another loss, which clamps and edits its inputs.

    Args:
        use_sigmoid: ``pred`` is a logit and the error that of its sigmoid, to regress a confidence.
    """

    fn = staticmethod(mse_loss)
    inputs = ("reduction",)
    upstream = (Upstream("torch.nn.functional.mse_loss"), Upstream("mmdet.models.losses.MSELoss"))


def rmse_loss(pred, target):
    """The root of one squared error, ``|pred - target|``; the class takes the root after the reduction.

    >>> rmse_loss(torch.tensor([2.5, 0.0]), torch.tensor([3.0, 2.0]))
    tensor([0.5000, 2.0000])
    """
    return F.l1_loss(pred, target, reduction="none")


@MODELS.register_module()
class RMSELoss(RegressionLoss):
    """Root of the mean squared error.

    Every reduction is the root of the one of :class:`MSELoss`: "mean" is ``sqrt(sum(w d^2) / n)``, or over the
    ``avg_factor``; "sum" is the Euclidean norm, "none" ``sqrt(w) |d|``. Weights are therefore those of squared errors,
    and the mean of the values of several calls is not the value of all. The gradient of no error is zero.
    """

    fn = staticmethod(rmse_loss)

    def total(self, pred, target, weight, avg_factor, reduction):
        """The root of the reduced squared errors."""
        size, valid = self.elements(pred, target, weight)
        square = reduce(self.weigh(size.square(), weight, valid), None, avg_factor, reduction)
        # The root's slope at zero is infinite; the square itself has the right value and slope there.
        return self.loss_weight * torch.where(square == 0, square, torch.where(square == 0, 1, square).sqrt())


def smooth_l1_loss(pred, target, *, beta=1.0, reduction="none"):
    """``d^2 / (2 beta)`` where ``|d| < beta``, else ``|d| - beta / 2``, with ``d = pred - target``; ``beta=0`` is L1.

    >>> smooth_l1_loss(torch.tensor([0.3, -1.4]), torch.zeros(2), beta=0.5)  # .09 / 1 and 1.4 - .25
    tensor([0.0900, 1.1500])
    """
    return F.smooth_l1_loss(pred, target, reduction=reduction, beta=beta)


@MODELS.register_module()
class SmoothL1Loss(RegressionLoss):
    """Girshick, Fast R-CNN, 2015.

    ``beta`` has the unit of the input; Detectron's sigma is ``beta = 1 / sigma^2``.

    Raises:
        ValueError: if ``beta`` is negative.
    """

    fn = staticmethod(smooth_l1_loss)
    inputs = ("reduction",)
    paper = "https://arxiv.org/abs/1504.08083"
    allowed = rules(beta=at_least(0))
    upstream = tuple(
        Upstream(path, {"beta": beta}, {"beta": beta})
        for path in ("torch.nn.functional.smooth_l1_loss", "mmdet.models.losses.SmoothL1Loss")
        for beta in (1.0, 1 / 9)
    )


def huber_loss(pred, target, *, delta=1.0, reduction="none"):
    """``d^2 / 2`` where ``|d| <= delta``, else ``delta (|d| - delta / 2)``, with ``d = pred - target``.

    >>> huber_loss(torch.tensor([0.3, -1.4]), torch.zeros(2), delta=0.5)  # .09 / 2 and .5 (1.4 - .25)
    tensor([0.0450, 0.5750])
    """
    return F.huber_loss(pred, target, reduction=reduction, delta=delta)


@MODELS.register_module()
class HuberLoss(RegressionLoss):
    """Huber, Robust Estimation of a Location Parameter, 1964.

    It is ``delta`` times the smooth L1 loss with ``beta = delta``.

    Raises:
        ValueError: if ``delta`` is not positive.
    """

    fn = staticmethod(huber_loss)
    inputs = ("reduction",)
    allowed = rules(delta=above(0))
    upstream = (
        Upstream("torch.nn.functional.huber_loss"),
        Upstream("torch.nn.functional.huber_loss", {"delta": 0.5}, {"delta": 0.5}),
        Upstream("mmdet.models.losses.SmoothL1Loss", {"delta": 0.5}, {"beta": 0.5, "loss_weight": 0.5}),
    )


def balanced_l1_loss(pred, target, *, alpha=0.5, gamma=1.5, beta=1.0, upstream_form=False):
    """L1 whose slope is ``alpha ln(b d / beta + 1)`` up to ``d = |pred - target| = beta`` and ``gamma`` beyond.

    ``b = e^(gamma / alpha) - 1`` joins the two. The value is ``alpha / b (b d + beta) ln(b d / beta + 1) - alpha d``
    inside and ``gamma d + gamma beta / b - alpha beta`` outside. Upstream's form has ``b d + 1`` and ``gamma / b``
    instead: the same for ``beta=1``; otherwise it has a kink at zero, and for ``beta > 1`` it is negative near zero.

    >>> balanced_l1_loss(torch.tensor([2.0]), torch.tensor([0.0]))  # b = e^3 - 1: 3 + 1.5 / b - .5
    tensor([2.5786])
    """
    return pointwise(_BalancedL1, pred - target, alpha, gamma, beta, upstream_form)


class _BalancedL1(Analytic):
    """See :func:`balanced_l1_loss`; of the difference."""

    @staticmethod
    def plain(difference, alpha, gamma, beta, upstream_form):
        size = difference.abs()
        near = size.clamp(max=beta)
        return _BalancedL1._inside(near, alpha, gamma, beta, upstream_form)[0] + gamma * (size - near)

    @staticmethod
    def _inside(near, alpha, gamma, beta, upstream_form):
        """The value up to ``beta``, and its logarithm."""
        b = math.expm1(gamma / alpha)
        log = torch.log1p(b / beta * near)
        return (alpha * near + alpha / b * (1.0 if upstream_form else beta)) * log - alpha * near, log

    @staticmethod
    def value(ctx, difference, alpha, gamma, beta, upstream_form):
        size = difference.abs()
        near = size.clamp(max=beta)
        value, log = _BalancedL1._inside(near, alpha, gamma, beta, upstream_form)
        slope = log.mul_(alpha)  # which is gamma from beta on
        if upstream_form and beta != 1:
            b = math.expm1(gamma / alpha)
            slope = slope.add_((size < beta) * (alpha * (1 - beta) / (beta + b * near)))
        ctx.slope = slope.mul_(difference.sign())
        return value.add_(size.sub_(near), alpha=gamma)

    @staticmethod
    def gradients(ctx, outer):
        return [ctx.slope * outer]


@MODELS.register_module()
class BalancedL1Loss(RegressionLoss):
    """Pang et al., Libra R-CNN, 2019.

    Args:
        alpha: smaller means more gradient for accurate samples.
        gamma: slope of the outliers.
        beta: where they begin, in the unit of the input.
        upstream_form: the released code's formula, which for ``beta != 1`` has not the slope that the paper asks for.

    Raises:
        ValueError: if ``alpha``, ``gamma`` or ``beta`` is not positive.
    """

    fn = staticmethod(balanced_l1_loss)
    paper = "https://arxiv.org/abs/1904.02701"
    allowed = rules(alpha=above(0), gamma=above(0), beta=above(0))
    upstream = (
        Upstream("mmdet.models.losses.BalancedL1Loss"),
        Upstream("mmdet.models.losses.BalancedL1Loss", {"upstream_form": True, "beta": 0.11}, {"beta": 0.11}),
        Upstream(
            "mmdet.models.losses.BalancedL1Loss",
            {"beta": 0.11},
            {"beta": 0.11},
            differs="mmdet's form for beta != 1 has a kink at zero; upstream_form=True gives it",
        ),
    )


def uncertainty_kl_loss(pred, target, *, clamp=10.0, log_variance=None):
    """``e^-a SmoothL1(pred - target) + a / 2`` with ``a`` the logarithm of the variance of ``pred``.

    ``a`` outside ``[-clamp, clamp]`` counts as the nearer end, and gets the gradient of that end, so that it does not
    stay where the clamp alone would leave it without one.

    Args:
        log_variance: same shape as ``pred``; None: 0, the smooth L1 loss.

    >>> d, a = torch.tensor([0.3, -1.4, 0.05, 2.0]), torch.tensor([0.0, 0.5, -1.0, -0.2])
    >>> uncertainty_kl_loss(d, torch.zeros(4), log_variance=a)
    tensor([ 0.0450,  0.7959, -0.4966,  1.7321])
    """
    error = F.smooth_l1_loss(pred, target, reduction="none")
    if log_variance is None:
        return error
    constant = log_variance.detach()
    log_variance = constant.clamp(-clamp, clamp) + (log_variance - constant)
    return torch.exp(-log_variance) * error + log_variance / 2


@MODELS.register_module()
class UncertaintyKLLoss(RegressionLoss):
    """He et al., Bounding Box Regression with Uncertainty for Accurate Object Detection, 2018 (KL loss).

    Called ``loss(pred, target, log_variance, weight=None, avg_factor=None, reduction_override=None)``: the model
    predicts the logarithm of a variance beside each number. Large where errors are large, it makes the loss flat there;
    the loss can be negative. It needs a head that predicts it: ``UncertaintyBBoxHead`` and ``UncertaintyRetinaHead`` of
    the MMDetection adapter do.

    Args:
        clamp: the log variance is that far from 0 at most; one outside gets the gradient of the nearer end.

    Raises:
        ValueError: if ``clamp`` is not positive, the shapes differ, or ``log_variance`` has no gradient while ``pred``
            has one: a head that knows nothing of variances passes its weights there.
    """

    fn = staticmethod(uncertainty_kl_loss)
    family = "uncertainty"  # of its own: what takes a regression loss has no log variance to give
    paper = "https://arxiv.org/abs/1809.08545"
    bounds = (-math.inf, math.inf)
    inputs = ("log_variance",)
    allowed = rules(clamp=above(0))

    def forward(self, pred, target, log_variance=None, weight=None, avg_factor=None, reduction_override=None):
        """Compute the loss; without ``log_variance``, the smooth L1 loss."""
        return self._run(pred, target, weight, avg_factor, reduction_override, log_variance=log_variance)

    def total(self, pred, target, weight, avg_factor, reduction, log_variance=None):
        if log_variance is None:
            return super().total(pred, target, weight, avg_factor, reduction)
        self._check_predicted(pred, log_variance)
        with without_autocast(pred.device):
            pred, target, _ = self.prepare(float32(pred), target)
            loss = self.fn(pred, target, **self.settings, log_variance=float32(log_variance))
        return self.loss_weight * reduce(loss, weight, avg_factor, reduction)

    def _check_predicted(self, pred, log_variance):
        if log_variance.shape != pred.shape or (pred.requires_grad and not log_variance.requires_grad):
            raise ValueError(
                f"The third argument of {type(self).__name__} is the predicted log variance, in the shape of pred "
                f"{tuple(pred.shape)} and with a gradient, not weights {tuple(log_variance.shape)}; in MMDetection use "
                "UncertaintyBBoxHead or UncertaintyRetinaHead, which predict it."
            )


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
