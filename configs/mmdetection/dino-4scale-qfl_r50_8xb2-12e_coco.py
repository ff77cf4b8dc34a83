_base_ = "dino-4scale_r50_8xb2-12e_coco.py"

# The head hands it the IoU of each matched box; so it does to VarifocalLoss.
model = dict(
    bbox_head=dict(
        loss_cls=dict(_delete_=True, type="detloss_plugins.QualityFocalLoss", use_sigmoid=True, beta=2.0),
    )
)
