"""What a loss class states about itself, in words: for ``detloss list`` and ``show``, and the documents' tables."""

import contextlib
import inspect
import re
from typing import Any, NamedTuple

from detloss_plugins import MODELS
from detloss_plugins.facts import Upstream
from detloss_plugins.families import ClassificationLoss
from detloss_plugins.loss import Loss
from detloss_plugins.registry import registered_losses
from detloss_plugins.testing.twins import in_words

SHARED = ("reduction", "loss_weight", "compile")  # settings of every loss
OF_CLASSES = ("class_weight", "class_counts", "effective_beta", "label_smoothing")  # and of every class loss


class Setting(NamedTuple):
    """A setting of a loss: its default, which values it may have, and what it is for, as far as that is written."""

    name: str
    default: Any  # ``inspect.Parameter.empty`` if it must be given
    allowed: str
    meaning: str

    def __str__(self) -> str:
        return self.name if self.default is inspect.Parameter.empty else f"{self.name}={self.default!r}"


def losses_by_family() -> dict[str, dict[str, type[Loss]]]:
    """``{family: {name: class}}``, the families sorted, the losses in the order of registration."""
    found: dict[str, dict[str, type[Loss]]] = {}
    for name, cls in registered_losses().items():
        found.setdefault(cls.facts.family, {})[name] = cls
    return dict(sorted(found.items()))


def aliases(cls: type[Loss]) -> list[str]:
    """The other names under which a loss is registered."""
    return [name for name, found in MODELS.module_dict.items() if found is cls and name != cls.__name__]


def title(cls: type[Loss]) -> str:
    """The first line of the docstring: the paper, or what the loss is."""
    return (inspect.getdoc(cls) or cls.__name__).splitlines()[0].rstrip(".")


def as_dict(cls: type[Loss], prefix: str = "") -> str:
    """How a loss is written as a dict; with the ``prefix`` of a config of MMDetection, as its heads want it."""
    given = dict(cls.facts.example)
    of_classes = cls.facts.family in ("classification", "ranking")
    if prefix and of_classes and "use_sigmoid" in cls.rules and cls.make().use_sigmoid:  # type: ignore[attr-defined]
        given = {"use_sigmoid": True, **given}  # they count their channels by it
    words = [f'type="{prefix}{cls.__name__}"', *(f"{name}={value!r}" for name, value in given.items())]
    return f"dict({', '.join(words)})"


def settings(cls: type[Loss]) -> list[Setting]:
    """The settings of a loss without those that every loss of its kind has."""
    common = {*SHARED, *set(OF_CLASSES) - set(cls.hyper)}
    return [setting for setting in every_setting(cls) if setting.name not in common]


def shared(cls: type[Loss]) -> list[str]:
    """The names of the settings that every loss of its kind has, without those that this one refuses."""
    names = list(SHARED)
    if issubclass(cls, ClassificationLoss):
        for given, of_it in (({"class_weight": [1.0]}, OF_CLASSES[:3]), ({"label_smoothing": 0.1}, OF_CLASSES[3:])):
            with contextlib.suppress(TypeError, ValueError):
                cls.make(**given)
                names += of_it
    return names


def every_setting(cls: type[Loss]) -> list[Setting]:
    """All settings of a loss, in the order of its signature."""
    meanings: dict[str, str] = {}
    for text in (*(inspect.getdoc(base) for base in reversed(cls.__mro__) if issubclass(base, Loss)), cls.fn.__doc__):
        meanings |= arguments(inspect.cleandoc(text or ""))
    parameters = inspect.signature(cls).parameters.values()
    rules = {name: rule.words if rule else "" for name, rule in cls.rules.items()}
    return [Setting(p.name, p.default, rules[p.name], meanings.get(p.name, "")) for p in parameters]


def in_one_line(cls: type[Loss]) -> str:
    """The settings with their defaults: ``"gamma=2.0, alpha=0.25"``."""
    return ", ".join(map(str, settings(cls)))


def equals(cls: type[Loss]) -> list[str]:
    """The packages that have an equal loss, under some settings at least."""
    return list(dict.fromkeys(upstream.path.split(".")[0] for upstream in cls.facts.upstream if not upstream.differs))


def same_under(upstream: Upstream) -> str:
    """The settings under which a loss and its counterpart are the same, in words."""
    given = {"ours": upstream.ours, "theirs": upstream.theirs}
    return "; ".join(f"{who} {in_words(values)}" for who, values in given.items() if values) or "defaults"


def yolo_slots(cls: type[Loss]) -> dict[str, list[str]]:
    """``{slot: [tasks]}`` of the Ultralytics adapter into which a loss goes; its class scores are independent sigmoids.

    Raises:
        ModuleNotFoundError: if Ultralytics is not installed.
    """
    from detloss_plugins.adapters.ultralytics import SLOTS

    try:
        sigmoid = cls.facts.family != "classification" or cls.make(use_sigmoid=True).use_sigmoid
    except (TypeError, ValueError):
        sigmoid = False
    found: dict[str, list[str]] = {}
    for task, slots in SLOTS.items() if sigmoid else ():
        for slot in (slot for slot, families in slots.items() if cls.facts.family in families):
            found.setdefault(slot, []).append(task)
    return found


def body(doc: str | None) -> str:
    """A docstring up to its first section."""
    return re.split(r"^(?:Args|Returns|Raises):$", inspect.cleandoc(doc or ""), maxsplit=1, flags=re.MULTILINE)[
        0
    ].strip()


def arguments(doc: str) -> dict[str, str]:
    """``{argument: what it is}`` of the section ``Args`` of a clean docstring.

    >>> arguments("Sum.\\n\\nArgs:\\n    a, b: two\\n        numbers.\\n\\nReturns:\\n    c: their sum.")
    {'a': 'two numbers.', 'b': 'two numbers.'}
    """
    found: dict[str, str] = {}
    section = re.search(r"^Args:\n((?:    .*\n?|\n(?=    ))*)", doc, re.MULTILINE)
    for entry in re.split(r"^    (?=\S)", section[1] if section else "", flags=re.MULTILINE)[1:]:
        names, _, text = entry.partition(":")
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found
