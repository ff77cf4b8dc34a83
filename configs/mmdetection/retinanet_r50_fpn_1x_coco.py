_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"

model = dict(
    bbox_head=dict(
        # A box loss compares boxes in pixels, so the head decodes the deltas first.
        reg_decoded_bbox=True,
        loss_cls=dict(_delete_=True, type="detloss_plugins.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25),
        loss_bbox=dict(_delete_=True, type="detloss_plugins.GIoULoss", loss_weight=2.0),
    )
)
