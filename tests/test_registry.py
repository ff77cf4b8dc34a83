"""The registry: one name, one class, whatever the default scope is."""

import inspect
import itertools

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS as ROOT
from mmengine.registry import DefaultScope, Registry

import detloss_plugins.losses
from detloss_plugins import MODELS, build_loss

ANOTHER = Registry("model", parent=ROOT, scope="another")


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
    with pytest.raises(ValueError, match=r"'varifocal'.*did you mean VarifocalLoss"):  # whatever the case
        build_loss({"type": "varifocal"})
    with pytest.raises(ValueError, match=r"'ciou'.*did you mean CIoULoss"):
        build_loss({"type": "ciou"})
    for bad in ("CIoULoss", {"loss_weight": 1.0}, None):
        with pytest.raises(TypeError, match="'type'"):
            build_loss(bad)


def test_a_misspelt_loss_in_a_config_of_another_package(monkeypatch):
    """Whoever builds it, the sentence is ours; what is no name of ours is looked up as mmengine does."""
    for build in (ROOT.build, ANOTHER.build, MODELS.build):
        for name in ("CIOULoss", "losses.CIOULoss"):
            with pytest.raises(ValueError, match=rf"no loss named .*{name}'.*did you mean CIoULoss"):
                build({"type": f"detloss_plugins.{name}"})
        with pytest.raises(KeyError, match="is not in"):
            build({"type": "detloss_plugins.heads.CIOULoss"})
        assert type(build({"type": "detloss_plugins.losses.CIoULoss"})).__name__ == "CIoULoss"
    monkeypatch.setitem(ROOT.module_dict, "OfTheRoot", dict)
    assert MODELS.get("OfTheRoot") is dict
    assert MODELS.get("another.CIoULoss") is None
    assert "CIoULoss" in MODELS
    assert "CIOULoss" not in MODELS


LAZY = """
from detloss_plugins.losses import DIoULoss, FocalLoss, InnerIoULoss, JointLoss, MultiBoxLoss, SlideLoss, VarifocalLoss
from detloss_plugins.losses import ConfidenceWeightedLoss, FocalerIoULoss
losses = dict(
    boxes=dict(type=InnerIoULoss, base=dict(type=FocalerIoULoss, base=dict(type=DIoULoss, eps=1e-3))),
    classes=dict(type=JointLoss, losses=[dict(type=FocalLoss), dict(type=VarifocalLoss)]),
    weighted=dict(type=ConfidenceWeightedLoss, base=dict(type=SlideLoss, base=dict(type=FocalLoss))),
    both=dict(type=MultiBoxLoss, loss_cls=dict(type=FocalLoss), loss_bbox=dict(type=DIoULoss)),
)
"""


def test_every_way_to_name_a_class(tmp_path):
    """A lazy config has the classes themselves, its dump their paths, a base of another package a scope beside."""
    source, dump = tmp_path / "lazy.py", tmp_path / "dump.py"
    source.write_text(LAZY, encoding="utf-8")
    Config.fromfile(source).dump(dump)
    assert "type='detloss_plugins.losses.DIoULoss'" in dump.read_text(encoding="utf-8")
    cls = detloss_plugins.losses.DIoULoss
    for path in (source, dump):
        losses = Config.fromfile(path).losses
        for build in (build_loss, ROOT.build, ANOTHER.build):
            boxes, classes, weighted, both = (build(losses[name]) for name in ("boxes", "classes", "weighted", "both"))
            assert type(boxes.base.base) is cls
            assert boxes.base.base.eps == 1e-3
            assert [type(part).__name__ for part in classes.losses] == ["FocalLoss", "VarifocalLoss"]
            assert type(weighted.base.base).__name__ == "FocalLoss"
            assert type(both.loss_bbox) is cls
    defined_in = f"{cls.__module__}.DIoULoss"
    for way in ("DIoULoss", "detloss_plugins.DIoULoss", "detloss_plugins.losses.DIoULoss", defined_in, cls):
        assert type(build_loss({"type": way, "_scope_": "mmdet"})) is cls


def test_the_path_of_something_else_is_refused():
    for other in ("torch.nn.L1Loss", torch.nn.L1Loss, "detloss_plugins.losses.iou_loss", "torch", "no.where", ".", {}):
        with pytest.raises(ValueError, match="There is no loss named"):
            build_loss({"type": other})


def test_a_class_in_a_losses_dict_is_recorded_by_its_path():
    from detloss_plugins.adapters.ultralytics import load_losses

    cls = detloss_plugins.losses.DIoULoss
    (box,) = load_losses({"box": {"type": detloss_plugins.losses.InnerIoULoss, "base": {"type": cls}}}).values()
    assert box["base"] == {"type": f"{cls.__module__}.DIoULoss"}
    assert load_losses(yaml.safe_load(yaml.safe_dump({"box": box}))) == {"box": box}


AS_GIVEN = [np.asarray, lambda value: np.asarray(value)[()], lambda value: torch.from_numpy(np.asarray(value))]


def test_settings_are_plain_python_values_however_they_are_given(loss_cls):
    """So that a loss can be compared, printed, saved and compiled."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(loss_cls).parameters.items()}
    settings = {**defaults, "reduction": "sum", **loss_cls.facts.example}
    for given, (name, value) in itertools.product(AS_GIVEN, settings.items()):
        if not isinstance(value, bool | int | float | tuple):
            continue
        loss = loss_cls.make(**{name: given(value)})
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
