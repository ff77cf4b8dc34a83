_base_ = "retinanet_r18_fpn_digits.py"

model = dict(
    bbox_head=dict(
        type="detloss_plugins.adapters.mmdetection.RankingRetinaHead",
        # Scores start at 1/2, as the authors have it: from 1/100, the few positives hardly learn.
        init_cfg=dict(
            type="Normal",
            layer="Conv2d",
            std=0.01,
            override=dict(type="Normal", name="retina_cls", std=0.01, bias_prob=0.5),
        ),
        loss_cls=dict(_delete_=True, type="detloss_plugins.DRLoss", use_sigmoid=True),
    )
)
