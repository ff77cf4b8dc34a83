"""Heads that predict the uncertainty of boxes: their loss, their detections with and without voting, whole runs."""

import copy
import math
import pickle
import sys

import pytest
import torch
from digits import build_digits
from mmcv.ops import nms, soft_nms
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.registry import TASK_UTILS
from mmengine.config import ConfigDict
from mmengine.runner import set_random_seed
from mmengine.structures import InstanceData
from test_mmdetection import CONFIG_DIR, Interrupt, backward, batch, build, mmdet_scope, run, small

from detloss_plugins.adapters.mmdetection import CornerBBoxCoder, variance_voting

__all__ = ["batch", "mmdet_scope"]  # fixtures of the tests here too

OURS = "detloss_plugins.adapters.mmdetection"
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
NMS = {
    "hard": HARD,
    "gaussian": dict(type="soft_nms", method="gaussian", sigma=0.5, min_score=0.02),
    "linear": dict(type="soft_nms", method="linear", iou_threshold=0.3, min_score=0.02),
}
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
    """Detections in the coordinates of images that were scaled differently in x and y."""
    batch = copy.deepcopy(batch)
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


# The coder.


def test_offsets_of_the_paper():
    anchors = torch.tensor([[10.0, 20, 50, 40], [0.0, 0, 10, 10]])
    boxes = torch.tensor([[14.0, 19, 48, 45], [1.0, -2, 10, 11]])
    expected = torch.tensor([[4 / 40, -1 / 20, -2 / 40, 5 / 20], [0.1, -0.2, 0.0, 0.1]])
    coder = CornerBBoxCoder(target_stds=[1.0] * 4)
    torch.testing.assert_close(coder.encode(anchors, boxes), expected)
    coder = CornerBBoxCoder(target_means=[0.1, 0.2, 0.3, 0.4], target_stds=[0.1, 0.2, 0.5, 1.0])
    means, stds = torch.tensor(coder.means), torch.tensor(coder.stds)
    torch.testing.assert_close(coder.encode(anchors, boxes), (expected - means) / stds)
    torch.testing.assert_close(coder.decode(anchors, coder.encode(anchors, boxes)), boxes)


def test_decoding_one_box_a_class_and_none():
    coder = CornerBBoxCoder()
    anchors = torch.tensor([[10.0, 20, 50, 40], [0.0, 0, 10, 10]])
    offsets = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    boxes = coder.decode(anchors, offsets, max_shape=(30, 48))
    assert boxes.shape == (2, 12)
    for box, part in zip(boxes.split(4, -1), offsets.split(4, -1), strict=True):
        assert torch.equal(box, coder.decode(anchors, part, max_shape=(30, 48)))
        assert (box[:, [0, 2]] <= 48).all()
        assert (box[:, [1, 3]] <= 30).all()
        assert (box >= 0).all()
    assert coder.decode(anchors[:0], offsets[:0]).shape == (0, 12)
    assert coder.encode(anchors[:0], anchors[:0]).shape == (0, 4)


def test_extreme_boxes_of_the_coder():
    coder = CornerBBoxCoder()
    swapped = coder.decode(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[9.0, 0, -9, 0]]))
    assert (swapped[:, :2] <= swapped[:, 2:]).all()
    point = torch.tensor([[5.0, 5, 5, 5]])
    for target in (point, torch.tensor([[0.0, 0, 1e5, 1e5]])):
        assert coder.encode(point, target).isfinite().all()
    assert coder.decode(point, torch.full((1, 4), 1e4)).isfinite().all()
    assert coder.decode(point.half(), torch.full((1, 4), 6e4).half()).dtype == torch.float32


def test_coder_by_its_full_path():
    before = dict(TASK_UTILS.module_dict)
    coder = TASK_UTILS.build(dict(type=f"{OURS}.CornerBBoxCoder", target_stds=[0.2] * 4))
    assert type(coder) is CornerBBoxCoder
    assert dict(TASK_UTILS.module_dict) == before


# The loss.


def kl(offsets, target, alpha):
    """The formula, number by number."""
    d = abs(offsets - target)
    return torch.exp(-alpha) * (d * d / 2 if d <= 1 else d - 0.5) + alpha / 2


@pytest.mark.parametrize("one_box", [False, True])
def test_loss_of_the_box_head(one_box):
    """Of the box of the right class of each positive, over the number of regions."""
    cfg = config("Faster R-CNN", **{"head.reg_class_agnostic": one_box}).model.roi_head.bbox_head
    set_random_seed(0)
    head = MMDET_MODELS.build(cfg)
    for layer in (head.fc_reg, head.log_variance):
        torch.nn.init.normal_(layer.weight, std=0.3)
    features = torch.randn(5, 32, 7, 7)
    labels = torch.tensor([3, 10, 0, 9, 10])  # 10 is background
    targets, weights = torch.randn(5, 4), (labels < 10).float().unsqueeze(1).expand(5, 4)
    shared = features.flatten(1)
    for layer in head.shared_fcs:
        shared = layer(shared).relu()
    offsets, alphas = head.fc_reg(shared)[:, :0], head.log_variance(shared)
    offsets = torch.nn.functional.linear(shared, head.fc_reg.weight, head.fc_reg.bias)
    expected = 0
    for row in (0, 2, 3):
        first = 0 if one_box else 4 * labels[row]
        for side in range(4):
            expected += kl(offsets[row, first + side], targets[row, side], alphas[row, first + side])
    rois = torch.tensor([[0.0, 0, 0, 9, 9]] * 5)
    losses = head.loss(*head(features), rois, labels, torch.ones(5), targets, weights)
    torch.testing.assert_close(losses["loss_bbox"], expected / 5)
    losses["loss_bbox"].backward()
    rows = 4 if one_box else 12
    assert (head.log_variance.bias.grad != 0).sum() == rows
    assert (head.fc_reg.bias.grad != 0).sum() == rows


def test_loss_of_the_retina_head(batch):
    """Of the positive anchors of all levels, over their number."""
    model = detector("RetinaNet")
    twins = stock("RetinaNet", model), stock("RetinaNet", model, layers(model)[1])
    data = model.data_preprocessor(copy.deepcopy(batch), training=True)
    head, samples = model.bbox_head, data["data_samples"]
    features = model.extract_feat(data["inputs"])
    losses = head.loss(features, samples)["loss_bbox"]
    with torch.no_grad():
        cls_scores, offsets = twins[0].bbox_head(features)
        _, alphas = twins[1].bbox_head(features)
        metas = [sample.metainfo for sample in samples]
        sizes = [level.shape[-2:] for level in cls_scores]
        anchors, valid = head.get_anchors(sizes, metas, device="cpu")
        targets = head.get_targets(anchors, valid, [sample.gt_instances for sample in samples], metas)
    labels, _, boxes, _, positives = targets
    assert boxes[0].size(-1) == 4
    for level, loss in enumerate(losses):
        flat = [part[level].permute(0, 2, 3, 1).reshape(-1, 4) for part in (offsets, alphas)]
        rows = (labels[level].flatten() < 10).nonzero().flatten()
        target = boxes[level].reshape(-1, 4)
        expected = sum(kl(flat[0][i, s], target[i, s], flat[1][i, s]) for i in rows for s in range(4)) / positives
        assert len(rows) > 3
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


@every_detector
def test_start(name):
    """The paper's: nearly all sigmas are 1, in units of the encoded offsets."""
    model = build(config(name))
    offsets, log_variance = layers(model)
    assert log_variance.weight.shape == offsets.weight.shape
    assert log_variance.weight.std().item() == pytest.approx(1e-4, rel=0.1)
    assert (log_variance.bias == 0).all()
    if name != "RetinaNet":
        assert offsets.weight.std().item() == pytest.approx(1e-3, rel=0.1)


@every_detector
def test_both_layers_learn(name, batch):
    model = build(config(name))
    backward(model, batch)
    for layer in layers(model):
        assert layer.weight.grad.isfinite().all()
        assert layer.weight.grad.abs().sum() > 0


@every_detector
def test_no_objects(name, batch):
    empty = copy.deepcopy(batch)
    for sample in empty["data_samples"]:
        sample.gt_instances = sample.gt_instances[:0]
    model = detector(name)
    losses = backward(model, empty)
    assert all(value.isfinite() for value in losses.values())
    assert losses["loss_bbox"] == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert layers(model)[1].weight.grad is not None  # for several processes


def test_half_precision(batch):
    """Under autocast the losses are near those without, and detections have their boxes in float32."""
    model = detector("RetinaNet")
    expected = backward(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = backward(model, batch)
        found = predict(model, batch)
    assert losses["loss_bbox"].dtype == torch.float32
    torch.testing.assert_close(losses["loss_bbox"], expected["loss_bbox"], rtol=0.1, atol=0.02)
    assert all(len(instances) for instances in found)
    assert all(instances[key].dtype == torch.float32 for instances in found for key in ("bboxes", "sigmas"))


def test_half_precision_of_the_box_head():
    """The head alone: regions are not cut out of bfloat16 features on a CPU."""
    head = head_of(detector("Faster R-CNN"))
    features, rois = torch.randn(3, 32, 7, 7), torch.tensor([[0.0, 0, 0, 60, 60]] * 3)
    arguments = rois, torch.tensor([1, 2, 3]), torch.ones(3), torch.zeros(3, 4), torch.ones(3, 4)
    expected = head.loss(*head(features), *arguments)["loss_bbox"]
    test_cfg = ConfigDict(dict(score_thr=0.0, nms=HARD, max_per_img=5, voting=dict(sigma_t=0.02)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, boxes = head(features)
        assert boxes.dtype == torch.bfloat16
        loss = head.loss(scores, boxes, *arguments)["loss_bbox"]
        (found,) = head.predict_by_feat((rois,), (scores,), (boxes,), [dict(img_shape=(128, 128))], test_cfg)
    assert loss.dtype == found.bboxes.dtype == found.sigmas.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.1, atol=0.02)


@every_detector
def test_a_copy_stands_alone(name, batch):
    """As the moving average of a model is made: with its own layers."""
    model = detector(name)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        expected = predict(model, batch)
        equal(predict(twin, batch), expected)
        torch.nn.init.zeros_(layers(twin)[1].weight)
        equal(predict(model, batch), expected)
        assert not torch.equal(predict(twin, batch)[0].sigmas, expected[0].sigmas)


# Detections.


@pytest.mark.parametrize("kind", NMS)
@every_detector
def test_without_voting_it_is_the_stock_detector(name, kind, batch):
    model = detector(name, **{"test.voting": None})
    equal(predict(model, batch, NMS[kind]), predict(stock(name, model), batch, NMS[kind]), rtol=1e-5, atol=1e-4)


def candidates(name, model, batch):
    """Of each image the boxes, sigmas ``(N, C, 4)`` and scores ``(N, C)`` of all classes, in pixels before scaling.

    They are computed from what stock heads with the layers of offsets and of log variances predict.
    """
    heads = [head_of(stock(name, model, layer).eval()) for layer in layers(model)]
    data = model.data_preprocessor(copy.deepcopy(batch))
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


@pytest.mark.parametrize(("kind", "sigma_t"), [("hard", 0.1), ("gaussian", 0.1), ("linear", 0.3)])
@every_detector
def test_voting_is_the_formula(name, kind, sigma_t, batch):
    batch = {key: value[:2] for key, value in batch.items()}
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
    model = build(small(MASK_RCNN))
    for layer in layers(model):
        torch.nn.init.normal_(layer.weight, std=0.1)
    found = predict(model, batch)
    assert all(instances.masks.shape == (len(instances), 256, 64) for instances in found)
    assert all(len(instances) for instances in found)


# Errors, when the detector is built.


@every_detector
def test_other_losses_and_coders_are_refused(name):
    delta = dict(_delete_=True, type="DeltaXYWHBBoxCoder")
    for changes, message in (
        (
            {"head.loss_bbox": dict(_delete_=True, type="detloss_plugins.SmoothL1Loss")},
            "for UncertaintyKLLoss .*SmoothL1",
        ),
        ({"head.bbox_coder": delta}, "CornerBBoxCoder as bbox_coder, not DeltaXYWHBBoxCoder"),
        ({"head.reg_decoded_bbox": True}, "reg_decoded_bbox=False"),
    ):
        with pytest.raises(ValueError, match=message):
            build(config(name, **changes))


@pytest.mark.parametrize(
    "voting", [dict(sigma=0.02), dict(sigma_t=0.02, iou=0.1), dict(), dict(sigma_t=0), dict(sigma_t="0.02")], ids=str
)
@every_detector
def test_wrong_voting_is_refused(name, voting):
    with pytest.raises(ValueError, match=r"voting in test_cfg .* dict\(sigma_t=0.02\)"):
        build(config(name, **{"test.voting": {"_delete_": True, **voting}}))


def test_voting_needs_sigmas():
    cfg = small(CONFIG_DIR / "faster-rcnn_r18_fpn_digits.py")
    cfg.merge_from_dict(
        {"model.roi_head.type": f"{OURS}.UncertaintyRoIHead", "model.test_cfg.rcnn.voting.sigma_t": 0.02}
    )
    with pytest.raises(ValueError, match=r"voting .* needs UncertaintyBBoxHead"):
        build(cfg)


def test_stock_heads_refuse_the_loss(batch):
    """They would hand over weights as log variances."""
    for path in (RETINANET, CONFIG_DIR / "faster-rcnn_r18_fpn_digits.py"):
        cfg = small(path)
        head = cfg.model.bbox_head if "bbox_head" in cfg.model else cfg.model.roi_head.bbox_head
        head.type = "RetinaHead" if "bbox_head" in cfg.model else "Shared2FCBBoxHead"
        head.loss_bbox = dict(type="detloss_plugins.UncertaintyKLLoss")
        with pytest.raises(ValueError, match=r"not weights .* use UncertaintyBBoxHead or UncertaintyRetinaHead"):
            backward(build(cfg), batch)


# Runs.


def test_run_is_resumed_and_its_checkpoint_loads(tmp_path, monkeypatch):
    """As if never stopped; where this package is not, and into the stock detector but for the log variances."""
    build_digits()
    model = config("Faster R-CNN").model
    for part in (model.train_cfg.rpn, model.train_cfg.rcnn):
        part.sampler.num = 10**6  # all: resuming does not bring back the state of the random numbers
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(whole, Interrupt(), model=model)
    run(stopped, Interrupt(at=1), model=model)
    assert not (stopped / "epoch_2.pth").exists()
    hook = Interrupt()
    run(stopped, hook, model=model, resume=True)
    assert hook.began == [(1, 2)]
    full, resumed = (torch.load(d / "epoch_2.pth", weights_only=False) for d in (whole, stopped))
    for key in ("state_dict", "optimizer"):
        torch.testing.assert_close(resumed[key], full[key], rtol=1e-4, atol=1e-6)
    trained = build(config("Faster R-CNN"))
    trained.load_state_dict(full["state_dict"])
    stock("Faster R-CNN", trained)
    for module in [name for name in sys.modules if name.startswith("detloss_plugins")]:
        monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    with pytest.raises(ImportError):
        import detloss_plugins  # noqa: F401
    assert torch.load(whole / "epoch_2.pth", weights_only=False)["state_dict"]
