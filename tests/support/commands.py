"""Python and the project's commands in a process of their own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from detloss_plugins.cli import main

ROOT = Path(__file__).parents[2]


def python(*command):
    """Run Python in a fresh process and return what it prints; its own errors fail the test."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def detloss(capsys, *words, status=0):
    """What the command prints when it ends with this status: to standard error where that is not 0, in whole lines."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words)], prog_name="detloss")
    printed = capsys.readouterr()
    assert stop.value.code == status, printed.err
    return (printed.err if status else printed.out).strip()


def last_line(capsys, *words, status=0):
    """The last line of that, such as what the command refuses."""
    return detloss(capsys, *words, status=status).splitlines()[-1]


def train(work_dir, *arguments):
    """Run tools/train.py; return its mAP50 and what it printed."""
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *arguments, "--work-dir", str(work_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(re.search(r"^mAP50 ([\d.]+)", done.stdout, re.MULTILINE)[1]), done.stdout
