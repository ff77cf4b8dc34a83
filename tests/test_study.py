"""The study's page and what is taken into the study, with trainings that are made up."""

import json
import re

import pytest
import study

from detloss_plugins.ablation import grid
from detloss_plugins.ablation.compare import WORSE, groups, merged, table
from detloss_plugins.cli._common import UsageError
from detloss_plugins.cli.train import DEFAULT_CONFIG
from detloss_plugins.configs import find
from detloss_plugins.study import studies


def trained(label, data, aps, slot="cls", weight=2.0):
    """Runs of a loss, a seed each, with these AP."""
    losses = {} if label == "stock" else {slot: {"type": label, "loss_weight": weight}}
    same = {"label": label, "slot": slot, "losses": losses, "model": "yolov8n.yaml", "data": data, "epochs": 3}
    figures = {
        "AP_first_third": 0.123456,
        "AP_last_third": None,
        "calibration_error": 0.031,
        "seconds_per_epoch": 1200.0,
    }
    return [
        {
            **same,
            "seed": s,
            "metrics": {"AP50": ap + 0.2, "AP": ap, **figures},
            "per_class": {"a": ap},
            "curve": {"AP50": [0.5], "AP": [0.4]},
        }
        for s, ap in enumerate(aps)
    ]


def results(*runs, machine="2 cores"):
    return {
        "name": "x",
        "data": "digits",
        "epochs": 3,
        "versions": {"torch": "2.5.1"},
        "machine": machine,
        "runs": runs,
    }


RUNS = [
    *trained("stock", "digits", (0.40, 0.42, 0.41)),
    *trained("FocalLoss", "digits", (0.44, 0.47, 0.45), weight=12.3456),
    *trained("GIoULoss", "digits", (0.45, 0.40, 0.43), "box"),
    *trained("stock", "digits:small", (0.40, 0.42, 0.41)),
    *trained("FocalLoss", "digits:small", (0.30, 0.31, 0.31), weight=12.3456),
]


def test_the_page_has_every_loss_beside_stock():
    text = study.content([results(*RUNS)])
    assert "15 trainings, 15.0 hours, on 2 cores, with torch 2.5.1." in text
    sections = text.split("## ")
    assert [part.splitlines()[0] for part in sections[1:]] == [
        "What comes out",
        "What does not come out",
        "digits, yolov8n.yaml, 3 epochs",
        "digits:small, yolov8n.yaml, 3 epochs",
    ]
    (focal,) = (line for line in sections[3].splitlines() if line.startswith("| FocalLoss "))
    cells = [cell.strip() for cell in focal.strip("|").split("|")]
    assert cells[:3] == ["FocalLoss", "12.3", "0.653 ± 0.015"]
    assert cells[3].startswith("+0.043 [+0.029, +0.058]")
    assert cells[4] == "better"
    assert cells[-3:] == ["0.123 ± 0.000", "0.031 ± 0.000", "3"]
    assert sections[3].count("| stock |") == 2, "one a slot"
    assert "Pairs in AP: better: FocalLoss; worse: none, of 2 with 3 seeds." in sections[3]
    assert "two means of 3 seeds must be 0.044 apart: better: none; worse: none." in sections[3]
    assert "better: none; worse: FocalLoss." in sections[4]


def test_the_page_says_what_does_not_come_out():
    came, text = study.content([results(*RUNS)]).split("## What does not come out")
    assert came.endswith("## What comes out\n\nNothing, at the 3 or more seeds that a verdict takes.\n\n")
    good = study.content([results(*RUNS[:9])]).split("## What comes out")[1]
    assert good.startswith("\n\n- FocalLoss is better than stock on digits (yolov8n.yaml, 3 epochs: pairs).\n")
    assert "- digits:small, yolov8n.yaml, 3 epochs: none of 1 is better than stock" in text
    small, plain = "digits:small (yolov8n.yaml, 3 epochs: pairs and at once)", "digits (yolov8n.yaml, 3 epochs: pairs)"
    assert f"- FocalLoss is worse than stock on {small}, though better on {plain}." in text
    assert study.content([]) == "The study has no trainings yet.\n"
    alone = study.content([results(*trained("stock", "digits", (0.4,)))])
    assert "There is nothing beside the stock losses yet." in alone


def written(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_results_join_a_study(tmp_path):
    runs = [{**run, "model": f"some/folder/{run['model']}"} for run in RUNS[:6]]
    first = written(tmp_path / "results.json", results(*runs))
    folder = tmp_path / "study"
    folder.mkdir()
    file = study.add(first, "mine", folder)
    (stored,) = study.studies(folder)
    assert stored["runs"][0]["metrics"]["AP_first_third"] == 0.1235
    assert stored["runs"][0]["model"] == "yolov8n.yaml"
    assert stored["runs"][0]["curve"] == {"AP50": [0.5]}
    assert stored["runs"][-1]["losses"]["cls"]["loss_weight"] == 12.3456, "as it was trained"
    again = trained("FocalLoss", "digits", (0.5, 0.5, 0.5), weight=12.3456)
    study.add(written(tmp_path / "results.json", results(*again, *RUNS[6:9], machine="a GPU")), "mine", folder)
    (joined,) = study.studies(folder)
    assert len(joined["runs"]) == 9
    assert {run["metrics"]["AP"] for run in joined["runs"] if run["label"] == "FocalLoss"} == {0.5}, "the newer"
    assert joined["machine"] == "2 cores; a GPU"
    other = results(*trained("FocalLoss", "digits", (0.5,), weight=1.0))
    with pytest.raises(UsageError, match=r"FocalLoss with yolov8n\.yaml is"):
        study.add(written(tmp_path / "results.json", other), "mine", folder)
    assert study.studies(folder) == [joined]
    elsewhere = [{**run, "model": f"/another/folder/{run['model']}"} for run in other["runs"]]
    with pytest.raises(UsageError, match=r"FocalLoss with yolov8n\.yaml is"):
        study.add(written(tmp_path / "results.json", {**other, "runs": elsewhere}), "mine", folder)
    with pytest.raises(UsageError):
        study.add(tmp_path / "nowhere.json", "mine", folder)
    with pytest.raises(UsageError, match="no trainings that have finished"):
        study.add(written(tmp_path / "results.json", results()), "another", folder)
    assert not (folder / "another.json").exists()
    assert file.read_text(encoding="utf-8").count("\n") == 9 + 7, "a training a line"


def test_weights_that_were_found_are_on_the_page():
    found = [
        {**run, "weights": {"cls": 4.0 + run["seed"]}} for run in trained("A", "digits", (0.44, 0.47), weight="auto")
    ]
    asked = trained("B", "digits", (0.44, 0.47), weight="auto")
    lines = study.content([results(*RUNS[:3], *found, *asked)]).splitlines()
    assert any(line.startswith("| A | auto: 4.5 |") for line in lines)
    assert any(line.startswith("| B | auto |") for line in lines)


def test_settings_beside_the_weight_are_on_the_page():
    slide = {"cls": {"type": "SlideLoss", "loss_weight": 0.785, "decay": 0.999}}
    runs = [{**run, "losses": slide} for run in trained("SlideLoss", "digits", (0.44, 0.47))]
    assert "| SlideLoss | 0.785 decay=0.999 |" in study.content([results(*RUNS[:3], *runs)])


def test_nothing_is_added_that_no_page_can_be_made_of(tmp_path):
    """Another study has the same loss with another weight."""
    study.add(written(tmp_path / "results.json", results(*RUNS[:6])), "mine", tmp_path)
    other = results(*trained("FocalLoss", "digits", (0.5,), weight=1.0))
    with pytest.raises(UsageError, match="FocalLoss with yolov8n"):
        study.add(written(tmp_path / "results.json", other), "other", tmp_path)
    assert not (tmp_path / "other.json").exists()


def test_command(tmp_path, monkeypatch, capsys):
    page = tmp_path / "experiments.md"
    page.write_text(f"# Mine\n\n{study.BEGIN}old\n{study.END}\nthe end\n", encoding="utf-8")
    monkeypatch.setattr(study, "PAGE", page)
    monkeypatch.setattr(study, "studies", lambda: [results(*RUNS)])
    assert study.main(["--check"]) == 1
    assert "experiments.md is out of date" in capsys.readouterr().err
    assert study.main([]) == 0
    assert page.read_text(encoding="utf-8").startswith("# Mine")
    assert page.read_text(encoding="utf-8").endswith("the end\n")
    assert study.main(["--check"]) == 0
    for words in (["--add", "x"], ["--name", "x"], ["--add", "x", "--name", "../x"]):
        with pytest.raises(SystemExit):
            study.main(words)
    assert study.main(["--add", str(tmp_path / "x"), "--name", "x"]) == 2


def test_the_grids_of_the_study(tmp_path, capsys):
    """What ablate makes of them are the study's trainings."""
    assert study.main(["--grids", str(tmp_path)]) == 0
    files = [*tmp_path.iterdir()]
    assert {*capsys.readouterr().out.splitlines()} == {*map(str, files)}
    assert len(files) == len(groups(merged(studies())))
    there, again = {}, {}
    for run in merged(studies()):
        table = there.setdefault((run["model"], run["data"], run["epochs"]), {})
        table.update({run["label"]: run["losses"]} if run["label"] != "stock" else {})
    for file in files:
        own = grid.check_grid(grid.parse_words([str(file)])[0])
        (model,), (data,) = own["models"], own["data"]
        again[model, data, own["epochs"]] = own["losses"]
    assert again == there


def test_the_page_is_that_of_the_study():
    assert study.updated(study.PAGE.read_text(encoding="utf-8"), study.studies()) == study.PAGE.read_text(
        encoding="utf-8"
    ), "run tools/study.py"


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md", "docs/index.md"])
def test_the_means_that_are_shown_first_are_those_of_the_study(page):
    (found,) = (runs for key, runs in groups(merged(studies())).items() if key == ("digits", "yolov8n.yaml", 12))
    rows = {row.label: row for row in table(found)}
    means = [f"{rows[label].spreads['AP50'].mean:.3f}" for label in ("ATFL+MPDIoU", "stock")]
    text = (study.PAGE.parents[1] / page).read_text(encoding="utf-8")
    (line,) = (part for part in text.split("\n\n") if "detloss train stock" in part and means[1] in part)
    assert re.findall(r"0\.\d{3}", line)[-2:] == means
    assert {len(rows[label].seeds) for label in ("ATFL+MPDIoU", "stock")} == {6}, "the sentence says six"


def test_the_default_losses_are_not_worse_than_stock_in_the_study():
    """On both data sets with every model. Of the scenarios, faulty labels are a reason for other losses; but in none
    may the difference be more than what seeds change."""
    default = pytest.importorskip("detloss_plugins.adapters.ultralytics").load_losses(find(DEFAULT_CONFIG))
    seen = []
    for where, runs in groups(merged(studies())).items():
        rows = {row.label: row for row in table(runs)}
        row = next((row for row in rows.values() if row.losses == default), None)
        if row is None:  # a table that was made for other losses
            continue
        assert len(row.seeds) >= 3, where
        if ":" in where[0]:
            assert row.differences["AP50"].verdict != WORSE, where
            continue
        assert row.spreads["AP50"].mean >= rows["stock"].spreads["AP50"].mean - 0.02, where
        seen.append(where[:2])
    assert len(seen) >= 4
