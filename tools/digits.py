"""The embedded data set: scikit-learn's handwritten digits scattered over textured images, in YOLO and COCO layout.

It exists so that a detector can be trained on two cores in two minutes with nothing downloaded. The glyphs of the
training and the validation images are disjoint, and the same files come out on every machine. For Ultralytics' other
tasks it has turned digits with labels of four corners (obb), outlines of the ink (segment) and the ink's outermost
points as keypoints (pose). For MMRotate the turned digits have labels in DOTA's form too.

Run it to build the set and print its folder.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from command import cache_folder, put
from PIL import Image
from scipy.spatial import ConvexHull
from sklearn.datasets import load_digits

VERSION = 1  # part of the folder's name: raise it when a line below changes the images
SIZE = 128
IMAGES = {"train": 400, "val": 100}
NAMES = [str(digit) for digit in range(10)]
PREFIXES = {"detect": "", "obb": "oriented-", "segment": "segment-", "pose": "pose-"}  # of a task's folder


def digits_dir(task="detect"):
    """The folder of the set, in ``$DETLOSS_PLUGINS_CACHE`` or ``~/.cache/detloss_plugins``; it may not exist yet."""
    return cache_folder() / f"{PREFIXES[task]}digits-v{VERSION}"


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


def draw_image(rng, glyphs, digits, task="detect"):
    """One image, its objects as ``(class, x, y, w, h)`` in pixels, and the points ``(n, 2)`` of each."""
    image, objects, points = background(rng), [], []
    for _ in range(rng.integers(2, 7)):
        index = rng.integers(len(glyphs))
        height = int(np.exp(rng.uniform(np.log(16), np.log(64))))
        width = int(np.clip(height * np.exp(rng.uniform(-0.7, 0.3)), 8, 64))
        mask = glyph_mask(glyphs[index], width, height)
        if task == "obb":
            mask, own = turned(mask, rng.uniform(-85, 85))  # upside down, a 6 is a 9
            height, width = mask.shape
        else:
            own = ink(mask)
        for _ in range(20):
            x, y = int(rng.integers(0, SIZE - width + 1)), int(rng.integers(0, SIZE - height + 1))
            if overlap((x, y, width, height), [o[1:] for o in objects]) < 0.25:
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


def write_split(root, split, rng, glyphs, digits, task):
    """Images and labels of one split: YOLO's and, of the plain set, the COCO annotation file."""
    images, annotations = [], []
    for folder in ("images", "labels"):
        (root / folder / split).mkdir(parents=True)
    for number in range(IMAGES[split]):
        image, objects, points = draw_image(rng, glyphs, digits, task)
        image.save(root / "images" / split / f"{number:04d}.png")
        lines = [label(task, c, box, own) for (c, *box), own in zip(objects, points, strict=True)]
        (root / "labels" / split / f"{number:04d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        images.append({"id": number, "file_name": f"{number:04d}.png", "width": SIZE, "height": SIZE})
        annotations += [
            {"image_id": number, "category_id": c, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            for c, x, y, w, h in objects
        ]
    if task != "detect":
        return
    coco = {
        "images": images,
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"{split}.json").write_text(json.dumps(coco), encoding="utf-8")


def build_digits(task="detect"):
    """Write the set for a task of Ultralytics into the cache unless it is there; return its folder.

    The folder holds ``digits.yaml`` (for Ultralytics), ``images/{train,val}``, ``labels/{train,val}`` and, for
    "detect", ``annotations/{train,val}.json`` (COCO).
    """
    root = digits_dir(task)
    if root.exists():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    data = load_digits()
    is_val = np.arange(len(data.images)) % 5 == 0
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        new = Path(folder) / "digits"
        for seed, (split, chosen) in enumerate({"train": ~is_val, "val": is_val}.items()):
            write_split(new, split, np.random.default_rng(seed), data.images[chosen], data.target[chosen], task)
        names = "".join(f"  {i}: '{name}'\n" for i, name in enumerate(NAMES))
        keypoints = "kpt_shape: [4, 3]\nflip_idx: [0, 3, 2, 1]\n" if task == "pose" else ""
        (new / "digits.yaml").write_text(
            f"path: {root}\ntrain: images/train\nval: images/val\n{keypoints}names:\n{names}", encoding="utf-8"
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=PREFIXES, default="detect", help="the task of Ultralytics that it is for")
    print(build_digits(parser.parse_args().task))
