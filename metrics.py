"""Average precision under three protocols from one set of detections, by name.

VOC2007 (11 points) and VOC2010+ (area under the monotone curve) follow the devkit: IoU >= threshold; a detection
belongs to the object it overlaps most; difficult objects count neither as found nor as missed; equal scores keep the
order of the data list. COCO's numbers are faster-coco-eval's, which agree with pycocotools.
"""

import contextlib
import io

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from torchvision.ops import box_convert, box_iou

DIFFICULT_AREA = 1e11  # beyond every area range of COCO: ignored, with ordinary IoU
COCO_NAMES = (
    "coco_ap", "coco_ap50", "coco_ap75", "coco_ap_small", "coco_ap_medium", "coco_ap_large",
    "coco_ar1", "coco_ar10", "coco_ar100", "coco_ar_small", "coco_ar_medium", "coco_ar_large",
)  # fmt: skip


def compute_metrics(data_list, detections):
    """All protocols. detections: one dict (boxes, scores, labels; tensors) an image, in the data list's order.

    Returns numbers in 0..1 by name and per_class, a dict of such dicts; None where there is nothing to score against
    (a class without objects, a size that no object has). Means are over classes that have objects.
    """
    if len(detections) != len(data_list):
        raise ValueError(f"{len(detections)} sets of detections for {len(data_list)} images of {data_list.path}")
    coco, coco_per_class = coco_metrics(data_list, detections)
    per_class = {}
    for label, name in enumerate(data_list.classes, start=1):
        of_class = data_list.labels == label
        counted = of_class & ~data_list.difficult & ~data_list.crowd
        found, num_detections = match_class(data_list, detections, label, min_overlap=0.5)
        per_class[name] = {
            "objects": int(counted.sum()),
            "difficult": int((of_class & ~counted).sum()),
            "detections": num_detections,
            "voc2007_ap50": voc2007_ap(found, int(counted.sum())),
            "voc2010_ap50": voc2010_ap(found, int(counted.sum())),
            **coco_per_class[name],
        }
    return {
        "voc2007_ap50": _mean(row["voc2007_ap50"] for row in per_class.values()),
        "voc2010_ap50": _mean(row["voc2010_ap50"] for row in per_class.values()),
        **coco,
        "images": len(data_list),
        "objects": sum(row["objects"] for row in per_class.values()),
        "per_class": per_class,
    }


def _mean(values):
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


# ---------------------------------------------------------------------------------------------------------------------
# VOC


def match_class(data_list, detections, label, min_overlap):
    """Which detections of a class are right: (is_true (n,) bool, best first, without ignored ones; number of all)."""
    scores, claims = [], []  # a claim is the row of the object found, or -1 for none, or -2 for one to be ignored
    for image, result in enumerate(detections):
        chosen = result["labels"] == label
        if not chosen.any():
            continue
        rows = np.arange(data_list.first[image], data_list.first[image + 1])
        rows = rows[data_list.labels[rows] == label]
        scores.append(result["scores"][chosen].double().numpy())
        claims.append(_claims(result["boxes"][chosen].double(), data_list, rows, min_overlap))
    if not scores:
        return np.zeros(0, dtype=bool), 0
    scores, claims = np.concatenate(scores), np.concatenate(claims)
    claims = claims[np.argsort(-scores, kind="stable")]
    claims = claims[claims != -2]
    # The best detection of an object finds it; later ones are false.
    is_true = np.zeros(len(claims), dtype=bool)
    objects, first_claim = np.unique(claims, return_index=True)
    is_true[first_claim[objects >= 0]] = True
    return is_true, len(scores)


def _claims(boxes, data_list, rows, min_overlap):
    if len(rows) == 0:
        return np.full(len(boxes), -1)
    objects = boxes.new_tensor(data_list.boxes[rows])
    overlaps = box_iou(boxes, objects).numpy()  # (m, n)
    best = overlaps.argmax(axis=1)  # the first of equals, as the devkit
    claims = rows[best]
    ignored = (data_list.difficult | data_list.crowd)[claims]
    claims = np.where(ignored, -2, claims)
    return np.where(overlaps[np.arange(len(best)), best] >= min_overlap, claims, -1)


def precision_curve(is_true):
    """(true positives so far, precision so far) along detections sorted best first."""
    true_so_far = np.cumsum(is_true)
    return true_so_far, true_so_far / np.arange(1, len(is_true) + 1)


def voc2007_ap(is_true, num_objects):
    """Mean over recalls 0, 0.1 .. 1 of the best precision at that recall or beyond; None without objects."""
    if num_objects == 0:
        return None
    true_so_far, precision = precision_curve(is_true)
    # In whole numbers: 0.1 * t has no exact float, and a recall of just 3 in 10 has to reach the third point.
    reached = [10 * true_so_far >= t * num_objects for t in range(11)]
    return float(np.mean([precision[at].max(initial=0) for at in reached]))


def voc2010_ap(is_true, num_objects):
    """Area under precision made monotone, summed where recall rises; None without objects."""
    if num_objects == 0:
        return None
    _, precision = precision_curve(is_true)
    monotone = np.maximum.accumulate(precision[::-1])[::-1]
    return float(monotone[is_true].sum() / num_objects)


# ---------------------------------------------------------------------------------------------------------------------
# COCO


def coco_metrics(data_list, detections):
    """COCO's twelve numbers by name, and ap, ap50 by class."""
    results = to_coco_results(data_list, detections)
    per_class_none = {name: {"coco_ap": None, "coco_ap50": None} for name in data_list.classes}
    if not results:  # the reference raises here; the numbers are known without it
        return _without_detections(data_list, per_class_none)
    truth = _coco_truth(data_list)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval_faster(truth, truth.loadRes(results), iouType="bbox")
        evaluation.run()
    numbers = {name: _or_none(value) for name, value in zip(COCO_NAMES, evaluation.stats[:12], strict=True)}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (10 IoUs, 101 recalls, C): all areas, 100 detections
    per_class = {
        name: {"coco_ap": _or_none(precision[..., k].mean()), "coco_ap50": _or_none(precision[0, :, k].mean())}
        for k, name in enumerate(data_list.classes)
    }
    return numbers, per_class


def _or_none(value):
    return None if value < 0 else float(value)  # COCO writes -1 for "nothing to score against"


def _without_detections(data_list, per_class):
    counted = ~(data_list.difficult | data_list.crowd)
    sides = data_list.boxes[:, 2:] - data_list.boxes[:, :2]
    areas = sides.prod(axis=1)
    ranges = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
    any_of = {size: (counted & (areas >= low) & (areas <= high)).any() for size, (low, high) in ranges.items()}
    numbers = {name: 0.0 if any_of.get(name.split("_")[-1], counted.any()) else None for name in COCO_NAMES}
    for label, name in enumerate(data_list.classes, start=1):
        if (counted & (data_list.labels == label)).any():
            per_class[name] = {"coco_ap": 0.0, "coco_ap50": 0.0}
    return numbers, per_class


def _coco_truth(data_list):
    image_rows = np.repeat(np.arange(len(data_list)), np.diff(data_list.first))
    sides = data_list.boxes[:, 2:] - data_list.boxes[:, :2]
    annotations = [
        {
            "id": row + 1,
            "image_id": int(image_rows[row]) + 1,
            "category_id": int(data_list.labels[row]),
            "bbox": [*data_list.boxes[row, :2].tolist(), *sides[row].tolist()],
            # `ignore` would be overwritten by COCO's scoring, and `iscrowd` forgives any box inside.
            "area": DIFFICULT_AREA if data_list.difficult[row] else float(sides[row].prod()),
            "iscrowd": int(data_list.crowd[row]),
        }
        for row in range(len(data_list.boxes))
    ]
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": row + 1} for row in range(len(data_list))],
        "annotations": annotations,
        "categories": [{"id": label, "name": name} for label, name in enumerate(data_list.classes, start=1)],
    }
    truth.createIndex()
    return truth


def to_coco_results(data_list, detections):
    """COCO's result format, with row + 1 as image id and labels as category ids."""
    results = []
    for row, result in enumerate(detections):
        boxes = box_convert(result["boxes"].double(), "xyxy", "xywh")
        for box, score, label in zip(boxes.tolist(), result["scores"].tolist(), result["labels"].tolist(), strict=True):
            results.append({"image_id": row + 1, "category_id": label, "bbox": box, "score": score})
    return results
