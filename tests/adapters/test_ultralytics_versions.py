"""The Ultralytics adapter on the version that is installed, whichever it is: all that a matrix of versions runs.

Parity with that version's own criteria, trainings of its oldest and newest detector with resume and checkpoints, what
the version lacks, and every difference that ``compat`` bridges.
"""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from support.ultralytics import (
    LOAD_WITHOUT_US,
    SETTINGS,
    STOCK_RTDETR,
    TASK_MODELS,
    Interrupted,
    branches,
    called,
    detector,
    interrupt,
    known,
    loss_and_gradients,
    losses_for,
    model_file,
    ours,
    overlapping,
    result,
    since,
    stock_criterion,
    task_of,
    third,
)
from ultralytics import RTDETR, YOLO, __version__
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOGGER
from ultralytics.utils.checks import parse_version
from ultralytics.utils.tal import make_anchors

from detloss_plugins import loss as core
from detloss_plugins.adapters.ultralytics import (
    SLOTS,
    PluginDetectionLoss,
    PluginRTDETRLoss,
    compat,
    describe,
    install,
    load_losses,
    make_trainer,
    trained_losses,
    tune,
)
from detloss_plugins.adapters.ultralytics.calibrate import calibrate, candidate
from detloss_plugins.registry import loss_class

VERSION = parse_version(__version__)
NEWEST = known("yolov10n", "yolo11n", "yolo12n", "yolo26n")[-1]
# Trainings of every task, and of the end-to-end head that the oldest versions have.
SLOW = [name for name in (*TASK_MODELS, "yolov8n-rtdetr") if name not in ("yolov8n", NEWEST)]
PARITY = {"rtol": 1e-4, "atol": 0}
PLUGINS = (PluginDetectionLoss, PluginRTDETRLoss)


def assert_equal_to_stock(mine, stock):
    torch.testing.assert_close(mine[0], stock[0], **PARITY)
    assert list(mine[1]) == list(stock[1])
    for key, value in stock[1].items():
        torch.testing.assert_close(mine[1][key], value, **PARITY)
    # On the scale of the whole gradient: biases before a batch norm have rounding noise only.
    largest = max(gradient.abs().max().item() for gradient in stock[2])
    assert largest > 0
    for a, b in zip(mine[2], stock[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.parametrize("name", TASK_MODELS)
def test_stock_equivalent_losses_equal_this_versions_criterion(name, batches):
    model, batch = detector(name), batches[task_of(name)]
    # The stock loss of oriented boxes has a floor on their size, which is not ours to repeat.
    box = {} if task_of(name) == "obb" else {"box": {"type": "CIoULoss"}}
    losses = {"cls": {"type": "BinaryCrossEntropyLoss"}, **box, "dfl": third(model)}
    stock = result(model, stock_criterion(model), batch)
    assert_equal_to_stock(result(model, ours(model, losses), batch), stock)


def test_rtdetr_stock_equivalent_losses_equal_this_versions_criterion(batches, monkeypatch):
    overlapping(monkeypatch)
    # New ones: on the model that tests share, others leave losses of theirs.
    stock, mine = (detector.__wrapped__("yolov8n-rtdetr") for _ in range(2))
    install(mine, STOCK_RTDETR)
    batch = batches["rtdetr"]
    assert_equal_to_stock(loss_and_gradients(mine, batch), loss_and_gradients(stock, batch))
    assert isinstance(mine.criterion, PluginRTDETRLoss)


@pytest.fixture(scope="module", params=["yolov8n", NEWEST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def trained(request):
    """The name, task and losses, one in every slot, of a model that is trained."""
    name = request.param
    third_slot = {} if task_of(name) == "rtdetr" else {"dfl": third(detector(name))}
    return name, task_of(name), {**losses_for(name), **third_slot}


@pytest.fixture(scope="module")
def interrupted(trained, datasets, tmp_path_factory):
    """A training of two epochs that died after the first: its folder, and what was seen on the way."""
    name, task, losses = trained
    folder, log, seen = tmp_path_factory.mktemp(name), [], []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    yolo = (RTDETR if task == "rtdetr" else YOLO)(model_file(name, folder))
    yolo.add_callback("on_train_batch_end", lambda t: seen.append(t.model.criterion))
    yolo.add_callback("on_fit_epoch_end", lambda t: seen.append(t.ema.ema.criterion))
    yolo.add_callback("on_fit_epoch_end", interrupt)
    trainer = make_trainer(losses, task)
    LOGGER.addHandler(handler)
    try:
        with pytest.raises(Interrupted):
            yolo.train(data=datasets[task], epochs=2, project=str(folder), name="run", trainer=trainer, **SETTINGS)
    finally:
        LOGGER.removeHandler(handler)
    return folder / "run", log, seen


def test_an_epoch_with_our_losses(interrupted, trained):
    _, _, seen = interrupted
    assert len(seen) == 3  # two steps and a validation
    for criterion in seen:
        for branch in branches(criterion):
            assert isinstance(branch, PLUGINS)
            assert branch.losses == load_losses(trained[2], trained[1])


def test_start_up_says_what_is_active(interrupted, trained):
    _, log, _ = interrupted
    lines = [line for line in log if line.startswith("detloss_plugins: ")]
    said = dict(line.split(maxsplit=2)[1:] for line in lines)
    assert list(said) == [f"{slot}:" for slot in SLOTS[trained[1]]]
    for slot in SLOTS[trained[1]]:
        loss = trained[2].get(slot)
        assert said[f"{slot}:"].startswith(f"{loss_class(loss['type']).__name__}(" if loss else "stock loss x gain ")


def test_the_description_has_the_slots_of_rtdetr():
    """And no gain of a loss that there is not, as the criterion of some versions has them."""
    lines = describe({"loss_class": {"type": "MALoss"}}, None, "rtdetr")
    assert [line.partition(":")[0] for line in lines] == list(SLOTS["rtdetr"])


def test_results_csv_keeps_its_columns(interrupted, trained):
    run, _, _ = interrupted
    header = (run / "results.csv").read_text(encoding="utf-8").splitlines()[0]
    boxes = "giou_loss" if trained[1] == "rtdetr" else "box_loss"
    for column in (f"train/{boxes}", "train/cls_loss", "val/cls_loss"):
        assert column in header


def test_best_and_last_load_and_predict_without_us(interrupted, trained):
    run, _, _ = interrupted
    files = [str(run / "weights" / name) for name in ("best.pt", "last.pt")]
    done = subprocess.run([sys.executable, "-c", LOAD_WITHOUT_US, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = load_losses(trained[2], trained[1])
    assert done.stdout.splitlines()[-1] == f"ultralytics.nn.tasks {losses}"
    for file in files:
        assert trained_losses(file)["losses"] == losses


def test_a_checkpoint_of_several_devices_is_refused_too(interrupted, trained, tmp_path, monkeypatch):
    """Its arguments are those of the run that resumes. Before the run below ends, of which nothing can resume."""
    monkeypatch.setitem(compat.FEATURES, "devices", (False, "8.4.140", "Training on several GPUs", "do not"))
    checkpoint = torch.load(interrupted[0] / "weights" / "last.pt", map_location="cpu", weights_only=False)
    checkpoint["train_args"]["device"] = "0,1"
    torch.save(checkpoint, tmp_path / "last.pt")
    with pytest.raises(RuntimeError, match=r"Training on several GPUs needs Ultralytics 8\.4\.140"):
        YOLO(str(tmp_path / "last.pt")).train(resume=True, trainer=make_trainer({}, trained[1]))


def test_resume_goes_on_with_our_losses(interrupted, trained):
    run, _, _ = interrupted
    _, task, losses = trained
    seen = []
    yolo = YOLO(str(run / "weights" / "last.pt"))

    def look(trainer):
        criterion = trainer.model.criterion
        seen.append((trainer.epoch, branches(criterion), getattr(criterion, "updates", None)))

    yolo.add_callback("on_train_batch_end", look)
    yolo.train(resume=True, trainer=make_trainer(losses, task))
    epochs, found, updates = zip(*seen, strict=True)
    assert set(epochs) == {1}
    assert all(branch.losses == load_losses(losses, task) for branch in found[0])
    if VERSION >= (8, 4, 33) and len(found[0]) == 2:  # before it a resume begins the schedule anew, stock losses too
        assert updates[0] == 1, "the end-to-end schedule goes on where it was"
    assert len((run / "results.csv").read_text(encoding="utf-8").splitlines()) == 3
    assert trained_losses(run / "weights" / "best.pt")["losses"] == load_losses(losses, task)


def test_a_stock_trainer_keeps_no_record(interrupted, trained, datasets, tmp_path):
    """Fine-tuning our checkpoint with the stock trainer must not claim our losses."""
    run, _, _ = interrupted
    yolo = YOLO(str(run / "weights" / "best.pt"))
    yolo.train(data=datasets[trained[1]], epochs=1, project=str(tmp_path), name="stock", **{**SETTINGS, "val": False})
    assert trained_losses(tmp_path / "stock" / "weights" / "last.pt") is None
    assert not any(isinstance(b, PLUGINS) for b in branches(yolo.trainer.model.init_criterion()))


@pytest.mark.parametrize("feature", compat.FEATURES)
def test_features_come_with_their_versions(feature):
    there, version, _, _ = compat.FEATURES[feature]
    assert there == (parse_version(version) <= VERSION)


REFUSED = {"cls_pw": {"cls_pw": 0.5}, "devices": {"device": "0,1"}, "tune": {}}


@pytest.mark.parametrize("feature", REFUSED)
def test_what_a_version_lacks_is_refused_before_data_is_read(feature, tmp_path, monkeypatch):
    """In one sentence; on a version that has the feature, as if it had not."""
    _, version, what, instead = compat.FEATURES[feature]
    monkeypatch.setitem(compat.FEATURES, feature, (False, version, what, instead))
    trainer, yolo = make_trainer({"cls": {"type": "VarifocalLoss"}}), YOLO("yolov8n.yaml")
    settings = {**SETTINGS, "data": "no-such-data.yaml", "project": str(tmp_path), **REFUSED[feature]}
    with pytest.raises(RuntimeError) as raised:
        tune(yolo, trainer, **settings) if feature == "tune" else yolo.train(trainer=trainer, **settings)
    assert str(raised.value) == (
        f"{what} needs Ultralytics {version} or newer, and this is {__version__}: upgrade, or {instead}."
    )
    assert not list(tmp_path.iterdir())


def test_a_worker_of_a_launch_may_name_several_devices(monkeypatch):
    monkeypatch.setitem(compat.FEATURES, "devices", (False, "8.4.140", "", ""))
    with pytest.raises(RuntimeError, match=r"needs Ultralytics 8\.4\.140"):
        compat.check_arguments({"device": [0, 1]})
    compat.check_arguments({"device": "cpu", "cls_pw": 0.0})
    monkeypatch.setenv("LOCAL_RANK", "0")
    compat.check_arguments({"device": [0, 1]})


class OfTheEnvironment(DetectionTrainer):
    """As in some versions, 8.3.240 and 8.4.76 among them: without a device, those of CUDA_VISIBLE_DEVICES."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.args.device = "0,1"


@pytest.mark.parametrize(("weight", "message"), [(1.0, r"needs Ultralytics 8\.4\.140"), ("auto", "on one device")])
def test_devices_of_the_environment_are_refused_too(weight, message, datasets, tmp_path, monkeypatch):
    monkeypatch.setitem(compat.FEATURES, "devices", (False, "8.4.140", "", ""))
    trainer = make_trainer({"cls": {"type": "VarifocalLoss", "loss_weight": weight}}, trainer=OfTheEnvironment)
    overrides = {**SETTINGS, "model": "yolov8n.yaml", "data": datasets["detect"], "project": str(tmp_path)}
    with pytest.raises((RuntimeError, ValueError), match=message):
        trainer(overrides=overrides)
    if weight == 1:
        monkeypatch.setenv("LOCAL_RANK", "0")
        trainer(overrides=overrides)


def test_calibration_warms_up_for_a_quarter_of_its_steps(datasets):
    """In every version to the learning rates of the training: those of biases down, those of weights up."""
    seen = []

    class Seen(DetectionTrainer):
        def preprocess_batch(self, batch):
            groups = self.optimizer.param_groups
            seen.append({(group["lr"], group["momentum"], self.accumulate) for group in groups if group["params"]})
            return super().preprocess_batch(batch)

    settings = {**SETTINGS, "nbs": 32, "epochs": 8, "warmup_epochs": 8, "lr0": 0.01, "lrf": 1.0}
    calibrate([candidate("VarifocalLoss")], "yolov8n.yaml", 8, 1, trainer=Seen, data=datasets["detect"], **settings)
    at = (0.1, 0.8, 1), (0.0, 0.8, 1)
    assert seen[0] == set(at)
    middle = {(round(lr, 6), round(momentum, 6), accumulate) for lr, momentum, accumulate in seen[1]}
    assert middle == {(0.055, 0.8685, 2), (0.005, 0.8685, 2)}
    assert seen[2:] == [{(0.01, 0.937, 4)}] * 6


@since("8.4.37", "it has no class weights")
def test_class_weights_reach_our_loss(batches):
    model, items = copy.deepcopy(detector("yolov8n")), []
    for weights in (None, torch.full((10,), 2.0)):
        model.class_weights = weights
        criterion = ours(model, losses_for("yolov8n"))
        assert (compat.class_weights(criterion) is None) == (weights is None)
        items.append(result(model, criterion, batches["detect"])[1])
    torch.testing.assert_close(items[1]["cls_loss"], 2 * items[0]["cls_loss"])


def test_a_criterion_without_class_weights():
    assert compat.class_weights(object()) is None


def test_items_are_as_this_version_has_them(batches):
    model = detector("yolov8n")
    _, items = ours(model, losses_for("yolov8n"))(model(batches["detect"]["img"]), batches["detect"])
    assert isinstance(items, dict if VERSION >= (8, 4, 104) else torch.Tensor)


def test_unwrap_model():
    model = torch.nn.Linear(1, 1)
    assert compat.unwrap_model(torch.nn.DataParallel(model)) is model
    assert compat.unwrap_model(model) is model


@pytest.mark.parametrize("name", [name for name in ("yolov10n", "yolo26n", "yolo26n-obb") if name in TASK_MODELS])
def test_an_end_to_end_criterion_is_the_stock_one_with_our_branches(name, batches):
    model = detector(name)
    stock, mine = stock_criterion(model), ours(model, losses_for(name))
    assert type(mine) is type(stock) is compat.E2ELoss
    for a, b in zip(branches(mine), branches(stock), strict=True):
        assert isinstance(a, PluginDetectionLoss)
        assert isinstance(a, type(b))
        for setting in ("topk", "topk2"):
            assert getattr(a.assigner, setting, None) == getattr(b.assigner, setting, None)
    assert called(mine, model, batches[task_of(name)])[0].isfinite().all()


def test_the_choice_of_an_end_to_end_criterion_follows_the_version():
    assert compat.E2ELoss.__name__ == ("E2ELoss" if VERSION >= (8, 4, 0) else "E2EDetectLoss")


@pytest.mark.parametrize("name", ["yolov8n", "yolov10n"])
def test_state_is_averaged_over_the_ranks_once_a_branch(name, batches, monkeypatch):
    """However this version calls the criterion of a branch."""
    model, averaged = detector(name), []
    monkeypatch.setattr(core, "rank_mean", lambda tensor: averaged.append(tensor) or tensor)
    criterion = ours(model, {"box": {"type": "WIoULoss"}})
    called(criterion, model, batches["detect"])
    assert [id(mean) for mean in averaged] == [id(branch.built["box"].mean) for branch in branches(criterion)]


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (320, 224)])
def test_strides_of_the_anchors(shape):
    strides = torch.tensor([8.0, 16.0, 32.0])
    features = [torch.zeros(1, 1, shape[0] // stride, shape[1] // stride) for stride in (8, 16, 32)]
    expected = make_anchors(features, strides, 0.5)[1]
    for dtype in (torch.float32, torch.float16):  # under autocast the stock criterion has the size in half precision
        found = compat.anchor_strides(torch.tensor(shape, dtype=dtype), strides)
        assert torch.equal(found.float(), expected)


@pytest.mark.parametrize("name", known("yolov8n", "yolov8n-obb", "yolov8n-seg", "yolov8n-pose"))
def test_a_box_loss_gets_pixels_and_the_size_of_an_image_that_is_no_square(name, batches):
    model, plain = detector(name), batches[task_of(name)]
    batch = {**plain, "img": torch.nn.functional.interpolate(plain["img"], (64, 96))}
    batch["resized_shape"] = [(64, 96)] * len(batch["img"])  # where the oriented boxes of 8.4.0 read it
    given = []

    class Recorder(torch.nn.Module):
        batch_image_size = None

        def forward(self, pred, target, weight, **_):
            given.append((target, weight))
            return (pred * 0).sum()

    criterion = ours(model, {"box": losses_for(name)["box"]})
    criterion.bbox_loss.box = Recorder()
    called(criterion, model, batch)
    ((target, weight),) = given
    assert criterion.bbox_loss.box.batch_image_size.tolist() == [64, 96]
    assert len(target) == len(weight) > 20
    objects = plain["bboxes"][:, :4] * torch.tensor([96.0, 64, 96, 64])
    if task_of(name) != "obb":
        objects = torch.cat([objects[:, :2] - objects[:, 2:] / 2, objects[:, :2] + objects[:, 2:] / 2], -1)
    # The centres alone of oriented boxes: the assigner of some versions, as 8.4.38, enlarges small ones.
    same = 2 if task_of(name) == "obb" else 4
    nearest = (target[:, None, :same] - objects[:, :same]).abs().amax(-1).amin(1)
    assert nearest.max() < 1e-3, "each target is one of the batch's objects, in pixels"


def test_sides_of_an_oriented_box_without_angle():
    """Along the axes of the image, whatever the version: two units from its left side, four from the others."""
    anchors, boxes = torch.tensor([[4.0, 5.0]]), torch.tensor([[[5.0, 5.0, 6.0, 8.0, 0.0]]])
    torch.testing.assert_close(compat.rbox2dist(boxes, anchors, 15), torch.tensor([[[2.0, 4.0, 4.0, 4.0]]]))
    assert compat.rbox2dist(boxes, anchors, 3).max() < 3


@since("8.4.0", "it measures them along the axes of the image")
def test_sides_of_an_oriented_box_are_those_of_its_own_axes():
    anchors, boxes = torch.tensor([[4.0, 5.0]]), torch.tensor([[[5.0, 5.0, 6.0, 8.0, torch.pi / 2]]])
    torch.testing.assert_close(compat.rbox2dist(boxes, anchors, 15), torch.tensor([[[3.0, 5.0, 3.0, 3.0]]]))
