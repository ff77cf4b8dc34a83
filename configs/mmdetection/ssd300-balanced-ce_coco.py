_base_ = "ssd300_coco.py"

model = dict(
    bbox_head=dict(
        # The weight that serves RetinaNet best in the focal loss paper. "auto" makes a false alarm nearly free: scores
        # rank badly.
        loss_cls=dict(_delete_=True, type="detloss_plugins.BalancedCrossEntropyLoss", use_sigmoid=True, alpha=0.75),
        neg_pos_ratio=None,  # every negative has a part
    )
)
