"""VOC2007, VOC2010+ and COCO average precision from one set of detections.

VOC2007 (11-point interpolation) and VOC2010+ (area under the interpolated curve) follow the devkit: a detection is
compared with the ground-truth box of its class that it overlaps most, and matches it if their IoU reaches the
threshold; objects marked difficult count neither as found nor as missed; detections of equal score keep the order of
the data list. The twelve COCO metrics are computed by faster-coco-eval, which agrees with pycocotools.
"""

import contextlib
import gc
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster

from fpnssd.data.data_list import DataList
from model import above_score

ImageDetections = dict[str, torch.Tensor]  # of one image: boxes (m, 4) xyxy, scores (m,), labels (m,), best first

DIFFICULT_AREA = 1e11  # beyond every area range of COCO, which ignores such objects but keeps their ordinary IoU
COCO_NAMES = (
    "coco_ap", "coco_ap50", "coco_ap75", "coco_ap_small", "coco_ap_medium", "coco_ap_large",
    "coco_ar1", "coco_ar10", "coco_ar100", "coco_ar_small", "coco_ar_medium", "coco_ar_large",
)  # fmt: skip
MAX_PAIRS = 2_000_000  # of a detection and a ground-truth box in one IoU computation: bounds its memory


def compute_metrics(
    data_list: DataList,
    detections: "Sequence[ImageDetections] | Ranked",
    iou_thresholds: Sequence[float] = (0.5,),
    min_scores: Sequence[float] = (),
) -> dict[str, Any]:
    """All metrics of a set of detections.

    Args:
        data_list: the ground truth.
        detections: one dict per image, in the order of the data list; or rank() of them.
        iou_thresholds: of the VOC metrics.
        min_scores: score thresholds to give precision, recall and F1 at.

    Returns:
        Numbers in 0..1 by name: voc2007_ap50, voc2010_ap50 and the like for other IoU thresholds, COCO_NAMES; means are
        over the classes that have objects, and a number is None where there is no ground truth for it. Besides:
        best_f1 (with missed_classes, which have no true positive) and at_scores (see scores_at) over all classes,
        images, objects, and per_class, a dict by class name of dicts with these numbers and objects, difficult,
        detections.
    """
    ranked = detections if isinstance(detections, Ranked) else rank(data_list, detections)
    coco, coco_per_class = coco_metrics(data_list, ranked)
    statuses = {threshold: match_voc(data_list, ranked, threshold) for threshold in {0.5, *iou_thresholds}}
    per_class = {}
    for label, name in enumerate(data_list.classes, start=1):
        of_class, rows = data_list.labels == label, ranked.of(label)
        num_objects = int((of_class & data_list.counted).sum())
        voc = {}
        for threshold in iou_thresholds:
            is_tp = true_positives(statuses[threshold][rows])
            voc[voc_name(2007, threshold)] = voc2007_ap(is_tp, num_objects)
            voc[voc_name(2010, threshold)] = voc2010_ap(is_tp, num_objects)
        per_class[name] = {
            "objects": num_objects,
            "difficult": int(of_class.sum()) - num_objects,
            "detections": rows.stop - rows.start,
            "at_scores": [scores_at(ranked.scores[rows], statuses[0.5][rows], num_objects, m) for m in min_scores],
            **voc,
            **coco_per_class[name],
        }
    names = [voc_name(year, threshold) for threshold in iou_thresholds for year in (2007, 2010)]
    of_all = (ranked.scores, statuses[0.5], int(data_list.counted.sum()))
    best = best_f1(*of_all)
    if best:
        found = is_above(ranked.scores, best["min_score"]) & (statuses[0.5] == 1)
        best["missed_classes"] = [
            name
            for label, name in enumerate(data_list.classes, start=1)
            if per_class[name]["objects"] and not found[ranked.of(label)].any()
        ]
    return {
        **{name: mean_of_known(row[name] for row in per_class.values()) for name in names},
        **coco,
        "best_f1": best,
        "at_scores": [scores_at(*of_all, min_score) for min_score in min_scores],
        "images": len(data_list),
        "objects": of_all[2],
        "per_class": per_class,
    }


def voc_name(year: int, iou_threshold: float) -> str:
    """2007, 0.5 -> "voc2007_ap50"."""
    return f"voc{year}_ap{100 * iou_threshold:g}"


def percent(value: float | None) -> str:
    """0.4321 -> "43.2", None -> "none"."""
    return "none" if value is None else f"{100 * value:.1f}"


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there is no such value."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# ---------------------------------------------------------------------------------------------------------------------
# All detections of a data list as arrays


@dataclass
class Ranked:
    """The n detections of a data list, label by label, best first; equal scores in the order of the data list."""

    images: np.ndarray  # (n,) rows of the data list
    labels: np.ndarray  # (n,) 1..C
    scores: np.ndarray  # (n,) float64
    boxes: np.ndarray  # (n, 4) xyxy in pixels, in the precision they came in
    objects: np.ndarray  # (n,) the ground-truth box of the same class and image with the highest IoU, -1 if none
    ious: np.ndarray  # (n,) IoU with it
    first: np.ndarray  # (C + 2,): the detections of a label are first[label]:first[label + 1]

    def __len__(self) -> int:
        return len(self.scores)

    def of(self, label: int) -> slice:
        """The rows of a label."""
        return slice(int(self.first[label]), int(self.first[label + 1]))


def rank(data_list: DataList, detections: Sequence[ImageDetections]) -> Ranked:
    """Sorts the detections of all images and finds the ground-truth box that each overlaps most.

    Args:
        data_list: the ground truth.
        detections: one dict per image, in the order of the data list.

    Raises:
        ValueError: if there are more or fewer dicts than images.
    """
    if len(detections) != len(data_list):
        raise ValueError(f"{len(detections)} sets of detections for {len(data_list)} images of {data_list.path}")
    parts = {
        "boxes": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0, dtype=torch.long),
    }
    gathered = {name: torch.cat([empty, *(d[name] for d in detections)]).numpy() for name, empty in parts.items()}
    images = np.repeat(np.arange(len(detections)), [len(d["scores"]) for d in detections])
    # First by label, images still in order, so that the IoUs read memory in order; then by score within each label.
    order = np.argsort(gathered["labels"].astype(np.uint16), kind="stable")
    images, labels = images[order], gathered["labels"][order]
    scores, boxes = gathered["scores"][order].astype(np.float64), gathered["boxes"][order]
    objects, ious = highest_ious(data_list, images, labels, boxes)
    first = np.searchsorted(labels, np.arange(len(data_list.classes) + 2))
    by_score = np.concatenate(
        [begin + np.argsort(-scores[begin:end], kind="stable") for begin, end in zip([0, *first], first, strict=False)]
    )
    images, labels, scores, boxes, objects, ious = (
        array[by_score] for array in (images, labels, scores, boxes, objects, ious)
    )
    return Ranked(images, labels, scores, boxes, objects, ious, first)


def highest_ious(
    data_list: DataList, images: np.ndarray, labels: np.ndarray, boxes: np.ndarray, of_other_classes: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """For each of n detections, the ground-truth box of its image and class with the highest IoU.

    Args:
        data_list: the ground truth.
        images: (n,) rows of the data list.
        labels: (n,) 1..C.
        boxes: (n, 4) xyxy in pixels.
        of_other_classes: compare with the objects of all classes but the detection's own.

    Returns:
        (n,) row of the ground-truth box, the first of equals as in the devkit, -1 if there is none; (n,) the IoU.
    """
    num_labels = len(data_list.classes) + 1
    object_keys, keys = data_list.object_images, images
    if not of_other_classes:
        object_keys, keys = object_keys * num_labels + data_list.labels, keys * num_labels + labels
    rows = np.argsort(object_keys, kind="stable")
    starts = np.searchsorted(object_keys[rows], keys, side="left")
    counts = np.searchsorted(object_keys[rows], keys, side="right") - starts
    best, ious = np.full(len(boxes), -1), np.zeros(len(boxes))
    # In blocks of detections, so that memory does not grow with the number of pairs.
    block = np.cumsum(counts) // MAX_PAIRS
    for which in np.split(np.flatnonzero(counts), np.flatnonzero(np.diff(block[counts > 0])) + 1):
        if len(which) == 0:
            continue
        ends = np.cumsum(counts[which])
        begins = ends - counts[which]
        place = np.repeat(np.arange(len(which)), counts[which])  # (pairs,) index into `which`
        candidates = rows[np.repeat(starts[which], counts[which]) + np.arange(ends[-1]) - begins[place]]
        pair_ious = paired_iou(boxes[which[place]].astype(np.float64), data_list.boxes[candidates].astype(np.float64))
        if of_other_classes:
            pair_ious[data_list.labels[candidates] == labels[which[place]]] = -1
        highest = np.maximum.reduceat(pair_ious, begins)
        winners = np.flatnonzero(pair_ious == highest[place])[::-1]
        first_winner = np.empty(len(which), dtype=int)
        first_winner[place[winners]] = winners  # written in reverse, so the first of equals stays
        known = highest >= 0
        best[which[known]], ious[which[known]] = candidates[first_winner[known]], highest[known]
    return best, ious


def paired_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU (n,) of boxes a (n, 4) and b (n, 4), xyxy, row by row."""
    width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    intersection = np.maximum(width, 0) * np.maximum(height, 0)
    areas = [(c[:, 2] - c[:, 0]) * (c[:, 3] - c[:, 1]) for c in (a, b)]
    return intersection / (areas[0] + areas[1] - intersection)


# ---------------------------------------------------------------------------------------------------------------------
# VOC. The status of a detection is 1 for a true positive, 0 for a false positive, -1 for one that is ignored.


def match_voc(data_list: DataList, ranked: Ranked, iou_threshold: float = 0.5) -> np.ndarray:
    """The status (n,) int8 of each detection under the VOC rule; those of difficult objects and crowds are ignored.

    VOC has no crowds. As in COCO, a detection is of a crowd also if this share of its own area is inside of it.
    """
    matched = np.where(ranked.ious >= iou_threshold, ranked.objects, -1)
    ignored = np.append(~data_list.counted, False)[matched]  # index -1 is the appended False
    # The best detection of an object is its true positive; later ones are duplicates, false positives.
    objects, first_match = np.unique(matched, return_index=True)
    status = np.zeros(len(matched), dtype=np.int8)
    status[first_match[objects >= 0]] = 1
    status[ignored] = -1
    if data_list.crowd.any():
        status[(status == 0) & (shares_in_crowds(data_list, ranked) >= iou_threshold)] = -1
    return status


def shares_in_crowds(data_list: DataList, ranked: Ranked) -> np.ndarray:
    """(n,) the largest share of each detection's area that is inside a crowd of its image and class."""
    num_labels = len(data_list.classes) + 1
    keys = ranked.images * num_labels + ranked.labels
    order = np.argsort(keys, kind="stable")
    sorted_keys, shares = keys[order], np.zeros(len(keys))
    areas = (ranked.boxes[:, 2:] - ranked.boxes[:, :2]).astype(np.float64).prod(axis=1)
    crowds = np.flatnonzero(data_list.crowd)
    for crowd, image in zip(crowds, data_list.object_images[crowds], strict=True):
        key = image * num_labels + data_list.labels[crowd]
        rows = order[slice(*np.searchsorted(sorted_keys, [key, key + 1]))]
        low = np.maximum(ranked.boxes[rows, :2], data_list.boxes[crowd, :2])
        high = np.minimum(ranked.boxes[rows, 2:], data_list.boxes[crowd, 2:])
        inside = (high - low).clip(min=0).astype(np.float64).prod(axis=1)
        shares[rows] = np.maximum(shares[rows], inside / np.maximum(areas[rows], 1e-9))
    return shares


def true_positives(status: np.ndarray) -> np.ndarray:
    """bool (m,): whether each detection that is not ignored is a true positive."""
    return status[status >= 0] == 1


def precision_curve(is_tp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of true positives and precision, (m,) each, over the first 1..m detections, best first."""
    num_tp = np.cumsum(is_tp)
    return num_tp, num_tp / np.arange(1, len(is_tp) + 1)


def voc2007_ap(is_tp: np.ndarray, num_objects: int) -> float | None:
    """Average precision by 11-point interpolation: the mean over recalls 0, 0.1 .. 1 of the highest precision at that
    recall or a higher one.

    Args:
        is_tp: bool (m,), detections of one class, best first.
        num_objects: ground-truth objects of the class.

    Returns:
        0..1, or None without objects.
    """
    if num_objects == 0:
        return None
    num_tp, precision = precision_curve(is_tp)
    # In integers: 0.1 * t is not exact in floats, and a recall of exactly 3 in 10 has to reach the point 0.3.
    reached = [10 * num_tp >= t * num_objects for t in range(11)]
    return float(np.mean([precision[at].max(initial=0) for at in reached]))


def voc2010_ap(is_tp: np.ndarray, num_objects: int) -> float | None:
    """Average precision as the area under the interpolated precision-recall curve; arguments as for voc2007_ap."""
    if num_objects == 0:
        return None
    _, precision = precision_curve(is_tp)
    interpolated = np.maximum.accumulate(precision[::-1])[::-1]
    return float(interpolated[is_tp].sum() / num_objects)


def is_above(scores: np.ndarray, min_score: float) -> np.ndarray:
    """model.above_score, the rule of decoding, for scores (n,) of any precision."""
    return above_score(torch.from_numpy(scores.astype(np.float32)), min_score).numpy()


def scores_at(scores: np.ndarray, status: np.ndarray, num_objects: int, min_score: float) -> dict[str, Any]:
    """Precision, recall and F1 of the detections with score > min_score.

    Args:
        scores: (n,), in any order.
        status: (n,), of match_voc.
        num_objects: ground-truth objects.
        min_score: score threshold.

    Returns:
        min_score, f1, precision, recall; a number whose denominator is 0 is None.
    """
    kept = true_positives(status[is_above(scores, min_score)])
    num_tp = int(kept.sum())

    def ratio(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    return {
        "min_score": min_score,
        "f1": ratio(2 * num_tp, len(kept) + num_objects),
        "precision": ratio(num_tp, len(kept)),
        "recall": ratio(num_tp, num_objects),
    }


def best_f1(scores: np.ndarray, status: np.ndarray, num_objects: int) -> dict[str, Any] | None:
    """scores_at the score threshold with the highest F1, the highest such threshold of equals.

    Arguments as for scores_at. None without objects or without detections.
    """
    counted = status >= 0
    order = np.argsort(-scores[counted], kind="stable")
    scores, is_tp = scores[counted][order].astype(np.float32), true_positives(status)[order]
    if num_objects == 0 or len(scores) == 0:
        return None
    num_tp, _ = precision_curve(is_tp)
    f1 = 2 * num_tp / (np.arange(1, len(scores) + 1) + num_objects)
    cuts = np.flatnonzero(np.append(scores[1:] < scores[:-1], True))  # no threshold separates equal scores
    lowest_kept = scores[cuts[np.argmax(f1[cuts])]]
    return scores_at(scores, is_tp, num_objects, float(np.nextafter(lowest_kept, np.float32(-np.inf))))


# ---------------------------------------------------------------------------------------------------------------------
# COCO


def coco_metrics(data_list: DataList, ranked: Ranked) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The COCO metrics by COCO_NAMES, and coco_ap and coco_ap50 by class."""
    unknown = {name: {"coco_ap": None, "coco_ap50": None} for name in data_list.classes}
    if len(ranked) == 0:  # the library raises here
        return _coco_without_detections(data_list, unknown)
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
def _no_garbage_collection() -> Iterator[None]:
    """While a million dicts are made, each of the collector's passes over them costs more than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _or_none(value: float) -> float | None:
    return None if value < 0 else float(value)  # COCO writes -1 where there is no ground truth


def _coco_without_detections(
    data_list: DataList, per_class: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    counted, areas = data_list.counted, data_list.object_areas
    ranges = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
    any_of = {size: (counted & (areas >= low) & (areas <= high)).any() for size, (low, high) in ranges.items()}
    numbers = {name: 0.0 if any_of.get(name.split("_")[-1], counted.any()) else None for name in COCO_NAMES}
    for label, name in enumerate(data_list.classes, start=1):
        if (counted & (data_list.labels == label)).any():
            per_class[name] = {"coco_ap": 0.0, "coco_ap50": 0.0}
    return numbers, per_class


def _coco_truth(data_list: DataList) -> COCO:
    image_rows, areas = data_list.object_images, data_list.object_areas
    sides = data_list.boxes[:, 2:] - data_list.boxes[:, :2]
    annotations = [
        {
            "id": row + 1,
            "image_id": int(image_rows[row]) + 1,
            "category_id": int(data_list.labels[row]),
            "bbox": [*data_list.boxes[row, :2].tolist(), *sides[row].tolist()],
            # COCO's scoring overwrites `ignore`, and under `iscrowd` any box inside would match.
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


def _coco_results(ranked: Ranked) -> list[dict[str, Any]]:
    """COCO results format, image after image, with row + 1 as image id and labels as category ids."""
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
    no_outline: list[float] = []  # without one the library makes an outline of each box
    return [
        {"image_id": image, "category_id": label, "bbox": box, "score": score, "segmentation": no_outline}
        for image, label, box, score in rows
    ]
