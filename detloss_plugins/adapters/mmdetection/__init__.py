"""MMDetection heads for losses that the stock heads cannot serve, named by their full path, without custom_imports."""

from detloss_plugins.adapters.mmdetection import lite  # noqa: F401  # first: mmdet may need what it stands in for
from detloss_plugins.adapters.mmdetection.counts import ClassCountsHook
from detloss_plugins.adapters.mmdetection.curves import LossCurvesHook
from detloss_plugins.adapters.mmdetection.gathered import GatheredATSSHead, GatheredGFLHead, GatheredRetinaHead
from detloss_plugins.adapters.mmdetection.per_image import PerImageLossHook, image_losses
from detloss_plugins.adapters.mmdetection.pixels import (
    PixelBoxInstBboxHead,
    PixelCenterNetUpdateHead,
    PixelCondInstBboxHead,
    PixelFCOSHead,
    PixelGFLHead,
    PixelLDHead,
    PixelNASFCOSHead,
    PixelRepPointsHead,
    PixelTOODHead,
)
from detloss_plugins.adapters.mmdetection.ranking import RankingATSSHead, RankingRetinaHead
from detloss_plugins.adapters.mmdetection.ssd import PluginSSDHead
from detloss_plugins.adapters.mmdetection.stock import NotStockError, StockConfigHook, stock_config
from detloss_plugins.adapters.mmdetection.uncertainty import (
    CornerBBoxCoder,
    UncertaintyBBoxHead,
    UncertaintyRetinaHead,
    UncertaintyRoIHead,
    variance_voting,
)
from detloss_plugins.adapters.mmdetection.yolo import PluginYOLOV3Head

__all__ = [
    "ClassCountsHook",
    "CornerBBoxCoder",
    "GatheredATSSHead",
    "GatheredGFLHead",
    "GatheredRetinaHead",
    "LossCurvesHook",
    "NotStockError",
    "PerImageLossHook",
    "PixelBoxInstBboxHead",
    "PixelCenterNetUpdateHead",
    "PixelCondInstBboxHead",
    "PixelFCOSHead",
    "PixelGFLHead",
    "PixelLDHead",
    "PixelNASFCOSHead",
    "PixelRepPointsHead",
    "PixelTOODHead",
    "PluginSSDHead",
    "PluginYOLOV3Head",
    "RankingATSSHead",
    "RankingRetinaHead",
    "StockConfigHook",
    "UncertaintyBBoxHead",
    "UncertaintyRetinaHead",
    "UncertaintyRoIHead",
    "image_losses",
    "stock_config",
    "variance_voting",
]
