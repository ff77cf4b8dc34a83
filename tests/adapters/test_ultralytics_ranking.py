"""Ranking losses in the ``cls`` slot: what is ranked, how it is scaled, and the scores that a new head starts with."""

import copy

import pytest
import torch
from support.ultralytics import (
    MODELS,
    SETTINGS,
    branches,
    detector,
    head,
    in_slot,
    older,
    ours,
    result,
    since,
    steps,
    stock_criterion,
    task_of,
)

from detloss_plugins import build_loss
from detloss_plugins.adapters.ultralytics import default_gain, default_prior, make_trainer
from detloss_plugins.adapters.ultralytics.trainer import start_at_prior
from detloss_plugins.families import RankingLoss
from detloss_plugins.registry import registered_losses

RANKING = [cls for cls in registered_losses().values() if issubclass(cls, RankingLoss)]
each_loss = pytest.mark.parametrize("cls", RANKING, ids=lambda cls: cls.__name__)


@pytest.fixture(scope="module")
def batch(batches):
    return batches["detect"]


def of_each_branch(model, batch):
    """Scores and targets of the stock criterion's class loss, with the graph, for every branch of the head."""
    criterion, seen = stock_criterion(model), []
    for branch in branches(criterion):
        branch.bce.register_forward_pre_hook(lambda _, args: seen.append(args))
    criterion(model(batch["img"]), batch)
    return seen


def biases(model):
    layers = [*head(model).cv3, *(getattr(head(model), "one2one_cv3", None) or ())]
    return torch.cat([layer[-1].bias.detach() for layer in layers])


@pytest.mark.parametrize("name", MODELS)
@each_loss
def test_the_whole_batch_is_ranked_and_the_mean_of_the_positives_is_the_loss(cls, name, batches):
    """Neither the sum of the scores nor the number of positives is left in the result."""
    model, images = detector(name), batches[task_of(name)]
    criterion = ours(model, {"cls": {**in_slot(cls), "loss_weight": 3.0}})
    values, weights = [], []
    for scores, target in of_each_branch(model, images):
        assert scores.shape[0] == len(images["img"])
        assert (target > 0).sum() > 10
        values.append(3 * model.args.cls * build_loss(in_slot(cls))(scores.flatten(0, 1), target.flatten(0, 1)))
        weights.append(1.0)
    if len(values) == 2:
        weights = [criterion.o2m, criterion.o2o]
    expected = sum(w * v for w, v in zip(weights, values, strict=True))
    loss, items, _ = result(model, criterion, images)
    # Of an end-to-end head, the items are those of the second branch.
    torch.testing.assert_close(items["cls_loss"], values[-1].detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss[1], expected.detach() * len(images["img"]), rtol=1e-5, atol=0)


@each_loss
def test_the_gradient_is_that_of_the_loss(cls, batch):
    model = detector("yolov8n")
    ((scores, target),) = of_each_branch(model, batch)
    criterion = ours(model, {"cls": in_slot(cls)})
    mine = scores.detach().requires_grad_()
    (criterion.bce(mine, target).sum() / target.sum().clamp(min=1)).backward()
    plain = scores.detach().requires_grad_()
    build_loss({**in_slot(cls), "loss_weight": default_gain(cls)})(plain, target).backward()
    torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-5 * plain.grad.abs().max().item())


@since("8.4.37", "it has no class weights")
@each_loss
def test_class_weights_are_those_of_the_positives(cls, batch):
    model = detector("yolov8n")
    ((scores, target),) = of_each_branch(model, batch)
    model.class_weights = torch.arange(1.0, 11)
    criterion = ours(model, {"cls": {**in_slot(cls), "loss_weight": 1.0}})
    model.class_weights = None
    rows = build_loss({**in_slot(cls), "reduction": "none"})(scores, target)
    own = torch.arange(1.0, 11)[(target > 0).nonzero()[:, -1]]
    items = result(model, criterion, batch)[1]
    torch.testing.assert_close(items["cls_loss"], (model.args.cls * rows * own).mean().detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", MODELS)
@each_loss
def test_no_objects_in_the_batch(cls, name, batches):
    model, images = detector(name), batches[task_of(name)]
    empty = {**images, **{key: images[key][:0] for key in ("batch_idx", "cls", "bboxes")}}
    loss, items, gradients = result(model, ours(model, {"cls": in_slot(cls)}), empty)
    assert items["cls_loss"] == 0
    assert loss.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", ["yolov8n", "yolo26n", "yolov8n-obb"])
def test_a_new_head_starts_at_the_prior_and_loaded_weights_stay(name, datasets, tmp_path):
    task = task_of(name)
    overrides = {**SETTINGS, "data": datasets[task], "model": f"{name}.yaml", "project": str(tmp_path)}
    losses = {"cls": {"type": "APLoss"}}
    trainer = make_trainer(losses, task)(overrides=overrides)
    new = biases(trainer.get_model(f"{name}.yaml", verbose=False))
    torch.testing.assert_close(new.sigmoid(), torch.full_like(new, 0.01))
    weights = copy.deepcopy(detector(name))
    for layer in (*head(weights).cv3, *(getattr(head(weights), "one2one_cv3", None) or ())):
        torch.nn.init.constant_(layer[-1].bias, -3.0)
    assert (biases(trainer.get_model(f"{name}.yaml", weights=weights, verbose=False)) == -3).all()
    other = make_trainer({"cls": {"type": "FocalLoss"}}, task)(overrides=overrides)
    assert torch.equal(biases(other.get_model(f"{name}.yaml", verbose=False)), biases(detector(name)))


def test_a_model_of_more_classes_leaves_its_new_head_the_prior(datasets, tmp_path):
    """Ultralytics makes the layers of the classes anew there; those of a class that has the same name are kept."""
    names = {**{number: f"class {number}" for number in range(79)}, 79: "3"}
    weights = copy.deepcopy(detector("yolov8n", classes=80))
    weights.names = names
    for layer in head(weights).cv3:
        torch.nn.init.constant_(layer[-1].bias, -3.0)
    overrides = {**SETTINGS, "data": datasets["detect"], "model": "yolov8n.yaml", "project": str(tmp_path)}
    trainer = make_trainer({"cls": {"type": "DRLoss"}})(overrides=overrides)
    trainer.data["names"] = {number: f"digit {number}" for number in range(10)} | {3: "3"}
    found = biases(trainer.get_model("yolov8n.yaml", weights=weights, verbose=False)).view(-1, 10)
    kept = torch.arange(10) == 3
    wanted = torch.full_like(found, 0.1)
    torch.testing.assert_close(found.sigmoid()[:, ~kept], wanted[:, ~kept])
    assert older("8.4.104") or (found[:, kept] == -3).all()


def test_a_joint_loss_of_ranking_losses(batch):
    model = detector("yolov8n")
    ((scores, target),) = of_each_branch(model, batch)
    parts = [{"type": "APLoss"}, {"type": "DRLoss", "loss_weight": 0.5}]
    items = result(model, ours(model, {"cls": {"type": "JointLoss", "losses": parts}}), batch)[1]
    expected = model.args.cls * sum(build_loss(part)(scores, target) for part in parts)
    torch.testing.assert_close(items["cls_loss"], expected.detach(), rtol=1e-5, atol=0)


@pytest.mark.slow
@each_loss
def test_ranking_losses_fall_in_training(cls, batch, warm):
    model, losses = copy.deepcopy(warm), {"cls": in_slot(cls)}
    start_at_prior(model, default_prior(cls))
    values = steps(model, ours(model, losses), batch, 60)
    assert sum(values[-5:]) < 0.9 * sum(values[:5]), values
