"""Class weights and label smoothing in the heads of mmdet."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.hooks import Hook
from mmengine.runner import Runner
from support.mmdetection import DIGITS, backward, build, config, run, small

from detloss_plugins.adapters.mmdetection import ClassCountsHook
from detloss_plugins.adapters.mmdetection.counts import class_counts
from detloss_plugins.families import effective_weights
from detloss_plugins.losses import FocalLoss

WEIGHTS = [0.5, 2.0, 0.25, 1.0, 3.0, 0.25, 1.5, 1.0, 0.75, 4.0]


def with_loss(**settings):
    cfg = small(DIGITS)
    cfg.model.bbox_head.loss_cls = {"type": "detloss_plugins.QualityFocalLoss", "use_sigmoid": True, **settings}
    return cfg


def test_a_head_weighs_its_classes(mmdet_scope, batch):
    """A factor for all classes is a factor on the class loss; weights of their own change the gradient of the layer."""
    found = []
    for settings in ({}, {"class_weight": [2.0] * 10}, {"class_weight": WEIGHTS}, {"label_smoothing": 0.1}):
        model = build(with_loss(**settings))
        losses = backward(model, batch)
        gradient = model.bbox_head.gfl_cls.weight.grad
        found.append((losses["loss_cls"], gradient.view(-1, 10, *gradient.shape[1:]).sum(0).flatten(1).norm(dim=1)))
    torch.testing.assert_close(found[1][0], 2 * found[0][0])
    torch.testing.assert_close(found[2][1] / found[0][1], torch.tensor(WEIGHTS), rtol=1e-3, atol=0)
    assert found[3][0] > found[0][0]


def test_a_head_with_other_classes_is_refused(mmdet_scope):
    with pytest.raises(ValueError, match="loss_cls of GFLHead has 2 class weights, and the head 10 classes"):
        build(with_loss(class_weight=[1.0, 2.0]))


def test_a_head_with_a_channel_for_the_background(mmdet_scope):
    """That of two-stage detectors has one beside a sigmoid loss too, and a weight for it, the last."""
    options = dict(type="Shared2FCBBoxHead", in_channels=4, fc_out_channels=8, roi_feat_size=1, num_classes=4)
    focal = dict(type="detloss_plugins.FocalLoss", use_sigmoid=True)
    logits, label = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 4])
    values = []
    for weights in ([1.0] * 5, [1.0] * 4 + [2.0]):
        head = MODELS.build(dict(options, loss_cls=dict(focal, class_weight=weights)))
        values.append(head.loss_cls(logits, label, reduction_override="none"))
    torch.testing.assert_close(values[1], values[0] * torch.tensor([1.0, 1, 1, 1, 2]))
    with pytest.raises(ValueError, match="has 4 class weights, and the head 4 classes and one for the background"):
        MODELS.build(dict(options, loss_cls=dict(focal, class_weight=[1.0] * 4)))
    with pytest.raises(ValueError, match="one for the background: write 5 numbers"):
        MODELS.build(dict(options, loss_cls=dict(focal, class_weight="effective")))
    for weights in ([1.0] * 4, "effective"):  # a part is looked at as the loss itself
        part = {"type": "FocalLoss", "class_weight": weights}
        for around in ({"type": "JointLoss", "losses": [part]}, {"type": "SlideLoss", "base": part}):
            with pytest.raises(ValueError, match="one for the background"):
                MODELS.build(dict(options, loss_cls={**around, "type": f"detloss_plugins.{around['type']}"}))
    MODELS.build(dict(options, loss_cls=dict(focal, class_weight="effective", class_counts=[9, 4, 2, 1, 0])))


def test_the_sigmoid_of_sparse_rcnns_head_has_no_channel_for_the_background(mmdet_scope):
    conv = dict(type="DynamicConv", in_channels=8, feat_channels=4, out_channels=8, input_feat_shape=7)
    options = dict(in_channels=8, num_heads=1, feedforward_channels=8, dynamic_conv_cfg=conv)
    loss = dict(type="detloss_plugins.FocalLoss", use_sigmoid=True)
    for weights in ([1.0, 2.0, 1.0, 1.0], "effective"):
        cfg = dict(type="DIIHead", num_classes=4, loss_cls=dict(loss, class_weight=weights), **options)
        assert MODELS.build(cfg).fc_cls.out_features == 4
    cfg["loss_cls"]["class_weight"] = [1.0] * 5
    with pytest.raises(ValueError, match=r"has 5 class weights, and the head 4 classes\."):
        MODELS.build(cfg)


class Look(Hook):
    def after_train_iter(self, runner, *_, **__):
        self.weights = runner.model.bbox_head.loss_cls.class_factors.tolist()


def test_the_hook_counts_the_training_set(tmp_path, mmdet_scope):
    """Before EMAHook copies the model, as its updates pair the buffers of the two by their order."""
    look = Look()
    loss = {"type": "detloss_plugins.QualityFocalLoss", "use_sigmoid": True, "class_weight": "effective"}
    cfg = small(DIGITS)
    cfg.model.bbox_head.loss_cls = loss
    averages = {"type": "EMAHook", "ema_type": "ExpMomentumEMA", "update_buffers": True, "priority": 49}  # RTMDet's
    hooks = [averages, {"type": "detloss_plugins.adapters.mmdetection.ClassCountsHook"}]
    run(tmp_path, look, model=cfg.model, custom_hooks=hooks, train_cfg={**config(DIGITS).train_cfg, "max_epochs": 1})
    options = {**config(DIGITS).train_dataloader}
    dataset = Runner.build_dataloader({**options, "dataset": {**options["dataset"], "indices": 8}}, seed=0).dataset
    labels = [instance["bbox_label"] for index in range(8) for instance in dataset.get_data_info(index)["instances"]]
    expected = effective_weights([labels.count(index) for index in range(10)])
    assert len(set(expected)) > 1
    assert look.weights == pytest.approx(expected)


def test_objects_to_be_ignored_are_not_counted():
    class Annotated(list):
        metainfo: ClassVar = {"classes": ("a", "b", "c")}

        def get_data_info(self, index):
            return {"instances": [dict(zip(("bbox_label", "ignore_flag"), one, strict=False)) for one in self[index]]}

    assert class_counts(Annotated([[(0, 0), (1, 1), (1, 0)], [(0,), (2, 1)], []])) == [2, 1, 0]


def test_nothing_is_counted_before_a_test(mmdet_scope):
    """mmengine calls the hooks of a test in the same place; its runner has the config of an optimizer, or none."""
    for optimizer in (None, config(DIGITS).optim_wrapper):
        loss = FocalLoss(class_weight="effective")
        ClassCountsHook().before_run(SimpleNamespace(optim_wrapper=optimizer, model=loss))
        assert loss.class_counts is None
