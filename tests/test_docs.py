"""The pages: every link inside works, every Python block runs, every command of a shell block is one that there is.

How a shell block is tried: the words of ``detloss`` are parsed by the subcommand's own parser, with the files that they
name in place, and configs are looked up. Names of sessions, groups and extras, pinned versions and what CI runs are
looked up where they are defined. The slow tests look for the options of our tools in their ``--help``, and run the
commands of ``detloss`` that :data:`SMALLER` can make small, and its trainings on the digits for an epoch. What installs
is not run.
"""

import ast
import contextlib
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from support.pages import PAGES, ROOT, anchors, blocks, commands, links

from detloss_plugins import build_loss, study
from detloss_plugins.cli import main
from detloss_plugins.cli.train import DEFAULT_CONFIG
from detloss_plugins.configs import find

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
# Examples of a new loss are parts of a file: test_readme.py and test_project.py put them there.
PYTHON = [block for block in blocks("python") if not re.search(r"LogCoshLoss|CharbonnierLoss", block.code)]
TRAINS = [block for block in PYTHON if re.search(r"\.train\(|\btune\(", block.code)]
SHELL = {" ".join(words): words for block in blocks("sh") for words in commands(block.code)}
DETLOSS = {line: words[words.index("detloss") + 1 :] for line, words in SHELL.items() if "detloss" in words[:4]}
DETLOSS = {line: words for line, words in DETLOSS.items() if words[0] in main.list_commands(None)}
OURS = [line for line, words in SHELL.items() if any(word.startswith("tools/") for word in words)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page):
    for link in links(page):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", ["adapters.mmdetection", "adapters.ultralytics", "testing"])
def test_the_reference_has_all_public_names(name):
    """By the paths at which they are defined, which differ from where they are imported from."""
    package = pytest.importorskip(f"detloss_plugins.{name}")
    page = (ROOT / "docs" / "api" / f"{name.rpartition('.')[2]}.md").read_text(encoding="utf-8")
    entries = {path.rpartition(".")[2]: path for path in re.findall(r"^::: (\S+)", page, re.MULTILINE)}
    assert sorted(entries) == sorted(package.__all__)
    for public, path in entries.items():
        assert pkgutil.resolve_name(path) is getattr(package, public)


@pytest.mark.parametrize("block", [block for block in PYTHON if block not in TRAINS], ids=str)
def test_python_blocks_run(block):
    """The dicts of a config are built, too."""
    names = {}
    exec(compile(block.code, block.page, "exec"), names)

    def build(node):
        if isinstance(node, dict):
            if str(node.get("type", "")).endswith("Loss"):
                build_loss({key: value for key, value in node.items() if key != "_delete_"})
            for value in node.values():
                build(value)

    for name in ("model", "bbox_head"):
        build(names.get(name))
    if "mean" in names:
        assert names["mean"] == names["same"] == 2 * names["per_box"].mean()


@pytest.mark.parametrize("block", TRAINS, ids=str)
def test_python_blocks_that_train_compile(block):
    """What they import is there; the slow test below runs them."""
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom):
            exec(compile(ast.Module([node], []), block.page, "exec"), {})


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder in which there are the files that the pages speak of; ``data.yaml`` is the digits set."""
    from detloss_plugins.testing.digits import build_digits

    shutil.copy(build_digits() / "digits.yaml", tmp_path / "data.yaml")
    text = (tmp_path / "data.yaml").read_text(encoding="utf-8")
    if not re.search(r"^path: /", text, re.MULTILINE):
        text = re.sub(r"^path:.*\n", "", text, flags=re.MULTILINE) + f"path: {build_digits()}\n"
    (tmp_path / "data.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("block", TRAINS, ids=str)
def test_python_blocks_that_train(block, data, monkeypatch):
    """For two epochs on small images, of which a resume is told that the second is still to come."""
    import ultralytics

    from detloss_plugins.adapters import ultralytics as adapter

    small = {"epochs": 2, "imgsz": 64, "batch": 32, "plots": False, "pretrained": False, "fraction": 0.1}
    last = Path("runs/detect/train/weights/last.pt")
    train, tune = ultralytics.YOLO.train, adapter.tune

    def shorter(self, **settings):
        if not settings.get("resume"):
            self.add_callback("on_model_save", lambda trainer: keep(trainer))
            settings = {**small, "project": str(data / "runs" / "detect"), "name": "train", **settings}
        done = train(self, **settings)
        if (data / "kept.pt").exists() and not settings.get("resume"):
            shutil.move(data / "kept.pt", last)
        return done

    def keep(trainer):
        if trainer.epoch == 0:
            shutil.copy(trainer.last, data / "kept.pt")

    monkeypatch.setattr(ultralytics.YOLO, "train", shorter)
    monkeypatch.setattr(adapter, "tune", lambda *args, **given: tune(*args, **{**given, **small, "iterations": 1}))
    exec(compile(block.code, block.page, "exec"), {})


def in_place(words, folder):
    """Put a file where a command names one that it expects: the package's own, or an empty one."""
    expected = [
        word.removeprefix("resume=") for word, before in zip(words, ["", *words], strict=False) if before != "--model"
    ]
    for name in (word.partition(":")[0] for word in expected if "=" not in word):
        path = folder / name
        if name.startswith("configs/"):
            shutil.copytree(ROOT / "configs", folder / "configs", dirs_exist_ok=True)
        elif name.startswith("path/to/"):
            path.mkdir(parents=True)
        elif path.suffix in {".yaml", ".py", ".pt"} and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def test_there_are_commands_of_every_kind():
    assert len(DETLOSS) > 5
    assert len(OURS) > 5
    assert len(SHELL) > 30


@pytest.mark.parametrize("line", DETLOSS)
def test_detloss_takes_the_command(line, tmp_path, monkeypatch):
    subcommand, *words = DETLOSS[line]
    monkeypatch.chdir(tmp_path)
    in_place(words, tmp_path)
    Path("ablation").mkdir()  # of a report
    command = main.get_command(click.Context(main), subcommand)
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(command.make_context(f"detloss {subcommand}", list(words)))
        assert not context.args
    if subcommand == "train":
        for word in words[: next((i for i, word in enumerate(words) if word.startswith("-")), len(words))]:
            assert "=" in word or Path(word).exists() or find(word)


def defined(section, name):
    """Whether a key is in a table of pyproject.toml."""
    table = PROJECT.partition(f"[{section}]\n")[2].partition("\n[")[0]
    return re.search(rf"^{re.escape(name)} = ", table, re.MULTILINE)


def test_the_command_is_the_projects():
    assert defined("project.scripts", "detloss")


@pytest.mark.parametrize("line", [line for line in SHELL if line not in DETLOSS])
def test_other_commands(line):
    words = SHELL[line]
    if words[:2] == ["uv", "run"]:
        words = words[2:]
        while words[0].startswith("-"):
            if words.pop(0) == "--group":
                assert defined("dependency-groups", words.pop(0))
    program, *rest = words
    if program == "pip":
        for word in rest[1:]:
            assert (extra := re.fullmatch(r"\.\[(\w+)\]", word)) is None or defined(
                "project.optional-dependencies", extra[1]
            )
            assert "==" not in word or f'"{word}"' in PROJECT
    elif program in ("mypy", "pytest", "ruff"):
        in_ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
        assert f"{' '.join(words)}\n" in in_ci
    elif program == "nox":
        assert rest[0] == "-s"
        assert all(f'"{session}": Row(' in (ROOT / "noxfile.py").read_text(encoding="utf-8") for session in rest[1:])
    elif words[:4] == ["uv", "tool", "run", "pre-commit"]:
        assert (ROOT / ".pre-commit-config.yaml").exists()
    elif program == "python":
        compile(rest[1], line, "exec")
    elif program == "torchrun":
        assert rest[2:5] == ["-m", "detloss_plugins", "train"]
        assert find(rest[5])
    elif program == "mkdocs":
        assert rest == ["build"]
        assert (ROOT / "mkdocs.yml").exists()
    else:
        assert program.startswith("tools/"), line
        assert (ROOT / program).exists()


@pytest.mark.slow
@pytest.mark.parametrize("line", OURS)
def test_options_of_the_tools(line):
    start = next(i for i, word in enumerate(SHELL[line]) if word.startswith("tools/"))
    tool, *words = SHELL[line][start:]
    if options := [word for word in words if word.startswith("--")]:
        done = subprocess.run(
            [sys.executable, ROOT / tool, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
        )
        assert all(re.search(rf"{option}\b", done.stdout) for option in options)


# What makes a command small; compare, which takes minutes, has tests of its own.
SMALLER = {
    "list": [],
    "show": [],
    "check": [],
    "advise": [],
    "calibrate": ["--steps", "4", "imgsz=64"],
    "ablate": ["--seeds", "1", "--epochs", "1", "imgsz=64", "fraction=0.1"],
    "report": [],
}
# By the kind of a config.
SHORTER = {".yaml": ["epochs=1", "imgsz=64", "fraction=0.1"], ".py": ["train_cfg.max_epochs=1"]}
# On the digits, or the file that the tests have in place; a resumed one and COCO's would have to be there, and mixed
# precision is for a GPU.
TRAININGS = [
    line
    for line, words in DETLOSS.items()
    if words[0] == "train" and not re.search(r"resume=|path/to|my_config\.py|AmpOptimWrapper", line)
]


# Of those that differ in their options, as a training takes long.
RUN = {
    (words[0], Path(words[1]).suffix, *filter(re.compile("--").match, words)): line
    for line, words in DETLOSS.items()
    if words[1:]
}


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in RUN.values() if DETLOSS[line][0] in SMALLER])
def test_detloss_runs_the_command(line, data):
    subcommand, *words = DETLOSS[line]
    for name, config in {"losses.yaml": "qfl", "qfl.yaml": "qfl", "wise.yaml": "wise_inner_nwd"}.items():
        shutil.copy(find(config), data / name)
    there = (ROOT / "detloss_plugins/losses/regression.py").read_text(encoding="utf-8")
    (example,) = [block.code for block in blocks("python") if "class LogCoshLoss" in block.code]
    (data / "ablation").mkdir()
    shutil.copy(study.FOLDER / "digits.json", data / "ablation" / "results.json")
    (data / "my_losses.py").write_text(there[: there.index("__all__")] + example, encoding="utf-8")
    in_place(words, data)
    run_apart(subcommand, *words, *SMALLER[subcommand])


@pytest.mark.slow
@pytest.mark.parametrize("line", TRAININGS)
def test_detloss_trains_as_told(line, data):
    config = next((word for word in DETLOSS[line][1:] if "=" not in word and not word.startswith("--")), DEFAULT_CONFIG)
    if find(config).suffix == ".py":
        pytest.importorskip("mmdet")
    assert "mAP50" in run_apart(*DETLOSS[line], *SHORTER[find(config).suffix])


def run_apart(*words):
    """Run ``detloss`` in a process of its own, as losses and models are registered there; what it printed."""
    command = [sys.executable, "-m", "detloss_plugins", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout
