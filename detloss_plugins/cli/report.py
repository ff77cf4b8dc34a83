"""The subcommand that writes the report of an ablation again."""

from pathlib import Path

import click

from detloss_plugins.cli._common import UsageError, as_usage_error, check_folder


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path), metavar="DIR ...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the report goes.  [default: DIR, if it is one folder]",
)
def command(results, out):
    """Write the report of an ablation again, maybe of several.

    \b
      detloss report runs/ablation
      detloss report runs/digits runs/trees results.json --out runs/both

    Writes report.md, report.html and pictures. DIR is a folder of detloss ablate, finished or not, or a results.json;
    several are reported together.
    """
    from detloss_plugins.ablation.report import read_results, write_report

    if out is None and (len(results) > 1 or not results[0].is_dir()):
        raise UsageError("say where the report goes: --out DIR")
    out = out or results[0]
    check_folder(out)
    with as_usage_error(ValueError):
        write_report([read_results(path) for path in results], out)
    click.echo(f"report: {out / 'report.md'} and report.html")
