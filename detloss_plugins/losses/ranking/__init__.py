"""Losses on the order of the scores of a whole batch."""

from detloss_plugins.losses.ranking import distributional, error_driven
from detloss_plugins.losses.ranking.distributional import *  # noqa: F403
from detloss_plugins.losses.ranking.error_driven import *  # noqa: F403

__all__: list[str] = []
__all__ += distributional.__all__
__all__ += error_driven.__all__
