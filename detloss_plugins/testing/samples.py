"""What to test a loss on: random predictions and targets that suit its family."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detloss_plugins.loss import Loss
from detloss_plugins.losses import SeesawLoss


def sample(
    loss: Loss | type[Loss], n: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """``pred`` and ``target`` for a loss or a loss class, ``n`` of what it compares; equal seeds give equal ones.

    ``kwargs`` are the further arguments of the sampler, such as ``classes``; see :func:`sampler_of`.

    >>> from detloss_plugins.losses import CIoULoss
    >>> [x.shape for x in sample(CIoULoss, 8)]
    [torch.Size([8, 4]), torch.Size([8, 4])]
    """
    return sampler_of(loss)(n, seed, dtype, **kwargs)


def sampler_of(loss: Loss | type[Loss]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``sampler(n, seed, dtype)`` of a loss or a loss class: its classmethod ``sample``, or else that of its family.

    Raises:
        TypeError: if it has neither.
    """
    cls = loss if isinstance(loss, type) else type(loss)
    if hasattr(cls, "sample"):
        return cls.sample
    if issubclass(cls, SeesawLoss):
        return seesaw_logits
    if loss.facts.family not in SAMPLERS:
        raise TypeError(
            f"{cls.__name__} needs a classmethod sample(n, seed, dtype), or one of the families {', '.join(SAMPLERS)}."
        )
    return SAMPLERS[loss.facts.family]


def boxes(n=64, seed=0, dtype=torch.float32):
    """``n`` predictions and targets in pixels: overlapping ones mostly, disjoint and nested ones too."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return torch.rand(n, 2, generator=generator, dtype=torch.float64) * (high - low) + low

    center, sides = uniform(100, 500), uniform(10, 120)
    # Pixel coordinates only: the conditioning of a loss at a scale is a property test of its own.
    moved = center + sides * uniform(-0.8, 0.8)
    resized = sides * uniform(0.4, 1.6)
    target = torch.cat([center - sides / 2, center + sides / 2], -1)
    pred = torch.cat([moved - resized / 2, moved + resized / 2], -1)
    return pred.to(dtype), target.to(dtype)


def class_logits(n=64, seed=0, dtype=torch.float32, classes=10):
    """Logits ``(n, classes)`` and dense soft targets: a quality on at most one channel, a third of them empty."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    label = torch.randint(0, classes + classes // 2, (n, 1), generator=generator)
    quality = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    target = torch.where(label == torch.arange(classes), quality, 0.0)
    return logits.to(dtype), target.to(dtype)


def seesaw_logits(n=64, seed=0, dtype=torch.float32, classes=8):
    """Logits ``(n, classes + 2)`` and labels, a third of them background."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes + 2, generator=generator, dtype=torch.float64)
    label = torch.randint(0, classes + classes // 2, (n,), generator=generator).clamp(max=classes)
    return logits.to(dtype), label


def bins_and_distances(n=64, seed=0, dtype=torch.float32, bins=16):
    """Logits ``(n, bins)`` and distances inside the bins."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, bins, generator=generator, dtype=torch.float64)
    target = torch.rand(n, generator=generator, dtype=torch.float64) * (bins - 1.02)
    return logits.to(dtype), target.to(dtype)


def heatmaps(n=64, seed=0, dtype=torch.float32):
    """Heatmaps ``(n, 16)`` of one bell each, with its peak of 1 in every second row, and probabilities."""
    generator = torch.Generator().manual_seed(seed)
    pred = 2 * torch.randn(n, 16, generator=generator, dtype=torch.float64)
    center = 15 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    center[::2] = center[::2].round()
    target = (-(torch.arange(16) - center).square() / 8).exp()
    return pred.sigmoid().to(dtype), target.to(dtype)


def anchors_of_images(n=64, seed=0, dtype=torch.float32, anchors=16, classes=3):
    """Logits and offsets side by side, ``(n, anchors, classes + 5)``, and labels and offsets, ``(n, anchors, 5)``.

    An image has a few positives, or none, and an ignored anchor.
    """
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(n, anchors, classes + 5, generator=generator, dtype=torch.float64)
    boxes = torch.randn(n, anchors, 4, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 8 * classes, (n, anchors, 1), generator=generator).clamp(max=classes)
    label[:, 0] = -1
    return pred.to(dtype), torch.cat([label, boxes], -1).to(dtype)


def offsets(n=64, seed=0, dtype=torch.float32):
    """Predictions and targets ``(n, 4)`` such as encoded box offsets."""
    generator = torch.Generator().manual_seed(seed)
    pred, target = torch.randn(2, n, 4, generator=generator, dtype=torch.float64).unbind(0)
    return pred.to(dtype), target.to(dtype)


def masks(n=64, seed=0, dtype=torch.float32, side=8):
    """Logits and rectangular masks ``(n, side, side)`` that they fit more or less; some masks are empty."""
    generator = torch.Generator().manual_seed(seed)
    pixel = torch.arange(side)
    low, high = torch.randint(0, side + 1, (2, n, 2, 1), generator=generator).sort(0).values
    rows, columns = ((low <= pixel) & (pixel < high)).unbind(1)
    target = (rows.unsqueeze(-1) & columns.unsqueeze(-2)).double()
    noise = torch.randn(n, side, side, generator=generator, dtype=torch.float64)
    fit = 6 * torch.rand(n, 1, 1, generator=generator, dtype=torch.float64) - 1
    return ((target - 0.5) * fit + 1.5 * noise).to(dtype), target.to(dtype)


def rotated_boxes(n=64, seed=0, dtype=torch.float32):
    """``n`` predictions and targets in pixels, at all angles: most overlap, a quarter is turned at will."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, columns=2):
        return torch.rand(n, columns, generator=generator, dtype=torch.float64) * (high - low) + low

    center, sides, angle = uniform(100, 500), uniform(10, 120), uniform(-torch.pi, torch.pi, 1)
    moved, resized = center + sides * uniform(-0.8, 0.8), sides * uniform(0.4, 1.6)
    turn, anyhow = uniform(-0.6, 0.6, 1), uniform(-torch.pi, torch.pi, 1)
    turned = angle + torch.where(uniform(0, 1, 1) < 0.25, anyhow, turn)
    target, pred = torch.cat([center, sides, angle], -1), torch.cat([moved, resized, turned], -1)
    return pred.to(dtype), target.to(dtype)


def distributions(n=64, seed=0, dtype=torch.float32, classes=10):
    """Logits ``(n, classes)`` and distributions, every fourth of which is one-hot."""
    generator = torch.Generator().manual_seed(seed)
    pred, target = 2 * torch.randn(2, n, classes, generator=generator, dtype=torch.float64)
    one_hot = (target == target.amax(-1, keepdim=True)).to(target.dtype)
    target = torch.where(torch.arange(n).unsqueeze(-1) % 4 == 0, one_hot, target.softmax(-1))
    return pred.to(dtype), target.to(dtype)


SAMPLERS = {
    "box": boxes,
    "classification": class_logits,
    "distribution": bins_and_distances,
    "heatmap": heatmaps,
    "multibox": anchors_of_images,
    "ranking": class_logits,
    "region": masks,
    "regression": offsets,
    "rotated": rotated_boxes,
    "soft label": distributions,
    "uncertainty": offsets,
}
