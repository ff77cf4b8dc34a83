"""``check_loss`` names the promise that a loss breaks: every promise has a loss here that breaks it."""

from typing import Any

import pytest
import torch
from support import needs_compiler
from torch import nn
from torch.autograd.function import once_differentiable

from detloss_plugins.facts import NonNegative, Positive, Upstream
from detloss_plugins.families import BoxLoss, ClassificationLoss, RegressionLoss
from detloss_plugins.geometry import Pair
from detloss_plugins.losses import (
    AlphaIoULoss,
    CIoULoss,
    ConfidenceWeightedLoss,
    InnerIoULoss,
    JointLoss,
    SlideLoss,
)
from detloss_plugins.reduction import reduce
from detloss_plugins.testing import check_loss, checks, instances
from detloss_plugins.testing.check import NoWaiting
from detloss_plugins.testing.twins import load

ROW_WISE = RegressionLoss.facts.but(row_wise=True)


def log_cosh(pred, target, *, scale: Positive = 1.0):
    """``scale * ln cosh(d / scale)``."""
    size = (pred - target).abs() / scale
    return scale * (size + nn.functional.softplus(-2 * size) - nn.functional.softplus(0 * size))


class LogCosh(RegressionLoss):
    """A user's loss as the README has it."""

    fn = staticmethod(log_cosh)
    facts = ROW_WISE


class WholeBatch(LogCosh):
    """It does not say that its rows are independent, and is run on the whole batch."""


class Learned(LogCosh):
    """It has something to learn."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.factor = nn.Parameter(torch.ones(()))

    def elements(self, pred, target, seen):
        return self.factor * super().elements(pred, target, seen)


def relative(pred, target, *, mean=1.0, power: NonNegative = 1.0):
    """``|d| / mean^power``."""
    return (pred - target).abs() / mean**power


class Running(RegressionLoss):
    """It has state: the running mean of the errors."""

    fn = staticmethod(relative)
    facts = ROW_WISE.but(filled=("mean",))

    def __init__(self, **settings):
        super().__init__(**settings)
        self.register_buffer("mean", torch.tensor(1.0))

    @property
    def observes(self):
        return self.learning

    def statistics(self, pred, target, valid, weight):
        error = (pred - target).abs()
        return {"error": error.nansum(), "count": error.isfinite().sum()}

    def summarise(self, sums):
        if sums is not None:
            moved = self.mean.lerp((sums["error"] / sums["count"]).float(), 0.1)
            self.mean.copy_(torch.where(sums["count"] > 0, moved, self.mean))
        return {"mean": self.mean}


@pytest.mark.parametrize("cls", [LogCosh, WholeBatch, Learned, Running])
def test_a_good_loss_passes(cls):
    check_loss(cls)


def test_settings_are_checked_as_given():
    check_loss(LogCosh, scale=0.5)
    with pytest.raises(AssertionError, match=r'^WrongBounds\(scale=0.5\) breaks the promise "bounds": .*\.$'):
        check_loss(WrongBounds, scale=0.5)
    assert [repr(loss) for loss in instances(CIoULoss)] == ["CIoULoss()", "CIoULoss(alpha_gate=0.5)"]


OF_SCORES = {"base": {"type": "FocalLoss", "activated": True}}


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (JointLoss, {"losses": [{"type": "CIoULoss"}, {"type": "NWDLoss"}]}),
        (InnerIoULoss, {"base": {"type": "NWDLoss"}}),
        (AlphaIoULoss, {"penalty": "ciou", "alpha": 0.5}),
        (SlideLoss, OF_SCORES),
        (ConfidenceWeightedLoss, OF_SCORES),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_is_known_of_a_loss_follows_its_settings(cls, settings):
    """So that it is held to no promise that these do not make."""
    check_loss(cls, **settings)


def square(pred, target):
    """``d^2``."""
    return (pred - target).square()


class Square(RegressionLoss):
    """What most of the broken ones change."""

    fn = staticmethod(square)
    facts = ROW_WISE


BROKEN = []


def breaks(promise):
    def note(cls):
        BROKEN.append((cls, promise))
        return cls

    return note


@breaks("usable")
class NeedsASetting(Square):
    def __init__(self, *, size: Positive | None = None, **settings):
        super().__init__(**settings)
        self.size = size + 0


@breaks("documented")
class Undocumented(RegressionLoss):
    fn = staticmethod(lambda pred, target: (pred - target).square())


@breaks("settings")
class TakesNaN(Square):
    def __init__(self, *, scale: Any = None, **settings):
        super().__init__(**settings)
        self.scale = scale


@breaks("result")
class ReturnsHalf(Square):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).half()


@breaks("bounds")
class WrongBounds(LogCosh):
    facts = ROW_WISE.but(bounds=(0.0, 0.5))


class OwnGradient(torch.autograd.Function):
    """A square with a hand-written backward, in which the incoming gradient is forgotten."""

    generate_vmap_rule = True
    forward = staticmethod(square)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.inputs = inputs

    @staticmethod
    def backward(ctx, outer):
        pred, target = ctx.saved_tensors
        return 2 * (pred - target), None


class Unsaved(OwnGradient):
    """It reads its input when it may have changed."""

    @staticmethod
    def backward(ctx, outer):
        pred, target = ctx.inputs
        return 2 * (pred - target) * outer, -2 * (pred - target) * outer


class Once(OwnGradient):
    """It has no second derivative."""

    @staticmethod
    @once_differentiable
    def backward(ctx, outer):
        pred, target = ctx.saved_tensors
        return 2 * (pred - target) * outer, -2 * (pred - target) * outer


class ByHand(Square):
    """A square by one of these."""

    facts = ROW_WISE
    way: type

    def elements(self, pred, target, seen):
        return self.way.apply(pred, target)


@breaks("incoming gradient")
class ForgetsTheIncoming(ByHand):
    way = OwnGradient


@breaks("late changes")
class SavesNothing(ByHand):
    facts = RegressionLoss.facts
    way = Unsaved


@breaks("derivatives")
class DifferentiableOnce(ByHand):
    way = Once


@breaks("reductions")
class HalfTheMean(Square):
    def normalizer(self, count, seen):
        return 2 * count


@breaks("chunks")
class ReadsTheBatch(Square):
    facts = ROW_WISE

    def elements(self, pred, target, seen):
        return super().elements(pred, target, seen) / len(pred)


@breaks("weights")
class CountsIgnoredRows(ReadsTheBatch):
    facts = RegressionLoss.facts


@breaks("weights")
class IgnoresWeight(Square):
    def weigh(self, loss, valid, weight):
        return loss


@breaks("weights")
class TakesAnyWeight(Square):
    def weigh(self, loss, valid, weight):
        fits = weight is None or weight.shape in (loss.shape, loss.shape[:1], (len(loss), 1))
        return super().weigh(loss, valid, weight if fits else None)


@breaks("loss weight")
class ForgetsLossWeight(Square):
    def reduced(self, pred, target, weight, avg_factor, reduction, factor):
        return super().reduced(pred, target, weight, avg_factor, reduction, 1.0)


@breaks("empty input")
class NaNOnEmpty(Square):
    def normalizer(self, count, seen):
        return count if count > 1 else 0


@breaks("unmodified input")
class ChangesItsInput(Square):
    def prepare(self, pred, target):
        return pred, target.clamp_(-1, 1), None


@breaks("half precision")
class StaysInHalf(Square):
    def unweighted(self, pred, target, seen):
        return self.fn(pred, target.to(pred.dtype)), None


@breaks("autocast")
class UnderAutocast(Square):
    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        if torch.randn(1, 1).mm(torch.randn(1, 1)).dtype != torch.float32:
            return self.loss_weight * reduce(self.fn(pred, target), weight, avg_factor)
        return super().forward(pred, target, weight, avg_factor, reduction_override)


@breaks("nan")
class HidesNaN(Square):
    def elements(self, pred, target, seen):
        return super().elements(pred, target, seen).nan_to_num(0.0)


@breaks("nan")
class KeepsNaN(Running):
    facts = Running.facts

    def statistics(self, pred, target, valid, weight):
        error = (pred - target).abs()
        return {"error": error.sum(), "count": torch.tensor(error.numel())}


@breaks("state")
class MovesInValidation(Running):
    facts = Running.facts

    @property
    def observes(self):
        return self.training


@breaks("wrong target")
class FillsUpTheTarget(Square):
    def prepare(self, pred, target):
        return pred, nn.functional.pad(target, (0, 0, 0, len(pred) - len(target))), None


@breaks("gradient")
class UndeclaredConstant(Square):
    def elements(self, pred, target, seen):
        return (pred - target).detach() * (pred - target)


@breaks("gradient")
class NothingIsConstant(Square):
    facts = ROW_WISE.but(true_gradient=False)


@breaks("several images")
class OneImage(Square):
    facts = ROW_WISE

    def as_rows(self, pred, target, weight):
        return pred, target, weight

    def elements(self, pred, target, seen):
        factor = torch.arange(pred.shape[1]).unsqueeze(-1) if pred.dim() > 2 else 1
        return factor * super().elements(pred, target, seen)


@breaks("copies")
class ForgetsItsSettings(Square):
    def __reduce__(self):
        return type(self), ()


@breaks("no waiting")
class AsksForANumber(Square):
    def elements(self, pred, target, seen):
        return super().elements(pred, target, seen) * (1 if pred.sum() > 1e9 else 2)


@breaks("upstream")
class WrongFormula(Square):
    facts = ROW_WISE.but(upstream=(Upstream("torch.nn.functional.l1_loss"),))


def box_loss(term):
    """A loss between boxes of a term of the pair."""

    def fn(pred, target):
        """A term."""
        return term(Pair(pred, target, 1e-7))

    return staticmethod(fn)


@breaks("extreme boxes")
class DividesByTheArea(BoxLoss):
    fn = box_loss(lambda pair: pair.center_distance2 / pair.target.area)


@breaks("invariances")
class KnowsThePlace(BoxLoss):
    fn = box_loss(lambda pair: (1 - pair.iou) * (1 + pair.target.x1.abs()))


@breaks("attraction")
class AttractsNobody(BoxLoss):
    fn = box_loss(lambda pair: 1 - pair.iou)
    facts = BoxLoss.facts.but(attracts=True)


@breaks("extreme logits")
class Overflows(ClassificationLoss):
    @staticmethod
    def fn(pred, target):
        """``-ln p``."""
        return -(target * pred.sigmoid().log() + (1 - target) * (1 - pred.sigmoid()).log())


def cross_entropy(pred, target):
    """Binary cross entropy of each class."""
    return nn.functional.binary_cross_entropy_with_logits(pred, target, reduction="none")


@breaks("ignored")
class TrainsOnWhatIsIgnored(ClassificationLoss):
    fn = staticmethod(cross_entropy)

    def prepare(self, pred, target):
        return *super().prepare(pred, target)[:2], None


@breaks("state")
class KeepsItsStateToItself(Running):
    def __init__(self, **settings):
        super().__init__(**settings)
        del self.mean
        self.mean = torch.tensor(1.0)


def sum_of_classes(pred, target):
    """The sum of the classes' cross entropies."""
    return cross_entropy(pred, target).sum(-1)


@breaks("reductions")
class OneARowUnsaid(ClassificationLoss):
    fn = staticmethod(sum_of_classes)


@pytest.mark.parametrize(("cls", "promise"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_promise_is_named(cls, promise):
    with pytest.raises(AssertionError, match=f'^{cls.__name__} breaks the promise "{promise}": [^\n]*\\.$'):
        check_loss(cls)


def test_what_helps_is_named():
    with pytest.raises(AssertionError, match="or its facts state one_per_row=True"):
        check_loss(OneARowUnsaid)


def test_settings_that_every_loss_has():
    check_loss(CIoULoss, loss_weight=2.0)
    for settings in ({"reduction": "sum"}, {"loss_weight": 0}):
        with pytest.raises(ValueError, match="leave it out"):
            check_loss(CIoULoss, **settings)


def test_a_counterpart_that_is_not_there_is_no_missing_package():
    assert load("a_package_that_nobody_has.losses.Loss") is None
    for path in ("torch.nn.funktional.mse_loss", "torch.nn.functional.mse_los"):
        with pytest.raises((ImportError, AttributeError)):
            load(path)


def test_what_counts_positives_may_index_by_them():
    scores, positive = torch.rand(4), torch.tensor([True, False, True, False])
    with NoWaiting("nonzero"):
        assert len(scores[positive]) == 2
    with NoWaiting(), pytest.raises(AssertionError, match="index makes the host wait"):
        scores[positive]


def test_only_losses_are_checked():
    with pytest.raises(TypeError, match="check_loss takes a subclass of"):
        check_loss(nn.L1Loss)


def test_every_promise_can_be_broken():
    broken = {promise for _, promise in BROKEN}
    assert broken == {check.__name__.replace("_", " ") for check in checks()} - {"compiled"}


@needs_compiler
def test_a_loss_that_cannot_be_compiled(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("there is no C++ compiler")

    monkeypatch.setattr(torch, "compile", fail)
    check_loss(Square)
    with pytest.raises(AssertionError, match=r'"compiled": UserWarning: .*no C\+\+ compiler'):
        check_loss(Square, compile=True)


def test_a_class_has_the_checks_that_say_something_of_it():
    names = {check.__name__ for check in checks(Square)}
    assert "chunks" in names
    assert not names & {"attraction", "extreme_boxes", "extreme_logits", "upstream"}
