"""The curves of an Ultralytics training: what is in them, who gets them, and that they change nothing."""

import csv
from types import SimpleNamespace

import pytest
import torch
from support.ultralytics import SETTINGS, branches, called, detector, known, older, ours
from ultralytics import YOLO

from detloss_plugins.adapters.ultralytics import criterion_state, make_trainer
from detloss_plugins.adapters.ultralytics.curves import Curves, append, scalars
from detloss_plugins.adapters.ultralytics.trainer import add_curves
from detloss_plugins.losses import set_progress

LOSSES = {
    "cls": {
        "type": "ScheduledLoss",
        "losses": [{"type": "BinaryCrossEntropyLoss", "class_weight": [1.0, 2.0] * 5}, {"type": "GHMC"}],
        "at": [1],
    },
    "box": {"type": "JointLoss", "losses": [{"type": "WIoULoss"}, {"type": "NWDLoss", "loss_weight": 2.0}]},
}
STATE = {"losses/box/losses.0.mean", "losses/cls/progress"}
LOOKS = {
    "losses/positives",
    *(f"losses/{slot}/gradient" for slot in ("box", "cls", "dfl")),
    "losses/cls/0_BinaryCrossEntropyLoss",
    "losses/cls/1_GHMC",
    "losses/box/0_WIoULoss",
    "losses/box/1_NWDLoss",
}


def looked_at(model, criterion, batch, every=1):
    add_curves(SimpleNamespace(model=SimpleNamespace(criterion=criterion)), every)
    preds = model(batch["img"])
    return preds, criterion(preds, batch)


@pytest.mark.parametrize("name", known("yolov8n", "yolo26n"))
def test_what_is_seen(name, batches):
    """Gradients are those of the step's own backward, parts add up to the slot's item, and the state is the loss's."""
    model, batch = detector(name), batches["detect"]
    criterion = ours(model, LOSSES)
    _, (_, items) = looked_at(model, criterion, batch)
    seen = scalars(criterion)
    several = len(branches(criterion)) == 2
    wanted = {"losses/one2one/", "losses/one2many/"} if several else {"losses/"}
    assert seen.keys() == {key.replace("losses/", start, 1) for start in wanted for key in LOOKS | STATE}
    start = "losses/one2one/" if several else "losses/"  # whose items those of an end-to-end head are
    items = items if isinstance(items, dict) else dict(zip(("box_loss", "cls_loss", "dfl_loss"), items, strict=True))
    box = seen[f"{start}box/0_WIoULoss"] + seen[f"{start}box/1_NWDLoss"]
    assert box == pytest.approx(items["box_loss"].item(), rel=1e-4)
    assert seen[f"{start}cls/0_BinaryCrossEntropyLoss"] == pytest.approx(items["cls_loss"].item(), rel=1e-4)
    assert seen[f"{start}cls/1_GHMC"] == 0
    last = branches(criterion)[-1]
    assert seen[f"{start}box/losses.0.mean"] == pytest.approx(last.built["box"].losses[0].mean.item())
    assert seen[f"{start}positives"] > 10


@pytest.mark.parametrize("kind", ["JointLoss", "ScheduledLoss"])
def test_parts_keep_no_graph(kind, batches):
    """It would be there until the end of the epoch."""
    whole = {
        "type": kind,
        "losses": [{"type": "GHMC"}, {"type": "FocalLoss"}],
        **({"at": [9]} if kind[0] == "S" else {}),
    }
    model = detector("yolov8n")
    criterion = ours(model, {"cls": whole})
    looked_at(model, criterion, batches["detect"])
    assert not any(value.requires_grad for look in criterion.curves.seen for value in look.values())


def test_an_epoch_that_begins_again_keeps_no_looks_of_the_first_time(batches):
    model = detector("yolov8n")
    criterion = ours(model, LOSSES)
    trainer = SimpleNamespace(model=SimpleNamespace(criterion=criterion))
    for _ in range(2):
        add_curves(trainer, 1)
        criterion(model(batches["detect"]["img"]), batches["detect"])
    assert len(criterion.curves.seen) == 1


@pytest.mark.parametrize("kind", ["JointLoss", "ScheduledLoss"])
def test_parts_are_what_each_has_in_the_slot(kind, batches):
    """Without what is ignored; half of each where one loss takes over from the other, as the slot normalises it."""
    model, batch = detector("yolov8n"), batches["detect"]
    parts = [{"type": "BinaryCrossEntropyLoss"}, {"type": "FocalLoss", "loss_weight": 9.0}]
    whole, share = {"type": kind, "losses": parts}, 1.0
    if kind == "ScheduledLoss":
        parts[1:] = [{"type": "APLoss", "loss_weight": 2.0}]
        whole, share = {**whole, "at": [0], "fade": 2}, 0.5
    ignore = {"ignore": {"classes": [0, 4, 7]}} if not older("8.3.200") else {}
    criterion = ours(model, {"cls": whole, **ignore})
    set_progress(criterion.built["cls"], epoch=1)
    looked_at(model, criterion, batch)
    seen = scalars(criterion)
    for number, part in enumerate(parts):
        items = called(ours(model, {"cls": part, **ignore}), model, batch)[1]
        found = seen[f"losses/cls/{number}_{part['type']}"]
        assert found == pytest.approx(share * items["cls_loss"].item(), rel=1e-4)


@pytest.mark.parametrize("name", known("yolov8n", "yolo26n"))
def test_gradients_are_those_of_the_backward(name, batches):
    """Slot by slot; of an end-to-end head branch by branch, with the weight that each has in this epoch."""
    model, batch = detector(name), batches["detect"]
    criterion = ours(model, LOSSES)
    preds, (loss, _) = looked_at(model, criterion, batch)
    if loss.dim() == 0:
        pytest.skip("this version of Ultralytics gives the sum of the slots alone")
    if hasattr(criterion, "update"):
        criterion.update()  # as Ultralytics does before the curves of an epoch are read
    seen, several = scalars(criterion), len(branches(criterion)) == 2
    for branch in ("one2many", "one2one") if several else ("",):
        own = preds[branch] if several else preds
        tensors = [x for x in (own.values() if isinstance(own, dict) else own) if isinstance(x, torch.Tensor)]
        tensors = [x for x in tensors if x.requires_grad]
        for place, slot in enumerate(("box", "cls", "dfl")):
            found = torch.autograd.grad(loss[place], tensors, retain_graph=True, allow_unused=True)
            norm = sum(x.square().sum() for x in found if x is not None).sqrt().item()
            assert seen["/".join(filter(None, ("losses", branch, slot, "gradient")))] == pytest.approx(norm, rel=1e-3)


def test_looking_changes_nothing_and_is_done_in_every_so_many_steps(batches, monkeypatch):
    model, batch = detector("yolov8n"), batches["detect"]
    plain, watched = ours(model, LOSSES), ours(model, LOSSES)
    watched.curves = Curves(3)
    looks = []
    monkeypatch.setattr("detloss_plugins.adapters.ultralytics.curves.Slots.scalars", lambda *_: looks.append(1) or {})
    for step in range(7):
        values = [criterion(model(batch["img"]), batch)[0].sum() for criterion in (plain, watched)]
        assert torch.equal(*values), step
        assert len(looks) == step // 3 + 1
    for slot, buffers in criterion_state(plain)["criterion"].items():
        for name, value in buffers.items():
            assert torch.equal(value, criterion_state(watched)["criterion"][slot][name])
    with torch.no_grad():
        watched(model(batch["img"]), batch)
    assert watched.curves.steps == 7


@pytest.mark.parametrize(("curves", "error"), [("often", TypeError), (-1, ValueError), (2.5, TypeError)])
def test_how_often_to_look(curves, error):
    with pytest.raises(error, match="curves of make_trainer must be True, False or a number of steps, not"):
        make_trainer(LOSSES, curves=curves)


@pytest.fixture
def data(datasets):
    return datasets["detect"]


def test_every_logger_gets_them_and_results_csv_does_not(data, tmp_path):
    """As TensorBoard, W&B, ClearML and the rest read them, from the metrics at the end of an epoch."""
    logged = []
    yolo = YOLO("yolov8n.yaml")
    yolo.add_callback("on_fit_epoch_end", lambda trainer: logged.append(dict(trainer.metrics)))
    settings = {**SETTINGS, "project": str(tmp_path), "epochs": 2}
    yolo.train(data=data, name="with", trainer=make_trainer(LOSSES, curves=1), **settings)
    YOLO("yolov8n.yaml").train(data=data, name="without", trainer=make_trainer(LOSSES), **settings)
    for epoch in range(2):
        assert logged[epoch].keys() >= LOOKS | STATE
        assert "metrics/mAP50(B)" in logged[epoch]
        assert logged[epoch]["losses/cls/progress"] == epoch
        idle, running = "0_BinaryCrossEntropyLoss", "1_GHMC"
        for name, runs in ((idle, epoch == 0), (running, epoch == 1)):
            assert (logged[epoch][f"losses/cls/{name}"] > 0) == runs
    assert not any(key.startswith("losses/") for key in yolo.trainer.metrics)
    tables = []
    for name in ("with", "without"):
        text = (tmp_path / name / "results.csv").read_text(encoding="utf-8")
        rows = [[word.strip() for word in line.split(",")] for line in text.splitlines()]
        timed = rows[0].index("time") if "time" in rows[0] else None
        tables.append([[word for place, word in enumerate(row) if place != timed] for row in rows])
    assert tables[0] == tables[1]
    with (tmp_path / "with" / "losses.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert rows[0].keys() == {"epoch", *LOOKS, *STATE}
    assert float(rows[1]["losses/cls/progress"]) == 1
    assert not (tmp_path / "without" / "losses.csv").exists()


def test_a_row_stands_below_its_own_columns(tmp_path):
    """Also of a run that resumes with another loss."""
    file = tmp_path / "losses.csv"
    for epoch, values in enumerate(({"a": 1.0, "b": 2.0}, {"b": 3.0, "c": 4.0}, {"a": 5.0, "b": 6.0}), 1):
        append(file, epoch, values)
    assert file.read_text(encoding="utf-8").splitlines() == ["epoch,a,b,c", "1,1,2,", "2,,3,4", "3,5,6,"]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("curves", [True, False])
def test_a_run_in_the_folder_of_another_keeps_none_of_its_rows(curves, data, tmp_path):
    """As Ultralytics keeps none of results.csv."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "losses.csv").write_text("epoch\n1\n", encoding="utf-8")
    settings = {**SETTINGS, "data": data, "model": "yolov8n.yaml", "project": str(tmp_path), "name": "run"}
    trainer = make_trainer(LOSSES, curves=curves)
    assert trainer(overrides={**settings, "exist_ok": True}).save_dir == folder
    assert not (folder / "losses.csv").exists()


def test_tensorboard(data, tmp_path, monkeypatch):
    """Ultralytics' own callback, with a writer in the place of TensorBoard's."""
    from ultralytics.utils.callbacks import tensorboard

    written = {}

    class Writer:
        def add_scalar(self, name, value, step):
            written[name, step] = value

    monkeypatch.setattr(tensorboard, "WRITER", Writer(), raising=False)
    yolo = YOLO("yolov8n.yaml")
    yolo.add_callback("on_fit_epoch_end", tensorboard.on_fit_epoch_end)
    settings = {**SETTINGS, "project": str(tmp_path), "epochs": 3, "val": False}
    yolo.train(data=data, name="run", trainer=make_trainer({"box": {"type": "WIoULoss"}}, curves=True), **settings)
    assert 0 < written["losses/box/mean", 1] < 1
    assert written["losses/positives", 3] > 0
    table = (tmp_path / "run" / "results.csv").read_text(encoding="utf-8")
    assert "losses" not in table
    assert len({line.count(",") for line in table.splitlines()}) == 1, (
        "nor do metrics keep them where none is validated"
    )


@pytest.mark.slow
def test_rtdetr_has_the_state_of_its_losses(datasets, tmp_path):
    from support.ultralytics import model_file
    from ultralytics import RTDETR

    yolo = RTDETR(model_file("yolov8n-rtdetr", tmp_path))
    logged = []
    yolo.add_callback("on_fit_epoch_end", lambda trainer: logged.append(dict(trainer.metrics)))
    trainer = make_trainer({"loss_giou": {"type": "WIoULoss"}}, "rtdetr", curves=True)
    settings = {**SETTINGS, "project": str(tmp_path), "epochs": 1}
    yolo.train(data=datasets["rtdetr"], name="run", trainer=trainer, **settings)
    assert 0 < logged[0]["losses/loss_giou/mean"] < 2
