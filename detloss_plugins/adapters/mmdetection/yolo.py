"""A YOLO head of MMDetection that scores classes the way its class loss trains them.

The stock head scores classes with a sigmoid whatever the class loss. The head of this module is named by its full
path, and needs no ``custom_imports``::

    model = dict(
        bbox_head=dict(
            type="detloss_plugins.adapters.mmdetection.PluginYOLOV3Head",
            loss_cls=dict(_delete_=True, type="detloss_plugins.FocalLoss", use_sigmoid=False, reduction="sum"),
        )
    )
"""

from typing import Any

import torch
from mmdet.models.dense_heads import YOLOV3Head
from torch import Tensor

from detloss_plugins.losses import KLDivLoss
from detloss_plugins.precision import float32


class PluginYOLOV3Head(YOLOV3Head):
    """YOLOV3Head whose class scores are a softmax if ``loss_cls`` is one: has ``use_sigmoid=False``, or is KLDivLoss.

    With a sigmoid class loss it is the stock head. Its weights and targets are the stock head's either way. It uses the
    first feature levels, one for each of ``featmap_strides``, and leaves the others of a neck alone.

    Raises:
        ValueError: if ``loss_cls`` regresses the logits themselves, which no score goes with.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        loss = self.loss_cls
        if getattr(loss, "family", "") == "regression" and not getattr(loss, "use_sigmoid", False):
            raise ValueError(
                f"{type(self).__name__} scores classes with a sigmoid or a softmax, and {type(loss).__name__} is "
                "trained on neither; take MSELoss with use_sigmoid=True, or a classification loss."
            )
        self.softmax_classes = isinstance(loss, KLDivLoss) or not getattr(loss, "use_sigmoid", True)

    def forward(self, x):
        """Prediction maps ``(N, anchors * (5 + classes), H, W)`` of the levels used."""
        return super().forward(x[: self.num_levels])

    def predict_by_feat(self, pred_maps, *args, **kwargs):
        """The parent's, which takes a sigmoid of the classes."""
        if self.softmax_classes:
            pred_maps = [self.sigmoid_form(pred_map) for pred_map in pred_maps]
        return super().predict_by_feat(pred_maps, *args, **kwargs)

    def sigmoid_form(self, pred_map: Tensor) -> Tensor:
        """The map with class logits whose sigmoid is the softmax of the given ones."""
        rest, classes = float32(pred_map).unflatten(1, (self.num_base_priors, -1)).split([5, self.num_classes], 2)
        return torch.cat([rest, classes.softmax(2).logit()], 2).flatten(1, 2)
