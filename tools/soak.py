"""Call losses of ours at random, for as long as you like, and compare each call with its formula in float64.

A case is a loss with random settings, in training or not, a reduction, weights, an avg_factor, a form of target, a
number type, a shape, a size of chunks and a device of this machine. Its value, gradient and state must be those of the
formula of the whole batch in float64, weighed and reduced here. Where they are not, but a rounding of the input changes
the formula as much (at the border of a bin, at a tie), nothing is wrong. The exit status is 1 if a case failed.

  tools/soak.py --minutes 30 --seed 1
  tools/soak.py --seed 1 --case 4711     one case again
"""

import argparse
import copy
import random
import sys
import time
from collections import Counter
from typing import get_args

import torch

from detloss_plugins.loss import takes_probabilities
from detloss_plugins.losses import GHMC, GHMR, JointLoss, ScheduledLoss, SeesawLoss, in_turn
from detloss_plugins.nested import each_tensor
from detloss_plugins.reduction import AVG_FACTOR_EPS
from detloss_plugins.registry import registered_losses
from detloss_plugins.testing import sample
from detloss_plugins.testing.check.subject import small_chunks

TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# Settings that belong to the input, that are losses, or that change nothing in a formula.
FIXED = {
    "num_classes",
    "compile",
    "reduction",
    "return_dict",
    "losses",
    "base",
    "loss_cls",
    "loss_bbox",
    "eps",
    "use_mask",
}
CLASSES = 10


def devices():
    """Those of this machine."""
    return ["cpu", *["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available()]


def random_setting(rng, parameter, rule):
    """A value that a setting may have by its annotation."""
    tries = [None, True, False, rng.uniform(0, 1), rng.uniform(0.05, 3), rng.randint(1, 12), rng.uniform(1, 3)]
    tries.append([rng.uniform(0.1, 0.9) for _ in range(CLASSES)])
    tries += [choice for choice in get_args(parameter.annotation) if isinstance(choice, str | int)]
    return rng.choice([value for value in tries if rule.holds(value)] or [parameter.default])


def random_settings(rng, cls):
    """Some settings of a loss that go together."""
    settings = {
        name: random_setting(rng, parameter, cls.rules[name])
        for name, parameter in cls.__signature__.parameters.items()
        if name not in FIXED | set(cls.facts.example) and rng.random() < 0.4
    }
    while True:
        try:
            cls.make(**settings)
            return settings
        except ValueError:  # two of them contradict one another
            settings.pop(rng.choice(sorted(settings)))


def random_target(rng, loss, pred, target):
    """The target of a class loss in one of its forms; other losses have one form."""
    if loss.family not in ("classification", "ranking") or target.shape != pred.shape:
        return target
    quality, label = target.max(-1)
    ignored = torch.tensor([rng.random() < 0.2 for _ in range(len(label))], dtype=torch.bool)
    form = rng.choice(["dense", "some ignored", "label", "label and quality"])
    if form == "dense":
        return target
    if form == "some ignored":
        return target.masked_fill(ignored.unsqueeze(-1), -1)
    if not loss.use_sigmoid:
        return label.masked_fill(ignored, -1)
    label = label.where(quality > 0, CLASSES).masked_fill(ignored, -1)
    return label if form == "label" else (label, rng.choice([quality, quality.unsqueeze(-1)]))


def formula(loss, pred, target, weight, avg_factor, reduction):
    """A loss of float64 tensors, weighed and reduced as the documentation says."""
    if isinstance(loss, JointLoss):
        parts = [formula(part, pred, target, weight, avg_factor, reduction) for part in loss.losses]
        return loss.loss_weight * sum(parts)
    if isinstance(loss, ScheduledLoss):
        turn = in_turn(loss)
        return sum(share * formula(part, pred, target, weight, avg_factor, reduction) for part, share in turn)
    if loss.family == "multibox":  # the function of two other losses
        return loss(pred, target, weight, avg_factor, reduction)
    if loss.family == "ranking":
        target = loss.prepare(pred, target)[1]
        weight = torch.ones_like(pred) if weight is None else weight.unsqueeze(-1).expand(pred.shape)
        target = target.masked_fill(weight == 0, -1)
        losses, count = loss.fn(pred, target, **loss.settings) * weight[target > 0], (target > 0).sum()
    else:
        seen = loss.observe(pred, target, weight)
        losses, valid = loss.unweighted(pred, target, seen)
        losses = losses.square() if loss.facts.root else losses
        shape = *losses.shape[:1], *[1] * (losses.dim() - 1)
        factor = torch.ones_like(losses) if weight is None else weight.reshape(shape).expand(losses.shape)
        if valid is not None:
            factor = factor * (valid if valid.shape == losses.shape else valid.reshape(shape))
        losses = losses * ((factor > 0) if isinstance(loss, GHMC | GHMR) else factor)
        losses = losses.sum(-1) if loss.facts.sums_classes else losses
        count = loss.normalizer(max(losses.numel(), 1), seen)
    if isinstance(loss, SeesawLoss):  # each of its two parts has a count of its own
        count = torch.stack([((target >= 0) & (target < loss.num_classes)).sum(), torch.tensor(len(pred))])
    if loss.facts.self_normalized:
        avg_factor = None
    if reduction == "mean":
        losses = losses / (torch.as_tensor(count).clamp(min=1) if avg_factor is None else avg_factor + AVG_FACTOR_EPS)
    if reduction != "none" or isinstance(loss, SeesawLoss):
        losses = losses.sum(-1) if reduction == "none" else losses.sum()
    return loss.loss_weight * (losses.clamp(min=1e-300).sqrt() if loss.facts.root else losses)


class Case:
    """One call; equal seeds and numbers make the same one."""

    def __init__(self, seed, number):
        rng = random.Random(f"{seed} {number}")
        self.cls = rng.choice(list(registered_losses().values()))
        settings = random_settings(rng, self.cls)
        self.loss = self.cls.make(**settings).train(rng.random() < 0.5)
        self.device, self.chunk = rng.choice(devices()), rng.choice([16, 1000, 350_000])
        self.dtype = rng.choice([dtype for dtype in TOLERANCES if (self.device, dtype) != ("mps", torch.float64)])
        rows = rng.choice([0, 1, 2, 7, 64, 300, 1500])
        pred, target = sample(self.loss, rows, number, torch.float64)
        pred = pred.sigmoid() if takes_probabilities(self.loss) else pred
        pred, kind = pred.to(self.dtype), rng.choice([self.dtype, torch.float32])
        target = random_target(rng, self.loss, pred, target.to(kind) if target.is_floating_point() else target)
        weight = torch.rand(rows, generator=torch.Generator().manual_seed(number))
        weight = rng.choice([None, weight, (weight > 0.5).float()])
        self.reduction = rng.choice(["none", "mean", "sum"])
        self.avg_factor = rng.choice([None, 3.5]) if self.reduction == "mean" else None
        self.tensors = pred, target, weight
        given = ", ".join(f"{name}={value}" for name, value in settings.items())
        form = "(label, quality)" if isinstance(target, tuple) else f"{target.dtype} {tuple(target.shape)}"
        self.words = (
            f"case {number}: {self.cls.__name__}({given}), training={self.loss.training}, {self.reduction}, avg_factor="
            f"{self.avg_factor}, weight={None if weight is None else tuple(weight.shape)}, pred {pred.dtype} "
            f"{tuple(pred.shape)}, target {form}, on {self.device} in chunks of {self.chunk}"
        )

    def evaluated(self, call, loss, pred):
        """Value, gradient and state of a call, in float64; the gradient in the type of the case's input."""
        pred = pred.detach().requires_grad_()
        value = call(loss, pred).flatten()
        incoming = torch.linspace(0.5, 1.5, len(value), dtype=value.dtype, device=value.device)
        (slope,) = torch.autograd.grad((value * incoming).sum(), pred)
        return [x.detach().cpu().double() for x in (value, slope.to(self.dtype), *loss.buffers())]

    def expected(self, step=0.0):
        """By the formula, of an input that is changed by relative steps up to this one."""
        pred, target, weight = each_tensor(lambda x: x.double() if x.is_floating_point() else x, self.tensors)
        pred = pred * (1 + step * (2 * torch.rand(pred.shape, dtype=pred.dtype) - 1))
        loss = copy.deepcopy(self.loss).double()
        call = (target, weight, self.avg_factor, self.reduction)
        return self.evaluated(lambda loss, pred: formula(loss, pred, *call), loss, pred)

    def found(self):
        """By the loss."""
        pred, target, weight = each_tensor(lambda x: x.to(self.device), self.tensors)
        options = {"weight": weight, "avg_factor": self.avg_factor, "reduction_override": self.reduction}
        with small_chunks(self.device, self.chunk):
            loss = copy.deepcopy(self.loss).to(self.device)
            return self.evaluated(lambda loss, pred: loss(pred, target, **options), loss, pred)

    def difference(self):
        """In words, or None."""
        expected, found = self.expected(), self.found()
        # Values and states are never in half precision, and states are in float32.
        wide = torch.float32 if self.dtype != torch.float64 or len(found) > 2 else torch.float64
        spread = None
        for place, (a, b) in enumerate(zip(found, expected, strict=True)):
            what = ("value", "gradient", "state")[min(place, 2)]
            tolerance = TOLERANCES[wide if what != "gradient" or self.dtype == torch.float64 else self.dtype]
            gap = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0)
            bound = tolerance * b.nan_to_num(0, 0, 0).abs().amax() if b.numel() else 0.0
            bound = bound + torch.finfo(wide).eps  # what is as small as that beside 1 has no digits to be right
            if (gap <= bound).all():
                continue
            if spread is None:
                spread = [self.expected(1e-6 if self.dtype != torch.float64 else 1e-12) for _ in range(10)]
            moved = torch.stack([(other[place] - b).abs() for other in spread]).amax(0)
            if not (gap <= bound + 4 * moved.max()).all():
                return f"{what} differs by {gap.max():.3g} where {bound:.3g} is rounding"
        return None


def soak(cases):
    """Run cases, print those that fail, and return how many of each loss there were and how many failed."""
    counts, failed = Counter(), 0
    for case in cases:
        counts[case.cls.__name__] += 1
        try:
            words = case.difference()
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
        if words:
            failed += 1
            print(f"{case.words}: {words}", flush=True)
    return counts, failed


def within(minutes, seed):
    """Cases one by one until the time is over."""
    end, number = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:
        yield Case(seed, number)
        number += 1


def main(argv=None):
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run only the case of this number")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # threads cost small calls more than they save
    cases = within(args.minutes, args.seed) if args.case is None else [Case(args.seed, args.case)]
    counts, failed = soak(cases)
    print(f"{counts.total()} cases of {len(counts)} losses on {', '.join(devices())}: {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
