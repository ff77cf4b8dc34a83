"""Detection losses for MMDetection 3.x and Ultralytics YOLO, swapped by one dict.

Importing this needs torch and mmengine only; mmdet and ultralytics are imported by their adapters.
"""

from detloss_plugins import losses  # registers every loss
from detloss_plugins.registry import MODELS, build_loss

__version__ = "0.2.0"
__all__ = ["MODELS", "build_loss", "losses"]

# Of a loss that mmdet asks whether it takes a quality: mmdet itself may be imported before this package or after it.
from detloss_plugins.adapters import detr as _detr  # noqa: F401
from detloss_plugins.adapters import heads as _heads  # noqa: F401
