"""Losses between axis-aligned boxes ``(x1, y1, x2, y2)``, a module a kind."""

from detloss_plugins.losses.box import distance, focusing, iou
from detloss_plugins.losses.box.distance import *  # noqa: F403
from detloss_plugins.losses.box.focusing import *  # noqa: F403
from detloss_plugins.losses.box.iou import *  # noqa: F403

__all__: list[str] = []
__all__ += distance.__all__
__all__ += focusing.__all__
__all__ += iou.__all__
