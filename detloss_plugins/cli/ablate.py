"""The subcommand that trains with losses beside the stock ones."""

import contextlib
from pathlib import Path

import click

from detloss_plugins.cli._common import RunError, as_usage_error, check_folder, require

DEFAULT_MODEL = "yolov8n.yaml"


@click.command()
@click.argument("losses", nargs=-1, metavar="LOSSES ... [KEY=VALUE ...]")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="M",
    help="Of YOLO (.pt: trained; .yaml: from scratch), or a config of MMDetection; more than once.  "
    f"[default: {DEFAULT_MODEL}]",
)
@click.option(
    "--data",
    multiple=True,
    metavar="D",
    help="digits, digits:SCENARIO, a data.yaml or its folder; more than once.  [default: digits]",
)
@click.option(
    "--seeds", type=click.IntRange(1), metavar="N", help="Trainings of each, with the seeds 0 to N - 1.  [default: 3]"
)
@click.option("--epochs", type=click.IntRange(1), metavar="E", help="Epochs of each training.  [default: 12]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/ablation"),
    metavar="DIR",
    show_default=True,
    help="Where trainings and report go.",
)
@click.option(
    "--jobs", type=click.IntRange(1), metavar="N", help="Trainings side by side.  [default: one a GPU, or one a core]"
)
@click.option(
    "--ray", metavar="ADDRESS", help="Train on a Ray cluster (auto: this machine's); all its nodes share DIR and data."
)
@click.option(
    "--cores", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Of each training on Ray."
)
@click.option(
    "--resume-after",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    metavar="MINUTES",
    help="A training that was cut off goes on if it had run for this long, and begins again if not.",
)
def command(losses, models, data, seeds, epochs, out, jobs, ray, cores, resume_after):
    """Train LOSSES beside the stock ones; say which are better.

    \b
      detloss ablate VarifocalLoss:4.2 WIoULoss --seeds 3
      detloss ablate wise='box: {type: WIoULoss}' mine.yaml --model yolo11n.pt --data data.yaml --epochs 50 imgsz=320
      detloss ablate QualityFocalLoss --model retinanet_r18_fpn_digits
      detloss ablate grid.yaml --out runs/study --jobs 2

    Each of LOSSES is the name of a loss, maybe with its weight, for the slot that it fits; a YAML file of losses or the
    name of a config that comes with the package, such as qfl; LABEL=LOSSES, with a dict in YAML; or a YAML file of a
    whole grid, with the keys losses (label -> dict), models, data, seeds, epochs and args. Any other KEY=VALUE is an
    argument of the trainings, such as imgsz=320.

    Of MMDetection, the losses of a config are replaced, which are called cls, box and dfl too, or by their keys; the
    config's own are the stock. Arguments with a dot are for its trainings.

    Each training is a process. What has finished is kept in the folder: called again, the command goes on where it was,
    and more losses, seeds, models and data sets may be added.
    """
    with as_usage_error(TypeError, ValueError):
        study, runs = prepare(losses, {"models": [*models], "data": [*data], "seeds": seeds, "epochs": epochs}, out)
    train(study, runs, jobs, (ray, cores), 60 * resume_after)
    finish(study)


def prepare(words, options, out):
    """The study's folder and the trainings of a grid; ``ValueError`` for what the user can put right."""
    from detloss_plugins.ablation import Study
    from detloss_plugins.ablation.grid import EPOCHS, check_grid, parse_words, plan

    grid, losses, args = parse_words(words)
    grid = {**check_grid(grid), **{key: value for key, value in options.items() if value}}
    if twice := grid["losses"].keys() & losses.keys():
        raise ValueError(f"The label {twice.pop()} is given twice.")
    defaults = {"models": [DEFAULT_MODEL], "data": ["digits"], "seeds": 3, "epochs": EPOCHS}
    grid = {**defaults, **grid, "losses": {**grid["losses"], **losses}, "args": {**grid["args"], **args}}
    if not grid["losses"]:
        raise ValueError("Give at least one loss beside the stock ones, such as VarifocalLoss.")
    check_folder(out)
    runs, study = plan(**grid), Study(out)  # says first if the framework is missing, whose extra has the rest
    require("pycocotools")
    study.add(runs)
    return study, runs


@contextlib.contextmanager
def told_how_to_go_on(study):
    """Say, if the user ends the trainings, that they are not lost."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"stopped: what has finished is in {study.folder}, and the same command goes on from it", err=True)
        raise


def train(study, runs, jobs, cluster, resume_after):
    """Train with a progress bar, here or on a cluster: its address and the cores of a training there."""
    from detloss_plugins.ablation.progress import Bar
    from detloss_plugins.ablation.study import default_jobs

    todo, (address, cores) = [run for run in runs if not study.is_done(run)], cluster
    click.echo(f"{len(runs)} trainings, {len(runs) - len(todo)} of them finished before; {study.folder}")
    with Bar(study, todo) as bar, told_how_to_go_on(study):
        if address is None:
            study.train(todo, jobs or default_jobs(), bar.tick, resume_after)
            return
        require("ray")
        from detloss_plugins.ablation.cluster import train as train_there

        with as_usage_error(ConnectionError, what=f"There is no Ray cluster at {address}: ", kind=RunError):
            train_there(study, todo, address, cores, bar.tick, resume_after)


def finish(study):
    """Write the report and say what failed."""
    from detloss_plugins.ablation.report import write_report

    results = study.results()
    write_report([results], study.folder)
    click.echo(f"report: {study.folder / 'report.md'} and report.html")
    if results["failed"]:
        raise RunError("\n".join(f"{failed['run']}: {failed['error']}" for failed in results["failed"]))
