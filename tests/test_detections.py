"""Detections written and read again, and what is wrong with other people's files."""

import json
import math

import numpy as np
import pytest
import torch
from test_metrics import make_detections, make_list, random_case

from fpnssd.data.data_list import Strings
from fpnssd.data.images import DataError
from fpnssd.evaluation.metrics import compute_metrics
from fpnssd.evaluation.result_files import read_coco, write_coco, write_voc

BOX, OTHER = (10, 10, 110, 110), (150, 150, 250, 250)


def small_list():
    data_list = make_list([[(BOX, 1, False, False)], [(OTHER, 2, False, False)]], 2)
    data_list.image_ids, data_list.category_ids = np.array([70, 50]), (3, 9)
    return data_list


def write(path, *rows):
    path.write_text(json.dumps(list(rows)))
    return path


GOOD = {"image_id": 50, "category_id": 9, "bbox": [150, 150, 100, 100], "score": 0.5}


def test_own_files_score_the_same(tmp_path):
    rng = np.random.default_rng(0)
    for case in range(10):
        objects, found = random_case(rng)
        data_list, detections = make_list(objects), make_detections(found)
        for result in detections:  # not on the grid, so that adding widths could round
            result["boxes"] = result["boxes"] + torch.rand(1) * 0.37
        write_coco(tmp_path / f"{case}.json", data_list, detections)
        again, problems = read_coco(tmp_path / f"{case}.json", data_list)
        assert problems == {}
        assert compute_metrics(data_list, again) == compute_metrics(data_list, detections)


@pytest.mark.parametrize(
    ("written", "listed", "same"),
    [
        ("photos/a.jpg", "a.jpg", True),  # detect.py writes the path that it was given
        ("a.jpg", "JPEGImages/a.jpg", True),
        ("../voc/JPEGImages/a.jpg", "JPEGImages/a.jpg", True),
        ("C:\\voc\\a.jpg", "a.jpg", True),
        ("/voc/a.jpg", "/voc/a.jpg", True),
        ("photos/b.jpg", "a.jpg", False),
        ("train/a.jpg", "val/a.jpg", False),
        ("aa.jpg", "a.jpg", False),
    ],
)
def test_rows_of_another_image_are_refused_by_file_name(tmp_path, written, listed, same):
    data_list = small_list()
    data_list.file_names = Strings.of(["first.jpg", listed])
    path = write(tmp_path / "d.json", {**GOOD, "file_name": written})
    if same:
        assert len(read_coco(path, data_list)[0][1]["scores"]) == 1
    else:
        with pytest.raises(DataError, match="the ids are those of another list"):
            read_coco(path, data_list)


def test_ids_are_the_lists(tmp_path):
    data_list = small_list()
    detections = make_detections([[(BOX, 0.75, 2)], [(OTHER, 0.5, 1), (BOX, 0.25, 2)]])
    write_coco(tmp_path / "d.json", data_list, detections)
    rows = json.loads((tmp_path / "d.json").read_text())
    assert [(row["image_id"], row["category_id"], row["score"]) for row in rows] == [
        (70, 9, 0.75), (50, 3, 0.5), (50, 9, 0.25)
    ]  # fmt: skip
    assert rows[0]["bbox"] == [10, 10, 100, 100]


@pytest.mark.parametrize("ids", [["7", "x"], ["007", "7.0"]])
def test_ids_that_are_texts_are_found_again(tmp_path, ids):
    data_list = small_list()
    data_list.image_ids = Strings.of(ids)
    detections = make_detections([[(BOX, 0.5, 1)], [(OTHER, 0.25, 2)]])
    write_coco(tmp_path / "own.json", data_list, detections)
    again, problems = read_coco(tmp_path / "own.json", data_list)
    assert problems == {}
    assert [result["scores"].tolist() for result in again] == [[0.5], [0.25]]


def test_file_names_without_ending_are_ids_where_no_image_has_them(tmp_path):
    """As Ultralytics writes them for images of other lists than COCO's."""
    data_list = small_list()
    data_list.file_names = Strings.of(["a/frame_1.jpg", "b/70.jpg"])
    path = write(tmp_path / "a.json", {**GOOD, "image_id": "frame_1"}, {**GOOD, "image_id": 70, "score": 0.25})
    assert [result["scores"].tolist() for result in read_coco(path, data_list)[0]] == [[0.5, 0.25], []]
    data_list.file_names = Strings.of(["a/frame_1.jpg", "b/frame_1.jpg"])
    with pytest.raises(DataError, match="1 x unknown image_id"):
        read_coco(path, data_list)


def test_categories_that_start_at_1_are_said_to(tmp_path):
    data_list = small_list()
    data_list.category_ids = (0, 1)
    path = write(tmp_path / "a.json", {**GOOD, "category_id": 1}, {**GOOD, "category_id": 2})
    with pytest.raises(DataError, match="category ids start at 1 in the file and at 0 in the list"):
        read_coco(path, data_list)


def test_detections_come_in_any_order(tmp_path):
    worse = {**GOOD, "score": 0.25}
    (_, second), _ = read_coco(write(tmp_path / "d.json", worse, GOOD), small_list())
    assert second["scores"].tolist() == [0.5, 0.25]
    assert second["labels"].tolist() == [2, 2]
    nothing, _ = read_coco(write(tmp_path / "e.json"), small_list())
    assert [len(result["scores"]) for result in nothing] == [0, 0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"score": math.nan}, "score is not finite"),
        ({"score": 10**400}, "score is not finite"),
        ({"bbox": [1, 2, math.inf, 4]}, "bbox is not finite"),
        ({"bbox": [1, 2, -3, 4]}, "negative width or height"),
        ({"bbox": [1, 2, 3]}, "bbox is not four numbers"),
        ({"bbox": ["1", 2, 3, 4]}, "bbox is not four numbers"),
        ({"bbox": 5}, "bbox is not four numbers"),
        ({"score": None}, "score is not a number"),
        ({"score": "0.5"}, "score is not a number"),
        ({"score": True}, "score is not a number"),
        ({"image_id": [50]}, "image_id is not an id"),
        ({"image_id": 51}, "unknown image_id"),
        ({"category_id": 1}, "unknown category_id"),
        ({"file_name": "other/0.jpg"}, "file_name is not that of the image"),
    ],
)
def test_bad_detections_are_named_or_skipped(tmp_path, change, problem):
    path = write(tmp_path / "d.json", GOOD, {**GOOD, **change}, GOOD)
    with pytest.raises(DataError, match=rf"d\.json: 1 x {problem}.*first row 2, .*ids 70, 50.*--skip-bad"):
        read_coco(path, small_list())
    (_, second), problems = read_coco(path, small_list(), skip_bad=True)
    assert len(second["scores"]) == 2
    assert list(problems.values()) == [1]


def test_ids_may_be_texts_as_in_lists(tmp_path):
    row = {**GOOD, "image_id": str(GOOD["image_id"]), "category_id": float(GOOD["category_id"])}
    (_, second), problems = read_coco(write(tmp_path / "d.json", row), small_list())
    assert (len(second["scores"]), problems) == (1, {})


def test_a_file_of_bad_rows_alone_is_refused(tmp_path):
    path = write(tmp_path / "d.json", {**GOOD, "image_id": 51}, {"image_id": 50})
    with pytest.raises(DataError, match="1 x unknown image_id.*1 x category_id is missing.*No row is left to evaluate"):
        read_coco(path, small_list(), skip_bad=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        pytest.param("[" * 100_000, "not JSON", id="nested"),
        ("{}", "not a list of detections"),
        ("[1", "not JSON"),
    ],
)
def test_bad_files_are_named(tmp_path, text, said):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(DataError, match=rf"d\.json is {said}"):
        read_coco(tmp_path / "d.json", small_list(), skip_bad=True)


def test_voc_files_are_one_based(tmp_path):
    data_list = small_list()
    data_list.file_names = Strings.of(["2008_000001.jpg", "VOC2012/JPEGImages/2008_000002.jpg"])
    detections = make_detections([[((0, 4.5, 20, 30), 0.5, 1)], [(BOX, 0.25, 1)]])
    write_voc(tmp_path / "comp4", data_list, detections, "test")
    # Blanks at the end are the mark of our own outputs (utils.check_outputs); readers of the form pass over them.
    assert [line.rstrip() for line in (tmp_path / "comp4" / "comp4_det_test_class1.txt").read_text().splitlines()] == [
        "2008_000001 0.500000 1.000 5.500 20.000 30.000",
        "2008_000002 0.250000 11.000 11.000 110.000 110.000",
    ]
    assert (tmp_path / "comp4" / "comp4_det_test_class2.txt").read_text().strip() == ""


@pytest.mark.parametrize("names", [["a/1.jpg", "b/1.jpg"], ["photo 1.jpg", "b.jpg"]])
def test_voc_files_cannot_name_every_image(tmp_path, names):
    data_list = small_list()
    data_list.file_names = Strings.of(names)
    with pytest.raises(DataError, match="the name has a blank, or is that of two images"):
        write_voc(tmp_path, data_list, make_detections([[], []]), "val")
    assert not list(tmp_path.iterdir())


def test_voc_files_of_two_classes_are_two(tmp_path):
    data_list = small_list()
    data_list.classes = ("a/b", "a:b")
    with pytest.raises(DataError, match=r"classes 'a/b' and 'a:b' would both be .*a_b\.txt: rename one"):
        write_voc(tmp_path / "comp4", data_list, make_detections([[], []]), "test")
    assert not (tmp_path / "comp4").exists()
