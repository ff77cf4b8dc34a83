"""The command ``detloss``: its help, what all subcommands refuse in the same way, and the small ones themselves."""

import importlib.util
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.commands import detloss, last_line

import detloss_plugins
from detloss_plugins import configs
from detloss_plugins.cli import _facts, main, train
from detloss_plugins.cli._common import INSTALL, DataSet, UsageError
from detloss_plugins.cli._yolo import is_of_data, yolo_data
from detloss_plugins.cli.check import wrong_label
from detloss_plugins.configs import find
from detloss_plugins.losses import CIoULoss, FocalLoss, GIoULoss, L1Loss
from detloss_plugins.registry import registered_losses
from detloss_plugins.testing import checks, training_tensors
from detloss_plugins.testing.digits import digits_dir

COMMANDS = main.list_commands(None)


def test_help_of_every_subcommand_has_an_example(capsys):
    assert "train" in COMMANDS
    assert detloss(capsys) == detloss(capsys, "--help") == detloss(capsys, "-h")
    assert detloss(capsys, "--version").split()[-1] == detloss_plugins.__version__
    for name in COMMANDS:
        text = detloss(capsys, name, "--help")
        assert re.search(rf"^ +detloss {name}\b", text, re.MULTILINE), name
        assert re.search(rf"^  {name}  ", detloss(capsys, "--help"), re.MULTILINE), name


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


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("detloss sh", "show"),
        ("detloss show CIoU", "CIoULoss"),
        ("detloss compare --loss GIoU", "GIoULoss"),
        ("detloss train retinanet_r18_fpn", "retinanet_r18_fpn_digits"),
    ],
)
def test_a_shell_completes_words(words, found, capsys, monkeypatch):
    monkeypatch.setenv("_DETLOSS_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert f"plain,{found}" in detloss(capsys).splitlines()


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


def test_the_package_is_the_command_and_its_help_needs_no_framework():
    heavy = ["mmdet", "mmcv", "ultralytics", "torchvision", "sklearn", "matplotlib"]
    code = (
        "import runpy, sys\n"
        f"for name in {heavy}: sys.modules[name] = None\n"
        "sys.argv[1:] = ['--help']\n"
        "runpy.run_module('detloss_plugins', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: detloss ")
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


def test_a_warning_of_an_import_is_not_shown(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    detloss(capsys, "list", "--configs")
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # as torch does
        for message in ("`TorchScript` support for functional optimizers is deprecated and ...", "another"):
            warnings.warn(message, DeprecationWarning, stacklevel=2)
    assert shown == ["another"]


def test_list_has_every_loss_once(capsys):
    header, *lines = detloss(capsys, "list").splitlines()
    assert header.split() == ["family", "loss", "equal", "to", "paper", "settings"]
    assert len(lines) == len(registered_losses())
    (focal,) = (line for line in lines if " FocalLoss " in line)
    assert focal.startswith("classification ")
    for words in ("mmdet, torchvision, ultralytics", "https://arxiv.org/abs/1708.02002", "gamma=2.0, alpha=0.25"):
        assert f"  {words}" in focal


def test_list_of_a_family(capsys):
    rows = json.loads(detloss(capsys, "list", "--family", "box", "--json"))
    assert {row["type"] for row in rows} == {n for n, c in registered_losses().items() if c.facts.family == "box"}
    (eiou,) = (row for row in rows if row["type"] == "EfficientIoULoss")
    assert eiou["equal_to"] == [], "mmdet's of this name is another loss"
    (ciou,) = (row for row in rows if row["type"] == "CIoULoss")
    assert ciou["equal_to"] == ["mmdet", "torchvision", "ultralytics"]
    assert ciou["settings"][0] == {"name": "alpha_gate", "default": None, "allowed": "a number in [0, 1] or None"}
    error = last_line(capsys, "list", "--family", "boxes", status=2)
    assert error.startswith("error: There is no family 'boxes'; there are box, classification, ")


def test_list_of_the_configs(capsys):
    lines = [line.split() for line in detloss(capsys, "list", "--configs").splitlines()]
    assert ["mmdetection", "retinanet_r18_fpn_digits"] in lines
    assert sorted(name for _, name in lines) == configs.names()
    assert json.loads(detloss(capsys, "list", "--configs", "--json"))["ultralytics"] == configs.names("ultralytics")
    assert "--configs lists none" in last_line(capsys, "list", "--configs", "--family", "box", status=2)


def test_the_digits_are_a_data_set_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert DataSet().convert("digits:small", None, None) == digits_dir(scenario="small")
    assert (digits_dir(scenario="small") / "digits.yaml").is_file()
    assert DataSet().convert("mine/data.yaml", None, None) == Path("mine/data.yaml")
    with pytest.raises(UsageError, match="scenarios plain, long-tail"):
        DataSet().convert("digits:large", None, None)
    Path("digits").mkdir()
    assert DataSet().convert("digits", None, None) == Path("digits")  # the user's own folder


def test_the_digits_by_name_are_those_of_the_task():
    assert yolo_data(digits_dir(), "obb")[0] == digits_dir("obb") / "digits.yaml"


def test_show_says_what_is_known(capsys):
    text = detloss(capsys, "show", "CIoULoss")
    wanted = [
        "CIoULoss (box loss)",
        CIoULoss.facts.paper,
        "DIoU plus `alpha * v`",
        "  alpha_gate=None              a number in [0, 1] or None",
        "  equal to torchvision.ops.complete_box_iou_loss\n",
        "torchvision's aspect ratio is 0/0 = NaN",
        'dict(type="detloss_plugins.CIoULoss")',
    ]
    assert [words for words in wanted if words not in text] == []
    assert "did you mean CIoULoss" in last_line(capsys, "show", "CIoULos", status=2)


def test_show_says_what_weight_yolo_gives(capsys, monkeypatch):
    pytest.importorskip("ultralytics")
    text = detloss(capsys, "show", "FocalLoss")
    assert "cls: {type: FocalLoss}, for detect, segment, pose, obb, with loss_weight 16" in text
    assert "loss_class: {type: FocalLoss}, for rtdetr, with loss_weight 1\n" in text + "\n"
    assert "it fits no slot there" in detloss(capsys, "show", "SeesawLoss")
    assert "label_smoothing=0.0" in text
    for name in ("APLoss", "SlideLoss", "VarifocalLoss"):
        assert "label_smoothing" not in detloss(capsys, "show", name).partition("its kind has")[2], "it is refused"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "Ultralytics: not installed here" in detloss(capsys, "show", "FocalLoss")


def test_show_of_ones_own_loss(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    source = 'from detloss_plugins.losses import L1Loss\n\nclass Mine(L1Loss):\n    """Of mine."""\n'
    (tmp_path / "own_losses.py").write_text(source, encoding="utf-8")
    for word in ("own_losses:Mine", "own_losses.py:Mine", "own_losses.Mine"):
        assert detloss(capsys, "show", word).startswith("Mine (regression loss)\nOf mine"), word
    assert "has no attribute 'Other'" in last_line(capsys, "show", "own_losses:Other", status=2)
    assert last_line(capsys, "show", "nowhere.py:Mine", status=2) == "error: there is no nowhere.py"
    assert "cannot import nowhere: ModuleNotFoundError" in last_line(capsys, "show", "nowhere:Mine", status=2)


def test_every_setting_says_what_it_may_be():
    for cls in registered_losses().values():
        for setting in _facts.settings(cls):
            assert setting.allowed or setting.name in {"base", "loss_cls", "loss_bbox"}, (cls, setting.name)


def test_meanings_come_from_the_docstrings():
    meanings = {setting.name: setting.meaning for setting in _facts.every_setting(FocalLoss)}
    assert meanings["gamma"] == "focusing power, 0 or at least 1 for a bounded second derivative."
    assert meanings["label_smoothing"].startswith("s; a target t becomes")
    assert meanings["loss_weight"] == "factor on the result, at least 0."


def test_a_picture_is_written(tmp_path, capsys):
    file = tmp_path / "new" / "giou.png"
    assert last_line(capsys, "show", "GIoULoss", "--plot", file) == f"picture: {file}"
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 20_000
    assert "is not supported" in last_line(capsys, "show", "GIoULoss", "--plot", tmp_path / "giou.txt", status=2)
    says = last_line(capsys, "show", "GIoULoss", "--plot", tmp_path / "giou", status=2)
    assert "giou has no suffix" in says
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_compare(tmp_path, capsys, monkeypatch):
    """The whole command, on random tensors; a wrong formula makes its exit status 1."""
    pytest.importorskip("mmdet")
    pytest.importorskip("ultralytics")
    monkeypatch.setattr(training_tensors, "training_tensors", dict)
    file = tmp_path / "rows.json"
    detloss(capsys, "compare", "--loss", "GIoULoss", "--loss", "EIoULoss", "--json", file)
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert {row["loss"] for row in rows} == {"GIoULoss", "EfficientIoULoss"}
    assert {row["verdict"] for row in rows} == {"PASS", "DIFFERS"}
    right = GIoULoss.fn
    monkeypatch.setattr(GIoULoss, "fn", staticmethod(lambda p, t, **hyper: right(p, t, **hyper) * 1.001))
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--loss", "GIoULoss"])
    assert stop.value.code == 1
    assert "FAIL" in capsys.readouterr().out


def test_compare_refuses_before_it_measures(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert "cannot write file/rows.json: " in last_line(capsys, "compare", "--json", "file/rows.json", status=2)
    assert "did you mean GIoULoss" in last_line(capsys, "compare", "--loss", "GIoULos", status=2)
    stock = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mmdet" else stock(name))
    assert detloss(capsys, "compare", "--loss", "GIoULoss", status=1) == f"error: {INSTALL['mmdet']}"


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def checked(capsys, *words, status=0):
    """What ``detloss check`` prints, and the sentences in which it says what does not suit."""
    with pytest.raises(SystemExit) as stop:
        main(["check", *map(str, words)], prog_name="detloss")
    printed = capsys.readouterr()
    assert stop.value.code == status, printed.err
    return printed.out, [line for line in printed.err.splitlines() if line.startswith("error: ")]


def test_check_losses_of_yolo(capsys, tmp_path):
    pytest.importorskip("ultralytics")
    out, errors = checked(capsys, "vfl_eiou_dfl")
    assert "cls: VarifocalLoss(alpha=0.75, " in out
    assert "weight 16 x gain 0.5" in out
    assert out.endswith("nothing is amiss\n")
    assert not errors
    _, (error,) = checked(capsys, "vfl_eiou_dfl", "--model", "yolov8n-obb.yaml", status=1)
    assert "takes a rotated loss" in error
    assert "yolov8n-obb.yaml (obb)" in checked(capsys, "obb")[0]
    slots = "cls: {type: FocalLoss, class_weight: [1, 2, 3]}", "box: {type: CIoULos}", "dfl: {type: L1Loss}"
    text = "\n".join([*slots, "nose: {type: L1Loss}"])
    out, errors = checked(capsys, write(tmp_path, "losses.yaml", text), status=1)
    assert "box:" not in out
    wanted = "did you mean CIoULoss", "no slot 'nose'", "over 16 bins", "3 class weights, and the model 80 classes"
    assert [any(words in error for error in errors) for words in wanted] == [True] * 4
    assert len(errors) == 4


@pytest.mark.parametrize(("content", "says"), [("", True), ("ignore: {classes: [1]}", False)])
def test_check_says_that_nothing_is_swapped(content, says, capsys, tmp_path):
    pytest.importorskip("ultralytics")
    out, _ = checked(capsys, write(tmp_path, "losses.yaml", content))
    assert ("no slot is changed: this is the stock training" in out) == says


def test_check_of_a_weight_that_is_found_at_the_start(capsys, tmp_path):
    pytest.importorskip("ultralytics")
    parts = "[{type: VarifocalLoss, loss_weight: auto}, {type: FocalLoss, loss_weight: 3}]"
    text = f"cls: {{type: ScheduledLoss, at: [1], losses: {parts}}}\nbox: {{type: CIoULoss, loss_weight: auto}}"
    out, errors = checked(capsys, write(tmp_path, "auto.yaml", text))
    assert "box: its weight is found by" in out
    assert "cls, loss 1: its weight is found by" in out
    assert "loss 2" not in out
    assert not errors
    assert "weight auto x gain 7.5" in out


def test_a_file_that_is_no_text_is_named(capsys, tmp_path):
    pytest.importorskip("ultralytics")
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    _, (error,) = checked(capsys, path, status=2)
    assert error.startswith(f"error: {path} cannot be read: ")
    for command in ("calibrate", "ablate"):
        with pytest.raises(SystemExit) as stop:
            main([command, str(path)], prog_name="detloss")
        assert (stop.value.code, str(path) in capsys.readouterr().err) == (2, True), command


@pytest.mark.parametrize("line", ["0 .5 .5 x .5", "0 .5 .5", "0 .5 nan .5 .5", "\xff"])
def test_a_line_that_is_no_label(line, tmp_path):
    file = tmp_path / "1.txt"
    file.write_bytes(f"\n0 .5 .5 .1 .1\n{line}\n".encode("latin-1"))
    assert "line 3 is no label" in wrong_label([file], 1)
    file.write_text("\n0 .5 .5 .1 .1\n", encoding="utf-8")
    assert wrong_label([file], 1) is None


@pytest.mark.parametrize(
    ("task", "points", "fits", "errs"),
    [
        ("segment", 0, (6, 8), (4, 5)),
        ("obb", 0, (8,), (4, 6)),
        ("pose", 6, (10,), (4, 9, 11)),
        ("rtdetr", 0, (4, 6), ()),
    ],
)
def test_a_label_of_another_task(task, points, fits, errs, tmp_path):
    file = tmp_path / "1.txt"
    for count in (*fits, *errs):
        file.write_text("\n0" + " .5" * count, encoding="utf-8")
        found = wrong_label([file], 1, task, points)
        assert (found is None) == (count in fits), found
        assert not found or f"line 2 has {count} coordinates; for task='{task}' it needs {fits[0]}" in found


def test_a_data_set_of_another_task(capsys, tmp_path):
    """What Ultralytics says when it reads one is a sentence too; another error keeps its traceback."""
    YOLODataset = pytest.importorskip("ultralytics.data").YOLODataset
    losses = write(tmp_path, "losses.yaml", "box: {type: CIoULoss}")
    data = write(tmp_path, "set/data.yaml", f"path: {(tmp_path / 'set').as_posix()}\ntrain: a\nval: a\nnames: [cat]\n")
    write(data.parent, "a/1.png", "")
    label = write(data.parent, "a/1.txt", "0 0.5 0.5 0.1 0.1\n")
    for model, words in (("yolov8n-seg", f"{label}, line 1 has 4"), ("yolov8n-pose", "needs a kpt_shape")):
        _, errors = checked(capsys, losses, "--data", data, "--model", f"{model}.yaml", status=1)
        assert any(words in error for error in errors)
    with pytest.raises(ValueError, match="kpt_shape") as refused:
        YOLODataset(img_path=str(data.parent), data={"names": ["cat"]}, task="pose")
    assert is_of_data(refused.value)
    with pytest.raises(ValueError, match="invalid literal") as other:
        int("a")
    assert not is_of_data(other.value)


def test_check_the_data_of_yolo(capsys, tmp_path):
    compat = pytest.importorskip("detloss_plugins.adapters.ultralytics.compat")
    can_ignore = compat.FEATURES["ignore"][0]
    ignore = "\nignore: {classes: [dog]}" if can_ignore else ""
    losses = write(tmp_path, "losses.yaml", "cls: {type: FocalLoss, class_weight: [1, 2]}" + ignore)
    data = write(tmp_path, "set/data.yaml", "path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n")
    data.write_text(
        data.read_text(encoding="utf-8").replace("path: .", f"path: {data.parent.as_posix()}"), encoding="utf-8"
    )
    (_, (error,)) = checked(capsys, losses, "--data", data, status=2)
    assert "data.yaml is no data set" in error
    for split in ("train", "val"):
        write(data.parent, f"images/{split}/1.png", "")
        label = write(data.parent, f"labels/{split}/1.txt", "1 0.5 0.5 0.1 0.1\n")
    assert "data.yaml, 2 classes\nnothing is amiss" in checked(capsys, losses, "--data", data.parent)[0]
    label.write_text("0 0.5 0.5 0.1 0.1\n2 0.5 0.5 0.1 0.1\n", encoding="utf-8")
    _, errors = checked(capsys, losses, "--data", data, status=1)
    assert errors == [f"error: {label}, line 2 is of class 2, and the data set has classes 0 to 1."]
    label.unlink()
    _, (error,) = checked(capsys, losses, "--data", data, status=1)
    assert "No image for val has a file of labels" in error
    data.write_text(data.read_text(encoding="utf-8").replace("[cat, dog]", "[a, b, c]"), encoding="utf-8")
    _, errors = checked(capsys, losses, "--data", data, status=1)
    assert any("2 class weights, and the model 3 classes" in error for error in errors)
    assert any("'dog'" in error for error in errors) == can_ignore


def test_check_a_config_of_mmdetection(capsys, tmp_path):
    pytest.importorskip("mmdet")
    out, errors = checked(capsys, "retinanet_r18_fpn_digits")
    assert "bbox_head.loss_cls: FocalLoss(), weight 1\n" in out
    assert "bbox_head.loss_bbox: GIoULoss(loss_weight=2.0), weight 2\n" in out
    assert not errors
    base = find("retinanet_r18_fpn_digits").as_posix()
    loss = "dict(_delete_=True, type='detloss_plugins.EqualizedFocalLoss', use_sigmoid=True, num_classes=7)"
    config = write(tmp_path, "own.py", f"_base_ = [{base!r}]\nmodel = dict(bbox_head=dict(loss_cls={loss}))\n")
    _, errors = checked(capsys, config, status=1)
    assert errors == ["error: bbox_head.loss_cls has num_classes=7, and its head has 10 classes."]
    _, (error,) = checked(capsys, config, "--model", "yolov8n.yaml", status=2)
    assert "--model is for Ultralytics" in error


def test_a_file_of_losses_names_a_class_in_the_working_directory(capsys, tmp_path, monkeypatch):
    pytest.importorskip("ultralytics")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    source = "from detloss_plugins.losses import GIoULoss\n\nclass Mine(GIoULoss):\n    pass\n"
    (tmp_path / "beside.py").write_text(source, encoding="utf-8")
    (tmp_path / "losses.yaml").write_text("box: {type: beside.Mine}\n", encoding="utf-8")
    assert "box: Mine(" in detloss(capsys, "check", "losses.yaml")


WRONG = """
from detloss_plugins.losses import L1Loss

class Right(L1Loss, row_wise=True):
    pass

class Wrong(L1Loss, fn=lambda pred, target: (pred - target).abs() - 1, row_wise=True):
    pass
"""


def test_check_a_loss_class(capsys, tmp_path, monkeypatch):
    file, count = write(tmp_path, "mine.py", WRONG), len(checks(L1Loss)) - 1  # less that it equals others
    assert checked(capsys, f"{file}:Right")[0] == f"Right keeps {count} of {count} promises\nnothing is amiss\n"
    out, (error,) = checked(capsys, f"{file}:Wrong", status=1)
    assert f" of {count} promises" in out
    assert error.startswith("error: Wrong ")
    _, (error,) = checked(capsys, "L1Loss", "--model", "yolov8n.yaml", status=2)
    assert "leave --model and --data out" in error


def test_check_says_what_it_does_not_know(capsys):
    for words, sentence in (
        (["nosuch"], "There is no config named 'nosuch'"),
        (["nosuch.yaml"], "there is no nosuch.yaml"),
        (["vfl_eiou_dfl", "--data", "nowhere"], "there is no nowhere"),
        ([], "say what to check, or give --report. Try: detloss check --help"),
    ):
        _, (error,) = checked(capsys, *words, status=2)
        assert sentence in error


def test_check_reports_what_a_bug_may_depend_on(capsys, monkeypatch):
    monkeypatch.setenv("DETLOSS_LITE", "0")
    out, _ = checked(capsys, "--report")
    rows = {name: value.strip() for name, value in (line.split(":", 1) for line in out.splitlines())}
    assert rows["detloss_plugins"] == f"{detloss_plugins.__version__}, {len(registered_losses())} losses"
    assert rows["torch"].startswith(f"torch {torch.__version__.split('+')[0]}")
    assert rows["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert "DETLOSS_LITE=0" in rows["environment"]
    assert {"mmengine", "mmcv", "mmdet", "ultralytics", "device"} <= rows.keys()
