"""MMDetection heads that call each of their losses once a step instead of once a level.

On a GPU a loss costs the kernels that it launches, not its arithmetic. A head of this module has the layers, targets,
predictions and checkpoints of the stock head, and the same sum of each loss over the levels; it is named by its full
path, and needs no ``custom_imports``::

    model = dict(bbox_head=dict(type="detloss_plugins.adapters.mmdetection.GatheredRetinaHead"))
"""

import itertools

import torch
from mmdet.models.dense_heads import ATSSHead, GFLHead, RetinaHead
from mmdet.structures.bbox import cat_boxes


def _joined(levels):
    """One argument of ``loss_by_feat_single`` of every level, as that of a single level of as many cells.

    Maps, ``(B, C, H, W)``, become ``(B, C, 1, sum of H * W)``; what has a row for each prior becomes ``(B, sum of rows,
    ...)``; a stride is the same on every level.
    """
    if isinstance(levels[0], tuple):
        return levels[0]
    if levels[0].dim() == 4:
        # The stock head takes the channels last: so laid out, it need not copy them again.
        rows = torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in levels], 1)
        return rows.permute(0, 2, 1).unsqueeze(2)
    return cat_boxes(levels, 1)


class _Gathered:
    """It differs from the stock head in that every loss is called once, for all levels and images of the batch.

    The dict of losses has lists of one value, the sum of those of the stock head. A loss with a state (GHM, Wise-IoU)
    learns once a step, from all levels, and not once from each level.
    """

    def loss_by_feat(self, *args, **kwargs):
        """The stock head's losses of the batch, ``{name: [sum over the levels]}``."""
        self.levels = []
        losses = super().loss_by_feat(*args, **kwargs)
        return {name: values[-1:] for name, values in losses.items()}

    def loss_by_feat_single(self, *level, avg_factor):
        """Zeros, until the last level comes; then what the stock head gives for all of them as one."""
        self.levels.append(level)
        if len(self.levels) < self.prior_generator.num_levels:
            return itertools.repeat(0.0)  # for as many losses as the last level gives
        levels, self.levels = self.levels, []
        return super().loss_by_feat_single(*map(_joined, zip(*levels, strict=True)), avg_factor=avg_factor)


class GatheredRetinaHead(_Gathered, RetinaHead):
    __doc__ = f"RetinaHead with its levels gathered. {_Gathered.__doc__}"


class GatheredATSSHead(_Gathered, ATSSHead):
    __doc__ = f"ATSSHead with its levels gathered. {_Gathered.__doc__}"


class GatheredGFLHead(_Gathered, GFLHead):
    __doc__ = f"""GFLHead with its levels gathered; boxes are in stride units of their level, as there.

    {_Gathered.__doc__}"""

    def loss_by_feat_single(
        self, anchors, cls_score, bbox_pred, labels, label_weights, bbox_targets, stride, avg_factor
    ):
        """What all levels get in units of their own stride has a stride of 1."""
        anchors, bbox_targets = anchors / stride[0], bbox_targets / stride[0]
        unit = tuple(side / stride[0] for side in stride)
        return super().loss_by_feat_single(
            anchors, cls_score, bbox_pred, labels, label_weights, bbox_targets, unit, avg_factor=avg_factor
        )
