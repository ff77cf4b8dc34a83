"""A small Rotated RetinaNet with focal and GWD loss, which takes decoded boxes: ``reg_decoded_bbox=True``."""

_base_ = "_base_/digits.py"

angle_version = "le90"
model = dict(
    type="mmdet.RetinaNet",
    bbox_head=dict(
        type="RotatedRetinaHead",
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=dict(type="GN", num_groups=32),
        # Digits are 8 to 64 pixels high, and higher than wide: of le90 boxes the long side is the width.
        anchor_generator=dict(
            type="FakeRotatedAnchorGenerator",
            angle_version=angle_version,
            octave_base_scale=1.5,
            scales_per_octave=3,
            ratios=[0.57, 0.8, 1.25],
            strides=_base_.strides,
        ),
        bbox_coder=dict(
            type="DeltaXYWHTRBBoxCoder",
            angle_version=angle_version,
            norm_factor=None,
            edge_swap=True,
            proj_xy=True,
            target_means=(0.0, 0.0, 0.0, 0.0, 0.0),
            target_stds=(1.0, 1.0, 1.0, 1.0, 1.0),
        ),
        reg_decoded_bbox=True,
        loss_cls=dict(type="detloss_plugins.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25),
        loss_bbox=dict(type="detloss_plugins.GWDLoss", loss_weight=5.0, normalize=True, tau=1.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type="mmdet.MaxIoUAssigner",
            pos_iou_thr=0.5,
            neg_iou_thr=0.4,
            min_pos_iou=0,
            ignore_iof_thr=-1,
            iou_calculator=dict(type="RBboxOverlaps2D"),
        ),
        sampler=dict(type="mmdet.PseudoSampler"),
        allowed_border=-1,
        pos_weight=-1,
    ),
)
