"""The samplers that the other tests stand on: varied, valid, deterministic."""

import torch


def test_deterministic(loss_cls):
    for a, b in zip(loss_cls.sample(50, seed=3), loss_cls.sample(50, seed=3), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(loss_cls.sample(50, seed=3)[0], loss_cls.sample(50, seed=4)[0])


def test_rows_vary(loss_cls):
    pred, target = loss_cls.sample(50)
    assert len(pred.unique(dim=0)) == 50
    assert len(target.unique(dim=0)) > (20 if target.is_floating_point() else 5)


def test_valid(loss_cls):
    pred, target = loss_cls.sample(500)
    if loss_cls.family == "box":
        for boxes in (pred, target):
            assert (boxes[:, 2:] > boxes[:, :2]).all()
        disjoint = ((pred[:, 2:] <= target[:, :2]) | (target[:, 2:] <= pred[:, :2])).any(-1)
        assert 0.01 < disjoint.float().mean() < 0.5
    elif loss_cls.family == "classification" and target.is_floating_point() and pred.shape == target.shape:
        assert target.min() == 0
        assert 0.9 < target.max() < 1
        positives = (target > 0).sum(-1)
        assert set(positives.tolist()) == {0, 1}
    elif loss_cls.family == "soft label":
        torch.testing.assert_close(target.sum(-1), torch.ones(len(target)))
        assert 0.2 < (target.amax(-1) == 1).float().mean() < 0.3
    elif loss_cls.family == "heatmap":
        assert 0 < pred.min() < pred.max() < 1
        assert set((target == 1).sum(-1).tolist()) == {0, 1}
    elif loss_cls.family == "distribution":
        assert target.min() >= 0
        assert target.max() < pred.shape[-1] - 1
        assert len(target.floor().unique()) == pred.shape[-1] - 1
