_base_ = "retinanet_r18_fpn_digits.py"

model = dict(
    bbox_head=dict(
        type="detloss_plugins.adapters.mmdetection.UncertaintyRetinaHead",
        reg_decoded_bbox=False,
        bbox_coder=dict(_delete_=True, type="detloss_plugins.adapters.mmdetection.CornerBBoxCoder"),
        loss_bbox=dict(_delete_=True, type="detloss_plugins.UncertaintyKLLoss"),
    ),
    test_cfg=dict(voting=dict(sigma_t=0.02)),
)
