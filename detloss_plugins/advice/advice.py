"""Which losses of the study are worth an ablation on a data set."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import yaml

from detloss_plugins.ablation.compare import BETTER, JUDGED, STOCK, WORSE, Row, groups, merged, pooled, table
from detloss_plugins.ablation.mmdetection import is_config
from detloss_plugins.advice.describe import Description
from detloss_plugins.advice.rules import scenarios
from detloss_plugins.study import studies

__all__ = ["Advice", "Choice", "advise"]

MOST = 3
METRIC = "AP"  # that the rows are ordered by
# What the study calls the data of a scenario; of the others, "digits:" and their name.
DATA = {"plain": "digits", "trees": "trees"}


@dataclass(frozen=True)
class Choice:
    """A row of the study, and where it stands there."""

    scenario: str
    data: str
    model: str
    epochs: int
    row: Row
    noise: float | None  # the stock losses' standard deviation of AP over the seeds, there
    at_once: Mapping[str, str]  # metric -> verdict, of all losses of that table judged at once
    others: Sequence["Choice"] = ()  # the same loss on the same data, with other models or epochs

    @property
    def better(self) -> bool:
        """Whether the study says so: better in AP or AP50, and worse in neither."""
        return not self.worse and any(found.verdict == BETTER for found in self.row.differences.values())

    @property
    def worse(self) -> bool:
        """Whether it is worse in AP or AP50."""
        return any(found.verdict == WORSE for found in self.row.differences.values())

    def mean(self, metric: str = METRIC) -> float:
        """The mean difference to the stock losses, over all its models too; minus infinity if no seed has both."""
        found = [one.row.differences[metric].mean for one in (self, *self.others)]
        return fmean(known) if (known := [mean for mean in found if mean is not None]) else float("-inf")

    @property
    def as_yaml(self) -> str:
        """The losses as a dict, in YAML and one line."""
        losses = {slot: {"type": loss["type"], **loss} for slot, loss in self.row.losses.items()}
        return yaml.safe_dump(losses, default_flow_style=True, sort_keys=False, width=10**6).strip()


@dataclass(frozen=True)
class Advice:
    """What to try.

    Attributes:
        scenarios: what the data set is like, and why; the first is what matters most.
        unknown: those of them on which the study has nothing.
        choices: at most three, the first to try first. None is better than the stock losses unless it says so.
        tried: the losses that the study has on such data, beside the stock ones.
    """

    scenarios: Mapping[str, str]
    unknown: Sequence[str]
    choices: Sequence[Choice]
    tried: int

    @property
    def any_better(self) -> bool:
        """Whether the study has a row that is better than the stock losses."""
        return any(choice.better for choice in self.choices)

    def command(self, data: str, model: str = "yolov8n.yaml") -> str:
        """The line that tries the choices beside the stock losses, for a shell."""
        losses = [f"{choice.row.label}={choice.as_yaml}" for choice in self.choices]
        return shlex.join(["detloss", "ablate", *losses, "--data", data, "--model", model])


def candidates(runs: Iterable[Mapping], scenario: str) -> list[Choice]:
    """The study's losses of YOLOs on the data of a scenario, beside the stock losses of the same model and epochs."""
    data = DATA.get(scenario, f"digits:{scenario}")
    found = []
    for (name, model, epochs), own in groups(runs).items():
        rows = table(own) if name == data and not is_config(model) else []
        stock = [row.spreads[METRIC] for row in rows if row.label == STOCK]
        noise = stock[0].deviation if stock and stock[0] else None
        together = {metric: judged.verdicts for metric in JUDGED if rows and (judged := pooled(rows, metric))}
        for row in rows:
            if row.differences:
                at_once = {metric: of[row.label] for metric, of in together.items() if row.label in of}
                found.append(Choice(scenario, name, model, epochs, row, noise, at_once))
    return found


def advise(
    found: Description, studied: Sequence[Mapping] | None = None, likeness: Mapping[str, str] | None = None
) -> Advice:
    """The losses of the study worth trying on a data set: those that are better on data like it, the best first.

    If there are fewer than three, those follow that are neither better nor worse, by their mean difference if it is
    above 0. A loss that has rows on several of the scenarios is judged by those on the first of them; one that is worse
    on any of them is left out.

    Args:
        found: the data set.
        studied: results of ``detloss ablate``; those of the package by default.
        likeness: the scenarios and why, in place of those that the rules give.
    """
    like = dict(scenarios(found) if likeness is None else likeness)
    runs = merged(studies() if studied is None else studied)
    of = {scenario: candidates(runs, scenario) for scenario in like}
    best: dict[str, Choice] = {}
    for choices in of.values():
        for choice in one_a_label(choices):
            best.setdefault(choice.row.label, choice)
    worse = {choice.row.label for choices in of.values() for choice in choices if choice.worse}
    pool = [choice for label, choice in best.items() if label not in worse]
    good = [choice for choice in pool if choice.better]
    rest = [choice for choice in pool if not choice.better and choice.mean() > 0]
    unknown = [scenario for scenario, choices in of.items() if not choices]
    return Advice(like, unknown, [*good, *rest][:MOST], len(best))


def one_a_label(choices: Iterable[Choice]) -> list[Choice]:
    """The best choice of each label, with its others; the labels with the largest mean first."""
    labels: dict[str, list[Choice]] = {}
    for choice in sorted(choices, key=lambda one: (not one.better, -one.mean())):
        labels.setdefault(choice.row.label, []).append(choice)
    return sorted(
        (replace(first, others=others) for first, *others in labels.values()), key=lambda choice: -choice.mean()
    )
