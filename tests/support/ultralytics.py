"""Small detectors of Ultralytics, batches for them, and criteria with our losses."""

import functools
import inspect

import pytest
import torch
import yaml
from ultralytics.cfg import get_cfg
from ultralytics.models.utils.loss import RTDETRDetectionLoss
from ultralytics.nn.tasks import (
    DetectionModel,
    OBBModel,
    PoseModel,
    RTDETRDetectionModel,
    SegmentationModel,
    yaml_model_load,
)
from ultralytics.utils import ROOT, __version__
from ultralytics.utils.checks import parse_version

from detloss_plugins.adapters.ultralytics import TRAINERS, install, model_task
from detloss_plugins.adapters.ultralytics.compat import E2ELoss
from detloss_plugins.testing import digits

# Of the models below, those that this version of Ultralytics has.
FILES = {path.stem for path in (ROOT / "cfg" / "models").rglob("*.yaml")}


def known(*names):
    """Those models whose files are there; the one of "yolov8n-obb" is ``yolov8-obb.yaml``."""
    return tuple(name for name in names if {name, name.replace("n", "", 1)} & FILES)


def older(version):
    """Whether the installed Ultralytics is older than this version."""
    return parse_version(__version__) < parse_version(version)


def since(version, why):
    """The mark of a test that needs this version of Ultralytics or a newer one."""
    return pytest.mark.skipif(older(version), reason=f"Ultralytics {__version__} is older than {version}: {why}")


MODELS = known("yolov8n", "yolo11n", "yolo26n", "yolov8n-obb", "yolo26n-obb")
# With those of the tasks whose boxes and classes have the same criterion.
TASK_MODELS = MODELS + known("yolov10n", "yolov8n-seg", "yolo26n-seg", "yolov8n-pose", "yolo26n-pose")
CLASSES = {
    "detect": DetectionModel,
    "obb": OBBModel,
    "segment": SegmentationModel,
    "pose": functools.partial(PoseModel, data_kpt_shape=(4, 3)),
    "rtdetr": RTDETRDetectionModel,
}
LOSSES = {"cls": {"type": "VarifocalLoss"}, "box": {"type": "EIoULoss"}}
ORIENTED = {"cls": {"type": "VarifocalLoss"}, "box": {"type": "KLDLoss"}}
FOR_RTDETR = {"loss_class": {"type": "VarifocalLoss"}, "loss_giou": {"type": "EIoULoss"}}
# What RT-DETR's stock losses are in ours; its varifocal loss has had other settings since it has them to choose.
CHOSEN = "gamma" in inspect.signature(RTDETRDetectionLoss).parameters
STOCK_RTDETR = {
    "loss_class": {"type": "VarifocalLoss"} | ({"alpha": 0.25, "gamma": 1.5} if CHOSEN else {}),
    "loss_bbox": {"type": "L1Loss"},
    "loss_giou": {"type": "GIoULoss"},
}
SETTINGS = {
    "imgsz": 64,
    "batch": 8,
    "nbs": 8,
    "device": "cpu",
    "plots": False,
    "verbose": False,
    "pretrained": False,
    "val": True,
    "optimizer": "SGD",
    "lr0": 1e-3,
}


# The items of a task's criterion, which are a tensor before Ultralytics 8.4.104.
ITEMS = {
    "detect": "box cls dfl",
    "obb": "box cls dfl angle",
    "segment": "box seg cls dfl sem",
    "pose": "box pose kobj cls dfl rle",
    "rtdetr": "giou cls l1",
}


# Run with the paths of checkpoints, where this package cannot be imported: load each and predict with it.
LOAD_WITHOUT_US = """
import sys
sys.modules["detloss_plugins"] = None
import torch
from ultralytics import RTDETR, YOLO
from ultralytics.nn.tasks import torch_safe_load
for path in sys.argv[1:]:
    if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # from torch 2.6 on
        torch_safe_load(path, safe_only=True)  # only the classes of Ultralytics' allow-list
    yolo = YOLO(path)
    yolo.predict(torch.rand(1, 3, 64, 64), verbose=False)
    print(type(yolo.model).__module__, yolo.model.detloss_plugins["losses"])
"""


class Interrupted(Exception):
    """A training that died."""


def interrupt(trainer):
    """A callback that ends a training after its first epoch."""
    if trainer.epoch == 0:
        raise Interrupted


def third(model):
    """The loss that the third slot's stock loss equals."""
    return {"type": "DistributionFocalLoss" if head(model).reg_max > 1 else "L1Loss"}


def head(model):
    return model.model[-1]


def task_of(name):
    endings = {"-obb": "obb", "-seg": "segment", "-pose": "pose", "-rtdetr": "rtdetr"}
    return next((task for ending, task in endings.items() if name.endswith(ending)), "detect")


def losses_for(name):
    return {"obb": ORIENTED, "rtdetr": FOR_RTDETR}.get(task_of(name), LOSSES)


def build_datasets(cache):
    """A digits set of 16 training and 8 validation images for each task."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "IMAGES", {"train": 16, "val": 8})
        patch.setenv("DETLOSS_PLUGINS_CACHE", str(cache))
        folders = {task: digits.build_digits(task) for task in digits.PREFIXES}
        return {task: str(folders.get(task, folders["detect"]) / "digits.yaml") for task in TRAINERS}


def real_batch(task, data, place):
    name = next(name for name in (*TASK_MODELS, "yolov8n-rtdetr") if task_of(name) == task)
    overrides = {**SETTINGS, "data": data, "model": f"{name}.yaml", "project": str(place)}
    trainer = TRAINERS[task](overrides=overrides)
    trainer.model = detector(name)
    loader = trainer.get_dataloader(trainer.data["train"], batch_size=8, rank=-1, mode="train")
    return trainer.preprocess_batch(next(iter(loader)))


def model_cfg(name):
    """The model's YAML as a dict; RT-DETR's real decoder with fewer channels, queries and layers."""
    cfg = yaml_model_load(f"{name}.yaml")
    if model_task(cfg) == "rtdetr":
        cfg["head"][-1][3] = ["nc", 64, 50, 4, 4, 2, 128]
    return cfg


def model_file(name, folder):
    """That YAML as a file."""
    path = folder / f"{name}.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in model_cfg(name).items() if key != "yaml_file"}), encoding="utf-8"
    )
    return str(path)


@functools.cache
def detector(name, classes=10):
    torch.manual_seed(0)
    model = CLASSES[task_of(name)](model_cfg(name), nc=classes, verbose=False).train()
    model.args, model.nc = get_cfg(), classes
    return model


def stock_criterion(model):
    return model.__class__.init_criterion(model)  # the stock class, also of a model with our losses


def named(items, model):
    """The items of a criterion as a dict."""
    if isinstance(items, dict):
        return items
    names = ITEMS[model_task(model)].split()
    if getattr(head(model), "reg_max", 0) == 1:
        names[names.index("dfl")] = "l1"
    return {f"{name}_loss": value for name, value in zip(names, items, strict=False)}


def called(criterion, model, batch):
    """Loss vector and items of a criterion for a batch."""
    loss, items = criterion(model(batch["img"]), batch)
    return loss, named(items, model)


def result(model, criterion, batch):
    """Loss vector, items and the gradient of every parameter."""
    loss, items = called(criterion, model, batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
    return loss.detach(), items, [g for g in gradients if g is not None]


def leaves(preds):
    """The predictions as leaves, and those that get a gradient."""
    if isinstance(preds, torch.Tensor):
        leaf = preds.detach().requires_grad_()
        return leaf, [leaf]
    if isinstance(preds, dict):
        pairs = {name: leaves(value) for name, value in preds.items()}
        return {name: made for name, (made, _) in pairs.items()}, [x for _, found in pairs.values() for x in found]
    return preds, []  # a list of features, of which only the sizes are read


def value_and_gradients(criterion, preds, batch):
    """Loss vector and the gradients of what a head predicts."""
    preds, inputs = leaves(preds)
    value, _ = criterion(preds, {**batch, "bboxes": batch["bboxes"].clone()})  # a new batch, as in each step
    return [value, *torch.autograd.grad(value.sum(), inputs, allow_unused=True)]


def branches(criterion):
    return [criterion.one2many, criterion.one2one] if isinstance(criterion, E2ELoss) else [criterion]


def ours(model, losses):
    install(model, losses)
    return model.init_criterion()


def loss_and_gradients(model, batch):
    """As :func:`result`, by ``model.loss``, as RT-DETR has to be, whose denoising queries are random."""
    torch.manual_seed(0)
    loss, items = model.loss(batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
    return loss.detach(), named(items, model), [g for g in gradients if g is not None]


def overlapping(monkeypatch):
    """Let every matched box of RT-DETR overlap its object a little: else the two varifocal losses differ.

    Ours counts a positive of quality 0 as a negative, theirs as nothing; the IoU of a box that barely touches is close
    enough to 0 for everything else.
    """
    from ultralytics.models.utils import loss

    iou = loss.bbox_iou
    monkeypatch.setattr(loss, "bbox_iou", lambda *a, **k: iou(*a, **k) if "GIoU" in k else iou(*a, **k).clamp(min=1e-6))


def assert_same(a, b, **tolerance):
    for x, y in zip((a[0], *a[1].values(), *a[2]), (b[0], *b[1].values(), *b[2]), strict=True):
        torch.testing.assert_close(x, y, **tolerance)
    assert list(a[1]) == list(b[1])


def in_slot(cls):
    """A loss as it is configured in the ``cls`` slot, where the number of classes is the model's."""
    return {"type": cls.__name__, **{key: value for key, value in cls.facts.example.items() if key != "num_classes"}}


def steps(model, criterion, batch, count):
    """The class loss of each of some steps on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values = []
    for _ in range(count):
        loss, items = called(criterion, model, batch)
        values.append(items["cls_loss"].item())
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return values


def wide(batch):
    """A batch with images of 64 x 96 pixels: in a square one, nothing tells height from width."""
    return {**batch, "img": torch.nn.functional.interpolate(batch["img"], (64, 96))}


def without_objects(batch):
    """A batch of images without objects: no boxes, keypoints or masks."""
    empty = {key: batch[key][:0] for key in ("batch_idx", "cls", "bboxes", "keypoints") if key in batch}
    return {**batch, **empty, **{key: batch[key] * 0 for key in ("masks", "sem_masks") if key in batch}}
