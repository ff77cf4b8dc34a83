"""The soak: it passes, it makes the same case again, and a wrong loss does not pass."""

import pytest
import soak
import torch

from detloss_plugins.loss import Loss
from detloss_plugins.registry import registered_losses


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost small calls more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_sixty_cases(capsys):
    counts, failed = soak.soak(soak.Case(0, number) for number in range(60))
    assert failed == 0, capsys.readouterr().out
    assert len(counts) > 30


@pytest.mark.slow
def test_thousands_of_cases(capsys):
    """By number, not by time, as a faster machine would find what a slower one does not."""
    counts, failed = soak.soak(soak.Case(3, number) for number in range(3700))
    assert failed == 0, capsys.readouterr().out
    assert len(counts) == len(registered_losses())


def test_the_command_runs_for_some_time(capsys):
    assert soak.main(["--minutes", "0.02", "--seed", "0"]) == 0
    assert ": 0 failed" in capsys.readouterr().out


def test_a_case_again(capsys):
    assert soak.Case(5, 17).words == soak.Case(5, 17).words != soak.Case(6, 17).words
    assert soak.main(["--seed", "5", "--case", "17"]) == 0
    assert capsys.readouterr().out == "1 cases of 1 losses on " + ", ".join(soak.devices()) + ": 0 failed\n"


@pytest.mark.parametrize("method", ["summed", "weigh"])
def test_a_wrong_loss_is_found(method, monkeypatch, capsys):
    right = getattr(Loss, method)
    monkeypatch.setattr(Loss, method, lambda self, *args: 1.001 * right(self, *args))
    _, failed = soak.soak(soak.Case(0, number) for number in range(25))
    assert failed > 3
    assert "value differs by" in capsys.readouterr().out
