"""Losses made of other losses."""

import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from detloss_plugins.facts import Facts, Increasing, NonNegative, Parts
from detloss_plugins.families import ClassificationLoss
from detloss_plugins.loss import Loss, check_use_sigmoid, takes_probabilities
from detloss_plugins.losses.classification.common import OverBase
from detloss_plugins.losses.classification.multilabel import confidence_weight
from detloss_plugins.precision import float32, outside_graph, without_autocast
from detloss_plugins.reduction import apply_weight, check_reduction, scaled, times
from detloss_plugins.registry import MODELS, build_loss, build_part, runner_progress

__all__ = [
    "ConfidenceWeightedLoss", "JointLoss", "ScheduledLoss", "confidence_weighted_loss", "in_turn", "joint_loss",
    "scheduled_loss", "set_progress",
]  # fmt: skip


def joint_loss(pred: Tensor, target: Tensor, *, losses: Sequence[Loss]) -> Tensor:
    """The sum of several losses (modules) of the same input, per element.

    >>> from detloss_plugins.losses import L1Loss, SmoothL1Loss
    >>> joint_loss(torch.tensor([3.0]), torch.tensor([0.0]), losses=[L1Loss(), SmoothL1Loss(loss_weight=2.0)])
    tensor([8.])
    """
    return _added(loss(pred, target, reduction_override="none") for loss in losses)


def check_one_family(losses: Sequence[Loss]) -> None:
    """Raise ``ValueError`` for losses whose per-element losses do not stand side by side."""
    if len({loss.family for loss in losses}) > 1:
        raise ValueError(
            'reduction="none" has no meaning while a class loss fades into a ranking loss, which has one loss a '
            'positive: take "mean" or "sum".'
        )


def _added(parts):
    """The sum of losses; beside some with one a row, those with one a class are summed over the classes."""
    parts = list(parts)
    fewest = min(part.dim() for part in parts)
    return sum(part if part.dim() == fewest else part.sum(-1) for part in parts)


def _check_use(loss: Any, use_sigmoid: bool | None) -> None:
    """Set ``use_sigmoid`` of a loss of others; ``ValueError`` if that is not given, or they do not take one input."""
    if any(getattr(part, "custom_cls_channels", False) for part in loss.losses):
        raise ValueError(f"losses of {type(loss).__name__} must not need channels of their own, as SeesawLoss does.")
    if len({takes_probabilities(part) for part in loss.losses}) > 1:
        raise ValueError(
            f"losses of {type(loss).__name__} are given one input: write activated=True (activate=False of region "
            "losses) in all of them, for probabilities, or in none."
        )
    loss.use_sigmoid = all(getattr(part, "use_sigmoid", True) for part in loss.losses)
    check_use_sigmoid(loss, use_sigmoid)


def facts_of_sum(losses: Sequence[Loss]) -> Facts:
    """What is known of the sum of some losses."""
    facts = [loss.facts for loss in losses]
    of_all = ("one_per_row", "keeps_little", "true_gradient", "symmetric", "scale_invariant")
    of_any = ("counts_positives", "needs_mining", "takes_quality")
    merged = {name: all(getattr(f, name) for f in facts) for name in of_all}
    merged |= {name: any(getattr(f, name) for f in facts) for name in of_any}
    alike = len({f.one_per_row or f.sums_classes for f in facts}) == 1
    merged |= {"row_wise": all(f.row_wise and not f.root for f in facts), "root": False, "self_normalized": False}
    merged["mean_of_rows"] = alike and all(f.mean_of_rows for f in facts)
    return facts[0].but(**merged, paper="", upstream=(), filled=("losses",))


@MODELS.register_module()
class JointLoss(Loss, fn=joint_loss):
    """Weighted sum of losses on the same input, each with its own ``loss_weight`` and normaliser.

    Args:
        losses: config dicts of losses of one family, which all take logits or all probabilities, else a ``ValueError``.
        use_sigmoid: may be given because mmdet's heads read it from the config; it must fit the parts.
    """

    facts = ClassificationLoss.facts.but(  # of the example; an instance has those of its parts
        row_wise=True,
        filled=("losses",),
        example={"losses": [{"type": "BinaryCrossEntropyLoss"}, {"type": "FocalLoss", "loss_weight": 2.0}]},
    )

    def __init__(self, *, losses: Parts = (), use_sigmoid: bool | None = None, **settings):  # type: ignore[assignment]
        super().__init__(**settings)
        self.losses: Any = torch.nn.ModuleList(build_part(cfg) for cfg in losses)
        families = {loss.family for loss in self.losses}
        if len(families) != 1:
            raise ValueError("losses of JointLoss must be one or more config dicts of losses of one family.")
        _check_use(self, use_sigmoid)
        self.facts = facts_of_sum([*self.losses])
        self.couples = any(loss.couples for loss in self.losses)

    def arranged(self, pred, target, weight):
        """As one of the parts wants it, which then finds it so."""
        for loss in self.losses:
            found = loss.arranged(pred, target, weight)
            if found[0] is not pred:
                return found
        return pred, target, weight

    def leading(self, pred):
        return self.losses[0].leading(pred)

    def without_ignored(self, pred, target):
        return self.losses[0].without_ignored(pred, target)  # as they all are below another loss

    def reduced(self, pred, target, weight, avg_factor, reduction, factor):
        """The sum of the parts, each called with the same arguments; of rows in one pass, which keeps one gradient."""
        reduction = check_reduction(self.reduction if reduction is None else reduction, avg_factor)
        if reduction == "none" or not self.facts.row_wise:
            pred = float32(pred)  # once, so that half-precision gradients are not added up in half precision
            parts = (loss(pred, target, weight, avg_factor, reduction) for loss in self.losses)
            return times(_added(parts), factor)
        pred = self.added_up(pred)
        self.look(pred, target)
        with without_autocast(pred.device):
            pred, target, weight = self.as_rows(pred, target, weight)
            seen = self.observe(pred, target, weight)
            self.add_scales(seen, pred, avg_factor, reduction)
            total = self.summed(pred, target, weight, seen)
        return times(total, factor)

    def add_scales(self, seen: dict[str, Any], pred: Tensor, avg_factor: Tensor | float | None, reduction: str) -> None:
        """Put beside what each part has seen what its sum is multiplied by."""
        one = float32(pred.new_ones(()))
        for loss, of_loss in zip(self.losses, seen.values(), strict=True):
            if isinstance(loss, JointLoss):  # its parts have each a normaliser
                loss.add_scales(of_loss, pred, avg_factor, reduction)
                of_loss["scale"] = times(one, loss.loss_weight)
            else:
                of_loss["scale"] = scaled(one, loss.divisor(pred, of_loss, avg_factor, reduction), loss.loss_weight)

    def look(self, pred, target):
        for loss in self.losses:
            loss.look(pred, target)

    def observe(self, pred, target, weight):
        return {str(i): loss.observe(pred, target, weight) for i, loss in enumerate(self.losses)}

    def weighted(self, pred, target, weight, seen):
        pred, total = float32(pred), 0  # half-precision gradients are not to be added up in half precision
        for loss, of_loss in zip(self.losses, seen.values(), strict=True):
            of_loss = dict(of_loss)
            scale = of_loss.pop("scale")
            of_rows = loss.weighted(pred, target, weight, of_loss)
            total = total + scale * (of_rows.flatten(1).sum(1) if of_rows.dim() > 1 else of_rows)
        return total

    def unweighted(self, pred, target, seen):
        pred = float32(pred)  # as in ``weighted``
        pairs = zip(self.losses, seen.values(), strict=True)
        found = [(loss.loss_weight, *loss.unweighted(pred, target, of_loss)) for loss, of_loss in pairs]
        return sum(factor * elements for factor, elements, _ in found), found[0][2]


def scheduled_loss(pred: Tensor, target: Tensor, *, losses: Sequence[Loss], shares: Sequence[Tensor | float]) -> Tensor:
    """The sum of several losses (modules) of the same input, each times its share, per element.

    >>> from detloss_plugins.losses import L1Loss, SmoothL1Loss
    >>> both = [L1Loss(), SmoothL1Loss(loss_weight=2.0)]  # a quarter of the way from 3 to 2 * 2.5
    >>> scheduled_loss(torch.tensor([3.0]), torch.tensor([0.0]), losses=both, shares=[0.75, 0.25])
    tensor([3.5000])
    """
    check_one_family(losses)
    found = (loss(pred, target, reduction_override="none") for loss in losses)
    return _added(times(of_loss, share) for of_loss, share in zip(found, shares, strict=True))


@MODELS.register_module()
class ScheduledLoss(Loss, fn=scheduled_loss):
    """One loss after the other on the same input, such as BCE for some epochs and then a ranking loss.

    Its facts are those of the losses that count now. How far training is, it is told: by our trainer in Ultralytics, by
    what mmengine's Runner keeps for everybody in MMDetection, and in a loop of your own by :func:`set_progress` at the
    start of every epoch; a warning says so if nobody tells. Iterations that nobody tells it counts by itself, one for
    each call in training. The place is a buffer, so a training that resumes goes on where it was.

    Args:
        losses: config dicts of losses of one family, or of classification and ranking losses.
        at: when each loss but the first begins, counted from 0.
        by_epoch: whether ``at`` and ``fade`` count epochs; else they count iterations (batches).
        fade: for how long from there on a loss takes over: its share rises linearly from 0 to 1, as that of the one
            before falls, and both are worked out. Two of one type and another ``loss_weight`` are a weight that moves.
        use_sigmoid: may be given because mmdet's heads read it from the config; it must fit the parts.

    Raises:
        ValueError: if the settings do not fit one another, or the losses one head.
    """

    can_be_part = False
    facts = ClassificationLoss.facts.but(  # of the example
        row_wise=True,
        filled=("losses", "shares"),
        example={"losses": [{"type": "SlideLoss"}, {"type": "FocalLoss", "loss_weight": 2.0}], "at": [1]},
    )

    def __init__(
        self,
        *,
        losses: Parts = (),  # type: ignore[assignment]
        at: Increasing = (),  # type: ignore[assignment]
        by_epoch: bool = True,
        fade: NonNegative = 0.0,
        use_sigmoid: bool | None = None,
        **settings,
    ):
        super().__init__(**settings)
        self.losses: Any = torch.nn.ModuleList(build_loss(cfg) for cfg in losses)
        self.at, self.by_epoch, self.fade = list(at), by_epoch, fade
        if not self.losses or len(self.at) != len(self.losses) - 1:
            raise ValueError(
                f"at of ScheduledLoss must say when each loss but the first begins: {len(self.losses)} losses do not "
                f"go with at={self.at}."
            )
        if any(later - earlier < self.fade for earlier, later in pairwise(self.at)):
            raise ValueError(f"fade of ScheduledLoss must not be longer than the losses last, which begin {self.at}.")
        families = {loss.family for loss in self.losses}
        if len(families) > 1 and families != {"classification", "ranking"}:
            raise ValueError(
                f"losses of ScheduledLoss must be of one family, or classification and ranking losses, not {families}."
            )
        _check_use(self, use_sigmoid)
        if "classification" in families and len({loss.use_sigmoid for loss in self.losses}) > 1:
            raise ValueError("losses of ScheduledLoss must have one use_sigmoid, as a head keeps its channels.")
        for loss in self.losses:
            loss.compiled = loss.compiled or self.compiled  # each has a kernel of its own, for all shares
        self.told = self.warned = False
        self.register_buffer("progress", torch.tensor(-1.0))  # before the first iteration
        self.move(-1)

    def move(self, now: float) -> None:
        """Go to an epoch or iteration."""
        self.progress.fill_(now)
        self.now = now
        last = bisect_right(self.at, now)
        first = last - 1 if last and now < self.at[last - 1] + self.fade else last
        self.running = tuple(range(first, last + 1))
        losses = [self.losses[i] for i in self.running]
        facts = facts_of_sum(losses) if len(losses) > 1 else losses[0].facts.but(paper="", upstream=())
        self.facts = facts.but(family="ranking" if "ranking" in {loss.family for loss in losses} else facts.family)

    def tell(self, now: float | None, end: float | None = None) -> None:
        """Take the epoch or iteration, and say if training ends before the last loss begins."""
        if now is not None and now != self.now:
            self.move(now)
        if end is not None and not self.warned and self.at and self.at[-1] >= end:
            unit = "epoch" if self.by_epoch else "iteration"
            self.warn(f"The last loss of a ScheduledLoss begins at {unit} {self.at[-1]:g}, and training has {end:g}.")

    def warn(self, sentence: str) -> None:
        """Warn once."""
        self.warned = True
        warnings.warn(sentence, stacklevel=2)

    @outside_graph  # it changes from call to call
    def advance(self) -> None:
        """Ask mmengine's Runner if one is training, else count a call."""
        if (found := runner_progress("epoch" if self.by_epoch else "iter")) is not None:
            self.tell(*found)
        elif not self.by_epoch:
            self.move(self.now + 1)
        elif not self.warned:
            self.warn(
                f"Nobody tells a ScheduledLoss the epoch, so it stays at {max(self.now, 0):g}: call "
                "detloss_plugins.losses.set_progress(model, epoch=epoch) at the start of each, or let it count "
                "iterations, by_epoch=False."
            )

    def in_turn(self) -> list[tuple[Loss, Tensor | float]]:
        """The losses that count in this call, and the share of each; in training, a call moves on what is counted."""
        if self.learning and not self.told:
            self.advance()
        last = self.losses[self.running[-1]]
        if len(self.running) == 1:
            return [(last, 1.0)]
        share = ((self.progress - self.at[self.running[0]]) / self.fade).clamp(0, 1)
        return [(self.losses[self.running[0]], 1 - share), (last, share)]

    def reduced(self, pred, target, weight, avg_factor, reduction, factor):
        """The sum of the losses in turn, each called with the same arguments."""
        reduction = self.reduction if reduction is None else reduction
        parts = self.in_turn()
        if reduction == "none":
            check_one_family([loss for loss, _ in parts])
        pred = pred if len(parts) == 1 else float32(pred)  # so that half-precision gradients are not added up
        found = (times(loss(pred, target, weight, avg_factor, reduction), share) for loss, share in parts)
        return times(_added(found), factor)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.move(self.progress.item())


def in_turn(loss: Loss) -> list[tuple[Loss, Tensor | float]]:
    """The losses that a call would use, and the share of each: those of a :class:`ScheduledLoss`, or the loss itself.

    The ``loss_weight`` of the ScheduledLoss is in the shares.
    """
    if type(loss) is not ScheduledLoss:
        return [(loss, 1.0)]
    return [(part, share * loss.loss_weight) for part, share in loss.in_turn()]


def set_progress(
    module: torch.nn.Module, *, epoch: float | None = None, iteration: float | None = None, epochs: float | None = None
) -> None:
    """Tell every :class:`ScheduledLoss` in a module the epoch, the iteration or both, counted from 0.

    Told how many ``epochs`` there are, one whose last loss begins later warns.

    >>> loss = ScheduledLoss(losses=[{"type": "L1Loss"}, {"type": "MSELoss"}], at=[5])
    >>> set_progress(loss, epoch=5)
    >>> loss(torch.tensor([3.0]), torch.tensor([0.0]))  # squared now
    tensor(9.)
    """
    for part in module.modules():
        if type(part) is ScheduledLoss:
            now, end = (epoch, epochs) if part.by_epoch else (iteration, None)
            part.told = part.told or now is not None
            part.tell(now, end)


def confidence_weighted_loss(
    pred: Tensor,
    target: Tensor,
    *,
    power: NonNegative = 2.0,
    use_sigmoid: bool = True,
    activated: bool = False,
    elements: Tensor,
) -> Tensor:
    """``(1 - Q_fg)^power Q_bg``, a constant of the row, times per-element losses, ``(..., C)`` or ``(...)``.

    Q_fg and Q_bg are the confidences that the row of logits ``(..., C)``, or of probabilities if ``activated``, is an
    object or background. With ``use_sigmoid`` they are the largest class probability and one minus it; else the largest
    of the classes in the softmax, and the background, which is last.

    >>> logit = torch.tensor([[0.5]]).logit()  # (1 - 1/2)^2 * 1/2 * ln 2
    >>> confidence_weighted_loss(logit, torch.ones(1, 1), elements=torch.tensor([[2.0]]).log())
    tensor([[0.0866]])
    """
    scores = float32(pred).detach()
    if not activated:
        scores = scores.sigmoid() if use_sigmoid else scores.softmax(-1)
    foreground = scores if use_sigmoid else scores[..., :-1]
    q_fg = foreground.amax(-1) if foreground.shape[-1] else scores.new_zeros(scores.shape[:-1])
    weight = confidence_weight(q_fg, 1 - q_fg if use_sigmoid else scores[..., -1], power)
    return apply_weight(elements, weight)


@MODELS.register_module()
class ConfidenceWeightedLoss(
    OverBase,
    fn=confidence_weighted_loss,
    row_wise=True,
    true_gradient=False,
    filled=("use_sigmoid", "activated", "elements"),
):
    """A classification loss weighted by how sure the model is that a sample is background.

    The weight comes from an article on the losses of SSD; no paper is known. It is not focal loss: it favours whatever
    is confidently background, positives that the model misses among them.

    Args:
        base: config of a classification loss (of a JointLoss, parts that are alike), else a ``ValueError``; binary
            cross entropy if it is not given.
        use_sigmoid: may be given because mmdet's heads read it from the config; it must fit the base.
    """

    sigmoid_only = False

    def __init__(self, *, base: Mapping | None = None, use_sigmoid: bool | None = None, **settings):
        part = build_part({"type": "BinaryCrossEntropyLoss"} if base is None else base)
        of_masks = any(getattr(inner, "use_mask", False) for inner in part.modules())
        if part.family != "classification" or of_masks:
            raise ValueError(f"base of ConfidenceWeightedLoss must be a classification loss of classes, not {part}.")
        super().__init__(use_sigmoid=part.use_sigmoid, **settings)
        check_use_sigmoid(self, use_sigmoid)
        self.of_probabilities = takes_probabilities(part)
        # What a sigmoid loss has beyond them is the background's column.
        self.classes = min((x.num_classes for x in part.modules() if hasattr(x, "num_classes")), default=None)
        self.take(part)

    def unweighted(self, pred, target, seen):
        elements, valid = self.of_base(pred, target, seen)
        pred = pred[..., : self.classes] if self.use_sigmoid else pred
        given = {"use_sigmoid": self.use_sigmoid, "activated": self.of_probabilities, "elements": elements}
        return self.fn(pred, elements, **self.settings, **given), valid
