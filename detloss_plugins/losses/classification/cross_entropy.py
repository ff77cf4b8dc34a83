"""Cross entropies and the divergence."""

import torch
import torch.nn.functional as F

from detloss_plugins.base import Loss, Upstream, above, rules
from detloss_plugins.execution import differentiated_once, float32, parts
from detloss_plugins.families import ClassificationLoss
from detloss_plugins.losses.classification.common import (
    SoftmaxOrSigmoid,
    balance,
    bce,
    class_vector,
    index_target,
    softmax_ce,
)
from detloss_plugins.reduction import apply_weight
from detloss_plugins.registry import MODELS


def cross_entropy_loss(
    pred, target, *, use_sigmoid=False, class_weight=None, ignore_index=-100, label_smoothing=0.0, reduction="none"
):
    """Softmax cross entropy with indices ``(...)`` or distributions ``(..., C)``, or (sigmoid) binary cross entropy.

    >>> cross_entropy_loss(torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([0]))  # ln(1 + e^-3 + e^-1.5)
    tensor([0.2413])
    """
    weight = class_vector(class_weight, pred)
    if use_sigmoid:
        smooth = target * (1 - label_smoothing) + label_smoothing / 2 if label_smoothing else target
        return bce(pred, smooth, pos_weight=weight, reduction=reduction)
    shape = pred.shape[:-1]
    if pred.dim() != 2:
        pred = pred.reshape(-1, pred.shape[-1])
        target = target.reshape(-1) if index_target(target) else target.reshape(pred.shape)
    ignore = {}
    if index_target(target):  # torch's function leaves out what has the one label that it ignores, at no cost
        ignore["ignore_index"] = max(ignore_index, -1)
        target = target.clamp(min=-1) if ignore_index < 0 else torch.where(target < 0, ignore_index, target)
    if differentiated_once() and index_target(target) and weight is None and not label_smoothing:
        loss = softmax_ce(pred, target, **ignore)
        loss = loss if reduction == "none" else loss.sum()
    else:
        loss = F.cross_entropy(
            pred,
            target,
            weight=weight,
            reduction="sum" if reduction == "mean" else reduction,  # their mean is over the weights
            label_smoothing=label_smoothing,
            **ignore,
        )
    if reduction == "none":
        return loss.reshape(shape)
    return loss / len(pred) if reduction == "mean" else loss


@MODELS.register_module()
class CrossEntropyLoss(SoftmaxOrSigmoid):
    """Softmax cross entropy, or binary cross entropy with `use_sigmoid=True`.

    The options and the mean are those of mmdet's class of this name.

    Args:
        class_weight: one factor a class. As in mmdet, "mean" still divides by the number of elements (torch divides by
            the sum of the weights), and in the sigmoid form it scales the positive term only (torch's ``pos_weight``).
        ignore_index: a label that takes no part; None means -100. Negative labels never do.
        avg_non_ignore: let "mean" divide by the number of elements that take part, when no ``avg_factor`` is given.
        label_smoothing: epsilon; the target becomes ``(1 - epsilon) target + epsilon / C`` (sigmoid: ``/ 2``).
    """

    fn = staticmethod(cross_entropy_loss)
    apart_without = ("class_weight", "label_smoothing")
    inputs = ("reduction",)
    upstream = (
        Upstream("torch.nn.functional.cross_entropy"),
        Upstream("torch.nn.functional.cross_entropy", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        Upstream("mmdet.models.losses.CrossEntropyLoss"),
        Upstream(
            "mmdet.models.losses.CrossEntropyLoss",
            {"class_weight": [1.0, 2.0, 0.5, 1.5, 1.0] * 2},
            {"class_weight": [1.0, 2.0, 0.5, 1.5, 1.0] * 2},
        ),
        Upstream("mmdet.models.losses.CrossEntropyLoss", {"use_sigmoid": True}, {"use_sigmoid": True}),
    )

    def __init__(self, *, use_sigmoid=False, avg_non_ignore=False, ignore_index=-100, **kwargs):
        super().__init__(use_sigmoid=use_sigmoid, **kwargs)
        self.avg_non_ignore = avg_non_ignore
        self.by_rows = not avg_non_ignore  # such a mean counts all rows
        self.ignore_index = -100 if ignore_index is None else ignore_index

    def labelled(self, pred, target):
        given = super().labelled(pred, target)
        return given and (torch.where(given[0] == self.ignore_index, -1, given[0]), given[1])

    def prepare(self, pred, target):
        if torch.is_tensor(target):
            if not self.use_sigmoid and target.shape == pred.shape[:-1] and index_target(target):
                counted = (target >= 0) & (target != self.ignore_index) if self.avg_non_ignore else None
                return pred, target.long(), counted
            if self.use_sigmoid and target.shape == pred.shape:
                valid = (target >= 0) & (target != self.ignore_index)
                return pred, torch.where(valid, target, 0).to(pred.dtype), valid
        return super().prepare(pred, target)

    def normalizer(self, avg_factor, loss, valid, weight, reduction, seen=None):
        if not self.avg_non_ignore or avg_factor is not None or valid is None or reduction != "mean":
            return avg_factor
        per_valid = loss.numel() // max(valid.numel(), 1)
        return valid.sum() * per_valid


def binary_cross_entropy_loss(pred, target, *, pos_weight=None, activated=False, reduction="none"):
    """``-[pos_weight y ln p + (1 - y) ln(1 - p)]`` with ``p = sigmoid(pred)``, or ``p = pred`` if ``activated``.

    >>> binary_cross_entropy_loss(torch.tensor([0.8, -0.4, 1.5]), torch.tensor([1.0, 0.0, 0.3]))
    tensor([0.3711, 0.5130, 1.2514])
    """
    return bce(pred, target, activated, None if activated else _pos_weight(pos_weight, pred), reduction)


def _pos_weight(value, pred):
    vector = class_vector(value, pred)
    return pred.new_tensor(vector) if isinstance(vector, (int, float)) else vector


@MODELS.register_module()
class BinaryCrossEntropyLoss(ClassificationLoss):
    """Binary cross entropy of every class on its own, with hard, soft or multi-hot targets.

    Args:
        pos_weight: factor on the positive term, a number or one a class; logits only.
        activated: ``pred`` is a probability; its logarithms are cut at -100 as torch does.
    """

    fn = staticmethod(binary_cross_entropy_loss)
    apart_without = ("pos_weight", "activated")
    inputs = ("reduction",)
    upstream = (
        Upstream("torch.nn.functional.binary_cross_entropy_with_logits"),
        Upstream("torch.nn.functional.binary_cross_entropy", {"activated": True}),
        Upstream("mmdet.models.losses.CrossEntropyLoss", theirs={"use_sigmoid": True}),
    )

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.activated and self.pos_weight is not None:
            raise ValueError("pos_weight of BinaryCrossEntropyLoss needs logits; leave it out or set activated=False.")


def balanced_cross_entropy_loss(pred, target, *, alpha="auto"):
    """``alpha_t BCE`` with ``alpha_t = alpha y + (1 - alpha) (1 - y)``; a negative target takes no part.

    ``alpha="auto"`` is ``n / (m + n)`` for m positives and n negatives (sums of ``y`` and of ``1 - y``), a constant; it
    is 1/2 where one of them is zero, because the formula's 1 or 0 would erase the loss.

    >>> balanced_cross_entropy_loss(torch.zeros(4), torch.tensor([1.0, 0, 0, 0]))  # 3/4 ln 2 and 1/4 ln 2
    tensor([0.5199, 0.1733, 0.1733, 0.1733])
    """
    if isinstance(alpha, str):
        alpha = share_of_negatives(*positives_and_negatives(target.detach()))
    counted = (target >= 0) | target.isnan()
    target = torch.where(counted, target, 0)
    return counted * balance(alpha, target) * bce(pred, target)


def positives_and_negatives(target):
    """How many there are: the sums of ``y`` and of ``1 - y``, of the targets that are not negative."""
    counted = (target >= 0) | target.isnan()
    return torch.where(counted, target, 0).sum(), torch.where(counted, 1 - target, 0).sum()


def share_of_negatives(positives, negatives):
    """Among both, or 1/2 where one of them is zero."""
    both = (positives > 0) & (negatives > 0)
    return torch.where(both, negatives / (positives + negatives), 0.5)


@MODELS.register_module()
class BalancedCrossEntropyLoss(ClassificationLoss):
    """Xie and Tu, Holistically-Nested Edge Detection, 2015.

    Each call counts its own positives and negatives, without the rows whose label or weight says that they are ignored.

    Args:
        alpha: "auto", or the weight of the positives, a number in [0, 1]; the negatives have ``1 - alpha``. "auto" is
            1/2 in a call without positives or without negatives.

    Raises:
        ValueError: if ``alpha`` is neither.
    """

    fn = staticmethod(balanced_cross_entropy_loss)
    paper = "https://arxiv.org/abs/1504.06375"
    by_rows = True
    needs_mining = False
    upstream = (
        Upstream("torchvision.ops.sigmoid_focal_loss", {"alpha": 0.3}, {"alpha": 0.3, "gamma": 0.0}),
        Upstream("torchvision.ops.sigmoid_focal_loss", {"alpha": 0.75}, {"alpha": 0.75, "gamma": 0.0}),
    )

    def __init__(self, *, alpha="auto", **kwargs):
        super().__init__(**kwargs)
        if alpha != "auto" and not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
            raise ValueError(f'alpha of BalancedCrossEntropyLoss must be "auto" or a number in [0, 1], not {alpha!r}.')
        self.alpha = alpha

    def survey(self, pred, target, weight):
        if self.alpha != "auto":
            return {}
        found = 0, 0
        for _, x, t, w in parts(self, pred.detach(), target, weight):
            _, t, valid = self.prepare(float32(x), t)
            found = [n + new for n, new in zip(found, positives_and_negatives(self._counted(t, valid, w)), strict=True)]
        return {"alpha": share_of_negatives(*found)}

    @staticmethod
    def _counted(target, *masks):
        """The target with -1 where a mask is zero."""
        for mask in masks:
            if mask is not None:
                target = torch.where(apply_weight(torch.ones_like(target), mask) != 0, target, -1)
        return target

    def compute(self, pred, target, valid, weight, **seen):
        return super().compute(pred, self._counted(target, valid, weight), valid, weight, **seen)


def kl_div_loss(pred, target, *, temperature=1.0, reduction="none"):
    """``T^2 sum_c t_c (ln t_c - ln q_c)`` with ``q = softmax(pred / T)`` and a distribution ``t``; ``0 ln 0 = 0``.

    >>> kl_div_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), temperature=2.0)  # 4 ln 2
    tensor([2.7726])
    """
    scale = temperature**2
    model = (pred if temperature == 1 else pred / temperature).log_softmax(-1)
    if reduction == "none":
        return scale * F.kl_div(model, target, reduction="none").sum(-1)
    scale = scale / pred.shape[:-1].numel() if reduction == "mean" else scale
    return scale * F.kl_div(model, target, reduction="sum")


@MODELS.register_module()
class KLDivLoss(Loss):
    """Kullback-Leibler divergence of the softmax of logits from a distribution.

    Call with logits and distributions ``(..., C)``; the per-element losses have shape ``(...)``.

    Args:
        temperature: divides the logits, and its square multiplies the loss, as in distillation (Hinton et al., 2015).
            A teacher's distribution is given at that temperature already.

    Raises:
        ValueError: if the temperature is not positive, or the target is not a distribution for each row.
    """

    fn = staticmethod(kl_div_loss)
    inputs = ("reduction",)
    allowed = rules(temperature=above(0))
    family = "soft label"
    upstream = (
        Upstream("torch.nn.functional.kl_div"),
        Upstream("mmdet.models.losses.KnowledgeDistillationKLDivLoss", theirs={"T": 1}),
        Upstream("mmdet.models.losses.KnowledgeDistillationKLDivLoss", {"temperature": 4.0}, {"T": 4}),
    )

    def prepare(self, pred, target):
        if not isinstance(target, torch.Tensor) or target.shape != pred.shape or not target.is_floating_point():
            given = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, torch.Tensor) else "a tuple"
            raise ValueError(
                f"KLDivLoss with logits {tuple(pred.shape)} takes one distribution a row as floats "
                f"{tuple(pred.shape)}, not {given}; for class indices use CrossEntropyLoss."
            )
        return super().prepare(pred, target)

    @classmethod
    def sample(cls, n=64, seed=0, dtype=torch.float32, classes=10):
        """Logits ``(n, classes)`` and distributions, every fourth of which is one-hot."""
        generator = torch.Generator().manual_seed(seed)
        pred, target = 2 * torch.randn(2, n, classes, generator=generator, dtype=torch.float64)
        one_hot = (target == target.amax(-1, keepdim=True)).to(target.dtype)
        target = torch.where(torch.arange(n).unsqueeze(-1) % 4 == 0, one_hot, target.softmax(-1))
        return pred.to(dtype), target.to(dtype)


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
