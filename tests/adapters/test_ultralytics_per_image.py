"""The loss of each image and object: they add up, each is what its anchors cost, and looking changes nothing."""

import copy

import pytest
import torch
from support.ultralytics import (
    TASK_MODELS,
    branches,
    called,
    detector,
    head,
    known,
    ours,
    since,
    stock_criterion,
    task_of,
    third,
)

from detloss_plugins.adapters.ultralytics import criterion_state, per_image

LOSSES = {"cls": {"type": "GHMC", "momentum": 0.5}, "box": {"type": "WIoULoss"}}
ORIENTED = {**LOSSES, "box": {"type": "KLDLoss"}}
SLOTS = {"box": "box_loss", "cls": "cls_loss", "dfl": "dfl_loss"}


def made(name, kind):
    model = detector(name)
    if kind == "stock":
        return model, stock_criterion(model)
    losses = ORIENTED if task_of(name) == "obb" else LOSSES
    return model, ours(model, {**losses, "dfl": third(model)})


@pytest.mark.parametrize("kind", ["stock", "ours"])
@pytest.mark.parametrize("name", TASK_MODELS)
def test_images_add_up_to_the_batch(name, kind, batches):
    """To the items, or of an end-to-end head to what it trains with."""
    model, batch = detector(name), batches[task_of(name)]
    model, criterion = made(name, kind)
    preds = model(batch["img"])
    found = per_image(criterion, preds, batch)
    with torch.no_grad():
        loss, items = called(criterion, model, batch)
    third_name = "dfl_loss" if "dfl_loss" in items else "l1_loss"
    for slot, item in {**SLOTS, "dfl": third_name}.items():
        expected = items[item]
        if len(branches(criterion)) == 2:
            if not loss.dim():
                continue
            expected = loss[list(items).index(item)] / len(batch["img"])
        assert found.images[slot].shape == (len(batch["img"]),)
        assert found.objects[slot].shape == (len(batch["cls"]),)
        torch.testing.assert_close(found.images[slot].sum(), expected.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.images["loss"], sum(found.images[slot] for slot in SLOTS))
    # All boxes cost what their objects cost; classes cost something in the background too.
    image = batch["batch_idx"].long()
    for slot in ("box", "dfl"):
        of_images = torch.zeros(len(batch["img"])).index_add(0, image, found.objects[slot])
        torch.testing.assert_close(of_images, found.images[slot], rtol=1e-4, atol=1e-6)
    assert found.objects["cls"].sum() < found.images["cls"].sum()
    weights = sum(getattr(criterion, name, 1.0) for name in ("o2m", "o2o")) if len(branches(criterion)) == 2 else 1.0
    assert 0 < found.weight.sum() <= weights + 1e-4


def test_in_inference_mode(batches):
    """In which Ultralytics validates and calls the callbacks of that."""
    model, criterion = made("yolov8n", "ours")
    expected = per_image(criterion, model(batches["detect"]["img"]), batches["detect"])
    with torch.inference_mode():
        found = per_image(criterion, model(batches["detect"]["img"]), batches["detect"])
    torch.testing.assert_close(found.images, expected.images)


@pytest.mark.parametrize("kind", ["stock", "ours"])
@pytest.mark.parametrize("name", known("yolov8n", "yolov8n-obb"))
def test_an_object_costs_what_its_anchors_cost(name, kind, batches):
    """Each by itself: the box criterion called for its anchors alone, and the class losses of these."""
    batch = batches[task_of(name)]
    model, criterion = made(name, kind)
    preds, seen = model(batch["img"]), {}
    found = per_image(criterion, preds, batch)
    twin = copy.copy(criterion)
    assigner, box, bce = twin.assigner, twin.bbox_loss, twin.bce
    twin.assigner = lambda *inputs: seen.setdefault("assigned", assigner(*inputs))
    twin.bce = lambda *inputs: seen.setdefault("cls", (inputs, bce(*inputs)))[1]
    twin.bbox_loss = Noted(box, seen)
    with torch.no_grad():
        twin(preds, batch)
        _, _, scores, positive, index = seen["assigned"]
        # Of a GHM-C, which is normalised by what the batch holds, the elements are those of the whole.
        elements = seen["cls"][1]
        if not elements.dim():
            elements = type(bce)(bce.loss, weighs=True)(*seen["cls"][0])
        rows = batch["batch_idx"].long()
        for row in range(0, len(rows), 5):
            image, number = rows[row], (rows[:row] == rows[row]).sum()
            own = torch.zeros_like(positive)
            own[image] = positive[image] & (index[image] == number)
            expected = box(*seen["box"][:6], own, *seen["box"][7:]) if own.any() else (torch.zeros(()),) * 2
            for slot, value in zip(("box", "dfl"), expected, strict=True):
                value = value * getattr(model.args, slot)
                torch.testing.assert_close(found.objects[slot][row], value, rtol=1e-4, atol=1e-6)
            value = model.args.cls * elements[own].sum() / scores.sum().clamp(min=1)
            torch.testing.assert_close(found.objects["cls"][row], value, rtol=1e-4, atol=1e-6)


class Noted:
    """A box criterion whose inputs are noted."""

    def __init__(self, stock, seen):
        self.stock, self.seen = stock, seen

    def __call__(self, *inputs):
        if hasattr(self, "sizes"):  # before 8.4.0
            self.stock.sizes = self.sizes
        self.seen["box"] = inputs
        return self.stock(*inputs)


def test_nothing_moves_and_nothing_has_a_gradient(batches):
    model, batch = detector("yolov8n"), batches["detect"]
    _, criterion = made("yolov8n", "ours")
    called(criterion, model, batch)
    before = criterion_state(criterion)
    parts = [part for loss in criterion.built.values() for part in loss.modules()]
    found = criterion.per_image(model(batch["img"]), batch)
    for slot, buffers in criterion_state(criterion)["criterion"].items():
        for name, value in buffers.items():
            assert torch.equal(value, before["criterion"][slot][name])
    assert all(part.training for part in parts)
    assert not any(x.requires_grad for part in found[:2] for x in part.values())
    again = criterion.per_image(model(batch["img"]), batch)
    torch.testing.assert_close(again.images, found.images)
    called(criterion, model, batch)
    assert not torch.equal(criterion_state(criterion)["criterion"]["box"]["mean"], before["criterion"]["box"]["mean"])


def test_predictions_in_evaluation_mode_and_the_way_of_a_gpu(batches, monkeypatch):
    model, batch = copy.deepcopy(detector("yolov8n")), batches["detect"]
    _, criterion = made("yolov8n", "ours")
    model.eval()
    expected = per_image(criterion, model(batch["img"]), batch)
    monkeypatch.setenv("DETLOSS_ASYNC", "1")
    found = per_image(criterion, model(batch["img"]), batch)
    for a, b in zip(found, expected, strict=True):  # dicts and a tensor
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_image_without_objects_and_a_batch_without(batches):
    model, batch = detector("yolov8n"), batches["detect"]
    _, criterion = made("yolov8n", "ours")
    kept = batch["batch_idx"] != 1
    preds = model(batch["img"])
    fewer = {**batch, **{name: batch[name][kept] for name in ("batch_idx", "cls", "bboxes")}}
    found = per_image(criterion, preds, fewer)
    assert found.images["box"][1] == 0 < found.images["cls"][1]
    assert (found.objects["box"] > 0).float().mean() > 0.5
    none = {**batch, **{name: batch[name][:0] for name in ("batch_idx", "cls", "bboxes")}}
    found = per_image(criterion, preds, none)
    assert found.images["box"].sum() == 0 < found.images["cls"].sum()
    assert found.objects["loss"].shape == (0,)


def test_tiny_oriented_boxes_that_the_criterion_drops_cost_nothing(batches):
    """Those after them keep their places."""
    model, batch = detector("yolov8n-obb"), batches["obb"]
    criterion = stock_criterion(model)
    preds, expected = model(batch["img"]), None
    expected = per_image(criterion, preds, batch).objects["loss"]
    tiny = batch["bboxes"][:1].clone()
    tiny[:, 2:4] = 1e-3
    with_tiny = {
        **batch,
        "bboxes": torch.cat([tiny, batch["bboxes"]]),
        **{name: torch.cat([batch[name][:1], batch[name]]) for name in ("batch_idx", "cls")},
    }
    found = per_image(criterion, preds, with_tiny).objects["loss"]
    assert found[0] == 0
    torch.testing.assert_close(found[1:], expected)


@since("8.4.37", "it has no class weights")
def test_class_weights_count(batches, monkeypatch):
    model, batch = detector("yolov8n"), batches["detect"]
    monkeypatch.setattr(model, "class_weights", torch.arange(1.0, 11), raising=False)
    criterion = ours(model, {"cls": {"type": "FocalLoss"}})
    found = per_image(criterion, model(batch["img"]), batch)
    torch.testing.assert_close(found.images["cls"].sum(), called(criterion, model, batch)[1]["cls_loss"])


@pytest.mark.parametrize("name", known("yolo26n"))
def test_losses_that_are_no_plain_sum(name, batches):
    model, batch = detector(name), batches["detect"]
    assert head(model).reg_max == 1
    criterion = ours(model, {"cls": {"type": "APLoss"}, "dfl": {"type": "RMSELoss"}})
    found = per_image(criterion, model(batch["img"]), batch)
    with torch.no_grad():
        total = called(criterion, model, batch)[0] / len(batch["img"])
    for place, slot in enumerate(SLOTS):
        torch.testing.assert_close(found.images[slot].sum(), total[place], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="does not weigh them, such as GHMR"):
        per_image(ours(model, {"dfl": {"type": "GHMR"}}), model(batch["img"]), batch)
