_base_ = "retinanet_r18_fpn_digits.py"

model = dict(
    bbox_head=dict(
        type="detloss_plugins.adapters.mmdetection.UncertaintyRetinaHead",
        reg_decoded_bbox=False,
        bbox_coder=dict(_delete_=True, type="detloss_plugins.adapters.mmdetection.CornerBBoxCoder"),
        # From scratch, with weight 1 its gradient, which grows as sigmas fall, would hold the classes back.
        loss_bbox=dict(_delete_=True, type="detloss_plugins.UncertaintyKLLoss", loss_weight=0.1),
    ),
    # More than the authors' 0.02: here it is worth more, with hard and soft NMS.
    test_cfg=dict(voting=dict(sigma_t=0.05)),
)
