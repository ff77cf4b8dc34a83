"""The commands: what they refuse, and in how many words; the README is what it says it is."""

import json

import bench
import compare
import pytest
import table
import torch
import train
from mmengine.config import ConfigDict

from detloss_plugins.base import Upstream
from detloss_plugins.losses import ap_loss


def refused(capsys, *argv, status):
    """The last line that a refused command prints."""
    try:
        code = train.main(list(argv))
    except SystemExit as stop:
        code = stop.code
    assert code == status
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_train_refuses_in_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no-such.yaml" in refused(capsys, "no-such.yaml", status=2)
    assert "there is no" in refused(capsys, "--data", "no-such-folder", status=2)
    (tmp_path / "losses.txt").touch()
    assert ".yaml" in refused(capsys, "losses.txt", status=2)
    assert "accepts alpha, compile, gamma" in refused(capsys, "cls.gama=2", status=1)
    assert "did you mean CIoULoss" in refused(capsys, "box.type=CIoULos", status=1)
    assert "exactly one data YAML" in refused(capsys, "--data", str(tmp_path), status=1)
    assert "no-such-model.yaml" in refused(capsys, "model=no-such-model.yaml", status=1)
    assert "reg_max=1" in refused(capsys, "model=yolo26n.yaml", status=1), "the default third slot needs bins"
    assert "'no_such_argument' is not a valid YOLO argument" in refused(capsys, "no_such_argument=1", status=1)


def test_train_overrides_losses(tmp_path):
    overrides = {"cls.loss_weight": 2, "box.type": "GIoULoss", "epochs": 3}
    losses = train.yolo_losses(train.DEFAULT_CONFIG, overrides)
    assert overrides == {"epochs": 3}
    assert losses["cls"] == {"type": "VarifocalLoss", "loss_weight": 2}
    assert losses["box"] == {"type": "GIoULoss"}
    assert losses["dfl"] == {"type": "DistributionFocalLoss"}


def coco(folder, ann, images, first):
    (folder / "annotations").mkdir(exist_ok=True)
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    content = {"images": [{"file_name": first}], "annotations": [], "categories": categories}
    (folder / "annotations" / ann).write_text(json.dumps(content))
    (folder / images).mkdir(parents=True, exist_ok=True)
    (folder / images / first).touch()


def test_point_an_mmdet_config_at_ones_own_data(tmp_path):
    coco(tmp_path, "instances_train2017.json", "train2017", "1.jpg")
    coco(tmp_path, "instances_val2017.json", "val2017", "1.jpg")
    loader = {"dataset": {"type": "RepeatDataset", "dataset": {"type": "CocoDataset", "data_root": "elsewhere"}}}
    cfg = ConfigDict(
        train_dataloader=loader,
        val_dataloader={"dataset": {}},
        test_dataloader={"dataset": {}},
        val_evaluator={"ann_file": ""},
        test_evaluator={"ann_file": ""},
        model={"roi_head": {"bbox_head": [{"num_classes": 80}, {"num_classes": 80}]}},
    )
    train.point_at(cfg, tmp_path)
    inner = cfg.train_dataloader.dataset.dataset
    assert inner.ann_file == "annotations/instances_train2017.json"
    assert inner.data_prefix == {"img": "train2017/"}
    assert cfg.val_dataloader.dataset.data_prefix == {"img": "val2017/"}
    assert inner.metainfo.classes == ("cat", "dog"), "in the file's order, as CocoDataset numbers them"
    assert [head.num_classes for head in cfg.model.roi_head.bbox_head] == [2, 2]
    assert cfg.val_evaluator.ann_file.endswith("instances_val2017.json")
    coco(tmp_path, "more_train.json", "train2017", "2.jpg")
    with pytest.raises(train.UsageError, match="exactly one train"):
        train.point_at(cfg, tmp_path)


def test_compare_command(tmp_path, capsys, monkeypatch):
    """The whole command, on random tensors; a wrong formula makes its exit status 1."""
    import training_tensors

    from detloss_plugins.losses import GIoULoss

    monkeypatch.setattr(training_tensors, "training_tensors", dict)
    file = tmp_path / "rows.json"
    assert compare.main(["--loss", "GIoULoss", "--loss", "EIoULoss", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert {row["loss"] for row in rows} == {"GIoULoss", "EfficientIoULoss"}
    assert {row["verdict"] for row in rows} == {"PASS", "DIFFERS"}
    right = GIoULoss.fn
    monkeypatch.setattr(GIoULoss, "fn", staticmethod(lambda p, t, **hyper: right(p, t, **hyper) * 1.001))
    assert compare.main(["--loss", "GIoULoss"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_documented_difference_that_is_none_fails():
    same = Upstream("mmdet.models.losses.GIoULoss", differs="it does not")
    from detloss_plugins.losses import GIoULoss

    worst = compare.compare(GIoULoss, same, {"random": GIoULoss.sample()})
    assert compare.verdict(same, worst) == "FAIL"


def test_the_readme_table_is_up_to_date(capsys):
    assert table.main(["--check"]) == 0


@pytest.mark.parametrize(("name", "row"), [("losses", "| `CIoULoss` | box |"), ("detectors", "| `RTDETRDecoder` |")])
def test_an_outdated_table_is_noticed(name, row, tmp_path, monkeypatch, capsys):
    readme, text = tmp_path / "README.md", table.README.read_text(encoding="utf-8")
    before, rest = text.split(f"<!-- {name}: generated by tools/table.py -->")
    _, after = rest.split(f"<!-- end of {name} -->")
    readme.write_text(f"{before}<!-- {name}: generated by tools/table.py -->\nold\n<!-- end of {name} -->{after}")
    monkeypatch.setattr(table, "README", readme)
    assert table.main(["--check"]) == 1
    assert table.main([]) == 0
    assert table.main(["--check"]) == 0
    assert row in readme.read_text()


def test_the_loop_of_the_benchmark_is_ap_loss():
    logits, target = (x.double() for x in bench.scene(40, 500))
    value, up, down = bench.plain_ap_loss(logits, target)
    logits.requires_grad_()
    mine = ap_loss(logits, target).mean()
    mine.backward()
    torch.testing.assert_close(value, mine.detach())
    torch.testing.assert_close(up, logits.grad[target > 0])
    torch.testing.assert_close(down, logits.grad[target == 0])


def test_peak_memory_is_what_is_there_at_once():
    def run():
        for _ in range(3):
            torch.zeros(1000, 1000)  # freed in every turn
        kept = torch.zeros(1000, 1000)
        return kept + 1

    assert bench.peak_memory(run, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


def test_bench_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SIZES", ((20, 4000),))
    file = tmp_path / "rows.json"
    assert bench.main(["--loss", "APLoss", "--loss", "DRLoss", "--runs", "3", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [row["loss"] for row in report["rows"]] == ["FocalLoss", "APLoss", "DRLoss"]
    for row in report["rows"]:
        assert 0 < row["least"] <= row["ms"] <= row["most"]
        assert row["memory"] > 0
    assert report["rows"][1]["faster"] == report["rows"][1]["loop_ms"] / report["rows"][1]["ms"]
    assert report["machine"]["torch"] == torch.__version__
    with pytest.raises(SystemExit):
        bench.main(["--loss", "GIoULoss"])
    assert "GIoULoss is not a ranking loss" in capsys.readouterr().err
