"""Every registered loss keeps every promise that says something of it; that each can break, test_check_loss shows."""

import pytest
import torch
from support import counted_graphs, needs_compiler, sample_for

from detloss_plugins.loss import Loss
from detloss_plugins.losses import AdaptiveThresholdFocalLoss, in_turn
from detloss_plugins.registry import loss_class, registered_losses
from detloss_plugins.testing import check_loss, checks, instances

# Each counterpart has a test of its own, compiling needs a fixture, and all the others need a usable loss.
ELSEWHERE = {"upstream", "compiled", "usable"}


def says_something(cls, check):
    if check.__name__ == "state":
        return any(list(loss.buffers()) for loss in instances(cls))
    if check.__name__ == "several_images":
        return cls.facts.family != "region"  # whose rows are the first dimension alone
    return check.__name__ not in ELSEWHERE


COMPILED = next(check for check in checks() if check.__name__ == "compiled")
# Settings that bring in what the defaults leave out: state, parts of another kind, a target of another form.
MORE = [
    {"type": "GHMC", "momentum": 0.75},
    {"type": "GHMR", "momentum": 0.7},
    {"type": "BalancedCrossEntropyLoss", "alpha": 0.4},
    {"type": "FocalLoss", "use_sigmoid": False, "alpha": [0.5, 1.0, 2.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]},
    {"type": "SlideLoss", "base": {"type": "QualityFocalLoss", "loss_weight": 2.0}, "authors_code": True},
    {"type": "SlideLoss", "base": {"type": "MALoss"}, "decay": 0.9},
    {"type": "ConfidenceWeightedLoss", "base": {"type": "CrossEntropyLoss"}},
    {"type": "VarifocalLoss", "detach_weight": True},
    {"type": "AdaptiveThresholdFocalLoss", "detach_gamma": True},
    {"type": "CrossEntropyLoss", "ignore_index": 2},
    {"type": "InnerIoULoss", "base": {"type": "WIoULoss", "momentum": 0.5}},
    {"type": "WIoULoss", "base": {"type": "InnerIoULoss", "base": {"type": "WIoULoss", "momentum": 0.5}}},
    {"type": "InterpIoULoss", "dynamic": True},
    {"type": "DistributionFocalLoss", "bins": [value**1.2 - 3 for value in range(16)]},
    {"type": "DiceLoss", "activate": False},
]


def test_every_promise(loss_cls, device):
    for check in checks(loss_cls):
        if says_something(loss_cls, check):
            check(loss_cls, device=device)


@needs_compiler
def test_one_kernel_for_any_number_of_rows(loss_cls, device, traced):
    """All but the kernel itself; 0 rows and 1 run uncompiled."""
    loss, eager = (loss_cls.make(compile=compiled).to(device).eval() for compiled in (True, False))
    for n in (40, 23, 1, 0):
        pred, target = sample_for(loss, device, n, torch.float64)
        found, expected = (x(pred, target, avg_factor=2.5 + n) for x in (loss, eager))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(value, pred)[0] for value in (found, expected)))
    found = [part for running, _ in in_turn(loss) for part in running.modules()]
    parts = [part for part in found if isinstance(part, Loss) and part.compiled]
    compiled = [part for part in parts if part.facts.row_wise and part.compiles(pred.device)]
    means = [part for part in compiled if isinstance(part, AdaptiveThresholdFocalLoss)]  # which have a kernel too
    assert counted_graphs() == len(compiled) + len(means)


ONE_OF_A_FAMILY = {cls.facts.family: cls for cls in registered_losses().values() if COMPILED.applies(cls.facts)}


@pytest.mark.parametrize("cls", ONE_OF_A_FAMILY.values(), ids=ONE_OF_A_FAMILY)
@needs_compiler
def test_compiled_in_a_model(cls, device, traced):
    COMPILED(cls, device=device, compile=True, **{"loss_weight": 1.0, **cls.facts.example})


@pytest.mark.parametrize("cfg", MORE, ids=lambda cfg: "-".join(map(str, cfg.values()))[:60])
@needs_compiler
def test_all_promises_under_more_settings(cfg, device, traced):
    cls, settings = loss_class(cfg["type"]), {name: value for name, value in cfg.items() if name != "type"}
    check_loss(cls, device=device, compile=True, **{**cls.facts.example, **settings})
