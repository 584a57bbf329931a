"""A folder with every defect that the check knows: each found, counted and named, and none of them crashes anything."""

import functools
import json
import math
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from create_data_lists import main
from datasets import DetectionDataset
from fpnssd.data.check_report import default_priors, unmatched_share
from fpnssd.data.checks import ACTIONS, LEFT_OUT, NOTED, REPAIRED, check_box
from fpnssd.data.data_list import DataList
from model import FPNSSD, ModelConfig

ROOT = Path(__file__).parents[1]


def noise(name, size=(100, 80)):
    colours = np.random.default_rng(list(name.encode())).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size)


def xml(objects, size=(100, 80)):
    """objects: (class, xmin, ymin, xmax, ymax)."""
    text = "<annotation>"
    if size:
        text += f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for label, *corners in objects:
        tags = "".join(f"<{t}>{c}</{t}>" for t, c in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
        text += f"<object><name>{label}</name><bndbox>{tags}</bndbox></object>"
    return text + "</annotation>"


@functools.cache
def huge_png(side=30_000):
    """A valid grey PNG of side x side pixels in less than a megabyte."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    packer, rows = zlib.compressobj(9), bytes(side + 1)
    data = b"".join(packer.compress(rows) for _ in range(side)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


LAUGHS = '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY lol0 "lol">' + "".join(
    f'<!ENTITY lol{n} "{f"&lol{n - 1};" * 10}">' for n in range(1, 10)
) + "]><annotation>&lol9;</annotation>"  # fmt: skip


class Folder:
    """A VOC folder in the making."""

    def __init__(self, root):
        self.root = root
        self.splits = {"train": [], "val": []}
        for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / part).mkdir(parents=True)

    def add(self, name, image=None, annotation=None, split="train", ending="jpg", **save):
        """The default is a good image with a good object; False leaves a part out."""
        self.splits[split].append(name)
        if image is not False:
            image = noise(name) if image is None else image
            image.save(self.root / "JPEGImages" / f"{name}.{ending}", **save)
        if annotation is not False:
            annotation = xml([("dog", 11, 11, 60, 60)]) if annotation is None else annotation
            (self.root / "Annotations" / f"{name}.xml").write_text(annotation)

    def finish(self):
        for split, names in self.splits.items():
            (self.root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return {"exif": tags}


def nasty_voc(root):
    """The folder, and {kind: [a part of each place that has to be named]}."""
    folder = Folder(root)
    images = root / "JPEGImages"
    folder.add("good")
    folder.add("good_cat", annotation=xml([("cat", 11, 11, 60, 60)]))
    folder.add("no_xml", annotation=False)
    folder.add("broken_xml", annotation="<annotation><object>")
    folder.add("laughs", annotation=LAUGHS)
    folder.add("no_bndbox", annotation="<annotation><object><name>dog</name></object></annotation>")
    folder.add("no_name", annotation=xml([("", 1, 1, 50, 50)]))
    folder.add("word", annotation=xml([("dog", "one", 1, 50, 50)]))
    folder.add("size_word", annotation=xml([("dog", 1, 1, 50, 50)], size=("wide", 80)))
    folder.add("no_image", image=False)
    folder.add("../outside")
    folder.add("text", image=False)
    (images / "text.jpg").write_text("hello")
    folder.add("nothing", image=False)
    (images / "nothing.jpg").write_bytes(b"")
    folder.add("cut")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:700])
    folder.add("cut_png", ending="png")
    (images / "cut_png.png").write_bytes((images / "cut_png.png").read_bytes()[:-300])
    folder.add("huge", image=False)
    (images / "huge.png").write_bytes(huge_png())
    folder.add("other_size", annotation=xml([("dog", 1, 1, 50, 50)], size=(80, 80)))
    # Both turn 100 x 80 pixels into 80 x 100; the first annotation was drawn after the turn, the second before.
    folder.add("turned", annotation=xml([("dog", 1, 1, 80, 100)], size=(80, 100)), **exif(6))
    folder.add("not_turned", annotation=xml([("dog", 1, 1, 100, 80)], size=(100, 80)), **exif(6))
    folder.add("upside_down", **exif(3))
    folder.add("turned_no_size", annotation=xml([("dog", 1, 1, 80, 100)], size=None), **exif(8))
    folder.add("grey", image=noise("grey").convert("L"))
    folder.add("cmyk", image=noise("cmyk").convert("CMYK"))
    folder.add("palette", image=noise("palette").convert("P"), ending="png")
    folder.add("sixteen", Image.fromarray(np.arange(8000, dtype=np.uint16).reshape(80, 100) * 8), ending="png")
    folder.add("alpha", image=noise("alpha").convert("RGBA"), ending="png")
    more = [noise("frame2")]
    folder.add("animated", ending="png", save_all=True, append_images=more)
    folder.add("not_finite", annotation=xml([("dog", "nan", 1, 50, 50), ("cat", 1, 1, 50, "inf")]))
    folder.add("inverted", annotation=xml([("dog", 50, 1, 20, 50)]))
    folder.add("empty_box", annotation=xml([("dog", 20, 1, 20, 50)]))
    folder.add("beyond", annotation=xml([("dog", 101, 1, 120, 50)]))
    folder.add("clipped", annotation=xml([("dog", -10, 1, 120, 50)]))
    folder.add("twice", annotation=xml([("dog", 1, 1, 50, 50), ("dog", 1, 1, 50, 50)]))
    folder.add("two_classes", annotation=xml([("dog", 1, 1, 50, 50), ("cat", 1, 1, 50, 50)]))
    folder.add("tiny", noise("tiny", (900, 80)), xml([("dog", 11, 11, 12, 60)], size=(900, 80)))
    folder.add("background", annotation=xml([]))
    folder.add("zebra", annotation=xml([("zebra", 1, 1, 50, 50)]))
    folder.add("named_twice")
    folder.splits["train"].append("named_twice")
    folder.add("twin", image=noise("good"), ending="png")  # JPEG's losses make it another image
    folder.add("twin2", image=noise("good"), ending="png")
    folder.add("leak", image=noise("leak"), ending="png")
    folder.add("leaked", image=noise("leak"), ending="png", split="val")
    folder.add("val_good", split="val")
    folder.finish()
    left_out = ["not_finite", "inverted", "empty_box", "beyond", "zebra"]
    return {
        "annotation missing": ["no_xml.xml"],
        "annotation does not parse": ["broken_xml.xml"],
        "annotation with entities": ["laughs.xml"],
        "annotation incomplete": ["no_bndbox.xml", "no_name.xml"],
        "number unreadable": ["word.xml: <xmin> is 'one'", "size_word.xml: <size>: 'wide' is not a number"],
        "image missing": ["no_image"],
        "image outside the image folder": ["outside"],
        "file is not an image": ["text.jpg", "nothing.jpg"],
        "image damaged": ["cut.jpg", "cut_png.png"],
        "image too large": ["huge.png"],
        "size differs from the annotation's": ["other_size.xml says 80x80"],
        "image is in a later split too": ["leak.png is val's leaked.png"],
        "box not finite": ["not_finite.xml: dog", "not_finite.xml: cat"],
        "box inverted": ["inverted.xml: dog (50, 1, 20, 50) in 100x80"],
        "box empty": ["empty_box.xml: dog (20, 1, 20, 50)"],
        "box outside the image": ["beyond.xml: dog (101, 1, 120, 50)"],
        "object twice": ["twice.xml"],
        "class that was not chosen": ["zebra.jpg: zebra"],
        "box partly outside the image": ["clipped.xml: dog (-10, 1, 120, 50)"],
        "image named twice": ["named_twice 2 times"],
        "EXIF rotation applied": ["/turned.jpg", "turned_no_size.jpg"],
        "EXIF rotation not applied": ["not_turned.jpg", "upside_down.jpg"],
        "image of another mode": [
            "grey.jpg: L",
            "cmyk.jpg: CMYK",
            "palette.png: P",
            "sixteen.png: I;16",
            "alpha.png: RGBA, transparent",
        ],  # fmt: skip
        "animated image": ["animated.png"],
        "image twice in the split": ["twin2.png has the pixels of twin.png"],
        "image without objects": ["background.jpg", *(f"{name}.jpg" for name in left_out)],
        "two classes on one box": ["two_classes.xml: cat"],
        "box under a pixel at network size": ["tiny.xml: dog"],
        "class without objects": ["cat", "unicorn", "unicorn"],
    }


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """(folder, its defects, where its lists are)."""
    folder = tmp_path_factory.mktemp("nasty")
    defects = nasty_voc(folder / "voc")
    (folder / "classes.txt").write_text("dog\ncat\nunicorn\n")
    main([*arguments(folder), "--out", str(folder)])
    return folder, defects


def arguments(folder):
    return ["--voc", str(folder / "voc"), "--splits", "train", "val", "--classes", str(folder / "classes.txt")]


def test_every_defect_is_found_named_and_counted(nasty):
    folder, defects = nasty
    assert len(defects) >= 25
    found = {}
    for row in json.loads((folder / "check.json").read_text())["problems"]:
        assert row["count"] == len(row["where"])
        assert row["done"] == ACTIONS[row["kind"]]
        found.setdefault(row["kind"], []).extend(row["where"])
    assert set(found) == set(defects)
    for kind, places in defects.items():
        assert len(found[kind]) == len(places), (kind, found[kind])
        for place in places:
            assert any(place in said for said in found[kind]), (kind, place, found[kind])


def test_what_is_left_can_be_used(nasty):
    folder, _ = nasty
    for split in ("train", "val"):
        data_list = DataList.load(folder / f"{split}.json")
        dataset = DetectionDataset(data_list)
        for index in range(len(dataset)):
            assert dataset[index]["image"].shape == (3, 300, 300)
    names = [data_list.file_names[i] for i in range(len(data_list))]
    assert sorted(names) == ["leaked.png", "val_good.jpg"]


def test_turned_images_are_read_turned(nasty):
    folder, _ = nasty
    data_list = DataList.load(folder / "train.json")
    index = [data_list.file_names[i] for i in range(len(data_list))].index("turned.jpg")
    with Image.open(folder / "voc" / "JPEGImages" / "turned.jpg") as stored:
        expected = np.asarray(stored.transpose(Image.Transpose.ROTATE_270))  # orientation 6: a quarter turn clockwise
    np.testing.assert_array_equal(np.asarray(data_list.read_image(index)), expected)
    assert data_list.target(index)["boxes"].tolist() == [[0, 0, 80, 100]]


def test_sixteen_bits_and_transparency_become_rgb(nasty):
    folder, _ = nasty
    data_list = DataList.load(folder / "train.json")
    names = [data_list.file_names[i] for i in range(len(data_list))]
    grey = np.asarray(data_list.read_image(names.index("sixteen.png")))
    expected = np.arange(8000).reshape(80, 100) * 8 // 257  # 65,535 is 255
    np.testing.assert_array_equal(grey, np.repeat(expected[..., None], 3, axis=2))


def test_strict_refuses_and_keeps_the_old_lists(nasty, check_picture, tmp_path, capsys):
    folder, _ = nasty
    (tmp_path / "train.json").write_text("old")
    with pytest.raises(SystemExit, match=r"--strict: .*1 x image too large.*No list was written"):
        main([*arguments(folder), "--out", str(tmp_path), "--strict", "--overwrite"])
    assert (tmp_path / "train.json").read_text() == "old"
    assert not (tmp_path / "val.json").exists()
    assert json.loads((tmp_path / "check.json").read_text())["problems"]
    assert Image.open(tmp_path / "check.png").width > 1000
    assert re.search(r"train +box inverted +1 +object left out", capsys.readouterr().out)


def test_strict_takes_what_is_only_noted(tmp_path):
    folder = Folder(tmp_path / "voc")
    folder.add("grey", image=noise("grey").convert("L"))
    folder.add("background", annotation=xml([]))
    folder.finish()
    main(["--voc", str(tmp_path / "voc"), "--splits", "train", "--out", str(tmp_path), "--strict"])
    assert len(DataList.load(tmp_path / "train.json")) == 2


MEMORY = """
import sys
from benchmarks.memory import peak_mb
from create_data_lists import main

before = peak_mb()
for folder in sys.argv[1:]:
    main(["--voc", folder, "--splits", "train", "--out", folder + "_out"])
    print(folder, "took", peak_mb() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_bombs_do_not_take_memory(tmp_path):
    """A billion laughs would be 3 GB, 30,000 x 30,000 grey pixels 0.9 GB."""
    for name in ("bombs", "plain"):
        folder = Folder(tmp_path / name)
        folder.add("good")
        if name == "bombs":
            folder.add("laughs", annotation=LAUGHS)
            folder.add("huge", image=False)
            (tmp_path / name / "JPEGImages" / "huge.png").write_bytes(huge_png())
        folder.finish()
    command = [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in ("plain", "bombs"))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    megabytes = {name: float(re.search(rf"{name} took (.*)", done.stdout)[1]) for name in ("plain", "bombs")}
    assert megabytes["bombs"] < 200_000 / 1024
    assert megabytes["bombs"] - megabytes["plain"] < 50_000 / 1024
    kinds = {row["kind"] for row in json.loads((tmp_path / "bombs_out" / "check.json").read_text())["problems"]}
    assert kinds >= {"annotation with entities", "image too large"}


def test_the_priors_are_the_networks():
    model = FPNSSD(ModelConfig(("a",), "resnet18", fpn_channels=16))
    assert torch.equal(default_priors(300), model.priors)


def test_kinds_are_in_one_table_each():
    assert len(ACTIONS) == len(LEFT_OUT) + len(REPAIRED) + len(NOTED)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 10, 10), ((0, 0, 10, 10), None)),
        ((-0.005, 0, 10, 10), ((0, 0, 10, 10), None)),
        ((-1, 0, 10, 10), ((0, 0, 10, 10), "box partly outside the image")),
        ((10, 10, 10.5, 30), ((10, 10, 10.5, 20), "box partly outside the image")),
        ((20, 0, 25, 10), (None, "box outside the image")),
        ((10.5, 1, 10.5 + 1e-9, 15), (None, "box empty")),  # in float32, as lists are read
        ((-5, 0, 0, 10), (None, "box outside the image")),
    ],
)
def test_boxes_by_hand(box, expected):
    assert check_box(box, (20, 20)) == expected


def test_unmatched_share_by_the_other_formula():
    """Boxes that are priors match; tiny ones do not; in between, torchvision's IoU over all priors says it."""
    # The nearest centre of P3 is half a cell, 1 / 76, off both ways: IoU 0.605 with its prior of 0.1.
    assert unmatched_share(np.array([[0.45, 0.45, 0.55, 0.55]]), 300) == 0.0
    cell = 1 / 38  # a prior of scale 0.1 around the centre of cell (10, 10) of P3
    x = 10.5 * cell
    assert unmatched_share(np.array([[x - 0.05, x - 0.05, x + 0.05, x + 0.05]]), 300) == 0.0
    assert unmatched_share(np.array([[0.5, 0.5, 0.501, 0.501]]), 300) == 1.0
    assert unmatched_share(np.zeros((0, 4)), 300) is None
    # The smallest prior has 0.1 of the side: a square of side s in its middle has IoU (s / 0.1)^2.
    for side in (0.07, 0.072):
        box = np.array([[x - side / 2, x - side / 2, x + side / 2, x + side / 2]])
        prior = torch.tensor([[x - 0.05, x - 0.05, x + 0.05, x + 0.05]])
        overlap = box_iou(torch.from_numpy(box).float(), prior).item()
        assert math.isclose(overlap, (side / 0.1) ** 2, rel_tol=1e-4)
        assert unmatched_share(box, 300) == float(overlap < 0.5)
