_base_ = "gfl_r50_fpn_1x_coco.py"

model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True,
            type="detloss_plugins.EqualizedQualityFocalLoss",
            use_sigmoid=True,
            num_classes=80,
            gamma=2.0,
            scale=8.0,
        )
    )
)
