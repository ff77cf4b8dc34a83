_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"

# The box losses stay on encoded deltas, where L1 and smooth L1 belong.
model = dict(
    rpn_head=dict(
        loss_cls=dict(_delete_=True, type="detloss_plugins.CrossEntropyLoss", use_sigmoid=True),
        loss_bbox=dict(_delete_=True, type="detloss_plugins.SmoothL1Loss", beta=1 / 9),
    ),
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(_delete_=True, type="detloss_plugins.CrossEntropyLoss", use_sigmoid=False),
            loss_bbox=dict(_delete_=True, type="detloss_plugins.L1Loss"),
        )
    ),
)
