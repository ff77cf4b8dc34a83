_base_ = "_base_/digits.py"

model = dict(
    type="GFL",
    bbox_head=dict(
        _delete_=True,
        type="GFLHead",
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        anchor_generator=dict(
            type="AnchorGenerator", ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=[8, 16, 32]
        ),
        reg_max=8,
        loss_cls=dict(type="detloss_plugins.QualityFocalLoss", use_sigmoid=True, beta=2.0),
        loss_dfl=dict(type="detloss_plugins.DistributionFocalLoss", loss_weight=0.25),
        loss_bbox=dict(type="detloss_plugins.GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(_delete_=True, assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1),
    test_cfg=dict(nms=dict(type="nms", iou_threshold=0.6)),
)
