_base_ = "retinanet_r50_fpn_1x_coco.py"

model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True,
            type="detloss_plugins.EqualizedFocalLoss",
            use_sigmoid=True,
            num_classes=80,
            gamma=2.0,
            alpha=0.25,
            scale=8.0,
        )
    )
)
