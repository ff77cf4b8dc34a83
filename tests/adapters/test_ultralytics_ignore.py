"""Ignore regions in YOLO: what is trained, what is validated, and what is refused."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.ultralytics import (
    LOAD_WITHOUT_US,
    LOSSES,
    SETTINGS,
    TASK_MODELS,
    Interrupted,
    branches,
    detector,
    head,
    in_slot,
    interrupt,
    known,
    ours,
    since,
    stock_criterion,
    task_of,
    third,
    value_and_gradients,
    without_objects,
)
from ultralytics import YOLO
from ultralytics.models.yolo.world import WorldTrainer
from ultralytics.utils import ops

from detloss_plugins.adapters.ultralytics import (
    SLOTS,
    describe,
    load_losses,
    make_trainer,
    make_validator,
    trained_losses,
)
from detloss_plugins.adapters.ultralytics.config import unlike
from detloss_plugins.adapters.ultralytics.ignore import share_inside
from detloss_plugins.registry import registered_losses

pytestmark = since("8.3.200", "ignoring classes is refused there")
OF_DICTS = since("8.4.0", "a head predicts no dict")
NAMES = ["7", 0, "4"]  # of the digits set, one by its index
IGNORED = [0, 4, 7]
IGNORE = {"ignore": {"classes": NAMES}}


def is_region(batch):
    return torch.isin(batch["cls"].view(-1).long(), torch.tensor(IGNORED))


def in_regions(batch, points, image):
    """A mask of the points in the image's regions: on one side of all edges of one of these."""
    inside = torch.zeros(len(points), dtype=torch.bool)
    for box in batch["bboxes"][is_region(batch) & (batch["batch_idx"] == image)]:
        box = torch.cat([box[:4] * 64, box[4:]])
        if len(box) == 5 and box[2:4].min() < 2:  # not an object to the stock criterion
            continue
        angle = box[4:] if len(box) == 5 else torch.zeros(1)
        corners = ops.xywhr2xyxyxyxy(torch.cat([box[:4], angle])[None])[0]
        edges, gap = corners.roll(-1, 0) - corners, points.unsqueeze(1) - corners
        side = edges[:, 0] * gap[..., 1] - edges[:, 1] * gap[..., 0]
        inside |= (side > 0).all(1) | (side < 0).all(1)
    return inside


def written_out(model, batch):
    """The stock criterion on the objects alone, without its losses of elements in the regions; and these elements."""
    criterion, found = stock_criterion(model), []
    for branch in branches(criterion):
        seen, assigner = {}, branch.assigner

        def assign(*args, seen=seen, assigner=assigner, **extra):
            seen.update(points=args[2], found=assigner(*args, **extra))
            return seen["found"]

        def bce(pred, target, seen=seen):
            images = range(len(pred))
            left = torch.stack([in_regions(batch, seen["points"], image) for image in images]) & ~seen["found"][3]
            left = left.unsqueeze(-1) | torch.isin(torch.arange(10), torch.tensor(IGNORED))
            found.append(left)
            elements = torch.nn.functional.binary_cross_entropy_with_logits(pred, target, reduction="none")
            return torch.where(left, 0, elements)

        branch.assigner, branch.bce = assign, bce
    objects = batch["bboxes"].masked_fill(is_region(batch).unsqueeze(-1), 0)  # as padding, which keeps their order
    return criterion, {**batch, "bboxes": objects}, found


WAYS = [(name, "eager") for name in TASK_MODELS]
A_TASK_EACH = known("yolo26n", "yolov8n-obb", "yolo26n-seg", "yolov8n-pose")
WAYS += [(name, way) for name in A_TASK_EACH for way in ("stock cls", "asynchronous")]
COMPILED = [(name, "compiled") for name in TASK_MODELS]


@OF_DICTS
@pytest.mark.parametrize(
    ("name", "way"), [*WAYS, COMPILED[0], *(pytest.param(*each, marks=pytest.mark.slow) for each in COMPILED[1:])]
)
def test_training_is_that_of_the_objects_without_the_regions(name, way, batches, monkeypatch, traced):
    if way in ("asynchronous", "compiled"):
        monkeypatch.setenv("DETLOSS_ASYNC", "1")
    model, batch = detector(name), batches[task_of(name)]
    preds = model(batch["img"])
    criterion, objects, left = written_out(model, batch)
    expected = value_and_gradients(criterion, preds, objects)
    losses = {"dfl": third(model), **({} if task_of(name) == "obb" else {"box": {"type": "CIoULoss"}})}
    losses |= {} if way == "stock cls" else {"cls": {"type": "BinaryCrossEntropyLoss"}}
    losses = {slot: {**cfg, "compile": way == "compiled"} for slot, cfg in losses.items()}
    found = value_and_gradients(ours(model, {**losses, **IGNORE}), preds, batch)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            largest = theirs.abs().max().item()
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * largest)
    assert all(0.3 < mask.float().mean() < 0.9 for mask in left), "there is something to leave out, and something else"


SIGMOID = [
    cls
    for cls in registered_losses().values()
    if cls.facts.family in SLOTS["detect"]["cls"] and getattr(cls.make(), "use_sigmoid", True)
]


@OF_DICTS
@pytest.mark.parametrize("way", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cls", SIGMOID, ids=lambda cls: cls.__name__)
def test_no_class_loss_trains_a_region(cls, way, batches, warm, monkeypatch, traced):
    if way == "compiled":
        monkeypatch.setenv("DETLOSS_ASYNC", "1")
    batch = batches["detect"]
    criterion, seen = ours(warm, {"cls": {**in_slot(cls), "compile": way == "compiled"}, **IGNORE}), []
    slot = criterion.bce
    criterion.bce = lambda *args: seen.append(args) or slot(*args)
    preds = warm(batch["img"])
    scores = preds["scores"].detach().requires_grad_()
    value, _ = criterion({**preds, "scores": scores}, batch)
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    left = criterion.assigner.left_out()
    assert gradient.isfinite().all()
    assert not gradient.transpose(1, 2)[left].any()
    assert gradient.transpose(1, 2)[~left].any()
    if cls.__name__ != "ConfidenceWeightedLoss":  # where the largest score of a row weighs all of it
        ((pred, target),) = seen
        with torch.no_grad():
            torch.testing.assert_close(slot(torch.where(left, 3.0, pred), target).sum(), slot(pred, target).sum())


@since("8.4.37", "it has no class weights")
@pytest.mark.parametrize("cls", ["BinaryCrossEntropyLoss", "QualityFocalLoss", "GHMC", "APLoss"])
def test_class_weights_of_one_change_nothing(cls, batches, warm):
    found = []
    for weights in (None, torch.ones(10)):
        warm.class_weights = weights
        criterion = ours(warm, {"cls": {"type": cls}, **IGNORE})
        found.append(value_and_gradients(criterion, warm(batches["detect"]["img"]), batches["detect"]))
    warm.class_weights = None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@OF_DICTS
@pytest.mark.parametrize("name", ["yolov8n", "yolov8n-obb"])
def test_without_objects_or_without_regions(name, batches):
    """An empty batch trains, and a class that no image has changes but its own channel."""
    model, batch = detector(name), batches[task_of(name)]
    preds = model(batch["img"])
    assert torch.isfinite(value_and_gradients(ours(model, IGNORE), preds, without_objects(batch))[0]).all()
    nothing = {**batch, "cls": torch.where(is_region(batch).view(-1, 1), 1.0, batch["cls"])}
    with_stock, with_ours = (
        value_and_gradients(criterion, preds, nothing) for criterion in (stock_criterion(model), ours(model, IGNORE))
    )
    scores = list(preds).index("scores") + 1
    kept = [index for index in range(10) if index not in IGNORED]
    assert torch.equal(with_ours[scores][:, kept], with_stock[scores][:, kept])
    assert not with_ours[scores][:, IGNORED].any()


@pytest.mark.parametrize(
    ("ignore", "task", "error", "message"),
    [
        ({"classes": "7"}, "detect", TypeError, "ignore must be"),
        ({"classes": []}, "detect", TypeError, "ignore must be"),
        ({"names": ["7"]}, "detect", TypeError, "ignore must be"),
        ({"classes": [True]}, "detect", TypeError, "ignore must be"),
        (["7"], "pose", TypeError, "ignore must be"),
        ({"classes": ["7"]}, "rtdetr", ValueError, "leave ignore out"),
    ],
)
def test_what_ignore_may_be(ignore, task, error, message):
    with pytest.raises(error, match=message):
        make_trainer({"ignore": ignore}, task)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("1O", "nearest name is '1'"),
        ("crowd", "'crowd', which the data set has not\\."),
        (10, "class 10"),
        (-1, "class -1"),
    ],
)
def test_an_unknown_class_fails_before_training(given, hint, datasets, tmp_path):
    trainer = make_trainer({**LOSSES, "ignore": {"classes": ["3", given]}})
    with pytest.raises(ValueError, match=hint):
        YOLO("yolov8n.yaml").train(data=datasets["detect"], project=str(tmp_path), trainer=trainer, **SETTINGS)
    with pytest.raises(ValueError, match="which the data set has not"):
        ours(copy.deepcopy(detector("yolov8n")), {"ignore": {"classes": [given]}})


@pytest.mark.parametrize("setting", [{"single_cls": True}, {"classes": [1]}])
def test_settings_that_change_the_labels_are_refused(setting, datasets, tmp_path):
    given = {**SETTINGS, "data": datasets["detect"], "project": str(tmp_path), **setting}
    with pytest.raises(ValueError, match="change the labels that ignore reads"):
        make_trainer(IGNORE)(overrides={**given, "model": "yolov8n.yaml"})


def test_texts_as_classes_are_refused():
    with pytest.raises(ValueError, match="The classes of World and YOLOE are texts"):
        ours(SimpleNamespace(set_classes=None, yaml=detector("yolov8n").yaml, names={}), IGNORE)
    assert hasattr(WorldTrainer, "get_model")


def test_the_share_of_a_box_in_a_region():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 40]])
    regions = torch.tensor([[5.0, 0, 50, 50], [0, 0, 1, 1], [60, 60, 70, 70]])
    expected = torch.tensor([[0.5, 0.01, 0], [1, 0, 0]])
    torch.testing.assert_close(share_inside(boxes, regions), expected)
    rotated = [torch.cat([ops.xyxy2xywh(x), torch.zeros(len(x), 1)], 1) for x in (boxes, regions)]
    torch.testing.assert_close(share_inside(*rotated), expected, rtol=0, atol=0.01)
    turned = torch.tensor([[0.0, 0, 20, 2, 0.5]])
    along, across = torch.tensor([[0.0, 0, 10, 4, 0.5]]), torch.tensor([[0.0, 0, 10, 4, -0.5]])
    assert share_inside(turned, along).item() == 0.5
    assert 0.2 < share_inside(turned, across).item() < 0.3  # 2 |x| sin 1 <= 4 - 2 cos 1 or so


def validator(task, plots=True):
    made = make_validator(IGNORE, task)(args={"task": task, "plots": plots, "imgsz": 64})
    made.device, made.data = torch.device("cpu"), {"val": "", "kpt_shape": (17, 3)}
    made.dataloader = SimpleNamespace(dataset=SimpleNamespace(labels=[]))
    made.init_metrics(SimpleNamespace(names={i: str(i) for i in range(10)}))
    return made


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb"])
def test_validation_leaves_out_regions_and_what_is_detected_in_them(task):
    """An object, a region of class 7, and detections of both, of half a region and of nothing."""
    angle = [0.0] if task == "obb" else []
    objects = [[8.0, 8, 8, 8, *angle], [40.0, 40, 20, 20, *angle]]
    detected = {  # center and sides, class, confidence, whether it counts
        "the object": ([8, 8, 8, 8], 1, 0.9, True),
        "the region as its class": ([40, 40, 20, 20], 7, 0.8, False),
        "the region as another": ([40, 40, 20, 20], 1, 0.7, False),
        "more than half in the region": ([32, 40, 12, 10], 2, 0.6, False),
        "less than half in the region": ([29, 40, 12, 10], 2, 0.5, True),
        "nothing": ([56, 8, 8, 8], 3, 0.4, True),
        "an ignored class somewhere": ([56, 8, 8, 8], 4, 0.3, False),
    }
    scale = torch.tensor([64.0] * 4 + [1] * len(angle))
    batch = {
        "cls": torch.tensor([[1.0], [7.0]]),
        "batch_idx": torch.zeros(2),
        "bboxes": torch.tensor(objects) / scale,
        "ori_shape": [(64, 64)],
        "ratio_pad": [None],
        "img": torch.zeros(1, 3, 64, 64),
        "im_file": ["a.jpg"],
        "keypoints": torch.rand(2, 17, 3),
        "masks": torch.zeros(1, 16, 16),
    }
    batch["masks"][:, :3, :3], batch["masks"][:, 8:12, 8:12] = 1, 2
    boxes = torch.tensor([[float(x) for x in box] + angle for box, *_ in detected.values()])
    pred = {
        "bboxes": boxes if task == "obb" else ops.xywh2xyxy(boxes),
        "conf": torch.tensor([conf for _, _, conf, _ in detected.values()]),
        "cls": torch.tensor([float(index) for _, index, _, _ in detected.values()]),
        "keypoints": torch.rand(len(boxes), 17, 3),
        "masks": torch.zeros(len(boxes), 16, 16, dtype=torch.uint8),
    }
    stats = validator(task)
    stats.update_metrics([pred], batch)
    found = {name: values[0].tolist() for name, values in stats.metrics.stats.items() if name in ("conf", "target_cls")}
    assert found["target_cls"] == [1]
    counted = [conf for _, _, conf, counts in detected.values() if counts]
    assert [round(conf, 3) for conf in found["conf"]] == counted
    assert stats.metrics.stats["tp"][0][:, 0].tolist() == [True, False, False]
    assert stats.confusion_matrix.matrix[:, IGNORED].sum() == stats.confusion_matrix.matrix[IGNORED].sum() == 0


def test_a_detection_that_matches_an_object_counts_in_a_region_too():
    batch = {
        "cls": torch.tensor([[1.0], [7.0]]),
        "batch_idx": torch.zeros(2),
        "bboxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]]),
        "ori_shape": [(64, 64)],
        "ratio_pad": [None],
        "img": torch.zeros(1, 3, 64, 64),
        "im_file": ["a.jpg"],
    }
    box = ops.xywh2xyxy(batch["bboxes"][:1]) * 64
    pred = {"bboxes": box.repeat(2, 1), "conf": torch.tensor([0.9, 0.8]), "cls": torch.ones(2)}
    stats = validator("detect")
    stats.update_metrics([pred], batch)
    assert stats.metrics.stats["conf"][0].tolist() == [pytest.approx(0.9)], "the second is no false positive"
    assert stats.metrics.stats["tp"][0].all()


def test_a_validator_without_regions_is_the_stock_one():
    assert make_validator(LOSSES).__module__.startswith("ultralytics.")
    with pytest.raises(ValueError, match="rtdetr"):
        make_validator(LOSSES, "rtdetr")


def test_the_record_knows_what_is_ignored():
    losses = load_losses({**LOSSES, **IGNORE})
    assert losses["ignore"] == {"classes": NAMES}
    assert load_losses(losses) == losses
    assert describe(losses, SimpleNamespace(box=1, cls=1, dfl=1))[-1].startswith("ignore: boxes of '7', 0, '4'")
    assert unlike(load_losses(LOSSES), losses) == (["ignore"], ["ignore"])


@pytest.fixture(
    scope="module", params=["yolov8n", *(pytest.param(x, marks=pytest.mark.slow) for x in ("yolo26n-obb",))]
)
def run(request, datasets, tmp_path_factory):
    """A training of two epochs that died after the first: its model's name, its folder, and rows of the class layer."""
    folder, rows = tmp_path_factory.mktemp(request.param), []
    task = task_of(request.param)

    def look(trainer):
        rows.append([level[-1].weight.detach().clone() for level in head(trainer.model).cv3])
        if len(rows) == 1:
            assert type(trainer.validator).__name__.startswith("Ignoring")

    yolo = YOLO(f"{request.param}.yaml")
    yolo.add_callback("on_train_start", look)
    yolo.add_callback("on_train_epoch_end", look)
    yolo.add_callback("on_fit_epoch_end", interrupt)
    with pytest.raises(Interrupted):
        yolo.train(
            data=datasets[task],
            epochs=2,
            project=str(folder),
            name="run",
            weight_decay=0.0,
            trainer=make_trainer({"cls": {"type": "BinaryCrossEntropyLoss"}, **IGNORE}, task),
            **SETTINGS,
        )
    return request.param, folder / "run", rows


def test_a_training_leaves_the_channels_of_ignored_classes_alone(run):
    _, _, (before, after) = run
    for old, new in zip(before, after, strict=True):
        changed = (old != new).flatten(1).any(1)
        assert changed.tolist() == [index not in IGNORED for index in range(10)]


def test_a_run_goes_on_with_what_it_ignores(run):
    name, folder, _ = run
    last = folder / "weights" / "last.pt"
    assert trained_losses(last)["losses"]["ignore"] == {"classes": NAMES}
    seen = []
    yolo = YOLO(str(last))
    yolo.add_callback("on_train_batch_end", lambda t: seen.append([b.assigner for b in branches(t.model.criterion)]))
    yolo.train(resume=True, trainer=make_trainer(folder / "losses.yaml", task_of(name)))
    assert all(assigner.ignored.nonzero().view(-1).tolist() == IGNORED for found in seen for assigner in found)
    metrics = yolo.trainer.validator.metrics
    assert not set(metrics.ap_class_index) & set(IGNORED)
    assert metrics.nt_per_class.sum() > 0
    assert not metrics.nt_per_class[IGNORED].any()


@pytest.mark.slow
def test_its_checkpoint_loads_where_we_are_not_installed(run):
    last = str(run[1] / "weights" / "best.pt")
    done = subprocess.run([sys.executable, "-c", LOAD_WITHOUT_US, last], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("ultralytics.nn.tasks ")
