"""The hook that lists the loss of each image and box of a training, to find bad labels."""

import copy
import csv
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.registry import MODELS
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS
from mmengine.runner import Runner, set_random_seed
from support import mmdetection_detr
from support.mmdetection import CONFIG_DIR, DIGITS, Interrupt, build, run, small
from support.mmdetection_features import CLASSES, STRIDES, features, samples

from detloss_plugins.adapters.mmdetection import image_losses, per_image
from detloss_plugins.testing.digits import build_digits

pytestmark = pytest.mark.usefixtures("mmdet_scope")

HOOK = dict(type="detloss_plugins.adapters.mmdetection.PerImageLossHook")


@pytest.fixture(scope="module")
def dataset():
    """Three images of digits."""
    build_digits()
    cfg = copy.deepcopy(small(DIGITS).train_dataloader.dataset)
    return DATASETS.build({**cfg, "indices": 3})


def by_hand(model, dataset, index, keep, factors):
    """The losses of one image in training mode, but for the statistics of batch norms, with some of its boxes.

    ``factors``: what each loss is divided by, if it is there; it is put there otherwise.
    """
    model = copy.deepcopy(model).train()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
        if name.startswith("bbox_head.loss_"):
            module.forward = divided(module.forward, name, factors)
    data = model.data_preprocessor(pseudo_collate([dataset[index]]), True)
    data["data_samples"][0].gt_instances = data["data_samples"][0].gt_instances[keep]
    return model.parse_losses(model(**data, mode="loss"))[0].item()


def divided(forward, name, factors):
    """A loss that is divided by the same as before."""

    def call(*args, avg_factor, **kwargs):
        return forward(*args, avg_factor=factors.setdefault(name, avg_factor), **kwargs)

    return call


def moved(model):
    """With statistics of batch norms that a batch would change, and weights that are not alike."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@pytest.mark.parametrize("name", ["gfl_r18_fpn_digits", "fcos_r50_fpn_1x_coco", "vfnet_r50_fpn_1x_coco"])
def test_losses_are_those_of_training(name, dataset):
    """FCOS's and VFNet's heads give something else in eval mode."""
    cfg = small(CONFIG_DIR / f"{name}.py")
    cfg.model.bbox_head.norm_cfg = dict(type="GN", num_groups=8)  # the last level is a pixel
    model = moved(build(cfg))
    found = list(image_losses(model, dataset, boxes=True))
    assert len(found) == 3
    for index, (image, boxes) in enumerate(found):
        assert image["image"].endswith(f"{index:04}.png")
        factors = {}
        assert image["loss"] == pytest.approx(by_hand(model, dataset, index, slice(None), factors), rel=1e-5)
        assert image["loss"] == pytest.approx(sum(value for key, value in image.items() if key.startswith("loss_")))
        assert image["objects"] == len(boxes) == len(dataset.get_data_info(index)["instances"])
        without = by_hand(model, dataset, index, torch.arange(len(boxes)) != 1, factors)
        assert boxes[1]["excess"] == pytest.approx(image["loss"] - without, abs=1e-4)
        assert boxes[1]["excess"] != boxes[0]["excess"]
        truth = dataset.get_data_info(index)["instances"][1]
        assert boxes[1]["class"] == str(truth["bbox_label"])
        assert list(map(float, boxes[1]["box"].split())) == truth["bbox"]


def test_a_loss_that_is_called_with_several_factors(dataset):
    """DINO's are divided by the number of objects, and for the denoising queries by that of these."""
    model = mmdetection_detr.detector(mmdetection_detr.DINO)
    image, _ = next(image_losses(model, dataset))
    alone = per_image._for_losses(model)
    with per_image._random_numbers_of(0):
        data = alone.data_preprocessor(pseudo_collate([dataset[0]]), True)
    assert image["loss"] == pytest.approx(per_image._loss(alone, data, 0)[0], rel=1e-5)


def test_dropout_and_sampling_are_alike_and_random_numbers_go_on(dataset):
    cfg = small(CONFIG_DIR / "faster-rcnn_r50_fpn_1x_coco.py")
    cfg.model.train_cfg.rcnn.sampler.num = 16  # some of the regions, at random
    model = build(cfg)
    model.backbone.add_module("layer4", torch.nn.Sequential(model.backbone.layer4, torch.nn.Dropout(0.5)))
    losses = []
    for seed in (1, 2):
        set_random_seed(seed)
        losses.append([image["loss"] for image, _ in image_losses(model, dataset)])
        after = torch.rand(1), np.random.rand(), random.random()
        set_random_seed(seed)
        assert after == (torch.rand(1), np.random.rand(), random.random())
    assert losses[0] == losses[1]


def ghm():
    """A detector with a loss of mmdet that has a state, and moves it without gradients too."""
    model = small(CONFIG_DIR / "retinanet_r18_fpn_digits.py").model
    model.bbox_head.loss_cls = dict(type="mmdet.GHMC", use_sigmoid=True, momentum=0.75)
    return model


def rows(path):
    """Of a file of the hook, which has the worst first."""
    with path.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    column = "excess" if "excess" in found[0] else "loss"
    values = [float(row[column]) for row in found]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) > 1
    return found


def test_the_training_is_that_without_the_hook(tmp_path):
    """Weights, batch norms, the state of the loss and the order of the images."""
    build_digits()
    for name, hooks in (("with", [dict(HOOK, interval=1)]), ("without", [])):
        run(tmp_path / name, Interrupt(), model=ghm(), custom_hooks=hooks)
    states = (torch.load(tmp_path / name / "epoch_2.pth", weights_only=False) for name in ("with", "without"))
    found, expected = (state["state_dict"] for state in states)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    first, second = (rows(tmp_path / "with" / f"image_losses_epoch_{epoch}.csv") for epoch in (1, 2))
    assert len(first) == len(second) == 8
    assert first != second
    assert not list((tmp_path / "with").glob("box*"))


@pytest.mark.slow
def test_another_data_set_after_the_training(tmp_path):
    build_digits()
    cfg = small(DIGITS)
    other = {**cfg.val_dataloader.dataset, "indices": 2, "test_mode": False}
    hook = dict(HOOK, boxes=True, dataset={**other, "pipeline": cfg.train_dataloader.dataset.pipeline})
    run(tmp_path, Interrupt(at=1), custom_hooks=[hook])
    assert not list(tmp_path.glob("*.csv"))
    run(tmp_path, Interrupt(), custom_hooks=[hook], resume=True)
    images, boxes = (rows(tmp_path / f"{name}_losses.csv") for name in ("image", "box"))
    assert sorted(Path(row["image"]).parts[-2:] for row in images) == [("val", "0000.png"), ("val", "0001.png")]
    assert len(boxes) == sum(int(row["objects"]) for row in images)


def test_what_is_no_number_is_worst():
    losses = [{"loss": 1.0}, {"loss": float("nan")}, {"loss": 2.0}]
    assert [row["loss"] for row in per_image.worst_first(losses, "loss")[1:]] == [2.0, 1.0]


def test_boxes_are_in_pixels_of_the_file(dataset):
    """Where the pipeline says how it has resized the image."""
    twice = copy.copy(dataset)
    resize = dict(type="Resize", scale=(256, 256))
    pack = dict(type="PackDetInputs", meta_keys=("img_path", "ori_shape", "img_shape", "scale_factor"))
    load, annotations = small(DIGITS).train_dataloader.dataset.pipeline[:2]
    twice.pipeline = Compose([load, annotations, resize, pack])
    (_, boxes), *_ = image_losses(build(small(DIGITS)), twice, boxes=True)
    assert [float(number) for number in boxes[0]["box"].split()] == dataset.get_data_info(0)["instances"][0]["bbox"]


def test_boxes_of_a_type():
    """Which a pipeline gives where the data preprocessor has boxtype2tensor=False."""
    sample = SimpleNamespace(metainfo={"scale_factor": (2.0, 0.5)})
    for boxes in (HorizontalBoxes([[2.0, 1, 20, 6]]), torch.tensor([[2.0, 1, 20, 6]])):
        assert per_image._box(sample, boxes[0]) == "1.0 2.0 10.0 12.0"


def test_a_head_that_keeps_predictions_of_the_last_step():
    """CondInst's does, for its masks, and no tensor with a past can be copied."""
    options = dict(num_classes=CLASSES, in_channels=16, feat_channels=16, stacked_convs=1, num_params=9)
    levels = dict(strides=STRIDES, regress_ranges=((-1, 64), (64, 128), (128, 1e8)), norm_cfg=dict(type="BN"))
    head = MODELS.build(dict(type="CondInstBboxHead", **options, **levels))
    head.data_preprocessor = torch.nn.Identity()
    objects = samples("objects")
    metas = [sample.metainfo for sample in objects]
    head.loss_by_feat(*head(features()), [sample.gt_instances for sample in objects], metas)
    (kept, *_) = head._raw_positive_infos["param_preds"]
    assert not kept.is_leaf
    twin = per_image._for_losses(head)
    assert torch.equal(twin.conv_cls.weight, head.conv_cls.weight)
    assert twin.conv_cls.weight is not head.conv_cls.weight
    assert head._raw_positive_infos["param_preds"][0] is kept


def test_what_is_no_head_and_yet_has_something_else_in_training():
    """DDQ's decoder, whose layers have dropout, and TridentNet's convolutions, each of which is three."""
    ddq = pytest.importorskip("mmdet.models.layers.transformer.ddq_detr_layers", reason="mmdet 3.2 and newer")
    attention = dict(embed_dims=8, num_heads=2)
    layer = dict(
        self_attn_cfg=dict(attention, dropout=0.1), cross_attn_cfg=dict(embed_dims=8, num_levels=1, num_heads=2)
    )
    layer["ffn_cfg"] = dict(embed_dims=8, feedforward_channels=8)
    model = torch.nn.Module()
    model.decoder = ddq.DDQTransformerDecoder(
        num_layers=1, layer_cfg=layer, return_intermediate=True, post_norm_cfg=None
    )
    model.convs = TridentConv(4, 4, 3, trident_dilations=(1, 2, 3), test_branch_idx=1, bias=True)
    model.data_preprocessor = torch.nn.Identity()
    model = per_image._for_losses(model.train())
    assert model.decoder.training
    assert not any(module.training for module in model.decoder.layers.modules())
    assert len(model.convs([torch.rand(1, 4, 8, 8)] * 3)) == 3


# Annotations of the training set, of large digits on their own, whose class is made another one.
BROKEN = (787, 947)
EPOCHS = 18


@pytest.mark.slow
def test_two_broken_labels_are_among_the_worst_ten(tmp_path):
    """Of the 1600 boxes, after a training with augmentation, without which it learns all labels by heart."""
    annotations = json.loads((build_digits() / "annotations" / "train.json").read_text(encoding="utf-8"))
    names = {image["id"]: image["file_name"] for image in annotations["images"]}
    broken = [annotation for annotation in annotations["annotations"] if annotation["id"] in BROKEN]
    for annotation in broken:
        annotation["category_id"] = (annotation["category_id"] + 5) % 10
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(annotations), encoding="utf-8")
    cfg = Config.fromfile(DIGITS)
    dataset = cfg.train_dataloader.dataset
    dataset.ann_file = str(file)
    cfg.custom_hooks = [dict(HOOK, boxes=True, dataset=copy.deepcopy(dataset))]
    *load, pack = dataset.pipeline
    resize = dict(type="RandomResize", scale=(128, 128), ratio_range=(0.7, 1.5), keep_ratio=False)
    crop = dict(type="RandomCrop", crop_size=(128, 128), allow_negative_crop=True)
    colours = dict(type="PhotoMetricDistortion")
    dataset.pipeline = [*load, resize, crop, dict(type="Pad", size=(128, 128)), colours, pack]
    cfg.train_cfg.update(max_epochs=EPOCHS, val_interval=EPOCHS + 1)
    cfg.param_scheduler[1].end = EPOCHS
    cfg.work_dir = str(tmp_path)
    Runner.from_cfg(cfg).train()
    boxes = rows(tmp_path / "box_losses.csv")
    assert len(boxes) == len(annotations["annotations"])
    worst = {(Path(row["image"]).name, *map(float, row["box"].split()[:2])) for row in boxes[:10]}
    assert {(names[annotation["image_id"]], *annotation["bbox"][:2]) for annotation in broken} <= worst
