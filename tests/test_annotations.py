"""COCO JSON: the same data in VOC's, COCO's and YOLO's form, and each kind of bad input."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from made_lists import listed, problems
from PIL import Image

from create_data_lists import main, read_class_file
from datasets import DetectionDataset
from fpnssd.data.augment import AugmentConfig
from fpnssd.data.data_list import DataList
from train import main as train_main


def voc_to_coco(voc, split, path):
    """Another way to COCO JSON, by ElementTree: ids that are not 1, 2, 3, boxes as x, y, width, height."""
    ids = {name: 10 * n + 7 for n, name in enumerate(("Platelets", "RBC", "WBC"))}
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for n, i in ids.items()]}
    for number, line in enumerate((voc / "ImageSets" / "Main" / f"{split}.txt").read_text().split()):
        root = ElementTree.parse(voc / "Annotations" / f"{line}.xml").getroot()
        size = {tag: int(root.findtext(f"size/{tag}")) for tag in ("width", "height")}
        content["images"].append({"id": 1000 + number, "file_name": f"{line}.jpg", **size})
        for element in root.iter("object"):
            x0, y0, x1, y1 = (int(element.findtext(f"bndbox/{tag}")) for tag in ("xmin", "ymin", "xmax", "ymax"))
            # The two degenerate boxes have no width, and none here.
            box = [x0 - 1, y0 - 1, x1 - x0 + (x1 > x0), y1 - y0 + (y1 > y0)]
            entry = {"id": len(content["annotations"]), "image_id": 1000 + number, "bbox": box, "iscrowd": 0}
            content["annotations"].append({**entry, "category_id": ids[element.findtext("name")]})
    path.write_text(json.dumps(content))


def coco_to_yolo(coco, images, split, root):
    """COCO JSON -> images/SPLIT (links) and labels/SPLIT below root."""
    content = json.loads(coco.read_text())
    index = {category["id"]: n for n, category in enumerate(content["categories"])}
    for folder in ("images", "labels"):
        (root / folder / split).mkdir(parents=True)
    for image in content["images"]:
        (root / "images" / split / image["file_name"]).symlink_to(images / image["file_name"])
        lines = []
        for entry in content["annotations"]:
            if entry["image_id"] == image["id"]:
                x, y, width, height = entry["bbox"]
                centre = ((x + width / 2) / image["width"], (y + height / 2) / image["height"])
                numbers = (*centre, width / image["width"], height / image["height"])
                lines.append(f"{index[entry['category_id']]} {' '.join(map(repr, numbers))}\n")
        (root / "labels" / split / image["file_name"]).with_suffix(".txt").write_text("".join(lines))


@pytest.fixture(scope="module")
def three_forms(bccd, tmp_path_factory):
    """A folder with voc, coco and yolo: the blood cells' lists, made from each form."""
    folder = tmp_path_factory.mktemp("bccd")
    for split in ("train", "val"):
        voc_to_coco(bccd, split, folder / f"{split}_coco.json")
        coco_to_yolo(folder / f"{split}_coco.json", bccd / "JPEGImages", split, folder / "y")
    names = {"names": ["Platelets", "RBC", "WBC"], "train": "images/train", "val": ["images/val"]}
    (folder / "y" / "data.yaml").write_text(yaml.safe_dump(names))
    main(["--voc", str(bccd), "--out", str(folder / "voc")])
    files = [str(folder / f"{split}_coco.json") for split in ("train", "val")]
    main(["--coco", *files, "--images", str(bccd / "JPEGImages"), "--out", str(folder / "coco")])
    main(["--yolo", str(folder / "y" / "data.yaml"), "--out", str(folder / "yolo")])
    return folder


@pytest.mark.parametrize("split", ["train", "val"])
def test_three_forms_give_the_same_samples(three_forms, split):
    lists = {form: DataList.load(three_forms / form / f"{split}.json") for form in ("voc", "coco", "yolo")}
    assert {data_list.classes for data_list in lists.values()} == {("Platelets", "RBC", "WBC")}
    order = {}  # YOLO's folder is read in the order of its names
    for form, data_list in lists.items():
        order[form] = np.argsort([Path(data_list.file_names[i]).name for i in range(len(data_list))])
    datasets = {form: DetectionDataset(data_list, 100) for form, data_list in lists.items()}
    for rows in zip(*(order[form][::7] for form in lists), strict=True):
        voc, coco, yolo = (datasets[form][int(row)] for form, row in zip(lists, rows, strict=True))
        for other in (coco, yolo):
            assert torch.equal(voc["image"], other["image"])
            assert torch.equal(voc["labels"], other["labels"])
            torch.testing.assert_close(voc["boxes_norm"], other["boxes_norm"], rtol=0, atol=1e-6)
    # The same keys give the same augmented samples, where the order is the same.
    augmented = [DetectionDataset(lists[form], 100, AugmentConfig()) for form in ("voc", "coco")]
    for index in range(0, len(augmented[0]), 40):
        assert torch.equal(augmented[0][2, index, 0]["image"], augmented[1][2, index, 0]["image"])
    counts = [len(data_list.boxes) for data_list in lists.values()]
    assert counts == [len(lists["voc"].boxes)] * 3
    assert lists["coco"].category_ids == (7, 17, 27)
    assert lists["coco"].target(0)["image_id"] == 1000


@pytest.mark.parametrize("form", ["voc", "coco", "yolo"])
def test_three_forms_train(three_forms, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {}
    for split in ("train", "val"):  # eight images are enough to see a step and an evaluation
        content = json.loads((three_forms / form / f"{split}.json").read_text())
        content["images"] = content["images"][:8]
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
        root = three_forms / form / content["info"]["image_root"]  # seen from there
        content["info"]["image_root"] = str(root.resolve())
        small[split] = content
    (tmp_path / "small").mkdir()
    for split, content in small.items():
        (tmp_path / "small" / f"{split}.json").write_text(json.dumps(content))
    metrics = train_main(
        ["--preset", "lite", "--data", "small", "--name", form, "--epochs", "1", "--batch-size", "4", "--workers", "0"]
        + ["--backbone-weights", "none", "--device", "cpu", "--set", "image_size=128", "cache=disk"]
    )
    assert set(metrics["per_class"]) == {"Platelets", "RBC", "WBC"}
    assert (tmp_path / "runs" / form / "batch_0.jpg").is_file()


def write_coco(path, **changes):
    content = {
        "images": [{"id": 5, "file_name": "a.jpg", "width": 100, "height": 80}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 1, "bbox": [10, 10, 30, 30], "area": 450.5, "iscrowd": 1},
            {"id": 2, "image_id": 5, "category_id": 2, "bbox": [20, 20, 90, 30], "area": 77, "iscrowd": 0},
            {"id": 3, "image_id": 5, "category_id": 4, "bbox": [5, 5, 9, 9], "iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}, {"id": 4, "name": "tree"}],
    }
    path.write_text(json.dumps({**content, **changes}))
    Image.new("RGB", (100, 80)).save(path.parent / "a.jpg")
    return ["--coco", str(path), "--splits", "train", "--out", str(path.parent / "out")]


def test_coco_keeps_crowds_areas_and_ids(tmp_path):
    main(write_coco(tmp_path / "x.json"))
    content = listed(tmp_path / "out")
    assert [entry["iscrowd"] for entry in content["annotations"]] == [1, 0, 0]
    # The second was clipped, so its area is no longer what was said; the third had none.
    assert [entry["area"] for entry in content["annotations"]] == [450.5, 80 * 30, 81]
    assert [entry["category_id"] for entry in content["annotations"]] == [1, 2, 4]
    assert content["images"][0]["id"] == 5


def test_classes_are_chosen_and_joined(tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("tree\nvehicle = car, bus\n")
    main([*write_coco(tmp_path / "x.json"), "--classes", str(tmp_path / "classes.txt")])
    content = listed(tmp_path / "out")
    assert content["categories"] == [{"id": 4, "name": "tree"}, {"id": 1, "name": "vehicle"}]
    assert [entry["category_id"] for entry in content["annotations"]] == [1, 1, 4]
    (tmp_path / "classes.txt").write_text("bus\nlorry\n")
    main([*write_coco(tmp_path / "x.json"), "--classes", str(tmp_path / "classes.txt")])
    assert [entry["category_id"] for entry in listed(tmp_path / "out")["annotations"]] == [1]
    assert len(problems(tmp_path / "out")["class that was not chosen"]) == 2
    assert "no objects of lorry, which" in capsys.readouterr().err


def test_classes_that_are_joined_mark_an_object_once(tmp_path):
    (tmp_path / "classes.txt").write_text("vehicle = car, bus\n")
    names = [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}]
    both = [{"id": n, "image_id": 5, "category_id": n, "bbox": [1, 1, 5, 5]} for n in (1, 2)]
    arguments = write_coco(tmp_path / "x.json", categories=names, annotations=both)
    main([*arguments, "--classes", str(tmp_path / "classes.txt")])
    assert len(listed(tmp_path / "out")["annotations"]) == 1
    assert len(problems(tmp_path / "out")["object twice"]) == 1


def test_coco_files_are_not_written_over(tmp_path):
    arguments = write_coco(tmp_path / "train.json")
    before = (tmp_path / "train.json").read_bytes()
    arguments[arguments.index("--out") + 1] = str(tmp_path)
    with pytest.raises(SystemExit, match=r"train\.json is an input and would be overwritten"):
        main(arguments)
    assert (tmp_path / "train.json").read_bytes() == before


def test_coco_files_of_other_categories_are_refused(tmp_path):
    """One id for two names, which a list could not hold."""
    for split, name in (("train", "cat"), ("val", "dog")):
        write_coco(tmp_path / f"{split}.json", categories=[{"id": 1, "name": name}], annotations=[])
    files = [str(tmp_path / f"{split}.json") for split in ("train", "val")]
    with pytest.raises(SystemExit, match=r"val\.json gives category 'dog' the id that .*train\.json gives 'cat': 1"):
        main(["--coco", *files, "--out", str(tmp_path / "out")])


def test_a_class_name_may_have_a_comma(tmp_path):
    (tmp_path / "classes.txt").write_text("bottle, plastic\nvehicle = car, bus\n")
    assert read_class_file(tmp_path / "classes.txt") == {
        "bottle, plastic": ["bottle, plastic"],
        "vehicle": ["car", "bus"],
    }


@pytest.mark.parametrize("text", ["", "dog\ndog\n", "a = x\nb = x\n", "a = \n", "= a\n"])
def test_bad_class_files_are_refused(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(SystemExit, match=r"classes\.txt must name each class once"):
        main([*write_coco(tmp_path / "x.json"), "--classes", str(tmp_path / "classes.txt")])


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        ({"image_id": 6, "category_id": 1, "bbox": [1, 1, 5, 5]}, "object of an unknown image"),
        ({"image_id": 5, "category_id": 3, "bbox": [1, 1, 5, 5]}, "object of an unknown class"),
        ({"image_id": 5, "category_id": 1, "bbox": []}, "object without a box"),
        ({"image_id": 5, "category_id": 1}, "object without a box"),
        ({"image_id": 5, "category_id": 1, "bbox": [1, 1, "five", 5]}, "object without a box"),
        ({"image_id": 5, "category_id": 1, "bbox": [1, 1, -5, 5]}, "box inverted"),
        ({"image_id": 5, "category_id": 1, "bbox": [1, 1, 0, 5]}, "box empty"),
    ],
)
def test_coco_annotations_that_are_left_out(tmp_path, entry, kind):
    good = {"id": 1, "image_id": 5, "category_id": 2, "bbox": [1, 1, 5, 5]}
    main(write_coco(tmp_path / "x.json", annotations=[good, {"id": 99, **entry}]))
    (place,) = problems(tmp_path / "out")[kind]
    assert "annotation 99" in place
    assert len(listed(tmp_path / "out")["annotations"]) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": []}, "lists no image"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "two categories the same id"),
        ({"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}, "two images the id 1"),
        (
            {"images": [{"id": 1, "file_name": "a", "width": 9, "height": "tall"}]},
            "a size that is not a number: 9 x 'tall'",
        ),
        ({"images": [{"id": 1}]}, "not a COCO JSON file: image 1 has no file_name"),
    ],
)
def test_coco_files_that_are_refused(tmp_path, changes, said):
    with pytest.raises(SystemExit, match=said):
        main(write_coco(tmp_path / "x.json", **changes))


def test_coco_images_cannot_leave_their_folder(tmp_path):
    arguments = write_coco(tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    content["images"] += [
        {"id": 6, "file_name": "../a.jpg", "width": 1, "height": 1},
        {"id": 7, "file_name": str(tmp_path / "elsewhere" / "b.jpg"), "width": 100, "height": 80},
    ]
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "elsewhere" / "b.jpg")
    (tmp_path / "x.json").write_text(json.dumps(content))
    (tmp_path / "images").mkdir()
    (tmp_path / "a.jpg").rename(tmp_path / "images" / "a.jpg")
    main([*arguments, "--images", str(tmp_path / "images")])
    assert len(problems(tmp_path / "out")["image outside the image folder"]) == 2
    assert [image["id"] for image in listed(tmp_path / "out", "train")["images"]] == [5]
