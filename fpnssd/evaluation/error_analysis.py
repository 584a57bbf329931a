"""Why an average precision is what it is: error types, confusions, calibration, kinds of objects, costliest mistakes.

    ranked = metrics.rank(data_list, detections)
    errors = find_errors(data_list, ranked)
    print(gains(data_list, ranked, errors))        # AP that mending each type of error would add

All of it is about VOC2010's AP at IoU 0.5, and what VOC ignores (detections of difficult objects and crowds) is no
error here either.
"""

from dataclasses import dataclass

import numpy as np

from fpnssd.evaluation.metrics import best_objects, is_true_of, match_voc, mean_of_known, voc2010_ap

MIN_OVERLAP, BACKGROUND = 0.5, 0.1
ERROR_TYPES = {
    "class": "the box is right, its class is not: IoU of 0.5 or more with an object of another class",
    "location": "the class is right, the box is not: IoU of 0.1 to 0.5 with an object of its class",
    "both": "IoU of 0.1 to 0.5 with an object of another class",
    "duplicate": "an object that a better detection has found already",
    "background": "nothing is there: IoU under 0.1 with every object",
    "missed": "an object without a detection, not even one of the wrong class or place",
}
SIZES = (0, 16, 32, 96, 192, np.inf)  # square root of the area in pixels; COCO's small ends at 32, its medium at 96
ASPECTS = (0, 0.5, 0.8, 1.25, 2, np.inf)  # width / height


@dataclass
class Errors:
    """What each of n ranked detections is, and which objects were missed."""

    status: np.ndarray  # (n,) int8: 1 right, 0 wrong, -1 ignored
    types: np.ndarray  # (n,) name of ERROR_TYPES, "" for what is not wrong
    objects: np.ndarray  # (n,) row of the object that is meant by a right, class, location or duplicate one, else -1
    missed: np.ndarray  # (objects,) bool

    def of_type(self, name):
        return self.types == name


def find_errors(data_list, ranked):
    """TIDE's types of errors (Bolya et al. 2020, arXiv:2008.08016) of Ranked detections -> Errors.

    Types are asked for in the order of TIDE's own program: location, class, duplicate, background, both. Difficult
    objects and crowds can error_message a wrong detection too, but are never missed.
    """
    status = match_voc(data_list, ranked, MIN_OVERLAP)
    other, other_overlaps = best_objects(data_list, ranked.images, ranked.labels, ranked.boxes, of_other_classes=True)
    near = ranked.overlaps >= BACKGROUND
    types = np.select(
        [
            status != 0,
            near & (ranked.overlaps < MIN_OVERLAP),
            other_overlaps >= MIN_OVERLAP,
            ranked.overlaps >= MIN_OVERLAP,
            ~near & (other_overlaps < BACKGROUND),
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
# What mending would gain


def gains(data_list, ranked, errors):
    """{type: AP that is gained if all errors of this type, and no others, are mended}; None without any object.

    As TIDE mends: of all class and location errors of an object that nothing has found, the one with the highest score
    becomes right when its type is mended; whatever else is of the type goes; missed objects are no longer asked for.
    """
    counts = _object_counts(data_list, data_list.counted)
    before = _mean_ap(ranked.labels, ranked.scores, errors.status, counts)
    if before is None:
        return dict.fromkeys(ERROR_TYPES)
    claims = _best_claims(data_list, ranked, errors)
    result = {}
    for name in ERROR_TYPES:
        labels, status, wanted = ranked.labels.copy(), errors.status.copy(), counts
        status[errors.of_type(name)] = -1
        if name in ("class", "location"):
            mended = claims[errors.of_type(name)[claims]]
            status[mended] = 1
            labels[mended] = data_list.labels[errors.objects[mended]]
        if name == "missed":
            wanted = counts - _object_counts(data_list, errors.missed)
        result[name] = _mean_ap(labels, ranked.scores, status, wanted, counts) - before
    return result


def _best_claims(data_list, ranked, errors):
    """Rows of the best class or location error of each object that has any and that no detection has found."""
    free = data_list.counted.copy()
    free[errors.objects[errors.status == 1]] = False
    rows = np.flatnonzero(errors.of_type("class") | errors.of_type("location"))
    rows = rows[free[errors.objects[rows]]]
    rows = rows[np.argsort(-ranked.scores[rows], kind="stable")]
    _, first = np.unique(errors.objects[rows], return_index=True)
    return rows[first]


def _object_counts(data_list, which):
    """(C + 1,) objects of each label among `which` (objects,) bool."""
    return np.bincount(data_list.labels[which], minlength=len(data_list.classes) + 1)


def _mean_ap(labels, scores, status, wanted, counts=None):
    """Mean AP over the labels with objects. wanted (C + 1,): how many are to be found, `counts` before mending."""
    counts = wanted if counts is None else counts
    order = np.lexsort((-scores, labels))
    first = np.searchsorted(labels[order], np.arange(len(counts) + 1))
    aps = []
    for label in np.flatnonzero(counts):
        is_true = is_true_of(status[order[first[label] : first[label + 1]]])
        ap = voc2010_ap(is_true, int(wanted[label]))
        aps.append(float(len(is_true) == 0) if ap is None else ap)  # nothing left to find: perfect if nothing is wrong
    return mean_of_known(aps)


def false_positive_costs(is_true, num_objects):
    """(n,) how much higher the AP would be without each detection, best first; 0 for right ones.

    Without a wrong detection between the right ones k - 1 and k, precision from k on is that of one rank higher.
    """
    right = np.flatnonzero(is_true)
    if len(right) == 0:
        return np.zeros(len(is_true))
    found = np.arange(1, len(right) + 1)
    before = np.maximum.accumulate((found / (right + 1))[::-1])[::-1]  # monotone precision at each right one
    after = np.maximum.accumulate((found / np.maximum(right, 1))[::-1])[::-1]
    # Of the right ones ahead, those whose precision is below what now lies behind them are lifted to it.
    sums = np.concatenate([[0], np.cumsum(before)])
    lifted_from = np.minimum(np.searchsorted(-before, -after, side="left"), np.arange(len(right)))
    ahead = sums[lifted_from] + (np.arange(len(right)) - lifted_from) * after
    gained = ahead + np.cumsum(after[::-1])[::-1] - sums[-1]
    costs = np.append(gained, 0)[np.cumsum(is_true)] / num_objects
    return np.where(is_true, 0, costs)


def costliest_false_positives(data_list, ranked, errors, most=12, most_of_class=3):
    """[(row of ranked, AP of the mean it costs)], costliest first, of equals the one with the higher score."""
    counts = _object_counts(data_list, data_list.counted)
    costs = np.zeros(len(ranked))
    for label in np.flatnonzero(counts):
        rows = np.arange(len(ranked))[ranked.of(label)]
        rows = rows[errors.status[rows] >= 0]
        costs[rows] = false_positive_costs(errors.status[rows] == 1, counts[label]) / (counts > 0).sum()
    order = np.lexsort((-ranked.scores, -costs))
    order = order[costs[order] > 0]
    return [(int(row), float(costs[row])) for row in _few_of_each(order, ranked.labels[order], most, most_of_class)]


def costliest_missed(data_list, errors, most=12, most_of_class=3):
    """[(row of the object, AP of the mean it costs at least)]: rarest class first, then the largest object."""
    counts = _object_counts(data_list, data_list.counted)
    costs = 1 / np.maximum(counts, 1)[data_list.labels] / max((counts > 0).sum(), 1)
    rows = np.flatnonzero(errors.missed)
    rows = rows[np.lexsort((-data_list.object_areas[rows], -costs[rows]))]
    return [(int(row), float(costs[row])) for row in _few_of_each(rows, data_list.labels[rows], most, most_of_class)]


def _few_of_each(rows, labels, most, most_of_class):
    """The first `most` rows with at most `most_of_class` of a label."""
    taken, seen = [], {}
    for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= most_of_class:
            taken.append(row)
        if len(taken) == most:
            break
    return taken


# ---------------------------------------------------------------------------------------------------------------------
# Confusions, calibration, kinds of objects


def confusion(data_list, ranked, errors, min_score):
    """(C + 1, C + 1) counts of detections of at least min_score: row is the object's label, column the detection's.

    Row 0: detections of nothing (or of what was found already). Column 0: objects without a detection.
    """
    matrix = np.zeros((len(data_list.classes) + 1,) * 2, dtype=int)
    kept = ranked.scores >= min_score
    right = kept & (errors.status == 1)
    np.add.at(matrix, (ranked.labels[right], ranked.labels[right]), 1)
    free = data_list.counted.copy()
    free[errors.objects[right]] = False
    # The best wrong detection of an object that is left over is taken for it.
    wrong = np.flatnonzero(kept & (errors.status == 0))
    wrong = wrong[np.argsort(-ranked.scores[wrong], kind="stable")]
    claims = np.where(errors.of_type("class")[wrong], errors.objects[wrong], -1)
    claims[~np.append(free, False)[claims]] = -1
    taken, first = np.unique(claims, return_index=True)
    claims[~np.isin(np.arange(len(claims)), first[taken >= 0])] = -1
    np.add.at(matrix, (np.append(data_list.labels, 0)[claims], ranked.labels[wrong]), 1)
    free[claims[claims >= 0]] = False
    matrix[:, 0] = _object_counts(data_list, free)
    return matrix


def calibration(ranked, errors, bins=10):
    """For each of `bins` ranges of scores: dict of mean score, share that is right, number; None where it is empty."""
    counted = errors.status >= 0
    scores, is_true = ranked.scores[counted], errors.status[counted] == 1
    bin_of = np.minimum((scores * bins).astype(int), bins - 1)
    result = []
    for number in range(bins):
        of_bin = bin_of == number
        if of_bin.any():
            means = {"score": float(scores[of_bin].mean()), "right": float(is_true[of_bin].mean())}
            result.append({**means, "detections": int(of_bin.sum())})
        else:
            result.append(None)
    return result


def size_groups(data_list):
    """({name: how it is said}, (objects,) group) by the square root of the area in original pixels."""
    return _ranges(SIZES, " px"), np.digitize(np.sqrt(data_list.object_areas), SIZES) - 1


def aspect_groups(data_list):
    """The same by width over height."""
    sides = data_list.boxes[:, 2:] - data_list.boxes[:, :2]
    return _ranges(ASPECTS, ""), np.digitize(sides[:, 0] / sides[:, 1], ASPECTS) - 1


def truncation_groups(data_list):
    """The same by whether a part of the object cannot be seen; None where the list does not tell them apart."""
    if data_list.truncated is None or len(set(data_list.truncated[data_list.counted].tolist()) - {-1}) < 2:
        return None
    return ["whole", "truncated"], data_list.truncated.astype(int)


def _ranges(edges, unit):
    names = [f"{low:g} to {high:g}{unit}" for low, high in zip(edges[1:-2], edges[2:-1], strict=True)]
    return [f"under {edges[1]:g}{unit}", *names, f"{edges[-2]:g}{unit} or more"]


def ap_by_group(data_list, ranked, errors, groups):
    """[(normalised AP or None, number of objects)] for each of (names, (objects,) group).

    Plain AP of a group sinks with its share of the objects, as all false positives count against it. Normalised AP
    (Hoiem et al. 2012, "Diagnosing error in object detectors") takes precision at a recall as if the group had as many
    objects as its class, so that groups can be compared with each other and with the plain AP of all.
    """
    names, group_of = groups
    counts = _object_counts(data_list, data_list.counted)
    result = []
    for group in range(len(names)):
        in_group = data_list.counted & (group_of == group)
        of_group = _object_counts(data_list, in_group)
        aps = []
        for label in np.flatnonzero(of_group):
            rows = ranked.of(label)
            status, objects = errors.status[rows], errors.objects[rows]
            right = (status == 1) & in_group[objects]
            is_true = right[right | (status == 0)]
            recall = np.cumsum(is_true) / of_group[label]
            expected = recall * counts[label]  # found objects, if the group were the class
            precision = expected / np.maximum(expected + np.cumsum(~is_true), 1e-12)
            monotone = np.maximum.accumulate(precision[::-1])[::-1]
            aps.append(float(monotone[is_true].sum() / of_group[label]))
        result.append((mean_of_known(aps), int(of_group.sum())))
    return result
