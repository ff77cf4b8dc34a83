"""The page and the picture of a report of ``tools/bench.py``, and whether its figures hold what was promised."""

import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cases import LOGITS, ROWS, YOLO
from command import as_table

METHOD = """\
Written by `uv run tools/bench.py --page` from what was measured, or from figures that are kept, a file a machine, with
`--from docs/speed/MACHINE.json`.

A figure is the median time of forward and backward over many rounds after a warm-up. In each round everybody has one
turn, in any order, on the same input (seed 0). Modules are built, and targets converted to the form that
each side takes by nature (class indices, label and quality, or a dense target; the table says which), before the clock
starts. *Faster* is the other's median over ours in the same run: below 1, ours is slower. *Memory* is the highest
amount beyond what was there before, the gradient included, as a multiple of the predictions, and *memory without* that
of the value alone, with gradients off. *Kernels* are, on a CPU, the operators that do work and the loops that the
compiler made; on a GPU, all that was launched there. *Bandwidth* is
the time of a copy of as many bytes as must move at least (predictions and target read, gradient written) over the
median, on a GPU over the time that the kernels ran. A loss with nobody beside it is timed at one size.
"""
NEAR = 0.05  # how far two runs of the same differ
COLUMNS = (
    "",
    "ms (quartiles)",
    "memory",
    "memory without",
    "kernels",
    "bandwidth",
    "eager faster",
    "compiled faster",
)


def ratios(rows):
    """``(row, mode, how many times faster ours is)`` of all counterparts in a report's rows."""
    return [(row, mode, ratio) for row in rows for mode, ratio in row.get("faster", {}).items() if is_twin(row)]


def is_twin(row):
    """Whether a row is that of an upstream counterpart: the others have no dotted path."""
    return "." in row["who"]


def package(row):
    """The package of a counterpart."""
    return row["who"].split(".")[0]


class Bar(NamedTuple):
    """A promise about the rows of a report."""

    words: str
    figures: Callable  # rows -> [(where, figure), ...]
    bound: float
    least: bool = True  # False: the figures must be at most the bound

    def check(self, rows):
        """The verdict, and the worst figure with where it is."""
        found = self.figures(rows)
        if not found:
            return {"bar": self.words, "verdict": "NOT MEASURED", "figure": "no such rows"}
        where, worst = (min if self.least else max)(found, key=lambda pair: pair[1])
        missed = [pair for pair in found if (pair[1] < self.bound if self.least else pair[1] > self.bound)]
        near = sum(abs(figure / self.bound - 1) < NEAR for _, figure in missed)
        figure = f"worst {worst:.2f} ({where}); {len(found) - len(missed)} of {len(found)} hold"
        figure += f", {near} more but for 5 %" if near else ""
        return {"bar": self.words, "verdict": "MISSED" if missed else "HOLDS", "figure": figure}


def place(row):
    """Where a figure was taken, in words."""
    name = f"{row['loss']}({row['settings']})" if row["settings"] else row["loss"]
    return f"{name}, {row['case']}, {row['dtype']}, {row['device']}"


def faster(mode, losses=None, cases=None, packages=None, family=None, device=None):
    """The ratios of some rows; None: of all."""

    def figures(rows):
        wanted = {"losses": losses, "cases": cases, "packages": packages}
        return [
            (f"{place(row)}, {row['who']}", ratio)
            for row, of, ratio in ratios(rows)
            if of == mode
            and family in (None, row["family"])
            and device in (None, row["device"])
            and all(
                allowed is None or value in allowed
                for allowed, value in zip(wanted.values(), (row["loss"], row["case"], package(row)), strict=True)
            )
        ]

    return figures


def times_theirs(*args, **kwargs):
    """How many times a counterpart's time ours is, of some rows."""
    figures = faster(*args, **kwargs)
    return lambda rows: [(where, 1 / ratio) for where, ratio in figures(rows)]


def of_ours(key, modes, cases=None, families=("classification",), device=None, losses=None):
    """A figure of some of our own rows."""
    return lambda rows: [
        (f"{place(row)}, {row['who']}", row[key])
        for row in rows
        if row["who"] in {f"ours {mode}" for mode in modes}
        and key in row
        and row["family"] in families
        and (cases is None or row["case"] in cases)
        and (losses is None or row["loss"] in losses)
        and device in (None, row["device"])
    ]


DENSE = ("FocalLoss", "QualityFocalLoss", "VarifocalLoss", "BinaryCrossEntropyLoss")
# Of EIoU, mmdet's and Ultralytics' have none; mmdet's loss of that name is our ExtendedIoULoss.
BOXES = ("CIoULoss", "GIoULoss", "DIoULoss", "EfficientIoULoss", "ExtendedIoULoss", "SIoULoss")
LARGE_LOGITS = tuple(case.name for case in LOGITS[1:])
FROM_10K = tuple(case.name for case in ROWS[1:])
EVERY_MODE = ("eager", "compiled")
BARS = (
    Bar(
        "compiled focal, QFL, VFL, BCE on YOLO's and RetinaNet's logits: 5 times faster than mmdet's",
        faster("compiled", DENSE, LARGE_LOGITS, ("mmdet",), device="cpu"),
        5,
    ),
    Bar(
        "compiled CIoU, GIoU, DIoU, EIoU, SIoU from 10k boxes on: 3.5 times faster than mmdet's",
        faster("compiled", BOXES, FROM_10K, ("mmdet",), device="cpu"),
        3.5,
    ),
    Bar(
        "the same: 2.2 times faster than Ultralytics'",
        faster("compiled", BOXES, FROM_10K, ("ultralytics",), device="cpu"),
        2.2,
    ),
    Bar(
        "eager, from 10k boxes on and on YOLO's logits: at most 1.25 times the time of the fastest counterpart",
        times_theirs("eager", None, (*FROM_10K, YOLO), device="cpu"),
        1.25,
        least=False,
    ),
    Bar(
        "eager losses of dense logits: 1.3 times faster than mmdet's",
        faster("eager", None, LARGE_LOGITS, ("mmdet",), "classification", device="cpu"),
        1.3,
    ),
    Bar(
        "peak memory of losses of dense logits: at most 3 times the logits",
        of_ours("of_pred", EVERY_MODE, LARGE_LOGITS),
        3,
        least=False,
    ),
    Bar(
        "the same without gradients: at most 2 times the logits",
        of_ours("of_pred_without", EVERY_MODE, LARGE_LOGITS),
        2,
        least=False,
    ),
    Bar(
        "GPU: compiled focal loss of YOLO's and RetinaNet's logits: at most 0.6 times mmdet's time",
        times_theirs("compiled", ("FocalLoss",), LARGE_LOGITS, ("mmdet",), device="cuda"),
        0.6,
        least=False,
    ),
    Bar(
        "GPU: compiled CIoU of 1k to 1M boxes: at most 0.25 times mmdet's time",
        times_theirs("compiled", ("CIoULoss",), None, ("mmdet",), device="cuda"),
        0.25,
        least=False,
    ),
    Bar(
        "GPU: compiled CIoU of 1M boxes: at most 0.1 ms on the device",
        of_ours("device_ms", ("compiled",), ("1M",), ("box",), "cuda", ("CIoULoss",)),
        0.1,
        least=False,
    ),
    Bar(
        "GPU: at most 5 kernels of a compiled box or dense loss",
        of_ours("kernels", ("compiled",), families=("box", "classification"), device="cuda"),
        5,
        least=False,
    ),
)


def check_bars(rows):
    """One dict for each promise: "HOLDS", "MISSED" or "NOT MEASURED", with the worst figure."""
    return [bar.check(rows) for bar in BARS]


def number(value):
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def contest_of(row):
    """What the rows of one contest have in common."""
    return tuple(row[key] for key in ("loss", "settings", "form", "case", "dtype", "device"))


def who(row):
    """A row's first cell."""
    name = f"`{row['who']}`" if is_twin(row) else row["who"]
    return name + (f" ({row['theirs']})" if row["theirs"] else "") + (f": {row['note']}" if row.get("note") else "")


def line(row):
    """A row of a family's table."""
    if "error" in row:
        return (who(row), row["error"].replace("|", "\\|"), *[""] * (len(COLUMNS) - 2))
    ratio = row.get("faster", {})
    return (
        who(row),
        f"{number(row['ms'])} ({number(row['low'])} to {number(row['high'])})",
        f"{row['of_pred']:.1f}",
        f"{row['of_pred_without']:.1f}",
        str(row["kernels"]),
        f"{100 * row['bandwidth']:.0f} %",
        *(f"{ratio[mode]:.2f}" if mode in ratio else "" for mode in ("eager", "compiled")),
    )


def title(contest):
    """A contest in words."""
    loss, settings, form, case, dtype, device = contest
    name = f"`{loss}`" + (f" ({settings})" if settings else "")
    return ", ".join(filter(None, (name, f"{form} target" if form else "", case, dtype, device)))


def family_tables(rows):
    """A section for each family: its contests one after the other in one table."""
    families = defaultdict(lambda: defaultdict(list))
    for row in rows:
        families[row["family"]][contest_of(row)].append(row)
    for family, found in families.items():
        lines = []
        for contest, members in found.items():
            lines.append((f"**{title(contest)}**", *[""] * (len(COLUMNS) - 1)))
            lines += map(line, members)
        yield f"## {family[0].upper()}{family[1:]}\n\n{as_table(COLUMNS, lines)}"


def slower(rows):
    """The section of the losing cases."""
    lost = sorted((found for found in ratios(rows) if found[2] < 1), key=lambda found: found[2])
    if not lost:
        return "None."
    lines = [
        (
            title(contest_of(row)),
            mode,
            f"`{row['who']}`",
            f"{number(row['ms'] / ratio)}",
            number(row["ms"]),
            f"{ratio:.2f}",
        )
        for row, mode, ratio in lost
    ]
    return as_table(("loss", "ours", "beside", "ours, ms", "theirs, ms", "faster"), lines)


def machine_in_words(machine):
    """What the figures were taken on."""
    devices = ", ".join(machine["device"].values())
    versions = ", ".join(
        f"{name} {machine[name]}"
        for name in ("python", "torch", "torchvision", "mmdet", "mmcv", "ultralytics")
        if machine.get(name)
    )
    size = f"{machine['cores']} cores, {machine['threads']} threads"
    return f"{devices}; {size}; {versions}; {machine['system']}; {machine['date']}."


def page(report, picture=None):
    """The whole page as Markdown; ``picture`` is its address."""
    rows = report["rows"]
    bars = [(bar["bar"], bar["verdict"].lower(), bar["figure"]) for bar in check_bars(rows)]
    parts = ["# Speed", METHOD.strip(), f"Machine: {machine_in_words(report['machine'])}"]
    if picture:
        parts.append(f"![How many times faster our losses are than each counterpart]({picture})")
    parts += ["## What was aimed at", as_table(("bar", "verdict", "figure"), bars)]
    parts += ["## Where ours is slower", slower(rows), *family_tables(rows)]
    return "\n\n".join(parts) + "\n"


def write_page(report, file, picture=None):
    """Write the page; the picture's address is relative to it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    address = picture and Path(os.path.relpath(picture, file.parent)).as_posix()
    file.write_text(page(report, address), encoding="utf-8")


def write_picture(report, file):
    """Draw, for each loss, how many times faster ours is than each counterpart: a point for each size and mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = ratios(report["rows"])
    losses = list(dict.fromkeys(row["loss"] for row, _, _ in found))[::-1]
    packages = sorted({package(row) for row, _, _ in found})
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.32 * len(losses)), layout="constrained")
    shapes = {"eager": {"marker": "o", "facecolors": "none"}, "compiled": {"marker": "o"}}
    for number, name in enumerate(packages):
        for mode, style in shapes.items():
            points = [
                (ratio, losses.index(row["loss"])) for row, of, ratio in found if (of, package(row)) == (mode, name)
            ]
            shift = 0.6 * ((number + 0.5) / len(packages) - 0.5)
            x, y = [ratio for ratio, _ in points], [place - shift for _, place in points]
            colour = {"edgecolors": f"C{number}"} | ({} if mode == "eager" else {"color": f"C{number}"})
            axes.scatter(x, y, s=16, label=f"{name}, ours {mode}", linewidths=0.9, **style, **colour)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(losses)), losses)
    axes.set_ylim(-0.7, max(len(losses), 1) - 0.3)
    axes.grid(axis="both", alpha=0.3)
    axes.set_xlabel(
        "times faster than the counterpart, forward and backward (left of 1: slower); one point a size and dtype"
    )
    if found:
        figure.legend(loc="outside lower center", ncols=len(packages), fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)
