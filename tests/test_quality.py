"""A positive of quality 0 stays a positive where the target tells: a label beside each quality."""

import math

import pytest
import torch

from detloss_plugins import build_loss
from detloss_plugins.testing.check.subject import small_chunks

LABEL = torch.tensor([1, 0, 3, -1])  # of quality 0, of quality .6, background, ignored
QUALITY = torch.tensor([0.0, 0.6, 0.0, 0.0])
X = 0.8
MISSED = math.log1p(math.exp(X))  # BCE of a target of 0
# Of the logit .8: BCE(x, 0), and BCE(x, .01) as .01 is the least target.
POSITIVE = {"MALoss": MISSED, "IABCELoss": MISSED - 0.01 * X}
NEGATIVE = {"MALoss": MISSED / (1 + math.exp(-X)) ** 1.5, "IABCELoss": MISSED / (1 + math.exp(-X)) ** 2}
WRAPPED = {
    "alone": lambda name: {"type": name},
    "JointLoss": lambda name: {"type": "JointLoss", "losses": [{"type": name}, {"type": name, "loss_weight": 0.5}]},
    "SlideLoss": lambda name: {"type": "SlideLoss", "base": {"type": name, "loss_weight": 2.0}},
    "moving SlideLoss": lambda name: {"type": "SlideLoss", "base": {"type": name}, "decay": 0.9},
    "ConfidenceWeightedLoss": lambda name: {"type": "ConfidenceWeightedLoss", "base": {"type": name}},
}
FACTOR = {"alone": 1.0, "JointLoss": 1.5, "SlideLoss": 2.0, "moving SlideLoss": 1.0}
each = pytest.mark.parametrize("name", POSITIVE)
wrapped = pytest.mark.parametrize("how", WRAPPED)


@each
@wrapped
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_positive_of_quality_0(how, name, dtype):
    loss = build_loss({**WRAPPED[how](name), "reduction": "none"})
    pred = torch.full((4, 3), X, dtype=dtype)
    factor = FACTOR.get(how, (1 - 1 / (1 + math.exp(-X))) ** 3)  # of the confidence weight: (1 - p)^2 (1 - p)
    rounded = 3e-3 if dtype == torch.bfloat16 else 3e-4 if dtype == torch.float16 else 1e-6
    rows = loss(pred, (LABEL, QUALITY.to(dtype)))
    torch.testing.assert_close(rows[0, 1].item(), factor * POSITIVE[name], rtol=rounded, atol=0)
    for negative in (rows[0, 0], rows[2, 1]):
        torch.testing.assert_close(negative.item(), factor * NEGATIVE[name], rtol=rounded, atol=0)
    assert (rows[3] == 0).all()
    dense = torch.zeros(4, 3, dtype=dtype)
    dense[1, 0] = 0.6
    torch.testing.assert_close(loss(pred, dense)[0, 1].item(), factor * NEGATIVE[name], rtol=rounded, atol=0)


@each
@wrapped
def test_in_chunks_and_with_a_gradient(how, name):
    """Value and gradient of the sum are those of the rows."""
    loss = build_loss(WRAPPED[how](name)).eval()
    pred = torch.full((4, 3), X, requires_grad=True)
    expected = loss(pred, (LABEL, QUALITY), reduction_override="none").sum()
    with small_chunks("cpu"):
        found = loss(pred, (LABEL, QUALITY), reduction_override="sum")
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(value, pred)[0] for value in (found, expected)]
    torch.testing.assert_close(*slopes)
    assert slopes[0][0, 1] > slopes[0][0, 0] > 0


@each
def test_a_label_is_a_quality_of_one(name):
    loss, pred = build_loss({"type": name, "reduction": "none"}), torch.full((4, 3), X)
    torch.testing.assert_close(loss(pred, LABEL), loss(pred, (LABEL, torch.ones(4))))
    torch.testing.assert_close(loss(pred, (LABEL, None)), loss(pred, LABEL))


def test_powers_of_nothing():
    """``gamma=0`` is BCE with labels; a small power makes no positive of a negative."""
    pred, target = torch.randn(5, 3), torch.eye(3)[[0, 1, 2, 0, 1]]
    bce = torch.nn.functional.binary_cross_entropy_with_logits(pred, target)
    torch.testing.assert_close(build_loss({"type": "MALoss", "gamma": 0.0})(pred, target), bce)
    almost = build_loss({"type": "MALoss", "gamma": 1e-6})(pred, target)
    torch.testing.assert_close(almost, bce, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["MALoss", "VarifocalLoss"])
def test_only_the_weight_is_detached(name):
    """With it as part of the gradient, that is the derivative."""
    loss = build_loss({"type": name, "detach_weight": False, "reduction": "none"})
    pred = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    target = torch.rand(6, 3, dtype=torch.float64) * (torch.rand(6, 3) < 0.5)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), (pred,))
    loss.detach_weight = True
    assert not torch.autograd.gradcheck(lambda x: loss(x, target), (pred,), raise_exception=False)
