"""The ``box`` slot of the Ultralytics adapter: boxes in pixels, the batch's size, and every loss in real steps."""

import copy
from pathlib import Path

import pytest
import table
import torch
from support.commands import train
from support.ultralytics import branches, detector, head, in_slot, named, ours, task_of

from detloss_plugins import build_loss
from detloss_plugins import loss as core
from detloss_plugins.adapters.ultralytics import SLOTS, describe, load_losses
from detloss_plugins.losses import BoundedIoULoss, GWDLoss, InnerIoULoss, NWDLoss, WIoULoss
from detloss_plugins.registry import registered_losses
from detloss_plugins.testing.check import NoWaiting

NAMES = ("yolov8n", "yolo26n", "yolov8n-obb", "yolo26n-obb")


def any_loss(name, **settings):
    return {"type": "GWDLoss" if task_of(name) == "obb" else "CIoULoss", **settings}


def first_branch(model, losses):
    """The criterion of a head, or of the first branch of an end-to-end head."""
    return branches(ours(model, losses))[0]


def predictions(model, images):
    found = model(images)
    return found.get("one2many", found)


def box_loss(criterion, model, found, batch):
    """The item of the box loss."""
    return named(criterion(found, batch)[1], model)["box_loss"]


def assigned(criterion, model, found, batch):
    """Loss items, and the positives as the stock assigner has them: boxes and targets in pixels, weights."""
    seen, assigner = {}, criterion.assigner

    def look(scores, boxes, *rest):
        out = assigner(scores, boxes, *rest)
        _, target, weights, mask, _ = out
        seen.update(pred=boxes[mask], target=target[mask].clone(), weight=weights[mask].sum(-1), scores=weights)
        return out

    criterion.assigner = look
    items = named(criterion.loss(found, batch)[1], model)
    criterion.assigner = assigner
    return items, seen


class Recorder(torch.nn.Module):
    """In place of a box loss: keeps what it is given."""

    batch_image_size = None

    def forward(self, pred, target, weight, **_):
        self.given = pred, target, weight
        return (pred * 0).sum()


@pytest.mark.parametrize("name", NAMES)
def test_boxes_in_the_slot_are_in_pixels(name, batches):
    model, batch = detector(name), batches[task_of(name)]
    criterion = first_branch(model, {"box": any_loss(name)})
    criterion.bbox_loss.box = Recorder()
    _, seen = assigned(criterion, model, predictions(model, batch["img"]), batch)
    pred, target, weight = criterion.bbox_loss.box.given
    assert len(target) > 20
    assert target[:, 2].max() > 20, "a digit of this batch is wider than 20 pixels"
    torch.testing.assert_close(pred, seen["pred"])
    torch.testing.assert_close(target, seen["target"])
    torch.testing.assert_close(weight, seen["weight"])
    if task_of(name) == "obb":
        assert torch.equal(target[:, 4], seen["target"][:, 4]), "an angle has no unit to change"
        assert target[:, 4].abs().max() < 4


@pytest.mark.parametrize("cfg", [{"type": "NWDLoss"}, {"type": "BoundedIoULoss", "eps": 1.0}, {"type": "MPDIoULoss"}])
def test_constants_are_pixels(cfg, batches):
    """The slot's value is that of the loss on boxes in pixels, and on stride units it would be another."""
    model, batch = detector("yolov8n"), batches["detect"]
    cfg = {"loss_weight": 1.0, **cfg}
    criterion = first_branch(model, {"box": cfg})
    items, seen = assigned(criterion, model, predictions(model, batch["img"]), batch)
    size = {"image_size": (64, 64)} if cfg["type"] == "MPDIoULoss" else {}
    loss = build_loss({**cfg, **size, "reduction": "sum"})
    normalizer = seen["scores"].sum().clamp(min=1) / model.args.box
    expected, units = (loss(seen["pred"] / s, seen["target"] / s, seen["weight"]) / normalizer for s in (1, 8))
    torch.testing.assert_close(items["box_loss"], expected, rtol=1e-5, atol=0)
    assert abs(units / expected - 1) > 0.01


MPDIOU = {"type": "MPDIoULoss"}


def nested(inner):
    return [
        inner,
        {"type": "InnerIoULoss", "base": inner},
        {"type": "FocalerIoULoss", "base": inner},
        {"type": "JointLoss", "losses": [inner, {"type": "GIoULoss"}]},
    ]


@pytest.mark.parametrize("depth", range(4))
@pytest.mark.parametrize("name", ["yolov8n", "yolo26n"])
def test_image_size_comes_from_the_batch(name, depth, batches):
    """Whatever its shape, and however deep the loss is nested; batches of two shapes one after the other."""
    model, batch = detector(name), batches["detect"]
    from_batch = ours(model, {"box": nested(MPDIOU)[depth]})
    for size in ((64, 96), (96, 64)):
        found = model(torch.nn.functional.interpolate(batch["img"], size))
        values = [box_loss(from_batch, model, found, batch)]
        for given in (size, size[::-1], (32, 32)):
            cfg = nested({**MPDIOU, "image_size": given})[depth]
            values.append(box_loss(ours(model, {"box": cfg}), model, found, batch))
        torch.testing.assert_close(values[0], values[1])
        torch.testing.assert_close(
            values[0], values[2]
        )  # the loss has the diagonal only; the order is tested elsewhere
        assert abs(values[3] / values[0] - 1) > 0.01


def test_the_size_is_height_and_width_and_of_this_batch(batches):
    model, batch = detector("yolov8n"), batches["detect"]
    criterion = ours(model, {"box": nested(MPDIOU)[1]})
    for size in ((64, 96), (96, 64)):
        criterion(model(torch.nn.functional.interpolate(batch["img"], size)), batch)
        assert criterion.built["box"].base.batch_image_size.tolist() == list(size)


@pytest.mark.parametrize("depth", range(4))
def test_a_size_left_out_is_recorded_and_said(depth):
    cfg = nested(MPDIOU)[depth]
    losses = load_losses({"box": cfg})
    assert cfg == nested(MPDIOU)[depth], "the caller's dict is untouched"
    assert losses == load_losses({"box": nested({**MPDIOU, "image_size": "batch"})[depth]}) == load_losses(losses)
    assert "image_size='batch'" in describe(losses, detector("yolov8n").args)[1]


COMBINED = [row for row in table.combinations() if row["slot"] != "cls"]


@pytest.mark.parametrize("row", COMBINED, ids=[row["name"] for row in COMBINED])
def test_a_combination_in_the_slot(row, batches):
    """Every row of docs/combinations.md; a loss with parts gives the sum of what they give alone."""
    name = "yolov8n-obb" if row["slot"] == "box of OBB" else "yolov8n"
    model, batch = detector(name), batches[task_of(name)]
    found = model(batch["img"])
    losses = [row["loss"], *row["loss"].get("losses", ())]
    values = [box_loss(first_branch(model, {"box": loss}), model, found, batch) for loss in losses]
    assert values[0] > 0
    if len(values) > 1:
        torch.testing.assert_close(values[0], sum(values[1:]))


def test_distillation_of_two_heads(batches):
    """The boxes of a student and a teacher, as the docstring of the loss has it."""
    student, teacher, batch = detector("yolov8n"), copy.deepcopy(detector("yolov8n")), batches["detect"]
    bins = head(student).reg_max
    for parameter in teacher.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = student(batch["img"]), teacher(batch["img"])
    if "boxes" not in ours:
        pytest.skip("this version of Ultralytics has no boxes before they are decoded")
    matched = torch.rand(len(batch["img"]), ours["boxes"].shape[-1]) < 0.1
    rows = lambda boxes: boxes.unflatten(1, (4, bins)).permute(0, 3, 1, 2)  # noqa: E731
    weight = torch.where(matched, torch.rand(matched.shape), theirs["scores"].sigmoid().amax(1))
    loss = build_loss({"type": "DistributionDistillationLoss"})
    value = loss(rows(ours["boxes"]), rows(theirs["boxes"]), weight, matched=matched)
    value.backward()
    assert value > 0
    assert any(parameter.grad.abs().sum() > 0 for parameter in head(student).cv2.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    same = rows(theirs["boxes"])
    assert loss(same, same, weight, matched=matched).item() == pytest.approx(0, abs=1e-5)


def test_a_size_that_is_given_stays():
    assert load_losses({"box": {**MPDIOU, "image_size": (64, 96)}})["box"]["image_size"] == (64, 96)
    assert "image_size" not in load_losses({"box": {"type": "CIoULoss"}})["box"]


@pytest.mark.parametrize("name", NAMES)
def test_no_synchronisation_in_the_slots(name, batches):
    model, batch = detector(name), batches[task_of(name)]
    box = any_loss(name) if task_of(name) == "obb" else nested(MPDIOU)[3]
    dfl = {"type": "DistributionFocalLoss" if head(model).reg_max > 1 else "L1Loss"}
    criterion = first_branch(model, {"box": box, "dfl": dfl})
    slots, calls = criterion.bbox_loss, []
    for part in slots.modules():
        part.unchecked = 0  # box losses look at the targets of the first calls

    def watched(*inputs):
        calls.append(inputs)
        with NoWaiting("nonzero"):  # the stock box criterion, too, asks where the positives are
            return slots(*inputs)

    criterion.bbox_loss = watched
    criterion.loss(predictions(model, batch["img"]), batch)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["yolov8n", "yolov8n-obb"])
def test_half_precision_boxes_become_pixels_in_float32(name):
    """Under autocast boxes, strides and image size are in half precision, which ends at 65504."""
    angle = [0.7] * (task_of(name) == "obb")
    boxes = torch.tensor([[[4096.0, 1, 4100, 9, *angle]]], dtype=torch.float16)
    criterion = type(first_branch(detector(name), {"box": any_loss(name)}).bbox_loss)(1, Recorder(), Recorder())
    one, stride, size = torch.ones(1, 1, 1), torch.tensor([[32.0]]).half(), torch.tensor([640.0, 320.0]).half()
    criterion(one.expand(1, 1, 4), boxes, one[0].expand(1, 2), boxes, one, one.sum(), one[0] > 0, size, stride)
    for given in criterion.box.given[:2]:
        assert given.dtype == torch.float32
        assert given[0, :4].tolist() == [131072, 32, 131200, 288]
    assert criterion.box.batch_image_size.dtype == torch.float32, "and the square of the size beyond 255"


@pytest.fixture(scope="module")
def found(batches):
    """What each head predicts for the batch."""
    return {name: detector(name)(batches[task_of(name)]["img"]) for name in NAMES}


# Every loss in one head; in two branches those with a number a coordinate, with a state, in pixels, over another.
CASES = [
    pytest.param(name, cls, id=f"{name}-{cls.__name__}")
    for name in NAMES
    for cls in registered_losses().values()
    if cls.facts.family in SLOTS[task_of(name)]["box"]
    and (name.startswith("yolov8n") or cls in (BoundedIoULoss, WIoULoss, NWDLoss, InnerIoULoss, GWDLoss))
]


@pytest.mark.parametrize(("name", "cls"), CASES)
def test_every_box_loss_has_a_gradient(name, cls, found, batches):
    """Twice, as some have a state."""
    model, batch = detector(name), batches[task_of(name)]
    criterion, twice = (ours(model, {"box": {**in_slot(cls), "loss_weight": w}}) for w in (1.0, 2.0))
    for _ in range(2):
        loss, items = criterion(found[name], batch)
        items = named(items, model)
        assert all(value.isfinite() for value in items.values())
        assert items["box_loss"] > 0
        torch.testing.assert_close(box_loss(twice, model, found[name], batch), 2 * items["box_loss"])
        for branch in filter(None, (getattr(head(model), name, None) for name in ("cv2", "one2one_cv2"))):
            last = [level[-1].weight for level in branch]
            slopes = torch.autograd.grad(loss[0], last, retain_graph=True, allow_unused=True)
            slopes = [slope for slope in slopes if slope is not None]
            assert all(slope.isfinite().all() for slope in slopes)
            assert sum(slope.abs().sum() for slope in slopes) > 0


@pytest.mark.parametrize("name", ["yolov8n", "yolo26n"])
def test_state_of_a_box_loss_is_averaged_over_ranks_in_training_only(name, batches, monkeypatch):
    """Once a step for every branch, whether or not there are positives; a rank alone in validation must not wait."""
    model, batch = detector(name), batches["detect"]
    criterion = ours(model, {"cls": {"type": "GHMC", "momentum": 0.5}, "box": {"type": "WIoULoss"}})
    empty = {**batch, **{key: batch[key][:0] for key in ("batch_idx", "cls", "bboxes")}}
    found = model(batch["img"])
    seen = []
    monkeypatch.setattr(core, "rank_mean", lambda tensor: seen.append(tensor) or tensor)
    for given in (batch, empty):
        seen.clear()
        criterion(found, given)
        assert [id(tensor) for tensor in seen] == [id(b.built["box"].mean) for b in branches(criterion)]
    seen.clear()
    before = [b.built["box"].mean.clone() for b in branches(criterion)]
    with torch.no_grad():
        criterion(found, batch)
    assert not seen
    assert before == [b.built["box"].mean for b in branches(criterion)]
    assert all(mean != 1 for mean in before), "it did move in training"


@pytest.mark.slow
def test_the_command_trains_oriented_boxes(tmp_path):
    config = Path(__file__).parents[2] / "configs" / "ultralytics" / "obb.yaml"
    short = ["model=yolov8n-obb.yaml", "epochs=1", "fraction=0.04", "imgsz=64", "val=False"]
    _, printed = train(tmp_path / "run", str(config), *short)
    assert "box: KLDLoss" in printed
