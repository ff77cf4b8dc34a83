"""A loss that changes in the course of an Ultralytics training: what counts in which epoch, in every branch."""

import copy

import pytest
import torch
from support.ultralytics import (
    FOR_RTDETR,
    SETTINGS,
    Interrupted,
    called,
    detector,
    known,
    model_file,
    ours,
    since,
)
from ultralytics import RTDETR, YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from detloss_plugins.adapters.ultralytics import install, load_losses, make_trainer, trained_losses
from detloss_plugins.adapters.ultralytics.criterion import branches
from detloss_plugins.losses import set_progress

END_TO_END = known("yolo26n")
BCE, AP, GHM = {"type": "BinaryCrossEntropyLoss"}, {"type": "APLoss"}, {"type": "GHMC"}


def schedule(*losses, **settings):
    return {"type": "ScheduledLoss", "losses": list(losses), **settings}


def at_epoch(criterion, epoch):
    for branch in branches(criterion).values():
        set_progress(torch.nn.ModuleList(branch.built.values()), epoch=epoch)
    return criterion


@pytest.fixture
def data(datasets):
    return datasets["detect"]


def class_losses(model, batch, *losses):
    return [called(ours(model, {"cls": loss}), model, batch)[1]["cls_loss"] for loss in losses]


@pytest.mark.parametrize("name", known("yolov8n", "yolo26n"))
def test_each_loss_is_what_it_would_be_alone(name, batches):
    """With its own weight for the slot and normaliser, and of a ranking loss its way through the criterion."""
    model, batch = detector(name), batches["detect"]
    bce, ap, ghm = class_losses(model, batch, BCE, AP, GHM)
    criterion = ours(model, {"cls": schedule(BCE, AP, GHM, at=[1, 3], fade=2, loss_weight=3.0)})
    for epoch, expected in ((0, bce), (1, bce), (2, (bce + ap) / 2), (3, ap), (4, (ap + ghm) / 2), (5, ghm)):
        found = called(at_epoch(criterion, epoch), model, batch)[1]["cls_loss"]
        torch.testing.assert_close(found, 3 * expected, rtol=1e-5, atol=0)


@since("8.4.37", "it has no class weights")
def test_with_class_weights(batches, monkeypatch):
    model, batch = detector("yolov8n"), batches["detect"]
    monkeypatch.setattr(model, "class_weights", torch.arange(1.0, 11), raising=False)
    bce, ap = class_losses(model, batch, BCE, AP)
    criterion = at_epoch(ours(model, {"cls": schedule(BCE, AP, at=[1], fade=2)}), 2)
    torch.testing.assert_close(called(criterion, model, batch)[1]["cls_loss"], (bce + ap) / 2, rtol=1e-5, atol=0)


def test_in_the_slots_of_rtdetr(batches):
    """A loss that takes a quality gets one, and one that does not gets none, in whatever stage."""
    model, batch = copy.deepcopy(detector("yolov8n-rtdetr")), batches["rtdetr"]  # others get it without losses
    values = {}
    for name, losses in {
        "bce": {**FOR_RTDETR, "loss_class": BCE},
        "vfl": FOR_RTDETR,
        "both": {slot: schedule(BCE if slot == "loss_class" else cfg, cfg, at=[1]) for slot, cfg in FOR_RTDETR.items()},
    }.items():
        install(model, losses)
        model.criterion = model.init_criterion()
        for epoch in (0, 1):
            torch.manual_seed(0)
            values[name, epoch] = model.loss(batch)[0].detach() if at_epoch(model.criterion, epoch) else None
    torch.testing.assert_close(values["both", 0], values["bce", 0])
    torch.testing.assert_close(values["both", 1], values["vfl", 0])


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ({"cls": schedule(BCE, {"type": "CIoULoss"}, at=[1])}, "one family"),
        ({"cls": schedule(BCE, {"type": "FocalLoss", "activated": True}, at=[1])}, "for probabilities"),
        ({"box": schedule(BCE, AP, at=[1])}, "takes a box loss"),
    ],
)
def test_a_misfit_in_any_stage_is_refused(losses, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(losses)


def test_each_loss_has_the_weight_of_its_slot():
    losses = load_losses({"cls": schedule(BCE, AP, {"type": "FocalLoss", "loss_weight": 2.0}, at=[1, 2])})["cls"]
    assert [part["loss_weight"] for part in losses["losses"]] == [1, 20, 2]
    assert losses["loss_weight"] == 1


def stop_after_two(trainer):
    if trainer.epoch == 1:
        raise Interrupted


class Watch:
    """Notes in every epoch which loss of each branch counts in training and in validation, and at which iterations."""

    def __init__(self, yolo, slot="cls"):
        self.slot, self.train, self.val = slot, {}, {}
        yolo.add_callback("on_train_batch_end", self.batch)
        yolo.add_callback("on_fit_epoch_end", self.epoch)

    def running(self, criterion):
        return [branch.built[self.slot].running for branch in branches(criterion).values()]

    def batch(self, trainer):
        self.train[trainer.epoch] = self.running(trainer.model.criterion)

    def epoch(self, trainer):
        if trainer.ema.ema.criterion is not None:
            self.val.setdefault(trainer.epoch, self.running(trainer.ema.ema.criterion))


@pytest.mark.parametrize(
    "name", ["yolov8n", *(pytest.param(name, marks=pytest.mark.slow) for name in known("yolo26n"))]
)
def test_training_goes_through_the_schedule_and_resumes_in_it(name, data, tmp_path):
    trainer = make_trainer({"cls": schedule(BCE, AP, GHM, at=[1, 2]), "box": {"type": "WIoULoss"}})
    yolo = YOLO(f"{name}.yaml")
    before = Watch(yolo)
    yolo.add_callback("on_fit_epoch_end", stop_after_two)
    with pytest.raises(Interrupted):
        yolo.train(data=data, epochs=3, project=str(tmp_path), name="run", trainer=trainer, **SETTINGS)
    count = 2 if name == "yolo26n" else 1
    assert before.train == before.val == {0: [(0,)] * count, 1: [(1,)] * count}

    last = tmp_path / "run" / "weights" / "last.pt"
    state = trained_losses(last)["state"]
    assert len(state) == count
    assert all(slots["cls"]["progress"] == 1 for slots in state.values())
    yolo = YOLO(str(last))
    after = Watch(yolo)
    yolo.train(resume=True, trainer=trainer)
    assert after.train == {2: [(2,)] * count}
    assert after.val[2] == [(2,)] * count


def test_no_callback_is_added(data, tmp_path):
    """A worker of a multi-GPU launch is handed those of its launcher, and would count each iteration twice."""
    overrides = {**SETTINGS, "data": data, "model": "yolov8n.yaml", "project": str(tmp_path)}
    losses = {"cls": schedule(BCE, AP, at=[1], by_epoch=False)}
    kinds = DetectionTrainer, make_trainer(losses, curves=True)
    stock, ours = (
        {event: len(found) for event, found in kind(overrides=overrides).callbacks.items()} for kind in kinds
    )
    assert ours == stock


@pytest.mark.slow
def test_iterations_in_rtdetr_whose_criterion_calls_a_loss_several_times_a_step(datasets, tmp_path):
    """Two iterations an epoch: the second epoch begins with iteration 2."""
    losses = {"loss_class": schedule(BCE, {"type": "VarifocalLoss"}, at=[2], by_epoch=False)}
    yolo = RTDETR(model_file("yolov8n-rtdetr", tmp_path))
    seen = []
    yolo.add_callback(
        "on_train_batch_end", lambda trainer: seen.append(trainer.model.criterion.built["loss_class"].running)
    )
    settings = {**SETTINGS, "val": False}
    trainer = make_trainer(losses, "rtdetr")
    yolo.train(data=datasets["rtdetr"], epochs=2, project=str(tmp_path), name="run", trainer=trainer, **settings)
    assert seen == [(0,), (0,), (1,), (1,)]
