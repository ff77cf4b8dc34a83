"""Data, schedule and a small body for turned digits, which `detloss train` builds; a config adds a head and losses.

Angles are those of le90: the long side's, from -90 degrees to 90, turning the x axis towards the y axis, which is the
convention of the rotated losses too.
"""

_base_ = ["mmrotate::_base_/default_runtime.py"]

# After _base_: mmengine reads a config that imports before it as one of its new style, if Python has os frozen in.
import os  # noqa: E402

# The folder that detloss_plugins.testing.digits writes.
data_root = os.path.join(
    os.environ.get("DETLOSS_PLUGINS_CACHE") or os.path.expanduser("~/.cache/detloss_plugins"), "oriented-digits-v1"
)

strides = [8, 16, 32]
model = dict(
    data_preprocessor=dict(
        type="mmdet.DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
        boxtype2tensor=False,
    ),
    backbone=dict(
        type="mmdet.ResNet",
        depth=18,
        base_channels=16,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        style="pytorch",
    ),
    neck=dict(
        type="mmdet.FPN",
        in_channels=[16, 32, 64, 128],
        out_channels=64,
        start_level=1,
        add_extra_convs="on_output",
        num_outs=3,
    ),
    test_cfg=dict(
        nms_pre=300,
        min_bbox_size=0,
        score_thr=0.05,
        nms=dict(type="nms_rotated", iou_threshold=0.1),
        max_per_img=100,
    ),
)

# No resize (all images are 128 x 128) and no flip: a mirrored digit is not a digit.
load = [
    dict(type="mmdet.LoadImageFromFile"),
    dict(type="mmdet.LoadAnnotations", with_bbox=True, box_type="qbox"),
    dict(type="ConvertBoxType", box_type_mapping=dict(gt_bboxes="rbox")),
]
meta_keys = ("img_id", "img_path", "ori_shape", "img_shape")
train_pipeline = [*load, dict(type="mmdet.PackDetInputs", meta_keys=meta_keys)]
test_pipeline = [
    load[0],
    # The identity; it only writes the scale_factor that detectors read to map boxes back.
    dict(type="mmdet.Resize", scale=(128, 128)),
    *load[1:],
    dict(type="mmdet.PackDetInputs", meta_keys=(*meta_keys, "scale_factor")),
]
metainfo = dict(classes=tuple("0123456789"))
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="DOTADataset",
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annfiles/train",
        data_prefix=dict(img_path="images/train"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="DOTADataset",
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annfiles/val",
        data_prefix=dict(img_path="images/val"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
# At an IoU of 0.5 only: for each further one it starts four processes anew.
val_evaluator = dict(type="DOTAMetric", metric="mAP", iou_thrs=0.5)
test_dataloader = val_dataloader
test_evaluator = val_evaluator

max_epochs = 12
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", begin=0, end=max_epochs, eta_min_ratio=0.01, convert_to_iter_based=True),
]
randomness = dict(seed=0)
# Each checkpoint holds the optimiser too.
# Two: mmengine removes the oldest before it writes the newest, so that of one a kill in between leaves none.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
