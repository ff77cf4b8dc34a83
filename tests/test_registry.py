"""The registry: one name, one class, whatever the default scope is; and every shipped YAML builds."""

from pathlib import Path

import pytest
import yaml
from mmengine.registry import MODELS as ROOT
from mmengine.registry import DefaultScope, Registry

import detloss_plugins.losses
from detloss_plugins import MODELS, build_loss

ANOTHER = Registry("model", parent=ROOT, scope="another")
YAMLS = sorted((Path(__file__).parents[1] / "configs" / "ultralytics").glob("*.yaml"))


def names_of(loss_cls):
    return [name for name, cls in MODELS.module_dict.items() if cls is loss_cls]


def test_class_and_function_are_exported(loss_cls):
    for name in names_of(loss_cls):
        assert getattr(detloss_plugins.losses, name) is loss_cls
    assert getattr(detloss_plugins.losses, loss_cls.fn.__name__) is loss_cls.fn


def test_build_by_name_prefix_and_alias(loss_cls):
    names = names_of(loss_cls)
    for name in (*names, f"detloss_plugins.{names[0]}"):
        assert type(build_loss({"type": name, "loss_weight": 2, **loss_cls.example})) is loss_cls


def test_no_loss_subclasses_a_loss(loss_cls):
    registered = set(MODELS.module_dict.values())
    assert not registered & set(loss_cls.__mro__[1:])


def test_the_scope_prefix_resolves_from_the_root_and_from_another_child(loss_cls):
    cfg = {"type": f"detloss_plugins.{loss_cls.__name__}", **loss_cls.example}
    assert type(ROOT.build(cfg)) is loss_cls
    assert type(ANOTHER.build(cfg)) is loss_cls


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
    assert load_losses(yaml.safe_load(path.read_text()), task) == losses
