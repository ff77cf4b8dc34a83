"""Losses that decide which boxes count: by what training has seen, or by another IoU in place of the IoU."""

from types import MappingProxyType

import torch

from detloss_plugins.base import Rule, above, one_of, rules
from detloss_plugins.families import BoxLoss
from detloss_plugins.geometry import Pair, resized
from detloss_plugins.losses.box.iou import ciou_loss
from detloss_plugins.reduction import apply_weight
from detloss_plugins.registry import MODELS, build_loss


def wiou_loss(pred, target, *, version=3, gamma=0.5, alpha=1.9, delta=3.0, mean=1.0, eps=1e-7):
    """``exp(centre distance^2 / hull diagonal^2) * (1 - IoU)``, the diagonal a constant, times a focusing constant.

    With ``b = (1 - IoU) / mean``, the factor is 1 in version 1, ``b^gamma`` in version 2 and
    ``b / (delta * alpha^(b - delta))`` in version 3, which is largest for boxes of medium quality.

    >>> pred, target = torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2])
    >>> wiou_loss(pred, target, version=1)  # exp(1 / 20) / 2
    tensor(0.5256)
    """
    pair = Pair(pred, target, eps)
    loss = 1 - pair.iou
    outlier = loss.detach() / mean
    loss = pair.ratio(pair.distance2, pair.diagonal2.detach()).exp() * loss
    if version == 1:
        return loss
    return loss * (outlier**gamma if version == 2 else outlier / delta * alpha ** (delta - outlier))


@MODELS.register_module()
class WIoULoss(BoxLoss):
    """Tong et al., Wise-IoU, 2023.

    Versions 2 and 3 compare a box with the running mean of ``1 - IoU``, which starts at 1 and moves in training, before
    it is used, by the boxes of weight above 0.

    Args:
        version: 1, 2 or 3.
        gamma: of version 2.
        alpha, delta: of version 3, the paper's; the authors' code has 1.7 and 2.7 now.
        momentum: share of a batch in the running mean, in (0, 1]. The paper's is ``1 - 0.05^(1 / n)``, n the steps
            until the model hardly improves any more.

    Raises:
        ValueError: for another ``version``, or a ``momentum`` outside (0, 1].
    """

    fn = staticmethod(wiou_loss)
    inputs = ("mean",)
    paper = "https://arxiv.org/abs/2301.10051"
    allowed = rules(version=one_of(1, 2, 3))
    true_gradient = False
    attracts = True

    def __init__(self, *, momentum=0.01, **kwargs):
        super().__init__(**kwargs)
        self.momentum = momentum
        self.check("momentum", Rule("in (0, 1]", lambda value: 0 < value <= 1))
        self.register_buffer("mean", torch.tensor(1.0) if self.version > 1 else None)

    @torch.no_grad()
    def _see(self, loss, weight):
        counts = (apply_weight(torch.ones_like(loss), weight) > 0) & loss.isfinite()
        seen = torch.where(counts, loss, 0.0).sum() / counts.sum()
        moved = (1 - self.momentum) * self.mean + self.momentum * seen
        self.mean.copy_(torch.where(counts.any(), moved, self.mean))

    def compute(self, pred, target, valid, weight):
        if self.mean is None:
            return self.fn(pred, target, **self.settings)
        if self.learning:
            self._see(1 - Pair(pred.detach(), target, self.eps).iou, weight)
        return self.fn(pred, target, mean=self.mean.clamp(min=self.eps).to(pred.dtype), **self.settings)


def _exchange(pred, target, base, iou, other):
    """``1 - other``, or a base loss with its IoU exchanged for another one."""
    return 1 - other if base is None else base(pred, target) + iou - other


def inner_iou_loss(pred, target, *, ratio=0.7, base=ciou_loss, eps=1e-7):
    """``base + IoU - inner IoU``, the latter of both boxes resized by ``ratio`` about their own centres.

    ``base`` is a function ``(pred, target) -> losses``; None gives ``1 - inner IoU``.

    >>> pred, target = torch.tensor([0.0, 0, 4, 4]), torch.tensor([2.0, 0, 6, 4])
    >>> inner_iou_loss(pred, target, ratio=0.75, base=None)  # 3 x 3, one apart by 2: 1 - 3 / 15
    tensor(0.8000)
    """
    iou, inner = Pair(pred, target, eps).iou, Pair(resized(pred, ratio), resized(target, ratio), eps).iou
    return _exchange(pred, target, base, iou, inner)


def focaler_iou_loss(pred, target, *, d=0.0, u=0.95, base=ciou_loss, eps=1e-7):
    """``base + IoU - focaler IoU``, the latter being the IoU stretched from [d, u] to [0, 1] and kept there.

    ``base`` is a function ``(pred, target) -> losses``; None gives ``1 - focaler IoU``.

    >>> pred, target = torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2])
    >>> focaler_iou_loss(pred, target, d=0.25, u=0.75, base=None)  # 1 - (1/2 - 1/4) / (1/2)
    tensor(0.5000)
    """
    iou = Pair(pred, target, eps).iou
    return _exchange(pred, target, base, iou, ((iou - d) / (u - d)).clamp(0, 1))


class _OverABase(BoxLoss):
    """A box loss that changes another one.

    Args:
        base: config of a box loss with one value a box; None for the plain form.

    Raises:
        ValueError: if ``base`` is another kind of loss.
    """

    inputs = ("base",)
    bounds = (0.0, 5.0)
    true_gradient = False  # this and the next: of the default base
    attracts = True

    def __init__(self, *, base=MappingProxyType({"type": "CIoULoss"}), **kwargs):
        super().__init__(**kwargs)
        self.base = None if base is None else build_loss(base)
        if base is not None and not (self.base.family == "box" and self.base.values_per_box == 1):
            name = type(self).__name__
            raise ValueError(f"base of {name} must be a box loss of one value a box, not {base['type']}.")

    def _base(self, weight):
        if self.base is None:
            return None
        return lambda pred, target: self.base.loss_weight * self.base.elements(pred, target, weight)[0]

    def compute(self, pred, target, valid, weight):
        return self.fn(pred, target, base=self._base(weight), **self.settings)


@MODELS.register_module()
class InnerIoULoss(_OverABase):
    """Zhang et al., Inner-IoU, 2023.

    Args:
        ratio: of the auxiliary boxes, above 0, usually 0.5 to 1.5. Below 1 the boxes part earlier.
        base: config of a box loss with one value a box; None for ``1 - inner IoU``.

    Raises:
        ValueError: if ``ratio`` is not above 0, or ``base`` is another kind of loss.
    """

    fn = staticmethod(inner_iou_loss)
    paper = "https://arxiv.org/abs/2311.02877"
    allowed = rules(ratio=above(0))


@MODELS.register_module()
class FocalerIoULoss(_OverABase):
    """Zhang et al., Focaler-IoU, 2024.

    Args:
        d, u: the IoUs between which boxes count, ``0 <= d < u <= 1``. The plain form has no gradient elsewhere.
        base: config of a box loss with one value a box; None for ``1 - focaler IoU``.

    Raises:
        ValueError: for other ``d`` and ``u``, or if ``base`` is another kind of loss.
    """

    fn = staticmethod(focaler_iou_loss)
    paper = "https://arxiv.org/abs/2401.10525"
    allowed = rules(u=Rule("in (0, 1]", lambda u: 0 < u <= 1))

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.check("d", Rule(f"at least 0 and below u={self.u}", lambda d: 0 <= d < self.u))


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
