"""The names of the public surface are written out, and each has types. What these are, mypy checks: tests/typed.py."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

from detloss_plugins import losses
from detloss_plugins.registry import MODELS

PUBLIC = {  # and the host that a part needs
    "detloss_plugins": None,
    "detloss_plugins.advice": None,
    "detloss_plugins.configs": None,
    "detloss_plugins.facts": None,
    "detloss_plugins.families": None,
    "detloss_plugins.geometry": None,
    "detloss_plugins.loss": None,
    "detloss_plugins.losses": None,
    "detloss_plugins.reduction": None,
    "detloss_plugins.registry": None,
    "detloss_plugins.study": None,
    "detloss_plugins.testing": None,
    "detloss_plugins.adapters.mmdetection": "mmdet",
    "detloss_plugins.adapters.ultralytics": "ultralytics",
}


def test_the_names_of_all_losses_are_written_out():
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(losses.__path__, f"{losses.__name__}.")
        if not module.ispkg
    ]
    found = {name for module in modules for name in getattr(module, "__all__", ())}
    assert len(modules) > 15
    assert set(losses.__all__) == found
    assert len(losses.__all__) == len(found)
    registered = {name for name, cls in MODELS.module_dict.items() if cls.__module__.startswith(losses.__name__)}
    assert len(registered) > 50
    assert registered <= found
    for name in ("balancing", "box", "classification", "ranking"):
        package = importlib.import_module(f"{losses.__name__}.{name}")
        assert set(package.__all__) == {
            name
            for module in modules
            if module.__name__.startswith(f"{package.__name__}.")
            for name in module_all(module)
        }


def module_all(module):
    """The public names of a module of losses; none of one that has helpers only."""
    return getattr(module, "__all__", ())


def public(module):
    """The functions and classes that a module stands for."""
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
    ]
    return {name: getattr(module, name) for name in names if not name.startswith("_")}


def signatures(name, value):
    """The functions that are called by a public name: itself, or a class's constructor and what it adds to its base."""
    if inspect.isfunction(value):
        yield name, value
    for own, function in vars(value).items() if inspect.isclass(value) else ():
        function = getattr(function, "__func__", getattr(function, "fget", function))
        inherited = any(own in vars(base) for base in value.__mro__[1:])
        if inspect.isfunction(function) and (own == "__init__" or not (own.startswith("_") or inherited)):
            yield f"{name}.{own}", function


def untyped(name, function):
    """The arguments without a type, but for ``**settings``, and "return"."""
    signature = inspect.signature(function)
    found = [
        p.name
        for p in signature.parameters.values()
        if p.annotation is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in ("self", "cls")
    ]
    return found + ["return"] * (signature.return_annotation is signature.empty and not name.endswith("__init__"))


@pytest.mark.parametrize(("module", "host"), PUBLIC.items(), ids=PUBLIC)
def test_the_public_surface_is_typed(module, host):
    if host:
        pytest.importorskip(host)
    names = public(importlib.import_module(module))
    found = {place: untyped(place, f) for name, value in names.items() for place, f in signatures(name, value)}
    assert {place: missing for place, missing in found.items() if missing} == {}


def test_the_package_says_that_it_is_typed():
    assert (Path(losses.__file__).parents[1] / "py.typed").exists()
