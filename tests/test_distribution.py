"""Losses on distributions over bins: DFL over bins of one's own, and D-FINE's distillation of distributions."""

import pytest
import torch
import torch.nn.functional as F

from detloss_plugins import build_loss
from detloss_plugins.losses import (
    DistributionDistillationLoss,
    DistributionFocalLoss,
    distribution_focal_loss,
    fgl_bins,
)


def both(loss, pred, target):
    value = loss(pred, target)
    return value, torch.autograd.grad(value.sum(), pred)[0]


def test_bins_of_0_1_2_are_the_default():
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(200, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    target = 20 * torch.rand(200, generator=generator, dtype=torch.float64) - 2
    target[:16] = torch.arange(16)
    given = DistributionFocalLoss(bins=list(range(16)), reduction="none")
    torch.testing.assert_close(both(given, pred, target), both(DistributionFocalLoss(reduction="none"), pred, target))


def test_the_minimum_over_any_bins_is_where_the_mean_is_the_target():
    """Two bins with the right shares decode to the target: that is what the weights are for."""
    bins = torch.tensor(fgl_bins())
    for y in (-3.1, -0.4, 0.0, 0.3, 2.7):
        pred = torch.zeros(1, len(bins), requires_grad=True)
        optimizer = torch.optim.Adam([pred], lr=0.5)
        for _ in range(300):
            optimizer.zero_grad()
            distribution_focal_loss(pred, torch.tensor([y]), bins=bins.tolist()).sum().backward()
            optimizer.step()
        assert (pred.softmax(-1) @ bins).item() == pytest.approx(y, abs=0.01)


def test_a_nan_target_is_the_callers():
    loss = DistributionFocalLoss(bins=[-1, 0, 3], reduction="none")
    value = loss(torch.zeros(2, 3), torch.tensor([float("nan"), 0.5]))
    assert value.isnan().tolist() == [True, False]


@pytest.mark.parametrize("wrong", [[1], [0, 0], [1, 0, 2], [0, float("nan")], "0, 1", 3, True])
def test_bins_that_do_not_increase(wrong):
    with pytest.raises((TypeError, ValueError), match="bins of DistributionFocalLoss must be increasing numbers"):
        DistributionFocalLoss(bins=wrong)


def test_as_many_bins_as_logits():
    with pytest.raises(ValueError, match="bins of DistributionFocalLoss has 3 values, and there are 4 logits"):
        DistributionFocalLoss(bins=[0, 1, 2])(torch.zeros(2, 4), torch.zeros(2))


@pytest.mark.parametrize("reg_max", [2, 33])
def test_no_such_bins(reg_max):
    with pytest.raises(ValueError, match="reg_max of fgl_bins"):
        fgl_bins(reg_max)


def distillation(n=40, bins=8, seed=0):
    """Logits of student and teacher, a row a side, and for each box whether it is matched and its weight."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, n, 4, bins, generator=generator, dtype=torch.float64)
    matched = torch.rand(n, generator=generator) < 0.3
    return student.requires_grad_(), teacher, matched, torch.rand(n, generator=generator, dtype=torch.float64)


def by_parts(student, teacher, matched, weight, temperature):
    """D-FINE's, as its paper says it: a mean over each kind of sides, and of the two by the roots of their numbers."""
    p, q = (x.div(temperature).softmax(-1) for x in (teacher, student))
    sides = weight[:, None] * temperature**2 * (p * (p / q).log()).sum(-1)
    parts, roots = [], []
    for kind in (matched, ~matched):
        if kind.any():
            parts.append(sides[kind].mean())
            roots.append(sides[kind].numel() ** 0.5)
    return sum(root * part for root, part in zip(roots, parts, strict=True)) / sum(roots)


@pytest.mark.parametrize("share", ["some", "all", "none"])
def test_distillation_weighs_both_kinds_by_the_roots_of_their_counts(share):
    student, teacher, matched, weight = distillation()
    matched = {"some": matched, "all": matched | True, "none": matched & False}[share]
    loss = DistributionDistillationLoss(temperature=3.0, loss_weight=2.0)
    expected = 2 * by_parts(student, teacher, matched, weight, 3.0)
    found = loss(student, teacher, weight, matched=matched)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (found, expected)))
    of_sides = [x.repeat_interleave(4) for x in (weight, matched)]
    torch.testing.assert_close(
        loss(student.flatten(0, 1), teacher.flatten(0, 1), of_sides[0], matched=of_sides[1]), found
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_matched_may_be_ones_and_zeros(dtype):
    student, teacher, matched = torch.randn(5, 8), torch.randn(5, 8), torch.tensor([True, False, False, True, False])
    loss = DistributionDistillationLoss()
    found = loss(student, teacher, matched=matched.to(dtype))
    torch.testing.assert_close(found, loss(student, teacher, matched=matched))


def test_without_weights_all_sides_count_alike():
    student, teacher, matched, weight = distillation()
    found = DistributionDistillationLoss()(student, teacher, matched=matched)
    torch.testing.assert_close(found, by_parts(student, teacher, matched, torch.ones_like(weight), 5.0))


def test_distillation_is_the_divergence_of_torch():
    student, teacher, *_ = distillation()
    rows = DistributionDistillationLoss(temperature=2.0, reduction="none")(student, teacher)
    p, q = teacher / 2, student / 2
    expected = 4 * F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(rows, expected)


def test_no_boxes_to_distill():
    empty = torch.zeros(0, 4, 8, requires_grad=True)
    value = DistributionDistillationLoss()(empty, empty.detach(), matched=torch.zeros(0, dtype=torch.bool))
    value.backward()
    assert value == 0


def test_the_teacher_gets_no_gradient():
    student, teacher, matched, weight = distillation()
    teacher.requires_grad_()
    DistributionDistillationLoss()(student, teacher, weight, matched=matched).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("how", [{"avg_factor": 3.0}, {"reduction_override": "sum"}, {"reduction_override": "none"}])
def test_matched_makes_a_mean(how):
    student, teacher, matched, weight = distillation()
    with pytest.raises(ValueError, match='matched is for a "mean" without avg_factor'):
        DistributionDistillationLoss()(student, teacher, weight, matched=matched, **how)
    with pytest.raises(ValueError, match="of student and teacher"):
        build_loss({"type": "DistributionDistillationLoss"})(student, teacher[:3])
