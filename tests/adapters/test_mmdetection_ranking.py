"""Heads that call a ranking loss once a step: its value and gradient, the box loss that goes with it, predictions.

Heads only, on random features, but for the run that is stopped and resumed.
"""

import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import ConfigDict
from mmengine.runner import set_random_seed
from mmengine.structures import InstanceData
from support.mmdetection import CONFIG_DIR, Interrupt, run, small
from support.mmdetection_features import CLASSES, SCENES, STRIDES, features, grads, samples

from detloss_plugins.losses import ALRPLoss, APLoss, DRLoss, GIoULoss, RankSortLoss, rank_sort_errors
from detloss_plugins.testing.digits import build_digits

pytestmark = pytest.mark.usefixtures("mmdet_scope")

ANCHORS = dict(type="AnchorGenerator", ratios=[1.0], octave_base_scale=2, scales_per_octave=2, strides=STRIDES)
MAX_IOU = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=0.5)
HEADS = {
    "RetinaHead": dict(assigner=MAX_IOU, sampler=dict(type="PseudoSampler")),
    "ATSSHead": dict(assigner=dict(type="ATSSAssigner", topk=9)),
}
LOSSES = {cls.__name__: cls for cls in (APLoss, ALRPLoss, RankSortLoss, DRLoss)}
every_head = pytest.mark.parametrize("name", HEADS)
every_loss = pytest.mark.parametrize("loss", LOSSES)


def settings(name, loss, **options):
    """The config of the stock head of that name, or of ours if the loss is a ranking loss."""
    ranking = loss in LOSSES
    return ConfigDict(
        dict(
            type=f"detloss_plugins.adapters.mmdetection.Ranking{name}" if ranking else f"mmdet.{name}",
            num_classes=CLASSES,
            in_channels=16,
            feat_channels=32,
            stacked_convs=1,
            anchor_generator=ANCHORS,
            reg_decoded_bbox=True,
            loss_cls=dict(type=f"detloss_plugins.{loss}", use_sigmoid=True),
            loss_bbox=dict(type="detloss_plugins.GIoULoss", loss_weight=2.0),
            train_cfg=dict(HEADS[name], allowed_border=-1, pos_weight=-1),
            test_cfg=dict(nms_pre=100, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.6), max_per_img=50),
        ),
        **options,
    )


def head(name, loss, **options):
    """A head whose weights depend on its layers only."""
    set_random_seed(0)
    model = MMDET_MODELS.build(settings(name, loss, **options))
    model.init_weights()
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and "centerness" not in key:  # a fresh head predicts one box everywhere
            torch.nn.init.normal_(module.weight, std=0.1)
    return model.train()


def gathered(model, scene):
    """Scores, labels, label weights of all levels, and predicted and true boxes of the positives, level by level."""
    batch = samples(scene)
    cls_scores, bbox_preds = model(features())
    metas = [sample.metainfo for sample in batch]
    sizes = [level.shape[-2:] for level in cls_scores]
    anchors, valid = model.get_anchors(sizes, metas, device="cpu")
    anchors_by_image = [torch.cat(levels) for levels in anchors]
    targets = model.get_targets(anchors, valid, [sample.gt_instances for sample in batch], metas)
    labels, label_weights, boxes = targets[1:4] if "ATSS" in type(model).__name__ else targets[:3]
    counts = [height * width * model.num_base_priors for height, width in sizes]
    rows = []
    for level, (scores, deltas) in enumerate(zip(cls_scores, bbox_preds, strict=True)):
        for image in range(len(batch)):
            anchor = anchors_by_image[image].split(counts)[level]
            logits = scores[image].reshape(model.num_base_priors, CLASSES, -1).permute(2, 0, 1).reshape(-1, CLASSES)
            delta = deltas[image].reshape(model.num_base_priors, 4, -1).permute(2, 0, 1).reshape(-1, 4)
            decoded = model.bbox_coder.decode(anchor, delta)
            rows.append((logits, labels[level][image], label_weights[level][image], decoded, boxes[level][image]))
    logits, labels, label_weights, decoded, boxes = map(torch.cat, zip(*rows, strict=True))
    positive = labels != CLASSES
    return logits, labels, label_weights, decoded[positive], boxes[positive]


def by_hand(model, scene):
    """The losses of a head from what :func:`gathered` gives; with aLRP's first balance."""
    logits, labels, weights, boxes, targets = gathered(model, scene)
    positive = labels != CLASSES
    loss = type(model.loss_cls)()
    giou = GIoULoss(reduction="none")(boxes, targets)
    if isinstance(loss, ALRPLoss):
        loss_cls, loss_bbox = loss(logits, labels, weights, loc_error=giou)
        return dict(loss_cls=loss_cls, loss_bbox=2 * 50 * loss_bbox)
    if isinstance(loss, RankSortLoss):
        quality = torch.zeros(len(labels))
        quality[positive] = bbox_overlaps(boxes.detach(), targets, is_aligned=True)
        loss_cls = loss(logits, (labels, quality), weights)
        largest = logits[positive].detach().sigmoid().max(1).values
        loss_bbox = (giou * largest).sum() / largest.sum()
        return dict(loss_cls=loss_cls, loss_bbox=2 * loss_bbox * (loss_cls / loss_bbox).detach())
    images_without = sum(not objects for objects in SCENES[scene])  # mmdet counts them as one positive each
    loss_bbox = giou.sum() / (len(giou) + images_without)
    return dict(loss_cls=loss(logits, labels, weights), loss_bbox=2 * loss_bbox)


@every_loss
@every_head
@pytest.mark.parametrize("scene", ["objects", "one level"])
def test_losses_are_over_all_levels(name, loss, scene):
    model = head(name, loss)
    expected = by_hand(model, scene)
    losses = model.loss(features(), samples(scene))
    assert losses.keys() == expected.keys()
    assert all(value > 0 for value in losses.values())
    torch.testing.assert_close(losses, expected)
    expected, found = grads(model, expected), grads(model, losses)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("scope", ["detloss_plugins", "mmdet"])
@pytest.mark.parametrize("loss", ["ALRPLoss", "RankSortLoss"])
def test_a_box_loss_without_weight(loss, scope):
    """The class loss still reads how well boxes fit."""
    found = []
    for weight in (2.0, 0.0):
        model = head("RetinaHead", loss, loss_bbox=dict(type=f"{scope}.GIoULoss", loss_weight=weight))
        found.append(model.loss(features(), samples("objects")))
        assert model.loss_bbox.loss_weight == weight
    assert torch.equal(found[0]["loss_cls"], found[1]["loss_cls"])
    assert found[0]["loss_bbox"] > 0 == found[1]["loss_bbox"]
    assert all(slope.isfinite().all() for slope in grads(model, found[1]).values())


@every_head
def test_scenes_are_what_they_say(name):
    model = head(name, "APLoss")
    sizes = [2 * 2 * (128 // stride) ** 2 for stride in STRIDES]
    levels = {}
    for scene in SCENES:
        labels = gathered(model, scene)[1]
        levels[scene] = sum(bool((level != CLASSES).any()) for level in labels.split(sizes))
    assert levels["objects"] > 1
    assert levels["one level"] == 1
    assert levels["nothing"] == 0


@pytest.mark.parametrize("loss", ["APLoss", "DRLoss"])
@pytest.mark.parametrize("decoded", [True, False])
def test_ap_and_dr_leave_the_box_loss_alone(loss, decoded):
    box = dict(type="mmdet.GIoULoss" if decoded else "mmdet.L1Loss", loss_weight=0.5)
    found, expected = (
        head("RetinaHead", cls, loss_bbox=box, reg_decoded_bbox=decoded).loss(features(), samples("objects"))
        for cls in (loss, "FocalLoss")
    )
    torch.testing.assert_close(found["loss_bbox"], sum(expected["loss_bbox"]))


@every_loss
@every_head
def test_no_object_in_the_batch(name, loss):
    stock, model = head(name, "FocalLoss"), head(name, loss)
    losses = model.loss(features(), samples("nothing"))
    assert all(value == 0 for value in losses.values())
    found = grads(model, losses)
    assert all((gradient == 0).all() for gradient in found.values())
    expected = grads(stock, stock.loss(features(), samples("nothing")))
    assert found.keys() == {key for key in expected if "centerness" not in key}


@every_loss
def test_ignored_anchors_have_no_part(loss):
    model = head("RetinaHead", loss)
    batch = samples("objects")
    batch[0].ignored_instances = InstanceData(bboxes=torch.tensor([[70.0, 10, 120, 60]]))
    with torch.no_grad():
        cls_scores, bbox_preds = model(features())
    metas = [sample.metainfo for sample in batch]
    truth = [sample.gt_instances for sample in batch]
    ignored = [batch[0].ignored_instances, None]
    anchors, valid = model.get_anchors([level.shape[-2:] for level in cls_scores], metas, device="cpu")
    weights = model.get_targets(anchors, valid, truth, metas, ignored)[1]
    # As channels of a level: the anchors of a pixel, then their classes.
    out = [
        (weight == 0).reshape(2, *level.shape[-2:], -1).permute(0, 3, 1, 2).repeat_interleave(CLASSES, 1)
        for weight, level in zip(weights, cls_scores, strict=True)
    ]
    assert sum(mask.sum() for mask in out) > 10 * CLASSES

    def value(cls_scores):
        leaves = [level.clone().requires_grad_() for level in cls_scores]
        total = model.loss_by_feat(leaves, bbox_preds, truth, metas, ignored)["loss_cls"]
        return total.detach(), torch.autograd.grad(total, leaves)

    expected, gradients = value(cls_scores)
    assert all((gradient[mask] == 0).all() for gradient, mask in zip(gradients, out, strict=True))
    raised = [torch.where(mask, 50.0, level) for mask, level in zip(out, cls_scores, strict=True)]
    torch.testing.assert_close(value(raised), (expected, gradients))


@every_head
def test_rank_and_sort_balance(name):
    """The box loss has the value of ranking and sorting error, whatever the boxes are."""
    model = head(name, "RankSortLoss", loss_bbox=dict(type="detloss_plugins.GIoULoss"))
    logits, labels, weights, boxes, targets = gathered(model, "objects")
    cells = torch.zeros_like(logits)
    positive = labels != CLASSES
    cells[positive, labels[positive]] = bbox_overlaps(boxes, targets, is_aligned=True).detach().clamp(min=1e-30)
    cells[weights == 0] = -1
    ranking, sorting = rank_sort_errors(logits, cells)
    assert ranking.mean() > 0
    assert sorting.mean() > 0
    losses = model.loss(features(), samples("objects"))
    total = (ranking + sorting).mean().float()
    torch.testing.assert_close(losses, dict(loss_cls=total, loss_bbox=total), check_dtype=False)


def balance(model):
    return model.box_balance.clone(), model.balance_history.clone()


@every_head
def test_alrp_balance_follows_the_history(name):
    """Fifty for a period of steps with objects; then the mean of both losses over that of the box loss."""
    model = head(name, "ALRPLoss", self_balance_period=3, loss_bbox=dict(type="detloss_plugins.GIoULoss"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    factor, history = 50.0, []
    for step, scene in enumerate(["objects", "one level", "nothing", "objects", "objects", "one level", "objects"]):
        by_itself = by_hand(model, scene)
        losses = model.loss(features(), samples(scene))
        if scene != "nothing":
            history.append((by_itself["loss_bbox"].item() / 100, by_itself["loss_cls"].item()))
        if len(history) == 3:  # the balance of the step that completes a period counts already
            box, cls = map(sum, zip(*history, strict=True))
            factor, history = (box + cls) / box, []
        assert losses["loss_bbox"].item() == pytest.approx(by_itself["loss_bbox"].item() / 100 * factor), step
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert factor < 50


def test_alrp_balance_moves_in_training_only():
    model = head("RetinaHead", "ALRPLoss", self_balance_period=100)
    for training, gradients, moves in ((False, True, False), (True, False, False), (True, True, True)):
        before = balance(model)[1]
        with torch.set_grad_enabled(gradients):
            model.train(training).loss(features(), samples("objects"))
        assert (balance(model)[1] != before).all() == moves


def test_alrp_balance_survives_a_step_of_nan():
    model = head("RetinaHead", "ALRPLoss", self_balance_period=1)
    torch.nn.init.constant_(model.retina_reg.bias, torch.nan)
    assert model.loss(features(), samples("objects"))["loss_bbox"].isnan()
    assert balance(model)[0] == 50
    assert (balance(model)[1] == 0).all()
    torch.nn.init.zeros_(model.retina_reg.bias)
    model.loss(features(), samples("objects"))
    assert balance(model)[0].isfinite()
    assert balance(model)[0] != 50


def test_alrp_balance_may_change_before_backward():
    """As where the gradients of two batches are summed."""
    model = head("RetinaHead", "ALRPLoss", self_balance_period=1)
    first, second = (model.loss(features(), samples("objects")) for _ in range(2))
    torch.testing.assert_close(grads(model, first), grads(model, second))


def test_alrp_balance_is_saved_and_resumed(tmp_path):
    """Trained through, and stopped in the middle of a period."""
    build_digits()

    def alrp():
        model = small(CONFIG_DIR / "retinanet-alrp_r18_fpn_digits.py").model
        model.bbox_head.self_balance_period = 3
        return model

    def saved(folder, epoch):
        state = torch.load(tmp_path / folder / f"epoch_{epoch}.pth", weights_only=False)["state_dict"]
        return state["bbox_head.box_balance"], state["bbox_head.balance_history"]

    run(tmp_path / "whole", Interrupt(), model=alrp())
    run(tmp_path / "stopped", Interrupt(at=1), model=alrp())
    half = saved("stopped", 1)
    assert half[0] == 50
    assert half[1][2] == 2
    run(tmp_path / "stopped", Interrupt(), model=alrp(), resume=True)
    full = saved("whole", 2)
    assert full[0] != 50
    assert full[1][2] == 1
    torch.testing.assert_close(saved("stopped", 2), full, rtol=1e-4, atol=1e-6)


@every_loss
@every_head
def test_prediction_is_the_stock_heads(name, loss):
    """With centerness 1 everywhere, for there is none."""
    stock, model = (head(name, cls).eval() for cls in ("FocalLoss", loss))
    assert not model.load_state_dict(stock.state_dict(), strict=False).missing_keys or loss == "ALRPLoss"
    if name == "ATSSHead":
        torch.nn.init.zeros_(stock.atss_centerness.weight)
        torch.nn.init.constant_(stock.atss_centerness.bias, 50)
    with torch.no_grad():
        found, expected = (head.predict(features(), samples("objects")) for head in (model, stock))
    for one, other in zip(found, expected, strict=True):
        assert len(one) == 50
        for key in ("bboxes", "scores", "labels"):
            torch.testing.assert_close(one[key], other[key])


@every_loss
@every_head
def test_weights_are_the_stock_heads(name, loss):
    stock, model = (set(head(name, cls).state_dict()) for cls in ("FocalLoss", loss))
    own = {"box_balance", "balance_history"} if loss == "ALRPLoss" else set()
    missing = {"atss_centerness.weight", "atss_centerness.bias"} if name == "ATSSHead" else set()
    assert model - stock == own
    assert stock - model == missing
    assert stock >= missing


@pytest.mark.parametrize("given", [None, dict(type="mmdet.CrossEntropyLoss", use_sigmoid=True)])
def test_centerness_of_a_base_config_is_left_alone(given):
    """The type may be the only change to a stock config."""
    model = head("ATSSHead", "RankSortLoss", loss_centerness=given)
    assert not hasattr(model, "loss_centerness")
    assert model.loss(features(), samples("objects")).keys() == {"loss_cls", "loss_bbox"}


@every_head
def test_errors(name):
    cfg = settings(name, "APLoss")
    for change, message in (
        (dict(type="detloss_plugins.FocalLoss", use_sigmoid=True), "is for APLoss, .* not FocalLoss"),
        (dict(type="mmdet.FocalLoss", use_sigmoid=True), "is for APLoss, .* not FocalLoss"),
        (dict(type="detloss_plugins.APLoss"), "Write use_sigmoid=True .* APLoss"),
    ):
        with pytest.raises(ValueError, match=message):
            MMDET_MODELS.build({**cfg, "loss_cls": change})
    for loss in ("ALRPLoss", "RankSortLoss"):
        with pytest.raises(ValueError, match=f"{loss} .* reg_decoded_bbox=True"):
            MMDET_MODELS.build({**settings(name, loss), "reg_decoded_bbox": False})


@every_loss
@every_head
def test_a_few_steps_decrease_the_loss(name, loss):
    model = head(name, loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    values = []
    for _ in range(25):
        losses = model.loss(features(), samples("objects"))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        values.append(losses["loss_cls"].item())
    assert values[-1] < 0.7 * values[0]
