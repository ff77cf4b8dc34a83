"""Checks of what a loss computes: derivatives, state, compiled and on devices, beside counterparts, at extremes."""

import contextlib
import copy
import functools
import itertools
import math
import pickle
import sys
import warnings
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from detloss_plugins.facts import Facts
from detloss_plugins.loss import takes_probabilities
from detloss_plugins.nested import each_tensor, flatten
from detloss_plugins.testing import parity
from detloss_plugins.testing.check.subject import (
    DTYPES,
    MEAN,
    NONE,
    Subject,
    both,
    promise,
    require,
    rows_of,
    same,
    small_chunks,
)
from detloss_plugins.testing.twins import load


@promise("state true_gradient=False in its facts if a factor is detached, and only then")
def gradient(s: Subject) -> None:
    """The gradient is the derivative, or the facts say that a factor is detached, and it is."""
    loss, (pred, target) = s.make(), s.input(6, torch.float64)
    true = torch.autograd.gradcheck(lambda x: loss(x, target, **NONE), (pred,), raise_exception=False)
    if loss.facts.true_gradient:
        require(true, "the gradient is not the derivative")
    elif not s.settings:
        require(not true, "the gradient is the derivative, though the facts say true_gradient=False")


@promise("count all dimensions but those of one row as rows, as the families do", only=lambda facts: facts.row_wise)
def several_images(s: Subject) -> None:
    """Rows of several images, ``(B, N, ...)``, cost what they cost one below the other."""
    loss, (pred, target) = s.make(), s.input(dtype=torch.float64)
    if loss.leading(pred.unflatten(0, (4, -1))) == loss.leading(pred):
        return  # it has one dimension of rows

    def fold(x):
        return each_tensor(lambda x: x.detach().unflatten(0, (4, -1)), x)

    def run(pred, target, weight):
        value, slope = both(loss, pred.requires_grad_(), target, weight=weight, avg_factor=3.0)
        return value, slope.reshape(-1), loss(pred, target, **NONE).reshape(-1)

    weight = s.random(len(pred))
    for form in (weight, weight.unsqueeze(-1)):
        with small_chunks(s.device):
            found = run(fold(pred), fold(target), fold(form))
        same(found, run(pred, target, weight), "images must cost what their rows cost")


@promise("use plain operators, and detach() for constants", only=lambda facts: not facts.counts_positives)
def derivatives(s: Subject) -> None:
    """In chunks, second derivatives and those of forward mode are what ``torch.func`` gives."""
    loss, (pred, target) = s.make(), s.input(30, torch.float64)
    direction = s.random(*pred.shape).double()
    once = torch.func.grad(lambda x: loss(x, target))
    expected = torch.func.grad(lambda x: (once(x) * direction).sum())(pred.detach())
    with small_chunks(s.device):
        (first,) = torch.autograd.grad(loss(pred, target), pred, create_graph=True)
        along = (first * direction).sum()
        second = torch.autograd.grad(along, pred)[0] if first.requires_grad else torch.zeros_like(pred)
        forward = torch.func.jvp(lambda x: loss(x, target), (pred.detach(),), (direction,))[1]
    same(first, once(pred.detach()), "the gradient must be that of torch.func")
    same(second, expected, "the second derivative must be that of torch.func")
    same(forward, along, "forward mode must give the derivative")


@promise("move it in summarise() while self.learning, by finite numbers only")
def state(s: Subject) -> None:
    """State moves in training with gradients only, by rows that are finite, and goes on from where it was saved."""
    loss, restored = s.make().train(), s.make().train()
    loss(*s.input(64))
    restored.load_state_dict(loss.state_dict())
    same(restored(*s.input(64, seed=5)), loss(*s.input(64, seed=5)), "what it keeps of a call must be in its buffers")
    if not list(loss.buffers()):
        return
    loss = s.make().train()

    def after(loss, rows=None, bad=None, seed=0):
        pred, target = rows_of(s.input(64, seed=seed), slice(rows))
        for x in flatten((pred, target))[0] if bad else ():
            x.data[3] = bad if x.is_floating_point() else x[3]
        loss(pred, target)
        return [x.clone() for x in loss.buffers()]

    start = [x.clone() for x in loss.buffers()]
    with torch.no_grad():
        same(after(loss), start, "validation must not move the state", exact=True)
    same(after(loss.eval()), start, "evaluation mode must not move the state", exact=True)
    moved = after(loss.train())
    same(after(loss, rows=0), moved, "no rows must not move the state", exact=True)
    if not takes_probabilities(loss):  # torch refuses one that is NaN
        require(all(x.isfinite().all() for x in after(loss, bad=math.nan)), "a NaN must not get into the state")
    restored, copied = s.make().train(), copy.deepcopy(loss)
    restored.load_state_dict(loss.state_dict())
    expected = after(loss, seed=5)
    for other in (restored, copied):
        same(after(other, seed=5), expected, "a copy must go on as the loss does", exact=True)


@promise("define the class at the top level of a module, and keep its settings as attributes")
def copies(s: Subject) -> None:
    """Copies and pickles have the same settings and the same value."""
    loss, (pred, target) = s.make(loss_weight=0.7), s.input()
    expected = loss(pred, target)
    require("loss_weight=0.7" in repr(loss), "the repr must show the settings that are not the defaults")
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        require(repr(twin) == repr(loss), f"a copy is {twin!r} and not {loss!r}")
        same(twin(pred, target), expected, "a copy must have the same value", exact=True)


class NoWaiting(TorchDispatchMode):
    """Raise at the operators that make the host wait for the device."""

    def __init__(self, *allowed):
        super().__init__()
        self.forbidden = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"} - {*allowed}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        masked = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        masked = masked and "nonzero" in self.forbidden  # which is what it does first
        require(name not in self.forbidden and not masked, f"{name} makes the host wait for the device")
        return function(*args, **(kwargs or {}))


@promise("use torch.where and weights in place of indices, or state counts_positives=True in its facts")
def no_waiting(s: Subject) -> None:
    """The host does not wait for a GPU, but to count the positives of a loss that says so."""
    loss, (pred, target) = s.make(), s.input()
    for part in loss.modules():
        part.unchecked = 0  # box losses look at the targets of the first calls
    with contextlib.ExitStack() as on_a_gpu:  # on a CPU too, it is to do as there
        for name, module in list(sys.modules.items()):
            if name.startswith("detloss_plugins.") and hasattr(module, "is_asynchronous"):
                on_a_gpu.enter_context(mock.patch.object(module, "is_asynchronous", return_value=True))
        with NoWaiting(*("nonzero", "masked_select") * loss.facts.counts_positives):
            loss(pred, target, weight=s.random(len(pred)), avg_factor=s.random()).backward()


@promise("use operators that torch.compile knows, and ask for no number of a tensor")
def compiled(s: Subject) -> None:
    """Compiled, alone and in a model, it is the same loss; tried only if ``compile=True`` is asked for."""
    if not s.compile:
        return
    loss, eager = s.make(compile=True), s.make()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs uncompiled")
        for n, kwargs in itertools.product((40, 23, 1, 0), (NONE, MEAN, {"avg_factor": 2.5})):
            expected = both(eager, *s.input(n), **kwargs)
            same(both(loss, *s.input(n), **kwargs), expected, f"{n} rows must cost the same compiled")
    model = torch.compile(eager, fullgraph=not loss.facts.counts_positives)
    same(both(model, *s.input()), both(eager, *s.input()), "in a compiled model it must be the same")


@promise("correct the formula, or what the facts state of upstream", only=lambda facts: facts.upstream)
def upstream(s: Subject) -> None:
    """Each counterpart that is installed has the same value and gradient, or differs as stated."""
    for twin in s.cls.facts.upstream:
        if dict(twin.ours) == dict(s.settings) and load(twin.path) is not None:
            worst = parity.compare(s.cls, twin, [parity.random_tensors(s.cls)])
            how = "agrees" if worst.agree else f"differs by {worst.value:.2g}, its gradient by {worst.gradient:.2g}"
            require(parity.verdict(twin, worst) != "FAIL", f"{twin.path} {how}")


EXTREME_BOXES = {
    "identical": ((10.0, 10, 20, 20), (10.0, 10, 20, 20)),
    "disjoint": ((0.0, 0, 10, 10), (500.0, 500, 600, 600)),
    "nested": ((12.0, 12, 15, 15), (10.0, 10, 20, 20)),
    "touching": ((0.0, 0, 10, 10), (10.0, 0, 20, 10)),
    "zero-size": ((5.0, 5, 5, 5), (3.0, 3, 9, 9)),
    "both the same point": ((5.0, 5, 5, 5), (5.0, 5, 5, 5)),
    "no height": ((5.0, 5, 9, 5), (3.0, 3, 9, 9)),
    "no height, both": ((5.0, 5, 9, 5), (5.0, 5, 9, 5)),
    "thin": ((5.0, 5, 6, 900), (5.0, 5, 900, 6)),
    "inverted": ((20.0, 20, 10, 10), (10.0, 10, 20, 20)),
    "normalised": ((1e-3, 1e-3, 2e-3, 2e-3), (1e-3, 1e-3, 2e-3, 2.1e-3)),
    "huge": ((0.0, 0, 1e5, 1e5), (1e3, 0, 1e5, 9e4)),
}


def of_boxes(facts: Facts) -> bool:
    """Whether a loss is one between boxes."""
    return facts.family == "box"


@promise("divide by what vanishes as detloss_plugins.geometry.ratio does", only=of_boxes)
def extreme_boxes(s: Subject) -> None:
    """Boxes that are the same, apart, flat, thin, inverted, tiny or huge cost a finite number with such a gradient."""
    for (case, boxes), dtype in itertools.product(EXTREME_BOXES.items(), DTYPES):
        pred, target = s.moved(torch.tensor(boxes).clamp(max=6e4).to(dtype).unsqueeze(1).unbind())
        value, slope = both(s.make(), pred.requires_grad_(), target)
        require(value.isfinite() and slope.isfinite().all(), f"{case} boxes in {dtype} must cost a finite number")


@promise("correct the formula, or state minimum, symmetric or scale_invariant in its facts", only=of_boxes)
def invariances(s: Subject) -> None:
    """Identical boxes cost the minimum; moving, transposing, swapping and scaling both boxes changes what it may."""
    loss, (pred, target) = s.make(), s.input(200)
    facts = loss.facts
    cost = functools.partial(loss, **NONE)

    def near(found, expected, words, places):
        require(((found - expected).abs() <= places).all(), words)

    for scale, dtype in itertools.product((1e-3, 1.0, 1e4) if facts.scale_invariant else (1.0, 1e4), DTYPES):
        box = (target.detach() * scale).to(dtype)
        box = box[box.isfinite().all(-1)]
        near(cost(box.clone(), box), facts.minimum, "identical boxes must cost the minimum", 1e-5)
    rows = cost(pred, target)
    require(rows.min() >= facts.minimum - 1e-6, "nothing may cost less than the minimum")
    near(cost(pred + 64, target + 64), rows, "moving both boxes must change nothing", 1e-4)
    turned = cost(pred[:, [1, 0, 3, 2]], target[:, [1, 0, 3, 2]])
    near(turned if rows.dim() == 1 else turned[:, [1, 0, 3, 2]], rows, "x and y must be treated alike", 1e-4)
    if facts.symmetric:
        near(cost(target, pred), rows, "swapping the boxes must change nothing", 1e-4)
    for scale in (1e-3, 1 / 32, 1e3) if facts.scale_invariant else ():
        near(cost(pred * scale, target * scale), rows, "scaling both boxes must change nothing", 1e-4)


@promise("correct the formula, or leave attracts=True out of its facts", only=lambda f: of_boxes(f) and f.attracts)
def attraction(s: Subject) -> None:
    """A disjoint box of the target's size costs the less the nearer it is, and the gradient points at the target."""
    loss, target = s.make(), torch.tensor([0.0, 0, 16, 24], device=s.device)
    steps = torch.arange(40, 8, -1, device=s.device).unsqueeze(-1)  # whole pixels, which bfloat16 has up to 256
    for direction, dtype in itertools.product(((2, 0), (0, 3), (2, 3), (-2, 3), (-4, -3), (3, 1)), DTYPES):
        away = torch.tensor(direction * 2, device=s.device)
        pred = (target + steps * away).to(dtype).requires_grad_()
        rows = loss(pred, target.to(dtype).expand_as(pred), **NONE)
        uphill = (torch.autograd.grad(rows.sum(), pred)[0] * away).sum(-1)
        # An exponential saturates, so that float32 may repeat a value far away.
        less = (rows.diff()[-16:] < 0).all() if dtype == torch.float64 else rows[-1] < rows[0]
        require((rows.diff() <= 0).all() and less, "a nearer box must cost less")
        require((uphill >= 0).all() and (uphill[-8:] > 0).all(), "the gradient must point at the target")


@promise("use log_sigmoid, softplus and log_softmax", only=lambda facts: facts.family == "classification")
def extreme_logits(s: Subject) -> None:
    """Logits of any size cost a finite number with a finite gradient."""
    classes = s.input(1)[0].shape[-1]
    signs = 1 - 2.0 * (torch.arange(classes, device=s.device) % 2)
    for size, label in itertools.product((1e4, 60.0, 0.0), range(min(3, classes))):
        pred = s.activated(size * signs).unsqueeze(0).requires_grad_()
        value, slope = both(s.make(), pred, torch.full((1,), label, device=s.device))
        require(value.isfinite() and slope.isfinite().all(), f"logits of {size} must cost a finite number")
