_base_ = "ssd300_coco.py"

model = dict(
    bbox_head=dict(
        loss_cls=dict(_delete_=True, type="detloss_plugins.BalancedCrossEntropyLoss", use_sigmoid=True),
        neg_pos_ratio=None,
    )
)
