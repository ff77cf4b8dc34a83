_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "_base_/coco_512.py",
    "mmdet::_base_/default_runtime.py",
]

# Theirs: two scales an octave, deltas over 0.1 and 0.2, delta 1, smooth L1 averaged over the coordinates too, SGD with
# lr 0.001 for 8 images.
model = dict(
    bbox_head=dict(
        type="detloss_plugins.adapters.mmdetection.RankingRetinaHead",
        anchor_generator=dict(scales_per_octave=2),
        bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(_delete_=True, type="detloss_plugins.APLoss", use_sigmoid=True, delta=1.0),
        loss_bbox=dict(_delete_=True, type="detloss_plugins.SmoothL1Loss", beta=1.0, loss_weight=0.25),
    )
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=0.001))
auto_scale_lr = dict(base_batch_size=8)
