"""The labels of a data set as arrays: of YOLO's text files or of an annotation file in COCO's form."""

import contextlib
import glob
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

__all__ = ["Labels", "LabelsError", "read_labels"]

ORIENTATION, SIDEWAYS = 274, (5, 6, 7, 8)  # of a photograph's EXIF data
PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class LabelsError(ValueError):
    """What is wrong with a data set, in one sentence."""


@dataclass
class Labels:
    """The objects of some images.

    Attributes:
        names: of the classes, in the order of their numbers.
        sizes: ``(images, 2)`` width and height of each image in pixels.
        image: ``(n,)`` the image of each object.
        cls: ``(n,)`` the class of each object, an index of ``names``.
        boxes: ``(n, 4)`` x1, y1, x2, y2 in pixels, as they are labelled; an outline or a turned box has the box
            around it.
        crowds: how many annotations were left out because they stand for a crowd (COCO's ``iscrowd``).
        beside: the ``path`` of a data YAML that was taken from beside the file, where Ultralytics does not look for it:
            of a relative one it does in the working directory, then among its own data sets.
    """

    names: list[str]
    sizes: np.ndarray
    image: np.ndarray
    cls: np.ndarray
    boxes: np.ndarray
    crowds: int = 0
    beside: str | None = None


def read_labels(path: str | Path, split: str = "train") -> Labels:
    """The labels of a data set.

    Args:
        path: a data YAML of Ultralytics (labels for detect, segment, pose or obb) or an annotation file of COCO.
        split: "train", "val" or "test" of a data YAML; an annotation file is a split by itself.

    Raises:
        LabelsError: if it is none of these, or has no such split or no images.
    """
    path = Path(path)
    if path.suffix == ".json":
        labels = _of_coco(path)
    elif path.suffix in {".yaml", ".yml"}:
        labels = _of_yolo(path, split)
    else:
        raise LabelsError(f"{path} is neither a data YAML nor an annotation file (.json) in COCO's form.")
    if not len(labels.sizes):
        raise LabelsError(f"{path} has no images.")
    return labels


def _stacked(names, sizes, rows, **more) -> Labels:
    """Labels of rows of image, class and four sides of a box, and ``more`` of their attributes."""
    table = np.array(rows, dtype=float).reshape(-1, 6)
    image, cls = table[:, :2].astype(int).T
    return Labels(names, np.array(sizes, dtype=float).reshape(-1, 2), image, cls, table[:, 2:], **more)


def _of_coco(path: Path) -> Labels:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        classes = {category["id"]: number for number, category in enumerate(content["categories"])}
        images = {image["id"]: number for number, image in enumerate(content["images"])}
        sizes = [(image["width"], image["height"]) for image in content["images"]]
        kept = [one for one in content["annotations"] if not one.get("iscrowd")]
        rows = []
        for one in kept:
            x, y, w, h = one["bbox"]
            if not math.isfinite(x + y + w + h):
                raise ValueError(f"a bbox is {one['bbox']}")
            rows.append((images[one["image_id"]], classes[one["category_id"]], x, y, x + w, y + h))
        names = [str(category["name"]) for category in content["categories"]]
    except (OSError, ValueError, KeyError, TypeError) as error:  # a broken file is a ValueError
        raise LabelsError(f"{path} is no annotation file of COCO: {type(error).__name__}: {error}") from error
    return _stacked(names, sizes, rows, crowds=len(content["annotations"]) - len(kept))


def _of_yolo(path: Path, split: str) -> Labels:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LabelsError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or not data.get(split):
        raise LabelsError(f"{path} is no data YAML with a key {split}.")
    try:
        names = data["names"] if "names" in data else range(data.get("nc", 0))
        names = [names[number] for number in sorted(names)] if isinstance(names, dict) else names
        names = [str(name) for name in names]
    except TypeError as error:
        raise LabelsError(f"{path} has neither a list or dict of names nor their number, nc.") from error
    if not isinstance(data[split], str | list) or not all(isinstance(place, str) for place in data[split]):
        raise LabelsError(f"{path}: {split} is a folder, a file or a list of these, not {data[split]!r}.")
    sizes, rows = [], []
    for number, image in enumerate(_images(path, data, split)):
        try:
            with Image.open(image) as picture:  # reads the header only
                # Of a PNG without them, Pillow would read all pixels to look for EXIF data.
                exif = picture.getexif() if picture.format != "PNG" or "exif" in picture.info else {}
                turned = exif.get(ORIENTATION) in SIDEWAYS
                sizes.append(picture.size[::-1] if turned else picture.size)
        except OSError as error:
            raise LabelsError(f"{image} is no image that can be read: {error}") from error
        rows += [(number, *row) for row in _rows(_label_file(image), sizes[-1], "kpt_shape" in data, len(names))]
    root = data.get("path")
    beside = path.parent / (root or ".")
    elsewhere = root and beside.exists() and beside.resolve() != Path(root).resolve()
    return _stacked(names, sizes, rows, beside=root if elsewhere else None)


def _images(path: Path, data: dict, split: str) -> Iterator[Path]:
    """The images of a split: files of a folder, of a pattern, or those that a text file lists."""
    root = _root(path, data)
    places = data[split] if isinstance(data[split], list) else [data[split]]
    for place in (_place(root, place) for place in places):
        if place.is_dir():
            yield from sorted(file for file in place.rglob("*") if file.suffix.lower() in PICTURES)
        elif place.is_file():
            listed = _text(place).split("\n")
            yield from (place.parent / line.strip() for line in listed if line.strip())
        elif found := sorted(glob.glob(str(place), recursive=True)):
            yield from (Path(file) for file in found if Path(file).suffix.lower() in PICTURES)
        else:
            raise LabelsError(f"{place}, {split} of {path}, is not there.")


def _root(path: Path, data: dict) -> Path:
    """The folder of a data set: a relative one is beside the YAML file, here, or where Ultralytics keeps its own."""
    root = Path(data.get("path") or path.parent)
    for folder in (path.parent / root, root.absolute()):
        if folder.exists():
            return folder
    with contextlib.suppress(ImportError):
        from ultralytics.utils import DATASETS_DIR

        root = Path(DATASETS_DIR) / root
    return root.absolute()


def _place(root: Path, place: str) -> Path:
    """A split in its folder; Roboflow's exports begin with a "../" that Ultralytics leaves out too."""
    return root / place[3:] if place.startswith("../") and not (root / place).exists() else root / place


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise LabelsError(f"{file} cannot be read: {error}") from error


def _label_file(image: Path) -> Path:
    """The label file of an image: in the folder ``labels`` that stands where the last ``images`` of its path does."""
    parts = [*image.parts]
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def _rows(file: Path, size: tuple[int, int], pose: bool, classes: int) -> Iterator[tuple[float, ...]]:
    """Class and box in pixels of each line of a label file; none if there is no file."""
    if not file.exists():
        return
    width, height = size
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            label, *values = map(float, line.split())
        except ValueError as error:
            raise LabelsError(f"{file}, line {number} is no label: {line.strip()[:60]}") from error
        if not all(map(math.isfinite, values)):
            raise LabelsError(f"{file}, line {number} is no label: {line.strip()[:60]}")
        if not (label.is_integer() and 0 <= label < classes):
            raise LabelsError(f"{file}, line {number} has the class {label:g}, but the classes are 0 to {classes - 1}.")
        if len(values) == 4 or (pose and len(values) > 4):
            x, y, w, h = values[:4]
            sides = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        elif len(values) >= 6 and len(values) % 2 == 0:
            sides = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
        else:
            raise LabelsError(f"{file}, line {number} has {len(values)} numbers after the class: no box, no outline.")
        yield label, *(side * length for side, length in zip(sides, (width, height) * 2, strict=True))
