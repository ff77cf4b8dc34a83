"""What a setting may be: all settings of all losses, by what they are annotated with."""

import math
import re
import sys

import numpy as np
import pytest
import torch
import yaml

from detloss_plugins import build_loss
from detloss_plugins.facts import Rule, above, at_least, between
from detloss_plugins.losses import GHMC, FocalLoss, MultiBoxLoss
from detloss_plugins.registry import registered_losses

NUMERIC = {
    f"{name}.{setting}": (cls, setting)
    for name, cls in registered_losses().items()
    for setting, rule in cls.rules.items()
    if rule is not None and re.search("number|at least|in pixels", rule.words)
}


def numeric(cls):
    return [name for of, name in NUMERIC.values() if of is cls]


INTERVAL = r"in ([\[(])([-\d.]+), ([-\d.]+)([\])])"


def beyond(limit, towards):
    """The next number, and beside 0 the next that is not flushed to 0, as compiled code can have the processor do."""
    return math.nextafter(limit, towards) if limit else math.copysign(sys.float_info.min, towards)


def outside(words):
    """Numbers just outside the range that a rule states in words."""
    for low in re.findall(r"at least (-?\d+)", words):
        yield beyond(float(low), -math.inf)
        yield float(low) - 1
    for low in re.findall(r"above (-?\d+)", words):
        yield float(low)
        yield float(low) - 1
    for opens, low, high, closes in re.findall(INTERVAL, words):
        yield from (float(low) - 1, float(low) if opens == "(" else beyond(float(low), -math.inf))
        yield from (float(high) + 1, float(high) if closes == ")" else beyond(float(high), math.inf))


def refused(cls, name, value):
    words = re.escape(f"{name} of {cls.__name__} must be {cls.rules[name].words}, not ")
    with pytest.raises((TypeError, ValueError), match=f"^{words}.*\\.$"):
        cls.make(**{name: value})


def test_all_kinds_of_ranges_are_tried():
    assert len(NUMERIC) > 150
    ranges = {"at least 0", "at least 1", "at least -1", "above 0", "[0, 1]", "(0, 1]", "[0, 1)", "(0, 1)"}
    stated = " ".join(cls.rules[name].words for cls, name in NUMERIC.values())
    assert all(words in stated for words in ranges)
    assert list(outside("a number in (0, 1]"))[1] == 0


def test_no_setting_takes_what_is_no_number_or_out_of_its_range(loss_cls):
    for name in numeric(loss_cls):
        check_range(loss_cls, name)


def check_range(cls, name):
    words = cls.rules[name].words
    for value in (math.nan, math.inf, -math.inf, True, False, "abc", "nan", "1e999", {}, [math.nan], [True], [None]):
        refused(cls, name, value)
    for value in (torch.tensor(math.nan), np.float32(math.inf), np.array([math.nan, 1.0])):
        refused(cls, name, value)
    if "None" not in words:
        refused(cls, name, None)
    if '"' not in words or "number" in words:  # "batch" apart
        for value in outside(words):
            if not re.search(r"\b0 or at least 1", words) or value != 0:
                refused(cls, name, value)
                refused(cls, name, torch.tensor(value, dtype=torch.float64))
    if "list" in words:
        for value in outside(words.split("list")[1]):
            refused(cls, name, [0.5, value])


def test_a_number_in_words_is_the_number_that_it_means(loss_cls):
    """YAML reads ``1e-3`` as a string."""
    for name in numeric(loss_cls):
        check_words(loss_cls, name)


def check_words(cls, name):
    default = cls.__signature__.parameters[name].default
    if isinstance(default, int | float):
        found = getattr(cls.make(**{name: f"{default:.17e}"}), name)
        assert found == default
        assert type(found) in (int, float)
    if "list" in cls.rules[name].words:
        if name == "class_weight" and name not in cls.hyper and (cls.instead or not cls.make().use_sigmoid):
            return  # it is refused
        assert getattr(cls.make(**{name: ["5e-1", 1]}), name) == [0.5, 1]


@pytest.mark.parametrize("rule", [at_least(2), above(2), between(2, 3), between(2, 3, "(2, 3)")])
def test_a_range_is_what_its_words_say(rule):
    assert isinstance(rule, Rule)
    assert all(not rule.holds(value) for value in outside(rule.words))
    assert rule.holds(2.5)
    assert rule.holds(2) == ("at least" in rule.words or "[2" in rule.words)


def test_settings_from_yaml():
    text = "{type: GHMC, momentum: 5e-1, bins: 1e1, loss_weight: 1e-3}"
    loss = build_loss(yaml.safe_load(text))
    assert (loss.momentum, loss.bins, loss.loss_weight) == (0.5, 10, 0.001)
    assert loss(torch.zeros(2, 3), torch.zeros(2, 3)).isfinite()
    for wrong in (".nan", ".inf", "null", "true", "one", "-1e-3"):
        with pytest.raises(
            (TypeError, ValueError), match="loss_weight of CIoULoss must be a number of at least 0, not"
        ):
            build_loss(yaml.safe_load(f"{{type: CIoULoss, loss_weight: {wrong}}}"))
    with pytest.raises(TypeError, match=r"bins of GHMC must be a whole number above 0, not '1\.5e0'"):
        GHMC(bins="1.5e0")


def test_torchvisions_alpha_of_minus_one():
    """It means no balance there; here it would make an easy positive cost less than nothing."""
    with pytest.raises(ValueError, match=r"alpha of FocalLoss must be .* None \(which is torchvision's -1\), not -1\."):
        FocalLoss(alpha=-1)


def test_settings_are_plain_values():
    loss = GHMC(momentum=np.float64(0.5), bins=torch.tensor(7))
    assert type(loss.momentum) is float
    assert type(loss.bins) is int


def test_parts_of_a_multibox_loss_are_configs():
    for nothing in (False, [], {}):
        with pytest.raises(TypeError, match="configured by a dict"):
            MultiBoxLoss(loss_cls=nothing)
