"""Weights by gradients beside the stock losses of Ultralytics, and ``loss_weight: auto``."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from click.testing import CliRunner
from support.ultralytics import (
    SETTINGS,
    STOCK_RTDETR,
    branches,
    detector,
    known,
    loss_and_gradients,
    model_file,
    ours,
    overlapping,
    since,
    third,
    without_objects,
)
from ultralytics import RTDETR, YOLO
from ultralytics.cfg import get_cfg

from detloss_plugins.adapters.calibrate import STOCK, Gradients, Suggestion
from detloss_plugins.adapters.ultralytics import calibrate as module
from detloss_plugins.adapters.ultralytics import (
    criterion_state,
    describe,
    install,
    load_losses,
    make_trainer,
    trained_losses,
)
from detloss_plugins.adapters.ultralytics.calibrate import Look, RTDETRLook, calibrate, candidate, fitting
from detloss_plugins.adapters.ultralytics.config import waiting, weights_of, with_weights
from detloss_plugins.cli import main

DFL = {"type": "DistributionFocalLoss"}
AUTO = {"cls": {"type": "VarifocalLoss", "loss_weight": "auto"}, "box": {"type": "WIoULoss"}}


def looking(criterion, model, candidates, at=(1,)):
    """Have the branches of a criterion looked at; the gradients that will be found."""
    found = Gradients()
    for branch in branches(criterion):
        branch.curves = Look(model, branch, candidates, found, at)
    return found


def amounts(found, slot, label, step=1):
    return found.found[slot, label][step].tolist()


def norms(model, criterion, batch):
    """L1 norms of the gradients of the box, class and dfl loss at the head's class scores and distances."""
    preds = model(batch["img"])
    loss, _ = criterion(preds, batch)
    norm = {}
    for place, slot in enumerate(("box", "cls", "dfl")):
        at = preds["scores" if slot == "cls" else "boxes"]
        norm[slot] = torch.autograd.grad(loss[place], at, retain_graph=True)[0].abs()
    return norm, len(batch["img"])


@pytest.mark.parametrize("name", known("yolov8n", "yolo26n", "yolov8n-obb", "yolov8n-seg", "yolov8n-pose"))
def test_the_stock_losses_have_weight_one(name, batches):
    """And a loss that is four times the stock one a quarter of it: in every branch and task."""
    task = {"obb": "obb", "seg": "segment", "pose": "pose"}.get(name.partition("-")[2], "detect")
    model, batch = detector(name), batches[task]
    box = "ProbIoULoss" if task == "obb" else "CIoULoss"
    joint = {"type": "JointLoss", "losses": [{"type": "BinaryCrossEntropyLoss", "loss_weight": 4.0}]}
    stock = [candidate("BinaryCrossEntropyLoss", task), candidate(box, task), candidate(third(model), task)]
    wanted = [*stock, candidate(joint, task, label="four")]
    criterion = ours(model, {})
    found = looking(criterion, model, wanted)
    criterion(model(batch["img"]), batch)
    *ones, quarter = found.suggestions(wanted)
    turned = (
        0.02 if task == "obb" else 0
    )  # Ultralytics' floor below the sides of a box is of stride units, ours of pixels
    assert [suggestion.weight for suggestion in ones] == [1.0, pytest.approx(1.0, rel=turned), 1.0]
    assert quarter.weight == 0.25
    assert [suggestion.positives for suggestion in ones[1:]] == [1.0, 1.0]
    assert 0 < quarter.positives < 1
    assert quarter.positives == pytest.approx(quarter.stock_positives)


@since("8.3.200", "it ignores no classes")
def test_candidates_ignore_what_the_training_does(batches):
    model, batch, wanted = detector("yolov8n"), batches["detect"], [candidate("BinaryCrossEntropyLoss")]
    norms = []
    for ignore in ({}, {"ignore": {"classes": [0, 4, 7]}}):
        criterion = ours(model, ignore)
        found = looking(criterion, model, wanted)
        criterion(model(batch["img"]), batch)
        assert found.suggestion(wanted[0]).weight == 1.0
        norms.append(amounts(found, "cls", STOCK))
    assert norms[0] != norms[1]


@since("8.4.104", "its heads predict no dict, and its items have no names")
def test_the_gradients_are_those_of_a_training_with_the_loss(batches):
    """At the head's outputs, and on the anchors that the assigner makes positive."""
    model, batch = detector("yolov8n"), batches["detect"]
    losses = {"cls": {"type": "VarifocalLoss"}, "box": {"type": "NWDLoss"}}
    wanted = [candidate(cfg) for cfg in losses.values()]
    criterion = ours(model, {})
    found = looking(criterion, model, wanted)
    criterion(model(batch["img"]), batch)
    assigned = []
    own = ours(model, {slot: {**cfg, "loss_weight": 1.0} for slot, cfg in losses.items()})
    assigner = own.assigner
    own.assigner = lambda *args: assigned.append(assigner(*args)) or assigned[0]
    gains = {"box": own.hyp.box, "cls": own.hyp.cls}
    for label, (norm, images) in ((STOCK, norms(model, ours(model, {}), batch)), (True, norms(model, own, batch))):
        for slot, cfg in losses.items():
            name = STOCK if label is STOCK else cfg["type"]
            total, positive = amounts(found, slot, name)
            assert total * gains[slot] * images == pytest.approx(norm[slot].sum().item(), rel=1e-4)
            if assigned and slot == "cls":
                mask = assigned[0][3]
                expected = (norm[slot].sum(1) * mask).sum().item()
                assert positive * gains[slot] * images == pytest.approx(expected, rel=1e-4)
                assert positive < 0.999 * total


@pytest.mark.parametrize("name", ["yolov8n", "yolov8n-obb"])
def test_a_batch_without_objects_is_no_measure(name, batches):
    """Some criteria call no box criterion there."""
    task, box = ("obb", "KLDLoss") if name.endswith("obb") else ("detect", "CIoULoss")
    model, batch = detector(name), without_objects(batches[task])
    wanted = [candidate(box, task), candidate("VarifocalLoss", task)]
    criterion = ours(model, {})
    found = looking(criterion, model, wanted)
    criterion(model(batch["img"]), batch)
    assert all(amounts(found, "box", label) == [0, 0] for label in (STOCK, wanted[0].label))
    assert amounts(found, "cls", STOCK)[0] > 0
    assert [suggestion.weight for suggestion in found.suggestions(wanted)] == [None, None]


@since("8.4.37", "it counts no objects")
def test_a_candidate_counts_the_objects_that_a_training_with_it_counts(datasets, tmp_path, monkeypatch):
    """Without those of a class that is ignored."""
    ready = []

    def begins(model, criterion, candidates, *_):
        ready.extend(candidates)
        raise module.Finished

    monkeypatch.setattr(module, "Look", begins)
    wanted = [candidate({"type": "FocalLoss", "class_weight": "effective"})]
    settings = {**SETTINGS, "data": datasets["detect"], "epochs": 1}
    calibrate(wanted, "yolov8n.yaml", steps=1, looks=1, ignore={"classes": ["3", 7]}, **settings)
    counts = ready[0].cfg["class_counts"]
    assert [index for index, count in enumerate(counts) if not count] == [3, 7]


def test_looking_changes_nothing_and_states_see_every_batch(batches):
    """A candidate with a state has the one that it would have in a training, and no step sees it twice."""
    model, batch = detector("yolov8n"), batches["detect"]
    plain, watched, own = ours(model, {}), ours(model, {}), ours(model, {"box": {"type": "WIoULoss", "momentum": 0.5}})
    wanted = [candidate({"type": "WIoULoss", "momentum": 0.5}), candidate("VarifocalLoss")]
    found = looking(watched, model, wanted, at=(3,))
    for step in range(1, 4):
        values = [criterion(model(batch["img"]), batch)[0].sum() for criterion in (plain, watched, own)]
        assert torch.equal(*values[:2]), step
        assert bool(found.found) == (step == 3)
    _, looked = watched.curves.looks.each[0]
    assert torch.equal(looked.built["box"].mean, own.built["box"].mean)
    assert own.built["box"].mean != 1, "where it starts"
    assert criterion_state(watched) == {}


@pytest.mark.parametrize("name", known("yolo26n"))
def test_branches_count_with_their_weights(name, batches):
    """As they do in the sum that is trained with."""
    model, batch = detector(name), batches["detect"]
    criterion, wanted, weights = ours(model, {}), [candidate("VarifocalLoss")], {"one2many": 0.75, "one2one": 0.25}
    each, both = {name: Gradients() for name in weights}, Gradients()
    for weighs in (False, True):
        for name, weight in weights.items():
            branch, found = getattr(criterion, name), both if weighs else each[name]
            branch.curves = Look(model, branch, wanted, found, (1,), lambda w=weight if weighs else 1.0: w)
        criterion(model(batch["img"]), batch)
    many, one = (amounts(found, "cls", STOCK)[0] for found in each.values())
    assert many != pytest.approx(one, rel=0.01)
    assert amounts(both, "cls", STOCK)[0] == pytest.approx(0.75 * many + 0.25 * one, rel=1e-5)


def test_rtdetr_layer_by_layer(batches, monkeypatch):
    """Its stock losses have weight one, as ours that equal them, and half of one that is twice as large."""
    overlapping(monkeypatch)
    model, batch = detector("yolov8n-rtdetr"), batches["rtdetr"]
    twice = {"type": "JointLoss", "losses": [{"type": "GIoULoss", "loss_weight": 2.0}]}
    wanted = [candidate(cfg, "rtdetr") for cfg in STOCK_RTDETR.values()]
    wanted += [candidate(twice, "rtdetr", label="twice"), candidate({"type": "WIoULoss", "momentum": 0.5}, "rtdetr")]
    install(model, {})
    values = []
    for looks in (False, True):
        model.criterion = model.init_criterion()
        found = Gradients()
        if looks:
            look = RTDETRLook(model, model.criterion, wanted, found, (1,), lambda: 1)
        values.append(loss_and_gradients(model, batch))
    assert torch.equal(values[0][0], values[1][0])
    weights = [each.weight for each in found.suggestions(wanted)]
    assert weights[:4] == [pytest.approx(1.0, abs=0.005)] * 3 + [pytest.approx(0.5, abs=0.005)]
    shares = [each.positives for each in found.suggestions(wanted)]
    assert 0 < shares[0] < 1
    assert shares[1:] == [1.0] * 4
    assert look.looks.each[-1][1].built["loss_giou"].mean != 1


def test_what_fits_a_slot():
    """Every loss of a family that the slot takes, but those made of others and those for a head of their own."""
    labels = {slot: {each.label for each in fitting(slot)} for slot in ("cls", "box", "dfl")}
    assert labels["cls"] >= {"VarifocalLoss", "CrossEntropyLoss", "APLoss", "EQLV2Loss", "GHMC"}
    assert labels["box"] >= {"CIoULoss", "MPDIoULoss", "WIoULoss"}
    assert labels["dfl"] >= {"DistributionFocalLoss", "L1Loss"}
    assert not (labels["cls"] | labels["box"]) & {"JointLoss", "ScheduledLoss", "SeesawLoss", "KLDLoss"}
    assert {each.label for each in fitting("box", "obb")} >= {"KLDLoss", "ProbIoULoss"}
    with pytest.raises(ValueError, match="no slot 'loss_cls'; the slots are cls, box, dfl"):
        fitting("loss_cls")


def test_a_candidate_has_its_default_weight_and_is_measured_at_one():
    focal = candidate({"type": "FocalLoss", "gamma": 1.5, "loss_weight": 3.0})
    assert (focal.slot, focal.default) == ("cls", 16.0)
    assert focal.cfg == {"type": "FocalLoss", "gamma": 1.5, "loss_weight": 1.0}
    with pytest.raises(ValueError, match="a weight for each of its losses"):
        candidate({"type": "ScheduledLoss", "losses": [{"type": "FocalLoss"}]})
    with pytest.raises(ValueError, match=r"'cls' slot.*takes a classification"):
        candidate("L1Loss", slot="cls")


# loss_weight: auto


def test_the_places_that_wait_for_a_weight():
    schedule = {"type": "ScheduledLoss", "at": [1], "losses": [DFL, {**DFL, "loss_weight": "auto"}]}
    losses = load_losses({**AUTO, "dfl": schedule}, auto=True)
    assert waiting(losses) == [("cls",), ("dfl", 1)]
    assert waiting(with_weights(losses, {("cls",): 4.0})) == [("dfl", 1)]
    full = with_weights(losses, {("cls",): 4.0, ("dfl", 1): 2.0})
    assert full["cls"]["loss_weight"] == 4.0
    assert [part["loss_weight"] for part in full["dfl"]["losses"]] == [1.0, 2.0]
    assert losses["cls"]["loss_weight"] == "auto", "a copy"
    assert weights_of(losses, full) == {("cls",): 4.0, ("dfl", 1): 2.0}
    other = load_losses({"cls": {"type": "FocalLoss", "loss_weight": 9.0}})
    assert weights_of(losses, other) == {}


def test_losses_that_wait_are_described():
    cls, box, _ = describe(load_losses(AUTO, auto=True), get_cfg())
    assert cls.startswith("cls: VarifocalLoss(")
    assert cls.endswith("weight auto x gain 0.5")
    assert "weight 1 x" in box


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: load_losses(AUTO), '"auto" of VarifocalLoss has no meaning here'),
        (lambda: ours(detector("yolov8n"), AUTO), '"auto" of VarifocalLoss has no meaning here'),
        (
            lambda: make_trainer({"cls": {"type": "JointLoss", "losses": [AUTO["cls"]]}}),
            '"auto" of VarifocalLoss has no meaning here',
        ),
        (
            lambda: make_trainer({"cls": {"type": "ScheduledLoss", "losses": [AUTO["cls"]], "loss_weight": "auto"}}),
            '"auto" of ScheduledLoss has no meaning here.*each loss of a ScheduledLoss',
        ),
        (lambda: make_trainer(AUTO)(overrides={"device": "0,1"}), "for a training on one device"),
    ],
)
def test_where_auto_has_no_meaning(make, says):
    with pytest.raises(ValueError, match=says):
        make()


class Interrupted(Exception):
    """A training that died."""


def interrupt(_):
    raise Interrupted


@pytest.fixture
def quick(datasets, tmp_path, monkeypatch):
    """Training arguments of a run, and a calibration of a few steps."""
    monkeypatch.setattr(module, "STEPS", 16)
    faster = {"optimizer": "AdamW", "lr0": 0.002, "warmup_epochs": 0.0}
    return {**SETTINGS, **faster, "data": datasets["detect"], "project": str(tmp_path), "epochs": 2, "val": False}


def weights(trainer):
    return trainer.model.state_dict()


@pytest.mark.slow
def test_a_training_with_auto_is_one_with_the_weights_that_it_finds(quick, tmp_path):
    runs = {}
    asked = AUTO
    for name in ("auto", "written"):
        runs[name] = YOLO("yolov8n.yaml")
        runs[name].train(trainer=make_trainer(asked), name=name, **quick)
        asked = yaml.safe_load((tmp_path / name / "losses.yaml").read_text(encoding="utf-8"))
    weight = asked["cls"]["loss_weight"]
    assert weight != 16.0, "the default"
    assert trained_losses(tmp_path / "auto" / "weights" / "last.pt")["losses"] == asked
    assert runs["auto"].trainer.plugin_losses["cls"]["loss_weight"] == weight
    first, second = (weights(run.trainer) for run in runs.values())
    assert all(torch.equal(first[name], second[name]) for name in first)
    tuned = YOLO(tmp_path / "auto" / "weights" / "last.pt")  # whose model the trainer is handed
    tuned.train(trainer=make_trainer(AUTO), name="tuned", **{**quick, "epochs": 1, "pretrained": True})
    assert tuned.trainer.plugin_losses["cls"]["loss_weight"] not in (16.0, weight)


@pytest.mark.slow
def test_a_run_that_resumes_keeps_its_weights(quick, tmp_path, monkeypatch):
    yolo = YOLO("yolov8n.yaml")
    yolo.add_callback("on_model_save", interrupt)
    with pytest.raises(Interrupted):
        yolo.train(trainer=make_trainer(AUTO), name="run", **quick)
    last = tmp_path / "run" / "weights" / "last.pt"
    weight = trained_losses(last)["losses"]["cls"]["loss_weight"]
    monkeypatch.setattr(module, "auto_weights", interrupt)  # would be a second calibration
    with pytest.raises(ValueError, match="resumes with another loss for cls"):
        YOLO(last).train(resume=True, trainer=make_trainer({"cls": {"type": "FocalLoss", "loss_weight": "auto"}}))
    yolo = YOLO(last)
    yolo.train(resume=True, trainer=make_trainer(AUTO))
    assert yolo.trainer.plugin_losses["cls"]["loss_weight"] == weight
    assert trained_losses(last)["losses"]["cls"]["loss_weight"] == weight


# The command


def run(*words):
    done = CliRunner().invoke(main, ["calibrate", *map(str, words)], catch_exceptions=False)
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["SmoothL1Loss"], "regresses distances, but this model's head predicts a distribution"),
        (["KLDLoss"], "is a rotated loss, for task='obb'"),
        (["FocalLoss", "--slot", "bbox"], "no slot 'bbox'; the slots are cls, box, dfl"),
        (["FocalLoss", "--model", "none.yaml"], "none.yaml"),
        (["FocalLoss", "epoch=1"], "epoch"),
        (["FocalLoss", "device=0,1"], "by a training on one device"),
    ],
)
def test_mistakes_are_said_before_anything_is_trained(words, says, monkeypatch):
    monkeypatch.setattr("ultralytics.engine.model.Model.train", lambda *_, **settings: interrupt(settings))
    code, output = run(*words)
    assert code == 2
    assert says in output


def test_the_command(datasets, tmp_path):
    """Of names, a file and a slot; the table, lines to copy and the JSON say the same."""
    file = tmp_path / "mine.yaml"
    file.write_text("box: {type: JointLoss, losses: [{type: CIoULoss}, {type: CIoULoss}]}\n", encoding="utf-8")
    settings = [f"{name}={SETTINGS[name]}" for name in ("imgsz", "batch", "nbs", "device", "optimizer", "lr0")]
    words = ["VarifocalLoss", file, "--slot", "dfl", "--data", datasets["detect"], "--steps", 5, *settings]
    code, output = run(*words, "--json", tmp_path / "found.json")
    assert code == 0, output
    found = {
        each["label"]: each for each in json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["suggestions"]
    }
    assert list(found) == ["VarifocalLoss", "JointLoss of mine", "DistributionFocalLoss"]
    assert found["JointLoss of mine"]["weight"] == 0.5
    assert found["DistributionFocalLoss"]["weight"] == 1.0
    assert list(found["VarifocalLoss"]["ratios"]) == ["1", "2", "4", "5"]
    weight = found["VarifocalLoss"]["weight"]
    assert found["VarifocalLoss"]["range"][0] <= weight * 1.01
    assert f"cls: {{type: VarifocalLoss, loss_weight: {weight}}}" in output
    assert "stock loss of box" in output


def test_the_seeds_of_a_check_are_trainings_of_their_own(monkeypatch):
    """Each weight has the same seeds; the fake mAP50 of a training tells which it was."""
    trained = SimpleNamespace(epochs=3)

    def train(trainer, seed, epochs, **_):
        return {"metrics/mAP50(B)": 100 * seed + trainer["cls"]["loss_weight"], "metrics/mAP50-95(B)": epochs}

    monkeypatch.setattr(module, "open_model", lambda model: SimpleNamespace(model=None, train=train, trainer=trained))
    monkeypatch.setattr(module, "model_task", lambda model: "detect")
    monkeypatch.setattr(module, "make_trainer", lambda losses, task: losses)
    losses = {"cls": {"type": "VarifocalLoss", "loss_weight": 8.0}}
    suggestion = Suggestion("vfl", "cls", 16.0, losses, 8.0, {}, None, None)
    found = module.verify(suggestion, seeds=3, factors=(0.5, 1, 2), epochs=3)
    assert found.map50 == {0.5: [4, 104, 204], 1: [8, 108, 208], 2: [16, 116, 216]}
    assert (found.epochs, found.suggestion) == (3, suggestion)


@pytest.mark.slow
def test_verify(datasets, tmp_path):
    settings = [f"{name}={SETTINGS[name]}" for name in ("imgsz", "batch", "nbs", "device", "optimizer", "lr0")]
    words = ["--data", datasets["detect"], "--steps", 4, "--verify", "--epochs", 1, *settings]
    code, output = run("VarifocalLoss", *words, "--json", tmp_path / "found.json")
    assert code == 0, output
    (verified,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["verified"]
    assert list(verified["mAP50"]) == ["0.5", "1", "2", "4"]
    assert {len(values) for values in verified["mAP50"].values()} == {2}
    assert "the noise of seeds" in output


@pytest.mark.slow
def test_the_figures_of_the_prototype():
    """L1 ratios on the digits set with yolov8n after 25, 50 and 100 steps, which trainings by hand had found too."""
    from detloss_plugins.testing.digits import DIGITS_ARGS, build_digits

    expected = {
        "VarifocalLoss": 4.5, "QualityFocalLoss": 6.3, "FocalLoss": 17.2, "APLoss": 1.0, "PolyLoss": 0.7,
        "BoundedIoULoss": 0.47, "WIoULoss": 1.7, "IoULoss": 0.66, "NWDLoss": 1.3,
    }  # fmt: skip
    settings = {**DIGITS_ARGS, "data": str(build_digits() / "digits.yaml"), "pretrained": False}
    for found in calibrate([candidate(name) for name in expected], **settings):
        assert found.weight == pytest.approx(expected[found.label], rel=0.35), found


@pytest.mark.slow
def test_rtdetr_by_the_command_and_auto(quick, tmp_path):
    model = model_file("yolov8n-rtdetr", tmp_path)
    settings = [f"{name}={SETTINGS[name]}" for name in ("imgsz", "batch", "nbs", "device")]
    code, output = run("GIoULoss", "VarifocalLoss", "--model", model, "--data", quick["data"], "--steps", 2, *settings)
    assert code == 0, output
    assert "loss_giou: {type: GIoULoss, loss_weight: 1.0}" in output
    yolo = RTDETR(model)
    losses = {"loss_giou": {"type": "GIoULoss", "loss_weight": "auto"}}
    yolo.train(trainer=make_trainer(losses, "rtdetr"), name="rtdetr", **{**quick, "epochs": 1})
    assert yolo.trainer.plugin_losses["loss_giou"]["loss_weight"] == pytest.approx(1.0, abs=0.01)
