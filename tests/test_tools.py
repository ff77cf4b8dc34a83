"""The commands: what they refuse, and in how many words; the README is what it says it is."""

import copy
import functools
import gc
import json
import logging
import os
import pickle
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import bench
import cases
import pytest
import speed_page
import step
import timing
import torch
from click.testing import CliRunner
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from PIL import Image
from support.commands import ROOT, detloss, last_line
from ultralytics.cfg import get_cfg

from detloss_plugins.adapters.ultralytics import compat
from detloss_plugins.cli import _coco, _mmdet, _yolo, train
from detloss_plugins.cli._common import DataSet, UsageError
from detloss_plugins.configs import find
from detloss_plugins.facts import Upstream
from detloss_plugins.losses import FocalLoss, GIoULoss, ap_loss
from detloss_plugins.registry import registered_losses
from detloss_plugins.testing import parity, sample, twins
from detloss_plugins.testing.digits import DIGITS_ARGS


def refused(capsys, *argv, status):
    """The sentence with which ``detloss train`` refuses."""
    sentence = last_line(capsys, "train", *argv, status=status)
    assert sentence.startswith("error: ")
    return sentence


def test_train_refuses_in_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no-such.yaml" in refused(capsys, "no-such.yaml", status=2)
    assert "there is no" in refused(capsys, "--data", "no-such-folder", status=2)
    (tmp_path / "losses.txt").touch()
    assert ".yaml" in refused(capsys, "losses.txt", status=2)
    assert "accepts class_counts, class_weight" in refused(capsys, "cls.gama=2", status=2)
    assert "did you mean CIoULoss" in refused(capsys, "box.type=CIoULos", status=2)
    assert "exactly one data YAML" in refused(capsys, "--data", str(tmp_path), status=2)
    assert "no-such-model.yaml" in refused(capsys, "model=no-such-model.yaml", status=2)
    assert "reg_max=1" in refused(capsys, "vfl_eiou_dfl", "model=yolo26n.yaml", status=2), "its third slot needs bins"
    assert "'no_such_argument' is not a valid YOLO argument" in refused(capsys, "no_such_argument=1", status=2)


def test_train_takes_a_config_by_its_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("qfl", "retinanet_r18_fpn_digits"):
        assert train.parsed_words([name, "epochs=1"])[0] == find(name)
    assert "did you mean retinanet_r18_fpn_digits" in refused(capsys, "retinanet_r18_digits", status=2)
    (tmp_path / "qfl.yaml").touch()
    assert train.parsed_words(["qfl.yaml"])[0] == Path("qfl.yaml")
    assert "there is no configs/qfl.yaml" in refused(capsys, "configs/qfl.yaml", status=2)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("CIoULoss", ": detloss train stock box.type=CIoULoss"),
        ("EIoULoss", ": detloss train stock box.type=EIoULoss"),
        ("MPDIoULoss", ": detloss train stock box.type=MPDIoULoss"),
        ("L1Loss", ": detloss train stock model=rtdetr-l.yaml loss_bbox.type=L1Loss"),
        ("KLDLoss", ": detloss train stock model=yolov8n-obb.yaml box.type=KLDLoss"),
        ("SeesawLoss", ": detloss show SeesawLoss says how"),
    ],
)
def test_a_loss_in_place_of_a_config_is_told_how_it_is_trained(name, how, capsys):
    assert f"{name} is a loss, and no config{how}" in refused(capsys, name, "--data", "x", status=2)


def test_train_takes_a_model_as_an_option_too(capsys, monkeypatch):
    found = []
    monkeypatch.setattr(train, "train", lambda args: found.append(args.overrides))
    for words in (["model=yolo11n.yaml"], ["--model", "yolo11n.yaml"], ["model=yolo11n.yaml", "--model=yolo11n.yaml"]):
        detloss(capsys, "train", "qfl", "epochs=3", *words)
    assert found == [{"epochs": "3", "model": "yolo11n.yaml"}] * 3
    twice = refused(capsys, "model=yolo11n.yaml", "--model", "yolov8n.yaml", status=2)
    assert "given twice: leave model=yolo11n.yaml or --model yolov8n.yaml out" in twice
    assert "--model is for Ultralytics" in refused(capsys, ATSS, "--model", "yolo11n.yaml", status=2)


def test_a_scenario_is_trained_as_the_digits_set_is(tmp_path, monkeypatch):
    monkeypatch.setenv("DETLOSS_PLUGINS_CACHE", str(tmp_path / "cache"))
    for folder in (tmp_path / "cache" / "small-digits-v1", tmp_path / "mine"):
        folder.mkdir(parents=True)
        (folder / "digits.yaml").touch()
        wanted = DIGITS_ARGS if folder.parent.name == "cache" else {}
        assert _yolo.yolo_data(folder, "detect") == (folder / "digits.yaml", wanted)


def test_train_says_which_ultralytics_it_needs(capsys, monkeypatch):
    rest = compat.FEATURES["devices"][1:]
    monkeypatch.setitem(compat.FEATURES, "devices", (False, *rest))
    assert "needs Ultralytics 8.4.140 or newer" in refused(capsys, "device=0,1", "epochs=1", status=2)


def test_train_ends_with_what_a_training_on_several_devices_returns(capsys, tmp_path, monkeypatch):
    """A dict: the metrics themselves stay in the processes of its launch."""

    def launch(self, **_):
        self.trainer = SimpleNamespace(plugin_losses={}, args=get_cfg(), best=Path("best.pt"))
        return {"metrics/mAP50(B)": 0.75, "metrics/mAP50-95(B)": 0.5, "fitness": 0.5}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ultralytics.engine.model.Model.train", launch)
    assert detloss(capsys, "train", "qfl", "device=0,1").startswith("mAP50 0.750   mAP50-95 0.500\n")


def test_train_ends_with_what_a_training_with_mmdetection_has_measured():
    """CocoMetric logs nothing where nothing was detected; other metrics have no AP of boxes."""
    coco, masks, voc = (
        {"val_evaluator": part}
        for part in ({"type": "CocoMetric"}, {"type": "CocoMetric", "metric": ["segm"]}, [{"type": "VOCMetric"}])
    )
    val = {"train/loss": 1.0, "val/time": 0.1, "val/data_time": 0.1}
    boxes = {"val/coco/bbox_mAP": 0.25, "val/coco/bbox_mAP_50": 0.5}
    for cfg, scalars, words in (
        (coco, {**val, **boxes}, "mAP50 0.500   mAP50-95 0.250"),
        (coco, val, "mAP50 0.000   mAP50-95 0.000"),
        (coco, {"train/loss": 1.0}, "not measured"),
        (masks, {**val, "val/coco/segm_mAP": 0.25}, "coco/segm_mAP 0.250"),
        (masks, val, "not measured"),
        (
            voc,
            {**val, "val/pascal_voc/mAP": 0.5, "val/pascal_voc/AP50": 0.5},
            "pascal_voc/mAP 0.500   pascal_voc/AP50 0.500",
        ),
        ({}, {**val, "val/dota/AP50": 0.5, "val/dota/mAP": 0.1}, "mAP50 0.500"),
    ):
        assert _mmdet.measured(scalars, cfg) == words


ATSS = str(ROOT / "configs" / "mmdetection" / "atss_r18_fpn_digits.py")


def test_train_names_what_does_not_fit(tmp_path, capsys):
    loss, run = "model.bbox_head.loss_cls", ["--work-dir", str(tmp_path)]
    focal = f"{loss}.type=detloss_plugins.FocalLoss"
    assert "Write use_sigmoid=True" in refused(capsys, ATSS, *run, f"{loss}._delete_=True", focal, status=2)
    only_type = f"{loss}.type=detloss_plugins.VarifocalLoss"
    assert "VarifocalLoss would keep gamma=2.0, alpha=0.25" in refused(capsys, ATSS, *run, only_type, status=2)
    assert not list(tmp_path.iterdir())


def test_train_refuses_a_key_that_a_config_does_not_have(tmp_path, capsys):
    for word, nearest in (("epochs=1", "train_cfg.max_epochs"), ("cls.type=Focal", "model.bbox_head.loss_cls.type")):
        message = refused(capsys, ATSS, "--work-dir", str(tmp_path), word, status=2)
        assert f"The config has no key {word.split('=')[0]}; did you mean" in message
        assert nearest in message


def test_the_schedule_follows_the_number_of_epochs():
    steps = [
        {"type": "LinearLR", "by_epoch": False, "begin": 0, "end": 500},
        {"type": "MultiStepLR", "begin": 0, "end": 12, "milestones": [8, 11]},
    ]
    stock = ConfigDict(train_cfg={"max_epochs": 12}, param_scheduler=steps)
    for epochs, end, milestones in ((24, 24, [16, 22]), (6, 6, [4, 6]), (1, 1, [1, 1])):
        cfg = copy.deepcopy(stock)
        cfg.train_cfg.max_epochs = epochs
        (note,) = _mmdet.scale_schedule(cfg, stock)
        assert f"from 12 to {epochs} epochs" in note
        assert cfg.param_scheduler[0] == stock.param_scheduler[0]
        assert cfg.param_scheduler[1] == {**stock.param_scheduler[1], "end": end, "milestones": milestones}
    assert _mmdet.scale_schedule(copy.deepcopy(stock), stock) == []
    assert _mmdet.scale_schedule(ConfigDict(train_cfg={"max_iters": 9}), ConfigDict(train_cfg={"max_iters": 3})) == []
    with pytest.raises(UsageError, match="whole number above 0"):
        _mmdet.scale_schedule(ConfigDict(stock, train_cfg={"max_epochs": "abc"}), stock)


@pytest.mark.parametrize("config", ["qfl", ATSS])
def test_digits_that_cannot_be_written(config, capsys, monkeypatch):
    monkeypatch.setenv("DETLOSS_PLUGINS_CACHE", "/dev/null/cache")
    assert "set DETLOSS_PLUGINS_CACHE to another folder" in refused(capsys, config, status=2)


class Refusing:
    """A Runner in whose training torch refuses to load a checkpoint, as 2.6 and newer do with mmengine 0.10.7."""

    logger = logging.getLogger("refusing")

    @classmethod
    def from_cfg(cls, cfg):
        return cls()

    def register_hook(self, hook):
        pass

    def train(self):
        raise pickle.UnpicklingError("Weights only load failed. In PyTorch 2.6, we changed the default value of ...")


def test_a_checkpoint_that_torch_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mmengine.runner.Runner", Refusing)
    monkeypatch.delenv(_mmdet.LOAD_ALL, raising=False)
    arguments = [ATSS, "--work-dir", str(tmp_path / "run")]
    message = refused(capsys, *arguments, "resume=True", f"load_from={tmp_path}/x.pth", status=1)
    assert "onedl-mmengine" in message
    assert _mmdet.LOAD_ALL in message
    assert _mmdet.LOAD_ALL not in os.environ, "a stranger's file is not trusted"
    refused(capsys, *arguments, "resume=True", status=1)
    assert os.environ.pop(_mmdet.LOAD_ALL) == "1", "what we wrote ourselves is"


DATA = "train: images\nval: images\nnames: [a]\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["broken.yaml"], "broken.yaml is no YAML"),
        (["twice.yaml"], "twice.yaml has the key box twice, in line 1 and in line 3."),
        (["inside.yaml"], "inside.yaml has the key type twice, in line 1 and in line 1."),
        (["resume=."], "There is no checkpoint weights/last.pt to resume."),
        (["list.yaml"], "list.yaml must hold a dict, such as {cls: {type: VarifocalLoss}}"),
        (["null.yaml"], "cls needs a dict such as {type: NAME}, not None"),
        (["cls.gamma=[1"], "cls.gamma=[1 is no YAML"),
        (["cls.loss_weight=null"], "loss_weight of AdaptiveThresholdFocalLoss must be"),
        (["cls.detach_gamma={a: 1}"], "detach_gamma of AdaptiveThresholdFocalLoss must be"),
        (["cls.type=[1]"], "There is no loss named [1]"),
        (["epochs=abc"], "'epochs=abc' is of invalid type str"),
        (["epochs=[1]"], "'epochs=[1]' is of invalid type list"),
        (["box=[1]"], "'box=[1]' is of invalid type list"),
        (["--data", "broken.yaml"], "broken.yaml is no data set"),
        (["--data", "list.yaml"], "list.yaml is no data set"),
        (["--data", "data.yaml"], "data.yaml is no data set"),
        (["--work-dir", "list.yaml/run"], "list.yaml is no folder"),
    ],
)
def test_a_training_with_ultralytics_that_cannot_be(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    twice = "box: {type: WIoULoss}\ncls: {type: FocalLoss}\nbox: {type: CIoULoss}"
    for name, content in (
        ("twice", twice),
        ("inside", "box: {type: A, type: B}"),
        ("broken", "cls: [1"),
        ("list", "[1]"),
        ("null", "cls:"),
        ("data", DATA),
    ):
        (tmp_path / f"{name}.yaml").write_text(content, encoding="utf-8")
    assert message in refused(capsys, *words, status=2)
    assert not (tmp_path / "runs").exists()


def test_labels_that_ultralytics_refuses(capsys, tmp_path, monkeypatch):
    """Class 7 of two: it leaves such images out, and none is left."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / split / "1.png")
        (tmp_path / "labels" / split / "1.txt").write_text("7 0.5 0.5 0.5 0.5\n", encoding="utf-8")
    data = f"path: {tmp_path.as_posix()}\ntrain: images/train\nval: images/val\nnames: [a, b]\n"
    (tmp_path / "data.yaml").write_text(data, encoding="utf-8")
    message = refused(capsys, "--data", "data.yaml", "epochs=1", "imgsz=32", "workers=0", status=1)
    assert "No valid images found" in message


NO_MODEL = "train_dataloader = dict(dataset=dict())\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["script.py"], "script.py is no config: ZeroDivisionError: division by zero"),
        (["syntax.py"], "syntax.py is no config: "),
        (["base.py"], "base.py is no config of a training: it has no model and no train_cfg and no optim_wrapper"),
        ([ATSS, "train_cfg.max_epochs=abc"], "train_cfg.max_epochs is 12 in the config, and cannot be 'abc'"),
        ([ATSS, "train_cfg.max_epochs=None"], "train_cfg.max_epochs must be a whole number above 0, not None"),
        ([ATSS, "model=3"], "model is a dict of "),
        ([ATSS, "train_dataloader.batch_size=[1,(2]"], "train_dataloader.batch_size=[1,(2]: Imbalanced brackets"),
        ([ATSS, "model={a: [1, 2]}"], "model={a: [1, 2]}: "),
        ([ATSS, "model.bbox_head.loss_cls.gamma=[1]"], "gamma of FocalLoss must be"),
        ([ATSS, "model.bbox_head.loss_cls=None"], "The detector cannot be built: AttributeError"),
        ([ATSS, "--work-dir", "script.py/run"], "script.py is no folder"),
    ],
)
def test_a_training_with_mmdetection_that_cannot_be(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("script", "x = 1 / 0"), ("syntax", "model = dict("), ("base", NO_MODEL)):
        (tmp_path / f"{name}.py").write_text(content, encoding="utf-8")
    assert message in refused(capsys, *words, status=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no annotation file of COCO: JSONDecodeError"),
        ("", "is no annotation file of COCO: JSONDecodeError"),
        ("[]", "is no annotation file of COCO: TypeError"),
        ('{"images": []}', "is no annotation file of COCO: KeyError"),
        ('{"images": [], "annotations": [], "categories": [{"id": 0, "name": "a"}]}', "lists no images"),
        ('{"images": [{"file_name": "1.jpg"}], "annotations": [], "categories": []}', "lists no categories"),
        (
            '{"images": [{"file_name": "1.jpg"}], "annotations": [{"category_id": 9}],'
            ' "categories": [{"id": 0, "name": "a"}]}',
            "has objects of category 9",
        ),
    ],
)
def test_a_coco_file_that_cannot_be(content, message, capsys, tmp_path):
    coco(tmp_path, "instances_train2017.json", "train2017", "1.jpg")
    coco(tmp_path, "instances_val2017.json", "val2017", "1.jpg")
    (tmp_path / "annotations" / "instances_train2017.json").write_text(content, encoding="utf-8")
    assert message in refused(capsys, ATSS, "--data", str(tmp_path), status=2)


def stopped(capsys, command, *argv):
    """The last line of a command whose options are refused, which it must be before it does anything."""
    with pytest.raises(SystemExit) as stop:
        command(list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_other_commands_refuse_before_they_measure(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("{}", encoding="utf-8")
    for command in (bench.main, step.main):
        assert "cannot write file/rows.json: " in stopped(capsys, command, "--json", "file/rows.json")
    assert "no size has nosuch in its name; there are 1k" in stopped(
        capsys, bench.main, "--loss", "GIoULoss", "--case", "nosuch"
    )
    assert "must end in one of" in stopped(capsys, bench.main, "--picture", "speed.txt")
    assert "file is no report of this command" in stopped(capsys, bench.main, "--from", "file")
    assert "nowhere is no report of this command" in stopped(capsys, bench.main, "--from", "nowhere")
    assert "--batch must be at least 1" in stopped(capsys, step.main, "--batch", "0")
    assert "there is no device nosuch here" in stopped(capsys, step.main, "--device", "nosuch")
    if not torch.cuda.is_available():
        assert "there is no device cuda here" in stopped(capsys, step.main, "--device", "cuda")
    assert step.main(["--model", "nosuch.yaml", "--losses", "stock"]) == 2
    assert "error: nosuch.yaml is no model of Ultralytics" in capsys.readouterr().err


def test_train_overrides_losses(tmp_path):
    overrides = {"cls.loss_weight": 2, "box.type": "GIoULoss", "epochs": 3}
    losses = _yolo.yolo_losses(find(train.DEFAULT_CONFIG), overrides)
    assert overrides == {"epochs": 3}
    assert losses["cls"] == {"type": "AdaptiveThresholdFocalLoss", "loss_weight": 2}
    assert losses["box"] == {"type": "GIoULoss"}
    assert losses.keys() == {"cls", "box"}


def test_train_overrides_come_in_any_order():
    overrides = {"cls.loss_weight": 2, "cls.type": "FocalLoss"}
    losses = _yolo.yolo_losses(find(train.DEFAULT_CONFIG), overrides)
    assert losses["cls"] == {"type": "FocalLoss", "loss_weight": 2}


def test_train_overrides_the_losses_in_a_loss():
    inner = {"box.base.type": "InnerIoULoss", "box.base.base.type": "CIoULoss", "box.base.ratio": 0.8}
    losses = _yolo.yolo_losses({}, {**inner, "box.type": "WIoULoss"})
    base = {"type": "InnerIoULoss", "ratio": 0.8, "base": {"type": "CIoULoss"}}
    assert losses == {"box": {"type": "WIoULoss", "base": base}}
    parts = {"cls": {"type": "JointLoss", "losses": [{"type": "FocalLoss", "gamma": 1.5}, {"type": "PolyLoss"}]}}
    before = copy.deepcopy(parts)
    found = _yolo.yolo_losses(parts, {"cls.losses.0.alpha": 0.5, "cls.losses.1.type": "GHMC"})["cls"]["losses"]
    assert found == [{"type": "FocalLoss", "gamma": 1.5, "alpha": 0.5}, {"type": "GHMC"}]
    assert parts == before
    for index in ("2", "-1", "a"):
        with pytest.raises(UsageError, match=f"cls.losses.{index}.gamma: there is no {index} in a list of 2"):
            _yolo.yolo_losses(parts, {f"cls.losses.{index}.gamma": 1})


def test_a_data_set_is_given_once_and_as_ultralytics_has_it(tmp_path):
    args = {"data": str(tmp_path / "own.yaml"), "epochs": 3}
    data = _yolo.given_data(None, args)
    assert (data, args) == (tmp_path / "own.yaml", {"epochs": 3})
    assert _yolo.yolo_data(data, "detect") == (data, {}), "not with the arguments of the digits"
    with pytest.raises(UsageError, match="given twice"):
        _yolo.given_data(data, {"data": "other.yaml"})


def test_numbers_as_people_write_them():
    assert _yolo.values({"lr0": "1e-3", "x": "[1e3, a]"}) == {"lr0": 0.001, "x": [1000, "a"]}


@pytest.mark.parametrize("word", ["/x/my set #2/data.yaml", "https://host/coco8.zip"])
def test_a_data_set_is_where_the_word_says(word):
    for data in (_yolo.given_data(None, _yolo.values({"data": word})), DataSet().convert(word, None, None)):
        assert str(_yolo.yolo_data(data, "detect")[0]) == str(word if "://" in word else Path(word))


def test_the_address_of_a_data_set_is_no_file(monkeypatch):
    """Ultralytics reads it, MMDetection cannot."""
    seen, word = [], "https://host/coco8.yaml"
    monkeypatch.setattr(train, "train_yolo", lambda args: seen.append(args) or ("", "", []))
    assert CliRunner().invoke(train.command, ["--data", word]).exit_code == 0
    assert [args.data for args in seen] == [word]
    assert CliRunner().invoke(train.command, ["--data", "none.yaml"]).exit_code == 2
    with pytest.raises(UsageError, match=f"a folder in COCO layout, not an address: {word}"):
        _coco.point_at(ConfigDict(), word)


def coco(folder, ann, images, first):
    (folder / "annotations").mkdir(exist_ok=True)
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    content = {"images": [{"file_name": first}], "annotations": [], "categories": categories}
    (folder / "annotations" / ann).write_text(json.dumps(content), encoding="utf-8")
    (folder / images / first).parent.mkdir(parents=True, exist_ok=True)
    (folder / images / first).touch()


def test_point_an_mmdet_config_at_ones_own_data(tmp_path):
    coco(tmp_path, "instances_train2017.json", "train2017", "1.jpg")
    coco(tmp_path, "instances_val2017.json", "val2017", "1.jpg")
    for other in ("captions_train2017.json", "person_keypoints_train2017.json"):  # COCO's own folder has them too
        (tmp_path / "annotations" / other).write_text("{}", encoding="utf-8")
    loader = {"dataset": {"type": "RepeatDataset", "dataset": {"type": "CocoDataset", "data_root": "elsewhere"}}}
    cfg = ConfigDict(
        train_dataloader=loader,
        val_dataloader={"dataset": {"type": "mmdet.CityscapesDataset"}},
        test_dataloader=None,
        val_evaluator=[{"type": "CocoMetric", "ann_file": ""}],
        test_evaluator=None,
        model={"roi_head": {"bbox_head": [{"num_classes": 80}, {"num_classes": 80}]}},
    )
    _coco.point_at(cfg, tmp_path)
    inner = cfg.train_dataloader.dataset.dataset
    assert inner.ann_file == "annotations/instances_train2017.json"
    assert inner.data_prefix == {"img": "train2017/"}
    assert cfg.val_dataloader.dataset.data_prefix == {"img": "val2017/"}
    assert inner.metainfo.classes == ("cat", "dog"), "in the file's order, as CocoDataset numbers them"
    assert [head.num_classes for head in cfg.model.roi_head.bbox_head] == [2, 2]
    assert cfg.val_dataloader.dataset.type == "CocoDataset", "which Cityscapes' is in all but what it leaves out"
    assert cfg.val_evaluator[0].ann_file.endswith("instances_val2017.json")
    coco(tmp_path, "instances_more_train.json", "train2017", "2.jpg")
    with pytest.raises(UsageError, match="exactly one train"):
        _coco.point_at(cfg, tmp_path)


def pointed_at(folder, name, **more):
    """One of mmdet's own configs, made to train on data of two classes."""
    for split in ("train", "val"):
        coco(folder, f"{split}.json", split, "1.jpg")
    cfg = get_config(f"mmdet::{name}")
    cfg.merge_from_dict(more)
    _coco.point_at(cfg, folder)
    return cfg


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py", "this one has VOCDataset"),
        ("maskformer/maskformer_r50_ms-16xb1-75e_coco.py", "this one has CocoPanopticDataset"),
        ("cityscapes/mask-rcnn_r50_fpn_1x_cityscapes.py", "the config by CityScapesMetric"),
        ("lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py", "the config by LVISMetric"),
    ],
)
def test_a_config_that_is_not_of_coco_is_not_pointed_at_ones_own_data(name, what, tmp_path):
    with pytest.raises(UsageError, match=what):
        pointed_at(tmp_path, name)


def test_what_configs_have_beside_the_number_of_classes(tmp_path):
    mask2former = pointed_at(tmp_path, "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py").model
    for head in (mask2former.panoptic_head, mask2former.panoptic_fusion_head):
        assert (head.num_things_classes, head.num_stuff_classes) == (2, 0)
    assert mask2former.panoptic_head.loss_cls.class_weight == [1.0, 1.0, 0.1], "the last of the background"
    weights = {"model.panoptic_head.loss_cls.class_weight": [2.0, *[1.0] * 79, 0.1]}
    with pytest.raises(UsageError, match="class_weight has weights of 80 classes, and the data has 2"):
        pointed_at(tmp_path, "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", **weights)
    weights["model.panoptic_head.loss_cls.class_weight"] = [2.0, 1.0, 0.1]  # of the data already
    mask2former = pointed_at(tmp_path, "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", **weights).model
    assert mask2former.panoptic_head.loss_cls.class_weight == [2.0, 1.0, 0.1]
    htc = pointed_at(tmp_path, "htc/htc_r50_fpn_1x_coco.py")
    assert [head.num_classes for head in htc.model.roi_head.bbox_head] == [2, 2, 2]
    assert htc.model.roi_head.semantic_head.num_classes == 183, "of the stuff"
    assert htc.train_dataloader.dataset.data_prefix == {"img": "train/", "seg": "stuffthingmaps/train2017/"}


def test_data_sets_that_are_put_together(tmp_path):
    """One stays of those that are the same then; a semi-supervised training has two ways to look at the images."""
    two = [{"type": "CocoDataset", "data_root": root, "ann_file": f"{root}.json"} for root in ("a", "b")]
    more = {"train_dataloader.dataset": {"_delete_": True, "type": "RepeatDataset", "dataset": {"datasets": two}}}
    (one,) = pointed_at(tmp_path, "gfl/gfl_r50_fpn_1x_coco.py", **more).train_dataloader.dataset.dataset.datasets
    assert (one.type, one.ann_file, one.data_prefix.img) == ("CocoDataset", "annotations/train.json", "train/")
    semi = pointed_at(tmp_path, "soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py")
    assert [part.ann_file for part in semi.train_dataloader.dataset.datasets] == ["annotations/train.json"] * 2


@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize("first", ["1.jpg", "photo[1].jpg", "day/1.jpg"])
def test_images_of_ones_own_data_may_be_behind_a_link(first, tmp_path):
    folder, found = tmp_path / "coco", ("annotations/train.json", "images/")
    folder.mkdir()
    coco(folder, "train.json", "../elsewhere", first)
    with pytest.raises(UsageError, match="is nowhere below"):
        _coco.coco_split(folder, "train")
    (folder / "around").symlink_to(folder)
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    assert _coco.coco_split(folder, "train") == found
    shutil.copytree(tmp_path / "elsewhere", folder / "more")
    with pytest.raises(UsageError, match="is in several folders, of which none has train in its name"):
        _coco.coco_split(folder, "train")
    (folder / "more").rename(folder / "train")
    assert _coco.coco_split(folder, "train") == ("annotations/train.json", "train/")


def test_both_files_of_ones_own_data_number_the_classes_alike(tmp_path):
    for split in ("train", "val"):
        coco(tmp_path, f"{split}.json", split, "1.jpg")
    content = json.loads((tmp_path / "annotations" / "val.json").read_text(encoding="utf-8"))
    for categories in (content["categories"][::-1], content["categories"][:1]):
        content["categories"] = categories
        (tmp_path / "annotations" / "val.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(UsageError, match=r"val\.json lacks categories of annotations/train\.json, or has them"):
            _coco.point_at(ConfigDict(), tmp_path)


def test_images_at_absolute_paths_and_folders_that_are_there_twice(tmp_path):
    for split in ("train", "val"):
        coco(tmp_path, f"{split}.json", f"images/{split}", "1.jpg")
    (tmp_path / "a-link").symlink_to(tmp_path / "images" / "train")
    (tmp_path / "images" / "up").symlink_to(tmp_path)
    assert _coco.coco_split(tmp_path, "train") == ("annotations/train.json", "images/train/")
    assert _coco.coco_split(tmp_path, "val") == ("annotations/val.json", "images/val/")
    coco(tmp_path, "train.json", "images/train", str(tmp_path / "images" / "train" / "1.jpg"))
    assert _coco.coco_split(tmp_path, "train") == ("annotations/train.json", "")


def test_a_documented_difference_that_is_none_fails():
    same = Upstream("mmdet.models.losses.GIoULoss", differs="it does not")
    worst = parity.compare(GIoULoss, same, [sample(GIoULoss)])
    assert parity.verdict(same, worst) == "FAIL"


def test_the_loop_of_the_benchmark_is_ap_loss():
    logits, target = (x.double() for x in cases.scene(40, 500))
    value, up, down = cases.plain_ap_loss(logits, target)
    logits.requires_grad_()
    mine = ap_loss(logits, target).mean()
    mine.backward()
    torch.testing.assert_close(value, mine.detach())
    torch.testing.assert_close(up, logits.grad[target > 0])
    torch.testing.assert_close(down, logits.grad[target == 0])


CPU = torch.device("cpu")


def test_peak_memory_is_what_is_there_at_once():
    def run():
        for _ in range(3):
            torch.zeros(1000, 1000)  # freed in every turn
        kept = torch.zeros(1000, 1000)
        return kept + 1

    assert timing.peak_memory(run, CPU) == pytest.approx(8e6, rel=0.01)


def test_kernels_are_the_operators_that_do_work():
    x, y = torch.ones(10, 10), torch.ones(100)

    def run():
        view = x.t().reshape(2, 50)[:1].expand(3, 50).unsqueeze(0)  # the reshape of a transposed tensor copies
        return (view * 2 + 1).exp(), torch.empty(5), y.to(y.dtype).contiguous().view(4, 25)

    seen = timing.observe(run, CPU)
    assert seen["kernels"] == 4, "copy, times, plus, exp"
    assert timing.is_view("aten::expand")
    assert not timing.is_view("aten::mul_")


def test_rounds_take_turns_and_a_slow_one_runs_once():
    order = []
    calls = {name: functools.partial(order.append, name) for name in "abc"}
    times = timing.interleaved(calls, CPU, rounds=4, warm_up=2)
    rounds = ["".join(order[start : start + 3]) for start in range(6, 18, 3)]
    assert "".join(order[:6]) == "aabbcc"
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1, "nobody always comes after the same"
    assert {name: len(taken) for name, taken in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert gc.isenabled()
    times = timing.interleaved({"slow": lambda: time.sleep(0.02), "fast": int}, CPU, rounds=3, limit=0.01)
    assert len(times["slow"]) == 1
    assert len(times["fast"]) == 3
    assert timing.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"ms": 3.0, "low": 2.0, "high": 4.0, "runs": 5}
    assert (timing.rounds_in(1, 100), timing.rounds_in(1, 1e4), timing.rounds_in(1, 0)) == (10, 5, 50)


def test_both_sides_of_a_contest_compute_the_same(loss_cls):
    """So the benchmark hands every counterpart the right input, in the right form."""
    case = cases.cases(loss_cls)[0]
    if case in cases.ROWS:
        case = case._replace(n=50)
    for contest in cases.contests(loss_cls, every_setting=True):
        ours = cases.our_losses(contest, case, ["eager"], CPU)
        pred, _, found = cases.participants(contest, case, ours, CPU, torch.float32)
        values = {who: call(pred, target) for who, (call, target) in found.items()}
        for upstream in contest.twins:
            torch.testing.assert_close(values[upstream.path], values["ours eager"], rtol=1e-3, atol=1e-5)


def test_every_counterpart_has_its_contest():
    for cls in registered_losses().values():
        expected = {upstream.path for upstream in cls.facts.upstream if not upstream.differs}
        assert {upstream.path for contest in cases.contests(cls) for upstream in contest.twins} == expected


def test_logits_have_few_positives():
    case = cases.LOGITS[1]._replace(n=5000)
    label, quality = cases.sampled(FocalLoss, case)[1]
    assert (label < 80).float().mean() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(quality > 0, label < 80)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(cases, "ROWS", (cases.Case("40", 40), cases.Case("60", 60)))
    monkeypatch.setattr(cases, "LOGITS", (cases.Case("30 x 80", 30, {"classes": 80}, 0.2),))
    monkeypatch.setattr(cases, "SCENES", (cases.Case("20 of 400", 400, {"positives": 20}),))


@pytest.mark.slow
def test_bench_command(tmp_path, capsys, tiny):
    file, picture, page = tmp_path / "rows.json", tmp_path / "speed.png", tmp_path / "docs" / "speed.md"
    few = ["--runs", "3", "--mode", "eager", "--dtype", "float32", "--device", "cpu"]
    chosen = ["--loss", "GIoULoss", "--loss", "FocalLoss", "--loss", "APLoss", "--loss", "NWDLoss"]
    assert bench.main([*chosen, *few, "--json", str(file), "--picture", str(picture), "--page", str(page)]) == 0
    report = bench.read_report(file)
    rows = report["rows"]
    for row in rows:
        assert 0 < row["low"] <= row["ms"] <= row["high"]
        assert row["runs"] == 3
        assert row["memory"] > 0
        assert row["kernels"] > 0
        assert row["bandwidth"] == pytest.approx(row["copy_ms"] / row["ms"], rel=1e-6)  # kept to eight digits
    boxes = [row for row in rows if (row["loss"], row["case"]) == ("GIoULoss", "60")]
    assert [row["who"].split(".")[0] for row in boxes] == ["ours eager", "mmdet", "torchvision", "ultralytics"]
    assert boxes[1]["faster"] == pytest.approx({"eager": boxes[1]["ms"] / boxes[0]["ms"]}, rel=1e-6)
    assert {row["bytes"] for row in boxes} == {3 * 60 * 4 * 4}
    assert [row["form"] for row in rows if row["who"].startswith("mmdet") and row["loss"] == "FocalLoss"] == ["index"]
    assert {row["who"] for row in rows if row["loss"] == "APLoss"} == {"ours eager", "FocalLoss", "plain loop"}
    assert {row["case"] for row in rows if row["loss"] == "NWDLoss"} == {"60"}, "nobody is beside it"
    assert report["machine"]["torch"] == torch.__version__
    assert picture.stat().st_size > 10_000
    assert "](../speed.png)" in page.read_text(encoding="utf-8")
    assert "## Box" in page.read_text(encoding="utf-8")
    capsys.readouterr()
    assert bench.main(["--from", str(file), "--page", str(page)]) == 0
    assert "NOT MEASURED" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["--loss", "GIoUlos"])
    assert "did you mean GIoULoss" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_compiled(tiny):
    args = bench.parse(["--loss", "GIoULoss", "--case", "40", "--runs", "2", "--dtype", "float32", "--device", "cpu"])
    rows = bench.rows(args.names, args)
    (compiled,) = [row for row in rows if row["who"] == "ours compiled"]
    assert not compiled["note"]
    assert compiled["kernels"] < rows[0]["kernels"]
    assert {mode for row in rows for mode in row.get("faster", ())} == {"eager", "compiled"}


def test_who_does_not_run_is_in_the_table(tmp_path, monkeypatch, tiny):
    def refuse(*args):
        raise RuntimeError("not for this dtype")

    path = "mmdet.models.losses.GIoULoss"
    monkeypatch.setitem(twins.TWINS, "mmdet", twins.TWINS["mmdet"]._replace(call=refuse))
    few = ["--loss", "GIoULoss", "--case", "40", "--runs", "2", "--mode", "eager", "--dtype", "bfloat16"]
    file = tmp_path / "rows.json"
    assert bench.main([*few, "--device", "cpu", "--json", str(file)]) == 0
    errors = {row["who"]: row["error"] for row in bench.read_report(file)["rows"] if "error" in row}
    assert errors == {path: "RuntimeError: not for this dtype"}
    monkeypatch.setattr(GIoULoss, "forward", refuse)
    assert bench.main([*few, "--device", "cpu"]) == 1


def made_up(who, ms, family="classification", loss="FocalLoss", case=cases.YOLO, **more):
    row = {"loss": loss, "family": family, "settings": "", "form": "index", "case": case, "dtype": "float32"}
    row |= {"device": "cpu", "who": who, "theirs": "", "ms": ms, "low": ms, "high": ms, "of_pred": 2.0, "kernels": 4}
    row["of_pred_without"] = 1.0
    return row | {"bandwidth": 0.5, "note": "", **more}


def made_up_rows():
    dense = [made_up("ours eager", 4.0), made_up("ours compiled", 2.0), made_up("mmdet.FocalLoss", 10.0)]
    boxes = {"family": "box", "loss": "CIoULoss", "case": "10k"}
    found = [("ours eager", 5.0), ("ours compiled", 1.0), ("mmdet.CIoULoss", 5.5), ("ultralytics.bbox_iou", 4.5)]
    return bench.with_ratios(dense) + bench.with_ratios([made_up(who, ms, **boxes) for who, ms in found])


def test_bars():
    rows = made_up_rows()
    assert rows[2]["faster"] == {"eager": 2.5, "compiled": 5.0}
    verdicts = [bar["verdict"] for bar in speed_page.check_bars(rows)]
    assert verdicts == ["HOLDS"] * 7 + ["NOT MEASURED"] * 4
    slow = bench.with_ratios([made_up("ours eager", 5.0, family="box", loss="CIoULoss", case="10k"), rows[-1]])
    missed = speed_page.check_bars([*rows[:3], *slow, {**rows[-1], "faster": {"eager": 0.7, "compiled": 2.0}}])
    assert [bar["verdict"] for bar in missed[2:4]] == ["MISSED", "MISSED"]
    assert missed[3]["figure"].startswith("worst 1.43 (CIoULoss, 10k, float32, cpu, ultralytics.bbox_iou); ")
    for key, place in (("of_pred", 5), ("of_pred_without", 6)):
        assert speed_page.check_bars([{**rows[0], key: 3.1}, *rows[1:]])[place]["verdict"] == "MISSED"
    on_gpu = [made_up("ours compiled", 2.0, device="cuda", kernels=6)]
    assert speed_page.check_bars(on_gpu)[-1]["verdict"] == "MISSED"


def test_the_page_lists_where_ours_is_slower(tmp_path):
    report = {"machine": bench.machine(["cpu"]), "rows": made_up_rows()}
    lost = speed_page.page(report).split("## Where ours is slower")[1].split("## ")[0]
    assert "| `CIoULoss`, index target, 10k, float32, cpu | eager | `ultralytics.bbox_iou` | 5 | 4.5 | 0.90 |" in lost
    assert lost.count("`CIoULoss`") == 1
    won = {**report, "rows": report["rows"][:3]}
    assert "## Where ours is slower\n\nNone." in speed_page.page(won)


def test_the_kept_figures_have_a_page():
    """Of every machine: what the README and the site say of speed is taken from these files."""
    files = sorted((Path(__file__).parents[1] / "docs" / "speed").glob("*.json"))
    assert files
    for file in files:
        report = bench.read_report(file)
        assert {bar["verdict"] for bar in speed_page.check_bars(report["rows"])} & {"HOLDS", "MISSED"}
        page = speed_page.page(report)
        assert all(f"`{name}`" in page for name in {row["loss"] for row in report["rows"]})


def test_step_command(tmp_path):
    """Two steps of a real training, with the stock losses and with ours."""
    file = tmp_path / "rows.json"
    few = ["--imgsz", "64", "--batch", "4", "--steps", "2", "--warm-up", "1", "--json", str(file)]
    assert step.main([*few, "--losses", "stock", "--losses", "VFL + EIoU + DFL, eager"]) == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    assert [row["losses"] for row in report["rows"]] == ["stock", "VFL + EIoU + DFL, eager"]
    for row in report["rows"]:
        assert row["steps"] == 2
        assert sum(row[part]["ms"] for part in step.PARTS) < row["forward"]["ms"] < row["step"]["ms"]
        assert 0 < row["share"]["low"] <= row["share"]["median"] <= row["share"]["high"] < 1
        assert row["kernels"] > 300
        assert row["waits"] >= 3
    assert report["machine"]["imgsz"] == 64


def test_step_command_counts_what_a_gpu_would_be_given(monkeypatch):
    monkeypatch.setenv("DETLOSS_ASYNC", "1")
    args = step.parse(["--model", "yolo26n.yaml", "--imgsz", "64", "--batch", "4", "--steps", "1", "--warm-up", "1"])
    stock, ours = (step.measure(name, args)[-1] for name in ("stock", "BCE + CIoU + DFL, eager"))
    assert ours["kernels"] < stock["kernels"]
    assert ours["waits"] < stock["waits"]


def test_step_command_takes_configs_of_mmdetection(capsys):
    config = "configs/mmdetection/retinanet_r18_fpn_digits.py"
    assert step.main(["--config", config, "--batch", "2", "--steps", "2", "--warm-up", "1"]) == 0
    assert "kernels" in capsys.readouterr().out
