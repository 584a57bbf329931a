"""Data lists and their images, and what is wrong with them."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpnssd.data.data_list import DataList, Strings
from fpnssd.data.images import DataError, read_image


def noise_image(width, height, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def write_list(path, **changes):
    content = {
        "info": {"image_root": "."},
        "images": [{"id": 7, "file_name": "a.jpg", "width": 10, "height": 20}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 1, "difficult": 1}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
        **changes,
    }
    path.write_text(json.dumps(content))
    return path


def test_data_list_is_read(tmp_path):
    data_list = DataList.load(write_list(tmp_path / "x.json"))
    target = data_list.target(0)
    assert target["boxes"].tolist() == [[1, 2, 4, 6]]
    assert (target["labels"].tolist(), target["image_id"], target["size"]) == ([2], 7, (20, 10))
    assert target["difficult"].tolist() == target["crowd"].tolist() == [True]
    assert data_list.image_path(0) == tmp_path / "a.jpg"
    assert DataList.load(tmp_path / "x.json", images="/photos").image_path(0).as_posix() == "/photos/a.jpg"


def test_data_list_without_objects(tmp_path):
    data_list = DataList.load(write_list(tmp_path / "x.json", annotations=[]))
    assert data_list.target(0)["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"annotations": [{"id": 5, "image_id": 8, "category_id": 1, "bbox": [0, 0, 1, 1]}]}, "5 names image_id 8"),
        ({"annotations": [{"id": 5, "image_id": 7, "category_id": 2, "bbox": [0, 0, 1, 1]}]}, "category_id 2"),
        (
            {"annotations": [{"id": 5, "image_id": 7, "category_id": 1, "bbox": [0, 0, 0, 1]}]},
            "5 has a box",
        ),
        ({"annotations": [{"id": 5, "image_id": 7, "category_id": 1, "bbox": [5, 5, 9, 9]}]}, "leaves its image"),
        ({"images": [{"id": 7, "file_name": "a", "width": 1, "height": 2}] * 2}, "same id to two images"),
        ({"images": [{"id": 7}]}, "not a COCO JSON data list"),
        ({"images": [{"id": 2**63, "file_name": "a", "width": 1, "height": 2}], "annotations": []}, "too large"),
    ],
)
def test_bad_data_lists_are_named(tmp_path, changes, said):
    with pytest.raises(DataError, match=said):
        DataList.load(write_list(tmp_path / "x.json", **changes))


def test_what_is_no_data_list(tmp_path):
    (tmp_path / "x.json").write_text("<xml/>")
    with pytest.raises(DataError, match=r"x\.json is not a COCO JSON"):
        DataList.load(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match=r"has the lists x, python create_data_lists\.py creates others"):
        DataList.load(tmp_path / "y.json")


def test_bad_images_are_named(tmp_path):
    noise_image(50, 50).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("hello")
    for name in ("cut", "text", "absent"):
        with pytest.raises(DataError, match=f"{name}.jpg"):
            read_image(tmp_path / f"{name}.jpg")


def test_image_of_another_size_is_refused(tmp_path):
    noise_image(50, 50).save(tmp_path / "a.jpg")
    data_list = DataList.load(write_list(tmp_path / "x.json"))
    with pytest.raises(DataError, match=r"a\.jpg is 50x50 pixels, but .*x\.json says 10x20"):
        data_list.read_image(0)


def test_strings_are_a_list():
    names = ["", "a.jpg", "Bäume/ß 1.png", "", "z" * 300]
    table = Strings.of(names)
    assert len(table) == 5
    assert [table[i] for i in range(5)] == names
    assert len(Strings.of([])) == 0


def two_images(path):
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 10, "height": 20} for i in (7, 9)]
    objects = [{"image_id": i, "category_id": c, "bbox": [1, 2, 3, 4]} for i, c in ((7, 3), (9, 1))]
    return write_list(path, images=images, annotations=objects)


def test_content_hash_is_of_what_trains(tmp_path):
    """Each change of the content changes it; another place, other ids and another spelling of the JSON do not."""
    content = json.loads(two_images(tmp_path / "x.json").read_text())
    before = DataList.load(tmp_path / "x.json").content_hash

    def hash_after(change, folder="."):
        changed = json.loads(json.dumps(content))
        change(changed)
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / "y.json"
        path.write_text(json.dumps(changed, indent=3))
        return DataList.load(path).content_hash

    assert hash_after(lambda c: c["info"].update(image_root="/photos"), "elsewhere") == before
    assert hash_after(lambda c: c["annotations"][0].update(id=5, area=3.0, iscrowd=0)) == before
    assert hash_after(lambda c: [c["images"][0].update(id=3), c["annotations"][0].update(image_id=3)]) == before
    others = [
        hash_after(lambda c: c["categories"][0].update(name="cow")),
        hash_after(lambda c: c["categories"].append({"id": 4, "name": "cow"})),
        hash_after(lambda c: c["categories"].reverse()),
        hash_after(lambda c: c["images"][0].update(file_name="8.jpg")),
        hash_after(lambda c: c["images"][0].update(width=11)),
        hash_after(lambda c: c["images"][0].update(apply_exif=True)),
        hash_after(lambda c: c["images"].reverse()),
        hash_after(lambda c: c["images"].append({"id": 1, "file_name": "b.jpg", "width": 10, "height": 20})),
        hash_after(lambda c: c["annotations"][0].update(bbox=[1, 2, 3, 4.01])),
        hash_after(lambda c: c["annotations"][0].update(category_id=1)),
        hash_after(lambda c: c["annotations"][0].update(image_id=9)),
        hash_after(lambda c: c["annotations"][0].update(iscrowd=1)),
        hash_after(lambda c: c["annotations"][0].update(difficult=1)),
        hash_after(lambda c: c["annotations"].pop()),
    ]
    assert len({before, *others}) == len(others) + 1


def same_lists(a, b):
    assert (a.classes, a.category_ids, a.image_root) == (b.classes, b.category_ids, b.image_root)
    assert a.content_hash == b.content_hash
    np.testing.assert_array_equal(a.areas, b.areas)
    np.testing.assert_array_equal(a.truncated, b.truncated)
    for index in range(len(a)):
        one, other = a.target(index), b.target(index)
        assert a.image_path(index) == b.image_path(index)
        assert set(one) == set(other)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("ids", [[7, 9], ["seven", "nine"]])
def test_arrays_of_a_large_list_are_kept_and_mapped(tmp_path, monkeypatch, ids):
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 10, "height": 20} for i in ids]
    path = write_list(tmp_path / "x.json", images=images, annotations=[
        {"id": 1, "image_id": ids[0], "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 1, "area": 7.5},
        {"id": 2, "image_id": ids[1], "category_id": 1, "bbox": [0, 2, 3, 4], "difficult": 1, "truncated": 1},
    ])  # fmt: skip
    parsed = DataList.load(path)
    assert parsed.object_areas.tolist() == [7.5, 12]
    assert parsed.truncated.tolist() == [-1, 1]
    monkeypatch.setattr("fpnssd.data.data_list.ARRAYS_FROM", 0)
    same_lists(parsed, DataList.load(path))  # makes the file
    monkeypatch.setattr(DataList, "_from_json", None)  # and now it has to do without parsing
    mapped = DataList.load(path)
    same_lists(parsed, mapped)
    assert mapped.arrays_file == tmp_path / "x.arrays"
    same_lists(mapped, pickle.loads(pickle.dumps(mapped)))
    assert len(pickle.dumps(mapped)) < 500
    assert DataList.load(path, images="/photos").image_path(0).parent == Path("/photos")
    assert pickle.loads(pickle.dumps(DataList.load(path, images="/photos"))).image_root == Path("/photos")


@pytest.mark.parametrize("length", [1, 2, 50_000])
def test_a_list_read_in_parts_is_the_same(tmp_path, monkeypatch, length):
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 10.0, "height": 20, "apply_exif": i == 9} for i in (7, 9, 4)]
    objects = [
        {"id": 1, "image_id": 4, "category_id": 3, "bbox": [1, 2, 3.25, 4], "iscrowd": 1, "area": 7.5},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 2, 3, 4], "difficult": 1, "truncated": 1},
        {"id": 3, "image_id": 4, "category_id": 1, "bbox": [0, 0, 3, 4]},
    ]
    path = write_list(tmp_path / "x.json", images=images, annotations=objects)
    empty = write_list(tmp_path / "empty.json", annotations=[])
    whole, whole_empty = DataList.load(path), DataList.load(empty)
    monkeypatch.setattr("fpnssd.data.data_list.STREAMED_FROM", 0)
    monkeypatch.setattr("fpnssd.data.data_list.read_coco_json", None)
    monkeypatch.setattr("fpnssd.data.data_list.PART", length)
    same_lists(whole, DataList.load(path))
    assert whole.sizes.dtype == DataList.load(path).sizes.dtype
    assert DataList.load(path).apply_exif.tolist() == [False, True, False]
    assert DataList.load(empty).content_hash == whole_empty.content_hash
    objects[2]["bbox"] = [0, 0, 30, 4]
    with pytest.raises(DataError, match="annotation 3 has a box"):
        DataList.load(write_list(path, images=images, annotations=objects))


def test_broken_large_lists_are_named_too(tmp_path, monkeypatch):
    monkeypatch.setattr("fpnssd.data.data_list.STREAMED_FROM", 0)
    path = write_list(tmp_path / "x.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"x\.json is not a COCO JSON file"):
        DataList.load(path)
    write_list(path)
    path.write_bytes(path.read_text().encode("utf-16"))
    assert len(DataList.load(path)) == 1


def test_stale_or_broken_arrays_are_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("fpnssd.data.data_list.ARRAYS_FROM", 0)
    path = write_list(tmp_path / "x.json")
    DataList.load(path)
    write_list(path, classes=[], annotations=[])
    assert len(DataList.load(path).boxes) == 0
    write_list(path)
    (tmp_path / "x.arrays").write_bytes(b"rubbish")
    assert len(DataList.load(path).boxes) == 1
    monkeypatch.setattr(
        "fpnssd.data.data_list.ARRAYS_VERSION", 4
    )  # a file of the version before is of no use to this one
    monkeypatch.setattr(DataList, "_from_arrays", lambda path, images, arrays_file: torch.load(arrays_file)["version"])
    assert DataList.load(path) == 4
    (tmp_path / "x.arrays").unlink()
    (tmp_path / "x.arrays").mkdir()  # where no file can be written
    assert len(DataList.load(path, images="/photos").boxes) == 1
