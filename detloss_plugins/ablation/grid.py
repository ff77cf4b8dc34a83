"""What is to be trained: losses x models x data sets x seeds."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from detloss_plugins import configs
from detloss_plugins.facts import number_in
from detloss_plugins.registry import build_loss, loss_class, portable, registered_losses

EPOCHS = 12
STOCK = "stock"
GRID_KEYS = {"losses", "models", "data", "seeds", "epochs", "args"}
# Arguments of a training that say where it runs, and not what comes out.
OF_THE_MACHINE = {"device", "workers", "cache"}
OF_THE_GRID = {"data", "epochs", "exist_ok", "mode", "model", "name", "project", "resume", "save_dir", "seed", "task"}


@dataclass(frozen=True)
class Run:
    """One training.

    ``losses`` are by slot, with every weight written out, and empty for the stock ones; ``data`` is a name, and
    ``path`` its YAML file, empty for the digits, which are built where they are used.
    """

    label: str
    losses: dict
    model: str
    data: str
    path: str
    epochs: int
    seed: int
    args: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its folder."""
        parts = self.label, Path(self.model).stem, self.data, str(self.seed)
        return "-".join(re.sub(r"[^\w.+]+", "_", part) for part in parts)

    @property
    def setting(self) -> dict:
        """What all runs of a model and a data set share."""
        args = {key: value for key, value in self.args.items() if key not in OF_THE_MACHINE}
        return {"data": self.path or self.data, "epochs": self.epochs, "args": args}

    def as_dict(self) -> dict:
        """As plain data."""
        return asdict(self)


def contradiction(stored: Iterable[Run], new: Iterable[Run]) -> str | None:
    """Why ``new`` runs cannot stand beside those that are ``stored``, in a sentence; None if they can.

    Other losses, seeds, models and data sets can. What a label means, and how long and how a model is trained on a
    data set, cannot change.
    """
    losses, settings, names = {}, {}, {}
    for run in (*stored, *new):
        before = losses.setdefault((run.label, run.model), run.losses)
        if before != run.losses:
            return f"{run.label} has been trained with {before} and is now {run.losses}: give it another label"
        before = settings.setdefault((run.model, run.data), run.setting)
        for key, value in run.setting.items():
            if before[key] != value:
                was, is_ = _difference(before[key], value)
                return f"{run.model} has been trained on {run.data} with {key} {was}, not {is_}"
        known = names.setdefault(run.name, run)
        if (known.label, known.model, known.data) != (run.label, run.model, run.data):
            return (
                f"two trainings would have the folder {run.name}: give one of them another "
                "label, or its model's file another name"
            )
    return None


def _difference(a, b):
    """Two values, or of two dicts what differs."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return a, b
    keys = sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
    return tuple("(" + ", ".join(f"{k}={d[k]}" if k in d else f"no {k}" for k in keys) + ")" for d in (a, b))


def slots_of(losses: Mapping, task: str) -> dict:
    """The losses of a training by slot, checked and with each weight written out.

    Args:
        losses: ``{slot: config}``, or the config of one loss, which goes to the slot that takes its family.
        task: "detect" or "rtdetr", Ultralytics' tasks with boxes alone.

    Raises:
        ValueError, TypeError: if that is no loss, or none of this task.
    """
    from detloss_plugins.adapters.ultralytics import SLOTS, load_losses

    if "type" in losses:
        family = family_of(losses)
        fitting = [slot for slot, families in SLOTS[task].items() if family in families]
        if not fitting:
            raise ValueError(f"{losses['type']} is a {family} loss, for which task={task!r} has no slot.")
        losses = {fitting[0]: losses}
    if "ignore" in losses:
        raise ValueError("Ignored classes change what is measured, so an ablation has none: leave ignore out.")
    return plain(portable(load_losses(losses, task, auto=True)))


def plain(value: Any) -> Any:
    """A value as it is read again from a JSON file: with lists for tuples."""
    return json.loads(json.dumps(value))


def family_of(loss: Mapping) -> str:
    """The family of the loss of a config. Its weight does not matter, and may be "auto"; nor what a slot fills in."""
    others = {key: value for key, value in loss.items() if key != "loss_weight"}
    return build_loss({**loss_class(loss["type"]).facts.example, **others}).family


def losses_of_word(word: str) -> tuple[str, Any]:
    """Label and losses that a word on the command line means.

    It is the name of a loss, maybe with its weight (``VarifocalLoss:4.2``), a YAML file of losses, or the name of a
    config that comes with the package.

    Raises:
        ValueError: if it is none of these.
    """
    name, _, weight = word.partition(":")
    if name in registered_losses():
        return word, {"type": name, **({"loss_weight": _number(weight, word)} if weight else {})}
    path = Path(word)
    if path.suffix not in {".yaml", ".yml"}:
        path = _config(word)
    return path.stem, read_mapping(path)


def _number(text, word):
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{word}: a weight is a number, as in VarifocalLoss:4.2.") from None


def _config(word):
    """The YAML file of the package's config of that name."""
    try:
        path = configs.find(word)
    except ValueError as error:
        if word[:1].isupper():
            loss_class(word.partition(":")[0])  # raises, with the nearest names
        raise ValueError(f"{word} is no loss and no file of losses. {error}") from None
    if path.suffix == ".py":
        raise ValueError(f"{word} is a config of MMDetection: give it as the model.")
    return path


def read_mapping(path: str | Path) -> dict:
    """The dict of a YAML file; ``ValueError`` if there is none."""
    try:
        content = configs.read_yaml(path)
    except OSError as error:
        raise ValueError(error) from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict, such as {{cls: {{type: VarifocalLoss}}}}.")
    return content or {}


def parse_words(words: Iterable[str]) -> tuple[dict, dict, dict]:
    """The grid files' keys, the losses by label, and the arguments of trainings that words stand for.

    ``KEY=VALUE`` is a loss if VALUE is a dict in YAML (``wise='box: {type: WIoULoss}'``) or the name of a loss, and
    otherwise an argument of the trainings.

    Raises:
        ValueError: for a word that means nothing, or a label that is given twice.
    """
    grid, losses, args = {}, {}, {}
    for word in words:
        if "=" in word and not configs.is_file(word):
            key, text = word.split("=", 1)
            value = value_of(text, word)
            if isinstance(value, str) and value.partition(":")[0] in registered_losses():
                value = losses_of_word(value)[1]
            if not isinstance(value, dict):
                args[key] = value
                continue
            found = {key: value}
        else:
            found = dict([losses_of_word(word)])
            if "losses" in next(iter(found.values())):
                (content,) = found.values()
                found, grid = {}, {**grid, **content}
        if twice := losses.keys() & found.keys():
            raise ValueError(f"The label {twice.pop()} is given twice.")
        losses.update(found)
    return grid, losses, args


def value_of(text: str, word: str) -> Any:
    """What the text after ``KEY=`` means in YAML; what is a text there, and not in quotes, is as it was typed.

    To YAML, a path would end where it has " #".

    Args:
        text: the text.
        word: all of it, for the error.

    Raises:
        ValueError: if that is no YAML.

    >>> [value_of(text, f"project={text}") for text in ("runs/set #2", "'1'", "1e-3")]
    ['runs/set #2', '1', 0.001]
    """
    try:
        value = number_in(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"{word} is no YAML: {' '.join(str(error).split())}") from error
    as_typed = isinstance(value, str) and text.strip()[0] not in "'\""
    return text.strip() if as_typed else value


def check_grid(grid: Mapping) -> dict:
    """A grid as a YAML file has it, with lists where it may have single values.

    Raises:
        ValueError: for an unknown key or a value of the wrong kind.
    """
    if unknown := sorted(grid.keys() - GRID_KEYS):
        raise ValueError(f"A grid has the keys {', '.join(sorted(GRID_KEYS))}, and no {unknown[0]}.")
    grid = dict(grid)
    losses = grid.get("losses") or {}
    if isinstance(losses, list):
        pairs = [losses_of_word(str(word)) for word in losses]
        if twice := sorted(label for label, number in Counter(label for label, _ in pairs).items() if number > 1):
            raise ValueError(f"The label {twice[0]} is given twice.")
        losses = dict(pairs)
    if isinstance(losses, dict):
        losses = {str(k): losses_of_word(v)[1] if isinstance(v, str) else (v or {}) for k, v in losses.items()}
    if not isinstance(losses, dict) or not all(isinstance(value, dict) for value in losses.values()):
        raise ValueError("The losses of a grid are a dict, label: {slot: {type: ...}}.")
    if not isinstance(grid.get("args") or {}, dict):
        raise ValueError("The args of a grid are a dict, such as {imgsz: 256}.")
    args = {key: number_in(value) for key, value in (grid.get("args") or {}).items()}
    grid = {**{key: value for key, value in grid.items() if value is not None}, "losses": losses, "args": args}
    for key in ("models", "data"):
        if key in grid:
            grid[key] = [str(part) for part in (grid[key] if isinstance(grid[key], list) else [grid[key]])]
    if "seeds" in grid:
        grid["seeds"] = seeds_of(grid["seeds"])
    return grid


def seeds_of(seeds: int | Sequence[int]) -> list[int]:
    """A list of seeds, of such a list or of how many there are."""
    seeds = list(range(seeds)) if type(seeds) is int else seeds
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"seeds are a number of them or a list of numbers, not {seeds!r}.")
    return sorted(set(seeds))


def plan(
    losses: Mapping[str, Mapping],
    models: Sequence[str] = ("yolov8n.yaml",),
    data: Sequence[str] = ("digits",),
    seeds: int | Sequence[int] = 3,
    epochs: int = EPOCHS,
    args: Mapping | None = None,
) -> list[Run]:
    """The trainings of a grid, the stock losses' among them, seed by seed.

    Args:
        losses: label -> ``{slot: config}``, or the config of one loss, for the slot that takes it.
        models: what ``YOLO(...)`` takes; a config of MMDetection, a file or the name of one of the package's; any other
            name without a suffix is a pretrained model of Ultralytics, "yolov8n" its yolov8n.pt.
        data: "digits", "digits:SCENARIO", a data YAML, or a folder with one; MMDetection takes the folder, in COCO
            layout.
        seeds: how many, or which.
        epochs: of each training.
        args: arguments of the trainings, as for ``YOLO.train``; those with a dot are keys of MMDetection's config.

    Raises:
        ValueError, TypeError: for a loss that does not suit a model, or anything that is not there.
    """
    from detloss_plugins.ablation import mmdetection, yolo
    from detloss_plugins.ablation.data import locate

    args, seeds = dict(args or {}), seeds_of(seeds if isinstance(seeds, int) else list(seeds))
    if own := sorted(args.keys() & OF_THE_GRID):
        raise ValueError(f"{own[0]} belongs to the grid: leave {own[0]}={args[own[0]]} out.")
    if type(epochs) is not int or epochs < 1:
        raise ValueError(f"epochs are a whole number above 0, not {epochs!r}.")
    if losses.get(STOCK):
        raise ValueError(f"The label {STOCK} is for the stock losses.")
    losses = {STOCK: {}, **losses}
    names = [word if mmdetection.is_config(word) else yolo.model_name(word) for word in models]
    of_model = {name: mmdetection if mmdetection.is_config(name) else yolo for name in names}
    resolved = {model: framework.check_model(model, losses) for model, framework in of_model.items()}
    found = {name: (path, defaults) for name, path, defaults in map(locate, dict.fromkeys(data))}
    if len(found) < len(set(data)):
        raise ValueError(f"Two data sets have the same name ({', '.join(found)}): rename one's file or folder.")
    arguments = {
        (model, name): _arguments(model, path, defaults, args)
        for model in resolved
        for name, (path, defaults) in found.items()
    }
    runs = [
        Run(label, resolved[model][label], model, name, path, epochs, seed, arguments[model, name])
        for name, (path, _) in found.items()
        for model in resolved
        for seed in seeds
        for label in losses
    ]
    if problem := contradiction([], runs):
        raise ValueError(f"{problem}.")
    return runs


def _arguments(model, path, defaults, args):
    """Those of the arguments that are for a model's framework, checked; the defaults of the digits are Ultralytics'."""
    from detloss_plugins.ablation import mmdetection, yolo

    dotted = {key: value for key, value in args.items() if "." in key}
    if mmdetection.is_config(model):
        mmdetection.check_arguments(dotted)
        return dotted
    own = {**defaults, **{key: value for key, value in args.items() if key not in dotted}}
    yolo.check_arguments(path, own)
    return own
