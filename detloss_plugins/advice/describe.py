"""What is in a data set, as far as a loss has to do with it."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from detloss_plugins.advice.labels import Labels

__all__ = ["CROWDED_IOU", "DEFAULT_SIZE", "TINY", "Description", "describe", "training_size"]

DEFAULT_SIZE = 640  # what Ultralytics trains at
SMALL, LARGE = 32**2, 96**2  # COCO's areas, in pixels
TINY = 16**2  # two by two cells of the finest level of most detectors, whose stride is 8
CROWDED_IOU = 0.3
OUTSIDE = 0.5  # pixels, as whole ones are rounded


@dataclass
class Description:
    """Figures of a data set. Areas and sizes are those at the training size; shares are of the objects.

    Attributes:
        size: the longer side of an image in training, in pixels.
        images, empty: how many there are, and how many of them have no object.
        counts: objects of each class, by its name.
        tiny, small, medium, large: shares with less than 16 x 16 pixels (part of the small ones), and by COCO's areas.
        thirds: the two sizes, square roots of areas, that divide the objects into three parts of equal number.
        shapes: width over height, at 5, 50 and 95 % of the objects.
        per_image: objects of an image, mean and most, of the images that have any.
        crowded: share of the objects that another one overlaps with an IoU above 0.3.
        degenerate, outside, duplicate: how many boxes have no width or height, reach out of the image by more than
            half a pixel, or have been labelled before in the same image and class.
        crowds: how many annotations stand for a crowd; they are left out of everything else.
    """

    size: int
    images: int
    empty: int
    counts: dict[str, int]
    tiny: float = 0.0
    small: float = 0.0
    medium: float = 0.0
    large: float = 0.0
    thirds: tuple[float, float] = (0.0, 0.0)
    shapes: tuple[float, float, float] = (1.0, 1.0, 1.0)
    per_image: tuple[float, int] = (0.0, 0)
    crowded: float = 0.0
    degenerate: int = 0
    outside: int = 0
    duplicate: int = 0
    crowds: int = 0
    without_objects: list[str] = field(default_factory=list)  # names of classes

    @property
    def objects(self) -> int:
        """How many there are."""
        return sum(self.counts.values())

    @property
    def imbalance(self) -> float:
        """Objects of the largest class over those of the smallest that has any; 1 without objects."""
        found = [count for count in self.counts.values() if count]
        return max(found) / min(found) if found else 1.0

    @property
    def faulty(self) -> float:
        """The share of boxes that are degenerate, outside or duplicates; one can be counted twice."""
        return (self.degenerate + self.outside + self.duplicate) / max(self.objects, 1)


def training_size(labels: Labels) -> int:
    """The longer side of an image in training if none is given: 640, or that of the largest image if it is less."""
    return int(min(DEFAULT_SIZE, labels.sizes.max()))


def overlapped(boxes: np.ndarray) -> int:
    """How many boxes of an image, ``(n, 4)``, another one overlaps with an IoU above 0.3."""
    x1, y1, x2, y2 = boxes.T
    width = np.minimum(x2[:, None], x2) - np.maximum(x1[:, None], x1)
    height = np.minimum(y2[:, None], y2) - np.maximum(y1[:, None], y1)
    common = width.clip(0) * height.clip(0)
    area = (x2 - x1).clip(0) * (y2 - y1).clip(0)
    iou = common / np.maximum(area[:, None] + area - common, 1e-9)
    np.fill_diagonal(iou, 0)
    return int((iou > CROWDED_IOU).any(1).sum())


def duplicates(labels: Labels) -> int:
    """How many boxes have been labelled before: the same image, class and sides to a hundredth of a pixel."""
    rows = np.column_stack([labels.image, labels.cls, labels.boxes.round(2)])
    return len(rows) - len(np.unique(rows, axis=0))


def describe(labels: Labels, size: int | None = None) -> Description:
    """The figures of some labels at a training size, by default that of :func:`training_size`.

    As in Ultralytics, an image is scaled until its longer side has the training size.
    """
    size = size or training_size(labels)
    per_image = np.bincount(labels.image, minlength=len(labels.sizes))
    per_class = np.bincount(labels.cls, minlength=len(labels.names))
    counts: Counter[str] = Counter()  # classes may share a name
    for name, count in zip(labels.names, per_class.tolist(), strict=True):
        counts[name] += count
    empty = [name for name, count in counts.items() if not count]
    found = Description(size, len(labels.sizes), int((per_image == 0).sum()), dict(counts), without_objects=empty)
    found.crowds = labels.crowds
    if not found.objects:
        return found
    x1, y1, x2, y2 = labels.boxes.T
    own = labels.sizes[labels.image]
    outside = np.minimum(x1, y1) < -OUTSIDE
    found.outside = int((outside | (x2 > own[:, 0] + OUTSIDE) | (y2 > own[:, 1] + OUTSIDE)).sum())
    sides = np.stack([x2 - x1, y2 - y1], 1).round(2)  # a YOLO file has no more
    whole = (sides > 0).all(1)
    found.degenerate, found.duplicate = int((~whole).sum()), duplicates(labels)
    found.per_image = float(per_image[per_image > 0].mean()), int(per_image.max())
    near = sum(overlapped(labels.boxes[labels.image == image]) for image in np.flatnonzero(per_image > 1))
    found.crowded = near / found.objects
    if whole.any():
        area = (sides.prod(1) * (size / own.max(1)) ** 2)[whole]
        found.tiny, found.small = float((area < TINY).mean()), float((area < SMALL).mean())
        found.large = float((area >= LARGE).mean())
        found.medium = 1 - found.small - found.large
        found.thirds = tuple(np.sqrt(np.quantile(area, [1 / 3, 2 / 3])).tolist())
        found.shapes = tuple(np.quantile(sides[whole, 0] / sides[whole, 1], [0.05, 0.5, 0.95]).tolist())
    return found
