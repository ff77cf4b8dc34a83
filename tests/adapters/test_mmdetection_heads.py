"""Heads of MMDetection that ask more of a loss than most: ours in them equal mmdet's own, values and gradients."""

import copy
import math

import pytest
import torch
from mmdet.models.losses import SmoothL1Loss as StockSmoothL1
from mmdet.models.roi_heads.mask_heads import FusedSemanticHead, SCNetSemanticHead
from mmengine.hub import get_config
from support.mmdetection import backward, build, dicts, shrink

from detloss_plugins.losses import (
    BalancedL1Loss,
    CrossEntropyLoss,
    GaussianFocalLoss,
    IoULoss,
    L1Loss,
    MSELoss,
    SmoothL1Loss,
)
from detloss_plugins.registry import MODELS

pytestmark = pytest.mark.usefixtures("mmdet_scope")

# mmdet's configs, and what is of interest there.
CONFIGS = {
    "Dynamic R-CNN": "dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py",  # is loss_bbox its own smooth L1?
    "CenterNet, update": "centernet/centernet-update_r50-caffe_fpn_ms-1x_coco.py",  # pos_weight, pos_inds
    "Cascade RPN": "cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py",  # IoULoss(linear=True)
    "FSAF": "fsaf/fsaf_r50_fpn_1x_coco.py",  # weights of all classes, flat
    "Mask R-CNN": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",  # use_mask
    "PointRend": "point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py",  # use_mask of points
}


def config(name):
    """A config made small, with everything on for a batch of four."""
    cfg = shrink(get_config(f"mmdet::{CONFIGS[name]}"))
    cfg.model.backbone.pop("pretrained", None)
    return cfg


def with_our_losses(cfg):
    cfg, count = copy.deepcopy(cfg), 0
    for part in dicts(cfg.model):
        for key, loss in part.items():
            if key.startswith("loss_") and isinstance(loss, dict) and loss["type"] in MODELS.module_dict:
                loss["type"], count = f"detloss_plugins.{loss['type']}", count + 1
    assert count
    return cfg


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_the_stock_losses(name, batch):
    stock, ours = build(config(name)), build(with_our_losses(config(name)))
    ours.load_state_dict(stock.state_dict())
    expected, found = backward(stock, batch), backward(ours, batch)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for (parameter, mine), theirs in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            scale = theirs.grad.abs().max()
            assert (mine.grad - theirs.grad).abs().max() <= 1e-3 * scale + 1e-6, parameter


def test_dynamic_rcnn_moves_beta(batch):
    """Of our smooth L1 as of mmdet's, which it takes ours for; no other loss of ours is taken for it."""
    cfg = with_our_losses(config("Dynamic R-CNN"))
    cfg.model.train_cfg.rcnn.dynamic_rcnn.update(update_iter_interval=1, initial_beta=0.25)
    model = build(cfg)
    loss = model.roi_head.bbox_head.loss_bbox
    assert type(loss) is SmoothL1Loss
    assert loss.beta == 1
    backward(model, batch)
    assert 0 < loss.beta <= 0.25
    assert backward(model, batch)["loss_bbox"].isfinite()
    assert isinstance(SmoothL1Loss(), StockSmoothL1)
    assert not isinstance(L1Loss(), StockSmoothL1)
    cfg.model.roi_head.bbox_head.loss_bbox = dict(type="detloss_plugins.L1Loss")
    with pytest.raises(AssertionError):
        build(cfg)


@pytest.mark.parametrize("cls", [L1Loss, SmoothL1Loss, MSELoss, BalancedL1Loss])
def test_a_mask_of_a_map_weighs_all_its_channels(cls):
    """CornerNet's and CentripetalNet's offsets."""
    torch.manual_seed(0)
    pred, target, mask = torch.rand(2, 2, 8, 8), torch.rand(2, 2, 8, 8), (torch.rand(2, 1, 8, 8) < 0.1).float()
    value, each = (cls()(pred, target, weight, avg_factor=mask.sum()) for weight in (mask, mask.expand_as(pred)))
    assert value > 0
    assert value == each


def test_a_heatmap_of_the_number_of_classes_is_one_of_background():
    """CenterNetUpdateHead's of an image without objects."""
    pred = torch.full((3, 4), 0.3)
    value = GaussianFocalLoss()(pred, torch.full((3, 4), 4), avg_factor=1)
    assert value == GaussianFocalLoss()(pred, torch.zeros(3, 4), avg_factor=1)
    assert value == pytest.approx(12 * 0.09 * -math.log(0.7), rel=1e-4)


@pytest.mark.parametrize("head", [FusedSemanticHead, SCNetSemanticHead])
@pytest.mark.parametrize("settings", [{}, {"avg_non_ignore": True}, {"class_weight": [0.5, 1.0, 2.0, 1.0, 1.0]}])
def test_semantic_head(head, settings):
    """Labels are maps of the stuff, 255 where there is none; the classes are the second dimension of the logits."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 6, 7), torch.randint(0, 5, (2, 1, 48, 56))
    labels[0, 0, :16] = 255
    options = dict(num_ins=1, fusion_level=0, num_convs=1, in_channels=8, conv_out_channels=8, num_classes=5)
    results = []
    for scope in ("mmdet", "detloss_plugins"):
        loss_seg = dict(type=f"{scope}.CrossEntropyLoss", ignore_index=255, loss_weight=0.2, **settings)
        module = head(seg_scale_factor=1 / 8, loss_seg=loss_seg, **options)
        pred = logits.clone().requires_grad_()
        value = module.loss(pred, labels)
        value.backward()
        results.append((value.detach(), pred.grad))
    torch.testing.assert_close(*results)
    assert type(module.criterion) is CrossEntropyLoss


def test_logits_whose_classes_could_be_two_dimensions():
    labels = torch.zeros(2, 5, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="dimension 1 or 3"):
        CrossEntropyLoss()(torch.randn(2, 5, 5, 5), labels)
    logits = torch.randn(2, 3, 4, 5)
    last = CrossEntropyLoss(reduction="none")(logits, labels[:, :3, :4])
    first = CrossEntropyLoss(reduction="none")(logits.movedim(-1, 1), labels[:, :3, :4])
    assert torch.equal(last, first)


def test_mask_of_each_objects_own_class():
    torch.manual_seed(0)
    pred, target, label = torch.randn(3, 4, 5, 6), torch.rand(3, 5, 6), torch.tensor([0, 3, 1])
    value = CrossEntropyLoss(use_mask=True, loss_weight=2.0)(pred, target, label)
    own = torch.stack([pred[0, 0], pred[1, 3], pred[2, 1]])
    expected = 2 * torch.nn.functional.binary_cross_entropy_with_logits(own, target)
    torch.testing.assert_close(value, expected)
    with pytest.raises(ValueError, match="class of each mask"):
        CrossEntropyLoss(use_mask=True)(pred, target)
    with pytest.raises(ValueError, match="class of each mask"):
        CrossEntropyLoss(use_mask=True)(pred, target, torch.ones(3))
    with pytest.raises(ValueError, match="not both"):
        CrossEntropyLoss(use_mask=True, use_sigmoid=True)


def test_positives_beside_a_heatmap():
    """A cell may count twice, and all cells have the penalty of the heatmap too."""
    pred, target = torch.tensor([[0.5, 0.25], [0.5, 0.5]]), torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    where = dict(pos_inds=torch.tensor([0, 1, 1]), pos_labels=torch.tensor([1, 0, 0]))
    loss = GaussianFocalLoss(pos_weight=0.25, neg_weight=0.5, reduction="none")(pred, target, **where)
    log = math.log
    hit = [[0, -(0.75**2) * log(0.25)], [-2 * 0.25 * log(0.5), 0]]
    miss = [[0, -(0.5**4) * 0.25**2 * log(0.75)], [-0.25 * log(0.5), -0.25 * log(0.5)]]
    expected = 0.25 * torch.tensor(hit) + 0.5 * torch.tensor(miss)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="not a tuple"):
        GaussianFocalLoss()(pred, (target, target))


def test_the_older_way_to_write_a_linear_iou_loss():
    assert IoULoss(linear=True).mode == "linear"
    assert IoULoss(mode="square").mode == "square"
    box, other = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 0, 4, 2]])
    assert IoULoss(linear=True)(box, other) == 0.5
