"""Rotated losses: worked numbers, the papers' matrix formulas, and what each loss promises on any boxes."""

import itertools
import math

import pytest
import torch

from detloss_plugins import build_loss
from detloss_plugins.families import RotatedLoss
from detloss_plugins.registry import loss_class
from detloss_plugins.testing import sample

PAIR = [5.0, 5, 8, 4, 0.3], [5.5, 4.6, 7, 4.5, 0.5]
# Settings and the loss of PAIR, computed from the papers' formulas outside this package, to 6 digits.
WORKED = [
    ({"type": "GWDLoss"}, 0.622002),
    ({"type": "GWDLoss", "fun": "none", "tau": 0}, 0.906973),  # d^2
    ({"type": "GWDLoss", "fun": "sqrt"}, 0.661287),
    ({"type": "GWDLoss", "normalize": True, "tau": 0}, 0.156164),
    ({"type": "GWDLoss", "normalize": True, "tau": 1}, 0.135071),
    ({"type": "KLDLoss"}, 0.084566),
    ({"type": "KLDLoss", "fun": "none", "tau": 0}, 0.096779),  # the divergences
    ({"type": "KLDLoss", "fun": "none", "tau": 0, "direction": "target||pred"}, 0.097105),
    ({"type": "KLDLoss", "factor": 2}, 0.150338),
    ({"type": "KLDLoss", "factor": 2, "fun": "sqrt"}, 0.305533),
    ({"type": "KLDLoss", "direction": "target||pred", "root": True}, 0.213380),
    ({"type": "KLDLoss", "direction": "target||pred"}, 0.084815),
    ({"type": "KLDLoss", "direction": "target||pred", "root": True, "tau": 0}, 0.271261),
    ({"type": "KFIoULoss", "center_weight": 0}, 0.673052),
    ({"type": "KFIoULoss", "center_weight": 0, "mode": "log"}, 1.117953),
    ({"type": "KFIoULoss", "center_weight": 0, "mode": "exp"}, 0.960210),
    # offsets .247021 / 7 and -.590746 / 4.5 in the target's frame: .035289^2 * 4.5 and .131277 - 1/18 more
    ({"type": "KFIoULoss"}, 0.754377),
    ({"type": "ProbIoULoss"}, 0.203383),
    ({"type": "ProbIoULoss", "mode": "l2"}, 0.042244),
    ({"type": "RotatedMGIoULoss"}, 0.099782),  # of the corners, projected
]
SETTINGS = [cfg for cfg, _ in WORKED] + [{"type": "ProbIoULoss", "floor": 0.01}]
GAUSSIAN = ("ProbIoULoss", "GWDLoss", "KLDLoss", "KFIoULoss")
NAMES = (*GAUSSIAN, "RotatedMGIoULoss")
SYMMETRIC = ("ProbIoULoss", "GWDLoss", "RotatedMGIoULoss")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MINIMUM = {  # for identical boxes; 0 for what is not here
    "GWDLoss": lambda cfg: 1 - 1 / cfg.get("tau", 2) if cfg.get("tau", 2) else 0,
    "KFIoULoss": lambda cfg: {"log": math.log(3), "exp": math.expm1(2 / 3)}.get(cfg.get("mode"), 2 / 3),
}


def describe(cfg):
    return " ".join(str(value) if name == "type" else f"{name}={value}" for name, value in cfg.items())


def unit_free(cfg):
    return not cfg.get("floor") and (cfg["type"] != "GWDLoss" or cfg.get("normalize", False))


def minimum(cfg):
    return MINIMUM.get(cfg["type"], lambda _: 0.0)(cfg)


def of_rows(cfg):
    """The loss as a function of boxes, one value a row."""
    return build_loss({**cfg, "reduction": "none"})


@pytest.fixture(params=NAMES)
def settings(request):
    """One of the losses under all its settings, ``[(config, function of boxes), ...]``."""
    return [(cfg, of_rows(cfg)) for cfg in SETTINGS if cfg["type"] == request.param]


def gradient(loss, pred, target):
    pred = pred.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(pred, target).sum(), pred)[0]


@pytest.mark.parametrize(("cfg", "expected"), WORKED, ids=[describe(cfg) for cfg, _ in WORKED])
def test_worked_numbers(cfg, expected):
    pred, target = (torch.tensor([box], dtype=torch.float64) for box in PAIR)
    assert build_loss(cfg)(pred, target).item() == pytest.approx(expected, abs=6e-7)


def covariance(boxes, k):
    cos, sin = boxes[:, 4].cos(), boxes[:, 4].sin()
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    return rotation @ torch.diag_embed(k * boxes[:, 2:4].square()) @ rotation.mT


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT


def trace(matrix):
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def mahalanobis(gap, matrix):
    return (gap.unsqueeze(-2) @ matrix.inverse() @ gap.unsqueeze(-1)).reshape(-1)


def wasserstein(pred, target):
    s, t, gap = covariance(pred, 1 / 4), covariance(target, 1 / 4), pred[:, :2] - target[:, :2]
    return gap.square().sum(-1) + trace(s) + trace(t) - 2 * torch.linalg.eigvalsh(root(s) @ t @ root(s)).sqrt().sum(-1)


def kullback_leibler(pred, target):
    s, t, gap = covariance(pred, 1 / 4), covariance(target, 1 / 4), pred[:, :2] - target[:, :2]
    return (mahalanobis(gap, t) + trace(t.inverse() @ s) + (t.det() / s.det()).log()) / 2 - 1


def bhattacharyya(pred, target):
    s, t, gap = covariance(pred, 1 / 12), covariance(target, 1 / 12), pred[:, :2] - target[:, :2]
    middle = (s + t) / 2
    return mahalanobis(gap, middle) / 8 + (middle.det() / (s.det() * t.det()).sqrt()).log() / 2


def kalman(pred, target):
    s, t = covariance(pred, 1 / 4), covariance(target, 1 / 4)
    v = 4 * (s - s @ (s + t).inverse() @ s).det().sqrt()
    return 1 - v / (pred[:, 2:4].prod(-1) + target[:, 2:4].prod(-1) - v)


def corners(boxes):
    cos, sin = boxes[:, 4].cos().unsqueeze(-1), boxes[:, 4].sin().unsqueeze(-1)
    along, across = (
        boxes[:, i, None] / 2 * boxes.new_tensor(signs) for i, signs in ((2, [1, 1, -1, -1]), (3, [1, -1] * 2))
    )
    return boxes[:, None, :2] + torch.stack([along * cos - across * sin, along * sin + across * cos], -1)


def projected_giou(pred, target):
    """One minus the mean of the GIoUs of the corners' projections on the directions of all edges, halved."""
    gious = []
    for angle in (pred[:, 4], pred[:, 4] + math.pi / 2, target[:, 4], target[:, 4] + math.pi / 2):
        normal = torch.stack([angle.cos(), angle.sin()], -1).unsqueeze(-1)
        a, b = ((corners(x) @ normal).squeeze(-1) for x in (pred, target))
        (start_a, end_a), (start_b, end_b) = ((x.amin(-1), x.amax(-1)) for x in (a, b))
        hull = torch.maximum(end_a, end_b) - torch.minimum(start_a, start_b)
        gious.append((torch.minimum(end_a, end_b) - torch.maximum(start_a, start_b)) / hull)
    return (1 - sum(gious) / 4) / 2


FORMULAS = [
    ({"type": "GWDLoss", "fun": "none", "tau": 0}, wasserstein),
    ({"type": "KLDLoss", "fun": "none", "tau": 0}, kullback_leibler),
    ({"type": "KLDLoss", "fun": "none", "tau": 0, "direction": "target||pred"}, lambda p, t: kullback_leibler(t, p)),
    ({"type": "ProbIoULoss", "mode": "l2"}, bhattacharyya),
    ({"type": "ProbIoULoss"}, lambda p, t: (1 - (-bhattacharyya(p, t)).exp()).sqrt()),
    ({"type": "KFIoULoss", "center_weight": 0}, kalman),
    ({"type": "RotatedMGIoULoss"}, projected_giou),
]


@pytest.mark.parametrize(("cfg", "formula"), FORMULAS, ids=[describe(cfg) for cfg, _ in FORMULAS])
def test_the_papers_matrix_formulas(cfg, formula):
    pred, target = sample(RotatedLoss, 500, dtype=torch.float64)
    loss = of_rows(cfg)
    torch.testing.assert_close(loss(pred, target), formula(pred, target), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gradient(loss, pred, target), gradient(formula, pred, target), rtol=1e-7, atol=1e-7)


def test_gradient_is_the_derivative(settings):
    pred, target = sample(RotatedLoss, 8, dtype=torch.float64)
    for _, rows in settings:
        assert torch.autograd.gradcheck(lambda p, rows=rows: rows(p, target), pred.requires_grad_())


EXTREME = {
    "identical": ([10.0, 10, 20, 5, 0.4], [10.0, 10, 20, 5, 0.4]),
    "identical squares": ([10.0, 10, 20, 20, 0.4], [10.0, 10, 20, 20, 0.9]),
    "disjoint": ([5.0, 5, 10, 8, 0.4], [550.0, 550, 100, 70, -1]),
    "nested": ([12.0, 12, 3, 4, 1], [10.0, 10, 20, 25, 2]),
    "touching": ([5.0, 5, 10, 10, 0], [15.0, 5, 10, 10, 0]),
    "a point": ([5.0, 5, 0, 0, 0.3], [6.0, 6, 6, 4, 0.3]),
    "a point as target": ([6.0, 6, 6, 4, 0.3], [5.0, 5, 0, 0, 0.3]),
    "the same point": ([5.0, 5, 0, 0, 0.3], [5.0, 5, 0, 0, 0.3]),
    "two points": ([5.0, 5, 0, 0, 0.3], [50.0, 5, 0, 0, 1.3]),
    "no height": ([5.0, 5, 4, 0, 0.3], [6.0, 6, 6, 4, 0.9]),
    "no height, target": ([6.0, 6, 6, 4, 0.9], [5.0, 5, 4, 0, 0.3]),
    "no height, both": ([5.0, 5, 4, 0, 0.3], [5.0, 5, 4, 0, 0.3]),
    "no height, both, apart": ([5.0, 5, 4, 0, 0], [5.0, 6, 4, 0, 0]),
    "one pixel thin": ([5.0, 5, 1, 900, 0], [5.0, 5, 900, 1, 0]),
    "one pixel thin, apart": ([5.0, 50, 900, 1, 0], [5.0, 5, 900, 1, 0.1]),
    "negative sides": ([15.0, 15, -10, -8, 0.2], [15.0, 15, 10, 8, 0.2]),
    "a negative side": ([15.0, 15, -10, 8, 0.2], [15.0, 12, 10, 8, 0.2]),
    "normalised": ([1e-3, 1e-3, 1e-3, 2e-3, 0.1], [1e-3, 1.5e-3, 1e-3, 1.9e-3, 0.2]),
    "huge": ([5e4, 5e4, 1e5, 3e4, 0.1], [5e4, 4e4, 9e4, 4e4, 3.1]),
    "turned many times": ([5.0, 5, 8, 4, 1000], [5.5, 4.6, 7, 4.5, -1000]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_boxes(settings, dtype, device):
    for cfg, rows in settings:
        for case, boxes in EXTREME.items():
            pred, target = (torch.tensor([box], device=device).clamp(max=6e4).to(dtype) for box in boxes)
            assert rows(pred, target).isfinite().all(), case
            slope = gradient(rows, pred, target)
            if dtype == torch.float16 and (cfg.get("fun") == "none" or cfg.get("mode") == "l2"):
                # A distance itself grows with (gap / thickness)^2, and its gradient is more than float16 can hold.
                largest = torch.finfo(dtype).max
                slope = slope.where(gradient(rows, pred.float(), target.float()).abs() <= largest, 0)
            assert slope.isfinite().all(), case


def test_a_side_of_no_length_counts_as_eps(settings):
    pred, target = torch.tensor([[5.0, 5, 0, 3, 0.3], [5, 5, -2, 3, 0.3]]), torch.tensor([[6.0, 6, 8, 4, 0.9]] * 2)
    thin = pred.clone()
    thin[:, 2] = 0.08
    for cfg, _ in settings:
        loss = of_rows({**cfg, "eps": 0.01})
        if not cfg.get("floor"):
            torch.testing.assert_close(loss(pred, target), loss(thin, target))
        assert (gradient(loss, pred, target)[:, 2] == 0).all()


def test_identical_boxes_are_the_minimum(settings, device):
    def scaled(boxes):
        return torch.cat([scale * boxes[:, :4], boxes[:, 4:]], -1).to(device)

    for scale in (1e-3, 1.0, 1e3):
        target, pred = scaled(sample(RotatedLoss, 500)[1]), scaled(sample(RotatedLoss, 500, seed=1)[0])
        moved = target + scale * torch.tensor([1.0, 0, 0, 0, 0], device=device)
        for cfg, rows in settings:
            value = rows(target.clone(), target)
            torch.testing.assert_close(value, torch.full_like(value, minimum(cfg)), atol=1e-6, rtol=0)
            assert gradient(rows, target, target).abs().max() <= 1e-5 / scale
            assert rows(pred, target).min() >= minimum(cfg) - 1e-6
            assert rows(moved, target).min() >= minimum(cfg) - 1e-6


def test_facts():
    for name in NAMES:
        facts = loss_class(name).facts
        assert facts.minimum == pytest.approx(minimum({"type": name}))
        assert facts.symmetric == (name in SYMMETRIC)
        assert facts.scale_invariant == unit_free({"type": name})


def turned(boxes, angle):
    """The boxes, the whole plane turned."""
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = boxes[:, 0], boxes[:, 1]
    return torch.cat([torch.stack([x * cos - y * sin, x * sin + y * cos], -1), boxes[:, 2:4], boxes[:, 4:] + angle], -1)


def test_one_box_has_many_names(settings, device):
    pred, target = (x.to(device) for x in sample(RotatedLoss, 200))
    other = {
        "swapped sides": lambda b: b[:, [0, 1, 3, 2, 4]] + b.new_tensor([0, 0, 0, 0, math.pi / 2]),
        "half a turn": lambda b: b + b.new_tensor([0, 0, 0, 0, math.pi]),
    }
    for _, rows in settings:
        expected = rows(pred, target)
        for name in other.values():
            for p, t in ((name(pred), target), (pred, name(target)), (name(pred), name(target))):
                torch.testing.assert_close(rows(p, t), expected, rtol=1e-4, atol=1e-5)


def test_invariances(settings, device):
    """Those that hold, and that the others do not."""
    pred, target = (x.to(device) for x in sample(RotatedLoss, 200))
    moved = [b + b.new_tensor([64, -32, 0, 0, 0]) for b in (pred, target)]
    for cfg, rows in settings:
        expected = rows(pred, target)
        torch.testing.assert_close(rows(*moved), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows(turned(pred, 0.7), turned(target, 0.7)), expected, rtol=1e-3, atol=1e-4)
        for scale in (1e-3, 1 / 32, 1e3):
            scaled = rows(*(torch.cat([scale * b[:, :4], b[:, 4:]], -1) for b in (pred, target)))
            if unit_free(cfg):
                torch.testing.assert_close(scaled, expected, atol=1e-4, rtol=1e-4)
            elif scale != 1e3:  # a floor vanishes beside boxes so large
                assert (scaled - expected).abs().max() > 1e-3
        swapped = rows(target, pred)
        if cfg["type"] in SYMMETRIC or cfg.get("center_weight") == 0:
            torch.testing.assert_close(swapped, expected, rtol=1e-4, atol=1e-5)
        else:
            assert (swapped - expected).abs().max() > 1e-2


@pytest.mark.parametrize("settings", GAUSSIAN, indirect=True)
def test_a_square_has_no_angle(settings, device):
    pred, target = (x.to(device) for x in sample(RotatedLoss, 50))
    pred[:, 3] = pred[:, 2]
    other = pred + torch.tensor([0, 0, 0, 0, 0.6], device=device)
    for _, rows in settings:
        assert (gradient(rows, pred, target)[:, 4] == 0).all()
        torch.testing.assert_close(rows(other, target), rows(pred, target), rtol=1e-5, atol=1e-6)


def test_the_two_sides_of_a_square_are_not_mixed(settings):
    """A square whose target is longer in one direction has another gradient on each side."""
    square = torch.tensor([[1.0, 2, 5, 5, 0.2]], dtype=torch.float64)
    target = torch.tensor([[1.5, 2, 9, 5, 0.3]], dtype=torch.float64)
    for _, rows in settings:
        actual = gradient(rows, square, target)[0]
        for i in range(5):
            step = torch.zeros_like(square)
            step[0, i] = 1e-6
            slope = (rows(square + step, target) - rows(square - step, target)) / 2e-6
            assert actual[i].item() == pytest.approx(slope.item(), abs=1e-7)
        assert abs(actual[2] - actual[3]) > 1e-4


def approach(steps=200):
    """A box that comes from far away, over its target of the same size: the last step is the target's center."""
    target = torch.tensor([[100.0, 100, 40, 20, 0.5]]).expand(steps, 5)
    way = torch.linspace(900, 0, steps).unsqueeze(-1) * torch.tensor([0.8, -0.6])
    return torch.cat([target[:, :2] + way, target[:, 2:]], -1), target


def test_loss_falls_as_a_box_approaches(settings):
    pred, target = approach()
    for cfg, rows in settings:
        value, slope = rows(pred, target), gradient(rows, pred, target)
        towards = (slope[:-1, :2] * (pred - target)[:-1, :2]).sum(-1)
        if cfg.get("center_weight") == 0:  # KFIoU alone does not see the centers
            torch.testing.assert_close(value, value[-1:].expand_as(value))
            assert (slope[:, :2] == 0).all()
        elif cfg["type"] == "ProbIoULoss" and cfg.get("mode") != "l2":  # saturates
            assert (value.diff() <= 0).all()
            assert (towards >= 0).all()
            assert (slope[0] == 0).all()
            assert value[0] == 1
        else:
            assert (value.diff() < 0).all()
            assert (towards > 0).all()


def test_probiou_l1_has_no_offset_and_a_finite_slope(device):
    """H is like a norm of what differs: where nothing does, its gradient is 0, and finite however close."""
    loss = build_loss({"type": "ProbIoULoss"})
    target = torch.tensor([[10.0, 10, 20, 20, 0.4]], device=device)
    assert loss(target, target) == 0
    assert (gradient(loss, target, target) == 0).all()
    for gap in (1e-6, 1e-4, 1e-2):  # H = sqrt(3/2) gap / 20
        near = target.double() + torch.tensor([gap, 0, 0, 0, 0], dtype=torch.float64, device=device)
        assert loss(near, target.double()).item() == pytest.approx(math.sqrt(1.5) * gap / 20, rel=1e-6)
        assert gradient(loss, near, target.double())[0, 0].item() == pytest.approx(math.sqrt(1.5) / 20, rel=1e-6)


def test_probiou_floor_adds_to_both_variances():
    pred, target = torch.tensor([[0.0, 0, 2, 2, 0]]), torch.tensor([[2.0, 0, 2, 2, 0.7]])
    loss = build_loss({"type": "ProbIoULoss", "mode": "l2", "floor": 1 / 3})
    assert loss(pred, target).item() == pytest.approx(0.75)  # M = (1/3 + 1/3) I: 1/8 * 2^2 * 3/2
    tiny = torch.tensor([[0.0, 0, 1e-6, 0, 0]])
    floored = build_loss({"type": "ProbIoULoss", "floor": 0.01})
    assert gradient(floored, tiny, target).abs().max() < 10


@pytest.mark.parametrize(("nearness", "accuracy"), [(1, 1e-4), (1e-3, 2e-3)])
def test_float32_is_as_good_as_float64(settings, nearness, accuracy):
    """Boxes 1e-4 to 1e5 long. Of those a thousandth of their size apart, three digits of the difference are lost."""
    pred, target = sample(RotatedLoss, 500)
    pred = target + nearness * (pred - target)
    for cfg, rows in settings:
        for scale in (1.0, 1e3) if cfg.get("floor") else (1e-5, 1e-3, 1.0, 1e3):  # a floor drowns small boxes
            p, t = (torch.cat([scale * b[:, :4], b[:, 4:]], -1) for b in (pred, target))
            torch.testing.assert_close(rows(p, t).double(), rows(p.double(), t.double()), rtol=accuracy / 10, atol=2e-7)
            unit = torch.tensor([1 / scale] * 4 + [1], dtype=torch.float64)
            got, want = (gradient(rows, p.to(x), t.to(x)) / unit for x in (torch.float32, torch.float64))
            assert ((got - want).abs() <= accuracy * want.abs().amax(-1, keepdim=True) + 1e-9).all()


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_alone_finds_its_target(name):
    """Gradient descent on center, logarithms of the sides and angle brings boxes onto their targets."""
    start, target = sample(RotatedLoss, 64, seed=2)
    sides = target[:, 2:4].sort(-1).values
    target = target[sides[:, 1] > 1.3 * sides[:, 0]]  # a square has no angle to find
    start = start[sides[:, 1] > 1.3 * sides[:, 0]]
    free = torch.cat([start[:, :2] / 100, start[:, 2:4].log(), start[:, 4:]], -1).requires_grad_()
    boxes = lambda x: torch.cat([x[:, :2] * 100, x[:, 2:4].exp(), x[:, 4:]], -1)  # noqa: E731
    loss, optimizer = build_loss({"type": name}), torch.optim.Adam([free], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        optimizer.zero_grad()
        loss(boxes(free), target, reduction_override="sum").backward()
        optimizer.step()
        schedule.step()
    left = bhattacharyya(boxes(free).detach().double(), target.double())
    assert (left < 1e-3).float().mean() > 0.95


def test_rotated_mgiou_at_angle_0_is_mgiou():
    """Value and gradient; at another angle it is not."""
    pred, target = sample(RotatedLoss, 200, dtype=torch.float64)
    pred[:, 4] = target[:, 4] = 0
    pred.requires_grad_()
    aligned = of_rows({"type": "MGIoULoss"})
    xyxy = lambda b: torch.cat([b[:, :2] - b[:, 2:4] / 2, b[:, :2] + b[:, 2:4] / 2], -1)  # noqa: E731
    expected, rows = aligned(xyxy(pred), xyxy(target)), of_rows({"type": "RotatedMGIoULoss"})
    torch.testing.assert_close(rows(pred, target), expected)
    torch.testing.assert_close(gradient(rows, pred, target)[:, :4], torch.autograd.grad(expected.sum(), pred)[0][:, :4])
    other = pred + pred.new_tensor([0, 0, 0, 0, 0.2])
    assert ((rows(other, target) - expected).abs() > 1e-3).float().mean() > 0.9


def test_rotated_mgiou_sees_the_angle_of_a_square_and_pulls_from_afar():
    target = torch.tensor([[0.0, 0, 8, 8, 0]])
    pred, far = torch.tensor([[0.0, 0, 8, 8, 0.3]]), torch.tensor([[8000.0, 0, 8, 8, 0.3]])
    rows = of_rows({"type": "RotatedMGIoULoss"})
    assert gradient(rows, pred, target)[0, 4] > 0
    assert gradient(rows, far, target)[0, 0] > 0


def test_weight_of_five_columns():
    pred, target = sample(RotatedLoss, 8)
    weight = torch.arange(8.0)
    columns = weight.unsqueeze(-1).expand(8, 5)
    for cfg in SETTINGS:
        rows = of_rows(cfg)
        torch.testing.assert_close(rows(pred, target, columns), rows(pred, target) * weight)


WRONG = [
    ({"type": "ProbIoULoss", "mode": "L1"}, '"l1" or "l2", not \'L1\''),
    ({"type": "ProbIoULoss", "floor": -1.0}, "at least 0"),
    ({"type": "GWDLoss", "fun": "log"}, '"log1p", "sqrt" or "none", not \'log\''),
    ({"type": "GWDLoss", "tau": 0.5}, "0 or at least 1, not 0.5"),
    ({"type": "KLDLoss", "direction": "both"}, r'"pred\|\|target" or "target\|\|pred", not'),
    ({"type": "KLDLoss", "tau": -1.0}, "0 or at least 1"),
    ({"type": "KFIoULoss", "mode": "ln"}, '"linear", "log" or "exp", not'),
    ({"type": "KFIoULoss", "center_weight": -1.0}, "at least 0"),
]


@pytest.mark.parametrize(("cfg", "message"), WRONG, ids=[describe(cfg) for cfg, _ in WRONG])
def test_wrong_settings(cfg, message):
    with pytest.raises(ValueError, match=message):
        build_loss(cfg)


def test_wrong_shapes():
    for name in NAMES:
        loss = build_loss({"type": name})
        with pytest.raises(ValueError, match=r"\(2, 5\) and target \(3, 5\)"):
            loss(torch.rand(2, 5), torch.rand(3, 5))
        with pytest.raises(ValueError, match=r"must both be rotated boxes of 5 values"):
            loss(torch.rand(2, 4), torch.rand(2, 4))


def test_samples_are_varied():
    pred, target = sample(RotatedLoss, 2000)
    for boxes in (pred, target):
        assert (boxes[:, 2:4] > 0).all()
        assert (torch.histc(boxes[:, 4].remainder(math.pi), 8, 0, math.pi) > 100).all()
    distance = bhattacharyya(pred.double(), target.double())
    assert (distance < 0.2).float().mean() > 0.05
    assert 0.02 < (distance > 2).float().mean() < 0.5
    reached = {tuple(x > 0 for x in sides) for sides in (pred[:, 2:4] - target[:, 2:4]).tolist()}
    assert reached == set(itertools.product((False, True), repeat=2))
