"""The loss of each image and of each object in it, to find hard images and bad labels."""

import contextlib
import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detloss_plugins.adapters.curves import still
from detloss_plugins.adapters.ultralytics import compat

SLOTS = ("box", "cls", "dfl")
WEIGHTS = {"one2many": "o2m", "one2one": "o2o"}  # branch -> the attribute of its weight
TARGET_SCORES = 4  # the place among the inputs of a box criterion


class LossesByImage(NamedTuple):
    """What :func:`per_image` gives: of each slot (``box``, ``cls``, ``dfl``), and under "loss" of all together.

    A loss over the weight beside it says how bad the worst is, be there many anchors or few.
    """

    images: dict[str, Tensor]  # (B,)
    objects: dict[str, Tensor]  # (M,), in the order of the batch's labels
    weight: Tensor  # (M,), the share of each object in the target scores of the batch


@torch.inference_mode(False)  # in which Ultralytics validates, and nothing has a derivative
def per_image(criterion: Any, preds: Any, batch: Mapping[str, Any]) -> LossesByImage:
    """The losses of a batch, image by image and object by object; no state moves, and nothing has a gradient.

    They have the gains and are over the sum of the target scores of the whole batch, so that those of all images add
    up to the batch's items, whatever the losses, stock or ours. (Ultralytics multiplies what it trains with by the
    number of images.) A ranking loss has a part for each positive. An object has the box, distribution and class
    losses of the anchors that are assigned to it; an image has besides those of its background. The masks, keypoints
    and angles of other tasks are left out.

    Args:
        criterion: of a YOLO head, stock or ours; of an end-to-end head, the two branches are added with their weights.
        preds: what ``model(batch["img"])`` gives, in training or evaluation mode.
        batch: as the trainer has it.

    Raises:
        ValueError: for a loss that does not weigh its anchors (GHMR), and so has no part for each.
    """
    observers = {name: _ByAnchor(branch, batch) for name, branch in branches(criterion).items()}
    copies = {name: observer.criterion for name, observer in observers.items()}
    twin = copies.get("criterion")
    if twin is None:  # of an end-to-end head
        twin = copy.copy(criterion)
        vars(twin).update(copies)
    with torch.no_grad(), contextlib.ExitStack() as still:
        for observer in observers.values():
            still.enter_context(observer.still())
        twin(preds, batch)
    images, objects = zip(*(observer.losses() for observer in observers.values()), strict=True)
    weights = [branch_weight(criterion, name) for name in observers]
    objects = _added(objects, weights)
    return LossesByImage(_added(images, weights), objects, objects.pop("weight"))


def branches(criterion):
    """The criteria of a head, by name: an end-to-end head has two, each with losses and state of its own."""
    if isinstance(criterion, compat.E2ELoss):
        return {name: getattr(criterion, name) for name in WEIGHTS}
    return {"criterion": criterion}


def branch_weight(criterion, name):
    """What the loss of a branch of a criterion is multiplied by now: of an end-to-end head by a schedule, else by 1."""
    return getattr(criterion, WEIGHTS[name], 1.0) if name in WEIGHTS else 1.0


def _added(losses, weights):
    """The weighted sums of some dicts, with the sum of the slots."""
    total = {name: sum(w * x[name] for w, x in zip(weights, losses, strict=True)) for name in losses[0]}
    return {"loss": sum(total[slot] for slot in SLOTS), **total}


class Observer:
    """A copy of a criterion, ``criterion``, that tells what its assigner, class loss and box criterion are called with.

    Attributes:
        scores: the target scores of the anchors, ``(B, A)``.
        normalizer: their sum, by which the criterion divides.
        positive: which anchors are, ``(B, A)``.
        index: of the object of each, ``(B, A)``.
    """

    def __init__(self, stock):
        self.stock, self.criterion = stock, copy.copy(stock)
        self.criterion.observed = True
        self.criterion.assigner, self.criterion.bce = self.assign, self.class_loss
        self.criterion.bbox_loss = _BoxObserver(stock.bbox_loss, self.box_loss)

    def assign(self, *args, **kwargs):
        found = self.stock.assigner(*args, **kwargs)
        _, _, scores, self.positive, self.index = found
        self.scores, self.normalizer = scores.sum(-1), scores.sum().clamp(min=1)
        return found

    def class_loss(self, pred, target):
        """In place of the criterion's ``bce``."""
        return self.stock.bce(pred, target)

    def box_loss(self, *inputs):
        """In place of the box criterion's ``forward``."""
        return self.stock.bbox_loss(*inputs)

    def still(self):
        """While no state of a loss moves."""
        return still(*getattr(self.stock, "built", {}).values())


class _BoxObserver:
    """Stands in for a box criterion; what a criterion of before Ultralytics 8.4.0 tells that is passed on."""

    def __init__(self, stock, call):
        vars(self).update(stock=stock, call=call)

    def __setattr__(self, name, value):
        setattr(self.stock, name, value)

    def __call__(self, *inputs):
        return self.call(*inputs)


class _ByAnchor(Observer):
    """What each anchor costs."""

    def __init__(self, stock, batch):
        super().__init__(stock)
        self.batch, self.terms = batch, {}  # slot -> (B, A), before the gain
        self.preprocess, self.criterion.preprocess = self.criterion.preprocess, self.rows

    def rows(self, targets, *args, **kwargs):
        """The stock method; it is not given every object, of oriented boxes."""
        self.kept = targets
        return self.preprocess(targets, *args, **kwargs)

    def class_loss(self, pred, target):
        stock = copy.copy(self.stock.bce)
        stock.weighs = stock.of_elements = True  # of ours
        elements = stock(pred, target)
        weights = compat.class_weights(self.stock)
        self.terms["cls"] = (elements if weights is None else elements * weights).sum(-1) / self.normalizer
        return elements

    def box_loss(self, *inputs):
        with torch.enable_grad():
            scores = inputs[TARGET_SCORES].detach().requires_grad_()
            sums = super().box_loss(*inputs[:TARGET_SCORES], scores, *inputs[TARGET_SCORES + 1 :])
            for slot, total in zip(("box", "dfl"), sums, strict=True):
                self.terms[slot] = _shares(total, scores)
        return tuple(total.detach() for total in sums)

    def losses(self):
        """The losses of images and objects."""
        nothing = torch.zeros_like(self.terms["cls"])
        terms = {slot: getattr(self.stock.hyp, slot) * self.terms.get(slot, nothing) for slot in SLOTS}
        images = {slot: of_anchors.sum(1).float() for slot, of_anchors in terms.items()}
        terms["weight"] = self.scores / self.normalizer
        return images, {name: self.of_objects(of_anchors.float()) for name, of_anchors in terms.items()}

    def of_objects(self, of_anchors):
        """Losses of anchors ``(B, A)`` added up over those of each object, in the order of the batch's labels."""
        image, count = self.batch["batch_idx"].view(-1).long().to(of_anchors.device), len(self.batch["cls"])
        found = of_anchors.new_zeros(count)
        kept = self.places()
        for number, (index, positive, losses) in enumerate(zip(self.index, self.positive, of_anchors, strict=True)):
            own = kept[image[kept] == number]
            if len(own):
                found.index_add_(0, own[index[positive].long()], losses[positive])
        return found

    def places(self):
        """Which of the batch's objects the criterion kept, in its order; it drops tiny oriented ones."""
        of_image, classes = (self.batch[name].view(-1, 1) for name in ("batch_idx", "cls"))
        given = torch.cat([of_image, classes, self.batch["bboxes"].flatten(1)], 1).tolist()
        kept = iter(self.kept.tolist())
        wanted, places = next(kept, None), []
        for place, row in enumerate(given):
            if row == wanted:
                places.append(place)
                wanted = next(kept, None)
        return torch.tensor(places, dtype=torch.long, device=self.index.device)


def _shares(total, scores):
    """The parts ``(B, A)`` of a sum that the anchors' scores ``(B, A, C)`` weigh: the scores times their derivative.

    Of a root (RMSELoss), whose parts are not added up, they are as those of the sum below it.
    """
    (slope,) = torch.autograd.grad(total, scores, retain_graph=True) if total.requires_grad else (0,)
    parts = (slope * scores).sum(-1).detach()
    if total != 0 and not parts.any():
        raise ValueError("A loss that counts anchors and does not weigh them, such as GHMR, has no part for each.")
    return parts * (total.detach() / parts.sum()).nan_to_num()
