"""The embedded data set: scikit-learn's handwritten digits scattered over textured images, in YOLO and COCO layout.

It exists so that a detector can be trained on two cores in two minutes with nothing downloaded. The glyphs of the
training and the validation images are disjoint, and the same files come out on every machine.

Run it to build the set and print its folder.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

VERSION = 1  # part of the folder's name: raise it when a line below changes the images
SIZE = 128
IMAGES = {"train": 400, "val": 100}
NAMES = [str(digit) for digit in range(10)]


def digits_dir():
    """The folder of the set, in ``$DETLOSS_PLUGINS_CACHE`` or ``~/.cache/detloss_plugins``; it may not exist yet."""
    cache = os.environ.get("DETLOSS_PLUGINS_CACHE") or Path.home() / ".cache" / "detloss_plugins"
    return Path(cache) / f"digits-v{VERSION}"


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


def overlap(box, others):
    """The largest share of ``box``, or of another box, that the two have in common."""
    shares = [0.0]
    x, y, w, h = box
    for ox, oy, ow, oh in others:
        common = max(min(x + w, ox + ow) - max(x, ox), 0) * max(min(y + h, oy + oh) - max(y, oy), 0)
        shares.append(common / min(w * h, ow * oh))
    return max(shares)


def draw_image(rng, glyphs, digits):
    """One image and its objects as ``(class, x, y, w, h)`` in pixels."""
    image, objects = background(rng), []
    for _ in range(rng.integers(2, 7)):
        index = rng.integers(len(glyphs))
        height = int(np.exp(rng.uniform(np.log(16), np.log(64))))
        width = int(np.clip(height * np.exp(rng.uniform(-0.7, 0.3)), 8, 64))
        for _ in range(20):
            x, y = int(rng.integers(0, SIZE - width + 1)), int(rng.integers(0, SIZE - height + 1))
            if overlap((x, y, width, height), [o[1:] for o in objects]) < 0.25:
                break
        else:
            continue
        mask = glyph_mask(glyphs[index], width, height)[..., None]
        colour = rng.uniform(170, 255, 3)
        patch = image[y : y + height, x : x + width]
        image[y : y + height, x : x + width] = patch * (1 - mask) + colour * mask
        objects.append((int(digits[index]), x, y, width, height))
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)), objects


def write_split(root, split, rng, glyphs, digits):
    """Images, YOLO labels and the COCO annotation file of one split."""
    images, annotations = [], []
    for folder in ("images", "labels"):
        (root / folder / split).mkdir(parents=True)
    for number in range(IMAGES[split]):
        image, objects = draw_image(rng, glyphs, digits)
        image.save(root / "images" / split / f"{number:04d}.png")
        lines = [
            f"{c} {(x + w / 2) / SIZE:.6f} {(y + h / 2) / SIZE:.6f} {w / SIZE:.6f} {h / SIZE:.6f}"
            for c, x, y, w, h in objects
        ]
        (root / "labels" / split / f"{number:04d}.txt").write_text("\n".join(lines) + "\n")
        images.append({"id": number, "file_name": f"{number:04d}.png", "width": SIZE, "height": SIZE})
        annotations += [
            {"image_id": number, "category_id": c, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            for c, x, y, w, h in objects
        ]
    coco = {
        "images": images,
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"{split}.json").write_text(json.dumps(coco))


def build_digits():
    """Write the set into the cache unless it is there; return its folder.

    The folder holds ``digits.yaml`` (for Ultralytics), ``images/{train,val}``, ``labels/{train,val}`` and
    ``annotations/{train,val}.json`` (COCO).
    """
    root = digits_dir()
    if root.exists():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    data = load_digits()
    is_val = np.arange(len(data.images)) % 5 == 0
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        new = Path(folder) / "digits"
        for seed, (split, chosen) in enumerate({"train": ~is_val, "val": is_val}.items()):
            write_split(new, split, np.random.default_rng(seed), data.images[chosen], data.target[chosen])
        names = "".join(f"  {i}: '{name}'\n" for i, name in enumerate(NAMES))
        (new / "digits.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames:\n{names}")
        try:
            new.rename(root)  # whole or not at all, also when two processes build it at once
        except OSError:
            if not root.exists():
                raise
    return root


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(build_digits())
