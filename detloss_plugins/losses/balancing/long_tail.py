"""Losses for data sets in which some classes are rare: the weights follow what has been seen of each."""

import math
from types import MappingProxyType

import torch
import torch.nn.functional as F

from detloss_plugins.base import Upstream, rank_mean
from detloss_plugins.execution import float32, parts, transforming, waits, without_autocast
from detloss_plugins.families import ClassificationLoss
from detloss_plugins.losses.classification.common import focused_ce
from detloss_plugins.reduction import apply_weight, reduce
from detloss_plugins.registry import MODELS


def seesaw_loss(pred, target, *, p=0.8, q=2.0, eps=1e-2, counts=None):
    """Softmax cross entropy with ``log S_ij`` added to the logits of the other classes; S is a constant.

    ``S = M C``: M, ``(N_j / N_i)^p`` where class j is rarer than the label i, spares rare classes; C,
    ``(p_j / p_i)^q`` where j scores higher than i, does not spare mistakes.

    Args:
        pred: logits ``(N, C)``.
        target: labels ``(N,)``.
        counts: samples of each class so far, ``(C,)``; None for equal counts.

    >>> pred = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, -0.3]])
    >>> seesaw_loss(pred, torch.tensor([0, 2]), counts=torch.tensor([100.0, 10.0, 1.0]))
    tensor([0.0134, 2.1750])
    """
    with torch.no_grad():
        log_scores = pred.log_softmax(-1)
        label = target.unsqueeze(-1)
        log_weights = torch.zeros_like(pred)
        if counts is not None and p > 0:
            log_counts = counts.to(pred.dtype).clamp(min=1).log()
            log_weights = p * (log_counts - log_counts[label]).clamp(max=0)
        if q > 0:
            own = log_scores.gather(-1, label).clamp(min=math.log(eps))
            log_weights = log_weights + q * (log_scores - own).clamp(min=0)
    return F.cross_entropy(pred + log_weights, target, reduction="none")


@MODELS.register_module()
class SeesawLoss(ClassificationLoss):
    """Wang et al., Seesaw Loss for Long-Tailed Instance Segmentation, 2020.

    For mmdet's two-stage heads, with mmdet's interface: logits ``(N, C + 2)``, the last two for object and background,
    labels ``(N,)`` with ``C`` for background. Returns a dict of the objectness and the class loss, or with
    ``return_dict=False`` their sum; "none" gives ``(N,)``, zero in the class part of background rows. ``compile=True``
    has no effect on a CPU, where the positives are taken out of the batch first.

    Args:
        num_classes: C.
        p, q, eps: see :func:`seesaw_loss`.
        return_dict: False to return the sum.
    """

    fn = staticmethod(seesaw_loss)
    inputs = ("counts",)
    paper = "https://arxiv.org/abs/2008.10032"
    true_gradient = False
    sigmoid_only = False
    mean_of_rows = False
    example = MappingProxyType({"num_classes": 8, "return_dict": False})
    upstream = (
        Upstream("mmdet.models.losses.SeesawLoss", example, example),
        Upstream("mmdet.models.losses.SeesawLoss", {**example, "q": 1.0}, {**example, "q": 1.0}),
    )
    custom_cls_channels = custom_activation = custom_accuracy = True  # mmdet's heads ask for these

    def __init__(self, *, use_sigmoid=False, num_classes=1203, return_dict=True, **kwargs):
        if use_sigmoid:
            raise ValueError("SeesawLoss has a softmax form only; write use_sigmoid=False.")
        super().__init__(use_sigmoid=False, **kwargs)
        self.num_classes, self.return_dict = num_classes, return_dict
        self.register_buffer("cum_samples", torch.zeros(num_classes + 1))

    def compiles(self, device):
        return waits(device)  # elsewhere the positives are taken out of the batch, and there is little left to do

    def get_cls_channels(self, num_classes):
        """How many logits mmdet's head must predict for ``num_classes``."""
        if num_classes != self.num_classes:
            raise ValueError(f"num_classes={self.num_classes} of SeesawLoss differs from the head's {num_classes}.")
        return num_classes + 2

    def get_activation(self, cls_score):
        """Scores ``(N, C + 1)`` from logits ``(N, C + 2)``: class times objectness, and background last."""
        classes, objectness = cls_score[..., :-2].softmax(-1), cls_score[..., -2:].softmax(-1)
        return torch.cat([classes * objectness[..., :1], objectness[..., 1:]], -1)

    def get_accuracy(self, cls_score, labels):
        """Accuracy in percent of the objectness, and of the classes among the positives."""
        positive = labels < self.num_classes
        objectness = (cls_score[..., -2:].argmax(-1) == 0) == positive
        classes = (cls_score[..., :-2].argmax(-1) == labels) & positive
        count = positive.sum().clamp(min=1)
        return {
            "acc_objectness": 100 * objectness.float().sum() / max(labels.numel(), 1),
            "acc_classes": 100 * classes.sum() / count,
        }

    def prepare(self, pred, target):
        if pred.shape[-1] != self.num_classes + 2 or target.shape != pred.shape[:-1] or target.is_floating_point():
            raise ValueError(
                f"SeesawLoss with num_classes={self.num_classes} takes logits (N, {self.num_classes + 2}) and labels "
                f"(N,), not {tuple(pred.shape)} and {tuple(target.shape)}."
            )
        return pred, target, target >= 0

    def elements(self, pred, target, weight=None, seen=None):
        with without_autocast(pred.device):
            pred, target, valid = self.prepare(pred, target)
            return self.compute(pred, target, valid, weight), valid

    def compute(self, pred, target, valid, weight):
        """Losses of the classes and of the objectness, side by side: ``(N, 2)``; what is used is up-cast here."""
        positive = valid & (target < self.num_classes)
        label = torch.where(positive, target, 0)
        if self.learning:
            seen = torch.zeros_like(self.cum_samples)
            slot = torch.where(valid, target, self.num_classes)
            seen = seen.scatter_add(0, slot, valid.to(seen.dtype))
            self.cum_samples.add_(rank_mean(seen))
        classes, objectness = pred.split([self.num_classes, 2], -1)
        objectness = F.cross_entropy(float32(objectness), (target == self.num_classes).long(), reduction="none")
        return torch.stack([self._of_classes(classes, label, positive), objectness], -1)

    def _of_classes(self, pred, label, positive):
        """Losses of the classes, zero where a row is not positive."""
        options = {"counts": self.cum_samples[:-1], **self.settings}
        if transforming() or waits(pred.device):
            return torch.where(positive, self.fn(float32(pred), label, **options), 0.0)
        (rows,) = positive.nonzero(as_tuple=True)
        losses = self.fn(float32(pred.index_select(0, rows)), label[rows], **options)
        return losses.new_zeros(len(pred)).index_copy(0, rows, losses)

    def total(self, pred, target, weight, avg_factor, reduction):
        """As of every loss, but the classes' mean is over the positives, and the two parts come in a dict."""
        rows = super().total(pred, target, weight, None, "none")
        positives = ((target >= 0) & (target < self.num_classes)).sum().clamp(min=1)
        of_classes = positives if reduction == "mean" and avg_factor is None else avg_factor
        loss = {
            "loss_cls_objectness": reduce(rows[..., 1], None, avg_factor, reduction),
            "loss_cls_classes": reduce(rows[..., 0], None, of_classes, reduction),
        }
        return loss if self.return_dict else sum(loss.values())

    @classmethod
    def sample(cls, n=64, seed=0, dtype=torch.float32, classes=8):
        """Logits ``(n, classes + 2)`` and labels, a third of them background."""
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(n, classes + 2, generator=generator, dtype=torch.float64)
        label = torch.randint(0, classes + classes // 2, (n,), generator=generator).clamp(max=classes)
        return logits.to(dtype), label


def eqlv2_loss(pred, target, *, gamma=12.0, mu=0.8, alpha=4.0, ratio=None):
    """BCE with weights by class: negatives ``r = sigmoid(gamma (ratio - mu))``, positives ``1 + alpha (1 - r)``.

    Args:
        pred: logits ``(..., C)``; columns beyond those of ``ratio``, such as mmdet's background, have weight 1.
        target: dense, ``(..., C)``.
        ratio: accumulated positive over negative gradient of each class; None for weights of 1.

    >>> pred, target = torch.tensor([[0.8, -0.4]]), torch.tensor([[1.0, 0.0]])
    >>> eqlv2_loss(pred, target, ratio=torch.tensor([0.5, 0.8]))  # weights 1 + 4 (1 - 0.0266) and 1/2
    tensor([[1.8160, 0.2565]])
    """
    weight = None if ratio is None else eqlv2_weight(pred, target, ratio, gamma, mu, alpha)
    return focused_ce(pred, target, "soft", 0, weight)


def eqlv2_weight(pred, target, ratio, gamma, mu, alpha):
    """The weights of :func:`eqlv2_loss`, the shape of ``pred``."""
    negative = F.pad(torch.sigmoid(gamma * (ratio.to(pred.dtype) - mu)), (0, pred.shape[-1] - len(ratio)), value=1.0)
    positive = 1 + alpha * (1 - negative)
    return torch.addcmul(negative, target, positive - negative)


@MODELS.register_module()
class EQLV2Loss(ClassificationLoss):
    """Tan et al., Equalization Loss v2, 2020.

    With mmdet's interface: logits ``(N, C + 1)`` whose last column is the background, which has weight 1 and is not
    accumulated. Logits ``(..., C)`` without that column are taken too. Losses are summed over the classes; unlike in
    mmdet, ``weight``, ``avg_factor`` and ``reduction`` are honoured.

    Args:
        num_classes: C.
        gamma, mu, alpha: see :func:`eqlv2_loss`.
    """

    fn = staticmethod(eqlv2_loss)
    inputs = ("ratio",)
    by_rows = True
    paper = "https://arxiv.org/abs/2012.08548"
    yolo_gain = 4.0
    sums_classes = True
    example = MappingProxyType({"num_classes": 9})  # the sample's tenth column is the background
    upstream = (Upstream("mmdet.models.losses.EQLV2Loss", {"num_classes": 9}, {"num_classes": 9}),)

    def __init__(self, *, num_classes=1203, **kwargs):
        super().__init__(**kwargs)
        self.num_classes = num_classes
        # The ratio starts so high that every weight is 1.
        self.register_buffer("pos_grad", torch.zeros(num_classes))
        self.register_buffer("neg_grad", torch.zeros(num_classes))
        self.register_buffer("pos_neg", torch.full((num_classes,), 100.0))

    def survey(self, pred, target, weight):
        if pred.shape[-1] not in (self.num_classes, self.num_classes + 1):
            raise ValueError(
                f"EQLV2Loss with num_classes={self.num_classes} takes {self.num_classes + 1} logits (the last for the "
                f"background) or {self.num_classes}, not {pred.shape[-1]}."
            )
        ratio = self.pos_neg.clone()
        if self.learning:
            self._accumulate(pred, target, ratio)
        return {"ratio": ratio}

    @torch.no_grad()
    def _accumulate(self, pred, target, ratio):
        of_positives = of_negatives = 0
        for _, x, t, _ in parts(self, pred, target, None):
            x, t, valid = self.prepare(float32(x), t)
            size = x.sigmoid().sub_(t).abs_().mul_(eqlv2_weight(x, t, ratio, **self.settings))
            size = apply_weight(size, valid)[..., : self.num_classes].flatten(0, -2)
            positive = size * t[..., : self.num_classes].flatten(0, -2)
            of_positives = of_positives + positive.nansum(0)
            of_negatives = of_negatives + size.sub_(positive).nansum(0)
        for buffer, found in ((self.pos_grad, of_positives), (self.neg_grad, of_negatives)):
            buffer.add_(rank_mean(found.to(buffer.dtype)))
        seen = self.pos_grad + self.neg_grad > 0
        self.pos_neg.copy_(torch.where(seen, self.pos_grad / (self.neg_grad + 1e-10), self.pos_neg))

    def get_activation(self, cls_score):
        """Scores from logits ``(N, C + 1)``: class times not-background; the background last."""
        scores = cls_score.sigmoid()
        return torch.cat([scores[..., :-1] * (1 - scores[..., -1:]), scores[..., -1:]], -1)


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
