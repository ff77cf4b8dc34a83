"""The README's code runs, and the files it names exist."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from support import needs_compiler

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(containing):
    (found,) = [code for code in BLOCKS if containing in code]
    return found


def test_functions_and_modules():
    names = {}
    exec(block("ciou_loss("), names)
    assert torch.equal(names["mean"], names["same"])
    torch.testing.assert_close(names["mean"], 2 * names["per_box"].mean())


def test_mmdetection_block_is_a_config():
    names = {}
    exec(block("reg_decoded_bbox"), names)
    assert names["model"]["bbox_head"]["loss_bbox"]["type"] == "detloss_plugins.CIoULoss"


@needs_compiler
def test_the_example_of_a_new_loss(tmp_path):
    """In a process of its own, so that the example does not join the registry of the other tests."""
    module = tmp_path / "example.py"
    there = (ROOT / "detloss_plugins/losses/regression.py").read_text(encoding="utf-8")
    head = there[: there.index("__all__")]  # what the file imports already
    module.write_text(f"{head}{block('class LogCoshLoss')}", encoding="utf-8")
    code = (
        "import doctest, example\n"
        "from detloss_plugins import build_loss\n"
        "assert doctest.testmod(example) == (0, 1)\n"
        "loss = build_loss(dict(type='LogCoshLoss', scale=2.0))\n"
        "from detloss_plugins.testing import sample\n"
        "pred, target = sample(loss)\n"
        "loss(pred.requires_grad_(), target).backward()\n"
        "from example import LogCoshLoss\n"
    ) + block("check_loss(LogCoshLoss)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_named_files_exist():
    named = set(re.findall(r"\b(?:tools|configs)/[\w./-]+", README))
    assert len(named) > 5
    assert all((ROOT / path).exists() for path in named), named
