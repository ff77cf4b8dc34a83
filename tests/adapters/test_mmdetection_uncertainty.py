"""Heads that predict the uncertainty of boxes: their boxes, their loss, what they refuse, whole runs."""

import copy
import pickle

import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.registry import TASK_UTILS
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner, set_random_seed
from scipy.stats import spearmanr
from support.mmdetection import CONFIG_DIR, backward, build, small, stopped_and_resumed
from support.mmdetection_uncertainty import (
    FASTER_RCNN,
    HARD,
    RETINANET,
    config,
    detector,
    equal,
    every_detector,
    head_of,
    layers,
    predict,
    stock,
)

from detloss_plugins.adapters.mmdetection import CornerBBoxCoder
from detloss_plugins.testing.digits import build_digits

pytestmark = pytest.mark.usefixtures("mmdet_scope")

OURS = "detloss_plugins.adapters.mmdetection"


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
    offsets = torch.nn.functional.linear(shared, head.fc_reg.weight, head.fc_reg.bias)
    alphas = head.log_variance(shared)
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


@pytest.mark.parametrize("name", ["Faster R-CNN", "RetinaNet"])
def test_a_copy_stands_alone(name, batch):
    """As the moving average of a model is made: with its own layers."""
    model = detector(name)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        expected = predict(model, batch)
        equal(predict(twin, batch), expected)
        torch.nn.init.zeros_(layers(twin)[1].weight)
        equal(predict(model, batch), expected)
        assert not torch.equal(predict(twin, batch)[0].sigmas, expected[0].sigmas)


# Errors, when the detector is built.


@pytest.mark.parametrize("name", ["Faster R-CNN", "RetinaNet"])
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
@pytest.mark.parametrize("name", ["Faster R-CNN", "RetinaNet"])
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


@pytest.mark.parametrize("detector", [pytest.param("Faster R-CNN", marks=pytest.mark.slow), "RetinaNet"])
def test_run_is_resumed_and_its_checkpoint_loads(detector, tmp_path):
    """Into the stock detector but for the log variances."""
    model = config(detector).model
    for part in (model.train_cfg.rpn, model.train_cfg.rcnn) if detector == "Faster R-CNN" else ():
        part.sampler.num = 10**6  # all: resuming does not bring back the state of the random numbers
    weights, _ = stopped_and_resumed(tmp_path, model)
    trained = build(config(detector))
    trained.load_state_dict(weights)
    stock(detector, trained)


def matched(runner):
    """Sigmas, errors and sides ``(K, 4)`` of the detections with an IoU above 0.5 with an object of their class."""
    rows = []
    with torch.no_grad():
        for data in runner.val_dataloader:
            for sample, given in zip(runner.model.eval().test_step(data), data["data_samples"], strict=True):
                found, objects = sample.pred_instances, given.gt_instances
                boxes = objects.bboxes.tensor
                overlaps = bbox_overlaps(found.bboxes, boxes) * (found.labels[:, None] == objects.labels)
                best, index = overlaps.max(1)
                found, boxes = found[best > 0.5], boxes[index[best > 0.5]]
                sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
                rows.append((found.sigmas, (found.bboxes - boxes).abs(), sides))
    return map(torch.cat, zip(*rows, strict=True))


@pytest.mark.slow
def test_digits_teach_sigmas_that_follow_the_errors(tmp_path):
    """In half the epochs of the config; the size of a box alone does not explain it, and the vote does no harm."""
    build_digits()
    cfg = Config.fromfile(FASTER_RCNN)
    cfg.merge_from_dict({"train_cfg.max_epochs": 6, "train_cfg.val_interval": 100, "param_scheduler.1.end": 6})
    # The evaluation reads the file; it is the comparison with the sigmas that needs the objects here.
    cfg.val_dataloader.dataset.pipeline.insert(1, dict(type="LoadAnnotations", with_bbox=True))
    cfg.work_dir = str(tmp_path)
    runner = Runner.from_cfg(cfg)
    runner.train()
    voted = runner.val()["coco/bbox_mAP_75"]
    runner.model.roi_head.test_cfg.voting = None
    assert voted >= runner.val()["coco/bbox_mAP_75"] > 0.05
    sigmas, errors, sides = matched(runner)
    assert len(sigmas) > 200
    assert spearmanr(sigmas.flatten(), errors.flatten())[0] > 0.3
    assert spearmanr((sigmas / sides).flatten(), (errors / sides).flatten())[0] > 0.1
    for side in range(4):
        assert spearmanr(sigmas[:, side], errors[:, side])[0] > 0.2
