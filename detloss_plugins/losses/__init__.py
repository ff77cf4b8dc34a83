"""Every loss as a class and as a per-element function, one module a family. This is the only list of modules.

The list of names is for type checkers and for readers; a test compares it with those of the modules.
"""

# ruff: noqa: F403, F405
from detloss_plugins.losses.balancing.equalized import *
from detloss_plugins.losses.balancing.ghm import *
from detloss_plugins.losses.balancing.long_tail import *
from detloss_plugins.losses.balancing.slide import *
from detloss_plugins.losses.box.distance import *
from detloss_plugins.losses.box.focusing import *
from detloss_plugins.losses.box.iou import *
from detloss_plugins.losses.classification.adaptive import *
from detloss_plugins.losses.classification.cross_entropy import *
from detloss_plugins.losses.classification.focal import *
from detloss_plugins.losses.classification.multilabel import *
from detloss_plugins.losses.classification.quality import *
from detloss_plugins.losses.composite import *
from detloss_plugins.losses.distribution import *
from detloss_plugins.losses.multibox import *
from detloss_plugins.losses.ranking.distributional import *
from detloss_plugins.losses.ranking.error_driven import *
from detloss_plugins.losses.region import *
from detloss_plugins.losses.regression import *
from detloss_plugins.losses.rotated import *

__all__ = [
    "DR_LAMBDA", "GHMC", "GHMR", "ALRPLoss", "APLoss", "AdaptiveThresholdFocalLoss", "AlphaIoULoss",
    "AsymmetricLoss", "BalancedCrossEntropyLoss", "BalancedL1Loss", "BinaryCrossEntropyLoss", "BoundedIoULoss",
    "CIoULoss", "ConfidenceWeightedLoss", "CrossEntropyLoss", "DIoULoss", "DRLoss", "DiceLoss",
    "DistributionDistillationLoss", "DistributionFocalLoss", "EIoULoss", "EQLV2Loss", "EfficientIoULoss",
    "EqualizedFocalLoss", "EqualizedQualityFocalLoss", "ExtendedIoULoss", "FocalEIoULoss", "FocalEfficientIoULoss",
    "FocalLoss", "FocalerIoULoss", "GCDLoss", "GIoULoss", "GWDLoss", "GaussianFocalLoss", "GeneralizedFocalLoss",
    "HuberLoss", "IABCELoss", "InnerIoULoss", "InterpIoULoss", "IoULoss", "JaccardLoss", "JointLoss", "KFIoULoss",
    "KLDLoss", "KLDivLoss", "L1Loss", "MALoss", "MGIoULoss", "MPDIoULoss", "MSELoss", "ModifiedCrossEntropyLoss",
    "MultiBoxLoss", "NWDLoss", "PolyLoss", "PowerfulIoULoss", "ProbIoULoss", "QualityFocalLoss", "RMSELoss",
    "RankSortLoss", "RotatedMGIoULoss", "SIoULoss", "ScaleDynamicIoULoss", "ScheduledLoss", "SeesawLoss",
    "ShapeIoULoss", "SlideLoss", "SmoothL1Loss", "TverskyLoss", "UncertaintyKLLoss", "VarifocalLoss", "WIoULoss",
    "adaptive_threshold_focal_loss", "alpha_iou_loss", "alrp_loss", "ap_loss", "asymmetric_loss",
    "balanced_cross_entropy_loss", "balanced_l1_loss", "bin_counts", "binary_cross_entropy_loss",
    "bounded_iou_loss", "ciou_loss", "confidence_weight", "confidence_weighted_loss", "cross_entropy_loss",
    "dice_loss", "diou_loss", "distribution_distillation_loss", "distribution_focal_loss", "distributional_ranking",
    "dr_loss", "eiou_loss", "eqlv2_loss", "eqlv2_weight", "equalized_focal_loss", "equalized_quality_focal_loss",
    "extended_iou_loss", "fgl_bins", "focal_eiou_loss", "focal_loss", "focaler_iou_loss", "gaussian_focal_loss",
    "gcd_loss", "generalized_focal_loss", "ghmc_loss", "ghmr_loss", "giou_loss", "gwd_loss", "hard_negatives",
    "harmony", "huber_loss", "iabce_loss", "in_turn", "inner_iou_loss", "interp_iou_loss", "iou_loss",
    "jaccard_loss", "joint_loss", "kfiou_loss", "kl_div_loss", "kld_loss", "l1_loss", "ma_loss", "mgiou_loss",
    "mining_ratio", "modified_cross_entropy_loss", "mpdiou_loss", "mse_loss", "multibox_loss", "nwd_loss",
    "poly_loss", "powerful_iou_loss", "probiou_loss", "quality_focal_loss", "rank_sort_errors", "rank_sort_loss",
    "rmse_loss", "rotated_mgiou_loss", "scale_dynamic_iou_loss", "scheduled_loss", "seesaw_loss", "set_progress",
    "shape_iou_loss", "siou_loss", "slide_loss", "slide_weight", "smooth_l1_loss", "tversky_loss",
    "uncertainty_kl_loss", "varifocal_loss", "wiou_loss",
]  # fmt: skip
