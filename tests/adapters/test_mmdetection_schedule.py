"""A loss that changes in the course of a training with mmengine's Runner, which nobody has to tell."""

import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.hooks import Hook
from mmengine.runner import set_random_seed
from support.mmdetection import DIGITS, run, small
from support.mmdetection_features import CLASSES, STRIDES, features, samples

from detloss_plugins.losses import set_progress
from detloss_plugins.testing.digits import build_digits

pytestmark = pytest.mark.usefixtures("mmdet_scope")

QFL = dict(type="QualityFocalLoss", use_sigmoid=True)


def schedule(*losses, **settings):
    losses = [dict(type=loss) if isinstance(loss, str) else loss for loss in losses]
    return dict(type="detloss_plugins.ScheduledLoss", losses=losses, use_sigmoid=True, **settings)


class Watch(Hook):
    """Notes after each iteration which class loss counted; may end the run where an epoch begins."""

    def __init__(self, end=None):
        self.end, self.seen = end, []

    def before_train_epoch(self, runner):
        if runner.epoch == self.end:
            raise KeyboardInterrupt

    def after_train_iter(self, runner, *_, **__):
        self.seen.append((runner.iter, runner.model.bbox_head.loss_cls.running))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({"at": [1]}, [(0, (0,)), (1, (0,)), (2, (1,)), (3, (1,))], marks=pytest.mark.slow),
        # The head calls its loss once for each of five levels, and an iteration counts once.
        ({"at": [1], "by_epoch": False, "fade": 2}, [(0, (0,)), (1, (0, 1)), (2, (0, 1)), (3, (1,))]),
    ],
)
def test_a_run_goes_through_the_schedule_and_resumes_in_it(settings, expected, tmp_path):
    build_digits()
    cfg = small(DIGITS)
    cfg.model.bbox_head.loss_cls = schedule(QFL, {**QFL, "loss_weight": 2.0}, **settings)
    (watch, rest) = Watch(end=1), Watch()
    run(tmp_path, watch, model=cfg.model)
    runner = run(tmp_path, rest, model=cfg.model, resume=True)
    assert watch.seen + rest.seen == expected
    assert runner.model.bbox_head.loss_cls.progress == (1 if settings.get("by_epoch", True) else 3)


def test_a_schedule_in_epochs_says_that_a_run_has_none(tmp_path):
    """As one that counts iterations has a single epoch."""
    build_digits()
    cfg = small(DIGITS)
    cfg.model.bbox_head.loss_cls = schedule(QFL, QFL, at=[1])
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=10)
    with pytest.warns(UserWarning, match="begins at epoch 1, and training has 1"):
        run(tmp_path, Watch(), model=cfg.model, train_cfg=cfg.train_cfg, param_scheduler=None)


def head(kind, loss_cls):
    set_random_seed(0)
    anchors = dict(type="AnchorGenerator", ratios=[1.0], octave_base_scale=2, scales_per_octave=2, strides=STRIDES)
    assigner = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=0.5)
    cfg = dict(
        type=kind,
        num_classes=CLASSES,
        in_channels=16,
        feat_channels=32,
        stacked_convs=1,
        anchor_generator=anchors,
        reg_decoded_bbox=True,
        loss_cls=loss_cls,
        loss_bbox=dict(type="detloss_plugins.GIoULoss", loss_weight=2.0),
        train_cfg=dict(assigner=assigner, sampler=dict(type="PseudoSampler"), allowed_border=-1, pos_weight=-1),
    )
    model = MMDET_MODELS.build(cfg)
    model.init_weights()
    return model.train()


def losses_of(model):
    batch = samples("objects")
    metas = [sample.metainfo for sample in batch]
    losses = model.loss_by_feat(*model(features()), [sample.gt_instances for sample in batch], metas)
    return {name: sum(value) if isinstance(value, list) else value for name, value in losses.items()}


def test_a_head_for_ranking_takes_classification_losses_in_turn():
    """Each stage is what it is alone: BCE in mmdet's head, the ranking losses in ours, with their box losses."""
    ours = "detloss_plugins.adapters.mmdetection.RankingRetinaHead"
    bce = dict(type="detloss_plugins.BinaryCrossEntropyLoss", use_sigmoid=True)
    alone = [losses_of(head("RetinaHead", bce))]
    for name in ("APLoss", "ALRPLoss"):
        alone.append(losses_of(head(ours, dict(type=f"detloss_plugins.{name}", use_sigmoid=True))))
    stages = schedule("BinaryCrossEntropyLoss", "APLoss", "ALRPLoss", at=[1, 3], fade=2, loss_weight=3.0)
    for epoch, shares in ((0, (1, 0, 0)), (2, (0.5, 0.5, 0)), (3, (0, 1, 0)), (4, (0, 0.5, 0.5)), (9, (0, 0, 1))):
        model = head(ours, stages)
        set_progress(model, epoch=epoch)
        found = losses_of(model)
        for name, factor in (("loss_cls", 3), ("loss_bbox", 1)):
            expected = sum(share * losses[name] for share, losses in zip(shares, alone, strict=True))
            torch.testing.assert_close(found[name], factor * expected)


@pytest.mark.parametrize(
    ("kind", "cfg", "words"),
    [
        ("RetinaHead", schedule("BinaryCrossEntropyLoss", "APLoss", at=[1]), "called level by level"),
        ("RetinaHead", dict(type="detloss_plugins.ScheduledLoss", losses=[QFL, QFL], at=[1]), "Write use_sigmoid=True"),
        ("RetinaHead", schedule("CIoULoss", "CIoULoss", at=[1]), "no place for CIoULoss"),
    ],
)
def test_a_stage_that_does_not_fit_a_head_is_refused(kind, cfg, words):
    with pytest.raises(ValueError, match=words):
        head(kind, cfg)
