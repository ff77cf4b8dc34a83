"""Compiled losses where it is easy to go wrong: what changes, what is freed, in models, and with the real compiler."""

import gc
import weakref

import pytest
import torch
from support import counted_graphs, gradient, needs_compiler, sample_for
from timing import kernels_and_waits
from torch import nn

from detloss_plugins import build_loss, engine
from detloss_plugins.losses import (
    CIoULoss,
    CrossEntropyLoss,
    FocalLoss,
    JointLoss,
    MPDIoULoss,
    MultiBoxLoss,
    QualityFocalLoss,
    WIoULoss,
)
from detloss_plugins.precision import outside_graph
from detloss_plugins.testing import sample

pytestmark = needs_compiler


def test_a_setting_that_changes_in_place(device, traced):
    pred, target = torch.randn(8, 3, device=device), torch.arange(8, device=device) % 3
    loss = CrossEntropyLoss(compile=True, class_weight=[1.0, 2.0, 3.0])
    loss(pred, target)
    loss.class_weight[0] = 9.0
    torch.testing.assert_close(loss(pred, target), CrossEntropyLoss(class_weight=[9.0, 2.0, 3.0])(pred, target))
    assert counted_graphs() == 2


def test_a_setting_of_a_part(device, traced):
    pred, target = sample_for(JointLoss.make(), device)
    joint, eager = JointLoss.make(compile=True), JointLoss.make()
    for gamma in (2.0, 1.0):
        joint.losses[1].gamma = eager.losses[1].gamma = gamma
        torch.testing.assert_close(joint(pred, target), eager(pred, target))
    assert counted_graphs() == 2


def test_a_loss_that_is_told_that_nothing_is_ignored(device, traced):
    """Its kernel is not that of an equal loss which has to look, as in another training of the process."""
    pred, target = torch.randn(8, 3, device=device), torch.rand(8, 3, device=device).round()
    told, looks = FocalLoss(compile=True), FocalLoss(compile=True)
    told.may_ignore = False
    told(pred, target)
    target[:4] = -1
    torch.testing.assert_close(looks(pred, target), FocalLoss()(pred, target))


def test_what_is_outside_the_graph_is_run_and_compiles_nothing_again(device, traced):
    seen = []

    @outside_graph
    def positives(x):
        seen.append(len(x[x > 0]))
        return x[x > 0]

    compiled, x = torch.compile(lambda x: positives(2 * x).sum() + 1), torch.tensor([1.0, -1.0, 3.0], device=device)
    for call in range(5):
        assert compiled(x).item() == 9
        if call == 1:
            frames = torch._dynamo.utils.counters["frames"]["total"]
    assert torch._dynamo.utils.counters["frames"]["total"] == frames > 0
    assert seen == [2] * 5


def test_what_a_batch_tells_is_no_setting(device, traced):
    """The size of the images changes from batch to batch, and nothing is compiled again."""
    pred, target = sample_for(CIoULoss(), device)
    loss, eager = MPDIoULoss(image_size="batch", compile=True), MPDIoULoss(image_size="batch")
    for side in (600.0, 900.0, 300.0):
        for x in (loss, eager):
            x.batch_image_size = torch.full((2,), side, device=device)
        torch.testing.assert_close(gradient(loss, pred, target), gradient(eager, pred, target))
    assert counted_graphs() == 1


STATEFUL = [
    {"type": "WIoULoss"},
    {"type": "SlideLoss"},
    {"type": "SlideLoss", "decay": 0.9},
    {"type": "GHMC", "momentum": 0.5},
    {"type": "EqualizedFocalLoss"},
    {"type": "EqualizedQualityFocalLoss"},
]


@pytest.mark.parametrize("cfg", STATEFUL, ids=str)
def test_state_moves_as_uncompiled(cfg, device, traced):
    loss, eager = build_loss({**cfg, "compile": True}).to(device), build_loss(cfg).to(device)
    start = [x.clone() for x in eager.buffers()]
    for seed in range(3):
        pred, target = sample(loss, 20, seed=seed)
        for x in (loss, eager):
            x(pred.to(device).requires_grad_(), target.to(device)).backward()
    assert counted_graphs() == 1
    torch.testing.assert_close(list(loss.buffers()), list(eager.buffers()))
    assert not all(torch.equal(a, b) for a, b in zip(loss.buffers(), start, strict=True))


def test_a_pair_of_logits_and_boxes(device, traced):
    """MultiBoxLoss takes a pair too, and compiles its parts."""
    pred, target = (x.to(device) for x in sample(MultiBoxLoss, 4))
    pairs = (pred[..., :-4], pred[..., -4:]), (target[..., 0].long(), target[..., 1:])
    torch.testing.assert_close(MultiBoxLoss(compile=True)(*pairs), MultiBoxLoss()(pred, target))
    assert counted_graphs() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype, device, traced):
    """With each form of target, and under autocast."""
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(90, 4, generator=generator).to(device, dtype).requires_grad_()
    label = (torch.arange(90) % 5).to(device)
    quality, dense = (torch.rand(shape, generator=generator).to(device) for shape in ((90,), (90, 4)))
    for target in (label, (label, quality), dense):
        compiled, eager = QualityFocalLoss(compile=True), QualityFocalLoss()
        for kwargs in ({}, {"avg_factor": 7.0}, {"reduction_override": "sum"}):
            expected, slope = eager(pred, target, **kwargs), gradient(eager, pred, target, **kwargs)
            torch.testing.assert_close(compiled(pred, target, **kwargs), expected)
            torch.testing.assert_close(gradient(compiled, pred, target, **kwargs), slope)
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                found = compiled(pred, target, **kwargs)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [CIoULoss, WIoULoss, MPDIoULoss.make])
def test_a_compiled_loss_is_freed(kind, device, traced):
    """Its kernel stays, for the next that is equal."""
    loss = kind(compile=True).to(device)
    gradient(loss, *sample_for(loss, device))
    assert engine._kernels
    gone = weakref.ref(loss)
    del loss
    gc.collect()
    assert gone() is None


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


def test_in_a_compiled_model(traced):
    x, target = torch.rand(20, 4), torch.rand(20, 6)
    whole = torch.compile(Model(compile=True), fullgraph=True)
    torch.testing.assert_close(slopes(whole, x, target), slopes(Model(compile=False), x, target))
    assert counted_graphs() == 1


def test_in_a_distributed_model(traced, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        x, target = torch.rand(20, 4), torch.rand(20, 6)
        model = nn.parallel.DistributedDataParallel(Model(compile=True))
        torch.testing.assert_close(slopes(model, x, target), slopes(Model(compile=False), x, target))
        assert counted_graphs() == 1
    finally:
        torch.distributed.destroy_process_group()


def test_a_scale_costs_no_operator(device, traced):
    """Forward and backward: the kernel multiplies by the weight of the loss and what is averaged over."""

    def operators(loss, **how):
        pred, target = (x.to(device) for x in sample(loss, 8))

        def run():
            loss(pred.detach().requires_grad_(), target, **how).backward()

        run()
        return kernels_and_waits(run, torch.device(device))[0]

    scaled = operators(CIoULoss(compile=True, loss_weight=2.0), avg_factor=3.0)
    assert scaled == operators(CIoULoss(compile=True), reduction_override="sum")


@pytest.mark.parametrize("name", ["FocalLoss", "CIoULoss", pytest.param("KLDLoss", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("error:.*runs uncompiled")
def test_really_compiled(name, device):
    """The kernels too: over millions of numbers, and as exact as uncompiled."""
    loss, eager = build_loss({"type": name, "compile": True}), build_loss({"type": name})
    for n in (300_000, 1000):
        pred, target = (x.to(device) for x in sample(loss, n))
        pred.requires_grad_()
        value = eager(pred.double(), target.double())
        torch.testing.assert_close(loss(pred, target).double(), value, rtol=1e-6, atol=0)
        found, expected = gradient(loss, pred, target), gradient(eager, pred, target)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
