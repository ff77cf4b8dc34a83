"""The embedded data set: the same everywhere, disjoint glyphs, two layouts that say the same."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from detloss_plugins.testing import digits


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


def test_the_set_may_be_seen_under_another_path(small):
    assert "path" not in yaml.safe_load((small[0] / "digits.yaml").read_text(encoding="utf-8"))


def test_a_cache_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv("DETLOSS_PLUGINS_CACHE", "/dev/null/cache")
    with pytest.raises(ValueError, match=r"written to /dev/null/cache \(Not a directory\): set DETLOSS_PLUGINS_CACHE"):
        digits.build_digits()


def test_the_plain_set_is_what_it_was(small):
    """Its labels depend on every number that was drawn before them. Otherwise VERSION must be raised."""
    labels = "".join((small[0] / "labels" / "train" / f"{i:04d}.txt").read_text(encoding="utf-8") for i in range(12))
    assert hashlib.sha256(labels.encode()).hexdigest()[:16] == "49394ad3d26df8d0"


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """The folder of each scenario of a small set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "IMAGES", {"train": 70, "val": 10})
        patch.setenv("DETLOSS_PLUGINS_CACHE", str(tmp_path_factory.mktemp("scenarios")))
        return {scenario: digits.build_digits(scenario=scenario) for scenario in digits.SCENARIOS}


def objects(root, split="train"):
    """Image, class and box of each object of a split, from the COCO file, ``(n, 6)``."""
    annotations = json.loads((root / "annotations" / f"{split}.json").read_text(encoding="utf-8"))["annotations"]
    return np.array([[a["image_id"], a["category_id"], *a["bbox"]] for a in annotations])


def counts(root, split="train"):
    """How many objects an image has."""
    return np.bincount(objects(root, split)[:, 0].astype(int))


def images(root, split):
    return {file.name: file.read_bytes() for file in (root / "images" / split).iterdir()}


def test_scenarios_have_folders_of_their_own(scenarios):
    assert len({root.name for root in scenarios.values()}) == 5
    assert scenarios["plain"].name == f"digits-v{digits.VERSION}"
    with pytest.raises(ValueError, match="for detection"):
        digits.build_digits("obb", "small")


@pytest.mark.parametrize("scenario", digits.SCENARIOS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_layouts_of_scenarios_agree(scenarios, scenario, split):
    root = scenarios[scenario]
    ours = objects(root, split)
    assert len(images(root, split)) == {"train": 70, "val": 10}[split] == len(counts(root, split))
    for number in range(len(counts(root, split))):
        lines = np.loadtxt(root / "labels" / split / f"{number:04d}.txt", ndmin=2)
        own = ours[ours[:, 0] == number]
        np.testing.assert_array_equal(lines[:, 0], own[:, 1])
        np.testing.assert_allclose(digits.SIZE * lines[:, 3:], own[:, 4:], atol=1e-3)
        np.testing.assert_allclose(digits.SIZE * (lines[:, 1:3] - lines[:, 3:] / 2), own[:, 2:4], atol=1e-3)
    assert (ours[:, 2:4] >= 0).all()
    assert (ours[:, 4:] >= 1).all()
    assert (ours[:, 2:4] + ours[:, 4:] <= digits.SIZE).all()


def test_long_tail(scenarios):
    """A hundred of the first class for one of the last in training; validation is the plain one."""
    classes = np.arange(10).repeat(3)
    drawn = digits.drawn(np.random.default_rng(0), classes, digits.SCENARIOS["long-tail"].tail)
    numbers = [next(drawn) for _ in range(2500)]
    of_class = np.bincount(classes[numbers])
    assert (of_class[0], of_class[9]) == (1000, 10)
    np.testing.assert_allclose(of_class[1:] / of_class[:-1], 0.01 ** (1 / 9), atol=0.1)
    assert len(set(numbers)) == 30, "and all glyphs of a class"
    of_class = np.bincount(objects(scenarios["long-tail"])[:, 1].astype(int), minlength=10)
    assert (np.diff(of_class) < 0).all()
    assert of_class[0] / of_class.sum() == pytest.approx(0.4, abs=0.05)
    assert 1 <= of_class[9] <= 2, "of 280 objects"
    assert images(scenarios["long-tail"], "val") == images(scenarios["plain"], "val")
    np.testing.assert_array_equal(objects(scenarios["long-tail"], "val"), objects(scenarios["plain"], "val"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_small(scenarios, split):
    sizes = objects(scenarios["small"], split)[:, 4:]
    assert sizes.min() >= 5
    assert sizes.max() <= 16
    assert np.median(objects(scenarios["plain"], split)[:, 5]) > 2 * np.median(sizes[:, 1])
    assert counts(scenarios["small"], split).mean() == pytest.approx(4, abs=1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_crowded(scenarios, split):
    crowded, plain = counts(scenarios["crowded"], split), counts(scenarios["plain"], split)
    assert crowded.min() > plain.max() == 6
    assert crowded.max() <= 20
    assert crowded.mean() > 3.5 * plain.mean()

    def mean_overlaps(root):
        """With how many others an object shares a tenth of the smaller box or more."""
        ours = objects(root, split)
        by_image = [ours[ours[:, 0] == image, 2:] for image in np.unique(ours[:, 0])]
        shares = [digits.overlap(a, [b]) for own in by_image for a, b in itertools.combinations(own, 2)]
        assert max(shares) < 0.35
        return 2 * np.mean(np.array(shares) > 0.1) * len(shares) / len(ours)

    assert mean_overlaps(scenarios["crowded"]) > 1.5 * mean_overlaps(scenarios["plain"])


def test_noisy(scenarios):
    """A fifth of the classes is another, no side is further off than it may be; validation and images are plain."""
    noisy, plain = objects(scenarios["noisy"]), objects(scenarios["plain"])
    assert np.mean(noisy[:, 1] != plain[:, 1]) == pytest.approx(0.2, abs=0.05)
    off = [np.hstack([box[:, 2:4], box[:, 2:4] + box[:, 4:]]) for box in (noisy, plain)]
    off = np.abs(off[0] - off[1])
    assert (off <= 0.2 * np.tile(plain[:, 4:], 2) + 0.5).all(), "rounded to whole pixels"
    assert np.mean(off > 0.1 * np.tile(plain[:, 4:], 2)) == pytest.approx(0.5, abs=0.1)
    for split in ("train", "val"):
        assert images(scenarios["noisy"], split) == images(scenarios["plain"], split)
    np.testing.assert_array_equal(objects(scenarios["noisy"], "val"), objects(scenarios["plain"], "val"))


def test_a_flipped_class_is_any_other():
    rng, always = np.random.default_rng(0), digits.Scenario(flipped=1.0)
    classes = {digits.spoiled(rng, 3, 10, 20, 30, 40, always) for _ in range(200)}
    assert classes == {(digit, 10, 20, 30, 40) for digit in range(10) if digit != 3}


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
