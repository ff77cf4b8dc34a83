"""The loss of each image of a data set and of each of its boxes, worst first, to find bad labels with MMDetection."""

import collections
import contextlib
import copy
import csv
import functools
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import DATASETS
from mmdet.structures.bbox import get_box_tensor
from mmengine.dataset import pseudo_collate
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from detloss_plugins.nested import flatten

# In eval mode, mmdet's detectors and heads prepare for predictions: FCOS scales its boxes, DINO has no denoising. So do
# DDQ's decoder, which has other branches for dense queries in training, and TridentNet's backbone, which has but one.
_HEADS = ("detectors", "dense_heads", "roi_heads", "seg_heads")
_OTHERS = ("layers.transformer.ddq_detr_layers", "backbones.trident_resnet")
_STAY_IN_TRAINING = tuple(f"mmdet.models.{part}." for part in _HEADS + _OTHERS)


class PerImageLossHook(Hook):
    """Writes the loss of each image of the training, each as a batch of its own, worst first.

    In a config, ``custom_hooks=[dict(type="detloss_plugins.adapters.mmdetection.PerImageLossHook")]``. The work
    directory then has ``image_losses.csv``: image, number of objects, the sum of the losses and each of them. With
    ``boxes=True`` it has ``box_losses.csv`` too: image, place of the box in it, class, box and ``excess``, by how much
    the loss of the image falls if this box is left out of its labels; where a head hands ``avg_factor`` to a loss, that
    stays what it was. The detector learns to find what is labelled
    alike, so that a right label lowers the loss, and a wrong class, a wrong place or an object that is none raises it;
    until it has learnt the wrong ones by heart, so look before the end of a long training too.

    Nothing of the training is moved: the losses are those of a copy of the model, without gradients, with the running
    statistics of its batch norms and without dropout. The random numbers of an image (augmentation, sampling) are the
    same every time. Of several ranks, each looks at all images, as mmdet averages over ranks what it divides by.

    Args:
        interval: write the files every so many epochs, as ``image_losses_epoch_3.csv``; 0: after the training.
        boxes: whether to look at boxes, which takes another look at the image for each.
        dataset: config of the data set to look at, such as that of the training without augmentations; None: that of
            the training. Boxes are as its pipeline leaves them, but that a resize is undone if ``scale_factor`` is
            among what it packs.
    """

    def __init__(self, interval: int = 0, boxes: bool = False, dataset: dict | None = None) -> None:
        self.interval, self.boxes, self.dataset = interval, boxes, dataset

    def after_train_epoch(self, runner) -> None:
        """Write the files if it is their turn."""
        if self.every_n_epochs(runner, self.interval):
            self.write(runner, f"_epoch_{runner.epoch + 1}")

    def after_train(self, runner) -> None:
        """Write the files, if that is not done between the epochs."""
        if not self.interval:
            self.write(runner)

    def write(self, runner: Any, suffix: str = "") -> None:
        """Write the files, with that at the end of their names."""
        dataset = DATASETS.build(self.dataset) if self.dataset else runner.train_dataloader.dataset
        runner.logger.info(f"PerImageLossHook: looks at {len(dataset)} images")
        images, boxes = zip(*image_losses(runner.model, dataset, self.boxes), strict=True)
        tables = {f"image_losses{suffix}.csv": worst_first(images, "loss")}
        if self.boxes:
            tables[f"box_losses{suffix}.csv"] = worst_first(itertools.chain(*boxes), "excess")
        for name, rows in tables.items() if is_main_process() else ():
            _write_csv(Path(runner.work_dir) / name, rows)
            runner.logger.info(f"PerImageLossHook: {Path(runner.work_dir) / name}, the worst first")


def image_losses(model: torch.nn.Module, dataset: Any, boxes: bool = False) -> Iterator[tuple[dict, list[dict]]]:
    """For each image of a data set, a row of ``image_losses.csv`` and, if ``boxes``, the rows of ``box_losses.csv``.

    Args:
        model: a detector of mmdet; it is copied.
        dataset: gives what its data loader collates.
        boxes: whether to look at boxes.
    """
    model, factors, calls = _for_losses(model), {}, collections.Counter()
    model.register_forward_pre_hook(lambda *_: calls.clear())
    for module in model.modules():
        module.register_forward_pre_hook(functools.partial(_same_factor, factors, calls), with_kwargs=True)
    classes = dataset.metainfo.get("classes", ())
    for index in range(len(dataset)):
        with _random_numbers_of(index):
            data = model.data_preprocessor(pseudo_collate([dataset[index]]), True)
        (sample,) = data["data_samples"]
        objects = sample.gt_instances
        factors.clear()
        total, parts = _loss(model, data, index)
        image = {"image": sample.metainfo.get("img_path", index)}
        rows = []
        for box in range(len(objects)) if boxes else ():
            sample.gt_instances = objects[torch.arange(len(objects)) != box]
            without, _ = _loss(model, data, index)
            label = int(objects.labels[box])
            name = classes[label] if label < len(classes) else label
            rows.append({**image, "number": box, "class": name, "box": _box(sample, objects.bboxes[box])})
            rows[-1]["excess"] = total - without
        yield {**image, "objects": len(objects), "loss": total, **parts}, rows


def _for_losses(model):
    """A copy that gives the losses of training without moving anything."""
    model = model.module if is_model_wrapper(model) else model
    # CondInst's head keeps predictions of the last step, and no tensor with a past can be copied.
    kept = [x for module in model.modules() for x in flatten(vars(module))[0] if not x.is_leaf]
    model = copy.deepcopy(model, {id(x): x.detach() for x in kept}).eval()
    for module in model.modules():
        bases = (f"{base.__module__}." for base in type(module).__mro__)
        module.training = any(base.startswith(_STAY_IN_TRAINING) for base in bases)
    if hasattr(model.data_preprocessor, "batch_augments"):
        model.data_preprocessor.batch_augments = None  # which resize the batch
    return model


def _same_factor(factors, calls, module, args, kwargs):
    """What an image's losses are divided by stays when a box is left out: else the others would count for more.

    A loss may be called more than once with factors of their own, as DINO's are for the denoising queries.
    """
    if kwargs.get("avg_factor") is not None:
        calls[module] += 1
        kwargs["avg_factor"] = factors.setdefault((module, calls[module]), kwargs["avg_factor"])
    return args, kwargs


@torch.no_grad()
def _loss(model, data, index):
    """The sum of the losses of a batch, and ``{name: number}``."""
    with _random_numbers_of(index):
        total, parts = model.parse_losses(model(**data, mode="loss"))
    return total.item(), {name: value.item() for name, value in parts.items() if name != "loss"}


@contextlib.contextmanager
def _random_numbers_of(seed):
    """While the random numbers are those of a seed; afterwards they go on as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _box(sample, box):
    """The numbers of a box in one string."""
    box = get_box_tensor(box).detach().cpu().double().reshape(-1)
    box[:4] /= box.new_tensor(sample.metainfo.get("scale_factor", (1.0, 1.0))).repeat(2)
    return " ".join(f"{number:.1f}" for number in box.tolist())


def worst_first(rows, key):
    """Rows sorted by a number of theirs, largest first; what is not a number is worst."""
    return sorted(rows, key=lambda row: math.inf if math.isnan(row[key]) else row[key], reverse=True)


def _write_csv(path, rows):
    names = dict.fromkeys(itertools.chain(*rows))  # of all rows, as an image without objects may lack a loss
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
