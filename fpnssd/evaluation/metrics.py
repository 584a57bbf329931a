"""Average precision under three protocols from one set of detections, by name.

VOC2007 (11 points) and VOC2010+ (area under the monotone curve) follow the devkit: IoU >= threshold; a detection
belongs to the object it overlaps most; difficult objects count neither as found nor as missed; equal scores keep the
order of the data list. COCO's numbers are faster-coco-eval's, which agree with pycocotools.
"""

import contextlib
import gc
import io
from dataclasses import dataclass

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster

DIFFICULT_AREA = 1e11  # beyond every area range of COCO: ignored, with ordinary IoU
COCO_NAMES = (
    "coco_ap", "coco_ap50", "coco_ap75", "coco_ap_small", "coco_ap_medium", "coco_ap_large",
    "coco_ar1", "coco_ar10", "coco_ar100", "coco_ar_small", "coco_ar_medium", "coco_ar_large",
)  # fmt: skip
MOST_PAIRS = 2_000_000  # of a detection and an object that are compared at a time


def compute_metrics(data_list, detections, voc_overlaps=(0.5,), min_scores=()):
    """All protocols. detections: one dict (boxes, scores, labels; tensors) an image, in the data list's order.

    Returns numbers in 0..1 by name (voc2007_ap50 is at IoU 0.5; voc_overlaps says at which VOC is scored) and
    per_class, a dict of such dicts; None where there is nothing to score against (a class without objects, a size that
    no object has). Means are over classes that have objects. at_scores: at_score for each of min_scores, over all
    classes; in per_class of one.
    """
    return score(data_list, rank(data_list, detections), voc_overlaps, min_scores)


def score(data_list, ranked, voc_overlaps=(0.5,), min_scores=()):
    """compute_metrics for detections that are ranked already."""
    coco, coco_per_class = coco_metrics(data_list, ranked)
    statuses = {min_overlap: match_voc(data_list, ranked, min_overlap) for min_overlap in {0.5, *voc_overlaps}}
    per_class = {}
    for label, name in enumerate(data_list.classes, start=1):
        of_class, rows = data_list.labels == label, ranked.of(label)
        num_objects = int((of_class & data_list.counted).sum())
        voc = {}
        for min_overlap in voc_overlaps:
            is_true = is_true_of(statuses[min_overlap][rows])
            voc[voc_name(2007, min_overlap)] = voc2007_ap(is_true, num_objects)
            voc[voc_name(2010, min_overlap)] = voc2010_ap(is_true, num_objects)
        per_class[name] = {
            "objects": num_objects,
            "difficult": int(of_class.sum()) - num_objects,
            "detections": rows.stop - rows.start,
            "at_scores": [at_score(ranked.scores[rows], statuses[0.5][rows], num_objects, m) for m in min_scores],
            **voc,
            **coco_per_class[name],
        }
    names = [voc_name(year, min_overlap) for min_overlap in voc_overlaps for year in (2007, 2010)]
    of_all = (ranked.scores, statuses[0.5], int(data_list.counted.sum()))
    return {
        **{name: mean_of_known(row[name] for row in per_class.values()) for name in names},
        **coco,
        "best_f1": best_f1(*of_all),
        "at_scores": [at_score(*of_all, m) for m in min_scores],
        "images": len(data_list),
        "objects": sum(row["objects"] for row in per_class.values()),
        "per_class": per_class,
    }


def voc_name(year, min_overlap):
    """2007, 0.5 -> "voc2007_ap50"."""
    return f"voc{year}_ap{100 * min_overlap:g}"


def mean_of_known(values):
    """The mean of those that are not None; None if all are."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


# ---------------------------------------------------------------------------------------------------------------------
# All detections of a list as arrays


@dataclass
class Ranked:
    """All detections, label after label, best first; of equal scores the one that the data list has earlier."""

    images: np.ndarray  # (n,) rows of the data list
    labels: np.ndarray  # (n,)
    scores: np.ndarray  # (n,) float64
    boxes: np.ndarray  # (n, 4), as precise as they came
    objects: np.ndarray  # (n,) row of the object of its class and image that it overlaps most, -1 where there is none
    overlaps: np.ndarray  # (n,) IoU with that object
    first: np.ndarray  # (C + 2,): detections of a label are first[label]:first[label + 1]

    def __len__(self):
        return len(self.scores)

    def of(self, label):
        """The rows of a label, as a slice."""
        return slice(int(self.first[label]), int(self.first[label + 1]))


def rank(data_list, detections):
    """One dict (boxes, scores, labels; tensors) an image -> Ranked."""
    if len(detections) != len(data_list):
        raise ValueError(f"{len(detections)} sets of detections for {len(data_list)} images of {data_list.path}")
    parts = {
        "boxes": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0, dtype=torch.long),
    }
    gathered = {name: torch.cat([empty, *(d[name] for d in detections)]).numpy() for name, empty in parts.items()}
    images = np.repeat(np.arange(len(detections)), [len(d["scores"]) for d in detections])
    # First by label, images still in order, so that what is looked up lies close together; then by score in each label.
    order = np.argsort(gathered["labels"].astype(np.uint16), kind="stable")
    images, labels = images[order], gathered["labels"][order]
    scores, boxes = gathered["scores"][order].astype(np.float64), gathered["boxes"][order]
    objects, overlaps = best_objects(data_list, images, labels, boxes)
    first = np.searchsorted(labels, np.arange(len(data_list.classes) + 2))
    by_score = np.concatenate(
        [begin + np.argsort(-scores[begin:end], kind="stable") for begin, end in zip([0, *first], first, strict=False)]
    )
    arrays = (array[by_score] for array in (images, labels, scores, boxes, objects, overlaps))
    return Ranked(*arrays, first)


def best_objects(data_list, images, labels, boxes, of_other_classes=False):
    """For each of n detections the row of the object of its image and class that it overlaps most, and the IoU.

    The first of equals, as the devkit; -1 and 0 where there is no such object. of_other_classes: of its image and any
    class but its own.
    """
    num_labels = len(data_list.classes) + 1
    object_keys, keys = data_list.object_images, images
    if not of_other_classes:
        object_keys, keys = object_keys * num_labels + data_list.labels, keys * num_labels + labels
    rows = np.argsort(object_keys, kind="stable")
    starts = np.searchsorted(object_keys[rows], keys, side="left")
    counts = np.searchsorted(object_keys[rows], keys, side="right") - starts
    best, overlaps = np.full(len(boxes), -1), np.zeros(len(boxes))
    # Blocks of detections, so that memory does not grow with the number of pairs.
    block = np.cumsum(counts) // MOST_PAIRS
    for which in np.split(np.flatnonzero(counts), np.flatnonzero(np.diff(block[counts > 0])) + 1):
        if len(which) == 0:
            continue
        ends = np.cumsum(counts[which])
        begins = ends - counts[which]
        place = np.repeat(np.arange(len(which)), counts[which])  # (pairs,): which detection
        candidates = rows[np.repeat(starts[which], counts[which]) + np.arange(ends[-1]) - begins[place]]
        pair_overlaps = overlap_pairs(
            boxes[which[place]].astype(np.float64), data_list.boxes[candidates].astype(np.float64)
        )
        if of_other_classes:
            pair_overlaps[data_list.labels[candidates] == labels[which[place]]] = -1
        highest = np.maximum.reduceat(pair_overlaps, begins)
        winners = np.flatnonzero(pair_overlaps == highest[place])[::-1]
        first_winner = np.empty(len(which), dtype=int)
        first_winner[place[winners]] = winners  # the last one written is the first of equals
        there = highest >= 0
        best[which[there]], overlaps[which[there]] = candidates[first_winner[there]], highest[there]
    return best, overlaps


def overlap_pairs(a, b):
    """IoU (n,) of boxes a (n, 4) and b (n, 4), row by row."""
    width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    areas = [(c[:, 2] - c[:, 0]) * (c[:, 3] - c[:, 1]) for c in (a, b)]
    return shared / (areas[0] + areas[1] - shared)


# ---------------------------------------------------------------------------------------------------------------------
# VOC


def match_voc(data_list, ranked, min_overlap=0.5):
    """(n,) int8 for Ranked detections: 1 right, 0 wrong, -1 ignored: on a difficult object or a crowd."""
    claims = np.where(ranked.overlaps >= min_overlap, ranked.objects, -1)
    ignored = np.append(~data_list.counted, False)[claims]  # -1 is the one appended
    # The best detection of an object finds it; later ones are false.
    objects, first_claim = np.unique(claims, return_index=True)
    result = np.zeros(len(claims), dtype=np.int8)
    result[first_claim[objects >= 0]] = 1
    result[ignored] = -1
    return result


def is_true_of(status):
    """Bool, without the ignored ones."""
    return status[status >= 0] == 1


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


def best_f1(scores, status, num_objects):
    """at_score where F1 is highest, of equals the highest min_score; None if no detection or no object counts."""
    counted = status >= 0
    order = np.argsort(-scores[counted], kind="stable")
    scores, is_true = scores[counted][order], is_true_of(status)[order]
    if num_objects == 0 or len(scores) == 0:
        return None
    true_so_far, _ = precision_curve(is_true)
    f1 = 2 * true_so_far / (np.arange(1, len(scores) + 1) + num_objects)
    cuts = np.flatnonzero(np.append(scores[1:] < scores[:-1], True))  # equal scores are shown together
    best = scores[cuts[np.argmax(f1[cuts])]]
    return at_score(scores, is_true, num_objects, float(np.nextafter(np.float32(best), np.float32(0))))


def at_score(scores, status, num_objects, min_score):
    """What who looks at detections sees of those that score more than min_score, as decoding shows them.

    scores (n,) and status (n,) as of match_voc, in any order. Returns a dict of min_score, f1 (2 x right / (shown +
    objects)), precision (right / shown), recall (right / objects); None for what would divide by 0.
    """
    above = scores.astype(np.float32) > np.float32(min_score)  # as decoding compares
    shown = status[above & (status >= 0)]
    right = int((shown == 1).sum())

    def share(part, whole):
        return part / whole if whole else None

    return {
        "min_score": min_score,
        "f1": share(2 * right, len(shown) + num_objects),
        "precision": share(right, len(shown)),
        "recall": share(right, num_objects),
    }


# ---------------------------------------------------------------------------------------------------------------------
# COCO


def coco_metrics(data_list, ranked):
    """COCO's twelve numbers by name, and ap, ap50 by class."""
    per_class_none = {name: {"coco_ap": None, "coco_ap50": None} for name in data_list.classes}
    if len(ranked) == 0:  # the reference raises here; the numbers are known without it
        return _without_detections(data_list, per_class_none)
    truth = _coco_truth(data_list)
    with contextlib.redirect_stdout(io.StringIO()), _no_garbage_collection():
        results = _coco_results(ranked)
        evaluation = COCOeval_faster(truth, truth.loadRes(results), iouType="bbox")
        evaluation.run()
    numbers = {name: _or_none(value) for name, value in zip(COCO_NAMES, evaluation.stats[:12], strict=True)}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (10 IoUs, 101 recalls, C): all areas, 100 detections
    per_class = {
        name: {"coco_ap": _or_none(precision[..., k].mean()), "coco_ap50": _or_none(precision[0, :, k].mean())}
        for k, name in enumerate(data_list.classes)
    }
    return numbers, per_class


@contextlib.contextmanager
def _no_garbage_collection():
    """While a million dicts are made, each pass over all of them costs more than they do."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _or_none(value):
    return None if value < 0 else float(value)  # COCO writes -1 for "nothing to score against"


def _without_detections(data_list, per_class):
    counted, areas = data_list.counted, data_list.object_areas
    ranges = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
    any_of = {size: (counted & (areas >= low) & (areas <= high)).any() for size, (low, high) in ranges.items()}
    numbers = {name: 0.0 if any_of.get(name.split("_")[-1], counted.any()) else None for name in COCO_NAMES}
    for label, name in enumerate(data_list.classes, start=1):
        if (counted & (data_list.labels == label)).any():
            per_class[name] = {"coco_ap": 0.0, "coco_ap50": 0.0}
    return numbers, per_class


def _coco_truth(data_list):
    image_rows, areas = data_list.object_images, data_list.object_areas
    sides = data_list.boxes[:, 2:] - data_list.boxes[:, :2]
    annotations = [
        {
            "id": row + 1,
            "image_id": int(image_rows[row]) + 1,
            "category_id": int(data_list.labels[row]),
            "bbox": [*data_list.boxes[row, :2].tolist(), *sides[row].tolist()],
            # `ignore` would be overwritten by COCO's scoring, and `iscrowd` forgives any box inside.
            "area": DIFFICULT_AREA if data_list.difficult[row] else float(areas[row]),
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


def _coco_results(ranked):
    """COCO's result format, with row + 1 as image id and labels as category ids, image after image."""
    order = np.argsort(ranked.images, kind="stable")
    boxes = ranked.boxes[order].astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    rows = zip(
        (ranked.images[order] + 1).tolist(),
        ranked.labels[order].tolist(),
        boxes.tolist(),
        ranked.scores[order].tolist(),
        strict=True,
    )
    no_outline = []  # without one the library makes one of each box
    return [
        {"image_id": image, "category_id": label, "bbox": box, "score": score, "segmentation": no_outline}
        for image, label, box, score in rows
    ]
