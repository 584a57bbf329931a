"""Types of errors on cases made to hold exactly one; the rest against slow formulas and properties."""

import numpy as np
import pytest
from test_metrics import make_detections, make_list, random_case

from fpnssd.evaluation.error_analysis import (
    ERROR_TYPES,
    ap_by_group,
    aspect_groups,
    calibration,
    confusion,
    costliest_false_positives,
    costliest_missed,
    false_positive_costs,
    find_errors,
    gains,
    size_groups,
    truncation_groups,
)
from fpnssd.evaluation.metrics import compute_metrics, rank, voc2010_ap

BOX, OTHER, FAR = (10, 10, 110, 110), (150, 150, 250, 250), (10, 200, 60, 250)
SHIFTED = (60, 10, 160, 110)  # IoU 1/3 with BOX


def diagnose(objects, detections, num_classes=3):
    """(data list, ranked, errors) of one image. objects: (box, label[, difficult]); detections: (box, score, label)."""
    data_list = make_list([[(row[0], row[1], bool(row[2:]), False) for row in objects]], num_classes)
    ranked = rank(data_list, make_detections([detections]))
    return data_list, ranked, find_errors(data_list, ranked)


# ---------------------------------------------------------------------------------------------------------------------
# One type of error at a time: (objects, detections, the type, AP before, AP mended), worked out by hand

ONE_OF_EACH = [
    # The only object of class 1 is called 2: class 1 has AP 0, and is right once mended. Class 2 has no object.
    pytest.param([(BOX, 1)], [(BOX, 0.9, 2)], "class", 0, 1, id="class"),
    # Two such claims: the better one is mended, the other one goes.
    pytest.param([(BOX, 1)], [(BOX, 0.9, 2), (BOX, 0.8, 3)], "class", 0, 1, id="class, twice"),
    # The object is found already, so that a mended claim would be a duplicate: it goes; class 2's AP was 1/2.
    pytest.param(
        [(BOX, 1), (OTHER, 2)],
        [(BOX, 0.9, 1), (BOX, 0.9, 2), (OTHER, 0.5, 2)],
        "class", (1 + 1 / 2) / 2, 1, id="class, of an object that is found",
    ),
    pytest.param([(BOX, 1)], [(SHIFTED, 0.9, 1)], "location", 0, 1, id="location"),
    # Misplaced, with one right ahead of it: precision 1 at recall 1/2 before, at recall 1 after.
    pytest.param([(BOX, 1), (OTHER, 1)], [(OTHER, 0.9, 1), (SHIFTED, 0.5, 1)], "location", 1 / 2, 1, id="location 2"),
    # Class 1: not found. Class 2: one false ahead of one right, 1/2; without it 1. "Both" cannot be made right.
    pytest.param(
        [(BOX, 1), (OTHER, 2)],
        [(BOX, 0.9, 1), (SHIFTED, 0.9, 2), (OTHER, 0.5, 2)],
        "both", (1 + 1 / 2) / 2, 1, id="both",
    ),
    # Right, duplicate, right of two: 1 at recall 1/2 and 2/3 at recall 1, so (1 + 2/3) / 2 before.
    pytest.param(
        [(BOX, 1), (OTHER, 1)],
        [(BOX, 0.9, 1), (BOX, 0.8, 1), (OTHER, 0.7, 1)],
        "duplicate", (1 + 2 / 3) / 2, 1, id="duplicate",
    ),
    pytest.param([(BOX, 1)], [(FAR, 0.9, 1), (BOX, 0.5, 1)], "background", 1 / 2, 1, id="background"),
    pytest.param([(BOX, 1), (OTHER, 1)], [(BOX, 0.9, 1)], "missed", 1 / 2, 1, id="missed"),
    pytest.param([(BOX, 1), (OTHER, 2)], [(BOX, 0.9, 1)], "missed", 1 / 2, 1, id="missed, all of its class"),
]  # fmt: skip


@pytest.mark.parametrize(("objects", "detections", "kind", "before", "mended"), ONE_OF_EACH)
def test_one_type_at_a_time(objects, detections, kind, before, mended):
    data_list, ranked, errors = diagnose(objects, detections)
    assert set(errors.types) - {""} <= {kind}
    assert errors.missed.any() == (kind == "missed")
    assert compute_metrics(data_list, make_detections([detections]))["voc2010_ap50"] == pytest.approx(before)
    result = gains(data_list, ranked, errors)
    assert result.pop(kind) == pytest.approx(mended - before)
    assert result == pytest.approx(dict.fromkeys(result, 0))


def test_an_object_is_mended_by_its_best_claim_alone():
    """Claimed by a misplaced detection and, with a lower score, by one of the wrong class: location would mend it."""
    data_list, ranked, errors = diagnose([(BOX, 1), (OTHER, 2)], [(SHIFTED, 0.9, 1), (BOX, 0.8, 2), (OTHER, 0.7, 2)])
    assert sorted(errors.types) == ["", "class", "location"]
    result = gains(data_list, ranked, errors)
    # Before: 0 and 1/2. Location mended: 1 and 1/2; class mended: 0 and 1.
    assert (result["location"], result["class"]) == (1 / 2, 1 / 4)


def test_difficult_objects_are_neither_missed_nor_errors():
    data_list, ranked, errors = diagnose([(BOX, 1, True), (OTHER, 1)], [(BOX, 0.9, 1), (OTHER, 0.8, 1), (BOX, 0.7, 2)])
    assert errors.types.tolist() == ["", "", "class"]
    assert not errors.missed.any()
    assert set(gains(data_list, ranked, errors).values()) == {0}


def test_without_any_object_there_is_nothing_to_gain():
    data_list, ranked, errors = diagnose([], [(BOX, 0.9, 1)])
    assert errors.types.tolist() == ["background"]
    assert gains(data_list, ranked, errors) == dict.fromkeys(ERROR_TYPES)


# ---------------------------------------------------------------------------------------------------------------------
# Random cases


def random_errors(seed):
    objects, detections = random_case(np.random.default_rng(seed))
    data_list = make_list(objects)
    ranked = rank(data_list, make_detections(detections))
    return data_list, ranked, find_errors(data_list, ranked)


@pytest.mark.parametrize("seed", range(30))
def test_random_cases(seed):
    data_list, ranked, errors = random_errors(seed)
    # Each wrong detection has one type, no other has any; and each gain is one.
    assert ((errors.types != "") == (errors.status == 0)).all()
    for value in gains(data_list, ranked, errors).values():
        assert value is None or value >= -1e-12
    # Every counted object is found, explained by an error or missed.
    found = set(errors.objects[errors.status == 1].tolist())
    assert not found & set(np.flatnonzero(errors.missed))
    # A confusion matrix counts every object once, and every detection that is not ignored once.
    matrix = confusion(data_list, ranked, errors, min_score=0)
    expected = np.bincount(data_list.labels[data_list.counted], minlength=4)
    assert matrix[1:].sum(axis=1).tolist() == expected[1:].tolist()
    detected = np.bincount(ranked.labels[errors.status >= 0], minlength=4)
    assert matrix[:, 1:].sum(axis=0).tolist() == detected[1:].tolist()
    assert np.diag(matrix)[1:].sum() == (errors.status == 1).sum()


@pytest.mark.parametrize("seed", range(30))
def test_costs_are_those_of_leaving_each_out(seed):
    rng = np.random.default_rng(seed)
    is_true = rng.random(rng.integers(1, 40)) < rng.random()
    num_objects = int(is_true.sum()) + int(rng.integers(1, 5))
    costs = false_positive_costs(is_true, num_objects)
    whole = voc2010_ap(is_true, num_objects)
    for row, right in enumerate(is_true):
        expected = 0 if right else voc2010_ap(np.delete(is_true, row), num_objects) - whole
        assert costs[row] == pytest.approx(expected, abs=1e-12)


def test_the_costliest():
    # Class 1: a false one ahead of both right ones costs more than one between them. Class 2 has three missed objects.
    objects = [(BOX, 1), (OTHER, 1), (FAR, 2), ((200, 10, 290, 90), 2), ((120, 10, 130, 20), 2)]
    detections = [(FAR, 0.9, 1), (BOX, 0.8, 1), ((120, 120, 130, 130), 0.7, 1), (OTHER, 0.6, 1), (FAR, 0.1, 3)]
    data_list, ranked, errors = diagnose(objects, detections)
    (first, cost), (second, _) = costliest_false_positives(data_list, ranked, errors)
    assert (ranked.scores[first], ranked.scores[second]) == pytest.approx((0.9, 0.7))
    # Precisions 1/2 and 2/4 become 1/1 and 2/3, in one class of two.
    assert cost == pytest.approx(((1 + 2 / 3) / 2 - 1 / 2) / 2)
    assert [row for row, _ in costliest_missed(data_list, errors, most_of_class=2)] == [3, 4]  # FAR is class 3's error


# ---------------------------------------------------------------------------------------------------------------------
# Confusion, calibration, groups


def test_confusion_by_hand():
    objects = [(BOX, 1), (OTHER, 2), (FAR, 3)]
    detections = [(BOX, 0.9, 1), (OTHER, 0.8, 1), ((270, 10, 290, 30), 0.7, 3), (FAR, 0.1, 3)]
    data_list, ranked, errors = diagnose(objects, detections)
    expected = np.zeros((4, 4), dtype=int)
    expected[1, 1] = expected[2, 1] = expected[0, 3] = expected[3, 0] = 1  # the last one's score is too low
    assert confusion(data_list, ranked, errors, min_score=0.25).tolist() == expected.tolist()


def test_calibration_by_hand():
    detections = [(BOX, 0.95, 1), (BOX, 0.92, 1), (FAR, 0.5, 1), (OTHER, 0.05, 2)]
    _, ranked, errors = diagnose([(BOX, 1), (OTHER, 2)], detections)
    bins = calibration(ranked, errors)
    assert bins[9] == {"score": pytest.approx(0.935), "precision": 0.5, "detections": 2}
    assert (bins[5]["precision"], bins[0]["precision"]) == (0, 1)
    assert [k for k, one in enumerate(bins) if one] == [0, 5, 9]


@pytest.mark.parametrize("seed", range(10))
def test_the_normalised_ap_of_all_objects_is_the_plain_one(seed):
    data_list, ranked, errors = random_errors(seed)
    everything = (["all"], np.zeros(len(data_list.labels), dtype=int))
    ((ap, count),) = ap_by_group(data_list, ranked, errors, everything)
    assert count == data_list.counted.sum()
    per_class = [
        voc2010_ap((status := errors.status[ranked.of(label)])[status >= 0] == 1, int(number))
        for label in (1, 2, 3)
        if (number := (data_list.counted & (data_list.labels == label)).sum())
    ]
    assert ap == (pytest.approx(np.mean(per_class)) if per_class else None)


def test_groups_by_hand():
    """Two of four are small; both are found, behind one false; of the large ones none is found."""
    small = [(0, 0, 10, 10), (50, 0, 60, 20)]
    objects = [(small[0], 1), (small[1], 1), (BOX, 1), (OTHER, 1)]
    detections = [(FAR, 0.9, 1), (small[0], 0.8, 1), (small[1], 0.7, 1)]
    data_list, ranked, errors = diagnose(objects, detections)
    result = ap_by_group(data_list, ranked, errors, size_groups(data_list))
    # Recall 1/2 and 1 of the small, as if of four: 2 / (2 + 1) and 4 / (4 + 1), made monotone 4/5.
    assert result == [(pytest.approx(4 / 5), 2), (None, 0), (None, 0), (0, 2), (None, 0)]
    names, groups = aspect_groups(data_list)
    assert [names[group] for group in groups] == ["0.8 to 1.25", "0.5 to 0.8", "0.8 to 1.25", "0.8 to 1.25"]


def test_truncation_where_it_is_known():
    data_list, ranked, errors = diagnose([(BOX, 1), (OTHER, 1)], [(BOX, 0.9, 1)])
    assert truncation_groups(data_list) is None
    data_list.truncated = np.array([0, 0], dtype=np.int8)
    assert truncation_groups(data_list) is None  # all the same: nothing to compare
    data_list.truncated = np.array([0, 1], dtype=np.int8)
    assert ap_by_group(data_list, ranked, errors, truncation_groups(data_list)) == [(1, 1), (0, 1)]
