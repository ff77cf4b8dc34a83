"""A small ATSS with focal, GIoU and centerness loss; atss-*_r18_fpn_digits.py change the losses."""

_base_ = "_base_/digits.py"

model = dict(
    type="ATSS",
    bbox_head=dict(
        _delete_=True,
        type="ATSSHead",
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        anchor_generator=dict(
            type="AnchorGenerator", ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=[8, 16, 32]
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type="detloss_plugins.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25),
        loss_bbox=dict(type="detloss_plugins.GIoULoss", loss_weight=2.0),
        loss_centerness=dict(type="detloss_plugins.CrossEntropyLoss", use_sigmoid=True),
    ),
    train_cfg=dict(_delete_=True, assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1),
    # A ranking loss orders the scores, and says nothing of their size: every detection counts.
    test_cfg=dict(score_thr=0.001, nms=dict(type="nms", iou_threshold=0.6)),
)
