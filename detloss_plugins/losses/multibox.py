"""SSD's loss: classes and boxes of all anchors together, with hard negative mining."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from detloss_plugins.facts import ARXIV, NonNegative
from detloss_plugins.loss import Loss
from detloss_plugins.losses.composite import ScheduledLoss
from detloss_plugins.precision import float32, without_autocast
from detloss_plugins.reduction import check_reduction, fit_weight
from detloss_plugins.registry import MODELS, build_loss

__all__ = ["MultiBoxLoss", "hard_negatives", "mining_ratio", "multibox_loss"]


def hard_negatives(loss: Tensor, positive: Tensor, negative: Tensor, ratio: float) -> Tensor:
    """Which negatives of each row cost the most, at most ``ratio`` for every positive; of equal ones, the first.

    Losses and masks, also the one returned, are ``(..., A)`` of A anchors; ``ratio`` is at least 0.

    >>> positive = torch.tensor([True, False, False, False])
    >>> hard_negatives(torch.tensor([9.0, 1.0, 3.0, 2.0]), positive, ~positive, ratio=2)
    tensor([False, False,  True,  True])
    """
    order = loss.masked_fill(~negative, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(1, loss.shape[-1] + 1, device=loss.device)
    kept = rank <= ratio * positive.sum(-1, keepdim=True)
    return torch.zeros_like(negative).scatter(-1, order, kept) & negative


def multibox_loss(
    pred: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    weight: tuple[Tensor | None, Tensor | None] = (None, None),
    avg_factor: Tensor | float | None = None,
    reduction: str = "mean",
    *,
    neg_pos_ratio: NonNegative | None = 3,
    loss_cls: Callable,
    loss_bbox: Callable,
) -> tuple[Tensor, Tensor]:
    """The class loss of the positives and of the hardest negatives of each image, and the box loss of the positives.

    Shapes, background and mean are those of :class:`MultiBoxLoss`; the choice of the negatives is a constant.

    Args:
        weight: of the class losses, ``(B, A)``, and of the box losses, ``(B, A)`` or ``(B, A, 4)``; None is 1.
        neg_pos_ratio: negatives for each positive of an image; None for all.
        loss_cls, loss_bbox: loss modules, ours or mmdet's, whose weights are ``(B, A, 4)`` and no label negative.

    Returns:
        The class loss and the box loss; for ``reduction="none"`` those of each anchor, ``(B, A)``.

    >>> from detloss_plugins.losses import CrossEntropyLoss, SmoothL1Loss
    >>> logits = [[1.0, -0.5, 0.2], [0.1, 0.0, 1.5], [0.3, 0.2, 0.0], [-1.0, -1.0, 2.0], [0.5, 0.1, 0.4]]
    >>> boxes = torch.tensor([0.3, -1.4, 0.05, 2.0]).expand(1, 5, 4)
    >>> target = torch.tensor([[0, 2, 2, 2, 2]]), torch.zeros(1, 5, 4)  # two of the four negatives have a part
    >>> parts = dict(loss_cls=CrossEntropyLoss(), loss_bbox=SmoothL1Loss())
    >>> multibox_loss((torch.tensor([logits]), boxes), target, neg_pos_ratio=2, **parts)
    (tensor(2.8331), tensor(2.4462))
    """
    (logits, boxes), (labels, true_boxes) = pred, target
    background = logits.shape[-1] - int(not getattr(loss_cls, "use_sigmoid", False))
    positive, negative = (labels >= 0) & (labels < background), labels == background
    class_weight, box_weight = (_masked(mask, w) for mask, w in zip((labels >= 0, positive), weight, strict=True))
    flat = float32(logits).flatten(0, 1), labels.flatten()
    if neg_pos_ratio is not None:
        with torch.no_grad():
            cost = _rows(loss_cls(*flat, reduction_override="none"), labels.shape) * class_weight
        class_weight = class_weight * (positive | hard_negatives(cost, positive, negative, neg_pos_ratio))
    if avg_factor is None and reduction == "mean":
        avg_factor = positive.sum(-1).clamp(min=1).sum()
    options = dict(avg_factor=avg_factor, reduction_override=reduction)
    classes = loss_cls(*flat, class_weight.flatten(), **options)
    places = loss_bbox(float32(boxes).flatten(0, 1), true_boxes.flatten(0, 1), box_weight.flatten(0, 1), **options)
    return (_rows(classes, labels.shape), _rows(places, labels.shape)) if reduction == "none" else (classes, places)


def _masked(mask, weight):
    """A weight, ``(B, A)`` or ``(B, A, 4)``, without what is masked out."""
    if weight is None:
        return mask.float()
    return weight * (mask if weight.dim() == mask.dim() else mask.unsqueeze(-1))


def _rows(loss, shape):
    """The losses of each anchor, summed over its classes or coordinates."""
    return (loss.flatten(1).sum(1) if loss.dim() > 1 else loss).reshape(shape)


def mining_ratio(neg_pos_ratio: Any, loss_cls: Callable, loss_bbox: Callable, auto: Any = 3) -> float | None:
    """The ``neg_pos_ratio`` to use with two losses: what is given, or for "auto" what ``loss_cls`` needs.

    Raises:
        ValueError: for a loss that has no place in a multibox loss, or another ratio, or one beside a ranking loss.
    """
    parts = loss_cls.losses if isinstance(loss_cls, ScheduledLoss) else [loss_cls]
    of_classes = [("loss_cls", part, ("classification", "ranking")) for part in parts]
    for slot, loss, families in (*of_classes, ("loss_bbox", loss_bbox, ("regression", "box"))):
        name = type(loss).__name__
        if isinstance(loss, Loss) and loss.family not in families:
            raise ValueError(f"{slot} of a multibox loss must be a {' or '.join(families)} loss, not {name}.")
        if getattr(loss, "custom_cls_channels", False):
            raise ValueError(f"{name} has channels of its own beside the classes; take a loss without them.")
    if neg_pos_ratio == "auto":
        needs_mining = any(not isinstance(part, Loss) or part.facts.needs_mining for part in parts)
        neg_pos_ratio = auto if needs_mining else None
    if neg_pos_ratio is not None and not (isinstance(neg_pos_ratio, (int, float)) and neg_pos_ratio >= 0):
        raise ValueError(f'neg_pos_ratio must be "auto", None or a number of at least 0, not {neg_pos_ratio!r}.')
    ranking = [type(part).__name__ for part in parts if getattr(part, "family", "") == "ranking"]
    if ranking and neg_pos_ratio is not None:
        raise ValueError(f"{ranking[0]} ranks all negatives; write neg_pos_ratio=None or leave it out.")
    return neg_pos_ratio


@MODELS.register_module()
class MultiBoxLoss(
    Loss,
    fn=multibox_loss,
    family="multibox",
    takes_pairs=True,
    paper=ARXIV + "1512.02325",
    mean_of_rows=False,
    filled=("loss_cls", "loss_bbox", "neg_pos_ratio"),
):
    """Liu et al., SSD: Single Shot MultiBox Detector, 2016.

    Call with A anchors in each of B images: ``pred`` is a pair of class logits ``(B, A, K)`` and boxes ``(B, A, 4)``,
    ``target`` a pair of labels ``(B, A)`` and boxes ``(B, A, 4)``. Either may be one tensor: the logits and boxes side
    by side, ``(B, A, K + 4)``, and the label and the box, ``(B, A, 5)``. The boxes are whatever ``loss_bbox`` compares,
    encoded offsets or corners; those of an anchor without an object have no part.

    A softmax loss has a channel for the background, the last, and K - 1 classes; a sigmoid loss has K classes. The
    background's label is the number of classes; a negative label is ignored.

    ``weight`` is one an anchor, ``(B, A)``, or one an image, ``(B,)``. "mean" is over ``avg_factor``, or the number of
    positives, where an image counts as one at least, though none of its negatives then; "none" gives ``(B, A)``.

    Args:
        loss_cls, loss_bbox: configs of a classification or ranking loss, and of a point-wise or box loss; softmax cross
            entropy and smooth L1 if they are not given. Their ``loss_weight`` balances the two.
        neg_pos_ratio: how many negatives an image has for each positive, those with the highest class loss; None for
            all. "auto" is 3, or None if ``loss_cls`` balances positives and negatives itself, as focal loss does.
        return_dict: True for a dict of ``loss_cls`` and ``loss_bbox`` in place of their sum.
        background: "last", or "first" for the authors' order (and that of ssd.pytorch): label 0 and, of a softmax loss,
            channel 0 are the background, and the classes count from 1.

    Raises:
        ValueError: if a loss has no place here, or shapes do not fit.
    """

    def __init__(
        self,
        *,
        loss_cls: Mapping | None = None,
        loss_bbox: Mapping | None = None,
        neg_pos_ratio: NonNegative | Literal["auto"] | None = "auto",
        return_dict: bool = False,
        background: Literal["first", "last"] = "last",
        **settings,
    ):
        super().__init__(**settings)
        self.loss_cls = build_loss({"type": "CrossEntropyLoss"} if loss_cls is None else loss_cls)
        self.loss_bbox = build_loss({"type": "SmoothL1Loss"} if loss_bbox is None else loss_bbox)
        for part in (self.loss_cls, self.loss_bbox):
            part.compiled = part.compiled or self.compiled
        self.return_dict, self.background = return_dict, background
        self.neg_pos_ratio = mining_ratio(neg_pos_ratio, self.loss_cls, self.loss_bbox)
        self.facts = self.facts.but(every_rank=self.loss_cls.facts.every_rank)

    def reduced(self, pred, target, weight, avg_factor, reduction, factor):
        """The sum of both losses, or with ``return_dict=True`` both."""
        reduction = check_reduction(self.reduction if reduction is None else reduction, avg_factor)
        if reduction == "none" and self.loss_cls.facts.counts_positives:
            raise ValueError('reduction="none" of MultiBoxLoss has a loss for each anchor, and a ranking loss has not.')
        self.look(pred, target)
        pred = pred if isinstance(pred, (tuple, list)) else (pred[..., :-4], pred[..., -4:])
        target = target if isinstance(target, (tuple, list)) else (target[..., 0].long(), target[..., 1:])
        self._check_shapes(*pred, *target)
        if self.background == "first":
            pred, target = self._background_last(*pred, *target)
        if weight is not None:
            weight = fit_weight(weight, float32(pred[0])[..., 0]).expand(target[0].shape)
        losses = {"loss_cls": self.loss_cls, "loss_bbox": self.loss_bbox}
        with without_autocast(pred[0].device):
            parts = self.fn(
                pred, target, (weight, weight), avg_factor, reduction, neg_pos_ratio=self.neg_pos_ratio, **losses
            )
        parts = [factor * part for part in parts]
        return dict(zip(losses, parts, strict=True)) if self.return_dict else sum(parts)

    def _background_last(self, logits, boxes, labels, true_boxes):
        softmax = not self.loss_cls.use_sigmoid
        classes = logits.shape[-1] - softmax
        of_class = (labels > 0) & (labels <= classes)  # of another there is none, which the class loss says
        labels = torch.where(of_class, labels - 1, torch.where(labels == 0, classes, labels))
        return (logits.roll(-1, -1) if softmax else logits, boxes), (labels, true_boxes)

    def _check_shapes(self, logits, boxes, labels, true_boxes):
        anchors = logits.shape[:-1]
        if len(anchors) != 2 or labels.shape != anchors or not boxes.shape == true_boxes.shape == (*anchors, 4):
            raise ValueError(
                "MultiBoxLoss takes logits (B, A, K), boxes (B, A, 4), labels (B, A) and boxes (B, A, 4), not "
                f"{', '.join(str(tuple(x.shape)) for x in (logits, boxes, labels, true_boxes))}."
            )
