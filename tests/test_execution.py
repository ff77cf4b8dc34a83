"""However a loss is run - as it is written, in parts, by a formula, compiled - it is the same loss."""

import copy
import functools
import gc
import inspect
import pickle
import warnings
import weakref

import pytest
import torch
from compare import registered
from test_properties import EXTREME_BOXES, family, gradient, sample_for, variants
from timing import peak_memory
from torch import nn

from detloss_plugins import build_loss, execution
from detloss_plugins.losses import (
    GHMC,
    BinaryCrossEntropyLoss,
    CIoULoss,
    CrossEntropyLoss,
    DiceLoss,
    EQLV2Loss,
    FocalLoss,
    GIoULoss,
    JointLoss,
    L1Loss,
    MPDIoULoss,
    MultiBoxLoss,
    QualityFocalLoss,
    SeesawLoss,
    VarifocalLoss,
    WIoULoss,
)
from detloss_plugins.losses.classification.common import log1p, logistic

DENSE = [BinaryCrossEntropyLoss, FocalLoss, QualityFocalLoss, VarifocalLoss]
MEMORY = [
    (34_000, torch.float32, 3),
    (34_000, torch.bfloat16, 4),
    (8 * 8400, torch.float32, 3),
    (8 * 8400, torch.bfloat16, 3),
]
STATES = [
    {"type": "GHMC", "momentum": 0.5},
    {"type": "GHMR", "momentum": 0.5},
    {"type": "EQLV2Loss", "num_classes": 9},
    {"type": "SlideLoss"},
    {"type": "BalancedCrossEntropyLoss"},
]


@pytest.fixture
def in_small_parts(monkeypatch, device):
    """Parts of a few rows, so that a small input takes several; what ran in parts is counted."""
    monkeypatch.setitem(execution.PART, torch.device(device).type, 64)
    ran, in_parts = [], execution.in_parts
    monkeypatch.setattr(execution, "in_parts", lambda *call: ran.append(call[0]) or in_parts(*call))
    return ran


@pytest.fixture
def unbuilt(monkeypatch):
    """``torch.compile`` without a C++ compiler: everything up to the kernels, which would take seconds each."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    stock = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options=None, **how: stock(f, backend="eager", **how))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs uncompiled")
        yield


def graphs():
    """How many graphs the compiler has made since its reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def plain(loss, pred, target, *args, **kwargs):
    """Value and gradient as ``torch.func`` takes them, which are those of the plain operators."""
    both = torch.func.grad_and_value(lambda x: loss(x, target, *args, **kwargs))(pred.detach())
    return both[1], both[0]


def same(loss, pred, target, rtol=1e-5, **kwargs):
    """Assert that value and gradient are those of the plain operators."""
    value, slope = plain(loss, pred, target, **kwargs)
    found = loss(pred, target, **kwargs)
    torch.testing.assert_close(found, value, rtol=rtol, atol=1e-7)
    bound = rtol * slope.abs().max().item() + 1e-12
    torch.testing.assert_close(torch.autograd.grad(found, pred)[0], slope, rtol=rtol, atol=bound)


def test_parts_give_what_the_whole_gives(loss_cls, device, in_small_parts):
    for loss in variants(loss_cls)[: 0 if loss_cls.counts_positives else None]:  # those read all rows at once
        pred, target = sample_for(loss, device, 70, torch.float64)
        weight = torch.rand(len(pred), device=device)
        for kwargs in ({}, {"reduction_override": "sum"}, {"weight": weight, "avg_factor": 3.0}):
            same(loss, pred, target, **kwargs)
        assert in_small_parts or not loss.by_rows or loss.keeps_little


@pytest.mark.parametrize("kind", DENSE)
def test_parts_of_several_images(kind, device, in_small_parts):
    """Leading dimensions, labels with a background and an ignored one, and weights of every shape."""
    loss = kind()
    pred = torch.randn(3, 11, 6, device=device, requires_grad=True)
    label = torch.randint(-1, 7, (3, 11), device=device)
    quality = torch.rand(3, 11, device=device)
    for target in (label, (label, quality), torch.rand(3, 11, 6, device=device)):
        for shape in ((3, 11), (3, 11, 1), (3, 11, 6)):
            same(loss, pred, target, weight=torch.rand(shape, device=device), avg_factor=5.0)
    assert len(in_small_parts) == 9


APART = [{}, {"ignore_index": 2}, {"alpha": 0.3}, {"epsilon": -0.5}, {"gamma": 0.5}, {"beta": 1.5}]
TOGETHER = [{"class_weight": [1.0, 2.0, 0.5, 3.0]}, {"label_smoothing": 0.2}, {"pos_weight": 2.0}]


@pytest.mark.parametrize(
    "kind", [cls for cls in registered().values() if getattr(cls, "apart_without", None) is not None]
)
def test_labels_apart_from_the_other_channels(kind, device, in_small_parts):
    """A loss that can do so sets labels apart, and the settings with which it cannot are known."""
    torch.manual_seed(0)
    accepted = inspect.signature(kind).parameters.keys()
    vectors = [] if kind.sigmoid_only else [{"alpha": [0.1, 0.2, 0.3, 0.4], "gamma": 1.0}]
    for settings in APART + TOGETHER + vectors:
        if not settings.keys() <= accepted:
            continue
        loss = kind.make(**{"use_sigmoid": True, **settings})
        pred = (30 * torch.randn(90, 4, dtype=torch.float64, device=device)).requires_grad_()
        label = torch.randint(-1, 5, (90,), device=device)
        for target in (label, (label, torch.rand(90, device=device).round(decimals=1))):
            for kwargs in ({}, {"weight": torch.rand(90, device=device), "avg_factor": 3.0}):
                same(loss, pred, target, **kwargs)
        assert (loss.labels_apart(pred, label, None) is not None) == (settings in APART)
        assert in_small_parts.pop() is loss


class Squared(FocalLoss):
    """A user's loss with a formula of its own."""

    fn = staticmethod(lambda pred, target, *, gamma=2.0: (pred - target).abs() ** gamma)


class Smoothed(FocalLoss):
    """A user's loss that changes the target."""

    def prepare(self, pred, target):
        pred, target, valid = super().prepare(pred, target)
        return pred, 0.9 * target + 0.01, valid


@pytest.mark.parametrize("kind", [Squared, Smoothed])
def test_a_loss_derived_from_one_that_sets_labels_apart(kind, device, in_small_parts):
    pred = torch.randn(90, 4, device=device, requires_grad=True)
    same(kind(), pred, torch.arange(90, device=device) % 4)
    assert in_small_parts


def test_softmax_cross_entropy_in_parts(device, in_small_parts):
    """Sure and wrong rows, whose probability is no float32, background or ignored labels."""
    torch.manual_seed(0)
    for scale in (1.0, 300.0):
        pred = (scale * torch.randn(90, 4, device=device)).requires_grad_()
        label = torch.randint(-1, 4, (90,), device=device)
        for loss in (CrossEntropyLoss(ignore_index=2), FocalLoss(use_sigmoid=False, alpha=[0.1, 0.2, 0.3, 0.4])):
            same(loss, pred, label)
    assert len(in_small_parts) == 4


@pytest.mark.parametrize("kind", [BinaryCrossEntropyLoss, DiceLoss, L1Loss])
@pytest.mark.parametrize(("dtype", "much"), [(torch.float32, "MUCH"), (torch.bfloat16, "MUCH_OF_HALF")])
def test_much_runs_in_parts_even_where_little_is_kept(kind, dtype, much, device, in_small_parts, monkeypatch):
    loss = kind()
    pred, target = sample_for(loss, device, 40, dtype)
    whole = gradient(loss, pred, target)
    assert not in_small_parts
    monkeypatch.setattr(execution, much, 100)
    torch.testing.assert_close(gradient(loss, pred, target), whole)
    assert in_small_parts == [loss]


def test_a_scaled_gradient_in_half_precision_does_not_vanish(device, in_small_parts):
    """A part's gradient of 1e-9 is nothing in half precision; after the scaler's factor it is something."""
    pred = torch.randn(40, 8, device=device).half().requires_grad_()
    target = torch.rand(40, 8, device=device)
    (found,) = torch.autograd.grad(2.0**20 * FocalLoss()(pred, target, avg_factor=1e8), pred)
    wide = pred.detach().float()
    torch.testing.assert_close(found, (2.0**20 * plain(FocalLoss(), wide, target, avg_factor=1e8)[1]).half())
    assert in_small_parts
    assert (found != 0).all()


def test_torch_func_agrees(loss_cls, device):
    """It takes the plain operators, so this compares every backward by formula with autograd's."""
    for loss in variants(loss_cls):
        if not loss.counts_positives:
            same(loss, *sample_for(loss, device, 40, torch.float64))


@pytest.mark.parametrize("case", EXTREME_BOXES)
@family("box")
def test_formulas_agree_on_extreme_boxes(loss_cls, device, case):
    pred, target = (torch.tensor([box], dtype=torch.float64, device=device) for box in EXTREME_BOXES[case])
    same(loss_cls.make().eval(), pred.requires_grad_(), target)


@family("box")
def test_formulas_agree_on_any_corners(loss_cls, device):
    """Inverted along an axis, or along both, the prediction as well as the target."""
    pred, target = 100 * torch.rand(2, 200, 4, dtype=torch.float64, device=device)
    loss = loss_cls.make().eval()
    loss.unchecked = 0
    same(loss, pred.requires_grad_(), target)


def test_second_derivatives(loss_cls, device, in_small_parts):
    """By autograd twice, against ``torch.func`` twice."""
    loss = loss_cls.make().eval()
    if loss.counts_positives:
        return
    pred, target = sample_for(loss, device, 30, torch.float64)
    direction = torch.rand_like(pred)
    (first,) = torch.autograd.grad(loss(pred, target), pred, create_graph=True)
    (found,) = torch.autograd.grad((first * direction).sum(), pred) if first.requires_grad else (0 * pred,)
    once = torch.func.grad(lambda x: loss(x, target))
    expected = torch.func.grad(lambda x: (once(x) * direction).sum())(pred.detach())
    torch.testing.assert_close(found, expected)


def test_a_second_backward_through_one_graph(device, in_small_parts):
    pred, target = sample_for(GIoULoss(), device, 40)
    value = 3 * GIoULoss()(pred, target)
    first, second = (torch.autograd.grad(value, pred, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)
    assert in_small_parts


def test_a_target_with_a_gradient_gets_it(device, in_small_parts):
    for loss in (GIoULoss(), FocalLoss()):
        pred, target = sample_for(loss, device, 40, torch.float64)
        expected = torch.func.grad(lambda x, loss=loss, pred=pred: loss(pred.detach(), x))(target)
        found = torch.autograd.grad(loss(pred, target.requires_grad_()), target)[0]
        torch.testing.assert_close(found, expected)


def test_nothing_is_left_behind(loss_cls, device, in_small_parts):
    """A function that notes down its own output holds on to its memory until the garbage collector comes by."""
    loss = loss_cls.make()
    pred, target = sample_for(loss, device, 40)
    gc.disable()
    gc.freeze()  # what there is already is not looked at
    try:
        counts = []
        for _ in range(3):
            loss(pred, target).backward()
            pred.grad = None
            counts.append(sum(type(x) is torch.Tensor for x in gc.get_objects()))
    finally:
        gc.unfreeze()
        gc.enable()
    assert counts[1] == counts[2]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state["type"])
def test_state_in_parts(state, device, request):
    """A loss that looks at the whole batch sees it once, in parts or not, and its state moves as it would."""
    whole, split = build_loss(state).to(device), build_loss(state).to(device)
    pred, target = sample_for(whole, device, 70)
    expected = [whole(pred, target) for _ in range(2)]
    ran = request.getfixturevalue("in_small_parts")
    torch.testing.assert_close([split(pred, target) for _ in range(2)], expected)
    assert len(ran) == 2
    torch.testing.assert_close(list(split.buffers()), list(whole.buffers()))


@pytest.mark.parametrize("kind", [*DENSE, GHMC, functools.partial(EQLV2Loss, num_classes=80), JointLoss.make])
@pytest.mark.parametrize(("rows", "dtype", "times"), MEMORY)
def test_memory_of_dense_logits(kind, rows, dtype, times):
    """At most three times YOLO's logits, which autograd's intermediate results would take several times over.

    Of half precision the gradient is half as long, but not what a part works with, which weighs more with fewer rows.
    """
    pred, target = FocalLoss.sample(rows, classes=80)
    pred = pred.to(dtype).requires_grad_()
    loss = kind()
    used = peak_memory(lambda: loss(pred, target).backward(), torch.device("cpu"))
    assert used < times * pred.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_loss_of_the_positives(dtype):
    """Nothing is made of the rows that take no part."""
    pred, target = SeesawLoss.sample(8 * 8400, classes=78)
    target = target.where(torch.rand(len(target)) < 0.02, 78)
    pred = pred.to(dtype).requires_grad_()
    loss = SeesawLoss(num_classes=78, return_dict=False)
    used = peak_memory(lambda: loss(pred, target).backward(), torch.device("cpu"))
    assert used < 2.2 * pred.nbytes


def test_compiled_is_the_same(loss_cls, device, unbuilt):
    """One graph for every number of rows but 0 and 1, which run uncompiled; the compiler gives up on none."""
    loss = loss_cls.make(compile=True).eval()
    eager = loss_cls.make().eval()
    for n in (40, 23, 2, 1, 0):
        pred, target = sample_for(loss, device, n, torch.float64)
        for kwargs in ({"avg_factor": 2.5 + n}, {"reduction_override": "none"})[: 1 if n < 40 else 2]:
            found, expected = (x(pred, target, **kwargs).sum() for x in (loss, eager))
            torch.testing.assert_close(found, expected)
            slopes = (torch.autograd.grad(value, pred)[0] for value in (found, expected))
            torch.testing.assert_close(*slopes)
    assert graphs() <= (3 if loss.compiles(pred.device) else 0)  # one or two for one way, one for the other


def test_compiled_pair_of_logits_and_boxes(device, unbuilt):
    """MultiBoxLoss takes its logits and boxes as a pair too."""
    pred, target = (x.to(device) for x in MultiBoxLoss.sample(4))
    pairs = (pred[..., :-4], pred[..., -4:]), (target[..., 0].long(), target[..., 1:])
    torch.testing.assert_close(MultiBoxLoss(compile=True)(*pairs), MultiBoxLoss()(pred, target))
    assert graphs() == 1


def test_many_compiled_losses(device, unbuilt):
    """The compiler keeps eight graphs of one function, and then gives up; each loss has a function of its own."""
    pred, target = sample_for(CIoULoss(), device)
    for weight in range(1, 11):
        CIoULoss(compile=True, loss_weight=weight)(pred, target)
    assert graphs() == 10


def test_compiled_with_several_images(device, unbuilt):
    loss, eager = QualityFocalLoss(compile=True), QualityFocalLoss()
    for images, anchors in ((3, 7), (2, 9), (1, 5)):
        pred = torch.randn(images, anchors, 6, device=device, requires_grad=True)
        target = torch.randint(0, 7, (images, anchors), device=device), torch.rand(images, anchors, device=device)
        rows = loss(pred, target, reduction_override="none")
        torch.testing.assert_close(rows, eager(pred, target, reduction_override="none"))
        torch.testing.assert_close(gradient(loss, pred, target), gradient(eager, pred, target))
    assert graphs() == 2


@pytest.mark.parametrize("state", [{"type": "WIoULoss"}, {"type": "SlideLoss"}, {"type": "GHMC", "momentum": 0.5}])
def test_compiled_state_moves(state, device, unbuilt):
    loss, eager = build_loss({**state, "compile": True}).to(device), build_loss(state).to(device)
    for seed in range(3):
        pred, target = type(loss).sample(20, seed=seed)
        for x in (loss, eager):
            x(pred.to(device).requires_grad_(), target.to(device)).backward()
    assert graphs() == 1
    for found, expected in zip(loss.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


def test_compiled_with_changed_settings(device, unbuilt):
    """A graph holds the settings that it was made with, and a copy of those that can change in place."""
    pred, target = sample_for(CIoULoss(), device)
    loss = CIoULoss(compile=True)
    for weight in (1.0, 0.5, 0.5):
        loss.loss_weight = weight
        torch.testing.assert_close(loss(pred, target), CIoULoss(loss_weight=weight)(pred, target))
    assert graphs() == 2
    pred, target = torch.randn(8, 3, device=device), torch.arange(8, device=device) % 3
    loss = CrossEntropyLoss(compile=True, class_weight=[1.0, 2.0, 3.0])
    loss(pred, target)
    loss.class_weight[0] = 9.0
    torch.testing.assert_close(loss(pred, target), CrossEntropyLoss(class_weight=[9.0, 2.0, 3.0])(pred, target))
    assert graphs() == 4
    pred, target = sample_for(JointLoss.make(), device)
    joint, eager = JointLoss.make(compile=True), JointLoss.make()
    for gamma in (2.0, 1.0):
        joint.losses[1].gamma = eager.losses[1].gamma = gamma
        torch.testing.assert_close(joint(pred, target), eager(pred, target))
    assert graphs() == 6


def test_compiled_with_a_tensor_among_the_settings(device, unbuilt):
    pred, target = torch.randn(8, 3, device=device), torch.arange(8, device=device) % 3
    for weight in (torch.tensor([1.0, 2.0, 3.0], device=device), [1.0, 2.0, 3.0]):
        loss, eager = (CrossEntropyLoss(compile=x, class_weight=weight) for x in (True, False))
        torch.testing.assert_close(loss(pred, target), eager(pred, target))
        assert loss not in execution._not_compiled


class Counting(CIoULoss):
    """A loss with an attribute of its own, which is no setting."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = 0

    def compute(self, *call):
        return self.calls * super().compute(*call)


@pytest.mark.parametrize("kind", [Counting, functools.partial(MPDIoULoss, image_size="batch")])
def test_compiled_with_what_is_no_setting(kind, device, unbuilt):
    """The compiler watches it by itself."""
    pred, target = sample_for(CIoULoss(), device)
    loss, eager = kind(compile=True), kind()
    for step in (2.0, 3.0):
        for x in (loss, eager):
            x.calls, x.batch_image_size = step, torch.full((2,), 300.0 * step, device=device)
        torch.testing.assert_close(gradient(loss, pred, target), gradient(eager, pred, target))


@pytest.mark.parametrize("kind", [CIoULoss, WIoULoss, MPDIoULoss.make])
def test_a_compiled_loss_is_freed(kind, device, unbuilt):
    loss = kind(compile=True)
    gradient(loss, *sample_for(loss, device))
    gone = weakref.ref(loss)
    del loss
    gc.collect()
    assert gone() is None


def test_compiled_loss_is_copied_and_pickled(device, unbuilt):
    loss = CIoULoss(compile=True, loss_weight=0.5)
    pred, target = sample_for(loss, device)
    value = loss(pred, target)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(twin) == repr(loss) == "CIoULoss(loss_weight=0.5, compile=True)"
        torch.testing.assert_close(twin(pred, target), value)


def test_compiled_in_half_precision_keeps_no_more(device, unbuilt, in_small_parts):
    """The gradient waits in the type of the logits; labels beside them are gone through in parts."""
    pred = torch.randn(90, 4, device=device).bfloat16().requires_grad_()
    label = torch.arange(90, device=device) % 5
    for target in (label, (label, torch.rand(90, device=device)), torch.rand(90, 4, device=device)):
        compiled, eager = QualityFocalLoss(compile=True), QualityFocalLoss()
        for kwargs in ({}, {"avg_factor": 7.0}, {"reduction_override": "sum"}):
            found = compiled(pred, target, **kwargs)
            torch.testing.assert_close(found, eager(pred, target, **kwargs))
            torch.testing.assert_close(*(gradient(loss, pred, target, **kwargs) for loss in (compiled, eager)))
        kernel = execution.compiled_kernel(compiled, pred.detach(), target, None, None, "sum", {})
        assert kernel[0].dtype == torch.bfloat16
    assert compiled not in execution._not_compiled


def test_compiled_under_autocast(device, unbuilt):
    pred, target = sample_for(CIoULoss(), device)
    loss = CIoULoss(compile=True)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        found = loss(pred.bfloat16(), target)
    torch.testing.assert_close(found, CIoULoss()(pred.bfloat16(), target))
    assert found.dtype == torch.float32


class Model(nn.Module):
    """A layer and a loss that may be compiled."""

    def __init__(self, compile):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.loss = nn.Linear(4, 6), FocalLoss(compile=compile)

    def forward(self, x, target):
        return self.loss(self.layer(x), target)


def slopes(model, x, target):
    model(x, target).backward()
    return [parameter.grad for parameter in model.parameters()]


def test_compiled_in_a_compiled_model(unbuilt):
    x, target = torch.rand(20, 4), torch.rand(20, 6)
    whole = torch.compile(Model(compile=True), fullgraph=True)
    torch.testing.assert_close(slopes(whole, x, target), slopes(Model(compile=False), x, target))
    assert graphs() == 1


def test_compiled_in_a_distributed_model(unbuilt, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x, target = torch.rand(20, 4), torch.rand(20, 6)
        model = nn.parallel.DistributedDataParallel(Model(compile=True))
        torch.testing.assert_close(slopes(model, x, target), slopes(Model(compile=False), x, target))
        assert graphs() == 1
    finally:
        torch.distributed.destroy_process_group()


def test_without_a_compiler_there_is_one_warning(monkeypatch, device):
    def fail(*_, **__):
        raise RuntimeError("there is no C++ compiler")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(execution, "_told", set())
    pred, target = sample_for(CIoULoss(), device)
    loss = CIoULoss(compile=True)
    with pytest.warns(UserWarning, match="CIoULoss runs uncompiled.*no C\\+\\+ compiler"):
        value = loss(pred, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, other = loss(pred, target), GIoULoss(compile=True)(pred, target)
    assert value == again == CIoULoss()(pred, target)
    assert other == GIoULoss()(pred, target)


def test_a_mistake_in_a_call_is_told_as_without_compiling(unbuilt):
    loss = CIoULoss(compile=True)
    with pytest.raises(ValueError, match="must both be boxes"):
        loss(torch.rand(3, 4, requires_grad=True), torch.rand(4, 4).cumsum(-1))
    assert loss not in execution._not_compiled
    assert not execution.compiling()
    assert not execution.differentiated_once()


def test_what_compiled_losses_take_for_the_logarithm():
    x = torch.linspace(0, 1, 100_001)
    error = (log1p(x).double() / x.double().log1p() - 1)[1:].abs()
    assert error.max() < 2e-7
    assert log1p(x[:1]) == 0
    assert log1p(torch.tensor([1e-30])) == 1e-30


def test_one_exponential_gives_all():
    z = torch.tensor([-1e30, -90.0, -3.0, 0.0, 3.0, 90.0, 1e30])
    small, p, q = logistic(z)
    torch.testing.assert_close(small, torch.nn.functional.softplus(-z.abs()), rtol=1e-6, atol=0)
    torch.testing.assert_close(p, z.sigmoid(), rtol=1e-6, atol=1e-38)
    torch.testing.assert_close(q, (-z).sigmoid(), rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("settings", [{"type": "FocalLoss"}, {"type": "CIoULoss"}], ids=lambda s: s["type"])
def test_really_compiled(settings):
    """The kernels too: over millions of numbers, and as exact as uncompiled."""
    loss, eager = build_loss({**settings, "compile": True}), build_loss(settings)
    for n in (300_000, 1000):
        pred, target = type(loss).sample(n)
        pred.requires_grad_()
        value = eager(pred.double(), target.double())
        torch.testing.assert_close(loss(pred, target).double(), value, rtol=1e-6, atol=0)
        found, expected = gradient(loss, pred, target), gradient(eager, pred, target)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert loss not in execution._not_compiled


def test_softmax_ignores_nothing_new(device):
    """Labels below zero and ``ignore_index`` take no part, whichever way they are left out."""
    pred = torch.randn(5, 4, device=device, requires_grad=True)
    target = torch.tensor([0, -1, 255, 3, -100], device=device)
    rows = CrossEntropyLoss(ignore_index=255)(pred, target, reduction_override="none")
    assert (rows == 0).tolist() == [False, True, True, False, True]
