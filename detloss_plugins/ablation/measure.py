"""What is measured of a trained detector beside its AP: by size, and how far its scores can be believed."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHOWN = 0.05  # detections with a lower score do not count in the calibration error
BINS = 10
COCO_AREAS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # in pixels of the image
# Arguments of a training that its validation has too.
OF_VALIDATION = ("imgsz", "batch", "device", "single_cls", "classes", "split", "workers", "iou", "conf", "max_det")
OF_VALIDATION += ("agnostic_nms", "rect")
THIRDS = ("first_third", "second_third", "last_third")


def calibration_error(scores: np.ndarray, correct: np.ndarray) -> float | None:
    """The expected calibration error: the mean distance of score and share of correct detections, over BINS of score.

    The bins have equal width; each counts with its share of the detections.

    Args:
        scores: ``(n,)``, 0 to 1.
        correct: ``(n,)``, 0 or 1.

    Returns:
        0 to 1, or None without detections.

    >>> calibration_error(np.array([0.75, 0.85, 0.85]), np.array([1, 1, 0]))  # 1/3 x 0.25 + 2/3 x 0.35
    0.31667
    """
    if not len(scores):
        return None
    number = np.minimum((scores * BINS).astype(int), BINS - 1)
    gaps = [abs(scores[number == b].sum() - correct[number == b].sum()) for b in range(BINS)]
    return round(float(sum(gaps) / len(scores)), 5)


def thirds(areas: np.ndarray) -> list[tuple[float, float]]:
    """The ranges of area that part the objects in three of the same number, as near as can be.

    >>> thirds(np.array([1.0, 4, 9, 16, 25, 36]))
    [(0.0, 6.5), (6.5, 20.5), (20.5, 10000000000.0)]
    """
    ordered = np.sort(areas.astype(float))

    def cut(k):
        return float(ordered[k - 1] + ordered[k]) / 2 if k else 0.0

    edges = [0.0, cut(len(areas) // 3), cut(2 * len(areas) // 3), 1e10]
    return list(itertools.pairwise(edges))


def coco_of(truth: np.ndarray, images: int, classes: int):
    """pycocotools' form of objects ``(n, 6)``: image, class, x, y, width, height."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(images)],
        "categories": [{"id": number} for number in range(classes)],
        "annotations": [
            {"id": i, "image_id": int(image), "category_id": int(c), "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for i, (image, c, *box) in enumerate(truth.tolist(), 1)
        ],
    }
    coco.createIndex()
    return coco


def evaluate(truth: np.ndarray, found: np.ndarray, images: int, classes: int) -> dict[str, Any]:
    """AP by size and the calibration error, by pycocotools, of up to 300 detections of a class in an image.

    Args:
        truth: objects ``(n, 6)``: image, class, x, y, width, height in pixels of the image.
        found: detections ``(m, 7)``: image, x, y, width, height, score, class.
        images, classes: how many there are.

    Returns:
        ``AP50``, ``AP``, ``AP75``, ``AP_small``, ..., ``AP_last_third`` and ``calibration_error``, None where the
        data set has no objects; ``per_class``, the AP of each class by its number as text.
    """
    return evaluate_coco(coco_of(truth, images, classes), found, most=300)


def evaluate_coco(coco: Any, found: Any, most: int) -> dict[str, Any]:
    """As :func:`evaluate`, of a ``COCO`` of pycocotools or the path of its file; ``found`` may also be a list of
    dicts, as COCO has detections, of which the ``most`` of an image and class count. The classes have their names."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = coco if isinstance(coco, COCO) else COCO(coco)
    objects = [a for a in coco.dataset["annotations"] if not a.get("iscrowd")]
    ranges = {"all": (0.0, 1e10), **COCO_AREAS}
    ranges.update(zip(THIRDS, thirds(np.array([a["area"] for a in objects])), strict=True))
    categories = sorted(coco.dataset["categories"], key=lambda part: part["id"])
    names = {part["id"]: str(part.get("name", part["id"])) for part in categories}
    if not len(found):  # pycocotools does not take an empty list
        return without_detections(objects, ranges, names)
    evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [list(r) for r in ranges.values()], list(ranges)
    evaluation.params.maxDets = [most]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]  # thresholds, recalls, classes, areas
    result = {f"AP_{name}": _mean(precision[..., a]) for a, name in enumerate(ranges)}
    result["AP"] = result.pop("AP_all")
    result["AP50"], result["AP75"] = _mean(precision[0, ..., 0]), _mean(precision[5, ..., 0])
    numbers = evaluation.params.catIds
    result["per_class"] = {names[number]: _mean(precision[:, :, c, 0]) for c, number in enumerate(numbers)}
    return {**result, "calibration_error": calibration_error(*matched(evaluation))}


def without_detections(objects, ranges, names):
    """What :func:`evaluate` returns when nothing was detected: 0 where there is something to detect."""
    areas = np.array([a["area"] for a in objects])
    result = {f"AP_{name}": _zero(((areas >= low) & (areas <= high)).any()) for name, (low, high) in ranges.items()}
    result["AP"] = result["AP50"] = result["AP75"] = result.pop("AP_all")
    there = {a["category_id"] for a in objects}
    per_class = {name: _zero(number in there) for number, name in names.items()}
    return {**result, "per_class": per_class, "calibration_error": None}


def _zero(is_there):
    return 0.0 if is_there else None


def _mean(precision):
    """The mean of the precisions of those classes that have objects; None if none has."""
    known = precision[precision > -1]
    return round(float(known.mean()), 5) if len(known) else None


def matched(evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Scores ``(n,)`` of the detections above ``SHOWN``, and whether each is correct: it has an object at an IoU of
    0.5, of its class, that no detection with a higher score has. Those in a crowd are left out, as COCO does."""
    everywhere = list(evaluation.params.areaRng[0])
    own = [image for image in evaluation.evalImgs if image is not None and list(image["aRng"]) == everywhere]
    scores = np.concatenate([np.zeros(0), *(image["dtScores"] for image in own)])
    correct = np.concatenate([np.zeros(0), *(image["dtMatches"][0] > 0 for image in own)])
    ignored = np.concatenate([np.zeros(0, bool), *(image["dtIgnore"][0] for image in own)])
    counted = (scores >= SHOWN) & ~ignored.astype(bool)
    return scores[counted], correct[counted]


def collector(task: str, kept: dict) -> type:
    """A validator class of Ultralytics that puts objects and detections, in pixels of the images, into ``kept``.

    These are lists ``truth`` and ``found`` of rows as :func:`evaluate` takes them, and the number of ``images``.
    """
    from ultralytics.models.rtdetr.val import RTDETRValidator
    from ultralytics.models.yolo.detect import DetectionValidator
    from ultralytics.utils import ops

    kept.update(truth=[], found=[], images=0)
    stretched = task == "rtdetr"  # which has images stretched to a square, in place of padded ones

    def to_image(boxes, batch, number):
        height, width = batch["img"].shape[2:]
        own = batch["ori_shape"][number]
        if stretched:
            return boxes * boxes.new_tensor([own[1] / width, own[0] / height] * 2)
        return ops.scale_boxes((height, width), boxes, own, ratio_pad=batch["ratio_pad"][number])

    class Collecting(RTDETRValidator if stretched else DetectionValidator):
        def update_metrics(self, preds, batch):
            height, width = batch["img"].shape[2:]
            for number, pred in enumerate(preds):
                here = (batch["batch_idx"] == number).cpu()
                boxes = ops.xywh2xyxy(batch["bboxes"].cpu().float()[here]) * torch.tensor([width, height] * 2)
                classes = batch["cls"].cpu().reshape(-1)[here]
                kept["truth"] += rows(kept["images"], classes, to_image(boxes, batch, number))
                boxes, scores, labels = of_prediction(pred)
                kept["found"] += rows(kept["images"], to_image(boxes, batch, number), scores, labels)
                kept["images"] += 1
            super().update_metrics(preds, batch)

    return Collecting


def of_prediction(pred):
    """Boxes, scores and labels of an image, of whichever form this version of Ultralytics gives them."""
    if isinstance(pred, Mapping):
        boxes, scores, labels = (pred[name] for name in ("bboxes", "conf", "cls"))
    else:
        boxes, scores, labels = pred[:, :4], pred[:, 4], pred[:, 5]
    return boxes.detach().cpu().float().clone(), scores.detach().cpu(), labels.detach().cpu()


def rows(image, *columns):
    """Lists of numbers: the image, and each column, in which corners become x, y, width and height."""
    parts = []
    for column in columns:
        values = np.asarray(column, dtype=float)
        if values.ndim == 2:
            values = np.hstack([values[:, :2], values[:, 2:] - values[:, :2]])
        parts.append(values if values.ndim == 2 else values[:, None])
    both = np.hstack(parts)
    return np.hstack([np.full((len(both), 1), image), both]).tolist()


def measure(model: Any, task: str, data: str, args: Mapping, folder: Path) -> tuple[dict, dict]:
    """The metrics and the AP of each class of a trained model, on the validation set.

    AP50, AP, AP75 and those of the classes are Ultralytics' own; those by size and the calibration error are of the
    same detections, by pycocotools.

    Args:
        model: a ``YOLO`` or ``RTDETR``.
        task: "detect" or "rtdetr".
        data: the data YAML.
        args: arguments of the training.
        folder: where Ultralytics makes the folder that it wants for a validation.
    """
    kept = {}
    how = {"project": str(folder.absolute()), "name": "val", "exist_ok": True}
    how |= {"data": data, "plots": False, "verbose": False, "save_json": False}
    how |= {key: args[key] for key in OF_VALIDATION if key in args}
    own = model.val(validator=collector(task, kept), **how).box
    truth, found = (np.array(kept[key], dtype=float).reshape(-1, width) for key, width in (("truth", 6), ("found", 7)))
    names = list(model.names.values())
    result = evaluate(truth, found, kept["images"], len(names))
    result.update(AP50=round(float(own.map50), 5), AP=round(float(own.map), 5), AP75=round(float(own.map75), 5))
    by_class = {str(int(c)): round(float(ap), 5) for c, ap in zip(own.ap_class_index, own.ap, strict=True)}
    per_class = {c: by_class.get(c, None if ap is None else 0.0) for c, ap in result.pop("per_class").items()}
    return result, {str(names[int(c)]): ap for c, ap in per_class.items()}


def measure_on_test(model: Any, task: str, data: str, args: Mapping, folder: Path) -> dict:
    """AP50 and AP on the test set, as ``AP50_test`` and ``AP_test``; nothing if it has no images or no objects."""
    from ultralytics.data.utils import check_det_dataset

    if args.get("split") == "test" or not has_test(check_det_dataset(data)):
        return {}
    metrics, per_class = measure(model, task, data, {**args, "split": "test"}, folder)
    if all(ap is None for ap in per_class.values()):
        return {}
    return {f"{name}_test": metrics[name] for name in ("AP50", "AP")}


def has_test(data: Mapping) -> bool:
    """Whether a data YAML, as Ultralytics reads it, names a test set that is there: many have a line for none."""
    named = data.get("test") or []
    places = [Path(named)] if isinstance(named, str) else [*map(Path, named)]
    return bool(places) and all(place.is_file() or any(place.rglob("*")) for place in places)
