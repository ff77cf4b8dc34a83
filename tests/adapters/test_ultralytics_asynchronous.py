"""The criterion where kernels and waits are what it costs: the way for a GPU, taken on a CPU by DETLOSS_ASYNC=1."""

import pytest
import torch
from support.ultralytics import (
    TASK_MODELS,
    assert_same,
    branches,
    detector,
    known,
    ours,
    result,
    since,
    stock_criterion,
    task_of,
    third,
    value_and_gradients,
    wide,
)
from timing import kernels_and_waits, named_loops
from ultralytics.utils.tal import RotatedTaskAlignedAssigner, TaskAlignedAssigner

from detloss_plugins.adapters.ultralytics import assigner as before
from detloss_plugins.adapters.ultralytics import slots
from detloss_plugins.adapters.ultralytics.assigner import FastAssigner, assign, padded
from detloss_plugins.losses import CIoULoss
from detloss_plugins.registry import registered_losses

pytestmark = since("8.4.0", "its criteria have no method to take the place of")
CLASSES = 5
KINDS = ("plain", "equal predictions", "equal objects", "of a pixel", "empty", "scores of 0")


@pytest.fixture
def asynchronous(monkeypatch):
    monkeypatch.setenv("DETLOSS_ASYNC", "1")


def scene(seed, kind, images, objects, rotated, cells):
    """Inputs of an assigner: predictions near objects of random sizes, some of which are only padding."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=g)

    points = []
    for level, stride in enumerate((8, 16, 32)):
        sides = (max(side >> level, 1) for side in cells)
        y, x = torch.meshgrid(*(stride * (torch.arange(side) + 0.5) for side in sides), indexing="ij")
        points.append(torch.stack([x, y], -1).flatten(0, 1))
    points, width = torch.cat(points), 8 * cells[1]
    center = random(images, objects, 2) * width
    half = random(images, objects, 2) * (1 if kind == "of a pixel" else 0.3 * width)
    boxes = torch.cat([center - half, center + half], -1)
    boxes = boxes[:, :1].expand_as(boxes) if kind == "equal objects" else boxes
    valid = random(images, objects, 1) < (0 if kind == "empty" else 0.7)
    boxes = boxes * valid
    nearest = torch.randint(objects, (images, len(points), 1), generator=g).expand(-1, -1, 4)
    pred = boxes.gather(1, nearest)
    scores = random(images, len(points), CLASSES)
    if kind == "equal predictions":
        scores = torch.full_like(scores, 0.5)
    else:
        pred = pred + 0.2 * width * (random(*pred.shape) - 0.5)
    if kind == "scores of 0":
        scores = torch.zeros_like(scores)
    if rotated:
        pred, boxes = (
            torch.cat([(b[..., :2] + b[..., 2:]) / 2, (b[..., 2:] - b[..., :2]).abs(), random(*b.shape[:-1], 1)], -1)
            for b in (pred, boxes)
        )
        boxes = boxes * valid
    labels = torch.randint(CLASSES, (images, objects, 1), generator=g).float()
    return scores, pred, points, labels, boxes, valid


def stock_assigner(rotated, topk, topk2):
    kind = RotatedTaskAlignedAssigner if rotated else TaskAlignedAssigner
    return kind(topk=topk, num_classes=CLASSES, alpha=0.5, beta=6.0, stride=[8.0, 16.0, 32.0], topk2=topk2)


def check_picks(found, expected):
    """The same positives, objects, classes and boxes to the bit; scores by rounding."""
    label, box, scores, positive, index = expected
    assert torch.equal(found[3], positive)
    for name, ours_, stock in zip(
        ("labels", "boxes", "objects"), found[:2] + found[4:5], (label, box, index), strict=True
    ):
        assert torch.equal(ours_[positive], stock[positive].to(ours_.dtype)), name
    torch.testing.assert_close(found[2], scores, rtol=1e-4, atol=1e-6)
    return int(positive.sum())


@pytest.mark.parametrize("rotated", [False, True], ids=["aligned", "rotated"])
@pytest.mark.parametrize(("topk", "topk2"), [(10, None), (7, 1), (10, 3)])
def test_the_assigner_picks_what_the_stock_one_picks(topk, topk2, rotated):
    stock, positives = stock_assigner(rotated, topk, topk2), 0
    for seed in range(180):
        cells, objects = (8 + seed % 5, 9 + seed % 7), 120 if seed % 20 == 0 else 1 + seed % 9
        inputs = scene(seed, KINDS[seed % len(KINDS)], 1 + seed % 3, objects, rotated, cells)
        expected = stock(*(x.clone() for x in inputs))
        positives += check_picks(assign(stock, *inputs), expected)
    assert positives > 300, "the scenes have positives to pick"


@pytest.mark.slow
@pytest.mark.parametrize(("topk", "topk2"), [(10, None), (7, 1)])
def test_the_compiled_assigner_picks_the_same(topk, topk2):
    """Of aligned boxes. Where two overlaps of rotated ones differ by rounding alone, either may win; see below."""
    stock = stock_assigner(False, topk, topk2)
    for seed in range(100):
        inputs = scene(seed, KINDS[seed % len(KINDS)], 3, 6 + seed % 30, False, (8 + seed % 5, 9 + seed % 7))
        check_picks(FastAssigner(stock)(*inputs), stock(*(x.clone() for x in inputs)))


@pytest.mark.slow
def test_the_compiled_rotated_assigner_differs_by_rounding_alone():
    stock, differ, positives = stock_assigner(True, 10, None), 0, 0
    for seed in range(100):
        inputs = scene(seed, KINDS[seed % len(KINDS)], 3, 6 + seed % 30, True, (8 + seed % 5, 9 + seed % 7))
        found, expected = FastAssigner(stock)(*inputs), stock(*(x.clone() for x in inputs))
        positives += int(expected[3].sum())
        differ += int((found[3] != expected[3]).sum())
        torch.testing.assert_close(found[2], expected[2], rtol=0, atol=1e-3)
    assert differ <= positives / 1000
    assert positives > 300


def stock_equivalents(name):
    box = {"type": "ProbIoULoss", "floor": 0.01} if task_of(name) == "obb" else {"type": "CIoULoss"}
    return {"cls": {"type": "BinaryCrossEntropyLoss"}, "box": box, "dfl": third(detector(name))}


def compiled(losses):
    return {slot: {**cfg, "compile": True} for slot, cfg in losses.items()}


def assert_near(found, expected):
    for ours_, stock in zip(found, expected, strict=True):
        if stock is None:
            assert ours_ is None or not ours_.any()
            continue
        torch.testing.assert_close(ours_, stock, rtol=1e-5, atol=1e-5 * float(stock.abs().max()))


COMPILED = [pytest.param(name, "compiled", marks=pytest.mark.slow) for name in ("yolov8n", "yolo26n", "yolov8n-obb")]


@pytest.mark.parametrize(("name", "how"), [*((name, "eager") for name in TASK_MODELS), *COMPILED])
def test_stock_equivalent_losses_give_stock_values_and_gradients(
    name, how, batches, asynchronous, monkeypatch, recwarn
):
    """Of oriented boxes, whose stock loss is in stride units, it is our own criterion on a CPU that is stock."""
    model, batch = detector(name), wide(batches[task_of(name)])
    losses = stock_equivalents(name)
    criterion = ours(model, losses if how == "eager" else compiled(losses))
    preds = model(batch["img"])
    found = value_and_gradients(criterion, preds, batch)
    monkeypatch.setenv("DETLOSS_ASYNC", "0")
    stock = ours(model, losses) if task_of(name) == "obb" else stock_criterion(model)
    assert_near(found, value_and_gradients(stock, preds, batch))
    assert not [w for w in recwarn if "uncompiled" in str(w.message)]


@pytest.mark.parametrize("name", [name for name in TASK_MODELS if task_of(name) != "obb"])
def test_absent_slots_are_stock_bit_for_bit(name, batches, asynchronous):
    model, batch = detector(name), batches[task_of(name)]
    stock = result(model, stock_criterion(model), batch)
    assert_same(result(model, ours(model, {}), batch), stock, rtol=0, atol=0)


@pytest.mark.parametrize("name", known("yolo26n-seg", "yolov8n-pose"))
def test_what_a_task_does_to_its_targets_does_not_reach_the_backward(name, batches, asynchronous, traced):
    """The keypoint loss divides the boxes in place, which a kernel has saved."""
    model, batch = detector(name), batches[task_of(name)]
    preds = model(batch["img"])
    expected = value_and_gradients(stock_criterion(model), preds, batch)
    assert_near(value_and_gradients(ours(model, compiled(stock_equivalents(name))), preds, batch), expected)


@pytest.mark.parametrize("objects", [0, 1])
def test_batches_of_no_and_of_one_object(objects, batches, asynchronous, monkeypatch):
    monkeypatch.setattr(before, "compiled", lambda function, name, key: function)
    model, batch = detector("yolov8n"), dict(batches["detect"])
    for name in ("batch_idx", "cls", "bboxes"):
        batch[name] = batch[name][:objects]
    preds = model(batch["img"])
    expected = value_and_gradients(stock_criterion(model), preds, batch)
    criterion = ours(model, stock_equivalents("yolov8n"))
    criterion.targets = before.FastTargets(criterion.assigner, criterion.reg_max)
    assert_near(value_and_gradients(criterion, preds, batch), expected)


def in_slot(cls):
    return {"type": cls.__name__, **cls.facts.example, "loss_weight": 1.0}


def in_family(*families):
    return [cls for cls in registered_losses().values() if cls.facts.family in families]


@pytest.mark.parametrize("cls", in_family("box"), ids=lambda cls: cls.__name__)
def test_all_anchors_give_what_the_positive_ones_give(cls, batches, asynchronous, monkeypatch):
    """With weights of 0, no box loss sees the other anchors: value, gradient, and the state of those that have one."""
    monkeypatch.setattr(before, "compiled", lambda function, name, key: function)
    model, batch = detector("yolov8n"), batches["detect"]
    preds, found, state = model(batch["img"]), [], []
    for everywhere in (False, True):
        takes = lambda self, _, everywhere=everywhere: everywhere and self.box.facts.row_wise  # noqa: E731
        monkeypatch.setattr(slots.BoxCriterion, "takes_all_anchors", takes)
        criterion = ours(model, {"box": in_slot(cls), "dfl": {"type": "DistributionFocalLoss"}})
        criterion.targets = before.FastTargets(criterion.assigner, criterion.reg_max) if everywhere else None
        found.append(value_and_gradients(criterion, preds, batch))
        state.append(list(criterion.built["box"].state_dict().values()))
    assert_near(found[1], found[0])
    torch.testing.assert_close(state[1], state[0])


class Doubled(CIoULoss, row_wise=True):
    """A loss of somebody's own, with a way of its own to sum up."""

    def forward(self, *args, **settings):
        return 2 * super().forward(*args, **settings)


def test_a_loss_with_a_forward_of_its_own(batches, asynchronous, traced):
    model, found = detector("yolov8n"), []
    preds = model(batches["detect"]["img"])
    for cls in (Doubled, CIoULoss):
        criterion = ours(model, {**stock_equivalents("yolov8n"), "box": {"type": cls, "compile": True}})
        found.append(criterion(preds, batches["detect"])[0].detach())
    torch.testing.assert_close(found[0][0], 2 * found[1][0])


@pytest.mark.slow
@pytest.mark.parametrize("cls", ["WIoULoss", "JointLoss", "RankSortLoss"])
def test_losses_of_the_batch_work_compiled(cls, batches, asynchronous):
    """Losses with a state, of several parts and with shapes of the data go on working where waits count."""
    model, batch = detector("yolov8n"), batches["detect"]
    joint = {"type": "JointLoss", "losses": [{"type": "GIoULoss"}, {"type": "NWDLoss"}]}
    slots = {"WIoULoss": {"box": {"type": "WIoULoss", "version": 3}}, "JointLoss": {"box": joint}}
    losses = {**stock_equivalents("yolov8n"), **slots.get(cls, {"cls": {"type": "RankSortLoss"}})}
    preds, found = model(batch["img"]), []
    for cfg in (losses, compiled(losses)):
        found.append(value_and_gradients(ours(model, cfg), preds, batch))
    assert_near(found[1], found[0])


@pytest.mark.slow
def test_kernels_and_waits(batches, asynchronous):
    """The bars: of the stock criterion's kernels, at most 0.28 and 1 wait compiled, at most 0.8 and 3 waits eager."""
    named_loops()
    model, batch = detector("yolov8n"), batches["detect"]
    preds, losses = model(batch["img"]), stock_equivalents("yolov8n")
    ways = {"stock": stock_criterion(model), "eager": ours(model, losses), "compiled": ours(model, compiled(losses))}
    counts = {}
    for way, criterion in ways.items():
        value_and_gradients(criterion, preds, batch)
        counts[way] = kernels_and_waits(lambda c=criterion: value_and_gradients(c, preds, batch), torch.device("cpu"))
    kernels = {way: count / counts["stock"][0] for way, (count, _) in counts.items()}
    assert counts["stock"][1] >= 7
    assert kernels["eager"] <= 0.8
    assert counts["eager"][1] <= 3
    assert kernels["compiled"] <= 0.28
    assert counts["compiled"][1] == 1


@pytest.mark.slow
def test_image_sizes_do_not_compile_again(batches, asynchronous):
    model, batch = detector("yolov8n"), batches["detect"]
    criterion = ours(model, compiled(stock_equivalents("yolov8n")))
    torch._dynamo.utils.counters.clear()
    graphs = []
    for height, width in ((64, 96), (96, 64), (128, 96), (160, 160)):
        preds = model(torch.rand(len(batch["img"]), 3, height, width))
        value_and_gradients(criterion, preds, batch)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1], graphs


def test_branches_share_the_objects_of_a_batch(batches, asynchronous, monkeypatch):
    model, batch = detector("yolo26n"), batches["detect"]
    criterion = ours(model, stock_equivalents("yolo26n"))
    first, second = branches(criterion)
    assert first.scene is second.scene
    counted = []
    stock = torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda *args: counted.append(0) or stock(*args))
    value_and_gradients(criterion, model(batch["img"]), batch)
    assert len(counted) == 1


def test_objects_with_the_same_boxes_and_other_classes(batches, asynchronous):
    model, batch = detector("yolov8n"), batches["detect"]
    criterion, stock = ours(model, stock_equivalents("yolov8n")), stock_criterion(model)
    for classes in (batch["cls"], (batch["cls"] + 1) % CLASSES):
        other, preds = {**batch, "cls": classes}, model(batch["img"])
        assert_near([criterion(preds, other)[0]], [stock(preds, other)[0]])


def test_a_training_after_a_validation_in_inference_mode(batches, asynchronous):
    model, batch = detector("yolov8n"), batches["detect"]
    criterion = ours(model, stock_equivalents("yolov8n"))
    with torch.inference_mode():
        criterion(model(batch["img"]), batch)
    value_and_gradients(criterion, model(batch["img"]), batch)


def test_padded_objects_are_the_stock_criterions(batches):
    """Classes and corners to the bit, for every size of batch."""
    model, batch = detector("yolov8n"), batches["detect"]
    stock = stock_criterion(model)
    criterion = ours(model, {})
    preds = model(batch["img"])
    criterion.scene.resize(preds["feats"], criterion.stride)
    targets = torch.cat([batch["batch_idx"].view(-1, 1), batch["cls"].view(-1, 1), batch["bboxes"]], 1)
    images = len(batch["img"])
    expected = stock.preprocess(targets, images, torch.tensor([64.0, 64, 64, 64]))
    label, corners, valid = padded(*criterion.scene.objects(batch, images))
    assert torch.equal(torch.cat([label, corners], -1), expected)
    assert torch.equal(valid, expected[..., 1:].sum(-1, keepdim=True) > 0)


def test_a_cpu_keeps_the_stock_way(batches):
    """Where nothing waits, indexing is faster."""
    model = detector("yolov8n")
    criterion = ours(model, compiled(stock_equivalents("yolov8n")))
    assert criterion.targets is None
    assert isinstance(criterion.assigner, TaskAlignedAssigner)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_batch_without_objects_is_left_to_the_stock_assigner(rotated):
    """Which criteria of other tasks and those that are observed call with no column for them."""
    stock = stock_assigner(rotated, 10, 10)
    scores, pred, points, *objects = scene(0, "plain", 2, 3, rotated, (8, 8))
    inputs = scores, pred, points, *(x[:, :0] for x in objects)
    for found, expected in zip(FastAssigner(stock)(*inputs), stock(*inputs), strict=True):
        assert torch.equal(found, expected)


def test_out_of_memory_goes_image_by_image(batches, asynchronous, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError

    model, batch, found = detector("yolov8n"), batches["detect"], []
    preds = model(batch["img"])
    for fast in (lambda function, name, key: function, lambda function, name, key: full):
        monkeypatch.setattr(before, "compiled", fast)
        criterion = ours(model, stock_equivalents("yolov8n"))
        criterion.targets = before.FastTargets(criterion.assigner, criterion.reg_max)
        found.append(value_and_gradients(criterion, preds, batch))
    assert_near(found[1], found[0])
    inputs = scene(0, "plain", 2, 5, False, (8, 9))
    stock = stock_assigner(False, 10, None)
    check_picks(FastAssigner(stock)(*inputs), stock(*(x.clone() for x in inputs)))


def test_without_a_compiler_the_assigner_says_so_and_works(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("backend='inductor' raised:\nno compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    monkeypatch.setattr(before, "_compiled", {})
    monkeypatch.setattr(before, "_failed", set())
    stock = stock_assigner(False, 10, None)
    inputs = scene(0, "plain", 2, 5, False, (8, 9))
    with pytest.warns(UserWarning, match="The assigner runs uncompiled: .*no compiler"):
        found = FastAssigner(stock)(*inputs)
    check_picks(found, stock(*(x.clone() for x in inputs)))
