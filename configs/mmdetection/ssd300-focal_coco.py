_base_ = "ssd300_coco.py"

model = dict(
    bbox_head=dict(
        loss_cls=dict(_delete_=True, type="detloss_plugins.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25),
        neg_pos_ratio=None,  # every negative has a part: focal loss makes the easy ones small
    )
)
