"""The Ultralytics adapter on the real trainer: scale, parity, validation, checkpoints, resume, workers."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.ultralytics import (
    LOSSES,
    SETTINGS,
    TASK_MODELS,
    Interrupted,
    assert_same,
    branches,
    called,
    detector,
    head,
    in_slot,
    interrupt,
    known,
    losses_for,
    model_file,
    named,
    ours,
    result,
    since,
    steps,
    stock_criterion,
    task_of,
    third,
    wide,
    without_objects,
)
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.dist import generate_ddp_file
from ultralytics.utils.loss import VarifocalLoss

from detloss_plugins import engine
from detloss_plugins.adapters.ultralytics import (
    SLOTS,
    PluginDetectionLoss,
    PluginRTDETRLoss,
    criterion_class,
    criterion_state,
    default_gain,
    default_prior,
    describe,
    install,
    load_losses,
    make_trainer,
    trained_losses,
)
from detloss_plugins.adapters.ultralytics.compat import E2ELoss
from detloss_plugins.adapters.ultralytics.config import GAINS, PRIORS
from detloss_plugins.configs import path_of
from detloss_plugins.losses import APLoss, FocalLoss, L1Loss
from detloss_plugins.registry import MODELS, build_loss, loss_class, registered_losses

# The stock loss of oriented boxes has a floor on their size, which is not ours to repeat.
STOCK_BOX = {"box": {"type": "CIoULoss"}}


@pytest.fixture(scope="module")
def data(datasets):
    return datasets["detect"]


@pytest.fixture(scope="module")
def batch(batches):
    return batches["detect"]


PLUGINS = (PluginDetectionLoss, PluginRTDETRLoss)


@pytest.fixture(scope="module", params=TASK_MODELS)
def stock(request, batches):
    """A detector, a batch, and what its stock criterion gives."""
    model, batch = detector(request.param), batches[task_of(request.param)]
    return request.param, model, batch, result(model, stock_criterion(model), batch)


def test_stock_equivalent_losses_reproduce_stock(stock):
    name, model, batch, stock = stock
    box = {} if task_of(name) == "obb" else STOCK_BOX
    losses = {"cls": {"type": "BinaryCrossEntropyLoss"}, **box, "dfl": third(model)}
    mine = result(model, ours(model, losses), batch)
    torch.testing.assert_close(mine[0], stock[0], rtol=2e-6, atol=0)
    # Float tolerance on the scale of the whole gradient: biases before a batch norm have rounding noise only.
    largest = max(g.abs().max().item() for g in stock[2])
    for a, b in zip(mine[2], stock[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6 * largest)


@pytest.mark.parametrize("name", known("yolo26n", "yolo26n-obb"))
def test_a_head_without_bins_regresses_shares_of_the_images_sides(name, batches):
    model, batch = detector(name), wide(batches[task_of(name)])
    mine, stock = (
        called(criterion, model, batch) for criterion in (ours(model, {"dfl": third(model)}), stock_criterion(model))
    )
    torch.testing.assert_close(mine[0], stock[0], rtol=2e-6, atol=0)


def test_absent_slots_are_stock_bit_for_bit(stock):
    name, model, batch, stock = stock
    assert_same(result(model, ours(model, {}), batch), stock, rtol=0, atol=0)
    for slot, cfg in {**losses_for(name), "dfl": {**third(model), "loss_weight": 2.0}}.items():
        got, want = called(ours(model, {slot: cfg}), model, batch)[1], stock[1]
        assert list(got) == list(want)
        changed = [key for key in want if not torch.equal(got[key], want[key])]
        assert changed == [{"dfl": "dfl_loss" if head(model).reg_max > 1 else "l1_loss"}.get(slot, f"{slot}_loss")]


def test_class_loss_is_summed_over_anchors_and_divided_by_the_scores(batch):
    """Upstream's VarifocalLoss averages over the anchors; times their number it is the sum that belongs here."""
    model = detector("yolov8n")
    criterion = DetectionModel.init_criterion(model)
    seen = {}
    criterion.bce.register_forward_pre_hook(lambda _, args: seen.update(scores=args[0], target=args[1]))
    result(model, criterion, batch)
    scores, target = seen["scores"].detach(), seen["target"]
    varifocal = VarifocalLoss()(scores, target, (target > 0).float()) * scores.shape[1]
    expected = varifocal / target.sum().clamp(min=1) * model.args.cls * 3.0
    items = result(model, ours(model, {"cls": {"type": "VarifocalLoss", "loss_weight": 3.0}}), batch)[1]
    torch.testing.assert_close(items["cls_loss"], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "power"), [("MALoss", 1.5), ("IABCELoss", 2.0)])
def test_losses_of_matched_boxes_get_the_scores_of_the_assigner(name, power, batch):
    """As a dense target, from which a positive is told by being above 0."""
    model, seen = detector("yolov8n"), {}
    criterion = DetectionModel.init_criterion(model)
    criterion.bce.register_forward_pre_hook(lambda _, args: seen.update(scores=args[0], target=args[1]))
    result(model, criterion, batch)
    scores, target = seen["scores"].detach(), seen["target"]
    p, positive = scores.sigmoid(), target > 0
    assert ((0 < target) & (target < 1)).any()
    wanted = target**power if name == "MALoss" else (p**0.25 * target**0.75).clamp(min=0.01)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(scores, positive * wanted, reduction="none")
    expected = (torch.where(positive, 1.0, p**power) * bce).sum() / target.sum().clamp(min=1) * model.args.cls * 16
    items = result(model, ours(model, {"cls": {"type": name}}), batch)[1]
    torch.testing.assert_close(items["cls_loss"], expected, rtol=1e-5, atol=0)


NO_CLASS_WEIGHTS = since("8.4.37", "it has no class weights")


@NO_CLASS_WEIGHTS
@pytest.mark.parametrize(
    "cls", ["VarifocalLoss", "QualityFocalLoss", "FocalLoss", "BinaryCrossEntropyLoss", "APLoss", "DRLoss"]
)
def test_class_weights_keep_working(cls, batch):
    model = detector("yolov8n")
    criteria = []
    for weights in (None, torch.full((10,), 2.0)):
        model.class_weights = weights
        criteria.append(ours(model, {"cls": {"type": cls}}))
    model.class_weights = None
    plain, doubled = (result(model, criterion, batch)[1] for criterion in criteria)
    torch.testing.assert_close(doubled["cls_loss"], 2 * plain["cls_loss"])
    torch.testing.assert_close(doubled["box_loss"], plain["box_loss"])


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param(None, id="plain"),
        pytest.param(torch.ones(10), id="class weights of one", marks=NO_CLASS_WEIGHTS),
    ],
)
def test_a_loss_with_a_normaliser_of_its_own_keeps_it(weights, batch):
    """The number of scores that count, whatever the criterion divides by; under autocast too."""
    model, seen = detector("yolov8n"), []
    model.class_weights = weights
    criterion = ours(model, {"cls": {"type": "GHMC", "loss_weight": 3.0}})
    model.class_weights = None
    slot = criterion.bce
    criterion.bce = lambda *args: seen.append(args) or slot(*args)
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            items = result(model, criterion, batch)[1]
            scores, target = seen.pop()
        assert scores.dtype == (torch.bfloat16 if half else torch.float32)
        expected = model.args.cls * criterion.built["cls"](scores, target)
        torch.testing.assert_close(items["cls_loss"], expected.detach(), rtol=1e-3 if half else 1e-5, atol=0)


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param(None, id="plain"),
        pytest.param(torch.arange(1.0, 11), id="class weights", marks=NO_CLASS_WEIGHTS),
    ],
)
def test_a_loss_with_a_normaliser_of_its_own_keeps_it_in_another(weights, batch):
    """Beside a loss without one, in a JointLoss or two; and as the base of another."""
    model = detector("yolov8n")

    def cls_loss(cfg):
        model.class_weights = weights
        criterion = ours(model, {"cls": cfg})
        model.class_weights = None
        return result(model, criterion, batch)[1]["cls_loss"]

    ghm, bce = {"type": "GHMC", "loss_weight": 3.0}, {"type": "BinaryCrossEntropyLoss"}
    alone = cls_loss(ghm)
    inner = {"type": "JointLoss", "losses": [bce, ghm], "loss_weight": 0.5}
    torch.testing.assert_close(cls_loss(inner), 0.5 * (alone + cls_loss(bce)))
    outer = {"type": "JointLoss", "losses": [inner, bce], "loss_weight": 2.0}
    torch.testing.assert_close(cls_loss(outer), alone + 3 * cls_loss(bce))
    wrapped = {"type": "ConfidenceWeightedLoss", "base": ghm, "power": 0.0, "loss_weight": 1.0}
    assert 0.9 * alone < cls_loss(wrapped) < alone  # (1 - Q_fg)^0 Q_bg is about 1 at first
    assert 0.9 * alone < cls_loss({"type": "SlideLoss", "base": ghm}) < 3 * alone  # its weights are 1 to e


def test_a_rebuilt_criterion_compiles_nothing_again(batch, monkeypatch):
    """A loss has one kernel for training and one for validation, and every criterion of the process shares them."""
    made, losses = [], {**LOSSES, "dfl": {"type": "DistributionFocalLoss"}}
    monkeypatch.setattr(engine, "_kernels", {})
    monkeypatch.setattr(torch, "compile", lambda function, **_: made.append(function) or function)
    model, plain = (copy.deepcopy(detector("yolov8n")) for _ in range(2))
    install(plain, losses)
    install(model, {slot: {**cfg, "compile": True} for slot, cfg in losses.items()})
    for count in (1, 2, 2):
        loss = model.loss(batch)[0]
        loss.sum().backward()
        torch.testing.assert_close(loss, plain.loss(batch)[0])
        assert len(made) == count * len(losses)
        ema = copy.deepcopy(model)
        ema.criterion = None  # as the trainer does before each validation
        with torch.no_grad():
            torch.testing.assert_close(ema.loss(batch)[0], loss)
        assert len(made) == 2 * len(losses)
    install(model, {slot: {**cfg, "compile": True, "loss_weight": 0.5} for slot, cfg in losses.items()})
    model.loss(batch)[0].sum().backward()
    assert len(made) == 2 * len(losses), "a weight is no part of a kernel"


@pytest.mark.parametrize("name", ["yolov8n", "yolov8n-obb", "yolov8n-rtdetr"])
def test_compile_is_of_every_loss(name):
    model, losses = detector(name), losses_for(name)
    kind = type(stock_criterion(model))
    kind = PluginRTDETRLoss if task_of(name) == "rtdetr" else criterion_class(kind)
    for compile in (False, True):
        installed = copy.deepcopy(model)
        install(installed, losses, compile=compile)
        criteria = kind(model, losses=losses, compile=compile), installed.init_criterion()
        trainer = make_trainer(losses, task_of(name), compile=compile)
        for found in (*(criterion.losses for criterion in criteria), trainer.plugin_losses):
            assert {cfg.get("compile", False) for cfg in found.values()} == {compile}


@pytest.mark.parametrize("name", ["yolo26n", "yolo26n-obb"])
def test_end_to_end_head(name):
    model = detector(name)
    criterion = ours(model, losses_for(name))
    assert isinstance(criterion, E2ELoss)
    assert all(isinstance(branch, PluginDetectionLoss) for branch in branches(criterion))
    stock = stock_criterion(model)
    for a, b in zip(branches(criterion), branches(stock), strict=True):
        assert isinstance(a, type(b))
        assert (a.assigner.topk, a.assigner.topk2) == (b.assigner.topk, b.assigner.topk2)
    for _ in range(3):
        criterion.update()
        stock.update()
        assert (criterion.o2m, criterion.o2o) == (stock.o2m, stock.o2o)
    assert criterion.o2m < 0.8


CLASS_LOSSES = [
    cls for cls in registered_losses().values() if cls.facts.family in SLOTS["detect"]["cls"] and cls.make().use_sigmoid
]
DOCUMENTED = """BinaryCrossEntropyLoss BalancedCrossEntropyLoss FocalLoss ModifiedCrossEntropyLoss QualityFocalLoss
VarifocalLoss GeneralizedFocalLoss ConfidenceWeightedLoss JointLoss""".split()


@pytest.fixture(scope="module")
def found(batch):
    """What a head predicts for the batch."""
    return detector("yolov8n")(batch["img"])


@pytest.mark.parametrize("cls", CLASS_LOSSES, ids=lambda cls: cls.__name__)
def test_every_class_loss_has_a_gradient(cls, found, batch):
    """Twice, as some have a state."""
    model = detector("yolov8n")
    criterion = ours(model, {"cls": in_slot(cls)})
    for _ in range(2):
        loss, items = criterion(found, batch)
        assert named(items, model)["cls_loss"] > 0
        slopes = torch.autograd.grad(loss.sum(), [level[-1].weight for level in head(model).cv3], retain_graph=True)
        assert all(slope.isfinite().all() for slope in slopes)
        assert slopes[0].abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTED)
def test_losses_of_the_documents_fall_in_training(name, batch, warm):
    model = copy.deepcopy(warm)
    values = steps(model, ours(model, {"cls": in_slot(registered_losses()[name])}), batch, 30)
    assert sum(values[-5:]) < 0.9 * sum(values[:5]), values


@pytest.mark.parametrize(
    "cfg",
    [
        {"type": "SeesawLoss"},
        {"type": "KLDivLoss"},
        {"type": "GaussianFocalLoss"},
        {"type": "CrossEntropyLoss"},
        {"type": "PolyLoss", "use_sigmoid": False},
        {"type": "ModifiedCrossEntropyLoss", "activation": "softmax"},
    ],
    ids=lambda cfg: cfg["type"],
)
def test_class_losses_without_a_meaning_for_independent_sigmoids(cfg):
    with pytest.raises(ValueError, match=r"takes a classification or ranking loss|independent sigmoids"):
        load_losses({"cls": cfg})


class Own(FocalLoss):
    """A user's, which says nothing of its gain."""


class Stated(APLoss):
    yolo_gain, yolo_prior = 3.0, 0.2


def test_default_gains_and_priors():
    """Of the nearest class that is known, or what a class states itself; every class that is known exists."""
    assert (default_gain(FocalLoss), default_gain(Own), default_gain(Own()), default_gain(L1Loss)) == (16, 16, 16, 1)
    assert (default_prior(APLoss), default_prior(Own), default_prior(loss_class("DRLoss")())) == (0.01, None, 0.1)
    assert [(default_gain(loss), default_prior(loss)) for loss in (Stated, Stated())] == [(3, 0.2)] * 2
    joint = build_loss({"type": "JointLoss", "losses": [{"type": "DRLoss"}, {"type": "APLoss"}]})
    assert (default_gain(joint), default_prior(joint)) == (1, 0.1)
    focal = {"type": "FocalLoss"}
    for kind, base, gain in [
        ("SlideLoss", focal, 16),
        ("SlideLoss", {"type": "BinaryCrossEntropyLoss"}, 1),
        ("SlideLoss", {**focal, "loss_weight": 16.0}, 1),  # which is weighed already
        ("ConfidenceWeightedLoss", focal, 16),
        ("ConfidenceWeightedLoss", {"type": "SlideLoss", "base": focal}, 16),
        ("ConfidenceWeightedLoss", {"type": "BinaryCrossEntropyLoss"}, 4),
        ("WIoULoss", {"type": "EIoULoss"}, 1),
    ]:
        assert default_gain(build_loss({"type": kind, "base": base})) == gain, (kind, base)
    bases = {base.__name__ for cls in registered_losses().values() for base in cls.__mro__}
    assert {*GAINS, *PRIORS} <= bases


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[since("8.4.1", "its own loss fails there")] if task_of(name) == "segment" else [])
        for name in TASK_MODELS
    ],
)
def test_no_objects_in_the_batch(name, batches):
    model, batch = detector(name), batches[task_of(name)]
    empty = without_objects(batch)
    loss, _, gradients = result(model, ours(model, {**losses_for(name), "dfl": third(model)}), empty)
    assert loss.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


def test_third_slot_suits_the_head():
    with pytest.raises(ValueError, match=r"reg_max=1.*L1Loss"):
        install(detector("yolo26n"), {"dfl": {"type": "DistributionFocalLoss"}})
    with pytest.raises(ValueError, match="16 bins"):
        install(detector("yolov8n"), {"dfl": {"type": "SmoothL1Loss"}})
    install(copy.deepcopy(detector("yolo26n")), {"dfl": {"type": "SmoothL1Loss", "beta": 0.01}})


@pytest.mark.parametrize(
    ("losses", "error", "words"),
    [
        ({"clas": {"type": "FocalLoss"}}, ValueError, "no slot 'clas'; the slots are cls, box, dfl"),
        ({"cls": {"type": "FocalLos"}}, ValueError, "did you mean FocalLoss"),
        ({"cls": {"type": "FocalLoss", "gama": 2.0}}, TypeError, r"'gama'; it accepts .*gamma"),
        ({"cls": {"type": "GIoULoss"}}, ValueError, "GIoULoss is a box loss"),
        ({"dfl": {"type": "DistributionFocalLoss", "bins": [0, 2, 4]}}, ValueError, "decode by bins 0, 1, 2 and so on"),
        (
            {"box": {"type": "GWDLoss"}},
            ValueError,
            r"'box' slot of task='detect' takes a box loss \(.*CIoULoss.*\), but GWDLoss .* for task='obb'",
        ),
        ({"cls": {"type": "FocalLoss", "use_sigmoid": False}}, ValueError, "use_sigmoid=True"),
        ({"cls": {"type": "FocalLoss", "activated": True}}, ValueError, "logits"),
        (
            {"cls": {"type": "SlideLoss", "base": {"type": "FocalLoss", "activated": True}}},
            ValueError,
            "out of FocalLoss",
        ),
        ({"box": {"type": "CIoULoss", "reduction": "none"}}, ValueError, 'leave reduction="none" out of CIoULoss'),
        (
            {"cls": {"type": "JointLoss", "losses": [{"type": "FocalLoss", "reduction": "sum"}]}},
            ValueError,
            'leave reduction="sum" out of FocalLoss',
        ),
        ({"box": "GIoULoss"}, TypeError, "box needs a dict .*, not 'GIoULoss'; left out, it keeps"),
        ("nothing.yaml", FileNotFoundError, "^there is no nothing.yaml$"),
    ],
)
def test_mistakes_fail_before_the_data_is_touched(losses, error, words, tmp_path):
    with pytest.raises(error, match=words):
        YOLO("yolov8n.yaml").train(data="no-such-data.yaml", trainer=make_trainer(losses), project=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_oriented_boxes_take_rotated_losses():
    joint = {"type": "JointLoss", "losses": [{"type": "GIoULoss"}]}
    for cfg in ({"type": "GIoULoss"}, joint):
        words = rf"takes a rotated loss \(.*GWDLoss.*\), but {cfg['type']} is a box loss, for task='detect'"
        with pytest.raises(ValueError, match=words):
            make_trainer({"box": cfg}, task="obb")
        with pytest.raises(ValueError, match=words):
            install(detector("yolov8n-obb"), {"box": cfg})
    make_trainer({"box": {**joint, "losses": [{"type": "GWDLoss"}, {"type": "KLDLoss"}]}}, task="obb")
    with pytest.raises(ValueError, match="the tasks detect, segment, pose, obb, rtdetr, not for 'classify'"):
        make_trainer({}, task="classify")


@pytest.mark.parametrize(("model", "given", "wanted"), [("yolov8n-obb", "detect", "obb"), ("yolov8n", "obb", "detect")])
def test_a_model_of_another_task_fails_before_the_data_is_touched(model, given, wanted, datasets, tmp_path):
    words = f"model's task is '{wanted}'; write make_trainer.losses, task='{wanted}'"
    trainer = make_trainer({"cls": {"type": "VarifocalLoss"}}, task=given)
    with pytest.raises(ValueError, match=words):
        YOLO(f"{model}.yaml").train(data="no-such-data.yaml", trainer=trainer, project=str(tmp_path))
    assert not list(tmp_path.iterdir())
    # A trainer that is used on its own is told no task.
    overrides = {**SETTINGS, "data": datasets[given], "model": f"{model}.yaml", "project": str(tmp_path)}
    with pytest.raises(ValueError, match=words):
        trainer(overrides=overrides).train()


def test_a_model_of_a_task_without_slots_fails_without_advice_to_name_it(tmp_path):
    with pytest.raises(ValueError, match=r"Losses can be swapped for the tasks detect.*, not for 'classify'"):
        YOLO("yolov8n-cls.yaml").train(data="no-such-data.yaml", trainer=make_trainer({}), project=str(tmp_path))


SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "ultralytics").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_of_losses_suit_their_task(path):
    task = next((task for task in ("rtdetr", "obb") if path.stem.startswith(task)), "detect")
    losses = load_losses(path, task)
    assert bool(losses) == (path.stem != "stock")
    assert all("loss_weight" in cfg for cfg in losses.values())
    assert load_losses(path.stem, task) == losses, "by its name, as for the command"
    assert load_losses(yaml.safe_load(path.read_text(encoding="utf-8")), task) == losses


def test_a_name_that_no_shipped_file_has():
    with pytest.raises(ValueError, match="no config named 'qfk'; did you mean qfl"):
        make_trainer("qfk")
    with pytest.raises(ValueError, match=r"^retinanet_r18_fpn_digits is a config of MMDetection"):
        make_trainer("retinanet_r18_fpn_digits")
    with pytest.raises(ValueError, match=r"CIoULoss is a loss: .*; the slots are cls, box, dfl"):
        make_trainer("CIoULoss")


def test_a_word_too_long_for_a_file():
    with pytest.raises(ValueError, match=r"There is no config named '=+'"):
        path_of("=" * 300)


def test_a_file_without_a_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "stock"):
        Path(name).write_text(yaml.safe_dump(LOSSES), encoding="utf-8")
    assert load_losses("mine") == load_losses(Path("stock")) == load_losses(LOSSES)
    assert load_losses("stock") == {}, "a word is the name of a shipped file where it can be"


def test_compiled_is_said_of_what_is(monkeypatch):
    """Not of a loss that does not state that its rows are apart, of one that ranks them, or of a part."""
    monkeypatch.setitem(MODELS.module_dict, "Own", type("Own", (FocalLoss,), {"fn": FocalLoss.fn}))
    joint = {"type": "JointLoss", "losses": [{"type": "FocalLoss"}]}
    for cfg in ({"type": "AdaptiveThresholdFocalLoss"}, joint, {"type": "Own"}, {"type": "APLoss"}):
        line = describe(load_losses({"cls": cfg}, compile=True), get_cfg())[0]
        assert (", compiled" in line) == (cfg["type"] not in ("Own", "APLoss")), line
    part = {"type": "FocalLoss", "compile": True}
    for cfg, said in (
        ({**joint, "losses": [part]}, False),
        ({"type": "ScheduledLoss", "losses": [part, part], "at": [1]}, True),
    ):
        assert (", compiled" in describe(load_losses({"cls": cfg}), get_cfg())[0]) == said


def test_a_yaml_file_and_a_dict_are_the_same(tmp_path):
    path = tmp_path / "losses.yaml"
    path.write_text(yaml.safe_dump(LOSSES), encoding="utf-8")
    assert (
        make_trainer(path).plugin_losses == make_trainer(str(path)).plugin_losses == make_trainer(LOSSES).plugin_losses
    )


def test_default_gain_and_override():
    gain = load_losses(LOSSES)["cls"]["loss_weight"]
    assert gain > 1, "varifocal terms are smaller than BCE's"
    assert load_losses({"cls": {"type": "VarifocalLoss", "loss_weight": 1.5}})["cls"]["loss_weight"] == 1.5
    assert LOSSES == {"cls": {"type": "VarifocalLoss"}, "box": {"type": "EIoULoss"}}, "the caller's dict is untouched"
    lines = describe(load_losses(LOSSES), get_cfg())
    settings = "alpha=0.75, gamma=2.0, iou_weighted=True, detach_weight=False"
    assert lines[0] == f"cls: VarifocalLoss({settings}), weight {gain:g} x gain 0.5"
    assert lines[2] == "dfl: stock loss x gain 1.5"
    slide = load_losses({"cls": {"type": "SlideLoss", "base": {"type": "FocalLoss", "alpha": None}}})
    assert (
        "SlideLoss(authors_code=False, decay=None, tau=2000.0, FocalLoss(gamma=2.0, alpha=None"
        in describe(slide, get_cfg())[0]
    )


@pytest.mark.parametrize(
    ("slot", "loss", "said"),
    [
        ("cls", {"type": "FocalLoss", "loss_weight": 1}, "weight 1 (default 16) x gain"),
        ("cls", {"type": "FocalLoss", "loss_weight": 65}, "weight 65 (default 16) x gain"),
        ("cls", {"type": "FocalLoss", "loss_weight": 4}, "weight 4 x gain"),
        ("cls", {"type": "FocalLoss", "loss_weight": 64}, "weight 64 x gain"),
        ("cls", {"type": "BinaryCrossEntropyLoss", "loss_weight": 1}, "weight 1 x gain"),
        ("box", {"type": "GCDLoss", "loss_weight": 0.4}, "weight 0.4 (default 2) x gain"),
        ("loss_class", {"type": "FocalLoss", "loss_weight": 1}, "weight 1 x gain"),
        ("loss_class", {"type": "FocalLoss", "loss_weight": 16}, "weight 16 (default 1) x gain"),
    ],
)
def test_a_weight_far_from_the_default_is_said(slot, loss, said):
    """One that was right for another program may hardly train here."""
    task = "rtdetr" if slot == "loss_class" else "detect"
    lines = describe(load_losses({slot: loss}, task), get_cfg(), task)
    assert any(line.startswith(f"{slot}: {loss['type']}") and said in line for line in lines)


def test_a_weight_far_from_the_default_is_said_of_each_loss_in_turn():
    parts = [{"type": "FocalLoss", "loss_weight": weight} for weight in (1, 8)]
    line = describe(load_losses({"cls": {"type": "ScheduledLoss", "losses": parts, "at": [1]}}), get_cfg())[0]
    assert ") x 1 (default 16), FocalLoss(" in line
    assert line.endswith(") x 8), weight 1 x gain 0.5")


def test_a_loss_without_a_sigmoid_form_is_not_told_to_write_one():
    for given in ({}, {"use_sigmoid": False}):
        with pytest.raises(ValueError, match=r"^SeesawLoss needs a head with a softmax(?!.*use_sigmoid)"):
            load_losses({"cls": {"type": "SeesawLoss", "num_classes": 10, **given}})


def test_description_of_the_parts_of_a_loss():
    """Each with all its settings, and with its weight, once."""
    slide = {"type": "SlideLoss", "loss_weight": 3, "base": {"type": "BinaryCrossEntropyLoss", "loss_weight": 0.5}}
    joint = {"type": "JointLoss", "loss_weight": 2, "losses": [slide, {"type": "GHMC", "momentum": 0.5}]}
    of_base = "BinaryCrossEntropyLoss(pos_weight=None, activated=False) x 0.5"
    of_slide = f"SlideLoss(authors_code=False, decay=None, tau=2000.0, {of_base}) x 3"
    line = describe(load_losses({"cls": joint}), get_cfg())[0]
    assert line == f"cls: JointLoss({of_slide}, GHMC(bins=10, momentum=0.5)), weight 2 x gain 0.5"
    for given in ({}, {"num_classes": 10}):  # without it, it is the model's
        line = describe(load_losses({"cls": {"type": "EQLV2Loss", **given}}), get_cfg())[0]
        assert ("num_classes=10" in line, "1203" in line) == (bool(given), False)


# As a process of a launch, but for the other processes: the group has this one alone.
WORKER = """
import sys, torch
from ultralytics.utils import DEFAULT_CFG_DICT, RANK
from ultralytics.utils.patches import torch_load
assert RANK == 1
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
state = torch_load(sys.argv[1], map_location="cpu")
cfg = DEFAULT_CFG_DICT.copy()
cfg.update(save_dir="")
trainer = state["trainer"](cfg=cfg, overrides=state["args"], _callbacks=state["callbacks"])
trainer.model = state["model"]
trainer._setup_train()
criterion = trainer.model.init_criterion()
trainer.epoch, trainer.metrics = 0, None  # as all but the first rank have them
for event in ("on_train_epoch_start", "on_train_epoch_end", "on_fit_epoch_end"):
    trainer.run_callbacks(event)
kind = type(trainer)
here, there = vars(sys.modules[kind.__module__]), [getattr(x, "__globals__", {}) for x in vars(kind).values()]
print({name for values in there for name in here.keys() & values.keys() if here[name] != values[name]})
print(type(criterion).__name__, criterion.losses)
"""


@since("8.4.140", "its workers import the trainer by name")
@pytest.mark.parametrize(
    "name", ["yolov8n", *(pytest.param(name, marks=pytest.mark.slow) for name in ("yolov8n-obb", "yolov8n-rtdetr"))]
)
def test_workers_of_a_multi_gpu_launch_build_the_same_criterion(name, datasets, tmp_path):
    losses, task, model = losses_for(name), task_of(name), model_file(name, tmp_path)
    overrides = {**SETTINGS, "data": datasets[task], "model": model, "project": str(tmp_path)}
    trainer = make_trainer(losses, task, curves=True)(overrides=overrides)
    trainer.model = trainer.get_model(cfg=model, verbose=False)
    script = generate_ddp_file(trainer)
    shutil.rmtree(trainer.save_dir)  # as a launch does, and its first rank makes it again
    worker = [sys.executable, "-c", WORKER, script.replace(".py", ".pt")]
    rank = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(worker, capture_output=True, text=True, check=False, env=rank)
    assert done.returncode == 0, done.stderr
    assert not list(trainer.save_dir.glob("losses.*")), "another rank than the first writes"
    kind = {"detect": "PluginDetectionLoss", "obb": "PluginOBBLoss", "rtdetr": "PluginRTDETRLoss"}[task]
    assert done.stdout.splitlines()[-2:] == ["set()", f"{kind} {load_losses(losses, task)}"]


STATEFUL = {"cls": {"type": "GHMC", "momentum": 0.75}, "box": {"type": "WIoULoss"}}


def flat(state):
    return {
        (branch, slot, name): value
        for branch, slots in state.items()
        for slot, buffers in slots.items()
        for name, value in buffers.items()
    }


@pytest.mark.parametrize("name", [pytest.param("yolov8n", marks=pytest.mark.slow), "yolo26n"])
def test_state_is_saved_validated_with_and_resumed(name, data, tmp_path):
    """One state a branch; it is in the checkpoint, and validation uses it and leaves it alone."""
    seen = {}
    yolo = YOLO(f"{name}.yaml")
    yolo.add_callback("on_train_epoch_end", lambda t: seen.update(trained=criterion_state(t.model.criterion)))
    yolo.add_callback("on_fit_epoch_end", lambda t: seen.update(ema=criterion_state(t.ema.ema.criterion)))
    yolo.add_callback("on_fit_epoch_end", interrupt)
    with pytest.raises(Interrupted):
        yolo.train(data=data, epochs=2, project=str(tmp_path), name="run", trainer=make_trainer(STATEFUL), **SETTINGS)
    trained = flat(seen["trained"])
    for slot in STATEFUL:
        first, *others = (value for (_, where, _), value in trained.items() if where == slot)
        assert len(others) == (1 if name == "yolo26n" else 0)
        assert first.sum() > 0
        assert not any(torch.equal(first, other) for other in others)
    last = tmp_path / "run" / "weights" / "last.pt"
    for other in (flat(seen["ema"]), flat(trained_losses(last)["state"])):
        assert other.keys() == trained.keys()
        assert all(torch.equal(other[key], trained[key]) for key in trained)
    yolo = YOLO(str(last))
    before = []
    yolo.add_callback("on_train_start", lambda t: before.append(criterion_state(t.model.init_criterion())))
    yolo.add_callback("on_train_epoch_end", lambda t: seen.update(resumed=criterion_state(t.model.criterion)))
    yolo.train(resume=True, trainer=make_trainer(STATEFUL))
    assert all(torch.equal(flat(before[0])[key], trained[key]) for key in trained)
    assert not any(torch.equal(flat(seen["resumed"])[key], trained[key]) for key in trained)


def test_a_loss_of_ones_own_reaches_the_workers_of_a_launch(filed_loss):
    """They are handed the class of the trainer, and nothing there has imported the file of the loss."""
    losses = make_trainer({"box": {"type": "WIoULoss", "base": {"type": "FiledLoss"}}}).plugin_losses
    filed_loss()
    assert type(build_loss(losses["box"]).base).__name__ == "FiledLoss"


def test_a_loss_of_a_script_does_not(monkeypatch):
    monkeypatch.setattr(Own, "__module__", "__main__")
    monkeypatch.setitem(MODELS.module_dict, "Own", Own)
    trainer = make_trainer({"cls": {"type": "Own"}})
    assert trainer.plugin_losses["cls"]["type"] == "Own"
    with pytest.raises(ValueError, match=r"Own is of a script.*put the class in a file of its own"):
        trainer(overrides={"device": "0,1"})


@pytest.mark.slow
def test_a_model_that_is_compiled_builds_its_criterion(batch):
    """As ``compile=True`` of Ultralytics' trainer does, where the first step builds it."""
    model = detector.__wrapped__("yolov8n")
    install(model, STATEFUL)
    loss = torch.compile(model, backend="eager")(batch)[0]
    loss.sum().backward()
    assert loss.isfinite().all()
    assert isinstance(model.criterion, PluginDetectionLoss)
