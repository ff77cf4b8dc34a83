"""Figures of a few panels, and how they are saved."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detloss_plugins.cli._plot.panels import GREY, Panel, panels_of
from detloss_plugins.loss import Loss

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "detloss_plugins",
    "font.sans-serif": ["DejaVu Sans"],  # an SVG repeats the whole list at every word
    "font.size": 8,
    "axes.titlesize": 8,
}


def figure(loss: Loss, title: str = "") -> Any:
    """A matplotlib figure of a loss: the panels of its family.

    Raises:
        ValueError: if its family is none of ours.
    """
    found = _figure(loss, panels_of(loss), columns=2, size=(3.6, 2.7))
    if title:
        found.suptitle(title, color=GREY)
    return found


def panel_figures(loss: Loss, more: Sequence[Panel] = ()) -> Iterator[Any]:
    """The panels of :func:`figure`, and more of them, each as a figure of its own."""
    for panel in (*panels_of(loss), *more):
        yield _figure(loss, [panel], columns=1, size=(3.6, 2.7))


def thumbnail(loss: Loss) -> Any:
    """The first panel alone, small and without words."""
    found = _figure(loss, panels_of(loss)[:1], columns=1, size=(1.9, 1.4))
    for axes in found.axes:
        axes.set(title="", xlabel="", ylabel="", xticks=[], yticks=[])
        if axes.get_legend():
            axes.get_legend().remove()
    return found


def _figure(loss, panels, columns, size):
    import matplotlib
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        found = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained", facecolor="none")
        grid = found.subplots(rows, columns, squeeze=False).flatten()
        for axes, panel in zip(grid, panels, strict=False):
            panel(axes, loss)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
    return found


def save(drawn: Any, path: Path) -> None:
    """Write a figure as SVG (small, and equal for equal figures) or whatever the suffix says.

    Raises:
        ValueError: for a suffix that matplotlib does not know.
    """
    import matplotlib

    path = Path(path)
    with matplotlib.rc_context(STYLE):
        if path.suffix != ".svg":
            drawn.savefig(path, dpi=150)
            return
        drawn.savefig(path, metadata={"Date": None})
    path.write_text(_smaller(path.read_text(encoding="utf-8")), encoding="utf-8")


def _smaller(svg):
    """An SVG of matplotlib's at half its size: a tenth of a point is enough, and it needs no comments and names."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<!DOCTYPE.*?>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\d+\.\d{2,}", lambda n: f"{float(n[0]):.1f}".removesuffix(".0"), svg)
    svg = re.sub(r'd="[^"C]*"', lambda path: re.sub(r"\s*L ", " ", path[0]), svg)  # lines follow a move unnamed
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w-]+)"', lambda name: name[0] if name[1] in used else "", svg)
    return re.sub(r"\s*\n\s*", lambda gap: "\n" if svg[gap.start() - 1] == ">" else " ", svg)
