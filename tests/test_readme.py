"""Both READMEs: short, of one content, and their example of a new loss works."""

import re
import subprocess
import sys

import pytest
from support import needs_compiler
from support.pages import BLOCK, ROOT, blocks, links, prose

README, CHINESE, START = ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "docs" / "index.md"


def block(containing, page=README):
    (found,) = [block.code for block in blocks("python", [page]) if containing in block.code]
    return found


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


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 170


def test_named_files_exist():
    named = set(
        re.findall(r"\b(?:tools|configs|docs|detloss_plugins)/[\w./-]+\.\w+", README.read_text(encoding="utf-8"))
    )
    assert len(named) > 10
    assert all((ROOT / path).exists() for path in named), named


def facts(page):
    """What does not depend on the language: blocks, numbers in figures, names in code, and targets of links."""
    text = page.read_text(encoding="utf-8")
    plain = re.sub(r"\]\([^)]*\)", "]", prose(text)).replace("names-zh", "names")
    return {
        "blocks": BLOCK.findall(text),
        "numbers": sorted(re.findall(r"(?<![\w.-])\d+(?:\.\d+)*", re.sub(r"`[^`]*`", "", plain))),
        "names": sorted(re.findall(r"`([^`\n]+)`", plain)),
        "links": sorted({*links(page)} - {README.name, CHINESE.name}),
    }


@pytest.mark.parametrize("what", ["blocks", "numbers", "names", "links"])
def test_the_chinese_one_says_the_same(what):
    assert facts(CHINESE)[what] == facts(README)[what]


def test_they_link_to_one_another():
    assert CHINESE.name in links(README)
    assert README.name in links(CHINESE)


def test_the_start_page_prints_the_same_figures():
    (printed,) = blocks("text", [README])
    assert printed.code in START.read_text(encoding="utf-8")
