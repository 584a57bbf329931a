"""VOC folders to data lists: coordinates, class order, and each kind of bad input."""

import hashlib
import http.server
import json
import os
import re
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from made_lists import listed, problems
from PIL import Image
from torchvision.datasets.voc import DATASET_YEAR_DICT

from create_data_lists import create_data_lists, image_root_for, main
from fpnssd.data.data_list import DataList
from fpnssd.data.images import DataError
from fpnssd.data.voc import VOC_CLASSES, read_voc


def add_image(voc, name, objects, size=(100, 80), said=None, split="train"):
    """objects: (class, xmin, ymin, xmax, ymax, difficult or None)."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (voc / folder).mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(list(name.encode())).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).resize(size).save(voc / "JPEGImages" / f"{name}.jpg")
    width, height = said or size
    xml = f"<annotation><size><width>{width}</width><height>{height}</height></size>"
    for label, xmin, ymin, xmax, ymax, difficult in objects:
        flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
        corners = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
        xml += f"<object><name>{label}</name>{flag}<bndbox>{corners}</bndbox></object>"
    (voc / "Annotations" / f"{name}.xml").write_text(xml + "</annotation>")
    with open(voc / "ImageSets" / "Main" / f"{split}.txt", "a") as file:
        file.write(f"{name}\n")


def list_voc(voc, splits, out, **options):
    return create_data_lists([read_voc([voc], split) for split in splits], out, **options)


def test_voc_boxes_become_continuous(tmp_path):
    add_image(tmp_path / "voc", "a", [("dog", 1, 11, 100, 80, 1), ("cat", 2.5, 3, 40, 50, None)])
    list_voc(tmp_path / "voc", ["train"], tmp_path)
    content = listed(tmp_path)
    first, second = content["annotations"]
    assert (first["bbox"], first["difficult"], first["iscrowd"]) == ([0, 10, 100, 70], 1, 0)
    assert (second["bbox"], second["difficult"], second["area"]) == ([1.5, 2, 38.5, 48], 0, 38.5 * 48)
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert (first["category_id"], second["category_id"]) == (2, 1)
    assert problems(tmp_path) == {}


def test_classes_are_those_of_the_data_or_voc(tmp_path, capsys):
    """VOC's twenty in VOC's order from eleven of them on, over all splits, and where they are asked for."""
    for number, name in enumerate(VOC_CLASSES[:10]):
        add_image(tmp_path / "voc", f"p{number}", [(name, 1, 1, 50, 50, 0)], split="train")
    add_image(tmp_path / "voc", "other", [("dog", 1, 1, 50, 50, 0)], split="val")

    def classes(*splits, options=()):
        main(["--voc", str(tmp_path / "voc"), "--out", str(tmp_path / "out"), *options, "--splits", *splits])
        return tuple(category["name"] for category in listed(tmp_path / "out", splits[0])["categories"])

    assert classes("train") == tuple(sorted(VOC_CLASSES[:10]))
    assert "classes: the 10 of the objects, sorted" in capsys.readouterr().out
    assert classes("val") == ("dog",)
    assert classes("val", options=["--classes", "voc"]) == VOC_CLASSES
    assert classes("train", "val") == VOC_CLASSES
    assert "classes: VOC's 20, in VOC's order; the data set has objects of 11" in capsys.readouterr().out


def test_truncation_is_kept_where_somebody_said(tmp_path):
    add_image(
        tmp_path / "voc", "a", [("dog", 1, 11, 100, 80, 1), ("cat", 1, 3, 40, 50, 0), ("cow", 1, 3, 50, 60, None)]
    )
    path = tmp_path / "voc" / "Annotations" / "a.xml"
    text = path.read_text().replace("<difficult>1", "<truncated>1</truncated><difficult>1")
    path.write_text(text.replace("<difficult>0", "<truncated>0</truncated><difficult>0"))
    list_voc(tmp_path / "voc", ["train"], tmp_path)
    assert [entry.get("truncated") for entry in listed(tmp_path)["annotations"]] == [1, 0, None]
    main(["--coco", str(tmp_path / "train.json"), "--splits", "train", "--out", str(tmp_path / "again")])
    assert DataList.load(tmp_path / "again" / "train.json").truncated.tolist() == [1, 0, -1]


def test_other_classes_are_sorted_over_all_splits(tmp_path, capsys):
    add_image(tmp_path / "voc", "a", [("zebra", 1, 1, 50, 50, 0)])
    add_image(tmp_path / "voc", "b", [("ant", 1, 1, 50, 50, 0), ("dog", 1, 1, 50, 50, 0)], split="val")
    list_voc(tmp_path / "voc", ["train", "val"], tmp_path)
    for split in ("train", "val"):
        assert [category["name"] for category in listed(tmp_path, split)["categories"]] == ["ant", "dog", "zebra"]
    assert "classes: the 3 of the objects, sorted" in capsys.readouterr().out


def test_class_file_fixes_the_order_and_leaves_out_others(tmp_path):
    add_image(tmp_path / "voc", "a", [("zebra", 1, 1, 50, 50, 0)])
    (tmp_path / "classes.txt").write_text("zebra\nant\n")
    arguments = ["--voc", str(tmp_path / "voc"), "--splits", "train", "--out", str(tmp_path)]
    main([*arguments, "--classes", str(tmp_path / "classes.txt")])
    assert [category["name"] for category in listed(tmp_path)["categories"]] == ["zebra", "ant"]
    (tmp_path / "classes.txt").write_text("ant\n")
    with pytest.raises(SystemExit, match=r"train has no objects .*class that was not chosen \(1\), as in a\.jpg"):
        main([*arguments, "--classes", str(tmp_path / "classes.txt")])
    main([*arguments, "--classes", str(tmp_path / "classes.txt"), "--unlabelled"])
    assert problems(tmp_path)["class that was not chosen"] == ["a.jpg: zebra (1, 1, 50, 50)"]
    assert listed(tmp_path)["annotations"] == []


@pytest.mark.parametrize(
    ("box", "kept", "said"),
    [
        ((1, 1, 1, 50), None, "box empty"),
        ((50, 1, 20, 50), None, "box inverted"),
        (("nan", 1, 20, 50), None, "box not finite"),
        ((101, 1, 120, 50), None, "box outside the image"),
        ((-20, 1, 0, 50), None, "box outside the image"),
        ((0, -5, 120, 90), [0, 0, 100, 80], "box partly outside the image"),
    ],
)
def test_bad_boxes_are_counted_and_named(tmp_path, capsys, box, kept, said):
    add_image(tmp_path / "voc", "a", [("dog", *box, 0), ("cat", 10, 10, 20, 20, 0)])
    list_voc(tmp_path / "voc", ["train"], tmp_path)
    boxes = [entry["bbox"] for entry in listed(tmp_path)["annotations"]]
    assert boxes == ([kept] if kept else []) + [[9, 9, 11, 11]]
    assert re.search(rf"train +{said} +1 ", capsys.readouterr().out)
    (place,) = problems(tmp_path)[said]
    assert "a.xml: dog" in place


def spoil(voc, defect):
    """Makes image b of the folder unusable."""
    xml, jpg = voc / "Annotations" / "b.xml", voc / "JPEGImages" / "b.jpg"
    if defect == "no xml":
        xml.unlink()
    elif defect == "broken xml":
        xml.write_text("<annotation><object>")
    elif defect == "entity bomb":
        xml.write_text('<!DOCTYPE a [<!ENTITY x "xx"><!ENTITY y "&x;&x;">]><annotation>&y;</annotation>')
    elif defect == "no number":
        xml.write_text(xml.read_text().replace("<xmin>1</xmin>", "<xmin>one</xmin>"))
    elif defect == "size nan":
        xml.write_text(xml.read_text().replace("<width>100</width>", "<width>nan</width>"))
    elif defect == "no bndbox":
        xml.write_text(xml.read_text().replace("bndbox", "box"))
    elif defect == "no image":
        jpg.unlink()
    elif defect == "cut image":
        jpg.write_bytes(jpg.read_bytes()[:300])
    elif defect == "text image":
        jpg.write_text("hello")
    elif defect == "other size":
        Image.new("RGB", (80, 100)).save(jpg)


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        ("no xml", "b.xml is missing"),
        ("broken xml", "b.xml does not parse"),
        ("entity bomb", "b.xml is refused"),
        ("no number", "<xmin> is 'one', not a number"),
        ("no bndbox", "an <object> without <bndbox>"),
        ("no image", "JPEGImages/b with any of .jpg"),
        ("size nan", "says nanx80"),
        ("cut image", "b.jpg is damaged"),
        ("text image", "b.jpg is not a readable image"),
        ("other size", "says 100x80"),
    ],
)
def test_unusable_images_are_left_out_and_named(tmp_path, capsys, defect, said):
    for name in "abc":
        add_image(tmp_path / "voc", name, [("dog", 1, 1, 50, 50, 0)])
    spoil(tmp_path / "voc", defect)
    list_voc(tmp_path / "voc", ["train"], tmp_path)
    assert [image["file_name"] for image in listed(tmp_path)["images"]] == ["a.jpg", "c.jpg"]
    (found,) = (kind for kind, places in problems(tmp_path).items() if any(said in place for place in places))
    assert found in capsys.readouterr().out
    assert problems(tmp_path)[found] == [place for place in problems(tmp_path)[found] if re.search(r"\bb\b", place)]


def test_names_cannot_leave_the_image_folder(tmp_path):
    add_image(tmp_path / "voc", "a", [("dog", 1, 1, 50, 50, 0)])
    add_image(tmp_path / "voc", "../outside", [("dog", 1, 1, 50, 50, 0)])
    list_voc(tmp_path / "voc", ["train"], tmp_path)
    assert [image["file_name"] for image in listed(tmp_path)["images"]] == ["a.jpg"]
    assert "image outside the image folder" in problems(tmp_path)


def test_other_endings_names_with_spaces_and_flags(tmp_path):
    for name in ("one two", "b", "c"):
        add_image(tmp_path / "voc", name, [("dog", 1, 1, 50, 50, 0)])
    images = tmp_path / "voc" / "JPEGImages"
    Image.open(images / "b.jpg").save(images / "b.png")
    (images / "b.jpg").unlink()
    (images / "c.jpg").rename(images / "c.JPG")
    split_file = tmp_path / "voc" / "ImageSets" / "Main" / "train.txt"
    split_file.write_text("\ufeffone two\nb  1\nc -1\n", encoding="utf-8")
    list_voc(tmp_path / "voc", ["train"], tmp_path)
    assert [image["file_name"] for image in listed(tmp_path)["images"]] == ["one two.jpg", "b.png", "c.JPG"]


def test_a_split_that_loses_its_objects_is_refused(tmp_path):
    for number in range(4):
        edges = (1, 1, 50, 50) if number == 0 else (200, 1, 250, 50)
        add_image(tmp_path / "voc", f"p{number}", [("dog", *edges, 0)], split="most")
        add_image(tmp_path / "voc", f"p{number}", [("dog", *edges, 0)], split="half" if number < 2 else "all")
    arguments = ["--voc", str(tmp_path / "voc"), "--out", str(tmp_path / "out"), "--splits"]
    main([*arguments, "half"])
    assert len(listed(tmp_path / "out", "half")["annotations"]) == 1
    with pytest.raises(
        SystemExit, match=r"most would lose 3 of its 4 objects.*: box outside the image \(3\), as in .*p1"
    ):
        main([*arguments, "most"])
    assert not (tmp_path / "out" / "most.json").exists()
    main([*arguments, "most", "--allow-loss"])
    assert len(listed(tmp_path / "out", "most")["annotations"]) == 1
    with pytest.raises(SystemExit, match=r"all has no objects \(2 were annotated\).*pass --unlabelled"):
        main([*arguments, "half", "all", "--allow-loss"])


def test_a_split_of_unreadable_annotations_is_refused(tmp_path):
    for name in ("a", "b", "c"):
        add_image(tmp_path / "voc", name, [("dog", 1, 1, 50, 50, 0)])
    for name in ("b", "c"):
        (tmp_path / "voc" / "Annotations" / f"{name}.xml").write_text("<annotation><object>")
    with pytest.raises(DataError, match="train would lose 2 of its 3 annotations"):
        list_voc(tmp_path / "voc", ["train"], tmp_path)
    list_voc(tmp_path / "voc", ["train"], tmp_path, allow_loss=True)
    assert len(listed(tmp_path)["images"]) == 1


def test_lists_name_their_images_relative_to_themselves(tmp_path, monkeypatch):
    """A folder with lists and images can be moved; where only the root of the file system holds both, none can."""
    add_image(tmp_path / "set" / "voc", "a", [("dog", 1, 1, 50, 50, 0)])
    monkeypatch.chdir(tmp_path / "set")
    main(["--voc", "voc", "--splits", "train", "--out", "lists/mine"])
    assert listed(tmp_path / "set" / "lists" / "mine")["info"]["image_root"] == "../../voc/JPEGImages"
    (tmp_path / "set").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert DataList.load(tmp_path / "moved" / "lists" / "mine" / "train.json").read_image(0).size == (100, 80)
    assert image_root_for(Path("/photos/a"), Path("/home/me/lists")) == "/photos/a"
    assert image_root_for(Path("/home/a"), Path("/home/me/lists")) == "../../a"
    assert image_root_for(Path("/home/me/lists"), Path("/home/me/lists")) == "."


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes there alone")
def test_names_that_lists_and_xml_cannot_hold_are_named(tmp_path):
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "dog"}]}
    for number, name in enumerate((b"good.png", b"latin-\xe9.png", b"bell\a.png", b"line\n.png")):
        name = os.fsdecode(name)
        Image.new("RGB", (9, 8), (number, 0, 0)).save(tmp_path / name)
        content["images"].append({"id": number, "file_name": name, "width": 9, "height": 8})
        content["annotations"].append({"image_id": number, "category_id": 1, "bbox": [1, 1, 5, 5]})
    (tmp_path / "x.json").write_text(json.dumps(content))
    main(["--coco", str(tmp_path / "x.json"), "--splits", "train", "--out", str(tmp_path / "out"), "--allow-loss"])
    data_list = DataList.load(tmp_path / "out" / "train.json")
    assert [data_list.file_names[i] for i in range(len(data_list))] == ["good.png"]
    assert len(problems(tmp_path / "out")["file name unusable"]) == 3


def test_boxes_in_another_unit_are_refused(tmp_path):
    add_image(tmp_path / "voc", "a", [("dog", 0.1, 0.2, 0.5, 0.9, 0), ("dog", 0, 0, 1, 1, 0)])
    with pytest.raises(DataError, match="train: none of the 2 boxes is larger than a pixel"):
        list_voc(tmp_path / "voc", ["train"], tmp_path)
    assert not (tmp_path / "train.json").exists()


def test_images_without_objects_are_kept(tmp_path):
    add_image(tmp_path / "voc", "a", [])
    add_image(tmp_path / "voc", "b", [("dog", 1, 1, 50, 50, 0)])
    list_voc(tmp_path / "voc", ["train"], tmp_path)
    assert len(listed(tmp_path)["images"]) == 2


def test_missing_and_empty_splits(tmp_path):
    add_image(tmp_path / "voc", "a", [("dog", 1, 1, 50, 50, 0)])
    with pytest.raises(DataError, match=r"no split 'val': .*val\.txt is missing; existing splits: train"):
        list_voc(tmp_path / "voc", ["train", "val"], tmp_path)
    (tmp_path / "voc" / "ImageSets" / "Main" / "val.txt").write_text("\n")
    with pytest.raises(DataError, match=r"split 'val' is empty"):
        list_voc(tmp_path / "voc", ["train", "val"], tmp_path)
    assert not (tmp_path / "train.json").exists()  # all or none
    (tmp_path / "voc" / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"no image can be used \(1 problems\): image missing: .*a with any of"):
        list_voc(tmp_path / "voc", ["train"], tmp_path)
    with pytest.raises(DataError, match="not a VOC folder"):
        list_voc(tmp_path, ["train"], tmp_path)


def test_real_photographs(voc_real, tmp_path):
    list_voc(voc_real, ["val"], tmp_path)
    content = listed(tmp_path, "val")
    assert len(content["images"]) == 150
    assert len(content["annotations"]) == 344
    assert len(content["categories"]) == 20


# ---------------------------------------------------------------------------------------------------------------------
# Several folders, COCO, YOLO, class files, downloads


def test_several_voc_folders_become_one_list(tmp_path, capsys):
    add_image(tmp_path / "VOC1", "a", [("dog", 1, 1, 50, 50, 0)])
    add_image(tmp_path / "VOC2", "a", [("cat", 1, 1, 60, 60, 0)], size=(90, 70))
    add_image(tmp_path / "VOC1", "t", [("cat", 1, 1, 60, 60, 0)], split="test")
    folders = [str(tmp_path / name) for name in ("VOC1", "VOC2")]
    main(["--voc", *folders, "--splits", "train", "test", "--out", str(tmp_path / "out")])
    files = [image["file_name"] for image in listed(tmp_path / "out")["images"]]
    assert files == ["VOC1/JPEGImages/a.jpg", "VOC2/JPEGImages/a.jpg"]
    assert [image["file_name"] for image in listed(tmp_path / "out", "test")["images"]] == ["VOC1/JPEGImages/t.jpg"]
    assert "VOC2 has no split 'test'" in capsys.readouterr().out
    data_list = DataList.load(tmp_path / "out" / "train.json")
    assert data_list.read_image(1).size == (90, 70)


def test_voc_folders_may_be_links(tmp_path):
    for name in ("VOC1", "VOC2"):
        add_image(tmp_path / "disk" / name, name, [("dog", 1, 1, 50, 50, 0)])
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    main(["--voc", *(str(tmp_path / n) for n in ("VOC1", "VOC2")), "--splits", "train", "--out", str(tmp_path / "out")])
    assert len(listed(tmp_path / "out")["images"]) == 2


def test_unlabelled_names_may_have_spaces(tmp_path):
    add_image(tmp_path / "voc", "two words", [], split="test")
    (tmp_path / "voc" / "Annotations" / "two words.xml").unlink()
    main(["--voc", str(tmp_path / "voc"), "--splits", "test", "--out", str(tmp_path / "out"), "--unlabelled"])
    assert listed(tmp_path / "out", "test")["images"][0]["file_name"] == "two words.jpg"


def test_unlabelled_images_can_be_listed(tmp_path):
    add_image(tmp_path / "voc", "a", [("dog", 1, 1, 50, 50, 0)], split="test")
    (tmp_path / "voc" / "Annotations" / "a.xml").unlink()
    arguments = ["--voc", str(tmp_path / "voc"), "--splits", "test", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"no image can be used \(1 problems\): .*a\.xml"):
        main(arguments)
    main([*arguments, "--unlabelled"])
    content = listed(tmp_path / "out", "test")
    assert (len(content["images"]), content["annotations"]) == (1, [])
    assert tuple(category["name"] for category in content["categories"]) == VOC_CLASSES


class Archive(http.server.BaseHTTPRequestHandler):
    """Serves one file, or the first half of it and hangs up."""

    content, breaks, requests = b"", False, 0

    def do_GET(self):
        type(self).requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.content[: len(self.content) // 2] if self.breaks else self.content)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small VOC2012 archive on a local server, in the place of the real one."""
    add_image(tmp_path / "made" / "VOCdevkit" / "VOC2012", "a", [("dog", 1, 1, 50, 50, 0)], split="trainval")
    with tarfile.open(tmp_path / "voc.tar", "w") as tar:
        tar.add(tmp_path / "made" / "VOCdevkit", "VOCdevkit")
    Archive.content, Archive.breaks, Archive.requests = (tmp_path / "voc.tar").read_bytes(), False, 0
    server = http.server.HTTPServer(("127.0.0.1", 0), Archive)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    entry = {
        **DATASET_YEAR_DICT["2012"],
        "url": f"http://127.0.0.1:{server.server_port}/voc.tar",
        "md5": hashlib.md5(Archive.content).hexdigest(),
    }
    monkeypatch.setitem(DATASET_YEAR_DICT, "2012", entry)
    yield Archive
    server.shutdown()
    server.server_close()


def test_download_is_checked_and_started_again(archive, tmp_path):
    arguments = ["--download", "voc2012", "--root", str(tmp_path / "root"), "--splits", "trainval"]
    arguments += ["--out", str(tmp_path / "out")]
    archive.breaks = True
    with pytest.raises(SystemExit, match="voc2012 trainval cannot be downloaded"):
        main(arguments)
    assert not (tmp_path / "out").exists()
    archive.breaks = False
    main(arguments)
    assert len(listed(tmp_path / "out", "trainval")["images"]) == 1
    requests = archive.requests
    main(arguments)  # all is there: nothing is fetched, nothing unpacked
    assert archive.requests == requests


def test_download_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    entry = {**DATASET_YEAR_DICT["2012"], "url": "http://127.0.0.1:9/voc.tar"}
    monkeypatch.setitem(DATASET_YEAR_DICT, "2012", entry)
    arguments = ["--download", "voc2012", "--root", str(tmp_path), "--splits", "trainval", "--out", str(tmp_path / "o")]
    with pytest.raises(SystemExit, match="unpack its archive there yourself and use --voc"):
        main(arguments)
