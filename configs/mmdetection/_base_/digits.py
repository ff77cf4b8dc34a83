"""Data, schedule and a small body for the digits set, which `detloss train` builds; only the head is missing.

It trains from scratch on two CPU cores in minutes. A config adds a head with its losses.
"""

_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "mmdet::_base_/default_runtime.py"]

# After _base_: mmengine reads a config that imports before it as one of its new style, if Python has os frozen in.
import os  # noqa: E402

# The folder that detloss_plugins.testing.digits writes.
data_root = os.path.join(
    os.environ.get("DETLOSS_PLUGINS_CACHE") or os.path.expanduser("~/.cache/detloss_plugins"), "digits-v1"
)

# RetinaNet's body; most other heads have no base file without COCO data, and two bases may not share a key.
model = dict(
    backbone=dict(depth=18, base_channels=16, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=64, num_outs=3),
)

# No resize (all images of the set have one size) and no flip: a mirrored digit is not a digit.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape")),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    # The identity; it only writes the scale_factor that detectors read to map boxes back.
    dict(type="Resize", scale_factor=1.0),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
metainfo = dict(classes=tuple("0123456789"))
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/train.json",
        data_prefix=dict(img="images/train"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/val.json",
        data_prefix=dict(img="images/val"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(type="CocoMetric", ann_file=os.path.join(data_root, "annotations/val.json"), metric="bbox")
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
