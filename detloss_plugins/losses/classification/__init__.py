"""Classification losses on logits, a module a kind."""

from detloss_plugins.losses.classification import adaptive, cross_entropy, focal, multilabel, quality
from detloss_plugins.losses.classification.adaptive import *  # noqa: F403
from detloss_plugins.losses.classification.cross_entropy import *  # noqa: F403
from detloss_plugins.losses.classification.focal import *  # noqa: F403
from detloss_plugins.losses.classification.multilabel import *  # noqa: F403
from detloss_plugins.losses.classification.quality import *  # noqa: F403

__all__: list[str] = []
__all__ += adaptive.__all__
__all__ += cross_entropy.__all__
__all__ += focal.__all__
__all__ += multilabel.__all__
__all__ += quality.__all__
