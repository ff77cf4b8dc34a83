"""The shared geometry against a definition that needs no formula: counting the unit cells that a box covers."""

import torch

from detloss_plugins.geometry import Pair, power, ratio

SIZE = 12


def integer_boxes(n, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, SIZE, (n, 2, 2), generator=generator).sort(dim=1).values
    corners[:, 1] += 1  # at least one cell
    return corners.flatten(1)


def cells(box):
    covered = torch.zeros(SIZE + 1, SIZE + 1, dtype=torch.bool)
    x1, y1, x2, y2 = box.tolist()
    covered[y1:y2, x1:x2] = True
    return covered


def test_areas_by_counting_cells():
    pred, target = integer_boxes(200, 0), integer_boxes(200, 1)
    pair = Pair(pred.double(), target.double(), 1e-7)
    for row, (a, b) in enumerate(zip(map(cells, pred), map(cells, target), strict=True)):
        both, either = (a & b).sum(), (a | b).sum()
        rows, columns = (either := a | b).any(1).nonzero(), either.any(0).nonzero()
        width, height = columns.max() - columns.min() + 1, rows.max() - rows.min() + 1
        assert pair.union[row] == either.sum()
        assert pair.iou[row] == both / either.sum().double()
        assert [pair.enclosing_width[row], pair.enclosing_height[row]] == [width, height]
        torch.testing.assert_close(pair.enclosing_penalty[row], 1 - either.sum() / (width * height).double())
        assert pair.diagonal2[row] == width**2 + height**2


def test_an_inverted_box_has_no_area_and_the_target_is_enclosed():
    target = torch.tensor([4.0, 4, 6, 7])
    for inverted in ([9.0, 1, 2, 3], [2.0, 3, 9, 1], [9.0, 3, 2, 1], [6.0, 7, 4, 4]):
        pair = Pair(torch.tensor(inverted), target, 1e-7)
        assert 2 <= pair.enclosing_width < torch.inf
        assert 3 <= pair.enclosing_height < torch.inf
        assert 0 <= pair.enclosing_penalty < 1
        assert pair.iou == 0
        assert pair.union == 6, "the target's"


def test_a_side_of_no_length_is_a_matter_of_scale():
    """Sides far below the eps are compared like any others, as long as the enclosing box is of their size."""
    pred, target = torch.tensor([0.0, 0, 2, 1], dtype=torch.float64), torch.tensor([1.0, 0, 3, 4], dtype=torch.float64)
    large, small = (Pair(pred * scale, target * scale, 1e-7) for scale in (1.0, 1e-9))
    torch.testing.assert_close(small.side_change, large.side_change)
    torch.testing.assert_close(small.aspect_ratio_term, large.aspect_ratio_term)
    assert large.aspect_ratio_term > 0.01


def test_quotient_of_nothing():
    numerator = torch.tensor([0.0, 1.0, 1.0, float("nan")], requires_grad=True)
    denominator = torch.tensor([0.0, 1e-9, 2.0, 1.0], requires_grad=True)
    value = ratio(numerator, denominator, 1e-7)
    assert value[:3].tolist() == [0.0, 0.0, 0.5]
    assert value[3].isnan(), "NaN is not hidden"
    for gradient in torch.autograd.grad(value[:3].sum(), (numerator, denominator)):
        assert gradient[:2].tolist() == [0.0, 0.0]


def test_power_below_one_has_no_infinite_slope():
    base = torch.tensor([0.0, 0.25, float("nan")], requires_grad=True)
    value = power(base, 0.5, 1e-7)
    assert value[:2].tolist() == [0.0, 0.5]
    assert value[2].isnan()
    assert torch.autograd.grad(value[:2].sum(), base)[0][:2].tolist() == [0.0, 1.0]
