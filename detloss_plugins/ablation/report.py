"""The report of an ablation, from the content of ``results.json``."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from detloss_plugins.ablation import pictures
from detloss_plugins.ablation.compare import (
    BETTER,
    FEWEST,
    JUDGED,
    WORSE,
    Difference,
    Row,
    Spread,
    groups,
    merged,
    pooled,
    table,
)
from detloss_plugins.ablation.files import read_json, write_json, write_whole
from detloss_plugins.ablation.page import Page

RESULTS = "results.json"
# Metric -> the head of its column, in the second table.
DETAILS = {
    "AP50_test": "AP50 (test)",
    "AP_test": "AP (test)",
    "AP75": "AP75",
    "AP_small": "small (COCO)",
    "AP_medium": "medium (COCO)",
    "AP_large": "large (COCO)",
    "AP_first_third": "smallest third",
    "AP_second_third": "middle third",
    "AP_last_third": "largest third",
    "calibration_error": "calibration error",
    "seconds_per_epoch": "seconds per epoch",
}
# What every run of a results file has.
OF_A_RUN = {
    "label": str,
    "slot": str,
    "losses": dict,
    "model": str,
    "data": str,
    "epochs": int,
    "seed": int,
    "metrics": dict,
    "per_class": dict,
    "curve": dict,
}
METHOD = """\
AP50, AP and AP75 are those of Ultralytics' own final validation, of `best.pt`, the epoch that was best on the \
validation set: all are a little flattered by that choice, stock and others alike; those of a test set, where the data \
have one, are not. For MMDetection they are those of CocoMetric, of the last epoch. The spread is the standard \
deviation over the seeds. A difference is paired: of the same seed with the stock losses, then the mean over the \
seeds; behind it are Student's 95 % interval and, after "boot.", the percentile bootstrap over the seeds. The verdict \
goes by Student's interval: with three seeds the bootstrap is no more than the lowest and the highest of three \
differences, and too narrow. Fewer than 3 seeds have no verdict. Three seeds make a wide interval, though, so all \
losses of a table are also judged at once: their means by the standard deviation pooled over the table, which is taken \
to be the same for all, with Bonferroni's correction for their number."""
SIZES = """\
COCO's sizes are areas below 32², below 96² and above, in pixels of the image; the thirds part the objects of the \
validation set by area. The calibration error is the mean distance between score and share of correct detections (an \
object of the class at an IoU of 0.5), over 10 bins of the scores above 0.05; lower is better. Seconds are of the \
machine as it was, maybe with other trainings beside."""


def read_results(path: str | Path) -> dict:
    """The content of a results file, or of that in a folder, or what has finished in the folder of a :class:`Study`.

    Raises:
        ValueError: if there is none.
    """
    path = Path(path)
    if any(path.glob("runs/*/run.json")):  # not of Ultralytics' own runs/detect
        from detloss_plugins.ablation.study import Study

        try:
            return Study(path).results()
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path / 'runs'} has files of another version of this package: {error}.") from error
    path = path / RESULTS if path.is_dir() else path
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"There are no results in {path}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("runs"), list):
        raise ValueError(f"There are no results in {path}.")
    for run in content["runs"]:
        if not isinstance(run, dict) or (missing := sorted(OF_A_RUN.keys() - run.keys())):
            what = f"has no {', '.join(missing)}" if isinstance(run, dict) else f"is {run!r}"
            raise ValueError(f"{path} is no file of results: a run {what}.")
        for key, kind in OF_A_RUN.items():
            if not isinstance(run[key], kind):
                raise ValueError(f"{path} is no file of results: {key} of a run is {run[key]!r}.")
        for name, value in run["metrics"].items():
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ValueError(f"{path} is no file of results: {name} of a run is {value!r}.")
    # What is said in words, and may be missing in a file that was put together by hand.
    return {"name": path.absolute().parent.name, "versions": {}, "machine": "a machine not named", **content}


def write_report(results: Sequence[Mapping], folder: str | Path) -> None:
    """Write ``report.md``, ``report.html`` and the pictures into a folder, and ``results.json`` of one result.

    Raises:
        ValueError: if the results contradict one another, or there are none.
    """
    if not results:
        raise ValueError("There are no results to report.")
    runs, folder = merged(results, strict=True), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if len(results) == 1:
        write_json(folder / RESULTS, results[0])
    page = Page(", ".join(dict.fromkeys(str(result["name"]) for result in results)), folder)
    page.text(summary(results, runs))
    for (data, model, epochs), own in groups(runs).items():
        add_group(page, f"{data}, {model}, {count(epochs, 'epoch')}", table(own))
    failed = [part for result in results for part in result.get("failed", [])]
    if failed:
        page.heading("Failed")
        page.table(["training", "error"], [[part["run"], part["error"]] for part in failed])
    page.heading("How it was measured")
    page.text(METHOD)
    page.text(SIZES)
    page.text(chance(runs))
    write_whole(folder / "report.md", page.markdown())
    write_whole(folder / "report.html", page.html())


def summary(results, runs):
    """What was trained, where and with what."""
    machines = "; ".join(dict.fromkeys(result["machine"] for result in results))
    versions = dict.fromkeys(f"{name} {v}" for result in results for name, v in result["versions"].items())
    failed = sum(len(result.get("failed", [])) for result in results)
    resumed = sum(bool(run.get("resumed")) for run in runs)
    where = f" on {machines}" if machines else ""  # of a study whose first training has not finished, nothing is known
    text = f"{count(len(runs), 'training')}{where}{', with ' if versions else ''}{', '.join(versions)}."
    if failed:
        text += f" {failed} failed, see below."
    if unfinished := sum(len(result.get("unfinished", [])) for result in results):
        text += f" {unfinished} not finished."
    if resumed:
        text += f" {resumed} were cut off and went on from their last checkpoint, which is not quite the same training."
    return text


def chance(runs):
    """How many verdicts would come by chance."""
    judged = [row for own in groups(runs).values() for row in table(own) if row.differences]
    number = sum(row.differences[JUDGED[0]].seeds >= FEWEST for row in judged)
    if not number:
        return f"No loss has the {FEWEST} seeds that a verdict takes."
    return (
        f"Of {count(number, 'comparison')} of pairs, about {number * 0.05:.1f} would come out as better or worse in "
        f"{JUDGED[0]} if no loss made a difference, and as many in {JUDGED[1]}."
    )


def at_once(rows: Sequence[Row], metric: str) -> str:
    """What the losses of a table come to when all are judged at once; nothing if too few have their seeds."""
    found = pooled(rows, metric)
    if found is None:
        return ""
    return (
        f"Seeds change {metric} by {found.deviation:.3f}, pooled over the table; judged at once, two means of {FEWEST} "
        f"seeds must be {found.least:.3f} apart: {better_and_worse(found.verdicts)}."
    )


def better_and_worse(verdicts: Mapping[str, str]) -> str:
    """The labels that are better and those that are worse.

    >>> better_and_worse({"A": "better", "B": "not distinguishable", "C": "better"})
    'better: A, C; worse: none'
    """
    labels = {word: [label for label, verdict in verdicts.items() if verdict == word] for word in (BETTER, WORSE)}
    return "; ".join(f"{word}: {', '.join(own) or 'none'}" for word, own in labels.items())


def count(number: int, word: str) -> str:
    """A number of things in words.

    >>> count(1, "epoch"), count(12, "epoch")
    ('1 epoch', '12 epochs')
    """
    return f"{number} {word}{'' if number == 1 else 's'}"


def add_group(page: Page, title: str, rows: Sequence[Row]) -> None:
    """The tables and pictures of one model, data set and number of epochs."""
    seeds = sorted({seed for row in rows for seed in row.seeds})
    page.heading(title)
    page.text(f"Seeds {', '.join(map(str, seeds))}; the best AP50 first. {outcome(rows)}")
    heads = [f"{m}{end}" for m in JUDGED for end in ("", ": difference to stock", ": verdict")]
    page.table(["losses", "slot", *heads], [[*names(row, seeds), *judged_cells(row)] for row in rows])
    for metric in JUDGED:
        if words := at_once(rows, metric):
            page.text(words)
    slug = re.sub(r"[^\w.]+", "_", title)
    if any(row.differences for row in rows):
        file = f"pictures/{slug}-differences.png"
        pictures.differences(rows, JUDGED[0], title, page.folder / file)
        page.picture(file, f"Differences to the stock losses: {title}")
    shown = [name for name in DETAILS if any(row.spreads.get(name) for row in rows)]
    cells = [[row.label, *(in_words(row.spreads.get(name), digits(name)) for name in shown)] for row in rows]
    page.table(["losses", *(DETAILS[name] for name in shown)], cells)
    if any(value is not None for row in rows for value in row.curve):
        file = f"pictures/{slug}-curves.png"
        pictures.curves(rows, title, page.folder / file)
        page.picture(file, f"AP50 by epoch: {title}")
    page.text("AP of each class:")
    page.table(*class_table(rows))
    page.text("The losses:")
    page.table(["losses", "as a dict"], [[row.label, losses_in_words(row)] for row in rows if row.losses])


def losses_in_words(row):
    """The dict of the losses, and the weights that were found for it."""
    found = [f"{slot}: {', '.join(f'{weight:.3g}' for weight in weights)}" for slot, weights in row.weights.items()]
    return f"`{row.losses}`" + (f"; weights found, by seed: {'; '.join(found)}" if found else "")


def outcome(rows):
    """How many losses are better and worse than the stock ones in AP50."""
    verdicts = [row.differences[JUDGED[0]].verdict for row in rows if row.differences]
    if not verdicts:
        return "There is nothing beside the stock losses."
    better, worse = (verdicts.count(word) for word in (BETTER, WORSE))
    rest = len(verdicts) - better - worse
    return f"Of {len(verdicts)}, {better} better than stock in AP50, {worse} worse, {rest} not distinguishable."


def names(row, seeds):
    """The first cells of a row; a label with fewer seeds than others says so."""
    missing = "" if list(row.seeds) == seeds else f" (seeds {', '.join(map(str, row.seeds))})"
    return [row.label + missing, row.slot or "-"]


def judged_cells(row):
    """Mean, difference and verdict of each metric that is judged."""
    cells = []
    for name in JUDGED:
        found = row.differences.get(name)
        cells += [in_words(row.spreads[name]), difference_in_words(found), verdict_in_words(found)]
    return cells


def in_words(spread: Spread | None, places: int = 3) -> str:
    """Mean and deviation of a metric.

    >>> in_words(Spread(0.5, 0.01, 3)), in_words(None)
    ('0.500 ± 0.010', '-')
    """
    if spread is None:
        return "-"
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.{places}f}"
    return f"{spread.mean:.{places}f}{deviation}"


def difference_in_words(found: Difference | None) -> str:
    """The mean and both intervals of a difference.

    >>> difference_in_words(Difference(3, 0.02, (-0.005, 0.045), (0.01, 0.03), "", ""))
    '+0.020 [-0.005, +0.045], boot. [+0.010, +0.030]'
    """
    if found is None or found.mean is None:
        return "-"
    parts = [f"{found.mean:+.3f}"]
    if found.interval:
        parts[0] += " [{:+.3f}, {:+.3f}]".format(*found.interval)
        parts.append("boot. [{:+.3f}, {:+.3f}]".format(*found.bootstrap))
    return ", ".join(parts)


def verdict_in_words(found):
    """The verdict; with its reason where seeds are missing."""
    if found is None:
        return "-"
    return f"{found.verdict} ({found.reason})" if "seeds" in found.reason else found.verdict


def digits(name):
    """Places behind the point that a metric is shown with."""
    return 1 if name == "seconds_per_epoch" else 3


def class_table(rows):
    """AP by class: a line for each loss, or, of many classes, for each class."""
    classes = list(dict.fromkeys(name for row in rows for name in row.per_class))
    found = {(row.label, name): row.per_class.get(name) for row in rows for name in classes}
    cells = {key: "-" if value is None else f"{value:.3f}" for key, value in found.items()}
    if len(classes) <= 12:
        return ["losses", *classes], [[row.label, *(cells[row.label, name] for name in classes)] for row in rows]
    labels = [row.label for row in rows]
    return ["class", *labels], [[name, *(cells[label, name] for label in labels)] for name in classes]
