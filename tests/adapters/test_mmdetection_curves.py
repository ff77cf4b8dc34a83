"""The curves of a training with mmengine's Runner, as its visualizers have them."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from support.mmdetection import DIGITS, run, small

from detloss_plugins.adapters.mmdetection import LossCurvesHook
from detloss_plugins.adapters.mmdetection.curves import positives
from detloss_plugins.losses import BoundedIoULoss, CrossEntropyLoss, FocalLoss, GaussianFocalLoss, L1Loss, SeesawLoss
from detloss_plugins.testing.digits import build_digits

pytestmark = pytest.mark.usefixtures("mmdet_scope")

HOOK = dict(type="detloss_plugins.adapters.mmdetection.LossCurvesHook", interval=1)
JOINT = dict(type="detloss_plugins.JointLoss", losses=[dict(type="WIoULoss"), dict(type="GIoULoss", loss_weight=2.0)])
QFL = dict(type="QualityFocalLoss", use_sigmoid=True)
SCHEDULE = dict(type="detloss_plugins.ScheduledLoss", losses=[QFL, QFL], at=[1], use_sigmoid=True)


class Watch(Hook):
    """Of each iteration what LoggerHook hands to the visualizers, the gradient's norm at the class scores, from the
    backward itself, and what the box loss gave."""

    priority = "LOWEST"

    def __init__(self):
        self.rows, self.norms, self.boxes = [], [], []
        self.squares, self.values = [], []  # of this iteration

    def before_train(self, runner):
        stock = runner.model.bbox_head.loss_by_feat

        def noted(cls_scores, *args, **kwargs):
            for scores in cls_scores:
                scores.register_hook(lambda slope: self.squares.append(slope.square().sum()))
            return stock(cls_scores, *args, **kwargs)

        runner.model.bbox_head.loss_by_feat = noted
        runner.model.bbox_head.loss_bbox.register_forward_hook(lambda *call: self.values.append(call[-1].item()))

    def after_train_iter(self, runner, batch_idx, *_, **__):
        self.rows.append(runner.log_processor.get_log_after_iter(runner, batch_idx, "train")[0])
        self.norms.append(torch.stack(self.squares).sum().sqrt().item())
        self.boxes.append(sum(self.values))
        self.squares, self.values = [], []


def train(tmp_path, **options):
    build_digits()
    cfg = small(DIGITS)
    cfg.model.bbox_head.loss_bbox, cfg.model.bbox_head.loss_cls = JOINT, SCHEDULE
    watch = Watch()
    return run(tmp_path, watch, model=cfg.model, **options), watch


def test_what_the_visualizers_get(tmp_path):
    runner, watch = train(tmp_path, custom_hooks=[HOOK])
    assert len(watch.rows) == 4
    for number, row in enumerate(watch.rows):
        cls, box = (
            {name: row[f"curves/bbox_head.{slot}/{name}"] for name in names}
            for slot, names in (
                ("cls", ("positives", "gradient", "progress", "0_QualityFocalLoss", "1_QualityFocalLoss")),
                ("bbox", ("positives", "gradient", "losses.0.mean", "0_WIoULoss", "1_GIoULoss")),
            )
        )
        assert box["gradient"] > 0
        assert cls["gradient"] == pytest.approx(watch.norms[number], rel=1e-4)
        assert cls["positives"] == box["positives"] > 10
        assert row["curves/bbox_head.dfl/positives"] == 4 * box["positives"]
        epoch = number // 2
        assert cls["progress"] == epoch
        assert (cls["0_QualityFocalLoss"] > 0) == (epoch == 0)
        assert (cls["1_QualityFocalLoss"] > 0) == (epoch == 1)
        assert 0 < box["losses.0.mean"] < 1
        parts = box["0_WIoULoss"] + box["1_GIoULoss"]
        assert parts == pytest.approx(watch.boxes[number], rel=1e-4)
    assert len(runner.model.bbox_head.loss_bbox._forward_hooks) == 1, "that of Watch"


def test_every_so_many_iterations_and_without_an_influence(tmp_path):
    rows, plain = (
        train(tmp_path / name, custom_hooks=hooks)[1].rows
        for name, hooks in (("with", [{**HOOK, "interval": 3}]), ("without", []))
    )
    assert ["curves/bbox_head.bbox/gradient" in row for row in rows] == [False, False, True, True]
    assert not any(name.startswith("curves") for row in plain for name in row)
    for row, other in zip(rows, plain, strict=True):
        assert row["loss"] == other["loss"]
        assert row["loss_bbox"] == other["loss_bbox"]


def gradient(scale, dtype):
    """What the hook writes down of the gradient for logits of that type, of a loss that is scaled by so much."""
    model, written = torch.nn.Module(), {}
    model.loss_cls = FocalLoss(use_sigmoid=True)
    optimizer = SimpleNamespace(loss_scaler=SimpleNamespace(get_scale=lambda: scale)) if scale > 1 else None
    hub = SimpleNamespace(update_scalar=written.__setitem__)
    runner = SimpleNamespace(model=model, iter=0, optim_wrapper=optimizer, message_hub=hub)
    hook = LossCurvesHook(interval=1)
    hook.before_train_iter(runner, 0)
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    (scale * model.loss_cls(logits, torch.arange(64) % 9, avg_factor=1.0)).backward()
    if optimizer:
        optimizer.loss_scaler.get_scale = lambda: 2 * scale  # as at the end of a step
    hook.after_train_iter(runner, 0)
    assert written["train/curves/cls/positives"] == 57
    return written.get("train/curves/cls/gradient")


def test_the_gradient_of_mixed_precision():
    """Not that of the scaled loss, whose square is beyond float16; none where the gradient itself is."""
    whole = gradient(1, torch.float32)
    assert gradient(2.0**12, torch.float16) == pytest.approx(whole, rel=1e-3)
    assert gradient(2.0**30, torch.float16) is None


def test_positives_of_logits_in_a_row():
    """As centerness has them: one a positive, with a target above 0."""
    target = torch.tensor([0.5, 0.1, 0.0, 1.0])
    assert positives(CrossEntropyLoss(use_sigmoid=True), torch.zeros(4), target, None) == 3


def test_positives_of_heads_with_other_channels_than_classes():
    """Of three classes, an object and three of background; R-CNN has a channel for that beside a sigmoid too."""
    labels = torch.tensor([0, 3, 3, 3])
    for loss, channels in (
        (FocalLoss(use_sigmoid=True), 4),
        (CrossEntropyLoss(use_sigmoid=False), 4),
        (SeesawLoss(num_classes=3), 5),
        (FocalLoss(use_sigmoid=True), 3),
    ):
        assert positives(loss, torch.zeros(4, channels), labels, None, classes=3) == 1
    pixels = torch.tensor([[[0, 1, 2], [255, 255, 2]]])  # of a map without a background, 255 being ignored
    assert positives(CrossEntropyLoss(), torch.zeros(1, 3, 2, 3), pixels, None, classes=3) == 4
    assert positives(FocalLoss(use_sigmoid=True), torch.zeros(4, 1), torch.tensor([0, 1, 1, 0]), None, classes=80) == 2


def test_positives_of_masks_and_of_no_rows():
    masks = torch.zeros(2, 80, 4, 4), torch.zeros(2, 4, 4), torch.zeros(2, dtype=torch.long)
    assert positives(CrossEntropyLoss(use_mask=True), *masks) == 2, "objects, whatever their masks"
    none = torch.zeros(0, 4)
    assert positives(BoundedIoULoss(), none, none, none) == 0
    assert positives(BoundedIoULoss(), torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0.5, 0.0, 1.0])) == 2
    assert positives(BoundedIoULoss(), torch.zeros(2, 4), torch.zeros(2, 4), torch.eye(4)[[0, 1]]) == 2


def test_positives_of_dense_calls():
    """Of two images at once, with 3 objects: CenterNet's heatmap and sizes, YOLOv3's confidence and offsets."""
    heatmap, weight = torch.zeros(2, 80, 8, 8), torch.zeros(2, 2, 8, 8)
    for image, label, x in ((0, 0, 2), (0, 3, 6), (1, 3, 4)):
        heatmap[image, label, x], weight[image, :, x, x] = 0.5, 1.0
        heatmap[image, label, x, x] = 1.0
    assert positives(GaussianFocalLoss(), torch.full_like(heatmap, 0.5), heatmap, None, classes=80) == 3
    assert positives(L1Loss(), weight, weight, weight, classes=80) == 3
    of_points = torch.full((2, 80), 0.5)  # CenterNetUpdateHead: points by classes, with the rows of the objects
    rows = torch.tensor([0, 0, 1])
    assert positives(GaussianFocalLoss(), of_points, of_points, None, 80, rows) == 3
    confidence, offsets = torch.zeros(2, 100), torch.zeros(2, 100, 2)
    confidence[0, :2] = confidence[1, 5] = 1.0
    offsets[confidence > 0] = 0.5
    mask = confidence.unsqueeze(-1)
    bce = CrossEntropyLoss(use_sigmoid=True)
    assert positives(bce, torch.zeros(2, 100), confidence, torch.ones(2, 100), classes=80) == 3
    assert positives(bce, torch.zeros(2, 100, 2), offsets, mask, classes=80) == 3
    assert positives(L1Loss(), torch.zeros(2, 100, 2), offsets, mask, classes=80) == 3
    assert positives(bce, torch.zeros(2, 80), torch.eye(80)[:2], None, classes=80) == 2, "logits by class"


def test_the_classes_are_those_of_the_head():
    head = torch.nn.Module()
    head.num_classes, head.loss_cls = 3, FocalLoss(use_sigmoid=True)
    model, hook = torch.nn.Module(), LossCurvesHook(interval=1)
    model.bbox_head = head
    hook.before_train_iter(SimpleNamespace(model=model, iter=0, optim_wrapper=None), 0)
    head.loss_cls(torch.zeros(4, 4), torch.tensor([0, 3, 3, 3]))
    assert hook.seen["bbox_head.cls"]["positives"] == 1


def test_the_rows_that_a_head_names():
    """As CenterNetUpdateHead does."""
    model, hook, rows = torch.nn.Module(), LossCurvesHook(interval=1), torch.tensor([1, 2])
    model.loss_cls = GaussianFocalLoss()
    hook.before_train_iter(SimpleNamespace(model=model, iter=0, optim_wrapper=None), 0)
    points = torch.full((4, 3), 0.5)
    model.loss_cls(points, points, pos_inds=rows, pos_labels=rows)
    assert hook.seen["cls"]["positives"] == 2
