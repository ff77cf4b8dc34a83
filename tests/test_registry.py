"""The registry: one name, one class, whatever the default scope is; and every shipped YAML builds."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.registry import MODELS as ROOT
from mmengine.registry import DefaultScope, Registry

import detloss_plugins.losses
from detloss_plugins import MODELS, build_loss
from detloss_plugins.registry import registered_losses

ANOTHER = Registry("model", parent=ROOT, scope="another")
YAMLS = sorted((Path(__file__).parents[1] / "configs" / "ultralytics").glob("*.yaml"))


def test_class_and_function_are_exported():
    for name, cls in MODELS.module_dict.items():
        assert getattr(detloss_plugins.losses, name) is cls
        assert getattr(detloss_plugins.losses, cls.fn.__name__) is cls.fn


def test_build_by_name_alias_and_prefix():
    """The prefix resolves from the root and from another child too."""
    for name, cls in MODELS.module_dict.items():
        cfg = {"type": name, "loss_weight": 2, **cls.facts.example}
        assert type(build_loss(cfg)) is cls
        for build in (build_loss, ROOT.build, ANOTHER.build):
            assert type(build({**cfg, "type": f"detloss_plugins.{name}"})) is cls


def test_no_loss_subclasses_a_loss():
    registered = set(MODELS.module_dict.values())
    assert len(registered) > 50
    assert not any(registered & set(cls.__mro__[1:]) for cls in registered)


def test_build_loss_ignores_the_default_scope():
    """Under mmdet's scope ``MODELS.build`` of a bare name gives mmdet's class; ``build_loss`` must not."""
    import mmdet.models  # noqa: F401

    cfg = {"type": "CIoULoss"}
    with DefaultScope.overwrite_default_scope("mmdet"):
        assert type(MODELS.build(cfg)).__module__.startswith("mmdet"), "the trap is there"
        assert type(build_loss(cfg)).__module__.startswith("detloss_plugins")


def test_configuration_is_not_modified():
    cfg = {"type": "CIoULoss", "loss_weight": 2.0}
    build_loss(cfg)
    assert cfg == {"type": "CIoULoss", "loss_weight": 2.0}


def test_errors():
    with pytest.raises(ValueError, match=r"'CIoULos'.*did you mean CIoULoss"):
        build_loss({"type": "CIoULos"})
    for bad in ("CIoULoss", {"loss_weight": 1.0}, None):
        with pytest.raises(TypeError, match="'type'"):
            build_loss(bad)


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_shipped_yaml(path):
    from detloss_plugins.adapters.ultralytics import load_losses

    task = path.stem if path.stem in ("obb", "rtdetr") else "detect"
    losses = load_losses(path, task)
    assert losses
    assert all("loss_weight" in cfg for cfg in losses.values())
    assert load_losses(yaml.safe_load(path.read_text(encoding="utf-8")), task) == losses


AS_GIVEN = {
    "numpy": np.asarray,
    "numpy scalar": lambda value: np.asarray(value)[()],
    "tensor": lambda value: torch.from_numpy(np.asarray(value)),
}


@pytest.mark.parametrize("cls", registered_losses().values(), ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("given", AS_GIVEN)
def test_settings_are_plain_python_values_however_they_are_given(given, cls):
    """So that a loss can be compared, printed, saved and compiled."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    settings = {**defaults, "reduction": "sum", **cls.facts.example}
    for name, value in settings.items():
        if not isinstance(value, bool | int | float | tuple):
            continue
        loss = cls.make(**{name: AS_GIVEN[given](value)})
        kept = loss.compiled if name == "compile" else getattr(loss, name, value)
        parts, expected = (x if isinstance(x, list | tuple) else [x] for x in (kept, value))
        assert list(parts) == list(expected)
        assert {type(part) for part in parts} <= {bool, int, float}, name
        repr(loss)
        loss.blueprint()


def test_a_setting_that_is_changed_later_is_plain_too():
    loss = build_loss({"type": "FocalLoss", "alpha": torch.tensor([0.25, 0.5])})
    assert repr(loss) == "FocalLoss(alpha=[0.25, 0.5])"
    loss.gamma = np.float64(1.5)
    assert type(loss.gamma) is float
