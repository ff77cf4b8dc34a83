"""The trainings that ``detloss advise`` and docs/experiments.md are taken from.

Each ``NAME.json`` here is the ``results.json`` of ``detloss ablate``, with figures to four digits::

    {"name": ..., "data": "digits", "epochs": 12, "versions": {...}, "machine": "...",
     "runs": [{"label", "slot", "losses", "model", "data", "epochs", "seed", "metrics", "per_class", "curve"}, ...]}

The stock losses are the runs with the label "stock". All AP are shares from 0 to 1; what was not measured is None.
``tools/study.py --add`` puts one here.
"""

import json
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "studies"]

FOLDER = Path(__file__).parent


def studies(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The content of every file of a folder, that of the package unless another is given, in order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
