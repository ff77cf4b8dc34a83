"""A small YOLOv3 whose confidence is regressed by MSE and whose classes are learnt by the softmax focal loss.

The files beside this one that start with its name change one loss. The head is mmdet's, but for its class scores: they
are a softmax if the class loss is one.
"""

_base_ = "_base_/digits.py"

# The losses are sums over the batch, as in mmdet's YOLOv3: the head gives no normaliser, and a mean would be over all
# anchors, nearly all of which have weight zero in every loss but that of the confidence.
model = dict(
    type="YOLOV3",
    backbone=dict(out_indices=(1, 2, 3)),
    neck=dict(_delete_=True, type="YOLOV3Neck", num_scales=3, in_channels=[128, 64, 32], out_channels=[64, 32, 32]),
    bbox_head=dict(
        _delete_=True,
        type="detloss_plugins.adapters.mmdetection.PluginYOLOV3Head",
        num_classes=10,
        in_channels=[64, 32, 32],
        out_channels=[64, 64, 64],
        anchor_generator=dict(
            type="YOLOAnchorGenerator",
            base_sizes=[[(36, 48), (44, 58), (60, 60)], [(20, 32), (28, 36), (30, 44)], [(9, 12), (13, 18), (17, 24)]],
            strides=[32, 16, 8],
        ),
        bbox_coder=dict(type="YOLOBBoxCoder"),
        featmap_strides=[32, 16, 8],
        loss_cls=dict(
            type="detloss_plugins.FocalLoss", use_sigmoid=False, gamma=2.0, alpha=None, loss_weight=1.0, reduction="sum"
        ),
        loss_conf=dict(type="detloss_plugins.MSELoss", use_sigmoid=True, loss_weight=5.0, reduction="sum"),
        loss_xy=dict(type="detloss_plugins.CrossEntropyLoss", use_sigmoid=True, loss_weight=2.0, reduction="sum"),
        loss_wh=dict(type="detloss_plugins.MSELoss", loss_weight=2.0, reduction="sum"),
    ),
    train_cfg=dict(_delete_=True, assigner=dict(type="GridAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0)),
    test_cfg=dict(
        _delete_=True,
        nms_pre=1000,
        score_thr=0.05,
        conf_thr=0.005,
        nms=dict(type="nms", iou_threshold=0.45),
        max_per_img=100,
    ),
)

# Twice the schedule of _base_: only the one anchor that fits a digit best learns from it.
max_epochs = 24
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", begin=0, end=max_epochs, eta_min_ratio=0.01, convert_to_iter_based=True),
]
