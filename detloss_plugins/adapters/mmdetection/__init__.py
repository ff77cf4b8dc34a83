"""MMDetection heads for losses that the stock heads cannot serve, named by their full path, without custom_imports."""

from detloss_plugins.adapters.mmdetection import lite  # noqa: F401  # first: mmdet may need what it stands in for
from detloss_plugins.adapters.mmdetection.curves import LossCurvesHook
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
    "CornerBBoxCoder",
    "LossCurvesHook",
    "NotStockError",
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
    "stock_config",
    "variance_voting",
]
