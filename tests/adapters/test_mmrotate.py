"""MMRotate 1.x: its detectors train with the rotated losses, which equal its own where they are the same loss."""

import copy
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, set_random_seed
from support.commands import ROOT, train

from detloss_plugins import build_loss
from detloss_plugins.losses.rotated import GWDLoss
from detloss_plugins.testing import sample
from detloss_plugins.testing.digits import build_dota

pytest.importorskip("mmrotate", reason="mmrotate is not installed: it needs onedl-mmcv, which takes mmcv's place")

from mmrotate.models import DeltaXYWHTRBBoxCoder
from mmrotate.registry import MODELS
from mmrotate.structures import RotatedBoxes
from mmrotate.utils import register_all_modules

CONFIGS = ROOT / "configs" / "mmrotate"
RETINANET = CONFIGS / "rotated-retinanet-gwd_r18_fpn_digits.py"
FCOS = CONFIGS / "rotated-fcos-kld_r18_fpn_digits.py"
# The last layers that predict sides and angles.
DETECTORS = {
    "Rotated RetinaNet": ["retina_reg"],
    "Rotated FCOS": ["conv_reg", "conv_angle"],
    "RTMDet-R": ["rtm_reg", "rtm_ang"],
}
every_detector = pytest.mark.parametrize("name", DETECTORS)

GWD = dict(type="detloss_plugins.GWDLoss", normalize=True, tau=0)
KLD = dict(type="detloss_plugins.KLDLoss", direction="target||pred", root=True, tau=0)
# MMRotate's losses and ours with the same settings; GDLoss's own default is tau=0.
SAME = [
    (dict(type="GDLoss", loss_type="gwd"), GWD),
    (dict(type="GDLoss", loss_type="gwd", tau=1.0), GWD | dict(tau=1)),
    (dict(type="GDLoss", loss_type="gwd", tau=1.0, fun="sqrt"), GWD | dict(tau=1, fun="sqrt")),
    (dict(type="GDLoss", loss_type="gwd", fun="none", loss_weight=5.0), GWD | dict(fun="none", loss_weight=5.0)),
    (dict(type="GDLoss", loss_type="kld"), KLD),
    (
        dict(type="GDLoss", loss_type="kld", tau=1, sqrt=False, loss_weight=5.5),
        KLD | dict(tau=1, root=False, loss_weight=5.5),
    ),
    (dict(type="GDLoss", loss_type="kld", tau=2, fun="sqrt"), KLD | dict(tau=2, fun="sqrt")),
]


@pytest.fixture(scope="module", autouse=True)
def scope():
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope("mmrotate"):
        yield


@pytest.fixture(scope="module")
def batch():
    build_dota()
    options = Config.fromfile(FCOS).train_dataloader
    return next(iter(Runner.build_dataloader({**options, "batch_size": 4}, seed=0)))


def model_config(name):
    """The config of a detector that is small enough for a test."""
    if name != "RTMDet-R":
        return Config.fromfile(RETINANET if name == "Rotated RetinaNet" else FCOS).model
    model = Config.fromfile(
        Config._get_cfg_path("mmrotate::rotated_rtmdet/rotated_rtmdet_tiny-3x-dota.py", "")[0]
    ).model
    for part in (model.backbone, model.neck, model.bbox_head):
        part.norm_cfg = dict(type="BN")
    model.backbone.init_cfg = None
    model.bbox_head.num_classes = 10
    model.bbox_head.loss_cls.type = "detloss_plugins.QualityFocalLoss"
    return model


def step(name, loss, batch, bias=None):
    """The loss dict of a training step with a box loss, summed over levels, and the gradients by parameter.

    ``bias`` is that of the layers that predict sides, in strides.
    """
    cfg = model_config(name)
    cfg.bbox_head.loss_bbox = loss
    set_random_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    for key, parameter in model.named_parameters():
        if bias is not None and re.search(r"(conv|rtm)_reg\.(\d\.)?bias$", key):
            torch.nn.init.constant_(parameter, bias)
    data = model.train().data_preprocessor(copy.deepcopy(batch), training=True)
    total, losses = model.parse_losses(model(**data, mode="loss"))
    total.backward()
    return losses, {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


@every_detector
@pytest.mark.parametrize("loss", ["GWDLoss", "KLDLoss", "KFIoULoss", "ProbIoULoss"])
def test_every_loss_trains_every_detector(name, loss, batch):
    losses, gradients = step(name, dict(type=f"detloss_plugins.{loss}", loss_weight=2.0), batch)
    assert all(value.isfinite() for value in losses.values())
    assert losses["loss_bbox"] > 0
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for layer in DETECTORS[name]:
        found = [gradient for key, gradient in gradients.items() if layer in key]
        assert found, layer
        assert all(gradient.abs().sum() > 0 for gradient in found), layer


@every_detector
@pytest.mark.parametrize(("theirs", "ours"), [SAME[1], SAME[5]], ids=["gwd", "kld"])
def test_a_step_is_the_same(name, theirs, ours, batch):
    """With weights ``(N, 5)``, ``(N,)``, and normalisers as each head hands them over.

    The heads without anchors start with boxes that have no sides, where MMRotate's KLD is NaN and its GWD clamped: so
    here their boxes have some.
    """
    losses, gradients = step(name, ours, batch, bias=2.0)
    stock_losses, stock_gradients = step(name, theirs, batch, bias=2.0)
    torch.testing.assert_close(dict(losses), dict(stock_losses), rtol=1e-4, atol=1e-5)
    assert gradients.keys() == stock_gradients.keys()
    for key, stock in stock_gradients.items():
        torch.testing.assert_close(gradients[key], stock, rtol=1e-3, atol=1e-3 * stock.abs().max().item(), msg=key)


def value_and_gradient(function, pred):
    pred = pred.clone().requires_grad_()
    value = function(pred).flatten()
    return [value.detach(), *torch.autograd.grad(value.sum(), pred)]


@pytest.mark.parametrize(("theirs", "ours"), SAME)
def test_gaussian_distances(theirs, ours):
    pred, target = sample(GWDLoss, 200, dtype=torch.float64)
    stock, loss = MODELS.build(theirs), build_loss(ours)
    want = value_and_gradient(lambda pred: stock(pred, target, reduction_override="none"), pred)
    got = value_and_gradient(lambda pred: loss(pred, target, reduction_override="none"), pred)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (dict(loss_type="gwd"), dict(type="GWDLoss", fun="sqrt", tau=1)),
        (dict(loss_type="gwd", fun="log1p", tau=2), dict(type="GWDLoss")),
        (dict(loss_type="kld", fun="log1p"), dict(type="KLDLoss", factor=2.0)),
        (dict(loss_type="kld"), dict(type="KLDLoss", factor=2.0, fun="sqrt")),
    ],
)
def test_gaussian_distances_of_the_first_version(theirs, ours):
    """Which neither weights nor averages: its result is the loss of each box."""
    pred, target = sample(GWDLoss, 200, dtype=torch.float64)
    stock, loss = MODELS.build(dict(type="GDLoss_v1", **theirs)), build_loss(ours)
    want = value_and_gradient(lambda pred: stock(pred, target), pred)
    got = value_and_gradient(lambda pred: loss(pred, target, reduction_override="none"), pred)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("fun", "mode"), [("none", "linear"), ("ln", "log"), ("exp", "exp")])
@pytest.mark.parametrize("center_weight", [0.0, 1.0])
def test_kfiou(fun, mode, center_weight):
    """KFLoss's center term compares encoded offsets, which depend on the anchor; ours are those of the target as the
    anchor, as the loss knows no other. Its ``eps`` of 1e-6 is a shift, ours is none."""
    pred, target = sample(GWDLoss, 200, dtype=torch.float64)
    coder = DeltaXYWHTRBBoxCoder(angle_version="le90", norm_factor=None, edge_swap=False, proj_xy=True)
    stock = MODELS.build(dict(type="KFLoss", fun=fun))
    loss = build_loss(dict(type="KFIoULoss", mode=mode, center_weight=center_weight))

    def with_offsets(pred):
        deltas = coder.encode(RotatedBoxes(target), RotatedBoxes(pred))
        return stock(
            center_weight * deltas,
            torch.zeros_like(deltas),
            pred_decode=pred,
            targets_decode=target,
            reduction_override="none",
        )

    want = value_and_gradient(with_offsets, pred)
    got = value_and_gradient(lambda pred: loss(pred, target, reduction_override="none"), pred)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [RETINANET, FCOS], ids=["Rotated RetinaNet", "Rotated FCOS"])
def test_training(config, tmp_path):
    """Four epochs, a third of what the config wants."""
    map50, printed = train(tmp_path, config, *(f"train_cfg.{key}=4" for key in ("max_epochs", "val_interval")))
    assert map50 > 0.1
    assert "bbox_head.loss_bbox: " in printed
