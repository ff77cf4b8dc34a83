"""Losses that balance samples or classes by what they have seen: their weights, and their state, carry no gradient.

State is in buffers, so it is in the checkpoint. It changes in training only, counts neither ignored nor NaN samples,
and is averaged over the ranks of a distributed run.
"""

import math
from types import MappingProxyType

import torch
import torch.nn.functional as F

from detloss_plugins.base import Rule, Upstream, rank_mean
from detloss_plugins.execution import float32, parts, transforming, waits
from detloss_plugins.families import ClassificationLoss, RegressionLoss
from detloss_plugins.losses.classification.common import bce
from detloss_plugins.reduction import apply_weight, reduce
from detloss_plugins.registry import MODELS, build_loss


def bin_counts(norm, mask, bins):
    """How many samples have their gradient norm in each of ``bins`` unit regions of [0, 1], in float64.

    ``mask`` is 1 for the samples that count, in the shape of ``norm``, or None.

    >>> bin_counts(torch.tensor([0.1, 0.12, 1.0, float("nan")]), None, 2)
    tensor([2., 1.], dtype=torch.float64)
    """
    counts, counted = torch.zeros(bins, dtype=torch.float64, device=norm.device), norm.isfinite()
    counted = counted if mask is None else mask * counted
    return counts.scatter_add(0, _bin_of(norm, bins).flatten(), counted.flatten().double())


def _bin_of(norm, bins):
    return (norm * bins).nan_to_num(0.0).clamp(0, bins - 1).long()


def harmony(counts, total, average=None):
    """Gradient harmonising weight of each unit region: inverse to the number of samples in it.

    Args:
        counts: see :func:`bin_counts`, ``(bins,)``.
        total: what the weights of all samples add up to.
        average: counts to use in place of those of this call where they are not zero, ``(bins,)``.

    >>> harmony(torch.tensor([0.0, 2.0, 0.0, 1.0]), 3)[[1, 3]]  # 3 / (2 bins), shared by 2 and by 1
    tensor([0.7500, 1.5000])
    """
    occupied = (counts > 0).sum().clamp(min=1)
    density = counts if average is None else torch.where(average > 0, average, counts)
    # What does not count may be alone in its region, and has no weight.
    return torch.where(density > 0, total / (density.clamp(min=torch.finfo(torch.float32).tiny) * occupied), 0.0)


def ghmc_norm(pred, target):
    """The gradient norm of BCE, ``|p - y|``, a constant."""
    return (pred.detach().sigmoid() - target).abs()


def ghmc_loss(pred, target, *, bins=10, weight=None):
    """BCE with gradient harmonising weights, from the bins of this call unless ``weight`` is given.

    >>> ghmc_loss(torch.tensor([0.8, -0.4, 1.5, 0.7]), torch.tensor([1.0, 0.0, 0.0, 1.0])).mean()
    tensor(0.8672)
    """
    if weight is None:
        weight = _weight_in(ghmc_norm(pred, target), bins)
    return weight * bce(pred, target)


def _weight_in(norm, bins):
    """The weights of a call without a past."""
    return _weights(harmony(bin_counts(norm, None, bins), norm.numel()), norm)


def _weights(table, norm):
    """Those that a table has for some norms."""
    return table.to(norm.dtype)[_bin_of(norm, len(table))]


def _at_least_one(count):
    return count.clamp(min=1) if torch.is_tensor(count) else max(count, 1)


class _Harmonised:
    """State and normaliser that GHM-C and GHM-R share. A sample's weight is a mask: only its sign is used."""

    self_normalized = True

    def _init_state(self, momentum):
        self.momentum = momentum
        self.check("momentum", Rule("in [0, 1)", lambda value: 0 <= value < 1))
        # None keeps a loss without a moving average free of state, as mmdet's.
        self.register_buffer("acc_sum", torch.zeros(self.bins, dtype=torch.float64) if momentum else None)

    def survey(self, pred, target, weight):
        counts = total = 0
        for _, x, t, w in parts(self, pred.detach(), target, weight):
            x, t, valid = self.prepare(float32(x), t)
            norm = self.norm(x, t)
            counts = counts + bin_counts(norm, self._mask(norm, valid, w), self.bins)
            total = total + self._total(norm, valid, w)
        if self.acc_sum is not None and self.learning:
            seen = rank_mean(counts) if self.every_rank else counts
            moved = self.momentum * self.acc_sum + (1 - self.momentum) * seen
            self.acc_sum.copy_(torch.where(seen > 0, moved, self.acc_sum))
        total = _at_least_one(total)
        return {"table": harmony(counts, total, self.acc_sum), "total": total}

    def compute(self, pred, target, valid, weight, *, table, total):
        norm = self.norm(pred, target)
        weights, mask = _weights(table, norm), self._mask(norm, valid, weight)
        return self.fn(pred, target, weight=weights if mask is None else weights * mask, **self.settings)

    @staticmethod
    def _mask(norm, valid, weight):
        """1 for the samples that count; None for all."""
        if valid is None and weight is None:
            return None
        ones = torch.ones_like(norm)
        return apply_weight((apply_weight(ones, weight) > 0).to(norm.dtype), valid)

    def _total(self, norm, valid, weight):
        """How many count."""
        mask = self._mask(norm, valid, weight)
        return norm.numel() if mask is None else mask.sum()

    def weigh(self, loss, weight, valid):
        return loss  # the mask is in the harmonising weights already

    def normalizer(self, avg_factor, loss, valid, weight, reduction, seen=None):
        if reduction != "mean":
            return avg_factor
        return seen["total"] if seen else _at_least_one(self._total(loss, valid, weight))


@MODELS.register_module()
class GHMC(_Harmonised, ClassificationLoss):
    """Li et al., Gradient Harmonized Single-stage Detector, 2018 (GHM-C).

    As in mmdet, "mean" divides by the number of samples that count whatever ``avg_factor`` says, and a sample's weight
    is a mask. The moving average starts at zero without a correction: the first steps are inflated by
    ``1 / (1 - momentum)``.

    Args:
        bins: number of unit regions of the gradient norm.
        momentum: of the moving average of the counts, in [0, 1); 0 keeps no state.
    """

    fn = staticmethod(ghmc_loss)
    norm = staticmethod(ghmc_norm)
    inputs = ("weight",)
    by_rows = True
    paper = "https://arxiv.org/abs/1811.05181"
    needs_mining = False
    upstream = (Upstream("mmdet.models.losses.GHMC"), Upstream("mmdet.models.losses.GHMC", {"bins": 30}, {"bins": 30}))

    def __init__(self, *, momentum=0.0, **kwargs):
        super().__init__(**kwargs)
        self._init_state(momentum)


def ghmr_loss(pred, target, *, mu=0.02, bins=10, weight=None):
    """``sqrt(d^2 + mu^2) - mu`` with gradient harmonising weights, from this call's bins unless ``weight`` is given.

    >>> ghmr_loss(torch.tensor([0.01, -0.5, 0.005, 1.0]), torch.zeros(4)).mean()
    tensor(0.2444)
    """
    length = ((pred - target).square() + mu**2).sqrt()
    if weight is None:
        weight = _weight_in(ghmr_norm(pred, target, mu), bins)
    return weight * (length - mu)


def ghmr_norm(pred, target, mu):
    """The gradient norm of :func:`ghmr_loss`'s root, a constant."""
    distance = (pred - target).detach()
    return (distance / (distance.square() + mu**2).sqrt()).abs()


@MODELS.register_module()
class GHMR(_Harmonised, RegressionLoss):
    """Li et al., Gradient Harmonized Single-stage Detector, 2018 (GHM-R).

    As in mmdet, "mean" divides by the sum of the weights whatever ``avg_factor`` says; otherwise a weight is a mask.

    Args:
        mu: width of the smooth part, in the unit of the input.
        bins: number of unit regions of the gradient norm.
        momentum: of the moving average of the counts, in [0, 1); 0 keeps no state.
    """

    fn = staticmethod(ghmr_loss)
    inputs = ("weight",)
    by_rows = True
    keeps_little = False
    paper = "https://arxiv.org/abs/1811.05181"
    upstream = (Upstream("mmdet.models.losses.GHMR"),)

    def __init__(self, *, momentum=0.0, **kwargs):
        super().__init__(**kwargs)
        self._init_state(momentum)

    def norm(self, pred, target):
        return ghmr_norm(pred, target, self.mu)

    def _total(self, norm, valid, weight):
        return norm.numel() if weight is None else apply_weight(torch.ones_like(norm), weight).sum()


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
    ``return_dict=False`` their sum; "none" gives ``(N,)``, zero in the class part of background rows.

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

    def compute(self, pred, target, valid, weight):
        """Losses of the classes and of the objectness, side by side: ``(N, 2)``."""
        positive = valid & (target < self.num_classes)
        label = torch.where(positive, target, 0)
        if self.learning:
            seen = torch.zeros_like(self.cum_samples)
            slot = torch.where(valid, target, self.num_classes)
            seen = seen.scatter_add(0, slot, valid.to(seen.dtype))
            self.cum_samples.add_(rank_mean(seen))
        classes, objectness = pred.split([self.num_classes, 2], -1)
        objectness = F.cross_entropy(objectness, (target == self.num_classes).long(), reduction="none")
        return torch.stack([self._of_classes(classes, label, positive), objectness], -1)

    def _of_classes(self, pred, label, positive):
        """Losses of the classes, zero where a row is not positive."""
        options = {"counts": self.cum_samples[:-1], **self.settings}
        if transforming() or waits(pred.device):
            return torch.where(positive, self.fn(pred, label, **options), 0.0)
        (rows,) = positive.nonzero(as_tuple=True)
        losses = self.fn(pred.index_select(0, rows), label[rows], **options)
        return pred.new_zeros(len(pred)).index_copy(0, rows, losses)

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
    weight = 1.0 if ratio is None else eqlv2_weight(pred, target, ratio, gamma, mu, alpha)
    return weight * bce(pred, target)


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
            size = (x.sigmoid() - t).abs().mul_(eqlv2_weight(x, t, ratio, **self.settings))
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


def slide_weight(iou, mean_iou, authors_code=False):
    """1 for an IoU up to ``mean - 0.1``, ``e^(1 - mean)`` up to the mean, ``e^(1 - IoU)`` above it.

    ``authors_code=True`` has ``e^mean`` in the middle, as the released code and not the paper.

    >>> slide_weight(torch.tensor([0.1, 0.55, 0.9]), torch.tensor(0.6))
    tensor([1.0000, 1.4918, 1.1052])
    """
    middle = mean_iou.exp() if authors_code else (1 - mean_iou).exp()
    weight = torch.where(iou < mean_iou, middle, (1 - iou).exp())
    return torch.where(iou <= mean_iou - 0.1, 1.0, weight)


def slide_loss(pred, target, *, authors_code=False, mean_iou=None, base=None):
    """:func:`slide_weight` of the target times a base loss (a module; None for BCE), per element.

    The mean is that of the call's positives unless it is given.

    >>> slide_loss(torch.tensor([[0.8], [-0.4], [1.5]]), torch.tensor([[0.1], [0.55], [0.9]])).squeeze(-1)
    tensor([1.0911, 1.1496, 0.3884])
    """
    mean_iou = mean_of_positives(*positives(target)) if mean_iou is None else mean_iou
    if base is None:
        elements = bce(pred, target)
    else:
        elements = base.loss_weight * base.elements(pred, target)[0]
    return slide_weight(target, mean_iou, authors_code) * elements


def positives(target):
    """The sum of the IoU of the rows that have one, and their number. NaN rows do not count."""
    iou = target.amax(-1) if target.shape[-1] else target.sum(-1)
    positive = iou > 0
    return torch.where(positive, iou, 0.0).sum(), positive.sum()


def mean_of_positives(total, count, otherwise=0.5):
    """Their mean IoU, at least 0.2; ``otherwise`` if there are none."""
    return torch.where(count > 0, (total / count.clamp(min=1)).clamp(min=0.2), otherwise)


@MODELS.register_module()
class SlideLoss(ClassificationLoss):
    """Yu et al., YOLO-FaceV2, 2022.

    Hard samples, whose IoU is about the mean, weigh more. The target is the IoU on the label's channel: dense, or
    mmdet's ``(label, quality)``. The mean is that of the batch in training, and the last one seen in validation.

    Args:
        base: config of a classification loss whose terms are weighted.
        authors_code: see :func:`slide_weight`.
    """

    fn = staticmethod(slide_loss)
    inputs = ("mean_iou", "base")
    paper = "https://arxiv.org/abs/2208.02019"

    def __init__(self, *, base=None, **kwargs):
        super().__init__(**kwargs)
        base = {"type": "BinaryCrossEntropyLoss"} if base is None else base
        self.base = build_loss(base)
        if self.base.family != "classification" or not self.base.use_sigmoid:
            raise ValueError(f"base of SlideLoss must be a sigmoid classification loss, not {base['type']}.")
        self.sums_classes, self.needs_mining = self.base.sums_classes, self.base.needs_mining
        self.by_rows = self.base.by_rows and not self.base.surveys
        self.register_buffer("mean_iou", torch.tensor(0.5))

    def survey(self, pred, target, weight):
        if self.learning:
            total = count = 0
            for _, x, t, _ in parts(self, pred.detach(), target, None):
                of_part = positives(self.prepare(float32(x), t)[1])
                total, count = total + of_part[0], count + of_part[1]
            self.mean_iou.copy_(rank_mean(mean_of_positives(total, count, self.mean_iou)))
        return {"mean_iou": self.mean_iou.to(float32(pred).dtype)}

    def compute(self, pred, target, valid, weight, *, mean_iou):
        return self.fn(pred, target, mean_iou=mean_iou, base=self.base, **self.settings)


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
