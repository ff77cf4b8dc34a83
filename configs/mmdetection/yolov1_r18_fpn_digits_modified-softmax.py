_base_ = "yolov1_r18_fpn_digits.py"

# Its values are smaller than those of the softmax focal loss by alpha, and a term for each class is added.
model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True,
            type="detloss_plugins.ModifiedCrossEntropyLoss",
            use_sigmoid=False,
            activation="softmax",
            alpha=0.25,
            gamma=2.0,
            reduction="sum",
        )
    )
)
