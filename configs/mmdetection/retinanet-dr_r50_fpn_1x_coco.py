_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"

# Theirs: scores that start at 1/2, no anchors between positive and negative, detections above 0.2 only, smooth L1 (beta
# 0.11) averaged over the coordinates too on deltas over 0.1 and 0.2, lr 0.01 for 16 images (which is mmdet's).
model = dict(
    bbox_head=dict(
        type="detloss_plugins.adapters.mmdetection.RankingRetinaHead",
        bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2]),
        init_cfg=dict(
            type="Normal",
            layer="Conv2d",
            std=0.01,
            override=dict(type="Normal", name="retina_cls", std=0.01, bias_prob=0.5),
        ),
        loss_cls=dict(_delete_=True, type="detloss_plugins.DRLoss", use_sigmoid=True, margin=0.5, L=6.0, tau=4.0),
        loss_bbox=dict(_delete_=True, type="detloss_plugins.SmoothL1Loss", beta=1 / 9, loss_weight=0.25),
    ),
    train_cfg=dict(assigner=dict(neg_iou_thr=0.5)),
    test_cfg=dict(score_thr=0.2),
)
