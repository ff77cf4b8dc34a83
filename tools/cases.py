"""What the benchmark runs: sizes by family, inputs from the families' samplers, and who competes on them."""

import functools
import inspect
from collections.abc import Mapping
from typing import NamedTuple

import torch

from detloss_plugins.facts import Upstream
from detloss_plugins.families import ClassificationLoss, RankingLoss
from detloss_plugins.nested import each_tensor, flatten
from detloss_plugins.registry import loss_class
from detloss_plugins.testing.parity import HARD_TARGETS
from detloss_plugins.testing.samples import sample, sampler_of
from detloss_plugins.testing.twins import load, twin_of

YARDSTICK = "FocalLoss"  # beside the ranking losses, which have no counterparts
LOOP = "plain loop"  # beside AP loss: it as its authors write it


class Case(NamedTuple):
    """One size: how many samples, with which arguments of the sampler, and the share of positive rows of logits."""

    name: str
    n: int
    sampler: Mapping = {}
    positives: float | None = None  # None: as sampled


YOLO = "YOLO 8 x 8400 x 80"
RETINANET = "RetinaNet 2 x 120k x 80"
ROWS = (Case("1k", 1000), Case("10k", 10_000), Case("100k", 100_000), Case("1M", 1_000_000))
LOGITS = (
    Case("1k x 80", 1000, {"classes": 80}),
    Case(YOLO, 8 * 8400, {"classes": 80}, 0.02),
    Case(RETINANET, 240_000, {"classes": 80}, 0.002),
)
MASKS = tuple(Case(f"100 x {side} x {side}", 100, {"side": side}) for side in (28, 80, 160))
SSD = (Case("SSD300 8 x 8732 x 80", 8, {"anchors": 8732, "classes": 80}),)
SCENES = (
    Case("500 of 100k", 100_500, {"positives": 500}),
    Case("2000 of 1M", 1_002_000, {"positives": 2000}),
)


def cases(cls):
    """The sizes for a loss, by what its sampler takes."""
    takes = inspect.signature(sampler_of(cls)).parameters
    if issubclass(cls, RankingLoss):
        return SCENES
    for name, sizes in (("anchors", SSD), ("classes", LOGITS), ("side", MASKS)):
        if name in takes:
            return sizes
    return ROWS


def scene(positives, negatives, seed=0):
    """Logits and soft targets in one row: negatives mostly below, but all of them near enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(positives + negatives, generator=generator) - 4
    logits[:positives] += 3
    target = torch.zeros_like(logits)
    target[:positives] = torch.rand(positives, generator=generator).clamp(min=0.01)
    order = torch.randperm(len(logits), generator=generator)
    return logits[order], target[order]


@torch.no_grad()
def plain_ap_loss(logits, target, delta=1.0):
    """AP loss and its update by a loop over the positives, from the lowest: what the fast form replaces."""
    scores, negatives = logits[target > 0], logits[target == 0]
    near = negatives >= scores.min() - delta
    others = negatives[near]
    up, down = torch.zeros_like(scores), torch.zeros_like(others)
    best = scores.new_zeros(())
    for i in scores.argsort():
        above = ((scores - scores[i]) / (2 * delta) + 0.5).clamp(0, 1).sum() + 0.5
        step = ((others - scores[i]) / (2 * delta) + 0.5).clamp(0, 1)
        precision = above / (above + step.sum())
        step /= above + step.sum()
        if precision >= best:
            best = precision
        else:
            step *= (1 - best) / (1 - precision)
        down += step
        up[i] = best - 1
    pushed = torch.zeros_like(negatives)
    pushed[near] = down
    return -up.mean(), up / len(up), pushed / len(up)


@functools.lru_cache(maxsize=len(LOGITS))
def _sampled(sampler, n, arguments, seed):  # once for the losses that share a sampler
    return sampler(n, seed=seed, **dict(arguments))


def sampled(cls, case, seed=0):
    """``(pred, target)`` of a size, in float32; the target of class logits is ``(label, quality)``."""
    if issubclass(cls, RankingLoss):
        return scene(case.sampler["positives"], case.n - case.sampler["positives"], seed)
    pred, target = _sampled(sampler_of(cls), case.n, tuple(case.sampler.items()), seed)
    if not issubclass(cls, ClassificationLoss):
        return pred, target
    return pred, thinned(*label_and_quality(target, case.sampler["classes"]), case, seed)


def label_and_quality(target, classes):
    """A class index, ``classes`` for the background, and the value on its channel, from what samplers give."""
    if target.dim() == 1:
        return target, (target < classes).float()
    quality, label = target.max(-1)
    return label.where(quality > 0, classes), quality


def thinned(label, quality, case, seed):
    """The positives reduced to a case's share of the rows."""
    if case.positives is None:
        return label, quality
    generator = torch.Generator().manual_seed(seed + 1)
    background = case.sampler["classes"]
    share = (label < background).float().mean()
    kept = torch.rand(len(label), generator=generator) * share < case.positives
    return label.where(kept, background), quality * kept


def inputs(loss, form, case, seed=0):
    """The input of a loss in float32, with a class loss's target in one of its forms; see :class:`Contest`."""
    pred, target = sampled(type(loss), case, seed)
    if not issubclass(type(loss), ClassificationLoss) or isinstance(target, torch.Tensor):
        return pred, target
    label, quality = target
    if getattr(loss, "activated", False):
        pred = pred.sigmoid()
    if form == "index":
        # Heads of softmax losses have a class of their own for the background: here the last one.
        last = getattr(loss, "num_classes", pred.shape[-1] - (not loss.use_sigmoid))
        return pred, label.clamp(max=last)
    if form == "hard":
        quality = (quality > 0).to(quality.dtype)
    target = label, quality
    return pred, target if form == "quality" else ClassificationLoss.dense(pred, target)[0]


class Contest(NamedTuple):
    """A loss under some settings, and the counterparts that are the same loss under these on one form of target.

    The form of a class loss's target is the one that the counterpart takes by nature, so that neither side converts
    one for the other: "index", "quality" (label and quality), "dense" (soft) or "hard" (dense, of 0 and 1).
    """

    cls: type
    ours: Mapping
    form: str
    twins: tuple[Upstream, ...]


def contests(cls, every_setting=False):
    """The contests of a loss: each counterpart under the first of its settings, or under all; at least one contest."""
    found, seen = {}, set()
    for upstream in cls.facts.upstream:
        new = upstream.path not in seen or every_setting
        if upstream.differs or not new or load(upstream.path) is None:
            continue
        seen.add(upstream.path)
        form = default_form(cls) and twin_of(upstream.path).form
        if (cls.__name__, upstream.path) in HARD_TARGETS:
            form = "hard"
        found.setdefault((repr(sorted(dict(upstream.ours).items())), form), []).append(upstream)
    if not found:
        return [Contest(cls, {}, default_form(cls), ())]
    return [Contest(cls, twins[0].ours, form, tuple(twins)) for (_, form), twins in found.items()]


def default_form(cls):
    """The target's form of a class loss without counterparts: dense as in YOLO, or an index for a softmax."""
    if not issubclass(cls, ClassificationLoss) or issubclass(cls, RankingLoss):
        return ""
    return "dense" if cls.make().use_sigmoid else "index"


def fitted(settings, cls, case):
    """Settings made for the sampler's default number of classes, for those of a case."""
    if "classes" not in case.sampler:
        return dict(settings)
    before, now = (sample(cls, 1, **more)[0].shape[-1] for more in ({}, {"classes": case.sampler["classes"]}))

    def fit(name, value):
        if name == "num_classes":
            return value + now - before
        return (list(value) * now)[:now] if isinstance(value, list) and len(value) == before else value

    return {name: fit(name, value) for name, value in settings.items()}


def way_of(twins):
    """The reduction that all of them know."""
    known = [ways for ways in (twin_of(upstream.path).ways for upstream in twins) if ways is not None]
    return next(way for way in ("mean", "sum") if all(way in ways for ways in known))


def our_losses(contest, case, modes, device):
    """``{mode: module}``; they serve all cases of a contest, as their number of classes is one."""
    cls = contest.cls
    settings = fitted({**cls.facts.example, **contest.ours}, cls, case)
    extra = {"eager": {}, "compiled": {"compile": True}}
    made = {mode: cls(**settings, **extra[mode]).to(device) for mode in modes}
    return {mode: loss for mode, loss in made.items() if mode != "compiled" or loss.compiles(torch.device(device))}


def participants(contest, case, ours, device, dtype, seed=0):
    """The input of a contest, and ``{who: (call, target)}`` with ``call(pred, target)``, on a device and in a dtype."""
    cls = contest.cls
    loss = next(iter(ours.values()), None) or our_losses(contest, case, ["eager"], device)["eager"]
    pred, target = moved(inputs(loss, contest.form, case, seed), device, dtype)
    # The other side is told the reduction in the call, and so are we.
    how = {"reduction_override": way_of(contest.twins)}
    found = {f"ours {mode}": (functools.partial(made, **how), target) for mode, made in ours.items()}
    for upstream in contest.twins:
        fitting = upstream._replace(theirs=fitted(upstream.theirs, cls, case))
        call, given = twin_of(upstream.path).ready(fitting, loss, pred, target)
        found[upstream.path] = (lambda pred, target, call=call: call(pred, target, how), given)
    if issubclass(cls, RankingLoss):
        found[YARDSTICK] = (loss_class(YARDSTICK)().to(device), target)
        if cls.__name__ == "APLoss":
            found[LOOP] = (plain_ap_loss, target)
    return pred, target, found


def moved(tensors, device, dtype):
    """Tensors, nested in tuples, on a device, those of floating point in a dtype."""
    return each_tensor(lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype), tensors)


def size_of(tensors):
    """Bytes of tensors, nested in tuples."""
    return sum(x.nbytes for x in flatten(tensors)[0])
