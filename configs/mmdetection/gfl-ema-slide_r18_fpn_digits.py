_base_ = "gfl_r18_fpn_digits.py"

model = dict(
    bbox_head=dict(
        # The head hands over the IoU, whose moving mean tells the hard from the easy.
        loss_cls=dict(
            _delete_=True,
            type="detloss_plugins.SlideLoss",
            use_sigmoid=True,
            base=dict(type="detloss_plugins.QualityFocalLoss", use_sigmoid=True, beta=2.0),
            decay=0.999,
        )
    )
)
