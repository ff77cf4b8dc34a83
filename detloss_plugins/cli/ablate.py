"""The subcommand that trains with losses beside the stock ones."""

from pathlib import Path

import click

from detloss_plugins.cli._common import RunError, UsageError, check_folder

DEFAULT_MODEL = "yolov8n.yaml"


@click.command()
@click.argument("losses", nargs=-1, metavar="LOSSES ... [KEY=VALUE ...]")
@click.option(
    "--model", "models", multiple=True, help=f"of YOLO, or a config of MMDetection  [default: {DEFAULT_MODEL}]"
)
@click.option("--data", multiple=True, help="digits, digits:SCENARIO, a data YAML or its folder  [default: digits]")
@click.option("--seeds", type=click.IntRange(1), help="number of seeds  [default: 3]")
@click.option("--epochs", type=click.IntRange(1), help="epochs of each training  [default: 12]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/ablation"), show_default=True, help="folder")
@click.option("--jobs", type=click.IntRange(1), help="trainings side by side  [default: one a GPU, or one a core]")
def command(losses, models, data, seeds, epochs, out, jobs):
    """Train a grid of losses x models x data sets x seeds, the stock losses always among them, and report.

    Each of LOSSES is the name of a loss, maybe with its weight (VarifocalLoss:4.2), for the slot that it fits; a YAML
    file of losses or the name of a config that comes with the package; LABEL=LOSSES with a dict in YAML, as in
    wise='box: {type: WIoULoss}'; or a YAML file of a whole grid with the keys losses (label -> dict), models, data,
    seeds, epochs and args. Any other KEY=VALUE is an argument of the trainings, such as imgsz=256.

    Of MMDetection, the losses of a config are replaced, which are called cls, box and dfl too, or by their keys; the
    config's own are the stock. Arguments with a dot are for its trainings.

    What has finished is kept in the folder: called again, the command goes on where it was, and more losses, seeds,
    models and data sets may be added.
    """
    try:
        run(losses, {"models": list(models), "data": list(data), "seeds": seeds, "epochs": epochs}, out, jobs)
    except (TypeError, ValueError) as error:
        raise UsageError(error) from error


def run(words, options, out, jobs):
    """What the command does; ``ValueError`` for what the user can put right."""
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
    runs = plan(**grid)
    study = open_study(out, runs)
    train(study, runs, jobs)
    finish(study)


def open_study(out, runs):
    """The folder with these runs in it."""
    from detloss_plugins.ablation import Study

    study = Study(out)
    study.add(runs)
    return study


def train(study, runs, jobs):
    """Train with a progress bar."""
    from detloss_plugins.ablation.progress import Bar
    from detloss_plugins.ablation.study import default_jobs

    todo = [run for run in runs if not study.is_done(run)]
    click.echo(f"{len(runs)} trainings, {len(runs) - len(todo)} of them finished before; {study.folder}")
    with Bar(study, todo) as bar:
        study.train(todo, jobs or default_jobs(), bar.tick)


def finish(study):
    """Write the report and say what failed."""
    from detloss_plugins.ablation.report import write_report

    results = study.results()
    write_report([results], study.folder)
    click.echo(f"report: {study.folder / 'report.md'} and report.html")
    if results["failed"]:
        raise RunError("\n".join(f"{failed['run']}: {failed['error']}" for failed in results["failed"]))
