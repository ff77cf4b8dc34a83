"""Every loss as a class and as a per-element function, one module or folder a family, each with its own list."""

# ruff: noqa: F403
from detloss_plugins.losses import composite, distribution, multibox, region, regression, rotated

# isort: split
# In the order in which they are registered.
from detloss_plugins.losses import balancing, box, classification, ranking
from detloss_plugins.losses.balancing import *
from detloss_plugins.losses.box import *
from detloss_plugins.losses.classification import *
from detloss_plugins.losses.composite import *
from detloss_plugins.losses.distribution import *
from detloss_plugins.losses.multibox import *
from detloss_plugins.losses.ranking import *
from detloss_plugins.losses.region import *
from detloss_plugins.losses.regression import *
from detloss_plugins.losses.rotated import *

# In this form type checkers read the names of the modules.
__all__: list[str] = []
__all__ += balancing.__all__
__all__ += box.__all__
__all__ += classification.__all__
__all__ += composite.__all__
__all__ += distribution.__all__
__all__ += multibox.__all__
__all__ += ranking.__all__
__all__ += region.__all__
__all__ += regression.__all__
__all__ += rotated.__all__
