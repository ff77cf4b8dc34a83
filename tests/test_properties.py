"""What every loss gets for free: tests on all registered losses, driven by the facts their classes state."""

import copy
import inspect
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from detloss_plugins import execution
from detloss_plugins.losses.balancing import long_tail


def family(name):
    """Run the test on the losses of one family only."""

    def mark(function):
        function.family = name
        return function

    return mark


def sample(cls, device, n=32, dtype=torch.float32, **kwargs):
    pred, target = cls.sample(n, dtype=dtype, **kwargs)
    return pred.to(device).requires_grad_(), target.to(device)


def variants(cls):
    """The default loss and one for every hyper-parameter setting that its facts mention."""
    settings = [dict(u.ours) for u in cls.upstream]
    found = [cls.make(**s) for s in [{}, *(s for s in settings if s)] if not s.get("activated")]
    return [loss.eval() for loss in found]  # a loss with state gives the same result twice only when it is frozen


def softmax(loss):
    return loss.family == "classification" and not loss.use_sigmoid


def sample_for(loss, device, n=32, dtype=torch.float32):
    """Inputs in a form that the loss takes: class indices for a softmax loss."""
    pred, target = sample(type(loss), device, n, dtype)
    return pred, target.argmax(-1) if softmax(loss) and target.dim() == pred.dim() else target


def gradient(loss, pred, target, **kwargs):
    value = loss(pred, target, **kwargs)
    return torch.autograd.grad(value.sum(), pred)[0]


def test_facts(loss_cls):
    assert loss_cls.__doc__
    assert loss_cls.fn.__doc__, "the function documents the formula"
    assert ">>>" in loss_cls.fn.__doc__, "with a worked number"
    if loss_cls.paper:
        assert loss_cls.paper.startswith("https://")
    assert set(inspect.signature(loss_cls).parameters) >= {"reduction", "loss_weight"}
    loss = loss_cls.make()
    assert all(hasattr(loss, name) for name in inspect.signature(loss_cls).parameters)


def test_unknown_hyper_parameter_lists_the_accepted(loss_cls):
    with pytest.raises(TypeError, match=r"no hyper-parameter 'nonsense'; it accepts .*loss_weight.*reduction"):
        loss_cls(nonsense=1)


def test_string_where_a_number_belongs(loss_cls):
    with pytest.raises(TypeError, match="loss_weight"):
        loss_cls(loss_weight="2")


def test_a_value_that_is_not_allowed(loss_cls):
    for name in loss_cls.allowed:
        with pytest.raises((ValueError, TypeError), match=name):
            loss_cls.make(**{name: float("nan")})


def test_bounds(loss_cls, device):
    for loss in variants(loss_cls):
        value = loss(*sample_for(loss, device, 500, torch.float64), reduction_override="none")
        low, high = loss_cls.bounds
        assert value.min() >= low - 1e-12
        assert value.max() <= high


def reduced(loss):
    """Call a loss, and give back what it weighs and reduces: the square, for the one that takes the root afterwards."""
    power = 2 if type(loss).__name__ == "RMSELoss" else 1
    return lambda *args, **kwargs: loss(*args, **kwargs) ** power


def test_reductions(loss_cls, device):
    for loss in variants(loss_cls):
        pred, target = sample_for(loss, device)
        value = reduced(loss)
        rows = value(pred, target, reduction_override="none")
        if loss.mean_of_rows:
            torch.testing.assert_close(value(pred, target), rows.mean())
        torch.testing.assert_close(value(pred, target, reduction_override="sum"), rows.sum())
        expected = rows.mean() if loss.self_normalized else rows.sum() / 3
        torch.testing.assert_close(value(pred, target, avg_factor=3.0), expected)
        torch.testing.assert_close(value(pred, target, avg_factor=3.0, reduction_override="none"), rows)
        with pytest.raises(ValueError, match="avg_factor"):
            loss(pred, target, avg_factor=3.0, reduction_override="sum")
        with pytest.raises(ValueError, match="reduction"):
            loss(pred, target, reduction_override="average")


def test_weights(loss_cls, device):
    for loss in variants(loss_cls):
        pred, target = sample_for(loss, device)
        value = reduced(loss)
        weight = torch.arange(len(pred), device=device) % 3
        kept = weight > 0  # a row of weight 0 might as well not be there
        rows = value(pred[kept], target[kept], reduction_override="none")
        if loss.self_normalized:
            weight = kept.long()  # a weight is a mask for a loss with a normaliser of its own
        if loss.counts_positives:
            expected = rows * weight[kept & (target > 0).any(-1)]
        else:
            expected = torch.zeros(len(pred), *rows.shape[1:], device=device)
            expected[kept] = rows * weight[kept].reshape(-1, *[1] * (rows.dim() - 1))
        for form in (weight, weight.unsqueeze(-1)):
            torch.testing.assert_close(value(pred, target, weight=form, reduction_override="none"), expected)
        zero = loss(pred, target, weight=torch.zeros(len(pred), device=device))
        assert zero == 0
        assert (torch.autograd.grad(zero, pred)[0] == 0).all()
        with pytest.raises(ValueError, match="weight of shape"):
            loss(pred, target, weight=torch.ones(len(pred) + 1, device=device))


def test_loss_weight_scales(loss_cls, device):
    loss, twice = loss_cls.make(), loss_cls.make(loss_weight=2.0)
    pred, target = sample_for(loss, device)
    torch.testing.assert_close(2 * loss(pred, target), twice(pred, target))
    torch.testing.assert_close(2 * gradient(loss, pred, target), gradient(twice, pred, target))


def test_incoming_gradient_is_honoured(loss_cls, device):
    loss = loss_cls.make().eval()
    pred, target = sample_for(loss, device)
    (thrice,) = torch.autograd.grad(3 * loss(pred, target), pred)
    torch.testing.assert_close(thrice, 3 * gradient(loss, pred, target))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_input_is_zero_with_a_graph(loss_cls, device, reduction):
    for loss in variants(loss_cls):
        pred, target = (x[:0] for x in sample_for(loss, device))
        for kwargs in ({}, {"weight": torch.ones(0, device=device)}):
            value = loss(pred, target, reduction_override=reduction, **kwargs)
            assert value.sum() == 0
            value.sum().backward()
        if reduction == "mean":
            assert loss(pred, target, avg_factor=0.0) == 0


def test_inputs_are_not_modified(loss_cls, device):
    for loss in variants(loss_cls):
        pred, target = sample_for(loss, device)
        before = pred.detach().clone(), target.clone()
        loss(pred, target).backward()
        assert torch.equal(pred, before[0])
        assert torch.equal(target, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(loss_cls, device, dtype):
    for loss in variants(loss_cls):
        pred, target = sample_for(loss, device)
        pred = pred.detach().to(dtype).requires_grad_()
        target = target.to(dtype) if target.is_floating_point() else target
        wide = pred.detach().float().requires_grad_()
        value, expected = loss(pred, target), loss(wide, target.float() if target.is_floating_point() else target)
        assert value.dtype == torch.float32
        assert value == expected
        (got,) = torch.autograd.grad(value, pred)
        (want,) = torch.autograd.grad(expected, wide)
        assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(loss_cls, device, dtype):
    for loss in variants(loss_cls):
        pred, target = sample_for(loss, device)
        expected = loss(pred, target)
        with torch.autocast(torch.device(device).type, dtype=dtype):
            assert loss(pred, target) == expected


def test_autocast_is_off_inside(loss_cls, device, monkeypatch):
    """Some operators refuse to run under CUDA's autocast, and a matrix product would lose its precision."""
    inside, function, kind = [], loss_cls.fn, torch.device(device).type

    def spy(*args, **hyper):
        inside.append(torch.is_autocast_enabled(kind))
        return function(*args, **hyper)

    monkeypatch.setattr(loss_cls, "fn", staticmethod(spy))
    loss = loss_cls.make()
    with torch.autocast(kind, dtype=torch.bfloat16):
        loss(*sample_for(loss, device))
    composed = "losses" in loss_cls.inputs  # its parts switch autocast off
    assert inside == ([] if composed else [False])


def test_nan_is_not_hidden(loss_cls, device):
    loss = loss_cls.make().eval()
    pred, target = sample_for(loss, device)
    pred = pred.detach().clone()
    pred[0] = float("nan")
    assert loss(pred, target).isnan()
    clean = sample_for(loss, device)
    assert loss(*clean).isfinite(), "and does not poison the next call"


def test_copies_agree(loss_cls, device):
    loss = loss_cls.make(loss_weight=0.7).eval()
    pred, target = sample_for(loss, device)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(pred, target), loss(pred, target))
        assert repr(twin) == repr(loss)
    assert "loss_weight=0.7" in repr(loss)


def test_one_graph(loss_cls, device):
    """No graph break: the loss can be compiled whole. The back end does not matter for that.

    One whose shapes depend on the number of positives is compiled in pieces.
    """
    torch._dynamo.reset()
    for loss in variants(loss_cls)[:2]:
        pred, target = sample_for(loss, device)
        compiled = torch.compile(loss, fullgraph=not loss.counts_positives, backend="eager")
        torch.testing.assert_close(compiled(pred, target), loss(pred, target))


class NoSynchronisation(TorchDispatchMode):
    """Fail on the operators that make the host wait for the device; it may wait to count positives."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self, counts_positives=False):
        super().__init__()
        self.forbidden = {*self.FORBIDDEN} - ({"masked_select", "nonzero"} if counts_positives else set())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in self.forbidden, f"{name} synchronises with the device"
        return function(*args, **(kwargs or {}))


def test_no_synchronisation(loss_cls, device, monkeypatch):
    for module in (execution, long_tail):  # on a CPU too, a loss is to do as on a GPU
        monkeypatch.setattr(module, "waits", lambda device: True)
    for loss in variants(loss_cls):
        pred, target = sample_for(loss, device)
        weight = torch.rand(len(pred), device=device)
        for part in loss.modules():
            part.unchecked = 0  # box losses look at the targets of the first calls
        with NoSynchronisation(loss.counts_positives):
            loss(pred, target, weight=weight, avg_factor=torch.tensor(3.0, device=device)).backward()


def test_the_synchronisation_test_can_fail():
    with pytest.raises(AssertionError, match="synchronises"), NoSynchronisation():
        torch.rand(3).sum().item()


def test_gradient_is_the_derivative(loss_cls, device):
    if not loss_cls.true_gradient:
        return  # a factor is constant by definition; parity and worked gradients pin these
    for loss in variants(loss_cls):
        pred, target = sample_for(loss, device, 6, torch.float64)
        assert torch.autograd.gradcheck(lambda p, loss=loss, t=target: loss(p, t, reduction_override="none"), pred)


def test_a_detached_factor_is_declared(loss_cls, device):
    """The other half of the fact: what claims no true gradient indeed has none."""
    if loss_cls.true_gradient:
        return
    loss = loss_cls.make().eval()
    pred, target = sample_for(loss, device, 6, torch.float64)
    call = lambda p: loss(p, target, reduction_override="none")  # noqa: E731
    assert not torch.autograd.gradcheck(call, pred, raise_exception=False)


EXTREME_BOXES = {
    "identical": ([10.0, 10, 20, 20], [10.0, 10, 20, 20]),
    "disjoint": ([0.0, 0, 10, 10], [500.0, 500, 600, 600]),
    "nested": ([12.0, 12, 15, 15], [10.0, 10, 20, 20]),
    "touching": ([0.0, 0, 10, 10], [10.0, 0, 20, 10]),
    "zero-size": ([5.0, 5, 5, 5], [3.0, 3, 9, 9]),
    "both the same point": ([5.0, 5, 5, 5], [5.0, 5, 5, 5]),
    "no height": ([5.0, 5, 9, 5], [3.0, 3, 9, 9]),
    "no height, both": ([5.0, 5, 9, 5], [5.0, 5, 9, 5]),
    "thin": ([5.0, 5, 6, 900], [5.0, 5, 900, 6]),
    "inverted": ([20.0, 20, 10, 10], [10.0, 10, 20, 20]),
    "normalised": ([1e-3, 1e-3, 2e-3, 2e-3], [1e-3, 1e-3, 2e-3, 2.1e-3]),
    "huge": ([0.0, 0, 1e5, 1e5], [1e3, 0, 1e5, 9e4]),
}


@pytest.mark.parametrize("case", EXTREME_BOXES)
@family("box")
def test_extreme_boxes(loss_cls, device, case):
    for loss in variants(loss_cls):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            pred, target = (torch.tensor([b], device=device).clamp(max=6e4).to(dtype) for b in EXTREME_BOXES[case])
            pred.requires_grad_()
            value = loss(pred, target)
            assert value.isfinite()
            assert torch.autograd.grad(value, pred)[0].isfinite().all()


@family("box")
def test_identical_boxes_are_the_minimum(loss_cls, device):
    for loss in variants(loss_cls):
        for scale in (1e-3, 1.0, 1e4) if loss_cls.scale_invariant else (1.0, 1e4):
            _, target = sample(loss_cls, device)
            target = target * scale
            value = loss(target.clone(), target, reduction_override="none")
            torch.testing.assert_close(value, torch.full_like(value, loss_cls.minimum), atol=1e-5, rtol=0)
            for dtype in (torch.float64, torch.float16, torch.bfloat16):
                same = target.to(dtype)
                same = same[same.isfinite().all(-1)]
                value = loss(same.clone(), same, reduction_override="none")
                torch.testing.assert_close(value, torch.full_like(value, loss_cls.minimum), atol=1e-5, rtol=0)
        pred, target = sample(loss_cls, device, 500)
        assert loss(pred, target, reduction_override="none").min() >= loss_cls.minimum - 1e-6


@family("box")
def test_box_invariances(loss_cls, device):
    for loss in variants(loss_cls):
        pred, target = sample(loss_cls, device, 200)
        rows = loss(pred, target, reduction_override="none")
        torch.testing.assert_close(loss(pred + 64, target + 64, reduction_override="none"), rows, atol=1e-4, rtol=0)
        turned = loss(*(b[:, [1, 0, 3, 2]] for b in (pred, target)), reduction_override="none")
        torch.testing.assert_close(turned[:, [1, 0, 3, 2]] if loss_cls.values_per_box == 4 else turned, rows)
        if loss_cls.symmetric:
            torch.testing.assert_close(loss(target, pred, reduction_override="none"), rows)
        if loss_cls.scale_invariant:
            for scale in (1e-3, 1 / 32, 1e3):
                scaled = loss(pred * scale, target * scale, reduction_override="none")
                torch.testing.assert_close(scaled, rows, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@family("box")
def test_disjoint_boxes_are_attracted(loss_cls, device, dtype):
    """The nearer a box of the target's size, the smaller the loss; and the gradient points at the target."""
    if not loss_cls.attracts:
        return
    target = torch.tensor([0.0, 0, 16, 24], device=device)
    steps = torch.arange(40, 8, -1, device=device).unsqueeze(-1)  # whole pixels, which bfloat16 has up to 256
    for loss in variants(loss_cls):
        for direction in ([2, 0], [0, 3], [2, 3], [-2, 3], [-4, -3], [3, 1]):
            away = torch.tensor(direction * 2, device=device)
            pred = (target + steps * away).to(dtype).requires_grad_()
            rows = loss(pred, target.to(dtype).expand(len(pred), 4), reduction_override="none")
            assert (rows.diff() <= 0).all()
            # An exponential saturates, so that float32 may repeat a value far away.
            assert (rows.diff()[-16:] < 0).all() if dtype == torch.float64 else rows[-1] < rows[0]
            (gradient,) = torch.autograd.grad(rows.sum(), pred)
            uphill = (gradient * away).sum(-1)
            assert (uphill >= 0).all()
            assert (uphill[-8:] > 0).all()


@family("box")
def test_wrong_shapes(loss_cls, device):
    with pytest.raises(ValueError, match=r"\(2, 4\) and target \(3, 4\)"):
        loss_cls.make()(torch.rand(2, 4), torch.rand(3, 4))
    with pytest.raises(ValueError, match="4 coordinates"):
        loss_cls.make()(torch.rand(2, 5), torch.rand(2, 5))


@family("classification")
def test_extreme_logits(loss_cls, device):
    for loss in variants(loss_cls):
        for size in (1e4, 60.0, 0.0):
            for label in range(3):
                pred = torch.tensor([[size, -size] * 5], device=device, requires_grad=True)
                target = torch.tensor([label], device=device)
                value = loss(pred, target)
                assert value.isfinite()
                assert torch.autograd.grad(value, pred)[0].isfinite().all()
