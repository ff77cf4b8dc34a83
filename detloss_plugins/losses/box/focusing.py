"""Losses that decide which boxes count: by what training has seen, or by another IoU in place of the IoU."""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch
from torch import Tensor

from detloss_plugins.facts import NonNegative, Positive, Share, between
from detloss_plugins.families import BoxLoss
from detloss_plugins.geometry import Pair, resized
from detloss_plugins.losses.box.iou import ciou_loss
from detloss_plugins.reduction import counts
from detloss_plugins.registry import MODELS, build_loss

__all__ = [
    "FocalerIoULoss", "InnerIoULoss", "WIoULoss", "focaler_iou_loss", "inner_iou_loss", "wiou_loss",
]  # fmt: skip

Momentum = Annotated[float, between(0, 1, "(0, 1]")]
CIOU = {"type": "CIoULoss"}


def wiou_loss(
    pred: Tensor,
    target: Tensor,
    *,
    version: Literal[1, 2, 3] = 3,
    gamma: NonNegative = 0.5,
    alpha: Positive = 1.9,
    delta: Positive = 3.0,
    mean: Tensor | float = 1.0,
    eps: Positive = 1e-7,
) -> Tensor:
    """``exp(d^2 / c^2) * (1 - IoU)`` times a focusing constant: d the distance of the centers, c the diagonal of the
    enclosing box, a constant.

    With ``b = (1 - IoU) / mean``, the factor is 1 in version 1, ``b^gamma`` in version 2 and
    ``b / (delta * alpha^(b - delta))`` in version 3, which is largest for boxes of medium quality.

    >>> pred, target = torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2])
    >>> wiou_loss(pred, target, version=1)  # exp(1 / 20) / 2
    tensor(0.5256)
    """
    pair = Pair(pred, target, eps)
    loss = 1 - pair.iou
    outlier = loss.detach() / mean
    # Of boxes it is at most 1; of an inverted annotation it has no bound, and its exponential is infinite.
    loss = pair.ratio(pair.center_distance2, pair.diagonal2.detach()).clamp(max=1).exp() * loss
    if version == 1:
        return loss
    return loss * (outlier**gamma if version == 2 else outlier / delta * alpha ** (delta - outlier))


@MODELS.register_module()
class WIoULoss(
    BoxLoss,
    fn=wiou_loss,
    paper="https://arxiv.org/abs/2301.10051",
    row_wise=True,
    attracts=True,
    true_gradient=False,
    filled=("mean",),
):
    """Tong et al., Wise-IoU, 2023.

    Versions 2 and 3 compare a box with the running mean of ``1 - IoU``, which starts at 1 and moves in training, before
    it is used, by the boxes of weight above 0.

    Args:
        version: 1, 2 or 3.
        gamma: of version 2.
        alpha, delta: of version 3, the paper's; the authors' code has 1.7 and 2.7 now.
        momentum: share of a batch in the running mean, in (0, 1]. The paper's is ``1 - 0.05^(1 / n)``, n the steps
            until the model hardly improves any more.
    """

    def __init__(self, *, momentum: Momentum = 0.01, **settings):
        super().__init__(**settings)
        self.momentum = momentum
        self.register_buffer("mean", torch.tensor(1.0) if self.version > 1 else None)

    @property
    def observes(self):
        return self.mean is not None and self.learning

    def statistics(self, pred, target, valid, weight):
        loss = 1 - Pair(pred, target, self.eps).iou
        seen = counts(loss, weight) * loss.isfinite()
        return {"loss": torch.where(seen > 0, loss, 0.0).sum(), "count": seen.sum()}

    def summarise(self, sums):
        if self.mean is None:
            return {}
        if sums:
            moved = (1 - self.momentum) * self.mean + self.momentum * sums["loss"] / sums["count"]
            self.mean.copy_(torch.where(sums["count"] > 0, moved, self.mean))
        return {"mean": self.mean.clamp(min=self.eps)}

    def elements(self, pred, target, seen):
        return super().elements(pred, target, {name: value.to(pred.dtype) for name, value in seen.items()})


def inner_iou_loss(
    pred: Tensor, target: Tensor, *, ratio: Positive = 0.7, base: Callable | None = ciou_loss, eps: Positive = 1e-7
) -> Tensor:
    """``base + IoU - inner IoU``, the latter of both boxes resized by ``ratio`` about their own centers.

    ``base`` is a function ``(pred, target) -> losses``; None gives ``1 - inner IoU``.

    >>> pred, target = torch.tensor([0.0, 0, 4, 4]), torch.tensor([2.0, 0, 6, 4])
    >>> inner_iou_loss(pred, target, ratio=0.75, base=None)  # 3 x 3, one apart by 2: 1 - 3 / 15
    tensor(0.8000)
    """
    inner = Pair(resized(pred, ratio), resized(target, ratio), eps).iou
    return 1 - inner if base is None else base(pred, target) + Pair(pred, target, eps).iou - inner


def focaler_iou_loss(
    pred: Tensor,
    target: Tensor,
    *,
    d: Share = 0.0,
    u: Momentum = 0.95,
    base: Callable | None = ciou_loss,
    eps: Positive = 1e-7,
) -> Tensor:
    """``base + IoU - focaler IoU``, the latter being the IoU stretched from [d, u] to [0, 1] and kept there.

    ``base`` is a function ``(pred, target) -> losses``; None gives ``1 - focaler IoU``.

    >>> pred, target = torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2])
    >>> focaler_iou_loss(pred, target, d=0.25, u=0.75, base=None)  # 1 - (1/2 - 1/4) / (1/2)
    tensor(0.5000)
    """
    iou = Pair(pred, target, eps).iou
    focaler = ((iou - d) / (u - d)).clamp(0, 1)
    return 1 - focaler if base is None else base(pred, target) + iou - focaler


class _OverABase(BoxLoss, bounds=(0.0, 5.0), true_gradient=False, attracts=True, filled=("base",)):
    """A box loss that changes another one, ``base``; None for the plain form. Some facts are the default base's."""

    def __init__(self, *, base: Mapping | None = CIOU, **settings):
        super().__init__(**settings)
        self.base = None if base is None else build_loss(base)
        if self.base is None:
            return
        of_base = self.base.facts
        if of_base.family != "box" or not of_base.one_per_row:
            name = type(self).__name__
            raise ValueError(f"base of {name} must be a box loss of one value a box, not {base['type']}.")
        self.facts = self.facts.but(row_wise=self.facts.row_wise and of_base.row_wise)

    def observe(self, pred, target, weight):
        return {} if self.base is None else {"base": self.base.observe(pred, target, weight)}

    def elements(self, pred, target, seen):
        def base(pred, target):
            return self.base.loss_weight * self.base.unweighted(pred, target, seen["base"])[0]

        return super().elements(pred, target, {"base": base if self.base is not None else None})


@MODELS.register_module()
class InnerIoULoss(_OverABase, fn=inner_iou_loss, paper="https://arxiv.org/abs/2311.02877", row_wise=True):
    """Zhang et al., Inner-IoU, 2023.

    Args:
        ratio: of the auxiliary boxes, above 0, usually 0.5 to 1.5. Below 1 the boxes part earlier.
        base: config of a box loss with one value a box; None for ``1 - inner IoU``.

    Raises:
        ValueError: if ``base`` is another kind of loss.
    """


@MODELS.register_module()
class FocalerIoULoss(_OverABase, fn=focaler_iou_loss, paper="https://arxiv.org/abs/2401.10525", row_wise=True):
    """Zhang et al., Focaler-IoU, 2024.

    Args:
        d, u: the IoUs between which boxes count, ``0 <= d < u <= 1``. The plain form has no gradient elsewhere.
        base: config of a box loss with one value a box; None for ``1 - focaler IoU``.

    Raises:
        ValueError: for other ``d`` and ``u``, or if ``base`` is another kind of loss.
    """

    def __init__(self, **settings):
        super().__init__(**settings)
        if not self.d < self.u:
            raise ValueError(f"d of FocalerIoULoss must be below u={self.u}, not {self.d}.")
