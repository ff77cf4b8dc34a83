_base_ = "yolov1_r18_fpn_digits.py"

model = dict(
    bbox_head=dict(
        loss_conf=dict(
            _delete_=True, type="detloss_plugins.CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0, reduction="sum"
        )
    )
)
