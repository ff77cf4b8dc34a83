"""Worked numbers: values and gradients computed from the papers' formulas outside this package, to 6 digits."""

import pytest
import torch

from detloss_plugins import build_loss

BOX_A = ([1.0, 2, 5, 7], [2.0, 1, 7, 6])
BOX_B = ([0.5, 0.2, 10.4, 8], [1.0, 0, 10, 10])
BOX_C = ([0.0, 0, 2, 2], [4.0, 3, 6, 7])  # disjoint

# type and settings: losses at A, B, C and the gradient at B
BOXES = {
    ("IoULoss", "linear"): ((0.636364, 0.276438, 1.0), (-0.058171, 0.086052, 0.058171, -0.086052)),
    ("IoULoss", "square"): ((0.867769, 0.476458, 1.0), None),
    ("IoULoss", "log"): ((1.011601, 0.323569, 13.815511), None),
    ("GIoULoss",): ((0.719697, 0.296438, 1.714286), (-0.078373, 0.095143, 0.078373, -0.095143)),
    ("DIoULoss",): ((0.681503, 0.280541, 1.376471), (-0.058014, 0.081507, 0.057509, -0.090598)),
    ("CIoULoss", None): ((0.681541, 0.281025, 1.378160), (-0.058292, 0.081860, 0.057787, -0.090951)),
    ("CIoULoss", 0.5): ((0.681503, 0.281025, 1.376471), (-0.058292, 0.081860, 0.057787, -0.090951)),
    ("EfficientIoULoss",): ((0.709280, 0.337206, 1.458103), (-0.074709, 0.125507, 0.074204, -0.134598)),
    ("FocalEfficientIoULoss", True): ((0.427712, 0.286835, 0.0), (-0.063550, 0.106759, 0.063120, -0.114492)),
    ("FocalEfficientIoULoss", False): ((0.427712, 0.286835, 0.0), (-0.052020, 0.089703, 0.051590, -0.097435)),
}
OPTION = {"IoULoss": "mode", "CIoULoss": "alpha_gate", "FocalEfficientIoULoss": "detach_weight"}


def close(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    # Half a unit of the sixth printed decimal.
    torch.testing.assert_close(actual.detach(), expected.reshape(actual.shape), atol=6e-7, rtol=0)


@pytest.mark.parametrize("case", BOXES, ids=str)
def test_boxes(case):
    name, *option = case
    loss = build_loss({"type": name, "reduction": "none", **dict.fromkeys([OPTION[name]] if option else [], *option)})
    pred, target = (torch.tensor(boxes, dtype=torch.float64) for boxes in zip(BOX_A, BOX_B, BOX_C, strict=True))
    pred.requires_grad_()
    value = loss(pred, target)
    values, gradient = BOXES[case]
    close(value, values)
    if gradient:
        (actual,) = torch.autograd.grad(value[1], pred)
        close(actual[1], gradient)


X = [0.8, -0.4, 1.5]
SOFTMAX = [[2.0, -1.0, 0.5], [0.1, 0.2, -0.3]]
# config, pred, target, per-element values, gradient of their sum
POINTWISE = [
    (
        {"type": "BinaryCrossEntropyLoss"},
        X,
        [1, 0, 0.3],
        [0.371101, 0.513015, 1.251413],
        [-0.310026, 0.401312, 0.517574],
    ),
    (
        {"type": "BinaryCrossEntropyLoss", "pos_weight": 2.0},
        X,
        [1, 0, 0.3],
        [0.742201, 0.513015, 1.311837],
        [-0.620051, 0.401312, 0.462847],
    ),
    (
        {"type": "BinaryCrossEntropyLoss", "activated": True},
        [0.9, 0.2, 0.0],
        [1, 0, 1],
        [0.105361, 0.223144, 100.0],
        None,
    ),
    (
        {"type": "FocalLoss"},
        [0.8, -0.4, 3.0],
        [1, 0, 0],
        [0.008917, 0.061966, 2.074710],
        [-0.019755, 0.122671, 0.845062],
    ),
    ({"type": "FocalLoss", "alpha": None}, [0.8, -0.4, 3.0], [1, 0, 0], [0.035669, 0.082622, 2.766280], None),
    ({"type": "FocalLoss", "gamma": 1.5}, [0.8, -0.4, 3.0], [1, 0, 0], [0.016015, 0.097817, 2.125730], None),
    (
        {"type": "QualityFocalLoss"},
        X,
        [0.6, 0, 1],
        [0.005595, 0.082622, 0.006703],
        [0.027331, 0.163561, -0.017031],
    ),
    ({"type": "QualityFocalLoss", "beta": 1.5, "alpha": 0.25}, X, [0.6, 0, 1], [0.008393, 0.097817, 0.003923], None),
    (
        {"type": "VarifocalLoss"},
        X,
        [0.6, 0, 1],
        [0.414660, 0.061966, 0.201413],
        [0.053985, 0.122671, -0.182426],
    ),
    ({"type": "VarifocalLoss", "iou_weighted": False}, X, [0.6, 0, 1], [0.691101, 0.061966, 0.201413], None),
    ({"type": "VarifocalLoss", "gamma": 1.5}, X, [0.6, 0, 1], [0.414660, 0.097817, 0.201413], None),
    ({"type": "L1Loss"}, [2.5, 0, 2, 8], [3, -0.5, 2, 7], [0.5, 0.5, 0.0, 1.0], [-1, 1, 0, 1]),
    ({"type": "SmoothL1Loss"}, [0.3, -1.4, 0.05, 2], [0, 0, 0, 0], [0.045, 0.9, 0.00125, 1.5], None),
    (
        {"type": "SmoothL1Loss", "beta": 0.5},
        [0.3, -1.4, 0.05, 2],
        [0, 0, 0, 0],
        [0.09, 1.15, 0.0025, 1.75],
        [0.6, -1.0, 0.1, 1.0],
    ),
    (
        {"type": "SmoothL1Loss", "beta": 1 / 9},
        [0.3, -1.4, 0.05, 2],
        [0, 0, 0, 0],
        [0.244444, 1.344444, 0.011250, 1.944444],
        None,
    ),
]


@pytest.mark.parametrize(("cfg", "pred", "target", "values", "gradient"), POINTWISE, ids=lambda x: str(x)[:60])
def test_pointwise(cfg, pred, target, values, gradient):
    # One class a row, so that a loss that sums over the classes shows each element.
    pred = torch.tensor(pred, dtype=torch.float64).unsqueeze(-1).requires_grad_()
    target = torch.tensor(target, dtype=torch.float64).unsqueeze(-1)
    value = build_loss({**cfg, "reduction": "none"})(pred, target)
    close(value, values)
    if gradient:
        close(torch.autograd.grad(value.sum(), pred)[0], gradient)


ROW_GRADIENT = (-0.214403, 0.039113, 0.175290)
FOCAL_GRADIENT = ((-0.006821, 0.001244, 0.005577), (0.098708, 0.109089, -0.207797))
# config, target (indices or distributions), values of the two rows, gradient
SOFTMAX_CASES = [
    ({"type": "CrossEntropyLoss"}, [0, 2], [0.241311, 1.420828], None),
    ({"type": "CrossEntropyLoss"}, [[0.7, 0.1, 0.2], [0, 0.5, 0.5]], [0.841311, 1.170828], None),
    ({"type": "CrossEntropyLoss", "label_smoothing": 0.1}, [0, 2], [0.391311, 1.390828], None),
    ({"type": "FocalLoss", "use_sigmoid": False}, [0, 2], [0.002773, 0.204351], FOCAL_GRADIENT),
    ({"type": "FocalLoss", "use_sigmoid": False, "alpha": None}, [0, 2], [0.011093, 0.817403], None),
    ({"type": "FocalLoss", "use_sigmoid": False, "alpha": None}, [[1.0, 0, 0], [0, 0, 1]], [0.011093, 0.817403], None),
]


@pytest.mark.parametrize(("cfg", "target", "values", "gradient"), SOFTMAX_CASES, ids=lambda x: str(x)[:60])
def test_softmax(cfg, target, values, gradient):
    pred = torch.tensor(SOFTMAX, dtype=torch.float64, requires_grad=True)
    target = torch.tensor(target)
    value = build_loss({**cfg, "reduction": "none"})(pred, target)
    close(value, values)
    if gradient:
        close(torch.autograd.grad(value.sum(), pred)[0], gradient)
    if cfg == {"type": "CrossEntropyLoss"} and target.dim() == 1:
        close(torch.autograd.grad(value[0], pred)[0][0], ROW_GRADIENT)


def test_class_weighted_mean_is_mmdets():
    pred, target = torch.tensor(SOFTMAX, dtype=torch.float64), torch.tensor([0, 2])
    loss = build_loss({"type": "CrossEntropyLoss", "class_weight": [1.0, 2, 3]})
    close(loss(pred, target), 2.251897)  # torch divides by the weights' sum: 1.125949


def test_distribution_focal_loss():
    pred = torch.tensor([[0.2, 0.5, 1.5, 0.3, -0.7]], dtype=torch.float64, requires_grad=True)
    loss = build_loss({"type": "DistributionFocalLoss"})
    value = loss(pred, torch.tensor([2.3], dtype=torch.float64))
    close(value, 1.079014)
    close(torch.autograd.grad(value, pred)[0], [[0.132786, 0.179243, -0.212768, -0.153248, 0.053987]])
    best = torch.tensor([[-1e9, -1e9, 0.7, 0.3, -1e9]], dtype=torch.float64)
    best[best > 0] = best[best > 0].log()
    close(loss(best, torch.tensor([2.3], dtype=torch.float64)), 0.610864)  # the entropy of (0.7, 0.3)
