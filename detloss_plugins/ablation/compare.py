"""Losses beside the stock ones: mean and spread over the seeds, paired differences, and what may be concluded.

Everything here is a pure function of the runs of ``results.json``.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

STOCK = "stock"
JUDGED = ("AP50", "AP")
LEVEL = 0.95
FEWEST = 3  # seeds, for a verdict
ALL_RESAMPLES = 50_000  # up to so many, every resample is taken
DRAWN = 10_000  # else so many are drawn
BETTER, WORSE, NEITHER = "better", "worse", "not distinguishable"


def t_interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of the mean of paired differences, which takes them to be normal.

    Args:
        differences: at least two.
        level: the confidence.

    >>> low, high = t_interval([0.01, 0.02, 0.03])  # 0.02 -+ 4.3027 x 0.01 / sqrt(3)
    >>> round(low, 5), round(high, 5)
    (-0.00484, 0.04484)
    """
    from scipy.stats import t

    n, mean = len(differences), statistics.fmean(differences)
    half = float(t.ppf((1 + level) / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return mean - half, mean + half


def bootstrap_interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of paired differences over the seeds.

    All ``n ** n`` resamples are taken where these are few, so up to six seeds; else ``DRAWN`` are drawn. Of three seeds
    it is the range from the lowest to the highest difference, which holds the mean far less often than ``level`` says.

    >>> bootstrap_interval([0.0, 1.0])  # means 0, 1/2, 1/2, 1
    (0.0, 1.0)
    """
    values, n = np.asarray(differences, dtype=float), len(differences)
    if n**n <= ALL_RESAMPLES:
        means = [sum(resample) / n for resample in itertools.product(values.tolist(), repeat=n)]
    else:
        means = values[np.random.default_rng(0).integers(0, n, (DRAWN, n))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """A loss minus the stock losses in one metric, over the seeds that both have.

    The intervals are None for fewer than two seeds; ``verdict`` is "better", "worse" or "not distinguishable", and
    ``reason`` says why.
    """

    seeds: int
    mean: float | None
    interval: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
    verdict: str
    reason: str


def difference(own: Mapping[int, float], stock: Mapping[int, float]) -> Difference:
    """Of two metrics by seed. A metric is taken to be better if it is higher.

    >>> difference({0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.3, 1: 0.39, 2: 0.5}).verdict  # 0.2, 0.21, 0.2
    'better'
    """
    seeds = sorted(own.keys() & stock.keys())
    pairs = [own[seed] - stock[seed] for seed in seeds]
    mean = statistics.fmean(pairs) if pairs else None
    if len(pairs) < 2:
        return Difference(len(pairs), mean, None, None, NEITHER, f"{len(pairs)} of {FEWEST} seeds")
    low, high = t_interval(pairs)
    verdict, reason = NEITHER, f"the {LEVEL:.0%} interval holds 0"
    if low > 0 or high < 0:
        verdict, reason = (BETTER, "above 0") if low > 0 else (WORSE, "below 0")
        reason = f"the whole {LEVEL:.0%} interval is {reason}"
    if len(pairs) < FEWEST:
        verdict, reason = NEITHER, f"{len(pairs)} of {FEWEST} seeds"
    return Difference(len(pairs), mean, (low, high), bootstrap_interval(pairs), verdict, reason)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a metric over the seeds that have it; the deviation is None for one."""

    mean: float
    deviation: float | None
    seeds: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of those values that are there; None if there are none.

    >>> spread([0.25, 0.75, 0.5, None])
    Spread(mean=0.5, deviation=0.25, seeds=3)
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class Row:
    """A loss in a group of runs of one model, data set and number of epochs.

    ``spreads`` has every metric, those of ``JUDGED`` at least, of which ``differences`` are; ``per_class`` is the mean
    AP of each class and ``curve`` the mean of AP50 by epoch. ``weights`` are those that were found where one is "auto",
    one for each seed.
    """

    label: str
    slot: str
    losses: dict
    seeds: tuple[int, ...]
    spreads: dict[str, Spread | None]
    differences: dict[str, Difference]
    per_class: dict[str, float | None]
    curve: list[float | None]
    weights: dict[str, list[float]]


@dataclass(frozen=True)
class Pooled:
    """What seeds change in one metric, over all rows of a table, and the verdicts that hold for all of them at once.

    Attributes:
        deviation: the standard deviation over the seeds, pooled.
        freedom: its degrees of freedom.
        least: the difference between two means of ``FEWEST`` seeds that is beyond chance.
        verdicts: label -> "better", "worse" or "not distinguishable", of the losses that have it of ``FEWEST`` seeds.
    """

    deviation: float
    freedom: int
    least: float
    verdicts: dict[str, str]


def pooled(rows: Sequence[Row], metric: str) -> Pooled | None:
    """All losses of a table beside the stock ones at once: Student's test of two means, corrected after Bonferroni.

    It takes the spread over the seeds to be the same for all losses, which three seeds of each cannot tell from one
    another: so many more degrees of freedom find smaller differences, and the chance that any verdict of the table is
    wrong stays below ``1 - LEVEL``. None if the stock losses or all others have the metric of fewer than ``FEWEST``
    seeds.
    """
    from scipy.stats import t

    spreads = {row.label: found for row in rows if (found := row.spreads[metric]) and found.seeds >= FEWEST}
    if STOCK not in spreads or len(spreads) < 2:
        return None
    freedom = sum(found.seeds - 1 for found in spreads.values())
    deviation = math.sqrt(sum((found.seeds - 1) * found.deviation**2 for found in spreads.values()) / freedom)
    stock = spreads.pop(STOCK)
    factor = deviation * float(t.ppf(1 - (1 - LEVEL) / 2 / len(spreads), freedom))
    verdicts = {}
    for label, found in spreads.items():
        difference, least = found.mean - stock.mean, factor * math.sqrt(1 / found.seeds + 1 / stock.seeds)
        verdicts[label] = NEITHER if abs(difference) <= least else BETTER if difference > 0 else WORSE
    return Pooled(deviation, freedom, factor * math.sqrt(2 / FEWEST), verdicts)


def groups(runs: Iterable[Mapping]) -> dict[tuple, list]:
    """Runs by ``(data, model, epochs)``, which alone can be compared."""
    found = {}
    for run in runs:
        found.setdefault((run["data"], run["model"], run["epochs"]), []).append(run)
    return dict(sorted(found.items()))


def by_seed(runs: Iterable[Mapping], metric: str) -> dict[int, float]:
    """A metric of some runs by their seed, where it is known."""
    values = {run["seed"]: run["metrics"].get(metric) for run in runs}
    return {seed: value for seed, value in values.items() if value is not None}


def table(runs: Sequence[Mapping]) -> list[Row]:
    """A row for each label of a group of runs, the best AP50 first."""
    labels = {}
    for run in runs:
        labels.setdefault(run["label"], []).append(run)
    stock = labels.get(STOCK, [])
    rows = [_row(label, own, stock) for label, own in labels.items()]
    return sorted(rows, key=lambda row: -(row.spreads["AP50"].mean if row.spreads["AP50"] else -1))


def _row(label, runs, stock):
    runs = sorted(runs, key=lambda run: run["seed"])
    metrics = dict.fromkeys((*JUDGED, *(name for run in runs for name in run["metrics"])))
    return Row(
        label=label,
        slot=runs[0]["slot"],
        losses=runs[0]["losses"],
        seeds=tuple(run["seed"] for run in runs),
        spreads={name: spread(run["metrics"].get(name) for run in runs) for name in metrics},
        differences={}
        if label == STOCK
        else {name: difference(by_seed(runs, name), by_seed(stock, name)) for name in JUDGED},
        per_class={
            name: found.mean if (found := spread(run["per_class"].get(name) for run in runs)) else None
            for name in dict.fromkeys(name for run in runs for name in run["per_class"])
        },
        curve=mean_curve([run["curve"].get("AP50") or [] for run in runs]),
        weights={
            slot: [run["weights"][slot] for run in runs if slot in run.get("weights", {})]
            for slot in dict.fromkeys(slot for run in runs for slot in run.get("weights", {}))
        },
    )


def mean_curve(curves: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The mean by epoch, as far as every curve goes; None for an epoch without validation.

    >>> mean_curve([[0.0, None, 0.5, 0.75], [0.5, None, 1.0]])
    [0.25, None, 0.75]
    """
    found = [spread(values) for values in zip(*curves, strict=False)]
    return [None if of_epoch is None else of_epoch.mean for of_epoch in found]


def merged(results: Sequence[Mapping], strict: bool = False) -> list[dict]:
    """The runs of several results, each once, the first of those of the same label, model, data set, epochs and seed.

    Raises:
        ValueError: if two of the same have other losses or, if ``strict``, other metrics, or two of the same model,
            data set and epochs were trained with other arguments.
    """
    found, losses, args = {}, {}, {}
    for run in (run for result in results for run in result["runs"]):
        key = (run["label"], run["model"], run["data"], run["epochs"])
        own = run.get("args")  # which a file that was put together by hand may not have
        if own is not None and args.setdefault(key[1:], own) != own:
            raise ValueError(f"{run['data']} with {run['model']} has {args[key[1:]]} in one and {own} in another.")
        if losses.setdefault(key, run["losses"]) != run["losses"]:
            raise ValueError(
                f"{run['label']} with {run['model']} is {losses[key]} in one and {run['losses']} in another."
            )
        kept = found.setdefault((*key, run["seed"]), run)
        if strict and any(kept["metrics"].get(name) != run["metrics"].get(name) for name in JUDGED):
            raise ValueError(
                f"{run['label']} with {run['model']} on {run['data']}, seed {run['seed']}, is in two of the results "
                "with other metrics. If these are other data of that name, or from another machine, report them one by "
                "one."
            )
    return list(found.values())
