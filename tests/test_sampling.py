"""What losses are tested on: varied, valid, deterministic."""

import pytest
import torch

from detloss_plugins.families import BoxLoss, ClassificationLoss, DistributionLoss, RankingLoss, RegionLoss
from detloss_plugins.loss import Loss
from detloss_plugins.losses import GaussianFocalLoss, JointLoss, KLDivLoss, L1Loss
from detloss_plugins.registry import registered_losses
from detloss_plugins.testing import sample
from detloss_plugins.testing.samples import sampler_of

# Many losses share one sampler.
SAMPLERS = {sampler_of(cls): cls for cls in registered_losses().values()}


@pytest.mark.parametrize("cls", SAMPLERS.values(), ids=[function.__qualname__ for function in SAMPLERS])
def test_deterministic_and_varied(cls):
    pred, target = sample(cls, 50)
    assert len(pred.unique(dim=0)) == 50
    assert len(target.unique(dim=0)) > (20 if target.is_floating_point() else 5)
    for a, b in zip(sample(cls, 50, seed=3), sample(cls, 50, seed=3), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(sample(cls, 50, seed=3)[0], sample(cls, 50, seed=4)[0])


def test_boxes():
    pred, target = sample(BoxLoss, 500)
    for boxes in (pred, target):
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    disjoint = ((pred[:, 2:] <= target[:, :2]) | (target[:, 2:] <= pred[:, :2])).any(-1)
    assert 0.01 < disjoint.float().mean() < 0.5


@pytest.mark.parametrize("family", [ClassificationLoss, RankingLoss])
def test_qualities_of_classes(family):
    _, target = sample(family, 500)
    assert target.min() == 0
    assert 0.9 < target.max() < 1
    assert set((target > 0).sum(-1).tolist()) == {0, 1}


def test_distributions_over_classes():
    _, target = sample(KLDivLoss, 500)
    torch.testing.assert_close(target.sum(-1), torch.ones(len(target)))
    assert 0.2 < (target.amax(-1) == 1).float().mean() < 0.3


def test_heatmaps():
    pred, target = sample(GaussianFocalLoss, 500)
    assert 0 < pred.min() < pred.max() < 1
    assert set((target == 1).sum(-1).tolist()) == {0, 1}


def test_distances_in_bins():
    pred, target = sample(DistributionLoss, 500)
    assert target.min() >= 0
    assert target.max() < pred.shape[-1] - 1
    assert len(target.floor().unique()) == pred.shape[-1] - 1


def test_masks():
    _, target = sample(RegionLoss, 500)
    assert set(target.unique().tolist()) == {0, 1}
    assert 0 < (target.flatten(1).sum(-1) == 0).float().mean() < 0.5


def test_a_sampler_of_its_own_wins():
    class Own(L1Loss):
        @classmethod
        def sample(cls, n=64, seed=0, dtype=torch.float32):
            return torch.full((n, 1), seed, dtype=dtype), torch.zeros(n, 1, dtype=dtype)

    for loss in (Own, Own()):
        assert sample(loss, 2, seed=3)[0].tolist() == [[3.0], [3.0]]


def test_the_family_of_an_instance_counts():
    joint = JointLoss(losses=[{"type": "CIoULoss"}])
    assert torch.equal(sample(joint, 5)[0], sample(BoxLoss, 5)[0])
    assert sample(JointLoss, 5)[0].shape == (5, 10)


def test_a_loss_of_no_known_family():
    with pytest.raises(
        TypeError, match=r"Odd needs a classmethod sample\(n, seed, dtype\), or one of the families box, "
    ):
        sample(type("Odd", (Loss,), {}, family="odd"))
