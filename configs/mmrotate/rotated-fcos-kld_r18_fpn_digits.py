"""A small Rotated FCOS with focal, KLD and centerness loss; the box loss turns the boxes, so the angle has none."""

_base_ = "_base_/digits.py"

model = dict(
    type="mmdet.FCOS",
    bbox_head=dict(
        type="RotatedFCOSHead",
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        strides=_base_.strides,
        regress_ranges=((-1, 24), (24, 48), (48, 1e8)),
        center_sampling=True,
        center_sample_radius=1.5,
        norm_on_bbox=True,
        centerness_on_reg=True,
        use_hbbox_loss=False,
        scale_angle=True,
        bbox_coder=dict(type="DistanceAnglePointCoder", angle_version="le90"),
        loss_cls=dict(type="detloss_plugins.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25),
        loss_bbox=dict(type="detloss_plugins.KLDLoss", loss_weight=2.0),
        loss_angle=None,
        loss_centerness=dict(type="detloss_plugins.CrossEntropyLoss", use_sigmoid=True),
    ),
)
