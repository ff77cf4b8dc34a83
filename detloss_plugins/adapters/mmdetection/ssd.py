"""An SSD head whose losses are set by its config.

The stock head has softmax cross entropy and smooth L1 written into it. The head of this module has its weights, targets
and predictions; it is named by its full path, and needs no ``custom_imports``::

    bbox_head = dict(
        type="detloss_plugins.adapters.mmdetection.PluginSSDHead",
        loss_cls=dict(type="detloss_plugins.FocalLoss", use_sigmoid=True),
    )
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from mmdet.models.dense_heads import SSDHead
from mmdet.registry import MODELS
from mmdet.structures.bbox import get_box_tensor
from mmengine.model import bias_init_with_prob

from detloss_plugins.adapters.mmdetection.levels import GathersLevels
from detloss_plugins.losses import mining_ratio, multibox_loss


class PluginSSDHead(GathersLevels, SSDHead):
    """SSDHead with any losses, as :func:`detloss_plugins.losses.multibox_loss` puts them together.

    A sigmoid loss has ``num_classes`` channels and sigmoid scores, a softmax loss one more and softmax scores. With the
    losses by default this is the stock head; ``smoothl1_beta`` of ``train_cfg`` is not read.

    Args:
        loss_cls: config of a classification or ranking loss.
        loss_bbox: config of a point-wise loss, of encoded offsets, or with ``reg_decoded_bbox=True`` of a box loss.
        neg_pos_ratio: how many negatives an image has for each positive; None for all. "auto" is that of ``train_cfg``,
            or 3, or None for a loss of ours that balances positives and negatives itself, as focal loss does.
        prior_prob: for a sigmoid loss, the score of every class that training starts with.

    Raises:
        ValueError: if a loss has no place here, or a box loss comes without ``reg_decoded_bbox=True``.
    """

    join = staticmethod(torch.stack)

    def __init__(
        self,
        *args: Any,
        loss_cls: Mapping[str, Any] | None = None,
        loss_bbox: Mapping[str, Any] | None = None,
        neg_pos_ratio: float | Literal["auto"] | None = "auto",
        prior_prob: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        loss_cls = MODELS.build(loss_cls or dict(type="detloss_plugins.CrossEntropyLoss"))
        loss_bbox = MODELS.build(loss_bbox or dict(type="detloss_plugins.SmoothL1Loss"))
        stock_ratio = (self.train_cfg or {}).get("neg_pos_ratio", 3)
        self.neg_pos_ratio = mining_ratio(neg_pos_ratio, loss_cls, loss_bbox, auto=stock_ratio)
        self.use_sigmoid_cls = getattr(loss_cls, "use_sigmoid", False)
        self.loss_cls, self.loss_bbox = loss_cls, loss_bbox
        if getattr(self.loss_bbox, "family", "") == "box" and not self.reg_decoded_bbox:
            name = type(self.loss_bbox).__name__
            raise ValueError(f"{name} takes boxes, not encoded offsets: set reg_decoded_bbox=True in PluginSSDHead.")
        if not 0 < prior_prob < 1:
            raise ValueError(f"prior_prob must be between 0 and 1, not {prior_prob}.")
        self.prior_prob = prior_prob
        if self.use_sigmoid_cls:
            self.cls_out_channels = self.num_classes
            self._init_layers()  # anew, without channels for the background

    def init_weights(self):
        """As ``init_cfg`` says; the biases of sigmoid scores from ``prior_prob``."""
        super().init_weights()
        if self.use_sigmoid_cls:
            for layers in self.cls_convs:
                torch.nn.init.constant_(layers[-1].bias, bias_init_with_prob(self.prior_prob))

    def loss_by_feat_single(self, *image, avg_factor):
        """The tensors of an image: the stock head takes image by image."""
        return (*image, avg_factor), None

    def losses(self, scores, boxes, anchors, labels, label_weights, true_boxes, box_weights, avg_factor):
        """Of all images at once, as negatives are mined image by image but counted together."""
        boxes = boxes.float()
        if self.reg_decoded_bbox:
            decoded = self.bbox_coder.decode(anchors.flatten(0, 1), boxes.flatten(0, 1))
            boxes = get_box_tensor(decoded).reshape(boxes.shape)
        loss_cls, loss_bbox = multibox_loss(
            (scores, boxes),
            (labels, true_boxes),
            (label_weights, box_weights),
            avg_factor,
            neg_pos_ratio=self.neg_pos_ratio,
            loss_cls=self.loss_cls,
            loss_bbox=self.loss_bbox,
        )
        return dict(loss_cls=loss_cls, loss_bbox=loss_bbox)
