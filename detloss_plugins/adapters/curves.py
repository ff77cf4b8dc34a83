"""What there is to draw of a loss in the course of training, in either framework. This module imports neither."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from detloss_plugins.loss import Loss
from detloss_plugins.losses import JointLoss, ScheduledLoss
from detloss_plugins.precision import longest

FEW = 16  # a buffer of so many numbers is drawn number by number


def state_scalars(loss: Loss) -> dict[str, Tensor]:
    """The state of a loss as scalars by name: a number, each of a few numbers, or the mean and the ends of many.

    >>> from detloss_plugins.losses import WIoULoss
    >>> state_scalars(WIoULoss())
    {'mean': tensor(1.)}
    """
    found, state = {}, loss.state_dict()
    for name, buffer in loss.named_buffers():
        if name not in state:  # it is of the settings, as the weights of classes are
            continue
        values = longest(buffer.detach()).flatten()
        if values.numel() == 1:
            found[name] = buffer.detach().reshape(())
        elif values.numel() <= FEW:
            found.update({f"{name}.{number}": value for number, value in enumerate(values)})
        else:
            found.update({f"{name}.mean": values.mean(), f"{name}.min": values.min(), f"{name}.max": values.max()})
    return found


def part_names(loss: Loss) -> list[str]:
    """The names of the losses that a joint or scheduled loss is made of; none of another loss."""
    parts = loss.losses if isinstance(loss, (JointLoss, ScheduledLoss)) else ()
    return [f"{number}_{type(part).__name__}" for number, part in enumerate(parts)]


@torch.no_grad()
def part_values(loss: Loss, *args: object, **kwargs: object) -> list[Tensor]:
    """What each of these has in the value of a call; 0 if it is not in turn."""
    if not part_names(loss):
        return []
    turn = loss.in_turn() if isinstance(loss, ScheduledLoss) else [(part, 1.0) for part in loss.losses]
    values = {part: loss.loss_weight * share * part(*args, **kwargs) for part, share in turn}
    return [values.get(part, torch.zeros(())) for part in loss.losses]


def gradients(value: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """The gradients of a value for those of the outputs that it depends on, in float32; the graph stays."""
    if not value.requires_grad:
        return []
    found = torch.autograd.grad(value, outputs, retain_graph=True, allow_unused=True)
    return [x.float() for x in found if x is not None]


@contextlib.contextmanager
def still(*losses: torch.nn.Module) -> Iterator[None]:
    """While no state of some losses moves."""
    modes = [(part, part.training) for loss in losses for part in loss.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
