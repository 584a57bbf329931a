"""VOC's precision by hand and against the devkit's rules, literally; COCO's numbers against pycocotools."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpnssd.data.data_list import DataList
from fpnssd.evaluation.error_analysis import confusion, find_errors
from fpnssd.evaluation.metrics import (
    COCO_NAMES,
    best_f1,
    compute_metrics,
    match_voc,
    rank,
    scores_at,
    voc2007_ap,
    voc2010_ap,
)
from model import above_score


def make_list(images, num_classes=3):
    """images: lists of (xyxy, label, difficult, crowd) -> a DataList without photographs."""
    rows = [row for objects in images for row in objects]
    return DataList(
        path="made.json",
        image_root=Path(),
        file_names=[f"{i}.jpg" for i in range(len(images))],
        image_ids=list(range(len(images))),
        sizes=np.full((len(images), 2), 300),
        apply_exif=np.zeros(len(images), dtype=bool),
        first=np.cumsum([0, *(len(objects) for objects in images)]),
        boxes=np.array([row[0] for row in rows], dtype=np.float32).reshape(-1, 4),
        labels=np.array([row[1] for row in rows], dtype=np.int64),
        difficult=np.array([row[2] for row in rows], dtype=bool),
        crowd=np.array([row[3] for row in rows], dtype=bool),
        classes=tuple(f"class{k}" for k in range(1, num_classes + 1)),
        category_ids=tuple(range(1, num_classes + 1)),
    )


def make_detections(images):
    """images: lists of (xyxy, score, label), best first."""
    return [
        {
            "boxes": torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4),
            "scores": torch.tensor([row[1] for row in rows], dtype=torch.float32),
            "labels": torch.tensor([row[2] for row in rows], dtype=torch.long),
        }
        for rows in images
    ]


# ---------------------------------------------------------------------------------------------------------------------
# By hand


def test_average_precision_by_hand():
    # Right, wrong, right, of three objects: precision 1 at recall 1/3, 2/3 at recall 2/3, nothing beyond.
    is_true = np.array([True, False, True])
    assert voc2010_ap(is_true, 3) == pytest.approx((1 + 2 / 3) / 3)
    # Recalls 0, .1, .2, .3 have 1; .4, .5, .6 have 2/3; the rest 0.
    assert voc2007_ap(is_true, 3) == pytest.approx((4 + 3 * 2 / 3) / 11)


def test_recall_points_are_reached_exactly():
    # Three of ten: recall 0.3 is reached, though 3 / 10 and 0.1 * 3 differ as floats.
    assert voc2007_ap(np.array([True] * 3), 10) == pytest.approx(4 / 11)
    assert voc2007_ap(np.array([True] * 7), 10) == pytest.approx(8 / 11)


def test_precision_is_made_monotone():
    # Wrong first, then two right of two: precision 1/2, 2/3; monotone from the right: 2/3, 2/3.
    assert voc2010_ap(np.array([False, True, True]), 2) == pytest.approx(2 / 3)


def test_no_objects_is_none_and_no_detections_is_zero():
    nothing = np.zeros(0, dtype=bool)
    assert voc2007_ap(nothing, 0) is None
    assert voc2010_ap(nothing, 0) is None
    assert voc2007_ap(nothing, 4) == voc2010_ap(nothing, 4) == 0


BOX, OTHER = (10, 10, 110, 110), (150, 150, 250, 250)


def ap(objects, detections, **_):
    return compute_metrics(make_list([objects], 1), make_detections([detections]))["voc2010_ap50"]


def test_second_detection_of_an_object_is_false():
    twice = [(BOX, 0.9, 1), (BOX, 0.8, 1), (OTHER, 0.7, 1)]
    assert ap([(BOX, 1, 0, 0), (OTHER, 1, 0, 0)], twice) == pytest.approx((1 + 2 / 3) / 2)


def test_difficult_objects_count_neither_way():
    detections = [(OTHER, 0.9, 1), (OTHER, 0.8, 1), (BOX, 0.7, 1)]
    assert ap([(BOX, 1, 0, 0), (OTHER, 1, 1, 0)], detections) == 1
    assert ap([(BOX, 1, 0, 0), (OTHER, 1, 1, 0)], [(BOX, 0.7, 1)]) == 1


def test_threshold_is_reached_by_half():
    half = (10, 10, 110, 60)  # IoU exactly 0.5
    assert ap([(BOX, 1, 0, 0)], [(half, 0.9, 1)]) == 1
    assert ap([(BOX, 1, 0, 0)], [((10, 10, 110, 59), 0.9, 1)]) == 0


def test_best_f1_by_hand():
    # Of three objects: right, wrong, right; then one wrong and one right of the same score, which stay together; an
    # ignored one between them is not shown as anything. F1: 2/4, 2/5, 4/6, 6/8.
    scores = np.array([0.9, 0.8, 0.7, 0.65, 0.6, 0.6])
    status = np.array([1, 0, 1, -1, 0, 1], dtype=np.int8)
    expected = {"min_score": 0.6, "f1": 6 / 8, "precision": 3 / 5, "recall": 1}
    assert best_f1(scores, status, 3) == pytest.approx(expected)
    expected = {"min_score": 0.7, "f1": 4 / 10, "precision": 2 / 3, "recall": 2 / 7}
    assert best_f1(scores[:5], status[:5], 7) == pytest.approx(expected)
    assert best_f1(scores, status, 0) is None
    assert best_f1(scores[3:4], status[3:4], 3) is None


def test_best_f1_is_that_of_the_best_min_score_asked_for():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, status = rng.integers(1, 20, 60) / 20, rng.integers(-1, 2, 60).astype(np.int8)
        found = best_f1(scores, status, 40)
        f1 = {}
        for min_score in scores:
            right, wrong = (((scores >= min_score) & (status == s)).sum() for s in (1, 0))
            f1[min_score] = 2 * right / (2 * right + wrong + 40 - right)
        shown = f1[scores[scores > found["min_score"]].min()]
        assert found["f1"] == pytest.approx(max(f1.values())) == shown
        assert found["f1"] == pytest.approx(2 / (1 / found["precision"] + 1 / found["recall"]))


def test_scores_at_by_hand():
    # Right, wrong, on a difficult object, right, wrong, of four objects.
    scores, status = np.array([0.9, 0.5, 0.45, 0.4, 0.3]), np.array([1, 0, -1, 1, 0], dtype=np.int8)
    assert scores_at(scores, status, 4, 0.3) == {"min_score": 0.3, "f1": 4 / 7, "precision": 2 / 3, "recall": 2 / 4}
    assert scores_at(scores, status, 4, 0.4) == {"min_score": 0.4, "f1": 2 / 6, "precision": 1 / 2, "recall": 1 / 4}
    assert scores_at(scores, status, 4, 0.9) == {"min_score": 0.9, "f1": 0, "precision": None, "recall": 0}
    assert scores_at(scores, status, 0, 0.95) == {"min_score": 0.95, "f1": None, "precision": None, "recall": None}


def test_a_score_of_the_threshold_is_below_it_everywhere():
    """Equal in float32 is equal, in decoding, at a score, in confusions and at the best F1; the next float is above."""
    above = float(np.nextafter(np.float32(0.4), np.float32(1)))
    for scores, kept in (([0.4, float(np.float32(0.4)), 0.4 + 1e-9], 0), ([0.4, above, above], 2)):
        assert above_score(torch.tensor(scores, dtype=torch.float32), 0.4).sum() == kept
        data_list = make_list([[(BOX, 1, False, False)]] * 3)
        found = make_detections([[(BOX, 0, 1)]] * 3)
        for one, score in zip(found, scores, strict=True):
            one["scores"] = torch.tensor([score], dtype=torch.float64)
        ranked = rank(data_list, found)
        status = match_voc(data_list, ranked)
        assert scores_at(ranked.scores, status, 3, 0.4)["recall"] == kept / 3
        assert confusion(data_list, ranked, find_errors(data_list, ranked), 0.4)[1, 1] == kept
    assert best_f1(np.array([-0.5, -0.5]), np.array([1, 1], dtype=np.int8), 2)["recall"] == 1


def test_numbers_or_none_but_no_crash():
    objects = [(BOX, 1, False, False), (BOX, 2, True, False)]
    empty = compute_metrics(make_list([objects, []]), make_detections([[], []]))
    assert empty["voc2007_ap50"] == empty["coco_ap"] == empty["coco_ap_large"] == 0
    assert empty["coco_ap_small"] is None
    assert empty["per_class"]["class2"]["voc2007_ap50"] is None  # a difficult object alone
    assert empty["per_class"]["class3"] == {
        "objects": 0, "difficult": 0, "detections": 0, "at_scores": [], "voc2007_ap50": None, "voc2010_ap50": None,
        "coco_ap": None, "coco_ap50": None,
    }  # fmt: skip
    nothing = compute_metrics(make_list([[], []]), make_detections([[(BOX, 0.5, 1)], []]))
    assert nothing["voc2007_ap50"] is None
    assert nothing["coco_ap"] is None
    with pytest.raises(ValueError, match="1 sets of detections for 2 images"):
        compute_metrics(make_list([[], []]), make_detections([[]]))


# ---------------------------------------------------------------------------------------------------------------------
# Against references


def random_case(rng):
    """Objects and detections on a coarse grid: ties, duplicates, difficult objects, crowds, empty images, classes."""
    objects, detections = [], []
    for _ in range(rng.integers(1, 8)):
        truth, found = [], []
        for _ in range(rng.integers(0, 6)):
            corner, sides = rng.integers(0, 20, 2) * 10, rng.choice([10, 20, 50, 100, 150], 2)
            box = (*corner, *(corner + sides))
            truth.append((box, int(rng.integers(1, 3)), bool(rng.random() < 0.2), bool(rng.random() < 0.1)))
            for _ in range(rng.integers(0, 4)):
                moved = np.array(box) + rng.integers(-2, 3, 4) * 5
                moved[2:] = np.maximum(moved[2:], moved[:2] + 5)
                found.append((tuple(moved), rng.integers(1, 9) / 8, int(rng.integers(1, 4))))
        objects.append(truth)
        detections.append(sorted(found, key=lambda row: -row[1]))
    return objects, detections


def half_inside(box, crowd):
    w, h = min(box[2], crowd[2]) - max(box[0], crowd[0]), min(box[3], crowd[3]) - max(box[1], crowd[1])
    return w > 0 and h > 0 and 2 * w * h >= (box[2] - box[0]) * (box[3] - box[1])


def devkit_ap(objects, detections, label, year):
    """The devkit's evaluation of one class, step by step; crowds as difficult, and where a half is inside of one."""
    ranked = []
    for image, rows in enumerate(detections):
        ranked += [(image, box, score) for box, score, k in rows if k == label]
    ranked.sort(key=lambda row: -row[2])
    truth = [[row for row in rows if row[1] == label] for rows in objects]
    found = [[False] * len(rows) for rows in truth]
    num_objects = sum(not (difficult or crowd) for rows in truth for _, _, difficult, crowd in rows)
    if num_objects == 0:
        return None
    tp, fp = [], []
    for image, box, _ in ranked:
        best, best_overlap = None, -1
        for j, (other, *_) in enumerate(truth[image]):
            w, h = min(box[2], other[2]) - max(box[0], other[0]), min(box[3], other[3]) - max(box[1], other[1])
            if w > 0 and h > 0:
                areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
                overlap = float(w * h) / float(sum(areas) - w * h)
                if overlap > best_overlap:
                    best, best_overlap = j, overlap
        tp.append(0)
        fp.append(0)
        if best is not None and best_overlap >= 0.5:
            if not (truth[image][best][2] or truth[image][best][3]):
                if not found[image][best]:
                    tp[-1], found[image][best] = 1, True
                else:
                    fp[-1] = 1
        else:
            fp[-1] = 1
        if any(crowd and half_inside(box, other) for other, _, _, crowd in truth[image]):
            fp[-1] = 0
    tp, fp = np.cumsum(tp), np.cumsum(fp)
    at = tp + fp > 0  # before the first that counts there is no precision
    tp, fp = tp[at], fp[at]
    recall, precision = tp / num_objects, tp / (tp + fp)
    if year == 2007:
        return sum(max(precision[10 * tp >= t * num_objects], default=0) for t in range(11)) / 11
    recall = np.concatenate([[0], recall, [1]])
    precision = np.concatenate([[0], precision, [0]])
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    return sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)))


def pycocotools_numbers(objects, detections):
    annotations, results = [], []
    for image, rows in enumerate(objects, start=1):
        for (x0, y0, x1, y1), label, difficult, crowd in rows:
            area = 1e11 if difficult else float((x1 - x0) * (y1 - y0))
            bbox = [float(v) for v in (x0, y0, x1 - x0, y1 - y0)]
            one = {"image_id": image, "category_id": label, "area": area, "bbox": bbox, "iscrowd": int(crowd)}
            annotations.append({"id": len(annotations) + 1, **one})
    for image, rows in enumerate(detections, start=1):
        for (x0, y0, x1, y1), score, label in rows:
            bbox = [float(v) for v in (x0, y0, x1 - x0, y1 - y0)]
            results.append({"image_id": image, "category_id": label, "bbox": bbox, "score": float(score)})
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": image} for image in range(1, len(objects) + 1)],
        "annotations": annotations,
        "categories": [{"id": k} for k in (1, 2, 3)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [None if value < 0 else value for value in evaluation.stats]


def test_sizes_are_those_of_the_outlines_where_the_file_has_them():
    """A box of 100 x 100 whose outline covers 500 pixels is small to COCO."""
    data_list = make_list([[(BOX, 1, False, False)]])
    detections = make_detections([[(BOX, 0.9, 1)]])
    assert [compute_metrics(data_list, detections)[f"coco_ap_{size}"] for size in ("small", "large")] == [None, 1]
    data_list.areas = np.array([500], dtype=np.float32)
    assert [compute_metrics(data_list, detections)[f"coco_ap_{size}"] for size in ("small", "large")] == [1, None]
    assert compute_metrics(data_list, make_detections([[]]))["coco_ap_small"] == 0


def test_voc_at_other_overlaps():
    data_list = make_list([[((0, 0, 100, 100), 1, False, False)]])
    metrics = compute_metrics(data_list, make_detections([[((0, 0, 100, 60), 0.9, 1)]]), (0.5, 0.6, 0.61, 0.75))
    assert [metrics[f"voc2010_ap{name}"] for name in (50, 60, 61, 75)] == [1, 1, 0, 0]
    assert metrics["per_class"]["class1"]["voc2007_ap75"] == 0


@pytest.mark.parametrize("cases", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_random_cases_against_the_references(cases):
    rng = np.random.default_rng(0)
    for _ in range(cases):
        objects, detections = random_case(rng)
        metrics = compute_metrics(make_list(objects), make_detections(detections))
        for label in (1, 2, 3):
            row = metrics["per_class"][f"class{label}"]
            for year, name in ((2007, "voc2007_ap50"), (2010, "voc2010_ap50")):
                expected = devkit_ap(objects, detections, label, year)
                assert row[name] == (None if expected is None else pytest.approx(expected, abs=1e-9))
        if any(detections):
            expected = pycocotools_numbers(objects, detections)
            for name, value in zip(COCO_NAMES, expected, strict=True):
                assert metrics[name] == (None if value is None else pytest.approx(value, abs=1e-12)), name


def test_classes_without_a_detection_above_the_best_threshold_are_named(tmp_path):
    """Three of class a with a score of 0.9, one of class b with 0.2, beside four false ones of b."""
    boxes = [[10.0 * k, 0.0, 10.0 * k + 8, 8.0] for k in range(8)]
    content = {
        "images": [{"id": 1, "file_name": "x.jpg", "height": 100, "width": 100}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "c"}],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": 1 + (k == 3), "bbox": [boxes[k][0], 0, 8, 8], "iscrowd": 0}
            for k in range(4)
        ],
    }
    (tmp_path / "list.json").write_text(json.dumps(content))
    scores, labels = [0.9] * 3 + [0.2] + [0.3] * 4, [1] * 3 + [2] * 5
    detections = [{"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}]
    best = compute_metrics(DataList.load(tmp_path / "list.json"), detections)["best_f1"]
    assert best["missed_classes"] == ["b"]  # c has no objects
    assert best["recall"] == 0.75
