"""MMDetection heads that hand boxes in pixels to their box loss.

Some of mmdet's heads hand over boxes in units of their level's stride. A scale-invariant loss gives the same value
there, one with a constant in pixels (NWDLoss, MPDIoULoss, ScaleDynamicIoULoss, BoundedIoULoss) does not. A head of this
module changes that and nothing else; it is named by its full path, and needs no ``custom_imports``::

    model = dict(bbox_head=dict(type="detloss_plugins.adapters.mmdetection.PixelGFLHead"))

Every other dense head of mmdet hands over pixels already, and so do FCOS and CondInst without ``norm_on_bbox``.
"""

import inspect

import torch
from mmdet.models import dense_heads


class _PixelLevels:
    """For a head that computes its losses level by level."""

    box_losses = ("loss_bbox",)

    def unit(self, stride):
        """The length in pixels that is 1 to the head."""
        return stride[0]

    def loss_by_feat_single(self, *args, **kwargs):
        compute = super().loss_by_feat_single
        unit = self.unit(inspect.signature(compute).bind(*args, **kwargs).arguments["stride"])

        def to_pixels(loss, inputs):
            pred, target, *rest = inputs
            return (pred * unit, target * unit, *rest)

        hooks = [getattr(self, name).register_forward_pre_hook(to_pixels) for name in self.box_losses]
        try:
            return compute(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()


class PixelGFLHead(_PixelLevels, dense_heads.GFLHead):
    """GFLHead with pixels for ``loss_bbox``."""


class PixelLDHead(_PixelLevels, dense_heads.LDHead):
    """LDHead with pixels for ``loss_bbox``."""


class PixelTOODHead(_PixelLevels, dense_heads.TOODHead):
    """TOODHead with pixels for ``loss_bbox``."""


class PixelRepPointsHead(_PixelLevels, dense_heads.RepPointsHead):
    """RepPointsHead with pixels for ``loss_bbox_init`` and ``loss_bbox_refine``."""

    box_losses = ("loss_bbox_init", "loss_bbox_refine")

    def unit(self, stride):
        return self.point_base_scale * stride


class _PixelPoints:
    """For a head whose distances from a pixel to the sides are in stride units during training."""

    norm_on_bbox = True

    def to_pixels(self, levels):
        """Distances of every level, ``[(...), ...]``, in pixels."""
        if not self.norm_on_bbox:
            return levels
        return [distances * stride for distances, stride in zip(levels, self.strides, strict=True)]

    def loss_by_feat(self, cls_scores, bbox_preds, *args, **kwargs):
        return super().loss_by_feat(cls_scores, self.to_pixels(bbox_preds), *args, **kwargs)

    def get_targets(self, *args, **kwargs):
        labels, bbox_targets, *rest = super().get_targets(*args, **kwargs)
        return (labels, self.to_pixels(bbox_targets), *rest)


class PixelFCOSHead(_PixelPoints, dense_heads.FCOSHead):
    """FCOSHead with pixels for ``loss_bbox`` under ``norm_on_bbox=True`` too."""


class PixelNASFCOSHead(_PixelPoints, dense_heads.NASFCOSHead):
    """NASFCOSHead with pixels for ``loss_bbox`` under ``norm_on_bbox=True`` too."""


class PixelCondInstBboxHead(_PixelPoints, dense_heads.CondInstBboxHead):
    """CondInstBboxHead with pixels for ``loss_bbox`` under ``norm_on_bbox=True`` too."""


class PixelBoxInstBboxHead(_PixelPoints, dense_heads.BoxInstBboxHead):
    """BoxInstBboxHead with pixels for ``loss_bbox`` under ``norm_on_bbox=True`` too."""


class PixelCenterNetUpdateHead(_PixelPoints, dense_heads.CenterNetUpdateHead):
    """CenterNetUpdateHead with pixels for ``loss_bbox``."""

    def get_targets(self, points, batch_gt_instances):
        # Skips _PixelPoints: here the targets of all levels are one tensor.
        labels, bbox_targets = dense_heads.CenterNetUpdateHead.get_targets(self, points, batch_gt_instances)
        sizes = [len(batch_gt_instances) * len(level) for level in points]
        return labels, torch.cat(self.to_pixels(bbox_targets.split(sizes)))

    def _get_center3x3_region_index_targets(self, *args, **kwargs):
        # The targets of the additional positive samples: (objects, levels, 9, 4).
        labels, levels, indices, bbox_targets, masks = super()._get_center3x3_region_index_targets(*args, **kwargs)
        return labels, levels, indices, torch.stack(self.to_pixels(bbox_targets.unbind(1)), 1), masks
