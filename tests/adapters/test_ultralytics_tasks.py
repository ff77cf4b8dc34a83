"""What the tasks and heads beyond detection and oriented boxes need of the Ultralytics adapter, and use on its own."""

import copy
import json
import logging
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from support.ultralytics import (
    CLASSES,
    FOR_RTDETR,
    LOSSES,
    SETTINGS,
    STOCK_RTDETR,
    TASK_MODELS,
    assert_same,
    branches,
    detector,
    head,
    in_slot,
    loss_and_gradients,
    losses_for,
    model_cfg,
    model_file,
    named,
    ours,
    overlapping,
    result,
    since,
    stock_criterion,
    task_of,
    third,
    without_objects,
)
from table import ultralytics_detectors
from ultralytics import RTDETR, YOLO
from ultralytics.cfg import get_cfg
from ultralytics.models.utils.loss import RTDETRDetectionLoss
from ultralytics.models.yolo import yoloe
from ultralytics.models.yolo.world import WorldTrainer
from ultralytics.nn.tasks import (
    DetectionModel,
    OBBModel,
    PoseModel,
    SegmentationModel,
    WorldModel,
    YOLOEModel,
    YOLOESegModel,
    yaml_model_load,
)
from ultralytics.utils import LOGGER

from detloss_plugins import build_loss
from detloss_plugins import loss as core
from detloss_plugins.adapters.ultralytics import (
    SLOTS,
    PluginDetectionLoss,
    PluginRTDETRLoss,
    install,
    load_losses,
    make_trainer,
    model_task,
    trained_losses,
    tune,
)
from detloss_plugins.adapters.ultralytics.trainer import class_biases, start_at_prior
from detloss_plugins.registry import registered_losses
from detloss_plugins.testing import digits

RTDETR_NAME = "yolov8n-rtdetr"


@pytest.fixture
def log():
    """What is logged."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    LOGGER.addHandler(handler)
    yield lines
    LOGGER.removeHandler(handler)


def with_losses(name, losses):
    """A fresh copy of a detector with losses of ours, or with the stock ones for None."""
    model = copy.deepcopy(detector(name))
    if losses is not None:
        install(model, losses)
    return model


def assert_close(mine, stock, scale=1.0):
    torch.testing.assert_close(mine[0], stock[0] * scale, rtol=1e-5, atol=0)
    largest = max(g.abs().max().item() for g in stock[2])
    for a, b in zip(mine[2], stock[2], strict=True):
        torch.testing.assert_close(a, b * scale, rtol=1e-3, atol=1e-5 * largest)


@pytest.fixture(scope="module")
def images(batches):
    return batches["rtdetr"]


def test_rtdetr_stock_equivalent_losses_reproduce_stock(images, monkeypatch):
    overlapping(monkeypatch)
    stock = loss_and_gradients(with_losses(RTDETR_NAME, None), images)
    assert_close(loss_and_gradients(with_losses(RTDETR_NAME, STOCK_RTDETR), images), stock)
    for slot, cfg in STOCK_RTDETR.items():  # one at a time, and twice its weight is twice its value
        twice = loss_and_gradients(with_losses(RTDETR_NAME, {slot: {**cfg, "loss_weight": 2.0}}), images)
        item = {"loss_class": "cls_loss", "loss_bbox": "l1_loss", "loss_giou": "giou_loss"}[slot]
        for key, value in stock[1].items():
            torch.testing.assert_close(twice[1][key], value * (2 if key == item else 1), rtol=1e-5, atol=0)


def test_rtdetr_without_our_losses_is_stock_bit_for_bit(images):
    stock, mine = (loss_and_gradients(with_losses(RTDETR_NAME, losses), images) for losses in (None, {}))
    assert_same(mine, stock, rtol=0, atol=0)


def test_rtdetr_focal_loss_gets_classes_and_equals_the_stock_focal_loss(images):
    """The stock criterion has one too, which takes the classes, not the IoU."""
    model = with_losses(RTDETR_NAME, None)
    model.criterion = RTDETRDetectionLoss(nc=10, use_vfl=False)
    stock = loss_and_gradients(model, images)
    focal = {"loss_class": {"type": "FocalLoss", "gamma": 1.5, "alpha": 0.25}}
    assert_close(loss_and_gradients(with_losses(RTDETR_NAME, focal), images), stock)


def takes_a_slot(cls):
    families = {family for takes in SLOTS["rtdetr"].values() for family in takes}
    return cls.facts.family in families and getattr(cls.make(), "use_sigmoid", True)


@pytest.fixture(scope="module")
def predictions(images):
    """What the model predicts for a batch, in training, as leaves of the graph."""
    torch.manual_seed(0)
    model = detector(RTDETR_NAME)
    targets = {
        "cls": images["cls"].long().view(-1),
        "bboxes": images["bboxes"],
        "batch_idx": images["batch_idx"].long(),
        "gt_groups": [int((images["batch_idx"] == i).sum()) for i in range(len(images["img"]))],
    }
    *found, denoising = model.predict(images["img"], batch=targets)
    return [tensor.detach() for tensor in found], denoising


@pytest.mark.parametrize(
    "cls", [cls for cls in registered_losses().values() if takes_a_slot(cls)], ids=lambda cls: cls.__name__
)
def test_rtdetr_every_loss_has_a_gradient(cls, images, predictions, monkeypatch):
    forward = PluginRTDETRLoss.forward
    slot = next(slot for slot, takes in SLOTS["rtdetr"].items() if cls.facts.family in takes)
    model = detector(RTDETR_NAME)
    install(model, {slot: in_slot(cls)})
    found = [tensor.clone().requires_grad_() for tensor in predictions[0]]
    boxes, scores = found[:2]
    _, items = model.loss(images, (*found, predictions[1]))
    assert isinstance(model.criterion, PluginRTDETRLoss)
    assert isinstance(model.criterion.built[slot], cls)
    assert all(value.isfinite() for value in named(items, model).values())
    seen = {}
    monkeypatch.setattr(PluginRTDETRLoss, "forward", lambda *a, **k: seen.update(forward(*a, **k)) or seen)
    model.loss(images, (*found, predictions[1]))
    for postfix in ("", "_aux", "_dn"):  # the last layer of the decoder, the other ones, the denoising queries
        (gradient,) = torch.autograd.grad(
            seen[f"{slot}{postfix}"], scores if slot == "loss_class" else boxes, retain_graph=True
        )
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


# Of a positive of quality 0, whose target is 0 for the one and .01 for the other, and of a negative.
OF_QUALITY_0 = {"MALoss": (0.0, 1.5), "IABCELoss": (0.01, 2.0)}


@pytest.mark.parametrize("name", OF_QUALITY_0)
def test_rtdetr_a_matched_box_that_misses_its_object_is_a_positive(name, images, predictions):
    """All predicted boxes are outside of the image: an IoU of 0, and the label beside it, in every layer."""
    model, seen = with_losses(RTDETR_NAME, {"loss_class": {"type": name}}), []
    boxes, scores, encoder_boxes, encoder_scores = predictions[0]
    away = torch.tensor([-0.5, -0.5, 0.1, 0.1])
    boxes, encoder_boxes = (away.expand_as(x).clone().requires_grad_() for x in (boxes, encoder_boxes))
    model.criterion = model.init_criterion()
    loss = model.criterion.built["loss_class"]
    loss.register_forward_hook(lambda _, args, kwargs, value: seen.append((args, kwargs, value)), with_kwargs=True)
    model.loss(images, (boxes, scores, encoder_boxes, encoder_scores, predictions[1]))
    assert len(seen) >= 3
    wanted, power = OF_QUALITY_0[name]
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    for (logits, (labels, quality)), kwargs, value in seen:
        positive = torch.nn.functional.one_hot(labels, 11)[..., :10].bool()
        assert positive.any()
        assert (quality == 0).all()
        rows = logits.sigmoid() ** torch.where(positive, 0.0, power)
        rows = rows * bce(logits, torch.where(positive, wanted, 0.0), reduction="none")
        torch.testing.assert_close(value, rows.sum() / kwargs["avg_factor"], rtol=1e-5, atol=0)


RANKED = {"loss_class": {"type": "APLoss"}, "loss_bbox": {"type": "SmoothL1Loss"}}


@pytest.mark.parametrize("losses", [FOR_RTDETR, RANKED], ids=["dense", "ranking"])
def test_rtdetr_takes_steps(losses, images):
    model = with_losses(RTDETR_NAME, losses)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values = []
    for _ in range(3):
        torch.manual_seed(0)
        loss, _ = model.loss(images)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        values.append(loss.item())
    assert values[2] < values[0]


def test_rtdetr_boxes_of_a_constant_in_pixels(images):
    """A loss with a constant in pixels, and one that takes the batch's size, of an image that is no square."""
    cfg = {"type": "NWDLoss", "constant": 5.0}
    model = with_losses(RTDETR_NAME, {"loss_giou": cfg})
    batch = {**images, "img": torch.nn.functional.interpolate(images["img"], (64, 96))}
    model.loss(batch)
    criterion = model.criterion
    assert criterion.image_size == (64, 96)
    pred, target = torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([[0.5, 0.25, 0.2, 0.2]])
    value = criterion._get_loss_bbox(pred, target)["loss_giou"]
    pixels = [torch.tensor([[48 - 9.6, y - 6.4, 48 + 9.6, y + 6.4]]) for y in (32.0, 16.0)]
    torch.testing.assert_close(value, 2 * build_loss(cfg)(*pixels))
    alone = PluginRTDETRLoss(model, {"loss_giou": {"type": "MPDIoULoss"}})
    with pytest.raises(ValueError, match=r"Set criterion\.image_size"):
        alone.corners(pred)
    alone.image_size = (64, 96)
    value = alone._get_loss_bbox(pred, target)["loss_giou"]
    torch.testing.assert_close(value, 2 * build_loss({"type": "MPDIoULoss", "image_size": (64, 96)})(*pixels))


@pytest.mark.parametrize("losses", [STOCK_RTDETR, {"loss_class": {"type": "RankSortLoss"}}], ids=["dense", "ranking"])
def test_rtdetr_no_objects_in_the_batch(losses, images):
    model = with_losses(RTDETR_NAME, losses)
    loss, items, gradients = loss_and_gradients(model, without_objects(images))
    assert loss.isfinite()
    assert items["giou_loss"] == items["l1_loss"] == 0
    assert all(g.isfinite().all() for g in gradients)


def test_rtdetr_state_stays_out_of_the_model(images, monkeypatch):
    averaged = []
    monkeypatch.setattr(core, "rank_mean", lambda tensor: averaged.append(tensor) or tensor)
    model = with_losses(
        RTDETR_NAME, {"loss_class": {"type": "GHMC", "momentum": 0.5}, "loss_giou": {"type": "WIoULoss"}}
    )
    names = set(model.state_dict())
    model.loss(images)
    mean = model.criterion.built["loss_giou"].mean.clone()
    assert mean != 1
    assert sum(tensor is model.criterion.built["loss_giou"].mean for tensor in averaged) == 1, "once a step"
    assert set(model.state_dict()) == names
    averaged.clear()
    with torch.no_grad():
        model.loss(images)
    assert not averaged
    assert torch.equal(model.criterion.built["loss_giou"].mean, mean)


def test_rtdetr_waits_for_other_ranks_equally_often(images, monkeypatch):
    """A batch without objects has no denoising queries, and so fewer calls of the class loss."""
    waited = []
    model = with_losses(RTDETR_NAME, {"loss_class": {"type": "SlideLoss"}, "loss_giou": {"type": "WIoULoss"}})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: waited.append(len(waited)))
    counts = []
    for objects in (slice(None), slice(0)):
        batch = {**images, **{name: images[name][objects] for name in ("cls", "bboxes", "batch_idx")}}
        waited.clear()
        model.loss(batch)
        counts.append(len(waited))
    assert counts[0] == counts[1] > 0


def test_rtdetr_slots_are_checked():
    words = (
        "no slot 'cls' of task='rtdetr'; it is one of task='detect' .*; the slots are loss_class, loss_bbox, loss_giou"
    )
    with pytest.raises(ValueError, match=words):
        make_trainer({"cls": {"type": "FocalLoss"}}, task="rtdetr")
    with pytest.raises(ValueError, match=r"'loss_bbox' slot of task='rtdetr' takes a regression loss"):
        install(detector(RTDETR_NAME), {"loss_bbox": {"type": "GIoULoss"}})
    assert load_losses({"loss_class": {"type": "VarifocalLoss"}}, "rtdetr")["loss_class"]["loss_weight"] == 1


@pytest.mark.parametrize(("name", "task"), [(RTDETR_NAME, "detect"), ("yolov8n", "rtdetr")])
def test_rtdetr_is_no_yolo(name, task, datasets, tmp_path):
    wanted = task_of(name)
    with pytest.raises(ValueError, match=f"model's task is '{wanted}'; write make_trainer.losses, task='{wanted}'"):
        (RTDETR if wanted == "rtdetr" else YOLO)(f"{name}.yaml").train(
            data=datasets["detect"], trainer=make_trainer({}, task), project=str(tmp_path), **SETTINGS
        )


@since("8.4.37", "it has no class weights")
def test_rtdetr_says_that_class_weights_do_nothing(datasets, tmp_path, log):
    settings = {**SETTINGS, "data": datasets["rtdetr"], "project": str(tmp_path), "cls_pw": 0.5, "epochs": 1}

    def stop(trainer):
        raise KeyboardInterrupt

    model = RTDETR(f"{RTDETR_NAME}.yaml")
    model.add_callback("on_train_start", stop)
    with pytest.raises(KeyboardInterrupt):
        model.train(trainer=make_trainer(FOR_RTDETR, "rtdetr"), **settings)
    assert any("cls_pw does nothing" in line for line in log)


@since("8.4.37", "it has no class weights")
@pytest.mark.parametrize("name", [name for name in TASK_MODELS if task_of(name) not in ("detect", "obb")])
def test_class_weights_and_extra_losses_of_a_task(name, batches):
    """Twice the class weights are twice the class loss; masks and keypoints do not notice that a loss was swapped."""
    model, batch = copy.deepcopy(detector(name)), batches[task_of(name)]
    stock = result(model, stock_criterion(model), batch)[1]
    plain = result(model, ours(model, losses_for(name)), batch)[1]
    model.class_weights = torch.full((10,), 2.0)
    doubled = result(model, ours(model, losses_for(name)), batch)[1]
    extra = set(stock) - {"box_loss", "cls_loss", "dfl_loss", "l1_loss"}
    assert extra
    for key in stock:
        torch.testing.assert_close(doubled[key], plain[key] * (2 if key == "cls_loss" else 1))
        assert torch.equal(plain[key], stock[key]) == (key not in ("box_loss", "cls_loss"))


TEXTS = {
    "yolov8s-worldv2": WorldModel,
    "yoloe-v8s": YOLOEModel,
    "yoloe-26n": YOLOEModel,
    "yoloe-v8s-seg": YOLOESegModel,
}


def text_model(name):
    torch.manual_seed(0)
    model = TEXTS[name](f"{name}.yaml", nc=10, verbose=False).train()
    model.args = get_cfg()
    return model


def texts(model, images):
    """Embeddings of as many texts as the head has classes, for each image."""
    return torch.nn.functional.normalize(torch.randn(images, head(model).nc, 512), dim=-1)


@pytest.mark.parametrize("name", TEXTS)
def test_models_with_texts_for_classes(name, batches):
    """World and YOLOE have the criterion of their task; only what the scores are made of differs."""
    model = text_model(name)
    batch = dict(batches["segment" if name.endswith("-seg") else "detect"])
    batch["txt_feats"] = texts(model, len(batch["img"]))
    before = named(model.loss(batch)[1], model)
    losses = {"cls": {"type": "BinaryCrossEntropyLoss"}, "box": {"type": "CIoULoss"}, "dfl": third(model)}
    install(model, losses)
    loss, items = model.loss(batch)
    assert all(isinstance(branch, PluginDetectionLoss) for branch in branches(model.criterion))
    # The second forward pass has moved the statistics of no batch norm that is in training: the same predictions.
    for key, value in before.items():
        torch.testing.assert_close(named(items, model)[key], value, rtol=1e-4, atol=1e-6)
    loss.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    install(model, LOSSES)
    assert named(model.loss(batch)[1], model)["cls_loss"] != before["cls_loss"]


class Alphabet:
    """In place of the text encoder, whose weights would be downloaded: a fixed random embedding for each text."""

    def tokenize(self, texts):
        return torch.tensor([sum(text.encode()) for text in texts])

    def encode_text(self, tokens):
        vectors = [torch.randn(512, generator=torch.Generator().manual_seed(int(token))) for token in tokens]
        return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)


@pytest.mark.slow
def test_world_trainer(datasets, tmp_path, monkeypatch):
    """Ultralytics' trainer for texts as the base: two epochs with validation, and a checkpoint with our record."""
    texts = SimpleNamespace(build_text_model=lambda *_, **__: Alphabet())
    monkeypatch.setitem(sys.modules, "ultralytics.nn.text_model", texts)
    seen = []
    yolo = YOLO("yolov8s-worldv2.yaml")
    yolo.add_callback("on_train_batch_end", lambda t: seen.append(t.model.criterion))
    yolo.add_callback("on_fit_epoch_end", lambda t: seen.append(t.ema.ema.criterion))
    trainer = make_trainer(LOSSES, trainer=WorldTrainer)
    yolo.train(data=datasets["detect"], epochs=2, trainer=trainer, project=str(tmp_path), name="run", **SETTINGS)
    assert len(seen) >= 6  # four steps and two validations, and that of best.pt
    assert all(isinstance(c, PluginDetectionLoss) and c.losses == load_losses(LOSSES) for c in seen)
    assert trained_losses(tmp_path / "run" / "weights" / "best.pt")["losses"] == load_losses(LOSSES)


def model_of(head_name, stem):
    """The nano model of a file, with a decoder of a few channels for RT-DETR."""
    cfg = {**model_cfg(stem), "scale": "n"}
    of_texts = {"WorldDetect": WorldModel, "YOLOEDetect": YOLOEModel}
    of_texts |= dict.fromkeys(["YOLOESegment", "YOLOESegment26"], YOLOESegModel)
    torch.manual_seed(0)
    model = of_texts.get(head_name, CLASSES[model_task(cfg)])(cfg, nc=10, verbose=False).train()
    model.args, model.nc = get_cfg(), 10
    return model


@pytest.mark.parametrize(("task", "head_name"), ultralytics_detectors())
def test_every_detector_of_the_readme_takes_steps(task, head_name, batches):
    """A model of each task and head of the table, with a loss of ours in every slot."""
    stems = ultralytics_detectors()[task, head_name]
    nano = next(stem for stem in stems if "n" in yaml_model_load(f"{stem}.yaml").get("scales", {}))
    model, batch = model_of(head_name, nano), dict(batches[task])
    assert type(head(model)).__name__ == head_name
    if hasattr(model, "get_text_pe"):
        batch["txt_feats"] = texts(model, len(batch["img"]))
    losses = {**FOR_RTDETR, "loss_bbox": {"type": "SmoothL1Loss"}} if task == "rtdetr" else {"dfl": third(model)}
    losses |= {} if task == "rtdetr" else losses_for("-obb" if task == "obb" else "")
    assert losses.keys() == SLOTS[task].keys()
    install(model, losses)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = [parameter.detach().clone() for parameter in trained]
    for _ in range(3):
        loss, items = model.loss(batch)
        assert all(value.isfinite() for value in named(items, model).values())
        optimizer.zero_grad()
        loss.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
    assert all(part.losses == load_losses(losses, task) for part in branches(model.criterion))
    moved = [not torch.equal(a, b) for a, b in zip(weights, trained, strict=True)]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("class_weight", {"type": "QualityFocalLoss", "class_weight": [2.0] * 10}),
        ("class_weight", {"type": "SlideLoss", "base": {"type": "FocalLoss", "class_weight": "effective"}}),
        ("class_weight", {"type": "CrossEntropyLoss", "use_sigmoid": True, "class_weight": [2.0] * 10}),
        ("alpha", {"type": "FocalLoss", "alpha": [0.5] * 10}),
        ("pos_weight", {"type": "BinaryCrossEntropyLoss", "pos_weight": [2.0] * 10}),
    ],
)
def test_weights_of_classes_that_are_texts_are_refused(name, settings):
    """Where the channels are those of the prompts of an image; not where the texts are fused into the head."""
    model = text_model("yoloe-v8s").eval()
    for losses in (settings, {"type": "ScheduledLoss", "losses": [{"type": "GHMC"}, settings], "at": [1]}):
        with pytest.raises(ValueError, match=f"are texts, which differ from image to image: leave {name} out"):
            install(model, {"cls": losses})
    model.set_classes([str(number) for number in range(10)], torch.zeros(1, 10, head(model).embed))
    head(model).fuse(model.pe)
    install(model, {"cls": settings})


def test_visual_prompts_are_refused(batches):
    """They have a criterion of their own, and would train the stock losses without a word."""
    model = text_model("yoloe-v8s")
    install(model, LOSSES)
    with pytest.raises(ValueError, match="visual prompts"):
        model.loss({**batches["detect"], "visuals": torch.zeros(8, 1, 8, 8)})


@since("8.4.190", "it asks a text encoder, whose weights would be downloaded")
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_linear_probing_goes_on_with_its_weights(task):
    """It must have some: here those of a head that its texts are fused into, as another such training leaves it."""
    base = {"detect": yoloe.YOLOEPETrainer, "segment": yoloe.YOLOEPESegTrainer}[task]
    trainer = object.__new__(make_trainer({"cls": {"type": "RankSortLoss"}}, task, trainer=base))
    names = {number: str(number) for number in range(10)}
    trainer.data, trainer.args, trainer.resume = {"nc": 10, "channels": 3, "names": names}, get_cfg(), False
    trainer.args.task = task
    name = "yoloe-v8s" if task == "detect" else "yoloe-v8s-seg"
    weights = text_model(name).eval()
    weights.set_classes(list(names.values()), torch.zeros(1, 10, head(weights).embed))
    head(weights).fuse(weights.pe)
    for bias in class_biases(head(weights)):
        torch.nn.init.constant_(bias, -3.0)
    model = trainer.get_model(f"{name}.yaml", weights=weights, verbose=False)
    assert all((bias == -3).all() for bias in class_biases(head(model)))


def test_any_trainer_can_be_the_base():
    class Mine(WorldTrainer):
        pass

    trainer = make_trainer(LOSSES, trainer=Mine)
    assert issubclass(trainer, Mine)
    assert trainer.preprocess_batch is WorldTrainer.preprocess_batch


@pytest.mark.parametrize("name", ["yolov8n", "yolo26n-seg", "yolov8n-pose", RTDETR_NAME, *TEXTS])
def test_a_head_starts_at_the_prior(name, batches):
    model = text_model(name) if name in TEXTS else copy.deepcopy(detector(name))
    count = len(class_biases(head(model)))
    assert count == (6 if "26" in name else 3)  # of RT-DETR, the encoder's and two layers'
    start_at_prior(model, 0.01)
    for bias in class_biases(head(model)):
        torch.testing.assert_close(bias, torch.full_like(bias, math.log(0.01 / 0.99)))
    if name in TEXTS:  # scores are similarities, to random texts here: no small ones
        levels = [*head(model).cv4, *(getattr(head(model), "one2one_cv4", None) or ())]
        assert [id(level.bias) for level in levels] == [id(bias) for bias in class_biases(head(model))]
        return
    found = model(batches[task_of(name)]["img"])
    scores = found[1] if name == RTDETR_NAME else found.get("one2many", found)["scores"]
    assert 0.003 < scores.sigmoid().median() < 0.03


BARE = {DetectionModel: "yolov8n", SegmentationModel: "yolo26n-seg", PoseModel: "yolov8n-pose", OBBModel: "yolov8n-obb"}


@pytest.mark.parametrize("cls", BARE, ids=lambda cls: cls.__name__)
def test_a_bare_model_without_training_arguments(cls, batches, log):
    """The value is that of the same model with Ultralytics' default arguments, and the gains are said."""
    name = BARE[cls]
    batch, losses = batches[task_of(name)], losses_for(name)
    expected = with_losses(name, losses).loss(batch)
    model = copy.deepcopy(detector(name))
    del model.args
    assert model.__class__ is cls
    install(model, losses)
    loss, items = model.loss(batch)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(items, expected[1])
    lines = [line for line in log if "not in training" in line]
    assert lines == [
        "detloss_plugins: this model is not in training; its losses have the gains cls 0.5, box 7.5, dfl 1.5"
    ]
    assert not hasattr(model, "args"), "what was lent is taken back"


def test_plugin_detection_loss_on_its_own(batches, log):
    """On a model as YOLO("x.yaml") has it, whose arguments are a dict, also with gains of its own and foreign keys."""
    batch = batches["detect"]
    model = YOLO("yolov8n.yaml").model.train()
    assert isinstance(model.args, dict)
    found = model(batch["img"])
    items = named(PluginDetectionLoss(model, losses=LOSSES)(found, batch)[1], model)
    model.args = {"box": 15.0, "no_longer_an_argument": 1}
    doubled = named(PluginDetectionLoss(model, losses=LOSSES)(found, batch)[1], model)
    assert model.args == {"box": 15.0, "no_longer_an_argument": 1}
    torch.testing.assert_close(doubled["box_loss"], 2 * items["box_loss"])
    torch.testing.assert_close(doubled["cls_loss"], items["cls_loss"])
    assert [line.rsplit("gains ")[1] for line in log if "gains" in line] == [
        "cls 0.5, box 7.5, dfl 1.5",
        "cls 0.5, box 15, dfl 1.5",
    ]


@pytest.mark.slow
@since("8.4.129", "its tuner takes no trainer")
@pytest.mark.parametrize("name", ["yolov8n", "yolo26n-seg", "yolov8n-pose", "yolov8n-obb", RTDETR_NAME])
def test_tuning_trains_our_losses(name, datasets, tmp_path):
    """Each training of the search has our losses, and the values that the search chose."""
    task, seen = task_of(name), []
    trainer = make_trainer(losses_for(name), task)

    class Seen(trainer):
        def train(self):
            super().train()
            seen.append((trained_losses(self.best)["losses"], self.args.lr0))

    search = {"iterations": 2, "space": {"lr0": (1e-4, 1e-3)}, "data": datasets[task], "project": str(tmp_path)}
    settings = {key: value for key, value in SETTINGS.items() if key != "lr0"}
    tune((RTDETR if task == "rtdetr" else YOLO)(model_file(name, tmp_path)), Seen, epochs=1, **search, **settings)
    assert [losses for losses, _ in seen] == [trainer.plugin_losses] * 2
    (results,) = tmp_path.rglob("tune_results.ndjson")
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [line["hyperparameters"]["lr0"] for line in lines] == pytest.approx([lr0 for _, lr0 in seen])
    assert seen[0][1] != seen[1][1]


@since("8.4.129", "its tuner takes no trainer")
def test_tuning_by_ray_is_refused(monkeypatch):
    """It would tune the stock losses without a word."""
    from ultralytics.utils import tuner

    monkeypatch.setattr(tuner, "run_ray_tune", lambda *_, **__: None)
    with pytest.raises(ValueError, match="leave use_ray out"):
        tune(YOLO("yolov8n.yaml"), make_trainer(LOSSES), iterations=1, use_ray=True, data="coco8.yaml")


@since("8.4.129", "its tuner takes no trainer")
def test_tuning_leaves_the_stock_class(datasets):
    from ultralytics.engine import trainer as engine

    before = engine.MultiTrainer
    with pytest.raises(SyntaxError, match="nonsense"):
        tune(YOLO("yolov8n.yaml"), make_trainer({}), data=datasets["detect"], nonsense=1)
    assert engine.MultiTrainer is before


@pytest.mark.parametrize("task", ["segment", "pose"])
def test_labels_of_the_other_tasks(task, tmp_path, monkeypatch):
    """The outline holds the ink and lies in the box; the four keypoints are on the box's sides."""
    monkeypatch.setattr(digits, "IMAGES", {"train": 3, "val": 1})
    monkeypatch.setenv("DETLOSS_PLUGINS_CACHE", str(tmp_path))
    plain, own = digits.build_digits(), digits.build_digits(task)
    for number in range(3):
        name = f"train/{number:04d}"
        assert (plain / "images" / f"{name}.png").read_bytes() == (own / "images" / f"{name}.png").read_bytes()
        boxes = [line.split() for line in (plain / "labels" / f"{name}.txt").read_text(encoding="utf-8").splitlines()]
        lines = [line.split() for line in (own / "labels" / f"{name}.txt").read_text(encoding="utf-8").splitlines()]
        for box, line in zip(boxes, lines, strict=True):
            assert line[0] == box[0]
            if task == "pose":
                assert line[1:5] == box[1:]
                points = torch.tensor(list(map(float, line[5:]))).view(4, 3)
                assert (points[:, 2] == 2).all()
            else:
                points = torch.tensor(list(map(float, line[1:]))).view(-1, 2)
            x, y, w, h = map(float, box[1:])
            low, high = points[:, :2].amin(0), points[:, :2].amax(0)
            assert (low >= torch.tensor([x - w / 2, y - h / 2]) - 1e-5).all()
            assert (high <= torch.tensor([x + w / 2, y + h / 2]) + 1e-5).all()
            assert ((high - low) > 0.6 * torch.tensor([w, h])).all()
