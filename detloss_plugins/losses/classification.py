"""Classification losses on logits."""

import torch
import torch.nn.functional as F

from detloss_plugins.base import ClassificationLoss, Upstream
from detloss_plugins.registry import MODELS


def _power(base, exponent):
    """``base ** exponent`` for ``base >= 0`` with a finite gradient at zero for exponents below 1 too."""
    return base.clamp(min=torch.finfo(base.dtype).tiny).pow(exponent)


def _bce(pred, target, activated, pos_weight=None):
    if activated:
        return F.binary_cross_entropy(pred, target, reduction="none")
    return F.binary_cross_entropy_with_logits(pred, target, reduction="none", pos_weight=pos_weight)


def _class_vector(values, pred):
    """Per-class values (number, list, tensor or None) beside ``pred``."""
    if values is None or isinstance(values, (int, float)):
        return values
    vector = torch.as_tensor(values, dtype=pred.dtype, device=pred.device)
    if vector.dim() and vector.shape[-1] not in (1, pred.shape[-1]):
        raise ValueError(f"{vector.shape[-1]} values were given for {pred.shape[-1]} classes.")
    return vector


def _index_target(target):
    """Whether a target of a softmax loss is class indices rather than a distribution."""
    return not target.is_floating_point()


def cross_entropy_loss(pred, target, *, use_sigmoid=False, class_weight=None, ignore_index=-100, label_smoothing=0.0):
    """Softmax cross entropy with indices ``(...)`` or distributions ``(..., C)``, or (sigmoid) binary cross entropy.

    >>> cross_entropy_loss(torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([0]))  # ln(1 + e^-3 + e^-1.5)
    tensor([0.2413])
    """
    weight = _class_vector(class_weight, pred)
    if use_sigmoid:
        smooth = target * (1 - label_smoothing) + label_smoothing / 2 if label_smoothing else target
        return _bce(pred, smooth, activated=False, pos_weight=weight)
    classes_last = pred.reshape(-1, pred.shape[-1])
    target = target.reshape(-1) if _index_target(target) else target.reshape(classes_last.shape)
    ignore = {"ignore_index": ignore_index} if _index_target(target) else {}
    loss = F.cross_entropy(
        classes_last, target, weight=weight, reduction="none", label_smoothing=label_smoothing, **ignore
    )
    return loss.reshape(pred.shape[:-1])


class _SoftmaxOrSigmoid(ClassificationLoss):
    """A loss with both forms: the softmax form takes indices or distributions as they are."""

    sigmoid_only = False

    def prepare(self, pred, target):
        if self.use_sigmoid:
            return super().prepare(pred, target)
        if isinstance(target, torch.Tensor) and target.shape == pred.shape:
            return pred, target.to(pred.dtype), None
        if isinstance(target, torch.Tensor) and target.shape == pred.shape[:-1] and _index_target(target):
            valid = target >= 0
            return pred, torch.where(valid, target, 0).long(), valid
        raise ValueError(
            f"The softmax form of {type(self).__name__} with logits {tuple(pred.shape)} takes class indices "
            f"{tuple(pred.shape[:-1])} as integers or distributions {tuple(pred.shape)}; "
            "a (label, quality) target has a meaning for use_sigmoid=True only."
        )


@MODELS.register_module()
class CrossEntropyLoss(_SoftmaxOrSigmoid):
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
        self.ignore_index = -100 if ignore_index is None else ignore_index

    def prepare(self, pred, target):
        if isinstance(target, (tuple, list)):
            label, quality = target
            return super().prepare(pred, (self._drop_ignored(label), quality))
        if self.use_sigmoid and target.shape == pred.shape:
            valid = (target >= 0) & (target != self.ignore_index)
            return pred, torch.where(valid, target, 0).to(pred.dtype), valid
        return super().prepare(pred, self._drop_ignored(target) if _index_target(target) else target)

    def _drop_ignored(self, label):
        return torch.where(label == self.ignore_index, -1, label)

    def normalizer(self, avg_factor, loss, valid, reduction):
        if not self.avg_non_ignore or avg_factor is not None or valid is None or reduction != "mean":
            return avg_factor
        per_valid = loss.numel() // max(valid.numel(), 1)
        return valid.sum() * per_valid


def binary_cross_entropy_loss(pred, target, *, pos_weight=None, activated=False):
    """``-[pos_weight y ln p + (1 - y) ln(1 - p)]`` with ``p = sigmoid(pred)``, or ``p = pred`` if ``activated``.

    >>> binary_cross_entropy_loss(torch.tensor([0.8, -0.4, 1.5]), torch.tensor([1.0, 0.0, 0.3]))
    tensor([0.3711, 0.5130, 1.2514])
    """
    return _bce(pred, target, activated, pos_weight=None if activated else _pos_weight(pos_weight, pred))


def _pos_weight(value, pred):
    vector = _class_vector(value, pred)
    return pred.new_tensor(vector) if isinstance(vector, (int, float)) else vector


@MODELS.register_module()
class BinaryCrossEntropyLoss(ClassificationLoss):
    """Binary cross entropy of every class on its own, with hard, soft or multi-hot targets.

    Args:
        pos_weight: factor on the positive term, a number or one a class; logits only.
        activated: ``pred`` is a probability; its logarithms are cut at -100 as torch does.
    """

    fn = staticmethod(binary_cross_entropy_loss)
    upstream = (
        Upstream("torch.nn.functional.binary_cross_entropy_with_logits"),
        Upstream("torch.nn.functional.binary_cross_entropy", {"activated": True}),
        Upstream("mmdet.models.losses.CrossEntropyLoss", theirs={"use_sigmoid": True}),
    )

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.activated and self.pos_weight is not None:
            raise ValueError("pos_weight of BinaryCrossEntropyLoss needs logits; leave it out or set activated=False.")


def focal_loss(pred, target, *, gamma=2.0, alpha=0.25, use_sigmoid=True, activated=False):
    """``alpha_t (1 - p_t)^gamma CE``; the factor carries gradient.

    Sigmoid form: a loss per class, ``alpha_t = alpha`` for positives and ``1 - alpha`` for negatives. Softmax form: one
    per row, where a scalar alpha is a mere scale and a per-class one balances. ``alpha=None`` leaves it out.

    >>> focal_loss(torch.tensor([0.8, -0.4, 3.0]), torch.tensor([1.0, 0.0, 0.0]))
    tensor([0.0089, 0.0620, 2.0747])
    """
    alpha = _class_vector(alpha, pred)
    if not use_sigmoid:
        return _softmax_focal_loss(pred, target, gamma, alpha, activated)
    p, q = (pred, 1 - pred) if activated else (pred.sigmoid(), (-pred).sigmoid())
    loss = _power(target * q + (1 - target) * p, gamma) * _bce(pred, target, activated)
    return loss if alpha is None else (alpha * target + (1 - alpha) * (1 - target)) * loss


def _softmax_focal_loss(pred, target, gamma, alpha, activated):
    log_p = pred.clamp(min=torch.finfo(pred.dtype).tiny).log() if activated else pred.log_softmax(-1)
    if not _index_target(target):
        loss = -target * _power(1 - log_p.exp(), gamma) * log_p
        return (loss if alpha is None else alpha * loss).sum(-1)
    log_p = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    loss = -_power(1 - log_p.exp(), gamma) * log_p
    if isinstance(alpha, torch.Tensor) and alpha.dim():
        alpha = alpha.expand(pred.shape[-1])[target]
    return loss if alpha is None else alpha * loss


@MODELS.register_module()
class FocalLoss(_SoftmaxOrSigmoid):
    """Lin et al., Focal Loss for Dense Object Detection, 2017.

    Args:
        gamma: focusing power, 0 or at least 1 for a bounded second derivative.
        alpha: weight of the positives, a number or one a class; None for no balance.
        use_sigmoid: False for the softmax form.
        activated: ``pred`` holds probabilities.

    In Ultralytics' ``cls`` slot the default ``loss_weight`` is 16, measured as the README tells.
    """

    fn = staticmethod(focal_loss)
    paper = "https://arxiv.org/abs/1708.02002"
    yolo_gain = 16.0
    upstream = (
        Upstream("mmdet.models.losses.FocalLoss", theirs={"use_sigmoid": True}),
        Upstream("mmdet.models.losses.FocalLoss", {"activated": True}, {"use_sigmoid": True, "activated": True}),
        Upstream("torchvision.ops.sigmoid_focal_loss"),
        Upstream("torchvision.ops.sigmoid_focal_loss", {"alpha": None, "gamma": 1.5}, {"alpha": -1, "gamma": 1.5}),
        Upstream("ultralytics.utils.loss.FocalLoss", {"gamma": 1.5}, {"gamma": 1.5}),
    )

    def __init__(self, *, use_sigmoid=True, **kwargs):
        super().__init__(use_sigmoid=use_sigmoid, **kwargs)


def quality_focal_loss(pred, target, *, beta=2.0, alpha=None, activated=False):
    """``|y - p|^beta BCE`` with a quality ``y`` in [0, 1]; the factor carries gradient.

    ``alpha`` (a number) multiplies ``alpha y + (1 - alpha)(1 - y)``, the form of YOLOv5 and not of the paper.

    >>> quality_focal_loss(torch.tensor([0.8, -0.4, 1.5]), torch.tensor([0.6, 0.0, 1.0]))
    tensor([0.0056, 0.0826, 0.0067])
    """
    p = pred if activated else pred.sigmoid()
    loss = _power((target - p).abs(), beta) * _bce(pred, target, activated)
    return loss if alpha is None else (alpha * target + (1 - alpha) * (1 - target)) * loss


@MODELS.register_module()
class QualityFocalLoss(ClassificationLoss):
    """Li et al., Generalized Focal Loss, 2020 (QFL).

    The class sums over the classes: ``reduction="none"`` gives ``(...)``. In Ultralytics' ``cls`` slot the default
    ``loss_weight`` is 16, measured as the README tells.
    """

    fn = staticmethod(quality_focal_loss)
    paper = "https://arxiv.org/abs/2006.04388"
    yolo_gain = 16.0
    sums_classes = True
    upstream = (
        Upstream("mmdet.models.losses.QualityFocalLoss"),
        Upstream("mmdet.models.losses.QualityFocalLoss", {"activated": True}, {"activated": True}),
    )


def varifocal_loss(pred, target, *, alpha=0.75, gamma=2.0, iou_weighted=True):
    """``y BCE`` where the quality ``y > 0``, ``alpha p^gamma BCE`` where it is 0; ``iou_weighted=False`` drops the y.

    >>> varifocal_loss(torch.tensor([0.8, -0.4, 1.5]), torch.tensor([0.6, 0.0, 1.0]))
    tensor([0.4147, 0.0620, 0.2014])
    """
    positive_weight = target if iou_weighted else torch.ones_like(target)
    weight = torch.where(target > 0, positive_weight, alpha * _power(pred.sigmoid(), gamma))
    return weight * _bce(pred, target, activated=False)


@MODELS.register_module()
class VarifocalLoss(ClassificationLoss):
    """Zhang et al., VarifocalNet, 2020 (VFL).

    A positive whose quality is 0 counts as a negative. In Ultralytics' ``cls`` slot the default ``loss_weight`` is 16,
    measured as the README tells.
    """

    fn = staticmethod(varifocal_loss)
    paper = "https://arxiv.org/abs/2008.13367"
    yolo_gain = 16.0
    upstream = (
        Upstream("mmdet.models.losses.VarifocalLoss"),
        Upstream("mmdet.models.losses.VarifocalLoss", {"iou_weighted": False}, {"iou_weighted": False}),
        Upstream("ultralytics.utils.loss.VarifocalLoss"),
    )


# What is defined here is public; a new loss is exported by being here.
__all__ = [k for k, v in list(globals().items()) if getattr(v, "__module__", "") == __name__ and k[0] != "_"]
