"""What the tools with argparse share: files and devices are looked at before anything is measured."""

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
