"""What differs between the versions of Ultralytics from 8.2.100 on; the rest of the adapter is written for the newest.

Version: what it changed, and what is here for the versions before it.

- 8.3.196: ``unwrap_model`` in place of ``de_parallel``. The old one serves under the new name.
- 8.3.200: validators prepare the objects of an image, masks included, one a row. Ignore regions are refused.
- 8.4.0: criteria have a method ``loss`` beside ``__call__`` and a second ``tal_topk2`` for their assigner; those of all
  tasks take ``tal_topk``. :class:`DetectionCriterion` has both, and hands on what the stock constructor takes.
- 8.4.0: the box criterion is given the image's size and the strides of the anchors. :func:`box_inputs` adds them.
- 8.4.0: heads without bins (``reg_max=1``). Before it the number of bins is always 16, and there is nothing to do.
- 8.4.0: the distances of an oriented box are measured in its own axes, by ``rbox2dist``. :func:`rbox2dist` measures
  them as its version did, without the angle.
- 8.4.0: ``E2ELoss``, which is told the criterion of its branches and weights them by a schedule, in place of
  ``E2EDetectLoss``. :data:`E2ELoss` is either; :func:`end_to_end` makes one.
- 8.4.0: a head predicts a dict of boxes, scores and features, before it the features alone. Nothing here reads them.
- 8.4.33: a run that resumes goes on with the schedule of ``E2ELoss``. Before it the schedule begins anew, with stock
  losses too, and stays so.
- 8.4.37: class weights (``cls_pw``). :func:`class_weights` is None; the argument is refused, and so is the counting of
  objects, for which the trainer has no place.
- 8.4.104: a criterion's items are a dict, before it a tensor. They are handed on as they are.
- 8.4.129: the tuner starts its trainings by a class, which is there since 8.4.76, not by the command line. ``tune`` is
  refused.
- 8.4.140: the trainer is sent to the processes of a multi-GPU launch; before it, each imported it by its name, which a
  class made by ``make_trainer`` has not. More than one device is refused.
"""

import inspect
import os

import torch
from ultralytics import __version__, utils
from ultralytics.data.utils import verify_image_label
from ultralytics.engine import tuner
from ultralytics.utils import DEFAULT_CFG_DICT, ops, tal, torch_utils
from ultralytics.utils import loss as stock
from ultralytics.utils.checks import parse_version

E2ELoss = getattr(stock, "E2ELoss", None) or stock.E2EDetectLoss  # 8.4.0
unwrap_model = getattr(torch_utils, "unwrap_model", None) or torch_utils.de_parallel  # 8.3.196
# 8.4.0
OBJECTS_HAVE_MASK = "mask_gt" in inspect.signature(tal.TaskAlignedAssigner.select_candidates_in_gts).parameters
# How it reads labels; older versions take a file that begins with a byte-order mark for a broken one.
LABELS = "utf-8-sig" if "utf-8-sig" in inspect.getsource(verify_image_label) else "utf-8"
BOXES_HAVE_SIZES = "imgsz" in inspect.signature(stock.BboxLoss.forward).parameters  # 8.4.0
SENDS_TRAINER = parse_version(__version__) >= (8, 4, 140)  # nothing but the version tells
# Feature -> whether this version has it, the version it came with, what it is and what to do without.
FEATURES = {
    "cls_pw": ("cls_pw" in DEFAULT_CFG_DICT, "8.4.37", "Class weights (cls_pw)", "leave cls_pw out"),
    "class_counts": (
        "cls_pw" in DEFAULT_CFG_DICT,
        "8.4.37",
        'Counting objects for class_weight="effective"',
        "give class_counts",
    ),
    "tune": (
        "MultiTrainer" in inspect.getsource(tuner),
        "8.4.129",
        "Tuning with losses of ours",
        "train with each value yourself",
    ),
    "ignore": (parse_version(__version__) >= (8, 3, 200), "8.3.200", "Ignoring classes", "leave ignore out"),
    "devices": (SENDS_TRAINER, "8.4.140", "Training on several GPUs", "train on one device"),
}


class TooOldError(RuntimeError):
    """This version of Ultralytics lacks what is asked for."""


def require(feature):
    """Raise :class:`TooOldError` if this version of Ultralytics lacks a feature of :data:`FEATURES`."""
    there, version, what, instead = FEATURES[feature]
    if not there:
        raise TooOldError(
            f"{what} needs Ultralytics {version} or newer, and this is {__version__}: upgrade, or {instead}."
        )


def check_arguments(arguments):
    """Raise :class:`TooOldError` if training arguments ask for what this version lacks.

    Args:
        arguments: a dict as ``YOLO.train`` hands it to the trainer; those of a worker of a launch have passed before.
    """
    if arguments.get("cls_pw"):
        require("cls_pw")
    if "LOCAL_RANK" not in os.environ and device_count(arguments.get("device")) > 1:
        require("devices")


def probes(trainer):
    """Whether a class of trainer does YOLOE's linear probing; some versions have none, or no common base."""
    return any(base.__name__ in ("YOLOEPETrainer", "YOLOEPESegTrainer") for base in trainer.__mro__)


def rank():
    """The place of this process in a multi-GPU launch, from 0; -1 if it is in none.

    A name of the trainer's module would not do: the trainer is sent to the processes of a launch with the values that
    the names in its methods have where it starts.
    """
    return utils.RANK


def device_count(device):
    """How many devices the ``device`` argument names: a number, a text such as "0,1", a list, or None.

    >>> [device_count(device) for device in (None, 0, "cpu", "0,1", [0, 1, 2])]
    [1, 1, 1, 2, 3]
    """
    if isinstance(device, str):
        device = [name for name in device.split(",") if name.strip()]
    return len(device) if isinstance(device, list | tuple) else 1


class _Before84(stock.v8DetectionLoss):
    """A criterion of before 8.4.0 with the method ``loss`` and with what :func:`box_inputs` needs."""

    def __call__(self, preds, batch):
        return self.loss(preds, batch)

    def loss(self, preds, batch):
        return super().__call__(preds, batch)

    def preprocess(self, targets, batch_size, scale_tensor):
        # The one place where every task's criterion tells the image's size (width, height, width, height) in pixels.
        image_size = scale_tensor[[1, 0]]
        self.bbox_loss.sizes = image_size, anchor_strides(image_size, self.stride)
        return super().preprocess(targets, batch_size, scale_tensor)


class DetectionCriterion(stock.v8DetectionLoss if hasattr(stock.v8DetectionLoss, "loss") else _Before84):
    """``v8DetectionLoss`` with the constructor and methods of now; in a subclass it may stand before another task's.

    Args:
        model: as in the stock class.
        tal_topk, tal_topk2: as in the stock class; ignored where the version's has none.
    """

    def __init__(self, model, tal_topk=10, tal_topk2=None):
        takes = inspect.signature(super().__init__).parameters
        given = {"tal_topk": tal_topk, "tal_topk2": tal_topk2}
        super().__init__(model, **{name: value for name, value in given.items() if name in takes})


def anchor_strides(image_size, strides):
    """The stride of every anchor ``(A, 1)`` of an image of ``(height, width)`` pixels, level after level."""
    height, width = image_size.tolist()
    counts = [round(height / stride) * round(width / stride) for stride in strides.tolist()]
    counts = torch.tensor(counts, device=image_size.device)
    return strides.to(image_size).repeat_interleave(counts).unsqueeze(-1)


def box_inputs(criterion, inputs):
    """The inputs of a box criterion's ``forward``, the last the image's ``(height, width)`` and strides ``(A, 1)``."""
    return inputs if BOXES_HAVE_SIZES else (*inputs, *criterion.sizes)


def share_sizes(criterion, other):
    """Have ``other`` know the sizes that a box criterion was told of its batch; see :func:`box_inputs`."""
    if not BOXES_HAVE_SIZES:
        other.sizes = criterion.sizes


def rbox2dist(boxes, anchors, largest=None):
    """Distances ``(..., 4)`` of the sides of oriented boxes ``(..., 5)`` from the anchor points, up to ``largest``."""
    if hasattr(tal, "rbox2dist"):
        return tal.rbox2dist(boxes[..., :4], anchors, boxes[..., 4:], reg_max=largest)
    return tal.bbox2dist(anchors, ops.xywh2xyxy(boxes[..., :4]), largest)


def box_aps(metrics):
    """AP50 and AP of boxes in what ``YOLO.train`` returns: metrics or, after a launch on several devices, a dict."""
    found = metrics if isinstance(metrics, dict) else metrics.results_dict
    return float(found["metrics/mAP50(B)"]), float(found["metrics/mAP50-95(B)"])


def class_weights(criterion):
    """The weights ``(1, 1, C)`` that a criterion gives its classes, or None."""
    return getattr(criterion, "class_weights", None)


def named(criterion, items):
    """What a criterion gives beside its loss: its parts by name, before 8.4.104 the tensor."""
    names = getattr(criterion, "loss_names", None)  # of some tasks more than the detection part has
    return items if names is None else dict(zip(names, items, strict=False))


def end_to_end(model, make):
    """An end-to-end criterion whose branches ``make(model, tal_topk=...)`` makes."""
    if "loss_fn" in inspect.signature(E2ELoss).parameters:
        return E2ELoss(model, make)
    criterion = E2ELoss(model)
    for name in ("one2many", "one2one"):
        setattr(criterion, name, make(model, tal_topk=getattr(criterion, name).assigner.topk))
    return criterion
