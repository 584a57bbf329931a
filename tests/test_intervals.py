"""Resamples by weights against lists in which images really come twice; matches against COCO's own numbers."""

import numpy as np
import pytest
import torch
from test_metrics import make_detections, make_list, random_case

from fpnssd.evaluation.intervals import NAMES, compare, draw_weights, intervals, match, resampled
from fpnssd.evaluation.metrics import compute_metrics, rank


def case(rng):
    objects, detections = random_case(rng)
    return make_list(objects), make_detections(detections)


def matched(data_list, detections):
    return match(data_list, rank(data_list, detections))


@pytest.mark.parametrize("seed", range(12))
def test_without_resampling_it_is_the_metric(seed):
    data_list, detections = case(np.random.default_rng(seed))
    expected = compute_metrics(data_list, detections)
    whole = resampled(data_list, matched(data_list, detections), np.ones((1, len(data_list))))
    for name in NAMES:
        if expected[name] is None:
            assert np.isnan(whole[name][0])
        else:
            assert whole[name][0] == pytest.approx(expected[name], abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_a_weight_is_an_image_that_often(seed):
    rng = np.random.default_rng(100 + seed)
    data_list, detections = case(rng)
    # No two detections alike, or their order would count; a copy of an image is alike all through.
    values = rng.permutation(sum(len(d["scores"]) for d in detections)) + 1
    for d in detections:
        taken, values = values[: len(d["scores"])], values[len(d["scores"]) :]
        d["scores"] = torch.from_numpy(np.sort(taken)[::-1] / 10_000).float()
    weights = draw_weights(len(data_list), 3, seed)
    by_weight = resampled(data_list, matched(data_list, detections), weights)
    for number, row in enumerate(weights.astype(int)):
        images = np.repeat(np.arange(len(data_list)), row)
        objects = []
        for image in images:
            t = data_list.target(image)
            objects.append(list(zip(t["boxes"], t["labels"], t["difficult"], t["crowd"], strict=True)))
        copies = compute_metrics(make_list(objects, len(data_list.classes)), [detections[image] for image in images])
        for name in NAMES:
            if copies[name] is None:
                assert np.isnan(by_weight[name][number])
            else:
                assert by_weight[name][number] == pytest.approx(copies[name], abs=1e-9), name


def half_right(count, right):
    """`count` images with an object each; the detector finds those in `right`, and says something wrong everywhere."""
    box, other = (10, 10, 110, 110), (150, 150, 250, 250)
    data_list = make_list([[(box, 1, False, False)] for _ in range(count)], 1)
    rows = [([(box, 0.9, 1)] if image in right else []) + [(other, 0.1, 1)] for image in range(count)]
    return data_list, make_detections(rows)


def test_intervals_cover_what_they_should():
    """Found with probability 0.6 and no mistakes above: AP is the share found, whose spread is the binomial's."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(40):
        data_list, detections = half_right(100, set(np.flatnonzero(rng.random(100) < 0.6)))
        low, high = intervals(data_list, matched(data_list, detections), samples=300)["voc2010_ap50"]
        assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.6 * 0.4 / 100), rel=0.3)
        covered += low <= 0.6 <= high
    assert covered >= 33  # of 40; 38 are expected


def test_intervals_stay_in_the_range_of_ap():
    """Of 4 images, one right: the basic interval, 2 x estimate minus the percentiles, begins below 0."""
    data_list, detections = half_right(4, {0})
    one = matched(data_list, detections)
    estimate = resampled(data_list, one, np.ones((1, 4)))["voc2010_ap50"][0]
    drawn = resampled(data_list, one, draw_weights(4, 300))["voc2010_ap50"]
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert 2 * estimate - high < 0
    assert intervals(data_list, one, samples=300)["voc2010_ap50"] == (0.0, pytest.approx(2 * estimate - low))


def test_compare_tells_a_difference_from_none():
    everything = set(range(100))
    data_list, good = half_right(100, everything - set(range(0, 100, 7)))
    _, worse = half_right(100, everything - set(range(0, 100, 3)))
    _, same = half_right(100, everything - set(range(1, 101, 7)))
    good, worse, same = (matched(data_list, d) for d in (good, worse, same))
    clear = compare(data_list, worse, good, samples=300)["voc2010_ap50"]
    assert clear["difference"] == pytest.approx(0.19, abs=1e-9)
    assert clear["interval"][0] > 0
    assert clear["better"] > 0.97
    unclear = compare(data_list, same, good, samples=300)["voc2010_ap50"]
    assert unclear["interval"][0] < 0 < unclear["interval"][1]
    itself = compare(data_list, good, good, samples=50)["coco_ap"]
    assert itself == {"difference": 0, "interval": (0, 0), "better": 0.5}


def test_compare_of_several_seeds_is_of_their_means():
    """With one each it is the plain one; with two it is, resample for resample, between the two of one each."""
    everything = set(range(100))
    lists, found = zip(*(half_right(100, everything - set(range(0, 100, step))) for step in (2, 3, 5, 7)), strict=True)
    data_list = lists[0]
    a, b, c, d = (matched(data_list, one) for one in found)
    assert compare(data_list, [a], [c], samples=100) == compare(data_list, a, c, samples=100)
    both = compare(data_list, [a, b], [c, d], samples=100)
    singles = [compare(data_list, one, other, samples=100) for one, other in ((a, c), (b, d))]
    for name in NAMES:
        assert both[name]["difference"] == pytest.approx(np.mean([one[name]["difference"] for one in singles]))
        width = np.ptp(both[name]["interval"])
        assert 0 < width <= np.mean([np.ptp(one[name]["interval"]) for one in singles]) + 1e-9


def test_nothing_to_score_is_none():
    data_list = make_list([[], []], 2)
    assert intervals(data_list, matched(data_list, make_detections([[], []]))) == dict.fromkeys(NAMES)
