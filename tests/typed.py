"""What a type checker knows of the public surface: checked by mypy (see pyproject.toml), never run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import assert_type

from detloss_plugins import build_loss
from detloss_plugins.adapters.mmdetection import PluginSSDHead, PluginYOLOV3Head, RankingATSSHead
from detloss_plugins.adapters.ultralytics import PluginDetectionLoss, load_losses, make_trainer
from detloss_plugins.advice import Advice, advise, describe, read_labels
from detloss_plugins.configs import find, names
from detloss_plugins.facts import Facts, NonNegative
from detloss_plugins.families import BoxLoss
from detloss_plugins.loss import Loss
from detloss_plugins.losses import ALRPLoss, CIoULoss, FocalLoss, KLDivLoss, ciou_loss, focal_loss
from detloss_plugins.testing import check_loss

pred, target = torch.zeros(3, 4), torch.ones(3, 4)
assert_type(ciou_loss(pred, target, eps=1e-6), Tensor)
assert_type(focal_loss(pred, target, gamma=2, alpha=None), Tensor)
ciou_loss(pred, "boxes")  # type: ignore[arg-type]
ciou_loss(pred, target, ep=1e-6)  # type: ignore[call-arg]

module: Loss = CIoULoss(loss_weight=2.0, reduction="sum")
assert_type(module.forward(pred, target, avg_factor=3.0), Tensor)
assert_type(module.facts, Facts)
assert_type(module.settings, dict[str, Any])
assert_type(FocalLoss.make(gamma=1.0), Loss)
for kind in (ALRPLoss, KLDivLoss):
    assert_type(kind().family, str)
build_loss(dict(type="CIoULoss"))(pred, target)


def my_loss(pred: Tensor, target: Tensor, *, scale: NonNegative = 1.0) -> Tensor:
    """A loss of one's own."""
    return scale * (pred - target).abs().sum(-1)


class MyLoss(BoxLoss, fn=my_loss, row_wise=True):
    """And its class."""


check_loss(MyLoss)

assert_type(load_losses({"cls": {"type": "VarifocalLoss"}}), dict[str, Any])
assert_type(make_trainer(Path("losses.yaml"), task="obb", curves=True), type)
make_trainer({}, curves="all")  # type: ignore[arg-type]


def use(criterion: PluginDetectionLoss, heads: tuple[PluginSSDHead, PluginYOLOV3Head, RankingATSSHead]) -> Tensor:
    """The criterion's own methods."""
    return criterion.class_loss(pred, target)


assert_type(find("gfl_r18_fpn_digits"), Path)
assert_type(names("ultralytics"), list[str])
assert_type(advise(describe(read_labels("data.yaml"))), Advice)
