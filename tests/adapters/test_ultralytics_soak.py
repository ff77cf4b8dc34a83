"""What a long training meets, for every loss in every slot: poisoned batches, and kills at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from support.ultralytics import SETTINGS, branches, detector, head, task_of, without_objects

from detloss_plugins.adapters.ultralytics import SLOTS, install, load_losses, trained_losses
from detloss_plugins.adapters.ultralytics.building import build_losses
from detloss_plugins.registry import registered_losses

pytestmark = pytest.mark.slow


def every_loss(task, slot, reg_max):
    """The config of every loss that a slot takes, with state if it can have one."""
    for cls in registered_losses().values():
        # The third slot of a head without bins takes regression losses.
        suits = slot != "dfl" or (cls.facts.family == "distribution") == (reg_max > 1)
        if cls.facts.family in SLOTS[task][slot] and suits and getattr(cls.make(), "use_sigmoid", True):
            settings = {name: value for name, value in cls.facts.example.items() if name != "num_classes"}
            yield {"type": cls.__name__, **settings, **({"momentum": 0.5} if "momentum" in cls.rules else {})}


def pixel(value):
    """The poison of one pixel."""

    def poison(batch):
        images = batch["img"].clone()
        images[0, 0, 0, 0] = value
        return [{**batch, "img": images}]

    return poison


def boxes(change):
    """The poison of every fifth box; of more inverted ones our losses would think that they are encoded deltas."""

    def poison(batch):
        given = batch["bboxes"].clone()
        given[::5] = change(given[::5])
        return [{**batch, "bboxes": given}]

    return poison


def sides(factor):
    return boxes(lambda given: torch.cat([given[:, :2], given[:, 2:4] * factor, given[:, 4:]], -1))


def chosen(batch, rows):
    """A batch with some of its objects, in any order and number."""
    return {**batch, **{key: batch[key][rows] for key in ("batch_idx", "cls", "bboxes")}}


def resized(batch, shape):
    images = torch.nn.functional.interpolate(batch["img"], shape)
    return {**batch, "img": images, "resized_shape": [shape] * len(images)}


# Name -> the batches that it makes of a good one.
POISONS = {
    "NaN images": pixel(float("nan")),
    "inf images": pixel(float("inf")),
    "NaN boxes": boxes(lambda given: given * float("nan")),
    "inf boxes": boxes(lambda given: given * float("inf")),
    "negative boxes": sides(-1),
    "boxes without area": sides(0),
    "boxes outside": boxes(lambda given: given + 3),
    "10,000 objects": lambda batch: [chosen(batch, torch.arange(10_000) * len(batch["cls"]) // 10_000)],
    "no objects": lambda batch: [without_objects(batch)],
    "one class": lambda batch: [{**batch, "cls": batch["cls"] * 0}],
    "1203 classes": lambda batch: [batch],
    "batch of one": lambda batch: [{**chosen(batch, batch["batch_idx"] == 0), "img": batch["img"][:1]}],
    "changing sizes": lambda batch: [resized(batch, shape) for shape in ((64, 64), (96, 64), (64, 160))],
    "bf16": lambda batch: [batch],
}
CLASSES = {"one class": 1, "1203 classes": 1203}
CASES = [
    (name, slot)
    for name, slots in {
        "yolov8n": ("cls", "box", "dfl"),
        "yolo26n": ("cls", "box", "dfl"),
        "yolov8n-obb": ("box",),
        "yolov8n-rtdetr": ("loss_class", "loss_bbox", "loss_giou"),
    }.items()
    for slot in slots
]


def predictions(model, batch):
    """What a model predicts for a batch in ``model.loss``."""
    seen, predict = [], model.predict
    model.predict = lambda *args, **kwargs: seen.append(predict(*args, **kwargs)) or seen[-1]
    try:
        model.loss(batch)
    except (ValueError, RuntimeError, IndexError):
        pass  # it is looked at below
    finally:
        del model.predict
    return seen[0]


def with_gradients(preds, leaves):
    """A copy of nested predictions whose tensors take gradients and are added to a list."""
    if isinstance(preds, dict):
        return {key: with_gradients(part, leaves) for key, part in preds.items()}
    if isinstance(preds, list | tuple):
        return type(preds)(with_gradients(part, leaves) for part in preds)
    if isinstance(preds, torch.Tensor) and preds.is_floating_point():
        leaves.append(preds.detach().clone().requires_grad_())
        return leaves[-1]
    return preds


def outcome(model, batch, preds):
    """Which parts of a loss are finite and whether all its gradients are, or the error that there was."""
    leaves = []
    try:
        loss, _ = model.loss(batch, with_gradients(preds, leaves))
    except (ValueError, RuntimeError, IndexError) as error:
        return type(error).__name__, str(error)
    gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    return loss.isfinite().tolist(), all(g.isfinite().all().item() for g in gradients if g is not None)


@pytest.mark.parametrize(("name", "slot"), CASES)
@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_batch_does_what_it_does_to_the_stock_losses(poison, name, slot, batches):
    """What is finite with them is with ours, and what is not, not in silence; a state is always a number."""
    task = task_of(name)
    model = detector.__wrapped__(name, CLASSES.get(poison, 10))
    meals = POISONS[poison](batches[task])
    with torch.autocast("cpu", torch.bfloat16, enabled=poison == "bf16"):
        preds = [predictions(model, meal) for meal in meals]
        stock = [outcome(model, *pair) for pair in zip(meals, preds, strict=True)]
        faults = {}
        for cfg in every_loss(task, slot, getattr(head(model), "reg_max", 0)):
            install(model, {slot: cfg})
            found = [outcome(model, *pair) for pair in zip(meals, preds, strict=True)]
            if found != stock:
                faults[cfg["type"]] = found
            state = [b for part in branches(model.criterion) for loss in part.built.values() for b in loss.buffers()]
            if not all(buffer.isfinite().all() for buffer in state):
                faults[f"state of {cfg['type']}"] = state
    assert not faults, stock


KILLS = int(os.environ.get("DETLOSS_KILLS", "4"))  # 20 of them take minutes a training
# Run with the settings of a training, as JSON: it starts, or resumes if there is something to resume, and says what
# state it goes on with.
TRAINING = """
import json, sys
from pathlib import Path
from ultralytics import YOLO
from detloss_plugins.adapters.ultralytics import criterion_state, make_trainer

model, losses, settings = json.loads(sys.argv[1])
last = Path(settings["project"], settings["name"], "weights", "last.pt")

def say(trainer):
    state = criterion_state(trainer.model.init_criterion())
    plain = {b: {s: {n: v.tolist() for n, v in x.items()} for s, x in slots.items()} for b, slots in state.items()}
    print("\\nSTATE", trainer.start_epoch, json.dumps(plain), flush=True)

yolo = YOLO(last if last.exists() else model)
yolo.add_callback("on_train_start", say)
yolo.add_callback("on_model_save", lambda trainer: print("\\nSAVED", flush=True))
yolo.train(**({"resume": True} if last.exists() else settings), trainer=make_trainer(losses))
"""


def stateful(slot, reg_max):
    """The losses of a slot that keep a state."""
    return [
        cfg for cfg in every_loss("detect", slot, reg_max) if [*build_losses({slot: cfg}, 10, "cpu")[slot].buffers()]
    ]


def trainings():
    """Models and losses: each loss with state once, as many in a training as there are slots."""
    of_slots = {"cls": stateful("cls", 16), "box": stateful("box", 16), "dfl": stateful("dfl", 1)}
    for number in range(max(map(len, of_slots.values()))):
        losses = {slot: of_slot[number] for slot, of_slot in of_slots.items() if number < len(of_slot)}
        name = "-".join(cfg["type"] for cfg in losses.values())
        yield pytest.param("yolo26n.yaml" if "dfl" in losses else "yolov8n.yaml", losses, id=name)


def killed(command, moments):
    """Run a training until some moment after its start; the epoch and the state that it went on with."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
    said, saves = [], moments.randint(0, 2)
    try:
        for line in process.stdout:
            said.append(line)
            if any(line.startswith("STATE ") for line in said) and said.count("SAVED\n") == saves:
                time.sleep(moments.uniform(0, 1.5))
                break
    finally:
        process.send_signal(signal.SIGKILL)
        process.stdout.read()
        process.wait()
    started = [line for line in said if line.startswith("STATE ")]
    assert started, "".join(said[-30:])
    _, epoch, state = started[0].split(maxsplit=2)
    return int(epoch), json.loads(state)


def as_lists(state):
    return {
        branch: {slot: {name: value.tolist() for name, value in buffers.items()} for slot, buffers in slots.items()}
        for branch, slots in state.items()
    }


@pytest.mark.parametrize(("model", "losses"), [*trainings()])
def test_a_training_that_is_killed_again_and_again(model, losses, datasets, tmp_path):
    """It goes on where its last checkpoint was, with its losses and their state, whenever it is killed."""
    settings = {**SETTINGS, "data": datasets["detect"], "epochs": 1000, "project": str(tmp_path), "name": "run"}
    command = [sys.executable, "-c", TRAINING, json.dumps([model, losses, settings])]
    moments, last, reached = random.Random(0), tmp_path / "run" / "weights" / "last.pt", []
    for _ in range(KILLS + 1):
        before = trained_losses(last) if last.exists() else None
        epoch, state = killed(command, moments)
        reached.append(epoch)
        if before is not None:
            assert state == as_lists(before["state"])
            assert before["losses"] == load_losses(losses)
        numbers = [torch.as_tensor(v) for slots in state.values() for b in slots.values() for v in b.values()]
        assert all(number.isfinite().all() for number in numbers)
    assert sorted(reached) == reached
    assert reached[-1] > 2, "it went on between the kills"
    assert trained_losses(last)["state"] != {}
