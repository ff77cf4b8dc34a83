"""Losses on a distribution over distance bins."""

import torch
from torch import Tensor

from detloss_plugins.facts import ARXIV, MMDET, Bins, Positive, Upstream, alike
from detloss_plugins.families import DistributionLoss, check_same_shape, of_one_type
from detloss_plugins.loss import Loss
from detloss_plugins.losses.classification.cross_entropy import kl_div_loss
from detloss_plugins.precision import float32
from detloss_plugins.registry import MODELS

__all__ = [
    "DistributionDistillationLoss", "DistributionFocalLoss", "distribution_distillation_loss",
    "distribution_focal_loss", "fgl_bins",
]  # fmt: skip


def fgl_bins(reg_max: int = 32, up: float = 0.5, reg_scale: float = 4.0) -> list[float]:
    """D-FINE's bins for :class:`DistributionFocalLoss`: ``reg_max + 1`` values, dense about 0.

    With ``a = up * reg_scale`` and ``s = (a + 1)^(2 / (reg_max - 2))`` they are 0, ``+-(s^i - 1)`` for i from 1 to
    ``reg_max / 2 - 1``, the last of which is a, and ``+-2a`` at the ends; ``reg_max`` is even and at least 4, else a
    ``ValueError``.

    >>> fgl_bins(6, 0.5, 6.0)  # a = 3, s = 4^(1/2)
    [-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0]
    """
    if reg_max < 4 or reg_max % 2:
        raise ValueError(f"reg_max of fgl_bins must be an even number of at least 4, not {reg_max}.")
    largest = up * reg_scale
    step = (largest + 1) ** (2 / (reg_max - 2))
    right = [step**i - 1 for i in range(1, reg_max // 2)] + [2 * largest]
    return [-value for value in reversed(right)] + [0.0] + right


def distribution_focal_loss(pred: Tensor, target: Tensor, *, bins: Bins | None = None) -> Tensor:
    """Cross entropy with the two bins around the target, weighted by their nearness.

    ``-[(1 - w) log S_l + w log S_(l+1)]`` with ``w = (y - W_l) / (W_(l+1) - W_l)`` for a target y between the bins
    ``W_l`` and ``W_(l+1)``, one for each logit (None: 0, 1, 2 and so on), and ``S = softmax(pred)``. Logits are
    ``(..., bins)``, targets, in the unit of the bins, and losses ``(...)``. Outside, the nearest bin counts.

    >>> distribution_focal_loss(torch.tensor([[0.2, 0.5, 1.5, 0.3, -0.7]]), torch.tensor([2.3]))
    tensor([1.0790])
    >>> logits = torch.tensor([[0.2, -0.1, 0.5, 0.0, 0.3]])
    >>> distribution_focal_loss(logits, torch.tensor([0.7]), bins=[-2, -0.5, 0, 1, 3])  # -.3 log S_2 - .7 log S_3
    tensor([1.6623])
    """
    pred, target = of_one_type(pred, target)
    if bins is None:
        # A NaN target is the caller's and gives NaN; as an index it would stop the program or the device.
        left = target.detach().nan_to_num(0.0).floor().clamp(0, pred.shape[-1] - 2)
        of_right = (target - left).clamp(0, 1)
    else:
        values = pred.new_tensor(bins)
        left = (target.detach().unsqueeze(-1) >= values[1:-1]).sum(-1)
        low, high = values[left], values[left + 1]
        of_right = ((target - low) / (high - low)).clamp(0, 1)
    pair = torch.stack([left, left + 1], -1).long()
    at_left, at_right = pred.log_softmax(-1).gather(-1, pair).unbind(-1)
    return -torch.lerp(at_left, at_right, of_right)


@MODELS.register_module()
class DistributionFocalLoss(
    DistributionLoss,
    fn=distribution_focal_loss,
    paper=ARXIV + "2006.04388",
    row_wise=True,
    keeps_little=True,
    upstream=(*alike(MMDET + "DistributionFocalLoss"), *alike("ultralytics.utils.loss.DFLoss")),
):
    """Li et al., Generalized Focal Loss, 2020 (DFL).

    Its minimum is the entropy of the target, not zero.

    Args:
        bins: increasing values, one for each logit, else a ``ValueError``; None for 0, 1, 2 and so on, by which the
            heads of MMDetection and Ultralytics decode. ``fgl_bins()`` are those of D-FINE (Peng et al., 2024), whose
            fine-grained localization loss this is then, with the IoU of each box as ``weight``.
    """

    def prepare(self, pred, target):
        if self.bins is not None and len(self.bins) != pred.shape[-1]:
            given = f"{len(self.bins)} values, and there are {pred.shape[-1]} logits"
            raise ValueError(f"bins of DistributionFocalLoss has {given}.")
        return super().prepare(pred, target)


def distribution_distillation_loss(pred: Tensor, target: Tensor, *, temperature: Positive = 5.0) -> Tensor:
    """``T^2 KL(t || s)`` with ``s = softmax(pred / T)`` and the teacher's ``t = softmax(target / T)``, a constant.

    Logits ``(..., bins)`` of both, losses ``(...)``.

    >>> teacher = torch.tensor([[3.0, 1.0]]).log()  # t = 3/4, 1/4 at T = 1: 3/4 ln 3/2 + 1/4 ln 1/2
    >>> distribution_distillation_loss(torch.zeros(1, 2), teacher, temperature=1.0)
    tensor([0.1308])
    """
    teacher = (float32(target).detach() / temperature).softmax(-1)
    return kl_div_loss(pred, teacher, temperature=temperature)


@MODELS.register_module()
class DistributionDistillationLoss(
    Loss,
    fn=distribution_distillation_loss,
    family="soft label",
    paper=ARXIV + "2410.13842",
    row_wise=True,
    upstream=(Upstream(MMDET + "KnowledgeDistillationKLDivLoss", theirs={"T": 5}),),
):
    """Peng et al., D-FINE, 2024: distillation of the distributions of a box's sides (DDF).

    Call with logits ``(..., bins)`` of the student and of the teacher, one row a side of a box; the per-element losses
    have shape ``(...)``. It goes where mmdet's LD head has ``loss_ld``, whose loss is the mean over the bins: this one
    is the sum, as in the paper.

    With ``matched``, the mean is the paper's: that over the matched rows and that over the others, weighted by the
    square roots of how many there are. The weight of a matched box is its IoU, of another one the teacher's best score.

    >>> loss, bins = DistributionDistillationLoss(), 16
    >>> student, teacher = torch.randn(2, 2, 4 * bins, 100)  # "boxes" of two YOLO heads, (B, 4 bins, anchors)
    >>> scores = torch.rand(2, 80, 100)  # the teacher's
    >>> matched, iou = torch.rand(2, 100) < 0.1, torch.rand(2, 100)  # what the assigner has found
    >>> rows = lambda boxes: boxes.unflatten(1, (4, bins)).permute(0, 3, 1, 2)  # (B, anchors, 4, bins)
    >>> weight = torch.where(matched, iou, scores.amax(1))
    >>> loss(rows(student), rows(teacher), weight, matched=matched).shape
    torch.Size([])
    """

    def prepare(self, pred, target):
        check_same_shape(pred, target, "logits (N, bins), of student and teacher")
        return super().prepare(pred, target)

    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None, matched=None):
        """As in every loss, but for ``matched``: booleans, one for each row or box, which make the mean the paper's,
        with constant weights; a ``ValueError`` beside an ``avg_factor`` or another reduction than "mean"."""
        if matched is None:
            return super().forward(pred, target, weight, avg_factor, reduction_override)
        if avg_factor is not None or (reduction_override or self.reduction) != "mean":
            raise ValueError('matched is for a "mean" without avg_factor, as it decides what that divides by.')
        rows = pred.shape[:-1]
        matched, weight = (
            x.reshape(*x.shape, *[1] * (len(rows) - x.dim())).expand(rows)
            for x in (matched.bool(), pred.new_ones(()) if weight is None else weight)
        )
        # A share for each row, of sum 1, that gives the mean of each kind the square root of its count.
        roots = torch.stack([(~matched).sum(), matched.sum()]).float().sqrt()
        share = (1 / (roots * roots.sum()))[matched.long()]
        return super().forward(pred, target, weight.detach() * share, None, "sum")
