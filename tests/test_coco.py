"""COCO's format as other tools write it: values that are texts, polygons, groups, folders; and what is refused."""

import json

import pytest
from PIL import Image

from fpnssd.data.annotations import parse_flag, parse_number, parse_size, rotated_box
from fpnssd.data.checks import check_image, check_objects
from fpnssd.data.coco import enclosing_box, parse_id, read_coco
from fpnssd.data.data_list import DataList
from fpnssd.data.images import DataError

GOOD = {"id": 1, "image_id": 5, "category_id": 2, "bbox": [1, 2, 30, 40]}


@pytest.fixture
def write(tmp_path):
    """Writes a COCO file with an image a.jpg and an object; changes replace parts of it."""
    Image.new("RGB", (100, 80)).save(tmp_path / "a.jpg")

    def write_file(name="train", **changes):
        content = {
            "info": {"description": "drawn"},
            "images": [{"id": 5, "file_name": "a.jpg", "width": 100, "height": 80}],
            "annotations": [GOOD],
            "categories": [{"id": 1, "name": "mug"}, {"id": 2, "name": "key"}],
        }
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**content, **changes}))
        return path

    return write_file


def read_one(path):
    """(records, problems, classes) of one file."""
    (split,), classes = read_coco([path], ["train"])
    return [parse() for parse in split.records], split.problems, classes


@pytest.mark.parametrize(
    "changes",
    [
        {"image_id": "5"},
        {"image_id": 5.0, "category_id": 2.0},
        {"category_id": "2"},
        {"category_id": " 2.0"},
        {"bbox": ["1", "2.0", " 30", "4e1"]},
        {"iscrowd": "0", "difficult": "false", "truncated": None},
        {"iscrowd": False, "area": "1200"},
        {"iscrowd": 0.0, "area": ""},
        {"bbox": [], "segmentation": [[1, 2, 31, 2, 31, 42]]},
        {"bbox": None, "segmentation": [[1, 2, 20, 2, 20, 9], [9, 9, 31, 42, 9, 42]]},
    ],
)
def test_values_are_read_as_exports_write_them(write, changes):
    """Each is the same object: xyxy 1, 2, 31, 42, neither difficult nor a crowd."""
    (record,), problems, classes = read_one(write(annotations=[{**GOOD, **changes}]))
    (one,) = record.objects
    assert (one.name, one.box, one.difficult, one.crowd) == ("key", (1, 2, 31, 42), False, False)
    assert one.area in (None, 1200)
    assert {problem.kind for problem in problems} <= {"polygon instead of a box"}
    assert classes == {"mug": 1, "key": 2}


@pytest.mark.parametrize("flag", [1, 1.0, True, "1", "true", " True "])
def test_flags_that_are_set(write, flag):
    entry = {**GOOD, "iscrowd": flag, "difficult": flag, "truncated": flag}
    (record,), problems, _ = read_one(write(annotations=[entry]))
    (one,) = record.objects
    assert (one.crowd, one.difficult, one.truncated, problems) == (True, True, True, [])


@pytest.mark.parametrize("flag", [2, -1, "2", "maybe", [1], {"a": 1}, "1 0"])
def test_other_flags_are_named_and_not_set(write, flag):
    (record,), (problem,), _ = read_one(write(annotations=[{**GOOD, "iscrowd": flag}]))
    assert record.objects[0].crowd is False
    assert problem.kind == "flag unreadable"
    assert "train.json: annotation 1: iscrowd " in problem.where


def test_problems_with_a_box_name_file_and_annotation_once(write):
    entry = {**GOOD, "bbox": [1, 2, 0, 40]}
    (record,), _, _ = read_one(write(annotations=[entry]))
    objects, ((kind, text),) = check_objects(record, (100, 100), 300)
    assert (objects, kind) == ([], "box empty")
    assert text == "key annotation 1 [1, 2, 0, 40] in 100x100"


@pytest.mark.parametrize("area", ["big", -3, 0, float("nan"), [4]])
def test_areas_that_are_none_are_named(write, area):
    (record,), (problem,), _ = read_one(write(annotations=[{**GOOD, "area": area}]))
    assert record.objects[0].area is None
    assert problem.kind == "area unusable"


@pytest.mark.parametrize(
    "changes",
    [
        {"bbox": "1234"},
        {"bbox": {"x": 1, "y": 2, "width": 3, "height": 4}},
        {"bbox": [1, 2, 3, True]},
        {"bbox": [1, 2, 3, "1_0"]},
        {"bbox": [1, 2, 3, 4, 5], "segmentation": [[1, 2, 31, 2, 31, 42]]},
        {"bbox": None, "segmentation": [[1, 2, 31, 2]]},
        {"bbox": None, "segmentation": [[1, 2, 31, 2, 31]]},
        {"bbox": None, "segmentation": [[1, 2, 31, 2, 31, float("inf")]]},
        {"bbox": None, "segmentation": {"counts": "abc", "size": [80, 100]}},
    ],
)
def test_boxes_that_are_not_guessed(write, changes):
    (record,), (problem,), _ = read_one(write(annotations=[{**GOOD, **changes}]))
    assert record.objects == []
    assert problem.kind == "object without a box"


@pytest.mark.parametrize(("degrees", "box"), [(0.0, None), (90, (-4, 7, 36, 37)), ("180", None), (None, None)])
def test_boxes_that_cvat_turned(write, degrees, box):
    (record,), problems, _ = read_one(write(annotations=[{**GOOD, "attributes": {"rotation": degrees}}]))
    assert record.objects[0].box == pytest.approx(box or (1, 2, 31, 42))
    assert [problem.kind for problem in problems] == (["rotated box"] if box else [])


def test_a_turned_square_needs_more_room_by_the_root_of_two():
    assert rotated_box((0, 0, 10, 10), 45) == pytest.approx((5 - 50**0.5, 5 - 50**0.5, 5 + 50**0.5, 5 + 50**0.5))
    assert rotated_box((10, 10, 210, 30), -45) == pytest.approx(
        (110 - 77.78, 20 - 77.78, 110 + 77.78, 20 + 77.78), abs=0.01
    )


def test_label_studio_writes_sizes_before_the_turn_and_boxes_after_it(write):
    path = write(info={"contributor": "Label Studio"})
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (100, 80)).save(path.parent / "a.jpg", exif=tags)
    checked, _ = check_image(read_one(path)[0][0], path.parent)
    assert checked.apply_exif
    assert checked.size == (100, 80)
    Image.new("RGB", (50, 40)).save(path.parent / "a.jpg", exif=tags)
    checked, problems = check_image(read_one(path)[0][0], path.parent)
    assert checked is None
    assert [problem.kind for problem in problems][-1] == "size differs from the annotation's"


def test_polygons_may_be_pairs():
    assert enclosing_box([[3, 4], [9, 4], ["9", 20]]) == (3, 4, 9, 20)
    assert enclosing_box([3, 4, 9, 4, 9, 20]) == (3, 4, 9, 20)


def test_ids_are_kept_and_0_is_one(write):
    """Text ids stay texts, as results have to name images as the file does."""
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in ("p1", "007", "7", 0, 8.0)]
    entries = [{**GOOD, "image_id": i, "category_id": 0} for i in ("p1", "007", 7, "0", "8")]
    categories = [{"id": 0, "name": "key"}, {"id": 9, "name": "mug"}]
    path = write(images=images, annotations=entries, categories=categories)
    (split,), classes = read_coco([path], ["train"], [path.parent])
    records = [parse() for parse in split.records]
    assert [record.image_id for record in records] == ["p1", "007", "7", 0, 8]
    assert [len(record.objects) for record in records] == [1] * 5
    assert classes == {"key": 0, "mug": 9}
    assert [parse_id(value) for value in ("12", "-3", "0", "1.0", "1.5", "01")] == [12, -3, 0, 1, "1.5", "01"]
    for value in (None, True, 1.5, [1], 2**63, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="neither a whole number nor a text"):
            parse_id(value)


def test_categories_without_whole_ids_are_numbered(write):
    categories = [{"id": "mug-id", "name": "mug"}, {"id": "key-id", "name": "key"}]
    (record,), problems, classes = read_one(
        write(categories=categories, annotations=[{**GOOD, "category_id": "key-id"}])
    )
    assert (record.objects[0].name, problems, classes) == ("key", [], {"mug": 1, "key": 2})


def test_a_group_is_no_class(write, capsys):
    """Roboflow's category 0 is the project's name, even where a class has the same."""
    for project in ("kitchen", "key"):
        categories = [{"id": 0, "name": project, "supercategory": "none"}]
        categories += [{"id": 2, "name": "key", "supercategory": project}]
        assert read_one(write(categories=categories))[2] == {"key": 2}
        assert f"category 0, '{project}', is a supercategory" in capsys.readouterr().err
    # Where an object has it, in any of the files, it is a class.
    categories = [{"id": 0, "name": "animal"}, {"id": 2, "name": "cat", "supercategory": "animal"}]
    files = [write("train", categories=categories), write("val", categories=categories)]
    assert read_coco(files, ["train", "val"])[1] == {"cat": 2}
    files[1] = write("val", categories=categories, annotations=[{**GOOD, "category_id": 0}])
    assert read_coco(files, ["train", "val"])[1] == {"animal": 0, "cat": 2}
    # Two classes of one name, of which neither is a group.
    with pytest.raises(DataError, match=r"gives category 'key' the id 2, .* 1$"):
        read_one(write(categories=[{"id": 1, "name": "key"}, {"id": 2, "name": "key "}]))


@pytest.mark.parametrize("info", [None, [], "made by hand", 3, {"image_root": None}, {"image_root": 3}])
def test_info_may_be_anything(write, info):
    assert len(read_one(write(info=info))[0]) == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(write, encoding):
    path = write()
    path.write_text(path.read_text(), encoding=encoding)
    assert len(read_one(path)[0][0].objects) == 1


def test_annotations_may_be_missing(write):
    path = write()
    content = json.loads(path.read_text())
    del content["annotations"]
    path.write_text(json.dumps(content))
    assert read_one(path)[0][0].objects == []
    assert read_one(write(annotations=None))[0][0].objects == []


def test_two_entries_of_a_file_are_one_image(write):
    images = [{"id": i, "file_name": name, "width": 100, "height": 80} for i, name in ((5, "a.jpg"), (6, "./a.jpg"))]
    entries = [GOOD, {**GOOD, "image_id": 6, "bbox": [5, 5, 9, 9]}]
    (record,), (problem,), _ = read_one(write(images=images, annotations=entries))
    assert [one.box for one in record.objects] == [(1, 2, 31, 42), (5, 5, 14, 14)]
    assert (problem.kind, record.image_id) == ("image named twice", 5)


@pytest.mark.parametrize("sides", [(0, 0), (-1, 80), (None, None), ("", ""), ("null", 80)])
def test_sizes_that_are_not_given(write, sides):
    image = {"id": 5, "file_name": "a.jpg", "width": sides[0], "height": sides[1]}
    assert read_one(write(images=[image]))[0][0].size is None
    assert parse_size("80", 100.0) == (80, 100)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "holds a list"),
        ("null", "holds a NoneType"),
        ('{"images": {"1": {}}, "categories": []}', "images that are not a list of objects"),
        ('{"images": [1], "categories": []}', "images that are not a list of objects"),
        ('{"categories": []}', "has no images"),
        ('{"images": []}', "has no categories"),
        ('{"images": [], "annotations": 3, "categories": []}', "annotations that are not a list"),
        ('{"images": [', "not a COCO JSON file .JSONDecodeError"),
        (b"\xff\xfe\x00", "not a COCO JSON file .UnicodeDecodeError"),
    ],
)
def test_other_json_is_refused(tmp_path, text, said):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=said):
        read_coco([path], ["train"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"categories": []}, "has no categories"),
        ({"categories": [{"id": 1, "name": None}]}, "category 1: None is not a class name"),
        ({"categories": [{"id": 1, "name": " "}]}, "category 1: ' ' is not a class name"),
        ({"categories": [{"id": 1, "name": "a\0b"}]}, "has a control character"),
        ({"categories": [{"id": 1, "name": "a\ud800"}]}, "is not UTF-8"),
        ({"categories": [{"id": None, "name": "mug"}]}, "category 'mug' has the id None"),
        ({"categories": [{"name": "mug"}]}, "category 'mug' has the id None"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": "1", "name": "b"}]}, "two categories the same id 1"),
        ({"images": [{"id": 5, "file_name": None}]}, "image 5 has no file_name"),
        ({"images": [{"id": 5, "file_name": 7}]}, "image 5 has the file_name 7"),
        ({"images": [{"file_name": "a.jpg"}]}, "image 'a.jpg' has the id None"),
        ({"images": [{"id": 2**64, "file_name": "a.jpg"}]}, "neither a whole number nor a text"),
        ({"images": [{"id": i, "file_name": f"{i}.jpg"} for i in (5, "5")]}, "two images the id 5"),
        ({"images": [{"id": 5, "file_name": "b.jpg"}]}, "no image .* can be found, such as b.jpg.*--images"),
    ],
)
def test_files_that_are_refused_by_value(write, changes, said):
    with pytest.raises(DataError, match=said):
        read_one(write(**changes))


@pytest.mark.parametrize("folder", ["", "images", "data", "../images", "../images/default", "../train2017", "../train"])
def test_images_are_looked_for_where_tools_put_them(tmp_path, folder):
    """Beside the file (Roboflow), and as CVAT, COCO, FiftyOne and Supervisely export them."""
    content = {"images": [{"id": 1, "file_name": "sub\\a.jpg"}], "categories": [{"id": 1, "name": "mug"}]}
    stem = folder.rpartition("/")[2] if folder.startswith("../") else "x"
    path = tmp_path / "annotations" / f"instances_{stem}.json"
    (path.parent / folder / "sub").mkdir(parents=True)
    Image.new("RGB", (10, 10)).save(path.parent / folder / "sub" / "a.jpg")
    path.write_text(json.dumps(content))
    (split,), _ = read_coco([path], ["train"])
    assert (split.image_root / split.records[0]().file_name).resolve() == (
        path.parent / folder / "sub" / "a.jpg"
    ).resolve()


def test_flags_of_a_list_are_read_as_such(write):
    """A list that somebody else wrote: the text "0" is no crowd."""
    path = write(annotations=[{**GOOD, "iscrowd": "0", "difficult": "true", "truncated": "1"}])
    data_list = DataList.load(path)
    assert (data_list.crowd.tolist(), data_list.difficult.tolist(), data_list.truncated.tolist()) == ([0], [1], [1])
    with pytest.raises(DataError, match="'maybe' is neither 0 nor 1"):
        DataList.load(write(annotations=[{**GOOD, "iscrowd": "maybe"}]))
    with pytest.raises(DataError, match="whole number from 0"):
        DataList.load(write(categories=[{"id": "2", "name": "key"}], annotations=[]))


def test_numbers_and_flags():
    assert [parse_number(value) for value in (3, "3", " 3.5 ", 1e3)] == [3, 3, 3.5, 1000]
    for value in (True, None, "", "1,5", "1_0", [1], 10**400):
        with pytest.raises(ValueError, match="is not a number"):
            parse_number(value)
    assert [parse_flag(value) for value in (None, "", "Unspecified", "NULL")] == [None] * 4
