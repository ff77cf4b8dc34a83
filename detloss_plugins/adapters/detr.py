"""What MMDetection asks our losses by ``isinstance``.

Its DETR-type heads hand the IoUs of matched boxes to instances of mmdet's own ``QualityFocalLoss`` only, and class
labels to any other loss; Dynamic R-CNN moves the ``beta`` of mmdet's own ``SmoothL1Loss`` only. So a loss of ours whose
target is a quality, or that is our smooth L1, is to ``isinstance`` one of those too as soon as mmdet's losses are
loaded. Its type stays what it is, and nothing of mmdet's is changed. This module imports neither framework.
"""

import sys

from detloss_plugins.loss import Loss

_ASKED_FOR = ("QualityFocalLoss", "SmoothL1Loss")


def seen_as(loss: Loss) -> type:
    """The class that ``isinstance`` is told beside the type of a loss."""
    name = "QualityFocalLoss" if loss.facts.takes_quality else type(loss).__name__
    theirs = getattr(sys.modules.get("mmdet.models.losses"), name, None) if name in _ASKED_FOR else None
    return type(loss) if theirs is None else theirs


Loss.seen_as = staticmethod(seen_as)
