"""What ``check_loss`` leaves open: facts that claim too little, and what is refused in which words."""

import math

import pytest
import torch
from support import only

from detloss_plugins import build_loss
from detloss_plugins.registry import loss_class, registered_losses
from detloss_plugins.testing import sample

BEYOND_DEFAULTS = {"ShapeIoULoss": {"scale": 1.5}}  # by default it weighs both sides alike


@only(lambda facts: facts.family == "box")
def test_no_fact_of_a_box_loss_claims_too_little(loss_cls, device):
    """A loss that is said not to be symmetric, invariant to scale or attracting is not."""
    facts = loss_cls.facts
    loss = loss_cls.make(reduction="none", **BEYOND_DEFAULTS.get(loss_cls.__name__, {})).eval()
    pred, target = (x.to(device) for x in sample(loss_cls, 200, dtype=torch.float64))
    rows = loss(pred, target)

    def differs(other):
        return bool((other - rows).abs().max() > 1e-3)

    assert differs(loss(target, pred)) != facts.symmetric
    assert differs(loss(1e-3 * pred, 1e-3 * target)) != facts.scale_invariant
    steps = torch.arange(40, 8, -1, dtype=torch.float64, device=device).unsqueeze(-1)
    target = torch.tensor([0.0, 0, 16, 24], device=device).expand(len(steps), 4)
    coming = loss(target + steps * torch.tensor([2, 3, 2, 3], device=device), target)
    assert bool((coming.reshape(len(steps), -1).sum(1).diff() < 0).all()) == facts.attracts


def test_every_setting_states_what_it_may_be():
    """But for configs of other losses, which those check."""
    free = {name for cls in registered_losses().values() for name, rule in cls.rules.items() if rule is None}
    assert free == {"base", "loss_cls", "loss_bbox"}


REFUSED = [
    ("FocalLoss", "gamma", (-1, None, math.nan, math.inf, "2", True, [2.0]), "a number of at least 0"),
    ("FocalLoss", "alpha", (5, -0.1, math.nan, "0.25", True, [0.5, math.nan], []), r"a number in \[0, 1\] or"),
    ("GIoULoss", "eps", (-1e-7, 0, None, math.nan, "small", False), "a number above 0"),
    ("GIoULoss", "loss_weight", (-1, None, math.nan, math.inf, "2", True), "a number of at least 0"),
    ("GIoULoss", "compile", (1, None, "yes"), "True or False"),
    ("GIoULoss", "reduction", ("average", None, 1), ""),
    ("CIoULoss", "alpha_gate", (2, -1, math.nan, True), r"a number in \[0, 1\] or None"),
    ("IoULoss", "mode", ("cubic", None, 1), '"log", "linear" or "square"'),
    ("GHMC", "bins", (0, -1, 2.5, None, True, math.nan), "a whole number above 0"),
    ("DiceLoss", "naive_dice", (1, None, "no"), "True or False"),
    ("CrossEntropyLoss", "class_weight", ([1.0, -1.0], [math.nan], 2, "balanced", []), "a list of numbers"),
    ("MPDIoULoss", "image_size", (640, (640, 0), (640, math.nan), None), r"\(height, width\)"),
    ("GeneralizedFocalLoss", "values", ((1.0, 0.0), (0, 0), (0.0,), 1, None), "two increasing numbers"),
]


@pytest.mark.parametrize(("kind", "name", "values", "words"), REFUSED, ids=[f"{row[0]}-{row[1]}" for row in REFUSED])
def test_a_setting_that_has_no_meaning(kind, name, values, words):
    cls = loss_class(kind)
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"^{name}.* must be .*{words}"):
            cls(**{**cls.facts.example, name: value})


def test_an_unknown_setting_brings_the_known_ones():
    with pytest.raises(
        TypeError, match="CIoULoss has no hyper-parameter 'nonsense'; it accepts alpha_gate, compile, eps"
    ):
        build_loss({"type": "CIoULoss", "nonsense": 1})


def test_a_number_is_no_target():
    """Once it meant that there are only negatives."""
    for cls in registered_losses().values():
        pred, _ = sample(cls, 8)
        for number in (0, 5, 1.0, None):
            with pytest.raises(TypeError, match=rf"target of \w+ must be a tensor.*, not {number}"):
                cls.make()(pred, number)


def test_boxes_of_the_wrong_shape():
    for cls in registered_losses().values():
        if cls.facts.family == "box":
            with pytest.raises(ValueError, match=r"\(2, 4\) and target \(3, 4\)"):
                cls.make()(torch.rand(2, 4), torch.rand(3, 4))
            with pytest.raises(ValueError, match="4 coordinates"):
                cls.make()(torch.rand(2, 5), torch.rand(2, 5))
