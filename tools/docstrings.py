"""The package's docstrings as Markdown, for the gallery and for the reference of the site."""

import re


def as_markdown(text: str) -> str:
    """A docstring as Markdown: code in single ticks, references by their last part, examples as code."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"^( *)(>>> .*(?:\n(?!\n).*)*)", r"\1```pycon\n\1\2\n\1```", text, flags=re.MULTILINE)
