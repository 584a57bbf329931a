"""95 % confidence intervals of average precision, and paired comparison of two detectors, by bootstrap over images.

    matched = match(data_list, metrics.rank(data_list, detections))
    print(intervals(data_list, matched))
    print(compare(data_list, matched, other))

A resample draws as many images as the list has, with replacement. Whether a detection is a true positive does not
depend on other images, so detections are matched once, and a resample is a weight for each image.

The intervals are basic bootstrap intervals, 2 x estimate minus the percentiles: AP of few objects is biased upwards, in
a resample more so, and this form subtracts the bias. Of 95 % intervals for lists of 1,000 and 150 images out of VOC2007
test, with simulated detections, 88 to 92 % and 55 to 67 % contained the AP of all 4,952 images; of percentile intervals
13 to 30 % and 0 to 7 % (python -m benchmarks.metrics --coverage). With few objects per class they are too narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import mask

from fpnssd.data.data_list import DataList
from fpnssd.evaluation.metrics import Ranked, match_voc

NAMES = ("voc2007_ap50", "voc2010_ap50", "coco_ap", "coco_ap50")
COCO_IOUS = np.linspace(0.5, 0.95, 10)
COCO_RECALLS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 100  # per class and image; COCO ignores the rest
MAX_WEIGHTS = 20_000_000  # of resamples x detections at a time: bounds the memory

Scores = dict[str, np.ndarray]  # (samples,) of each of NAMES


@dataclass
class Matched:
    """The status of each detection: 1 true positive, 0 false positive, -1 ignored."""

    ranked: Ranked
    voc: np.ndarray  # (n,) int8, under the VOC rule at IoU 0.5
    coco: np.ndarray  # (n, 10) int8, under the COCO rule at COCO_IOUS


def match(data_list: DataList, ranked: Ranked) -> Matched:
    """Matches detections with ground-truth boxes, under the VOC and COCO rules."""
    return Matched(ranked, match_voc(data_list, ranked), match_coco(data_list, ranked))


def match_coco(data_list: DataList, ranked: Ranked) -> np.ndarray:
    """The status (n, 10) int8 of each detection at COCO_IOUS, as pycocotools gives it for all areas.

    In order of score, each detection takes the free ground-truth box of its class that it overlaps most; ignored boxes
    (difficult objects, and crowds, which are never used up) come after all others.
    """
    status = np.zeros((len(ranked), len(COCO_IOUS)), dtype=np.int8)
    keys = ranked.labels * len(data_list) + ranked.images  # a group is a class in an image
    order = np.argsort(keys, kind="stable")
    begins = np.flatnonzero(np.diff(keys[order], prepend=-1))
    sizes = np.diff(begins, append=len(order))
    place = np.arange(len(order)) - np.repeat(begins, sizes)
    status[order[place >= MAX_DETECTIONS]] = -1
    # Skip the groups without a possible match: IoU below 0.5 everywhere, and no crowd, whose overlap is not an IoU.
    has_crowd = np.zeros(len(data_list), dtype=bool)
    has_crowd[data_list.object_images[data_list.crowd]] = True
    near = (ranked.ious[order] >= COCO_IOUS[0]) | has_crowd[ranked.images[order]]
    busy = np.add.reduceat(near, begins, dtype=int) > 0 if len(begins) else np.zeros(0, dtype=bool)
    for begin, size in zip(begins[busy].tolist(), sizes[busy].tolist(), strict=True):
        rows = order[begin : begin + min(size, MAX_DETECTIONS)]
        image, label = ranked.images[rows[0]], ranked.labels[rows[0]]
        objects = np.arange(data_list.first[image], data_list.first[image + 1])
        objects = objects[data_list.labels[objects] == label]
        if len(objects):
            status[rows] = _match_group(ranked.boxes[rows], data_list, objects)
    return status


def _match_group(boxes: np.ndarray, data_list: DataList, objects: np.ndarray) -> np.ndarray:
    """The status (m, 10) of m detections of one class in one image; objects: rows of its ground-truth boxes."""
    ignored = ~data_list.counted[objects]
    objects = objects[np.argsort(ignored, kind="stable")]
    ignored, crowd = np.sort(ignored), data_list.crowd[objects]
    # With a crowd the overlap is the share of the detection that lies in it.
    overlaps = mask.iou(_xywh(boxes), _xywh(data_list.boxes[objects]), crowd.astype(np.uint8))
    status = np.zeros((len(boxes), len(COCO_IOUS)), dtype=np.int8)
    for column, threshold in enumerate(COCO_IOUS):
        used = np.zeros(len(objects), dtype=bool)
        for row in np.flatnonzero((overlaps >= threshold - 1e-10).any(axis=1)):
            highest, best = min(threshold, 1 - 1e-10), -1
            for number in range(len(objects)):
                if used[number] and not crowd[number]:
                    continue
                if best >= 0 and not ignored[best] and ignored[number]:
                    break  # matched one that counts: ignored ones do not replace it
                if overlaps[row, number] >= highest:
                    highest, best = overlaps[row, number], number
            if best >= 0:
                used[best] = True
                status[row, column] = -1 if ignored[best] else 1
    return status


def _xywh(boxes: np.ndarray) -> np.ndarray:
    boxes = boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Resamples


def intervals(
    data_list: DataList, matched: Matched, samples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """The 95 % interval of each of NAMES, clipped to 0..1; None where there is no ground truth."""
    scores = resampled(data_list, matched, draw_weights(len(data_list), samples, seed))
    estimate = resampled(data_list, matched, np.ones((1, len(data_list))))
    result = {}
    for name, values in scores.items():
        interval = _basic_interval(estimate[name][0], values)
        # A basic interval of few images can leave the range of AP.
        result[name] = (min(max(interval[0], 0.0), 1.0), min(max(interval[1], 0.0), 1.0)) if interval else None
    return result


def compare(
    data_list: DataList,
    first: Matched | Sequence[Matched],
    second: Matched | Sequence[Matched],
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Paired bootstrap: both detectors are scored on the same resamples, so what makes images hard for both cancels.

    Args:
        data_list: the ground truth.
        first, second: of a detector; or several, of runs with different seeds, whose mean score counts.
        samples: resamples.
        seed: of the resamples.

    Returns:
        For each of NAMES: difference (second - first), interval (its 95 % interval), better (the share of resamples in
        which the second is better); None where there is no ground truth.
    """
    weights = draw_weights(len(data_list), samples, seed)
    everything = np.ones((1, len(data_list)))
    scores = [_mean_resampled(data_list, matched, weights) for matched in (first, second)]
    estimates = [_mean_resampled(data_list, matched, everything) for matched in (first, second)]
    result = {}
    for name in NAMES:
        differences = scores[1][name] - scores[0][name]
        known = differences[np.isfinite(differences)]
        difference = (estimates[1][name] - estimates[0][name])[0]
        result[name] = {
            "difference": float(difference) if np.isfinite(difference) else None,
            "interval": _basic_interval(difference, differences),
            "better": float((known > 0).mean() + (known == 0).mean() / 2) if len(known) else None,
        }
    return result


def _mean_resampled(data_list: DataList, matched: Matched | Sequence[Matched], weights: np.ndarray) -> Scores:
    several = [matched] if isinstance(matched, Matched) else matched
    scores = [resampled(data_list, of_run, weights) for of_run in several]
    return {name: np.mean([of_run[name] for of_run in scores], axis=0) for name in NAMES}


def draw_weights(images: int, samples: int, seed: int = 0) -> np.ndarray:
    """(samples, images) uint16: how often each image is drawn."""
    rng, shares = np.random.default_rng(seed), np.full(images, 1 / max(images, 1))
    weights = np.empty((samples, images), np.uint16)
    for row in weights:  # a whole array of int64 would take four times the memory
        row[:] = rng.multinomial(images, shares)
    return weights


def _basic_interval(estimate: float, values: np.ndarray) -> tuple[float, float] | None:
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(2 * estimate - high), float(2 * estimate - low)


def resampled(data_list: DataList, matched: Matched, weights: np.ndarray) -> Scores:
    """Scores with weighted images.

    Args:
        data_list: the ground truth.
        matched: detections.
        weights: (samples, images).

    Returns:
        (samples,) for each of NAMES: means over the classes that have objects in the resample, NaN if none has.
    """
    object_images = data_list.object_images
    scores: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    for label in range(1, len(data_list.classes) + 1):
        objects = np.bincount(object_images[data_list.counted & (data_list.labels == label)], minlength=len(data_list))
        if objects.sum():
            of_class = _resampled_class(matched, label, objects, weights)
            for name in NAMES:
                scores[name].append(of_class[name])
    unknown = np.full(len(weights), np.nan)
    return {name: _mean_of_finite(np.stack(rows)) if rows else unknown for name, rows in scores.items()}


def _mean_of_finite(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where all are."""
    known = np.isfinite(values)
    return np.where(known.any(axis=0), np.where(known, values, 0).sum(axis=0) / known.sum(axis=0).clip(min=1), np.nan)


def _resampled_class(matched: Matched, label: int, objects: np.ndarray, weights: np.ndarray) -> Scores:
    """Scores of one class; objects (images,) counts its ground-truth objects in each image."""
    rows = matched.ranked.of(label)
    images = matched.ranked.images[rows]
    parts, with_objects = [], np.flatnonzero(objects)
    step = max(1, MAX_WEIGHTS // max(1, len(images)))
    for begin in range(0, len(weights), step):
        block = weights[begin : begin + step]
        of_detections = block[:, images].astype(float)  # (samples, n)
        positives = (block[:, with_objects] @ objects[with_objects]).astype(float)  # (samples,)
        so_far = np.cumsum(of_detections, axis=1)
        voc = _curve(of_detections, so_far, matched.voc[rows])
        coco = [_curve(of_detections, so_far, status) for status in matched.coco[rows].T]
        aps = np.stack([_coco_ap(*curve, positives) for curve in coco])
        parts.append(
            {
                "voc2007_ap50": _voc2007_ap(*voc, positives),
                "voc2010_ap50": _voc2010_ap(*voc, positives),
                "coco_ap": aps.mean(axis=0),
                "coco_ap50": aps[0],
            }
        )
        parts[-1] = {name: np.where(positives > 0, values, np.nan) for name, values in parts[-1].items()}
    return {name: np.concatenate([part[name] for part in parts]) for name in NAMES}


def _curve(of_detections: np.ndarray, so_far: np.ndarray, status: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(samples, t) number of true positives so far, and interpolated precision, at the t true positives of a class."""
    tp, ignored = np.flatnonzero(status == 1), np.flatnonzero(status == -1)
    num_tp = np.cumsum(of_detections[:, tp], axis=1)
    # Ignored detections ahead of each true positive are not counted.
    num_ignored = np.concatenate([np.zeros((len(so_far), 1)), np.cumsum(of_detections[:, ignored], axis=1)], axis=1)
    num_counted = so_far[:, tp] - num_ignored[:, np.searchsorted(ignored, tp)]
    precision = num_tp / np.maximum(num_counted, 1e-12)
    return num_tp, np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]


def _mean_precision(reached: np.ndarray, precision: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """(samples,) mean over `levels` (samples, r) of the precision where `reached` (samples, t) comes up to each level;
    0 where it never does."""
    padded = np.concatenate([precision, np.zeros((len(precision), 1))], axis=1)
    rows = zip(reached, padded, levels, strict=True)
    return np.array([row[np.searchsorted(values, targets, side="left")].mean() for values, row, targets in rows])


def _coco_ap(num_tp: np.ndarray, precision: np.ndarray, positives: np.ndarray) -> np.ndarray:
    recall = num_tp / np.maximum(positives, 1)[:, None]  # COCO compares recalls as floats
    return _mean_precision(recall, precision, np.broadcast_to(COCO_RECALLS, (len(recall), len(COCO_RECALLS))))


def _voc2007_ap(num_tp: np.ndarray, precision: np.ndarray, positives: np.ndarray) -> np.ndarray:
    return _mean_precision(10 * num_tp, precision, positives[:, None] * np.arange(11))  # in integers, as metrics.py


def _voc2010_ap(num_tp: np.ndarray, precision: np.ndarray, positives: np.ndarray) -> np.ndarray:
    gained = np.diff(num_tp, axis=1, prepend=0)
    return (gained * precision).sum(axis=1) / np.maximum(positives, 1)
