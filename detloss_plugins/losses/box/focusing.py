"""Losses that decide which boxes count: by what training has seen, or by another IoU in place of the IoU."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from detloss_plugins.facts import ARXIV, NonNegative, Positive, Share, between
from detloss_plugins.families import BoxLoss, of_one_type
from detloss_plugins.geometry import Pair, resized
from detloss_plugins.losses.box.iou import ciou_loss
from detloss_plugins.reduction import counts
from detloss_plugins.registry import MODELS, build_part

__all__ = [
    "FocalerIoULoss", "InnerIoULoss", "InterpIoULoss", "WIoULoss", "focaler_iou_loss", "inner_iou_loss",
    "interp_iou_loss", "wiou_loss",
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
    base: Callable | None = None,
    eps: Positive = 1e-7,
) -> Tensor:
    """``exp(d^2 / c^2) * (1 - IoU)`` times a focusing constant: d the distance of the centers, c the diagonal of the
    enclosing box, a constant.

    With ``b = (1 - IoU) / mean``, the factor is 1 in version 1, ``b^gamma`` in version 2 and
    ``b / (delta * alpha^(b - delta))`` in version 3, which is largest for boxes of medium quality. ``base``, a function
    ``(pred, target) -> losses``, takes the place of what it multiplies.

    >>> pred, target = torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 0, 4, 2])
    >>> wiou_loss(pred, target, version=1)  # exp(1 / 20) / 2
    tensor(0.5256)
    """
    pair = Pair(pred, target, eps)
    loss = 1 - pair.iou
    outlier = (loss.detach() / mean).to(loss.dtype)
    if base is None:
        # Of boxes it is at most 1; of an inverted annotation it has no bound, and its exponential is infinite.
        loss = pair.ratio(pair.center_distance2, pair.diagonal2.detach()).clamp(max=1).exp() * loss
    else:
        loss = base(pred, target)
    if version == 1:
        return loss
    return loss * (outlier**gamma if version == 2 else outlier / delta * alpha ** (delta - outlier))


class _OverABase(BoxLoss, true_gradient=False, attracts=True, filled=("base",)):
    """A box loss that changes another one; they nest in any order. Some facts of the class are the default base's.

    Args:
        base: config of a box loss with one value a box, else a ``ValueError``; None for the plain form. Put Wise-IoU
            around Inner- and Focaler-IoU: inside, it does not focus what they add, the most for boxes that fit well.
    """

    def __init__(self, *, base: Mapping | None = CIOU, **settings):
        super().__init__(**settings)
        self.base = None if base is None else build_part(base)
        if self.base is None:
            return
        of_base = self.base.facts
        if of_base.family != "box" or not of_base.one_per_row:
            name = type(self).__name__
            raise ValueError(f"base of {name} must be a box loss of one value a box, not {type(self.base).__name__}.")
        self.facts = self.facts.but(
            row_wise=self.facts.row_wise and of_base.row_wise,
            symmetric=self.facts.symmetric and of_base.symmetric,
            scale_invariant=self.facts.scale_invariant and of_base.scale_invariant,
        )

    def observe(self, pred, target, weight):
        of_base = {} if self.base is None else {"base": self.base.observe(pred, target, weight)}
        return {**super().observe(pred, target, weight), **of_base}

    def elements(self, pred, target, seen):
        def base(pred, target):
            return self.base.loss_weight * self.base.unweighted(pred, target, seen["base"])[0]

        return super().elements(pred, target, {**seen, "base": base if self.base is not None else None})


@MODELS.register_module()
class WIoULoss(_OverABase, fn=wiou_loss, paper=ARXIV + "2301.10051", row_wise=True, filled=("mean", "base")):
    """Tong et al., Wise-IoU, 2023.

    Versions 2 and 3 compare a box with the running mean of ``1 - IoU``, which starts at 1 and moves in training, before
    it is used, by the boxes of weight above 0.

    Args:
        alpha, delta: of version 3, the paper's; the authors' code has 1.7 and 2.7 now.
        momentum: share of a batch in the running mean, in (0, 1]. The paper's is ``1 - 0.05^(1 / n)``, n the steps
            until the model hardly improves any more.
        base: config of a box loss with one value a box, which the focusing constant multiplies (Wise-EIoU,
            Wise-Inner-DIoU, ...), else a ``ValueError``; None for Wise-IoU itself. Version 1 over a base is the base.
    """

    def __init__(self, *, momentum: Momentum = 0.01, base: Mapping | None = None, **settings):
        super().__init__(base=base, **settings)
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


@MODELS.register_module()
class InnerIoULoss(_OverABase, fn=inner_iou_loss, paper=ARXIV + "2311.02877", row_wise=True, bounds=(0.0, 5.0)):
    """Zhang et al., Inner-IoU, 2023.

    Args:
        ratio: of the auxiliary boxes, usually 0.5 to 1.5. Below 1 the boxes part earlier.
    """


@MODELS.register_module()
class FocalerIoULoss(_OverABase, fn=focaler_iou_loss, paper=ARXIV + "2401.10525", row_wise=True, bounds=(0.0, 5.0)):
    """Zhang et al., Focaler-IoU, 2024.

    Args:
        d, u: the IoUs between which boxes count, ``d < u``, else a ``ValueError``; elsewhere the plain form is flat.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if not self.d < self.u:
            raise ValueError(f"d of FocalerIoULoss must be below u={self.u}, not {self.d}.")


def interp_iou_loss(
    pred: Tensor, target: Tensor, *, alpha: Share = 0.98, dynamic: bool = False, eps: Positive = 1e-7
) -> Tensor:
    """``(1 - IoU) + (1 - the IoU of an interpolated box)``, which is ``(1 - alpha) pred + alpha target``.

    That box overlaps the target where the predicted one does not, and passes its gradient on. With ``dynamic``
    (D-InterpIoU), ``alpha = 1 - IoU``, kept in [0.6, 0.99], a constant.

    >>> interp_iou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([2.0, 0, 4, 2]), alpha=0.5)  # 1 + 1 - 1/3
    tensor(1.6667)
    """
    pred, target = of_one_type(pred, target)
    iou = Pair(pred, target, eps).iou
    share = (1 - iou.detach()).clamp(0.6, 0.99).unsqueeze(-1) if dynamic else alpha
    return 2 - iou - Pair(torch.lerp(pred, target, share), target, eps).iou


@MODELS.register_module()
class InterpIoULoss(
    BoxLoss,
    fn=interp_iou_loss,
    paper=ARXIV + "2507.12420",
    row_wise=True,
    attracts=True,
    bounds=(0.0, 2.0),
    symmetric=False,
):
    """Liu and Watanabe, InterpIoU, 2025.

    The formula is that of ports of the authors' code, which disagree on the direction and the value of alpha. A box
    further than ``1 / (1 - alpha)`` sides away gets no gradient.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.facts = self.facts.but(true_gradient=not self.dynamic)
