"""The IoUs of matched boxes for our losses in MMDetection's DETR-type heads.

Those heads hand the IoU to instances of mmdet's own ``QualityFocalLoss`` only, and class labels to any other loss. So a
loss of ours whose target is a quality is, to ``isinstance``, one of those too as soon as mmdet's losses are loaded. Its
type stays what it is, and nothing of mmdet's is changed. This module imports neither framework.
"""

import sys

from detloss_plugins.loss import Loss


def seen_as(loss: Loss) -> type:
    """The class that ``isinstance`` is told beside the type of a loss."""
    theirs = getattr(sys.modules.get("mmdet.models.losses"), "QualityFocalLoss", None)
    return theirs if theirs is not None and loss.facts.takes_quality else type(loss)


Loss.seen_as = staticmethod(seen_as)
