"""The engine: chunks, transforms and compiled kernels give what the plain formula gives, and fail without a trace."""

import contextlib
import copy
import pickle
import re
import threading
import warnings
from pathlib import Path

import pytest
import torch
from support import counted_graphs, needs_compiler, plain, sample_for
from torch import nn
from torch.utils.checkpoint import checkpoint

import detloss_plugins
from detloss_plugins import engine, precision
from detloss_plugins.families import ClassificationLoss, RegressionLoss
from detloss_plugins.losses import (
    GHMC,
    AdaptiveThresholdFocalLoss,
    CIoULoss,
    DiceLoss,
    DRLoss,
    FocalLoss,
    GIoULoss,
    InnerIoULoss,
    JaccardLoss,
    JointLoss,
    QualityFocalLoss,
    WIoULoss,
    eiou_loss,
    giou_loss,
)
from detloss_plugins.testing import sample

ROWS = 300  # of 80 classes: several chunks


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, device):
    """A chunk of 25 rows of 80 classes, and chunks wherever there are more than four."""
    monkeypatch.setitem(precision.CHUNK, torch.device(device).type, 2000)
    monkeypatch.setitem(precision.AT_ONCE, torch.device(device).type, 4)


@contextlib.contextmanager
def plain_rows(device):
    """Nothing is run in chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(precision.CHUNK, torch.device(device).type, 10**9)
        yield


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def many(device, rows=ROWS, dtype=torch.float64):
    pred, target = sample(FocalLoss, rows, dtype=dtype, classes=80)
    return pred.to(device).requires_grad_(), target.to(device)


# What is run by rows


class Centered(ClassificationLoss):
    """A user's loss that reads the whole batch."""

    fn = staticmethod(lambda pred, target: (pred - pred.mean() - target).abs())


def test_a_loss_that_states_nothing_is_run_on_the_whole_batch(device):
    pred, target = many(device)
    with_gradient, without = Centered()(pred, target), Centered()(pred.detach(), target)
    expected = Centered.fn(pred, target).mean()
    close(with_gradient, expected)
    close(without, expected)


def test_what_a_subclass_changes_is_not_guessed():
    assert FocalLoss.facts.row_wise
    assert not type("Changed", (FocalLoss,), {"fn": Centered.fn}).facts.row_wise


@pytest.mark.parametrize("rows", [20, ROWS])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_loss_learns_gets_its_gradient(rows, compiled, device):
    loss = FocalLoss(compile=compiled)
    loss.gamma = nn.Parameter(torch.tensor(2.0, device=device))
    pred, target = many(device, rows)
    loss(pred, target).backward()
    low, high = (FocalLoss(gamma=2 + step)(pred, target).item() for step in (-1e-4, 1e-4))
    assert loss.gamma.grad.item() == pytest.approx((high - low) / 2e-4, rel=1e-3)


def test_a_learned_loss_weight(device):
    weight = nn.Parameter(torch.tensor(3.0, device=device))
    pred, target = many(device)
    FocalLoss(loss_weight=weight)(pred, target).backward()
    close(weight.grad.double(), FocalLoss()(pred, target).detach())


def test_a_target_with_a_gradient_gets_it(device):
    pred, target = many(device)
    (found,) = torch.autograd.grad(QualityFocalLoss()(pred, target.requires_grad_()), target)
    close(found, torch.func.grad(lambda t: QualityFocalLoss()(pred.detach(), t))(target.detach()))


@pytest.mark.parametrize("shape", [(), (80,)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_what_is_shared_gets_its_gradient(shape, compiled, device, request):
    """By chunks, or of a number by a kernel too: first and second, and in forward mode."""
    if compiled:
        request.getfixturevalue("traced")
    pred, target = many(device)
    shared = (torch.rand(shape, dtype=torch.float64, device=device) + 1).requires_grad_()
    apart = torch.zeros_like(shared)  # shared too, and without a gradient

    def function(pred, target, apart, shared):
        return (pred.sigmoid() ** shared - target).square() + apart

    def total(pred, shared):
        rows, numbers = (pred, target), (apart, shared)
        kernel = ("a test", lambda: function, "A test") if compiled else None
        return engine.weighted_sum(engine.Call(function, rows, numbers, True, kernel))

    def whole(pred, shared):
        return function(pred, target, apart, shared).sum()

    def derivatives(total):
        first = torch.autograd.grad(total(pred, shared), (pred, shared), create_graph=True)
        along = sum((x * x.detach()).sum() for x in first)
        return *first, *torch.autograd.grad(along, (pred, shared))

    for found, expected in zip(derivatives(total), derivatives(whole), strict=True):
        close(found, expected)
    at, along = (pred.detach(), shared.detach()), (target + 1, torch.ones_like(shared))
    close(torch.func.jvp(total, at, along)[1], torch.func.jvp(whole, at, along)[1])
    if compiled:  # of several numbers, none
        assert [learned for _, _, learned, _ in engine._kernels] == ([] if shape else [(0, 3)])


# Gradients in the forward


@pytest.mark.parametrize("rows", [20, ROWS])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_transforms(rows, compiled, device, request):
    """Forward mode, reverse mode and both in either order, and vmap: in one chunk, in several, and by a kernel."""
    if compiled:
        request.getfixturevalue("traced")
    pred, target = many(device, rows)
    loss, x = FocalLoss(compile=compiled), pred.detach()
    direction = torch.rand_like(x)

    def value(x):
        return loss(x, target)

    _, slope = plain(loss, x, target)
    close(torch.func.grad(value)(x), slope)
    close(torch.func.jvp(value, (x,), (direction,))[1], (slope * direction).sum())
    (first,) = torch.autograd.grad(value(pred), pred, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), pred)
    close(torch.func.jvp(torch.func.grad(value), (x,), (direction,))[1], second)
    close(torch.func.grad(lambda x: torch.func.jvp(value, (x,), (direction,))[1])(x), second)
    several = torch.stack([x, x + 1])
    close(torch.vmap(value)(several), torch.stack([value(x), value(x + 1)]))
    along = torch.func.jvp(torch.vmap(value), (several,), (torch.stack([direction, direction]),))[1]
    close(along[0], (slope * direction).sum())
    close(torch.vmap(torch.func.grad(value))(several)[0], slope)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(pred, direction)
        close(torch.autograd.forward_ad.unpack_dual(value(dual)).tangent, (slope * direction).sum())


def test_a_loss_in_a_transform_of_something_else(device):
    pred, target = many(device)
    loss, value = FocalLoss(), plain(FocalLoss(), pred.detach(), target)[0]
    ones = torch.ones(2, device=device, dtype=value.dtype)
    close(torch.vmap(lambda x: x * loss(pred, target))(ones)[1], value)
    close(torch.func.grad(lambda x: x * loss(pred, target))(ones[0]), value)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("kind", [QualityFocalLoss, AdaptiveThresholdFocalLoss])
def test_forward_mode_of_pred_and_target(kind, compiled, device, request):
    """Of either and both, also without a graph."""
    if compiled:
        request.getfixturevalue("traced")
    pred, target = many(device)
    loss, whole = kind(compile=compiled), kind()
    directions = torch.rand_like(pred), torch.rand_like(target)
    with plain_rows(device):
        expected = torch.func.jvp(whole, (pred.detach(), target), directions)[1]
        of_target = torch.func.jvp(lambda x: whole(pred.detach(), x), (target,), directions[1:])[1]
    make_dual, unpack = torch.autograd.forward_ad.make_dual, torch.autograd.forward_ad.unpack_dual
    for graph in (True, False):
        with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(graph):
            duals = [make_dual(x, along) for x, along in zip((pred, target), directions, strict=True)]
            close(unpack(loss(*duals)).tangent, expected)
            close(unpack(loss(pred, duals[1])).tangent, of_target)


def test_a_second_backward_through_one_graph(device):
    pred, target = many(device)
    value = 3 * FocalLoss()(pred, target)
    first, second = (torch.autograd.grad(value, pred, retain_graph=True)[0] for _ in range(2))
    close(first, second)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_activations_may_be_worked_out_again(compiled, device, request):
    """What a checkpoint saves may be asked for once; no kernel can be made in it, and that of later calls is."""
    if compiled:
        request.getfixturevalue("traced")
    pred, target = many(device)
    loss = FocalLoss(compile=compiled)
    value = checkpoint(lambda x: loss(x, target), pred, use_reentrant=False)
    close(torch.autograd.grad(value, pred), torch.autograd.grad(loss(pred, target), pred))
    assert len(engine._kernels) == compiled or not compiled


@pytest.mark.parametrize("kind", [DiceLoss, JaccardLoss])
@pytest.mark.parametrize("rows", [20, ROWS])
def test_a_change_in_place_before_the_backward_is_no_silent_error(kind, rows, device):
    logits, target = (x.to(device) for x in sample(kind, rows))
    loss, leaf = kind(activate=False), logits.sigmoid().requires_grad_()
    (expected,) = torch.autograd.grad(loss(1 * leaf, target), leaf)
    pred = 1 * leaf
    value = loss(pred, target)
    with torch.no_grad():
        pred.zero_()
    try:
        (found,) = torch.autograd.grad(value, leaf)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        close(found, expected)


def test_a_scaled_gradient_in_half_precision_does_not_vanish(device):
    """A chunk's gradient of 1e-9 is nothing in half precision; after the scaler's factor it is something."""
    pred, target = many(device, dtype=torch.float32)
    half = pred.detach().half().requires_grad_()
    (found,) = torch.autograd.grad(2.0**20 * FocalLoss()(half, target, avg_factor=1e8), half)
    wide = half.detach().float()
    expected = plain(FocalLoss(loss_weight=2.0**20), wide, target, avg_factor=1e8)[1].half()
    torch.testing.assert_close(found, expected)
    assert (found != 0).float().mean() > 0.9


def test_threads_do_not_share_anything(device):
    """Two trainings at once get what each gets alone."""
    pred, target = many(device, dtype=torch.float32)
    losses = [FocalLoss(gamma=1.0), FocalLoss(gamma=3.0), QualityFocalLoss()]
    expected = [torch.autograd.grad(loss(pred, target), pred)[0] for loss in losses]
    found = [[] for _ in losses]

    def train(place):
        for _ in range(5):
            x = pred.detach().clone().requires_grad_()
            found[place].append(torch.autograd.grad(losses[place](x, target), x)[0])

    threads = [threading.Thread(target=train, args=(place,)) for place in range(len(losses))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for slopes, slope in zip(found, expected, strict=True):
        assert len(slopes) == 5
        for each in slopes:
            torch.testing.assert_close(each, slope)


def test_the_package_has_no_flags_and_uses_nothing_private_of_torch():
    root = Path(detloss_plugins.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^ +global ", text, re.MULTILINE), f"{path.name} writes module-level state"
        assert not re.search(r"torch\.(_(?!_version__)\w|\w+\._C|func\._)", text), (
            f"{path.name} uses a private name of torch"
        )


# Half precision, other devices


@pytest.mark.parametrize("function", [giou_loss, eiou_loss])
def test_functions_of_pixels_in_half_precision(function, device):
    """An area of 600 pixels squared is more than float16 can hold."""
    pred, target = (torch.tensor([box], device=device) for box in ([0.0, 0, 600, 600], [8.0, 0, 608, 600]))
    found = function(pred.half().requires_grad_(), target.half())
    torch.testing.assert_close(found, function(pred, target))


def test_meta_tensors():
    for kind in (FocalLoss, CIoULoss, GHMC, DiceLoss, WIoULoss):
        pred, target = sample(kind, 8)
        value = kind()(pred.to("meta").requires_grad_(), target.to("meta")) if kind not in (GHMC, WIoULoss) else None
        value = value if value is not None else kind().to("meta")(pred.to("meta"), target.to("meta"))
        assert value.shape == ()
        assert value.is_meta


# Compiled kernels; the compiler's back end does not matter for most of it


@needs_compiler
def test_equal_losses_share_a_kernel(device, traced):
    pred, target = sample_for(CIoULoss(), device)
    for weight in range(1, 11):
        loss = CIoULoss(compile=True, loss_weight=weight)
        for twin in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            close(twin(pred, target), weight * CIoULoss()(pred, target))
    assert counted_graphs() == 1


@needs_compiler
def test_a_schedule_of_the_weight_compiles_once_and_a_changed_setting_again(device, traced):
    pred, target = sample_for(FocalLoss(), device)
    loss = FocalLoss(compile=True)
    for step in range(4):
        loss.loss_weight = 1.0 + step
        expected = FocalLoss(loss_weight=1.0 + step)(pred, target, None, 2.0 + step)
        close(loss(pred, target, avg_factor=2.0 + step), expected)
    assert counted_graphs() == 1
    loss.gamma, loss.loss_weight = 1.0, 1.0
    close(loss(pred, target), FocalLoss(gamma=1.0)(pred, target))
    assert counted_graphs() == 2


@needs_compiler
def test_any_number_of_rows(device, traced):
    loss = QualityFocalLoss(compile=True)
    for images, anchors in ((3, 7), (2, 9), (1, 5), (1, 1), (2, 0)):
        pred = torch.randn(images, anchors, 6, device=device, requires_grad=True)
        target = torch.randint(0, 7, (images, anchors), device=device), torch.rand(images, anchors, device=device)
        found, expected = loss(pred, target), QualityFocalLoss()(pred, target)
        close(found, expected)
        close(*(torch.autograd.grad(value, pred)[0] for value in (found, expected)))
        close(loss(pred.detach(), target), expected.detach())
    assert counted_graphs() == 2  # with a gradient and without


@needs_compiler
def test_state_reaches_a_kernel_as_a_tensor(device, traced):
    """It moves at every step, and nothing is compiled again."""
    whole, kernel = (
        InnerIoULoss(base={"type": "WIoULoss", "momentum": 0.5}, compile=c).to(device) for c in (False, True)
    )
    pred, target = sample_for(CIoULoss(), device)
    for _ in range(4):
        close(kernel(pred, target), whole(pred, target))
    assert whole.base.mean != 1
    assert counted_graphs() == 1


@needs_compiler
def test_parts_of_a_joint_loss_in_one_kernel(device, traced):
    cfg = [{"type": "QualityFocalLoss"}, {"type": "GHMC", "momentum": 0.5, "loss_weight": 2.0}]
    whole, kernel = (JointLoss(losses=cfg, compile=c).to(device) for c in (False, True))
    pred, target = sample_for(FocalLoss(), device)
    for kwargs in ({}, {"avg_factor": 3.0}, {"reduction_override": "sum"}):
        close(kernel(pred, target, **kwargs), whole(pred, target, **kwargs))
    assert counted_graphs() == 1


@needs_compiler
def test_no_full_sum_is_compiled(device, monkeypatch):
    """A full sum of dynamic shape runs in one block of a GPU: a kernel gives a number for each row."""
    shapes = []
    original = engine._compile

    def spy(function, *how):
        kernel = original(function, *how)

        def called(*flat):
            found = kernel(*flat)
            shapes.extend(tuple(x.shape) for x in found)
            return found

        return called

    monkeypatch.setattr(engine, "_compile", spy)
    monkeypatch.setattr(engine, "_kernels", {})
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    pred, target = sample_for(CIoULoss(), device, 37)
    CIoULoss(compile=True)(pred, target).backward()
    assert shapes == [(37,), (37, 4)]


@needs_compiler
def test_the_compiler_of_another_device_than_a_cpu_keeps_its_own_limits(monkeypatch):
    """There it inlines all that a cat is made of: with higher limits it takes twice as long for every operator."""
    given = []
    monkeypatch.setattr(engine, "_kernels", {})
    monkeypatch.setattr(torch, "compile", lambda function, **how: given.append(how["options"].keys()) or function)
    for device in ("cpu", "meta"):
        pred, target = sample_for(FocalLoss(), torch.device(device))
        FocalLoss(compile=True)(pred, target).backward()
    raised = {f"realize_{what}_threshold" for what in ("opcount", "reads", "acc_reads")}
    assert [bool(options & raised) for options in given] == [True, False]


class Broken:
    """A compiler that fails, or whose kernel does, the first times."""

    def __init__(self, error, times=1, inside=True):
        self.error, self.left, self.inside = error, times, inside

    def __call__(self, function, **how):
        def kernel(*flat):
            if self.left:
                self.left -= 1
                raise self.error
            return function(*flat)

        return kernel


@pytest.fixture
def broken(monkeypatch):
    def give(error, times=1):
        monkeypatch.setattr(torch, "compile", Broken(error, times))
        monkeypatch.setattr(engine, "_kernels", {})
        monkeypatch.setattr(engine, "_failed", set())

    return give


FAULT = RuntimeError("backend='inductor' raised:\nCppCompileError: no compiler was found\n  more")


@needs_compiler
def test_a_failed_compilation_warns_for_each_loss_and_says_why(device, broken):
    broken(FAULT, times=9)
    for kind in (FocalLoss, QualityFocalLoss):
        pred, target = sample_for(kind(), device)
        loss = kind(compile=True)
        with pytest.warns(UserWarning, match=rf"{kind.__name__} runs uncompiled: .*no compiler was found"):
            close(loss(pred, target), kind()(pred, target))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss(pred, target)


@needs_compiler
def test_a_failed_compilation_takes_no_more_memory_than_a_call(device, broken, monkeypatch):
    """The arguments are looked at in chunks and without a graph."""
    broken(FAULT)
    pred, target = many(device)
    loss, seen = FocalLoss(compile=True), []
    function = FocalLoss.fn
    spy = lambda x, *args, **kwargs: seen.append((len(x), torch.is_grad_enabled())) or function(x, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(FocalLoss, "fn", staticmethod(spy))
    with pytest.warns(UserWarning, match="runs uncompiled"):
        loss(pred, target)
    assert max(rows for rows, _ in seen) == 25
    assert seen[0] == (25, False)


@needs_compiler
@pytest.mark.parametrize("cfg", [{"type": "GHMC", "momentum": 0.5}, {"type": "WIoULoss", "momentum": 0.5}])
def test_a_failed_compilation_moves_the_state_once(cfg, device, broken):
    broken(FAULT)
    kernel, whole = (detloss_plugins.build_loss({**cfg, "compile": c}).to(device) for c in (True, False))
    pred, target = sample_for(kernel, device)
    with pytest.warns(UserWarning, match="runs uncompiled"):
        close(kernel(pred, target), whole(pred, target))
    close(list(kernel.buffers()), list(whole.buffers()))


@needs_compiler
def test_out_of_memory_is_no_failed_compilation(device, broken):
    broken(torch.cuda.OutOfMemoryError("out of memory"))
    pred, target = sample_for(FocalLoss(), device)
    loss = FocalLoss(compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(loss(pred, target), FocalLoss()(pred, target))
    assert not engine._failed


@needs_compiler
def test_a_mistake_in_the_call_is_told_as_it_is(device, traced):
    with pytest.raises(ValueError, match="4 coordinates"):
        GIoULoss(compile=True)(torch.rand(9, 3, device=device), torch.rand(9, 3, device=device))
    assert not engine._failed


def test_a_ranking_loss_runs_uncompiled_without_a_word(device):
    pred, target = sample_for(DRLoss(), device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(DRLoss(compile=True)(pred, target), DRLoss()(pred, target))


class LogCosh(RegressionLoss):
    """A user's loss that states that it is row-wise."""

    fn = staticmethod(lambda pred, target, *, scale=1.0: torch.log(torch.cosh((pred - target) / scale)))
    facts = RegressionLoss.facts.but(row_wise=True)


@needs_compiler
def test_a_users_loss_is_compiled_too(device, traced):
    pred, target = sample_for(LogCosh(), device)
    close(LogCosh(compile=True, scale=2.0)(pred, target), LogCosh(scale=2.0)(pred, target))
    assert counted_graphs() == 1
