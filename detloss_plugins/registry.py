"""The one list of losses: a child of mmengine's root ``MODELS``, and the way to build from it.

mmengine imports ``<scope>.registry`` when it meets ``type="<scope>.X"``, so this file's name and place make
``type="detloss_plugins.CIoULoss"`` work in any MMDetection config, with or without ``custom_imports``.
"""

import contextlib
import difflib
import sys
from collections.abc import Mapping
from typing import Any

from mmengine.logging import MessageHub
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

SCOPE = "detloss_plugins"


class LossRegistry(Registry):
    """A registry of mmengine that says which name is near where a loss is misspelt."""

    def get(self, key: str) -> type | None:
        """The class of a name, as mmengine's registries give it; None for the path of what is no loss, which their
        root looks up.

        Raises:
            ValueError: for a name that nothing has, here or in a parent; the message gives the nearest ones.
        """
        found, name = super().get(key), key.removeprefix(f"{SCOPE}.")
        of_loss = "." not in name or name.startswith("losses.")
        return loss_class(f"{SCOPE}.{name}") if found is None and of_loss else found

    def __contains__(self, key: str) -> bool:
        with contextlib.suppress(ValueError):
            return super().__contains__(key)
        return False


MODELS = LossRegistry("model", parent=MMENGINE_MODELS, scope=SCOPE, locations=["detloss_plugins.losses"])


def runner_progress(unit: str) -> tuple[float, float] | None:
    """The ``unit``, "epoch" or "iter", in which mmengine's Runner is, and how many there are; None if none trains."""
    hub = MessageHub.get_current_instance()
    return (hub.get_info(unit), hub.get_info(f"max_{unit}s")) if hub.get_info("loop_stage") == "train" else None


def registered_losses() -> dict[str, type]:
    """``{name: class}`` of every registered loss, each once and by its own name, in order of registration."""
    MODELS.import_from_location()
    return {cls.__name__: cls for cls in MODELS.module_dict.values()}


def loss_class(name: str | type) -> type:
    """The class of a loss: a registered name, with or without the ``detloss_plugins.`` prefix, a dotted path as the
    dump of a lazy config has it, or the class itself.

    Looks only among our own losses: under mmdet's default scope ``MODELS.build`` builds mmdet's of the same name.

    Raises:
        ValueError: for an unknown name, or the path of something else; the message gives the nearest names.
    """
    MODELS.import_from_location()
    known = MODELS.module_dict
    found = name if isinstance(name, type) else known.get(str(name).removeprefix(f"{SCOPE}."))
    if found is None and isinstance(name, str) and "." in name:
        with contextlib.suppress(ValueError):
            found = get_object_from_string(name)
    if not (isinstance(found, type) and hasattr(found, "fn") and hasattr(found, "facts")):
        key = name.__name__ if isinstance(name, type) else str(name).rpartition(".")[2]
        by_lower = {name.lower(): name for name in known}
        nearest = [by_lower[near] for near in difflib.get_close_matches(key.lower(), by_lower, n=3, cutoff=0.4)]
        hint = f"did you mean {', '.join(nearest)}?" if nearest else f"there are {', '.join(sorted(known))}."
        raise ValueError(f"There is no loss named {name!r} in {SCOPE}; {hint}")
    return found


def importable(cls: type) -> bool:
    """Whether another process can import a class by its path: not one of a script, a notebook or a function."""
    return cls.__module__ != "__main__" and getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls


def loss_path(name: str | type) -> str:
    """What :func:`loss_class` takes for the same class in another process, which has not imported what this one has.

    It is the path of a class from outside this package, or of one that is given as such, and otherwise the name.
    """
    cls = loss_class(name)
    if isinstance(name, str) and (cls.__module__.partition(".")[0] == SCOPE or not importable(cls)):
        return name
    return f"{cls.__module__}.{cls.__name__}"


def portable(cfg: Any) -> Any:
    """A copy of a config in which each loss, also a nested one, is named as :func:`loss_path` does.

    ``ValueError`` for a loss that other processes cannot import.
    """
    if isinstance(cfg, list | tuple):
        return type(cfg)(map(portable, cfg))
    if not isinstance(cfg, Mapping):
        return cfg
    if "type" in cfg and not importable(cls := loss_class(cfg["type"])):
        raise ValueError(
            f"{cls.__name__} is of a script or a notebook, from which other processes cannot import it: put the class "
            "in a file of its own, and import it from there."
        )
    return {key: loss_path(value) if key == "type" else portable(value) for key, value in cfg.items()}


def build_loss(cfg: Mapping) -> Any:
    """Build one of our losses from a config dict, which is not modified, whatever mmengine's default scope is.

    Raises:
        TypeError: if ``cfg`` is not a dict with a ``type``, which is what :func:`loss_class` takes, or names an unknown
            hyper-parameter.
        ValueError: if no loss has that name.

    >>> build_loss(dict(type="GIoULoss", loss_weight=2.0))
    GIoULoss(loss_weight=2.0)
    """
    if not isinstance(cfg, Mapping) or "type" not in cfg:
        raise TypeError(f"A loss is configured by a dict with a 'type', such as dict(type='CIoULoss'), not by {cfg!r}.")
    options = dict(cfg)
    options.pop("_scope_", None)  # mmengine writes it into a base config of a package
    return loss_class(options.pop("type"))(**options)


def build_part(cfg: Mapping) -> Any:
    """Build a loss that another one is made of, as :func:`build_loss`; a ``TypeError`` also for a ScheduledLoss."""
    loss = build_loss(cfg)
    if not loss.can_be_part:
        raise TypeError(f"A {type(loss).__name__} is no part of another loss: let its losses be those others.")
    return loss
