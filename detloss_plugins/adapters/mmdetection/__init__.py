"""MMDetection heads for losses that the stock heads cannot serve, named by their full path, without custom_imports."""

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
from detloss_plugins.adapters.mmdetection.yolo import PluginYOLOV3Head

__all__ = [
    "PixelBoxInstBboxHead",
    "PixelCenterNetUpdateHead",
    "PixelCondInstBboxHead",
    "PixelFCOSHead",
    "PixelGFLHead",
    "PixelLDHead",
    "PixelNASFCOSHead",
    "PixelRepPointsHead",
    "PixelTOODHead",
    "PluginYOLOV3Head",
    "RankingATSSHead",
    "RankingRetinaHead",
]
