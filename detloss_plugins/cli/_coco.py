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
        ann_file, prefix = splits[split]
        new = {"data_root": f"{folder}/", "ann_file": ann_file, "metainfo": {"classes": tuple(classes)}}
        if cfg.get(loader):
            _point_dataset_at(cfg[loader].dataset, new, prefix)
    for evaluator in (*evaluators(cfg, "val"), *evaluators(cfg, "test")):
        if type_name(evaluator) != "CocoMetric":
            raise UsageError(f"--data measures by CocoMetric, and the config by {type_name(evaluator)}.")
        evaluator.ann_file = str(folder / splits["val"][0])
    _set_classes(cfg.model, len(classes))


def _point_dataset_at(dataset, new, prefix):
    """Give a data set of a config, or that inside of RepeatDataset and its like, the ``new`` settings.

    Of a ConcatDataset, one stays of those that are the same then.
    """
    if "dataset" in dataset:
        _point_dataset_at(dataset.dataset, new, prefix)
    elif "datasets" in dataset:
        for part in dataset.datasets:
            _point_dataset_at(part, new, prefix)
        dataset.datasets = [part for i, part in enumerate(dataset.datasets) if part not in dataset.datasets[:i]]
    elif not _reads_coco(dataset.get("type")):
        raise UsageError(f"--data is for configs with CocoDataset, and this one has {type_name(dataset)}.")
    else:  # which may have a folder of segmentation maps too
        dataset.update(new, type="CocoDataset", data_prefix={**dataset.get("data_prefix", {}), "img": prefix})


def _reads_coco(kind):
    """Whether a type is CocoDataset or reads the same as it does."""
    from mmdet.datasets import CocoDataset, CocoPanopticDataset
    from mmdet.registry import DATASETS

    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    return isinstance(kind, type) and issubclass(kind, CocoDataset) and not issubclass(kind, CocoPanopticDataset)


def evaluators(cfg, split):
    """The metrics of "val" or "test" in a config."""
    found = cfg.get(f"{split}_evaluator")
    return found if isinstance(found, list) else [found] if found else []


def type_name(part):
    """The name of the type that a dict configures."""
    kind = part.get("type")
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def _set_classes(node, count):
    """Write the number of classes wherever a detector's config has it, but where it is that of the stuff."""
    if isinstance(node, list):
        for part in node:
            _set_classes(part, count)
    if not isinstance(node, dict):
        return
    before = node.get("num_classes", node.get("num_things_classes", 0) + node.get("num_stuff_classes", 0))
    for key, value in node.items():
        if key in ("num_classes", "num_things_classes"):
            node[key] = count
        elif key == "num_stuff_classes":
            node[key] = 0
        elif key != "semantic_head":
            _set_classes(value, count)
            if before and isinstance(value, dict) and isinstance(weights := value.get("class_weight"), list):
                value["class_weight"] = _weights_for(weights, before, count)


def _weights_for(weights, before, count):
    """The weights of so many classes, from those of as many as there were ``before``, and maybe of the background."""
    if count == before or len(weights) not in (before, before + 1):  # which are of the data already, or of neither
        return weights
    if len({*weights[:before]}) > 1:
        raise UsageError(
            f"class_weight has weights of {before} classes, and the data has {count}: give them in the config."
        )
    return weights[:1] * count + weights[before:]


def provide_data(cfg, folder):
    """Point a config at a folder in COCO layout or, for None, see to it that the digits are there if it is of them."""
    from detloss_plugins.testing.digits import build_digits, build_dota, digits_dir

    if folder is not None:
        point_at(cfg, folder)
        return
    try:
        if Path(cfg.get("data_root", "")) == digits_dir():
            build_digits()
        elif Path(cfg.get("data_root", "")) == digits_dir("obb"):
            build_dota()
    except ValueError as error:  # nothing can be written there
        raise UsageError(error) from error
