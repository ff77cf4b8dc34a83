"""A detector in the manner of YOLOv1: one level, one box a cell; confidence by MSE, classes by the softmax focal loss.

The body is a small ResNet-18 with an FPN, whose level of stride 8 is used. The files beside this one that start with
its name change one loss.
"""

_base_ = "yolov3_r18_digits.py"

model = dict(
    backbone=dict(out_indices=(0, 1, 2, 3)),
    neck=dict(
        _delete_=True,
        type="FPN",
        in_channels=[16, 32, 64, 128],
        out_channels=64,
        start_level=1,
        num_outs=3,
    ),
    # One anchor, of the mean size of a digit: YOLOv1 has none, and predicts sizes from the same one everywhere.
    bbox_head=dict(
        in_channels=[64],
        out_channels=[64],
        anchor_generator=dict(_delete_=True, type="YOLOAnchorGenerator", base_sizes=[[(27, 33)]], strides=[8]),
        featmap_strides=[8],
        # All class losses here have the alpha of lvsolo's experiment, and a weight that makes up for it.
        loss_cls=dict(alpha=0.25, loss_weight=4.0),
    ),
)
# For more than one process: the other levels' last convolutions get no gradient.
find_unused_parameters = True
