"""The losses of a training in words, for its log and the command."""

from collections.abc import Mapping
from typing import Any

import torch

from detloss_plugins.adapters.ultralytics.building import slot_gains
from detloss_plugins.adapters.ultralytics.config import default_weight, default_weights, waiting, with_weights
from detloss_plugins.loss import AUTO, Loss
from detloss_plugins.losses import JointLoss, ScheduledLoss
from detloss_plugins.registry import build_loss

# Settings that are not in a loss's description: said beside it, or the same in every slot; and if nobody has set them.
SAID_OTHERWISE = {"loss_weight", "compile", "reduction", "use_sigmoid", "class_counts"}
UNSAID = {"bins": None, "class_weight": None, "effective_beta": 0.999, "label_smoothing": 0.0, "num_classes": 1203}


def describe(losses: Mapping[str, Any], args: Any, task: str = "detect") -> list[str]:
    """One line per slot: the active loss, its settings, its weight and the training's gain for the slot.

    A weight below a quarter of the slot's default for the loss, or above four times, has the default beside it: with
    such a one of the user's own it may hardly learn, or drown the others, and nothing else would say so.
    """
    lines, asked = [], waiting(losses)
    losses = with_weights(losses, default_weights(losses))
    for slot, gain in slot_gains(args, task).items():
        line = "stock loss"
        if slot in losses:
            loss = build_loss(losses[slot])
            weight = AUTO if (slot,) in asked else _weight(loss, slot)
            line = f"{_in_words(loss, slot)}{', compiled' * runs_compiled(loss)}, weight {weight}"
        lines.append(f"{slot}: {line} x gain {gain:g}")
    if "ignore" in losses:
        classes = ", ".join(map(repr, losses["ignore"]["classes"]))
        lines.append(f"ignore: boxes of {classes}, and what is detected in them")
    return lines


def runs_compiled(loss):
    """Whether a loss is compiled, or one of those that it calls: some cannot be."""
    if isinstance(loss, ScheduledLoss) or (isinstance(loss, JointLoss) and not loss.facts.row_wise):
        return any(map(runs_compiled, loss.losses))
    return loss.compiled and loss.facts.row_wise and loss.compiles(torch.device("cpu"))


def _weight(loss, slot):
    """The weight of a loss in words; one that is far from the slot's default with that."""
    default = default_weight(loss, slot)
    far = not default / 4 <= loss.loss_weight <= 4 * default
    return f"{loss.loss_weight:g}{f' (default {default:g})' * far}"


def _in_words(loss, slot):
    """A loss with all its settings, and with those and the weights of the losses it is made of."""
    own = [name for name in loss.rules if name not in SAID_OTHERWISE and hasattr(loss, name)]
    values = {name: getattr(loss, name) for name in own if UNSAID.get(name, own) != getattr(loss, name)}
    words = [f"{name}={value!r}" for name, value in values.items() if not isinstance(value, torch.nn.Module)]
    for part in _parts(loss):  # those of a ScheduledLoss have the default of the slot, any other 1
        weight = _weight(part, slot) if isinstance(loss, ScheduledLoss) else f"{part.loss_weight:g}"
        words.append(_in_words(part, slot) + (f" x {weight}" if weight != "1" else ""))
    return f"{type(loss).__name__}({', '.join(words)})"


def _parts(module):
    """The losses that a loss is made of, without those that these are made of."""
    for child in module.children():
        yield from [child] if isinstance(child, Loss) else _parts(child)
