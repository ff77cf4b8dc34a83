"""Value and gradient of a loss as curves, by what its family looks at, and a picture of them.

Class losses: over the score, for several targets. Box losses: while a box is moved and resized over its target, and
turned where boxes are rotated. Ranking losses: what each score of a small batch is pushed by. The curves need torch
only; the picture needs matplotlib.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detloss_plugins.loss import Loss

POINTS = 161


class Line(NamedTuple):
    """A curve: values and derivatives at some places."""

    x: Tensor
    value: Tensor | None  # None where a single place has no value of its own
    slope: Tensor


class Panel(NamedTuple):
    """Curves over one quantity."""

    over: str  # what x is
    slope_by: str  # what the slope is the derivative by
    lines: dict[str, Line]
    points: bool = False  # single places, not a curve


def panels(loss: Loss) -> list[Panel]:
    """The curves of a loss; it is taken as it is built, with a state that does not move.

    Raises:
        ValueError: if no curve makes sense for losses of its family.
    """
    family = loss.family
    if family not in _OF_FAMILY:
        raise ValueError(f"There is no picture of a {type(loss).__name__}, a {family} loss: draw what it is made of.")
    return _OF_FAMILY[family](loss.double().eval())


def along(loss: Loss, x: Tensor, pred: Callable[[Tensor], Tensor], target: Any, *more: Tensor) -> Line:
    """The loss of each row of ``pred(x)``, summed over what a row holds, and the derivative of their sum by x.

    All x are one call, so that a loss that looks at its batch takes the curve for one.
    """
    x = x.detach().double().requires_grad_()
    value = loss(pred(x), target, *more, reduction_override="none")
    value = value.flatten(1).sum(-1) if value.dim() > 1 else value
    (slope,) = torch.autograd.grad(value.sum(), x)
    return Line(x.detach(), value.detach(), slope)


def figure(loss: Loss, title: str = "") -> Any:
    """A matplotlib ``Figure``: a row of value and gradient for each panel, the value left out where there is none."""
    from matplotlib.figure import Figure

    drawn = panels(loss)
    both = any(line.value is not None for panel in drawn for line in panel.lines.values())
    picture = Figure(figsize=(4.4 * (1 + both) + 0.6, 3.1 * len(drawn) + 0.5), layout="constrained")
    axes = picture.subplots(len(drawn), 1 + both, squeeze=False)
    for panel, row in zip(drawn, axes, strict=True):
        for axis, what in zip(row, ("value", "slope")[1 - both :], strict=True):
            for label, line in panel.lines.items():
                axis.plot(line.x, getattr(line, what), "o" if panel.points else "-", label=label, markersize=4)
            axis.set_xlabel(panel.over)
            axis.set_ylabel("loss" if what == "value" else f"gradient by {panel.slope_by}")
            axis.grid(alpha=0.3)
        if len(panel.lines) > 1:
            row[0].legend(fontsize="small")
    picture.suptitle((title or repr(loss)) + ("\n(each curve is one batch)" if loss.observes else ""))
    return picture


def _scores() -> tuple[Tensor, Tensor]:
    """Scores in (0, 1), and their logits."""
    scores = torch.linspace(0.005, 0.995, POINTS, dtype=torch.float64)
    return scores, scores.logit()


def _over_score(lines: dict[str, Line], what: str = "score") -> Panel:
    """Lines that were worked out over logits, drawn over scores."""
    drawn = {label: line._replace(x=line.x.sigmoid()) for label, line in lines.items()}
    return Panel(what, "the logit", drawn)


def _of_classes(loss: Loss) -> list[Panel]:
    logits = _scores()[1]
    if not loss.use_sigmoid:
        # The first class against one other; what comes behind the classes is objectness.
        classes = getattr(loss, "num_classes", 2)
        rest = [torch.full((POINTS,), score, dtype=torch.float64) for score in _rest_of_softmax(loss, classes)]
        lines = {
            f"its class is the {name}": along(
                loss, logits, lambda z: torch.stack([z, *rest], -1), torch.full((POINTS,), label)
            )
            for label, name in enumerate(("first", "other"))
        }
        return [_over_score(lines, "score of the first of two classes")]
    channels = getattr(loss, "num_classes", 1) + int(getattr(loss, "custom_cls_channels", False))
    activated = getattr(loss, "activated", False)

    def pred(z):
        z = z.sigmoid() if activated else z
        return torch.cat([z.unsqueeze(-1), z.new_full((POINTS, channels - 1), 0.01 if activated else -4.6)], -1)

    def target(quality):
        dense = torch.zeros(POINTS, channels, dtype=torch.float64)
        dense[:, 0] = quality
        return dense

    return [_over_score({f"target {t:g}": along(loss, logits, pred, target(t)) for t in (0.0, 0.3, 0.7, 1.0)})]


def _rest_of_softmax(loss: Loss, classes: int) -> list[float]:
    objectness = [6.0, -6.0] if getattr(loss, "custom_cls_channels", False) else []
    return [0.0, *[-20.0] * (classes - 2), *objectness]


def _of_ranking(loss: Loss) -> list[Panel]:
    scores = torch.linspace(0.05, 0.95, 8, dtype=torch.float64), torch.linspace(0.02, 0.9, 40, dtype=torch.float64)
    logits = torch.cat(scores).logit()
    target = torch.cat([torch.linspace(0.9, 0.5, 8), torch.zeros(40)]).double()
    x = logits.requires_grad_()
    (slope,) = torch.autograd.grad(loss(x.unsqueeze(-1), target.unsqueeze(-1), reduction_override="sum"), x)
    kinds = {"8 positives": target > 0, "40 negatives": target == 0}
    lines = {label: Line(x.detach()[where].sigmoid(), None, slope[where]) for label, where in kinds.items()}
    return [Panel("score", "the logit", lines, points=True)]


def _of_heatmap(loss: Loss) -> list[Panel]:
    logits = _scores()[1]
    lines = {}
    for t in (0.0, 0.5, 0.9, 1.0):
        target = torch.full((POINTS, 1), t, dtype=torch.float64)
        lines[f"target {t:g}"] = along(loss, logits, lambda z: z.sigmoid().unsqueeze(-1), target)
    return [_over_score(lines)]


def _of_soft_label(loss: Loss) -> list[Panel]:
    logits = _scores()[1]
    lines = {}
    for share in (0.5, 0.8, 0.99):
        teacher = torch.tensor([share, 1 - share], dtype=torch.float64)
        # A teacher's logits, or its distribution at the loss's temperature.
        target = teacher if getattr(loss, "target", "") == "distribution" else teacher.log()
        lines[f"teacher {share:g}"] = along(
            loss, logits, lambda z: torch.stack([z, torch.zeros_like(z)], -1), target.expand(POINTS, 2)
        )
    return [_over_score(lines, "score of the first of two classes")]


def _of_bins(loss: Loss) -> list[Panel]:
    bins = torch.arange(16.0, dtype=torch.float64) if loss.bins is None else torch.tensor(loss.bins).double()
    low, high = float(bins[0]), float(bins[-1])
    x = torch.linspace(low, high, POINTS)
    width = (high - low) / 12
    lines = {}
    for share in (0.2, 0.5, 0.75):
        target = torch.full((POINTS,), low + share * (high - low), dtype=torch.float64)
        lines[f"target {target[0]:.3g}"] = along(
            loss, x, lambda x: -((bins - x.unsqueeze(-1)) / width).square() / 2, target
        )
    return [Panel("centre of the predicted distribution, in bins", "the centre", lines)]


def _of_error(loss: Loss) -> list[Panel]:
    x = torch.linspace(-3, 3, POINTS)
    target = torch.zeros(POINTS, 1, dtype=torch.float64)
    if loss.family != "uncertainty":
        sigmoid = getattr(loss, "use_sigmoid", False)
        over = "logit, for a target of 0" if sigmoid else "prediction - target"
        return [Panel(over, "the prediction", {"loss": along(loss, x, lambda x: x.unsqueeze(-1), target)})]
    lines = {}
    for variance in (0.25, 1.0, 4.0):
        log = torch.full_like(target, math.log(variance)).requires_grad_()
        lines[f"variance {variance:g}"] = along(loss, x, lambda x: x.unsqueeze(-1), target, log)
    return [Panel("prediction - target", "the prediction", lines)]


def _of_region(loss: Loss) -> list[Panel]:
    """An object of a quarter of the mask: one score for its pixels, another for the rest."""
    logits, target = _scores()[1], torch.zeros(POINTS, 8, 8, dtype=torch.float64)
    target[:, 2:6, 2:6] = 1
    lines = {}
    for outside in (0.05, 0.2, 0.5):

        def pred(z, outside=outside):
            score = torch.where(target > 0, z[:, None, None].sigmoid(), z.new_tensor(outside))
            return score if not getattr(loss, "activate", True) else score.logit()

        lines[f"score {outside:g} outside"] = along(loss, logits, pred, target)
    return [_over_score(lines, "score of the pixels of the object")]


SIDES = {"as large as the target": 1.0, "half its sides": 0.5, "twice its sides": 2.0}
SHAPES = {"at its place": 0.0, "moved by half a width": 0.5, "moved by 1.5 widths": 1.5}


def _of_boxes(loss: Loss) -> list[Panel]:
    """Over a target of 100 x 60 pixels."""
    rotated = loss.family == "rotated"

    def box(shift, factor, angle):
        """Boxes around (320, 320) moved by a shift in x, scaled by a factor, turned by an angle in degrees."""
        shift, factor, angle = (torch.as_tensor(v, dtype=torch.float64).expand(POINTS) for v in (shift, factor, angle))
        x, y, w, h = 320 + shift, torch.full_like(shift, 320), 100 * factor, 60 * factor
        if rotated:
            return torch.stack([x, y, w, h, torch.deg2rad(angle)], -1)
        return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)

    target, still = box(0, 1, 0), torch.linspace(-150, 150, POINTS)
    moved = {label: along(loss, still, lambda x, s=s: box(x, s, 0), target) for label, s in SIDES.items()}
    factors = torch.linspace(0.2, 3, POINTS)
    sized = {label: along(loss, factors, lambda s, x=x: box(100 * x, s, 0), target) for label, x in SHAPES.items()}
    found = [
        Panel("shift of the box in x, in pixels (target 100 x 60)", "the shift", moved),
        Panel("sides of the box, as multiples of the target's", "the multiple", sized),
    ]
    if rotated:
        angles = torch.linspace(-90, 90, POINTS)
        turned = {label: along(loss, angles, lambda a, s=s: box(0, s, a), target) for label, s in SIDES.items()}
        found.append(Panel("turn of the box, in degrees", "the angle", turned))
    return found


_OF_FAMILY: dict[str, Callable[[Loss], list[Panel]]] = {
    "box": _of_boxes,
    "classification": _of_classes,
    "distribution": _of_bins,
    "heatmap": _of_heatmap,
    "ranking": _of_ranking,
    "region": _of_region,
    "regression": _of_error,
    "rotated": _of_boxes,
    "soft label": _of_soft_label,
    "uncertainty": _of_error,
}
