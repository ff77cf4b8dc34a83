"""Weights with which losses move the outputs of a head as much as the stock loss does, in either framework.

The weight of a loss is worked out from gradients: the L1 norm of that of the stock loss at the outputs of the head over
that of the loss with ``loss_weight=1``, on the same batch and predictions, at some steps of a training with stock
losses. It says how hard a loss pulls, and nothing of where to. This module imports neither framework.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from detloss_plugins.adapters.curves import gradients
from detloss_plugins.loss import Loss
from detloss_plugins.registry import build_loss, registered_losses

STEPS = 100  # how long the training with stock losses is
LOOKS = 4  # at a training, at equal distances, the last at its end
FAR = 100.0  # times the default of a loss, a weight that its gradients alone do not justify
MOVES = 3.0  # times the smallest ratio, the largest of one that goes on moving
SOME, ALL = 0.9, 0.98  # of the stock gradient, and nearly all of one
STOCK = None  # in the place of a candidate's label
FACTORS = (0.5, 1.0, 2.0, 4.0)  # of a weight, in trainings that verify it


class Finished(Exception):
    """A training that has gone as far as it should."""


@dataclass(frozen=True)
class Candidate:
    """A loss to find a weight for.

    Attributes:
        label: its name in what is printed and stored.
        slot: where it is to stand, such as "cls" or "loss_bbox".
        cfg: its config, whose ``loss_weight`` is 1.
        default: the ``loss_weight`` that it has there if nobody writes one.
    """

    label: str
    slot: str
    cfg: Mapping
    default: float = 1.0


@dataclass(frozen=True)
class Suggestion:
    """The weight that suits a loss in a slot.

    Attributes:
        label, slot, default: as of the candidate.
        losses: ``{slot: config}`` with that weight, ready to train with.
        weight: the median over the steps, three digits of it; None if the loss has no gradient there.
        ratios: step -> what the weight would be by this step alone, of the steps whose batches have objects.
        positives, stock_positives: which share of the gradient falls on positive anchors, of the loss and of the stock
            one; None of a loss without one.
    """

    label: str
    slot: str
    default: float
    losses: Mapping
    weight: float | None
    ratios: Mapping[int, float]
    positives: float | None
    stock_positives: float | None

    @property
    def range(self) -> tuple[float, float] | None:
        """The smallest and the largest of the ratios."""
        return (min(self.ratios.values()), max(self.ratios.values())) if self.ratios else None

    @property
    def moves(self) -> bool:
        """Whether the ratio is not the same all along, as it is at the start of a training: the weight says little."""
        return self.range is not None and self.range[1] > MOVES * self.range[0]

    @property
    def doubt(self) -> str | None:
        """Why the weight is not to be used as it is, in words; None if nothing speaks against it."""
        far = self.weight is not None and self.weight > FAR * self.default
        words = ["the ratio has moved all along"] * self.moves + [f"more than {FAR:g} times the default"] * far
        return ", ".join(words) or None

    @property
    def focuses(self) -> bool:
        """Whether the loss leaves the negatives alone to which the stock loss gives a good part of its gradient."""
        own, stock = self.positives, self.stock_positives
        return self.weight is not None and None not in (own, stock) and own > ALL and stock < SOME

    def as_dict(self) -> dict:
        """What there is to store, as plain data."""
        ratios = {str(step): ratio for step, ratio in self.ratios.items()}
        return {**vars(self), "range": self.range and list(self.range), "ratios": ratios}


def look_steps(steps: int, looks: int = LOOKS) -> list[int]:
    """The steps, counted from 1, at which to look.

    >>> look_steps(100)
    [25, 50, 75, 100]
    >>> look_steps(3)
    [1, 2, 3]
    """
    return sorted({max(round(steps * number / looks), 1) for number in range(1, looks + 1)})


def amounts(gradient: Tensor, positive: Tensor) -> Tensor:
    """The L1 norm of a gradient ``(..., n)``, and that of its rows that are ``positive``, a mask ``(...)``: both.

    >>> amounts(torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([True, False]))
    tensor([3.5000, 3.0000])
    """
    rows = gradient.detach().float().abs().sum(-1)
    return torch.stack([rows.sum(), (rows * positive).sum()])


def amounts_at(place: Tensor, value: Tensor, positive: Tensor) -> Tensor:
    """The :func:`amounts` of the gradient that a value has at a tensor; zeros if it has none."""
    found = gradients(value, [place])
    return amounts(found[0], positive) if found else torch.zeros(2)


def losses_of(families: Iterable[str]) -> dict[str, type[Loss]]:
    """``{name: class}`` of every loss of ours of some families, without those that are made of others."""
    known = registered_losses().items()
    return {name: cls for name, cls in known if cls.facts.family in families and "losses" not in cls.facts.filled}


@dataclass
class Gradients:
    """What was found at the steps of a training: (slot, label of a candidate or STOCK) -> step -> :func:`amounts`."""

    found: dict = field(default_factory=dict)

    def add(self, step: int, slot: str, label: str | None, amount: Tensor) -> None:
        """Add what one branch or feature level has."""
        of_steps = self.found.setdefault((slot, label), {})
        of_steps[step] = of_steps.get(step, 0) + amount.cpu()

    def suggestion(self, candidate: Candidate) -> Suggestion:
        """The weight of a candidate."""
        own, stock = (self.found.get((candidate.slot, label), {}) for label in (candidate.label, STOCK))
        # A batch without objects says how hard the background pulls, and nothing of the losses' balance.
        steps = [step for step in own if step in stock and stock[step][1] > 0]
        ratios = {step: _ratio(stock[step][0], own[step][0]) for step in steps}
        ratios = {step: ratio for step, ratio in ratios.items() if ratio}
        weight = float(f"{statistics.median(ratios.values()):.3g}") if ratios else None
        cfg = {name: value for name, value in candidate.cfg.items() if name != "loss_weight"}
        cfg["loss_weight"] = candidate.default if weight is None else weight
        return Suggestion(
            candidate.label, candidate.slot, candidate.default, {candidate.slot: cfg}, weight, ratios,
            _share(own), _share(stock),
        )  # fmt: skip

    def suggestions(self, candidates: Sequence[Candidate]) -> list[Suggestion]:
        """Those of some candidates, in their order."""
        return [self.suggestion(candidate) for candidate in candidates]


class Looks:
    """Looks at a training: at some steps, 1 the first, all candidates are called; in between those that keep a state.

    A state has to see every batch to be what it is in a training.
    """

    def __init__(self, candidates, called, found, at):
        self.found, self.at = found, at
        self.each = list(zip(candidates, called, strict=True))
        self.keeps = {c.label for c in candidates if build_loss(c.cfg).state_dict()}

    def turns(self, step, slots):
        """``(slot, label, what is called)`` of a step, for some slots; for the stock loss of each STOCK and None."""
        own = [(c.slot, c.label, called) for c, called in self.each if c.slot in slots]
        if step in self.at:
            return [*((slot, STOCK, None) for slot in dict.fromkeys(slot for slot, _, _ in own)), *own]
        return [turn for turn in own if turn[1] in self.keeps]

    def add(self, step, slot, label, amount):
        """Write down what has come out, if it is a step to look at."""
        if step in self.at:
            self.found.add(step, slot, label, amount)


def _ratio(stock, own):
    """How many times as large the first is; 0 if one of them is 0 or no number."""
    ratio = float(stock) / float(own) if own else 0.0
    return ratio if math.isfinite(ratio) else 0.0


def _share(of_steps):
    """The share of the positives, over all steps."""
    total, positive = sum(of_steps.values(), torch.zeros(2)).tolist()
    return positive / total if total else None


@dataclass(frozen=True)
class Verified:
    """What short trainings with a weight, and with others around it, say.

    Attributes:
        suggestion: whose weight it is.
        epochs: of each training.
        map50: factor of the weight -> the mAP50 of each seed, the same seeds for each factor, two or more.
    """

    suggestion: Suggestion
    epochs: int
    map50: Mapping[float, Sequence[float]]

    @property
    def means(self) -> dict[float, float]:
        """The mean of each factor."""
        return {factor: statistics.fmean(values) for factor, values in self.map50.items()}

    @property
    def best(self) -> float:
        """The factor with the largest mean; of equal ones the nearest to 1."""
        return max(self.means, key=lambda factor: (self.means[factor], -abs(math.log(factor))))

    @property
    def noise(self) -> float:
        """What the difference of two factors' means has to exceed, by the spread of seeds around each mean.

        Student's 95 % interval of the spread of all factors together, for as many comparisons as one factor has with
        the others (Bonferroni): the largest of some means is above the rest by chance alone.

        >>> suggestion = Suggestion("FocalLoss", "cls", 16.0, {}, 15.0, {25: 15.0}, 1.0, 0.8)
        >>> verified = Verified(suggestion, 6, {1.0: [0.50, 0.54], 2.0: [0.60, 0.64]})
        >>> round(verified.noise, 4)  # 4.3027, of 2 degrees of freedom, * sqrt(2 / 2 * 0.0008)
        0.1217
        """
        from scipy.stats import t

        seeds, others = min(map(len, self.map50.values())), len(self.map50) - 1
        freedom = sum(len(values) - 1 for values in self.map50.values())
        error = math.sqrt(2 / seeds * statistics.fmean(map(statistics.variance, self.map50.values())))
        return float(t.ppf(1 - 0.05 / 2 / others, freedom)) * error

    @property
    def gain(self) -> float:
        """By how much the best factor is better than the weight itself; if that is the best, than the next best."""
        means = self.means
        other = means[1.0] if self.best != 1.0 else max(mean for factor, mean in means.items() if factor != 1.0)
        return means[self.best] - other

    def in_words(self) -> str:
        """What came out, in some lines."""
        suggestion, seeds = self.suggestion, min(map(len, self.map50.values()))
        lines = [f"{suggestion.label}, mAP50 after {self.epochs} epochs, mean of {seeds} seeds:"]
        for factor, values in self.map50.items():
            each = ", ".join(f"{value:.3f}" for value in values)
            lines.append(
                f"  weight {suggestion.weight * factor:.3g} (x {factor:g}): {self.means[factor]:.3f}  ({each})"
            )
        beside = "the calibrated weight" if self.best != 1.0 else "the next best"
        verdict = "more than" if self.gain > self.noise else "no more than"
        best = f"{suggestion.weight * self.best:.3g} (x {self.best:g})"
        lines.append(f"  best: {best}, {self.gain:.3f} above {beside}: {verdict} the noise of seeds, {self.noise:.3f}")
        return "\n".join(lines)

    def as_dict(self) -> dict:
        """What there is to store, as plain data."""
        return {
            "label": self.suggestion.label,
            "slot": self.suggestion.slot,
            "weight": self.suggestion.weight,
            "epochs": self.epochs,
            "mAP50": {f"{factor:g}": list(values) for factor, values in self.map50.items()},
            "best": self.best,
            "gain": self.gain,
            "noise": self.noise,
            "more_than_noise": self.gain > self.noise,
        }
