"""MMDetection heads that call a ranking loss once a step, with all levels and images of the batch.

The stock heads call their losses level by level, where a ranking loss would rank each level for itself. A head of this
module has the weights, targets and predictions of the stock head; it is named by its full path, and needs no
``custom_imports``::

    bbox_head = dict(
        type="detloss_plugins.adapters.mmdetection.RankingRetinaHead",
        loss_cls=dict(_delete_=True, type="detloss_plugins.APLoss", use_sigmoid=True),
    )
"""

from collections.abc import Mapping
from typing import Any

import torch
from mmdet.models.dense_heads import ATSSHead, RetinaHead
from mmdet.structures.bbox import bbox_overlaps, get_box_tensor

from detloss_plugins.adapters.mmdetection.levels import GathersLevels
from detloss_plugins.families import RankingLoss
from detloss_plugins.losses import ALRPLoss, RankSortLoss, ScheduledLoss

FIRST_BALANCE = 50.0  # aLRP's factor on the box loss until it has a history
EPS = 1e-6


class _Ranking(GathersLevels):
    """What becomes of the box loss depends on the class loss.

    - APLoss, DRLoss: it is over the number of positives.
    - ALRPLoss: ``loss_bbox`` of each positive is its localisation error, as the authors have it with GIoULoss; the box
      loss is the localisation component times a self-balancing factor. That is 50 until the
      ``self_balance_period``-th step with positives, from there ``(mean box + mean class loss) / mean box loss`` of
      those steps, renewed after as many again.
    - RankSortLoss: the quality of a positive is the IoU of its predicted box. The box loss is the mean of ``loss_bbox``
      weighted by the largest class probability of each positive, scaled to the value of the class loss in every step.
    - ScheduledLoss of these, and of classification losses: as the loss in turn has it. A classification loss is over
      ``avg_factor``, as in the stock head.

    Either way it is multiplied by the ``loss_weight`` of ``loss_bbox``. The class loss is over the number of positives.

    Args:
        self_balance_period: for ALRPLoss; the authors' is an epoch, 3665 steps for COCO in batches of 32.

    Raises:
        ValueError: if ``loss_cls`` is no ranking loss, or ALRPLoss or RankSortLoss comes
            without ``reg_decoded_bbox=True``.
    """

    def __init__(self, *args: Any, self_balance_period: int = 3665, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for loss in self.loss_cls.losses if isinstance(self.loss_cls, ScheduledLoss) else [self.loss_cls]:
            self.take(loss, self_balance_period)

    def take(self, loss, self_balance_period):
        """Check a class loss, and make what it needs."""
        head, name = type(self).__name__, type(loss).__name__
        scheduled = loss is not self.loss_cls and loss.family == "classification"
        if not (scheduled or isinstance(loss, RankingLoss)):
            raise ValueError(f"{head} is for APLoss, ALRPLoss, RankSortLoss and DRLoss as loss_cls, not {name}.")
        if isinstance(loss, (ALRPLoss, RankSortLoss)) and not self.reg_decoded_bbox:
            raise ValueError(f"{name} reads how well boxes fit: set reg_decoded_bbox=True in {head}.")
        if isinstance(loss, ALRPLoss):
            self.self_balance_period = self_balance_period
            self.register_buffer("box_balance", torch.tensor(FIRST_BALANCE))
            self.register_buffer("balance_history", torch.zeros(3))  # sums of box and class losses, steps

    def level(self, cls_score, bbox_pred, anchors, labels, label_weights, bbox_targets, avg_factor):
        """What the losses are called with, in the order of rows; boxes of the positives only."""
        labels = labels.reshape(-1)
        positive = self.positive(labels)
        scores = cls_score.permute(0, 2, 3, 1).reshape(-1, self.cls_out_channels)
        boxes = bbox_pred.permute(0, 2, 3, 1).reshape(-1, self.bbox_coder.encode_size)[positive]
        if self.reg_decoded_bbox:
            boxes = get_box_tensor(self.bbox_coder.decode(anchors.reshape(-1, anchors.size(-1))[positive], boxes))
        targets = bbox_targets.reshape(-1, bbox_targets.size(-1))[positive]
        return scores, labels, label_weights.reshape(-1), boxes, targets, avg_factor

    def positive(self, labels):
        return (labels >= 0) & (labels < self.num_classes)

    def losses(self, *inputs):
        if not isinstance(self.loss_cls, ScheduledLoss):
            return self.losses_of(self.loss_cls, *inputs)
        found = [(self.losses_of(loss, *inputs), share) for loss, share in self.loss_cls.in_turn()]
        total = {name: sum(share * losses[name] for losses, share in found) for name in found[0][0]}
        return {**total, "loss_cls": self.loss_cls.loss_weight * total["loss_cls"]}

    def losses_of(self, ranking, scores, labels, label_weights, boxes, targets, avg_factor):
        """The losses of the batch with one class loss."""
        if isinstance(ranking, ALRPLoss):
            errors = self.box_errors(boxes, targets)
            loss_cls, loss_bbox = ranking(scores, labels, label_weights, loc_error=errors)
            balance = self.self_balance(loss_bbox, loss_cls) if len(errors) else self.box_balance
            loss_bbox = loss_bbox * balance * self.loss_bbox.loss_weight
        elif isinstance(ranking, RankSortLoss):
            positive = self.positive(labels)
            quality = torch.zeros(labels.shape, device=labels.device)
            quality[positive] = bbox_overlaps(boxes.detach().float(), targets.float(), is_aligned=True)
            loss_cls = ranking(scores, (labels, quality), label_weights)
            sure = scores.detach()[positive].sigmoid().amax(1)
            loss_bbox = (sure * self.box_errors(boxes, targets)).sum() / sure.sum().clamp(min=EPS)
            balance = loss_cls.detach() / loss_bbox.detach().clamp(min=EPS)
            loss_bbox = loss_bbox * balance * self.loss_bbox.loss_weight
        else:
            normalizer = {} if ranking.family == "ranking" else {"avg_factor": avg_factor}
            loss_cls = ranking(scores, labels, label_weights, **normalizer)
            loss_bbox = self.loss_bbox(boxes, targets, avg_factor=avg_factor)
        return dict(loss_cls=loss_cls, loss_bbox=loss_bbox)

    def box_errors(self, boxes, targets):
        """The box loss of each positive, without its weight, which may be 0."""
        weight, self.loss_bbox.loss_weight = self.loss_bbox.loss_weight, 1.0
        try:
            return self.loss_bbox(boxes, targets, reduction_override="none")
        finally:
            self.loss_bbox.loss_weight = weight

    @torch.no_grad()
    def _renew_balance(self, losses):
        # A step that is not finite is no part of the history; nothing here waits for the device.
        step = torch.cat([losses, losses.new_ones(1)])
        history = self.balance_history + torch.where(step.isfinite().all(), step, 0.0)
        box, cls, steps = history.unbind()
        due = (steps >= self.self_balance_period) & (box > 0)
        self.box_balance.copy_(torch.where(due, (box + cls) / box, self.box_balance))
        self.balance_history.copy_(torch.where(due, 0.0, history))

    def self_balance(self, loss_bbox, loss_cls):
        """aLRP's factor; it learns from the losses in training mode only, and not while gradients are off."""
        if self.training and torch.is_grad_enabled():
            self._renew_balance(torch.stack([loss_bbox, loss_cls]).detach())
        return self.box_balance.clone()


class RankingRetinaHead(_Ranking, RetinaHead):
    __doc__ = f"RetinaHead for a ranking loss. {_Ranking.__doc__}"

    def loss_by_feat_single(
        self, cls_score, bbox_pred, anchors, labels, label_weights, bbox_targets, bbox_weights, avg_factor
    ):
        return self.level(cls_score, bbox_pred, anchors, labels, label_weights, bbox_targets, avg_factor), None


class RankingATSSHead(_Ranking, ATSSHead):
    __doc__ = (
        "ATSSHead for a ranking loss, without centerness: no branch, no loss, no part in the score. "
        f"A ``loss_centerness`` from a base config is left alone. {_Ranking.__doc__}"
    )

    def __init__(self, *args: Any, loss_centerness: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.loss_centerness

    def _init_layers(self):
        super()._init_layers()
        self.atss_centerness = torch.nn.Identity()

    def forward(self, x):
        """Class scores and box deltas of every level."""
        return super().forward(x)[:2]

    def loss_by_feat(self, cls_scores, bbox_preds, *args, **kwargs):
        return super().loss_by_feat(cls_scores, bbox_preds, bbox_preds, *args, **kwargs)

    def loss_by_feat_single(
        self, anchors, cls_score, bbox_pred, centerness, labels, label_weights, bbox_targets, avg_factor
    ):
        level = self.level(cls_score, bbox_pred, anchors, labels, label_weights, bbox_targets, avg_factor)
        nothing = cls_score.new_zeros(())
        return level, nothing, nothing, nothing
