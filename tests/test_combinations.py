"""Every row of docs/combinations.md, which tools/table.py writes, is a loss that can be built and called."""

import pytest
import table
import torch

from detloss_plugins import build_loss
from detloss_plugins.testing import sample

ROWS = table.combinations()
FAMILIES = {"box": "box", "box of OBB": "rotated", "cls": "classification"}


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_combination(row):
    """It has a finite value with a gradient, alike before and after a step, in training and in evaluation."""
    loss = build_loss(row["loss"])
    assert loss.family == FAMILIES[row["slot"]]
    pred, target = sample(loss, 32)
    pred.requires_grad_()
    for mode in (True, False):
        value = loss.train(mode)(pred, target)
        (slope,) = torch.autograd.grad(value, pred)
        assert value > 0
        assert slope.isfinite().all()
        assert (slope.abs().sum(-1) > 0).float().mean() > 0.5


def test_the_page_is_up_to_date():
    page = table.COMBINATIONS.read_text(encoding="utf-8")
    assert table.updated(page, ["combinations"]) == page
    assert len({row["name"] for row in ROWS}) == len(ROWS)


def test_each_row_is_written_as_python_that_gives_it():
    for row in ROWS:
        assert eval(table.as_dict(row["loss"])) == row["loss"]


def test_an_auxiliary_loss_at_a_ratio():
    """0.8 of the one and 0.2 of the other, row by row."""
    pred, target = sample(build_loss({"type": "CIoULoss"}), 32)
    (cfg,) = (row["loss"] for row in ROWS if row["name"] == "CIoU and GCD, ratio 0.8")
    rows = [build_loss({**part, "reduction": "none"})(pred, target) for part in (cfg, *cfg["losses"])]
    torch.testing.assert_close(rows[0], rows[1] + rows[2])
    ciou = build_loss({"type": "CIoULoss", "reduction": "none"})(pred, target)
    torch.testing.assert_close(rows[1], 0.8 * ciou)
