"""The panels of a picture, functions ``(axes, loss) -> None``, and which a family has.

Colours and greys are those that can be read on white and on black.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from detloss_plugins.cli._plot.numbers import (
    NEGATIVES,
    POSITIVES,
    TARGET,
    Curve,
    box_losses,
    class_curves,
    curve,
    grown,
    heatmap_curves,
    mask_curve,
    masks,
    moved,
    plane,
    pushes,
    ranking_example,
    ready,
    regression_curves,
    rotated_curves,
    soft_label_curves,
    uncertainty_curves,
)
from detloss_plugins.loss import Loss
from detloss_plugins.testing.samples import sample

GREY = "#80868f"
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444")

Panel = Callable[[Any, Loss], None]


def tidy(axes, title="", x="", y=""):
    """Grey axes without a frame, on no background."""
    axes.set_facecolor("none")
    axes.set_title(title, color=GREY)
    axes.set_xlabel(x, color=GREY)
    axes.set_ylabel(y, color=GREY)
    axes.tick_params(colors=GREY, labelsize=7)
    axes.grid(alpha=0.25, color=GREY, linewidth=0.5)
    for name, spine in axes.spines.items():
        spine.set_color(GREY)
        spine.set_visible(name in ("left", "bottom"))


def lines(axes, curves: Sequence[Curve], which: str, title: str, x: str) -> None:
    """The values or the slopes of curves over x, with a legend if there are several."""
    for i, (label, at, value, slope) in enumerate(curves):
        style = "-" if i < len(COLOURS) else "--"
        axes.plot(
            at.numpy(),
            (value if which == "value" else slope).numpy(),
            style,
            color=COLOURS[i % 5],
            label=label,
            linewidth=1.4,
        )
    tidy(axes, title, x)
    if len(curves) > 1 and which == "value":
        axes.legend(fontsize=7, labelcolor=GREY, frameon=False)


def value_and_slope(curves: Callable[[Loss], list[Curve]], x: str, of: str) -> list[Panel]:
    """Two panels over one x, of the same curves, which are worked out once."""
    found: dict[int, list[Curve]] = {}

    def once(loss):
        if id(loss) not in found:
            found.clear()
            found[id(loss)] = curves(loss)
        return found[id(loss)]

    return [
        lambda axes, loss: lines(axes, once(loss), "value", "loss", x),
        lambda axes, loss: lines(axes, once(loss), "slope", f"gradient on {of}", x),
    ]


def field(axes, loss: Loss, make: Callable, span: tuple[float, float], columns: list[int], title: str) -> None:
    """The loss as contours over two numbers of a box, and arrows down its gradient on them."""
    from matplotlib.colors import LinearSegmentedColormap

    loss, colours = ready(loss), LinearSegmentedColormap.from_list("", [COLOURS[2], COLOURS[0], COLOURS[3]])
    fine, coarse = torch.linspace(*span, 25), torch.linspace(*span, 11)[1:-1]
    value, _ = box_losses(loss, plane(fine, fine, make))
    axes.contour(fine.numpy(), fine.numpy(), value.reshape(25, 25).numpy(), levels=9, cmap=colours, linewidths=0.9)
    _, gradient = box_losses(loss, plane(coarse, coarse, make))
    down = -gradient[:, columns]
    length = down.norm(dim=-1, keepdim=True)
    shown = down / length.clamp(min=1e-12) * (length / length.max().clamp(min=1e-12)) ** 0.5  # so that small ones show
    middle = plane(coarse, coarse, lambda x, y: (x, y, x, y))[:, :2]
    arrows(axes, middle, 0.8 * (coarse[1] - coarse[0]) * shown)
    tidy(axes, title, "x, pixels" if make is moved else "width, pixels", "y" if make is moved else "height")
    axes.set_aspect("equal")


def arrows(axes, middle: Tensor, along: Tensor) -> None:
    """Arrows about points ``(N, 2)``, all in one line: an SVG of one path each would be three times as long."""
    long_enough = along.norm(dim=-1) > 1e-6
    middle, along = middle[long_enough], along[long_enough]
    tip, across = middle + along / 2, along.flip(-1) * torch.tensor([-1.0, 1.0])
    barbs = (tip - 0.35 * along + 0.25 * across, tip, tip - 0.35 * along - 0.25 * across)
    path = torch.stack([middle - along / 2, tip, *barbs, torch.full_like(tip, math.nan)], 1).flatten(0, 1)
    axes.plot(*path.T.numpy(), color=COLOURS[1], linewidth=1, solid_joinstyle="miter")


def moving(axes, loss):
    """A box loss while the center of the prediction moves over the target, which is outlined."""
    field(axes, loss, moved, (-80.0, 80.0), [0, 1], "center of the box: loss, and where it is pulled")
    _, _, w, h = TARGET
    axes.plot([-w / 2, w / 2, w / 2, -w / 2, -w / 2], [-h / 2, -h / 2, h / 2, h / 2, -h / 2], color=GREY, linewidth=1)


def growing(axes, loss):
    """A box loss while the sides of the prediction change; the target's are marked."""
    field(axes, loss, grown, (8.0, 108.0), [2, 3], "sides of the box: loss, and where they are pulled")
    axes.plot(*TARGET[2:], "+", color=GREY, markersize=9)


def sliding(axes, loss):
    """A box loss, and its gradient on the center, along a line through the target."""
    x = torch.linspace(-120, 120, 160)
    shape = torch.tensor([0.0, TARGET[1], *TARGET[2:]]).expand(len(x), 4).double()
    boxes = torch.cat([TARGET[0] + x[:, None].double(), shape[:, 1:]], -1)
    value, gradient = box_losses(ready(loss), boxes)
    axes.plot(x.numpy(), value.numpy(), color=COLOURS[0], label="loss", linewidth=1.4)
    axes.plot(
        x.numpy(), 60 * gradient[:, 0].numpy(), color=COLOURS[1], label="gradient, per width of the box", linewidth=1.4
    )
    axes.legend(fontsize=7, labelcolor=GREY, frameon=False, loc="lower right")
    tidy(axes, "a box of the right shape moves along x", "x, pixels")


def distribution_value(axes, loss):
    """A loss of distributions while a predicted bell moves over the bins."""
    bins, target = torch.arange(16), 6.3

    def rows(x, width):
        return -0.5 * ((bins - x[:, None]) / width) ** 2, torch.full_like(x, target)

    widths = (0.5, 1.0, 2.0)
    curves = [curve(loss, f"bell of width {w:g}", torch.linspace(0, 15, 91), partial(rows, width=w)) for w in widths]
    lines(axes, curves, "value", f"loss; the target is {target:g}", "middle of the prediction, bins")


def distribution_push(axes, loss):
    """What a step down the gradient adds to the logit of each bin, from equal logits."""
    logits = torch.zeros(1, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(logits, torch.tensor([6.3], dtype=torch.float64)), logits)
    axes.bar(range(16), (-gradient[0]).tolist(), color=COLOURS[0])
    tidy(axes, "push on each logit, target 6.3, from equal logits", "bin")


def mask_move(axes, loss):
    """A loss of masks while a square of the right size moves."""
    lines(axes, [mask_curve(loss, "move")], "value", "loss of a square of the right size", "moved by, of 10 pixels")


def mask_growth(axes, loss):
    """A loss of masks while a square in the right place grows."""
    lines(axes, [mask_curve(loss, "growth")], "value", "loss of a square in the right place", "side; right is 10")


def mask_push(axes, loss):
    """What a step down the gradient adds to the logit of each pixel of a square that is 4 pixels off."""
    ten, zero = torch.full((1,), 10.0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    pred = (0.5 * masks(zero + 4, ten)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(pred, (masks(zero, ten) > 0).double()), pred)
    push, top = -gradient[0], gradient.abs().max()
    axes.imshow(push.numpy(), cmap="RdBu", vmin=float(-top), vmax=float(top), interpolation="nearest")
    tidy(axes, "push on each pixel (blue up, red down); 4 pixels off")
    axes.grid(False)


def ranked(axes, loss):
    """The scores of an example, and what a step down the gradient does to each."""
    scores, target = ranking_example()
    push, rows = pushes(loss, scores, target), torch.arange(len(scores)).flip(0)
    scale = 0.9 / float(push.abs().max().clamp(min=1e-12))
    for score, quality, change, row in zip(*(x.flatten().tolist() for x in (scores, target, push, rows)), strict=True):
        colour = COLOURS[0] if quality > 0 else COLOURS[1]
        axes.plot(score, row, "o", color=colour, markersize=5)
        if abs(change * scale) > 1e-3:
            axes.annotate(
                "", (score + change * scale, row), (score, row), arrowprops={"arrowstyle": "->", "color": colour}
            )
    names = [f"positive, {q:g}" for _, q in POSITIVES] + ["negative"] * len(NEGATIVES)
    axes.set_yticks(rows.tolist(), names)
    axes.set_xlim(-3, 3)
    tidy(axes, "where each score is pushed", "score (logit)")


def ranked_in_time(axes, loss, steps=60):
    """The scores of the example on their way down the gradient, in steps of equal length at the start."""
    scores, target = ranking_example()
    size, path = 0.15 / pushes(loss, scores, target).abs().max().clamp(min=1e-12), [scores.flatten()]
    for _ in range(steps):
        scores = scores + (size * pushes(loss, scores, target))[:, None]
        path.append(scores.flatten())
    for column, quality in zip(torch.stack(path).T, target.flatten(), strict=True):
        colour, width = (COLOURS[0], 0.8 + quality.item()) if quality > 0 else (COLOURS[1], 0.8)
        axes.plot(column.numpy(), color=colour, linewidth=width)
    tidy(axes, f"the scores in {steps} steps: positives blue, by quality", "step", "score")


def mined(axes, loss):
    """How much gradient the logits of each anchor of an image get, the hardest negatives first."""
    pred, target = sample(loss, 4, seed=1, anchors=24)
    pred.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(pred, target), pred)
    image = int((target[..., 0] < 3).logical_and(target[..., 0] >= 0).sum(-1).argmax())
    size, label = gradient[image, :, :-4].norm(dim=-1), target[image, :, 0]
    order = torch.argsort(size + 100 * ((label >= 0) & (label < 3)), descending=True)
    colours = [COLOURS[0] if 0 <= label[i] < 3 else COLOURS[1] for i in order]
    axes.bar(range(len(order)), size[order].tolist(), color=colours)
    tidy(axes, "gradient on an anchor's logits; positives blue", "anchor, the hardest first")


def mined_boxes(axes, loss):
    """The loss of the boxes over the error of one offset."""
    lines(axes, regression_curves(loss.loss_bbox), "value", "loss of an offset of a positive", "error")


CLASS = value_and_slope(class_curves, "logit", "the logit")
PANELS: dict[str, list[Panel]] = {
    "classification": CLASS,
    "soft label": value_and_slope(soft_label_curves, "logit", "the logit"),
    "heatmap": value_and_slope(heatmap_curves, "probability", "the probability"),
    "regression": value_and_slope(regression_curves, "error", "the prediction"),
    "uncertainty": [
        *value_and_slope(partial(uncertainty_curves, over="error"), "error", "the prediction"),
        *value_and_slope(partial(uncertainty_curves, over="log variance"), "log variance", "the log variance"),
    ],
    "box": [moving, growing, sliding],
    "rotated": [
        *value_and_slope(partial(rotated_curves, over="turn"), "turned by, radians", "the angle"),
        value_and_slope(partial(rotated_curves, over="move"), "moved along the long side, pixels", "x")[0],
        value_and_slope(partial(rotated_curves, over="growth"), "both sides times", "the size")[0],
    ],
    "distribution": [distribution_value, distribution_push],
    "multibox": [mined, mined_boxes],
    "ranking": [ranked, ranked_in_time],
    "region": [mask_move, mask_growth, mask_push],
}


def panels_of(loss: Loss) -> list[Panel]:
    """The panels of a loss's family.

    Raises:
        ValueError: if its family is none of ours.
    """
    if loss.family not in PANELS:
        raise ValueError(f"There is no picture of a {type(loss).__name__}, as its family is {loss.family!r}.")
    return PANELS[loss.family]
