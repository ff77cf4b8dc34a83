"""What upstream packages compute otherwise than this one: found in the facts of the losses, and worked out anew.

``python tools/table.py`` writes it into docs/differences.md.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from detloss_plugins import losses
from detloss_plugins.facts import Upstream
from detloss_plugins.loss import Loss
from detloss_plugins.registry import registered_losses
from detloss_plugins.testing.parity import value_and_gradient
from detloss_plugins.testing.twins import in_words, load, twin_of

PACKAGES = {"mmdet": "MMDetection", "torchvision": "torchvision", "ultralytics": "Ultralytics", "torch": "PyTorch"}
ANYWHERE = {"box": ((0, 0, 2, 2), (1, 1, 4, 3)), "regression": ((0.5,), (0.0,))}  # of two that differ on any input


class Finding(NamedTuple):
    """One way in which a counterpart is another loss."""

    loss: str  # a class of ours
    path: str  # the counterpart's
    given: str  # the input, in words
    theirs: str  # what comes out there, and here
    ours: str
    why: str


def number(value: float | torch.Tensor) -> str:
    """A number in three digits, as it is written on a page."""
    value = float(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinity" if value > 0 else "-infinity"
    if abs(value) < 1e-6:
        return "0"
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def outcomes(both: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[str]:
    """What two losses of one row give: the values, and the gradients' largest elements where one is a thousand times
    the other or the values are the same."""
    values, slopes = ([number(v) for v in side] for side in ([v for v, _ in both], [g.abs().max() for _, g in both]))
    small, large = sorted(float(gradient.abs().max()) for _, gradient in both)
    steep = " with a gradient of {}" if values[0] == values[1] or large > 1000 * small else ""
    yield from (value + steep.format(slope) for value, slope in zip(values, slopes, strict=True))


def in_figures(row: torch.Tensor) -> str:
    """The numbers of one row; a single one without brackets."""
    words = ", ".join(f"{value:g}" for value in row.tolist())
    return words if len(row) == 1 else f"`({words})`"


def stated(cls: type[Loss], upstream: Upstream) -> Finding:
    """A difference that the facts of a loss state, on the input that they name."""
    loss, twin = cls.make(**upstream.ours), twin_of(upstream.path)
    pred, target = (torch.tensor([row], dtype=torch.float32) for row in upstream.at or ANYWHERE[cls.facts.family])
    call, given = twin.ready(upstream, loss, pred, target)
    none = {"reduction_override": "none"}
    both = [
        value_and_gradient(lambda p, t, **kwargs: call(p, t, kwargs), pred, given, none),
        value_and_gradient(copy.deepcopy(loss), pred, target, none),
    ]
    row, other = in_figures(pred[0]), in_figures(target[0])
    words = f"pred = target = {row}" if row == other else f"pred {row}, target {other}"
    settings = in_words(upstream.theirs)
    words += (f" (there {settings})" if settings else "") + ("" if upstream.at else ", and on any other")
    return Finding(cls.__name__, upstream.path, words, *outcomes(both), upstream.differs)


def half_boxes(found: Callable, ours: Callable) -> tuple[str, str]:
    """What both give for boxes in half precision whose area, 90,000, is beyond its range."""
    pred, target = (torch.tensor([(0, 0, 300, y)], dtype=torch.float16) for y in (300, 290))
    return number(found()(pred, target)), number(ours(pred, target))


def half_similarity(found: Callable, ours: Callable) -> tuple[str, str]:
    """The same for a perfect box and a function of the similarity."""
    box = torch.tensor([(0, 0, 300, 300)], dtype=torch.float16)
    return number(1 - found(box, box, xywh=False, CIoU=True)), number(ours(box, box))


def scores() -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits of one image of a YOLO at 640 px, and qualities: ten anchors are positives."""
    logits = torch.randn(1, 8400, 80, generator=torch.Generator().manual_seed(0))
    quality = torch.zeros_like(logits)
    quality[0, :10, 0] = 0.8
    return logits, quality


def varifocal_of_scores(found: Callable, ours: Callable) -> tuple[str, str]:
    """The sum over anchors and classes that a YOLO trains with."""
    logits, quality = scores()
    theirs = found()(logits, quality, (quality > 0).float())
    return number(theirs), number(ours(logits, quality, reduction_override="sum"))


def focal_of_scores(found: Callable, ours: Callable) -> tuple[str, str]:
    """The same for hard targets."""
    logits, quality = scores()
    target = (quality > 0).float()
    theirs = found(gamma=ours.gamma, alpha=ours.alpha)(logits, target)
    return number(theirs), number(ours(logits, target, reduction_override="sum"))


def last_bin(found: Callable, ours: Callable) -> tuple[str, str]:
    """A distance that lies on the last of 17 bins."""
    pred, target = torch.zeros(1, 17), torch.tensor([16.0])
    try:
        theirs = number(found()(pred, target))
    except IndexError:
        theirs = "an IndexError"
    return theirs, number(ours(pred, target))


def target_after(found: Callable, ours: Callable) -> tuple[str, str]:
    """What a target beyond the last of 16 bins is after the call."""
    theirs, mine = torch.tensor([[15.5]]), torch.tensor([15.5])
    found(16)(torch.zeros(1, 16), theirs)
    ours(torch.zeros(1, 16), mine)
    return f"the target is {number(theirs)} afterwards", f"it is {number(mine)}"


def shape_without_weight(found: Callable, ours: Callable) -> tuple[str, str]:
    """How many losses there are for three boxes of weight zero, without a reduction."""
    boxes, weight = torch.tensor([(0.0, 0, 1, 1)] * 3), torch.zeros(3)
    both = (loss(boxes, boxes + 1, weight=weight, reduction_override="none") for loss in (found(), ours))
    return tuple(f"shape {tuple(losses.shape)}" for losses in both)


def negative_label(found: Callable, ours: Callable) -> tuple[str, str]:
    """A row that is to be ignored."""
    logits, label = torch.zeros(1, 3), torch.tensor([-1])
    try:
        theirs = number(found(use_sigmoid=True)(logits, label))
    except RuntimeError as error:
        theirs = f'an error, "{str(error).splitlines()[0]}"'
    return theirs, number(ours(logits, label))


MMDET, ULTRALYTICS = "mmdet.models.losses.", "ultralytics.utils."
_OVERFLOW = "areas are worked out in half precision there, and overflow; here in float32"
_300 = "300 px boxes in float16, on a CPU"
_MEAN = "it averages over the anchors, where stock BCE is summed, and so is thousands of times too small in BCE's place"
_ANCHORS = "the scores of one image, 8400 anchors x 80 classes"
_ZERO, _SHORTCUT = "three boxes of weight 0 without a reduction", "its shortcut for weights of zero gives one number"
# What no settings and boxes can state: our loss, the counterpart, the input, why, and what gives both outcomes.
CASES = [
    *((losses.__dict__[name](), MMDET + name, _300, _OVERFLOW, half_boxes)
      for name in ("IoULoss", "GIoULoss", "DIoULoss", "CIoULoss", "SIoULoss")),
    (losses.ExtendedIoULoss(), MMDET + "EIoULoss", _300, _OVERFLOW, half_boxes),
    (losses.CIoULoss(), ULTRALYTICS + "metrics.bbox_iou", _300 + ", identical", _OVERFLOW, half_similarity),
    (losses.GIoULoss(), MMDET + "GIoULoss", _ZERO, _SHORTCUT, shape_without_weight),
    (losses.CIoULoss(), MMDET + "CIoULoss", _ZERO, _SHORTCUT, shape_without_weight),
    (losses.VarifocalLoss(), ULTRALYTICS + "loss.VarifocalLoss", _ANCHORS, _MEAN, varifocal_of_scores),
    (losses.FocalLoss(), ULTRALYTICS + "loss.FocalLoss", _ANCHORS, _MEAN, focal_of_scores),
    (losses.FocalLoss(), MMDET + "FocalLoss", "label -1, on a CPU", "it knows no rows to be ignored", negative_label),
    (losses.DistributionFocalLoss(), MMDET + "DistributionFocalLoss", "a target on the last bin, on a CPU",
     "the bin to its right is looked up although its weight is zero", last_bin),
    (losses.DistributionFocalLoss(), ULTRALYTICS + "loss.DFLoss", "a target beyond the last bin",
     "it is clamped in place, so the caller's tensor is another one", target_after),
]  # fmt: skip


def findings() -> list[Finding]:
    """Every difference, family by family.

    ``ModuleNotFoundError`` where a package is missing, ``AssertionError`` where a difference is none.
    """
    found = [stated(cls, u) for cls in registered_losses().values() for u in cls.facts.upstream if u.differs]
    for loss, path, given, why, run in CASES:
        counterpart = load(path)
        if counterpart is None:
            package = path.partition(".")[0]
            raise ModuleNotFoundError(f"{package} is not installed: uv run --all-groups", name=package)
        theirs, ours = run(counterpart, loss)
        found.append(Finding(type(loss).__name__, path, given, theirs, ours, why))
    for finding in found:
        assert finding.theirs != finding.ours, f"{finding.path}, given {finding.given}: both give {finding.ours}"
    order = sorted(registered_losses(), key=lambda name: registered_losses()[name].facts.family)
    return sorted(found, key=lambda finding: (order.index(finding.loss), finding.path.partition(".")[0]))


def sections() -> str:
    """The findings in Markdown, a section a loss."""
    lines, last = [], None
    for finding in findings():
        if finding.loss != last:
            lines += ["", f"### {finding.loss}", ""]
            last = finding.loss
        package, name = PACKAGES[finding.path.partition(".")[0]], finding.path.rpartition(".")[2]
        lines.append(
            f"- **{package}**, `{name}`, given {finding.given}: **{finding.theirs}**, here {finding.ours}. The reason: "
            f"{finding.why}."
        )
    return "\n".join([*lines, ""])


def agreement_rows() -> Iterator[tuple[str, str, str, str]]:
    """One row a counterpart that is the same loss: ours, the counterpart, and the settings of each side."""
    for name, cls in sorted(registered_losses().items(), key=lambda item: item[1].facts.family):
        for upstream in cls.facts.upstream:
            if not upstream.differs:
                both = (f"`{in_words(settings)}`" if settings else "" for settings in (upstream.ours, upstream.theirs))
                yield f"`{name}`", f"`{upstream.path}`", *both
