"""Every loss against every upstream counterpart, value and gradient, on random tensors; and that this test can fail.

``tools/compare.py`` does the same on the tensors of real training steps.
"""

import compare
import pytest

TENSORS = compare.random_tensors()
PAIRS = [(cls, upstream) for cls in compare.registered().values() for upstream in cls.upstream]


@pytest.mark.parametrize(("cls", "upstream"), PAIRS, ids=lambda x: getattr(x, "__name__", getattr(x, "path", "")))
def test_parity(cls, upstream):
    worst = compare.compare(cls, upstream, {"random": TENSORS[cls.family]})
    assert compare.verdict(upstream, worst) in ("PASS", "DIFFERS"), worst


def broken(factor, power):
    """A function that gets the formula a little wrong."""

    def break_it(function):
        return staticmethod(lambda pred, target, **hyper: factor * function(pred, target, **hyper) ** power)

    return break_it


@pytest.mark.parametrize(("factor", "power"), [(1.0001, 1), (1, 1.0001)])
def test_a_broken_loss_fails(loss_cls, factor, power, monkeypatch):
    pairs = [upstream for upstream in loss_cls.upstream if not upstream.differs]
    monkeypatch.setattr(loss_cls, "fn", broken(factor, power)(loss_cls.fn))
    for upstream in pairs:
        worst = compare.compare(loss_cls, upstream, {"random": TENSORS[loss_cls.family]})
        assert compare.verdict(upstream, worst) == "FAIL"
