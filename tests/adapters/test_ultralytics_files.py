"""Files of models and runs with our losses in Ultralytics: what is saved, loaded and resumed, with us and without."""

import copy
import io
import logging
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from support.ultralytics import SETTINGS, Interrupted, branches, detector, interrupt, task_of
from ultralytics import YOLO
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER

from detloss_plugins.adapters.ultralytics import PluginDetectionLoss, install, make_trainer, trained_losses

WIOU = {"type": "WIoULoss"}  # has state, which is 1 at first
LEARNT = torch.tensor(0.25)

# Run with the paths of files, where this package cannot be imported.
WITHOUT_US = """
import sys
sys.modules["detloss_plugins"] = None
from ultralytics.nn.tasks import torch_safe_load
for path in sys.argv[1:]:
    torch_safe_load(path, safe_only=True)  # only the classes of Ultralytics' allow-list, where torch has one
    checkpoint, _ = torch_safe_load(path)
    model = checkpoint.get("ema") or checkpoint["model"]
    model = getattr(model, "student_model", model)
    criterion = model.float().init_criterion()
    print(type(model).__module__, type(criterion).__module__, model.detloss_plugins["losses"])
"""


def loaded_without_us(*files):
    """What that prints: for each file the modules of the model and its criterion, and the losses."""
    command = [sys.executable, "-c", WITHOUT_US, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith("ultralytics.")]


def states(criterion):
    return [buffer for part in branches(criterion) for loss in part.built.values() for buffer in loss.buffers()]


def with_state(name):
    """A model whose criterion is there and has learnt a state."""
    model = detector.__wrapped__(name)
    install(model, {"loss_giou" if task_of(name) == "rtdetr" else "box": WIOU})
    model.criterion = model.init_criterion()
    for state in states(model.criterion):
        state.copy_(LEARNT)
    return model


def torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "oldest pickle": lambda model: pickle.loads(pickle.dumps(model, 0)),
    "deepcopy and pickle": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
    "torch.save": torch_saved,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("name", ["yolov8n", "yolov10n", "yolov8n-rtdetr"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_our_losses_and_their_state(name, way):
    model = with_state(name)
    twin = COPIES[way](model)
    assert type(twin) is type(model)
    assert (twin.criterion is None) == (way != "deepcopy"), "what is not for a file keeps its criterion"
    criterion = twin.criterion or twin.init_criterion()
    assert len(states(criterion)) == len(branches(criterion))
    assert all(torch.equal(state, LEARNT) for state in states(criterion))
    assert criterion is not model.criterion
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_what_is_saved_of_a_model_loads_without_us(tmp_path):
    files = [tmp_path / f"{name}.pt" for name in ("detector", "rtdetr", "saved", "pickled")]
    for file, name in zip(files, ("yolov10n", "yolov8n-rtdetr"), strict=False):
        torch.save({"model": with_state(name)}, file)
    yolo = YOLO("yolov8n.yaml")
    yolo.model = with_state("yolov8n")
    yolo.save(files[2])
    torch.save({"model": COPIES["deepcopy and pickle"](with_state("yolov8n"))}, files[3])
    lines = loaded_without_us(*files)
    stock = ["ultralytics.models.utils.loss" if file.stem == "rtdetr" else "ultralytics.utils.loss" for file in files]
    assert [line.split(maxsplit=2)[:2] for line in lines] == [["ultralytics.nn.tasks", module] for module in stock]
    for file, line in zip(files, lines, strict=True):
        assert line.endswith(str(trained_losses(file)["losses"]))
        assert torch.equal(next(iter(next(iter(trained_losses(file)["state"].values())).values()))["mean"], LEARNT)
    assert isinstance(YOLO(files[2]).model.init_criterion(), PluginDetectionLoss)


def train(data, folder, losses, model="yolov8n.yaml", epochs=2, **settings):
    """A training that dies after its first epoch; the path of its last.pt and what a callback saves of the EMA."""
    yolo = YOLO(model)
    yolo.add_callback("on_fit_epoch_end", lambda t: torch.save({"model": t.ema.ema}, folder / "ema.pt"))
    yolo.add_callback("on_fit_epoch_end", interrupt)
    with pytest.raises(Interrupted):
        yolo.train(
            data=data,
            epochs=epochs,
            project=str(folder),
            name="run",
            trainer=make_trainer(losses),
            **{**SETTINGS, **settings},
        )
    return folder / "run" / "weights" / "last.pt", folder / "ema.pt"


@pytest.fixture(scope="module")
def data(datasets):
    return datasets["detect"]


@pytest.fixture(scope="module")
def distilled(data, tmp_path_factory):
    """A distillation that died after its first epoch, and the terms that it had of the teacher."""
    from ultralytics.nn.distill_model import DistillationModel

    folder, terms, stock = tmp_path_factory.mktemp("distilled"), [], DistillationModel.loss_sl2
    torch.save({"model": detector.__wrapped__("yolov8n").eval()}, folder / "teacher.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationModel, "loss_sl2", lambda *a, **k: terms.append(stock(*a, **k)) or terms[-1])
        last, ema = train(data, folder, {"box": WIOU}, distill_model=str(folder / "teacher.pt"))
    return last, ema, terms


DISTILLS = pytest.mark.skipif("distill_model" not in DEFAULT_CFG_DICT, reason="this Ultralytics has no distillation")


@DISTILLS
def test_a_distillation_calls_its_teacher_and_its_files_load(distilled):
    last, ema, terms = distilled
    assert len(terms) == 6, "two steps on three levels"
    assert all(value > 0 for value in terms)
    assert "train/dis_loss" in (last.parents[1] / "results.csv").read_text(encoding="utf-8")
    for line in loaded_without_us(last, last.with_name("best.pt"), ema):
        assert line == f"ultralytics.nn.tasks ultralytics.utils.loss {trained_losses(last)['losses']}"


@DISTILLS
@pytest.mark.slow
def test_a_distillation_resumes(distilled):
    last = distilled[0]
    mean = trained_losses(last)["state"]["criterion"]["box"]["mean"]
    assert mean != 1
    yolo, found = YOLO(last), []
    yolo.add_callback("on_train_start", lambda t: found.append(t.model.init_criterion().built["box"].mean.clone()))
    yolo.train(resume=True, trainer=make_trainer({"box": WIOU}))
    assert torch.equal(found[0], mean)
    assert len((last.parents[1] / "results.csv").read_text(encoding="utf-8").splitlines()) == 3
    assert loaded_without_us(last.with_name("best.pt"))


STATEFUL = {"cls": {"type": "GHMC", "momentum": 0.75}, "box": WIOU}


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The last.pt of a training of two epochs that died after the first."""
    return train(data, tmp_path_factory.mktemp("stopped"), STATEFUL)[0]


@pytest.fixture
def own_run(stopped, tmp_path):
    """The same, in a folder of the test's own."""
    shutil.copytree(stopped.parents[1], tmp_path / "run")
    return tmp_path / "run" / "weights" / "last.pt"


def resumed(last, trainer=None):
    """The trainer of a run that is resumed, and what it logs, up to its first step."""
    yolo, seen = YOLO(last), []
    handler = logging.Handler()
    # Ultralytics' own handler puts a word before a warning.
    handler.emit = lambda record: seen.append(record.getMessage().partition("detloss_plugins: ")[2])

    def stop(trainer):
        raise Interrupted

    yolo.add_callback("on_train_start", stop)
    LOGGER.addHandler(handler)
    try:
        with pytest.raises(Interrupted):
            yolo.train(resume=True, **({"trainer": trainer} if trainer else {}))
    finally:
        LOGGER.removeHandler(handler)
    return yolo.trainer, [line for line in seen if line]


def test_a_resume_without_our_trainer_warns(own_run):
    trainer, said = resumed(own_run)
    losses = trained_losses(own_run)["losses"]
    assert said == [
        f"{own_run} was trained with {losses}, and goes on with Ultralytics' own losses: to keep them, give "
        f"trainer=make_trainer(trained_losses('{own_run}')['losses'])."
    ]
    assert not isinstance(trainer.model.init_criterion(), PluginDetectionLoss)
    trainer, said = resumed(own_run, make_trainer(losses))
    assert [line.split()[0] for line in said] == ["cls:", "box:", "dfl:"], "no warning"
    assert isinstance(trainer.model.init_criterion(), PluginDetectionLoss)
