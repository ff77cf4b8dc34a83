"""Classification losses on logits, a module a kind."""

from detloss_plugins.losses.classification import cross_entropy, focal, multilabel
from detloss_plugins.losses.classification.cross_entropy import *  # noqa: F403
from detloss_plugins.losses.classification.focal import *  # noqa: F403
from detloss_plugins.losses.classification.multilabel import *  # noqa: F403

__all__ = [*cross_entropy.__all__, *focal.__all__, *multilabel.__all__]
