"""Every loss as a class and as a per-element function, one module a family. This is the only list of modules."""

# ruff: noqa: F403
from detloss_plugins.losses import composite, distribution, multibox, region, regression, rotated
from detloss_plugins.losses.balancing import equalized, ghm, long_tail, slide
from detloss_plugins.losses.balancing.equalized import *
from detloss_plugins.losses.balancing.ghm import *
from detloss_plugins.losses.balancing.long_tail import *
from detloss_plugins.losses.balancing.slide import *
from detloss_plugins.losses.box import distance, focusing, iou
from detloss_plugins.losses.box.distance import *
from detloss_plugins.losses.box.focusing import *
from detloss_plugins.losses.box.iou import *
from detloss_plugins.losses.classification import adaptive, cross_entropy, focal, multilabel, quality
from detloss_plugins.losses.classification.adaptive import *
from detloss_plugins.losses.classification.cross_entropy import *
from detloss_plugins.losses.classification.focal import *
from detloss_plugins.losses.classification.multilabel import *
from detloss_plugins.losses.classification.quality import *
from detloss_plugins.losses.composite import *
from detloss_plugins.losses.distribution import *
from detloss_plugins.losses.multibox import *
from detloss_plugins.losses.ranking import distributional, error_driven
from detloss_plugins.losses.ranking.distributional import *
from detloss_plugins.losses.ranking.error_driven import *
from detloss_plugins.losses.region import *
from detloss_plugins.losses.regression import *
from detloss_plugins.losses.rotated import *

# In this form type checkers read the names of the modules.
__all__: list[str] = []
__all__ += equalized.__all__
__all__ += ghm.__all__
__all__ += long_tail.__all__
__all__ += slide.__all__
__all__ += distance.__all__
__all__ += focusing.__all__
__all__ += iou.__all__
__all__ += adaptive.__all__
__all__ += cross_entropy.__all__
__all__ += focal.__all__
__all__ += multilabel.__all__
__all__ += quality.__all__
__all__ += composite.__all__
__all__ += distribution.__all__
__all__ += multibox.__all__
__all__ += distributional.__all__
__all__ += error_driven.__all__
__all__ += region.__all__
__all__ += regression.__all__
__all__ += rotated.__all__
