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
    """Parts are added one by one; pictures are files below the page's folder."""

    def __init__(self, title: str, folder: Path):
        self.title, self.folder, self.parts = title, folder, []

    def heading(self, text: str) -> None:
        """A heading below the title."""
        self.parts.append(("heading", text))

    def text(self, text: str) -> None:
        """A paragraph; words in backticks are code."""
        self.parts.append(("text", text))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of texts."""
        self.parts.append(("table", (list(head), [list(row) for row in rows])))

    def picture(self, file: str, what: str) -> None:
        """A PNG by its path within the folder, and what it shows."""
        self.parts.append(("picture", (file, what)))

    def markdown(self) -> str:
        """The page as Markdown that refers to the pictures' files."""
        return "\n\n".join([f"# {self.title}", *(_MARKDOWN[kind](part) for kind, part in self.parts)]) + "\n"

    def html(self) -> str:
        """The page as HTML with the pictures in it."""
        body = "\n".join(_HTML[kind](part, self.folder) for kind, part in self.parts)
        title = html.escape(self.title)
        head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{title}</h1>\n{body}\n</body></html>\n'


def _markdown_table(table):
    head, rows = table
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|---" + "|---:" * (len(head) - 1) + "|", *lines[1:]])


def _html_table(table, _):
    head, rows = table
    lines = ["<tr>" + "".join(f"<th>{_inline(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _cell(text):
    kind = f' class="{text}"' if text in ("better", "worse") else ""
    return f"<td{kind}>{_inline(text)}</td>"


def _inline(text):
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _html_picture(picture, folder):
    file, what = picture
    data = base64.b64encode((folder / file).read_bytes()).decode()
    return f'<p><img alt="{html.escape(what)}" src="data:image/png;base64,{data}"></p>'


_MARKDOWN = {
    "heading": lambda text: f"## {text}",
    "text": lambda text: text,
    "table": _markdown_table,
    "picture": lambda picture: f"![{picture[1]}]({picture[0]})",
}
_HTML = {
    "heading": lambda text, _: f"<h2>{_inline(text)}</h2>",
    "text": lambda text, _: f"<p>{_inline(text)}</p>",
    "table": _html_table,
    "picture": _html_picture,
}
