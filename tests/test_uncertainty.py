"""UncertaintyKLLoss called with a log variance; what it does without one, every loss is tested for."""

import math

import pytest
import torch
from support import needs_compiler

from detloss_plugins.adapters.ultralytics import SLOTS
from detloss_plugins.losses import JointLoss, SmoothL1Loss, UncertaintyKLLoss

ERRORS = torch.tensor([0.3, -1.4, 0.05, 2.0], dtype=torch.float64)
LOG_VARIANCE = torch.tensor([0.0, 0.5, -1.0, -0.2], dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual.detach(), torch.tensor(expected, dtype=torch.float64), atol=6e-7, rtol=0)


def sample(n=16, dtype=torch.float64):
    """Predictions, targets and log variances ``(n, 4)``; a quarter of the errors is small."""
    generator = torch.Generator().manual_seed(0)
    pred, target, log_variance = torch.randn(3, n, 4, generator=generator, dtype=torch.float64)
    pred[: n // 4] = target[: n // 4] + 0.01 * pred[: n // 4]
    return pred.to(dtype).requires_grad_(), target.to(dtype), (2 * log_variance).to(dtype).requires_grad_()


def test_worked_numbers():
    pred, log_variance = (ERRORS + 3).requires_grad_(), LOG_VARIANCE.clone().requires_grad_()
    rows = UncertaintyKLLoss(reduction="none")(pred, torch.full_like(ERRORS, 3), log_variance)
    close(rows, [0.045000, 0.795878, -0.496602, 1.732104])
    by_pred, by_log_variance = torch.autograd.grad(rows.sum(), (pred, log_variance))
    close(by_pred, [0.300000, -0.606531, 0.135914, 1.221403])
    close(by_log_variance, [0.455000, -0.045878, 0.496602, -1.332104])


def test_gradient_of_both_arguments():
    pred, target, log_variance = sample()
    loss = UncertaintyKLLoss(reduction="none")
    assert torch.autograd.gradcheck(lambda p, a: loss(p, target, a), (pred, log_variance))


def test_the_best_variance_is_that_of_the_errors():
    """For one log variance of many small errors, the minimum is at log(mean d^2)."""
    errors = 0.5 * torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(-1.9, 1.9)
    best = errors.square().mean().log().requires_grad_()
    value = UncertaintyKLLoss()(errors, torch.zeros_like(errors), best.expand_as(errors))
    assert torch.autograd.grad(value, best)[0].abs() < 1e-12


def test_reductions_and_weights():
    pred, target, log_variance = sample()
    rows = UncertaintyKLLoss(reduction="none")(pred, target, log_variance)
    weight = torch.arange(len(pred)) % 3
    loss = UncertaintyKLLoss(loss_weight=2.0)
    for form in (weight, weight.unsqueeze(-1), weight.unsqueeze(-1).expand_as(pred)):
        expected = 2 * (rows * weight.unsqueeze(-1)).sum() / (7 + torch.finfo(torch.float32).eps)
        torch.testing.assert_close(loss(pred, target, log_variance, form, avg_factor=7.0), expected)
    torch.testing.assert_close(loss(pred, target, log_variance), 2 * rows.mean())
    torch.testing.assert_close(loss(pred, target, log_variance, reduction_override="sum"), 2 * rows.sum())
    with pytest.raises(ValueError, match="avg_factor"):
        loss(pred, target, log_variance, avg_factor=7.0, reduction_override="sum")


def test_a_weight_that_is_no_tensor():
    pred, target, log_variance = torch.zeros(3, 2, 4)
    for given in ((log_variance,), ()):
        with pytest.raises(TypeError, match="weight of UncertaintyKLLoss must be a tensor or None"):
            UncertaintyKLLoss()(pred, target, *given, weight=2.0)


def test_without_a_log_variance_it_is_smooth_l1():
    pred, target, log_variance = sample()
    expected = SmoothL1Loss()(pred, target)
    assert torch.equal(UncertaintyKLLoss()(pred, target), expected)
    torch.testing.assert_close(UncertaintyKLLoss()(pred, target, 0 * log_variance), expected)


@pytest.mark.parametrize(("log_variance", "end"), [(-40.0, -10.0), (40.0, 10.0), (1e30, 10.0), (-1e30, -10.0)])
@pytest.mark.parametrize("error", [0.0, 0.3, 1e6])
def test_beyond_the_clamp_value_and_gradient_are_those_of_the_end(log_variance, end, error):
    results = []
    for number in (log_variance, end):
        pred = torch.tensor([error], requires_grad=True)
        alpha = torch.tensor([number], requires_grad=True)
        value = UncertaintyKLLoss()(pred, torch.zeros(1), alpha)
        results.append((value, *torch.autograd.grad(value, (pred, alpha))))
        assert all(x.isfinite() for x in results[-1])
    assert results[0] == results[1]


@pytest.mark.parametrize("start", [-30.0, 30.0])
def test_what_is_beyond_the_clamp_comes_back(start):
    alpha = torch.tensor([start], requires_grad=True)
    optimizer = torch.optim.Adam([alpha], lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        UncertaintyKLLoss()(torch.tensor([0.5]), torch.zeros(1), alpha).backward()
        optimizer.step()
    assert alpha.abs() < 10


def test_clamp_is_a_setting():
    pred, alpha = torch.tensor([0.3], requires_grad=True), torch.tensor([-5.0], requires_grad=True)
    value = UncertaintyKLLoss(clamp=2.0)(pred, torch.zeros(1), alpha)
    assert value.item() == pytest.approx(math.exp(2) * 0.045 - 1)
    for clamp in (0.0, -1.0):
        with pytest.raises(ValueError, match="clamp"):
            UncertaintyKLLoss(clamp=clamp)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype):
    """With a log variance whose exponential float16 has not."""
    halves = [x.detach().to(dtype) for x in sample()]
    halves[2] = halves[2].clone()
    halves[2][0, 0] = -11.5
    results = []
    for inputs in (halves, [x.float() for x in halves]):
        pred, target, log_variance = inputs[0].requires_grad_(), inputs[1], inputs[2].requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = UncertaintyKLLoss(clamp=12.0)(pred, target, log_variance)
        results.append((value, *torch.autograd.grad(value, (pred, log_variance))))
    (value, *gradients), (expected, *wanted) = results
    assert value.dtype == torch.float32
    assert value == expected
    assert all(torch.equal(got, want.to(dtype)) for got, want in zip(gradients, wanted, strict=True))


def test_empty():
    pred, target, log_variance = (x[:0] for x in sample())
    for reduction in ("none", "mean", "sum"):
        value = UncertaintyKLLoss()(pred, target, log_variance, reduction_override=reduction)
        assert value.sum() == 0
        value.sum().backward()


def test_nan_is_not_hidden():
    for position in (0, 2):
        inputs = [x.detach().clone() for x in sample()]
        inputs[position][0] = torch.nan
        assert UncertaintyKLLoss()(*inputs).isnan()


@needs_compiler
def test_inputs_are_not_modified_and_one_graph():
    inputs = sample()
    before = [x.detach().clone() for x in inputs]
    loss = UncertaintyKLLoss()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="eager")(*inputs), loss(*inputs))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_weights_in_the_place_of_the_log_variance():
    """As a head without one hands them over."""
    pred, target, log_variance = sample()
    for weight in (torch.ones_like(target), torch.ones(len(target))):
        with pytest.raises(ValueError, match=r"third argument .* not weights .* use UncertaintyBBoxHead or"):
            UncertaintyKLLoss()(pred, target, weight)
    with torch.no_grad():  # nothing has a gradient there
        UncertaintyKLLoss()(pred, target, log_variance)
    UncertaintyKLLoss()(pred.detach(), target, log_variance.detach())
    with pytest.raises(ValueError, match=r"\(16, 4\) and target \(15, 4\)"):
        UncertaintyKLLoss()(pred, target[1:], log_variance)


def test_nothing_without_a_log_variance_takes_it_for_a_regression_loss():
    assert not any(UncertaintyKLLoss.family in families for slots in SLOTS.values() for families in slots.values())
    with pytest.raises(ValueError, match="one family"):
        JointLoss(losses=[dict(type="L1Loss"), dict(type="UncertaintyKLLoss")])
