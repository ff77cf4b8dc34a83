"""Draw the README's picture: box losses, and their pull, while a box moves away from its target.

  uv run --all-groups tools/picture.py [FILE]

mmdet's SIoULoss is beside ours as it is by default there.
"""

import sys
from pathlib import Path

import matplotlib
import torch

from detloss_plugins.losses import CIoULoss, GIoULoss, IoULoss, SIoULoss

PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "box-losses.svg"
SIDE = 10.0  # of the target, a square


def sweep(loss):
    """Distances of the centers in sides of the target, the losses there, and their derivatives by the distance."""
    distance = torch.linspace(0, 4, 201, dtype=torch.float64, requires_grad=True)
    left = SIDE * distance
    zero = torch.zeros_like(left)
    boxes = torch.stack([left, zero, left + SIDE, zero + SIDE], dim=-1)
    target = torch.tensor([0, 0, SIDE, SIDE], dtype=torch.float64).expand_as(boxes)
    values = loss(boxes, target, reduction_override="none")
    (slope,) = torch.autograd.grad(values.sum(), distance)
    return distance.detach(), values.detach(), slope


def draw(path, theirs):
    """Write the picture to a file; ``theirs`` is mmdet's SIoULoss."""
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "detloss", "font.size": 9})
    from matplotlib import pyplot as plt

    curves = {
        "IoU": IoULoss(mode="linear"),
        "GIoU": GIoULoss(),
        "CIoU": CIoULoss(),
        "SIoU, ours": SIoULoss(),
        "SIoU, mmdet's default": theirs,
    }
    figure, (losses, slopes) = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained")
    for name, loss in curves.items():
        distance, values, slope = sweep(loss)
        style = {"color": "crimson", "linestyle": "--"} if loss is theirs else {}
        losses.plot(distance, values, label=name, **style)
        slopes.plot(distance, slope, label=name, **style)
    losses.set_title("loss")
    slopes.set_title("its derivative: below 0 the box is pushed away")
    slopes.axhline(0, color="gray", linewidth=0.8)
    slopes.set_ylim(-0.6, 2.2)
    for axes in (losses, slopes):
        axes.set_xlabel("distance of the centers, in widths of the target")
        axes.spines[["top", "right"]].set_visible(False)
    slopes.legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    from mmdet.models.losses import SIoULoss as Theirs

    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE, Theirs())
