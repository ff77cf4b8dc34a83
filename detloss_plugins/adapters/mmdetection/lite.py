"""MMDetection where nothing was compiled: mmcv-lite with torchvision's operators in place of mmcv's.

mmdet imports ``mmcv.ops``, and that the compiled module ``mmcv._ext``, which mmcv-lite lacks. With ``DETLOSS_LITE=1``
in the environment (``detloss train --lite`` sets it) a stand-in takes its place, if this package is imported before
mmdet. It has NMS, soft-NMS, RoI align by averages, deformable convolutions and the sigmoid focal loss; any other
operator says so when it is called.

Operators of ``mmcv._ext`` write into tensors that they are handed: hence arguments such as ``output``.
"""

import importlib
import os
import sys
import types
import warnings
from importlib.machinery import ModuleSpec

import torch
import torch.nn.functional as F
import torchvision

NAME = "mmcv._ext"


class MissingOperatorError(NotImplementedError):
    """An operator was called that only the compiled mmcv has."""


def install():
    """Put the stand-in where ``mmcv._ext`` is looked for, unless the compiled one is there, and warn of either.

    Raises:
        ModuleNotFoundError: if there is no mmcv at all.
    """
    importlib.import_module("mmcv")
    if isinstance(sys.modules.get(NAME), StandIn):
        return
    try:
        importlib.import_module(NAME)
    except ImportError as error:
        sys.modules[NAME] = StandIn()
        why = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
        warnings.warn(
            f"mmcv's operators were not compiled{why}: of them there are those that torchvision has.", stacklevel=2
        )
    else:
        warnings.warn("mmcv's operators are compiled and are used: --lite was not needed.", stacklevel=2)


class StandIn(types.ModuleType):
    """``mmcv._ext`` of the operators below; it seems to have every other one too, as mmcv asks when it is imported."""

    def __init__(self):
        super().__init__(NAME, __doc__)
        self.__spec__ = ModuleSpec(NAME, None)  # without a loader: mmcv and mmengine see that nothing was compiled
        vars(self).update({function.__name__: function for function in OPERATORS})

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_, **__):
            raise _missing(name)

        return missing


def _missing(what):
    return MissingOperatorError(
        f"mmcv's operator {what} is not among those that torchvision stands in for; install the compiled mmcv for it."
    )


def _as_float(number):
    """A number as mmcv's C++ gets it: in single precision, so that an IoU of 0.6 does not exceed a threshold of 0.6."""
    return torch.tensor(number, dtype=torch.float32).item()


def _gradients(function, grad_output, *tensors):
    """The gradients of each tensor, by autograd of what ``function`` makes of them."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        output = function(*tensors)
    return torch.autograd.grad(output, tensors, grad_output)


def nms(boxes, scores, iou_threshold, offset=0):
    """Indices ``(K,)`` of the boxes ``(N, 4)`` that are kept, by score; ``offset`` 1 counts pixels, not lengths."""
    boxes = boxes.float() + boxes.new_tensor([0, 0, offset, offset], dtype=torch.float32)
    return torchvision.ops.nms(boxes, scores.float(), _as_float(iou_threshold))


def softnms(boxes, scores, dets, iou_threshold, sigma, min_score, method, offset=0):
    """Indices ``(K,)`` of the boxes ``(N, 4)`` that are kept; they and their new scores go into ``dets (N, 5)``.

    ``method`` is 0 to drop a box that overlaps a better one, 1 for a score less by the IoU, 2 for a Gaussian of it.
    """
    iou_threshold, sigma, min_score = _as_float(iou_threshold), _as_float(sigma), _as_float(min_score)
    shift = boxes.new_tensor([0, 0, offset, offset])
    left, kept = torch.arange(len(boxes)), []
    scores = scores.clone()
    while len(left):
        first = scores[left].argmax()
        best = left[first]
        dets[len(kept)] = torch.cat([boxes[best], scores[best, None]])
        kept.append(best)
        left = torch.cat([left[:first], left[first + 1 :]])
        iou = torchvision.ops.box_iou(boxes[best, None] + shift, boxes[left] + shift)[0]
        if method == 2:
            factor = torch.exp(-iou.square() / sigma)
        else:
            factor = torch.where(iou >= iou_threshold, 1 - iou if method == 1 else 0.0, 1.0)
        scores[left] *= factor
        left = left[scores[left] >= min_score]
    return torch.stack(kept) if kept else left


def _pooled(features, rois, aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned):
    """``(K, C, aligned_height, aligned_width)``: means over the cells of the boxes ``rois (K, 5)``."""
    if pool_mode == 0:
        raise _missing("roi_align with pool_mode='max'")
    size = (aligned_height, aligned_width)
    return torchvision.ops.roi_align(
        features, rois.to(features.dtype), size, spatial_scale, max(sampling_ratio, 0), aligned
    )


def roi_align_forward(features, rois, output, argmax_y, argmax_x, **settings):
    """Write the means over the cells of the boxes ``rois (K, 5)`` of ``features (N, C, H, W)`` into ``output``."""
    output.copy_(_pooled(features, rois, **settings))


def roi_align_backward(grad_output, rois, argmax_y, argmax_x, grad_input, **settings):
    """Write the gradient of the features into ``grad_input (N, C, H, W)``."""
    features = torch.zeros_like(grad_input)  # whatever they are: means are linear
    (gradient,) = _gradients(lambda features: _pooled(features, rois, **settings), grad_output, features)
    grad_input.copy_(gradient)


def _focal(logits, labels, weight, gamma, alpha):
    """``(N, C)``: the focal loss of each logit; a label of C is the background, a weight belongs to a label."""
    target = F.one_hot(labels, logits.shape[1] + 1)[:, :-1].to(logits)
    loss = torchvision.ops.sigmoid_focal_loss(logits, target, alpha, gamma)
    return loss * weight[labels, None] if len(weight) else loss


def sigmoid_focal_loss_forward(logits, labels, weight, output, gamma, alpha):
    """Write the focal loss of logits ``(N, C)`` and labels ``(N,)`` into ``output (N, C)``."""
    output.copy_(_focal(logits, labels, weight, gamma, alpha))


def sigmoid_focal_loss_backward(logits, labels, weight, grad_input, gamma, alpha):
    """Write the gradient of each logit's own loss into ``grad_input (N, C)``."""
    ones = torch.ones_like(logits)
    (gradient,) = _gradients(lambda logits: _focal(logits, labels, weight, gamma, alpha), ones, logits)
    grad_input.copy_(gradient)


def _convolution(stride, padding, dilation):
    """torchvision's deformable convolution of features, offsets, weight, mask and bias; the shapes tell the groups."""

    def convolve(features, offset, weight, mask=None, bias=None):
        return torchvision.ops.deform_conv2d(features, offset, weight, bias, stride, padding, dilation, mask)

    return convolve


def _plain(dH, dW, padH, padW, dilationH, dilationW, **_):
    return _convolution((dH, dW), (padH, padW), (dilationH, dilationW))


def _modulated(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, **_):
    return _convolution((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w))


def deform_conv_forward(features, weight, offset, output, columns, ones, **settings):
    """Write the deformable convolution of ``features (N, C, H, W)`` into ``output``."""
    output.copy_(_plain(**settings)(features, offset, weight))


def deform_conv_backward_input(features, offset, grad_output, grad_input, grad_offset, weight, columns, **settings):
    """Write the gradients of the features and of the offsets."""
    convolve = _plain(**settings)
    gradients = _gradients(lambda x, offset: convolve(x, offset, weight), grad_output, features, offset)
    grad_input.copy_(gradients[0])
    grad_offset.copy_(gradients[1])


def deform_conv_backward_parameters(features, offset, grad_output, grad_weight, columns, ones, scale, **settings):
    """Write ``scale`` times the gradient of the weight."""
    convolve = _plain(**settings)
    weight = torch.zeros_like(grad_weight)  # whatever it is: a convolution is linear
    (gradient,) = _gradients(lambda weight: convolve(features, offset, weight), grad_output, weight)
    grad_weight.copy_(scale * gradient)


def modulated_deform_conv_forward(features, weight, bias, ones, offset, mask, output, columns, with_bias, **settings):
    """Write the deformable convolution of ``features (N, C, H, W)`` with a mask into ``output``."""
    output.copy_(_modulated(**settings)(features, offset, weight, mask, bias if with_bias else None))


def modulated_deform_conv_backward(
    features,
    weight,
    bias,
    ones,
    offset,
    mask,
    columns,
    grad_input,
    grad_weight,
    grad_bias,
    grad_offset,
    grad_mask,
    grad_output,
    with_bias,
    **settings,
):
    """Write the gradients of all that goes into it, of the bias only if there is one."""
    tensors, written = [features, offset, weight, mask], [grad_input, grad_offset, grad_weight, grad_mask]
    if with_bias:
        tensors, written = [*tensors, bias], [*written, grad_bias]
    for gradient, place in zip(_gradients(_modulated(**settings), grad_output, *tensors), written, strict=True):
        place.copy_(gradient)


def get_compiler_version():
    """What mmcv says in its description of the environment."""
    return "none"


def get_compiling_cuda_version():
    """What mmcv says in its description of the environment."""
    return "not available"


OPERATORS = (
    nms,
    softnms,
    roi_align_forward,
    roi_align_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
    deform_conv_forward,
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    modulated_deform_conv_forward,
    modulated_deform_conv_backward,
    get_compiler_version,
    get_compiling_cuda_version,
)

if os.environ.get("DETLOSS_LITE") == "1":
    install()
