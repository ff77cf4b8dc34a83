"""Every loss as a class and as a per-element function, one module a family. This is the only list of modules."""

from detloss_plugins.losses.balancing import *  # noqa: F403
from detloss_plugins.losses.box import *  # noqa: F403
from detloss_plugins.losses.classification import *  # noqa: F403
from detloss_plugins.losses.composite import *  # noqa: F403
from detloss_plugins.losses.distribution import *  # noqa: F403
from detloss_plugins.losses.multibox import *  # noqa: F403
from detloss_plugins.losses.ranking import *  # noqa: F403
from detloss_plugins.losses.region import *  # noqa: F403
from detloss_plugins.losses.regression import *  # noqa: F403
from detloss_plugins.losses.rotated import *  # noqa: F403
