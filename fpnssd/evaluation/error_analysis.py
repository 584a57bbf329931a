"""Analysis of average precision: error types, confusions, calibration, groups of objects, costliest mistakes.

    ranked = metrics.rank(data_list, detections)
    errors = find_errors(data_list, ranked)
    print(gains(data_list, ranked, errors))        # AP that correcting each type of error would add

Everything refers to VOC2010's AP at IoU 0.5. Detections that VOC ignores (of difficult objects and crowds) are not
errors here either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpnssd.data.data_list import DataList
from fpnssd.evaluation.metrics import (
    Ranked,
    highest_ious,
    is_above,
    match_voc,
    mean_of_known,
    true_positives,
    voc2010_ap,
)

FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1  # TIDE's two thresholds
ERROR_TYPES = {
    "class": "right box, wrong class: IoU of 0.5 or more with an object of another class",
    "location": "right class, inaccurate box: IoU of 0.1 to 0.5 with an object of its class",
    "both": "IoU of 0.1 to 0.5 with an object of another class",
    "duplicate": "an object that a detection with a higher score has matched already",
    "background": "no object there: IoU below 0.1 with every object",
    "missed": "an object without a detection, not even one of the wrong class or an inaccurate one",
}
SIZES = (0, 16, 32, 96, 192, np.inf)  # square root of the area in pixels; COCO's small ends at 32, its medium at 96
ASPECTS = (0, 0.5, 0.8, 1.25, 2, np.inf)  # width / height

Groups = tuple[Sequence[str], np.ndarray]  # names of the groups; (objects,) the group of each object


@dataclass
class Errors:
    """The n detections of a Ranked, classified, and the objects that were missed."""

    status: np.ndarray  # (n,) int8: 1 true positive, 0 false positive, -1 ignored
    types: np.ndarray  # (n,) a key of ERROR_TYPES, "" for a detection that is not an error
    objects: np.ndarray  # (n,) the object that a true positive, class, location or duplicate one refers to, else -1
    missed: np.ndarray  # (objects,) bool

    def of_type(self, name: str) -> np.ndarray:
        """bool (n,)"""
        return self.types == name


def find_errors(data_list: DataList, ranked: Ranked) -> Errors:
    """Classifies detections by TIDE (Bolya et al. 2020, arXiv:2008.08016).

    As in TIDE's own program, types are tested in the order location, class, duplicate, background, both. A wrong
    detection may refer to a difficult object or a crowd, but these are never missed.
    """
    status = match_voc(data_list, ranked, FOREGROUND_IOU)
    other, other_ious = highest_ious(data_list, ranked.images, ranked.labels, ranked.boxes, of_other_classes=True)
    near = ranked.ious >= BACKGROUND_IOU
    types = np.select(
        [
            status != 0,
            near & (ranked.ious < FOREGROUND_IOU),
            other_ious >= FOREGROUND_IOU,
            ranked.ious >= FOREGROUND_IOU,
            ~near & (other_ious < BACKGROUND_IOU),
        ],
        ["", "location", "class", "duplicate", "background"],
        default="both",
    )
    objects = np.where(types == "class", other, ranked.objects)
    objects[np.isin(types, ["background", "both"]) | (status < 0)] = -1
    explained = np.isin(types, ["class", "location"]) | (status == 1)
    missed = data_list.counted.copy()
    missed[objects[explained]] = False
    return Errors(status, types, objects, missed)


# ---------------------------------------------------------------------------------------------------------------------
# What correcting errors would gain


def gains(data_list: DataList, ranked: Ranked, errors: Errors) -> dict[str, float | None]:
    """The AP gained by correcting all errors of one type and no others, for each of ERROR_TYPES.

    As TIDE corrects: of the class and location errors of an object that has no true positive, the one with the highest
    score becomes its true positive; all other errors of the type are removed; missed objects no longer count.

    Returns:
        Differences of the mean AP, by type; None without objects.
    """
    counts = _object_counts(data_list, data_list.counted)
    before = _mean_ap(ranked.labels, ranked.scores, errors.status, counts)
    result: dict[str, float | None] = dict.fromkeys(ERROR_TYPES)
    if before is None:
        return result
    best = _best_errors(data_list, ranked, errors)
    for name in ERROR_TYPES:
        labels, status, remaining = ranked.labels.copy(), errors.status.copy(), counts
        status[errors.of_type(name)] = -1
        if name in ("class", "location"):
            corrected = best[errors.of_type(name)[best]]
            status[corrected] = 1
            labels[corrected] = data_list.labels[errors.objects[corrected]]
        if name == "missed":
            remaining = counts - _object_counts(data_list, errors.missed)
        after = _mean_ap(labels, ranked.scores, status, remaining, counts)
        result[name] = None if after is None else after - before
    return result


def _best_errors(data_list: DataList, ranked: Ranked, errors: Errors) -> np.ndarray:
    """Rows of the class or location error with the highest score of each object that has no true positive."""
    free = data_list.counted.copy()
    free[errors.objects[errors.status == 1]] = False
    rows = np.flatnonzero(errors.of_type("class") | errors.of_type("location"))
    rows = rows[free[errors.objects[rows]]]
    rows = rows[np.argsort(-ranked.scores[rows], kind="stable")]
    _, first = np.unique(errors.objects[rows], return_index=True)
    return rows[first]


def _object_counts(data_list: DataList, which: np.ndarray) -> np.ndarray:
    """(C + 1,) number of objects of each label among `which`, bool (objects,)."""
    return np.bincount(data_list.labels[which], minlength=len(data_list.classes) + 1)


def _mean_ap(
    labels: np.ndarray, scores: np.ndarray, status: np.ndarray, remaining: np.ndarray, counts: np.ndarray | None = None
) -> float | None:
    """Mean AP over the labels with objects; remaining, counts (C + 1,): objects after and before correcting."""
    counts = remaining if counts is None else counts
    order = np.lexsort((-scores, labels))
    first = np.searchsorted(labels[order], np.arange(len(counts) + 1))
    aps = []
    for label in np.flatnonzero(counts):
        is_tp = true_positives(status[order[first[label] : first[label + 1]]])
        ap = voc2010_ap(is_tp, int(remaining[label]))
        aps.append(float(len(is_tp) == 0) if ap is None else ap)  # nothing left to find: 1 without a false positive
    return mean_of_known(aps)


def false_positive_costs(is_tp: np.ndarray, num_objects: int) -> np.ndarray:
    """How much higher the AP would be without each detection.

    Without a false positive between the true positives k - 1 and k, precision from k on is that of one rank higher.

    Args:
        is_tp: bool (m,), best first.
        num_objects: of the class.

    Returns:
        (m,) 0 for true positives.
    """
    tp = np.flatnonzero(is_tp)
    if len(tp) == 0:
        return np.zeros(len(is_tp))
    num_tp = np.arange(1, len(tp) + 1)
    before = np.maximum.accumulate((num_tp / (tp + 1))[::-1])[::-1]  # interpolated precision at each true positive
    after = np.maximum.accumulate((num_tp / np.maximum(tp, 1))[::-1])[::-1]
    # True positives ahead whose precision is now below that of a later one are raised to it.
    sums = np.concatenate([[0], np.cumsum(before)])
    raised_from = np.minimum(np.searchsorted(-before, -after, side="left"), np.arange(len(tp)))
    ahead = sums[raised_from] + (np.arange(len(tp)) - raised_from) * after
    gained = ahead + np.cumsum(after[::-1])[::-1] - sums[-1]
    costs = np.append(gained, 0)[np.cumsum(is_tp)] / num_objects
    return np.where(is_tp, 0, costs)


def costliest_false_positives(
    data_list: DataList, ranked: Ranked, errors: Errors, most: int = 12, most_of_class: int = 3
) -> list[tuple[int, float]]:
    """[(row of ranked, how much it lowers the mean AP)], costliest first, of equals the one with the higher score."""
    counts = _object_counts(data_list, data_list.counted)
    costs = np.zeros(len(ranked))
    for label in np.flatnonzero(counts).tolist():
        rows = np.arange(len(ranked))[ranked.of(label)]
        rows = rows[errors.status[rows] >= 0]
        costs[rows] = false_positive_costs(errors.status[rows] == 1, counts[label]) / (counts > 0).sum()
    order = np.lexsort((-ranked.scores, -costs))
    order = order[costs[order] > 0]
    return [(int(row), float(costs[row])) for row in _few_of_each(order, ranked.labels[order], most, most_of_class)]


def costliest_missed(
    data_list: DataList, errors: Errors, most: int = 12, most_of_class: int = 3
) -> list[tuple[int, float]]:
    """[(row of the object, how much at least it lowers the mean AP)]: rarest class first, then the largest object."""
    counts = _object_counts(data_list, data_list.counted)
    costs = 1 / np.maximum(counts, 1)[data_list.labels] / max((counts > 0).sum(), 1)
    rows = np.flatnonzero(errors.missed)
    rows = rows[np.lexsort((-data_list.object_areas[rows], -costs[rows]))]
    return [(int(row), float(costs[row])) for row in _few_of_each(rows, data_list.labels[rows], most, most_of_class)]


def _few_of_each(rows: np.ndarray, labels: np.ndarray, most: int, most_of_class: int) -> list[int]:
    """The first `most` rows with at most `most_of_class` of a label."""
    chosen: list[int] = []
    seen: dict[int, int] = {}
    for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= most_of_class:
            chosen.append(row)
        if len(chosen) == most:
            break
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Confusions, calibration, groups of objects


def confusion(data_list: DataList, ranked: Ranked, errors: Errors, min_score: float) -> np.ndarray:
    """Confusion matrix at IoU 0.5 of the detections with score > min_score.

    Returns:
        (C + 1, C + 1) counts: rows are the object's label, columns the detection's. Row 0 counts detections of the
        background and duplicates, column 0 objects without a detection.
    """
    matrix = np.zeros((len(data_list.classes) + 1,) * 2, dtype=int)
    kept = is_above(ranked.scores, min_score)
    tp = kept & (errors.status == 1)
    np.add.at(matrix, (ranked.labels[tp], ranked.labels[tp]), 1)
    free = data_list.counted.copy()
    free[errors.objects[tp]] = False
    # An object without a true positive counts for the class error with the highest score.
    wrong = np.flatnonzero(kept & (errors.status == 0))
    wrong = wrong[np.argsort(-ranked.scores[wrong], kind="stable")]
    matched = np.where(errors.of_type("class")[wrong], errors.objects[wrong], -1)
    matched[~np.append(free, False)[matched]] = -1
    objects, first = np.unique(matched, return_index=True)
    matched[~np.isin(np.arange(len(matched)), first[objects >= 0])] = -1
    np.add.at(matrix, (np.append(data_list.labels, 0)[matched], ranked.labels[wrong]), 1)
    free[matched[matched >= 0]] = False
    matrix[:, 0] = _object_counts(data_list, free)
    return matrix


def calibration(ranked: Ranked, errors: Errors, bins: int = 10) -> list[dict[str, Any] | None]:
    """For each of `bins` equal ranges of scores: mean score, precision and number of its detections; None if empty."""
    counted = errors.status >= 0
    scores, is_tp = ranked.scores[counted], errors.status[counted] == 1
    bin_of = np.clip((scores * bins).astype(int), 0, bins - 1)
    result: list[dict[str, Any] | None] = []
    for number in range(bins):
        of_bin = bin_of == number
        if of_bin.any():
            means = {"score": float(scores[of_bin].mean()), "precision": float(is_tp[of_bin].mean())}
            result.append({**means, "detections": int(of_bin.sum())})
        else:
            result.append(None)
    return result


def size_groups(data_list: DataList) -> Groups:
    """Groups by the square root of the area, in pixels of the original image."""
    return _range_names(SIZES, " px"), np.digitize(np.sqrt(data_list.object_areas), SIZES) - 1


def aspect_groups(data_list: DataList) -> Groups:
    """Groups by width over height."""
    sides = data_list.boxes[:, 2:] - data_list.boxes[:, :2]
    return _range_names(ASPECTS, ""), np.digitize(sides[:, 0] / sides[:, 1], ASPECTS) - 1


def truncation_groups(data_list: DataList) -> Groups | None:
    """Groups by whether a part of the object is outside the image; None unless the data list tells them apart."""
    if data_list.truncated is None or len(set(data_list.truncated[data_list.counted].tolist()) - {-1}) < 2:
        return None
    return ["whole", "truncated"], data_list.truncated.astype(int)


def _range_names(edges: Sequence[float], unit: str) -> list[str]:
    names = [f"{low:g} to {high:g}{unit}" for low, high in zip(edges[1:-2], edges[2:-1], strict=True)]
    return [f"under {edges[1]:g}{unit}", *names, f"{edges[-2]:g}{unit} or more"]


def ap_by_group(data_list: DataList, ranked: Ranked, errors: Errors, groups: Groups) -> list[tuple[float | None, int]]:
    """[(normalised AP or None, number of objects)] of each group.

    Plain AP of a group falls with its share of the objects, as all false positives count against it. Normalised AP
    (Hoiem et al. 2012, "Diagnosing error in object detectors") computes precision at a recall as if the group had as
    many objects as its class, so that groups can be compared with each other and with the AP of all objects.
    """
    names, group_of = groups
    counts = _object_counts(data_list, data_list.counted)
    result = []
    for group in range(len(names)):
        in_group = data_list.counted & (group_of == group)
        of_group = _object_counts(data_list, in_group)
        aps = []
        for label in np.flatnonzero(of_group).tolist():
            rows = ranked.of(label)
            status, objects = errors.status[rows], errors.objects[rows]
            tp = (status == 1) & in_group[objects]
            is_tp = tp[tp | (status == 0)]
            recall = np.cumsum(is_tp) / of_group[label]
            expected = recall * counts[label]  # true positives, if the group had as many objects as the class
            precision = expected / np.maximum(expected + np.cumsum(~is_tp), 1e-12)
            interpolated = np.maximum.accumulate(precision[::-1])[::-1]
            aps.append(float(interpolated[is_tp].sum() / of_group[label]))
        result.append((mean_of_known(aps), int(of_group.sum())))
    return result
