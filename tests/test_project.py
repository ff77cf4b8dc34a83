"""What the repository has for contributors: CONTRIBUTING.md, the forge's workflows and templates, the commit hooks."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import needs_compiler

ROOT = Path(__file__).parents[1]


def pyproject():
    """pyproject.toml; Python 3.10 has no reader of its own."""
    toml = pytest.importorskip("tomllib")
    return toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
HOOKS = ROOT / ".pre-commit-config.yaml"
GROUPS = pyproject()["dependency-groups"]


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps():
    """Every step of every workflow, with the workflow's name."""
    return [(path.name, step) for path in WORKFLOWS for job in read(path)["jobs"].values() for step in job["steps"]]


def commands():
    """The words of every command that workflows, hooks and CONTRIBUTING.md call."""
    scripts = [step["run"] for _, step in steps() if "run" in step]
    scripts += [hook["entry"] for repo in read(HOOKS)["repos"] for hook in repo["hooks"]]
    scripts += re.findall(r"^```sh\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    scripts += [
        code for code in re.findall(r"`([^`\n]+)`", PAGE) if code.startswith(("uv ", ".ci/", "ruff ", "detloss "))
    ]
    lines = [line.strip() for script in scripts for line in script.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line]


def packages(group):
    """The packages of a dependency group of pyproject.toml, the group's own and those of its groups."""
    for entry in GROUPS[group]:
        if isinstance(entry, dict):
            yield from packages(entry["include-group"])
        else:
            yield re.match(r"[\w-]+", entry)[0]


def called(words):
    """What ``uv run`` runs, without uv's own options, or the command itself."""
    if words[:2] != ["uv", "run"]:
        return words
    words = words[2:]
    while words[0].startswith("-"):
        words = words[2:] if words[0] == "--group" else words[1:]
    return words


def test_the_forge_runs_what_is_there():
    assert {path.stem for path in WORKFLOWS} == {"docs", "tests", "versions"}
    for name, step in steps():
        assert ("run" in step) != ("uses" in step), name
    assert [".ci/run"] in commands()
    for words in map(called, commands()):
        program = words[0]
        if "/" in program:
            path = ROOT / program
            assert path.is_file(), words
            assert program.startswith("tools/") or path.stat().st_mode & 0o100, f"{program} cannot be run"
        elif program == "detloss":
            assert (ROOT / "detloss_plugins" / "cli" / f"{words[1]}.py").exists(), words
        else:
            there = {"uv", "python", "echo", *(package for group in GROUPS for package in packages(group))}
            assert program in there or any(name.startswith(f"{program}-") for name in there), words


def test_nothing_but_the_forge_is_named():
    """No secret, and no address that a workflow or a hook would have to reach beside the forge's own actions."""
    for path in [*WORKFLOWS, HOOKS]:
        text = path.read_text(encoding="utf-8")
        assert "secrets." not in text
        assert "://" not in text
    for _, step in steps():
        assert step.get("uses", "actions/").startswith("actions/")
    assert {repo["repo"] for repo in read(HOOKS)["repos"]} == {"local"}


def test_a_bug_report_asks_for_what_it_needs():
    for path in TEMPLATES:
        if path.stem == "config":
            continue
        form = read(path)
        assert {"name", "description", "body"} <= form.keys()
        assert len({part["id"] for part in form["body"]}) == len(form["body"])
    asked = {part["attributes"]["label"]: part for part in read(ROOT / ".github/ISSUE_TEMPLATE/bug.yml")["body"]}
    (report,) = (part for label, part in asked.items() if "detloss check --report" in label)
    assert report["validations"]["required"]


def example(tmp_path):
    """The module of CONTRIBUTING.md's example, in a file, and the code that checks it."""
    loss, check = re.findall(r"^ *```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    there = (ROOT / "detloss_plugins/losses/regression.py").read_text(encoding="utf-8")
    head = there[: there.index("__all__")]  # what the file imports already
    (tmp_path / "example.py").write_text(head + loss, encoding="utf-8")
    return "import doctest, example\nassert doctest.testmod(example) == (0, 1)\n", re.sub("^   ", "", check, flags=re.M)


def run(code, folder):
    """In a process of its own, so that the example does not join the registry of the other tests."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@needs_compiler
def test_the_worked_example(tmp_path):
    doctest, check = example(tmp_path)
    run(f"{doctest}from example import CharbonnierLoss\n{check}", tmp_path)


def test_the_page_is_one_page():
    assert len(PAGE.splitlines()) < 80
    assert len(set(re.findall(r"\]\((?!http)([^)]+)\)", PAGE))) > 0
    assert all((ROOT / link).exists() for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGE))
