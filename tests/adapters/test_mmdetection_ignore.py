"""What mmdet's heads, with our losses, make of the boxes that a data set says are to be ignored."""

import pytest
import torch
from mmengine.structures import InstanceData
from support.mmdetection import CONFIG_DIR, build, small

SLOW = ["atss_r18_fpn_digits", "retinanet-ap_r18_fpn_digits", "atss-rs_r18_fpn_digits"]
DENSE = ["retinanet_r18_fpn_digits", "gfl_r18_fpn_digits"]
DENSE += [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]
REGION = [20.0, 20, 108, 108]


def gradients(name, threshold):
    """Of the class scores of each anchor ``(A, C)``, the boxes of the anchors, and whether each lies in the region."""
    cfg = small(CONFIG_DIR / f"{name}.py")
    cfg.model.bbox_head.num_classes = 10
    if threshold is not None:
        cfg.model.train_cfg.assigner.ignore_iof_thr = threshold
    model = build(cfg)
    head = model.bbox_head
    with torch.no_grad():
        features = model.extract_feat(torch.rand(2, 3, 128, 128))
        scores, *others = head(features)
    scores = [x.detach().requires_grad_() for x in scores]
    objects = InstanceData(bboxes=torch.tensor([[2.0, 2, 18, 18]]), labels=torch.tensor([3]))
    ignored = InstanceData(bboxes=torch.tensor([REGION]), labels=torch.tensor([5]))
    meta = {"img_shape": (128, 128), "pad_shape": (128, 128), "scale_factor": (1.0, 1.0)}
    found = head.loss_by_feat(scores, *others, [objects] * 2, [meta] * 2, [ignored] * 2)
    loss = sum(sum(x) if isinstance(x, list) else x for key, x in found.items() if "loss" in key)
    found = torch.autograd.grad(loss, scores)
    found = torch.cat([x[0].movedim(0, -1).reshape(-1, head.cls_out_channels) for x in found])
    generator = getattr(head, "atss_prior_generator", head.prior_generator)
    anchors = torch.cat(generator.grid_priors([x.shape[2:] for x in scores], device="cpu"))
    low, high = anchors[:, :2].clamp(min=20), anchors[:, 2:].clamp(max=108)
    inside = (high - low).clamp(min=0).prod(1) / (anchors[:, 2:] - anchors[:, :2]).prod(1)
    return found, inside > 0.5


@pytest.mark.parametrize("name", DENSE)
def test_anchors_in_an_ignored_box_have_no_class_loss_if_the_assigner_is_told(name, mmdet_scope):
    found, inside = gradients(name, 0.5)
    assert inside.any()
    assert not found[inside].any()
    assert found[~inside].any()


@pytest.mark.parametrize(
    ("name", "threshold"),
    [("gfl_r18_fpn_digits", None), pytest.param("vfnet_r50_fpn_1x_coco", 0.5, marks=pytest.mark.slow)],
)
def test_otherwise_they_are_negatives(name, threshold, mmdet_scope):
    """As mmdet's configs have it; and in VFNet, which hands no weights to its class loss."""
    found, inside = gradients(name, threshold)
    assert found[inside].any(1).all()
