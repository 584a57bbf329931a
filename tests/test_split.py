"""A data set without splits is divided by class, always alike, and never between images that belong together."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from made_lists import listed, problems
from PIL import Image, ImageOps

from create_data_lists import main
from fpnssd.data.annotations import SplitAnnotations
from fpnssd.data.checks import CheckedImage
from fpnssd.data.near_duplicates import describe
from fpnssd.data.split import divide_groups, divide_results, group_images, natural_key, source_names, split_to_divide


def scene(seed, size=(96, 64)):
    """A picture that is like no other's."""
    colours = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def checked(name, image):
    return CheckedImage(name, image.size[::-1], False, [], image.tobytes(), None, describe(image).astype(np.float16))


# ---------------------------------------------------------------------------------------------------------------------
# Division


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_each_class_has_its_share_within_one_group(seed, share):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 12, 150)
    groups = np.repeat(np.arange(150), sizes)
    labels = np.repeat(rng.choice(6, 150, p=[0.5, 0.3, 0.1, 0.06, 0.03, 0.01]), sizes)  # one class a group
    counts = np.eye(6, dtype=int)[labels] * rng.integers(1, 5, len(groups))[:, None]
    in_val = divide_groups(groups, counts, share, seed)
    for group in range(150):
        assert len(set(in_val[groups == group])) == 1
    for label in np.unique(labels):
        total, val = counts[:, label].sum(), counts[in_val, label].sum()
        held = [counts[groups == group, label].sum() for group in np.unique(groups[labels == label])]
        assert abs(val - share * total) <= max(held)
        assert len(held) == 1 or 0 < val < total
        assert len(held) > 1 or val == 0  # what only one group shows has to be learnt


@pytest.mark.parametrize("seed", range(20))
def test_classes_are_in_both_parts_where_that_can_be(seed):
    """Against a search over all divisions, on small sets with several classes in an image."""
    rng = np.random.default_rng(seed)
    counts = (rng.random((9, 5)) < 0.35).astype(int)
    counts[rng.integers(9)] = 0
    in_val = divide_groups(np.arange(9), counts, 0.3, seed)
    often = counts.sum(axis=0) > 1

    def in_both(part):
        return (counts[part].any(axis=0) & counts[~part].any(axis=0))[often].sum()

    most = max(in_both(np.array(part)) for part in itertools.product((False, True), repeat=9))
    assert in_both(in_val) == most


def test_a_share_of_images_without_objects_too():
    counts = np.zeros((100, 1), int)
    counts[:50, 0] = 3
    in_val = divide_groups(np.arange(100), counts, 0.2)
    assert (in_val[:50].sum(), in_val[50:].sum()) == (10, 10)


def test_the_seed_decides():
    counts = np.random.default_rng(0).integers(0, 3, (60, 3))
    first = divide_groups(np.arange(60), counts, 0.2, 1)
    assert (first == divide_groups(np.arange(60), counts, 0.2, 1)).all()
    assert (first != divide_groups(np.arange(60), counts, 0.2, 2)).any()


@pytest.mark.parametrize(
    ("names", "name"),
    [
        ((), "all"),
        (("default",), "default"),
        (("trainval", "test"), "trainval"),
        (("train", "test"), "train"),
        (("train", "val"), None),
        (("train", "valid"), None),
        (("one", "two"), None),
    ],
)
def test_which_split_is_divided(names, name):
    assert split_to_divide(names) == name


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def same(groups, a, b):
    return groups[a] == groups[b]


def test_what_belongs_together():
    frames = [Image.blend(scene(1), scene(2), weight) for weight in (0, 0.3, 0.6, 1)]  # one scene becomes another
    images = [checked(f"clip_{7 + 5 * number:06}.jpg", frame) for number, frame in enumerate(frames)]
    images += [checked("a.jpg", scene(3)), checked("b.jpg", ImageOps.mirror(scene(3).resize((48, 32))))]
    images += [checked("cat_1_jpg.rf.0a1b.jpg", scene(4)), checked("cat_1_jpg.rf.77aa.jpg", scene(5))]
    images += [
        checked("x/red.png", Image.new("RGB", (9, 9), "red")),
        checked("y/red.png", Image.new("RGB", (9, 9), "red")),
    ]
    images += [checked(f"photo{number}.jpg", scene(10 + number)) for number in range(20)]
    groups = group_images(images)
    assert same(groups, 0, 1)
    assert same(groups, 1, 2)
    assert same(groups, 2, 3)  # and with them the ends, which are unlike
    assert same(groups, 4, 5)
    assert same(groups, 6, 7)
    assert same(groups, 8, 9)
    assert len(set(groups.tolist())) == 4 + 20  # numbered photographs are no video


def test_frames_of_label_studio_are_in_the_order_of_their_names_before_its_own(capsys):
    still, digits = np.asarray(scene(1)), np.random.default_rng(0)
    images = []
    for number in range(20):
        pixels = still.copy()
        pixels[number, number] = 0
        images.append(checked(f"{digits.integers(16**8):08x}-frame_{number}.jpg", Image.fromarray(pixels)))
    annotations = SplitAnnotations("all", Path("."), [])
    train, val = divide_results(annotations, [(image, [], 1) for image in images])
    numbers = sorted(int(image.file_name[15:-4]) for image in val.images)
    assert len(numbers) == 4
    assert all(first // 2 in {number // 2 for number in numbers} for first in numbers)
    assert all({2 * (number // 2), 2 * (number // 2) + 1} <= set(numbers) for number in numbers)  # runs of two
    assert "runs of consecutive" in capsys.readouterr().err
    assert source_names(["a/3f2b1c4d-x.jpg", "y.jpg"]) == [("a/3f2b1c4d-x", False), ("y", False)]  # not all have one
    assert sorted(["f_10", "f_9", "f", "e_2"], key=natural_key) == ["e_2", "f", "f_9", "f_10"]


def test_likeness_that_is_enough_in_a_series_is_not_between_others():
    between = Image.blend(scene(1), scene(2), 0.5)
    assert 0.4 < float(describe(scene(1)) @ describe(between)) < 0.95
    weak = Image.blend(scene(1), scene(2), 0.62)
    assert 0.4 < float(describe(scene(1)) @ describe(weak)) < 0.65
    others = [checked(f"z{number}.jpg", scene(20 + number)) for number in range(4)]
    series = group_images([checked("v3.jpg", scene(1)), checked("v9.jpg", weak), *others])
    assert same(series, 0, 1)
    unlike = group_images([checked("v.jpg", scene(1)), checked("w.jpg", weak), *others])
    assert not same(unlike, 0, 1)


def test_a_camera_that_does_not_move_is_cut_into_runs(capsys):
    still = scene(1)
    noise = np.random.default_rng(0)
    images = []
    for number in range(40):
        pixels = np.asarray(still).copy()
        pixels[noise.integers(64), noise.integers(96)] = 0
        images.append(checked(f"{number:03}.jpg", Image.fromarray(pixels)))
    groups = group_images(images)
    assert "40 of 40 images show nearly the same scene, such as 000.jpg" in capsys.readouterr().err
    assert [len(set(groups[run : run + 4])) for run in range(0, 40, 4)] == [1] * 10
    assert len(set(groups.tolist())) == 10


# ---------------------------------------------------------------------------------------------------------------------
# The forms of exports


OBJECTS = [("dog", (10, 10, 50, 40))] * 15 + [("cat", (20, 5, 60, 50))] * 5


def voc_xml(label, box):
    corners = "".join(f"<{tag}>{edge}</{tag}>" for tag, edge in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<annotation><object><name>{label}</name><bndbox>{corners}</bndbox></object></annotation>"


def export(root, form):
    """Writes 20 images in a labelling tool's form, and returns the arguments that read it."""
    images, xmls, labels = {
        "voc in one folder": ("", "", None),
        "voc in two folders": ("JPEGImages", "Annotations", None),
        "voc, images": ("images", "annotations", None),
        "voc, one split": ("JPEGImages", "Annotations", None),
        "coco": ("images", None, None),
        "yolo, classes.txt": ("images", None, "labels"),
        "yolo, beside": ("", None, ""),
        "yolo, data.yaml": ("train/images", None, "train/labels"),
        "yolo, names alone": ("images", None, "labels"),
        "yolo, val is train": ("images", None, "labels"),
    }[form]
    content = {"images": [], "annotations": [], "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}]}
    for number, (label, box) in enumerate(OBJECTS):
        name = f"p{number:02}"
        for folder in {images, xmls, labels} - {None}:
            (root / folder).mkdir(parents=True, exist_ok=True)
        scene(100 + number).save(root / images / f"{name}.jpg")
        x0, y0, x1, y1 = box
        if xmls is not None:
            (root / xmls / f"{name}.xml").write_text(voc_xml(label, box))
        if labels is not None:
            numbers = ((x0 + x1) / 192, (y0 + y1) / 128, (x1 - x0) / 96, (y1 - y0) / 64)
            line = f"{['cat', 'dog'].index(label)} {' '.join(map(str, numbers))}"
            (root / labels / f"{name}.txt").write_text(line)
        content["images"].append({"id": number, "file_name": f"{name}.jpg", "width": 96, "height": 64})
        content["annotations"].append(
            {
                "id": number,
                "image_id": number,
                "category_id": 4 if label == "cat" else 9,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
            }
        )
    if form == "coco":
        (root / "all.json").write_text(json.dumps(content))
        return ["--coco", str(root / "all.json")]
    if form == "voc, one split":
        (root / "ImageSets" / "Main").mkdir(parents=True)
        (root / "ImageSets" / "Main" / "default.txt").write_text("".join(f"p{number:02}\n" for number in range(20)))
    if form in ("yolo, classes.txt", "yolo, beside"):
        (root / "classes.txt").write_text("cat\ndog\n")
    more = {"yolo, data.yaml": "train: train/images\n", "yolo, val is train": "train: images\nval: images\n"}
    if form in ("yolo, names alone", *more):
        (root / "data.yaml").write_text("names: [cat, dog]\n" + more.get(form, ""))
    return ["--yolo" if labels is not None else "--voc", str(root)]


FORMS = [
    "voc in one folder",
    "voc in two folders",
    "voc, images",
    "voc, one split",
    "coco",
    "yolo, classes.txt",
    "yolo, beside",
    "yolo, data.yaml",
    "yolo, names alone",
    "yolo, val is train",
]


@pytest.mark.parametrize("form", FORMS)
def test_exports_without_splits_are_divided(tmp_path, capsys, form):
    arguments = export(tmp_path / "mine", form)
    main([*arguments, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "20 images are divided into train (16) and val (4), 20 % of each class" in said
    names = {}
    for split, cats, dogs in (("train", 4, 12), ("val", 1, 3)):
        content = listed(tmp_path / "out", split)
        names[split] = {image["file_name"].rpartition("/")[2] for image in content["images"]}
        of_class = {category["id"]: category["name"] for category in content["categories"]}
        found = [of_class[entry["category_id"]] for entry in content["annotations"]]
        assert (found.count("cat"), found.count("dog")) == (cats, dogs)
        assert content["info"]["split"] == split
    assert names["train"] | names["val"] == {f"p{number:02}.jpg" for number in range(20)}
    main([*arguments, "--out", str(tmp_path / "again")])
    assert {image["file_name"].rpartition("/")[2] for image in listed(tmp_path / "again", "val")["images"]} == names[
        "val"
    ]


def test_a_split_that_is_named_is_divided_or_kept(tmp_path):
    arguments = export(tmp_path / "mine", "voc, one split")
    main([*arguments, "--splits", "default", "--out", str(tmp_path / "kept")])
    assert len(listed(tmp_path / "kept", "default")["images"]) == 20
    main([*arguments, "--splits", "default", "--val-share", "0.4", "--out", str(tmp_path / "out")])
    assert len(listed(tmp_path / "out", "val")["images"]) == 8
    with pytest.raises(SystemExit):
        main([*arguments, "--splits", "a", "b", "--val-share", "0.4", "--out", str(tmp_path / "out")])
    plain = export(tmp_path / "plain", "voc in one folder")
    main([*plain, "--splits", "test", "--out", str(tmp_path / "whole")])
    assert len(listed(tmp_path / "whole", "test")["images"]) == 20


def test_unusable_images_are_left_out_before_the_division(tmp_path, capsys):
    arguments = export(tmp_path / "mine", "voc in one folder")
    (tmp_path / "mine" / "p03.jpg").write_bytes(b"no image")
    (tmp_path / "mine" / "p04.xml").unlink()
    main([*arguments, "--out", str(tmp_path / "out")])
    assert "18 images are divided into train" in capsys.readouterr().out
    assert {"file is not an image", "annotation missing"} <= set(problems(tmp_path / "out"))


def test_what_cannot_be_divided_is_an_error(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    scene(1).save(folder / "a.jpg")
    (folder / "a.xml").write_text(voc_xml("dog", (1, 1, 50, 50)))
    with pytest.raises(SystemExit, match="1 usable images cannot be divided into train and val"):
        main(["--voc", str(folder), "--out", str(tmp_path / "out")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty has no XML files"):
        main(["--voc", str(tmp_path / "empty"), "--out", str(tmp_path / "out")])
    assert not list(tmp_path.glob("out/*.json"))


# ---------------------------------------------------------------------------------------------------------------------
# Near-duplicates between the splits that a data set has


def test_near_duplicates_in_a_later_split_are_noted(tmp_path):
    arguments = export(tmp_path / "voc", "voc, one split")
    images = tmp_path / "voc" / "JPEGImages"
    Image.open(images / "p00.jpg").resize((96, 64)).save(images / "p01.jpg", quality=40)
    ImageOps.mirror(Image.open(images / "p02.jpg")).save(images / "p03.jpg", quality=60)
    main_folder = tmp_path / "voc" / "ImageSets" / "Main"
    (main_folder / "train.txt").write_text("p00\np02\np05\n")
    (main_folder / "val.txt").write_text("p01\np03\np06\np15\n")
    main([*arguments, "--splits", "train", "val", "--out", str(tmp_path / "out"), "--strict"])
    plain, mirrored = problems(tmp_path / "out")["image nearly in a later split too"]
    assert plain.startswith("train's p00.jpg is nearly val's p01.jpg (")
    assert mirrored.startswith("train's p02.jpg is nearly the mirror image of val's p03.jpg (")
    assert len(listed(tmp_path / "out")["images"]) == 3  # kept
