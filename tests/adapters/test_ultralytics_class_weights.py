"""Class weights and label smoothing in the ``cls`` slot of YOLO."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.ultralytics import (
    FOR_RTDETR,
    LOSSES,
    SETTINGS,
    Interrupted,
    branches,
    called,
    detector,
    interrupt,
    ours,
    since,
    task_of,
)
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils.torch_utils import ModelEMA

from detloss_plugins import build_loss
from detloss_plugins.adapters.ultralytics import install, make_trainer, trained_losses
from detloss_plugins.adapters.ultralytics.config import counted, load_losses, unlike
from detloss_plugins.adapters.ultralytics.slots import ClassSlot
from detloss_plugins.families import effective_weights

pytestmark = since("8.4.37", "it has no class weights to compare with")
WEIGHTS = [0.5, 2.0, 0.25, 1.0, 3.0, 0.25, 1.5, 1.0, 0.75, 4.0]


@pytest.mark.parametrize("way", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["yolov8n", "yolo26n", "yolov8n-obb"])
@pytest.mark.parametrize("loss", ["BinaryCrossEntropyLoss", "VarifocalLoss", "QualityFocalLoss"])
def test_they_weigh_as_cls_pw_does(loss, name, way, batches, monkeypatch, traced):
    if way == "compiled":
        monkeypatch.setenv("DETLOSS_ASYNC", "1")
    model, batch = detector(name), batches[task_of(name)]
    cfg, found = {"type": loss, "compile": way == "compiled"}, []
    for settings, weights in (({"class_weight": WEIGHTS}, None), ({}, torch.tensor(WEIGHTS)), ({}, None)):
        model.class_weights = weights
        criterion = ours(model, {"cls": {**cfg, **settings}})
        model.class_weights = None
        found.append(called(criterion, model, batch)[1])
    torch.testing.assert_close(found[0]["cls_loss"], found[1]["cls_loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[0]["box_loss"], found[1]["box_loss"])
    assert abs(found[0]["cls_loss"] / found[2]["cls_loss"] - 1) > 0.01


def test_both_multiply(batches):
    model, batch = detector("yolov8n"), batches["detect"]
    found = []
    for settings, weights in (({"class_weight": WEIGHTS}, torch.full((10,), 2.0)), ({"class_weight": WEIGHTS}, None)):
        model.class_weights = weights
        criterion = ours(model, {"cls": {"type": "QualityFocalLoss", **settings}})
        model.class_weights = None
        found.append(called(criterion, model, batch)[1]["cls_loss"])
    torch.testing.assert_close(found[0], 2 * found[1])


def test_smoothing_reaches_every_anchor(batches):
    """BCE of the smoothed target is that of the target plus ``s (t - 1/2) x``, over the sum of the scores."""
    model, batch = detector("yolov8n"), batches["detect"]
    criterion, seen = ours(model, {"cls": {"type": "BinaryCrossEntropyLoss", "label_smoothing": 0.1}}), []
    slot = criterion.bce
    criterion.bce = lambda *args: seen.append(args) or slot(*args)
    found = called(criterion, model, batch)[1]["cls_loss"]
    plain = called(ours(model, {"cls": {"type": "BinaryCrossEntropyLoss"}}), model, batch)[1]["cls_loss"]
    scores, target = seen[0]
    added = (0.1 * (target - 0.5) * scores).sum() / target.sum().clamp(min=1)
    torch.testing.assert_close(found, plain + model.args.cls * added.detach())


@pytest.mark.parametrize("name", ["yolov8n", "yolov8n-rtdetr"])
@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (
            {"type": "QualityFocalLoss", "class_weight": [1.0, 2.0]},
            "QualityFocalLoss has 2 class weights, and the model 10 classes",
        ),
        ({"type": "EqualizedFocalLoss", "num_classes": 3}, "with num_classes=3 takes no more logits than that, not 10"),
        ({"type": "FocalLoss", "alpha": [0.2, 0.3]}, "2 values were given for 10 classes"),
    ],
)
def test_another_number_of_classes_is_refused(name, cls, words):
    """When the losses are given to the model, before a batch is read; also of a loss that is not in turn yet."""
    slot, losses = ("loss_class", FOR_RTDETR) if name.endswith("rtdetr") else ("cls", LOSSES)
    for loss in (cls, {"type": "ScheduledLoss", "losses": [{"type": "FocalLoss"}, cls], "at": [1]}):
        with pytest.raises(ValueError, match=words):
            install(detector(name), {**losses, slot: loss})


def test_counts_are_no_difference_between_two_dicts():
    for kind in (list, tuple):
        parts = kind([{"type": "FocalLoss", "class_weight": "effective"}])
        losses = load_losses({"cls": {"type": "JointLoss", "losses": parts}})
        with_counts = counted(losses, [3] * 10)
        assert with_counts["cls"]["losses"][0]["class_counts"] == [3] * 10
        assert unlike(with_counts, losses) == ([], [])
    assert counted(load_losses(LOSSES), [3]) == load_losses(LOSSES)


def labels(data):
    """How many objects of each class the training labels have."""
    folder = check_det_dataset(data)["train"].replace("images", "labels")
    files = Path(folder).glob("*.txt")
    classes = [int(line.split()[0]) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [classes.count(index) for index in range(10)]


@pytest.mark.parametrize("name", ["yolov8n", *(pytest.param(x, marks=pytest.mark.slow) for x in ("yolo26n-obb",))])
def test_effective_weights_of_a_training_are_those_of_its_labels(name, datasets, tmp_path, caplog):
    """Without those of a class that is ignored."""
    data, seen = datasets[task_of(name)], []
    base = {"type": "QualityFocalLoss", "class_weight": "effective", "effective_beta": 0.9}
    losses = {"cls": {"type": "SlideLoss", "base": base}}
    losses["ignore"] = {"classes": [3]}
    trainer = make_trainer(losses, task_of(name))

    def look(trainer):
        criteria = branches(trainer.model.criterion) + branches(trainer.ema.ema.criterion)
        seen.extend(part.built["cls"].base.class_factors.tolist() for part in criteria)

    yolo = YOLO(f"{name}.yaml")
    yolo.add_callback("on_fit_epoch_end", look)
    yolo.add_callback("on_fit_epoch_end", interrupt)
    with pytest.raises(Interrupted):
        yolo.train(data=data, epochs=2, project=str(tmp_path), name="run", trainer=trainer, **SETTINGS)
    assert labels(data)[3] > 0
    counts = [0 if index == 3 else count for index, count in enumerate(labels(data))]
    expected = effective_weights(counts, 0.9)
    assert sum(expected) == pytest.approx(10)
    assert len(set(expected)) > 1
    assert len(seen) == (4 if "26" in name else 2)
    assert all(weights == pytest.approx(expected) for weights in seen)
    assert trained_losses(tmp_path / "run" / "weights" / "last.pt")["losses"]["cls"]["base"]["class_counts"] == counts
    caplog.clear()
    yolo = YOLO(str(tmp_path / "run" / "weights" / "last.pt"))
    yolo.train(resume=True, trainer=make_trainer(tmp_path / "run" / "losses.yaml", task_of(name)))
    assert "resumes with another" not in caplog.text


def test_effective_weights_reach_a_copy_that_was_made_before_them(batches):
    """As the model that validates is in Ultralytics before 8.4.140."""
    trainer = object.__new__(make_trainer({"cls": {"type": "FocalLoss", "class_weight": "effective"}}))
    trainer.model, trainer.args = copy.deepcopy(detector("yolov8n")), get_cfg()
    trainer.data = {"nc": 10, "names": {number: str(number) for number in range(10)}}
    dataset = SimpleNamespace(labels=[{"cls": torch.arange(10.0).repeat_interleave(torch.arange(10) + 1)}])
    trainer.train_loader = SimpleNamespace(dataset=dataset)
    trainer.set_model_attributes()
    trainer.ema = ModelEMA(trainer.model)
    trainer.set_class_weights()
    loss = trainer.model.loss(batches["detect"])[0]
    trainer.hand_state_to_ema()
    copied = trainer.ema.ema.train()
    torch.testing.assert_close(copied.loss(batches["detect"])[0], loss)
    assert trained_losses(copied)["losses"]["cls"]["class_counts"] == list(range(1, 11))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_through_loss_and_mean_are_added_up_in_float32(dtype):
    """Of a loss whose mean has a gradient too, where the criterion weights the classes."""
    torch.manual_seed(0)
    target = (torch.rand(2, 50, 4) < 0.1) * torch.rand(2, 50, 4)
    slot = ClassSlot(build_loss({"type": "AdaptiveThresholdFocalLoss"}), weighs=True)
    half = torch.randn(2, 50, 4).to(dtype).requires_grad_()
    whole = half.detach().float().requires_grad_()
    for scores in (half, whole):
        slot(scores, target).sum().backward()
    assert (half.grad == whole.grad.to(dtype)).float().mean() > 0.99
