"""One loss after the other: which counts when, what moves it on, and that nothing is compiled again for a weight."""

import copy
import warnings

import pytest
import torch
from support import counted_graphs, gradient, needs_compiler, sample_for

from detloss_plugins import build_loss
from detloss_plugins.losses import scheduled_loss, set_progress
from detloss_plugins.testing import sample

BCE, FOCAL, AP = {"type": "BinaryCrossEntropyLoss"}, {"type": "FocalLoss", "loss_weight": 4.0}, {"type": "APLoss"}
AT_TWO = {"type": "ScheduledLoss", "at": [2]}
THREE = [BCE, FOCAL, AP]


def scheduled(losses=(BCE, FOCAL), **settings):
    return build_loss({"type": "ScheduledLoss", "losses": losses, **settings})


def at_epoch(loss, epoch):
    set_progress(loss, epoch=epoch)
    return loss


@pytest.mark.parametrize(("epoch", "stage"), [(0, 0), (1, 0), (2, 1), (4, 1), (5, 2), (99, 2)])
def test_each_loss_from_its_epoch_on(epoch, stage, device):
    """Value and gradient are those of the one loss, whatever else is given; the whole counts with its weight."""
    pred, target = sample_for(scheduled(at=[2]), device)
    weight = torch.rand(len(pred), device=device)
    loss = at_epoch(scheduled(THREE, at=[2, 5], loss_weight=3.0).to(device), epoch)
    alone = build_loss(THREE[stage])
    for kwargs in ({}, {"weight": weight}, {"avg_factor": 7.0}, {"reduction_override": "sum"}):
        torch.testing.assert_close(loss(pred, target, **kwargs), 3 * alone(pred, target, **kwargs))
        torch.testing.assert_close(gradient(loss, pred, target, **kwargs), 3 * gradient(alone, pred, target, **kwargs))
    assert loss.family == alone.family
    assert loss.facts.counts_positives == alone.facts.counts_positives


@pytest.mark.parametrize(("epoch", "share"), [(1, 0.0), (2, 0.0), (3, 0.25), (5, 0.75), (6, 1.0), (9, 1.0)])
def test_one_loss_fades_into_the_next(epoch, share):
    pred, target = sample_for(scheduled(at=[2]), "cpu")
    loss = at_epoch(scheduled(at=[2], fade=4), epoch)
    expected = (1 - share) * build_loss(BCE)(pred, target) + share * build_loss(FOCAL)(pred, target)
    torch.testing.assert_close(loss(pred, target), expected)


@pytest.mark.parametrize("positives", [1, 3])
def test_a_class_loss_that_fades_into_a_ranking_loss_has_no_losses_of_rows(positives):
    """One positive would be added to every row."""
    pred, label = torch.randn(5, 4), torch.tensor([0] * positives + [4] * (5 - positives))
    loss = at_epoch(scheduled([BCE, AP], at=[2], fade=2), 3)
    first, second = (build_loss(cfg)(pred, label) for cfg in (BCE, AP))
    torch.testing.assert_close(loss(pred, label), (first + second) / 2)
    with pytest.raises(ValueError, match='take "mean" or "sum"'):
        loss(pred, label, reduction_override="none")
    with pytest.raises(ValueError, match='take "mean" or "sum"'):
        scheduled_loss(pred, label, losses=loss.losses, shares=[0.5, 0.5])
    at_epoch(loss, 4)(pred, label, reduction_override="none")  # of the ranking loss alone


def test_a_weight_that_moves():
    weights = [{"type": "L1Loss", "loss_weight": 1.0}, {"type": "L1Loss", "loss_weight": 3.0}]
    loss = scheduled(weights, at=[0], fade=10)
    found = [at_epoch(loss, epoch)(torch.ones(2), torch.zeros(2)).item() for epoch in (0, 5, 10, 20)]
    assert found == [1.0, 2.0, 3.0, 3.0]


def test_iterations_are_counted_in_training_only_and_saved():
    """The count goes on from a checkpoint, and in a copy."""
    pred, target = sample_for(scheduled(at=[2]), "cpu")
    loss = scheduled(at=[3], by_epoch=False)
    first, second = (build_loss(cfg)(pred, target) for cfg in (BCE, FOCAL))
    for _ in range(2):
        torch.testing.assert_close(loss(pred, target), first)
        with torch.no_grad():
            loss(pred, target)
        loss.eval()(pred, target)
        loss.train()
    resumed, copied = scheduled(at=[3], by_epoch=False), copy.deepcopy(loss)
    resumed.load_state_dict(loss.state_dict())
    for twin in (loss, resumed, copied):
        found = [twin(pred, target) for _ in range(3)]
        torch.testing.assert_close(found, [first, second, second])
    later = scheduled(at=[3], by_epoch=False)
    later.load_state_dict(loss.state_dict())
    torch.testing.assert_close(later.eval()(pred, target), second)


def test_only_the_loss_in_turn_moves_its_state():
    loss = scheduled([{"type": "WIoULoss"}, {"type": "WIoULoss", "momentum": 0.5}], at=[1])
    pred, target = sample(build_loss({"type": "WIoULoss"}), 20)
    first, second = loss.losses
    for epoch, moves, stays in ((0, first, second), (1, second, first)):
        before = stays.mean.clone(), moves.mean.clone()
        at_epoch(loss, epoch)(pred, target)
        assert torch.equal(stays.mean, before[0])
        assert not torch.equal(moves.mean, before[1])


def test_it_says_once_that_nobody_tells_the_epoch():
    pred, target = sample_for(scheduled(at=[2]), "cpu")
    loss = scheduled(at=[3])
    with pytest.warns(UserWarning, match=r"Nobody tells .* stays at 0.*set_progress"):
        loss(pred, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(pred, target)
        at_epoch(scheduled(at=[3]), 0)(pred, target)
        scheduled(at=[3]).eval()(pred, target)


def test_it_says_that_training_ends_before_its_last_loss():
    with pytest.warns(UserWarning, match="begins at epoch 12, and training has 12"):
        set_progress(torch.nn.ModuleList([scheduled(at=[12])]), epoch=0, epochs=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_progress(scheduled(at=[11]), epoch=0, epochs=12)


@needs_compiler
def test_a_loss_is_compiled_once_and_a_share_never(device, traced):
    pred, target = sample_for(scheduled(at=[2]), device)
    loss, eager = (scheduled(at=[2], fade=6, compile=c).to(device) for c in (True, False))
    for epoch in (0, 1, 3, 4, 5, 7, 8, 9):
        at_epoch(eager, epoch)
        torch.testing.assert_close(gradient(at_epoch(loss, epoch), pred, target), gradient(eager, pred, target))
    assert counted_graphs() == 2


@needs_compiler
def test_in_a_compiled_model(traced):
    """A graph for each loss and one for the two together, whatever their shares."""
    pred, target = sample_for(scheduled(at=[2]), "cpu")
    loss, eager = (at_epoch(scheduled(at=[2], fade=6), 0) for _ in range(2))
    model = torch.compile(loss, fullgraph=True)
    for epoch in (0, 1, 3, 4, 5, 7, 8, 9):
        at_epoch(loss, epoch)
        torch.testing.assert_close(gradient(model, pred, target), gradient(at_epoch(eager, epoch), pred, target))
    assert counted_graphs() == 3
    counting = scheduled(at=[2], by_epoch=False)
    model = torch.compile(counting)
    found = [model(pred, target) for _ in range(4)]
    first, second = (build_loss(cfg)(pred, target) for cfg in (BCE, FOCAL))
    torch.testing.assert_close(found, [first, first, second, second])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"losses": []}, "0 losses do not go with"),
        ({"at": []}, "2 losses do not go with"),
        ({"at": [1, 2]}, "2 losses do not go with"),
        ({"losses": THREE, "at": [2, 2]}, "at of ScheduledLoss must be increasing"),
        ({"losses": THREE, "at": [2, 4], "fade": 3}, "fade .* longer"),
        ({"losses": [BCE, {"type": "CIoULoss"}], "at": [2]}, "one family"),
        ({"losses": [BCE, {"type": "CrossEntropyLoss"}], "at": [2]}, "one use_sigmoid"),
        ({"losses": [{"type": "SeesawLoss"}] * 2, "at": [2]}, "channels of their own"),
        ({"losses": [BCE, {**BCE, "activated": True}], "at": [2]}, "in all of them, for probabilities, or in none"),
        ({"at": [2], "use_sigmoid": False}, "use_sigmoid=False"),
    ],
)
def test_what_does_not_fit_is_refused_when_built(settings, words):
    with pytest.raises(ValueError, match=words):
        scheduled(**settings)


@pytest.mark.parametrize("name", ["ScheduledLoss", "JointLoss"])
@pytest.mark.parametrize("losses", [BCE, 3])
def test_losses_that_are_no_list(name, losses):
    with pytest.raises(TypeError, match=f"losses of {name} must be a list of config dicts of losses, not"):
        build_loss({"type": name, "losses": losses})


@pytest.mark.parametrize(
    "whole", [{"type": "JointLoss"}, {"type": "SlideLoss"}, {"type": "ConfidenceWeightedLoss"}, {"type": "WIoULoss"}]
)
def test_it_is_no_part_of_another_loss(whole):
    part = {**AT_TWO, "losses": [BCE, FOCAL]}
    with pytest.raises(TypeError, match="A ScheduledLoss is no part of another loss"):
        build_loss({**whole, **({"losses": [part, BCE]} if whole["type"] == "JointLoss" else {"base": part})})


def test_hard_negatives_of_a_schedule_are_those_of_its_losses():
    """A loss that ranks all negatives gets all of them, or the whole is refused."""

    def ratio(*losses, **given):
        return build_loss({"type": "MultiBoxLoss", "loss_cls": {**AT_TWO, "losses": losses}, **given}).neg_pos_ratio

    assert ratio(BCE, FOCAL) == 3
    assert ratio(FOCAL, AP) is None
    for given in ({}, {"neg_pos_ratio": 3}):
        with pytest.raises(ValueError, match="APLoss ranks all negatives; write neg_pos_ratio=None"):
            ratio(BCE, AP, **given)
    assert ratio(BCE, AP, neg_pos_ratio=None) is None
