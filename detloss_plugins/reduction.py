"""The reduction contract of every loss: weight, then avg_factor and reduction. It is MMDetection's, made safe."""

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")
# What mmdet adds to avg_factor, so that a normaliser of zero does not divide by zero.
AVG_FACTOR_EPS = torch.finfo(torch.float32).eps


def check_reduction(reduction: str, avg_factor: Tensor | float | None = None) -> str:
    """Return ``reduction`` if it is one of the three, and "sum" without ``avg_factor``; else a ``ValueError``."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, not {reduction!r}.")
    if avg_factor is not None and reduction == "sum":
        raise ValueError('avg_factor cannot be used with reduction="sum"; use reduction="mean".')
    return reduction


def apply_weight(loss: Tensor, weight: Tensor | None) -> Tensor:
    """Multiply per-element losses by a weight per element, in their shape or flat, per row or per box coordinate.

    A weight with one dimension more than the loss, such as the ``(N, 4)`` of mmdet's anchor heads beside the ``(N,)``
    of a box loss, is averaged over that dimension first, as mmdet does; any other is a ``ValueError``.

    >>> apply_weight(torch.ones(2), torch.tensor([[1.0, 1, 0, 0], [4, 4, 4, 4]]))
    tensor([0.5000, 4.0000])
    """
    if weight is None:
        return loss
    if weight.dtype == torch.bool and weight.shape == loss.shape:  # without a copy of it in the type of the loss
        return torch.where(weight, loss, 0.0)
    return loss * fit_weight(weight, loss)


def fit_weight(weight: Tensor, loss: Tensor) -> Tensor:
    """A weight in a shape and type that broadcasts with per-element losses; see :func:`apply_weight`."""
    given, shape = weight.shape, loss.shape
    weight = weight.to(loss.dtype)
    if given == shape or not given:
        return weight
    if given[:-1] == shape:
        return weight.mean(-1)
    if given == shape[: len(given)]:
        return weight.reshape(given + (1,) * (len(shape) - len(given)))
    # Or a mask of a map, as CornerNet's head has it.
    if given == (*shape[:-1], 1) or (loss.dim() > 2 and given == (*shape[:1], 1, *shape[2:])):
        return weight
    if given == (loss.numel(),):  # one per element, flat, as FSAF's head has it
        return weight.reshape(shape)
    raise ValueError(
        f"A weight of shape {tuple(given)} does not fit losses of shape {tuple(shape)}; "
        "give one weight per element or one per row."
    )


def divisor_of(count: Tensor | int, avg_factor: Tensor | float | None, reduction: str) -> Tensor | float | None:
    """What a sum of losses is divided by: ``avg_factor`` or else ``count`` for "mean", nothing for "sum"."""
    if reduction != "mean":
        return None
    return count if avg_factor is None else avg_factor + AVG_FACTOR_EPS


def scaled(total: Tensor, divisor: Tensor | float | None, factor: Tensor | float = 1.0) -> Tensor:
    """A sum over ``divisor``, if there is one, times ``factor``."""
    return times(total if divisor is None else total / divisor, factor)


def times(value: Tensor, factor: Tensor | float) -> Tensor:
    """A product, which costs no operator for the number 1."""
    return value if not isinstance(factor, Tensor) and factor == 1 else value * factor


def counts(like: Tensor, *weights: Tensor | None) -> Tensor:
    """1 for the per-element losses ``like`` whose weights are all above 0, else 0."""
    found = torch.ones_like(like)
    for weight in weights:
        found = found if weight is None else found * (fit_weight(weight, like) > 0)
    return found


def reduce(
    loss: Tensor, weight: Tensor | None = None, avg_factor: Tensor | float | None = None, reduction: str = "mean"
) -> Tensor:
    """Per-element losses of any shape, times :func:`apply_weight`'s weight: "none", or their "mean" or "sum", a scalar.

    "mean" is over the number of elements (not the sum of weights), or ``sum / (avg_factor + eps)``, which "none"
    ignores. An empty input gives zero with its graph, never NaN.

    Raises:
        ValueError: for an unknown reduction, for ``avg_factor`` with "sum", and for a weight that does not fit.

    >>> reduce(torch.tensor([1.0, 3.0]), weight=torch.tensor([1.0, 0.0])), reduce(torch.tensor([1.0, 3.0]), None, 8)
    (tensor(0.5000), tensor(0.5000))
    """
    check_reduction(reduction, avg_factor)
    loss = apply_weight(loss, weight)
    return loss if reduction == "none" else scaled(loss.sum(), divisor_of(max(loss.numel(), 1), avg_factor, reduction))
