"""A small RetinaNet with focal and GIoU loss; retinanet-*_r18_fpn_digits.py change the class loss."""

_base_ = "_base_/digits.py"

model = dict(
    bbox_head=dict(
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=dict(type="GN", num_groups=32),
        # Digits are 8 to 64 pixels high, and higher than wide.
        anchor_generator=dict(octave_base_scale=1.5, ratios=[0.9, 1.25, 1.75], strides=[8, 16, 32]),
        reg_decoded_bbox=True,
        loss_cls=dict(_delete_=True, type="detloss_plugins.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25),
        loss_bbox=dict(_delete_=True, type="detloss_plugins.GIoULoss", loss_weight=2.0),
    ),
    # A ranking loss orders the scores, and says nothing of their size: every detection counts.
    test_cfg=dict(score_thr=0.001),
)
# Twice the step of _base_: with it, 12 epochs bring the stock loss furthest.
optim_wrapper = dict(optimizer=dict(lr=4e-3))
