_base_ = "ssd300_coco.py"

model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True,
            type="detloss_plugins.ConfidenceWeightedLoss",
            use_sigmoid=False,
            base=dict(type="CrossEntropyLoss", use_sigmoid=False),
        ),
    )
)
