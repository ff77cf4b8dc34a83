"""What differs between devices and systems: a float64, a compiler, the encoding of text."""

import ast

import pytest
import torch
from support import gradient, only, sample_for
from support.commands import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from detloss_plugins import build_loss, precision
from detloss_plugins.adapters.curves import state_scalars
from detloss_plugins.losses import DRLoss, FocalLoss
from detloss_plugins.testing import sample


class NoFloat64(TorchDispatchMode):
    """Raises where a tensor of float64 is made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_flatten(found)[0]):
            raise TypeError(f"{func} makes a float64")
        return found


@pytest.fixture
def without_float64(device, monkeypatch):
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {torch.device(device).type})


@only(lambda facts: facts.family != "multibox")
def test_no_float64_where_there_is_none(loss_cls, device, without_float64):
    loss = loss_cls.make().to(device)
    pred, target = sample_for(loss, device)
    with NoFloat64():
        loss(pred, target).backward()
    assert pred.grad.isfinite().all()


@pytest.mark.parametrize("cfg", [{"type": "WIoULoss"}, {"type": "EQLV2Loss", "num_classes": 3}], ids=str)
def test_the_curves_of_a_state_make_none(cfg, device, without_float64):
    loss = build_loss(cfg).to(device)
    with NoFloat64():
        assert state_scalars(loss)


def test_a_float64_is_noticed():
    with pytest.raises(TypeError, match="makes a float64"), NoFloat64():
        torch.ones(2).double()


@only(lambda facts: facts.family == "ranking")
def test_ranking_losses_in_float32_sums(loss_cls, device, monkeypatch):
    loss, (pred, target) = loss_cls(), sample(loss_cls, 500)
    pred, target = pred.to(device).requires_grad_(), target.to(device)
    expected = loss(pred, target), gradient(loss, pred, target)
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {torch.device(device).type})
    torch.testing.assert_close((loss(pred, target), gradient(loss, pred, target)), expected, atol=1e-6, rtol=1e-4)


def test_compile_on_an_old_torch(monkeypatch):
    monkeypatch.setattr(precision, "COMPILES_FROM", "99")
    monkeypatch.setattr("detloss_plugins.loss.COMPILES_FROM", "99")
    with pytest.warns(UserWarning, match="FocalLoss runs uncompiled: compile=True needs torch 99 or newer"):
        loss = FocalLoss(compile=True)
    assert not loss.compiled
    assert not DRLoss(compile=True).compiled  # which never is, so there is nothing to say


def unstated(path):
    """Lines of a file that read or write text without saying its encoding, which on Windows is another one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        called = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", ""))
        binary = called == "open" and (isinstance(node.func, ast.Attribute) or "b" in ast.unparse(node.args[1:]))
        if called in ("read_text", "write_text", "open") and not binary:
            if "encoding" not in {keyword.arg for keyword in node.keywords}:
                yield node.lineno


def test_text_files_state_their_encoding():
    for folder in ("detloss_plugins", "tools", "tests", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not list(unstated(path)), path


def test_an_unstated_encoding_is_noticed(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "open('a')\nopen('b', 'rb')\np.read_text()\np.write_text('é', encoding='utf-8')\n", encoding="utf-8"
    )
    assert list(unstated(path)) == [1, 3]
