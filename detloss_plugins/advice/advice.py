"""Which losses of the study are worth an ablation on a data set."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from detloss_plugins.ablation.compare import BETTER, STOCK, WORSE, Row, groups, merged, table
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

    @property
    def better(self) -> bool:
        """Whether the study says so: better in AP or AP50, and worse in neither."""
        return not self.worse and any(found.verdict == BETTER for found in self.row.differences.values())

    @property
    def worse(self) -> bool:
        """Whether it is worse in AP or AP50."""
        return any(found.verdict == WORSE for found in self.row.differences.values())

    def mean(self, metric: str = METRIC) -> float:
        """The mean difference to the stock losses; minus infinity if no seed has both."""
        found = self.row.differences[metric].mean
        return float("-inf") if found is None else found

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
        found += [Choice(scenario, name, model, epochs, row, noise) for row in rows if row.differences]
    return found


def advise(
    found: Description, studied: Sequence[Mapping] | None = None, likeness: Mapping[str, str] | None = None
) -> Advice:
    """The losses of the study worth trying on a data set: those that are better on data like it, the best first.

    If there are fewer than three, those follow that are neither better nor worse, by their mean difference if it is
    above 0. A loss is named once, where it comes first.

    Args:
        found: the data set.
        studied: results of ``detloss ablate``; those of the package by default.
        likeness: the scenarios and why, in place of those that the rules give.
    """
    like = dict(scenarios(found) if likeness is None else likeness)
    runs = merged(studies() if studied is None else studied)
    of = {scenario: candidates(runs, scenario) for scenario in like}
    pool = [choice for choices in of.values() for choice in sorted(choices, key=lambda one: -one.mean())]
    good = [choice for choice in pool if choice.better]
    rest = [choice for choice in pool if not (choice.better or choice.worse) and choice.mean() > 0]
    chosen: dict[str, Choice] = {}
    for choice in (*good, *rest):
        if len(chosen) < MOST:
            chosen.setdefault(choice.row.label, choice)
    unknown = [scenario for scenario, choices in of.items() if not choices]
    return Advice(like, unknown, [*chosen.values()], len({choice.row.label for choice in pool}))
