"""What is wrong with the losses of ours in a config of MMDetection, before anything is trained.

What a loss itself can know of the head that takes it, it says when that is built (``detloss_plugins.adapters.heads``).
What only the config's text tells is found here.
"""

import ast
import copy
import difflib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner

from detloss_plugins.loss import Loss
from detloss_plugins.registry import SCOPE, build_loss, loss_class

# Settings that mean the same in every loss.
COMMON = {"type", "loss_weight", "reduction", "use_sigmoid", "class_weight", "eps", "_scope_"}


def our_losses(node: Any, path: str = "") -> Iterator[tuple[str, Mapping]]:
    """``(dotted key, dict)`` of every loss of ours in a nested config, those inside a loss of ours left out."""
    for key, value in _items(node):
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and _is_ours(value.get("type")):
            yield where, value
        else:
            yield from our_losses(value, where)


def build_alone(loss: Mapping) -> Loss:
    """A loss of a config, without the weights of classes that DETRHead makes of two numbers there.

    Its ``class_weight`` is one number, ``bg_cls_weight`` beside it another, and the loss gets one a class.
    """
    of_head = ("class_weight", "bg_cls_weight") if isinstance(loss.get("class_weight"), float) else ()
    return build_loss({key: value for key, value in loss.items() if key not in of_head})


def build_detector(cfg: Config) -> torch.nn.Module:
    """The detector of a config, with new weights; random numbers go on as if nothing had been."""
    scope = cfg.get("default_scope", "mmdet")
    with DefaultScope.overwrite_default_scope(scope), torch.random.fork_rng(devices=[]):
        return MODELS.build(copy.deepcopy(cfg.model))


def check_config(cfg: Config, stock: Config | None = None, overrides: Mapping[str, Any] = {}) -> list[str]:
    """What does not fit in a config, one sentence each; an empty list if all is well.

    Builds the detector once, without weights, to hear what heads and losses say of each other. What trains, and not as
    meant, is a :class:`~detloss_plugins.adapters.heads.MisfitWarning`.

    Args:
        cfg: the config of a training, overrides merged.
        stock: the same before these ``overrides`` (dotted keys).
    """
    of_types = {key.removesuffix(".type"): kind for key, kind in overrides.items() if key.endswith(".type")}
    written = {path: _keys_below(overrides, path) for path, kind in of_types.items() if _is_ours(kind)}
    found = left_over(stock, cfg, written) if stock else []
    found += _left_over_in_file(cfg.filename) if cfg.filename else []
    try:
        for _, loss in our_losses(cfg.model):
            build_alone(loss)  # which knows the nearest name
        build_detector(cfg)
    except (TypeError, ValueError) as error:  # a sentence of ours, or as good
        found.append(str(error))
    except (AssertionError, AttributeError, KeyError) as error:
        found.append(f"The detector cannot be built: {type(error).__name__} {error}".strip())
    return found


def unknown_keys(cfg: Config, overrides: Mapping[str, Any]) -> list[str]:
    """Overrides that change nothing because the config has no such key, one sentence each, with the nearest key; and
    those that put something of another kind in the place of a number or a dict.

    A key may be new where a class is configured (a dict with a type), which knows what it takes, and at the top where
    mmengine's Runner takes it.
    """
    found, known = [], None
    for key, value in overrides.items():
        parent, _, last = key.rpartition(".")
        place = at(cfg, parent) if parent else {**inspect.signature(Runner).parameters, **cfg}
        there = {str(name): old for name, old in _items(place)}
        if last in there:
            if not _alike(there[last], value):
                found.append(f"{key} is {_in_words(there[last])} in the config, and cannot be {value!r}.")
        elif not isinstance(place, Mapping) or not parent or "type" not in place:
            known = known or list(_all_keys(cfg))
            nearest = sorted(known, key=lambda name: -_likeness(key, name))[:3]
            found.append(f"The config has no key {key}; did you mean {', '.join(nearest)}?")
    return found


def _alike(old, new):
    if isinstance(old, Mapping | bool):
        return new is None or isinstance(new, Mapping if isinstance(old, Mapping) else bool)
    return not isinstance(old, int | float) or not isinstance(new, str | bool | Mapping)


def _in_words(value):
    return f"a dict of {', '.join(map(str, value))}" if isinstance(value, Mapping) else repr(value)


def _likeness(key, name):
    """Of a dotted key that somebody wrote to one that there is: whole, or to its end."""
    ends = name.rpartition(".")[2], name
    return max(name.endswith(key), *(difflib.SequenceMatcher(None, key, end).ratio() for end in ends))


def _all_keys(node, path=""):
    for key, value in _items(node):
        yield path + str(key)
        yield from _all_keys(value, f"{path}{key}.")


def left_over(before: Config, after: Config, written: Mapping[str, set[str]]) -> list[str]:
    """Settings of another loss that stay in a loss of ours because only the type was replaced, one sentence a loss.

    Args:
        before, after: the configs of which the second overrides the first.
        written: for the dotted path of each loss whose type the override gives, the keys that it writes there.
    """
    found = []
    for path, keys in written.items():
        old, loss = at(before, path), at(after, path)
        if not isinstance(old, Mapping) or "type" not in old or "_delete_" in keys or _name(old) == _name(loss):
            continue
        kept = {key: value for key, value in loss.items() if key in old and key not in {*keys, *COMMON}}
        if kept:
            settings = ", ".join(f"{key}={value!r}" for key, value in kept.items())
            found.append(
                f"{path}: {_name(loss)} would keep {settings}, which was written for {_name(old)}; give the value that "
                "you want beside the type, or _delete_=True to start from the defaults."
            )
    return found


def _left_over_in_file(filename):
    """The same of a config file that overrides its bases, and of these."""
    source = ast.parse(Path(filename).read_text(encoding="utf-8"))
    assigned = [node for node in source.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    file = {node.targets[0].id: node.value for node in assigned}
    try:
        bases = ast.literal_eval(file["_base_"])
    except (KeyError, ValueError):
        return []
    found, folder = [], Path(filename).resolve().parent
    bases = [bases] if isinstance(bases, str) else bases
    own = [str(folder / base) for base in bases if "::" not in base]  # "package::config" overrides nothing of ours
    for base in own:
        found += _left_over_in_file(base)
    if written := dict(_losses_in(file.get("model"), "model")):
        before = Config.fromstring(f"_base_ = {own + [base for base in bases if '::' in base]!r}", ".py")
        found += left_over(before, Config.fromfile(filename), written)
    return found


def _losses_in(node, path):
    """The path and the keys of every loss of ours that a file's syntax tree lays over that of a base."""
    parts = _parts(node)
    if _is_ours(getattr(parts.get("type"), "value", None)) and "_delete_" not in parts:
        yield path, set(parts)
    for key, part in parts.items():
        yield from _losses_in(part, f"{path}.{key}")


def _parts(node):
    """``{key: node}`` of a dict or list in a syntax tree."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict":
        return {keyword.arg: keyword.value for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {key.value: part for key, part in zip(node.keys, node.values, strict=True) if hasattr(key, "value")}
    return dict(enumerate(node.elts)) if isinstance(node, ast.List | ast.Tuple) else {}


def _keys_below(overrides, path):
    """The keys that dotted overrides write in the dict at ``path``."""
    return {key.removeprefix(f"{path}.").split(".")[0] for key in overrides if key.startswith(f"{path}.")}


def _items(node):
    if isinstance(node, Mapping | Config):
        return node.items()
    return enumerate(node) if isinstance(node, list | tuple) else ()


def at(node: Any, path: str) -> Any:
    """What a nested config has at a dotted path, itself at an empty one; None if there is nothing."""
    for key in filter(None, path.split(".")):
        node = {str(k): value for k, value in _items(node)}.get(key)
    return node


def _is_ours(kind):
    if isinstance(kind, type):
        return issubclass(kind, Loss)
    package, *rest = str(kind).split(".")
    if not rest:
        return False
    if package == SCOPE and len(rest) == 1:  # which may be misspelt
        return True
    try:
        return issubclass(loss_class(kind), Loss)  # by its path, also one that is not of this package
    except (ValueError, ImportError):
        return False


def _name(loss):
    kind = loss["type"]
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]
