"""Python and the project's commands in a process of their own."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(*command):
    """Run Python in a fresh process and return what it prints; its own errors fail the test."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def train(work_dir, *arguments):
    """Run tools/train.py; return its mAP50 and what it printed."""
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *arguments, "--work-dir", str(work_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(re.search(r"^mAP50 ([\d.]+)", done.stdout, re.MULTILINE)[1]), done.stdout
