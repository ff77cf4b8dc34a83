"""Curves of the losses of an Ultralytics training, for its loggers and ``losses.csv``."""

import csv

import torch

from detloss_plugins.adapters.curves import gradients, part_names, part_values, state_scalars
from detloss_plugins.adapters.ultralytics import compat
from detloss_plugins.adapters.ultralytics.criterion import branches
from detloss_plugins.adapters.ultralytics.per_image import SLOTS, Observer
from detloss_plugins.nested import each_tensor, flatten

EVERY = 50  # steps between two looks


class Curves:
    """Looks at a criterion in every so many steps, by a second call that changes nothing, and keeps what it sees.

    Args:
        every: number of steps from one look to the next.
        weight: a function without arguments, what the criterion's loss is multiplied by at the moment.
    """

    def __init__(self, every, weight=lambda: 1.0):
        self.every, self.weight, self.steps, self.seen = every, weight, 0, []

    def look(self, criterion, preds, batch):
        """To be called in every step of training."""
        self.steps += 1
        if self.steps % self.every == 1 % self.every:
            observer, preds = Slots(criterion), as_leaves(preds)
            with observer.still():
                observer.criterion.loss(preds, batch)
                outputs = [x for x in flatten(preds)[0] if x.requires_grad]
                self.seen.append(observer.scalars(outputs, self.weight()))

    def means(self):
        """The means of what was seen since the last time, as numbers by name."""
        seen, self.seen, self.steps = self.seen, [], 0
        values = [torch.stack([value.detach().float() for value in of_look.values()]) for of_look in seen]
        return dict(zip(seen[0], torch.stack(values).mean(0).tolist(), strict=True)) if seen else {}


def as_leaves(value):
    """The tensors of nested dicts, lists and tuples as leaves of a graph of their own; all else as it is."""
    return each_tensor(lambda x: x.detach().requires_grad_(x.is_floating_point()), value)


class Slots(Observer):
    """What the slots cost, with the graph, and what their losses are called with.

    Attributes:
        values: slot -> what it costs, without its gain.
        called: slot -> what the class loss or the box criterion is called with.
        inputs: slot -> the arguments of its loss, if that is one of ours.
    """

    def __init__(self, stock):
        super().__init__(stock)
        self.values, self.called, self.inputs = {}, {}, {}

    def class_loss(self, pred, target):
        found, weights = super().class_loss(pred, target), compat.class_weights(self.stock)
        self.values["cls"] = (found if weights is None else found * weights).sum() / self.normalizer
        self.called["cls"] = self.inputs["cls"] = pred, target
        return found

    def box_loss(self, *inputs):
        self.called["box"] = self.called["dfl"] = inputs
        own = [(slot, self.stock.built[slot]) for slot in ("box", "dfl") if slot in self.stock.built]
        hooks = [
            loss.register_forward_pre_hook(lambda _, args, slot=slot: self.inputs.update({slot: args}))
            for slot, loss in own
        ]
        try:
            self.values["box"], self.values["dfl"] = found = super().box_loss(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def scalars(self, outputs, weight):
        """By name; ``outputs`` are those of the head, ``weight`` is what the whole loss is multiplied by."""
        found = {"positives": self.positive.sum()}
        for slot in SLOTS:
            value = getattr(self.stock.hyp, slot) * self.values.get(slot, torch.zeros_like(self.normalizer))
            found[f"{slot}/gradient"] = gradient_norm(weight * len(self.positive) * value, outputs)
            if slot in self.stock.built:
                found.update({f"{slot}/{name}": part for name, part in self.parts(slot, value.detach())})
        return found

    def parts(self, slot, value):
        """The parts of what a slot costs, by the shares of those of its loss."""
        loss, inputs = self.stock.built[slot], self.inputs.get(slot)
        names = part_names(loss)
        if inputs is None:  # without positives
            return [(name, 0 * value) for name in names]
        if slot == "cls":
            parts = self.stock.bce.parts(*inputs)
        else:
            parts = part_values(loss, *inputs, reduction_override="sum")
        return [(name, (value * part / sum(parts)).nan_to_num()) for name, part in zip(names, parts, strict=True)]


def scalars(criterion):
    """What the curves of a criterion have seen, and the state of its losses, as numbers by name."""
    found, parts = {}, branches(criterion)
    for name, branch in parts.items():
        start = f"losses/{name}/" if len(parts) > 1 else "losses/"
        found.update({start + name: value for name, value in branch.curves.means().items()})
        for slot, loss in branch.built.items():
            found.update({f"{start}{slot}/{name}": value.item() for name, value in state_scalars(loss).items()})
    return found


def append(file, epoch, values):
    """Add a row to a CSV file; a column that is new is empty in the rows before it, one that is gone in this one."""
    rows = []
    if file.exists():
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    rows.append({"epoch": epoch, **{name: f"{value:.6g}" for name, value in values.items()}})
    beside = file.with_suffix(".unfinished")  # as a run may be killed
    with beside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(file)


def gradient_norm(value, outputs):
    """The norm of the gradient of a value for all outputs together."""
    squares = [x.square().sum() for x in gradients(value, outputs)]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros_like(value)
