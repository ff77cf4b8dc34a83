_base_ = "retinanet_r18_fpn_digits.py"

model = dict(
    bbox_head=dict(
        type="detloss_plugins.adapters.mmdetection.RankingRetinaHead",
        loss_cls=dict(_delete_=True, type="detloss_plugins.APLoss", use_sigmoid=True),
    )
)
