"""``class_weight`` and ``label_smoothing`` of every class loss with a sigmoid."""

import copy
import pickle

import pytest
import torch
from support import needs_compiler

from detloss_plugins import build_loss
from detloss_plugins.families import effective_weights
from detloss_plugins.losses import (
    GHMC,
    APLoss,
    BinaryCrossEntropyLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedFocalLoss,
    QualityFocalLoss,
    VarifocalLoss,
)
from detloss_plugins.registry import registered_losses

CLASSES, ROWS = 10, 40
WEIGHTS = [0.5, 2.0, 0.0, 1.0, 3.0, 0.25, 1.5, 1.0, 0.75, 4.0]


def sigmoid(cls):
    return cls.facts.family == "classification" and "class_weight" in cls.rules and cls.make().use_sigmoid


EVERY = [cls for cls in registered_losses().values() if sigmoid(cls) and not cls.instead]
SMOOTHABLE = [cls for cls in EVERY if not cls.facts.marks_positives]
every_loss = pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)


def inputs(form, ignored=True):
    """Logits in float64 and a target of one form, with rows or elements that are ignored; and its dense form."""
    g = torch.Generator().manual_seed(3)
    pred = torch.randn(ROWS, CLASSES, generator=g, dtype=torch.float64).requires_grad_()
    label = torch.randint(0, CLASSES + 1, (ROWS,), generator=g)
    quality = torch.rand(ROWS, generator=g, dtype=torch.float64)
    if form == "dense":
        dense = torch.rand(ROWS, CLASSES, generator=g, dtype=torch.float64)
        dense[dense < 0.6] = 0
        dense[:4, 2:5] = -1 if ignored else 0
        return pred, dense, dense
    label[:4] = -1 if ignored else 2
    value = quality if form == "quality" else torch.ones_like(quality)
    dense = torch.where(label.unsqueeze(-1) == torch.arange(CLASSES), value.unsqueeze(-1), 0)
    dense[label < 0] = -1
    return pred, (label, quality) if form == "quality" else label, dense


def gradient(value, pred):
    return torch.autograd.grad(value, pred)[0]


@pytest.mark.parametrize("form", ["label", "dense", "quality"])
@every_loss
def test_each_channel_is_multiplied_by_its_weight(cls, form):
    """Value and gradient, whether the loss sums over the classes or not."""
    pred, target, _ = inputs(form)
    plain, weighted = cls.make(reduction="sum").eval(), cls.make(reduction="sum", class_weight=WEIGHTS).eval()
    seen = plain.observe(pred, target, None)
    elements, valid = plain.unweighted(pred, target, seen)
    assert elements.shape == pred.shape
    valid = (
        torch.ones_like(elements)
        if valid is None
        else valid.to(elements).reshape(*valid.shape, *[1][: 2 - valid.dim()])
    )
    expected = sum(weight * (valid * elements)[:, index].sum() for index, weight in enumerate(WEIGHTS))
    found = weighted(pred, target)
    if not cls.facts.self_normalized:
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient(found, pred), gradient(expected, pred))
    rows = weighted(pred, target, reduction_override="none")
    torch.testing.assert_close(rows.sum(), expected)


@every_loss
def test_weights_of_one_change_nothing(cls):
    pred, target, _ = inputs("label")
    values = [cls.make(**given).eval()(pred, target) for given in ({}, {"class_weight": [1.0] * CLASSES})]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("form", ["label", "dense", "quality"])
@pytest.mark.parametrize("cls", SMOOTHABLE, ids=lambda cls: cls.__name__)
def test_smoothing_moves_every_target_towards_a_half(cls, form):
    pred, target, dense = inputs(form)
    smooth = torch.where(dense < 0, dense, 0.8 * dense + 0.1)
    found = cls.make(label_smoothing=0.2).eval()(pred, target)
    expected = cls.make().eval()(pred, smooth)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, pred), gradient(expected, pred))
    assert found != cls.make().eval()(pred, target)


def test_smoothing_and_weights_by_hand():
    """ln 2 for a logit of 0 whatever the target, so the weights alone; and with a logit of 2 the target's share."""
    zero, target = torch.zeros(1, 2), torch.tensor([0])
    loss = BinaryCrossEntropyLoss(class_weight=[3.0, 1.0], label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(loss(zero, target), torch.tensor([[3.0, 1.0]]) * 0.693147)
    # softplus(2) - 2 t with t = 0.9 and 0.1
    torch.testing.assert_close(loss(zero + 2, target), torch.tensor([[3 * 0.326928, 1.926928]]))


def test_effective_numbers():
    """(1 - 0.999^n) / 0.001 is 9.955 for 10 objects and 632.305 for 1000; a class that has none has the weight 1."""
    found = effective_weights([10, 1000, 0])
    assert found == pytest.approx([2 * 632.305 / (632.305 + 9.955), 2 * 9.955 / (632.305 + 9.955), 1.0], rel=1e-4)
    assert effective_weights([7, 7, 7]) == pytest.approx([1, 1, 1])
    assert effective_weights([5, 9], beta=0.0) == [1, 1]
    assert effective_weights([0, 0]) == [1, 1]
    loss = FocalLoss(class_weight="effective", class_counts=[10, 1000, 0], effective_beta=0.9)
    assert loss.class_factors.tolist() == pytest.approx(effective_weights([10, 1000, 0], 0.9))


@pytest.mark.parametrize("cls", [FocalLoss, CrossEntropyLoss, VarifocalLoss], ids=lambda cls: cls.__name__)
def test_weights_that_are_set_later(cls):
    """They count as those of the constructor do, and are refused as these are."""
    pred, target, _ = inputs("label")
    given = {"use_sigmoid": True, "class_counts": list(range(1, CLASSES + 1))}
    loss, found = cls(**given), []
    for weights in (None, WEIGHTS, torch.tensor(WEIGHTS[::-1]), "effective", None):
        loss.class_weight = weights
        found.append(loss(pred, target).item())
        assert found[-1] == cls(class_weight=weights, **given)(pred, target)
    assert len(set(found)) == 4
    twin = copy.deepcopy(loss)
    twin.class_weight = WEIGHTS
    assert (loss(pred, target), twin(pred, target)) == (found[0], found[1])
    uncounted = cls(use_sigmoid=True)
    uncounted.class_weight = "effective"
    with pytest.raises(ValueError, match="needs class_counts"):
        uncounted(pred, target)
    for other in (FocalLoss(use_sigmoid=False), APLoss()):
        with pytest.raises(ValueError, match="class_weight has no meaning"):
            other.class_weight = WEIGHTS
        assert other.class_weight is None


def test_effective_without_counts_says_so_when_it_is_called():
    for cls in (QualityFocalLoss, CrossEntropyLoss):
        loss = cls(class_weight="effective", use_sigmoid=True)
        with pytest.raises(ValueError, match=f'class_weight="effective" of {cls.__name__} needs class_counts'):
            loss(torch.zeros(2, 3), torch.tensor([0, 1]))
        loss.count_classes([1, 2, 3])
        assert loss(torch.zeros(2, 3), torch.tensor([0, 1])).isfinite()


def test_cross_entropy_keeps_mmdets_meaning():
    """Its weights scale the positive term, its smoothing is a part of the formula, and each is applied once."""
    pred, target, dense = inputs("dense", ignored=False)
    loss = CrossEntropyLoss(use_sigmoid=True, class_weight=WEIGHTS, label_smoothing=0.2)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        pred, 0.8 * dense + 0.1, pos_weight=torch.tensor(WEIGHTS, dtype=torch.float64)
    )
    torch.testing.assert_close(loss(pred, target), expected)
    counts = list(range(1, 11))
    effective = CrossEntropyLoss(use_sigmoid=True, class_weight="effective", class_counts=counts)
    by_hand = CrossEntropyLoss(use_sigmoid=True, class_weight=effective_weights(counts))
    assert effective(pred, target) == by_hand(pred, target) != CrossEntropyLoss(use_sigmoid=True)(pred, target)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"type": "VarifocalLoss", "label_smoothing": 0.1}, "takes every target above 0 for a positive"),
        ({"type": "SlideLoss", "label_smoothing": 0.1}, "in the dict of its base"),
        ({"type": "SlideLoss", "class_weight": [1.0]}, "in the dict of its base"),
        ({"type": "ConfidenceWeightedLoss", "class_weight": "effective"}, "in the dict of its base"),
        ({"type": "APLoss", "class_weight": [1.0]}, "it ranks scores"),
        ({"type": "RankSortLoss", "label_smoothing": 0.1}, "it ranks scores"),
        ({"type": "FocalLoss", "use_sigmoid": False, "class_weight": [1.0]}, "softmax form"),
        ({"type": "SeesawLoss", "label_smoothing": 0.1}, "softmax form"),
        ({"type": "CrossEntropyLoss", "class_weight": "effective"}, "softmax form"),
        ({"type": "GeneralizedFocalLoss", "values": (1.0, 3.0), "label_smoothing": 0.1}, r"values \(0.0, 1.0\)"),
    ],
    ids=lambda x: x["type"] if isinstance(x, dict) else "",
)
def test_where_they_have_no_meaning_they_are_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        build_loss(cfg)


def test_weights_for_another_number_of_classes():
    for loss in (FocalLoss(class_weight=[1.0, 2.0]), VarifocalLoss(class_weight=[1.0])):
        with pytest.raises(ValueError, match="class weights were given for 3 classes"):
            loss(torch.zeros(4, 3), torch.zeros(4, 3))


def test_in_a_base_and_in_a_joint_loss():
    pred, target, _ = inputs("label")
    inner = {"type": "BinaryCrossEntropyLoss", "class_weight": WEIGHTS, "label_smoothing": 0.2}
    expected = 2 * build_loss(inner)(pred, target) + FocalLoss()(pred, target)
    joint = build_loss({"type": "JointLoss", "losses": [{**inner, "loss_weight": 2.0}, {"type": "FocalLoss"}]})
    torch.testing.assert_close(joint(pred, target), expected)
    for outer in ("SlideLoss", "ConfidenceWeightedLoss"):
        bases = [{"type": "BinaryCrossEntropyLoss"}, {**inner, "label_smoothing": 0.0}]
        plain, weighted = (build_loss({"type": outer, "base": base, "reduction": "none"}).eval() for base in bases)
        torch.testing.assert_close(weighted(pred, target), plain(pred, target) * torch.tensor(WEIGHTS))


def test_they_are_settings_and_no_state():
    loss = GHMC(class_weight=WEIGHTS, label_smoothing=0.1)
    assert not loss.state_dict()
    assert "class_weight=[0.5" in repr(loss)
    pred, target, _ = inputs("label")
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin(pred, target) == loss(pred, target)
    plain = FocalLoss()
    assert "class_weight" not in repr(plain)
    assert GeneralizedFocalLoss(class_weight=[2.0, 2.0]).double().class_factors.dtype == torch.float64


@needs_compiler
@every_loss
def test_a_kernel_serves_all_weights(cls, traced):
    from detloss_plugins import engine

    pred, target, _ = inputs("dense", ignored=False)
    pred = pred.detach().float().requires_grad_()
    for weights in (WEIGHTS, WEIGHTS[::-1]):
        given = {"class_weight": weights, "label_smoothing": 0.0 if cls.facts.marks_positives else 0.1}
        values = [cls.make(compile=compiled, **given).eval()(pred, target) for compiled in (False, True)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(gradient(value, pred) for value in values), rtol=1e-4, atol=1e-6)
    kernels = 2 if "class_weight" in cls.hyper else 1
    found = [function for ((function, *_), *_) in engine._kernels if function == "weighted"]
    assert len(found) == (kernels if cls.make().compiles(pred.device) else 0)
