"""Mask losses in mmdet's mask heads: real steps of the detectors that take one, small and on tiny images."""

import copy
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.runner import set_random_seed
from mmengine.structures import InstanceData
from support.mmdetection import backward, build, dicts

from detloss_plugins.registry import loss_class, registered_losses

pytestmark = pytest.mark.usefixtures("mmdet_scope")

# mmdet's config, the key of its mask loss, and layers that predict masks.
HEADS = {
    "SOLO": ("solo/solo_r50_fpn_1x_coco.py", "loss_mask", "mask_head.conv_mask_list"),
    "decoupled SOLO": ("solo/decoupled-solo_r50_fpn_1x_coco.py", "loss_mask", "mask_head.conv_mask_list_x"),
    "SOLOv2": ("solov2/solov2_r50_fpn_1x_coco.py", "loss_mask", "mask_head.conv_kernel"),
    "CondInst": ("condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py", "loss_mask", "bbox_head.controller"),
    "RTMDet-Ins": ("rtmdet/rtmdet-ins_s_8xb32-300e_coco.py", "loss_mask", "bbox_head.rtm_kernel"),
    "QueryInst": ("queryinst/queryinst_r50_fpn_1x_coco.py", "loss_mask", "roi_head.mask_head.0.conv_logits"),
    "MaskFormer": ("maskformer/maskformer_r50_ms-16xb1-75e_coco.py", "loss_dice", "panoptic_head.mask_embed"),
    "Mask2Former": ("mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", "loss_dice", "panoptic_head.mask_embed"),
}
LOSSES = [name for name, cls in registered_losses().items() if cls.facts.family == "region"]


@pytest.fixture(scope="module")
def batch():
    """Two images with two elliptic objects each, as the data loader gives them."""
    generator = torch.Generator().manual_seed(0)
    y, x = np.mgrid[:128, :128] + 0.5
    samples = []
    for boxes in ([[10, 12, 58, 76], [60, 70, 110, 104]], [[30, 20, 118, 120], [5, 90, 40, 126]]):
        ellipses = [
            ((2 * x - left - right) / (right - left)) ** 2 + ((2 * y - top - bottom) / (bottom - top)) ** 2 < 1
            for left, top, right, bottom in boxes
        ]
        shape = dict(img_shape=(128, 128), ori_shape=(128, 128), pad_shape=(128, 128))
        sample = DetDataSample(metainfo=shape)
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32),
            labels=torch.tensor([1, 2]),
            masks=BitmapMasks(np.stack(ellipses).astype(np.uint8), 128, 128),
        )
        samples.append(sample)
    inputs = [torch.randint(0, 256, (3, 128, 128), generator=generator, dtype=torch.uint8) for _ in samples]
    return {"inputs": inputs, "data_samples": samples}


# A share of the channels, groups and dimensions that mmdet's configs give; what is below it stays.
SHARE = 8
COUNTS = {"num_classes": 10, "stacked_convs": 1, "num_layers": 1, "num_queries": 20, "num_proposals": 20}


def small(path):
    """mmdet's detector with few channels and layers, and nothing to download; the losses and their input stay."""
    model = get_config(f"mmdet::{path}").model
    model.data_preprocessor.batch_augments = None
    for part in dicts(model):
        for key, value in part.items():
            if key.endswith(("channels", "channel", "dims", "num_feats", "num_groups")) and isinstance(value, int):
                part[key] = value // SHARE if value >= 4 * SHARE else value
            elif key in COUNTS and value != 3:  # CondInst's dynamic layers are three
                part[key] = COUNTS[key]
        if part.get("type") == "SyncBN":
            part.type = "BN"
    if model.backbone.type == "ResNet":
        model.backbone.update(depth=18, base_channels=8, frozen_stages=-1, norm_eval=False)
        channels = [8, 16, 32, 64]
    else:
        model.backbone.update(widen_factor=1 / 16, deepen_factor=0.33)
        channels = [16, 32, 64]
    model.backbone.init_cfg = None
    (model.neck if "neck" in model else model.panoptic_head).in_channels = channels
    if "num_points" in (model.get("train_cfg") or {}):
        model.train_cfg.num_points = 256
    if "roi_head" in model:  # one stage of six
        head, rcnn = model.roi_head, model.train_cfg
        head.update(num_stages=1, stage_loss_weights=[1], bbox_head=head.bbox_head[:1], mask_head=head.mask_head[:1])
        rcnn.rcnn = rcnn.rcnn[:1]
    return model


@pytest.fixture(scope="module", params=HEADS)
def stock(request):
    """A detector of mmdet, the config of its own mask loss, that loss's key, and a layer that predicts masks."""
    path, key, layer = HEADS[request.param]
    model = small(path)
    (cfg,) = (part[key] for part in dicts(model) if key in part)
    assert cfg.type == "DiceLoss"
    return build(Config(dict(model=model))), dict(cfg), key, layer


def with_loss(stock, name, **changes):
    """The detector with our mask loss instead, under the settings of its config that the loss has."""
    detector, cfg, key, _ = stock
    accepted = inspect.signature(loss_class(name)).parameters
    settings = {option: value for option, value in {**cfg, **changes}.items() if option in accepted}
    model = copy.deepcopy(detector)
    heads = [module for module in model.modules() if isinstance(getattr(module, key, None), torch.nn.Module)]
    assert len(heads) == 1
    setattr(heads[0], key, MMDET_MODELS.build(dict(type=f"detloss_plugins.{name}", **settings)))
    assert type(getattr(heads[0], key)) is loss_class(name)
    return model


def split(losses, key):
    """The part of a loss dict that the mask loss gave, for the intermediate layers too, and the others."""
    losses = {name: value.detach() for name, value in losses.items() if name != "loss"}  # the sum
    masks = {name: value for name, value in losses.items() if key in name}
    return masks, {name: value for name, value in losses.items() if name not in masks}


@pytest.mark.parametrize("loss", sorted({*LOSSES} - {"DiceLoss"}))  # which is mmdet's, see below
def test_takes_steps(loss, stock, batch):
    """With the gradient of the mask loss alone, which reaches the layer that predicts masks."""
    _, _, key, layer = stock
    model = with_loss(stock, loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(2):
        set_random_seed(0)
        data = model.data_preprocessor(copy.deepcopy(batch), training=True)
        losses = model.parse_losses(model(**data, mode="loss"))[1]
        assert all(value.isfinite() for value in losses.values())
        masks = {name: value for name, value in losses.items() if key in name}
        optimizer.zero_grad()
        sum(masks.values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        # Not all of the layer's: SOLO and RTMDet have one a level, and not every level has an object.
        assert any(gradient.any() for name, gradient in gradients.items() if name.startswith(layer))
        seen.append({name: value.item() for name, value in masks.items()})
        optimizer.step()
    before, after = seen
    assert before
    assert all(value > 0 for value in before.values())
    assert all(before[name] != after[name] for name in before)


def test_loss_weight_scales_the_mask_loss_alone(stock, batch):
    _, cfg, key, _ = stock
    weight = cfg.get("loss_weight", 1.0)
    once, twice = (
        split(backward(with_loss(stock, "TverskyLoss", loss_weight=factor * weight), batch), key) for factor in (1, 2)
    )
    torch.testing.assert_close({name: 2 * value for name, value in once[0].items()}, twice[0])
    torch.testing.assert_close(once[1], twice[1])


def test_dice_is_mmdets(stock, batch):
    """The same losses and gradients as with the class that mmdet's config names."""
    detector, _, _, layer = stock
    theirs, ours = copy.deepcopy(detector), with_loss(stock, "DiceLoss")
    torch.testing.assert_close(backward(ours, batch), backward(theirs, batch), rtol=1e-5, atol=1e-6)
    for mine, other in zip(
        ours.get_submodule(layer).parameters(), theirs.get_submodule(layer).parameters(), strict=True
    ):
        if other.grad is not None:
            assert (mine.grad - other.grad).abs().max() <= 1e-4 * other.grad.abs().max() + 1e-9


def test_no_objects(stock, batch):
    empty = copy.deepcopy(batch)
    for sample in empty["data_samples"]:
        sample.gt_instances = sample.gt_instances[:0]
    model = with_loss(stock, "TverskyLoss")
    assert all(value.isfinite() for value in backward(model, empty).values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("class_agnostic", [True, False])
def test_mask_rcnn_keeps_its_own(loss, class_agnostic, monkeypatch):
    """FCNMaskHead hands over the masks of all classes, and the labels where weights belong."""
    cfg = dict(type=f"detloss_plugins.{loss}")
    head = MMDET_MODELS.build(
        dict(type="FCNMaskHead", num_classes=3, class_agnostic=class_agnostic, conv_out_channels=8, loss_mask=cfg)
    )
    monkeypatch.setattr(head, "get_targets", lambda **kwargs: torch.zeros(2, 28, 28))
    masks = torch.zeros(2, 1 if class_agnostic else 3, 28, 28)
    results = [SimpleNamespace(pos_gt_labels=torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=r"FCNMaskHead.*use_mask=True"):
        head.loss_and_target(masks, results, None, None)
    with pytest.raises(TypeError, match="use_mask"):
        MMDET_MODELS.build(dict(cfg, use_mask=True))
