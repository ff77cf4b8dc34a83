"""The samplers that the other tests stand on: varied, valid, deterministic."""

import pytest
import torch

from detloss_plugins.families import BoxLoss, ClassificationLoss, DistributionLoss, RankingLoss, RegionLoss
from detloss_plugins.losses import GaussianFocalLoss, KLDivLoss
from detloss_plugins.registry import registered_losses

# Many losses inherit one sampler.
SAMPLERS = {cls.sample.__func__: cls for cls in registered_losses().values()}


@pytest.mark.parametrize("cls", SAMPLERS.values(), ids=[function.__qualname__ for function in SAMPLERS])
def test_deterministic_and_varied(cls):
    pred, target = cls.sample(50)
    assert len(pred.unique(dim=0)) == 50
    assert len(target.unique(dim=0)) > (20 if target.is_floating_point() else 5)
    for a, b in zip(cls.sample(50, seed=3), cls.sample(50, seed=3), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(cls.sample(50, seed=3)[0], cls.sample(50, seed=4)[0])


def test_boxes():
    pred, target = BoxLoss.sample(500)
    for boxes in (pred, target):
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    disjoint = ((pred[:, 2:] <= target[:, :2]) | (target[:, 2:] <= pred[:, :2])).any(-1)
    assert 0.01 < disjoint.float().mean() < 0.5


@pytest.mark.parametrize("family", [ClassificationLoss, RankingLoss])
def test_qualities_of_classes(family):
    _, target = family.sample(500)
    assert target.min() == 0
    assert 0.9 < target.max() < 1
    assert set((target > 0).sum(-1).tolist()) == {0, 1}


def test_distributions_over_classes():
    _, target = KLDivLoss.sample(500)
    torch.testing.assert_close(target.sum(-1), torch.ones(len(target)))
    assert 0.2 < (target.amax(-1) == 1).float().mean() < 0.3


def test_heatmaps():
    pred, target = GaussianFocalLoss.sample(500)
    assert 0 < pred.min() < pred.max() < 1
    assert set((target == 1).sum(-1).tolist()) == {0, 1}


def test_distances_in_bins():
    pred, target = DistributionLoss.sample(500)
    assert target.min() >= 0
    assert target.max() < pred.shape[-1] - 1
    assert len(target.floor().unique()) == pred.shape[-1] - 1


def test_masks():
    _, target = RegionLoss.sample(500)
    assert set(target.unique().tolist()) == {0, 1}
    assert 0 < (target.flatten(1).sum(-1) == 0).float().mean() < 0.5
