"""The ranking losses against their definitions: every sum over pairs written out, ``O(P (P + N))``, in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from detloss_plugins.losses import (
    ALRPLoss,
    APLoss,
    DRLoss,
    RankSortLoss,
    alrp_loss,
    ap_loss,
    distributional_ranking,
    rank_sort_errors,
)
from detloss_plugins.testing import sample

RANKING = {"APLoss": APLoss, "ALRPLoss": ALRPLoss, "RankSortLoss": RankSortLoss}
SCORES = [1, 0.2, -0.5, 0.6, 0.1, -0.4, -2]
HARD = [1.0, 1, 1, 0, 0, 0, 0]
QUALITY = [0.6, 0.9, 0.3, 0, 0, 0, 0]


# ---- the definitions ----


def step(x, delta):
    return (x >= 0).double() if delta == 0 else (x / (2 * delta) + 0.5).clamp(0, 1)


def matrices(positives, negatives, delta):
    """``H(s_k - s_i)`` and ``H(t_j - s_i)``, a row for each positive i."""
    return (step(x[None] - positives[:, None], delta) for x in (positives, negatives))


def ap(positives, negatives, delta, incoming):
    """Losses, and the update of positives and negatives for incoming gradients of the losses."""
    above, outranking = matrices(positives, negatives, delta)
    a = 1 + above.fill_diagonal_(0).sum(1)
    b = outranking.sum(1)
    # The interpolated precision is the best of all positives that score no higher; here its error, the least.
    not_above = positives[None] <= positives[:, None]
    losses = torch.where(not_above, (b / (a + b))[None], torch.inf).min(1).values
    share = torch.where(b > 0, losses / b, 0)
    return losses, -incoming * losses, (incoming * share) @ outranking


def alrp(positives, negatives, delta, incoming, loc_error):
    above, outranking = matrices(positives, negatives, delta)
    above.fill_diagonal_(0)
    b = outranking.sum(1)
    rank = 1 + above.sum(1) + b
    update = torch.where(b > 1e-5, -(above @ loc_error + b) / rank, 0)
    share = torch.where(b > 1e-5, -update / b, 0)
    return b / rank, incoming * update, (incoming * share) @ outranking


def alrp_localisation(positives, negatives, delta, loc_error):
    above, outranking = matrices(positives, negatives, delta)
    rank = 1 + above.fill_diagonal_(0).sum(1) + outranking.sum(1)
    return (positives[None] >= positives[:, None]).double() @ loc_error / rank


def rank_sort(positives, negatives, delta, incoming, quality):
    above, outranking = matrices(positives, negatives, delta)
    r, b = above.sum(1), outranking.sum(1)
    ranking = b / (r + b)
    worse = quality[None] < quality[:, None]
    right = above * ~worse
    # The excess of the mean badness above i over that of those that belong above i.
    current, ideal = (above @ (1 - quality)) / r, (right @ (1 - quality)) / right.sum(1)
    missorted = (above * worse).sum(1)
    bad = missorted > 1e-10
    sorting = torch.where(bad, current - ideal, 0)
    ranked = torch.where(b > 1e-10, ranking, 0)
    down = torch.where(bad, sorting / missorted, 0)
    update = -incoming * (ranked + sorting) + (incoming * down) @ (above * worse)
    return ranking + sorting, update, (incoming * torch.where(b > 1e-10, 1 / (r + b), 0)) @ outranking


def expected(name, positives, negatives, delta, incoming, quality):
    if name == "APLoss":
        return ap(positives, negatives, delta, incoming)
    if name == "ALRPLoss":
        return alrp(positives, negatives, delta, incoming, 1 - quality)
    return rank_sort(positives, negatives, delta, incoming, quality)


# ---- cases ----


def scene(p, n, seed, ties=None, spread=2.0):
    """Scores of positives and negatives and qualities, in float64; ``ties``: on a grid of this width."""
    generator = torch.Generator().manual_seed(seed)
    positives = spread * torch.randn(p, generator=generator, dtype=torch.float64)
    negatives = spread * torch.randn(n, generator=generator, dtype=torch.float64) - 1
    quality = torch.rand(p, generator=generator, dtype=torch.float64).clamp(min=1e-3)
    if ties:
        positives, negatives = ((x / ties).round() * ties for x in (positives, negatives))
        quality = (quality * 4).ceil() / 4
    return positives, negatives, quality


def shuffled(positives, negatives, quality, seed=0):
    """The scene as logits and soft targets in one row, in any order, and where each positive and negative went."""
    logits = torch.cat([positives, negatives])
    target = torch.cat([quality, torch.zeros_like(negatives)])
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    return logits[order], target[order], order.argsort()


def check(name, scene, delta, dtype, tolerance):
    positives, negatives, quality = (x.to(dtype).double() for x in scene)
    logits, target, place = shuffled(positives, negatives, quality)
    pred = logits.to(dtype).requires_grad_()
    losses = RANKING[name](delta=delta, reduction="none")(pred, target.to(dtype))
    assert losses.shape == (len(positives),)
    rank = place[: len(positives)].argsort()  # losses come in the order of pred
    incoming = torch.rand(len(positives), generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    (gradient,) = torch.autograd.grad(losses, pred, incoming[rank].to(dtype))
    values, ups, downs = expected(name, positives, negatives, delta, incoming, quality)

    def close(got, want):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())

    close(losses, values[rank])
    close(gradient[place[: len(positives)]], ups)
    if len(negatives):
        close(gradient[place[len(positives) :]], downs)
    # Relative to what is exchanged, not to the sum, which is zero.
    assert abs(gradient.double().sum()) <= tolerance * gradient.double().abs().sum()


TOLERANCES = [(torch.float64, 1e-9), (torch.float32, 1e-4)]
DELTAS = {"APLoss": (0.25, 0.5, 1.0, 2.0), "ALRPLoss": (0.25, 0.5, 1.0, 2.0), "RankSortLoss": (0, 0.25, 0.5, 1.0, 2.0)}


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("name", RANKING)
def test_definition(name, dtype, tolerance):
    """Random scenes; a third of them with heavy ties and scores exactly on the kinks."""
    for delta in DELTAS[name]:
        for seed in range(24):
            p, n = 1 + 7 * seed % 40, 29 * seed % 200
            check(name, scene(p, n, seed, ties=0.25 if seed % 3 == 0 else None), delta, dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize(("p", "n"), [(1, 0), (1, 200_000), (300, 0), (2000, 0), (2000, 3000), (100, 200_000)])
@pytest.mark.parametrize("name", RANKING)
def test_definition_at_size(name, p, n, dtype, tolerance):
    for ties in (None, 0.25):
        check(name, scene(p, n, p + n, ties), DELTAS[name][-2], dtype, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("name", RANKING)
def test_definition_at_full_size(name, dtype, tolerance):
    """2000 positives and 200 000 negatives: the definition takes several gigabytes."""
    check(name, scene(2000, 200_000, 0), 0.5, dtype, tolerance)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(RANKING)),
    positives=st.lists(st.integers(-8, 8), min_size=1, max_size=6),
    negatives=st.lists(st.integers(-8, 8), max_size=8),
    quality=st.integers(0, 6**4 - 1),
    delta=st.sampled_from((0.25, 0.5, 1.0, 2.0)),
)
def test_definition_on_a_grid(name, positives, negatives, quality, delta):
    """Scores in quarters, so that they tie with one another and with the kinks."""
    qualities = [(quality // 6 ** (i % 4)) % 6 / 6 + 1 / 6 for i in range(len(positives))]
    scores = (torch.tensor(x, dtype=torch.float64) / 4 for x in (positives, negatives))
    check(name, (*scores, torch.tensor(qualities, dtype=torch.float64)), delta, torch.float64, 1e-9)


class Work(TorchDispatchMode):
    """Adds up the elements of all tensors that are made."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.made += sum(x.numel() for x in tree_flatten(found)[0] if isinstance(x, torch.Tensor))
        return found


@pytest.mark.parametrize("name", RANKING)
def test_work_grows_with_the_positives_and_not_with_their_square(name):
    def work(p):
        logits, target, _ = shuffled(*scene(p, 0, p))
        with Work() as counted:
            for delta in DELTAS[name][:2]:
                RANKING[name](delta=delta)(logits.detach().requires_grad_(), target).backward()
        return counted.made

    assert work(64_000) < 110 * work(1000)  # P log P is 102 times as much, P^2 4096


@pytest.mark.parametrize("delta", [0, 0.5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e12])
def test_rank_and_sort_at_any_scale(scale, delta):
    """Scores far apart, or far nearer than the step is wide, in the type of the scores."""
    positives, negatives, quality = scene(300, 500, 3, ties=0.25)
    check("RankSortLoss", (positives * scale, negatives * scale, quality), delta, torch.float64, 1e-9)


def test_localisation_component():
    for seed in range(20):
        positives, negatives, error = scene(1 + 3 * seed, 11 * seed, seed, ties=0.5 if seed % 2 else None)
        logits, target, place = shuffled(positives, negatives, torch.ones_like(positives))
        rank = place[: len(positives)].argsort()
        error = error.requires_grad_()
        pred = logits.requires_grad_()
        losses, located = alrp_loss(pred, target, loc_error=error[rank])
        want = alrp_localisation(positives, negatives, 1.0, error)
        torch.testing.assert_close(located, want[rank], rtol=1e-9, atol=0)
        incoming = torch.rand(len(error), dtype=torch.float64)
        got = torch.autograd.grad(located, error, incoming[rank])[0]
        torch.testing.assert_close(got, torch.autograd.grad(want, error, incoming)[0], rtol=1e-9, atol=1e-15)
        expected_losses, ups, _ = alrp(positives, negatives, 1.0, incoming, error.detach())
        torch.testing.assert_close(losses, expected_losses[rank], rtol=1e-9, atol=1e-15)
        (gradient,) = torch.autograd.grad(losses, pred, incoming[rank])
        torch.testing.assert_close(gradient[place[: len(positives)]], ups, rtol=1e-9, atol=1e-12)


# ---- worked numbers of the papers' formulas ----


@pytest.mark.parametrize(
    ("loss", "target", "value", "gradient"),
    [
        (APLoss(), HARD, 0.363454, [-0.080460, -0.132353, -0.150641, 0.201696, 0.106894, 0.054864, 0]),
        (RankSortLoss(), QUALITY, 0.446919, [0.011111, -0.221429, -0.169935, 0.228058, 0.112979, 0.039216, 0]),
        (RankSortLoss(delta=0), QUALITY, 0.327778, [0.05, -0.161111, -0.166667, 0.166667, 0.055556, 0.055556, 0]),
    ],
    ids=["AP", "RS", "RS hard"],
)
def test_worked_numbers(loss, target, value, gradient):
    pred = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    result = loss(pred, torch.tensor(target))
    result.backward()
    torch.testing.assert_close(result, torch.tensor(value).double(), atol=6e-7, rtol=0)
    torch.testing.assert_close(pred.grad, torch.tensor(gradient).double(), atol=6e-7, rtol=0)


@pytest.mark.parametrize(("delta", "ranking", "sorting"), [(0.5, 0.380252, 0.066667), (0, 0.277778, 0.05)])
def test_worked_parts_of_rank_and_sort(delta, ranking, sorting):
    parts = rank_sort_errors(torch.tensor(SCORES).double(), torch.tensor(QUALITY).double(), delta=delta)
    for part, value in zip(parts, (ranking, sorting), strict=True):
        torch.testing.assert_close(part.mean(), torch.tensor(value).double(), atol=6e-7, rtol=0)


def test_worked_numbers_of_alrp():
    pred = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    error = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    parts = ALRPLoss()(pred, torch.tensor(HARD), loc_error=error)
    torch.testing.assert_close(torch.stack(parts), torch.tensor([0.363454, 0.217169]).double(), atol=6e-7, rtol=0)
    (gradient,) = torch.autograd.grad(parts[0], pred, retain_graph=True)
    expected = torch.tensor([-0.091954, -0.163235, -0.190705, 0.244609, 0.132469, 0.068816, 0]).double()
    torch.testing.assert_close(gradient, expected, atol=6e-7, rtol=0)
    assert torch.autograd.grad(parts[1], pred, retain_graph=True, allow_unused=True)[0] is None
    rank = torch.tensor([1.45, 3.4, 5.2]).double()
    located = torch.autograd.grad(parts[1], error)[0]  # e_k counts for all positives at or below k
    torch.testing.assert_close(located, (1 / rank).flip(0).cumsum(0).flip(0) / 3)


def test_worked_numbers_of_dr():
    scores = torch.tensor([0.8, 0.4, 0.3, 0.05, 0.6], dtype=torch.float64, requires_grad=True)
    loss = DRLoss()(scores.logit(), torch.tensor([1, 1, 0, 0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor(2.155221).double(), atol=6e-7, rtol=0)
    expected = torch.tensor([-1.172676, -2.669542, -0.233223, -0.022132, 4.097573]).double()
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0], expected, atol=2e-6, rtol=0)
    hyper = {name: value for name, value in DRLoss().settings.items()}
    alone = distributional_ranking(scores[:0], scores[2:], **hyper)
    torch.testing.assert_close(alone, torch.tensor(0.672756).double(), atol=6e-7, rtol=0)
    nothing = distributional_ranking(scores[:2], scores[:0], **hyper)
    assert nothing < loss


# ---- behaviour ----


@pytest.fixture(params=["APLoss", "ALRPLoss", "RankSortLoss", "DRLoss"])
def loss(request):
    return {**RANKING, "DRLoss": DRLoss}[request.param]()


def example(n=40, classes=5, seed=0):
    return sample(RankSortLoss, n, seed=seed, dtype=torch.float64, classes=classes)


def value_and_gradient(loss, pred, target, **kwargs):
    pred = pred.detach().clone().requires_grad_()
    value = loss(pred, target, **kwargs)
    return value.detach(), torch.autograd.grad(value.sum(), pred)[0]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_forms_of_target(loss):
    pred, dense = example()
    label = torch.where(dense.sum(-1) > 0, dense.argmax(-1), 5)
    hard = (dense > 0).double()
    assert_same(value_and_gradient(loss, pred, label), value_and_gradient(loss, pred, hard))
    assert_same(value_and_gradient(loss, pred, (label, dense.sum(-1))), value_and_gradient(loss, pred, dense))


def test_a_positive_of_quality_zero_stays_one(loss):
    pred, dense = example()
    label = torch.where(dense.sum(-1) > 0, dense.argmax(-1), 5)
    rows = loss(pred, (label, torch.zeros(len(pred))), reduction_override="none")
    assert len(rows) == (label < 5).sum()


def test_ignored_anchors_take_no_part(loss):
    pred, target = example()
    kept = torch.arange(len(pred)) % 3 > 0
    label = torch.where(target.sum(-1) > 0, target.argmax(-1), 5)
    without, gradient = value_and_gradient(loss, pred[kept], label[kept])
    for form, kwargs in (
        (label, {"weight": kept.double()}),
        (label, {"weight": kept.double().unsqueeze(-1)}),
        (label, {"weight": kept.double().unsqueeze(-1).expand_as(pred)}),
        (torch.where(kept, label, -1), {}),
    ):
        value, whole = value_and_gradient(loss, pred, form, **kwargs)
        torch.testing.assert_close(value, without)
        torch.testing.assert_close(whole[kept], gradient)
        assert (whole[~kept] == 0).all()


def test_weights_multiply_the_losses_of_positives_and_leave_negatives(loss):
    pred, target = example()
    weight = torch.rand(len(pred), dtype=torch.float64) + 0.5
    rows = loss(pred, target, reduction_override="none")
    own = weight[(target > 0).any(-1)]
    torch.testing.assert_close(loss(pred, target, weight, reduction_override="none"), rows * own)
    torch.testing.assert_close(loss(pred, target, weight), (rows * own).mean())
    torch.testing.assert_close(loss(pred, target, weight, avg_factor=7.0), (rows * own).sum() / 7)


def test_the_gradient_is_that_of_weight_loss_weight_and_reduction(loss):
    pred, target = example()
    count = int((target > 0).sum())
    _, mean = value_and_gradient(loss, pred, target)
    twice = copy.deepcopy(loss)
    twice.loss_weight = 2.0
    for found, scale in (
        (value_and_gradient(loss, pred, target, reduction_override="sum"), count),
        (value_and_gradient(loss, pred, target, reduction_override="none"), count),
        (value_and_gradient(loss, pred, target, avg_factor=8.0), count / 8),
        (value_and_gradient(loss, pred, target, weight=torch.full((len(pred),), 3.0)), 3),
        (value_and_gradient(twice, pred, target), 2),
    ):
        torch.testing.assert_close(found[1], scale * mean)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_positives_is_zero_with_a_graph(loss, reduction):
    pred, target = example()
    for negatives in (torch.zeros_like(target), torch.full((len(pred),), 5)):
        value, gradient = value_and_gradient(loss, pred, negatives, reduction_override=reduction)
        assert value.sum() == 0
        assert value.shape == ((0,) if reduction == "none" else ())
        assert (gradient == 0).all()
    if reduction == "mean":
        assert loss(pred, torch.zeros_like(target), avg_factor=0.0) == 0


def test_no_negatives(loss):
    pred, target = example()
    value, gradient = value_and_gradient(loss, pred, target, weight=(target > 0).double())
    assert value.isfinite()
    assert gradient.isfinite().all()
    if isinstance(loss, APLoss):
        assert value == 0


def test_ties_in_any_order(loss):
    """Rows of equal scores may be permuted: the losses and gradients go with them."""
    generator = torch.Generator().manual_seed(0)
    pred, target = example(60)
    pred = (pred * 2).round() / 2
    once = value_and_gradient(loss, pred, target, reduction_override="none")
    order = torch.randperm(len(pred), generator=generator)
    again = value_and_gradient(loss, pred[order], target[order], reduction_override="none")
    torch.testing.assert_close(again[0].sort().values, once[0].sort().values)
    torch.testing.assert_close(again[1], once[1][order])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1.0, 60.0, 1e4])
def test_extreme_logits(loss, size, dtype):
    for signs in ([1, -1, 1, -1], [1, 1, -1, -1], [-1, 1, -1, 1]):
        pred = (size * torch.tensor(signs)).to(dtype).unsqueeze(0)
        value, gradient = value_and_gradient(loss, pred, torch.tensor([[1, 0.5, 0, 0]]))
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_a_nan_is_not_hidden_wherever_it_is(loss):
    pred, target = example()
    for where in ((target > 0).nonzero()[0], (target == 0).nonzero()[0]):
        broken = pred.clone()
        broken[tuple(where)] = float("nan")
        assert loss(broken, target).isnan()
        if isinstance(loss, ALRPLoss):
            error = torch.rand(int((target > 0).sum()))
            assert loss(broken, target, loc_error=error)[0].isnan()


def test_localisation_errors_of_the_wrong_number():
    pred, target = example()
    with pytest.raises(ValueError, match=r"one value for each of \d+ positives"):
        ALRPLoss()(pred, target, loc_error=torch.rand(3))
    nothing = torch.zeros_like(target)
    parts = ALRPLoss()(pred.requires_grad_(), nothing, loc_error=torch.rand(0, requires_grad=True))
    assert [part.item() for part in parts] == [0, 0]
    with pytest.raises(ValueError, match="each of 0 positives"):
        ALRPLoss()(pred, nothing, loc_error=torch.rand(3))


def test_localisation_errors_under_weights():
    """A positive of weight 0 is none, so it has no error to give."""
    pred, target = example()
    error = torch.rand(int((target > 0).sum()), dtype=torch.float64)
    weight = torch.rand(len(pred), dtype=torch.float64) + 0.5
    own = weight[(target > 0).any(-1)]
    rows = ALRPLoss(reduction="none")(pred, target, loc_error=error)
    for a, b in zip(ALRPLoss(loss_weight=2.0)(pred, target, weight, loc_error=error), rows, strict=True):
        torch.testing.assert_close(a, 2 * (b * own).mean())


def test_the_second_derivative_is_refused():
    pred, target = example()
    pred.requires_grad_()
    (gradient,) = torch.autograd.grad(ap_loss(pred, target).square().sum(), pred, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_perfect_ranking_costs_nothing():
    pred = torch.tensor([9.0, 8.5, 3.0, -1.0])
    target = torch.tensor([0.9, 0.7, 0.0, 0.0])
    for loss in (APLoss(), ALRPLoss(), RankSortLoss()):
        value, gradient = value_and_gradient(loss, pred, target)
        # With a slope, equals and near equals still exchange a little.
        assert value < 0.1 if isinstance(loss, RankSortLoss) else value == 0
        assert (gradient[2:] == 0).all()
    value, _ = value_and_gradient(RankSortLoss(delta=0.25), pred, target)
    assert value == 0
