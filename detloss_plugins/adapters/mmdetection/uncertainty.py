"""MMDetection heads for the KL loss: they predict how uncertain each side of a box is, and vote with it.

The heads predict the log variance of the four corner offsets beside the offsets; ``UncertaintyKLLoss`` learns both. At
test time, a box may be moved to where its neighbours, weighted by how sure they are, say that it is (variance voting).
All are named by their full path, and need no ``custom_imports``::

    model = dict(
        roi_head=dict(
            type="detloss_plugins.adapters.mmdetection.UncertaintyRoIHead",
            bbox_head=dict(
                type="detloss_plugins.adapters.mmdetection.UncertaintyBBoxHead",
                bbox_coder=dict(_delete_=True, type="detloss_plugins.adapters.mmdetection.CornerBBoxCoder"),
                loss_bbox=dict(_delete_=True, type="detloss_plugins.UncertaintyKLLoss"),
            ),
        ),
        test_cfg=dict(rcnn=dict(voting=dict(sigma_t=0.02))),
    )

He et al., Bounding Box Regression with Uncertainty for Accurate Object Detection, 2018,
https://arxiv.org/abs/1809.08545.
"""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmcv.ops import batched_nms
from mmdet.models.dense_heads import RetinaHead
from mmdet.models.roi_heads import ConvFCBBoxHead, StandardRoIHead
from mmdet.models.task_modules.coders import BaseBBoxCoder
from mmdet.structures.bbox import HorizontalBoxes, bbox_overlaps, get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor

from detloss_plugins.losses import UncertaintyKLLoss
from detloss_plugins.precision import float32, longest

MIN_SIDE = 1e-6  # of the box that offsets are relative to, in pixels
MIN_SIGMA = 1e-6  # in the vote, in pixels


class CornerBBoxCoder(BaseBBoxCoder):
    """Boxes as offsets of their corners, ``((x1 - x1a) / wa, (y1 - y1a) / ha, (x2 - x2a) / wa, (y2 - y2a) / ha)``.

    The parameters of the KL loss's paper: each coordinate of a box has an offset, and so an uncertainty, of its own.

    Args:
        target_means, target_stds: of the four offsets; the encoded ones are ``(offset - mean) / std``.
        clip_border: whether decoded boxes end at the border of the image.
    """

    def __init__(
        self,
        target_means: Sequence[float] = (0.0,) * 4,
        target_stds: Sequence[float] = (0.1,) * 4,
        clip_border: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.means, self.stds, self.clip_border = target_means, target_stds, clip_border

    def encode(self, bboxes, gt_bboxes):
        """Offsets ``(N, 4)`` that lead from boxes to ground truth boxes, both ``(N, 4)`` in pixels."""
        bboxes, gt_bboxes = get_box_tensor(bboxes), get_box_tensor(gt_bboxes)
        return (gt_bboxes - bboxes - self._shift(bboxes)) / self.scale(bboxes)

    def decode(self, bboxes, pred_bboxes, max_shape=None):
        """The boxes in pixels that offsets ``(N, 4)`` or, one box a class, ``(N, 4 C)`` lead to; same shape.

        A box whose corners change places has no size. ``max_shape`` is the ``(height, width)`` of the image.
        """
        bboxes = get_box_tensor(bboxes).unsqueeze(1)
        decoded = bboxes + self._shift(bboxes) + float32(pred_bboxes).unflatten(1, (-1, 4)) * self.scale(bboxes)
        top_left, bottom_right = decoded.chunk(2, -1)
        decoded = torch.cat([top_left, bottom_right.maximum(top_left)], -1)
        if self.clip_border and max_shape is not None:
            border = decoded.new_tensor([max_shape[1], max_shape[0]] * 2)
            decoded = decoded.clamp(min=0).minimum(border)
        decoded = decoded.flatten(1)
        return HorizontalBoxes(decoded) if self.use_box_type else decoded

    def scale(self, bboxes: Tensor) -> Tensor:
        """The length in pixels that is 1 to each encoded offset, ``(..., 4)``."""
        sides = (bboxes[..., 2:] - bboxes[..., :2]).clamp(min=MIN_SIDE)
        return torch.cat([sides, sides], -1) * bboxes.new_tensor(self.stds)

    def _shift(self, bboxes):
        return self.scale(bboxes) * bboxes.new_tensor(self.means) / bboxes.new_tensor(self.stds)


class _WithSigmas:
    """The coder of a head while its boxes have 8 numbers: offsets and log variances, decoded to boxes and sigmas."""

    encode_size = 8

    def __init__(self, coder, clamp):
        self.coder, self.clamp = coder, clamp

    def decode(self, bboxes, pred, max_shape=None):
        offsets, log_variance = float32(pred).chunk(2, -1)
        sigmas = (log_variance.clamp(-self.clamp, self.clamp) / 2).exp() * self.coder.scale(get_box_tensor(bboxes))
        return torch.cat([get_box_tensor(self.coder.decode(bboxes, offsets, max_shape)), sigmas], -1)


def variance_voting(boxes: Tensor, sigmas: Tensor, kept: Tensor, sigma_t: float) -> Tensor:
    """Move each kept box to the mean of the boxes that it overlaps, weighted by nearness and certainty.

    A coordinate becomes ``sum_i p_i x_i / sigma_i^2 / sum_i p_i / sigma_i^2`` over the boxes with IoU above 0, the box
    itself among them, with ``p_i = exp(-(1 - IoU_i)^2 / sigma_t)``. The IoUs are those before any box is moved.

    Args:
        boxes: ``(N, 4)`` as (x1, y1, x2, y2), all boxes of a class.
        sigmas: ``(N, 4)``, standard deviation of each coordinate in the unit of the boxes; 1e-6 at least.
        kept: ``(K,)``, indices of the boxes to move.
        sigma_t: how far neighbours have a say; the larger, the farther.

    Returns:
        ``(K, 4)``.

    >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [0, 2, 10, 11]])
    >>> sigmas = torch.tensor([[1.0, 1, 1, 1], [2, 1, 2, 1], [0.5, 1, 0.5, 1]])
    >>> variance_voting(boxes, sigmas, torch.tensor([0]), sigma_t=0.02)
    tensor([[ 0.0418,  0.0399, 10.0418, 10.0200]])
    """
    exact = longest(boxes)
    iou = bbox_overlaps(exact[kept], exact)
    nearness = torch.exp(-((1 - iou) ** 2) / sigma_t) * (iou > 0)
    nearness[torch.arange(len(kept), device=kept.device), kept] = 1  # also where a box has no size
    certainty = longest(sigmas).clamp(min=MIN_SIGMA) ** -2
    return (nearness @ (certainty * exact) / (nearness @ certainty)).to(boxes.dtype)


def _sigma_t(test_cfg):
    """The ``sigma_t`` of a ``test_cfg``'s ``voting``, None without; raises ``ValueError`` for any other content."""
    voting = (test_cfg or {}).get("voting")
    if voting is None:
        return None
    sigma_t = voting.get("sigma_t") if isinstance(voting, Mapping) and set(voting) == {"sigma_t"} else None
    if not isinstance(sigma_t, (int, float)) or not sigma_t > 0:
        raise ValueError(f"voting in test_cfg must be one positive number, dict(sigma_t=0.02), not {voting!r}.")
    return sigma_t


def _detect(candidates, scores, labels, cfg):
    """NMS and, if ``cfg`` asks for it, voting among the candidates of a class.

    Args:
        candidates: ``(N, 8)``, boxes and their sigmas.

    Returns:
        InstanceData with bboxes, scores, labels and ``sigmas (K, 4)``, those of the kept boxes before the vote.
    """
    boxes, sigmas = candidates.split(4, -1)
    if len(boxes) == 0:
        return InstanceData(bboxes=boxes, scores=scores, labels=labels, sigmas=sigmas)
    detected, kept = batched_nms(boxes, scores, labels, cfg.nms)
    if cfg.max_per_img > 0:
        detected, kept = detected[: cfg.max_per_img], kept[: cfg.max_per_img]
    found = InstanceData(bboxes=boxes[kept], scores=detected[:, 4], labels=labels[kept], sigmas=sigmas[kept])
    sigma_t = _sigma_t(cfg)
    if sigma_t is not None:
        for label in found.labels.unique():
            same, place = labels == label, found.labels == label
            among = same.cumsum(0)[kept[place]] - 1  # the kept ones' places among the candidates of their class
            found.bboxes[place] = variance_voting(boxes[same], sigmas[same], among, sigma_t)
    return found


def _hand_over_log_variance(loss, arguments):
    """Calls a box loss with ``(offsets, target, log_variance, ...)`` where the head gives both in its prediction."""
    pred, target, *rest = arguments
    offsets, log_variance = pred.chunk(2, -1)
    return offsets, target, log_variance, *rest


class _Uncertainty:
    """Its boxes have 8 numbers each, four encoded offsets and their log variances, from two layers of one shape.

    The layer ``log_variance`` starts with weights from N(0, 1e-4) and biases 0: all sigmas are 1. Detections have
    ``sigmas``, ``(K, 4)``: the standard deviations of x1, y1, x2 and y2 in pixels, before any vote. With
    ``voting=dict(sigma_t=0.02)`` in ``test_cfg``, detected boxes are moved by :func:`variance_voting` among all boxes
    of their class above ``score_thr``; hard and soft NMS select and score as without.

    Raises:
        ValueError: if ``loss_bbox`` is not UncertaintyKLLoss, ``bbox_coder`` not CornerBBoxCoder, or
            ``reg_decoded_bbox`` is set.
    """

    box_layer = ""  # the name of the layer that predicts the offsets

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        head, loss, coder = type(self).__name__, type(self.loss_bbox).__name__, type(self.bbox_coder).__name__
        if not isinstance(self.loss_bbox, UncertaintyKLLoss):
            raise ValueError(f"{head} is for UncertaintyKLLoss as loss_bbox: {loss} would leave the sigmas unlearnt.")
        if not isinstance(self.bbox_coder, CornerBBoxCoder):
            raise ValueError(f"{head} predicts sigmas of corners: give it CornerBBoxCoder as bbox_coder, not {coder}.")
        if self.reg_decoded_bbox:
            raise ValueError(f"The sigmas of {head} are those of encoded offsets: write reg_decoded_bbox=False.")
        layer = self.get_submodule(self.box_layer)
        self.log_variance = copy.deepcopy(layer)
        layer.register_forward_hook(self._append_log_variance)
        self.loss_bbox.register_forward_pre_hook(_hand_over_log_variance)
        given = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg]
        own = dict(type="Normal", std=1e-4, override=dict(name="log_variance"))
        self.init_cfg = [*(cfg for cfg in given if cfg), own]

    def _append_log_variance(self, layer, inputs, offsets):
        """Box by box: the boxes of all classes or anchors lie along the channels."""
        parts = [part.unflatten(1, (-1, 4)) for part in (offsets, self.log_variance(*inputs))]
        return torch.cat(parts, 2).flatten(1, 2)

    @contextlib.contextmanager
    def _boxes_of_8(self):
        """The stock head's code, run inside, sees boxes of 8 numbers."""
        coder, self.bbox_coder = self.bbox_coder, _WithSigmas(self.bbox_coder, self.loss_bbox.clamp)
        try:
            yield
        finally:
            self.bbox_coder = coder


class UncertaintyBBoxHead(_Uncertainty, ConvFCBBoxHead):
    __doc__ = f"Shared2FCBBoxHead, or ConvFCBBoxHead, for the KL loss in Faster and Mask R-CNN. {_Uncertainty.__doc__}"

    box_layer = "fc_reg"

    def __init__(self, *args: Any, num_shared_fcs: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, num_shared_fcs=num_shared_fcs, **kwargs)

    def _predict_by_feat_single(self, roi, cls_score, bbox_pred, img_meta, rescale=False, rcnn_test_cfg=None):
        predict = super()._predict_by_feat_single
        if len(roi) == 0:
            nothing = predict(roi, cls_score, bbox_pred, img_meta, rescale, rcnn_test_cfg)
            nothing.sigmas = nothing.bboxes
            return nothing
        with self._boxes_of_8():
            found = predict(roi, cls_score, bbox_pred, img_meta, rescale)  # all classes of all boxes, without NMS
        candidates = found.bboxes.unflatten(1, (-1, 8))
        if rcnn_test_cfg is None:
            found.bboxes = candidates[..., :4].flatten(1)
            return found
        scores = found.scores[:, :-1]
        chosen = scores > rcnn_test_cfg.score_thr
        candidates = candidates.expand(*scores.shape, 8)[chosen]
        return _detect(candidates, scores[chosen], chosen.nonzero()[:, 1], rcnn_test_cfg)


class UncertaintyRoIHead(StandardRoIHead):
    """StandardRoIHead that looks at ``test_cfg.voting`` when it is built, before a run has trained for hours.

    Beside a mask head, it scales the sigmas as the boxes.

    Raises:
        ValueError: if ``voting`` is anything but ``dict(sigma_t=...)`` with a positive number, or there is one but
            ``bbox_head`` is not UncertaintyBBoxHead.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if _sigma_t(self.test_cfg) is not None and not isinstance(self.bbox_head, UncertaintyBBoxHead):
            raise ValueError("voting in test_cfg needs UncertaintyBBoxHead as bbox_head, which predicts the sigmas.")

    def predict_mask(self, x, batch_img_metas, results_list, rescale=False):
        """The parent's, which scales the boxes that the box head leaves alone beside masks; so are the sigmas here."""
        found = super().predict_mask(x, batch_img_metas, results_list, rescale)
        for results, meta in zip(found, batch_img_metas, strict=True):
            if rescale and "sigmas" in results:
                results.sigmas = results.sigmas / results.sigmas.new_tensor(meta["scale_factor"]).repeat(2)
        return found


class UncertaintyRetinaHead(_Uncertainty, RetinaHead):
    __doc__ = f"RetinaHead for the KL loss. {_Uncertainty.__doc__}"

    box_layer = "retina_reg"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _sigma_t(self.test_cfg)

    def loss_by_feat_single(self, *args, **kwargs):
        with self._boxes_of_8():
            return super().loss_by_feat_single(*args, **kwargs)

    def _predict_by_feat_single(self, *args, **kwargs):
        with self._boxes_of_8():
            return super()._predict_by_feat_single(*args, **kwargs)

    def _bbox_post_process(self, results, cfg, rescale=False, with_nms=True, img_meta=None):
        results = super()._bbox_post_process(results, cfg, rescale, False, img_meta)  # scaled, without NMS
        if with_nms:
            return _detect(results.bboxes, results.scores, results.labels, cfg)
        results.bboxes, results.sigmas = results.bboxes.split(4, -1)
        return results
