"""What several test modules use."""

import pytest
import torch

from detloss_plugins.precision import COMPILES_FROM, can_compile
from detloss_plugins.testing import sample


def only(says):
    """Run a test that asks for ``loss_cls`` on those losses alone of whose facts ``says`` is true."""

    def mark(function):
        function.only = says
        return function

    return mark


def is_softmax(loss):
    return loss.family == "classification" and not loss.use_sigmoid


def sample_for(loss, device, n=32, dtype=torch.float32, **kwargs):
    """Inputs in a form that the loss takes: class indices for a softmax loss."""
    pred, target = sample(loss, n, dtype=dtype, **kwargs)
    target = target.argmax(-1) if is_softmax(loss) and target.dim() == pred.dim() else target
    return pred.to(device).requires_grad_(), target.to(device)


def gradient(loss, pred, target, **kwargs):
    return torch.autograd.grad(loss(pred, target, **kwargs).sum(), pred)[0]


def plain(loss, pred, target, *args, **kwargs):
    """Value and gradient as ``torch.func`` takes them, which are those of the plain operators."""
    both = torch.func.grad_and_value(lambda x: loss(x, target, *args, **kwargs))(pred.detach())
    return both[1], both[0]


def counted_graphs():
    """How many graphs the compiler has made since its reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


needs_compiler = pytest.mark.skipif(not can_compile(), reason=f"compile=True needs torch {COMPILES_FROM}")
