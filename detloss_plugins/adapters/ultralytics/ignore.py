"""Ignore regions: boxes of classes that are neither objects nor background, in training and in validation.

In training no anchor is assigned to such a box, those inside it that no object takes count as no negatives, and the
channel of its class has no loss. In validation neither such boxes nor what is detected in them count.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.models.yolo.obb import OBBValidator
from ultralytics.models.yolo.pose import PoseValidator
from ultralytics.models.yolo.segment import SegmentationValidator

from detloss_plugins.adapters.ultralytics import compat
from detloss_plugins.adapters.ultralytics.config import load_losses

VALIDATORS = {
    "detect": DetectionValidator,
    "segment": SegmentationValidator,
    "pose": PoseValidator,
    "obb": OBBValidator,
}


class UnknownClassError(ValueError):
    """A class that is to be ignored is none of the data set's."""


def ignored_classes(losses, names):
    """The indices of the classes that a losses dict ignores, in order; none without ``ignore``.

    Args:
        losses: see :func:`load_losses`.
        names: those of the classes, index -> name or a list.

    Raises:
        UnknownClassError: for a class that there is not.

    >>> ignored_classes({"ignore": {"classes": ["crowd", 0]}}, ["cat", "dog", "crowd"])
    [0, 2]
    """
    of_index = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
    of_name = {str(name): index for index, name in of_index.items()}
    found = {given: of_name.get(given, given) for given in losses.get("ignore", {}).get("classes", ())}
    for given, index in found.items():
        if index not in of_index:
            near = difflib.get_close_matches(str(given), of_name, 1, 0.5)
            hint = f"; the nearest name is {near[0]!r}" if near else ""
            raise UnknownClassError(f"The losses ignore a class {given!r}, which the data set has not{hint}.")
    return sorted(set(found.values()))


def lies_inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Which points ``(..., P, 2)`` lie inside which boxes ``(..., N, 4 or 5)``, a mask ``(..., N, P)``.

    Boxes are corners ``(x1, y1, x2, y2)`` or, with five values, ``(cx, cy, w, h, theta)``; all in one unit.

    >>> lies_inside(torch.tensor([[1.0, 1.0], [3.0, 1.0]]), torch.tensor([[0.0, 0.0, 2.0, 2.0]]))
    tensor([[ True, False]])
    """
    points, boxes = points.unsqueeze(-3), boxes.unsqueeze(-2)
    if boxes.shape[-1] == 4:
        low, high = boxes.chunk(2, -1)
        return ((points > low) & (points < high)).all(-1)
    center, sides, angle = boxes.split((2, 2, 1), -1)
    (x, y), cos, sin = (points - center).split(1, -1), angle.cos(), angle.sin()
    in_axes = torch.cat([x * cos + y * sin, y * cos - x * sin], -1)
    return (in_axes.abs() < sides / 2).all(-1)


def share_inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """The share of each box's area that lies inside each region: ``(N, R)`` of ``(N, 4 or 5)`` and ``(R, 4 or 5)``.

    Boxes as in :func:`lies_inside`. That of rotated boxes is by 400 points spread over each, right to some hundredths.

    >>> share_inside(torch.tensor([[0.0, 0.0, 4.0, 1.0]]), torch.tensor([[1.0, 0.0, 9.0, 9.0]]))
    tensor([[0.7500]])
    """
    if boxes.shape[-1] == 4:
        low, high = torch.max(boxes[:, None, :2], regions[:, :2]), torch.min(boxes[:, None, 2:], regions[:, 2:])
        area = (boxes[:, 2:] - boxes[:, :2]).prod(-1, keepdim=True)
        return (high - low).clamp(min=0).prod(-1) / area.clamp(min=torch.finfo(boxes.dtype).tiny)
    center, sides, angle = boxes.unsqueeze(-2).split((2, 2, 1), -1)
    steps = (torch.arange(20, device=boxes.device) + 0.5) / 20 - 0.5
    x, y = (torch.cartesian_prod(steps, steps) * sides).split(1, -1)  # (N, 400, 1)
    points = center + torch.cat([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1)
    return lies_inside(points, regions).to(boxes.dtype).mean(-1)


class Regions:
    """Takes the place of an assigner, and then knows what the class loss leaves out.

    Args:
        assigner: one whose call has the arguments and results of the stock ones.
        classes: the indices of the ignored ones.
        count: number of classes.
        device: where it is called.
    """

    def __init__(self, assigner, classes, count, device):
        self.assigner, self.anchors = assigner, None
        self.ignored = torch.zeros(count, dtype=torch.bool, device=device)
        self.ignored[classes] = True

    @torch.no_grad()
    def __call__(self, scores, boxes, points, labels, objects, valid, **extra):
        """As the assigner, which gets no region as an object."""
        region = self.ignored[labels.long()]
        found = self.assigner(scores, boxes, points, labels, objects, valid * ~region, **extra)
        inside = (lies_inside(points, objects) & region & valid.bool()).any(1)
        self.anchors = inside & ~found[3].bool()
        return found

    def left_out(self):
        """What the class loss leaves out of the last call's scores, a mask ``(B, A, C)``."""
        return self.anchors.unsqueeze(-1) | self.ignored


class StockClassLoss:
    """The stock element-wise class loss, 0 and without a gradient in what the regions leave out."""

    def __init__(self, bce, regions):
        self.bce, self.regions = bce, regions

    def __call__(self, pred_scores, target_scores):
        return self.bce(pred_scores, target_scores).masked_fill(self.regions.left_out(), 0)


class _IgnoringValidator:
    """What a validator that ignores classes does otherwise than its stock class, which stands behind this one."""

    plugin_losses: Mapping
    regions = None  # of the image that is looked at

    def _is_ignored(self, classes):
        ignored = torch.tensor(ignored_classes(self.plugin_losses, self.names), device=classes.device)
        return torch.isin(classes.long(), ignored)

    def _prepare_batch(self, si, batch):
        """The objects of an image without the regions."""
        found = super()._prepare_batch(si, batch)
        region = self._is_ignored(found["cls"])
        self.regions = found["bboxes"][region]
        rows = {name: found[name][~region] for name in ("cls", "bboxes", "masks", "keypoints") if name in found}
        self.objects = {**found, **rows}
        return self.objects

    def _prepare_pred(self, pred):
        """The detections without those of an ignored class, and without those in a region that match no object.

        As COCO does with crowds, at an IoU of 0.5: half of a detection's area must lie inside one region.
        """
        found = self._rows(super()._prepare_pred(pred), ~self._is_ignored(pred["cls"]))
        if not len(self.regions) or not len(found["cls"]):
            return found
        matches = self._process_batch(found, self.objects).values()  # of boxes, and maybe masks or keypoints
        matched = sum(torch.as_tensor(of_kind).any(1) for of_kind in matches).bool().to(found["cls"].device)
        inside = share_inside(found["bboxes"], self.regions.to(found["bboxes"].dtype)).amax(1) >= self.iouv[0].item()
        return self._rows(found, matched | ~inside)

    @staticmethod
    def _rows(pred, kept):
        return {name: value[kept] for name, value in pred.items()}


def make_validator(losses: Mapping[str, Any] | str | Path, task: str = "detect", validator: type | None = None) -> type:
    """A validator class for ``YOLO(...).val(validator=...)`` that leaves out what the losses ignore.

    A trainer of :func:`make_trainer` uses one by itself.

    Args:
        losses: a dict or the path of a YAML file, see :func:`load_losses`; without ``ignore`` in it
            the stock class is returned.
        task: "detect", "segment", "pose" or "obb".
        validator: the class to start from, if not Ultralytics' own for the task.

    Raises:
        RuntimeError: if this version of Ultralytics is older than 8.3.200.
    """
    losses, base = load_losses(losses, task), validator or VALIDATORS[task]
    if not losses.get("ignore"):
        return base
    compat.require("ignore")
    return type(f"Ignoring{base.__name__}", (_IgnoringValidator, base), {"plugin_losses": losses})
