_base_ = "mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py"

model = dict(
    bbox_head=dict(
        loss_cls=dict(_delete_=True, type="detloss_plugins.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25),
        loss_bbox=dict(_delete_=True, type="detloss_plugins.EIoULoss"),
        loss_centerness=dict(_delete_=True, type="detloss_plugins.CrossEntropyLoss", use_sigmoid=True),
    )
)
