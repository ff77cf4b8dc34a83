"""The forms of a classification target, and the options of the losses that a property test does not reach."""

import pytest
import torch

from detloss_plugins import build_loss
from detloss_plugins.losses import CrossEntropyLoss, DistributionFocalLoss, FocalLoss

LABEL = torch.tensor([0, 2, 3, 1])  # 3 is background
QUALITY = torch.tensor([0.4, 0.9, 0.0, 1.0])
DENSE = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]])
SIGMOID = ["BinaryCrossEntropyLoss", "FocalLoss", "QualityFocalLoss", "VarifocalLoss"]


@pytest.fixture
def logits():
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SIGMOID)
def test_forms_agree(name, logits):
    loss = build_loss({"type": name, "reduction": "none"})
    assert torch.equal(loss(logits, LABEL), loss(logits, DENSE))
    assert torch.equal(loss(logits, (LABEL, QUALITY)), loss(logits, DENSE * QUALITY[:, None]))
    assert torch.equal(loss(logits, DENSE.bool()), loss(logits, DENSE))
    images = loss(logits.reshape(2, 2, 3), LABEL.reshape(2, 2))
    assert torch.equal(images.flatten(0, 1), loss(logits, LABEL))


@pytest.mark.parametrize("name", SIGMOID)
def test_negative_labels_are_ignored(name, logits):
    loss = build_loss({"type": name, "reduction": "sum"})
    ignored = torch.tensor([0, -1, 3, -100])
    torch.testing.assert_close(loss(logits, ignored), loss(logits[[0, 2]], ignored[[0, 2]]))


@pytest.mark.parametrize("name", SIGMOID)
def test_a_form_without_meaning(name, logits):
    loss = build_loss({"type": name})
    for target in (LABEL.float(), LABEL[:3], torch.rand(4, 2)):
        with pytest.raises(ValueError, match="takes class indices"):
            loss(logits, target)
    with pytest.raises(ValueError, match=r"sigmoid form only|softmax"):
        build_loss({"type": name, "use_sigmoid": False})(logits, (LABEL, QUALITY))


def test_activated_equals_logits(logits):
    for name in ("BinaryCrossEntropyLoss", "FocalLoss", "QualityFocalLoss"):
        from_logits = build_loss({"type": name})(logits, DENSE)
        torch.testing.assert_close(build_loss({"type": name, "activated": True})(logits.sigmoid(), DENSE), from_logits)
    softmax = FocalLoss(use_sigmoid=False, activated=True)(logits.softmax(-1), LABEL % 3)
    torch.testing.assert_close(softmax, FocalLoss(use_sigmoid=False)(logits, LABEL % 3))


@pytest.mark.parametrize("use_sigmoid", [False, True])
def test_ignore_index(use_sigmoid, logits):
    label = torch.tensor([0, 1, 2, 1])
    kept = label != 1
    everywhere = CrossEntropyLoss(use_sigmoid=use_sigmoid, ignore_index=1)
    valid_only = CrossEntropyLoss(use_sigmoid=use_sigmoid, ignore_index=1, avg_non_ignore=True)
    plain = CrossEntropyLoss(use_sigmoid=use_sigmoid)
    torch.testing.assert_close(valid_only(logits, label), plain(logits[kept], label[kept]))
    torch.testing.assert_close(everywhere(logits, label), plain(logits[kept], label[kept]) / 2)
    if use_sigmoid:
        quality = torch.full((4,), 0.5)
        torch.testing.assert_close(
            valid_only(logits, (label, quality)), plain(logits[kept], (label[kept], quality[kept]))
        )
    nothing = torch.ones(4, dtype=torch.long)
    assert valid_only(logits.requires_grad_(), nothing) == 0
    valid_only(logits, nothing).backward()


@pytest.mark.parametrize(
    "cfg",
    [
        {"type": "FocalLoss", "gamma": 0.5},
        {"type": "FocalLoss", "gamma": 0.5, "use_sigmoid": False},
        {"type": "FocalLoss", "gamma": 0.0},
        {"type": "VarifocalLoss", "gamma": 0.5},
        {"type": "QualityFocalLoss", "beta": 0.5},
    ],
    ids=str,
)
def test_powers_below_one_have_finite_gradients(cfg):
    """Where the base of the power is exactly zero its slope is infinite: confident logits, a quality met exactly."""
    pred = torch.tensor([[1e4, -1e4, -1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    dense = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]])
    target = torch.tensor([0, 1]) if cfg.get("use_sigmoid") is False else dense
    value = build_loss(cfg)(pred, target)
    assert value.isfinite()
    assert torch.autograd.grad(value, pred)[0].isfinite().all()


def test_alpha_per_class(logits):
    alpha = torch.tensor([0.5, 1.0, 2.0])
    plain = FocalLoss(use_sigmoid=False, alpha=None, reduction="none")
    balanced = FocalLoss(use_sigmoid=False, alpha=[0.5, 1.0, 2.0], reduction="none")
    label = LABEL % 3
    torch.testing.assert_close(balanced(logits, label), alpha[label] * plain(logits, label))
    torch.testing.assert_close(balanced(logits, DENSE[[0, 1, 3, 3]]), balanced(logits, torch.tensor([0, 2, 1, 1])))
    sigmoid = FocalLoss(alpha=[0.3, 0.5, 0.9], reduction="none")(logits, LABEL)
    for column, value in enumerate([0.3, 0.5, 0.9]):
        torch.testing.assert_close(
            sigmoid[:, column], FocalLoss(alpha=value, reduction="none")(logits, LABEL)[:, column]
        )
    with pytest.raises(ValueError, match="2 values were given for 3 classes"):
        FocalLoss(alpha=[0.3, 0.5])(logits, LABEL)


def test_softmax_form_refuses_quality(logits):
    for loss in (CrossEntropyLoss(), FocalLoss(use_sigmoid=False)):
        with pytest.raises(ValueError, match="class indices"):
            loss(logits, (LABEL, QUALITY))


def test_bad_settings_fail_at_construction():
    for cfg, words in (
        ({"type": "IoULoss", "mode": "cubic"}, "log"),
        ({"type": "SmoothL1Loss", "beta": -1.0}, "negative"),
        ({"type": "GIoULoss", "reduction": "average"}, "reduction"),
        ({"type": "BinaryCrossEntropyLoss", "activated": True, "pos_weight": 2.0}, "pos_weight"),
    ):
        with pytest.raises(ValueError, match=words):
            build_loss(cfg)


def test_distribution_targets_are_clamped_not_changed():
    pred = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([-3.0, 0.0, 7.0, 7.9, float("inf")])
    before = target.clone()
    rows = DistributionFocalLoss(reduction="none")(pred, target)
    assert torch.equal(target, before)
    log_p = pred.log_softmax(-1)
    torch.testing.assert_close(rows, -torch.stack([log_p[0, 0], log_p[1, 0], log_p[2, 7], log_p[3, 7], log_p[4, 7]]))
    assert DistributionFocalLoss()(pred, target.fill_(float("nan"))).isnan()
    with pytest.raises(ValueError, match="bins"):
        DistributionFocalLoss()(pred, torch.rand(5, 4))
