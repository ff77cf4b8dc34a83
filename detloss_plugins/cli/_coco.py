"""Data sets in COCO layout: where the images of a split are, and how a config of MMDetection is pointed at them."""

import json
import os
from pathlib import Path

from detloss_plugins.cli._common import UsageError, first_line


def coco_content(path):
    """The content of an annotation file in COCO's form; ``UsageError`` if it is none, or empty, or at odds."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        used = {annotation["category_id"] for annotation in content["annotations"]}
        known = {category["id"]: category["name"] for category in content["categories"]}
        named = [image["file_name"] for image in content["images"]]
    except (ValueError, KeyError, TypeError) as error:  # a broken file is a ValueError
        raise UsageError(
            f"{path} is no annotation file of COCO: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not named or not known:
        raise UsageError(f"{path} lists no {'categories' if named else 'images'}.")
    if strange := sorted(used - known.keys()):
        raise UsageError(f"{path} has objects of category {strange[0]}, which is none of its categories.")
    return content


def coco_split(folder, split):
    """Annotation file and image folder (both relative to ``folder``) of "train" or "val" in a COCO layout."""
    files = sorted(f for f in (folder / "annotations").glob("*.json") if split in f.stem)
    if len(files) > 1:  # COCO's own folder has captions and keypoints too
        files = [file for file in files if file.stem.startswith("instances")] or files
    if len(files) != 1:
        raise UsageError(f"{folder}/annotations must hold exactly one {split} .json, but holds {len(files)}.")
    first = coco_content(files[0])["images"][0]["file_name"]
    if Path(first).is_absolute() and Path(first).is_file():
        return files[0].relative_to(folder).as_posix(), ""
    others = {}  # a folder that is there by a link too counts once
    for prefix in prefixes(folder, first):
        if split in prefix:
            return files[0].relative_to(folder).as_posix(), prefix
        others.setdefault(os.path.realpath(folder / prefix), prefix)
    if len(others) != 1:
        where = f"in several folders, of which none has {split} in its name" if others else f"nowhere below {folder}"
        raise UsageError(f"{first} of {files[0]} is {where}.")
    return files[0].relative_to(folder).as_posix(), *others.values()


def prefixes(folder, name):
    """Of each place of a file below ``folder``, links followed, what of its path is before its name."""
    for place, folders, _ in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        # Not by a link to where it is itself.
        folders[:] = sorted(each for each in folders if not real.is_relative_to(Path(place, each).resolve()))
        if Path(place, name).is_file():
            prefix = Path(place).relative_to(folder).as_posix()
            yield "" if prefix == "." else f"{prefix}/"


def point_at(cfg, folder):
    """Make a detection config train and validate on a folder in COCO layout, with its classes."""
    if isinstance(folder, str):
        raise UsageError(f"MMDetection takes a folder in COCO layout, not an address: {folder}")
    folder = folder.resolve()
    splits = {split: coco_split(folder, split) for split in ("train", "val")}
    # CocoDataset numbers classes in the order of each file.
    classes, of_val = (
        [category["name"] for category in coco_content(folder / splits[split][0])["categories"]] for split in splits
    )
    if [name for name in of_val if name in classes] != classes:
        raise UsageError(
            f"{splits['val'][0]} lacks categories of {splits['train'][0]}, or has them in another order: they must be "
            "the same, in the same order."
        )
    for loader, split in (("train_dataloader", "train"), ("val_dataloader", "val"), ("test_dataloader", "val")):
        dataset = cfg[loader].dataset
        while "dataset" in dataset:  # RepeatDataset and its like
            dataset = dataset.dataset
        ann_file, prefix = splits[split]
        dataset.update(
            type="CocoDataset",
            data_root=f"{folder}/",
            ann_file=ann_file,
            data_prefix={"img": prefix},
            metainfo={"classes": tuple(classes)},
        )
    evaluators = cfg.val_evaluator, cfg.test_evaluator
    for evaluator in (part for parts in evaluators for part in (parts if isinstance(parts, list) else [parts])):
        evaluator.ann_file = str(folder / splits["val"][0])

    def set_classes(node):
        for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            set_classes(value)
        if isinstance(node, dict) and "num_classes" in node:
            node["num_classes"] = len(classes)

    set_classes(cfg.model)


def provide_data(cfg, folder):
    """Point a config at a folder in COCO layout or, for None, see to it that the digits are there if it is of them."""
    from detloss_plugins.testing.digits import build_digits, build_dota, digits_dir

    if folder is not None:
        point_at(cfg, folder)
    elif Path(cfg.get("data_root", "")) == digits_dir():
        build_digits()
    elif Path(cfg.get("data_root", "")) == digits_dir("obb"):
        build_dota()
