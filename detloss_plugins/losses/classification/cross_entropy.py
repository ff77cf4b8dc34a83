"""Cross entropies and the divergence.

Logits and targets have one shape, which is that of the losses, where a function does not say another.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detloss_plugins.facts import ARXIV, MMDET, TORCH, NonNegative, PerClass, Positive, Share, Upstream, alike
from detloss_plugins.families import ClassificationLoss, of_one_type
from detloss_plugins.loss import Loss
from detloss_plugins.losses.classification.common import SoftmaxOrSigmoid, bce, class_vector
from detloss_plugins.precision import float32, longest
from detloss_plugins.reduction import counts
from detloss_plugins.registry import MODELS

__all__ = [
    "BalancedCrossEntropyLoss", "BinaryCrossEntropyLoss", "CrossEntropyLoss", "KLDivLoss",
    "balanced_cross_entropy_loss", "binary_cross_entropy_loss", "cross_entropy_loss", "kl_div_loss",
]  # fmt: skip


def cross_entropy_loss(
    pred: Tensor,
    target: Tensor,
    *,
    use_sigmoid: bool = False,
    class_weight: PerClass | None = None,
    ignore_index: int = -100,
    label_smoothing: Share = 0.0,
) -> Tensor:
    """Softmax cross entropy, ``(...)``: of logits ``(..., C)``, and indices ``(...)`` or distributions ``(..., C)``.

    It is zero where an index is negative or ``ignore_index``. With ``use_sigmoid``, binary cross entropy of each class.

    >>> cross_entropy_loss(torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([0]))  # ln(1 + e^-3 + e^-1.5)
    tensor([0.2413])
    """
    pred = float32(pred)
    weight = class_vector(class_weight, pred)
    if use_sigmoid:
        smooth = target * (1 - label_smoothing) + label_smoothing / 2 if label_smoothing else target
        return bce(pred, smooth.to(pred.dtype), pos_weight=weight)
    shape = pred.shape[:-1]
    rows = pred.flatten(0, -2) if shape else pred
    if target.is_floating_point():
        target = target.to(pred.dtype).reshape(rows.shape)
    else:
        target = target.long()  # a byte has no -100
        target = target.masked_fill((target < 0) | (target == ignore_index), -100).reshape(rows.shape[:-1])
    loss = F.cross_entropy(
        rows, target, weight=weight, reduction="none", ignore_index=-100, label_smoothing=label_smoothing
    )
    return loss.reshape(shape)


@MODELS.register_module()
class CrossEntropyLoss(
    SoftmaxOrSigmoid,
    fn=cross_entropy_loss,
    row_wise=True,
    upstream=(
        *alike(TORCH + "cross_entropy", {}, {"label_smoothing": 0.1}),
        *alike(MMDET + "CrossEntropyLoss", {}, {"class_weight": [1.0, 2.0, 0.5, 1.5, 1.0] * 2}, {"use_sigmoid": True}),
    ),
):
    """Softmax cross entropy, or binary cross entropy with `use_sigmoid=True`.

    The options and the mean are those of mmdet's class of this name. The softmax form takes torch's ``(N, C, H, W)``
    with class indices ``(N, H, W)`` too, as mmdet's semantic heads hand them over.

    Args:
        class_weight: one factor a class. As in mmdet, "mean" still divides by the number of elements (torch divides by
            the sum of the weights), and in the sigmoid form it scales the positive term only (torch's ``pos_weight``).
            "effective" is for the sigmoid form.
        ignore_index: a label that takes no part; None means -100. Negative labels never do.
        avg_non_ignore: let "mean" divide by the number of elements that take part, when no ``avg_factor`` is given.
        label_smoothing: epsilon; the target becomes ``(1 - epsilon) target + epsilon / C`` (sigmoid: ``/ 2``).
        use_mask: binary cross entropy of the mask of each object's own class, as mmdet's mask heads want it: logits
            ``(N, C, ...)``, masks ``(N, ...)`` and, in the place of the weight, the class of each, ``(N,)``.

    Raises:
        ValueError: for ``use_mask`` beside ``use_sigmoid`` or without classes, or if it cannot be told which are C.
    """

    outside_kernel = Loss.outside_kernel

    def __init__(
        self,
        *,
        use_sigmoid: bool = False,
        use_mask: bool = False,
        avg_non_ignore: bool = False,
        ignore_index: int | None = -100,
        **settings,
    ):
        if use_mask and use_sigmoid:
            raise ValueError("CrossEntropyLoss has use_sigmoid=True or use_mask=True, not both.")
        super().__init__(use_sigmoid=use_sigmoid or use_mask, **settings)
        self.facts = self.facts.but(keeps_little=not self.use_sigmoid)  # one operator of torch's
        self.avg_non_ignore, self.use_mask = avg_non_ignore, use_mask
        self.ignore_index = -100 if ignore_index is None else ignore_index

    def check_labels(self, pred, label):
        super().check_labels(pred, self._without_ignored(label))

    def arranged(self, pred, target, weight):
        """Classes last; with ``use_mask`` the third argument of a call is the class of each mask, and no weight."""
        arranged = weight is None and isinstance(target, Tensor) and pred.shape == target.shape  # by a JointLoss
        if self.use_mask and not arranged:
            if weight is None or weight.dtype != torch.long:
                raise ValueError("CrossEntropyLoss with use_mask=True takes the class of each mask as third argument.")
            pred, weight = pred[torch.arange(len(pred), device=pred.device), weight], None
        elif pred.dim() == 4 and isinstance(target, Tensor) and target.shape == (len(pred), *pred.shape[2:]):
            if target.shape == pred.shape[:-1]:
                shape = tuple(pred.shape)
                raise ValueError(f"The classes of logits {shape} may be dimension 1 or 3; flatten them to (N, C).")
            pred = pred.movedim(1, -1)
        return pred, target, weight

    def prepare(self, pred, target):
        of_labels = isinstance(target, Tensor) and target.shape == pred.shape[:-1] and not target.is_floating_point()
        if of_labels and not self.use_sigmoid:
            target = target.long()  # an index to ignore would be another number in a byte
            return pred, target, (target >= 0) & (target != self.ignore_index)
        return super().prepare(pred, self.without_ignored(pred, target))

    def without_ignored(self, pred, target):
        if isinstance(target, (tuple, list)):
            return self._without_ignored(target[0]), target[1]
        of_labels = target.shape == pred.shape[:-1] and not target.is_floating_point()
        dense = target.shape == pred.shape and self.use_sigmoid
        return self._without_ignored(target) if of_labels or dense else target

    def _without_ignored(self, target):
        target = target.int() if target.dtype in (torch.bool, torch.uint8) else target
        return target.masked_fill(target == self.ignore_index, -1)

    @property
    def observes(self):
        return self.avg_non_ignore

    def statistics(self, pred, target, valid, weight):
        valid = torch.ones(pred.shape[:-1], dtype=torch.bool, device=pred.device) if valid is None else valid
        per_valid = 1 if valid.shape == pred.shape or not self.use_sigmoid else pred.shape[-1]
        return {"counted": valid.sum() * per_valid}

    def elements(self, pred, target, seen):
        return super().elements(pred, target, {})

    def normalizer(self, count, seen):
        return seen["counted"].clamp(min=1) if seen else count


def binary_cross_entropy_loss(
    pred: Tensor, target: Tensor, *, pos_weight: NonNegative | PerClass | None = None, activated: bool = False
) -> Tensor:
    """``-[pos_weight y ln p + (1 - y) ln(1 - p)]`` with ``p = sigmoid(pred)``, or ``p = pred`` if ``activated``.

    >>> binary_cross_entropy_loss(torch.tensor([0.8, -0.4, 1.5]), torch.tensor([1.0, 0.0, 0.3]))
    tensor([0.3711, 0.5130, 1.2514])
    """
    pred = float32(pred)
    vector = None if activated else class_vector(pos_weight, pred)
    vector = pred.new_tensor(vector) if isinstance(vector, (int, float)) else vector
    return bce(pred, target.to(pred.dtype), activated, vector)


@MODELS.register_module()
class BinaryCrossEntropyLoss(
    ClassificationLoss,
    fn=binary_cross_entropy_loss,
    row_wise=True,
    upstream=(
        *alike(TORCH + "binary_cross_entropy_with_logits"),
        Upstream(TORCH + "binary_cross_entropy", {"activated": True}),
        Upstream(MMDET + "CrossEntropyLoss", theirs={"use_sigmoid": True}),
    ),
):
    """Binary cross entropy of every class on its own, with hard, soft or multi-hot targets.

    Args:
        pos_weight: factor on the positive term, a number or one a class; of logits, else a ``ValueError``.
        activated: ``pred`` is a probability; its logarithms are cut at -100 as torch does.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.activated and self.pos_weight is not None:
            raise ValueError("pos_weight of BinaryCrossEntropyLoss needs logits; leave it out or set activated=False.")


def balanced_cross_entropy_loss(
    pred: Tensor,
    target: Tensor,
    *,
    alpha: Literal["auto"] | Share = "auto",
    positives: Tensor | None = None,
    negatives: Tensor | None = None,
) -> Tensor:
    """``alpha_t BCE`` with ``alpha_t = alpha y + (1 - alpha) (1 - y)``; a negative target takes no part.

    ``alpha="auto"`` is ``n / (m + n)`` for m positives and n negatives, a constant; it is 1/2 where one of them is
    zero, because the formula's 1 or 0 would erase the loss. m and n are the sums of ``y`` and of ``1 - y``, of these
    targets or, if ``positives`` and ``negatives`` give them, of more.

    >>> balanced_cross_entropy_loss(torch.zeros(4), torch.tensor([1.0, 0, 0, 0]))  # 3/4 ln 2 and 1/4 ln 2
    tensor([0.5199, 0.1733, 0.1733, 0.1733])
    """
    pred, target = of_one_type(pred, target)
    counted = (target >= 0) | target.isnan()
    target = torch.where(counted, target, 0)
    if alpha == "auto":
        if positives is None or negatives is None:
            y = target.detach()
            positives, negatives = (y * counted).sum(), ((1 - y) * counted).sum()
        # Not 1 - n / (m + n), which has no digits left for one positive among ten million.
        m, n, both = positives, negatives, (positives > 0) & (negatives > 0)
        shares: Any = [torch.where(both, of_other / (m + n), 0.5).to(pred.dtype) for of_other in (n, m)]
    else:
        shares = alpha, 1 - alpha
    return counted * (shares[0] * target + shares[1] * (1 - target)) * bce(pred, target)


@MODELS.register_module()
class BalancedCrossEntropyLoss(
    ClassificationLoss,
    fn=balanced_cross_entropy_loss,
    paper=ARXIV + "1504.06375",
    row_wise=True,
    needs_mining=False,
    filled=("positives", "negatives"),
    upstream=tuple(
        Upstream("torchvision.ops.sigmoid_focal_loss", {"alpha": alpha}, {"alpha": alpha, "gamma": 0.0})
        for alpha in (0.3, 0.75)
    ),
):
    """Xie and Tu, Holistically-Nested Edge Detection, 2015.

    Each call counts its own positives and negatives, without the rows whose label or weight says that they are ignored.
    """

    @property
    def observes(self):
        return self.alpha == "auto"

    def statistics(self, pred, target, valid, weight):
        counted = counts(target, valid, weight)
        y = torch.where(counted > 0, target, 0)
        return {"positives": longest((y * counted).sum()), "negatives": longest(((1 - y) * counted).sum())}


def kl_div_loss(pred: Tensor, target: Tensor, *, temperature: Positive = 1.0) -> Tensor:
    """``T^2 sum_c t_c (ln t_c - ln q_c)`` with ``q = softmax(pred / T)`` and a distribution ``t``; ``0 ln 0 = 0``.

    Logits and distributions ``(..., C)``, losses ``(...)``.

    >>> kl_div_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), temperature=2.0)  # 4 ln 2
    tensor([2.7726])
    """
    log_q = (float32(pred) / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(log_q, target.to(log_q.dtype), reduction="none").sum(-1)


@MODELS.register_module()
class KLDivLoss(
    Loss,
    fn=kl_div_loss,
    family="soft label",
    row_wise=True,
    upstream=(
        *alike(TORCH + "kl_div"),
        Upstream(MMDET + "KnowledgeDistillationKLDivLoss", theirs={"T": 1}),
        Upstream(MMDET + "KnowledgeDistillationKLDivLoss", {"temperature": 4.0}, {"T": 4}),
        Upstream(MMDET + "KnowledgeDistillationKLDivLoss", {"target": "logits", "temperature": 4.0}, {"T": 4}),
    ),
):
    """Kullback-Leibler divergence of the softmax of logits from a distribution.

    Args:
        temperature: as in distillation (Hinton et al., 2015); a teacher's distribution is at that temperature already.
        target: "distribution", or "logits" of a teacher, as mmdet's LDHead hands over: they are constants, are softened
            by the temperature here, and the loss is the mean over the classes, not the sum, all as in mmdet.

    Raises:
        ValueError: if the target is not a distribution for each row; its values are looked at in the first calls.
    """

    def __init__(self, *, target: Literal["distribution", "logits"] = "distribution", **settings):
        super().__init__(**settings)
        self.target = target

    def check(self, pred, target):
        if self.target == "logits" or target.shape != pred.shape:
            return
        total = float32(target).sum(-1)  # 0 where a head leaves a row out
        if (target < 0).any() or (((total - 1).abs() > 0.01) & (total != 0)).any():
            raise ValueError(
                "KLDivLoss takes one distribution a row, and these targets have values below 0 or do not add up to 1; "
                'write target="logits" if they are the logits of a teacher.'
            )

    def prepare(self, pred, target):
        if target.shape != pred.shape or not target.is_floating_point():
            raise ValueError(
                f"KLDivLoss takes one distribution a row as floats {tuple(pred.shape)}, not {target.dtype} "
                f"{tuple(target.shape)}; for class indices use CrossEntropyLoss."
            )
        if self.target == "logits":
            target = (target.detach().to(pred.dtype) / self.temperature).softmax(-1)
        return super().prepare(pred, target)

    def elements(self, pred, target, seen):
        loss = super().elements(pred, target, seen)
        return loss / pred.shape[-1] if self.target == "logits" else loss
