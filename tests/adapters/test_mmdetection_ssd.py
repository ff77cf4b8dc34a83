"""The SSD head: equal to the stock head, any loss in it, what it refuses, training that is stopped and resumed.

Heads on random features, but for the detectors that see real digits.
"""

import time

import mmdet.models
import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.runner import set_random_seed
from mmengine.structures import InstanceData
from support.commands import python
from support.mmdetection import (
    BOX_LOSSES,
    CONFIG_DIR,
    FORMS,
    REGRESSION,
    TRAIN,
    backward,
    box_loss_cfg,
    build,
    scalars,
    settings_of,
    small,
    stopped_and_resumed,
)
from support.mmdetection_features import CLASSES, features, grads, samples

from detloss_plugins.loss import Loss
from detloss_plugins.losses import MultiBoxLoss
from detloss_plugins.registry import loss_class
from detloss_plugins.testing.digits import build_digits

pytestmark = pytest.mark.usefixtures("mmdet_scope")

DIGITS = CONFIG_DIR / "ssd_r18_digits.py"
OURS = "detloss_plugins.adapters.mmdetection.PluginSSDHead"
SCENES = ["objects", "one level", "nothing"]  # "one level" has an image without objects


def settings(train_cfg=None, **options):
    """The config of our head; ``type="mmdet.SSDHead"`` among the options makes it the stock head's."""
    assigner = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.0, gt_max_assign_all=False)
    train = dict(assigner=assigner, allowed_border=-1, pos_weight=-1, neg_pos_ratio=3, smoothl1_beta=1.0)
    anchors = dict(min_sizes=[12, 30, 60], max_sizes=[30, 60, 100], ratios=[[2]] * 3)
    return ConfigDict(
        dict(
            type=OURS,
            num_classes=CLASSES,
            in_channels=[16, 16, 16],
            anchor_generator=dict(type="SSDAnchorGenerator", scale_major=False, strides=[8, 16, 32], **anchors),
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=[0.1, 0.1, 0.2, 0.2]),
            train_cfg=dict(train, **(train_cfg or {})),
            test_cfg=dict(nms_pre=100, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.45), max_per_img=50),
        ),
        **options,
    )


def head(**options):
    """A head whose weights depend on its layers only."""
    model = MMDET_MODELS.build(settings(**options))
    set_random_seed(0)
    model.init_weights()
    return model.train()


def pair(**options):
    """Our head and the stock one with the same weights."""
    ours, stock = head(**options), head(**options, type="mmdet.SSDHead")
    stock.load_state_dict(ours.state_dict(), strict=True)
    return ours, stock


def same(ours, stock, batch):
    """The two heads have the same losses, as they are logged, and gradients; returns the losses."""
    found, lists = ours.loss(features(), batch), stock.loss(features(), batch)
    expected = {key: sum(value.sum() for value in values) for key, values in lists.items()}
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(grads(ours, found), grads(stock, expected), rtol=1e-5, atol=1e-6)
    return found


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("ratio", [3, 0, 1000])
def test_equal_to_the_stock_head(scene, decoded, ratio):
    losses = same(*pair(reg_decoded_bbox=decoded, train_cfg=dict(neg_pos_ratio=ratio)), samples(scene))
    assert losses.keys() == {"loss_cls", "loss_bbox"}
    assert all((value == 0) == (scene == "nothing") for value in losses.values())


# It draws anchors at random, from the seed that features() sets, and normalises by the negatives too.
SAMPLER = dict(type="RandomSampler", num=200, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False)


@pytest.mark.parametrize(
    "change", [dict(pos_weight=2.5), dict(allowed_border=0), dict(smoothl1_beta=0.2), dict(sampler=SAMPLER)], ids=str
)
def test_equal_under_other_settings(change):
    """Positives of another weight, anchors beyond the image left out, another beta, another sampler."""
    box = dict(type="detloss_plugins.SmoothL1Loss", beta=change.get("smoothl1_beta", 1.0))
    many = dict(neg_pos_ratio=50)  # so that some are beyond the image
    change = {**change, **many}
    ours, stock = head(train_cfg=change, loss_bbox=box), head(train_cfg=change, type="mmdet.SSDHead")
    plain = same(*pair(train_cfg=many), samples("objects"))
    changed = same(ours, stock, samples("objects"))
    assert any(changed[key] != plain[key] for key in plain)


def test_equal_with_ignored_regions():
    ours, stock = pair(train_cfg=dict(assigner=dict(settings().train_cfg.assigner, ignore_iof_thr=0.5)))
    data = samples("objects")
    data[0].ignored_instances = InstanceData(bboxes=torch.tensor([[70.0, 10, 120, 60]]))
    losses = same(ours, stock, data)
    assert losses["loss_cls"] != ours.loss(features(), samples("objects"))["loss_cls"]


def test_equal_when_all_negatives_are_tied():
    """A head of zeros: which of the equal negatives count differs, their number and the losses do not."""
    ours, stock = pair()
    for model in (ours, stock):
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
    data = samples("objects")
    found, expected = ours.loss(features(), data), stock.loss(features(), data)
    torch.testing.assert_close(found, {key: sum(v.sum() for v in values) for key, values in expected.items()})


def test_it_is_multibox_loss():
    """The module on what the head predicts, and the targets that it makes, gives the head's losses."""
    model = head()
    data = samples("one level")
    metas, truth = [sample.metainfo for sample in data], [sample.gt_instances for sample in data]
    cls_scores, bbox_preds = model(features())
    anchors, valid = model.get_anchors([level.shape[-2:] for level in cls_scores], metas, device="cpu")
    labels, _, boxes, _, count = model.get_targets(anchors, valid, truth, metas)
    logits = torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, CLASSES + 1) for level in cls_scores], 1)
    offsets = torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, 4) for level in bbox_preds], 1)
    target = torch.cat(labels, 1), torch.cat(boxes, 1)
    assert (target[0] < CLASSES).sum() > 0
    expected = MultiBoxLoss(return_dict=True)((logits, offsets), target)
    torch.testing.assert_close(model.loss(features(), data), expected)
    assert count == (target[0] < CLASSES).sum(1).clamp(min=1).sum()


def detectors(batch):
    """A small SSD on digits with our head and with the stock one, of the same weights."""
    ours, stock = small(DIGITS), small(DIGITS)
    head = stock.model.bbox_head
    head.type = "mmdet.SSDHead"
    stock.model.train_cfg.smoothl1_beta = head.loss_bbox.beta
    del head.loss_cls, head.loss_bbox
    ours, stock = build(ours), build(stock)
    stock.load_state_dict(ours.state_dict(), strict=True)
    return ours, stock


def test_detectors_are_equal_on_digits(batch):
    ours, stock = detectors(batch)
    torch.testing.assert_close(backward(ours, batch), backward(stock, batch), rtol=1e-5, atol=1e-6)
    for (name, our_one), stock_one in zip(ours.named_parameters(), stock.parameters(), strict=True):
        scale = stock_one.grad.abs().max()
        assert (our_one.grad - stock_one.grad).abs().max() <= 1e-4 * scale + 1e-7, name


def test_prediction_is_the_stock_heads():
    ours, stock = (model.eval() for model in pair())
    stock.loss_cls = None  # mmdet 3.3.0 looks for it in prediction, and the stock head has none
    with torch.no_grad():
        found, expected = (model.predict(features(), samples("objects")) for model in (ours, stock))
    for one, other in zip(found, expected, strict=True):
        assert len(one) == 50
        for key in ("bboxes", "scores", "labels"):
            torch.testing.assert_close(one[key], other[key])


def sigmoid(**options):
    return head(loss_cls=dict(type="detloss_plugins.FocalLoss", use_sigmoid=True), **options)


def test_a_sigmoid_loss_has_no_channel_for_the_background():
    model = sigmoid().eval()
    assert model.use_sigmoid_cls
    with torch.no_grad():
        cls_scores, _ = model(features())
        found = model.predict(features(), samples("objects"))
    assert all(scores.shape[1] == anchors * CLASSES for scores, anchors in zip(cls_scores, [4] * 3, strict=True))
    probabilities = torch.cat([level[0].sigmoid().flatten() for level in cls_scores])
    best = found[0].scores.max()
    assert (probabilities - best).abs().min() < 1e-6
    assert best == pytest.approx(probabilities.max().item())


def test_use_sigmoid_may_be_left_out():
    """The built loss is asked, so that channels and loss always fit."""
    assert head(loss_cls=dict(type="detloss_plugins.FocalLoss")).cls_out_channels == CLASSES
    assert head(loss_cls=dict(type="detloss_plugins.CrossEntropyLoss")).cls_out_channels == CLASSES + 1


@pytest.mark.parametrize("prior", [None, 0.01, 0.3])
def test_prior_of_sigmoid_scores(prior):
    tower = dict(stacked_convs=1, feat_channels=32, norm_cfg=dict(type="GN", num_groups=32), act_cfg=dict(type="ReLU"))
    model = sigmoid(**tower, **({} if prior is None else dict(prior_prob=prior)))
    for level in range(3):
        torch.testing.assert_close(model.cls_convs[level][-1].bias.sigmoid(), torch.full((16,), prior or 0.01))
        assert (model.reg_convs[level][-1].bias == 0).all()
        assert (model.cls_convs[level][0].norm.weight == 1).all()
    assert all((layers[-1].bias == 0).all() for layers in head().cls_convs)


def takes_steps(model, last, data):
    """Two steps change both losses, with gradients in the last layers; returns the first losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(2):
        losses = model.loss(features(), data)
        assert all(value.isfinite() and value > 0 for value in losses.values()), losses
        found = grads(model, losses)
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert all(gradient.abs().sum() > 0 for name, gradient in found.items() if last in name and "weight" in name)
        optimizer.step()
        seen.append(losses)
    assert all(seen[0][key] != seen[1][key] for key in seen[0])
    return seen[0]


RANKING = [(name, True) for name in ("APLoss", "ALRPLoss", "RankSortLoss", "DRLoss")]


@pytest.mark.parametrize(("name", "use_sigmoid"), [form for form in FORMS if form[0] != "SeesawLoss"] + RANKING)
def test_any_classification_loss_takes_steps(name, use_sigmoid):
    found = {**settings_of(loss_class(name), use_sigmoid), "use_sigmoid": use_sigmoid}
    if "num_classes" in found:
        found["num_classes"] = CLASSES
    model = head(loss_cls=dict(type=f"detloss_plugins.{name}", **found), prior_prob=0.5)
    assert model.use_sigmoid_cls == use_sigmoid
    takes_steps(model, "cls_convs", samples("objects"))


@pytest.mark.parametrize("name", [*REGRESSION, "GHMR"])
def test_any_pointwise_loss_takes_steps(name):
    takes_steps(head(loss_bbox=dict(type=f"detloss_plugins.{name}")), "reg_convs", samples("objects"))


@pytest.mark.parametrize("loss", BOX_LOSSES, ids=lambda cls: cls.__name__)
def test_any_box_loss_takes_steps(loss):
    takes_steps(head(loss_bbox=box_loss_cfg(loss), reg_decoded_bbox=True), "reg_convs", samples("objects"))


@pytest.mark.parametrize("cfg", [dict(type="FocalLoss", use_sigmoid=True), dict(type="CrossEntropyLoss")], ids=str)
@pytest.mark.parametrize("ratio", [3, None])
def test_losses_of_mmdet(cfg, ratio):
    """In our head they give what ours give."""
    theirs, ours = (
        head(loss_cls={**cfg, "type": f"{scope}.{cfg['type']}"}, neg_pos_ratio=ratio)
        for scope in ("mmdet", "detloss_plugins")
    )
    assert type(theirs.loss_cls) is getattr(mmdet.models.losses, cfg["type"])
    assert isinstance(ours.loss_cls, Loss)
    found, expected = (model.loss(features(), samples("objects")) for model in (theirs, ours))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grads(theirs, found), grads(ours, expected), rtol=1e-4, atol=1e-6)


def test_which_negatives_have_a_part():
    focal, softmax = (dict(type=f"detloss_plugins.{name}") for name in ("FocalLoss", "CrossEntropyLoss"))
    two = dict(train_cfg=dict(neg_pos_ratio=2))
    assert head(loss_cls=softmax, **two).neg_pos_ratio == 2
    assert head(loss_cls=focal, **two).neg_pos_ratio is None
    assert head(loss_cls=focal, neg_pos_ratio=1, **two).neg_pos_ratio == 1
    assert head(loss_cls=softmax, neg_pos_ratio=None, **two).neg_pos_ratio is None
    assert head(loss_cls=dict(type="mmdet.FocalLoss")).neg_pos_ratio == 3  # it says nothing of itself
    assert MMDET_MODELS.build({**settings(), "train_cfg": None}).neg_pos_ratio == 3  # as for prediction only


def test_all_negatives_of_an_image_without_objects():
    """With mining they have no part, without it they teach too."""
    mined, all_of_them = (sigmoid(neg_pos_ratio=ratio) for ratio in (3, None))
    for model, teaches in ((mined, False), (all_of_them, True)):
        losses = model.loss(features(), samples("nothing"))
        assert (losses["loss_cls"] > 0) == teaches
        assert losses["loss_bbox"] == 0
        assert grads(model, losses).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss_bbox=dict(type="detloss_plugins.GIoULoss")), "GIoULoss takes boxes.*reg_decoded_bbox=True"),
        (dict(loss_bbox=dict(type="detloss_plugins.FocalLoss")), "loss_bbox .* regression or box loss, not FocalLoss"),
        (dict(loss_bbox=dict(type="detloss_plugins.UncertaintyKLLoss")), "loss_bbox .* not UncertaintyKLLoss"),
        (dict(loss_cls=dict(type="detloss_plugins.L1Loss")), "loss_cls .* classification or ranking loss, not L1Loss"),
        (dict(loss_cls=dict(type="detloss_plugins.SeesawLoss")), "SeesawLoss has channels of its own"),
        (dict(loss_cls=dict(type="mmdet.SeesawLoss")), "SeesawLoss has channels of its own"),
        (dict(loss_cls=dict(type="detloss_plugins.APLoss"), neg_pos_ratio=3), "APLoss ranks all negatives"),
        (dict(neg_pos_ratio=-1), "neg_pos_ratio must be .* not -1"),
        (dict(train_cfg=dict(neg_pos_ratio="three")), "neg_pos_ratio must be .* not 'three'"),
        (dict(prior_prob=1.0), "prior_prob must be between 0 and 1, not 1.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        head(**options)


@pytest.mark.parametrize("decoded", [False, True])
def test_autocast(decoded):
    """Half-precision predictions are up-cast before anything is computed of them."""
    for model in (head(reg_decoded_bbox=decoded), sigmoid(reg_decoded_bbox=decoded)):
        data = samples("objects")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cls_scores, bbox_preds = model(features())
            assert cls_scores[0].dtype == torch.bfloat16
            arguments = [sample.gt_instances for sample in data], [sample.metainfo for sample in data]
            losses = model.loss_by_feat(cls_scores, bbox_preds, *arguments)
        wide = model.loss_by_feat(*([x.float() for x in level] for level in (cls_scores, bbox_preds)), *arguments)
        assert all(value.dtype == torch.float32 for value in losses.values())
        assert losses == wide
        assert all(gradient.isfinite().all() for gradient in grads(model, losses).values())


def test_extreme_predictions_are_finite():
    for model in (head(), sigmoid(), head(reg_decoded_bbox=True, loss_bbox=dict(type="detloss_plugins.CIoULoss"))):
        for size in (1e3, 1e6):
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=size)
            losses = model.loss(features(), samples("objects"))
            assert all(value.isfinite() for value in losses.values()), losses
            assert all(gradient.isfinite().all() for gradient in grads(model, losses).values())


def test_resume_continues_as_if_never_stopped(batch, tmp_path):
    """And what it has learnt fits the stock model."""
    weights, _ = stopped_and_resumed(tmp_path, small(DIGITS).model)
    detectors(batch)[1].load_state_dict(weights, strict=True)


@pytest.mark.parametrize("name", ["ssd", "ssd-focal", "ssd-balanced-ce", "ssd-confidence-weighted"])
def test_a_few_steps_on_digits_decrease_the_losses(name, batch):
    cfg = small(CONFIG_DIR / f"{name}_r18_digits.py")
    model = build(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    values = []
    for _ in range(10):
        optimizer.zero_grad()
        values.append(backward(model, batch))
        optimizer.step()
    assert all(values[-1][key] < 0.8 * values[0][key] for key in ("loss", "loss_bbox"))


@pytest.mark.slow
def test_digits_config_learns(tmp_path):
    """From scratch on two cores in a third of its schedule, and far above that mAP50, within two minutes."""
    build_digits()
    start = time.monotonic()
    short = ["train_cfg.max_epochs=8", "train_cfg.val_interval=8", "param_scheduler.1.end=8"]
    python(TRAIN, DIGITS, "--work-dir", tmp_path, "--cfg-options", *short)
    assert time.monotonic() - start < 120
    assert scalars(tmp_path)[-1].get("coco/bbox_mAP_50", 0) >= 0.2
