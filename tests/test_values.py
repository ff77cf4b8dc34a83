"""Worked numbers: values and gradients computed from the papers' formulas outside this package, to 6 digits."""

import math

import pytest
import torch

from detloss_plugins import build_loss
from detloss_plugins.geometry import Pair
from detloss_plugins.losses import confidence_weight, fgl_bins

BOX_A = ([1.0, 2, 5, 7], [2.0, 1, 7, 6])
BOX_B = ([0.5, 0.2, 10.4, 8], [1.0, 0, 10, 10])
BOX_C = ([0.0, 0, 2, 2], [4.0, 3, 6, 7])  # disjoint


def wise(base, **settings):
    return {"type": "WIoULoss", "base": base, **settings}


def inner(base):
    return {"type": "InnerIoULoss", "ratio": 0.75, "base": base}


def focaler(base):
    return {"type": "FocalerIoULoss", "base": base}


# type and settings: losses at A, B, C and the gradient at B; the running mean of Wise-IoU is 0.5
BOXES = [
    ({"type": "IoULoss", "mode": "linear"}, (0.636364, 0.276438, 1.0), (-0.058171, 0.086052, 0.058171, -0.086052)),
    ({"type": "IoULoss", "mode": "square"}, (0.867769, 0.476458, 1.0), None),
    ({"type": "IoULoss", "mode": "log"}, (1.011601, 0.323569, 13.815511), None),
    ({"type": "GIoULoss"}, (0.719697, 0.296438, 1.714286), (-0.078373, 0.095143, 0.078373, -0.095143)),
    ({"type": "DIoULoss"}, (0.681503, 0.280541, 1.376471), (-0.058014, 0.081507, 0.057509, -0.090598)),
    ({"type": "CIoULoss"}, (0.681541, 0.281025, 1.378160), (-0.058292, 0.081860, 0.057787, -0.090951)),
    (
        {"type": "CIoULoss", "alpha_gate": 0.5},
        (0.681503, 0.281025, 1.376471),
        (-0.058292, 0.081860, 0.057787, -0.090951),
    ),
    ({"type": "EfficientIoULoss"}, (0.709280, 0.337206, 1.458103), (-0.074709, 0.125507, 0.074204, -0.134598)),
    ({"type": "FocalEfficientIoULoss"}, (0.427712, 0.286835, 0.0), (-0.063550, 0.106759, 0.063120, -0.114492)),
    (
        {"type": "FocalEfficientIoULoss", "detach_weight": False},
        (0.427712, 0.286835, 0.0),
        (-0.052020, 0.089703, 0.051590, -0.097435),
    ),
    # The floor concerns C only: a quarter of EIoU.
    (
        {"type": "FocalEfficientIoULoss", "floor": 0.25},
        (0.427712, 0.286835, 1.458103 / 4),
        (-0.063550, 0.106759, 0.063120, -0.114492),
    ),
    ({"type": "SIoULoss"}, (0.684185, 0.284844, 1.330683), (-0.054354, 0.078671, 0.062200, -0.095906)),
    ({"type": "AlphaIoULoss"}, (0.951916, 0.621185, 1.0), None),
    ({"type": "AlphaIoULoss", "penalty": "giou"}, (0.952495, None, 1.364431), None),
    ({"type": "AlphaIoULoss", "penalty": "diou"}, (0.952008, None, 1.053357), None),
    ({"type": "AlphaIoULoss", "penalty": "ciou"}, (None, None, 1.053357), None),
    (
        {"type": "WIoULoss", "version": 1},
        (0.665747, 0.277574, 1.457133),
        (-0.058481, 0.085144, 0.058340, -0.087668),
    ),
    ({"type": "WIoULoss", "version": 2}, (0.751063, 0.206392, 2.060697), None),
    ({"type": "WIoULoss"}, (0.855867, 0.246054, 1.845701), None),
    ({"type": "WIoULoss", "alpha": 1.7, "delta": 2.7}, (0.669259, 0.177601, 1.564875), None),
    ({"type": "MPDIoULoss", "image_size": (10, 10)}, (0.671364, 0.298688, 1.330000), None),
    ({"type": "InnerIoULoss", "ratio": 0.75, "base": None}, (0.744186, 0.292279, 1.0), None),
    ({"type": "InnerIoULoss", "ratio": 1.25, "base": None}, (0.554913, 0.276438, None), None),
    ({"type": "InnerIoULoss", "ratio": 0.75}, (0.789363, 0.296866, 1.378160), None),
    ({"type": "FocalerIoULoss", "base": None}, (0.617225, 0.238356, 1.0), None),
    ({"type": "FocalerIoULoss"}, (0.662402, 0.242943, 1.378160), None),
    ({"type": "ShapeIoULoss"}, (0.682042, 0.281330, 1.388455), None),
    ({"type": "ShapeIoULoss", "scale": 1.0}, (0.682042, 0.280988, 1.379699), None),
    ({"type": "PowerfulIoULoss"}, (0.696951, 0.282817, 1.894601), None),
    ({"type": "PowerfulIoULoss", "version": 2}, (0.759495, 0.241207, 1.515650), None),
    ({"type": "NWDLoss"}, (0.135979, 0.110001, 0.361602), None),
    (
        {"type": "BoundedIoULoss"},
        (
            (0.650031, 0.471490, 0.100160, 0.0),
            (0.001219, 0.205144, 0.020703, 0.120078),
            (0.9, 0.9, 0.000001, 0.400125),
        ),
        None,
    ),
    ({"type": "ExtendedIoULoss"}, (0.586364, 0.226438, 1.521429), None),
    ({"type": "GCDLoss"}, (0.336370, 0.156613, 0.924224), (-0.013433, 0.017083, 0.010642, -0.075989)),
    ({"type": "InterpIoULoss"}, (0.656142, 0.282816, 1.111954), (-0.060365, 0.088044, 0.060365, -0.088044)),
    (
        {"type": "InterpIoULoss", "dynamic": True},
        (0.938141, 0.396537, 1.057922),
        (-0.092581, 0.123286, 0.092581, -0.123286),
    ),
    ({"type": "MGIoULoss"}, (0.208333, 0.077727, 0.619048), (-0.022957, 0.025000, 0.022957, -0.025000)),
    ({"type": "ScaleDynamicIoULoss"}, (0.477154, 0.281025, 1.096426), (-0.058292, 0.081860, 0.057787, -0.090951)),
    (
        {"type": "ScaleDynamicIoULoss", "delta": 0.8, "area": 400},
        (0.238094, 0.111878, 0.887988),
        (-0.021955, 0.025471, 0.021137, -0.040197),
    ),
    (wise({"type": "CIoULoss"}, version=1), (0.681541, 0.281025, 1.378160), (-0.058292, 0.081860, 0.057787, -0.090951)),
    (wise({"type": "CIoULoss"}, version=2), (0.768882, 0.208958, 1.949013), (-0.043343, 0.060868, 0.042968, -0.067627)),
    (wise({"type": "CIoULoss"}), (0.876172, 0.249112, 1.745669), (-0.051672, 0.072564, 0.051225, -0.080623)),
    (wise(inner({"type": "EIoULoss"})), (1.050447, 0.312956, 1.846931), (-0.064633, -0.051642, 0.064185, -0.141930)),
    (inner(wise({"type": "EIoULoss"})), (1.019656, 0.314755, 1.846931), (-0.064429, -0.072510, 0.063981, -0.144828)),
    (
        focaler(wise(inner({"type": "DIoULoss"}))),
        (0.995598, 0.224644, 1.743529),
        (-0.052895, -0.086117, 0.052447, -0.107456),
    ),
    (
        wise(focaler({"type": "MPDIoULoss", "image_size": (10, 10)})),
        (0.838484, 0.231012, 1.684667),
        (-0.058712, 0.082068, 0.057825, -0.098024),
    ),
    (focaler(inner({"type": "CIoULoss"})), (0.770225, 0.258784, 1.378160), (-0.059557, -0.097376, 0.059052, -0.120994)),
    (inner(focaler({"type": "CIoULoss"})), (0.770225, 0.258784, 1.378160), (-0.059557, -0.097376, 0.059052, -0.120994)),
]


def close(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    # Half a unit of the sixth printed decimal.
    torch.testing.assert_close(actual.detach(), expected.reshape(actual.shape), atol=6e-7, rtol=0)


@pytest.mark.parametrize(("cfg", "values", "gradient"), BOXES, ids=lambda x: str(x)[:120])
def test_boxes(cfg, values, gradient):
    loss = build_loss({**cfg, "reduction": "none"}).eval()
    for mean in loss.buffers():
        mean.fill_(0.5)
    pred, target = (torch.tensor(boxes, dtype=torch.float64) for boxes in zip(BOX_A, BOX_B, BOX_C, strict=True))
    pred.requires_grad_()
    value = loss(pred, target)
    for row, expected in zip(value, values, strict=True):
        if expected is not None:
            close(row, expected)
    if gradient:
        (actual,) = torch.autograd.grad(value[1], pred)
        close(actual[1], gradient)


def test_building_blocks_of_the_catalogue():
    """What lies inside CIoU, SIoU and PIoU on the fixed boxes."""
    pred, target = (torch.tensor(boxes, dtype=torch.float64) for boxes in zip(BOX_A, BOX_B, BOX_C, strict=True))
    pair = Pair(pred, target, 1e-7)
    close(pair.iou, (0.363636, 0.723562, 0.0))
    close(pair.union, (33.0, 97.02, 12.0))
    close(pair.enclosing_width, (6.0, 9.9, 6.0))
    close(pair.enclosing_height, (6.0, 10.0, 7.0))
    close(pair.center_distance2, (3.25, 0.8125, 32.0))
    v = pair.aspect_ratio_term
    close(v, (0.004963, 0.011806, 0.041956))
    close((pair.aspect_ratio_penalty() / v)[1], 0.040958)
    dx, dy = pair.center_offset
    slant = 2 * (dx * dy).abs() / pair.center_distance2
    close(slant[0], 0.923077)
    close(sum(1 - torch.exp((slant - 2) * share) for share in pair.over_enclosing2(dx, dy))[0], 0.094564)
    close(sum((1 - torch.exp(-change)).pow(4) for change in pair.side_change)[0], 0.001080)


def logits(*probabilities):
    return [math.log(p / (1 - p)) for p in probabilities]


X = [0.8, -0.4, 1.5]
SOFTMAX = [[2.0, -1.0, 0.5], [0.1, 0.2, -0.3]]
D = [0.3, -1.4, 0.05, 2]
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
    (
        {"type": "VarifocalLoss", "detach_weight": True},
        X,
        [0.6, 0, 1],
        [0.414660, 0.061966, 0.201413],
        [0.053985, 0.048474, -0.182426],
    ),
    # p - q^gamma of a positive, p^gamma p of a negative, and with a weight that is no constant as of the focal loss.
    ({"type": "MALoss"}, X, [0.6, 0, 1], [0.799294, 0.130423, 0.201413], [0.225216, 0.102025, -0.182426]),
    ({"type": "MALoss", "gamma": 2.0}, X, [0.6, 0, 1], [0.883101, 0.082622, 0.201413], None),
    (
        {"type": "MALoss", "detach_weight": False},
        X,
        [0.6, 0, 1],
        [0.799294, 0.130423, 0.201413],
        [0.225216, 0.219149, -0.182426],
    ),
    # p - t with t = .621329 and .950893.
    ({"type": "IABCELoss"}, X, [0.6, 0, 1], [0.674037, 0.082622, 0.275073], [0.068645, 0.163561, -0.133319]),
    (
        {"type": "IABCELoss", "detach_weight": True},
        X,
        [0.6, 0, 1],
        [0.674037, 0.082622, 0.275073],
        [0.068645, 0.064632, -0.133319],
    ),
    # The gradients by central differences of the formula in numpy, the second with gamma held.
    (
        {"type": "AdaptiveThresholdFocalLoss"},
        [0.8, -0.4, 1.5, -2],
        [1, 0, 0, 1],
        [0.126000, 0.221000, 2.720175, 4.224730],
        [-0.138462, 0.242142, 2.411597, -3.610390],
    ),
    (
        {"type": "AdaptiveThresholdFocalLoss", "detach_gamma": True},
        [0.8, -0.4, 1.5, -2],
        [1, 0, 0, 1],
        [0.126000, 0.221000, 2.720175, 4.224730],
        [-0.185451, 0.294919, 2.444360, -3.633453],
    ),
    (
        {"type": "AdaptiveThresholdFocalLoss"},
        [0.8, -0.4, 1.5, -2],
        [0.3, 0, 0.7, 1],
        [0.991489, 0.243559, 0.291325, 4.224730],
        None,
    ),
    # p = .9 .2 .6 .3 and one positive: alpha = 3/4, and .75 ln .9 = -.079020, .25 ln .8 = -.055786 and so on.
    (
        {"type": "BalancedCrossEntropyLoss"},
        logits(0.9, 0.2, 0.6, 0.3),
        [1, 0, 0, 0],
        [0.079020, 0.055786, 0.229073, 0.089169],
        [-0.075, 0.05, 0.15, 0.075],
    ),
    # The same value as the quality focal loss, and |d|^beta d + beta |d|^(beta - 1) sign(d) p (1 - p) BCE.
    (
        {"type": "GeneralizedFocalLoss"},
        X,
        [0.6, 0, 1],
        [0.005595, 0.082622, 0.006703],
        [0.027331, 0.163561, -0.017031],
    ),
    # Between 2 and 3 without a factor, p_r = .4: -.7 ln .6 - .3 ln .4, and the gradient .4 - .3.
    ({"type": "GeneralizedFocalLoss", "beta": 0.0, "values": [2, 3]}, logits(0.4), [2.3], [0.632465], [0.1]),
    ({"type": "PolyLoss", "gamma": 2.0}, [0.8, -0.4, 3.0], [1, 0, 0], [0.065467, 0.147254, 3.630644], None),
    (
        {"type": "PolyLoss", "gamma": 2.0, "alpha": 0.25},
        [0.8, -0.4, 3.0],
        [1, 0, 0],
        [0.016367, 0.110440, 2.722983],
        None,
    ),
    (
        {"type": "AsymmetricLoss"},
        [0.8, -0.4, 3.0],
        [1, 0, 0],
        [0.115051, 0.006593, 1.545391],
        [-0.096116, 0.005642, 0.307731],
    ),
    (
        {"type": "AsymmetricLoss", "detach_focusing": False},
        [0.8, -0.4, 3.0],
        [1, 0, 0],
        [0.115051, 0.006593, 1.545391],
        [-0.175498, 0.023677, 0.617138],
    ),
    (
        {"type": "AsymmetricLoss", "gamma_pos": 0.0},
        [0.8, -0.4, 3.0],
        [1, 0, 0],
        [0.371101, 0.006593, 1.545391],
        None,
    ),
    ({"type": "GaussianFocalLoss"}, [0.6, 0.6], [1, 0.8], [0.081732, 0.000528], None),
    ({"type": "MSELoss"}, [2.5, 0, 2, 8], [3, -0.5, 2, 7], [0.25, 0.25, 0, 1], [-1, 1, 0, 2]),
    # p = .6 and .5: (.6 - 1)^2 with the slope 2 (p - y) p (1 - p).
    ({"type": "MSELoss", "use_sigmoid": True}, logits(0.6, 0.5), [1, 0.3], [0.16, 0.04], [-0.192, 0.1]),
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
    ({"type": "HuberLoss"}, D, [0, 0, 0, 0], [0.045, 0.9, 0.00125, 1.5], [0.3, -1, 0.05, 1]),
    ({"type": "HuberLoss", "delta": 0.5}, D, [0, 0, 0, 0], [0.045, 0.575, 0.00125, 0.875], [0.3, -0.5, 0.05, 0.5]),
    (
        {"type": "BalancedL1Loss"},
        D,
        [0, 0, 0, 0],
        [0.185821, 1.678594, 0.009304, 2.578594],
        [0.952965, -1.5, 0.335010, 1.5],
    ),
    (
        {"type": "BalancedL1Loss", "beta": 2.0},
        D,
        [0, 0, 0, 0],
        [0.123518, 1.304712, 0.005193, 2.157187],
        None,
    ),
    (
        {"type": "BalancedL1Loss", "beta": 2.0, "upstream_form": True},
        D,
        [0, 0, 0, 0],
        [0.088114, 1.234909, -0.005027, 2.078594],
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
FOCAL = {"alpha": 0.25, "gamma": 2.0}
MULTI_LABEL = [[0.8, 0, 0.3], [0, 1, 1]]
FOCAL_GRADIENT = ((-0.006821, 0.001244, 0.005577), (0.098708, 0.109089, -0.207797))
# config, target (indices or distributions), values of the two rows, gradient
SOFTMAX_CASES = [
    ({"type": "CrossEntropyLoss"}, [0, 2], [0.241311, 1.420828], None),
    ({"type": "CrossEntropyLoss"}, [[0.7, 0.1, 0.2], [0, 0.5, 0.5]], [0.841311, 1.170828], None),
    ({"type": "CrossEntropyLoss", "label_smoothing": 0.1}, [0, 2], [0.391311, 1.390828], None),
    ({"type": "FocalLoss", "use_sigmoid": False}, [0, 2], [0.002773, 0.204351], FOCAL_GRADIENT),
    ({"type": "FocalLoss", "use_sigmoid": False, "alpha": None}, [0, 2], [0.011093, 0.817403], None),
    ({"type": "FocalLoss", "use_sigmoid": False, "alpha": None}, [[1.0, 0, 0], [0, 0, 1]], [0.011093, 0.817403], None),
    ({"type": "PolyLoss", "use_sigmoid": False}, [0, 2], [0.455714, 2.179314], None),
    ({"type": "PolyLoss", "use_sigmoid": False, "epsilon": 2.0}, [0, 2], [0.670117, 2.937800], None),
    ({"type": "PolyLoss", "use_sigmoid": False}, [[1.0, 0, 0], [0, 0, 1]], [0.455714, 2.179314], None),
    ({"type": "ModifiedCrossEntropyLoss"}, [0, 2], [1.414267, 2.396891], None),
    ({"type": "ModifiedCrossEntropyLoss", "activation": "softmax"}, [0, 2], [0.473933, 2.375391], None),
    ({"type": "ModifiedCrossEntropyLoss", **FOCAL}, [0, 2], [0.300503, 0.405318], None),
    ({"type": "ModifiedCrossEntropyLoss", "activation": "softmax", **FOCAL}, [0, 2], [0.007260, 0.308234], None),
    ({"type": "ModifiedCrossEntropyLoss"}, MULTI_LABEL, [1.664267, 2.196891], None),
    ({"type": "ModifiedCrossEntropyLoss", **FOCAL}, MULTI_LABEL, [0.468075, 0.254653], None),
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
    other = torch.tensor([[0.1, 0.1, 0.3, 0.5]], dtype=torch.float64).log()
    close(loss(other, torch.tensor([2.3], dtype=torch.float64)), 1.050725)


def test_distribution_focal_loss_over_other_bins():
    """D-FINE's FGL: a target between two of its bins, at one, below the first and beyond the last."""
    logits = torch.tensor([0.2, -0.1, 0.5, 0.0, 0.3], dtype=torch.float64)
    pred, target = logits.expand(5, 5).clone().requires_grad_(), torch.tensor([0.7, -1.0, 0.0, -9.0, 9.0]).double()
    loss = build_loss({"type": "DistributionFocalLoss", "bins": [-2, -0.5, 0, 1, 3], "reduction": "none"})
    value = loss(pred, target)
    close(value, (1.662349, 1.812349, 1.312349, 1.612349, 1.512349))
    (slope,) = torch.autograd.grad(value.sum(), pred)
    close(slope[0], (0.199419, 0.147733, -0.030813, -0.536730, 0.220392))
    close(slope[4], (0.199419, 0.147733, 0.269187, 0.163270, -0.779608))


def test_bins_of_d_fine():
    bins = torch.tensor(fgl_bins(), dtype=torch.float64)
    assert len(bins) == 33
    torch.testing.assert_close(bins, -bins.flip(0))
    close(bins[16:20], (0.0, 0.075990, 0.157754, 0.245731))
    close(bins[30:], (1.788131, 2.0, 4.0))


def test_distribution_distillation():
    student = torch.tensor([[0.3, 0.2, -0.4]], dtype=torch.float64, requires_grad=True)
    value = build_loss({"type": "DistributionDistillationLoss"})(student, torch.tensor([[1.0, -0.5, 2]]).double())
    close(value, 0.784760)
    close(torch.autograd.grad(value, student)[0], [[0.066736, 0.469470, -0.536206]])


def test_binary_cross_entropy_means():
    pred, target = torch.tensor(X, dtype=torch.float64), torch.tensor([1, 0, 0.3], dtype=torch.float64)
    loss = build_loss({"type": "BinaryCrossEntropyLoss"})
    close(loss(pred, target), 0.711843)
    close(loss(pred, target, torch.tensor([1, 0.5, 2])), 1.043478)
    close(build_loss({"type": "BinaryCrossEntropyLoss", "pos_weight": 2.0})(pred, target), 0.855685)
    cross_entropy = build_loss({"type": "CrossEntropyLoss"})
    close(cross_entropy(torch.tensor(SOFTMAX, dtype=torch.float64), torch.tensor([0, 2])), 0.831069)


def test_balanced_cross_entropy_means():
    pred = torch.tensor(logits(0.9, 0.2, 0.6, 0.3), dtype=torch.float64).unsqueeze(-1)
    target = torch.tensor([1.0, 0, 0, 0]).unsqueeze(-1)
    close(build_loss({"type": "BalancedCrossEntropyLoss"})(pred, target), 0.113262)
    close(build_loss({"type": "BalancedCrossEntropyLoss", "alpha": 0.25})(pred, target), 0.287106)


def test_asymmetric_sum_is_the_authors():
    pred, target = torch.tensor([[0.8, -0.4, 3.0]], dtype=torch.float64), torch.tensor([[1.0, 0, 0]])
    close(build_loss({"type": "AsymmetricLoss", "reduction": "sum"})(pred, target), 1.667034)


def test_kl_divergence():
    p = torch.tensor([[0.7, 0.1, 0.2]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    loss = build_loss({"type": "KLDivLoss"})
    logits_q = q.log().requires_grad_()
    value = loss(logits_q, p)
    close(value, 0.099273)
    close(torch.autograd.grad(value, logits_q)[0], [[-0.2, 0.15, 0.05]])  # q - p
    close(loss(p.log(), q), 0.116622)
    close(build_loss({"type": "CrossEntropyLoss"})(q.log(), p), 0.901091)
    close(build_loss({"type": "CrossEntropyLoss"})(p.log(), p), 0.801819)
    teacher = (torch.tensor([[2, -1, 0.5]], dtype=torch.float64) / 4).softmax(-1)
    student = torch.tensor([[1.0, 0, -1]], dtype=torch.float64, requires_grad=True)
    value = build_loss({"type": "KLDivLoss", "temperature": 4.0})(student, teacher)
    close(value, 0.476923)
    close(torch.autograd.grad(value, student)[0], 4 * ((student / 4).softmax(-1) - teacher).detach())


@pytest.mark.parametrize("target", [[[1.0, 0, 0], [0, 0, 1]], MULTI_LABEL], ids=["hard", "soft"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_gradient_of_modified_cross_entropy(activation, target):
    """From the formula: g = (p - t) / (p (1 - p)) by probability, then through the activation."""
    pred = torch.tensor(SOFTMAX, dtype=torch.float64, requires_grad=True)
    target = torch.tensor(target, dtype=torch.float64)
    loss = build_loss({"type": "ModifiedCrossEntropyLoss", "activation": activation, "reduction": "sum"})
    (actual,) = torch.autograd.grad(loss(pred, target), pred)
    with torch.no_grad():
        p = pred.sigmoid() if activation == "sigmoid" else pred.softmax(-1)
        g = (p - target) / (p * (1 - p))
        expected = p - target if activation == "sigmoid" else p * (g - (p * g).sum(-1, keepdim=True))
    torch.testing.assert_close(actual, expected)


def test_regression_means():
    pred, target = torch.tensor([2.5, 0, 2, 8], dtype=torch.float64), torch.tensor([3, -0.5, 2, 7.0])
    loss, weight = build_loss({"type": "MSELoss"}), torch.tensor([1, 2, 1, 0.5])
    close(loss(pred, target), 0.375)
    close(loss(pred, target, reduction_override="sum"), 1.5)
    close(loss(pred, target, weight), 0.3125)
    close(loss(pred, target, weight, avg_factor=weight.sum()), 0.277778)
    mae = build_loss({"type": "L1Loss"})
    close(mae(pred, target), 0.5)
    close(mae(pred, target, reduction_override="sum"), 2.0)


def test_rmse():
    pred = torch.tensor([2.5, 0, 2, 8], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([3, -0.5, 2, 7.0])
    loss = build_loss({"type": "RMSELoss"})
    value = loss(pred, target)
    close(value, 0.612372)
    close(torch.autograd.grad(value, pred)[0], [-0.204124, 0.204124, 0.0, 0.408248])
    close(loss(pred, target, torch.tensor([1, 2, 1, 0.5]), avg_factor=4.5), math.sqrt(1.25 / 4.5))


def test_balanced_l1_has_the_slope_the_paper_asks_for():
    """alpha ln(b d / beta + 1), zero at zero; upstream's for beta = 0.11 starts with .5 (1 - .11) / .11 = 4.045455."""
    b = math.exp(3) - 1
    at = torch.tensor([0.0, 1e-12, 0.05, 0.2], dtype=torch.float64, requires_grad=True)
    for form, start in ((False, 0.0), (True, 4.045455)):
        loss = build_loss({"type": "BalancedL1Loss", "beta": 0.11, "upstream_form": form, "reduction": "sum"})
        (slope,) = torch.autograd.grad(loss(at, torch.zeros(4)), at)
        extra = 0.5 * 0.89 / (b * 0.05 + 0.11) if form else 0.0
        close(slope, [0.0, start, 0.5 * math.log(b * 0.05 / 0.11 + 1) + extra, 1.5])


def test_confidence_weight():
    close(confidence_weight(torch.tensor(0.3).double(), torch.tensor(0.6), 2.0), 0.294)
    q = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    close(confidence_weight(q, 1 - q, 2.0), [0.729, 0.125, 0.001])
    assert not confidence_weight(q, 1 - q, 2.0).requires_grad
    background = torch.tensor([0.6, 0.5, 0.1])
    (slope,) = torch.autograd.grad(confidence_weight(q, background, 2.0, detach=False).sum(), q)
    close(slope, [-1.08, -0.5, -0.02])  # -power (1 - q_fg)^(power - 1) q_bg
