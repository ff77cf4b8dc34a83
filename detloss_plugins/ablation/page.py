"""A page of headings, paragraphs, tables and pictures, as Markdown and as HTML in one file."""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
.better { color: #08702f; font-weight: 600; } .worse { color: #b00020; font-weight: 600; }
code { background: #f3f3f3; padding: 0 .2rem; }
"""


class Page:
    """Parts are added one by one, as Markdown and as HTML; pictures are files below the page's folder."""

    def __init__(self, title: str, folder: Path):
        self.title, self.folder, self.parts = title, folder, []

    def heading(self, text: str) -> None:
        """A heading below the title."""
        self.parts.append((f"## {text}", f"<h2>{_inline(text)}</h2>"))

    def text(self, text: str) -> None:
        """A paragraph; words in backticks are code."""
        self.parts.append((text, f"<p>{_inline(text)}</p>"))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of texts."""
        first, *lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows))
        rule = "|---" + "|---:" * (len(head) - 1) + "|"
        tags = ["".join(f"<th>{_inline(cell)}</th>" for cell in head), *("".join(map(_cell, row)) for row in rows)]
        html_table = f"<table>{''.join(f'<tr>{row}</tr>' for row in tags)}</table>"
        self.parts.append(("\n".join([first, rule, *lines]), html_table))

    def picture(self, file: str, what: str) -> None:
        """A PNG, which is there, by its path within the folder, and what it shows."""
        data = base64.b64encode((self.folder / file).read_bytes()).decode()
        image = f'<p><img alt="{html.escape(what)}" src="data:image/png;base64,{data}"></p>'
        self.parts.append((f"![{what}]({file})", image))

    def markdown(self) -> str:
        """The page as Markdown that refers to the pictures' files."""
        return "\n\n".join([f"# {self.title}", *(markdown for markdown, _ in self.parts)]) + "\n"

    def html(self) -> str:
        """The page as HTML with the pictures in it."""
        title, body = html.escape(self.title), "\n".join(part for _, part in self.parts)
        head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{title}</h1>\n{body}\n</body></html>\n'


def _cell(text):
    kind = f' class="{text}"' if text in ("better", "worse") else ""
    return f"<td{kind}>{_inline(text)}</td>"


def _inline(text):
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
