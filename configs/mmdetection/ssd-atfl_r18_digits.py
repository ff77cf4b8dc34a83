_base_ = "ssd_r18_digits.py"

# Easy negatives keep most of their loss, so they are mined.
model = dict(
    bbox_head=dict(
        loss_cls=dict(_delete_=True, type="detloss_plugins.AdaptiveThresholdFocalLoss", use_sigmoid=True),
        neg_pos_ratio=3,
    )
)
