"""The subcommand that says what is in a data set and which losses are worth an ablation on it."""

from pathlib import Path

import click

from detloss_plugins.advice.rules import SCENARIOS
from detloss_plugins.cli._coco import coco_split
from detloss_plugins.cli._common import as_usage_error


@click.command()
@click.argument("data", metavar="DATA")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="train", show_default=True)
@click.option(
    "--imgsz", type=click.IntRange(32), help="The longer side in training [default: 640, or the largest image's]."
)
@click.option(
    "--scenario", type=click.Choice(SCENARIOS), multiple=True, help="Say what the data is like, such as noisy."
)
def command(data, split, imgsz, scenario):
    """Say what is in DATA, and which losses to try on it.

    \b
      detloss advise data.yaml                 a data YAML of Ultralytics, of any task with boxes, or its folder
      detloss advise annotations/train.json    an annotation file in COCO's form, or the folder of a COCO layout
      detloss advise digits:long-tail          the embedded digits set, and its scenarios
      detloss advise data.yaml --scenario noisy    that labels are wrong cannot be seen in them: say so

    First come the losses that the study of this package found better than the stock ones on the scenario that is like
    your data; if they are fewer than three, others follow whose mean difference there is above 0. One that it found
    worse on any of the scenarios is left out. Each has its verdicts beside it, with every model that was tried. The
    study has small data: take them as what to try first, not as what will help.
    """
    from detloss_plugins.advice import advise, describe, read_labels

    with as_usage_error(ValueError):
        path = located(data, split)
        labels = read_labels(path, split)
    found = describe(labels, imgsz)
    likeness = {**dict.fromkeys(scenario, "you say so"), "plain": "every data set is"} if scenario else None
    advice = advise(found, likeness=likeness)
    lines = [*description_lines(data, split, found), "", *advice_lines(data, path.suffix == ".json", advice)]
    if labels.beside:
        where = f"path: {labels.beside} beside {path.name}, but in the working directory and\namong its own data sets"
        lines += ["", f"Ultralytics does not look for {where}: write the whole path there, or leave it out."]
    click.echo("\n".join(lines))


def located(word, split):
    """The data YAML or annotation file that DATA means."""
    from detloss_plugins.ablation.data import digits_folder, locate

    _, path, _ = locate(word)
    if not path:
        return digits_folder(word) / "digits.yaml"
    return Path(path, coco_split(Path(path), split)[0]) if Path(path).is_dir() else Path(path)


def description_lines(data, split, found):
    """The figures of a data set, a line a subject."""
    counts = sorted(found.counts.items(), key=lambda item: -item[1])
    present = [(name, count) for name, count in counts if count]
    classes = f"{len(found.counts)}"
    if len(present) > 1:
        (most, many), (fewest, few) = present[0], present[-1]
        classes += f"; most {most} ({many}), fewest {fewest} ({few}), which is {found.imbalance:.1f} : 1"
    if found.without_objects:
        some = ", ".join(found.without_objects[:5]) + (", ..." if len(found.without_objects) > 5 else "")
        classes += f"; {len(found.without_objects)} without objects: {some}"
    low, median, high = found.shapes
    crowds = f", {found.crowds} crowds left out" if found.crowds else ""
    yield f"{data}, {split}: {found.objects} objects in {found.images} images, {found.empty} without any{crowds}"
    if not found.objects:
        return
    areas = ((found.small, "small"), (found.medium, "medium"), (found.large, "large"))
    shares = ", ".join(f"{share:.0%} {name}" for share, name in areas)
    yield f"  size      {shares} by COCO's areas, with images whose longer side has {found.size} pixels"
    first, second = found.thirds
    yield f"            {found.tiny:.0%} below 16 x 16; thirds of the objects at {first:.0f} and {second:.0f} pixels"
    yield f"  shape     width over height {low:.2f} to {high:.2f} (5 to 95 %), median {median:.2f}"
    yield f"  number    {found.per_image[0]:.1f} objects in an image, {found.per_image[1]} at most"
    yield f"  crowding  {found.crowded:.0%} of the objects have a neighbour at an IoU above 0.3"
    yield f"  classes   {classes}"
    yield (
        f"  labels    {found.degenerate} without width or height, {found.outside} that reach out of the image, "
        f"{found.duplicate} twice"
    )


def advice_lines(data, in_coco, advice):
    """What to try, and why; ``in_coco`` says whether the labels are in COCO's form, which YOLO does not read."""
    yield "Like these scenarios of the study:"
    for scenario, why in advice.scenarios.items():
        yield f"  {scenario}: {why}" + (" (the study has nothing on it)" if scenario in advice.unknown else "")
    yield ""
    if not advice.tried:
        yield "The study has no trainings on such data. Train with the stock losses first: detloss ablate compares."
        return
    if not advice.any_better:
        yield (
            f"None of the {advice.tried} losses that the study tried on such data is better than the stock losses by "
            "more than another seed changes: train with the stock losses first."
        )
    if not advice.choices:
        yield "None of them has a mean difference above 0 either."
        return
    yield "Worth an ablation, beside the stock losses:"
    for number, choice in enumerate(advice.choices, 1):
        yield f"{number}. {choice.as_yaml}"
        yield from (f"     {line}" for one in (choice, *choice.others) for line in evidence(one))
    yield ""
    yield "Try them, with the study's weights, or with your own from detloss calibrate:"
    yield f"  {advice.command('data.yaml' if in_coco else data)}"
    if in_coco:
        yield "It needs a data YAML of the same data; in MMDetection a dict goes in place of loss_cls or loss_bbox."
    yield ""
    yield PRIOR


def evidence(choice):
    """A row of the study in words, a line a metric."""
    seeds = ", ".join(map(str, choice.row.seeds))
    noise = "" if choice.noise is None else f"; AP of the stock losses there ± {choice.noise:.3f}"
    yield f"{choice.row.label} on {choice.data}, {choice.model}, {choice.epochs} epochs, seeds {seeds}{noise}:"
    for metric, found in choice.row.differences.items():
        interval = f", 95 % interval {found.interval[0]:+.3f} to {found.interval[1]:+.3f}" if found.interval else ""
        at_once = choice.at_once.get(metric, found.verdict)
        also = "" if at_once == found.verdict else f"; beside all losses tried there: {at_once}"
        mean = "not measured" if found.mean is None else f"{found.mean:+.3f}{interval}: {found.verdict}{also}"
        yield f"  {metric:5} {mean}"


PRIOR = "Differences below the spread from seed to seed mean nothing: take three seeds or more."
