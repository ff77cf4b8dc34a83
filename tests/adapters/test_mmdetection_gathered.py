"""Heads that call their losses once for all levels: the stock head in all but the number of calls.

Heads only, on random features, but for the trainings and the stock config.
"""

import itertools

import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import ConfigDict
from mmengine.runner import set_random_seed
from support.mmdetection import CONFIG_DIR, Interrupt, build, run, small
from support.mmdetection_features import CLASSES, SCENES, STRIDES, features, grads, samples
from timing import kernels_and_waits

from detloss_plugins.adapters.mmdetection import stock_config
from detloss_plugins.testing.digits import build_digits

pytestmark = pytest.mark.usefixtures("mmdet_scope")

OURS = "detloss_plugins.adapters.mmdetection.Gathered"
ANCHORS = dict(type="AnchorGenerator", ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=STRIDES)
FOUR_ANCHORS = dict(ANCHORS, octave_base_scale=2, ratios=[0.5, 1.0], scales_per_octave=2)
MAX_IOU = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1)
ATSS = dict(assigner=dict(type="ATSSAssigner", topk=9))
GIOU = dict(type="detloss_plugins.GIoULoss", loss_weight=2.0)
BCE = dict(type="detloss_plugins.CrossEntropyLoss", use_sigmoid=True)
HEADS = {
    "RetinaHead": dict(
        anchor_generator=FOUR_ANCHORS,
        reg_decoded_bbox=True,
        loss_cls=dict(type="detloss_plugins.FocalLoss", use_sigmoid=True),
        train_cfg=dict(assigner=MAX_IOU, sampler=dict(type="PseudoSampler")),
    ),
    "ATSSHead": dict(
        loss_cls=dict(type="detloss_plugins.FocalLoss", use_sigmoid=True), loss_centerness=BCE, train_cfg=ATSS
    ),
    "GFLHead": dict(
        reg_max=8,
        loss_cls=dict(type="detloss_plugins.QualityFocalLoss", use_sigmoid=True),
        loss_dfl=dict(type="detloss_plugins.DistributionFocalLoss", loss_weight=0.25),
        train_cfg=ATSS,
    ),
}
every_head = pytest.mark.parametrize("name", HEADS)


def head(name, prefix, **options):
    """The stock head ("mmdet.") or ours, with the same weights."""
    cfg = dict(num_classes=CLASSES, in_channels=16, feat_channels=32, stacked_convs=1, anchor_generator=ANCHORS)
    cfg |= {"loss_bbox": GIOU, **HEADS[name], **options, "type": prefix + name}
    cfg["train_cfg"] = dict(cfg["train_cfg"], allowed_border=-1, pos_weight=-1)
    cfg["test_cfg"] = dict(nms_pre=100, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.6), max_per_img=50)
    set_random_seed(0)
    model = MMDET_MODELS.build(ConfigDict(cfg))
    for module in model.modules():  # a fresh head predicts one box everywhere
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.1)
    return model.train()


def pair(name, **options):
    """The stock head and ours."""
    return head(name, "mmdet.", **options), head(name, OURS, **options)


def compare(stock, ours, batch):
    """The sums of every loss and the gradients are those of the stock head; a list of ours has one value."""
    expected, found = (model.loss(features(), batch) for model in (stock, ours))
    assert all(isinstance(values, list) and len(values) == 1 for values in found.values())
    sums = ({name: sum(values) for name, values in losses.items()} for losses in (found, expected))
    torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-7)
    found_grads, expected_grads = grads(ours, found), grads(stock, expected)
    assert found_grads.keys() == dict(ours.named_parameters()).keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(found_grads[name], grad, rtol=1e-5, atol=1e-5 * grad.abs().max().item() + 1e-8)
    return {name: sum(values).item() for name, values in found.items()}


@every_head
@pytest.mark.parametrize("scene", SCENES)
def test_values_and_gradients(name, scene):
    stock, ours = pair(name)
    losses = compare(stock, ours, samples(scene))
    assert all((value > 0) == (scene != "nothing" or key == "loss_cls") for key, value in losses.items())


@pytest.mark.parametrize(("decoded", "loss"), [(True, "GIoULoss"), (False, "SmoothL1Loss")])
@pytest.mark.parametrize("box_type", [False, True])
def test_boxes_and_deltas_of_retinanet(decoded, loss, box_type):
    """Tensors or mmdet's own boxes, which its data pipelines make."""
    options = dict(loss_bbox=dict(type=f"detloss_plugins.{loss}"), reg_decoded_bbox=decoded)
    options["bbox_coder"] = dict(type="DeltaXYWHBBoxCoder", use_box_type=box_type)
    options["anchor_generator"] = dict(FOUR_ANCHORS, use_box_type=box_type)
    batch = samples("objects")
    for sample in batch if box_type else ():
        sample.gt_instances.bboxes = HorizontalBoxes(sample.gt_instances.bboxes)
    compare(*pair("RetinaHead", **options), batch)


@every_head
def test_losses_of_mmdet(name):
    losses = {key: loss for key, loss in {"loss_bbox": GIOU, **HEADS[name]}.items() if key.startswith("loss")}
    theirs = {key: {**loss, "type": loss["type"].replace("detloss_plugins", "mmdet")} for key, loss in losses.items()}
    compare(*pair(name, **theirs), samples("objects"))


def test_strides_that_do_not_divide_evenly():
    """GFL's boxes in stride units, where that is no exact division."""
    compare(*pair("GFLHead", anchor_generator=dict(ANCHORS, strides=[10, 16, 33])), samples("objects"))


@every_head
def test_images_of_another_size(name):
    """Which have cells outside of the image, that count for nothing."""
    batch = samples("objects")
    batch[1].set_metainfo(dict(img_shape=(100, 80), pad_shape=(100, 80)))
    compare(*pair(name), batch)


@every_head
def test_each_loss_is_called_once(name):
    calls = []
    for model in pair(name):
        for key, loss in model.named_children():
            if key.startswith("loss_"):
                loss.register_forward_hook(lambda *_, key=key: calls.append(key))
        model.loss(features(), samples("objects"))
        calls.append(None)
    stock, ours = calls[: calls.index(None)], calls[calls.index(None) + 1 : -1]
    assert sorted(ours) == sorted(set(stock))
    assert len(stock) > len(ours)


@every_head
def test_a_tenth_of_the_kernels_is_saved(name):
    def criterion(model):
        losses = model.loss_by_feat(*maps, [sample.gt_instances for sample in batch], metas)
        return torch.autograd.grad(sum(map(sum, losses.values())), [*itertools.chain(*maps)], allow_unused=True)

    batch = samples("objects")
    metas = [sample.metainfo for sample in batch]
    counts = []
    for model in pair(name):
        maps = [[level.detach().requires_grad_() for level in part] for part in model(features())]
        criterion(model)
        counts.append(kernels_and_waits(lambda model=model: criterion(model), torch.device("cpu")))
    (stock, stock_waits), (ours, waits) = counts
    assert ours < 0.9 * stock
    assert waits <= stock_waits


@every_head
def test_checkpoints_and_predictions(name):
    stock, ours = pair(name)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    expected, found = (model.eval().predict(features(), samples("objects")) for model in (stock, ours))
    for one, other in zip(expected, found, strict=True):
        assert len(one.bboxes)
        assert torch.equal(one.bboxes, other.bboxes)
        assert torch.equal(one.scores, other.scores)


def test_a_loss_with_a_state_learns_once_a_step():
    """GHM's counts are a quarter of those of all levels; the stock head forgets a quarter of them at each level."""
    loss = dict(type="detloss_plugins.GHMC", use_sigmoid=True, momentum=0.75)
    stock, ours = pair("RetinaHead", loss_cls=loss)
    levels = []
    stock.loss_cls.register_forward_pre_hook(lambda _, given: levels.append(given))
    for model in (stock, ours):
        model.loss(features(), samples("objects"))
    scores, labels, weights = map(torch.cat, zip(*levels, strict=True))
    alone = MMDET_MODELS.build(loss)
    alone(scores, labels, weights)
    torch.testing.assert_close(ours.loss_cls.acc_sum, alone.acc_sum)
    assert not torch.allclose(stock.loss_cls.acc_sum, alone.acc_sum)


CONFIGS = {"RetinaHead": "retinanet", "ATSSHead": "atss", "GFLHead": "gfl"}


def detector(name, prefix):
    """The config of a small detector with the stock head or ours."""
    cfg = small(CONFIG_DIR / f"{CONFIGS[name]}_r18_fpn_digits.py")
    cfg.model.bbox_head.type = prefix + name
    return cfg


@every_head
def test_the_stock_config_has_the_stock_head(name):
    cfg = detector(name, OURS)
    stock = stock_config(cfg)
    assert stock.model.bbox_head.type == f"mmdet.{name}"
    build(stock).load_state_dict(build(cfg).state_dict())


@pytest.mark.slow
@every_head
def test_training_that_changes_the_head_midway(name, tmp_path):
    """By mmengine's Runner: two epochs with the stock head, with ours, and one with each, in both orders."""
    build_digits()
    weights = []
    for number, (first, second) in enumerate(itertools.product(["mmdet.", OURS], repeat=2)):
        folder = tmp_path / str(number)
        run(folder, Interrupt(at=1), model=detector(name, first).model)
        run(folder, Interrupt(), model=detector(name, second).model, resume=True)
        weights.append(torch.load(folder / "epoch_2.pth", weights_only=False)["state_dict"])
    stock, *others = weights
    for other in others:
        torch.testing.assert_close(other, stock, rtol=1e-4, atol=1e-6)
