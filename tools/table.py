"""Write what is generated of README and docs, or check it (--check): tables of the losses from the registry, of the
detectors from the configs and of combinations from a YAML file, and where upstream packages differ."""

import argparse
import functools
import inspect
import sys
import warnings
from pathlib import Path

import differences
import yaml
from mmengine.config import Config
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import ROOT as ULTRALYTICS

from detloss_plugins import MODELS
from detloss_plugins.adapters.ultralytics import SLOTS, default_gain, model_task
from detloss_plugins.registry import registered_losses

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
SHARED = {"compile", "reduction", "loss_weight"}
OF_CLASSES = {"class_weight", "class_counts", "effective_beta", "label_smoothing"}  # that every class loss has


def hyper_parameters(cls):
    """The settings of a loss with their defaults, without those that every loss has."""
    parameters = inspect.signature(cls).parameters.values()
    hidden = {*SHARED, *OF_CLASSES - set(cls.hyper)}
    words = ", ".join(f"{p.name}={p.default!r}" for p in parameters if p.name not in hidden)
    return words.replace("|", r"\|")  # a bare one ends the table's cell, in code too


def fits_a_slot(cls):
    """Whether a loss goes into a slot of the Ultralytics adapter; class scores there are independent sigmoids."""
    families = {family for slots in SLOTS.values() for takes in slots.values() for family in takes}
    try:
        sigmoid = cls.facts.family != "classification" or cls.make(use_sigmoid=True).use_sigmoid
        return sigmoid and cls.facts.family in families
    except (TypeError, ValueError):
        return False


def loss_rows():
    """One row a loss, family by family."""
    for name, cls in sorted(registered_losses().items(), key=lambda item: item[1].facts.family):
        facts = cls.facts
        aliases = [alias for alias, found in MODELS.module_dict.items() if found is cls and alias != name]
        title = "<br>".join(f"`{n}`" for n in (name, *aliases))
        source = inspect.getdoc(cls).splitlines()[0].rstrip(".")
        source = f"[{source}]({facts.paper})" if facts.paper else source
        upstream = dict.fromkeys(u.path.split(".")[0] for u in facts.upstream if not u.differs)
        gain = f"{default_gain(cls):g}" if fits_a_slot(cls) else ""
        yield title, facts.family, f"`{hyper_parameters(cls)}`".replace("``", ""), source, ", ".join(upstream), gain


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


def families():
    """``{family: names of its losses}``, other names too."""
    found = {}
    for name, cls in MODELS.module_dict.items():
        found.setdefault(cls.facts.family, []).append(name)
    return dict(sorted(found.items()))


# Name -> header and rows.
TABLES = {
    "names": (("family", "losses"), lambda: ((family, in_words(names)) for family, names in families().items())),
    "names-zh": (
        ("类别", "损失"),
        lambda: ((CHINESE[family], in_words(names)) for family, names in families().items()),
    ),
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
    lines = [header, ["---"] * len(header), *rows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def updated(page, names):
    """The text of a page with its tables replaced."""
    for name in names:
        begin, end = f"<!-- {name}: generated by tools/table.py -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        _, after = rest.split(end)
        page = f"{before}{begin}{table(name)}\n{end}{after}"
    return page


def main(argv=None):
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if one is out of date")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="pkg_resources")  # mmengine's, once a config
    outdated = []
    for path, names in PAGES.items():
        page = path.read_text(encoding="utf-8")
        if (new := updated(page, names)) != page:
            outdated.append(path.name)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    if args.check and outdated:
        print(f"error: a table of {' and '.join(outdated)} is out of date; run tools/table.py", file=sys.stderr)
    return int(args.check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
