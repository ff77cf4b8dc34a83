_base_ = "ssd_r18_digits.py"

model = dict(
    bbox_head=dict(
        loss_cls=dict(_delete_=True, type="detloss_plugins.BalancedCrossEntropyLoss", use_sigmoid=True),
        neg_pos_ratio=None,
    )
)
