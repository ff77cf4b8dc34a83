"""Write what is generated of README and docs, or check it (--check): tables of the losses from the registry, of the
detectors from the configs and of combinations from a YAML file, and where upstream packages differ."""

import argparse
import functools
import sys
import warnings
from pathlib import Path

import differences
import yaml
from command import as_table, between, write_or_check
from mmengine.config import Config
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import ROOT as ULTRALYTICS

from detloss_plugins.adapters.ultralytics import SLOTS, default_gain, model_task
from detloss_plugins.cli import _facts

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COMBINATIONS = DOCS / "combinations.md"
CONFIGS = ROOT / "configs" / "mmdetection"
PAGES = {  # and what is generated in them
    ROOT / "README.md": ("names",),
    ROOT / "README.zh-CN.md": ("names-zh",),
    DOCS / "losses.md": ("losses",),
    DOCS / "detectors.md": ("detectors",),
    COMBINATIONS: ("combinations",),
    DOCS / "differences.md": ("differences", "agreement"),
}
CHINESE = {
    "box": "边界框",
    "classification": "分类",
    "distribution": "分布",
    "heatmap": "热图",
    "multibox": "多框（SSD）",
    "ranking": "排序",
    "region": "区域（掩码）",
    "regression": "回归",
    "rotated": "旋转框",
    "soft label": "软标签（蒸馏）",
    "uncertainty": "不确定性",
}


def loss_rows():
    """One row a loss, family by family."""
    for family, losses in _facts.losses_by_family().items():
        for name, cls in losses.items():
            names = "<br>".join(f"`{n}`" for n in (name, *_facts.aliases(cls)))
            settings = _facts.in_one_line(cls).replace("|", r"\|")  # a bare one ends the table's cell, in code too
            source, paper = _facts.title(cls), cls.facts.paper
            source = f"[{source}]({paper})" if paper else source
            gain = f"{default_gain(cls):g}" if _facts.yolo_slots(cls) else ""
            yield names, family, f"`{settings}`".replace("``", ""), source, ", ".join(_facts.equals(cls)), gain


def in_words(names):
    """Names as code, in one line."""
    return ", ".join(f"`{name}`" for name in names)


@functools.cache
def ultralytics_detectors():
    """``{(task, head): [models]}`` of all of Ultralytics' model files in whose losses there is a slot."""
    detectors = {}
    for path in sorted((ULTRALYTICS / "cfg" / "models").rglob("*.yaml")):
        cfg = yaml_model_load(path)
        try:
            key = model_task(cfg), cfg["head"][-1][2]
        except ValueError:
            continue
        detectors.setdefault(key, []).append(path.stem)
    return dict(sorted(detectors.items(), key=lambda item: list(SLOTS).index(item[0][0])))


def heads(node, path=""):
    """``(path, type, slots)`` of every part of a config's model that has losses."""
    slots = [key for key, value in node.items() if key.startswith("loss_") and isinstance(value, dict)]
    if slots:
        yield path, str(node["type"]).rpartition(".")[2], tuple(slots)
    for key, value in node.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                yield from heads(part, f"{path}.{key}".lstrip("."))


@functools.cache
def mmdetection_detectors():
    """``{(detector, heads): [configs]}`` of the configs of this package."""
    detectors = {}
    for path in sorted(CONFIGS.glob("*.py")):
        model = Config.fromfile(path).model
        detectors.setdefault((model.type, tuple(dict.fromkeys(heads(model)))), []).append(path.stem)
    return detectors


def detector_rows():
    """One row a detector: of Ultralytics a task and head, of MMDetection a detector with its heads."""
    for (task, head), models in ultralytics_detectors().items():
        slots = "; ".join(f"`{slot}`: {' or '.join(families)}" for slot, families in SLOTS[task].items())
        yield "Ultralytics", f'`task="{task}"`', f"`{head}`", slots, in_words(models)
    for (detector, parts), configs in mmdetection_detectors().items():
        slots = "; ".join(f"`{path}`: {in_words(names)}" for path, _, names in parts)
        yield "MMDetection", f"`{detector}`", in_words(head for _, head, _ in parts), slots, in_words(configs)


def combinations():
    """``[{"name": what other code calls it, "slot": ..., "loss": the dict}, ...]``."""
    return yaml.safe_load(COMBINATIONS.with_suffix(".yaml").read_text(encoding="utf-8"))


def as_dict(value):
    """A config as it is written in Python: ``dict(type="CIoULoss")``."""
    if isinstance(value, dict):
        return f"dict({', '.join(f'{key}={as_dict(part)}' for key, part in value.items())})"
    if isinstance(value, list):
        return f"[{', '.join(map(as_dict, value))}]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def combination_rows():
    """One row a combination."""
    return ((f"`{row['name']}`", row["slot"], f"`{as_dict(row['loss'])}`") for row in combinations())


def family_rows(words):
    """One row a family: its name in ``words``, and the names of its losses."""
    for family, losses in _facts.losses_by_family().items():
        names = (n for name, cls in losses.items() for n in (name, *_facts.aliases(cls)))
        yield words.get(family, family), in_words(names)


# Name -> header and rows.
TABLES = {
    "names": (("family", "losses"), lambda: family_rows({})),
    "names-zh": (("类别", "损失"), lambda: family_rows(CHINESE)),
    "agreement": (("here", "the same as", "with, here", "with, there"), differences.agreement_rows),
    "losses": (
        ("type", "family", "hyper-parameters", "what it is", "equal to", "weight in YOLO's slot"),
        loss_rows,
    ),
    "detectors": (("framework", "detector", "head", "slots", "models or configs"), detector_rows),
    "combinations": (("elsewhere", "slot", "here"), combination_rows),
}

TEXTS = {"differences": differences.sections}


def table(name):
    """A table, or what else is generated, in Markdown."""
    if name in TEXTS:
        return TEXTS[name]()
    header, rows = TABLES[name]
    return as_table(header, rows())


def updated(page, names):
    """The text of a page with its tables replaced."""
    for name in names:
        begin, end = f"<!-- {name}: generated by tools/table.py -->\n", f"<!-- end of {name} -->"
        page = between(page, begin, end, f"{table(name)}\n")
    return page


def main(argv=None):
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if one is out of date")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="pkg_resources")  # mmengine's, once a config
    pages = {path: updated(path.read_text(encoding="utf-8"), names) for path, names in PAGES.items()}
    return write_or_check(pages, args.check, "table")


if __name__ == "__main__":
    sys.exit(main())
