_base_ = "faster-rcnn_r18_fpn_digits.py"

model = dict(
    roi_head=dict(
        type="detloss_plugins.adapters.mmdetection.UncertaintyRoIHead",
        bbox_head=dict(
            type="detloss_plugins.adapters.mmdetection.UncertaintyBBoxHead",
            # From scratch, with weight 1 its gradient, which grows as sigmas fall, would hold the classes back.
            loss_bbox=dict(_delete_=True, type="detloss_plugins.UncertaintyKLLoss", loss_weight=0.2),
        ),
    ),
    test_cfg=dict(rcnn=dict(voting=dict(sigma_t=0.02))),
)
