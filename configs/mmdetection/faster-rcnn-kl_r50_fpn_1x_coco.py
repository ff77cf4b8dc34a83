_base_ = "faster-rcnn_r50_fpn_1x_coco.py"

model = dict(
    roi_head=dict(
        type="detloss_plugins.adapters.mmdetection.UncertaintyRoIHead",
        bbox_head=dict(
            type="detloss_plugins.adapters.mmdetection.UncertaintyBBoxHead",
            bbox_coder=dict(_delete_=True, type="detloss_plugins.adapters.mmdetection.CornerBBoxCoder"),
            loss_bbox=dict(_delete_=True, type="detloss_plugins.UncertaintyKLLoss"),
        ),
    ),
    # Soft NMS and the vote, as the authors have it. Without voting, delete its line.
    test_cfg=dict(
        rcnn=dict(
            nms=dict(_delete_=True, type="soft_nms", method="gaussian", sigma=0.5, min_score=0.001),
            voting=dict(sigma_t=0.02),
        )
    ),
)
