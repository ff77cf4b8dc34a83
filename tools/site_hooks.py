"""What MkDocs does for this site besides: formulas in LaTeX become MathML, which browsers draw without a script."""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def as_mathml(found: re.Match) -> str:
    r"""The MathML of what arithmatex marks as a formula: ``\(...\)`` in a line, ``\[...\]`` on lines of its own."""
    latex = html.unescape(found[2]).strip()[2:-2]
    return convert(latex, display="block" if found[1] == "div" else "inline")


def on_page_content(content: str, **_) -> str:
    """The HTML of a page with its formulas drawn; called by MkDocs."""
    return FORMULA.sub(as_mathml, content)
