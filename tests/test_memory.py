"""What a loss takes and leaves behind, and that working in chunks changes nothing where numbers are extreme."""

import functools
import gc

import pytest
import torch
from support import only, plain, sample_for
from timing import peak_memory

from detloss_plugins import engine, precision
from detloss_plugins.losses import (
    GHMC,
    AdaptiveThresholdFocalLoss,
    BinaryCrossEntropyLoss,
    CrossEntropyLoss,
    EQLV2Loss,
    FocalLoss,
    JointLoss,
    QualityFocalLoss,
    SeesawLoss,
    VarifocalLoss,
)
from detloss_plugins.registry import registered_losses
from detloss_plugins.testing import sample
from detloss_plugins.testing.check import EXTREME_BOXES, small_chunks

CPU = torch.device("cpu")
YOLO = 8 * 8400
DENSE = [BinaryCrossEntropyLoss, FocalLoss, QualityFocalLoss, VarifocalLoss, GHMC, JointLoss.make]
DENSE += [functools.partial(EQLV2Loss, num_classes=80)]
# Rows, type, and how often the logits fit into what a call takes with gradients and without. Of half precision the
# logits are half as long, but not what a chunk works with, which weighs more with fewer rows. float16 lacks the range
# for a small gradient before it is scaled, which therefore waits in float32.
MEMORY = [
    (34_000, torch.float32, 3, 2),
    (34_000, torch.bfloat16, 4, 3),
    (YOLO, torch.float32, 3, 2),
    (YOLO, torch.bfloat16, 3, 2),
    (YOLO, torch.float16, 4, 2),
]


@functools.cache
def sampled(rows):
    return sample(FocalLoss, rows, classes=80)


@pytest.fixture(scope="module")
def undisturbed():
    """Nobody collects garbage, which would hide what a call takes or leaves, and no thread waits for another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    gc.freeze()  # what there is already is not looked at
    yield
    gc.unfreeze()
    gc.enable()
    torch.set_num_threads(threads)


def peaks(loss, pred, target):
    """The bytes that a call takes with a backward and in validation, in lengths of ``pred``."""
    training = peak_memory(lambda: loss(pred, target).backward(), CPU)
    assert training >= pred.nbytes, "the gradient alone takes that"
    with torch.no_grad():
        validating = peak_memory(lambda: loss(pred, target), CPU)
    return training / pred.nbytes, validating / pred.nbytes


def check_memory(loss, cases, share=1):
    """A few times the logits, where autograd's intermediates are ten or twenty times as long."""
    for rows, dtype, times, without in cases:
        pred, target = sampled(rows // share)
        training, validating = peaks(loss, pred.detach().to(dtype).requires_grad_(), target)
        assert training <= times, (rows, dtype)
        assert 0 < validating <= without, (rows, dtype)


@pytest.mark.parametrize("kind", DENSE)
def test_memory_of_dense_logits(kind, undisturbed, monkeypatch):
    """A tenth of the rows in chunks a tenth as large comes to the same, and takes a tenth of the time."""
    monkeypatch.setitem(precision.CHUNK, "cpu", precision.CHUNK["cpu"] // 10)
    check_memory(kind(), MEMORY, share=10)


def test_memory_of_yolos_logits(undisturbed):
    check_memory(FocalLoss(), [case for case in MEMORY if case[0] == YOLO])


def test_memory_of_a_loss_whose_mean_has_a_gradient(undisturbed, monkeypatch):
    """Which is as long as that of the losses, and added to it; of half precision, both are in float32.

    Without gradients it takes a chunk's operators, of which BCE has three more in torch 2.1.
    """
    monkeypatch.setitem(precision.CHUNK, "cpu", precision.CHUNK["cpu"] // 10)
    cases = [(34_000, torch.float32, 5, 2), (YOLO, torch.float32, 4, 1), (YOLO, torch.bfloat16, 9, 4)]
    check_memory(AdaptiveThresholdFocalLoss(), cases, share=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_loss_of_the_positives(dtype, undisturbed):
    """Nothing is made of the rows that take no part."""
    pred, target = sample(SeesawLoss, YOLO, classes=78)
    target = target.where(torch.rand(len(target)) < 0.02, 78)
    loss = SeesawLoss(num_classes=78, return_dict=False)
    assert peaks(loss, pred.to(dtype).requires_grad_(), target)[0] < 2.2


def left_behind(call):
    """How many tensors there are after each of three calls."""

    def counted():
        call()
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    return [counted() for _ in range(3)]


def test_nothing_is_left_behind(device, undisturbed):
    """A function that notes down its own output holds on to its memory until the garbage collector comes by."""
    with small_chunks(device):
        for cls in registered_losses().values():
            loss = cls.make().to(device)
            pred, target = sample_for(loss, device, 40)

            def call(loss=loss, pred=pred, target=target):
                loss(1 * pred, target).backward()
                pred.grad = None

            counts = left_behind(call)
            assert counts[1] == counts[2], cls.__name__


def test_what_is_left_behind_is_seen(undisturbed):
    def call():
        cycle = [torch.ones(1)]
        cycle.append(cycle)

    counts = left_behind(call)
    assert counts[0] < counts[1] < counts[2]


def agree(loss, pred, target, **kwargs):
    """Assert that value and gradient in chunks are those of the plain operators."""
    value, slope = plain(loss, pred, target, **kwargs)
    with small_chunks(pred.device):
        found = loss(pred, target, **kwargs)
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-7)
        bound = 1e-5 * slope.abs().max().item() + 1e-12
        torch.testing.assert_close(torch.autograd.grad(found, pred)[0], slope, rtol=1e-5, atol=bound)


@only(lambda facts: facts.family == "box")
def test_boxes_in_chunks(loss_cls, device):
    """Extreme ones, and any corners: inverted along an axis or both, the prediction as well as the target."""
    loss = loss_cls.make().eval().to(device)
    loss.unchecked = 0
    extreme = torch.tensor([*EXTREME_BOXES.values()], dtype=torch.float64, device=device).unbind(1)
    anyhow = 100 * torch.rand(2, 200, 4, dtype=torch.float64, device=device)
    for pred, target in (extreme, anyhow):
        assert pred.numel() > 40
        agree(loss, pred.clone().requires_grad_(), target)


SETTINGS = [{"ignore_index": 2}, {"class_weight": [1.0, 2.0, 0.5, 3.0]}, {"use_sigmoid": True}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sure_and_wrong_rows_in_chunks(settings, device):
    """Whose probability is no float32, with background and ignored labels."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(-1, 4, (90,), generator=generator).to(device)
    logits = torch.randn(90, 4, generator=generator).to(device)
    for scale in (1.0, 300.0):
        agree(CrossEntropyLoss(**settings), (scale * logits).requires_grad_(), label)
    focal = FocalLoss(use_sigmoid=False, alpha=[0.1, 0.2, 0.3, 0.4])
    agree(focal, (300 * logits).requires_grad_(), label)


@pytest.mark.parametrize("kind", [BinaryCrossEntropyLoss, FocalLoss, QualityFocalLoss, VarifocalLoss])
def test_several_images_in_chunks(kind, device):
    """Leading dimensions, labels with a background and an ignored one, and weights of every shape."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.rand(shape, generator=generator).to(device)  # noqa: E731
    pred = (4 * random(3, 11, 6) - 2).requires_grad_()
    label = torch.randint(-1, 7, (3, 11), generator=generator).to(device)
    for target in (label, (label, random(3, 11)), random(3, 11, 6)):
        for shape in ((3, 11), (3, 11, 1), (3, 11, 6)):
            agree(kind(), pred, target, weight=random(*shape), avg_factor=5.0)


def test_chunks_are_small(device):
    """What the tests above stand on."""
    with small_chunks(device):
        call = engine.Call(torch.mul, (torch.ones(12, 8, device=device),), row_wise=True)
        assert len(list(call.chunks())) > 1


def test_losses_of_each_row_with_a_gradient_are_not_taken_in_chunks(device):
    """The backward of each chunk would make a tensor as long as the batch."""
    pred, target = sample_for(FocalLoss(), device, 300)
    with small_chunks(device):
        rows = FocalLoss()(pred, target, reduction_override="none")
        assert rows.grad_fn.name() != "CatBackward0"
        torch.testing.assert_close(rows, FocalLoss()(pred.detach(), target, reduction_override="none"))
