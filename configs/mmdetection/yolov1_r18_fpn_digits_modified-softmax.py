_base_ = "yolov1_r18_fpn_digits.py"

model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True,
            type="detloss_plugins.ModifiedCrossEntropyLoss",
            use_sigmoid=False,
            activation="softmax",
            alpha=0.25,
            gamma=2.0,
            loss_weight=4.0,
            reduction="sum",
        )
    )
)
