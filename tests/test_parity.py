"""Every loss against every upstream counterpart, value and gradient, on random tensors; and that this test can fail.

``tools/compare.py`` does the same on the tensors of real training steps.
"""

import pytest

from detloss_plugins.registry import registered_losses
from detloss_plugins.testing.parity import compare, random_tensors, verdict
from detloss_plugins.testing.twins import in_words, load


def described(cls, upstream):
    """``FocalLoss(gamma=1.5)-ultralytics.utils.loss.FocalLoss``."""
    at = f" at {upstream.at}" if upstream.at else ""
    return f"{cls.__name__}({in_words(upstream.ours)})-{upstream.path}{at}"


PAIRS = {described(cls, up): (cls, up) for cls in registered_losses().values() for up in cls.facts.upstream}
EQUAL = [cls for cls in registered_losses().values() if any(not up.differs for up in cls.facts.upstream)]


def worst_of(cls, upstream):
    if load(upstream.path) is None:
        pytest.skip(f"{upstream.path} is not installed")
    return compare(cls, upstream, [random_tensors(cls)])


@pytest.mark.parametrize(("cls", "upstream"), PAIRS.values(), ids=PAIRS)
def test_parity(cls, upstream):
    worst = worst_of(cls, upstream)
    assert verdict(upstream, worst) in ("PASS", "DIFFERS"), worst


@pytest.mark.parametrize("cls", EQUAL, ids=lambda cls: cls.__name__)
def test_a_formula_that_is_a_little_wrong_fails(cls, monkeypatch):
    function = cls.fn
    for factor, power in ((1.0001, 1), (1, 1.0001)):
        wrong = lambda *args, f=factor, p=power, **hyper: f * function(*args, **hyper) ** p  # noqa: E731
        monkeypatch.setattr(cls, "fn", staticmethod(wrong))
        for upstream in cls.facts.upstream:
            if not upstream.differs:
                assert verdict(upstream, worst_of(cls, upstream)) == "FAIL", upstream
