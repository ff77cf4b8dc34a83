"""A small SSD with SSD's own losses; ssd-*_r18_digits.py change the class loss."""

_base_ = "_base_/digits.py"

model = dict(
    type="SingleStageDetector",
    bbox_head=dict(
        _delete_=True,
        type="detloss_plugins.adapters.mmdetection.PluginSSDHead",
        num_classes=10,
        in_channels=[64, 64, 64],
        # Digits are 8 to 64 pixels high.
        anchor_generator=dict(
            type="SSDAnchorGenerator",
            scale_major=False,
            strides=[8, 16, 32],
            ratios=[[1.5], [1.5], [1.5]],
            min_sizes=[16, 26, 42],
            max_sizes=[26, 42, 64],
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type="detloss_plugins.CrossEntropyLoss", use_sigmoid=False),
        loss_bbox=dict(type="detloss_plugins.SmoothL1Loss", beta=1.0),
    ),
    train_cfg=dict(
        _delete_=True,
        assigner=dict(
            type="MaxIoUAssigner",
            pos_iou_thr=0.5,
            neg_iou_thr=0.5,
            min_pos_iou=0.0,
            ignore_iof_thr=-1,
            gt_max_assign_all=False,
        ),
        sampler=dict(type="PseudoSampler"),
        allowed_border=-1,
        pos_weight=-1,
        neg_pos_ratio=3,
    ),
    test_cfg=dict(
        _delete_=True, nms_pre=1000, score_thr=0.02, nms=dict(type="nms", iou_threshold=0.45), max_per_img=100
    ),
)

# SSD's own augmentation, without which it learns the 400 images by heart; but no flip, and images stay 128 x 128.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Expand", mean=[123.675, 116.28, 103.53], to_rgb=True, ratio_range=(1, 2)),
    dict(type="MinIoURandomCrop", min_ious=(0.1, 0.3, 0.5, 0.7, 0.9), min_crop_size=0.3),
    dict(type="Resize", scale=(128, 128), keep_ratio=False),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape")),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

# Twice the schedule of _base_, and twice its step.
max_epochs = 24
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", begin=0, end=max_epochs, eta_min_ratio=0.01, convert_to_iter_based=True),
]
optim_wrapper = dict(optimizer=dict(lr=4e-3))
