"""The ablation: what a grid means, which trainings it starts, goes on with and refuses, and what it measures."""

import copy
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from detloss_plugins.ablation import Run, Study, mmdetection, plan, study, yolo
from detloss_plugins.ablation import measure as measuring
from detloss_plugins.ablation.grid import check_grid, contradiction, losses_of_word, parse_words, seeds_of, slots_of
from detloss_plugins.ablation.measure import evaluate, evaluate_coco
from detloss_plugins.ablation.progress import Bar
from detloss_plugins.cli import main
from detloss_plugins.cli.ablate import told_how_to_go_on
from detloss_plugins.losses import GIoULoss
from detloss_plugins.registry import MODELS, build_loss

RUN = Run(
    "vfl", {"cls": {"type": "VarifocalLoss", "loss_weight": 4.0}}, "yolov8n.yaml", "digits", "", 2, 0, {"batch": 4}
)
STOCK = replace(RUN, label="stock", losses={})
# What each word on the command line is: losses by label and arguments.
WORDS = {
    "VarifocalLoss": ({"VarifocalLoss": {"type": "VarifocalLoss"}}, {}),
    "GIoULoss:2.5": ({"GIoULoss:2.5": {"type": "GIoULoss", "loss_weight": 2.5}}, {}),
    "strong=GIoULoss:2.5": ({"strong": {"type": "GIoULoss", "loss_weight": 2.5}}, {}),
    "wise=box: {type: WIoULoss}": ({"wise": {"box": {"type": "WIoULoss"}}}, {}),
    "slide={type: SlideLoss, decay: 0.9}": ({"slide": {"type": "SlideLoss", "decay": 0.9}}, {}),
    "imgsz=96": ({}, {"imgsz": 96}),
    "optimizer=SGD": ({}, {"optimizer": "SGD"}),
    "cos_lr=true": ({}, {"cos_lr": True}),
    "lr0=1e-3": ({}, {"lr0": 0.001}),
    "project=runs/set #2": ({}, {"project": "runs/set #2"}),
    "name='1' # one": ({}, {"name": "1"}),
    "long=cls: {type: FocalLoss}" + " " * 300: ({"long": {"cls": {"type": "FocalLoss"}}}, {}),
}


@pytest.mark.parametrize("word", WORDS)
def test_words(word):
    assert parse_words([word]) == ({}, *WORDS[word])


def test_a_slot_fills_in_what_a_loss_must_be_given():
    pytest.importorskip("ultralytics")
    assert slots_of({"type": "MPDIoULoss"}, "detect") == {
        "box": {"image_size": "batch", "type": "MPDIoULoss", "loss_weight": 1.0}
    }


def test_files_and_configs_are_words_too(tmp_path):
    own, grid = tmp_path / "mine.yaml", tmp_path / "grid.yaml"
    own.write_text("box: {type: WIoULoss}", encoding="utf-8")
    grid.write_text("losses: {a: {type: GIoULoss}}\nseeds: 2", encoding="utf-8")
    assert losses_of_word(str(own)) == ("mine", {"box": {"type": "WIoULoss"}})
    label, losses = losses_of_word("vfl_eiou_dfl")
    assert (label, losses["box"]) == ("vfl_eiou_dfl", {"type": "EIoULoss"})
    found, losses, args = parse_words([str(grid), "DIoULoss", "lr0=0.01"])
    assert (found, list(losses), args) == (
        {"losses": {"a": {"type": "GIoULoss"}}, "seeds": 2},
        ["DIoULoss"],
        {"lr0": 0.01},
    )


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("VarifokalLoss", "did you mean VarifocalLoss"),
        ("nothing", "no loss and no file of losses"),
        ("none.yaml", "there is no none.yaml"),
        ("VarifocalLoss:heavy", "a weight is a number"),
        ("retinanet_r18_fpn_digits", "give it as the model"),
        ("a={type: [}", "is no YAML"),
        ("nothing" * 50, "no loss and no file of losses"),
    ],
)
def test_words_that_mean_nothing(word, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        parse_words([word])


def test_a_label_is_given_once():
    with pytest.raises(ValueError, match="VarifocalLoss is given twice"):
        parse_words(["VarifocalLoss", "VarifocalLoss"])


def test_a_grid_file():
    grid = check_grid({"losses": ["GIoULoss:2", "vfl_eiou_dfl"], "models": "yolov8n", "data": "digits", "seeds": 2})
    assert grid["losses"]["GIoULoss:2"] == {"type": "GIoULoss", "loss_weight": 2.0}
    assert (grid["models"], grid["data"], grid["seeds"], grid["args"]) == (["yolov8n"], ["digits"], [0, 1], {})
    assert seeds_of([4, 2, 4]) == [2, 4]
    assert check_grid({"losses": None, "models": None, "args": {"lr0": "1e-3"}}) == {
        "losses": {},
        "args": {"lr0": 0.001},
    }


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ({"loss": {}}, "and no loss"),
        ({"losses": {"a": 3}}, "a dict, label"),
        ({"losses": {}, "args": [1]}, "The args"),
        ({"losses": ["GIoULoss", "GIoULoss"]}, "GIoULoss is given twice"),
        ({"losses": {}, "seeds": 0}, "seeds are a number"),
        ({"losses": {}, "seeds": ["0"]}, "seeds are a number"),
    ],
)
def test_grids_that_are_none(grid, says):
    with pytest.raises(ValueError, match=says):
        check_grid(grid)


@pytest.mark.parametrize(
    "more",
    [
        replace(RUN, seed=1),
        replace(RUN, label="other", losses={}),
        replace(RUN, model="yolo11n.yaml", epochs=3),
        replace(RUN, data="trees", path="/trees.yaml", epochs=3),
        replace(RUN, args={"batch": 4, "device": 1}),
    ],
)
def test_what_may_be_added(more):
    assert contradiction([RUN, STOCK], [RUN, more]) is None


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (replace(RUN, losses={"cls": {"type": "VarifocalLoss", "loss_weight": 5.0}}), "give it another label"),
        (replace(RUN, label="more", epochs=3), "epochs 2, not 3"),
        (replace(RUN, seed=7, args={"batch": 8}), r"args \(batch=4\), not \(batch=8\)"),
        (replace(RUN, label="more", path="/other/digits.yaml"), "data digits, not /other"),
        (replace(RUN, label="v-fl"), None),
        (replace(RUN, label="vfl", model="elsewhere/yolov8n.yaml"), "the folder vfl-yolov8n-digits-0"),
    ],
)
def test_what_contradicts(other, says):
    found = contradiction([RUN, STOCK], [other])
    assert found is None if says is None else re.search(says, found)


def test_a_folder_for_each_run():
    assert RUN.name == "vfl-yolov8n-digits-0"
    assert replace(RUN, label="a/b: {c}", data="digits:small").name == "a_b_c_-yolov8n-digits_small-0"


# What stands for a training: it counts how often it was begun, and fails for one label as if it was killed.
TRAINING = """
import json, os, pathlib, signal, sys
folder = pathlib.Path(sys.argv[1])
run = json.loads((folder / "run.json").read_text())
with (folder / "begun").open("a") as file:
    file.write(os.environ["OMP_NUM_THREADS"])
if run["label"] == "bad":
    os.kill(os.getpid(), signal.SIGKILL)
metrics = {"metrics": {"AP50": run["seed"] / 10}, "per_class": {}, "curve": {}, "versions": {}, "machine": "m"}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture
def pretended(monkeypatch):
    """Trainings that take no time."""

    def start(folder, environment, resume_after):
        (folder / "error.txt").unlink(missing_ok=True)
        return subprocess.Popen([sys.executable, "-c", TRAINING, folder], stdin=subprocess.PIPE, env=environment)

    monkeypatch.setattr(study, "start", start)
    monkeypatch.setattr(study, "POLL", 0.01)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_failure_does_not_stop_the_others_and_what_has_finished_is_kept(tmp_path, pretended):
    runs = [replace(run, seed=seed) for seed in (0, 1) for run in (STOCK, RUN, replace(RUN, label="bad"))]
    ours, seen = Study(tmp_path / "own"), []
    ours.add(runs)
    ours.train(runs, 2, seen.append)
    assert max(map(len, seen)) == 2
    assert all("signal 9" in error for error in ours.failed().values())
    assert set(ours.failed()) == {"bad-yolov8n-digits-0", "bad-yolov8n-digits-1"}
    runs.append(replace(STOCK, seed=2))
    ours.add(runs)
    ours.train(runs, 2)
    begun = {run.name: len((ours.of(run) / "begun").read_text(encoding="utf-8")) for run in runs}
    assert begun == {run.name: 2 if run.label == "bad" else 1 for run in runs}
    results = ours.results()
    assert [(run["label"], run["seed"]) for run in results["runs"]] == [
        ("stock", 0), ("stock", 1), ("stock", 2), ("vfl", 0), ("vfl", 1),
    ]  # fmt: skip
    assert (len(results["failed"]), results["unfinished"]) == (2, [])
    first = results["runs"][3]
    expected = {"label": "vfl", "slot": "cls", "losses": RUN.losses, "model": "yolov8n.yaml", "data": "digits"}
    expected |= {"epochs": 2, "seed": 0, "args": {"batch": 4}, "metrics": {"AP50": 0.0}, "per_class": {}, "curve": {}}
    assert first == expected
    assert (results["name"], results["data"], results["epochs"], results["machine"]) == ("own", "digits", 2, "m")


def test_results_of_another_grid_are_refused_and_what_has_not_finished_may_change(tmp_path, pretended):
    ours = Study(tmp_path)
    ours.add([RUN])
    left = [ours.of(RUN) / "last_checkpoint", ours.of(RUN) / "weights" / "last.pt"]
    left[1].parent.mkdir()
    for file in left:
        file.touch()
    ours.add([RUN])
    assert all(file.exists() for file in left)
    ours.add([replace(RUN, epochs=5)])
    assert not any(file.exists() for file in left)
    assert ours.runs() == [replace(RUN, epochs=5)]
    assert ours.results()["unfinished"] == [RUN.name]
    ours.train(ours.runs(), 1)
    with pytest.raises(ValueError, match=r"results of another grid: .* epochs 5, not 2, or take another folder"):
        ours.add([RUN])


def test_who_stops_an_ablation_is_told_that_it_goes_on(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), told_how_to_go_on(Study(tmp_path / "out")):
        raise KeyboardInterrupt
    assert "the same command goes on" in capsys.readouterr().err


def test_the_bar_counts_epochs(tmp_path, capsys):
    """Where there is no terminal, a line now and then; the time left is that of the epochs so far."""
    ours, runs = Study(tmp_path), [RUN, replace(RUN, seed=1)]
    ours.add(runs)
    bar = Bar(ours, runs, every=0)
    with bar:
        bar.tick(runs[:1])
        assert "0/4 epochs, time left: not known yet; vfl-yolov8n-digits-0" in capsys.readouterr().out
        (ours.of(RUN) / "results.csv").write_text("epoch,time\n1,5\n", encoding="utf-8")
        bar.progress.tasks[0].start_time -= 100
        bar.tick(runs)
        assert "1/4 epochs, 0:05:00 left; vfl-yolov8n-digits-0, vfl-yolov8n-digits-1" in capsys.readouterr().out


def test_the_time_left_after_an_earlier_start(tmp_path, capsys):
    """What was done before took none of the time since."""
    ours, runs = Study(tmp_path), [RUN, replace(RUN, seed=1)]
    ours.add(runs)
    for run in runs:
        (ours.of(run) / "results.csv").write_text("epoch,time\n1,5\n", encoding="utf-8")
    with Bar(ours, runs, every=0) as bar:
        bar.progress.tasks[0].start_time -= 100
        bar.tick(runs)
        assert "2/4 epochs, time left: not known yet" in capsys.readouterr().out
        (ours.of(RUN) / "results.csv").write_text("epoch,time\n1,5\n2,10\n", encoding="utf-8")
        bar.tick(runs)
        assert "3/4 epochs, 0:01:40 left" in capsys.readouterr().out
        for run in runs:  # both begin again
            (ours.of(run) / "results.csv").write_text("epoch,time\n", encoding="utf-8")
        bar.tick(runs)
        (ours.of(RUN) / "results.csv").write_text("epoch,time\n1,5\n", encoding="utf-8")
        bar.tick(runs)
        assert "1/4 epochs, 0:05:00 left" in capsys.readouterr().out


def test_ap_by_size_and_calibration_by_hand():
    """Three objects, each a size of COCO's and a third; the middle one is missed, by a detection elsewhere."""
    pytest.importorskip("pycocotools")
    truth = np.array([[0, 0, 5, 5, 10, 10], [1, 0, 5, 5, 50, 50], [2, 0, 5, 5, 100, 100]], dtype=float)
    found = [[0, 5, 5, 10, 10, 0.9, 0], [1, 200, 200, 50, 50, 0.8, 0], [2, 5, 5, 100, 100, 0.7, 0]]
    low = [2, 300, 300, 9, 9, 0.04, 0]  # a score below those that count in the calibration
    result = evaluate(truth, np.array([*found, low]), images=3, classes=2)
    # Of 101 recalls, 34 have the precision 1, 33 more 2/3, and the rest, that no detection reaches, 0.
    assert result["AP50"] == result["AP"] == result["AP75"] == pytest.approx(56 / 101, abs=1e-5)
    assert result["per_class"] == {"0": result["AP"], "1": None}
    for one, two, three in (("small", "medium", "large"), ("first_third", "second_third", "last_third")):
        assert (result[f"AP_{one}"], result[f"AP_{two}"], result[f"AP_{three}"]) == (1.0, 0.0, 1.0)
    assert result["calibration_error"] == pytest.approx((0.1 + 0.8 + 0.3) / 3, abs=1e-5)
    nothing = evaluate(truth[:1], np.zeros((0, 7)), images=3, classes=2)
    assert (nothing["AP50"], nothing["AP_small"], nothing["AP_large"], nothing["calibration_error"]) == (
        0,
        0,
        None,
        None,
    )
    assert nothing["per_class"] == {"0": 0.0, "1": None}


def test_each_metric_has_its_own_threshold():
    """An IoU of 0.6525 is enough at 0.5, 0.55, 0.6 and 0.65, one of 0.5225 at the first of these."""
    pytest.importorskip("pycocotools")
    truth = np.array([[image, 0, 100, 100, 40, 40] for image in (0, 1)], dtype=float)
    found = [[0, 100, 100, 40, 26.1, 0.9, 0], [1, 100, 100, 40, 20.9, 0.8, 0]]
    result = evaluate(truth, np.array(found), images=2, classes=1)
    # One of two objects is half of the recall: 51 of 101 steps.
    assert (result["AP50"], result["AP75"]) == (1, 0)
    assert result["AP"] == pytest.approx((1 + 3 * 51 / 101) / 10, abs=1e-5)
    assert result["calibration_error"] == pytest.approx((0.1 + 0.2) / 2), "correct is what has an IoU of 0.5"


def test_as_many_detections_count_as_ultralytics_has():
    pytest.importorskip("pycocotools")
    truth = np.array([[0, 0, 5, 5, 10, 10]], dtype=float)
    wrong = [[0, 200, 200, 10, 10, 0.9, 0]] * 299
    assert evaluate(truth, np.array([*wrong, [0, 5, 5, 10, 10, 0.1, 0]]), 1, 1)["AP50"] == pytest.approx(
        1 / 300, abs=1e-5
    )


def test_what_is_measured_is_what_was_trained(tmp_path, monkeypatch):
    """The classes and the split of the training, for one; and what Ultralytics has measured, it says itself."""
    pytest.importorskip("pycocotools")
    monkeypatch.setattr(measuring, "collector", lambda task, kept: kept.update(truth=objects, found=[], images=1))
    objects = [[0, 0, 5, 5, 10, 10], [0, 2, 5, 5, 10, 10]]
    own, told = SimpleNamespace(map50=0.5, map=0.3, map75=0.4, ap_class_index=[2], ap=[0.3]), {}
    model = SimpleNamespace(
        names={0: "a", 1: "b", 2: "c"}, val=lambda **how: told.update(how) or SimpleNamespace(box=own)
    )
    settings = {"classes": [0, 2], "split": "test", "lr0": 0.1}
    result, per_class = measuring.measure(model, "detect", "data.yaml", settings, tmp_path)
    assert (told["data"], told["classes"], told["split"]) == ("data.yaml", [0, 2], "test")
    assert told["project"] == str(tmp_path), "not in the folder where somebody works"
    assert "lr0" not in told
    assert (result["AP50"], result["AP"], result["AP75"], result["AP_small"]) == (0.5, 0.3, 0.4, 0)
    assert per_class == {"a": 0, "b": None, "c": 0.3}


@pytest.mark.parametrize(
    ("named", "args", "ap", "found"),
    [
        ("images", {}, 0.25, {"AP50_test": 0.5, "AP_test": 0.25}),
        (["images", "list.txt"], {}, 0.25, {"AP50_test": 0.5, "AP_test": 0.25}),
        ("images", {}, None, {}),  # without objects
        ("images", {"split": "test"}, 0.25, {}),  # which has been measured already
        ("missing", {}, 0.25, {}),
        ("empty", {}, 0.25, {}),
        (None, {}, 0.25, {}),
    ],
)
def test_the_test_set_is_measured_where_there_is_one(tmp_path, monkeypatch, named, args, ap, found):
    pytest.importorskip("ultralytics")
    for name in ("train", "images", "empty"):
        (tmp_path / name).mkdir()
    for name in ("train/1.png", "images/1.png", "list.txt"):
        (tmp_path / name).touch()
    data = tmp_path / "data.yaml"
    test = {} if named is None else {"test": named}
    data.write_text(
        json.dumps({"path": str(tmp_path), "train": "train", "val": "train", "nc": 1, **test}), encoding="utf-8"
    )

    def measure(model, task, data, args, folder):
        assert args["split"] == "test"
        return {"AP50": 0.5, "AP": 0.25, "AP75": 0.1}, {"a": ap}

    monkeypatch.setattr(measuring, "measure", measure)
    assert measuring.measure_on_test(None, "detect", str(data), args, tmp_path) == found


@pytest.mark.parametrize(
    ("task", "shape", "boxes"),
    [
        # Half of each side of an image of 200 x 100 pixels, which is stretched.
        ("rtdetr", (100, 200), [[16, 16, 48, 48], [50, 25, 100, 50]]),
        # The same of 40 x 20 pixels, which are padded and not enlarged.
        ("detect", (20, 40), [[22, 27, 42, 37], [10, 5, 20, 10]]),
    ],
)
def test_boxes_are_measured_in_pixels_of_the_image(task, shape, boxes, monkeypatch):
    """Objects and detections of the second of two images, whose inputs have 64 x 64 pixels."""
    pytest.importorskip("ultralytics")
    kept, ((x1, y1, x2, y2), in_image) = {}, boxes
    kind = measuring.collector(task, kept)
    monkeypatch.setattr(kind.__base__, "update_metrics", lambda *_: None)
    ratio_pad = ((1.0, 1.0), (12.0, 22.0))
    batch = {"img": torch.zeros(2, 3, 64, 64), "ori_shape": [(64, 64), shape], "ratio_pad": [ratio_pad, ratio_pad]}
    center = torch.tensor([[x1 + x2, y1 + y2, 2 * (x2 - x1), 2 * (y2 - y1)]]) / 128
    batch |= {"batch_idx": torch.tensor([1.0]), "cls": torch.tensor([[3.0]]), "bboxes": center}
    detection = torch.tensor([[x1, y1, x2, y2, 0.75, 3.0]])
    kind.update_metrics(object.__new__(kind), [detection[:0], detection], batch)
    assert kept["truth"] == [pytest.approx([1, 3, *in_image])]
    assert kept["found"] == [pytest.approx([1, *in_image, 0.75, 3])]
    assert kept["images"] == 2


def test_detections_in_a_crowd_are_neither_correct_nor_wrong(tmp_path):
    """They are in it where half of them is."""
    pytest.importorskip("pycocotools")
    box = {"image_id": 0, "category_id": 0}
    objects = [{**box, "id": 1, "bbox": [5, 5, 40, 40], "area": 1600, "iscrowd": 0}]
    objects += [{**box, "id": 2, "bbox": [100, 100, 90, 90], "area": 8100, "iscrowd": 1}]
    images, categories = [{"id": 0, "width": 200, "height": 200}], [{"id": 0, "name": "a"}]
    file = tmp_path / "val.json"
    file.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}), encoding="utf-8")
    hit = {**box, "bbox": [5, 5, 40, 40], "score": 0.9}
    inside = [{**box, "bbox": [92 + i, 110, 20, 20], "score": 0.5} for i in range(4)]
    assert evaluate_coco(str(file), [hit, *inside], 100)["calibration_error"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("epoch", "seconds", "goes_on"), [(3, 550, False), (3, 650, True), (None, 900, False), (-1, 100, True)]
)
def test_a_training_that_was_cut_off_early_begins_again(tmp_path, epoch, seconds, goes_on):
    """One that has ended, which the epoch -1 says, has only to be measured."""
    pytest.importorskip("ultralytics")
    last = tmp_path / "weights" / "last.pt"
    last.parent.mkdir()
    if epoch is None:
        last.write_bytes(b"cut off")
    else:
        torch.save({"epoch": epoch}, last)
    for file, age in ((tmp_path / "begun", seconds), (tmp_path / "results.csv", 0), (last, 0)):
        file.touch()
        os.utime(file, (10**9 - age, 10**9 - age))
    assert yolo.prepare(tmp_path, 600) is (goes_on and epoch != -1)
    assert (tmp_path / "results.csv").exists() is last.exists() is goes_on
    assert ((tmp_path / "begun").stat().st_mtime > 10**9) is not goes_on


@pytest.mark.parametrize("checkpoint", [None, {"epoch": -1}], ids=["scratch", "pretrained"])
def test_ultralytics_is_told_what_a_run_is(tmp_path, monkeypatch, checkpoint):
    """Its seed above all: without it the seeds of a loss would be one training."""
    adapter = pytest.importorskip("detloss_plugins.adapters.ultralytics")
    opened, told = [], {}
    model = SimpleNamespace(model=None, ckpt=checkpoint, train=told.update)
    monkeypatch.setattr(adapter, "open_model", lambda path: opened.append(path) or model)
    monkeypatch.setattr(adapter, "model_task", lambda _: "detect")
    monkeypatch.setattr(adapter, "make_trainer", lambda *given: given)
    run = replace(RUN, seed=3, epochs=7, path="trees.yaml", args={"batch": 4, "lr0": 0.1})
    yolo.start(run, tmp_path / "runs" / "own", resume=False)
    for name, value in {"batch": 4, "lr0": 0.1, "epochs": 7, "seed": 3, "data": "trees.yaml"}.items():
        assert told[name] == value
    assert (told["pretrained"], told["trainer"]) == (checkpoint is not None, (RUN.losses, "detect"))
    assert Path(told["project"], told["name"]) == tmp_path / "runs" / "own"
    told.clear()
    yolo.start(run, tmp_path, resume=True)
    assert told == {"trainer": (RUN.losses, "detect"), "resume": True, "data": "trees.yaml"}
    assert opened == ["yolov8n.yaml", str(tmp_path / "weights" / "last.pt")]


def test_what_comes_out_of_a_training_with_ultralytics(tmp_path, monkeypatch):
    """The figures are those of its best weights, and the weight that it found for a loss is there to read."""
    adapter = pytest.importorskip("detloss_plugins.adapters.ultralytics")
    best, last = (tmp_path / "weights" / name for name in ("best.pt", "last.pt"))
    best.parent.mkdir()
    for file in (best, last):
        torch.save({"epoch": -1}, file)  # it has ended
    columns = "epoch,time,metrics/mAP50(B),metrics/mAP50-95(B)\n1,10,0.5,0.25\n2,20,0.75,nan\n"
    (tmp_path / "results.csv").write_text(columns, encoding="utf-8")
    found = {"cls": {"type": "VarifocalLoss", "loss_weight": 2.5}}
    record = {str(best): {"losses": found}, str(last): {"losses": {}}}
    monkeypatch.setenv("DETLOSS_PLUGINS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(yolo, "read_labels", lambda run: None)
    monkeypatch.setattr(adapter, "open_model", lambda path: SimpleNamespace(model=path))
    monkeypatch.setattr(adapter, "model_task", lambda model: "detect")
    monkeypatch.setattr(adapter, "trained_losses", lambda path: record[str(path)])
    monkeypatch.setattr(measuring, "measure", lambda model, *given: ({"of": model.model}, {"given": given}))
    monkeypatch.setattr(measuring, "measure_on_test", lambda *given: {"AP_test": 0.5})
    run = replace(RUN, path="trees.yaml", losses={"cls": {"type": "VarifocalLoss", "loss_weight": "auto"}})
    assert yolo.train(run, tmp_path, 0) == {
        "metrics": {"of": str(best), "AP_test": 0.5, "seconds_per_epoch": 10.0},
        "per_class": {"given": ("detect", "trees.yaml", run.args, tmp_path)},
        "curve": {"AP50": [0.5, 0.75], "AP": [0.25, None]},
        "weights": {"cls": 2.5},
        "resumed": False,
    }
    monkeypatch.setenv("DETLOSS_PLUGINS_CACHE", "/dev/null/cache")  # on data of one's own, nothing is written there
    best.unlink()  # as after a training without validation
    assert yolo.train(replace(run, losses={}), tmp_path, 0)["metrics"]["of"] == str(last)


def test_what_ultralytics_has_logged(tmp_path):
    (tmp_path / "results.csv").write_text("   epoch,  time\n1,10\n2,nan\n3,30.5\n", encoding="utf-8")
    assert yolo.read_curves(tmp_path / "results.csv") == {"epoch": [1, 2, 3], "time": [10, None, 30.5]}
    assert yolo.epochs_done(tmp_path) == 3
    assert yolo.seconds_per_epoch([10, None, 30.5, 42.5]) == 12.0, "of 10, 20.5 and 12"
    assert yolo.seconds_per_epoch([]) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "at least one loss"),
        (["dfl=DistributionFocalLoss", "--model", "yolo26n.yaml"], "needs a distribution over bins"),
        (["GIoULoss", "--data", "digits:tiny"], "no tiny"),
        (["GIoULoss", "--model", "yolov8n-seg.yaml"], "for the task segment"),
        (["GIoULoss", "epochs=3"], "epochs belongs to the grid"),
        (["GIoULoss", "stock=GIoULoss"], "label stock"),
    ],
)
def test_wrong_calls(tmp_path, words, says):
    pytest.importorskip("ultralytics")
    done = CliRunner().invoke(main, ["ablate", *words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert says in done.output
    assert not (tmp_path / "out").exists()


def mmdet_model():
    """The detector of a config, as far as it matters."""
    losses = {"loss_cls": {"type": "FocalLoss", "use_sigmoid": True}, "loss_bbox": {"type": "L1Loss"}}
    return {"type": "RetinaNet", "bbox_head": {"num_classes": 10, **losses}}


def test_losses_go_to_their_places_in_a_config():
    focal = {"type": "FocalLoss", "gamma": 1.5}
    found = mmdetection.slots_of(focal, mmdet_model())
    full = {"use_sigmoid": True, "type": "detloss_plugins.FocalLoss", "gamma": 1.5}
    assert found == {"bbox_head.loss_cls": full}
    for slot in ("cls", "loss_cls", "bbox_head.loss_cls"):
        assert mmdetection.slots_of({slot: focal}, mmdet_model()) == found
    both = mmdetection.slots_of({"cls": focal, "box": {"type": "GIoULoss"}}, mmdet_model())
    assert both["bbox_head.loss_bbox"] == {"type": "detloss_plugins.GIoULoss"}
    detr = {"bbox_head": {**mmdet_model()["bbox_head"], "loss_iou": {"type": "GIoULoss"}}}
    assert list(mmdetection.slots_of({"type": "CIoULoss"}, detr)) == ["bbox_head.loss_iou"]
    assert list(mmdetection.slots_of({"type": "SmoothL1Loss"}, detr)) == ["bbox_head.loss_bbox"]
    ddod = {"bbox_head": {**mmdet_model()["bbox_head"], "loss_iou": {"type": "CrossEntropyLoss"}}}
    assert list(mmdetection.slots_of({"type": "CIoULoss"}, ddod)) == ["bbox_head.loss_bbox"]
    two_stage = {"rpn_head": mmdet_model()["bbox_head"], "roi_head": {"bbox_head": mmdet_model()["bbox_head"]}}
    with pytest.raises(ValueError, match=r"several of them for 'cls': name one of rpn_head\.loss_cls"):
        mmdetection.slots_of(focal, two_stage)
    with pytest.raises(ValueError, match="has none for 'dfl'"):
        mmdetection.slots_of({"type": "DistributionFocalLoss"}, mmdet_model())


def test_the_stages_of_a_cascade_are_one_place(tmp_path):
    """They are a list in the config, of which a file that overrides it must write the whole."""
    mmengine = pytest.importorskip("mmengine")
    stages = [{**mmdet_model()["bbox_head"], "loss_iou": {"type": "GIoULoss"}, "stage": (n,)} for n in range(3)]
    model = {"rpn_head": mmdet_model()["bbox_head"], "roi_head": {"bbox_head": stages, "depth": 3}}
    with pytest.raises(
        ValueError, match=r"'cls': name one of rpn_head\.loss_cls, rpn_head\.loss_bbox, roi_head\.bbox_"
    ):
        mmdetection.slots_of({"type": "FocalLoss"}, model)
    focal = {"use_sigmoid": True, "type": "detloss_plugins.FocalLoss"}
    found = mmdetection.slots_of({"roi_head.bbox_head.loss_cls": {"type": "FocalLoss"}}, model)
    assert found == {f"roi_head.bbox_head.{stage}.loss_cls": focal for stage in range(3)}
    found |= mmdetection.slots_of({"roi_head.bbox_head.1.loss_bbox": {"type": "SmoothL1Loss"}}, model)
    assert len(mmdetection.slots_of({"type": "CIoULoss"}, {"roi_head": model["roi_head"]})) == 3, "loss_iou of each"

    base, file = tmp_path / "base.py", tmp_path / "run.py"
    parts = {"train_dataloader": {"a": 1}, "train_cfg": {"a": 1}, "optim_wrapper": {"a": 1}}
    base.write_text("\n".join(f"{key} = {part!r}" for key, part in {"model": model, **parts}.items()), encoding="utf-8")
    run = replace(RUN, model=str(base), losses={**found, "rpn_head.loss_cls": focal})
    file.write_text(mmdetection.config_text(run, tmp_path), encoding="utf-8")
    expected = copy.deepcopy(model)
    expected["rpn_head"]["loss_cls"] = focal
    for stage in expected["roi_head"]["bbox_head"]:
        stage["loss_cls"] = focal
    expected["roi_head"]["bbox_head"][1]["loss_bbox"] = {"type": "detloss_plugins.SmoothL1Loss"}
    assert mmengine.Config.fromfile(file).model.to_dict() == expected


def test_a_loss_is_reduced_as_the_one_that_it_replaces():
    """YOLOX's and YOLOv3's heads are given sums; a mean is what a loss makes by itself."""
    for reduction, written in (("sum", {"reduction": "sum"}), ("mean", {})):
        model = {"bbox_head": {"loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "reduction": reduction}}}
        full = {"use_sigmoid": True, **written, "type": "detloss_plugins.FocalLoss"}
        assert mmdetection.slots_of({"type": "FocalLoss"}, model) == {"bbox_head.loss_cls": full}
    (found,) = mmdetection.slots_of({"type": "FocalLoss", "reduction": "none"}, model).values()
    assert found["reduction"] == "none"


@pytest.mark.parametrize("framework", ["ultralytics", "mmdetection"])
def test_a_process_of_an_ablation_imports_a_loss_of_ones_own(framework, filed_loss):
    """It is given the losses as JSON, and nothing there has imported the file."""
    nested = {"type": "WIoULoss", "base": {"type": "FiledLoss"}}
    if framework == "ultralytics":
        found = [slots_of(loss, "detect")["box"] for loss in ({"type": "FiledLoss"}, nested)]
    else:
        found = [mmdetection.slots_of({"box": loss}, mmdet_model()) for loss in ({"type": "FiledLoss"}, nested)]
        found = [losses["bbox_head.loss_bbox"] for losses in found]
    filed_loss()
    first, second = map(build_loss, json.loads(json.dumps(found)))
    assert type(first).__name__ == type(second.base).__name__ == "FiledLoss"


class OfAScript(GIoULoss):
    """As if this file was run."""


OfAScript.__module__ = "__main__"


def test_a_loss_of_a_script_is_none_for_an_ablation(monkeypatch):
    monkeypatch.setitem(MODELS.module_dict, "OfAScript", OfAScript)
    for slots in (lambda loss: slots_of(loss, "detect"), lambda loss: mmdetection.slots_of(loss, mmdet_model())):
        with pytest.raises(ValueError, match="put the class in a file of its own"):
            slots({"box": {"type": "OfAScript"}})


@pytest.mark.parametrize(("visible", "names"), [("3,5", "353"), (None, "010")])
def test_trainings_side_by_side_have_a_gpu_each(visible, names, monkeypatch):
    """By the names that the process has for them; a third shares the first."""
    monkeypatch.setattr(study, "count_gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    places = study.Places(3)
    assert [places.environment(place)["CUDA_VISIBLE_DEVICES"] for place in places.free] == [*names]


def test_a_training_has_the_modules_of_the_process_that_starts_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(study.subprocess, "Popen", lambda command, **how: how["env"])
    assert str(tmp_path) in study.start(tmp_path, {}, 0.0)["PYTHONPATH"].split(os.pathsep)


def test_the_config_of_a_run(tmp_path):
    losses = mmdetection.slots_of({"cls": {"type": "FocalLoss"}, "box": {"type": "GIoULoss"}}, mmdet_model())
    run = replace(RUN, model="retinanet_r18_fpn_digits", losses=losses, seed=3)
    content = {}
    exec(mmdetection.config_text(run, tmp_path), content)
    assert Path(content["_base_"]).name == "retinanet_r18_fpn_digits.py"
    assert content["randomness"] == {"seed": 3}
    assert content["model"]["bbox_head"]["loss_bbox"] == {"_delete_": True, "type": "detloss_plugins.GIoULoss"}
    assert content["model"]["bbox_head"]["loss_cls"]["use_sigmoid"] is True


def test_what_mmengine_has_logged(tmp_path):
    """Epochs of 10 iterations of 0.5 s; validation after the second."""
    lines = [{"loss": 1.0, "time": t, "epoch": e, "iter": 10 * e, "step": 10 * e} for e, t in ((1, 0.5), (2, 0.5))]
    lines.append({"coco/bbox_mAP": 0.2, "coco/bbox_mAP_50": 0.4, "step": 2})
    (tmp_path / "1" / "vis_data").mkdir(parents=True)
    (tmp_path / "1" / "vis_data" / "scalars.json").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert mmdetection.logged(tmp_path, 3) == (5.0, {"AP50": [None, 0.4, None], "AP": [None, 0.2, None]})
    (tmp_path / "last_checkpoint").write_text("/somewhere/epoch_2.pth", encoding="utf-8")
    assert mmdetection.epochs_done(tmp_path) == 2


def test_what_comes_out_of_a_training_with_mmdetection(tmp_path, monkeypatch):
    """COCO counts 100 detections in an image: here the last of them hits an object, and one more would another."""
    pytest.importorskip("pycocotools")
    from detloss_plugins.cli import _mmdet

    box = {"image_id": 0, "category_id": 0}
    objects = [{**box, "id": x, "bbox": [x, 5, 10, 10], "area": 100, "iscrowd": 0} for x in (5, 50)]
    content = {
        "images": [{"id": 0, "file_name": "0.png"}],
        "annotations": objects,
        "categories": [{"id": 0, "name": "a"}],
    }
    (tmp_path / "data" / "annotations").mkdir(parents=True)
    (tmp_path / "data" / "annotations" / "val.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "data" / "0.png").touch()
    found = [{**box, "bbox": [x, 5, 10, 10], "score": 0.9 - i / 1000} for i, x in enumerate([*[200] * 99, 5, 50])]

    def trained(args):
        assert args.overrides == {"train_cfg.max_epochs": "2", "batch": "4"}
        (args.work_dir / mmdetection.DETECTIONS).write_text(json.dumps(found), encoding="utf-8")

    monkeypatch.setattr(_mmdet, "train_mmdet", trained)
    (tmp_path / "run").mkdir()
    run = replace(RUN, model="retinanet_r18_fpn_digits", losses={}, path=str(tmp_path / "data"))
    result = mmdetection.train(run, tmp_path / "run", 0)
    assert result["metrics"]["AP50"] == pytest.approx(0.01 * 51 / 101, abs=1e-5), "51 of 101 recalls are up to a half"
    assert (list(result["per_class"]), result["resumed"]) == (["a"], False)


@pytest.mark.slow
def test_an_ablation_with_mmdetection(tmp_path):
    pytest.importorskip("mmdet")
    args = {"train_dataloader.dataset.indices": 16, "val_dataloader.dataset.indices": 8}
    grid = {"losses": {"qfl": {"type": "QualityFocalLoss"}}, "models": "retinanet_r18_fpn_digits", "seeds": 1}
    grid |= {"epochs": 3, "args": args}
    process = ablate(tmp_path / "study", grid, "--jobs", "1")
    wait_for(process, lambda: [*tmp_path.glob("study/runs/stock-*/last_checkpoint")])
    process.kill()
    process.communicate()
    finish(ablate(tmp_path / "study", grid, "--jobs", "1", "--resume-after", "0"))
    results = json.loads((tmp_path / "study" / "results.json").read_text(encoding="utf-8"))
    assert [(run["label"], run["slot"]) for run in results["runs"]] == [("stock", ""), ("qfl", "cls")]
    assert [run.get("resumed", False) for run in results["runs"]] == [True, False]
    assert list(results["runs"][0]["per_class"]) == list("0123456789")
    assert results["versions"]["mmdet"]


GRID = {
    "losses": {
        "vfl": {"type": "VarifocalLoss", "loss_weight": 4.0},
        "giou": {"type": "GIoULoss"},
        "both": {"cls": {"type": "QualityFocalLoss"}, "box": {"type": "WIoULoss"}},
    },
    "seeds": 2,
    "epochs": 2,
    "args": {"fraction": 0.05, "imgsz": 64, "batch": 8, "warmup_epochs": 0},
}


def ablate(out, grid, *options):
    """The command in a process of its own, with two trainings side by side unless options say otherwise."""
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(grid), encoding="utf-8")
    code = "from detloss_plugins.cli import main; main()"
    command = [sys.executable, "-c", code, "ablate", str(file), "--out", str(out), "--jobs", "2", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process, come):
    """Wait until something has come, which must be before the process ends."""
    while process.poll() is None and not come():
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()[0][-3000:]


def finish(process, status=0):
    output = process.communicate()[0]
    assert process.returncode == status, output[-3000:]
    return output


def without_times(out):
    """The results and the report, but for seconds."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert all(run["metrics"].pop("seconds_per_epoch") > 0 for run in results["runs"])
    report = (out / "report.md").read_text(encoding="utf-8")
    return results, re.sub(r"\d+\.\d( ± \d+\.\d)? \|$", "", report, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_killed_twice_the_report_is_the_same(tmp_path):
    pytest.importorskip("ultralytics")
    alone, killed = tmp_path / "a" / "study", tmp_path / "b" / "study"
    for folder in (alone, killed):
        folder.parent.mkdir()
    finish(ablate(alone, GRID))
    for finished in (1, 4):
        process = ablate(killed, GRID)

        def at_work(finished=finished):
            done = len([*killed.glob("runs/*/metrics.json")])
            return done >= finished and len([*killed.glob("runs/*/weights/last.pt")]) > done

        wait_for(process, at_work)
        process.kill()
        process.communicate()
        assert len([*killed.glob("runs/*/metrics.json")]) < 8
    assert "of them finished before" in finish(ablate(killed, GRID))
    results, report = without_times(alone)
    assert len(results["runs"]) == 8
    logged = [yolo.read_curves(file) for file in alone.glob("runs/*/results.csv")]
    of_losses = {tuple(tuple(columns[f"train/{name}_loss"]) for name in ("box", "cls", "dfl")) for columns in logged}
    assert len(of_losses) == 8, "they all differ, the two seeds of a loss too"
    assert without_times(killed) == (results, report)


@pytest.mark.slow
def test_a_training_that_fails_is_in_the_report(tmp_path):
    pytest.importorskip("ultralytics")
    weights = {"type": "FocalLoss", "class_weight": [1.0, 2.0]}  # for two classes, and there are ten
    grid = {**GRID, "losses": {"two": {"cls": weights}, "giou": {"type": "GIoULoss"}}, "seeds": 1, "epochs": 1}
    output = finish(ablate(tmp_path / "study", grid), status=1)
    assert re.search("error: two-yolov8n-digits-0: .*class", output)
    report = (tmp_path / "study" / "report.md").read_text(encoding="utf-8")
    assert "2 trainings" in report
    assert "| two-yolov8n-digits-0 |" in report
    assert Path(tmp_path / "study" / "report.html").exists()


def test_why_a_task_on_ray_came_to_nothing_is_what_it_raised(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'detloss_plugins[ray]'")
    from detloss_plugins.ablation.cluster import note_lost

    def get(done):
        """As ``ray.get`` raises where the study's folder is not there on the task's node."""
        raise ray.exceptions.RayTaskError("train_there", "x", FileNotFoundError("no runs/a")).as_instanceof_cause()

    monkeypatch.setattr(ray, "get", get)
    note_lost(tmp_path, None)
    assert (tmp_path / "error.txt").read_text(encoding="utf-8") == "FileNotFoundError: no runs/a\n"


@pytest.mark.slow
def test_a_node_of_a_ray_cluster_is_killed(tmp_path):
    """Two nodes with a core each; what the lost one trained goes on from its checkpoint on the other."""
    pytest.importorskip("ultralytics")
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'detloss_plugins[ray]'")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    from detloss_plugins.ablation import cluster

    args = {"fraction": 0.05, "imgsz": 64, "batch": 8}
    losses = {label: {"type": f"{label}Loss"} for label in ("GIoU", "DIoU", "CIoU")}
    runs = plan(losses, ["yolov8n.yaml"], ["digits"], seeds=1, epochs=6, args=args)
    ours = Study(tmp_path / "study")
    ours.add(runs)
    nodes = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    lost = []

    def kill(running):
        """The second node, once a training of its own has a checkpoint."""
        mark = f"node {second.node_id} of Ray"
        for run in running if not lost else ():
            there = mark in (ours.of(run) / "train.log").read_text(encoding="utf-8")
            if there and ours.epochs_done(run) >= 1 and (ours.of(run) / "weights" / "last.pt").exists():
                nodes.remove_node(second, allow_graceful=False)
                lost.append(run)

    try:
        cluster.train(ours, runs, nodes.address, tick=kill, resume_after=0)
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert lost
    assert not ours.failed()
    results = ours.results()
    assert len(results["runs"]) == 4
    assert [run["label"] for run in results["runs"] if run.get("resumed")] == [lost[0].label]
    assert all(len(run["curve"]["AP50"]) == 6 for run in results["runs"])
    log = (ours.of(lost[0]) / "train.log").read_text(encoding="utf-8")
    assert len(set(re.findall(r"node (\w+) of Ray", log))) == 2
