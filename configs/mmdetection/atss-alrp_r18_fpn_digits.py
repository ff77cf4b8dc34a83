_base_ = "atss_r18_fpn_digits.py"

model = dict(
    bbox_head=dict(
        type="detloss_plugins.adapters.mmdetection.RankingATSSHead",
        loss_cls=dict(_delete_=True, type="detloss_plugins.ALRPLoss", use_sigmoid=True),
        loss_bbox=dict(loss_weight=1.0),
        loss_centerness=None,
        self_balance_period=50,  # an epoch, as the authors have it
    )
)
