"""Value and gradient of a loss beside those of an upstream counterpart, on given tensors."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detloss_plugins.facts import Upstream
from detloss_plugins.families import ClassificationLoss
from detloss_plugins.loss import Loss, takes_probabilities
from detloss_plugins.nested import each_tensor
from detloss_plugins.testing.samples import sample
from detloss_plugins.testing.twins import twin_of

# Both sides compute in float64; what remains is where each upstream adds its eps (1e-6 or 1e-7, to areas in square
# pixels or square stride units), and the float32 that some cast to.
RTOL, ATOL = 1e-5, 5e-6
# Two that agree for targets of 0 and 1 only: they weigh soft ones differently.
HARD_TARGETS = {
    ("ModifiedCrossEntropyLoss", "torchvision.ops.sigmoid_focal_loss"),
    ("AsymmetricLoss", "torchvision.ops.sigmoid_focal_loss"),
    ("IABCELoss", "mmdet.models.losses.VarifocalLoss"),
}


class Difference(NamedTuple):
    """The largest differences over all inputs and ways of calling."""

    value: float = 0.0
    gradient: float = 0.0
    relative: float = 0.0
    agree: bool = True

    def join(self, other: "Difference") -> "Difference":
        """The worse of two."""
        worse = (max(a, b) for a, b in zip(self[:3], other[:3], strict=True))
        return Difference(*worse, self.agree and other.agree)


def random_tensors(cls: type[Loss]) -> tuple[Tensor, Any]:
    """``(pred, target)`` from the sampler of a loss."""
    return sample(cls, 256, seed=1)


def inputs_for(loss: Loss, pred: Tensor, target: Any) -> list[tuple[str, Tensor, Any]]:
    """The input in the forms that the loss takes: ``[(form, pred, target), ...]`` in float64."""

    def double(x):
        return each_tensor(lambda x: x.double() if x.is_floating_point() else x, x)

    pred = double(pred)
    if loss.family != "classification":
        return [("", pred, double(target))]
    if hasattr(loss, "num_classes"):  # the columns beyond are the background's, and a label is all they take
        return [("index", pred, _labels(target).clamp(max=loss.num_classes))]
    if isinstance(target, tuple):
        target = ClassificationLoss.dense(pred, double(target))[0]
    dense, label = double(target), target.argmax(-1)
    positive = target.sum(-1) > 0
    if takes_probabilities(loss):
        pred = pred.sigmoid()
    if not loss.use_sigmoid:
        distribution = (dense + 0.1)[positive]
        return [
            ("index", pred[positive], label[positive]),
            ("distribution", pred[positive], distribution / distribution.sum(-1, keepdim=True)),
        ]
    background = torch.where(positive, label, pred.shape[-1])
    return [("soft", pred, dense), ("index", pred, background)]


def _labels(target: Any) -> Tensor:
    """Class indices from any form of target; a row without a class has one beyond all."""
    if isinstance(target, tuple):
        return target[0]
    if target.dim() == 1:
        return target
    return torch.where(target.sum(-1) > 0, target.argmax(-1), target.shape[-1])


def calls(loss: Loss, pred: Tensor) -> dict[str, dict]:
    """Ways of calling a loss under mmdet's contract: keyword arguments by name."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(len(pred), generator=generator, dtype=pred.dtype)
    # mmdet broadcasts, so beside a loss of several values a row its weight must be a column.
    one = loss.facts.one_per_row or loss.family == "classification"
    weight = rows if one else rows.unsqueeze(-1)
    found = {
        "none": {"reduction_override": "none"},
        "mean": {},
        "sum": {"reduction_override": "sum"},
        "weight": {"weight": weight},
        "weight, avg_factor": {"weight": weight, "avg_factor": 7.5},
        "weight, sum": {"weight": weight, "reduction_override": "sum"},
    }
    if loss.family in ("box", "regression"):
        found["weight (N, 4)"] = {"weight": rows.unsqueeze(-1).expand_as(pred), "avg_factor": 7.5}
    return found


def value_and_gradient(call: Callable, pred: Tensor, target: Any, kwargs: Mapping) -> tuple[Tensor, Tensor]:
    """The result and the gradient of a fixed random projection of it."""
    pred = pred.detach().clone().requires_grad_()
    result = call(pred, target, **kwargs).double()  # some counterparts compute in float32
    projection = torch.rand(result.shape, generator=torch.Generator().manual_seed(2), dtype=result.dtype) + 0.5
    (gradient,) = torch.autograd.grad((result * projection).sum(), pred)
    return result.detach(), gradient


def difference(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> Difference:
    """Largest absolute and relative difference of two (value, gradient) pairs."""
    gaps, relative, agree = [], 0.0, True
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"ours has shape {tuple(a.shape)}, theirs {tuple(b.shape)}")
        gap, size = (a - b).abs(), b.abs()
        gaps.append(gap.max().item() if gap.numel() else 0.0)
        largest = size.max().item() if size.numel() else 0.0
        share = gaps[-1] / max(largest, 1e-12)
        relative = relative if share <= relative else share  # a NaN is the largest
        # `<=` so that a NaN disagrees.
        agree = agree and bool((gap <= ATOL + RTOL * size.clamp(min=largest)).all())
    return Difference(*gaps, relative, agree)


def compare(cls: type[Loss], upstream: Upstream, tensors: Iterable[tuple[Tensor, Any]], **settings: Any) -> Difference:
    """The worst difference between a loss and one counterpart on the given ``(pred, target)``.

    ``settings`` are those of ours beside the ones that ``upstream`` states.
    """
    loss = cls.make(**{**settings, **upstream.ours})
    twin = twin_of(upstream.path)

    def theirs(pred, target, **kwargs):
        call, given = twin.ready(upstream, loss, pred, target)
        return call(pred, given, kwargs)

    def differ(pred, target, kwargs):
        fresh = copy.deepcopy(loss)  # state starts anew, as theirs does
        return difference(*(value_and_gradient(call, pred, target, kwargs) for call in (fresh, theirs)))

    if upstream.at:
        pred, target = (torch.tensor([box], dtype=torch.float32) for box in upstream.at)
        return differ(pred, target, {"reduction_override": "none"})
    worst = Difference()
    for pred, target in tensors:
        for _, p, t in inputs_for(loss, pred, target):
            if (cls.__name__, upstream.path) in HARD_TARGETS and t.is_floating_point():
                t = (t > 0).to(t.dtype)
            for way, kwargs in calls(loss, p).items():
                if twin.ways is None or way in twin.ways:
                    worst = worst.join(differ(p, t, kwargs))
    return worst


def verdict(upstream: Upstream, worst: Difference) -> str:
    """PASS, FAIL or DIFFERS; a documented difference that is not there is a failure of the documentation."""
    if not upstream.differs:
        return "PASS" if worst.agree else "FAIL"
    return "FAIL" if worst.agree else "DIFFERS"
