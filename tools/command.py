"""What the tools share: files and devices are looked at before anything is measured, pages are written or checked."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from detloss_plugins.cli._common import UsageError, check_file


def finish(work, *args):
    """Run a tool's work and return its exit status; a :class:`UsageError` is printed, not traced."""
    try:
        return work(*args) or 0
    except UsageError as error:
        error.show()
        return error.exit_code


def check_files(parser, *paths):
    """Make the folders of the files that a command is to write, None for no file, or stop with a sentence."""
    try:
        for path in paths:
            check_file(path)
    except UsageError as error:
        parser.error(str(error))


def check_picture(parser, path):
    """Stop with a sentence if a picture's name does not end as one that can be drawn; None is no picture."""
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if path and path.suffix[1:] not in formats:
        parser.error(f"the picture's name must end in one of .{', .'.join(sorted(formats))}, not {path}")


def check_device(parser, name):
    """Stop with a sentence if torch has no device of that name here."""
    import torch

    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError):
        parser.error(f"there is no device {name} here")


def as_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def between(page: str, begin: str, end: str, text: str) -> str:
    """A page with the text between two marks in the place of what is there."""
    before, rest = page.split(begin)
    return f"{before}{begin}{text}{end}{rest.split(end)[1]}"


def write_or_check(pages: Mapping[Path, str], check: bool, tool: str) -> int:
    """Write the pages that are out of date, or if ``check`` say which; the exit status is 1 if one is then."""
    old = {path: path.read_text(encoding="utf-8") if path.exists() else None for path in pages}
    outdated = [path for path, text in pages.items() if text != old[path]]
    for path in () if check else outdated:
        path.write_text(pages[path], encoding="utf-8")
    if check and outdated:
        names = " and ".join(path.name for path in outdated)
        print(f"error: {names} is out of date; run tools/{tool}.py", file=sys.stderr)
    return int(check and bool(outdated))
