"""The reduction contract on plain numbers."""

import pytest
import torch

from detloss_plugins.reduction import apply_weight, reduce


@pytest.mark.parametrize(
    ("loss_shape", "weight_shape", "expected_shape"),
    [
        ((5,), (5,), (5,)),
        ((5,), (5, 1), (5,)),
        ((5,), (5, 4), (5,)),
        ((5, 3), (5,), (5, 3)),
        ((5, 3), (5, 1), (5, 3)),
        ((5, 3), (15,), (5, 3)),
        ((2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 4, 5)),
    ],
)
def test_weight_shapes(loss_shape, weight_shape, expected_shape):
    weight = torch.rand(weight_shape)
    weighted = apply_weight(torch.ones(loss_shape), weight)
    assert weighted.shape == expected_shape
    torch.testing.assert_close(weighted.mean(), weight.mean())


@pytest.mark.parametrize(
    ("loss_shape", "weight_shape"),
    [
        ((5, 3), (4,)),
        ((5, 3), (3,)),
        ((5, 3), (5, 2)),
        ((5, 3), (2, 5, 3)),
        ((5, 3), (14,)),
        ((2, 3, 4, 5), (1, 3, 4, 5)),
        ((5,), (1, 5)),  # for as many boxes, a row of weights would mean those of one box
        ((2, 3), (3, 2)),  # as many numbers, in another order
        ((2, 3), (1, 3)),
    ],
)
def test_weight_that_does_not_fit(loss_shape, weight_shape):
    with pytest.raises(ValueError, match=rf"weight of shape .* does not fit losses of shape \({loss_shape[0]},"):
        apply_weight(torch.ones(loss_shape), torch.ones(weight_shape))


def test_mean_divides_by_elements_not_by_weights():
    assert reduce(torch.tensor([2.0, 4.0]), torch.tensor([3.0, 0.0])) == 3.0


def test_avg_factor():
    loss = torch.tensor([2.0, 4.0], requires_grad=True)
    assert reduce(loss, avg_factor=3) == 2.0
    assert reduce(loss, avg_factor=torch.tensor(3)) == 2.0
    assert reduce(loss, avg_factor=0).isfinite()
    assert torch.equal(reduce(loss, avg_factor=3, reduction="none"), loss)
    with pytest.raises(ValueError, match="avg_factor"):
        reduce(loss, avg_factor=3, reduction="sum")
    with pytest.raises(ValueError, match="'none', 'mean', 'sum'"):
        reduce(loss, reduction="avg")
