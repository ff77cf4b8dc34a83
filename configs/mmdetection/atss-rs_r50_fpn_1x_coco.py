_base_ = "mmdet::atss/atss_r50_fpn_1x_coco.py"

# Theirs: three scales an octave from 4 strides on in place of one of 8, delta 0.5, GIoU, SGD with lr 0.008 for 16
# images.
model = dict(
    bbox_head=dict(
        type="detloss_plugins.adapters.mmdetection.RankingATSSHead",
        anchor_generator=dict(octave_base_scale=4, scales_per_octave=3),
        loss_cls=dict(_delete_=True, type="detloss_plugins.RankSortLoss", use_sigmoid=True, delta=0.5),
        loss_bbox=dict(_delete_=True, type="detloss_plugins.GIoULoss"),
        loss_centerness=None,
    )
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=0.008))
auto_scale_lr = dict(base_batch_size=16)
