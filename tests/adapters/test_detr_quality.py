"""Which losses mmdet's DETR-type heads hand the IoU to: those of a quality, whatever they are wrapped in."""

import copy
import io
import pickle
import textwrap

import pytest
import torch
from mmdet.models.losses import FocalLoss as StockFocal
from mmdet.models.losses import QualityFocalLoss as Stock
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps
from support.commands import python
from support.mmdetection import backward
from support.mmdetection_detr import DEFORMABLE, DINO, MORE, QUALITY, WITH_STATE, calls, detector

from detloss_plugins import build_loss
from detloss_plugins.losses import VarifocalLoss
from detloss_plugins.registry import registered_losses

pytestmark = pytest.mark.usefixtures("mmdet_scope")


def joint(*names):
    return dict(type="JointLoss", losses=[dict(type=name) for name in names])


def weighted(base):
    return dict(type="ConfidenceWeightedLoss", base=base)


OF_QUALITY = {
    "joint": joint("QualityFocalLoss", "FocalLoss"),
    "joint, not the first": joint("FocalLoss", "VarifocalLoss"),
    "joint, one to one": joint("FocalLoss", "MALoss"),
    "weighted": weighted(dict(type="VarifocalLoss")),
    "weighted, one to one": weighted(dict(type="IABCELoss")),
    "weighted joint": weighted(joint("FocalLoss", "VarifocalLoss")),
    "joint weighted": dict(type="JointLoss", losses=[dict(type="FocalLoss"), weighted(dict(type="QualityFocalLoss"))]),
}
OF_LABELS = {
    "alone": dict(type="FocalLoss"),
    "joint": joint("FocalLoss", "BinaryCrossEntropyLoss"),
    "weighted": weighted(dict(type="FocalLoss")),
}
OTHERS = {"Deformable DETR": DEFORMABLE, **MORE}
CASES = {f"{name}, alone": (path, dict(type="QualityFocalLoss")) for name, path in {"DINO": DINO, **OTHERS}.items()}
CASES |= {f"DINO, {name}": (DINO, OF_QUALITY[name]) for name in ("weighted, one to one", "joint weighted")}
CASES["DINO, with a state"] = DINO, dict(type="EqualizedQualityFocalLoss", num_classes=10)
of_quality = pytest.mark.parametrize("cfg", OF_QUALITY.values(), ids=OF_QUALITY)


def in_head(cfg):
    return {**cfg, "type": f"detloss_plugins.{cfg['type']}", "use_sigmoid": True}


@pytest.mark.parametrize(("path", "cfg"), CASES.values(), ids=CASES)
def test_a_loss_of_a_quality_gets_the_iou(path, cfg, batch):
    """In every call: of the matched boxes, for the encoder's, each decoder layer's and the denoising queries."""
    model = detector(path, loss_cls=in_head(cfg))
    classes, boxes = calls(model.bbox_head.loss_cls), calls(model.bbox_head.loss_bbox)
    losses = backward(model, batch)
    assert all(value.isfinite() and value > 0 for name, value in losses.items() if name.endswith("loss_cls"))
    assert len(classes) == len(boxes) == (5 if path == DINO else 2)
    for ((_, (labels, quality), *_), _), ((pred, target, *_), _) in zip(classes, boxes, strict=True):
        found = labels < 10
        assert found.any()
        iou = bbox_overlaps(*(bbox_cxcywh_to_xyxy(box[found].detach()) for box in (pred, target)), is_aligned=True)
        torch.testing.assert_close(quality[found], iou)
        assert ((0 < iou) & (iou < 1)).any()
        assert (quality[~found] == 0).all()


@pytest.mark.parametrize("cfg", OF_LABELS.values(), ids=OF_LABELS)
def test_any_other_loss_gets_labels(cfg, batch):
    model = detector(DINO, loss_cls=in_head(cfg))
    seen = calls(model.bbox_head.loss_cls)
    backward(model, batch)
    assert len(seen) == 5
    assert all(isinstance(args[1], torch.Tensor) and not args[1].is_floating_point() for args, _ in seen)


@of_quality
def test_the_value_is_that_of_the_parts(cfg):
    """``isinstance`` is answered differently, and nothing else is: the loss is called as it is without mmdet."""
    loss = build_loss(cfg)
    logits, target = torch.randn(6, 4), (torch.tensor([0, 3, 4, 4, 1, 2]), torch.rand(6))
    parts = [logits.clone().requires_grad_() for _ in range(2)]
    value = loss(parts[0], target)
    if cfg["type"] == "JointLoss":
        expected = sum(build_loss(part)(parts[1], target) for part in cfg["losses"])
    else:
        elements, _ = loss.unweighted(parts[1], target, loss.observe(parts[1], target, None))
        count = len(logits) if loss.facts.sums_classes or loss.facts.one_per_row else logits.numel()
        expected = elements.sum() / count
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(parts[0].grad, parts[1].grad)


class Own(VarifocalLoss):
    """A user's, with settings of its own, as many are."""

    def __init__(self, name="own", **settings):
        super().__init__(**settings)
        self.name = name


OURS = {**{cls.__name__: cls() for cls in QUALITY}, "Own": Own(gamma=1.5)}
OURS |= {name: build_loss(cfg) for name, cfg in OF_QUALITY.items()}
each = pytest.mark.parametrize("loss", OURS.values(), ids=OURS)


def saved(loss, **options):
    file = io.BytesIO()
    torch.save(loss, file, **options)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [
    copy.copy,
    copy.deepcopy,
    lambda loss: pickle.loads(pickle.dumps(loss)),
    lambda loss: pickle.loads(pickle.dumps(loss, protocol=2)),
    saved,
    lambda loss: saved(loss, _use_new_zipfile_serialization=False),
    lambda loss: copy.deepcopy(torch.nn.Sequential(torch.nn.Linear(2, 2), loss))[1],
]


@each
def test_it_is_one_of_mmdets_to_isinstance_and_otherwise_what_it_was(loss):
    cls = type(loss)
    assert isinstance(loss, Stock)
    assert isinstance(loss, cls)
    assert not isinstance(loss, StockFocal)
    assert not issubclass(cls, Stock)
    assert repr(loss).startswith(f"{cls.__name__}(")
    assert not loss.state_dict()


@each
def test_copies_are_what_the_loss_is(loss):
    for way in COPIES:
        other = way(loss)
        assert type(other) is type(loss)
        assert isinstance(other, Stock)
        assert repr(other) == repr(loss)
        assert vars(other).keys() == vars(loss).keys()


def test_every_registered_loss_by_its_facts():
    for name, cls in registered_losses().items():
        loss = cls.make()
        assert isinstance(loss, Stock) == loss.facts.takes_quality, name
        assert cls.facts.takes_quality == (cls in [*QUALITY, *WITH_STATE]), name


@each
def test_a_compiler_asks_the_same(loss):
    """``torch.compile`` of a model that holds the loss follows the question and the call, without a break."""

    def ask(pred, target):
        return loss(pred, target) if isinstance(loss, Stock) else pred.sum() * torch.nan

    pred, target = torch.randn(6, 4), torch.rand(6, 4)
    torch._dynamo.reset()
    compiled = torch.compile(ask, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(pred, target), loss(pred, target))


ORDERS = {
    "mmdet first": "import mmdet.models; import detloss_plugins",
    "detloss_plugins first": "import detloss_plugins; import mmdet.models",
    "a loss first": "import detloss_plugins; early = losses(); import mmdet.models",
}


@pytest.mark.parametrize(
    "order",
    [pytest.param(code, id=name, marks=() if "early" in code else pytest.mark.slow) for name, code in ORDERS.items()],
)
def test_whichever_is_imported_first(order, tmp_path):
    """A loss that was built before mmdet's were loaded is one too, from then on."""
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            f"""
            def losses():
                from detloss_plugins import build_loss
                return [build_loss(cfg) for cfg in {[dict(type="QualityFocalLoss"), *OF_QUALITY.values()]!r}]

            early = []
            {order}
            from mmdet.models.losses import QualityFocalLoss
            found = [*early, *losses()]
            assert len(found) == {(1 + len(OF_QUALITY)) * (1 + order.count("losses()"))}
            assert all(isinstance(loss, QualityFocalLoss) for loss in found)
            assert not any(issubclass(type(loss), QualityFocalLoss) for loss in found)
            from detloss_plugins.losses import FocalLoss
            assert not isinstance(FocalLoss(), QualityFocalLoss)
            """
        ),
        encoding="utf-8",
    )
    python(tmp_path / "script.py")
