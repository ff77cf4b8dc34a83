"""Files of models and runs with our losses in Ultralytics: what is saved, loaded and resumed, with us and without."""

import contextlib
import copy
import functools
import io
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from support.commands import last_line
from support.ultralytics import SETTINGS, Interrupted, branches, detector, interrupt, since, task_of
from ultralytics import YOLO
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER

from detloss_plugins.adapters.ultralytics import PluginDetectionLoss, install, load_losses, make_trainer, trained_losses
from detloss_plugins.adapters.ultralytics.config import unlike
from detloss_plugins.adapters.ultralytics.trainer import whole_files
from detloss_plugins.cli import _yolo, train

WIOU = {"type": "WIoULoss"}  # has state, which is 1 at first
LEARNT = torch.tensor(0.25)

# Run with the paths of files, where this package cannot be imported.
WITHOUT_US = """
import sys
sys.modules["detloss_plugins"] = None
import torch
from ultralytics.nn.tasks import torch_safe_load
for path in sys.argv[1:]:
    if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # from torch 2.6 on
        torch_safe_load(path, safe_only=True)  # only the classes of Ultralytics' allow-list
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


@functools.cache
def learnt(name):
    """Such a model that nobody changes."""
    return with_state(name)


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
    model = learnt(name)
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
    yolo.model, yolo.ckpt = with_state("yolov8n"), {}  # older versions ask for one
    yolo.save(files[2])
    torch.save({"model": COPIES["deepcopy and pickle"](with_state("yolov8n"))}, files[3])
    lines = loaded_without_us(*files)
    stock = ["ultralytics.models.utils.loss" if file.stem == "rtdetr" else "ultralytics.utils.loss" for file in files]
    assert [line.split(maxsplit=2)[:2] for line in lines] == [["ultralytics.nn.tasks", module] for module in stock]
    for file, line in zip(files, lines, strict=True):
        assert line.endswith(str(trained_losses(file)["losses"]))
        assert torch.equal(next(iter(next(iter(trained_losses(file)["state"].values())).values()))["mean"], LEARNT)
    assert isinstance(YOLO(files[2]).model.init_criterion(), PluginDetectionLoss)


def trained(data, folder, losses, model="yolov8n.yaml", epochs=2, **settings):
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
        last, ema = trained(data, folder, {"box": WIOU}, distill_model=str(folder / "teacher.pt"))
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
    return trained(data, tmp_path_factory.mktemp("stopped"), STATEFUL)[0]


@pytest.fixture
def own_run(stopped, tmp_path):
    """The same, in a folder of the test's own."""
    shutil.copytree(stopped.parents[1], tmp_path / "run")
    last = tmp_path / "run" / "weights" / "last.pt"
    checkpoint = torch.load(last, map_location="cpu", weights_only=False)
    checkpoint["train_args"]["save_dir"] = str(tmp_path / "run")
    torch.save(checkpoint, last)
    return last


@contextlib.contextmanager
def heard():
    """The lines of ours in Ultralytics' log."""
    lines, handler = [], logging.Handler()

    def emit(record):
        if "detloss_plugins: " in record.getMessage():  # the log's own handler puts a word before a warning
            lines.append(record.getMessage().partition("detloss_plugins: ")[2])

    handler.emit = emit
    LOGGER.addHandler(handler)
    try:
        yield lines
    finally:
        LOGGER.removeHandler(handler)


def resumed(last, trainer=None):
    """The trainer of a run that is resumed, up to its first step, and what it says."""
    yolo = YOLO(last)

    def stop(trainer):
        raise Interrupted

    yolo.add_callback("on_train_start", stop)
    with heard() as lines, pytest.raises(Interrupted):
        yolo.train(resume=True, **({"trainer": trainer} if trainer else {}))
    return yolo.trainer, lines


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


CHANGES = {
    "another box loss": ({"cls": STATEFUL["cls"], "box": {"type": "GIoULoss"}}, {"cls"}, ["box"]),
    "another setting": ({**STATEFUL, "cls": {"type": "GHMC", "momentum": 0.5}}, {"box"}, ["cls"]),
    "another weight": ({**STATEFUL, "box": {**WIOU, "loss_weight": 2.0}}, {"cls", "box"}, ["box"]),
    "a slot less": ({"cls": STATEFUL["cls"]}, {"cls"}, ["box"]),
    "a slot more": ({**STATEFUL, "dfl": {"type": "DistributionFocalLoss"}}, {"cls", "box"}, ["dfl"]),
    "nothing": (STATEFUL, {"cls", "box"}, []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_resumes_keeps_the_state_of_what_stays(change, stopped):
    losses, kept, changed = CHANGES[change]
    trainer = make_trainer(losses)
    with heard() as said:
        state = trainer.state_to_go_on_with(trainer, trained_losses(stopped))
    assert state["criterion"].keys() == kept
    assert [line.split("another ")[1].split()[0] for line in said] == changed


def test_a_resume_with_one_slot_changed(own_run):
    state = trained_losses(own_run)["state"]["criterion"]["cls"]
    assert all(value.any() for value in state.values())
    trainer, said = resumed(own_run, make_trainer({**STATEFUL, "box": {"type": "GIoULoss"}}))
    assert said[0].startswith("this run resumes with another box loss: {'loss_weight': 1.0, 'type': 'GIoULoss'}, not {")
    found = trainer.model.init_criterion().built["cls"].state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_stock_run_that_resumes_with_our_losses_says_so():
    trainer = make_trainer({"box": WIOU})
    with heard() as said:
        assert trainer.state_to_go_on_with(trainer, {"losses": {}, "state": {}}) == {}
    assert said == [
        "this run resumes with another box loss: {'loss_weight': 1.0, 'type': 'WIoULoss'}, not the stock loss."
    ]


def test_the_folder_of_a_run_has_its_losses(stopped):
    assert make_trainer(stopped.parents[1] / "losses.yaml").plugin_losses == trained_losses(stopped)["losses"]


OF_NUMPY = {
    "cls": {
        "type": "FocalLoss",
        "alpha": np.full(10, 0.25),
        "gamma": np.float64(2.0),
        "loss_weight": torch.tensor(16.0),
    },
    "box": {"type": "InnerIoULoss", "base": {"type": "MPDIoULoss", "image_size": np.array([64, 64])}},
    "dfl": {"type": "DistributionFocalLoss", "loss_weight": torch.tensor(1.5)},
}


def test_a_record_is_of_plain_python_values():
    """They are equal to themselves and can be written as YAML."""
    losses = load_losses(OF_NUMPY)
    assert losses["cls"]["alpha"] == [0.25] * 10
    assert type(losses["cls"]["gamma"]) is float
    assert losses["box"]["base"]["image_size"] == [64, 64]
    assert losses == yaml.safe_load(yaml.safe_dump(losses)) == load_losses(losses)


@pytest.mark.slow
def test_settings_of_numpy_load_anywhere_and_resume(data, tmp_path):
    losses = load_losses(OF_NUMPY)
    last, _ = trained(data, tmp_path, OF_NUMPY)
    assert loaded_without_us(last)[0].endswith(str(losses))
    assert not any("another" in line for line in resumed(last, make_trainer(OF_NUMPY))[1])


def test_a_tuple_is_the_list_that_a_file_makes_of_it(tmp_path):
    losses = load_losses({"box": {"type": "MPDIoULoss", "image_size": (64, 96)}})
    (tmp_path / "losses.yaml").write_text(yaml.safe_dump(losses), encoding="utf-8")
    assert unlike(losses, load_losses(tmp_path / "losses.yaml")) == ([], [])


def test_a_setting_is_not_learnt():
    with pytest.raises(ValueError, match="not learnt"):
        make_trainer({"cls": {"type": "FocalLoss", "alpha": torch.tensor(0.25, requires_grad=True)}})


def test_the_command_refuses_what_a_resume_would_ignore(stopped, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resume = f"resume={stopped}"
    for arguments, words in (
        (["epochs=9"], "keeps its epochs=2: leave epochs=9 out"),
        (["lr0=0.5"], "keeps its lr0=0.001"),
        (["model=yolo11n.yaml"], "keeps its model: leave model=yolo11n.yaml out"),
        (["no_such_argument=1"], "is not a valid YOLO argument"),
        (
            ["cls.momentum=0.5"],
            "trained with other losses (cls: {'loss_weight': 1.0, 'type': 'GHMC', 'momentum': 0.75})",
        ),
        (["vfl_eiou_dfl"], "dfl: the stock loss): to resume it with yours, give --new-losses"),
        (["--work-dir", tmp_path / "other"], "leave --work-dir out"),
    ):
        assert words in last_line(capsys, "train", resume, *arguments, status=2), arguments
    assert "resume=true needs --work-dir" in last_line(capsys, "train", "resume=true", status=2)
    assert "leave epochs=9 out" in last_line(capsys, "train", f"resume={stopped.parents[1]}", "epochs=9", status=2)
    assert "no checkpoint no-such.pt" in last_line(capsys, "train", "resume=no-such.pt", status=2)
    (tmp_path / "half.pt").write_bytes(stopped.read_bytes()[:10000])
    assert last_line(capsys, "train", "resume=half.pt", status=2)
    assert "run of Ultralytics that resumes" in last_line(capsys, "train", "--new-losses", status=2)
    assert not (tmp_path / "runs").exists(), "nothing was trained"


def test_the_command_resumes_with_the_losses_of_the_run(own_run, capsys):
    run = own_run.parents[1]
    assert last_line(capsys, "train", "resume=true", "--work-dir", run, "batch=4").startswith("  dfl: stock loss")
    assert len((run / "results.csv").read_text(encoding="utf-8").splitlines()) == 3
    assert trained_losses(own_run)["losses"] == load_losses(STATEFUL)
    assert "has ended: start a new one" in last_line(capsys, "train", f"resume={own_run}", status=2)


def test_the_command_resumes_with_other_losses_where_it_is_told_to(own_run, capsys):
    last_line(capsys, "train", f"resume={own_run}", "--new-losses", "box.type=GIoULoss")
    assert trained_losses(own_run)["losses"] == load_losses({**STATEFUL, "box": {"type": "GIoULoss"}})


@pytest.fixture
def given(monkeypatch):
    """What ``detloss train`` hands to a training, given words; nothing is trained."""
    settings = {}

    def stop(_, **words):
        settings.update(words)
        raise Interrupted

    monkeypatch.setattr(YOLO, "train", stop)
    monkeypatch.setattr(_yolo, "yolo_data", lambda *_: ("own.yaml", {}))
    monkeypatch.setattr(_yolo, "check_yolo", lambda _: None)

    def give(*words):
        with pytest.raises(Interrupted):
            train.train_yolo(train.Arguments(*train.parsed_words(words)))
        return settings

    return give


def test_the_command_starts_anew_without_resume(given):
    settings = given("resume=false", "epochs=1")
    assert (settings["data"], settings["epochs"]) == ("own.yaml", 1)
    assert "resume" not in settings


def test_the_command_keeps_the_weights_of_a_model_that_has_some(given, own_run):
    # Ultralytics starts from none if it is told that they are not to be used.
    assert given(f"model={own_run}")["pretrained"] is True
    assert given("model=yolov8n.yaml")["pretrained"] is False


KILLED = """
import os, signal, sys
from pathlib import Path
from ultralytics import YOLO
from detloss_plugins.adapters.ultralytics import make_trainer, trained_losses

stock = Path.write_bytes

def half(self, data):
    stock(self, data[:len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

Path.write_bytes = half
YOLO(sys.argv[1]).train(resume=True, trainer=make_trainer(trained_losses(sys.argv[1])["losses"]))
"""


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(own_run):
    before = own_run.read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(own_run)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert own_run.read_bytes() == before
    assert resumed(own_run, make_trainer(STATEFUL))[0].start_epoch == 1


def test_only_whole_files_come_to_their_places(tmp_path):
    """Also those of every so many epochs; what a killed run left does not, nor what is written when it fails."""

    class Trainer:
        wdir, last, best = tmp_path, tmp_path / "last.pt", tmp_path / "best.pt"

    trainer, places = Trainer(), (Trainer.wdir, Trainer.last, Trainer.best)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "best.pt").write_text("half", encoding="utf-8")
    with whole_files(trainer):
        trainer.last.write_text("one", encoding="utf-8")
        (trainer.wdir / "epoch3.pt").write_text("one", encoding="utf-8")
        assert not Trainer.last.exists()
    with contextlib.suppress(OSError), whole_files(trainer):
        trainer.last.write_text("tw", encoding="utf-8")
        raise OSError("no space left")
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {
        "last.pt": "one",
        "epoch3.pt": "one",
    }
    assert (trainer.wdir, trainer.last, trainer.best) == places


class Evil:
    """What runs code of its own when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


READ = """
import sys
from ultralytics import YOLO
from detloss_plugins.adapters.ultralytics import trained_losses
for read in (YOLO, trained_losses):
    try:
        read(sys.argv[1])
    except TypeError as error:
        print("refused:", "outside the supported" in str(error))
"""


@pytest.mark.skipif(not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"), reason="older torch")
@since("8.4.104", "it does not know ULTRALYTICS_SAFE_LOAD")
def test_a_file_that_ultralytics_refuses_is_not_unpickled(tmp_path):
    model = with_state("yolov8n")
    model.evil = Evil(tmp_path / "harm")
    torch.save({"model": model}, tmp_path / "evil.pt")
    environment = {**os.environ, "ULTRALYTICS_SAFE_LOAD": "1"}
    command = [sys.executable, "-c", READ, str(tmp_path / "evil.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == ["refused: True"] * 2
    assert not (tmp_path / "harm").exists()


@since("8.4.140", "its loader does not say so")
def test_a_broken_file_is_read_by_ultralytics_own_loader(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with pytest.raises(TypeError, match="not a loadable checkpoint"):
        trained_losses(tmp_path / "broken.pt")
