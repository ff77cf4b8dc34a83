"""The embedded data set: the same everywhere, disjoint glyphs, two layouts that say the same."""

import hashlib
import json

import digits
import numpy as np
import pytest
from PIL import Image, ImageDraw


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small set, built twice in caches of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "IMAGES", {"train": 12, "val": 6})
        roots = []
        for name in ("first", "second"):
            patch.setenv("DETLOSS_PLUGINS_CACHE", str(tmp_path_factory.mktemp(name)))
            roots.append(digits.build_digits())
            assert digits.build_digits() == roots[-1]
        yield roots


def test_deterministic(small):
    def digest(root):
        files = sorted(f for f in root.rglob("*") if f.suffix in {".png", ".txt", ".json"})
        return hashlib.sha256(b"".join(str(f.relative_to(root)).encode() + f.read_bytes() for f in files)).hexdigest()

    assert digest(small[0]) == digest(small[1])


def test_nothing_half_written(small):
    assert [path.name for path in small[0].parent.iterdir()] == [f"digits-v{digits.VERSION}"]


def test_yolo_and_coco_agree(small):
    root = small[0]
    for split in ("train", "val"):
        coco = json.loads((root / "annotations" / f"{split}.json").read_text(encoding="utf-8"))
        assert len(coco["images"]) == digits.IMAGES[split]
        for image in coco["images"]:
            assert Image.open(root / "images" / split / image["file_name"]).size == (digits.SIZE, digits.SIZE)
            boxes = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
            label = (root / "labels" / split / image["file_name"]).with_suffix(".txt")
            lines = np.loadtxt(label, ndmin=2)
            assert len(lines) == len(boxes) >= 1
            for annotation, (c, x, y, w, h) in zip(boxes, lines, strict=True):
                assert annotation["category_id"] == c
                corner = np.array([x - w / 2, y - h / 2, w, h]) * digits.SIZE
                np.testing.assert_allclose(annotation["bbox"], corner, atol=1e-3)
                left, top, width, height = annotation["bbox"]
                assert left >= 0
                assert top >= 0
                assert left + width <= digits.SIZE
                assert top + height <= digits.SIZE


def test_train_and_validation_differ(small):
    images = {split: {p.read_bytes() for p in (small[0] / "images" / split).iterdir()} for split in ("train", "val")}
    assert not images["train"] & images["val"]


def test_oriented_labels_frame_the_ink(tmp_path, monkeypatch):
    """Four corners an object, of a rectangle that holds its ink: drawn on black, all the light is inside them."""
    monkeypatch.setattr(digits, "IMAGES", {"train": 6, "val": 2})
    monkeypatch.setattr(digits, "background", lambda rng: np.zeros((digits.SIZE, digits.SIZE, 3)))
    monkeypatch.setenv("DETLOSS_PLUGINS_CACHE", str(tmp_path))
    root = digits.build_digits("obb")
    assert root != digits.digits_dir()
    angles = []
    for number in range(6):
        light = np.asarray(Image.open(root / "images" / "train" / f"{number:04d}.png"), dtype=float).sum(-1)
        inside = Image.new("L", light.shape)
        for line in np.loadtxt(root / "labels" / "train" / f"{number:04d}.txt", ndmin=2):
            corners = line[1:].reshape(4, 2) * digits.SIZE
            along, down = corners[1] - corners[0], corners[2] - corners[1]
            # Labels are rounded to 1e-6 of the image: 1e-4 pixels on sides of 8 or more.
            assert abs(along @ down) < 1e-4 * np.linalg.norm(along) * np.linalg.norm(down)
            np.testing.assert_allclose(corners[3] - corners[0], down, atol=1e-3)
            assert 0 <= corners.min()
            assert corners.max() <= digits.SIZE
            angles.append(np.degrees(np.arctan2(*along[::-1])))
            ImageDraw.Draw(inside).polygon([tuple(corner) for corner in corners], fill=1)
        assert (light * (np.asarray(inside) == 0)).sum() < 0.02 * light.sum()
        assert np.asarray(inside).mean() < 0.7, "or everything is inside"
    assert min(angles) < -30
    assert max(angles) > 30


def test_dota_labels_are_the_corners_in_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "IMAGES", {"train": 4, "val": 2})
    monkeypatch.setenv("DETLOSS_PLUGINS_CACHE", str(tmp_path))
    root = digits.build_dota()
    assert digits.build_dota() == root == digits.digits_dir("obb")
    files = sorted((root / "labels").glob("*/*.txt"))
    assert len(files) == 6
    for file in files:
        objects = np.loadtxt(file, ndmin=2)
        lines = [
            line.split()
            for line in (root / "annfiles" / file.parent.name / file.name).read_text(encoding="utf-8").splitlines()
        ]
        assert len(lines) == len(objects) >= 1
        for (*corners, name, difficult), (c, *shares) in zip(lines, objects, strict=True):
            np.testing.assert_allclose(np.array(corners, dtype=float), np.array(shares) * digits.SIZE, atol=1e-3)
            assert (name, difficult) == (str(int(c)), "0")
