"""The subcommand that finds weights for losses."""

import contextlib
import json
import sys
from pathlib import Path

import click

from detloss_plugins.cli._common import UsageError, as_usage_error, check_file, data_option, require
from detloss_plugins.configs import path_of

MODEL = "yolov8n.yaml"
EPOCHS, SEEDS = 6, 2  # of --verify


@click.command()
@click.argument("words", nargs=-1, metavar="[CONFIG.py] LOSSES ... [KEY=VALUE ...]")
@click.option(
    "--slot", "slots", multiple=True, help="Besides LOSSES every loss of ours that this slot takes: cls, box."
)
@click.option("--model", metavar="FILE", help=f"What YOLO takes, a YAML file or a checkpoint.  [default: {MODEL}]")
@data_option
@click.option("--steps", type=click.IntRange(1), default=100, show_default=True, help="Steps of the stock training.")
@click.option("--verify", is_flag=True, help="Train a YOLO with 1/2, 1, 2, 4 times each weight; say which is best.")
@click.option("--epochs", type=click.IntRange(1), default=EPOCHS, show_default=True, help="Of each such training.")
@click.option("--seeds", type=click.IntRange(2), default=SEEDS, show_default=True, help="Such trainings of a weight.")
@click.option("--json", "file", type=Path, metavar="FILE", help="Write what was found here too.")
def command(words, slots, model, data, steps, verify, epochs, seeds, file):
    """Find weights with which LOSSES pull as hard as the stock ones.

    \b
      detloss calibrate VarifocalLoss QualityFocalLoss     on the embedded digits set with yolov8n
      detloss calibrate my_losses.yaml --data data.yaml --model yolo11n.yaml imgsz=320
      detloss calibrate --slot cls --json weights.json     every class loss
      detloss calibrate gfl_r18_fpn_digits FocalLoss       beside the losses of a config of MMDetection

    LOSSES are names of losses, YAML files of losses, names of configs that come with the package, and LABEL=LOSSES with
    a dict in YAML; any other KEY=VALUE is an argument of the training. A short training with stock losses is run. At
    four of its steps the gradient of the stock loss at the outputs of the head is compared with that of each loss: the
    weight is the ratio of their L1 norms, of the four the median.
    """
    check_file(file)
    with as_usage_error(TypeError, ValueError):
        config = mmdet_config(words[0]) if words else None
        if config:
            if verify or model:
                raise UsageError("--verify and --model are for Ultralytics; leave them out beside a config")
            words, overrides = without_overrides(words[1:])
            found, checked = of_mmdet(config, read_words(words)[0], slots, data, steps, overrides), []
        else:
            losses, args = read_words(words)
            found, checked = of_yolo(losses, slots, model or MODEL, data, steps, args, verify and (epochs, seeds))
    if file is not None:
        content = {
            "suggestions": [suggestion.as_dict() for suggestion in found],
            "verified": [each.as_dict() for each in checked],
        }
        file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    show(found, checked)


def mmdet_config(word):
    """The file of a config of MMDetection that a word means, or None."""
    try:
        path = path_of(word)
    except ValueError:
        return None
    if path.suffix == ".py" and not path.exists():
        raise UsageError(f"there is no {path}")
    return path if path.suffix == ".py" else None


def without_overrides(words):
    """Words without the overrides of a config, and these as text."""
    rest, overrides = [], {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and is_override(key, word):
            overrides[key] = value
        else:
            rest.append(word)
    return rest, overrides


def is_override(key, word):
    """Whether ``KEY=VALUE`` is for a config: the value is no loss, or is what a key with a dot may have there."""
    from detloss_plugins.ablation.grid import parse_words

    try:
        _, losses, args = parse_words([word])
    except ValueError:
        if "." in key:  # it need be no YAML
            return True
        raise
    content = losses.get(key, {})
    of_losses = "type" in content or all(isinstance(value, dict) for value in content.values())
    return bool(args) or ("." in key and (key.endswith(".type") or not of_losses))


def read_words(words):
    """``(label, slot or None, config)`` of each loss that words mean, and the arguments of the training."""
    from detloss_plugins.ablation.grid import parse_words

    grid, losses, args = parse_words(words)
    if grid:
        raise UsageError("a YAML file of a whole grid is for detloss ablate; give a file of losses")
    found = []
    for label, content in losses.items():
        if "type" in content:
            found.append((label, None, content))
            continue
        if not all(isinstance(cfg, dict) for cfg in content.values()):
            raise UsageError(f"{label} must hold a dict of losses such as {{cls: {{type: VarifocalLoss}}}}.")
        found += [(f"{cfg.get('type')} of {label}", slot, cfg) for slot, cfg in content.items() if slot != "ignore"]
    return found, args


def unique(candidates):
    """Candidates without those that are there twice; ``UsageError`` for two that share a label."""
    found = {}
    for each in candidates:
        before = found.setdefault((each.slot, each.label), each)
        if before.cfg != each.cfg:
            raise UsageError(f"there are two losses {each.label} for {each.slot}, with other settings")
    if not found:
        raise UsageError("give at least one loss, such as VarifocalLoss, or --slot cls")
    return list(found.values())


def of_yolo(losses, slots, model, data, steps, args, verified):
    """Suggestions of Ultralytics and, if ``verified`` has epochs and seeds, what trainings say of them."""
    from detloss_plugins.adapters.ultralytics import calibrate as adapter
    from detloss_plugins.adapters.ultralytics import check_head
    from detloss_plugins.cli._yolo import check_yolo, given_data, opened, refusals, yolo_data
    from detloss_plugins.testing.training_tensors import quiet

    with quiet():
        yolo, task = opened(model)
    built = yolo.model
    candidates = [adapter.candidate(cfg, task, slot, label) for label, slot, cfg in losses]
    for each in candidates:
        check_head(built, {each.slot: each.cfg})
    candidates += [each for slot in slots for each in adapter.fitting(slot, task) if suits(built, each)]
    candidates = unique(candidates)
    place, defaults = yolo_data(given_data(data, args), task)
    settings = {"data": str(place), "pretrained": bool(yolo.ckpt), **defaults, **args}
    check_yolo(settings)
    with refusals():
        with progress("calibrating", steps) as told, quiet():
            found = adapter.calibrate(candidates, model, steps, told=told, **settings)
        if not verified:
            return found, []
        epochs, seeds = verified
        trainings = [each for each in found if each.weight]
        count = len(trainings) * len(adapter.FACTORS) * seeds
        with progress(f"{count} trainings of {epochs} epochs", count) as told, quiet():
            settings = {**settings, "epochs": epochs}
            return found, [adapter.verify(each, model, seeds, told=told, **settings) for each in trainings]


def of_mmdet(config, losses, slots, data, steps, overrides):
    """Suggestions for a config of MMDetection."""
    require("mmdet")
    from detloss_plugins.ablation.mmdetection import SLOTS
    from detloss_plugins.cli._coco import provide_data
    from detloss_plugins.cli._mmdet import import_mmdet, parsed, read_config, refuse
    from detloss_plugins.testing.training_tensors import quiet

    import_mmdet()
    from detloss_plugins.adapters.mmdetection import calibrate as adapter
    from detloss_plugins.adapters.mmdetection.check import check_config, unknown_keys

    cfg = read_config(config)
    provide_data(cfg, data)
    values = parsed(overrides)
    refuse(unknown_keys(cfg, values))
    cfg.merge_from_dict(values)
    refuse(check_config(cfg))
    head = adapter.build_head(cfg)
    candidates = [adapter.candidate(each, head, SLOTS.get(slot, slot), label) for label, slot, each in losses]
    candidates += [each for slot in slots for each in adapter.fitting(SLOTS.get(slot, slot), head)]
    candidates = unique(candidates)
    with progress("calibrating", steps) as told, quiet():
        return adapter.calibrate(cfg, candidates, steps, told=told)


def suits(model, candidate):
    """Whether a model has a head for a candidate."""
    from detloss_plugins.adapters.ultralytics import check_head

    try:
        check_head(model, {candidate.slot: candidate.cfg})
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def progress(what, total):
    """A progress bar on the error stream; gives the function to call after each step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda *_: bar.advance(task)


def show(found, checked):
    """Print the weights as a table and as lines to copy, and what trainings say of them."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)  # labels are as they were given
    steps = ", ".join(str(step) for step in max((each.ratios for each in found), key=len))
    table = Table(
        box=SIMPLE, title=f"gradient of the stock loss over that of the loss, at steps {steps or 'with objects'}"
    )
    table.add_column("loss", overflow="fold")  # before any other column is cut
    for name in ("weight", "range", "on positives", "default"):
        table.add_column(name, justify="right", no_wrap=True)
    for slot in dict.fromkeys(each.slot for each in found):
        of_slot = [each for each in found if each.slot == slot]
        table.add_row(f"stock loss of {slot}", "", "", share(of_slot[0].stock_positives), "")
        for each in of_slot:
            low_high = f"{each.range[0]:.2g} - {each.range[1]:.2g}" if each.range else ""
            nothing = "no gradient" if each.stock_positives else "no objects"
            weight = nothing if each.weight is None else f"{each.weight:g}"
            table.add_row(each.label, weight, low_high, share(each.positives), f"{each.default:g}")
        table.add_section()
    console.print(table)
    for each in found:
        if each.weight is not None:
            click.echo(f"# {to_copy(each)}  # {each.doubt}" if each.doubt else to_copy(each))
    if moving := [each.label for each in found if each.moves]:
        click.echo(f"The ratio of {', '.join(moving)} has moved all along: give more --steps, or --verify.")
    if focusing := [each for each in found if each.focuses]:
        click.echo(
            f"Nearly all the gradient of {', '.join(each.label for each in focusing)} is on positives, of the stock "
            f"loss's {share(focusing[0].stock_positives)}. Trained, such losses needed 3 to 4 times this weight "
            "(docs/weights.md): --verify tries it."
        )
    for each in checked:
        click.echo(each.in_words())


def share(value):
    """A share in percent, empty for None."""
    return "" if value is None else f"{value:.0%}"


def to_copy(suggestion):
    """The config of a loss with its weight: a line of YAML, or for MMDetection of Python."""
    import yaml

    slot, cfg = suggestion.slot, dict(suggestion.losses[suggestion.slot])
    if str(cfg["type"]).startswith("detloss_plugins.") or slot == "loss_cls":  # a head's of MMDetection
        return f"{slot}=dict({', '.join(f'{name}={value!r}' for name, value in cfg.items())})"
    return f"{slot}: {yaml.safe_dump(cfg, default_flow_style=True, sort_keys=False, width=1000).strip()}"
