_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"

model = dict(
    bbox_head=dict(
        type="detloss_plugins.adapters.mmdetection.UncertaintyRetinaHead",
        bbox_coder=dict(_delete_=True, type="detloss_plugins.adapters.mmdetection.CornerBBoxCoder"),
        loss_cls=dict(_delete_=True, type="detloss_plugins.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25),
        loss_bbox=dict(_delete_=True, type="detloss_plugins.UncertaintyKLLoss"),
    ),
    test_cfg=dict(voting=dict(sigma_t=0.02)),
)
