"""How sure an average precision is: 95 % intervals by bootstrap over images, and whether two detectors differ.

    matched = match(data_list, metrics.rank(data_list, detections))
    print(intervals(data_list, matched))
    print(compare(data_list, matched, other))

A resample draws as many images as there are, with replacement, and scores them. Which detection is right in an image
does not depend on the other images, so detections are matched once and a resample is only a weight for each image.

Intervals are basic (reversed) ones: AP of few objects comes out too high, of a resample even more so, and what a
resample adds to the whole is taken off the whole. Of 95 % intervals for lists of 1,000 and 150 images out of VOC2007
test, with simulated detections, 88 to 92 % and 55 to 67 % held the AP of all 4,952; of plain percentile intervals 13 to
30 % and 0 to 7 % (benchmarks/metrics.py --coverage). With few objects a class, take them as too narrow.
"""

from dataclasses import dataclass

import numpy as np
from pycocotools import mask

from fpnssd.evaluation.metrics import Ranked, match_voc

NAMES = ("voc2007_ap50", "voc2010_ap50", "coco_ap", "coco_ap50")
COCO_OVERLAPS = np.linspace(0.5, 0.95, 10)
COCO_RECALLS = np.linspace(0, 1, 101)
MOST_DETECTIONS = 100  # that COCO counts, of a class in an image
BLOCK = 20_000_000  # weights held at a time


@dataclass
class Matched:
    """What each detection is (1 right, 0 wrong, -1 ignored), under VOC's rule at 0.5 and COCO's at ten IoUs."""

    ranked: Ranked
    voc: np.ndarray  # (n,) int8
    coco: np.ndarray  # (n, 10) int8


def match(data_list, ranked):
    """Ranked detections -> Matched."""
    return Matched(ranked, match_voc(data_list, ranked), match_coco(data_list, ranked))


def match_coco(data_list, ranked):
    """(n, 10) int8: 1 right, 0 wrong, -1 ignored, at IoU 0.5, 0.55 .. 0.95; as pycocotools for all areas.

    From the best on, each detection takes the free object that it overlaps most; ignored objects (difficult ones, and
    crowds, which are never used up) come after the others.
    """
    result = np.zeros((len(ranked), len(COCO_OVERLAPS)), dtype=np.int8)
    keys = ranked.labels * len(data_list) + ranked.images  # a group is a class in an image
    order = np.argsort(keys, kind="stable")
    begins = np.flatnonzero(np.diff(keys[order], prepend=-1))
    sizes = np.diff(begins, append=len(order))
    place = np.arange(len(order)) - np.repeat(begins, sizes)
    result[order[place >= MOST_DETECTIONS]] = -1
    # Groups in which nothing overlaps an object by half are all wrong; a crowd's overlap is another one.
    has_crowd = np.zeros(len(data_list), dtype=bool)
    has_crowd[data_list.object_images[data_list.crowd]] = True
    near = (ranked.overlaps[order] >= COCO_OVERLAPS[0]) | has_crowd[ranked.images[order]]
    busy = np.add.reduceat(near, begins, dtype=int) > 0 if len(begins) else np.zeros(0, dtype=bool)
    for begin, size in zip(begins[busy].tolist(), sizes[busy].tolist(), strict=True):
        rows = order[begin : begin + min(size, MOST_DETECTIONS)]
        image, label = ranked.images[rows[0]], ranked.labels[rows[0]]
        objects = np.arange(data_list.first[image], data_list.first[image + 1])
        objects = objects[data_list.labels[objects] == label]
        if len(objects):
            result[rows] = _match_group(ranked.boxes[rows], data_list, objects)
    return result


def _match_group(boxes, data_list, objects):
    """(detections, 10) int8 for the detections and objects of one class in one image."""
    ignored = ~data_list.counted[objects]
    objects = objects[np.argsort(ignored, kind="stable")]
    ignored, crowd = np.sort(ignored), data_list.crowd[objects]
    # With a crowd, the share of the detection that lies in it.
    overlaps = mask.iou(_xywh(boxes), _xywh(data_list.boxes[objects]), crowd.astype(np.uint8))
    result = np.zeros((len(boxes), len(COCO_OVERLAPS)), dtype=np.int8)
    for column, threshold in enumerate(COCO_OVERLAPS):
        used = np.zeros(len(objects), dtype=bool)
        for row in np.flatnonzero((overlaps >= threshold - 1e-10).any(axis=1)):
            least, best = min(threshold, 1 - 1e-10), -1
            for number in range(len(objects)):
                if used[number] and not crowd[number]:
                    continue
                if best >= 0 and not ignored[best] and ignored[number]:
                    break  # a real one was found: ignored ones are not asked
                if overlaps[row, number] >= least:
                    least, best = overlaps[row, number], number
            if best >= 0:
                used[best] = True
                result[row, column] = -1 if ignored[best] else 1
    return result


def _xywh(boxes):
    boxes = boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Resamples


def intervals(data_list, matched, samples=1000, seed=0):
    """{name: (low, high)} of NAMES, for 95 %; None where there is nothing to score. May reach beyond 0 and 1."""
    scores = resampled(data_list, matched, draw_weights(len(data_list), samples, seed))
    whole = resampled(data_list, matched, np.ones((1, len(data_list))))
    return {name: _basic_interval(whole[name][0], values) for name, values in scores.items()}


def compare(data_list, one, other, samples=1000, seed=0):
    """{name: dict of difference (other - one), interval, better: the share of resamples in which the other is better}.

    Paired: both are scored on the same resamples, so what makes images hard for both cancels out. Either may be a list
    of Matched, of one recipe with several seeds, and counts with the mean of their scores.
    """
    weights = draw_weights(len(data_list), samples, seed)
    everything = np.ones((1, len(data_list)))
    first, second = (_mean_resampled(data_list, matched, weights) for matched in (one, other))
    whole = [_mean_resampled(data_list, matched, everything) for matched in (one, other)]
    result = {}
    for name in NAMES:
        differences = second[name] - first[name]
        known = differences[np.isfinite(differences)]
        difference = (whole[1][name] - whole[0][name])[0]
        result[name] = {
            "difference": _or_none(difference),
            "interval": _basic_interval(difference, differences),
            "better": float((known > 0).mean() + (known == 0).mean() / 2) if len(known) else None,
        }
    return result


def _mean_resampled(data_list, matched, weights):
    several = matched if isinstance(matched, list) else [matched]
    scores = [resampled(data_list, one, weights) for one in several]
    return {name: np.mean([one[name] for one in scores], axis=0) for name in NAMES}


def draw_weights(images, samples, seed=0):
    """(samples, images): how often each image is drawn."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / max(images, 1)), samples).astype(float)


def _basic_interval(whole, values):
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(2 * whole - high), float(2 * whole - low)


def _or_none(value):
    return float(value) if np.isfinite(value) else None


def resampled(data_list, matched, weights):
    """{name: (samples,)} of NAMES with images weighted by each row of `weights` (samples, images).

    Means over the classes that have objects in the resample; NaN where none has.
    """
    object_images = data_list.object_images
    scores = {name: [] for name in NAMES}
    for label in range(1, len(data_list.classes) + 1):
        objects = np.bincount(object_images[data_list.counted & (data_list.labels == label)], minlength=len(data_list))
        if objects.sum():
            of_class = _resampled_class(matched, label, objects, weights)
            for name in NAMES:
                scores[name].append(of_class[name])
    return {
        name: _mean_of_known(np.stack(rows)) if rows else np.full(len(weights), np.nan) for name, rows in scores.items()
    }


def _mean_of_known(values):
    """Mean over the first axis without NaN; NaN where all are."""
    known = np.isfinite(values)
    return np.where(known.any(axis=0), np.where(known, values, 0).sum(axis=0) / known.sum(axis=0).clip(min=1), np.nan)


def _resampled_class(matched, label, objects, weights):
    """{name: (samples,)} for one class; objects (images,) counts its objects."""
    rows = matched.ranked.of(label)
    images = matched.ranked.images[rows]
    parts = []
    step = max(1, BLOCK // max(1, len(images)))
    for begin in range(0, len(weights), step):
        block = weights[begin : begin + step]
        of_detections, positives = block[:, images], block @ objects  # (samples, n), (samples,)
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
    joined = {name: np.concatenate([part[name] for part in parts]) for name in NAMES}
    return {name: np.where(weights @ objects > 0, values, np.nan) for name, values in joined.items()}


def _curve(of_detections, so_far, status):
    """(samples, t) true positives so far, and precision made monotone, at the t right detections of a class."""
    right, ignored = np.flatnonzero(status == 1), np.flatnonzero(status == -1)
    true_so_far = np.cumsum(of_detections[:, right], axis=1)
    # What was ignored before each right one comes off what was detected.
    off = np.concatenate([np.zeros((len(so_far), 1)), np.cumsum(of_detections[:, ignored], axis=1)], axis=1)
    detected = so_far[:, right] - off[:, np.searchsorted(ignored, right)]
    precision = true_so_far / np.maximum(detected, 1e-12)
    return true_so_far, np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]


def _at_recalls(true_so_far, precision, wanted):
    """Mean over wanted counts (samples, r) of the precision where so many are found, 0 where they never are."""
    padded = np.concatenate([precision, np.zeros((len(precision), 1))], axis=1)
    return np.array(
        [
            row[np.searchsorted(found, want, side="left")].mean()
            for found, row, want in zip(true_so_far, padded, wanted, strict=True)
        ]
    )


def _coco_ap(true_so_far, precision, positives):
    # COCO compares recalls as floats; so does this.
    recall = true_so_far / np.maximum(positives, 1)[:, None]
    return _at_recalls(recall, precision, np.broadcast_to(COCO_RECALLS, (len(recall), len(COCO_RECALLS))))


def _voc2007_ap(true_so_far, precision, positives):
    # In whole numbers, as metrics.voc2007_ap.
    return _at_recalls(10 * true_so_far, precision, positives[:, None] * np.arange(11))


def _voc2010_ap(true_so_far, precision, positives):
    gained = np.diff(true_so_far, axis=1, prepend=0)
    return (gained * precision).sum(axis=1) / np.maximum(positives, 1)
