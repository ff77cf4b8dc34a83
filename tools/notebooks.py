"""Write the notebooks of examples/ from the scripts beside them, or check them (--check).

A script whose cells begin with ``# %%``, those of text with ``# %% [markdown]``, has a notebook of the same name. It
holds no outputs.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from command import write_or_check

EXAMPLES = Path(__file__).parents[1] / "examples"
MARK = "# %%"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def cells(script: str) -> list[tuple[bool, str]]:
    """The cells of a script: whether it is text, and the lines without the mark; of text without ``# `` either."""
    found = []
    for part in re.split(rf"^{MARK}", script, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        is_text = head.strip() == "[markdown]"
        body = body.strip("\n")
        found.append((is_text, re.sub(r"^# ?", "", body, flags=re.MULTILINE) if is_text else body))
    return found


def notebook(script: str) -> str:
    """The notebook of a script, as JSON."""
    parts = []
    for number, (is_text, body) in enumerate(cells(script), 1):
        cell = {"cell_type": "markdown" if is_text else "code", "id": f"cell-{number}", "metadata": {}}
        cell |= {} if is_text else {"execution_count": None, "outputs": []}
        parts.append({**cell, "source": body.splitlines(keepends=True)})
    content = {"cells": parts, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def scripts() -> list[Path]:
    """The examples that have notebooks."""
    return [path for path in sorted(EXAMPLES.glob("*.py")) if path.read_text(encoding="utf-8").startswith(MARK)]


def main(argv=None):
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if one is out of date")
    args = parser.parse_args(argv)
    books = {script.with_suffix(".ipynb"): notebook(script.read_text(encoding="utf-8")) for script in scripts()}
    return write_or_check(books, args.check, "notebooks")


if __name__ == "__main__":
    sys.exit(main())
