"""The equalized focal losses beside their formulas in numpy over several steps, state included."""

import numpy as np
import pytest
import torch

from detloss_plugins import build_loss
from detloss_plugins.losses import EqualizedFocalLoss, EqualizedQualityFocalLoss, equalized_focal_loss
from detloss_plugins.losses import equalized_quality_focal_loss as eqfl

CLASSES = 4
X, Y = np.array([[0.8, -0.4, 1.5], [-1.0, 0.3, 0.2]]), np.array([[1.0, 0, 0], [0, 0, 1]])
QUALITY = np.array([[0.6, 0, 0], [0, 0, 0.9]])
RATIO = torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(
        found.detach().double(), torch.as_tensor(expected, dtype=torch.float64), atol=6e-7, rtol=0
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def focal(x, y, quality, gamma):
    """``.25 or .75 (1 - p_t)^gamma CE`` for labels, ``|q - p|^gamma BCE`` for qualities."""
    p = sigmoid(x)
    if quality is None:
        p_t = y * p + (1 - y) * (1 - p)
        return (0.25 * y + 0.75 * (1 - y)) * (1 - p_t) ** gamma * -np.log(p_t)
    return np.abs(quality - p) ** gamma * -(quality * np.log(p) + (1 - quality) * np.log(1 - p))


class Reference:
    """The authors' way: the gradients of a step, here by central differences, move the powers of the next one."""

    def __init__(self, of_quality, gamma=2.0, scale=8.0):
        self.of_quality, self.gamma, self.scale = of_quality, gamma, scale
        self.positive, self.negative, self.ratio = np.zeros(CLASSES), np.zeros(CLASSES), np.ones(CLASSES)

    def __call__(self, x, y, quality, weight):
        power = self.gamma + self.scale * (1 - self.ratio)

        def loss(x):
            return power / self.gamma * focal(x, y, quality if self.of_quality else None, power) * weight[:, None]

        step = 1e-6
        slope = np.abs(loss(x + step) - loss(x - step)) / (2 * step)  # each element depends on its own logit alone
        self.positive += (slope * y).sum(0)
        self.negative += (slope * (1 - y)).sum(0)
        self.ratio = np.clip(self.positive / (self.negative + 1e-10), 0, 1)
        return loss(x)


def batch(seed, n=60):
    """Logits, labels of which the later ones are rare, one-hot targets, qualities and weights."""
    random = np.random.default_rng(seed)
    label = random.choice(CLASSES + 1, n, p=[0.3, 0.1, 0.04, 0.01, 0.55])
    y = np.eye(CLASSES + 1)[label][:, :CLASSES]
    weight = random.choice([0.0, 1.0, 2.0], n)
    return random.normal(size=(n, CLASSES)) - y, label, y, y * random.random((n, 1)), weight


@pytest.mark.parametrize("cls", [EqualizedFocalLoss, EqualizedQualityFocalLoss])
def test_over_several_steps(cls):
    of_quality = cls is EqualizedQualityFocalLoss
    loss, reference = cls(num_classes=CLASSES, reduction="none").double(), Reference(of_quality)
    for seed in range(5):
        x, label, y, quality, weight = batch(seed)
        pair = torch.tensor(label), torch.tensor(quality.sum(-1))
        pred = torch.tensor(x, requires_grad=True)
        rows = loss(pred, pair if of_quality else pair[0], torch.tensor(weight))
        expected = torch.tensor(reference(x, y, quality, weight))
        torch.testing.assert_close(rows.detach(), expected.sum(-1) if of_quality else expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loss.pos_neg, torch.tensor(reference.ratio), rtol=1e-7, atol=1e-9)
    assert loss.pos_neg[0] > 2 * loss.pos_neg[3], "rare classes have the smaller ratio"


def test_worked_numbers():
    pred, target, quality = map(torch.tensor, (X, Y, QUALITY))
    expected = [[0.000247, 0.061966, 1.018942], [0.000267, 0.211443, 0.001009]]
    close(equalized_focal_loss(pred, target, ratio=RATIO), expected)
    expected = [[0.000001, 0.082622, 1.358590], [0.000356, 0.281924, 0.000559]]
    close(eqfl(pred, quality, ratio=RATIO), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("cls", [EqualizedFocalLoss, EqualizedQualityFocalLoss])
def test_the_state_follows_the_gradient_of_soft_targets(cls, smoothing):
    """Of this loss, as autograd has it; ignored elements have none, and a smoothed negative stays one."""
    loss = cls(num_classes=5, label_smoothing=smoothing, reduction="sum").double()  # more room than there are classes
    pred = torch.randn(40, CLASSES, dtype=torch.float64, requires_grad=True)
    target = torch.rand(40, CLASSES, dtype=torch.float64) * (torch.rand(40, CLASSES) < 0.5)
    target[::7, 0] = -1
    loss.pos_neg[:CLASSES] = torch.tensor([0.2, 0.9, 1.0, 0.5])
    (gradient,) = torch.autograd.grad(loss(pred, target), pred)
    positive, negative = (torch.where(kind, gradient.abs(), 0.0).sum(0) for kind in (target > 0, target <= 0))
    torch.testing.assert_close(loss.pos_grad[:CLASSES], positive)
    torch.testing.assert_close(loss.neg_grad[:CLASSES], negative)
    torch.testing.assert_close(loss.pos_neg[:CLASSES], (positive / negative).clamp(max=1))
    assert loss.pos_neg[CLASSES] == 1


def test_a_class_with_more_positive_gradient_keeps_the_power():
    loss = EqualizedFocalLoss(num_classes=1)
    loss(torch.full((4, 1), -2.0, requires_grad=True), torch.tensor([0, 0, 0, 1]))
    assert loss.pos_grad > loss.neg_grad > 0
    assert loss.pos_neg == 1


def test_a_positive_of_quality_0_counts_as_one():
    loss = EqualizedQualityFocalLoss(num_classes=CLASSES)
    pred = torch.zeros(2, CLASSES, requires_grad=True)
    loss(pred, (torch.tensor([1, CLASSES]), torch.zeros(2)))
    assert (loss.pos_grad > 0).tolist() == [False, True, False, False]


def test_more_classes_than_there_is_room_for():
    with pytest.raises(ValueError, match="num_classes=3 takes no more logits than that, not 4"):
        build_loss({"type": "EqualizedFocalLoss", "num_classes": 3})(torch.zeros(2, 4), torch.tensor([0, 1]))
