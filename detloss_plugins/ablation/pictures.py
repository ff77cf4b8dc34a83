"""Pictures of an ablation: differences to the stock losses, and curves."""

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from detloss_plugins.ablation.compare import STOCK, Row

COLOURS = {"better": "#08702f", "worse": "#b00020", "not distinguishable": "#777777"}

COLOURS_OF_LINES = 10  # that matplotlib goes through
LINES = ("-", "--", ":", "-.")


@contextmanager
def _picture(path, width, height):
    """A figure and its axes to draw in, which is then saved; labels with dollars are no formulas in it."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure((width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Software": None})


def differences(rows: Sequence[Row], metric: str, title: str, path: Path) -> None:
    """The paired difference of each loss to the stock ones with its interval, the best on top."""
    shown = [row for row in rows if row.differences and row.differences[metric].mean is not None]
    shown.sort(key=lambda row: row.differences[metric].mean)
    with _picture(path, 8, 1.2 + 0.3 * len(shown)) as (_, axes):
        for place, row in enumerate(shown):
            found = row.differences[metric]
            colour = COLOURS[found.verdict]
            if found.interval:
                axes.plot(found.interval, [place, place], color=colour, linewidth=2)
            axes.plot(found.mean, place, "o", color=colour)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(shown)), [row.label for row in shown])
        axes.set_xlabel(f"{metric} minus that of the stock losses, mean over the seeds and 95 % interval")
        axes.set_title(title)
        axes.grid(axis="x", alpha=0.3)


def curves(rows: Sequence[Row], title: str, path: Path) -> None:
    """AP50 by epoch, the mean over the seeds; the stock losses in black."""
    with _picture(path, 9, 5) as (figure, axes):
        for number, row in enumerate(row for row in rows if any(value is not None for value in row.curve)):
            style = {"linewidth": 1.2, "linestyle": LINES[number // COLOURS_OF_LINES % len(LINES)]}
            if row.label == STOCK:
                style = {"linewidth": 2.5, "color": "black"}
            epochs, values = zip(*((e, v) for e, v in enumerate(row.curve, 1) if v is not None), strict=True)
            # A label that begins with _ would not be in the legend.
            axes.plot(epochs, values, marker=".", label=f" {row.label}", **style)
        axes.set_xlabel("epoch")
        axes.set_ylabel("AP50")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
