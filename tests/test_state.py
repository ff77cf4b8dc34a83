"""Losses with state: a buffer that moves in training only, survives empty and NaN input, and is one over the ranks."""

import copy

import pytest
import torch
from mmengine.dist import all_reduce_params
from support.ranks import two_ranks

from detloss_plugins.loss import average_state
from detloss_plugins.losses import SlideLoss
from detloss_plugins.registry import registered_losses
from detloss_plugins.testing import sample

# Settings that give a loss its state where the defaults do not.
MOMENTUM = {"GHMC": {"momentum": 0.75}, "GHMR": {"momentum": 0.7}}


def make(cls):
    return cls.make(**MOMENTUM.get(cls.__name__, {}))


class EMASlide(SlideLoss):
    """Slide loss with a moving mean."""

    def __init__(self, *, decay=0.999, **settings):
        super().__init__(decay=decay, **settings)


STATEFUL = [cls for cls in registered_losses().values() if make(cls).state_dict()] + [EMASlide]
stateful = pytest.mark.parametrize("cls", STATEFUL, ids=lambda cls: cls.__name__)


def call(loss, seed=0, n=64):
    pred, target = sample(loss, n, seed=seed)
    if type(loss).__name__ == "EQLV2Loss":
        target = target.argmax(-1)
    return loss(pred.requires_grad_(), target)


def state(loss):
    return {name: value.clone() for name, value in loss.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_known_ones_are_found():
    names = {"GHMC", "GHMR", "SeesawLoss", "EQLV2Loss", "SlideLoss", "WIoULoss", "EqualizedFocalLoss"}
    assert {cls.__name__ for cls in STATEFUL} >= names


@stateful
def test_a_loss_on_positives_waits_for_no_other_rank(cls, monkeypatch):
    """A head may leave it out on a rank without positives; were it to wait there, the training would hang."""
    waited = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", waited.append)
    call(make(cls))
    assert bool(waited) == cls.facts.every_rank == (cls.facts.family == "classification")


@stateful
def test_moves_in_training_only(cls):
    loss = make(cls)
    start = state(loss)
    with torch.no_grad():
        call(loss)
    assert same(state(loss), start), "validation in Ultralytics leaves the criterion in training mode"
    loss.eval()
    call(loss)
    assert same(state(loss), start)
    loss.train()
    call(loss)
    assert not same(state(loss), start)


@stateful
def test_empty_and_nan_do_not_poison(cls):
    loss = make(cls)
    call(loss)
    before = state(loss)
    pred, target = sample(cls, 64, seed=1)
    values = loss(pred[:0].requires_grad_(), target[:0], reduction_override="none")
    assert values if isinstance(values, dict) else values.numel() == 0
    assert same(state(loss), before)
    pred[3] = float("nan")
    loss(pred, target)
    if target.is_floating_point():
        target[3] = float("nan")
        loss(pred, target)
    assert all(value.isfinite().all() for value in state(loss).values())
    total = call(loss)
    assert (sum(total.values()) if isinstance(total, dict) else total).isfinite()


@stateful
def test_restored_state_goes_on_as_if_never_stopped(cls):
    loss = make(cls)
    call(loss)
    restored = make(cls)
    restored.load_state_dict(loss.state_dict())
    copied = copy.deepcopy(loss)
    for other in (restored, copied):
        call(other, seed=5)
    call(loss, seed=5)
    assert same(state(loss), state(restored))
    assert same(state(loss), state(copied))


def rank_states(rank):
    """The states after a training step of every loss on a rank's own data."""
    states = {}
    for cls in STATEFUL:
        loss = make(cls)
        call(loss, seed=rank)
        if not cls.facts.every_rank:
            hooked = copy.deepcopy(loss)
            average_state(loss)  # what the Ultralytics adapter does in every step
            all_reduce_params(hooked.buffers(), op="mean")  # what mmengine's SyncBuffersHook does after an epoch
            assert same(state(loss), state(hooked))
        loss.eval()
        if rank == 0:
            call(loss, seed=9)  # validation on one rank must not wait for the other
        states[cls.__name__] = state(loss)
    return states


def test_one_state_over_the_ranks(tmp_path):
    """Two processes with different data end with one state, which is neither's own."""
    first, second = two_ranks(rank_states, tmp_path)
    for cls in STATEFUL:
        assert same(first[cls.__name__], second[cls.__name__]), cls.__name__
        alone = make(cls)
        call(alone, seed=0)
        assert not same(first[cls.__name__], state(alone)), cls.__name__
