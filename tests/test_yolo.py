"""YOLO's format: where images and labels are looked for, what a line means, and each kind of bad input."""

import numpy as np
import pytest
import yaml
from made_lists import listed, problems
from PIL import Image

from create_data_lists import main


def write_yolo(root, labels, names=("dog", "cat")):
    """labels: {image name: text of its label file, or None}."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for name, text in labels.items():
        colours = np.random.default_rng(list(name.encode())).integers(0, 256, (5, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((100, 50)).save(root / "images" / f"{name}.jpg")
        if text is not None:
            (root / "labels" / f"{name}.txt").write_text(text)
    (root / "data.yaml").write_text(yaml.safe_dump({"names": list(names), "train": "images"}))
    return ["--yolo", str(root / "data.yaml"), "--splits", "train", "--out", str(root / "out")]


def test_yolo_labels(tmp_path):
    labels = {
        "a": "0 0.5 0.5 0.2 0.4\n1 0.25 0.5 0.5 1\n",
        "background": None,
        "polygon": "1 0.1 0.1 0.6 0.2 0.3 0.8\n",
        "strange": "7 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n",
        "word": "dog 0.5 0.5 0.2 0.2\n",
        "short": "0 0.5 0.5 0.2\n",
    }
    main(write_yolo(tmp_path, labels))
    content = listed(tmp_path / "out")
    assert [image["file_name"] for image in content["images"]] == [
        "images/a.jpg", "images/background.jpg", "images/polygon.jpg", "images/strange.jpg"
    ]  # fmt: skip
    boxes = [entry["bbox"] for entry in content["annotations"]]
    np.testing.assert_allclose(boxes, [[40, 15, 20, 20], [0, 0, 50, 50], [10, 5, 50, 35], [40, 20, 20, 10]], atol=1e-9)
    found = problems(tmp_path / "out")
    assert "polygon.txt" in found["polygon instead of a box"][0]
    assert "7 0.5" in found["object of an unknown class"][0]
    assert "word.txt" in found["number unreadable"][0]
    assert "short.txt" in found["annotation incomplete"][0]


def test_yolo_images_have_any_ending_that_is_read(tmp_path):
    arguments = write_yolo(tmp_path, {"a": "0 0.5 0.5 0.2 0.4\n", "b": ""})
    for name, ending in (("c", "png"), ("d", "Bmp"), ("e", "webp"), ("f", "TIF")):
        Image.open(tmp_path / "images" / "a.jpg").rotate(ord(name)).save(tmp_path / "images" / f"{name}.{ending}")
    main(arguments)
    assert len(listed(tmp_path / "out")["images"]) == 6


def test_yolo_lists_of_images_and_named_classes(tmp_path):
    arguments = write_yolo(tmp_path, {"a": "3 0.5 0.5 0.2 0.4\n", "b": ""})
    (tmp_path / "train.txt").write_text("./images/b.jpg\nimages/a.jpg\nimages/a.jpg\n")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: train.txt\nnames:\n  3: dog\n  1: cat\n")
    main(arguments)
    assert [image["file_name"] for image in listed(tmp_path / "out")["images"]] == ["images/b.jpg", "images/a.jpg"]
    assert [category["name"] for category in listed(tmp_path / "out")["categories"]] == ["cat", "dog"]
    assert "image named twice" in problems(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("names: [a]\n", "no split 'train' in .*data.yaml"),
        ("names: [a]\ntrain: nowhere\n", "nowhere, which is neither a folder nor a text file"),
        ("train: images\n", "no data.yaml with `names`"),
        ("names: {cat: 0}\ntrain: images\n", "no data.yaml with `names`"),
        ("names: cat\ntrain: images\n", "no data.yaml with `names`"),
        ("names: [a\n", "no data.yaml with `names`"),
        ("names: [a]\ntrain: labels\n", "split 'train' is empty"),
    ],
)
def test_yolo_files_that_are_refused(tmp_path, text, said):
    arguments = write_yolo(tmp_path, {"a": ""})
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(SystemExit, match=said):
        main(arguments)
