"""The formulas in LaTeX give what the functions give."""

import inspect
import math

import gallery
import pytest
import torch
from support.latex import Formula

from detloss_plugins.losses import binary_cross_entropy_loss, smooth_l1_loss
from detloss_plugins.registry import registered_losses

PAIRS = (((1, 2, 5, 7), (2, 1, 7, 6)), ((0.5, 0.2, 10.4, 8), (1, 0, 10, 10)), ((2, 3, 7, 9), (1, 1, 9, 12)))
# What a formula calls otherwise than the function does.
SYMBOLS = {
    "AsymmetricLoss": {"gamma_+": "gamma_pos", "gamma_-": "gamma_neg"},
    "ExtendedIoULoss": {"s": "smooth_point"},
    "GaussianFocalLoss": {"w_+": "pos_weight", "w_-": "neg_weight"},
    "PowerfulIoULoss": {"lambda": "lambda_"},
    "ShapeIoULoss": {"s": "scale"},
}
CLASS = (
    "AdaptiveThresholdFocalLoss", "BinaryCrossEntropyLoss", "FocalLoss", "QualityFocalLoss", "VarifocalLoss",
    "PolyLoss", "GeneralizedFocalLoss", "AsymmetricLoss", "MALoss", "IABCELoss",
)  # fmt: skip
BOX = (
    "IoULoss", "GIoULoss", "DIoULoss", "CIoULoss", "EfficientIoULoss", "FocalEfficientIoULoss", "SIoULoss",
    "ShapeIoULoss", "MPDIoULoss", "PowerfulIoULoss", "NWDLoss", "GCDLoss", "MGIoULoss", "ScaleDynamicIoULoss",
    "ExtendedIoULoss", "WIoULoss", "FocalerIoULoss", "InnerIoULoss", "AlphaIoULoss",
)  # fmt: skip
POINT = ("L1Loss", "MSELoss", "SmoothL1Loss", "HuberLoss", "BalancedL1Loss", "UncertaintyKLLoss")


def number(function, *values, **settings):
    """A function of the package, of plain numbers."""
    return function(*(torch.tensor(value, dtype=torch.float64) for value in values), **settings).item()


def settings_of(name):
    """The numeric defaults of a function, and under the formula's names."""
    found = {}
    for p in inspect.signature(registered_losses()[name].fn).parameters.values():
        if p.kind == p.KEYWORD_ONLY and type(p.default) is float and p.name != "eps":
            found[p.name] = p.default
    return found | {ours: found[theirs] for ours, theirs in SYMBOLS.get(name, {}).items()}


@pytest.mark.parametrize("name", CLASS)
def test_of_classes(name):
    fn = registered_losses()[name].fn
    for x in (-3.0, -0.4, 0.8, 2.5):
        p = 1 / (1 + math.exp(-x))
        for y in (0.0, 0.6, 1.0):
            given = {
                **settings_of(name),
                "x": x,
                "p": p,
                "y": y,
                "q": y,
                "BCE": lambda *v: number(binary_cross_entropy_loss, *v),
            }
            given |= {"w": 1.0, "l": 0.0, "r": 1.0, "sigma": lambda x: 1 / (1 + math.exp(-x))}
            if name == "PolyLoss":
                given |= {"alpha_t": 1.0, "varepsilon": given["epsilon"]}
            options = {}
            if name == "AdaptiveThresholdFocalLoss":
                given["gamma"], options["mean"] = -math.log(0.7), torch.tensor(0.7, dtype=torch.float64)
            expected = number(fn, [x], [y], **options)
            assert Formula(gallery.formulas()[name], **given)["L"] == pytest.approx(expected, rel=1e-9)


def of_boxes(pred, target):
    """What the formulas of boxes are made of, worked out by hand."""
    given = {}
    for star, (x1, y1, x2, y2) in (("", pred), ("*", target)):
        given |= {f"x_1{star}": x1, f"y_1{star}": y1, f"x_2{star}": x2, f"y_2{star}": y2}
        given |= {f"w{star}": x2 - x1, f"h{star}": y2 - y1}
    width = min(pred[2], target[2]) - max(pred[0], target[0])
    height = min(pred[3], target[3]) - max(pred[1], target[1])
    c_w, c_h = max(pred[2], target[2]) - min(pred[0], target[0]), max(pred[3], target[3]) - min(pred[1], target[1])
    overlap = width * height
    union = given["w"] * given["h"] + given["w*"] * given["h*"] - overlap
    given |= {"I": overlap, "U": union, "IoU": overlap / union, "C": c_w * c_h, "c_w": c_w, "c_h": c_h}
    given |= {"c": math.hypot(c_w, c_h)}
    for axis, i in (("x", 0), ("y", 1)):
        given[f"d_{axis}"] = (target[i] + target[i + 2] - pred[i] - pred[i + 2]) / 2
    return given


@pytest.mark.parametrize("name", BOX)
def test_of_boxes(name):
    cls = registered_losses()[name]
    for pred, target in PAIRS:
        given, options = {**settings_of(name), **of_boxes(pred, target)}, {}
        ciou = Formula(gallery.formulas()["CIoULoss"], **of_boxes(pred, target))
        if name == "MPDIoULoss":
            given |= {"W": 8.0, "H": 6.0}
            options["image_size"] = (6, 8)
        if name == "WIoULoss":
            options["mean"], given["b"] = 0.5, (1 - given["IoU"]) / 0.5
        if name == "ScaleDynamicIoULoss":
            given |= {"alpha": ciou["alpha"], "v": ciou["v"]}
        if name == "FocalEfficientIoULoss":
            given["L_EIoU"] = Formula(gallery.formulas()["EfficientIoULoss"], **of_boxes(pred, target))["L"]
        if name in ("FocalerIoULoss", "InnerIoULoss"):
            given["L_base"] = ciou["L"]
            given["IoU_inner"] = 1 - number(registered_losses()["InnerIoULoss"].fn, pred, target, base=None)
        if name == "AlphaIoULoss":
            given["penalty"] = 0.0
        formula = Formula(gallery.formulas()[name], **given)
        expected = number(cls.fn, list(map(float, pred)), list(map(float, target)), **options)
        assert formula["L"] == pytest.approx(expected, rel=1e-9)
        if name == "PowerfulIoULoss":
            assert formula["L_version2"] == pytest.approx(number(cls.fn, pred, target, version=2), rel=1e-9)


@pytest.mark.parametrize("name", POINT)
def test_of_points(name):
    for d in (-1.4, -0.05, 0.3, 2.0):
        given = {**settings_of(name), "d": d, "SmoothL1": lambda d: number(smooth_l1_loss, d, 0.0)}
        options = {}
        if name == "UncertaintyKLLoss":
            given["a"], options["log_variance"] = 0.7, torch.tensor(0.7, dtype=torch.float64)
        expected = number(registered_losses()[name].fn, d, 0.0, **options)
        assert Formula(gallery.formulas()[name], **given)["L"] == pytest.approx(expected, rel=1e-9)


def test_of_heatmaps():
    given = settings_of("GaussianFocalLoss")
    for p in (0.1, 0.8):
        for y in (0.0, 0.5, 1.0):
            formula = Formula(gallery.formulas()["GaussianFocalLoss"], p=p, y=y, **given)
            expected = number(registered_losses()["GaussianFocalLoss"].fn, p, y)
            assert formula["L"] == pytest.approx(expected, rel=1e-6)


def test_of_slide():
    cls = registered_losses()["SlideLoss"]
    for y in (0.1, 0.55, 0.9):
        given = {"x": 0.8, "y": y, "mu": 0.6, "BCE": lambda *values: number(binary_cross_entropy_loss, *values)}
        expected = number(cls.fn, [0.8], [y], mean_iou=torch.tensor(0.6))
        assert Formula(gallery.formulas()["SlideLoss"], **given)["L"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["JaccardLoss", "TverskyLoss"])
def test_of_regions(name):
    cls = registered_losses()[name]
    pred, target = [[0.5, 0.6, 0.1]], [[1.0, 0.0, 1.0]]
    given = {**settings_of(name), "TP": 0.6, "FP": 0.6, "FN": 1.4}
    assert Formula(gallery.formulas()[name], **given)["L"] == pytest.approx(number(cls.fn, pred, target), rel=1e-9)
