_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"

# The mask loss stays mmdet's; of ours, CrossEntropyLoss with use_mask=True takes its masks too, one for every class.
model = dict(
    rpn_head=dict(
        loss_cls=dict(_delete_=True, type="detloss_plugins.CrossEntropyLoss", use_sigmoid=True),
        loss_bbox=dict(_delete_=True, type="detloss_plugins.SmoothL1Loss", beta=1 / 9),
    ),
    roi_head=dict(
        type="detloss_plugins.adapters.mmdetection.UncertaintyRoIHead",
        bbox_head=dict(
            type="detloss_plugins.adapters.mmdetection.UncertaintyBBoxHead",
            bbox_coder=dict(_delete_=True, type="detloss_plugins.adapters.mmdetection.CornerBBoxCoder"),
            loss_cls=dict(_delete_=True, type="detloss_plugins.CrossEntropyLoss", use_sigmoid=False),
            loss_bbox=dict(_delete_=True, type="detloss_plugins.UncertaintyKLLoss"),
        ),
    ),
    test_cfg=dict(
        rcnn=dict(
            nms=dict(_delete_=True, type="soft_nms", method="gaussian", sigma=0.5, min_score=0.001),
            voting=dict(sigma_t=0.02),
        )
    ),
)
