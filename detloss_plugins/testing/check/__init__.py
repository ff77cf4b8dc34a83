"""Whether a loss keeps this package's promises: ``check_loss(YourLoss)``, much as scikit-learn's check_estimator."""

import contextlib
from collections.abc import Callable
from typing import Any

from detloss_plugins.loss import Loss
from detloss_plugins.testing.check import calls  # noqa: F401  # its checks come before those of values
from detloss_plugins.testing.check.subject import CHECKS, small_chunks, subjects
from detloss_plugins.testing.check.values import EXTREME_BOXES, NoWaiting

__all__ = ["EXTREME_BOXES", "NoWaiting", "check_loss", "checks", "instances", "small_chunks"]


def check_loss(cls: type[Loss], *, device: str = "cpu", compile: bool = False, **settings: Any) -> None:
    """Check every promise of a loss class, registered or not, on what :func:`~detloss_plugins.testing.sample` gives.

    Args:
        cls: a subclass of :class:`detloss_plugins.loss.Loss`.
        device: where to run it, such as "cuda".
        compile: try the compiler too, which takes up to half a minute.
        settings: of the class. Without any, the default loss is checked, and one for each settings in its facts.

    Raises:
        AssertionError: naming the first promise that does not hold, and how to keep it.
        TypeError: if it is no loss class.
        ValueError: for ``reduction`` among the settings, as every one is tried, or a ``loss_weight`` of 0.

    >>> from detloss_plugins.losses import L1Loss
    >>> check_loss(L1Loss)
    """
    if not (isinstance(cls, type) and issubclass(cls, Loss)):
        raise TypeError(f"check_loss takes a subclass of detloss_plugins.loss.Loss, not {cls!r}.")
    if "reduction" in settings or settings.get("loss_weight", 1) == 0:
        raise ValueError("check_loss tries every reduction by itself, and a loss_weight of 0 gives none: leave it out.")
    for check in checks(cls, **settings):
        check(cls, device=device, compile=compile, **settings)


def checks(cls: type[Loss] | None = None, **settings: Any) -> list[Callable]:
    """All checks in their order, or those that say something of a class; each is called as :func:`check_loss` is."""
    facts = None if cls is None else cls.facts
    if settings:
        with contextlib.suppress(Exception):  # which the first check names
            facts = cls.make(**settings).facts
    return [check for check in CHECKS if facts is None or check.applies(facts)]


def instances(cls: type[Loss]) -> list[Loss]:
    """The default loss and one for each settings that its facts state, in evaluation mode."""
    return [subject.make() for subject in subjects(cls)]
