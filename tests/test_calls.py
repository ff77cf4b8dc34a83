"""What a call means whichever loss it is of: weights, types of targets, and losses that are made of others."""

import pytest
import torch

from detloss_plugins import build_loss
from detloss_plugins.geometry import power
from detloss_plugins.registry import registered_losses
from detloss_plugins.testing import sample

CALLS = [{}, {"avg_factor": 3.0}, {"reduction_override": "sum"}, {"reduction_override": "none"}]
PARTS = [
    cls
    for cls in registered_losses().values()
    if cls.can_be_part and cls.facts.family not in ("uncertainty", "multibox") and cls.__name__ != "SeesawLoss"
]
GHMC = {"type": "GHMC"}
OVER_BASE = [
    {"type": "SlideLoss", "base": GHMC},
    {"type": "ConfidenceWeightedLoss", "base": GHMC},
    {"type": "ConfidenceWeightedLoss", "base": {"type": "SlideLoss", "base": GHMC}},
]


@pytest.mark.parametrize("cls", PARTS, ids=lambda cls: cls.__name__)
def test_a_joint_loss_of_one_is_that_loss(cls):
    settings = {name: value for name, value in cls.facts.example.items()}
    alone = build_loss({"type": cls.__name__, **settings})
    joint = build_loss({"type": "JointLoss", "losses": [{"type": cls.__name__, **settings}]})
    pred, target = sample(alone, 6)
    for call in CALLS:
        torch.testing.assert_close(joint(pred, target, **call), alone(pred, target, **call), msg=f"{call}")


def test_a_joint_loss_takes_what_its_parts_take():
    torch.manual_seed(0)
    maps, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    masks, classes = torch.rand(2, 4, 5), torch.tensor([0, 2])
    for cfg, call in (({"use_sigmoid": False}, (maps, labels)), ({"use_mask": True}, (maps, masks, classes))):
        part = {"type": "CrossEntropyLoss", **cfg}
        joint = build_loss({"type": "JointLoss", "losses": [part, {**part, "loss_weight": 2.0}]})
        torch.testing.assert_close(joint(*call), 3 * build_loss(part)(*call))
    softmax = [{"type": "CrossEntropyLoss"}, {"type": "FocalLoss", "use_sigmoid": False}]
    nested = {"type": "JointLoss", "losses": [{"type": "JointLoss", "losses": softmax}]}
    over = {"type": "ConfidenceWeightedLoss", "base": softmax[0]}
    for cfg in ({"type": "JointLoss", "losses": softmax}, nested, over):
        rows = build_loss(cfg)(maps.movedim(1, -1), labels, reduction_override="none")
        torch.testing.assert_close(build_loss(cfg)(maps, labels, reduction_override="none"), rows)
        torch.testing.assert_close(build_loss(cfg)(maps, labels), rows.mean())
    with pytest.raises(ValueError, match="JointLoss must not need channels of their own"):
        build_loss({"type": "JointLoss", "losses": [{"type": "SeesawLoss", "num_classes": 3}]})


def test_a_joint_loss_is_of_logits_or_of_probabilities():
    for parts in (["BinaryCrossEntropyLoss", "FocalLoss"], ["DiceLoss", "TverskyLoss"]):
        setting = {"activate": False} if "DiceLoss" in parts else {"activated": True}
        first, second = ({"type": name} for name in parts)
        build_loss({"type": "JointLoss", "losses": [{**first, **setting}, {**second, **setting}]})
        nested = {"type": "JointLoss", "losses": [first]}
        for odd in (first, nested):
            with pytest.raises(ValueError, match="in all of them, for probabilities, or in none"):
                build_loss({"type": "JointLoss", "losses": [odd, {**second, **setting}]})


@pytest.mark.parametrize("name", ["SlideLoss", "ConfidenceWeightedLoss"])
def test_bases_that_are_none(name):
    bases = [{"type": "JointLoss", "losses": [GHMC]}, {"type": "SeesawLoss", "num_classes": 3}]
    if name == "ConfidenceWeightedLoss":
        wrong, over = {"type": "CrossEntropyLoss", "use_mask": True}, {"type": "SlideLoss"}
    else:
        wrong, over = {"type": "GeneralizedFocalLoss", "values": (1.0, 3.0)}, {"type": "ConfidenceWeightedLoss"}
    bases += [wrong, {"type": "JointLoss", "losses": [wrong]}, {**over, "base": wrong}]
    for base in bases:
        with pytest.raises(ValueError, match=f"base of {name} must be a"):
            build_loss({"type": name, "base": base})


BCE, QFL = {"type": "BinaryCrossEntropyLoss"}, {"type": "QualityFocalLoss"}
WITHOUT_1 = {"type": "CrossEntropyLoss", "use_sigmoid": True, "ignore_index": 1}


@pytest.mark.parametrize("odd", [QFL, WITHOUT_1, {"type": "CrossEntropyLoss"}], ids=str)
@pytest.mark.parametrize("name", ["SlideLoss", "ConfidenceWeightedLoss"])
def test_the_parts_of_a_base_are_of_one_kind(name, odd):
    """As the losses over it have one shape, one mean and one mask, which were those of the first part."""
    nested = {"type": "JointLoss", "losses": [{"type": "ConfidenceWeightedLoss", "base": odd}]}
    for parts in ([BCE, odd], [odd, BCE], [BCE, nested]):
        with pytest.raises(ValueError, match=f"base of {name} must be a"):
            build_loss({"type": name, "base": {"type": "JointLoss", "losses": parts}})
    if name == "ConfidenceWeightedLoss" or odd["type"] == "QualityFocalLoss":
        build_loss({"type": name, "base": {"type": "JointLoss", "losses": [odd, odd]}})


@pytest.mark.parametrize("cfg", OVER_BASE, ids=str)
def test_the_mean_of_a_loss_over_another_is_the_bases(cfg):
    """GHM-C divides by the number of elements that count, whatever avg_factor says."""
    loss = build_loss(cfg)
    pred, target = sample(loss, 50)
    total = loss(pred, target, reduction_override="sum")
    for call in ({}, {"avg_factor": 2.0}):
        torch.testing.assert_close(loss(pred, target, **call), total / pred.numel())


def test_the_base_says_what_is_ignored():
    base = {"type": "CrossEntropyLoss", "use_sigmoid": True, "ignore_index": 255, "avg_non_ignore": True}
    pred, label = torch.randn(3, 4), torch.tensor([0, 255, 2])
    for name in ("SlideLoss", "ConfidenceWeightedLoss"):
        loss = build_loss({"type": name, "base": base})
        loss(pred, label)  # the mean IoU of a batch is not that of two of its rows, but the last one seen
        loss.eval()
        torch.testing.assert_close(loss(pred, label), loss(pred[::2], label[::2]))


SEVERAL = {"type": "JointLoss", "losses": [BCE, {"type": "FocalLoss"}, {"type": "VarifocalLoss"}]}
ATFL = {"type": "AdaptiveThresholdFocalLoss"}


@pytest.mark.parametrize("base", [SEVERAL, ATFL, {"type": "JointLoss", "losses": [ATFL, BCE]}], ids=str)
@pytest.mark.parametrize("name", ["SlideLoss", "ConfidenceWeightedLoss"])
@pytest.mark.parametrize("call", [{}, {"reduction_override": "none"}], ids=str)
def test_gradients_are_not_added_up_in_half_precision(name, base, call):
    """They are those of float32, rounded once."""
    loss = build_loss({"type": name, "base": base}).eval()
    pred, target = 2 * torch.randn(64, 8), torch.rand(64, 8) * (torch.rand(64, 8) < 0.3)
    for dtype in (torch.float16, torch.bfloat16):
        half = pred.to(dtype).requires_grad_()
        full = half.detach().float().requires_grad_()
        found, wanted = (torch.autograd.grad(64 * loss(x, target, **call).sum(), x)[0] for x in (half, full))
        assert (found == wanted.to(dtype)).float().mean() > 0.99, dtype


@pytest.mark.parametrize("dense", [False, True])
def test_what_the_base_ignores_is_not_in_the_mean_iou(dense):
    """Whichever index it is, and however deep the base."""
    pred, label, iou = torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0.8, 0.2, 0.6])
    target = (label, iou)
    if dense:  # whose elements of that value are ignored
        target = torch.tensor([[0.8, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0.6, 0]])
    over = {"type": "ConfidenceWeightedLoss", "base": WITHOUT_1}
    for base in (WITHOUT_1, over, {"type": "JointLoss", "losses": [over, over]}):
        loss = build_loss({"type": "SlideLoss", "base": base})
        loss(pred, target)
        torch.testing.assert_close(loss.mean_iou, torch.tensor(0.7))


@pytest.mark.parametrize("name", ["QualityFocalLoss", "ModifiedCrossEntropyLoss", "EQLV2Loss", "FocalLoss"])
def test_ignored_elements_stay_so_beside_a_weight_of_each_row(name):
    """A sum over the classes leaves no place for a mask of classes."""
    loss = build_loss({"type": name, **({"num_classes": 3} if name == "EQLV2Loss" else {})}).eval()
    pred, weight = torch.randn(3, 3), torch.tensor([0.5, 1.0, 2.0])
    target = torch.tensor([[0, 0.6, -1], [1, 0, 0], [-1, -1, 0.3]])
    for call in CALLS:
        torch.testing.assert_close(loss(pred, target, weight, **call), loss(pred, target, weight[:, None], **call))


@pytest.mark.parametrize("name", ["APLoss", "ALRPLoss", "RankSortLoss", "DRLoss"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32])
def test_ranking_losses_leave_out_rows_of_any_type_of_target(name, dtype):
    loss = build_loss({"type": name})
    pred, weight = torch.randn(3, 2), torch.tensor([1.0, 0.0, 1.0])
    target = torch.tensor([[1, 0], [0, 0], [0, 1]])
    torch.testing.assert_close(loss(pred, target.to(dtype), weight), loss(pred[::2], target[::2].float()))


@pytest.mark.parametrize("name", ["SlideLoss", "EQLV2Loss", "EqualizedFocalLoss", "EqualizedQualityFocalLoss"])
def test_rows_of_weight_0_move_no_state(name):
    cfg = {"type": name, **({} if name == "SlideLoss" else {"num_classes": 3})}
    pred, target, weight = torch.randn(4, 3), torch.rand(4, 3) * (torch.rand(4, 3) > 0.4), torch.tensor([1.0, 0, 0, 1])
    masked, alone = build_loss(cfg), build_loss(cfg)
    masked(pred, target, weight)
    alone(pred[::3], target[::3])
    for found, wanted in zip(masked.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("name", "shape", "weight"),
    [
        ("CIoULoss", (2, 3, 4), (6,)),
        ("GaussianFocalLoss", (2, 3, 4, 5), (2, 1, 4, 5)),
        ("BinaryCrossEntropyLoss", (2, 3, 4), (24,)),
    ],
)
def test_weights_of_every_shape_without_a_reduction(name, shape, weight):
    loss, pred = build_loss({"type": name}), torch.rand(shape).sort(-1)[0]
    target, weight = torch.rand(shape).sort(-1)[0], torch.rand(weight)
    whole = loss(pred, target, reduction_override="none")
    given = weight if weight.dim() > 1 else weight.reshape(whole.shape)
    torch.testing.assert_close(loss(pred, target, weight, reduction_override="none"), whole * given)


def test_what_is_no_tensor_is_refused():
    for name in ("L1Loss", "RMSELoss", "CIoULoss", "APLoss", "ALRPLoss", "JointLoss"):
        with pytest.raises(TypeError, match=rf"The weight of {name} must be a tensor or None, not 2\.0"):
            registered_losses()[name].make()(torch.rand(3, 4), torch.rand(3, 4), 2.0)
    with pytest.raises(TypeError, match="must be a tensor, or a tuple of some"):
        build_loss({"type": "VarifocalLoss"})(torch.rand(2, 3), (torch.tensor([0, 1]), 0.5))


@pytest.mark.parametrize("use_sigmoid", [False, True])
def test_labels_in_a_byte(use_sigmoid):
    """Of which -100, the index to ignore, would be 156; and class 299 would be 43."""
    loss, pred = build_loss({"type": "CrossEntropyLoss", "use_sigmoid": use_sigmoid}), torch.randn(3, 300)
    label = torch.tensor([156, 43, 255])
    torch.testing.assert_close(loss(pred, label.to(torch.uint8)), loss(pred, label))
    focal = build_loss({"type": "FocalLoss"})
    torch.testing.assert_close(focal(pred, label.to(torch.uint8)), focal(pred, label))


def test_one_row_alone():
    loss, pred = build_loss({"type": "CrossEntropyLoss"}), torch.randn(3)
    torch.testing.assert_close(loss(pred, torch.tensor(1)), loss(pred[None], torch.tensor([1])))


def test_a_focusing_power_of_0_is_no_focusing():
    apart = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[5.0, 5, 7, 8]])
    assert build_loss({"type": "FocalEIoULoss", "gamma": 0})(*apart) == build_loss({"type": "EIoULoss"})(*apart) > 1


def test_an_infinite_log_variance_counts_as_the_largest():
    """As a head in half precision gives it."""
    loss, zero = build_loss({"type": "UncertaintyKLLoss"}), torch.zeros(1)
    largest = loss(zero, zero, torch.tensor([1e30]))
    variance = torch.tensor([float("inf")], requires_grad=True)
    torch.testing.assert_close(loss(zero, zero, variance), largest)
    assert torch.autograd.grad(loss(zero, zero, variance), variance)[0].isfinite().all()


def test_a_power_of_0_that_is_a_tensor():
    assert power(torch.tensor([0.0, 2.0]), torch.tensor(0.0), 1e-7).tolist() == [1, 1]
    assert power(torch.tensor([0.0, 2.0]), torch.tensor(2.0), 1e-7).tolist() == [0, 4]


def test_a_ranking_loss_has_none_for_each_anchor():
    loss = build_loss({"type": "MultiBoxLoss", "loss_cls": {"type": "APLoss"}, "reduction": "none"})
    with pytest.raises(ValueError, match="has a loss for each anchor, and a ranking loss has not"):
        loss((torch.rand(2, 6, 3), torch.rand(2, 6, 4)), (torch.zeros(2, 6).long(), torch.rand(2, 6, 4)))


def test_the_mean_of_seesaw_counts_all_rows():
    loss = build_loss({"type": "SeesawLoss", "num_classes": 3, "return_dict": False}).eval()
    pred, label = torch.randn(2, 4, 5), torch.tensor([[0, 3, 1, 3], [2, 3, 3, 3]])
    torch.testing.assert_close(loss(pred, label), loss(pred.flatten(0, 1), label.flatten()))
    torch.testing.assert_close(loss(pred[0], label[0].int()), loss(pred[0], label[0]))
