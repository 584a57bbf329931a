"""What the drawn set promises: determinism, sizes, overlaps, difficult and empty images, boxes that fit."""

import json

import numpy as np
import pytest

from create_data_lists import create_data_lists
from fpnssd.data.synthetic import SHAPES, draw_dataset, draw_image, main
from fpnssd.data.voc import read_voc


@pytest.fixture(scope="module")
def images():
    return [draw_image(np.random.default_rng([0, 0, number])) for number in range(60)]


def test_the_seed_decides_everything(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        draw_dataset(tmp_path / folder, {"train": 2, "val": 1}, seed)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 8
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    photograph = "JPEGImages/train_00000.jpg"
    assert (tmp_path / "a" / photograph).read_bytes() != (tmp_path / "c" / photograph).read_bytes()


def test_it_holds_what_it_promises(images):
    objects = [one for _, of_image in images for one in of_image]
    areas = np.array([(x1 - x0 + 1) * (y1 - y0 + 1) for x0, y0, x1, y1 in (one["box"] for one in objects)])
    assert len(SHAPES) >= 5
    assert {one["name"] for one in objects} == set(SHAPES)
    assert min((areas < 32**2).sum(), ((areas >= 32**2) & (areas < 96**2)).sum(), (areas >= 96**2).sum()) >= 10
    assert any(one["difficult"] for one in objects)
    assert any(one["truncated"] for one in objects)
    assert any(not of_image for _, of_image in images)
    for image, of_image in images:
        for x0, y0, x1, y1 in (one["box"] for one in of_image):
            assert 1 <= x0 < x1 <= image.width
            assert 1 <= y0 < y1 <= image.height


def test_some_objects_overlap(images):
    def overlap(a, b):
        return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])

    boxes = [[one["box"] for one in of_image] for _, of_image in images]
    assert any(overlap(a, b) for of_image in boxes for i, a in enumerate(of_image) for b in of_image[:i])


def test_the_lists_find_nothing_wrong(tmp_path):
    draw_dataset(tmp_path / "voc", {"train": 30})
    create_data_lists([read_voc([tmp_path / "voc"], "train")], tmp_path)
    kinds = {row["kind"] for row in json.loads((tmp_path / "check.json").read_text())["problems"]}
    assert kinds <= {"image without objects", "class without objects"}
    assert len(json.loads((tmp_path / "train.json").read_text())["images"]) == 30


def test_no_file_of_the_users_is_replaced(tmp_path):
    arguments = ["--out", str(tmp_path), "--train", "1", "--val", "1"]
    main(arguments)
    main(arguments)  # its own files it may replace
    photograph = tmp_path / "JPEGImages" / "val_00000.jpg"
    photograph.write_bytes(b"mine")
    with pytest.raises(SystemExit, match=r"val_00000\.jpg exists already"):
        main(arguments)
    assert photograph.read_bytes() == b"mine"
    main([*arguments, "--overwrite"])
    assert photograph.read_bytes() != b"mine"
