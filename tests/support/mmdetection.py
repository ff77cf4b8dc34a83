"""Small detectors of MMDetection, a batch for them, and runs of its trainer."""

import copy
import functools
import inspect
import json
import re
import sys
import uuid
from pathlib import Path

import mmdet.models
import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner, set_random_seed

from detloss_plugins.registry import MODELS, loss_class, registered_losses
from detloss_plugins.testing.digits import build_digits

CONFIG_DIR = Path(__file__).parents[2] / "configs" / "mmdetection"
DIGITS = CONFIG_DIR / "gfl_r18_fpn_digits.py"
TRAIN = Path(mmdet.__file__).parent / ".mim" / "tools" / "train.py"


def digits_batch():
    """Four real digits images, as the data loader gives them; the mask of an object is its box."""
    build_digits()
    options = Config.fromfile(DIGITS).train_dataloader
    batch = next(iter(Runner.build_dataloader({**options, "batch_size": 4}, seed=0)))
    for sample in batch["data_samples"]:
        left, top, right, bottom = sample.gt_instances.bboxes.tensor.round().int()[..., None, None].unbind(1)
        y, x = torch.arange(128).unsqueeze(1), torch.arange(128)
        inside = (left <= x) & (x < right) & (top <= y) & (y < bottom)
        sample.gt_instances.masks = BitmapMasks(inside.numpy().astype("uint8"), 128, 128)
    return batch


def dicts(node):
    """Every dict inside a config."""
    if isinstance(node, dict):
        yield node
        node = node.values()
    if not isinstance(node, str):
        for child in node:
            if isinstance(child, dict | list | tuple):
                yield from dicts(child)


def loss_dicts(cfg):
    """The dicts that configure a loss: ``loss_cls``, ``loss_bbox`` and so on, not the number ``loss_weight``.

    Mask R-CNN's ``loss_mask`` is mmdet's and stays so: its head hands over the masks of all classes.
    """
    items = [item for part in dicts(cfg.model) for item in part.items()]
    return [value for key, value in items if re.match("loss_(?!mask)", key) and isinstance(value, dict)]


SMALL = dict(in_channels=32, feat_channels=32, out_channels=32, fc_out_channels=32, stacked_convs=1, num_classes=10)
SMALL |= dict(conv_out_channels=32)  # of a mask head
# Of transformers; two layers, because the last one is a case of its own.
SMALL |= dict(feedforward_channels=32, num_layers=2, num_queries=20, num_dn_queries=10)


@functools.cache
def config(path):
    """A config file, read once: with its bases it takes a good part of a second."""
    return Config.fromfile(path)


def small(path):
    """The config with a body of a few channels and nothing to download; heads, assigners and losses are untouched."""
    return shrink(copy.deepcopy(config(path)))


def shrink(cfg):
    """A config made small, see above."""
    if cfg.model.backbone.type == "SSDVGG":  # it has one width, and needs images of 300 pixels
        digits = copy.deepcopy(config(CONFIG_DIR / "ssd_r18_digits.py")).model
        cfg.model.backbone, cfg.model.neck = digits.backbone, digits.neck
        for key in ("in_channels", "anchor_generator"):
            cfg.model.bbox_head[key] = digits.bbox_head[key]
    for part in dicts(cfg.model):
        for key, value in SMALL.items():
            if isinstance(part.get(key), int | list):  # YOLO's channels are lists, one number a level
                part[key] = value if isinstance(part[key], int) else [value] * len(part[key])
    cfg.model.backbone.update(depth=18, base_channels=8, frozen_stages=-1, norm_eval=False, init_cfg=None)
    cfg.model.backbone.update(style="pytorch", norm_cfg=dict(type="BN", requires_grad=True))
    channels = [8 * 2**stage for stage in cfg.model.backbone.out_indices]
    cfg.model.neck.in_channels = channels[::-1] if cfg.model.neck.type == "YOLOV3Neck" else channels
    if "decoder" in cfg.model:
        cfg.model.neck.out_channels = 256  # DINO's decoder works with this number only
    return cfg


def build(cfg):
    """The detector with weights of its own that depend on the seed only."""
    set_random_seed(0)
    model = MMDET_MODELS.build(cfg.model)
    model.init_weights()
    return model.train()


def backward(model, batch):
    """The loss dict of a batch, summed over levels, after the backward pass; the samplers are seeded."""
    set_random_seed(0)
    data = model.data_preprocessor(copy.deepcopy(batch), training=True)
    total, losses = model.parse_losses(model(**data, mode="loss"))
    total.backward()
    return losses


def branches(model):
    """The parameters of the last layers that predict classes and boxes; YOLOv3 has the same ones for both."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if "head" in name]
    for branch in ("cls", "reg"):
        # A transformer's have numbers: layers for classes, sequences that end with the fourth layer for boxes. So have
        # SSD's, a sequence a level.
        last = rf"[._]{branch}(_\w+)?\.\w+$|convs_pred|{branch}_(branches|convs\.\d+)\.\d+(\.4)?\.\w+$"
        found = [parameter for name, parameter in named if re.search(last, name)]
        assert found, branch
        yield from found


BOX_LOSSES = [cls for cls in registered_losses().values() if cls.facts.family == "box"]


def box_loss_cfg(loss):
    return dict(type=f"detloss_plugins.{loss.__name__}", **loss.facts.example)


def settings_of(cls, use_sigmoid):
    """What a config with ten classes writes for one form of a classification loss; None if it lacks that form."""
    activation = "sigmoid" if use_sigmoid else "softmax"
    wanted = {"use_sigmoid": use_sigmoid, "activation": activation, "num_classes": 10, "return_dict": True}
    accepted = inspect.signature(cls).parameters
    settings = {key: value for key, value in {**cls.facts.example, **wanted}.items() if key in accepted}
    try:
        return settings if cls(**settings).use_sigmoid == use_sigmoid else None
    except ValueError:
        return None


FORMS = [
    (name, use_sigmoid)
    for name, cls in MODELS.module_dict.items()
    for use_sigmoid in (True, False)
    if cls.facts.family == "classification" and settings_of(cls, use_sigmoid)
]


def twins(loss):
    """Our config and mmdet's for the same loss, by the facts on our class; ours twice if mmdet has no counterpart."""
    for upstream in loss_class(loss["type"]).facts.upstream:
        package, _, name = upstream.path.rpartition(".")
        if package != "mmdet.models.losses" or upstream.differs:
            continue
        accepted = inspect.signature(getattr(mmdet.models.losses, name)).parameters
        facts = {**upstream.ours, **upstream.theirs}
        if all(key in {"type", *accepted} and facts.get(key, loss[key]) == loss[key] for key in loss):
            return {**upstream.ours, **loss}, {**upstream.theirs, **loss, "type": f"mmdet.{name}"}
    return loss, loss


def twin_configs(path):
    """A small config with our losses and one with mmdet's."""
    ours, stock = small(path), small(path)
    for our_loss, stock_loss in zip(loss_dicts(ours), loss_dicts(stock), strict=True):
        new = twins(dict(our_loss))
        our_loss.update(new[0])
        stock_loss.update(new[1])
    return ours, stock


def scalars(work_dir):
    """What the run logged, one dict a line."""
    (file,) = work_dir.glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


class Interrupt(Hook):
    """Stops the run where its second epoch would begin; notes the epochs that began."""

    def __init__(self, at=None):
        self.at, self.began = at, []

    def before_train_epoch(self, runner):
        if runner.epoch == self.at:
            raise KeyboardInterrupt
        self.began.append((runner.epoch, runner.iter))


def run(work_dir, hook, **options):
    """Two epochs of two iterations on the digits set; returns the runner."""
    cfg = small(DIGITS)
    cfg.merge_from_dict({"train_cfg.max_epochs": 2, "train_dataloader.batch_size": 4})
    cfg.merge_from_dict({"train_dataloader.dataset.indices": 8, "val_dataloader.dataset.indices": 4})
    # mmengine knows runs by their second, and two in one would share what they have noted.
    name = {"work_dir": str(work_dir), "experiment_name": uuid.uuid4().hex}
    runner = Runner.from_cfg(Config({**cfg, **options, **name}))
    runner.register_hook(hook)
    try:
        runner.train()
    except KeyboardInterrupt:
        pass
    return runner


def stopped_and_resumed(folder, model=None):
    """A training that is stopped after the first of its two epochs and resumed ends as one that never was.

    Its checkpoint loads where this package is not, and its weights are returned, with the runner that was resumed.
    """
    build_digits()
    options = {} if model is None else {"model": model}
    run(folder / "whole", Interrupt(), **options)
    run(folder / "stopped", Interrupt(at=1), **options)
    paths = [folder / name / "epoch_2.pth" for name in ("whole", "stopped")]
    assert not paths[1].exists()
    hook = Interrupt()
    runner = run(folder / "stopped", hook, **options, resume=True)
    assert hook.began == [(1, 2)]
    assert (runner.epoch, runner.iter) == (2, 4)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.startswith("detloss_plugins")]:
            patch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError):
            import detloss_plugins  # noqa: F401
        whole, stopped = (torch.load(path, weights_only=False) for path in paths)
    for key in ("state_dict", "optimizer"):  # equal only if the moments of AdamW and the schedule came back too
        torch.testing.assert_close(stopped[key], whole[key], rtol=1e-4, atol=1e-6)
    return whole["state_dict"], runner


# Losses between coordinates.
REGRESSION = ["L1Loss", "SmoothL1Loss", "HuberLoss", "BalancedL1Loss", "MSELoss", "RMSELoss"]
