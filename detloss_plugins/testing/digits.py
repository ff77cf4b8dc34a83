"""The embedded data set: scikit-learn's handwritten digits scattered over textured images, in YOLO and COCO layout.

It exists so that a detector can be trained on two cores in two minutes with nothing downloaded. The glyphs of the
training and the validation images are disjoint, and the same files come out on every machine. For Ultralytics' other
tasks it has turned digits with labels of four corners (obb), outlines of the ink (segment) and the ink's outermost
points as keypoints (pose). For MMRotate the turned digits have labels in DOTA's form too.

Detection has four scenarios more, to try what a loss claims to be for:

  long-tail  the training set has 100 times as many objects of class 0 as of class 9, the others in between; the
             validation set is the plain one
  small      digits of 8 to 16 pixels' height
  crowded    12 to 20 digits of 12 to 40 pixels, where there is place; boxes that share up to 0.35 of the smaller one
  noisy      the plain images; of the training labels, a fifth has another class, and every box has each of its sides
             moved by up to a fifth of its width or height; the labels of validation stay clean
"""

import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import ConvexHull
from sklearn.datasets import load_digits

VERSION = 1  # part of the folder's name: raise it when a line below changes the images
SIZE = 128
IMAGES = {"train": 400, "val": 100}
NAMES = [str(digit) for digit in range(10)]
PREFIXES = {"detect": "", "obb": "oriented-", "segment": "segment-", "pose": "pose-"}  # of a task's folder
# Of a training with Ultralytics: small images, few of them, glyphs that must not be mirrored; enough for one that
# works after 12 epochs.
DIGITS_ARGS = {
    "imgsz": 128,
    "epochs": 12,
    "batch": 16,
    "nbs": 16,
    "optimizer": "AdamW",
    "lr0": 0.002,
    "warmup_epochs": 1,
    "mosaic": 0.0,
    "fliplr": 0.0,
    "plots": False,
}


@dataclass(frozen=True)
class Scenario:
    """How images are drawn, and what is wrong with the labels. The defaults are the plain set."""

    objects: tuple = (2, 6)  # in an image, the fewest and the most; fewer where there is no place for one
    heights: tuple = (16, 64)  # of the glyphs, in pixels, as are the widths
    widths: tuple = (8, 64)
    shared: float = 0.25  # a box shares less than this with another, of the smaller of the two
    tail: int = 1  # as many times more objects of the first class than of the last
    moved: float = 0.0  # each side of each box by up to this share of the box's width or height
    flipped: float = 0.0  # the chance of an object to be labelled as another class

    def of(self, split):
        """The scenario as it is in a split: the tail and the faults of labels are for training alone."""
        return self if split == "train" else replace(self, tail=1, moved=0.0, flipped=0.0)


SCENARIOS = {
    "plain": Scenario(),
    "long-tail": Scenario(tail=100),
    "small": Scenario(heights=(8, 16), widths=(5, 16)),
    "crowded": Scenario(objects=(12, 20), heights=(12, 40), shared=0.35),
    "noisy": Scenario(moved=0.2, flipped=0.2),
}


def cache_folder():
    """The folder of the data sets that are built, ``$DETLOSS_PLUGINS_CACHE`` or ``~/.cache/detloss_plugins``."""
    return Path(os.environ.get("DETLOSS_PLUGINS_CACHE") or Path.home() / ".cache" / "detloss_plugins")


def made_cache():
    """The cache folder, made if need be; ``ValueError`` if nothing can be written there."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError as error:
        raise ValueError(
            f"Nothing can be written to {folder} ({error.strerror}): set DETLOSS_PLUGINS_CACHE to another folder."
        ) from error
    return folder


def put(new, place):
    """Rename a finished folder to ``place``, whole or not at all, also when two processes build it at once."""
    try:
        new.rename(place)
    except OSError:
        if not place.exists():
            raise


def digits_dir(task="detect", scenario="plain"):
    """The folder of the set, in ``$DETLOSS_PLUGINS_CACHE`` or ``~/.cache/detloss_plugins``; it may not exist yet."""
    prefix = PREFIXES[task] if scenario == "plain" else f"{scenario}-"
    return cache_folder() / f"{prefix}digits-v{VERSION}"


def background(rng):
    """A smooth random texture plus grain, ``(SIZE, SIZE, 3)`` floats."""
    coarse = rng.integers(30, 150, (6, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=float)
    return smooth + rng.normal(0, 12, (SIZE, SIZE, 1))


def glyph_mask(glyph, width, height):
    """An 8 x 8 glyph cut to its ink and stretched to ``height x width``, values 0 to 1."""
    rows, columns = np.where(glyph > 3)
    ink = glyph[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    image = Image.fromarray((ink * (255 / 16)).astype(np.uint8))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / 255


def turned(mask, degrees):
    """A mask turned counter-clockwise on a canvas that holds it, and its corners ``(4, 2)`` in pixels there."""
    image = Image.fromarray((mask * 255).astype(np.uint8)).rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    height, width = mask.shape
    sides = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2 * (width, height)
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.asarray(image, dtype=float) / 255, sides @ np.array([[cos, -sin], [sin, cos]]) + np.array(image.size) / 2


def overlap(box, others):
    """The largest share of ``box``, or of another box, that the two have in common."""
    shares = [0.0]
    x, y, w, h = box
    for ox, oy, ow, oh in others:
        common = max(min(x + w, ox + ow) - max(x, ox), 0) * max(min(y + h, oy + oh) - max(y, oy), 0)
        shares.append(common / min(w * h, ow * oh))
    return max(shares)


def ink(mask):
    """The outline of the ink of a mask, its convex hull, ``(n, 2)`` corners in pixels, n at least 3."""
    rows, columns = np.where(mask > 0.5 * mask.max())
    pixels = np.stack([columns, rows], 1)[:, None] + np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    points = pixels.reshape(-1, 2)
    return points[ConvexHull(points).vertices].astype(float)


def outermost(outline):
    """The topmost, rightmost, lowest and leftmost points of an outline, ``(4, 2)``."""
    x, y = outline.T
    return outline[[y.argmin(), x.argmax(), y.argmax(), x.argmin()]]


def drawn(rng, digits, tail):
    """Numbers of glyphs without end: each as likely as any other, or with a long tail of classes.

    With a tail, they come in shuffled decks that hold ``tail`` of the first class, 1 of the last, and of each class in
    between the same share of the one before.
    """
    counts = np.rint(np.geomspace(tail, 1, len(NAMES))).astype(int)
    while True:
        if tail == 1:
            yield rng.integers(len(digits))
        else:
            for digit in rng.permutation(np.repeat(np.arange(len(NAMES)), counts)):
                yield rng.choice(np.flatnonzero(digits == digit))


def draw_image(rng, glyphs, digits, indices, task="detect", scenario=SCENARIOS["plain"]):
    """One image, its objects as ``(class, x, y, w, h)`` in pixels, and the points ``(n, 2)`` of each.

    The glyphs are those whose numbers ``indices`` yields.
    """
    image, objects, points = background(rng), [], []
    fewest, most = scenario.objects
    for _ in range(rng.integers(fewest, most + 1)):
        index = next(indices)
        height = int(np.exp(rng.uniform(*np.log(scenario.heights))))
        width = int(np.clip(height * np.exp(rng.uniform(-0.7, 0.3)), *scenario.widths))
        mask = glyph_mask(glyphs[index], width, height)
        if task == "obb":
            mask, own = turned(mask, rng.uniform(-85, 85))  # upside down, a 6 is a 9
            height, width = mask.shape
        else:
            own = ink(mask)
        for _ in range(20):
            x, y = int(rng.integers(0, SIZE - width + 1)), int(rng.integers(0, SIZE - height + 1))
            if overlap((x, y, width, height), [o[1:] for o in objects]) < scenario.shared:
                break
        else:
            continue
        mask = mask[..., None]
        colour = rng.uniform(170, 255, 3)
        patch = image[y : y + height, x : x + width]
        image[y : y + height, x : x + width] = patch * (1 - mask) + colour * mask
        objects.append((int(digits[index]), x, y, width, height))
        points.append(own + np.array([x, y]))
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)), objects, points


def label(task, digit, box, points):
    """A line of a YOLO label file: the class and, in shares of the image, what the task wants to know."""
    x, y, w, h = box
    numbers = [x + w / 2, y + h / 2, w, h]
    if task in ("obb", "segment"):
        numbers = points.flat
    words = [f"{value / SIZE:.6f}" for value in numbers]
    if task == "pose":
        words += [f"{a / SIZE:.6f} {b / SIZE:.6f} 2" for a, b in outermost(points)]  # 2: visible
    return " ".join([str(digit), *words])


def spoiled(rng, digit, x, y, w, h, scenario):
    """An object with the faults that a scenario has in its labels; its box stays in the image, whole pixels."""
    if rng.random() < scenario.flipped:
        digit = (digit + int(rng.integers(1, len(NAMES)))) % len(NAMES)
    sides = np.array([x, y, x + w, y + h]) + rng.uniform(-scenario.moved, scenario.moved, 4) * [w, h, w, h]
    x1, y1, x2, y2 = np.clip(np.rint(sides), 0, SIZE).astype(int).tolist()
    return digit, x1, y1, x2 - x1, y2 - y1


def write_split(root, split, rng, glyphs, digits, task, scenario):
    """Images and labels of one split: YOLO's and, for detection, the COCO annotation file."""
    images, annotations = [], []
    faults = np.random.default_rng(2)  # of its own, as the images must not depend on what is wrong with the labels
    indices = drawn(rng, digits, scenario.tail)
    for folder in ("images", "labels"):
        (root / folder / split).mkdir(parents=True)
    for number in range(IMAGES[split]):
        image, objects, points = draw_image(rng, glyphs, digits, indices, task, scenario)
        if scenario.moved or scenario.flipped:
            objects = [spoiled(faults, *object_, scenario) for object_ in objects]
        image.save(root / "images" / split / f"{number:04d}.png")
        lines = [label(task, c, box, own) for (c, *box), own in zip(objects, points, strict=True)]
        (root / "labels" / split / f"{number:04d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        images.append({"id": number, "file_name": f"{number:04d}.png", "width": SIZE, "height": SIZE})
        annotations += [
            {"image_id": number, "category_id": c, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            for c, x, y, w, h in objects
        ]
    if task == "detect":
        write_coco(root, split, images, annotations, NAMES)


def write_coco(root, split, images, annotations, names):
    """The COCO file of a split: ``annotations`` have no numbers yet, ``names`` are those of the classes."""
    coco = {
        "images": images,
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"{split}.json").write_text(json.dumps(coco), encoding="utf-8")


def build_digits(task="detect", scenario="plain"):
    """Write the set for a task of Ultralytics into the cache unless it is there; return its folder.

    ``scenario`` is a key of ``SCENARIOS``; those but the plain one are for detection. ``ValueError`` for another task,
    or if nothing can be written to the cache.

    The folder holds ``digits.yaml`` (for Ultralytics), ``images/{train,val}``, ``labels/{train,val}`` and, for
    "detect", ``annotations/{train,val}.json`` (COCO).
    """
    if scenario != "plain" and task != "detect":
        raise ValueError(f"The scenario {scenario} is for detection, not for the task {task}.")
    root = digits_dir(task, scenario)
    if root.exists():
        return root
    made_cache()
    data = load_digits()
    is_val = np.arange(len(data.images)) % 5 == 0
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        new = Path(folder) / "digits"
        for seed, (split, chosen) in enumerate({"train": ~is_val, "val": is_val}.items()):
            rng, how = np.random.default_rng(seed), SCENARIOS[scenario].of(split)
            write_split(new, split, rng, data.images[chosen], data.target[chosen], task, how)
        names = "".join(f"  {i}: '{name}'\n" for i, name in enumerate(NAMES))
        keypoints = "kpt_shape: [4, 3]\nflip_idx: [0, 3, 2, 1]\n" if task == "pose" else ""
        (new / "digits.yaml").write_text(
            f"train: images/train\nval: images/val\n{keypoints}names:\n{names}", encoding="utf-8"
        )
        put(new, root)
    return root


def build_dota():
    """Write the turned digits into the cache unless they are there, with ``annfiles/{train,val}`` in DOTA's form.

    Returns their folder, that of ``build_digits("obb")``. A line is four corners in pixels, the class, and 0, not
    difficult.
    """
    root = build_digits("obb")
    if (root / "annfiles").exists():
        return root
    with tempfile.TemporaryDirectory(dir=root) as folder:
        for file in sorted((root / "labels").glob("*/*.txt")):
            new = Path(folder, "annfiles", file.parent.name, file.name)
            new.parent.mkdir(parents=True, exist_ok=True)
            objects = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
            corners = [" ".join(f"{float(share) * SIZE:.4f}" for share in shares) for _, *shares in objects]
            lines = [f"{four} {NAMES[int(words[0])]} 0\n" for four, words in zip(corners, objects, strict=True)]
            new.write_text("".join(lines), encoding="utf-8")
        put(Path(folder, "annfiles"), root / "annfiles")
    return root
