"""Losses that balance samples or classes by what they have seen: their weights, and their state, carry no gradient.

State is in buffers, so it is in the checkpoint. It changes in training only, counts neither ignored nor NaN samples,
and is averaged over the ranks of a distributed run.
"""

from detloss_plugins.losses.balancing import equalized, ghm, long_tail, slide
from detloss_plugins.losses.balancing.equalized import *  # noqa: F403
from detloss_plugins.losses.balancing.ghm import *  # noqa: F403
from detloss_plugins.losses.balancing.long_tail import *  # noqa: F403
from detloss_plugins.losses.balancing.slide import *  # noqa: F403

__all__: list[str] = []
__all__ += equalized.__all__
__all__ += ghm.__all__
__all__ += long_tail.__all__
__all__ += slide.__all__
