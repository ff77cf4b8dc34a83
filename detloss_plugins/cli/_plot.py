"""Pictures of losses, drawn from the registered classes alone: value and gradient over what suits the family.

``detloss show NAME --plot FILE`` and the gallery of the site draw with these functions. A picture is a few panels; a
panel is a function ``(axes, loss) -> None``. Colours and greys are those that can be read on white and on black.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detloss_plugins.loss import Loss
from detloss_plugins.losses import SeesawLoss, set_progress
from detloss_plugins.testing.samples import sample

GREY = "#80868f"
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "detloss_plugins",
    "font.sans-serif": ["DejaVu Sans"],  # an SVG repeats the whole list at every word
    "font.size": 8,
    "axes.titlesize": 8,
}
BATCHES = 300  # that a loss with a state has seen when its picture is drawn

Panel = Callable[[Any, Loss], None]
Curve = tuple[str, Tensor, Tensor, Tensor]  # label, x, value, slope


# What is drawn: numbers.


def ready(loss: Loss) -> Loss:
    """A copy in evaluation mode in float64; one with a state has seen some batches of its family's sample first."""
    loss = copy.deepcopy(loss)
    if any(True for _ in loss.buffers()) and not hasattr(loss, "at"):
        for seed in range(BATCHES):
            loss(*sample(loss, seed=seed % 10))
    return loss.eval()


def per_row(loss: Loss, pred: Tensor, target: Any) -> Tensor:
    """The losses of each row, ``(N,)``, summed over classes or coordinates."""
    found = loss(pred, target, reduction_override="none")
    return found.flatten(1).sum(1) if found.dim() > 1 else found


def curve(loss: Loss, label: str, x: Tensor, rows: Callable[[Tensor], tuple[Tensor, Any]]) -> Curve:
    """Value and slope of a loss over x, ``(N,)``; ``rows(x)`` gives pred and target, one row for each x."""
    x = x.double().requires_grad_()
    value = per_row(loss, *rows(x))
    (slope,) = torch.autograd.grad(value.sum(), x)
    return label, x.detach(), value.detach(), slope


def curve_in_a_batch(loss: Loss, label: str, x: Tensor, rows: Callable, others: tuple[Tensor, Tensor]) -> Curve:
    """As :func:`curve`, with each row in a batch of its own beside others, for a loss that looks at the batch."""
    found = []
    for one in x.double():
        one = one.reshape(1).requires_grad_()
        batch = (torch.cat([rest, row.to(rest.dtype)]) for rest, row in zip(others, rows(one), strict=True))
        value = per_row(loss, *batch)[-1]
        found.append((value.item(), torch.autograd.grad(value, one)[0].item()))
    values, slopes = torch.tensor(found, dtype=torch.float64).unbind(1)
    return label, x.double(), values, slopes


def looks_at_the_batch(loss: Loss) -> bool:
    """Whether the loss of a row depends on the rows beside it, in evaluation too."""
    parts = [part for part in loss.modules() if isinstance(part, Loss)]
    return any(part.observes for part in parts) or not all(part.facts.row_wise for part in parts)


def class_curves(loss: Loss) -> list[Curve]:
    """A class loss over the logit of a class, for targets and qualities."""
    if hasattr(loss, "num_classes"):
        return long_tail_curves(loss)
    if hasattr(loss, "at"):
        return scheduled_curves(loss)
    loss, x = ready(loss), torch.linspace(-6, 6, 121)
    if not getattr(loss, "use_sigmoid", True):

        def softmax(label):
            return lambda x: (torch.stack([x, 0 * x, 0 * x], -1), torch.full(x.shape, label))

        return [curve(loss, name, x, softmax(i)) for i, name in enumerate(("the label", "another class"))]
    run = curve
    if looks_at_the_batch(loss):
        x, run = x[::3], partial(curve_in_a_batch, others=dense_batch())
    activated = getattr(loss, "activated", False)  # what it takes is a probability

    def rows(x, t):
        return (x.sigmoid() if activated else x)[:, None], torch.full_like(x, t)[:, None]

    return [run(loss, f"target {t:g}", x, partial(rows, t=t)) for t in (1.0, 0.7, 0.3, 0.0)]


def dense_batch(count: int = 400) -> tuple[Tensor, Tensor]:
    """Logits and targets ``(count, 1)`` such as those of a dense detector: one positive in ten, with a quality."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    quality = 0.3 + 0.7 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    positive = torch.arange(count).unsqueeze(-1) % 10 == 0
    return torch.where(positive, 0.5, -3.0) + 1.5 * noise, torch.where(positive, quality, 0.0)


def scheduled_curves(loss: Loss) -> list[Curve]:
    """A scheduled loss before and after the first change."""
    found = []
    for now in (0, loss.at[0]):
        set_progress(loss, epoch=now)
        part = loss.losses[loss.running[-1]]
        found += [(f"epoch {now:g}, {label}", *rest) for label, *rest in class_curves(part) if label != "target 0.3"]
    return found


def long_tail_curves(loss: Loss) -> list[Curve]:
    """A loss for rare classes over the logit of a common and of a rare one, after a stream of long-tailed batches."""
    settings = {**loss.facts.example, **loss.settings, "num_classes": 3}
    loss, seesaw = type(loss)(**settings), isinstance(loss, SeesawLoss)
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.4, 0.1, 0.004, 0.496])  # the last is background
    for _ in range(BATCHES):
        label = torch.multinomial(shares, 512, replacement=True, generator=generator)
        dense = torch.nn.functional.one_hot(label, 4)[:, :3].float()
        logits = 3 * dense - 2 + torch.randn(512, 3, generator=generator)
        loss(*((torch.cat([logits, logits[:, :2]], 1), label) if seesaw else (logits, dense)))
    loss.eval()
    x, found = torch.linspace(-6, 6, 121), []

    def row(column, label):
        def rows(x):
            pred = x.new_full((len(x), 5 if seesaw else 3), -20.0)
            if seesaw:
                pred[:, label], pred[:, 3] = 0.0, 20.0  # surely an object
            pred = torch.cat([pred[:, :column], x[:, None], pred[:, column + 1 :]], 1)
            target = torch.full((len(x),), label)
            return pred, target if seesaw else torch.nn.functional.one_hot(target, 4)[:, :3].double()

        return rows

    if seesaw:
        cases = (("a rare class beside a common label", 2, 0), ("a common class beside a rare label", 0, 2))
    else:
        cases = [(f"{w} class, target {1 - b}", c, 3 * b or c) for w, c in (("common", 0), ("rare", 2)) for b in (0, 1)]
    for name, column, label in cases:
        found.append(curve(loss, name, x, row(column, label)))
    return found


def soft_label_curves(loss: Loss) -> list[Curve]:
    """A divergence over the logit of one of two classes."""

    def rows(x, share):
        target = torch.stack([torch.full_like(x, share), torch.full_like(x, 1 - share)], -1)
        target = target if getattr(loss, "target", "") == "distribution" else target.log()
        return torch.stack([x, 0 * x], -1), target

    shares, x = (0.99, 0.7, 0.5), torch.linspace(-6, 6, 121)
    return [curve(ready(loss), f"target {t:g}", x, partial(rows, share=t)) for t in shares]


def heatmap_curves(loss: Loss) -> list[Curve]:
    """A loss of heatmaps over the probability."""
    x, loss = torch.linspace(0.01, 0.99, 99), ready(loss)
    targets = (1.0, 0.9, 0.5, 0.0)
    return [
        curve(loss, f"target {t:g}", x, lambda x, t=t: (x[:, None], torch.full_like(x, t)[:, None])) for t in targets
    ]


def regression_curves(loss: Loss) -> list[Curve]:
    """A point-wise loss over the error."""
    loss, x = ready(loss), torch.linspace(-3, 3, 121)

    def rows(x):
        return x[:, None], torch.zeros_like(x)[:, None]

    if not looks_at_the_batch(loss):
        return [curve(loss, "", x, rows)]
    pred, target = sample(loss, 100, dtype=torch.float64)
    others = 0.5 * (pred - target).reshape(-1, 1), torch.zeros(pred.numel(), 1, dtype=torch.float64)
    return [curve_in_a_batch(loss, "", x, rows, others)]


def uncertainty_curves(loss: Loss, over: str) -> list[Curve]:
    """A loss with a predicted variance, over the ``"error"`` or the ``"log variance"``."""
    found, x = [], torch.linspace(-3, 3, 121)
    for fixed in (-1.0, 0.0, 1.0) if over == "error" else (0.2, 1.0, 2.0):
        moving = x.double().requires_grad_()
        other = torch.full_like(moving, fixed, requires_grad=True)
        error, log_variance = (moving, other) if over == "error" else (other, moving)
        value = loss(error, torch.zeros_like(error), log_variance, reduction_override="none")
        (slope,) = torch.autograd.grad(value.sum(), moving)
        name = "log variance" if over == "error" else "error"
        found.append((f"{name} {fixed:g}", x, value.detach(), slope))
    return found


def rotated_curves(loss: Loss, over: str) -> list[Curve]:
    """A loss of rotated boxes while one turns, moves along its long side or grows over another of its shape."""
    spans = {"turn": (-math.pi / 2, math.pi / 2), "move": (-150.0, 150.0), "growth": (0.2, 3.0)}
    zero = {"turn": 0.0, "move": 0.0, "growth": 1.0}

    def rows(x, ratio):
        change = {**zero, over: x}
        width, height = 60.0 * ratio**0.5, 60.0 / ratio**0.5
        at, size = 300.0 + change["move"], change["growth"]
        pred = [torch.zeros_like(x) + v for v in (at, 300.0, width * size, height * size, change["turn"])]
        target = [torch.full_like(x, v) for v in (300.0, 300.0, width, height, 0.0)]
        return torch.stack(pred, -1), torch.stack(target, -1)

    x = torch.linspace(*spans[over], 120)  # an even number: the kink in the middle is none of the points
    return [curve(ready(loss), f"sides {r:g} : 1", x, partial(rows, ratio=r)) for r in (1.0, 2.0, 4.0)]


TARGET = (300.0, 300.0, 60.0, 40.0)  # cx, cy, w, h of the target of the pictures, in pixels
SHAPE = (44.0, 48.0)  # of the prediction that moves


def box_losses(loss: Loss, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Losses ``(N,)`` and their gradient ``(N, 4)`` of boxes (cx, cy, w, h) beside the target."""
    boxes = boxes.double().requires_grad_()
    target = torch.tensor(TARGET, dtype=torch.float64).expand_as(boxes)
    value = per_row(loss, corners(boxes), corners(target))
    return value.detach(), torch.autograd.grad(value.sum(), boxes)[0]


def corners(boxes: Tensor) -> Tensor:
    """Boxes ``(..., 4)`` as centers and sides in corners."""
    center, sides = boxes.split(2, -1)
    return torch.cat([center - sides / 2, center + sides / 2], -1)


def plane(xs: Tensor, ys: Tensor, make: Callable[[Tensor, Tensor], Sequence[Any]]) -> Tensor:
    """Boxes for each point of a plane, ``(Y * X, 4)``; ``make(x, y)`` gives their columns."""
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    return torch.stack([torch.zeros_like(x) + column for column in make(x, y)], -1).reshape(-1, 4)


def moved(x, y):
    """A prediction of another shape whose center is x, y pixels from the target's."""
    return TARGET[0] + x, TARGET[1] + y, *SHAPE


def grown(x, y):
    """A prediction with sides x, y a little beside the target's center."""
    return TARGET[0] + 9.0, TARGET[1] + 6.0, x, y


def masks(offset: Tensor, side: Tensor, pixels: int = 24) -> Tensor:
    """Logits ``(N, pixels, pixels)`` of squares with soft edges, moved to the right by ``offset``."""
    place = torch.arange(pixels, dtype=torch.float64) + 0.5 - pixels / 2

    def inside(center):
        return side[:, None] / 2 - (place - center[:, None]).abs()

    rows, columns = inside(torch.zeros_like(offset)), inside(offset)
    return 4 * torch.minimum(rows[:, :, None], columns[:, None, :]).clamp(-1, 1)


def mask_curve(loss: Loss, over: str) -> Curve:
    """A loss of masks while the predicted square moves or grows over one of 10 pixels."""
    x = torch.linspace(0, 12, 61) if over == "move" else torch.linspace(2, 24, 67)

    def rows(x):
        ten, zero = torch.full_like(x, 10.0), torch.zeros_like(x)
        pred = masks(x, ten) if over == "move" else masks(zero, x)
        return pred, (masks(zero, ten) > 0).double()

    return curve(ready(loss), "", x, rows)


POSITIVES = ((1.5, 0.6), (0.2, 0.9), (-0.5, 0.3))  # scores and qualities of the ranking example
NEGATIVES = (1.0, 0.4, 0.1, -0.4, -2.0)


def ranking_example() -> tuple[Tensor, Tensor]:
    """Scores and targets of three positives and five negatives, which lie among one another."""
    scores = torch.tensor([score for score, _ in POSITIVES] + list(NEGATIVES), dtype=torch.float64)
    target = torch.tensor([quality for _, quality in POSITIVES] + [0.0] * len(NEGATIVES), dtype=torch.float64)
    return scores[:, None], target[:, None]


def pushes(loss: Loss, scores: Tensor, target: Tensor) -> Tensor:
    """What a step down the gradient adds to each score, ``(N,)``."""
    scores = scores.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(scores, target), scores)
    return -gradient.flatten()


# How it is drawn: panels.


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
    loss = ready(loss)
    fine, coarse = torch.linspace(*span, 25), torch.linspace(*span, 11)[1:-1]
    value, _ = box_losses(loss, plane(fine, fine, make))
    axes.contour(
        fine.numpy(), fine.numpy(), value.reshape(25, 25).numpy(), levels=9, cmap=_colours_of_levels(), linewidths=0.9
    )
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


def _colours_of_levels():
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("", [COLOURS[2], COLOURS[0], COLOURS[3]])


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


def figure(loss: Loss, title: str = "", more: Sequence[Panel] = ()) -> Any:
    """A matplotlib figure of a loss: the panels of its family, and more of them.

    Raises:
        ValueError: if its family is none of ours.
    """
    found = _figure(loss, [*panels_of(loss), *more], columns=2, size=(3.6, 2.7))
    if title:
        found.suptitle(title, color=GREY)
    return found


def panel_figures(loss: Loss, more: Sequence[Panel] = ()) -> Iterator[Any]:
    """The panels of :func:`figure`, each as a figure of its own."""
    for panel in (*panels_of(loss), *more):
        yield _figure(loss, [panel], columns=1, size=(3.6, 2.7))


def thumbnail(loss: Loss) -> Any:
    """The first panel alone, small and without words."""
    found = _figure(loss, panels_of(loss)[:1], columns=1, size=(1.9, 1.4))
    for axes in found.axes:
        axes.set(title="", xlabel="", ylabel="", xticks=[], yticks=[])
        if axes.get_legend():
            axes.get_legend().remove()
    return found


def _figure(loss, panels, columns, size):
    import matplotlib
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        found = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained", facecolor="none")
        grid = found.subplots(rows, columns, squeeze=False).flatten()
        for axes, panel in zip(grid, panels, strict=False):
            panel(axes, loss)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
    return found


def save(drawn: Any, path: Path) -> None:
    """Write a figure as SVG (small, and equal for equal figures) or whatever the suffix says.

    Raises:
        ValueError: for a suffix that matplotlib does not know.
    """
    import matplotlib

    path = Path(path)
    with matplotlib.rc_context(STYLE):
        if path.suffix != ".svg":
            drawn.savefig(path, dpi=150)
            return
        drawn.savefig(path, metadata={"Date": None})
    path.write_text(_smaller(path.read_text(encoding="utf-8")), encoding="utf-8")


def _smaller(svg):
    """An SVG of matplotlib's at half its size: a tenth of a point is enough, and it needs no comments and names."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<!DOCTYPE.*?>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\d+\.\d{2,}", lambda n: f"{float(n[0]):.1f}".removesuffix(".0"), svg)
    svg = re.sub(r'd="[^"C]*"', lambda path: re.sub(r"\s*L ", " ", path[0]), svg)  # lines follow a move unnamed
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w-]+)"', lambda name: name[0] if name[1] in used else "", svg)
    return re.sub(r"\s*\n\s*", lambda gap: "\n" if svg[gap.start() - 1] == ">" else " ", svg)
