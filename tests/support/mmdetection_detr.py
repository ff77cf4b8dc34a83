"""Small detectors of the DETR type."""

import copy

import torch
from mmengine.hub import get_config

from detloss_plugins.losses import (
    EqualizedQualityFocalLoss,
    GeneralizedFocalLoss,
    IABCELoss,
    MALoss,
    QualityFocalLoss,
    SlideLoss,
    VarifocalLoss,
)
from support.mmdetection import CONFIG_DIR, branches, build, shrink, small

DEFORMABLE = CONFIG_DIR / "deformable-detr_r50_16xb2-50e_coco.py"
DINO = CONFIG_DIR / "dino-4scale_r50_8xb2-12e_coco.py"
# mmdet's own configs of two more heads.
MORE = {
    "DETR": "detr/detr_r50_8xb2-150e_coco.py",
    "Conditional DETR": "conditional_detr/conditional-detr_r50_8xb2-50e_coco.py",
}
QUALITY = [QualityFocalLoss, VarifocalLoss, GeneralizedFocalLoss, MALoss, IABCELoss]
WITH_STATE = [EqualizedQualityFocalLoss, SlideLoss]  # of a quality too


def detector(path, **losses):
    """A small one with those losses, whose boxes are not all one."""
    cfg = small(path) if not isinstance(path, str) else shrink(get_config(f"mmdet::{path}"))
    for key, value in losses.items():
        cfg.model.bbox_head[key] = copy.deepcopy(value)
    model = build(cfg)
    for parameter in branches(model):
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def calls(module):
    """The arguments of every call of a loss from now on, in a list that grows."""
    seen = []
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    return seen
