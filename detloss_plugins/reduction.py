"""The reduction contract of every loss: weight, then avg_factor and reduction. It is MMDetection's, made safe."""

import torch

from detloss_plugins.execution import compiling

REDUCTIONS = ("none", "mean", "sum")
# What mmdet adds to avg_factor, so that a normaliser of zero does not divide by zero.
AVG_FACTOR_EPS = torch.finfo(torch.float32).eps


def check_reduction(reduction):
    """Return ``reduction`` if it is one of ``none``, ``mean``, ``sum``; raise ``ValueError`` otherwise."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, not {reduction!r}.")
    return reduction


def apply_weight(loss, weight):
    """Multiply per-element losses by a weight per element, per row ``(N,)``/``(N, 1)``, or per box coordinate.

    A weight with one dimension more than the loss, such as the ``(N, 4)`` of mmdet's anchor heads beside the ``(N,)``
    of a box loss, is averaged over that dimension first, as mmdet does.

    >>> apply_weight(torch.ones(2), torch.tensor([[1.0, 1, 0, 0], [4, 4, 4, 4]]))
    tensor([0.5000, 4.0000])
    """
    return loss if weight is None else loss * fit_weight(weight, loss)


def fit_weight(weight, loss):
    """A weight in a shape and type that broadcasts with per-element losses; see :func:`apply_weight`.

    Raises:
        ValueError: if there is no such shape.
    """
    given = weight.shape
    weight = weight.to(loss.dtype)
    if weight.dim() == loss.dim() + 1:
        weight = weight.mean(-1)
    elif weight.numel() == loss.numel():
        weight = weight.reshape(loss.shape)
    elif weight.dim() < loss.dim():
        weight = weight.reshape(weight.shape + (1,) * (loss.dim() - weight.dim()))
    fits = weight.dim() == loss.dim() and all(w in (1, n) for w, n in zip(weight.shape, loss.shape, strict=True))
    if not fits:
        raise ValueError(
            f"A weight of shape {tuple(given)} does not fit losses of shape {tuple(loss.shape)}; "
            "give one weight per element or one per row."
        )
    return weight


def of_rows(loss, *weights):
    """Whether all of the weights that are given, and some are, have one value for each row of the losses."""
    given = [weight for weight in weights if weight is not None]
    return len(given) > 0 and all(loss.dim() > 1 and weight.shape == loss.shape[:-1] for weight in given)


def _sum(loss):
    """A compiled float32 sum adds one after the other: over millions of elements it is off in the fourth figure."""
    if compiling() and loss.device.type != "mps":  # which has no float64
        return loss.sum(dtype=torch.float64).to(loss.dtype)
    return loss.sum()


def reduce(loss, weight=None, avg_factor=None, reduction="mean", count=None):
    """Weight and reduce per-element losses.

    Args:
        loss: per-element losses, any shape.
        weight: see :func:`apply_weight`.
        avg_factor: normaliser; "mean" is then ``sum / (avg_factor + eps)``, "none" ignores it.
        reduction: "none", "mean" (over the number of elements, not the sum of weights) or "sum".
        count: the number of elements, where some have been added up already.

    Returns:
        The weighted losses for "none", otherwise a scalar. An empty input gives zero with its graph, never NaN.

    Raises:
        ValueError: for an unknown reduction, for ``avg_factor`` with "sum", and for a weight that does not fit.

    >>> reduce(torch.tensor([1.0, 3.0]), weight=torch.tensor([1.0, 0.0])), reduce(torch.tensor([1.0, 3.0]), None, 8)
    (tensor(0.5000), tensor(0.5000))
    """
    check_reduction(reduction)
    if avg_factor is not None and reduction == "sum":
        raise ValueError('avg_factor cannot be used with reduction="sum"; use reduction="mean".')
    loss = apply_weight(loss, weight)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return _sum(loss)
    if avg_factor is None:
        if not compiling() and 0 < loss.numel() < 2**14 and count in (None, loss.numel()):
            return loss.mean()  # one operator less, but its backward fills a tensor
        return _sum(loss) / max(loss.numel() if count is None else count, 1)
    return _sum(loss) / (avg_factor + AVG_FACTOR_EPS)
