_base_ = "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"

model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True, type="detloss_plugins.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0
        ),
        loss_bbox=dict(_delete_=True, type="detloss_plugins.L1Loss", loss_weight=5.0),
        loss_iou=dict(_delete_=True, type="detloss_plugins.CIoULoss", loss_weight=2.0),
    )
)
