_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "_base_/coco_512.py",
    "mmdet::_base_/default_runtime.py",
]

# Theirs: ATSS assigns in a RetinaNet with one ratio and two scales an octave; delta 1, GIoU, the balance renewed every
# 3665 steps, SGD with lr 0.008 for 32 images, the steps at epochs 75 and 95. Ours: the head of ATSS, with its group
# norm and the scale of each level.
model = dict(
    type="ATSS",
    bbox_head=dict(
        _delete_=True,
        type="detloss_plugins.adapters.mmdetection.RankingATSSHead",
        num_classes=80,
        in_channels=256,
        stacked_convs=4,
        feat_channels=256,
        anchor_generator=dict(
            type="AnchorGenerator",
            octave_base_scale=4,
            scales_per_octave=2,
            ratios=[1.0],
            strides=[8, 16, 32, 64, 128],
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type="detloss_plugins.ALRPLoss", use_sigmoid=True, delta=1.0),
        loss_bbox=dict(type="detloss_plugins.GIoULoss"),
        self_balance_period=3665,
    ),
    train_cfg=dict(_delete_=True, assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1),
)
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(optimizer=dict(lr=0.008))
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=100, by_epoch=True, milestones=[75, 95], gamma=0.1),
]
auto_scale_lr = dict(base_batch_size=32)
