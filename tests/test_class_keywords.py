"""A loss class states its function and facts as keywords of its class statement, or as attributes."""

import pytest
import torch

from detloss_plugins.families import RegressionLoss
from detloss_plugins.losses import GIoULoss, L1Loss, l1_loss


class ByKeywords(RegressionLoss, fn=l1_loss, row_wise=True, keeps_little=True, upstream=L1Loss.facts.upstream):
    pass


class ByAttributes(RegressionLoss):
    fn = staticmethod(l1_loss)
    facts = RegressionLoss.facts.but(row_wise=True, keeps_little=True, upstream=L1Loss.facts.upstream)


class OnTopOfAttributes(RegressionLoss, bounds=(0.0, 9.0)):
    fn = staticmethod(l1_loss)
    facts = L1Loss.facts


def test_both_spellings_are_one():
    assert ByKeywords.facts == ByAttributes.facts == L1Loss.facts
    pred, target = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.0])
    assert ByKeywords()(pred, target) == ByAttributes()(pred, target) == 1.25
    assert OnTopOfAttributes.facts == L1Loss.facts.but(bounds=(0.0, 9.0))


def test_what_a_subclass_does_not_state():
    changed = type("Changed", (GIoULoss,), {}, bounds=(0.0, 3.0))
    assert changed.facts == GIoULoss.facts.but(bounds=(0.0, 3.0), row_wise=False, upstream=())
    assert type("Kept", (GIoULoss,), {}, row_wise=True).facts == GIoULoss.facts.but(upstream=())


def test_an_unknown_keyword():
    with pytest.raises(TypeError, match=r"states fn and the facts family, paper, .*, attracts, not row_wize\.$"):
        type("Misspelt", (GIoULoss,), {}, row_wize=True)
    with pytest.raises(ValueError, match="bounds must be two increasing numbers"):
        type("Wrong", (GIoULoss,), {}, bounds=(1.0, 0.0))
