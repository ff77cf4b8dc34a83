_base_ = "ssd_r18_digits.py"

model = dict(
    bbox_head=dict(
        # Weight 8: with 1, the box loss drowns the classes (mAP50 0.43 in place of 0.65).
        loss_cls=dict(
            _delete_=True,
            type="detloss_plugins.FocalLoss",
            use_sigmoid=True,
            gamma=2.0,
            alpha=0.25,
            loss_weight=8.0,
        ),
        neg_pos_ratio=None,  # every negative has a part: focal loss makes the easy ones small
    )
)
