"""What the pictures of losses show, in numbers: values and slopes over what suits the family."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from detloss_plugins.loss import Loss, takes_probabilities
from detloss_plugins.losses import SeesawLoss, set_progress
from detloss_plugins.testing.samples import sample

BATCHES = 300  # that a loss with a state has seen when its picture is drawn

Curve = tuple[str, Tensor, Tensor, Tensor]  # label, x, value, slope


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
    activated = takes_probabilities(loss)

    def rows(x, t):
        return (x.sigmoid() if activated else x)[:, None], torch.full_like(x, t)[:, None]

    return [run(loss, f"target {t:g}", x, partial(rows, t=t)) for t in (1.0, 0.7, 0.3, 0.0)]


def dense_batch() -> tuple[Tensor, Tensor]:
    """Logits and targets ``(400, 1)`` such as those of a dense detector: one positive in ten, with a quality."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 1, generator=generator, dtype=torch.float64)
    quality = 0.3 + 0.7 * torch.rand(400, 1, generator=generator, dtype=torch.float64)
    positive = torch.arange(400).unsqueeze(-1) % 10 == 0
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


def masks(offset: Tensor, side: Tensor) -> Tensor:
    """Logits ``(N, 24, 24)`` of squares with soft edges, moved to the right by ``offset``."""
    place = torch.arange(24, dtype=torch.float64) + 0.5 - 12

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
