_base_ = "ssd_r18_digits.py"

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
