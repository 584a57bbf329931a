"""The published usage in a fresh process, the command line, and pictures that people can read."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sure_network import save_sure_network

from detect import annotate, detect, main, predict
from fpnssd.data.voc import parse_voc_xml
from fpnssd.inference.detector import Detections
from fpnssd.inference.draw import class_colour, covered_areas, place_label
from fpnssd.inference.inputs import find_sources
from model import load_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With small.pth.tar, whose network finds something in noise, and photo.jpg."""
    folder = tmp_path_factory.mktemp("detect")
    save_sure_network(folder / "small.pth.tar")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((480, 360)).save(folder / "photo.jpg")
    return folder


def run_python(code, folder):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_published_usage_in_a_fresh_process(folder):
    code = """
import torch
from PIL import Image
from detect import detect
device = torch.device("cpu")
checkpoint = torch.load("small.pth.tar")
model = checkpoint["model"].to(device)
image = Image.open("photo.jpg")
before = image.tobytes()
annotated = detect(image, min_score=0.25, max_overlap=0.5, top_k=200)
assert annotated.size == image.size and annotated.tobytes() != before and image.tobytes() == before
same = detect(image, min_score=0.25, max_overlap=0.5, top_k=200, model=model)
assert same.tobytes() == annotated.tobytes()
"""
    result = run_python(code, folder)
    assert result.returncode == 0, result.stderr
    assert "using the model last loaded (test_resnet, 2 classes)" in result.stderr


def test_importing_loads_no_weights(folder):
    code = """
import torch
def refuse(*args, **kwargs): raise AssertionError("weights were loaded")
torch.load = torch.hub.load_state_dict_from_url = refuse
import detect, model, train, eval
assert model.last_loaded_model() is None
"""
    result = run_python(code, folder)
    assert result.returncode == 0, result.stderr


def test_without_any_model_the_one_that_ships_is_used_from_any_folder(folder):
    result = run_python("from detect import detect\nfrom PIL import Image\ndetect(Image.open('photo.jpg'))", folder)
    assert result.returncode == 0, result.stderr
    assert "checkpoint/fpnssd300_lite_voc.pth.tar (tf_efficientnet_lite" in result.stderr


def test_command_line(folder, tmp_path, capsys):
    (folder / "text.jpg").write_text("hello")
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main([str(folder / name) for name in ("text.jpg", "photo.jpg", "none.jpg", "photo.jpg")]
             + ["--checkpoint", str(folder / "small.pth.tar"), "--out", str(out)])  # fmt: skip
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "text.jpg is no image" in printed.err
    assert "none.jpg is missing" in printed.err
    assert sorted(path.name for path in out.iterdir()) == ["photo.jpg", "photo_2.jpg"]
    lines = [line for line in printed.out.splitlines() if line.startswith("  ")]
    assert lines
    assert all(line.split()[0] in ("cat", "dog") for line in lines)


def test_photographs_are_never_overwritten(folder, tmp_path):
    before = (folder / "photo.jpg").read_bytes()
    with pytest.raises(SystemExit, match="is itself one of the inputs"):
        main([str(folder / "photo.jpg"), "--checkpoint", str(folder / "small.pth.tar"), "--out", str(folder)])
    assert (folder / "photo.jpg").read_bytes() == before
    other = tmp_path / "photo.jpg"
    other.write_bytes(before)
    with pytest.raises(SystemExit):  # nor another one of the same call
        main(
            [str(folder / "photo.jpg"), str(other)]
            + ["--checkpoint", str(folder / "small.pth.tar"), "--out", str(tmp_path)]
        )
    assert other.read_bytes() == before


@pytest.mark.parametrize("option", ["--json", "--coco"])
def test_a_photograph_is_no_file_for_answers(folder, tmp_path, option):
    """--json *.jpg, which the shell makes --json 1.jpg 2.jpg of."""
    paths = [tmp_path / f"{n}.jpg" for n in range(2)]
    for path in paths:
        shutil.copy(folder / "photo.jpg", path)
    before = paths[0].read_bytes()
    with pytest.raises(SystemExit, match=rf"{option} .*0\.jpg: that is no file to write text to"):
        main(["--checkpoint", str(folder / "small.pth.tar"), "--no-pictures", option, *map(str, paths)])
    assert paths[0].read_bytes() == before


def test_odd_pictures_and_names_stop_nothing(folder, tmp_path, capsys, monkeypatch):
    """EXIF that makes PIL's reader raise struct.error; a picture that is a program for Ghostscript; a name beyond the
    output's encoding."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"  # turned; then a tag of no sense
    exif += b"\x01\x19\0\x05\0\0\0\x01\0\0\0&\0\0\0\0\0\0\0H\0\0\0\x01"
    Image.open(folder / "photo.jpg").save(tmp_path / "1.jpg", exif=exif)
    (tmp_path / "2.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    shutil.copy(folder / "photo.jpg", tmp_path / "\u732b.jpg")
    started = []
    monkeypatch.setattr(subprocess, "check_call", started.append)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    with pytest.raises(SystemExit):
        main(
            [str(tmp_path), "--checkpoint", str(folder / "small.pth.tar"), "--no-pictures"]
            + ["--coco", str(tmp_path / "found.json")]
        )
    said = capsys.readouterr().err
    assert "1.jpg is damaged" in said
    assert "2.jpg is no image that can be read" in said
    assert not started
    sys.stdout.flush()
    assert rb"\u732b.jpg: " in sys.stdout.buffer.getvalue()
    assert {row["image_id"] for row in json.loads((tmp_path / "found.json").read_text())} == {3}


def test_class_names_are_no_paths(folder, tmp_path):
    checkpoint = save_sure_network(tmp_path / "hostile.pth.tar", ("../../escaped", "a:b"))
    arguments = ["--no-pictures", "--crops", str(tmp_path / "in" / "crops"), "--min-score", "0.1"]
    main([str(folder / "photo.jpg"), "--checkpoint", str(checkpoint), *arguments])
    assert {path.name for path in (tmp_path / "in" / "crops").iterdir()} <= {"_.._escaped", "a_b"}
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"crops"}
    assert not (tmp_path / "escaped").exists()


def test_every_form_of_answer(folder, tmp_path, capsys):
    (folder / "few").mkdir(exist_ok=True)
    for name in ("a.jpg", "b.png"):
        Image.open(folder / "photo.jpg").save(folder / "few" / name)
    forms = {name: str(tmp_path / name) for name in ("json", "coco", "voc-xml", "yolo", "crops", "out")}
    arguments = [text for name, path in forms.items() for text in (f"--{name}", path)]
    main([str(folder / "few"), "--checkpoint", str(folder / "small.pth.tar"), *arguments, "--min-score", "0.1"])
    found = [json.loads(line) for line in (tmp_path / "json").read_text().splitlines()]
    assert [Path(one["source"]).name for one in found] == ["a.jpg", "b.png"]
    objects = found[0]["objects"]
    assert len(objects) > 1
    coco = json.loads((tmp_path / "coco").read_text())
    assert [row["image_id"] for row in coco] == [1] * len(objects) + [2] * len(found[1]["objects"])
    x0, y0, x1, y1 = objects[0]["box"]
    assert coco[0]["bbox"] == [x0, y0, x1 - x0, y1 - y0]
    assert coco[0]["category_id"] == objects[0]["label"]
    # The XML is read back by the reader of annotations, which undoes VOC's counting from one.
    size, raw, _ = parse_voc_xml(tmp_path / "voc-xml" / "a.xml")
    assert size == (360, 480)
    assert [one.name for one in raw] == [one["name"] for one in objects]
    assert raw[0].box == pytest.approx(objects[0]["box"], abs=0.01)
    label, cx, cy, width, height, score = map(float, (tmp_path / "yolo" / "a.txt").read_text().splitlines()[0].split())
    assert (label, score) == (objects[0]["label"] - 1, pytest.approx(objects[0]["score"], abs=1e-6))
    assert ((cx - width / 2) * 480, (cy + height / 2) * 360) == pytest.approx((x0, y1), abs=0.01)
    crops = list((tmp_path / "crops").glob("*/a_*.jpg"))
    assert len(crops) == len(objects)
    with Image.open(tmp_path / "crops" / objects[0]["name"] / "a_1.jpg") as crop:
        assert crop.size == (round(x1) - round(x0), round(y1) - round(y0))


def test_standard_input_and_output(folder):
    code = "import detect; detect.main(['-', '--checkpoint', 'small.pth.tar', '--json', '-', '--no-pictures'])"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    with open(folder / "photo.jpg", "rb") as photograph:
        result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, stdin=photograph)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["width"] == 480
    assert not (folder / "detected_img").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing*.jpg"], "nothing matches"),
        (["empty"], "folder empty holds no image or video"),
        (["photo.jpg", "--classes", "cow"], "no class cow: the model knows cat, dog"),
        (["photo.jpg", "--min-score", "2"], "min_score is 2.0"),
        (
            ["photo.jpg", "--runtime", "onnx"],
            "has no onnx file beside it: python export.py small.pth.tar --to onnx makes",
        ),
        (["photo.jpg", "--checkpoint", "none.pth.tar"], "no checkpoint 'none.pth.tar'"),
    ],
)
def test_bad_command_lines_are_named(folder, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir(exist_ok=True)
    checkpoint = [] if "--checkpoint" in arguments else ["--checkpoint", "small.pth.tar"]
    with pytest.raises(SystemExit, match=said):
        main([*arguments, *checkpoint, "--out", str(tmp_path)])


def test_classes_that_are_chosen_or_suppressed(folder, tmp_path, capsys):
    for flags in (["--classes", "dog"], ["--suppress", "cat"]):
        arguments = ["--checkpoint", str(folder / "small.pth.tar"), "--json", str(tmp_path / "x"), "--no-pictures"]
        main([str(folder / "photo.jpg"), *arguments, "--min-score", "0.1", *flags])
        assert {one["name"] for one in json.loads((tmp_path / "x").read_text())["objects"]} == {"dog"}


def test_predict_and_detect_agree(folder):
    model = load_checkpoint(folder / "small.pth.tar")["model"]
    image = Image.open(folder / "photo.jpg")
    found = predict(image, model=model)
    assert isinstance(found, Detections)
    assert detect(image, model=model).tobytes() == annotate(image.convert("RGB"), found).tobytes()
    assert [len(one) for one in predict([image, image], model=model)] == [len(found)] * 2
    with pytest.raises(ValueError, match="cannot suppress cow"):
        detect(image, suppress=["cow"], model=model)


def test_boxes_and_labels_are_drawn_inside_the_picture():
    image = Image.new("RGB", (300, 200), "gray")
    box = [40.0, 50.0, 200.0, 150.0]

    def found(box):
        return Detections(torch.tensor([box]), torch.tensor([0.875]), torch.tensor([2]), ["dog"], (200, 300))

    picture = annotate(image, found(box))
    assert picture.getpixel((120, 150)) == class_colour(2)  # the lower edge
    assert picture.getpixel((41, 100)) == class_colour(2)
    assert picture.getpixel((120, 100)) == (128, 128, 128)  # the inside is left alone
    # The label at the corner of the frame moves inside: its plate covers as many pixels as in the middle.
    for corner in ([-5.0, -5.0, 300.0, 200.0], [280.0, 190.0, 300.0, 200.0]):
        plate = (np.asarray(annotate(image, found(corner))) == class_colour(2)).all(axis=2)
        assert plate.sum() > 400


def test_labels_keep_off_each_other():
    """Ten boxes on one place: labels do not overlap while there is room, and stay in the picture."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        taken = []
        for _ in range(5):
            box = [*rng.uniform(0, 100, 2), *rng.uniform(150, 300, 2)]
            taken.append(place_label(box, (60, 15), (300, 300), taken))
            left, top, right, bottom = taken[-1]
            assert 0 <= left < right <= 300
            assert 0 <= top < bottom <= 300
    same = []
    for _ in range(5):
        same.append(place_label([100, 100, 200, 200], (40, 15), (300, 300), same))
        assert not covered_areas(np.array([same[-1][:2]]), (40, 15), same[:-1]).any()


def test_colours_differ():
    colours = [class_colour(label) for label in range(1, 21)]
    distances = [sum(abs(a - b) for a, b in zip(c, d, strict=True)) for i, c in enumerate(colours) for d in colours[:i]]
    assert min(distances) > 20


def test_names_are_not_taken_twice():
    """By another ending or in another case neither."""
    files = ["x/a.jpg", "y/a.jpg", "a.jpg", "a.png", "A.JPG", "b.c.jpg", "a.mp4", "camera:0"]
    names = ["a.jpg", "a_2.jpg", "a_3.jpg", "a_4.png", "A_5.JPG", "b.c.jpg", "a_6.mp4", "camera0.mp4"]
    assert [str(source.name) for source in find_sources(files)] == names
