"""Write the gallery of the site: a page with a picture for every registered loss, and an index by family.

  python tools/gallery.py [--docs docs] [NAME ...]

All of it is made from the registry, the facts and the docstrings of the losses; the formulas in LaTeX are those of
docs/formulas.yaml. A picture that is newer than the package's sources is not drawn again.
"""

import argparse
import functools
import inspect
import re
import sys
from pathlib import Path

import playground
import simulate
import torch
import yaml
from docstrings import as_markdown

from detloss_plugins.cli import _facts, _plot
from detloss_plugins.registry import SCOPE, registered_losses

ROOT = Path(__file__).parents[1]
CENTERS = 6  # of the simulation: 6 * 343 anchors
# Other losses' curves, in grey, to compare with.
BESIDE = ("{type: IoULoss, mode: linear}", "GIoULoss", "CIoULoss")
HEADS = {  # where a head of MMDetection has a loss of a family
    "classification": "loss_cls",
    "ranking": "loss_cls",
    "box": "loss_bbox",
    "regression": "loss_bbox",
    "rotated": "loss_bbox",
    "uncertainty": "loss_bbox",
    "distribution": "loss_dfl",
    "soft label": "loss_ld",
    "heatmap": "loss_heatmap",
    "region": "loss_mask",
}
ABOUT = {  # what is seen in the pictures of a family
    "box": "First the loss as contours and, as arrows, where the gradient pulls, while the center of a box of 44 x 48 "
    "pixels moves over a target of 60 x 40 (its outline in grey); then the same for its sides (the target's are at "
    "the cross), loss and gradient on a line, and how fast 2058 boxes come to their targets by gradient descent, "
    "as in [the simulation](../simulation.md), beside other losses in grey.",
    "classification": "The loss over the logit of one class, for several targets, and its gradient. A loss that looks "
    "at the whole batch sees one sample among 400 of a dense detector; one that keeps a state has seen 300 batches.",
    "distribution": "The loss while a predicted bell moves over the bins, and what one step down the gradient adds to "
    "each logit.",
    "heatmap": "The loss over the predicted probability, for several values of the heatmap, and its gradient.",
    "multibox": "How much gradient each anchor of an image gets: all positives, and the hardest negatives only; and "
    "the part of the boxes.",
    "ranking": "What one step down the gradient does to the scores of three positives, of the qualities beside them, "
    "and five negatives; and the way of these scores in 60 steps.",
    "region": "The loss while a predicted square moves and grows over one of 10 x 10 pixels, and what one step down "
    "the gradient adds to each pixel.",
    "regression": "The loss over the error, and its gradient.",
    "rotated": "The loss while a box turns, moves and grows over one of its shape, for three shapes, and the gradient "
    "on the angle.",
    "soft label": "The loss over the logit of one of two classes, for several shares of it in the target, and its "
    "gradient.",
    "uncertainty": "Loss and gradient over the error for three variances, and over the variance for three errors.",
}
STYLE = """<style>
.panels, .losses { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); }
.losses { grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
.panels p, .losses p { margin: 0; }
.losses a { display: block; text-align: center; font-size: .62rem; overflow-wrap: anywhere; }
.panels img, .losses img { display: block; width: 100%; background: none; }
</style>"""


def in_a_cell(text: str) -> str:
    """Text for a cell of a table."""
    return as_markdown(text).replace("|", r"\|")


@functools.cache
def formulas() -> dict[str, str]:
    """``{loss: LaTeX}``, one formula a line."""
    return yaml.safe_load((ROOT / "docs" / "formulas.yaml").read_text(encoding="utf-8"))


def formula(name: str, cls: type) -> str:
    """The formula as LaTeX, if there is one, and what the function's docstring says of it."""
    latex = formulas().get(name, "").strip()
    shown = [f"$$\n{as_drawn(line)}\n$$" for line in latex.splitlines()]
    return "\n\n".join([*shown, as_markdown(_facts.body(cls.fn.__doc__))])


def as_drawn(latex: str) -> str:
    """LaTeX that keeps its spaces as MathML: after a logarithm, and none inside bars."""
    return re.sub(r"\|([^|]*)\|", r"\\left| \1 \\right|", latex.replace(r"\ln ", r"\ln\, "))


def settings(cls: type) -> str:
    """The table of the settings, and the names of those that every loss of its kind has."""
    lines = ["| setting | default | may be | |", "| --- | --- | --- | --- |"]
    own = _facts.settings(cls)
    for s in own:
        default = "" if s.default is inspect.Parameter.empty else f"`{s.default!r}`"
        lines.append(f"| `{s.name}` | {in_a_cell(default)} | {in_a_cell(s.allowed)} | {in_a_cell(s.meaning)} |")
    names = ", ".join(f"`{name}`" for name in _facts.shared(cls) if name not in [s.name for s in own])
    return "\n".join([*(lines if own else []), "", f"And those of every loss of its kind: {names}."])


def use(name: str, cls: type) -> str:
    """How it is written for Ultralytics, if it fits a slot there, and for MMDetection."""
    # The formulas are read without Ultralytics too.
    from detloss_plugins.adapters.ultralytics.config import default_weight

    key, lines = HEADS.get(cls.facts.family), []
    for slot, tasks in _facts.yolo_slots(cls).items():
        weight = default_weight(cls, slot)
        words = ", ".join(f"`{task}`" for task in tasks)
        lines.append(f"- Ultralytics, slot `{slot}` of {words}: weight {weight:g} unless you give `loss_weight`.")
    lines = lines or ["- Ultralytics: it fits no slot there."]
    if key:
        lines.append(f"- MMDetection, in a head's `{key}`: `{key}={_facts.as_dict(cls, f'{SCOPE}.')}`.")
    return "\n".join([*lines, f"- Anywhere: `build_loss({_facts.as_dict(cls)})`, or `losses.{name}`."])


def elsewhere(cls: type) -> str:
    """Where other packages have the same loss, and where they differ and why."""
    lines = []
    for upstream in cls.facts.upstream:
        under = _facts.same_under(upstream)
        under = "" if under == "defaults" else f" ({under})"
        if upstream.differs:
            where = "; on `{}` beside `{}`".format(*upstream.at) if upstream.at else ""
            lines.append(f"- **Differs** from `{upstream.path}`{under}{where}: {upstream.differs}.")
        else:
            lines.append(f"- Equal to `{upstream.path}`{under}.")
    return "\n".join(lines) or "No package that this one is compared with has it."


def page(name: str, cls: type) -> str:
    """The page of a loss."""
    title, names = _facts.title(cls), _facts.aliases(cls)
    source = f"[{title}]({cls.facts.paper})" if cls.facts.paper else title
    also = f" Also `{'`, `'.join(names)}`." if names else ""
    about = _facts.body(vars(cls).get("__doc__")).partition("\n")[2]
    count = len(_plot.panels_of(cls.make())) + len(more_panels(cls))
    images = "\n\n".join(f"![{name}, picture {i + 1}](img/{name}.{i + 1}.svg)" for i in range(count))
    parts = [
        f"# {name}",
        f"{source}. A loss of the family *{cls.facts.family}*.{also}",
        STYLE,
        f'<div class="panels" markdown>\n\n{images}\n\n</div>',
        ABOUT.get(cls.facts.family, ""),
        as_markdown(about).strip(),
        "## Formula",
        formula(name, cls),
        "## Settings",
        settings(cls),
        "## Where to use it",
        use(name, cls),
        "## Elsewhere",
        elsewhere(cls),
        "[All losses](index.md)" + ("; [try it on two boxes](../playground/index.md)" * (cls.facts.family == "box")),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def index() -> str:
    """The page of thumbnails by family."""
    parts = ["# Gallery", "Every loss with its picture; a click leads to its page.", STYLE]
    for family, losses in _facts.losses_by_family().items():
        images = "\n\n".join(
            f"[![{name}](img/{name}.thumb.svg){{ loading=lazy }} {name}]({name}.md)" for name in losses
        )
        parts += [f"## {family.capitalize()}", f'<div class="losses" markdown>\n\n{images}\n\n</div>']
    return "\n\n".join(parts) + "\n"


@functools.cache
def convergence(word: str) -> tuple[range, list[float]]:
    """The error of the simulation's anchors at every fourth iteration, for a loss as its command line takes it."""
    (cfg,) = simulate.parse_loss(word)
    iterations = range(0, simulate.ITERATIONS + 1, 4)
    return iterations, list(simulate.simulate(cfg, simulate.anchor_centers(CENTERS, 0))[::4])


def converging(axes, loss) -> None:
    """A panel: how the error of the simulation falls, beside other losses."""
    for word in BESIDE:
        iterations, errors = convergence(word)
        axes.plot(iterations, errors, color=_plot.GREY, linewidth=0.8, alpha=0.7)
        name = simulate.label(*simulate.parse_loss(word)).split("(")[0]
        axes.annotate(name, (iterations[-1], errors[-1]), color=_plot.GREY, fontsize=6, ha="right", va="bottom")
    axes.plot(*convergence(type(loss).__name__), color=_plot.COLOURS[0], linewidth=1.6)
    axes.set_yscale("log")
    _plot.tidy(axes, "simulation: error of the boxes", "iteration")


def more_panels(cls: type) -> list[_plot.Panel]:
    """What the gallery draws beside the panels of a family."""
    return [converging] if cls.facts.family == "box" else []


def draw(name: str, cls: type, folder: Path) -> None:
    """Draw the panels and the thumbnail of a loss."""
    loss = cls.make()
    for i, panel in enumerate(_plot.panel_figures(loss, more_panels(cls))):
        _plot.save(panel, folder / f"{name}.{i + 1}.svg")
    _plot.save(_plot.thumbnail(loss), folder / f"{name}.thumb.svg")


def write(docs: Path, names: list[str] | None = None) -> None:
    """Write the pages and pictures into ``docs/gallery``, and what the playground computes with; all, or of some."""
    folder = Path(docs) / "gallery" / "img"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*(ROOT / SCOPE).rglob("*.py"), *map(Path, (__file__, simulate.__file__))]
    newest, threads = max(path.stat().st_mtime for path in sources), torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    try:
        for name, cls in registered_losses().items():
            if names and name not in names:
                continue
            drawn = folder / f"{name}.thumb.svg"  # the last to be written
            if not drawn.exists() or drawn.stat().st_mtime < newest:
                draw(name, cls, folder)
            (folder.parent / f"{name}.md").write_text(page(name, cls), encoding="utf-8")
        (folder.parent / "index.md").write_text(index(), encoding="utf-8")
        playground.write(Path(docs) / "playground" / "losses.js")
    finally:
        torch.set_num_threads(threads)


def main(argv=None):
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="losses to draw (default: all)")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="DIR", help="where (default docs)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in registered_losses()]:
        parser.error(f"there is no loss named {unknown[0]}; detloss list has the names")
    write(args.docs, args.names)
    print(f"gallery: {args.docs / 'gallery'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
