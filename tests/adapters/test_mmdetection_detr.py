"""DETR-type detectors with our losses: equal to mmdet's, and able to train."""

import copy
import textwrap

import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.structures import InstanceData
from support.commands import python
from support.mmdetection import (
    BOX_LOSSES,
    CONFIG_DIR,
    FORMS,
    backward,
    box_loss_cfg,
    build,
    settings_of,
    small,
    stopped_and_resumed,
    twin_configs,
)
from support.mmdetection_detr import DEFORMABLE, DINO, MORE, calls, detector

from detloss_plugins.losses import NWDLoss, QualityFocalLoss
from detloss_plugins.registry import loss_class

pytestmark = pytest.mark.usefixtures("mmdet_scope")

DINO_QFL = CONFIG_DIR / "dino-4scale-qfl_r50_8xb2-12e_coco.py"
every_detector = pytest.mark.parametrize("path", [DEFORMABLE, DINO], ids=["Deformable DETR", "DINO"])


def classification(name, **settings):
    return dict(type=f"detloss_plugins.{name}", **settings_of(loss_class(name), True), **settings)


def bce(logit, target):
    return torch.nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="none")


# Of a positive of quality 0, whose target is 0 for the one and .01 for the other, and of a negative.
OF_QUALITY_0 = {
    "MALoss": (lambda x: bce(x, torch.zeros_like(x)), lambda x: x.sigmoid() ** 1.5 * bce(x, torch.zeros_like(x))),
    "IABCELoss": (
        lambda x: bce(x, torch.full_like(x, 0.01)),
        lambda x: x.sigmoid() ** 2 * bce(x, torch.zeros_like(x)),
    ),
}


@pytest.mark.parametrize("name", OF_QUALITY_0)
def test_a_matched_box_that_misses_its_object_is_a_positive(name, batch):
    """All predicted boxes are a dot in the corner, so the head hands over an IoU of 0, and the label beside it."""
    model = detector(MORE["DETR"], loss_cls=classification(name))
    last = model.bbox_head.fc_reg
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, -7.0)
    seen = calls(model.bbox_head.loss_cls)
    losses = backward(model, batch)
    for key, ((logits, (labels, quality), weight), kwargs) in zip(("d0.loss_cls", "loss_cls"), seen, strict=True):
        positive = torch.nn.functional.one_hot(labels, 11)[:, :10].bool()
        assert positive.any()
        assert (quality == 0).all()
        rows = torch.where(positive, *(of(logits.detach()) for of in OF_QUALITY_0[name]))
        expected = (rows * weight[:, None]).sum() / kwargs["avg_factor"]
        torch.testing.assert_close(losses[key].item(), expected.item(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("path", "settings"),
    [
        ("DETR", dict(type="CrossEntropyLoss", use_sigmoid=False, class_weight=1.0, bg_cls_weight=0.1)),
        ("DETR", dict(type="QualityFocalLoss", use_sigmoid=True)),
        ("Conditional DETR", dict(type="QualityFocalLoss", use_sigmoid=True, beta=1.5)),
    ],
)
def test_equal_to_mmdets_losses(path, settings, batch):
    """In the heads that no config of ours has: the same weights and batch give the same losses and gradients."""
    box = {"loss_bbox": ("L1Loss", 5.0), "loss_iou": ("GIoULoss", 2.0)}
    models = []
    for scope in ("detloss_plugins", "mmdet"):
        losses = {key: dict(type=f"{scope}.{name}", loss_weight=weight) for key, (name, weight) in box.items()}
        models.append(detector(MORE[path], loss_cls={**settings, "type": f"{scope}.{settings['type']}"}, **losses))
    ours, stock = models
    assert type(ours.bbox_head.loss_cls) is loss_class(settings["type"])
    assert type(stock.bbox_head.loss_cls).__module__.startswith("mmdet.")
    torch.testing.assert_close(backward(ours, batch), backward(stock, batch), rtol=1e-5, atol=1e-6)
    for (name, our_one), stock_one in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if stock_one.grad is not None:
            scale = stock_one.grad.abs().max()
            assert (our_one.grad - stock_one.grad).abs().max() <= 1e-4 * scale + 1e-7, name


@pytest.fixture(scope="module")
def body(batch):
    """DINO's head, and what the body gives it for the batch."""
    model = detector(DINO)
    data = model.data_preprocessor(copy.deepcopy(batch), training=True)
    with torch.no_grad():
        inputs = model.forward_transformer(model.extract_feat(data["inputs"]), data["data_samples"])
    return model.bbox_head, {**inputs, "batch_data_samples": data["data_samples"]}


def take_steps(body, part, loss):
    """Two with that loss; everything is finite, and that part of the losses is positive and moves."""
    head, inputs = copy.deepcopy(body[0]), body[1]
    setattr(head, part, MMDET_MODELS.build(loss))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    seen = []
    for _ in range(2):
        losses = head.loss(**inputs)
        assert all(value.isfinite() for value in losses.values())
        seen.append(torch.stack([value for name, value in losses.items() if name.endswith(part)]))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        grads = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
        assert all(grad.isfinite().all() for grad in grads)
        assert sum(grad.abs().sum() for grad in grads) > 0
        optimizer.step()
    assert (torch.stack(seen) > 0).all()
    assert (seen[0] != seen[1]).sum() >= 2  # those of the encoder do not move: what the body gives is fixed


@pytest.mark.parametrize("name", [name for name, use_sigmoid in FORMS if use_sigmoid])
def test_any_classification_loss_takes_steps(name, body):
    take_steps(body, "loss_cls", classification(name))


@pytest.mark.parametrize("loss", BOX_LOSSES, ids=lambda cls: cls.__name__)
def test_any_box_loss_takes_steps(loss, body):
    take_steps(body, "loss_iou", box_loss_cfg(loss))


@pytest.mark.parametrize("name", ["SmoothL1Loss", "HuberLoss", "BalancedL1Loss", "MSELoss"])
def test_point_losses_take_steps(name, body):
    take_steps(body, "loss_bbox", dict(type=f"detloss_plugins.{name}"))


@every_detector
def test_box_losses_get_pixels(path, batch):
    """The targets of the matched boxes are the annotated ones."""
    model = detector(path, loss_iou=box_loss_cfg(NWDLoss))
    boxes = calls(model.bbox_head.loss_iou)
    backward(model, batch)
    annotated = torch.cat([sample.gt_instances.bboxes.tensor for sample in batch["data_samples"]])
    for (_, target, weight, *_), _ in (args for args in boxes):
        matched = target[weight[:, 0] > 0]
        assert len(matched) >= len(annotated)
        assert torch.cdist(matched, annotated).amin(1).max() < 1e-3


@pytest.mark.parametrize("path", [DEFORMABLE, DINO, DINO_QFL], ids=lambda path: path.stem)
def test_no_object_in_the_batch(path, batch):
    batch = copy.deepcopy(batch)
    for sample in batch["data_samples"]:
        sample.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    ours, stock = map(build, twin_configs(path))
    losses = backward(ours, batch)
    torch.testing.assert_close(losses, backward(stock, batch), rtol=1e-5, atol=1e-6)
    assert losses["loss_cls"] > 0
    assert all(value == 0 for name, value in losses.items() if name.endswith(("loss_bbox", "loss_iou")))
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


def still():
    """Deformable DETR with a quality focal loss, and without dropout, whose noise a resumed run does not repeat."""
    model = small(DEFORMABLE).model
    model.bbox_head.loss_cls = classification("QualityFocalLoss")
    for part in (model.encoder.layer_cfg, model.decoder.layer_cfg):
        for attention in ("self_attn_cfg", "cross_attn_cfg"):
            if attention in part:
                part[attention].dropout = 0.0
        part.ffn_cfg.ffn_drop = 0.0
    return model


@pytest.mark.slow
def test_stopped_and_resumed(tmp_path):
    """And what it has learnt fits the detector with mmdet's losses."""
    weights, runner = stopped_and_resumed(tmp_path, still())
    assert type(runner.model.bbox_head.loss_cls) is QualityFocalLoss
    build(twin_configs(DEFORMABLE)[1]).load_state_dict(weights, strict=True)


ROUTES = """
import copy, pickle, sys
from pathlib import Path
import torch
import detloss_plugins
from detloss_plugins import build_loss
from detloss_plugins.losses import FocalLoss, GeneralizedFocalLoss, QualityFocalLoss, VarifocalLoss
folder = Path(sys.argv[1])
class Own(VarifocalLoss):
    def __init__(self, name="own", **settings):
        super().__init__(**settings)
        self.name = name
"""


def script(tmp_path, code):
    """Run code after ROUTES in a fresh process."""
    path = tmp_path / "script.py"
    path.write_text(ROUTES + textwrap.dedent(code), encoding="utf-8")
    return python(path, tmp_path)


@pytest.mark.slow
def test_recognised_whatever_the_way(tmp_path):
    """By mmdet, once it is loaded: however a loss is built, loaded or copied. Otherwise it stays what it was."""
    script(
        tmp_path,
        """
        early = QualityFocalLoss(beta=1.5)
        assert not [name for name in sys.modules if name.split(".")[0] == "mmdet"]
        assert early.__class__.__mro__[-2] is torch.nn.Module
        before = repr(early), early.state_dict(), dict(vars(early))
        attributes = vars(VarifocalLoss()).keys()
        (folder / "early").write_bytes(pickle.dumps(early))
        import mmdet.models
        from mmdet.models.losses import FocalLoss as StockFocal, QualityFocalLoss as Stock
        assert isinstance(early, Stock)
        assert isinstance(pickle.loads((folder / "early").read_bytes()), Stock)
        from mmdet.registry import MODELS
        cfg = dict(type="detloss_plugins.QualityFocalLoss", use_sigmoid=True, beta=3.0, loss_weight=2.0)
        routes = [QualityFocalLoss(beta=3.0), VarifocalLoss(), GeneralizedFocalLoss(), build_loss(cfg)]
        routes += [MODELS.build(cfg), detloss_plugins.MODELS.build(cfg), Own(gamma=1.5), early]
        for loss in routes:
            assert isinstance(loss, Stock), loss
            assert type(loss).__module__.split(".")[0] in {"detloss_plugins", "__main__"}
            for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
                assert type(other) is type(loss) and isinstance(other, Stock)
                assert repr(other) == repr(loss) and vars(other).keys() == vars(loss).keys()
            assert not loss.state_dict()
        built = routes[4]
        assert type(built) is QualityFocalLoss
        assert repr(built) == "QualityFocalLoss(beta=3.0, loss_weight=2.0)"
        assert (repr(early), early.state_dict(), dict(vars(early))) == before
        assert vars(VarifocalLoss()).keys() == attributes  # nothing of mmdet's class, such as its beta
        assert Own().name == "own" and Own(gamma=1.5).gamma == 1.5
        assert not isinstance(FocalLoss(), (Stock, StockFocal))
        try:
            QualityFocalLoss(gamma=1.0)
        except TypeError as error:
            assert "it accepts activated, alpha, beta" in str(error), error
        (folder / "late").write_bytes(pickle.dumps(built))
        """,
    )
    script(  # where mmdet is absent
        tmp_path,
        """
        sys.modules["mmdet"] = None
        late = pickle.loads((folder / "late").read_bytes())
        assert type(late) is QualityFocalLoss and late.beta == 3.0
        assert late(torch.zeros(2, 3), torch.tensor([0, 3])) > 0
        """,
    )
