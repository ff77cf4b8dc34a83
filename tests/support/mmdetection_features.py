"""What a head is tested on without a body: random features, and objects in two images."""

import torch
from mmdet.structures import DetDataSample
from mmengine.runner import set_random_seed
from mmengine.structures import InstanceData

STRIDES = [8, 16, 32]
CLASSES = 4
# Labels and boxes of each image.
SCENES = {
    "objects": [[(1, (10, 12, 50, 60)), (2, (60, 70, 90, 84))], [(1, (30, 20, 118, 120)), (0, (5, 90, 25, 112))]],
    "one level": [[(3, (40, 40, 57, 57))], []],
    "nothing": [[], []],
}


def samples(scene):
    """Two images with those objects."""
    found = []
    for objects in SCENES[scene]:
        shape = dict(img_shape=(128, 128), pad_shape=(128, 128), batch_input_shape=(128, 128), ori_shape=(128, 128))
        found.append(DetDataSample(metainfo={**shape, "scale_factor": (1.0, 1.0)}))
        boxes = torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([label for label, _ in objects], dtype=torch.long)
        found[-1].gt_instances = InstanceData(bboxes=boxes, labels=labels)
    return found


def features():
    set_random_seed(1)
    return [torch.randn(2, 16, 128 // stride, 128 // stride) for stride in STRIDES]


def grads(model, losses):
    """Gradients of the sum of a loss dict by parameter."""
    model.zero_grad()
    sum(sum(value) if isinstance(value, list) else value for value in losses.values()).backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
