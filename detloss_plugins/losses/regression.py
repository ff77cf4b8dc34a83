"""Point-wise regression losses."""

import torch.nn.functional as F

from detloss_plugins.base import RegressionLoss, Upstream
from detloss_plugins.registry import MODELS


def l1_loss(pred, target):
    """``|pred - target|``; the gradient at zero is zero.

    >>> import torch
    >>> l1_loss(torch.tensor([2.5, 0.0]), torch.tensor([3.0, -0.5]))
    tensor([0.5000, 0.5000])
    """
    return F.l1_loss(pred, target, reduction="none")


@MODELS.register_module()
class L1Loss(RegressionLoss):
    """Absolute error; its mean is the MAE."""

    fn = staticmethod(l1_loss)
    upstream = (Upstream("torch.nn.functional.l1_loss"), Upstream("mmdet.models.losses.L1Loss"))


def smooth_l1_loss(pred, target, *, beta=1.0):
    """``d^2 / (2 beta)`` where ``|d| < beta``, else ``|d| - beta / 2``, with ``d = pred - target``; ``beta=0`` is L1.

    >>> import torch
    >>> smooth_l1_loss(torch.tensor([0.3, -1.4]), torch.zeros(2), beta=0.5)  # .09 / 1 and 1.4 - .25
    tensor([0.0900, 1.1500])
    """
    return F.smooth_l1_loss(pred, target, reduction="none", beta=beta)


@MODELS.register_module()
class SmoothL1Loss(RegressionLoss):
    """Girshick, Fast R-CNN, 2015.

    ``beta`` has the unit of the input; Detectron's sigma is ``beta = 1 / sigma^2``.

    Raises:
        ValueError: if ``beta`` is negative.
    """

    fn = staticmethod(smooth_l1_loss)
    paper = "https://arxiv.org/abs/1504.08083"
    upstream = tuple(
        Upstream(path, {"beta": beta}, {"beta": beta})
        for path in ("torch.nn.functional.smooth_l1_loss", "mmdet.models.losses.SmoothL1Loss")
        for beta in (1.0, 1 / 9)
    )

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.beta < 0:
            raise ValueError(f"beta of SmoothL1Loss must not be negative, but is {self.beta}.")


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
