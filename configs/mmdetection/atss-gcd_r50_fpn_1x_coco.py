_base_ = "mmdet::atss/atss_r50_fpn_1x_coco.py"

model = dict(
    bbox_head=dict(
        loss_cls=dict(_delete_=True, type="detloss_plugins.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25),
        loss_bbox=dict(_delete_=True, type="detloss_plugins.GCDLoss", loss_weight=2.0),
        loss_centerness=dict(_delete_=True, type="detloss_plugins.CrossEntropyLoss", use_sigmoid=True),
    )
)
