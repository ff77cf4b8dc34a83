"""RT-DETR's criterion with losses of ours in its slots."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from ultralytics.models.utils.loss import RTDETRDetectionLoss
from ultralytics.utils.ops import xywh2xyxy

from detloss_plugins.adapters.ultralytics.building import average_states, build_losses
from detloss_plugins.adapters.ultralytics.config import load_losses
from detloss_plugins.adapters.ultralytics.slots import tell_image_size
from detloss_plugins.loss import Loss
from detloss_plugins.losses import in_turn
from detloss_plugins.precision import float32


class PluginRTDETRLoss(RTDETRDetectionLoss):
    """RT-DETR's criterion with losses of ours for ``loss_class``, ``loss_bbox`` and ``loss_giou``.

    Every loss is summed and divided by the number of objects, in every layer of the decoder and for the denoising
    queries, and multiplied by the stock gains (class 1, bbox 5, giou 2). A class loss whose target is a quality (MAL,
    IA-BCE, VFL, QFL, GFL, Slide, the ranking losses) gets the IoU of the matched boxes, any other the classes.
    ``loss_bbox`` gets ``(cx, cy, w, h)`` as shares of the image, ``loss_giou`` corners in pixels of the network's
    input. The costs of the matching stay stock.

    Args:
        model: an RT-DETR model.
        losses: see :func:`load_losses`; a slot that is absent keeps the stock loss.
        compile: compile all of the losses, as ``compile=True`` in the dict of each does.
    """

    curves = None  # which look at nothing here but the state
    image_size = None  # (height, width) of the batch, which the criterion is not given: set it before a call

    def __init__(self, model: torch.nn.Module, losses: Mapping[str, Any] | None = None, compile: bool = False) -> None:
        super().__init__(nc=model.model[-1].nc, use_vfl=True)
        self.losses = load_losses(losses or {}, "rtdetr", compile=compile)
        # In a dict, so that no state of a loss becomes a part of the model's own.
        self.built = build_losses(self.losses, self.nc, next(model.parameters()).device)
        # A batch without objects has no denoising queries, and their calls of the class loss: no call may wait.
        for part in (part for loss in self.built.values() for part in loss.modules() if isinstance(part, Loss)):
            part.facts = part.facts.but(every_rank=False)

    def forward(self, *args, **kwargs):
        """The stock losses; the state of its losses is averaged over the ranks."""
        found = super().forward(*args, **kwargs)
        average_states(self.built.values())
        return found

    def _get_loss_class(self, pred_scores, targets, gt_scores, num_gts, postfix=""):
        if "loss_class" not in self.built:
            return super()._get_loss_class(pred_scores, targets, gt_scores, num_gts, postfix)
        value = 0
        for loss, share in in_turn(self.built["loss_class"]):
            of_quality = loss.facts.takes_quality or loss.family == "ranking"
            target = (targets, gt_scores) if of_quality else targets
            value = value + share * loss(pred_scores, target, avg_factor=max(num_gts, 1))
        return {f"loss_class{postfix}": self.loss_gain["class"] * value}

    def _get_loss_bbox(self, pred_bboxes, gt_bboxes, postfix=""):
        both = self.built.keys() >= {"loss_bbox", "loss_giou"}
        found = {} if both else super()._get_loss_bbox(pred_bboxes, gt_bboxes, postfix)
        objects = max(len(gt_bboxes), 1)
        if "loss_bbox" in self.built:
            value = self.built["loss_bbox"](pred_bboxes, gt_bboxes, reduction_override="sum")
            found[f"loss_bbox{postfix}"] = self.loss_gain["bbox"] * value / objects
        if "loss_giou" in self.built:
            value = self.built["loss_giou"](*map(self.corners, (pred_bboxes, gt_bboxes)), reduction_override="sum")
            found[f"loss_giou{postfix}"] = self.loss_gain["giou"] * value / objects
        return found

    def corners(self, boxes: Tensor) -> Tensor:
        """Corners in pixels of boxes ``(cx, cy, w, h)`` that are shares of the image."""
        if self.image_size is None:
            raise ValueError("Set criterion.image_size to (height, width) of the batch; model.loss does it by itself.")
        size = torch.tensor(self.image_size, dtype=torch.float32, device=boxes.device)
        tell_image_size(self.built["loss_giou"], size)
        return xywh2xyxy(float32(boxes)) * size[[1, 0, 1, 0]]
