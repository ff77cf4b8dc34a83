"""The examples do what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_the_broken_labels_are_among_the_worst():
    command = [sys.executable, str(EXAMPLES / "worst_labels.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    worst = done.stdout.splitlines()[-10:]
    assert sum("its class is wrong" in line for line in worst) == 1, worst
    assert sum("its box is wrong" in line for line in worst) == 1, worst
