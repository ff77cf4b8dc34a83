"""What MkDocs does for this site besides.

Formulas in LaTeX become MathML, which browsers draw without a script. The gallery, which tools/gallery.py writes and no
commit has, joins the navigation where it has been written. The examples of docstrings are shown as code.
"""

import html
import re
from pathlib import Path

from docstrings import as_markdown
from griffe import Extension
from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def as_mathml(found: re.Match) -> str:
    r"""The MathML of what arithmatex marks as a formula: ``\(...\)`` in a line, ``\[...\]`` on lines of its own."""
    latex = html.unescape(found[2]).strip()[2:-2]
    if found[1] == "div":
        return f'<div class="formula">{convert(latex, display="block")}</div>'
    return convert(latex, display="inline")


def generated_pages(docs: Path) -> list:
    """Entries of the navigation for what is there of the gallery and the playground."""
    entries = []
    if (docs / "gallery" / "index.md").exists():
        pages = sorted(page for page in (docs / "gallery").glob("*.md") if page.stem != "index")
        entries.append({"Gallery": ["gallery/index.md", *(f"gallery/{page.name}" for page in pages)]})
    if (docs / "playground" / "index.md").exists():
        entries.append({"Playground": ["playground/index.md"]})  # an index.md of its section would be that of "Choose"
    return entries


def on_config(config):
    """The navigation with the generated pages before the experiments; called by MkDocs."""
    (choose,) = [section["Choose"] for section in config.nav if "Choose" in section]
    place = next(i for i, entry in enumerate(choose) if "Experiments" in entry)
    choose[place:place] = generated_pages(Path(config.docs_dir))
    return config


def on_page_content(content: str, **_) -> str:
    """The HTML of a page with its formulas drawn; called by MkDocs."""
    return FORMULA.sub(as_mathml, content)


class Docstrings(Extension):
    """Docstrings as Markdown, whose examples would otherwise be quotations; called by mkdocstrings."""

    def on_instance(self, *, obj, **_):
        """Called for every object with its docstring."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
