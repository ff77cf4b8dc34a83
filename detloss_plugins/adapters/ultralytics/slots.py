"""What stands in a slot of the stock criteria: a loss of ours in place of the stock class or box loss."""

import torch
from ultralytics.utils.loss import BboxLoss, RotatedBboxLoss
from ultralytics.utils.tal import bbox2dist

from detloss_plugins.adapters.curves import part_values
from detloss_plugins.adapters.ultralytics import compat
from detloss_plugins.adapters.ultralytics.assigner import boxes_of, sides_of, sum_of_head
from detloss_plugins.loss import Loss
from detloss_plugins.losses import JointLoss, ScheduledLoss, in_turn
from detloss_plugins.precision import float32, is_asynchronous, without_autocast
from detloss_plugins.reduction import apply_weight


def tell_image_size(loss, image_size):
    """Hand the size ``(height, width)`` of this batch to the losses that take one, also nested ones."""
    for part in loss.modules():
        if hasattr(part, "batch_image_size"):
            part.batch_image_size = image_size


class ClassSlot:
    """Stands in for the stock criterion's element-wise BCE; the criterion weights, sums and normalises the result.

    Where nothing weights the classes, the sum is all that it needs, and gets: faster, and in a fraction of the memory.
    What the ``regions``, if there are any, leave out is a negative target, which every class loss ignores.
    """

    def __init__(self, loss, weighs, regions=None):
        self.loss, self.regions = loss, regions
        self.weighs = weighs  # whether the criterion weights the classes
        self.of_elements = weighs or loss.family == "ranking" or loss.facts.self_normalized
        own = any(part.facts.self_normalized for part in loss.modules() if isinstance(part, Loss))
        self.by_parts = isinstance(loss, ScheduledLoss) or (own and isinstance(loss, JointLoss))

    def __call__(self, pred_scores, target_scores):
        if self.by_parts:
            found = ((slot(pred_scores, target_scores), share) for slot, share in self.in_turn())
            return sum(share * (values if self.weighs else values.sum()) for values, share in found)
        target = self.wanted(target_scores)
        if not self.of_elements:
            return self.loss(pred_scores, target, reduction_override="sum")
        # Under autocast the sum of the scores would be rounded to half precision.
        target_scores, target = float32(target_scores), float32(target)
        with without_autocast(pred_scores.device):
            rows = self.loss.added_up(pred_scores).flatten(0, -2), target.flatten(0, -2)
            seen = self.loss.observe(*rows, None)
            elements, valid = self.loss.unweighted(*rows, seen)
        if self.loss.family == "ranking":
            elements = self.in_their_places(elements, target_scores)
        elif valid is not None:
            elements = apply_weight(elements, valid)
        if self.loss.facts.self_normalized:
            # The criterion divides the sum by the scores; a loss with a normaliser of its own keeps that.
            own = self.loss.normalizer(elements.numel(), seen)
            elements = elements * (target_scores.sum().clamp(min=1) / own)
        return self.loss.loss_weight * elements.view_as(pred_scores)

    def in_turn(self):
        """The losses that a joint or scheduled one is made of and count now, each in such a slot, and their shares."""
        parts = [(part, self.loss.loss_weight) for part in self.loss.losses]
        parts = in_turn(self.loss) if isinstance(self.loss, ScheduledLoss) else parts
        return [(ClassSlot(loss, self.weighs, self.regions), share) for loss, share in parts]

    def wanted(self, target_scores):
        """The targets, negative in what is left out."""
        return target_scores if self.regions is None else target_scores.masked_fill(self.regions.left_out(), -1)

    @torch.no_grad()
    def parts(self, pred_scores, target_scores):
        """What each loss that the slot's is made of has in the sum."""
        if not self.by_parts:
            return part_values(self.loss, pred_scores, self.wanted(target_scores), reduction_override="sum")
        values = {slot.loss: share * slot(pred_scores, target_scores).sum() for slot, share in self.in_turn()}
        return [values.get(part, torch.zeros(())) for part in self.loss.losses]

    @staticmethod
    def in_their_places(losses, target_scores):
        """The losses of the positives where class weights find them, so scaled that the criterion gives their mean."""
        share = target_scores.sum().clamp(min=1) / max(len(losses), 1)
        nothing = torch.zeros(target_scores.shape, dtype=losses.dtype, device=losses.device)
        return nothing.masked_scatter(target_scores > 0, losses * share)


def in_pixels(boxes, stride):
    """Boxes ``(..., 4)`` or ``(..., 5)`` of stride units in pixels of the input; an angle stays what it is."""
    boxes = float32(boxes)
    return boxes * stride if boxes.shape[-1] == 4 else torch.cat([boxes[..., :4] * stride, boxes[..., 4:]], -1)


class BoxCriterion(BboxLoss):
    """The stock box criterion with the box loss, the distribution (or distance) loss, or both replaced."""

    def __init__(self, reg_max, box, dfl):
        super().__init__(reg_max)
        self.reg_max, self.box, self.dfl = reg_max, box, dfl

    def forward(self, *inputs):
        dist, boxes, anchors, target, scores, scores_sum, positive, imgsz, stride = compat.box_inputs(self, inputs)
        stock = super().forward(*inputs) if None in (self.box, self.dfl) else (None, None)
        places = torch.cat([anchors, stride], -1).expand(len(dist), -1, -1)
        dist, boxes, target, scores, places = self.rows_of(positive, dist, boxes, target, scores, places)
        pixels = in_pixels(boxes, places[..., 2:]), in_pixels(target, places[..., 2:])
        found = self.sums(*pixels, dist, target, places, scores.sum(-1), imgsz)
        return tuple(of_stock if own is None else own / scores_sum for own, of_stock in zip(found, stock, strict=True))

    def takes_all_anchors(self, device):
        """Whether the losses get all anchors, those that are not positive with weight 0, in place of the positive."""
        own = [loss for loss in (self.box, self.dfl) if loss is not None]
        return is_asynchronous(device) and all(loss.compiled and loss.facts.row_wise for loss in own)

    def rows_of(self, positive, *tensors):
        """Those rows of tensors ``(B, A, ...)`` that the losses get."""
        if self.takes_all_anchors(positive.device):
            return tensors
        index = positive.nonzero(as_tuple=True)
        return tuple(x[index] for x in tensors)

    def sums(self, boxes, target_boxes, dist, target, places, weight, imgsz):
        """The summed losses of the two slots; None for a stock one.

        Args:
            boxes, target_boxes: in pixels, ``(..., 4 or 5)``.
            dist: what the head predicts, ``(..., 4 * bins)``.
            target: boxes ``(..., 4 or 5)`` in stride units.
            places: anchors and strides ``(..., 3)``.
            weight: the scores ``(...)`` of the anchors' classes, 0 for those that are not positive.
            imgsz: as in the stock criterion.
        """
        loss_box = loss_dfl = None
        if self.box is not None:
            tell_image_size(self.box, float32(imgsz))
            loss_box = self.box(boxes, target_boxes, weight, reduction_override="sum")
        if self.dfl is not None:
            loss_dfl = self.sum_of_sides(dist, target, places, weight, imgsz)
        return loss_box, loss_dfl

    def sums_of_head(self, dist, target, places, weight, imgsz):
        """The same of both slots, of boxes in pixels and what the head predicts, in a kernel each."""
        tell_image_size(self.box, imgsz)
        loss_box = sum_of_head(self.box, boxes_of, self.reg_max, dist, target, places, weight)
        if self.reg_max > 1:
            return loss_box, sum_of_head(self.dfl, sides_of, self.reg_max, dist, target, places, weight)
        return loss_box, self.sum_of_sides(dist, target / places[..., 2:], places, weight, imgsz)

    def sum_of_sides(self, dist, target, places, weight, imgsz):
        """The summed loss of the ``dfl`` slot; a box counts as the mean of its four sides."""
        each = (weight / 4).unsqueeze(-1).expand(*weight.shape, 4)
        return self.dfl(*self.sides(dist, target, places, imgsz), each, reduction_override="sum")

    def sides(self, dist, target, places, imgsz):
        """What the head predicts for the four sides of a box, and the distances it should predict."""
        anchors, stride = places.split((2, 1), -1)
        if self.reg_max > 1:
            return dist.unflatten(-1, (4, self.reg_max)), self.distances(anchors, target, self.reg_max - 1)
        # A head without bins regresses the distances themselves, here as shares of the image's sides.
        to_share = stride / imgsz[[1, 0, 1, 0]]
        return dist * to_share, self.distances(anchors, target) * to_share

    def distances(self, anchors, target, largest=None):
        """Distances of the sides of the target boxes from the anchor points, in stride units."""
        return bbox2dist(anchors, target, largest)


class RotatedBoxCriterion(BoxCriterion, RotatedBboxLoss):
    """The same for oriented boxes ``(cx, cy, w, h, theta)``, whose sides are measured in the box's own axes."""

    def distances(self, anchors, target, largest=None):
        return compat.rbox2dist(target, anchors, largest)
