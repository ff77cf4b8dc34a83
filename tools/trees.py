"""Real photographs to try losses on: tree crowns seen from the air, in tiles, in YOLO and COCO layout.

Small, dense, overlapping objects of one class. The four photographs and their 951 boxes are part of the PyPI package
deepforest 2.1.0 (MIT licence, copyright 2019 Ben Weinstein, https://github.com/weecology/DeepForest), which is
downloaded (20 MB) and read as a zip, never installed or imported. Its licence goes into SOURCE.txt beside the tiles.

Training, validation and test have photographs of their own: two places in Yellowstone 13 km apart for the first two;
and for the third, the domain shift, one of a Florida forest and one of a Californian forest of dead trees.

The tiles of a photograph lie side by side, so no pixel is in two of them; at its right and lower edge they are filled
up with grey, and what is left there is left out if it is narrower than a quarter of a tile. A box that the edge of a
tile cuts is clipped and kept in each tile that has at least half its area.

Run it to build the set and print its folder.
"""

import argparse
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import numpy as np
from command import finish
from PIL import Image

from detloss_plugins.cli._common import RunError, UsageError, check_folder
from detloss_plugins.testing.digits import cache_folder, put, write_coco

VERSION = 1  # part of the folder's name: raise it when a line below changes the tiles
SIZE = 256
NARROWEST = 64  # a strip at the edge of a photograph that is narrower than this has no tile
GREY = (114, 114, 114)  # what Ultralytics and MMDetection pad images with
NAME = "Tree"
PACKAGE = "deepforest==2.1.0"
WHEEL = "deepforest-2.1.0-py3-none-any.whl"
SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
LICENCE = "deepforest-2.1.0.dist-info/licenses/LICENSE"
# The photographs of a split, by the names that their tiles begin with.
SPLITS = {
    "train": {"YELL-528000": "2019_YELL_2_528000_4978000_image_crop2"},
    "val": {"YELL-541000": "2019_YELL_2_541000_4977000_image_crop"},
    "test": {"OSBS": "OSBS_029", "SOAP": "SOAP_061"},
}
SOURCE = f"""The tiles in this folder are cut from photographs and boxes in the folder deepforest/data of
{PACKAGE} of the Python Package Index, which has this licence:

"""


def trees_dir():
    """The folder of the set, in ``$DETLOSS_PLUGINS_CACHE`` or ``~/.cache/detloss_plugins``; it may not exist yet."""
    return cache_folder() / f"trees-v{VERSION}"


def pip():
    """The words that start pip: this Python's own, that of uv, or that of the shell; ``RunError`` if there is none."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    if alone := shutil.which("pip"):
        return [alone]
    raise RunError(f"There is neither pip nor uv here to download {PACKAGE} with: give the file, --wheel {WHEEL}.")


def download(path):
    """Have pip fetch the wheel to ``path``, whole or not at all; ``RunError`` if it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [*pip(), "download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
        quiet = ["--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*command, *quiet, "-d", folder, PACKAGE], capture_output=True, text=True)
        if done.returncode or not Path(folder, WHEEL).exists():
            reason = (done.stderr.strip() or "it says nothing").splitlines()[-1]
            raise RunError(f"pip could not download {PACKAGE} ({reason}): give the file, --wheel {WHEEL}.")
        put(Path(folder, WHEEL), path)


def read_wheel(wheel=None):
    """The bytes of the wheel: of a file that the user has, or else from the cache, into which it is downloaded.

    ``UsageError`` if there is no such file, ``RunError`` if it is not the one that the set is made of.
    """
    path = cache_folder() / WHEEL if wheel is None else Path(wheel)
    if wheel is None and not path.exists():
        download(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise RunError(f"{path} is not the {WHEEL} of PyPI: delete it or give another.")
    return content


def photograph(wheel, name):
    """A photograph of an open wheel, ``(H, W, 3)`` uint8, and its boxes ``(n, 4)`` as x1, y1, x2, y2 in pixels."""
    image = Image.open(io.BytesIO(wheel.read(f"deepforest/data/{name}.png"))).convert("RGB")
    root = ElementTree.fromstring(wheel.read(f"deepforest/data/{name}.xml"))
    boxes = [[int(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")] for box in root.iter("bndbox")]
    return np.asarray(image), np.array(boxes).reshape(-1, 4)


def starts(length):
    """Where the tiles of a side of a photograph begin."""
    return range(0, length - NARROWEST + 1, SIZE)


def boxes_within(boxes, x, y):
    """The boxes ``(m, 4)`` of a tile whose corner is at ``x, y``, clipped to it and counted from there."""
    clipped = np.clip(boxes - [x, y, x, y], 0, SIZE)

    def area(of):
        return (of[:, 2] - of[:, 0]) * (of[:, 3] - of[:, 1])

    return clipped[2 * area(clipped) >= area(boxes)]


def tiles(photo, boxes):
    """Each tile of a photograph: its row and column, the image and its boxes, x1, y1, x2, y2 in pixels of the tile."""
    height, width = photo.shape[:2]
    for row, y in enumerate(starts(height)):
        for column, x in enumerate(starts(width)):
            tile = Image.new("RGB", (SIZE, SIZE), GREY)
            tile.paste(Image.fromarray(photo[y : y + SIZE, x : x + SIZE]))
            yield row, column, tile, boxes_within(boxes, x, y)


def label(box):
    """A line of a YOLO label file: the class, and centre and size in shares of the tile."""
    x1, y1, x2, y2 = (side / SIZE for side in box)
    return " ".join(["0", *(f"{value:.6f}" for value in ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1))]) + "\n"


def write_split(root, split, wheel):
    """Tiles and labels of one split, YOLO's and COCO's."""
    images, annotations = [], []
    for folder in ("images", "labels"):
        (root / folder / split).mkdir(parents=True)
    for short, name in SPLITS[split].items():
        for row, column, tile, boxes in tiles(*photograph(wheel, name)):
            file = f"{short}_{row}_{column}.png"
            tile.save(root / "images" / split / file)
            lines = "".join(label(box) for box in boxes)
            (root / "labels" / split / file).with_suffix(".txt").write_text(lines, encoding="utf-8")
            images.append({"id": len(images), "file_name": file, "width": SIZE, "height": SIZE})
            for x1, y1, x2, y2 in boxes.tolist():
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                annotations.append({"image_id": images[-1]["id"], "category_id": 0, **box, "iscrowd": 0})
    write_coco(root, split, images, annotations, [NAME])


def build_trees(root=None, wheel=None):
    """Write the set into a folder, that of the cache unless another is given, if it is not there; return the folder.

    ``wheel`` is the wheel's file where pip cannot fetch it. The folder holds ``trees.yaml`` (for Ultralytics),
    ``images/{train,val,test}``, ``labels/{train,val,test}``, ``annotations/{train,val,test}.json`` (COCO) and
    ``SOURCE.txt``. ``UsageError`` if the folder is something else, ``RunError`` if there is no wheel to be had.
    """
    root = (trees_dir() if root is None else Path(root)).absolute()
    if root.exists():
        if not (root / "trees.yaml").exists():
            raise UsageError(f"{root} is there and has no trees.yaml: give a folder that is not there yet.")
        return root
    check_folder(root)
    content = read_wheel(wheel)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as folder, zipfile.ZipFile(io.BytesIO(content)) as archive:
        new = Path(folder) / "trees"
        for split in SPLITS:
            write_split(new, split, archive)
        (new / "SOURCE.txt").write_text(SOURCE + archive.read(LICENCE).decode(), encoding="utf-8")
        splits = "".join(f"{split}: images/{split}\n" for split in SPLITS)
        (new / "trees.yaml").write_text(f"{splits}names:\n  0: {NAME}\n", encoding="utf-8")
        put(new, root)
    return root


def main(argv=None):
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where the set goes, if not into the cache")
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL}, where pip cannot fetch it")
    args = parser.parse_args(argv)
    return finish(lambda: print(build_trees(args.folder, args.wheel)))


if __name__ == "__main__":
    sys.exit(main())
