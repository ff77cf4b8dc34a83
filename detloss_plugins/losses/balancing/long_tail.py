"""Losses for data sets in which some classes are rare: the weights follow what has been seen of each."""

import math
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from detloss_plugins.facts import ARXIV, MMDET, Count, NonNegative, Number, alike, between
from detloss_plugins.families import ClassificationLoss, of_one_type
from detloss_plugins.loss import rank_mean
from detloss_plugins.losses.classification.common import bce
from detloss_plugins.precision import float32, is_asynchronous, is_compiling
from detloss_plugins.reduction import check_reduction, counts, divisor_of, scaled
from detloss_plugins.registry import MODELS

__all__ = ["EQLV2Loss", "SeesawLoss", "eqlv2_loss", "eqlv2_weight", "seesaw_loss"]

_EXAMPLE = {"num_classes": 8, "return_dict": False}  # of SeesawLoss


def seesaw_loss(
    pred: Tensor,
    target: Tensor,
    *,
    p: NonNegative = 0.8,
    q: NonNegative = 2.0,
    eps: Annotated[float, between(0, 1, "(0, 1]")] = 1e-2,
    counts: Tensor | None = None,
) -> Tensor:
    """Softmax cross entropy with ``log S_ij`` added to the logits of the other classes; S is a constant.

    ``S = M C``: M, ``(N_j / N_i)^p`` where class j is rarer than the label i, spares rare classes; C,
    ``(p_j / p_i)^q`` where j scores higher than i, does not spare mistakes. Logits are ``(N, C)``, labels ``(N,)``;
    ``counts``, ``(C,)``, are the samples of each class so far, None for equal ones.

    >>> pred = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, -0.3]])
    >>> seesaw_loss(pred, torch.tensor([0, 2]), counts=torch.tensor([100.0, 10.0, 1.0]))
    tensor([0.0134, 2.1750])
    """
    pred, label = float32(pred), target.unsqueeze(-1)
    log_weights = torch.zeros_like(pred)
    if counts is not None and p > 0:
        log_counts = counts.to(pred.dtype).clamp(min=1).log()
        log_weights = p * (log_counts - log_counts[label]).clamp(max=0)
    if q > 0:
        log_scores = pred.detach().log_softmax(-1)
        own = log_scores.gather(-1, label).clamp(min=math.log(eps))
        log_weights = log_weights + q * (log_scores - own).clamp(min=0)
    return F.cross_entropy(pred + log_weights, target, reduction="none")


@MODELS.register_module()
class SeesawLoss(
    ClassificationLoss,
    fn=seesaw_loss,
    paper=ARXIV + "2008.10032",
    row_wise=True,
    true_gradient=False,
    mean_of_rows=False,
    one_per_row=True,
    takes_pairs=False,
    filled=("counts",),
    example=_EXAMPLE,
    upstream=alike(MMDET + "SeesawLoss", _EXAMPLE, {**_EXAMPLE, "q": 1.0}),
):
    """Wang et al., Seesaw Loss for Long-Tailed Instance Segmentation, 2020.

    For mmdet's two-stage heads, with mmdet's interface: logits ``(N, C + 2)``, the last two for object and background,
    labels ``(N,)`` with ``C``, which is ``num_classes``, for background. Returns a dict of the objectness and the class
    loss, or with ``return_dict=False`` their sum; "none" gives ``(N,)``, zero in the class part of background rows.
    ``compile=True`` has no effect, as its two parts are reduced each for itself.
    """

    sigmoid_only = False
    custom_cls_channels = custom_activation = custom_accuracy = True  # mmdet's heads ask for these

    def __init__(self, *, use_sigmoid: bool = False, num_classes: Count = 1203, return_dict: bool = True, **settings):
        if use_sigmoid:
            raise ValueError("SeesawLoss has a softmax form only; write use_sigmoid=False.")
        super().__init__(use_sigmoid=False, **settings)
        self.num_classes, self.return_dict = num_classes, return_dict
        self.register_buffer("cum_samples", torch.zeros(num_classes + 1))

    def last_label(self, pred):
        return self.num_classes

    def compiles(self, device):
        return False  # it is reduced from the losses of each row

    def get_cls_channels(self, num_classes: int) -> int:
        """How many logits mmdet's head must predict for ``num_classes``."""
        if num_classes != self.num_classes:
            raise ValueError(f"num_classes={self.num_classes} of SeesawLoss differs from the head's {num_classes}.")
        return num_classes + 2

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Scores ``(N, C + 1)`` from logits ``(N, C + 2)``: class times objectness, and background last."""
        classes, objectness = cls_score[..., :-2].softmax(-1), cls_score[..., -2:].softmax(-1)
        return torch.cat([classes * objectness[..., :1], objectness[..., 1:]], -1)

    def get_accuracy(self, cls_score: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Accuracy in percent of the objectness, and of the classes among the positives."""
        positive = labels < self.num_classes
        objectness = (cls_score[..., -2:].argmax(-1) == 0) == positive
        classes = ((cls_score[..., :-2].argmax(-1) == labels) & positive).sum() / positive.sum().clamp(min=1)
        objectness = objectness.float().sum() / max(labels.numel(), 1)
        return {"acc_objectness": 100 * objectness, "acc_classes": 100 * classes}

    def prepare(self, pred, target):
        if pred.shape[-1] != self.num_classes + 2 or target.shape != pred.shape[:-1] or target.is_floating_point():
            raise ValueError(
                f"SeesawLoss with num_classes={self.num_classes} takes logits (N, {self.num_classes + 2}) and labels "
                f"(N,), not {tuple(pred.shape)} and {tuple(target.shape)}."
            )
        return pred, target.long(), target >= 0

    def observe(self, pred, target, weight):
        _, label, valid = self.prepare(pred, target)
        if self.learning:
            seen = torch.zeros_like(self.cum_samples)
            slot = torch.where(valid, label, self.num_classes).flatten()
            seen = seen.scatter_add(0, slot, valid.flatten().to(seen.dtype))
            self.cum_samples.add_(rank_mean(seen, self.facts.every_rank))
        return {"counts": self.cum_samples[:-1].clone()}

    def unweighted(self, pred, target, seen):
        """Losses of the classes, zero where a row is not positive, and of the objectness, side by side: ``(N, 2)``."""
        pred, target, valid = self.prepare(pred, target)  # what is used is up-cast below
        classes, objectness = pred.split([self.num_classes, 2], -1)
        # Cross entropy of two logits, by how much the wrong one is above; ln(1 + e^x) is x in float64 above 50.
        gap = torch.sub(*float32(objectness).unbind(-1))
        objectness = F.softplus(torch.where(target == self.num_classes, gap, -gap), threshold=50)
        positive = valid & (target < self.num_classes)
        if is_compiling() or is_asynchronous(pred.device):
            label = torch.where(positive, target, 0)
            classes = torch.where(positive, self.fn(classes, label, **self.settings, **seen), 0.0)
        else:
            (rows,) = positive.nonzero(as_tuple=True)
            losses = self.fn(classes.index_select(0, rows), target[rows], **self.settings, **seen)
            classes = losses.new_zeros(len(pred)).index_copy(0, rows, losses)
        return torch.stack([classes, objectness], -1), valid

    def reduced(self, pred, target, weight, avg_factor, reduction, factor):
        """As of every loss, but the classes' mean is over the positives, and the two parts come in a dict."""
        reduction = check_reduction(self.reduction if reduction is None else reduction, avg_factor)
        rows = super().reduced(pred, target, weight, None, "none", factor)
        positives = ((target >= 0) & (target < self.num_classes)).sum().clamp(min=1)
        classes, objectness = (part if reduction == "none" else part.sum() for part in rows.unbind(-1))
        loss = {
            "loss_cls_objectness": scaled(objectness, divisor_of(max(target.numel(), 1), avg_factor, reduction)),
            "loss_cls_classes": scaled(classes, divisor_of(positives, avg_factor, reduction)),
        }
        return loss if self.return_dict else sum(loss.values())


def eqlv2_loss(
    pred: Tensor,
    target: Tensor,
    *,
    gamma: NonNegative = 12.0,
    mu: Number = 0.8,
    alpha: NonNegative = 4.0,
    ratio: Tensor | None = None,
) -> Tensor:
    """BCE with weights by class: negatives ``r = sigmoid(gamma (ratio - mu))``, positives ``1 + alpha (1 - r)``.

    Logits and dense targets are ``(..., C)``. ``ratio`` is the accumulated positive over negative gradient of each
    class, None for weights of 1; columns beyond its own, such as mmdet's background, have weight 1.

    >>> pred, target = torch.tensor([[0.8, -0.4]]), torch.tensor([[1.0, 0.0]])
    >>> eqlv2_loss(pred, target, ratio=torch.tensor([0.5, 0.8]))  # weights 1 + 4 (1 - 0.0266) and 1/2
    tensor([[1.8160, 0.2565]])
    """
    pred, target = of_one_type(pred, target)
    loss = bce(pred, target)
    return loss if ratio is None else eqlv2_weight(target, ratio, gamma, mu, alpha) * loss


def eqlv2_weight(target: Tensor, ratio: Tensor, gamma: float, mu: float, alpha: float) -> Tensor:
    """The weights of :func:`eqlv2_loss`, in the shape of the dense target."""
    of_classes = torch.sigmoid(gamma * (ratio.to(target.dtype) - mu))
    negative = F.pad(of_classes, (0, target.shape[-1] - len(ratio)), value=1.0)
    return torch.lerp(negative, 1 + alpha * (1 - negative), target)


class GradientRatio(ClassificationLoss, filled=("ratio",)):
    """A state: the gradient that the positives and the negatives of each class have had so far, and their ratio.

    Args:
        num_classes: how many classes the state has room for.
    """

    start: ClassVar[float]  # the ratio of a class that has had none
    largest: ClassVar[float | None] = None  # what the ratio is cut at

    def __init__(self, *, num_classes: Count = 1203, **settings):
        super().__init__(**settings)
        self.num_classes = num_classes
        self.register_buffer("pos_grad", torch.zeros(num_classes))
        self.register_buffer("neg_grad", torch.zeros(num_classes))
        self.register_buffer("pos_neg", torch.full((num_classes,), self.start))

    @property
    def observes(self):
        return self.learning

    def summarise(self, sums):
        ratio = self.pos_neg.clone()
        if sums:
            for buffer, of_batch in ((self.pos_grad, sums["positive"]), (self.neg_grad, sums["negative"])):
                buffer[: len(of_batch)].add_(rank_mean(of_batch.to(buffer.dtype), self.facts.every_rank))
            found = self.pos_grad / (self.neg_grad + 1e-10)
            found = found if self.largest is None else found.clamp(max=self.largest)
            self.pos_neg.copy_(torch.where(self.pos_grad + self.neg_grad > 0, found, self.pos_neg))
        return {"ratio": ratio}


@MODELS.register_module()
class EQLV2Loss(
    GradientRatio,
    fn=eqlv2_loss,
    paper=ARXIV + "2012.08548",
    row_wise=True,
    sums_classes=True,
    example={"num_classes": 9},  # the sample's tenth column is the background
    upstream=alike(MMDET + "EQLV2Loss", {"num_classes": 9}),
):
    """Tan et al., Equalization Loss v2, 2020.

    With mmdet's interface: logits ``(N, C + 1)`` whose last column is the background, which has weight 1 and is not
    accumulated. Logits ``(..., C)`` without that column are taken too. Losses are summed over the classes; unlike in
    mmdet, ``weight``, ``avg_factor`` and ``reduction`` are honoured.
    """

    start = 100.0  # so high that every weight is 1

    def prepare(self, pred, target):
        n, given = self.num_classes, pred.shape[-1]
        if given not in (n, n + 1):
            logits = f"{n + 1} logits (the last for the background) or {n}"
            raise ValueError(f"EQLV2Loss with num_classes={n} takes {logits}, not {given}.")
        return super().prepare(pred, target)

    def statistics(self, pred, target, valid, weight):
        size = (pred.sigmoid() - target).abs() * eqlv2_weight(target, self.pos_neg, **self.settings)
        size = (size * counts(size, valid, weight))[..., : self.num_classes].flatten(0, -2)
        positive = size * target[..., : self.num_classes].flatten(0, -2)
        return {"positive": positive.nansum(0), "negative": (size - positive).nansum(0)}

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Scores from logits ``(N, C + 1)``: class times not-background; the background last."""
        scores = cls_score.sigmoid()
        return torch.cat([scores[..., :-1] * (1 - scores[..., -1:]), scores[..., -1:]], -1)
