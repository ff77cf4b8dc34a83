"""The Markdown of the project: its pages, their blocks of code, headings and links."""

import re
import shlex
import unicodedata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "docs" / "gallery"  # in no commit; its pages have the docstrings' examples
PAGES = [*sorted(ROOT.glob("*.md")), *(p for p in sorted((ROOT / "docs").rglob("*.md")) if GALLERY not in p.parents)]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# [words](target) and ![words](target), not in code; a reference of mkdocstrings has no target.
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str  # relative to the repository
    language: str
    code: str

    def __str__(self):
        return f"{self.page}: {self.code.splitlines()[0][:60]}"


def prose(text):
    """A page without its fenced blocks."""
    return BLOCK.sub("", text)


def blocks(language, pages=PAGES):
    """The blocks in a language; a block that several pages share is there once."""
    found = {}
    for page in pages:
        for kind, code in BLOCK.findall(page.read_text(encoding="utf-8")):
            if kind == language:
                found.setdefault(code, Block(page.relative_to(ROOT).as_posix(), kind, code))
    return list(found.values())


def anchors(page):
    """What a link to a page may have behind ``#``: its headings as MkDocs and GitHub write them."""
    found, lines = set(), prose(page.read_text(encoding="utf-8")).splitlines()
    for heading in (line.lstrip("#") for line in lines if re.match(r"#{1,6} ", line)):
        plain = unicodedata.normalize("NFKD", re.sub(r"\]\([^)]*\)", "", heading))
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def links(page):
    """Targets of a page's links, those to other hosts too."""
    return LINK.findall(re.sub(r"`[^`]*`", "", prose(page.read_text(encoding="utf-8"))))


def commands(code):
    """The commands of a shell block, as words; ``a && b`` is two."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]
