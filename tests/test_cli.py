"""The command ``detloss``: its help, what all subcommands refuse in the same way, and the small ones themselves."""

import subprocess
import sys

import pytest
from support.commands import detloss

import detloss_plugins
from detloss_plugins.cli import main, train
from detloss_plugins.cli._common import INSTALL

COMMANDS = main.list_commands(None)


def test_help_of_every_subcommand_has_an_example(capsys):
    assert "train" in COMMANDS
    assert detloss(capsys) == detloss(capsys, "--help") == detloss(capsys, "-h")
    assert detloss(capsys, "--version").split()[-1] == detloss_plugins.__version__
    for name in COMMANDS:
        text = detloss(capsys, name, "--help")
        assert f"\n  detloss {name} " in text.replace("\n    ", "\n  ").replace("\n    ", "\n  "), name
        assert main.get_command(None, name).get_short_help_str(limit=200) in detloss(capsys, "--help").replace("\n", "")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--no-such"], "such option"),
        (["no-such"], "error: No such command 'no-such'"),
        (["_common"], "error: No such command '_common'"),
        (["train", "--no-such"], "Try: detloss train --help"),
        (["train", "--data"], "error: Option '--data' requires an argument"),
    ],
)
def test_what_the_command_line_cannot_mean_is_one_sentence(words, sentence, capsys):
    printed = detloss(capsys, *words, status=2)
    assert printed.startswith("error: ")
    assert sentence in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("module", INSTALL)
def test_what_is_missing_is_one_sentence(module, capsys, monkeypatch):
    def import_it(_):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(train, "train_yolo", import_it)
    assert detloss(capsys, "train", "epochs=1", status=1) == f"error: {INSTALL[module]}"
    assert "nstall" in INSTALL[module]


def test_a_fault_of_our_own_is_no_missing_package(monkeypatch):
    def import_it(_):
        raise ModuleNotFoundError("No module named 'detloss_plugins.nowhere'", name="detloss_plugins.nowhere")

    monkeypatch.setattr(train, "train_yolo", import_it)
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        main(["train", "epochs=1"])


def test_help_imports_no_framework():
    heavy = ["mmdet", "mmcv", "ultralytics", "torchvision", "sklearn", "matplotlib"]
    code = (
        "import sys\n"
        f"for name in {heavy}: sys.modules[name] = None\n"
        "from detloss_plugins.cli import main\n"
        "main(['--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
