"""SSD's own losses; ssd300-*_coco.py change the class loss."""

_base_ = "mmdet::ssd/ssd300_coco.py"

model = dict(
    bbox_head=dict(
        type="detloss_plugins.adapters.mmdetection.PluginSSDHead",
        loss_cls=dict(type="detloss_plugins.CrossEntropyLoss", use_sigmoid=False),
        loss_bbox=dict(type="detloss_plugins.SmoothL1Loss", beta=1.0),
    )
)
