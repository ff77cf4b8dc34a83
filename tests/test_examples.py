"""The examples do what they say; the notebooks hold the scripts' code."""

import json
import subprocess
import sys
from pathlib import Path

import notebooks
import pytest
from support import needs_compiler

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_notebooks_are_those_of_the_scripts():
    assert [path.stem for path in notebooks.scripts()] == [
        "ablation",
        "mmdetection_training",
        "own_loss",
        "yolo_training",
    ]
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == {path.stem for path in notebooks.scripts()}
    assert notebooks.main(["--check"]) == 0, "run tools/notebooks.py"


def test_a_script_becomes_a_notebook(tmp_path, monkeypatch, capsys):
    script = "# %% [markdown]\n# # Title\n#\n# Words.\n\n# %%\na = 1\n\nb = '# %%'\n\n\n# %%\nprint(a)\n"
    assert notebooks.cells(script) == [
        (True, "# Title\n\nWords."),
        (False, "a = 1\n\nb = '# %%'"),
        (False, "print(a)"),
    ]
    (tmp_path / "x.py").write_text(script, encoding="utf-8")
    (tmp_path / "plain.py").write_text("print(1)\n", encoding="utf-8")
    monkeypatch.setattr(notebooks, "EXAMPLES", tmp_path)
    assert notebooks.main(["--check"]) == 1
    assert "x.ipynb is out of date" in capsys.readouterr().err
    assert notebooks.main([]) == 0
    (found,) = tmp_path.glob("*.ipynb")
    content = json.loads(found.read_text(encoding="utf-8"))
    assert [cell["cell_type"] for cell in content["cells"]] == ["markdown", "code", "code"]
    assert content["cells"][1]["source"] == ["a = 1\n", "\n", "b = '# %%'"]
    assert content["nbformat"] == 4


def run(command, folder):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def run_notebook(name, folder):
    """Run the code cells of a notebook in order; returns what they print."""
    content = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 1
    script = folder / f"{name}_cells.py"
    script.write_text("\n\n".join(code), encoding="utf-8")
    return run([script], folder)


@pytest.mark.slow
def test_yolo_training(tmp_path):
    printed = run_notebook("yolo_training", tmp_path)
    assert "cls: VarifocalLoss(loss_weight=4.0)" in printed
    assert "a DetectionModel of Ultralytics" in printed
    assert "mAP50 0." in printed
    assert (tmp_path / "runs" / "yolo_training" / "weights" / "best.pt").exists()


@pytest.mark.slow
def test_mmdetection_training(tmp_path):
    pytest.importorskip("mmdet")
    printed = run_notebook("mmdetection_training", tmp_path)
    assert "is no place for FocalLoss, a classification loss" in printed
    assert "<class 'detloss_plugins.losses.classification.focal.QualityFocalLoss'>" in printed
    assert (tmp_path / "work_dirs" / "mmdetection_training" / "epoch_1.pth").exists()


@pytest.mark.slow
@needs_compiler
def test_own_loss(tmp_path):
    printed = run_notebook("own_loss", tmp_path)
    assert "tensor(2.2500)" in printed
    assert "every promise holds" in printed
    assert "share of MixedIoULoss must be a number in [0, 1], not 1.5." in printed


@pytest.mark.slow
def test_ablation(tmp_path):
    printed = run_notebook("ablation", tmp_path)
    assert "vfl" in printed
    assert "2 of 3 seeds" in printed
    assert (tmp_path / "runs" / "ablation" / "report.html").exists()


@pytest.mark.slow
def test_the_broken_labels_are_among_the_worst():
    worst = run([EXAMPLES / "worst_labels.py"], None).splitlines()[-10:]
    assert sum("its class is wrong" in line for line in worst) == 1, worst
    assert sum("its box is wrong" in line for line in worst) == 1, worst
