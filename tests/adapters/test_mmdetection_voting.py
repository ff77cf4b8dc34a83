"""Detections of the heads that predict uncertainty: with and without voting, before and after NMS, none at all."""

import copy
import math

import pytest
import torch
from mmcv.ops import nms, soft_nms
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from support.mmdetection import build, small
from support.mmdetection_uncertainty import (
    HARD,
    MASK_RCNN,
    SCALE_FACTOR,
    config,
    detector,
    equal,
    every_detector,
    head_of,
    layers,
    predict,
    stock,
)

from detloss_plugins.adapters.mmdetection import variance_voting

pytestmark = pytest.mark.usefixtures("mmdet_scope")

NMS = {
    "hard": HARD,
    "gaussian": dict(type="soft_nms", method="gaussian", sigma=0.5, min_score=0.02),
    "linear": dict(type="soft_nms", method="linear", iou_threshold=0.3, min_score=0.02),
}
every_nms = pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("Faster R-CNN", kind) for kind in NMS),
        ("Faster R-CNN, one box for all classes", "hard"),
        ("RetinaNet", "hard"),
        ("RetinaNet", "gaussian"),
    ],
)


@every_nms
def test_without_voting_it_is_the_stock_detector(name, kind, batch):
    model = detector(name, **{"test.voting": None})
    equal(predict(model, batch, NMS[kind]), predict(stock(name, model), batch, NMS[kind]), rtol=1e-5, atol=1e-4)


def candidates(name, model, batch):
    """Of each image the boxes, sigmas ``(N, C, 4)`` and scores ``(N, C)`` of all classes, in pixels before scaling.

    They are computed from what stock heads with the layers of offsets and of log variances predict.
    """
    heads = [head_of(stock(name, model, layer).eval()) for layer in layers(model)]
    data = model.data_preprocessor(copy.deepcopy({key: value[:2] for key, value in batch.items()}))
    features = model.eval().extract_feat(data["inputs"])
    if name == "RetinaNet":
        (cls_scores, offsets), (_, alphas) = (head(features) for head in heads)
        sizes = [level.shape[-2:] for level in cls_scores]
        priors = torch.cat(heads[0].prior_generator.grid_priors(sizes, device="cpu"))
        flat = [
            torch.cat([level.permute(0, 2, 3, 1).reshape(len(level), -1, width) for level in levels], 1)
            for levels, width in ((cls_scores, 10), (offsets, 4), (alphas, 4))
        ]
        images = [(priors, scores.sigmoid(), *rest) for scores, *rest in zip(*flat, strict=True)]
    else:
        images = []
        for image, proposals in enumerate(model.rpn_head.predict(features, data["data_samples"])):
            rois = torch.cat([torch.full((len(proposals), 1), float(image)), proposals.bboxes], 1)
            regions = model.roi_head.bbox_roi_extractor(features, rois)
            (cls_score, offsets), (_, alphas) = (head(regions) for head in heads)
            images.append((proposals.bboxes, cls_score.softmax(-1)[:, :-1], offsets, alphas))
    for priors, scores, offsets, alphas in images:
        priors = priors.unsqueeze(1)
        sides = (priors[..., 2:] - priors[..., :2]).repeat(1, 1, 2)
        scale = torch.tensor(SCALE_FACTOR * 2)
        offsets, alphas = (part.reshape(len(priors), -1, 4) for part in (offsets, alphas))
        boxes = (priors + 0.1 * offsets * sides).clamp(0, 128) / scale
        boxes[..., 2:] = boxes[..., 2:].maximum(boxes[..., :2])
        sigmas = (alphas / 2).exp() * 0.1 * sides / scale
        yield boxes.expand(*scores.shape, 4), sigmas.expand(*scores.shape, 4), scores


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def voted(box, boxes, sigmas, sigma_t):
    """The formula, number by number; the box itself is one of the boxes."""
    place = []
    for side in range(4):
        above = below = 0.0
        for other, sigma in zip(boxes, sigmas, strict=True):
            overlap = iou(box, other)
            if overlap > 0:
                weight = math.exp(-((1 - overlap) ** 2) / sigma_t) / sigma[side] ** 2
                above, below = above + weight * other[side], below + weight
        place.append(above / below)
    return place


def by_loops(boxes, sigmas, scores, kind, sigma_t):
    """NMS class by class, then the vote of each box: labels, scores and boxes of the 30 best."""
    settings = {key: value for key, value in NMS[kind].items() if key != "type"}
    found = []
    for label in range(scores.shape[1]):
        above = (scores[:, label] > 0.08).nonzero().flatten()
        if len(above):
            own_boxes, own_sigmas = boxes[above, label], sigmas[above, label]
            detected, kept = (nms if kind == "hard" else soft_nms)(own_boxes, scores[above, label], **settings)
            found += [
                (-score, label, own_boxes[index].tolist(), own_boxes.tolist(), own_sigmas.tolist())
                for score, index in zip(detected[:, 4].tolist(), kept.tolist(), strict=True)
            ]
    found = sorted(found, key=lambda row: row[0])[:30]
    return InstanceData(
        labels=torch.tensor([row[1] for row in found]),
        scores=torch.tensor([-row[0] for row in found]),
        bboxes=torch.tensor([voted(*row[2:], sigma_t) for row in found]),
    )


@every_nms
def test_voting_is_the_formula(name, kind, batch):
    sigma_t = 0.3 if kind == "linear" else 0.1
    model = detector(name, **{"test.voting": dict(sigma_t=sigma_t)})
    found = predict(model, batch, NMS[kind])
    with torch.no_grad():
        expected = [by_loops(*image, kind, sigma_t) for image in candidates(name, model, batch)]
    equal(found, expected, rtol=1e-4, atol=2e-3)
    labels = torch.cat([instances.labels for instances in found])
    assert len(labels.unique()) > 1
    still = predict(detector(name, **{"test.voting": None}), batch, NMS[kind])
    moved = torch.cat([(one.bboxes - other.bboxes).abs() for one, other in zip(found, still, strict=True)])
    assert (moved > 0.1).float().mean() > 0.1
    for one, other in zip(found, still, strict=True):
        for key in ("scores", "labels", "sigmas"):
            assert torch.equal(one[key], other[key])


@every_detector
def test_sigmas_of_detections(name, batch):
    """In pixels of the unscaled image, those of the box that was kept."""
    model = detector(name, **{"test.voting": None})
    with torch.no_grad():
        images = candidates(name, model, batch)
        for instances, (boxes, sigmas, _) in zip(predict(model, batch), images, strict=True):
            for box, label, sigma in zip(instances.bboxes, instances.labels, instances.sigmas, strict=True):
                ((place, *_),) = [((boxes[:, label] - box).abs().sum(1) < 1e-3).nonzero().flatten().tolist()]
                torch.testing.assert_close(sigma, sigmas[place, label], rtol=1e-4, atol=1e-4)


def test_catalogue_example_of_the_vote():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [0, 2, 10, 11]], dtype=torch.float64)
    sigmas = torch.tensor([[1.0, 1, 1, 1], [2, 1, 2, 1], [0.5, 1, 0.5, 1]])
    result = variance_voting(boxes, sigmas, torch.tensor([0]), sigma_t=0.02)
    expected = torch.tensor([[0.041815, 0.039906, 10.041815, 10.019953]], dtype=torch.float64)
    torch.testing.assert_close(result, expected, atol=6e-7, rtol=0)


def test_votes_of_extreme_boxes():
    """No size, far apart, sigma nothing or huge: finite, and a box without neighbours stays."""
    boxes = torch.tensor([[5.0, 5, 5, 5], [5.0, 5, 5, 5], [1e4, 1e4, 2e4, 2e4], [0.0, 0, 10, 10]])
    sigmas = torch.tensor([[0.0] * 4, [1e-3] * 4, [1e8] * 4, [1.0] * 4])
    moved = variance_voting(boxes, sigmas, torch.arange(4), sigma_t=0.02)
    torch.testing.assert_close(moved, boxes)
    for empty in (torch.zeros(0, dtype=torch.long), torch.arange(0)):
        assert variance_voting(boxes, sigmas, empty, sigma_t=0.02).shape == (0, 4)
    assert variance_voting(boxes[:0], sigmas[:0], torch.arange(0), sigma_t=0.02).shape == (0, 4)


@pytest.mark.parametrize("voting", [None, dict(sigma_t=0.02)])
@every_detector
def test_nothing_detected(name, voting, batch):
    model = detector(name, **{"test.voting": voting})
    with torch.no_grad():
        data = model.eval().data_preprocessor(copy.deepcopy(batch))
        test_cfg = model.roi_head.test_cfg if hasattr(model, "roi_head") else model.bbox_head.test_cfg
        test_cfg.score_thr = 1.1
        for sample in data["data_samples"]:
            sample.set_metainfo(dict(scale_factor=SCALE_FACTOR))
        found = model(**data, mode="predict")
    for sample in found:
        shapes = {key: tuple(sample.pred_instances[key].shape) for key in ("bboxes", "scores", "labels", "sigmas")}
        assert shapes == dict(bboxes=(0, 4), scores=(0,), labels=(0,), sigmas=(0, 4))


def test_image_without_regions():
    head = MMDET_MODELS.build(config("Faster R-CNN").model.roi_head.bbox_head)
    test_cfg = ConfigDict(dict(score_thr=0.0, nms=HARD, max_per_img=5, voting=dict(sigma_t=0.02)))
    arguments = [(torch.zeros(0, 5),), (torch.zeros(0, 11),), (torch.zeros(0, 80),), [dict(img_shape=(9, 9))]]
    (found,) = head.predict_by_feat(*arguments, rcnn_test_cfg=test_cfg)
    assert found.bboxes.shape == found.sigmas.shape == (0, 4)
    (found,) = head.predict_by_feat(*arguments, rcnn_test_cfg=None)
    assert len(found.bboxes) == 0


def test_boxes_before_nms(batch):
    """As test-time augmentation asks for them: the stock head's."""
    model = detector("Faster R-CNN")
    twin = stock("Faster R-CNN", model)
    rois = torch.tensor([[0.0, 0, 0, 60, 60], [0.0, 20, 30, 90, 100]])
    features = torch.randn(2, 32, 7, 7)
    raw = []
    for head in map(head_of, (model, twin)):
        scores, boxes = head(features)
        raw.append(head.predict_by_feat((rois,), (scores,), (boxes,), [dict(img_shape=(128, 128))], None)[0])
    for key in ("bboxes", "scores"):
        torch.testing.assert_close(raw[0][key], raw[1][key])
    model = detector("RetinaNet")
    metas = [dict(img_shape=(128, 128))]
    features = [torch.randn(1, 32, 128 // stride, 128 // stride) for stride in (8, 16, 32)]
    for head in map(head_of, (model, stock("RetinaNet", model))):
        raw.append(head.predict_by_feat(*head(features), batch_img_metas=metas, with_nms=False)[0])
    for key in ("bboxes", "scores", "labels"):
        torch.testing.assert_close(raw[2][key], raw[3][key])
    assert raw[2].sigmas.shape == raw[2].bboxes.shape


def test_masks_of_voted_boxes(batch):
    """The boxes and sigmas are those without the mask head, which scales what the box head then leaves alone."""
    model = build(small(MASK_RCNN))
    for layer in layers(model):
        torch.nn.init.normal_(layer.weight, std=0.1)
    found = predict(model, batch)
    assert all(instances.masks.shape == (len(instances), 256, 64) for instances in found)
    assert all(len(instances) for instances in found)
    del model.roi_head.mask_head
    for one, other in zip(found, predict(model, batch), strict=True):
        for key in ("scores", "bboxes", "sigmas"):
            torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-4)
