"""What comes before the losses of a step, in few kernels: anchors, targets, decoded boxes and the assignment.

A device that runs asynchronously pays for every kernel that is launched and for every number that the host waits for,
and hardly for arithmetic. So nothing here has a shape that depends on the data, but for the padding of the targets.
"""

import copy
import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from ultralytics.utils.tal import TaskAlignedAssigner, make_anchors

from detloss_plugins.adapters.ultralytics import compat
from detloss_plugins.loss import Loss
from detloss_plugins.precision import float32, uncompiled, with_own_code, without_autocast

_compiled = {}  # what is equal for equal functions -> their compiled form, for the whole process
_failed = set()


def compiled(function, name, key):
    """A function compiled for all shapes, once for equal keys; the function where the compiler does not work."""

    def run(*args):
        return function(*args)

    def tried(*args):
        if key in _failed:
            return function(*args)
        try:
            return _compiled[key](*args)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            found = function(*args)  # if the arguments are at fault, this says it
            _failed.add(key)
            warnings.warn(uncompiled(name, error), stacklevel=2)
            return found

    if key not in _compiled:
        _compiled[key] = torch.compile(with_own_code(run), dynamic=True, fullgraph=True)
    return tried


def assign(stock, scores, boxes, points, labels, objects, valid):
    """The task-aligned assignment of a stock assigner: what it picks, by its own rules for candidates and overlaps.

    Args:
        stock: the assigner.
        scores, boxes: predicted class probabilities ``(B, A, C)`` and boxes ``(B, A, 4 or 5)``.
        points: of the anchors, ``(A, 2)``, in pixels as are all boxes.
        labels, objects, valid: classes ``(B, N, 1)``, boxes ``(B, N, 4 or 5)`` and mask ``(B, N, 1)`` of the objects.

    Returns:
        Of each anchor the class ``(B, A)``, box and class scores ``(B, A, C)`` that it should predict, whether it is
        positive ``(B, A)``, the index of its object ``(B, A)``, and the score of its class, 0 if it is not positive.
    """
    inside = stock.select_candidates_in_gts(points, objects, valid).bool() & valid.bool()
    pairs = torch.broadcast_tensors(objects.unsqueeze(2), boxes.unsqueeze(1))
    overlaps = stock.iou_calculation(*(x.reshape(-1, x.shape[-1]) for x in pairs)).view_as(inside)
    overlaps = torch.where(inside, overlaps, 0)
    of_class = labels.long().expand(-1, -1, scores.shape[1])
    metric = scores.transpose(1, 2).gather(1, of_class).pow(stock.alpha) * overlaps.pow(stock.beta)
    metric = torch.where(inside, metric, 0)

    picked = _of_largest(metric, stock.topk) & inside  # (B, N, A)
    best = torch.where(picked.sum(1) > 1, overlaps.argmax(1), picked.byte().argmax(1))  # of rivals, the largest overlap
    number = torch.arange(objects.shape[1], device=best.device).unsqueeze(-1)
    picked = (best.unsqueeze(1) == number) & picked.any(1, keepdim=True)
    if stock.topk2 != stock.topk:
        picked = picked & _of_largest(metric * picked, stock.topk2)
        best = picked.byte().argmax(1)
    positive = picked.any(1)

    # The score of an object's best anchor is its largest overlap; those of its others are smaller by their metric.
    largest_metric = (metric * picked).amax(-1, keepdim=True)
    largest_overlap = (overlaps * picked).amax(-1, keepdim=True)
    score = (metric * picked * largest_overlap / (largest_metric + stock.eps)).amax(1)  # (B, A)

    label = labels.squeeze(-1).long().gather(1, best).clamp(min=0)
    box = objects.gather(1, best.unsqueeze(-1).expand(-1, -1, objects.shape[-1]))
    classes = torch.arange(scores.shape[-1], device=best.device)
    target_scores = torch.where(label.unsqueeze(-1) == classes, score.unsqueeze(-1), 0)
    return label, box, target_scores, positive, best, score


def _of_largest(values, count):
    """A mask of the ``count`` largest of each row; of equal ones, those that the stock assigner's ``topk`` takes."""
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, values.topk(count, sorted=False).indices, True)


def fitting(stock):
    """A copy of a stock assigner, and what is equal for those that pick the same."""
    settings = {name: repr(getattr(stock, name)) for name in ("topk", "topk2", "alpha", "beta", "eps", "stride")}
    return copy.copy(stock), (type(stock), *settings.values())


class FastAssigner:
    """A stock assigner in a fraction of its kernels and without a wait, for criteria that call one.

    Args:
        stock: a ``TaskAlignedAssigner`` for aligned or rotated boxes, for which :func:`can_replace` holds.
    """

    def __init__(self, stock):
        self.stock, (copied, key) = stock, fitting(stock)
        self.fast = compiled(functools.partial(assign, copied), "The assigner", key)

    @torch.no_grad()
    def __call__(self, scores, boxes, points, labels, objects, valid):
        """See :func:`assign`."""
        inputs = scores, boxes, points, labels, objects, valid
        if not objects.shape[1]:
            return self.stock(*inputs)
        try:
            with without_autocast(scores.device):
                return self.fast(*inputs)[:5]
        except torch.cuda.OutOfMemoryError:
            return self.stock(*inputs)  # which goes image by image


def can_replace(assigner):
    """Whether :func:`assign` does what a stock assigner does: not for those of masks and keypoints of YOLO26."""
    same = ("forward", "_forward", "get_pos_mask", "get_box_metrics", "pair_overlaps", "select_topk_candidates")
    kind = type(assigner)
    return compat.OBJECTS_HAVE_MASK and all(
        getattr(kind, name, None) is getattr(TaskAlignedAssigner, name, None) for name in same
    )


def decode(bins, dist, places):
    """Boxes ``(..., 4)`` in pixels, float32, of what the head predicts, ``(..., 4 * bins)``; see :class:`Scene`."""
    sides = float32(dist)
    if bins > 1:
        share = sides.unflatten(-1, (4, bins)).softmax(-1)
        sides = (share * torch.arange(bins, dtype=share.dtype, device=share.device)).sum(-1)
    points, stride = places.unsqueeze(-2).split((2, 1), -1)
    corners = points + sides.unflatten(-1, (2, 2)) * _side_signs(sides.device)
    return (corners * stride).flatten(-2)


def _side_signs(device):
    """The sign of left and top, and of right and bottom; a product with it is in the kernel of what follows."""
    return 2 * torch.arange(2, device=device).unsqueeze(-1) - 1


def boxes_of(bins, dist, target, places, weight):
    """What a box loss compares, and its weight; see :class:`OfHead`."""
    return decode(bins, dist, places), target, weight


def sides_of(bins, dist, target, places, weight):
    """What a distribution loss compares, side by side, and its weight: a box counts as the mean of its four sides."""
    points, stride = places.unsqueeze(-2).split((2, 1), -1)
    sides = (target.unflatten(-1, (2, 2)) / stride - points) * _side_signs(target.device)
    distances = sides.flatten(-2).clamp(0, bins - 1 - 0.01)  # as the stock criterion clamps them
    return dist.unflatten(-1, (4, bins)), distances, (weight / 4).unsqueeze(-1).expand_as(distances)


class OfHead(Loss):
    """A loss on what the head predicts, ``(..., 4 * bins)``; the target is a tuple of boxes in pixels and places.

    What it compares, as ``inputs`` (:func:`boxes_of` or :func:`sides_of`) gives it, is worked out in its kernel.
    """

    def __init__(self, base, bins, inputs):
        super().__init__()
        self.base, self.bins, self.inputs, self.facts = base, bins, inputs, base.facts
        self.loss_weight, self.compiled, self.unchecked = base.loss_weight, base.compiled, 0

    def look(self, pred, target):
        """Nothing: the target is no user's."""

    def observe(self, pred, target, weight):
        if any(part.observes for part in self.base.modules() if isinstance(part, Loss)):
            return self.base.observe(*self.inputs(self.bins, pred.detach(), *target, weight))
        return self.base.observe(pred, target[0], weight)

    def weighted(self, pred, target, weight, seen):
        return self.base.weighted(*self.inputs(self.bins, pred, *target, weight), seen)

    def blueprint(self):
        return type(self), self.inputs, self.bins, self.base.blueprint()


def sum_of_head(loss, inputs, bins, dist, target, places, weight):
    """The sum of a loss on what the head predicts; see :class:`OfHead`, which does not call what sums up a loss."""
    if all(getattr(type(loss), name) is getattr(Loss, name) for name in ("forward", "reduced", "summed", "divisor")):
        return OfHead(loss, bins, inputs)(dist, (target, places), weight, reduction_override="sum")
    return loss(*inputs(bins, dist, target, places, weight), reduction_override="sum")


class Scene:
    """What the branches of a head share: all that follows from the last size of image, and the last batch's objects.

    Attributes:
        anchors: anchor points ``(A, 2)`` in stride units.
        strides: those of the anchors, ``(A, 1)``.
        places: both, ``(A, 3)``, in float32; :meth:`places_of` has them for each image.
        image_size: ``(height, width)`` in pixels.
    """

    def __init__(self):
        self.sizes = self.batch = self.repeated = None
        self.constants = {}

    @torch.inference_mode(False)  # as what is kept is also used in training
    def resize(self, features, strides):
        """Take the size of an image from its feature maps; ``strides`` is the head's."""
        sizes = features[0].dtype, features[0].device, *(x.shape[2:] for x in features)
        if sizes != self.sizes:
            self.sizes, self.batch, self.repeated = sizes, None, None
            self.anchors, self.strides = make_anchors(features, strides, 0.5)
            self.points = self.anchors * self.strides
            self.places = torch.cat([self.anchors, self.strides], 1).float()
            self.image_size = torch.tensor(features[0].shape[2:], device=strides.device) * strides[0]
            height, width = self.image_size.tolist()
            self.to_pixels = torch.tensor([1, width, height, width / 2, height / 2], device=strides.device)

    @torch.inference_mode(False)
    def places_of(self, images):
        """The places of a batch, ``(B, A, 3)``, made once."""
        if self.repeated is None or len(self.repeated) != images:
            self.repeated = self.places.repeat(images, 1, 1)
        return self.repeated

    @torch.inference_mode(False)
    def constant(self, *numbers):
        """Numbers as a tensor on the device, made once."""
        if numbers not in self.constants:
            self.constants = {numbers: torch.tensor(numbers, device=self.points.device)}
        return self.constants[numbers]

    def objects(self, batch, images):
        """The objects of a batch as :func:`padded` takes them.

        It waits once, for the largest number of objects in an image.
        """
        given = [batch[name] for name in ("batch_idx", "cls", "bboxes")]
        if self.batch is None or any(one is not other for one, other in zip(self.batch, given, strict=True)):
            of_image, classes, boxes = (x.to(self.points.device) for x in given)
            rows = torch.cat([classes.view(-1, 1), boxes], 1) * self.to_pixels
            if len(rows) < 2:  # sizes of 0 and 1 would be compiled for themselves
                rows = torch.cat([rows, rows.new_zeros(2, 5)])
            numbers = torch.arange(images + 1, device=rows.device, dtype=of_image.dtype)
            first = torch.searchsorted(of_image.view(-1), numbers)
            slots = torch.arange(max(int(first.diff().max()), 2), device=rows.device)
            self.found, self.batch = (rows, first, slots), given
        return self.found


def padded(rows, first, slots):
    """Classes ``(B, N, 1)``, corners ``(B, N, 4)`` in pixels and mask ``(B, N, 1)`` of the objects of a batch.

    Args:
        rows: class, center and half of the sides ``(M, 5)`` of each object, image by image.
        first: how many of them are before those of each image, ``(B + 1,)``.
        slots: numbers from 0, as many as the image with the most objects has, ``(N,)``.
    """
    index = first[:-1].unsqueeze(-1) + slots
    found = rows[index.clamp(max=len(rows) - 1)] * (index < first[1:].unsqueeze(-1)).unsqueeze(-1)
    label, center, half = found.split((1, 2, 2), -1)
    corners = torch.cat([center - half, center + half], -1)
    return label, corners, corners.sum(-1, keepdim=True) > 0  # the stock criterion's rule for what is an object


class Targets(NamedTuple):
    """What the anchors of a batch should predict."""

    boxes: Tensor  # (B, A, 4), in pixels
    scores: Tensor  # (B, A, C)
    positive: Tensor  # (B, A), a mask
    index: Tensor  # (B, A), of their objects
    weight: Tensor  # (B, A), the score of their objects' classes; 0 where they are not positive


def targets(stock, bins, scores, dist, places, *objects):
    """The :class:`Targets` of a batch.

    Args:
        stock: the assigner.
        bins: of the head.
        scores, dist: what it predicts, ``(B, A, C)`` and ``(B, A, 4 * bins)``.
        places: see :class:`Scene`.
        objects: see :func:`padded`.
    """
    points, strides = places.split((2, 1), -1)
    boxes = decode(bins, dist, places)
    return Targets(*assign(stock, float32(scores).sigmoid(), boxes, points * strides, *padded(*objects))[1:])


class FastTargets:
    """:func:`targets` of a stock assigner for which :func:`can_replace` holds, compiled."""

    def __init__(self, stock, bins):
        copied, key = fitting(stock)
        self.plain = functools.partial(targets, copied, bins)
        self.fast = compiled(self.plain, "The assigner", (bins, *key))

    @torch.no_grad()
    def __call__(self, scores, dist, places, rows, first, slots):
        """See :func:`targets`."""
        with without_autocast(scores.device):
            try:
                return self.fast(scores, dist, places, rows, first, slots)
            except torch.cuda.OutOfMemoryError:
                pass  # out of the handler, which holds on to what was there
            images = (slice(i, i + 1) for i in range(len(scores)))
            found = [self.plain(scores[i], dist[i], places, rows, first[i.start : i.stop + 1], slots) for i in images]
            return Targets(*map(torch.cat, zip(*found, strict=True)))
