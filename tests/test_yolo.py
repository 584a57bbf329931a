"""YOLO's format: where images and labels are looked for, what a line means, and each kind of bad input."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from made_lists import listed, problems
from PIL import Image

from create_data_lists import main
from fpnssd.data.checks import ACTIONS
from fpnssd.data.images import DataError
from fpnssd.data.yolo import find_box, read_yolo
from fpnssd.data.yolo_config import MAX_BYTES, read_config


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
        ("names: [a]\nval: images\n", "no split 'train' in .*data.yaml"),
        ("names: [a]\ntrain: nowhere\n", "nowhere, which is neither a folder nor a text file"),
        ("train: images\n", "not a data.yaml with `names`"),
        ("names: {cat: 0}\ntrain: images\n", "not a data.yaml with `names`"),
        ("names: cat\ntrain: images\n", "not a data.yaml with `names`"),
        ("names: [a\n", "not a data.yaml with `names`"),
        ("names: [a]\ntrain: labels\n", "split 'train' is empty"),
    ],
)
def test_yolo_files_that_are_refused(tmp_path, text, said):
    arguments = write_yolo(tmp_path, {"a": ""})
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(SystemExit, match=said):
        main(arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Where images and labels are; read_yolo opens no image, so these are empty files

LABEL = "0 0.5 0.5 0.2 0.4\n"


def write_files(root, files):
    """files: {path below root: text}."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def read_all(path, splits=("train",), **options):
    """{split: {file name: class names of its objects}}, the kinds of problems, and the splits."""
    found, _ = read_yolo(Path(path), list(splits), **options)
    records = {split.name: [read() for read in split.records] for split in found}
    objects = {
        name: {record.file_name: [one.name for one in record.objects] for record in part}
        for name, part in records.items()
    }
    kinds = [p.kind for split in found for p in split.problems]
    kinds += [p.kind for part in records.values() for record in part for p in record.problems]
    assert set(kinds) <= set(ACTIONS)
    return objects, kinds, found


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/train/a.jpg", "labels/train/a.txt"),
        ("train/images/a.jpg", "train/labels/a.txt"),
        ("train/images/a.jpg", "train/images/a.txt"),
        ("train/imgs/a.jpg", "train/labels/a.txt"),
        ("Images/train/a.JPG", "Labels/train/a.TXT"),
        ("JPEGImages/train/a.jpg", "labels/train/a.txt"),
        ("images/x/images/a.jpg", "images/x/labels/a.txt"),
        ("images/x/images/a.jpg", "labels/x/images/a.txt"),
        ("train/a.jpg", "train/labels/a.txt"),
        ("train/day/a.jpg", "labels/day/a.txt"),
        ("scans/train/a.jpg", "labels/train/a.txt"),
        ("images/train/a.jpg", "labels/a.txt"),
        ("images/train/a.jpg", "labels/train/a.jpg.txt"),
    ],
)
def test_labels_are_found_where_people_keep_them(tmp_path, image, label):
    root = tmp_path / "images" / "set"
    write_files(root, {image: "", label: LABEL, "data.yaml": f"names: [dog, cat]\ntrain: {Path(image).parent}\n"})
    decoy = "1 0.5 0.5 0.2 0.4\n"  # of another data set, where a folder further up is called images
    write_files(tmp_path / "labels" / "set", {f"{Path(image).parent}/a.txt": decoy, "a.txt": decoy})
    objects, kinds, _ = read_all(root / "data.yaml")
    assert objects == {"train": {image: ["dog"]}}
    assert kinds == []


def test_a_missing_label_file_is_no_empty_one(tmp_path):
    files = {f"images/{name}.jpg": "" for name in ("day/a", "day/b", "day/c", "night/d", "night/e")}
    files |= {"labels/day/a.txt": LABEL, "labels/day/b.txt": "\n", "data.yaml": "names: [dog]\ntrain: images\n"}
    write_files(tmp_path, files)
    objects, kinds, found = read_all(tmp_path / "data.yaml")
    assert sum(map(len, objects["train"].values())) == 1
    assert sorted(kinds) == ["folder without label files", *["image without a label file"] * 3, "label file is empty"]
    where = next(p.where for p in found[0].problems if p.kind == "folder without label files")
    assert where == f"{tmp_path / 'images' / 'night'}: none of its 2 images"
    _, kinds, _ = read_all(tmp_path / "data.yaml", unlabelled=True)
    assert "folder without label files" not in kinds


def test_a_split_without_label_files_is_refused(tmp_path):
    write_files(
        tmp_path, {"set/imgs/a.jpg": "", "set/lab/a.txt": LABEL, "set/data.yaml": "names: [dog]\ntrain: imgs\n"}
    )
    with pytest.raises(DataError, match="none of its 1 images has a label file") as error:
        read_all(tmp_path / "set" / "data.yaml")
    for place in ("labels/a.txt", "imgs/labels/a.txt", "imgs/a.txt"):
        assert str(tmp_path / "set" / place) in str(error.value)
    objects, _, _ = read_all(tmp_path / "set" / "data.yaml", unlabelled=True)
    assert objects == {"train": {"imgs/a.jpg": []}}
    write_files(tmp_path, {"set/labels/A.txt": LABEL})
    with pytest.raises(DataError, match="1 label files have no image of their name, such as .*A.txt"):
        read_all(tmp_path / "set" / "data.yaml")


def test_label_files_of_no_image_are_named(tmp_path):
    """Not those of another split's images, nor texts that are no labels."""
    names = {"a": LABEL, "other": LABEL, "stray": LABEL}
    files = {f"labels/{name}.txt": text for name, text in names.items()} | {"labels/classes.txt": "dog\n"}
    files |= {"images/a.jpg": "", "images/other.jpg": "", "train.txt": "images/a.jpg\n"}
    write_files(tmp_path, {**files, "data.yaml": "names: [dog]\ntrain: train.txt\n"})
    _, _, found = read_all(tmp_path / "data.yaml")
    assert found[0].problems == [("label file without an image", str(tmp_path / "labels" / "stray.txt"))]


def test_labels_that_two_places_or_two_images_share_are_named(tmp_path):
    files = {f"images/{name}": "" for name in ("a.jpg", "a.png", "b.jpg", "c.jpg")}
    files |= {f"labels/{name}.txt": LABEL for name in "abc"} | {
        "images/b.txt": LABEL,
        "images/c.txt": "0 .1 .1 .1 .1\n",
    }
    write_files(tmp_path, {**files, "data.yaml": "names: [dog]\ntrain: images\n"})
    _, kinds, found = read_all(tmp_path / "data.yaml")
    assert sorted(kinds) == ["label file of two images", "label files in two places differ"]
    assert all("c.txt" in p.where for p in found[0].problems if "differ" in p.kind)


YAML = "names: [dog, cat]\n"
ROBOFLOW = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\n" + YAML
SET = {f"set/{split}/{part}" for split in ("train", "valid") for part in ("images/a.jpg", "labels/a.txt")}


@pytest.mark.parametrize(
    ("files", "path"),
    [
        ({"set/data.yaml": ROBOFLOW}, "set/data.yaml"),
        ({"set/data.yaml": ROBOFLOW}, "set"),
        ({"set/data.yaml": "train: old-3/train/images\nval: old-3/valid/images\n" + YAML}, "set/data.yaml"),
        ({"set/data.yaml": "train: /content/old/train/images\nval: C:\\data\\valid\\images\n" + YAML}, "set"),
        ({"set/data.yaml": "path: /content/old\ntrain: train/images\nval: valid/images\n" + YAML}, "set"),
        ({"set/data.yaml": "path: ../set\ntrain: [train/images]\nval: valid\n" + YAML}, "set"),
        ({"cfg/a.yaml": "train: ../set/train/images\nval: ../set/valid/images\n" + YAML}, "cfg/a.yaml"),
        ({"cfg/a.yaml": "train: ROOT/set/train/images\nval: ROOT/set/valid/images\n" + YAML}, "cfg/a.yaml"),
        (
            {"cfg/a.yaml": "train: t.txt\nval: v.txt\n" + YAML, "cfg/t.txt": "ROOT/set/train/images/a.jpg\n"}
            | {"cfg/v.txt": '"../set/valid/images/a.jpg"\n'},
            "cfg/a.yaml",
        ),
        ({"set/classes.txt": "dog\ncat\n"}, "set"),
        ({"set/obj.names": "dog\ncat\n"}, "set/obj.names"),
        (
            {"set/obj.data": "classes = 2\nnames = data/obj.names\ntrain = data/train.txt\nvalid = data/valid.txt\n"}
            | {"set/obj.names": "dog\ncat\n", "set/train.txt": "data/train/images/a.jpg\n"}
            | {"set/valid.txt": "data/valid/images/a.jpg\n"},
            "set/obj.data",
        ),
    ],
)
def test_exports_are_read_as_they_come(tmp_path, files, path):
    """Roboflow's, of a renamed folder, of a notebook; paths that leave the folder; lists; class lists; CVAT's."""
    write_files(tmp_path, {name: LABEL if name.endswith("txt") else "" for name in SET})
    write_files(tmp_path, {name: text.replace("ROOT", str(tmp_path)) for name, text in files.items()})
    splits = ("train", "valid") if "yaml" not in "".join(files) else ("train", "val")
    objects, kinds, found = read_all(tmp_path / path, splits)
    assert kinds == []
    assert {split.image_root for split in found} == {tmp_path / "set"}
    assert objects == {
        name: {f"{folder}/images/a.jpg": ["dog"]} for name, folder in zip(splits, ("train", "valid"), strict=True)
    }


def test_label_studio_and_labelimg(tmp_path):
    """Classes alone: the whole set is one split, where one is asked for."""
    studio = {"classes.txt": "dog\ncat\n", "notes.json": "{}", "images/1a-x.jpg": "", "labels/1a-x.txt": LABEL}
    write_files(tmp_path / "studio", studio)
    write_files(tmp_path / "img", {"classes.txt": "dog\ncat\n", "x.jpg": "", "x.txt": "1 .5 .5 .5 .5\n"})
    assert read_all(tmp_path / "studio")[:2] == ({"train": {"images/1a-x.jpg": ["dog"]}}, [])
    assert read_all(tmp_path / "img")[:2] == ({"train": {"x.jpg": ["cat"]}}, [])
    with pytest.raises(DataError, match=r"has no train or images/train or train\.txt; --splits with one name"):
        read_all(tmp_path / "img", ("train", "val"))


def test_splits_that_moved_to_one_place_are_refused(tmp_path):
    arguments = write_yolo(tmp_path, {"a": LABEL})
    (tmp_path / "data.yaml").write_text("train: x/images\nval: y/images\n" + YAML)
    with pytest.raises(SystemExit, match="no usable image in train"):
        main([*arguments, "--splits", "train", "val"])
    assert "train's images/a.jpg is val's images/a.jpg" in problems(tmp_path / "out")["image is in a later split too"]


def test_an_empty_line_of_a_class_list_is_refused(tmp_path):
    write_files(tmp_path, {"classes.txt": "dog\n\ncat\n\n", "a.jpg": "", "a.txt": LABEL})
    with pytest.raises(DataError, match="line 2 is empty: is it a class without a name"):
        read_all(tmp_path)


def test_links_are_followed_once_and_junk_is_counted(tmp_path, capsys):
    junk = ("images/._a.jpg", "images/Thumbs.db", "images/.ipynb_checkpoints/a-checkpoint.jpg", "images/a.psd")
    write_files(
        tmp_path,
        {"images/a.jpg": "", "images/a.txt": LABEL, **dict.fromkeys(junk, ""), "data.yaml": YAML + "train: images\n"},
    )
    (tmp_path / "images" / "again").symlink_to(tmp_path / "images")
    assert read_all(tmp_path / "data.yaml")[:2] == ({"train": {"images/a.jpg": ["dog"]}}, [])
    said = "train: skipped files that are not images: 1 x .db, 1 x .psd, 2 x hidden"
    assert said in capsys.readouterr().out


def test_labels_may_lie_where_a_linked_folder_leads_to(tmp_path):
    write_files(
        tmp_path, {"disk/images/a.jpg": "", "disk/labels/a.txt": LABEL, "set/data.yaml": YAML + "train: images\n"}
    )
    (tmp_path / "set" / "images").symlink_to(tmp_path / "disk" / "images")
    assert read_all(tmp_path / "set")[:2] == ({"train": {"images/a.jpg": ["dog"]}}, [])


def test_listed_images_that_are_missing(tmp_path):
    """One is left out later, when it is opened; a list of none but these is an export without images."""
    write_files(tmp_path, {"images/a.jpg": "", "labels/a.txt": LABEL, "t.txt": "images/a.jpg\nimages/b.jpg\n"})
    write_files(tmp_path, {"data.yaml": YAML + "train: t.txt\n"})
    assert read_all(tmp_path)[:2] == ({"train": {"images/a.jpg": ["dog"], "images/b.jpg": []}}, [])
    (tmp_path / "t.txt").write_text("images/a.jpg\n/old/machine/c.jpg\n")
    (split,), _ = read_yolo(tmp_path, ["train"])
    assert split.image_root == tmp_path
    with pytest.raises(DataError, match=r"image /old/machine/c\.jpg is missing"):
        split.records[1]()
    write_files(tmp_path, {"t.txt": "images/a.jpg\nimages/b.jpg\n"})
    (tmp_path / "images" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"t\.txt lists 2 images, none of which exists, such as .*images/a\.jpg"):
        read_all(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# data.yaml


def test_class_names_stay_words(tmp_path):
    for names in ("[yes, no, on, Off, 1.0, 12:30, 2024-01-01, 0x10, 'null']", "{0: yes, 1: no, 7: 1_000}"):
        (tmp_path / "data.yaml").write_text(f"names: {names}\n")
        words = [word.split(": ")[-1].strip("'") for word in names[1:-1].split(", ")]
        assert list(read_config(tmp_path / "data.yaml").classes.values()) == words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("names: [a, b, a]", "names the class 'a' or its id 2 twice"),
        ("names: {0: a, 0: b}", "it has the key '0' twice"),
        ("names: {0: a, 00: b}", "names the class 'b' or its id 0 twice"),
        ("names: [a, null]", "class 1 has None in place of a name; quote it"),
        ("names: [a, ]\nnc: 2", "says 2 classes and names 1"),
        ("names: [a, [b]]", "class 1 has .* in place of a name"),
        ('names: ["a\\0b"]', "the name of class 0 has characters that cannot be printed"),
        ("names: [a]\nkpt_shape: [17, 4]", "kpt_shape must be"),
        ("names: [a]\nkpt_shape: 17", "kpt_shape must be"),
        ("names: [a]\npath: [b]", "`path` must be a folder"),
        ("- a\n- b\n", "not a data.yaml with `names`"),
        ("", "not a data.yaml with `names`"),
        ("names: [a]\ntrain: {a: b}", "split 'train' is empty"),
        ('names: [a]\ntrain: "b\\0c"', "neither a folder nor a text file"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nnames: [*b, *b]", "class 0 has .* in place of a name"),
        ("a: &a [*a, *a]\nnames: *a", "recursive node"),
        ("names: " + "[" * 5000, "not a data.yaml with `names`"),
        ("- " * 5000 + "a", "not a data.yaml with `names`"),
        ("#" * (MAX_BYTES + 1), "larger than"),
    ],
)
def test_bad_data_yaml_is_a_sentence(tmp_path, text, said):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=said):
        read_all(tmp_path / "data.yaml")


def test_an_alias_of_a_word_is_read(tmp_path):
    (tmp_path / "data.yaml").write_text("train: &t images\nval: *t\nnames: [a]\n")
    assert read_config(tmp_path / "data.yaml").splits == {"train": ["images"], "val": ["images"]}


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def labelled(root, lines, names="[dog, cat, cow]", extra=""):
    """One image with these lines as its label file."""
    write_files(
        root, {"images/a.jpg": "", "labels/a.txt": lines, "data.yaml": f"names: {names}\ntrain: images\n{extra}"}
    )
    return root / "data.yaml"


@pytest.mark.parametrize(
    ("ids", "names", "said"),
    [
        (
            (1, 2, 3),
            "[dog, cat, cow]",
            "ids start at 1 in the label files: they go from 1 to 3, those of .* from 0 to 2",
        ),
        ((1, 2), "[dog]", "ids start at 1"),
        ((3, 5), "[dog, cat, cow]", "ids start at 1"),
        ((0, 1), "{1: dog, 2: cat}", "ids start at 0 in the label files"),
        ((1, 2), "[dog, cat, cow]", None),
        ((0, 3), "[dog, cat, cow]", None),  # a 3 too many, which is left out
        ((1, 2), "{1: dog, 2: cat}", None),
    ],
)
def test_ids_that_count_from_another_number_are_refused(tmp_path, ids, names, said):
    path = labelled(tmp_path, "".join(f"{number} 0.5 0.5 0.2 0.2\n" for number in ids), names)
    if said is None:
        read_all(path)
        return
    with pytest.raises(DataError, match=said):
        read_all(path)


def test_boxes_in_pixels_are_refused(tmp_path):
    arguments = write_yolo(tmp_path, {"a": "0 50 25 40 20\n1 10 10 20 20\n", "b": "0 0.5 0.5 0.2 0.2\n"})
    with pytest.raises(
        SystemExit, match=r"train would lose 2 of its 3 objects.*: box in pixels, not in 0\.\.1 \(2\), as in .*0 50 25"
    ):
        main(arguments)


@pytest.mark.parametrize(
    ("numbers", "kpt_shape", "kind"),
    [
        ((0.5, 0.5, 0.2, 0.4), None, None),
        ((0.5, 0.5, 0.2, 0.4, 0.9), None, "confidence after the box"),
        ((0.5, 0.5, 0.2, 0.4), (2, 2), None),
        ((0.5, 0.5, 0.2, 0.4, 0.45, 0.4, 0.5, 0.6), (2, 2), None),
        ((0.5, 0.5, 0.2, 0.4, 0.45, 0.4, 2, 0, 0, 0), (2, 3), None),
        ((0.5, 0.5, 0.2, 0.4, 0.45, 0.4, 0.5, 0.6, 0.9), (2, 2), "confidence after the box"),
        ((0.4, 0.3, 0.6, 0.3, 0.6, 0.7, 0.4, 0.7), None, "polygon instead of a box"),
    ],
)
def test_every_kind_of_line_gives_its_box(numbers, kpt_shape, kind):
    box, said = find_box(numbers, kpt_shape)
    np.testing.assert_allclose(box, (0.4, 0.3, 0.6, 0.7), atol=1e-12)
    assert said == kind


@pytest.mark.parametrize("kpt_shape", [None, (3, 3)])
def test_lines_of_other_lengths_are_no_labels(kpt_shape):
    for numbers in ((0.5,) * 3, (0.5, 0.5, 0.2, 0.2, 7), (0.5,) * 7, (0.5,) * 8 * (kpt_shape is not None)):
        assert find_box(numbers, kpt_shape) == (None, None)


def test_key_points_without_kpt_shape_are_refused(tmp_path):
    """Only where every line may be a box and its key points."""
    two, three = "0 0.5 0.5 0.2 0.4 0.45 0.4 0.5 0.6\n", "0 0.5 0.5 0.2 0.4 0.45 0.4 2 0 0 0 0.5 0.6 1\n"
    with pytest.raises(DataError, match=r"every label has 9 columns.*`kpt_shape: \[2, 2\]`.*`kpt_shape: null`"):
        read_all(labelled(tmp_path, two * 3))
    with pytest.raises(DataError, match=r"every label has 14 columns.*`kpt_shape: \[3, 3\]`"):
        read_all(labelled(tmp_path, three * 2))
    for lines, extra, kinds in (
        (two * 3, "kpt_shape: [2, 2]\n", []),
        (three, "kpt_shape: [3, 3]\n", []),
        (two, "kpt_shape: null\n", ["polygon instead of a box"]),
        (two + "0 0.1 0.1 0.2 0.1 0.2 0.2\n", "", ["polygon instead of a box"] * 2),  # other counts
        # leaves the image as a box
        (two + "1 0.7 0.7 0.9 0.7 0.9 0.9 0.7 0.9\n", "", ["polygon instead of a box"] * 2),
        (two + "1 0.3 0.3 0.2 0.2 0.9 0.3 0.3 0.9\n", "", ["polygon instead of a box"] * 2),  # points out of the box
    ):
        assert read_all(labelled(tmp_path, lines, extra=extra))[1] == kinds


def test_a_confidence_behind_the_box_is_noted(tmp_path):
    """As in pseudo labels, which detect.py --yolo writes."""
    main(write_yolo(tmp_path, {"a": "1 0.300000 0.400000 0.400000 0.600000 0.750000\n"}))
    (entry,) = listed(tmp_path / "out")["annotations"]
    np.testing.assert_allclose(entry["bbox"], [10, 5, 40, 30], atol=1e-9)
    assert entry["category_id"] == 1
    assert len(problems(tmp_path / "out")["confidence after the box"]) == 1


def test_an_id_of_0_stays_where_classes_are_chosen(tmp_path):
    arguments = write_yolo(tmp_path, {"a": "0 0.5 0.5 0.2 0.4\n1 0.5 0.5 0.4 0.4\n2 0.5 0.5 0.5 0.5\n"}, "xyz")
    (tmp_path / "classes.txt").write_text("z\nboth = x, y\n")
    main([*arguments, "--classes", str(tmp_path / "classes.txt")])
    content = listed(tmp_path / "out")
    assert content["categories"] == [{"id": 2, "name": "z"}, {"id": 0, "name": "both"}]
    assert [entry["category_id"] for entry in content["annotations"]] == [0, 0, 2]
