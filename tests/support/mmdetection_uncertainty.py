"""Small detectors that predict the uncertainty of boxes, their stock twins, and detections."""

import copy

import pytest
import torch
from mmengine.config import ConfigDict

from support.mmdetection import CONFIG_DIR, build, small

FASTER_RCNN = CONFIG_DIR / "faster-rcnn-kl_r18_fpn_digits.py"
RETINANET = CONFIG_DIR / "retinanet-kl_r18_fpn_digits.py"
MASK_RCNN = CONFIG_DIR / "mask-rcnn-kl_r50_fpn_1x_coco.py"
# A config, and the parts of its model that hold the head and its test_cfg.
DETECTORS = {
    "Faster R-CNN": (FASTER_RCNN, "roi_head.bbox_head", "test_cfg.rcnn"),
    "Faster R-CNN, one box for all classes": (FASTER_RCNN, "roi_head.bbox_head", "test_cfg.rcnn"),
    "RetinaNet": (RETINANET, "bbox_head", "test_cfg"),
}
every_detector = pytest.mark.parametrize("name", DETECTORS)
HARD = dict(type="nms", iou_threshold=0.5)
SCALE_FACTOR = (2.0, 0.5)  # of the images in x and y


def config(name, **changes):
    """The small model of a detector, with changes to its head's options (``head.x``) or ``test_cfg`` (``test.x``)."""
    path, head, test_cfg = DETECTORS[name]
    cfg = small(path)
    if "one box" in name:
        changes["head.reg_class_agnostic"] = True
    if path == FASTER_RCNN:  # fewer regions, for time, and near ones, for the vote
        cfg.merge_from_dict({f"model.{part}.max_per_img": 40 for part in ("test_cfg.rpn", "train_cfg.rpn_proposal")})
        cfg.merge_from_dict({"model.test_cfg.rpn.nms.iou_threshold": 0.9})
        cfg.merge_from_dict({"model.rpn_head.anchor_generator.scales": [1.5, 1.6, 1.7, 1.8, 2.0, 2.2]})
    changes = {"head.loss_bbox.loss_weight": 1.0, **changes}
    places = {"head": head, "test": test_cfg}
    for key, value in changes.items():
        part, _, option = key.partition(".")
        cfg.merge_from_dict({f"model.{places[part]}.{option}": value})
    return cfg


def head_of(model):
    return model.bbox_head if hasattr(model, "bbox_head") else model.roi_head.bbox_head


def layers(model):
    """The layers of offsets and of log variances."""
    head = head_of(model)
    return head.get_submodule(head.box_layer), head.log_variance


def detector(name, **changes):
    """Built from the seed; offsets and log variances differ from box to box, as after training."""
    model = build(config(name, **changes))
    for layer in layers(model):
        torch.nn.init.normal_(layer.weight, std=0.1 if name == "RetinaNet" else 0.5)
    scores = head_of(model).retina_cls if name == "RetinaNet" else head_of(model).fc_cls
    torch.nn.init.normal_(scores.weight, std=0.1)
    return model


def stock(name, model, box_layer=None):
    """The stock detector with the same coder and weights, for its offsets those of ``box_layer`` if given."""
    cfg = config(name)
    cfg.model.test_cfg.get("rcnn", cfg.model.test_cfg).pop("voting")
    if name == "RetinaNet":
        head = cfg.model.bbox_head
        head.type = "RetinaHead"
    else:
        cfg.model.roi_head.type = "StandardRoIHead"
        head = cfg.model.roi_head.bbox_head
        head.type = "Shared2FCBBoxHead"
    head.loss_bbox.type = "detloss_plugins.SmoothL1Loss"
    twin = build(cfg).train(model.training)
    found = twin.load_state_dict(model.state_dict(), strict=False)
    assert not found.missing_keys
    assert {key.split(".")[-2] for key in found.unexpected_keys} == {"log_variance"}
    if box_layer is not None:
        head_of(twin).get_submodule(head_of(model).box_layer).load_state_dict(box_layer.state_dict())
    return twin


def predict(model, batch, nms_cfg=HARD):
    """Detections in two images, in the coordinates before these were scaled differently in x and y."""
    batch = copy.deepcopy({key: value[:2] for key, value in batch.items()})
    for sample in batch["data_samples"]:
        sample.set_metainfo(dict(scale_factor=SCALE_FACTOR, ori_shape=(256, 64)))
    test_cfg = model.roi_head.test_cfg if hasattr(model, "roi_head") else model.bbox_head.test_cfg
    test_cfg.nms = ConfigDict(nms_cfg)
    test_cfg.update(score_thr=0.08, max_per_img=30)
    with torch.no_grad():
        found = model.eval()(**model.data_preprocessor(batch), mode="predict")
    return [sample.pred_instances for sample in found]


def equal(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        assert len(other) > 5
        for key in ("labels", "scores", "bboxes"):
            torch.testing.assert_close(one[key], other[key], **tolerance)
