"""The published usage in a fresh process, the command line, and pictures that people can read."""

import dataclasses
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from sure_network import save_sure_network

from detect import annotate, detect, main, predict
from fpnssd.data.voc import parse_voc_xml
from fpnssd.inference.detector import Detections, Detector
from fpnssd.inference.draw import class_colour, covered_areas, find_font, label_text, place_label, system_fonts
from fpnssd.inference.inputs import Source, find_sources
from fpnssd.inference.outputs import write_voc_xml
from model import load_checkpoint, save_checkpoint
from utils import InputError

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


def test_a_fresh_process(folder):
    """Importing loads no weights; the model that ships is used from any folder; then the published usage."""
    code = """
import torch
load = torch.load
def refuse(*args, **kwargs): raise AssertionError("weights were loaded")
torch.load = torch.hub.load_state_dict_from_url = refuse
import detect, model, train, eval
assert model.last_loaded_model() is None
torch.load = load
from PIL import Image
from detect import detect
detect(Image.open("photo.jpg"))
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
    assert "checkpoint/fpnssd300_lite_voc.pth.tar (tf_efficientnet_lite" in result.stderr
    assert "using the model last loaded (test_resnet, 2 classes)" in result.stderr


def test_command_line(folder, tmp_path, capsys):
    (folder / "text.jpg").write_text("hello")
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main([str(folder / name) for name in ("text.jpg", "photo.jpg", "none.jpg", "photo.jpg")]
             + ["--checkpoint", str(folder / "small.pth.tar"), "--out", str(out)])  # fmt: skip
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "text.jpg is not a readable image" in printed.err
    assert "none.jpg is missing" in printed.err
    assert sorted(path.name for path in out.iterdir()) == ["photo.jpg", "photo_2.jpg"]
    lines = [line for line in printed.out.splitlines() if line.startswith("  ")]
    assert lines
    assert all(line.split()[0] in ("cat", "dog") for line in lines)
    counts = {name: sum(line.startswith(f"  {name} ") for line in lines) for name in ("cat", "dog")}
    total = printed.out.splitlines()[-1]
    assert total.startswith("2 images: ")
    assert total.endswith("; 2 failures")
    assert all((f"{name} {count}" in total) == (count > 0) for name, count in counts.items())


def test_photographs_are_never_overwritten(folder, tmp_path):
    before = (folder / "photo.jpg").read_bytes()
    with pytest.raises(SystemExit, match=r"would replace the input .*photo\.jpg: pass --out FOLDER .* --no-pictures"):
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
    with pytest.raises(SystemExit, match=rf"{option} .*0\.jpg: that is not a text file"):
        main(["--checkpoint", str(folder / "small.pth.tar"), "--no-pictures", option, *map(str, paths)])
    assert paths[0].read_bytes() == before


def test_odd_pictures_and_names_stop_nothing(folder, tmp_path, capsys, monkeypatch):
    """EXIF that makes PIL's reader raise struct.error, which costs nothing; a picture that is a program for
    Ghostscript; a name beyond the output's encoding."""
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
    assert "1.jpg" not in said
    assert "2.jpg is not a readable image" in said
    assert not started
    sys.stdout.flush()
    assert rb"\u732b.jpg: " in sys.stdout.buffer.getvalue()
    assert {row["image_id"] for row in json.loads((tmp_path / "found.json").read_text())} == {1, 3}


def save_noise(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((120, 90)).save(path, **options)


def test_a_picture_that_fails_at_any_stage_costs_itself_alone(folder, tmp_path, capsys, monkeypatch):
    """1.jpg cannot be read, 3.jpg fails in the network, 5.jpg when it is drawn: the others are whole in every form."""
    for number in range(7):
        save_noise(tmp_path / "in" / f"{number}.jpg")
    (tmp_path / "in" / "1.jpg").write_bytes(b"hello")
    predict_images = Detector.predict_images

    def broken_network(self, images, *arguments):
        sources = arguments[-1]
        if any(source.endswith("3.jpg") for source in sources):
            raise RuntimeError("CUDA out of memory")
        return predict_images(self, images, *arguments)

    def broken_pen(image, detections):
        if detections.source.endswith("5.jpg"):
            raise ZeroDivisionError("no room")
        return annotate(image, detections)

    monkeypatch.setattr(Detector, "predict_images", broken_network)
    monkeypatch.setattr("fpnssd.inference.outputs.annotate", broken_pen)
    forms = ["--json", str(tmp_path / "found.jsonl"), "--coco", str(tmp_path / "found.json"), "--min-score", "0.1"]
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                str(tmp_path / "in"),
                "--checkpoint",
                str(folder / "small.pth.tar"),
                "--out",
                str(tmp_path / "out"),
                *forms,
            ]
        )
    assert stopped.value.code == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{n}.jpg" for n in (0, 2, 4, 6)]
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [Path(line["source"]).name for line in lines] == [f"{n}.jpg" for n in (0, 2, 4, 5, 6)]
    assert {row["image_id"] for row in json.loads((tmp_path / "found.json").read_text())} == {1, 3, 5, 6, 7}
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("detect: ")]
    assert [next(n for n in "135" if f"{n}.jpg" in line) for line in errors] == ["1", "3", "5"]
    assert "RuntimeError: CUDA out of memory" in errors[1]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, signal.SIGTERM, OSError("disk full")])
def test_what_was_found_is_written_at_every_end(folder, tmp_path, monkeypatch, ending):
    for number in range(4):
        save_noise(tmp_path / "in" / f"{number}.jpg")

    def stop(source, loaded=Source.load):
        if source.number == 3:
            if isinstance(ending, signal.Signals):
                signal.raise_signal(ending)
            raise ending
        return loaded(source)

    monkeypatch.setattr(Source, "load", stop)
    if isinstance(ending, OSError):  # outside of any picture
        monkeypatch.setattr("detect.load_each", lambda sources, outputs: [(one, stop(one)) for one in sources])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="disk full" if isinstance(ending, OSError) else "results so far are written"):
        main(
            [str(tmp_path / "in"), "--checkpoint", str(folder / "small.pth.tar"), "--no-pictures", "--batch-size", "1"]
            + ["--coco", str(tmp_path / "found.json"), "--json", str(tmp_path / "found.jsonl"), "--min-score", "0.1"]
        )
    assert signal.getsignal(signal.SIGTERM) is before
    assert {row["image_id"] for row in json.loads((tmp_path / "found.json").read_text())} == {1, 2}
    assert len((tmp_path / "found.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.jsonl", "in"]


def test_folders_are_read_whole_and_outputs_keep_them(folder, tmp_path, capsys):
    root = tmp_path / "in"
    for name in ("a.jpg", "deep/a.jpg", "deep/er/b.JPG", "deep/c.WebP", "out/old.jpg"):
        save_noise(root / name, format=None if name.endswith("bP") else "JPEG")
    (root / "deep" / "notes.txt").write_text("hello")
    (root / "deep" / "again").symlink_to(root, target_is_directory=True)
    main(
        [str(root), "--checkpoint", str(folder / "small.pth.tar"), "--out", str(root / "out")]
        + ["--voc-xml", str(tmp_path / "xml")]
    )
    written = sorted(str(path.relative_to(root / "out")) for path in (root / "out").rglob("*") if path.is_file())
    assert written == ["a.jpg", "deep/a.jpg", "deep/c.WebP", "deep/er/b.JPG", "old.jpg"]
    assert (tmp_path / "xml" / "deep" / "er" / "b.xml").is_file()
    assert "skipped 1 .txt, 1 in out" in capsys.readouterr().err
    main([str(root), "--checkpoint", str(folder / "small.pth.tar"), "--out", str(root / "out"), "--no-pictures"])
    assert "skipped 1 .txt, 5 in out" in capsys.readouterr().err  # annotated copies are no photographs


def test_outputs_are_none_of_the_users_files(folder, tmp_path):
    """Annotations of the same name, as VOC's own, stay; what an earlier call wrote is replaced."""
    checkpoint = ["--checkpoint", str(folder / "small.pth.tar"), "--no-pictures"]
    for option, name in (("--voc-xml", "photo.xml"), ("--yolo", "photo.txt"), ("--json", ""), ("--coco", "")):
        path = tmp_path / option / name if name else tmp_path / f"x{option}"
        call = [str(folder / "photo.jpg"), *checkpoint, option, str(tmp_path / option if name else path)]
        main(call)
        own = path.read_bytes()
        main(call)
        assert path.read_bytes() == own
        path.write_text("mine")
        with pytest.raises(SystemExit, match="exists already and is not a .* file that this program wrote"):
            main(call)
        assert path.read_text() == "mine"
        main([*call, "--overwrite"])
        assert path.read_bytes() == own


def test_yolo_labels_of_five_columns(folder, tmp_path):
    checkpoint = ["--checkpoint", str(folder / "small.pth.tar"), "--no-pictures", "--min-score", "0.1"]
    for columns in ("5", "6"):
        main([str(folder / "photo.jpg"), *checkpoint, "--yolo", str(tmp_path / columns), "--yolo-columns", columns])
    five, six = ((tmp_path / columns / "photo.txt").read_text().splitlines() for columns in "56")
    assert [line.split()[:5] for line in six] == [line.split() for line in five]
    assert five


def test_names_that_xml_cannot_hold_are_named(tmp_path):
    found = Detections(torch.tensor([[4.0, 4, 50, 40]]), torch.tensor([0.5]), torch.tensor([1]), ["a\x01"], (60, 80))
    with pytest.raises(InputError, match=r"XML cannot hold the name 'a\\x01'"):
        write_voc_xml(tmp_path / "a.xml", found, "a.jpg")
    assert not list(tmp_path.iterdir())


def test_coco_results_have_the_training_lists_ids(folder, tmp_path):
    torch.manual_seed(0)
    model = load_checkpoint(folder / "small.pth.tar")["model"]
    model.config = dataclasses.replace(model.config, category_ids=(17, 90))
    save_checkpoint(tmp_path / "ids.pth.tar", model)
    coco = ["--no-pictures", "--coco", str(tmp_path / "found.json"), "--min-score", "0.1"]
    main([str(folder / "photo.jpg"), "--checkpoint", str(tmp_path / "ids.pth.tar"), *coco])
    assert {row["category_id"] for row in json.loads((tmp_path / "found.json").read_text())} == {17, 90}


def test_outputs_that_are_no_numbers_name_picture_and_model(folder, tmp_path, capsys, monkeypatch):
    def nan(*arguments):
        raise InputError("the outputs are NaN")

    monkeypatch.setattr("fpnssd.inference.detector.postprocess", nan)
    with pytest.raises(SystemExit):
        main([str(folder / "photo.jpg"), "--checkpoint", str(folder / "small.pth.tar"), "--no-pictures"])
    assert re.search(r"detect: .*photo\.jpg: .*small\.pth\.tar: the outputs are NaN", capsys.readouterr().err)


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
    assert [Path(row["file_name"]).name for row in coco] == ["a.jpg"] * len(objects) + ["b.png"] * len(
        found[1]["objects"]
    )
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
        (["empty"], "folder empty has no image or video"),
        (["photo.jpg", "--classes", "cow"], "unknown class cow: the model has cat, dog"),
        (["photo.jpg", "--min-score", "2"], "min_score is 2.0"),
        (
            ["photo.jpg", "--runtime", "onnx"],
            "has no onnx file beside it: python export.py small.pth.tar --to onnx creates",
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


def to_lab(colours):
    """CIELAB (D65) of sRGB colours (n, 3), from the definition."""
    linear = np.array(colours) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    f = np.cbrt(linear @ to_xyz.T / (0.9505, 1, 1.089))
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def test_colours_differ():
    """VOC's 20 classes by more than 35 in CIELAB, where 2 is just visible; 60 classes at all."""
    assert to_lab([(255, 0, 0)])[0] == pytest.approx([53.2, 80.1, 67.2], abs=0.2)  # known values of red
    lab = to_lab([class_colour(label) for label in range(1, 21)])
    distances = np.linalg.norm(lab[:, None] - lab, axis=2)[np.triu_indices(20, 1)]
    assert distances.min() > 35
    assert len({class_colour(label) for label in range(1, 61)}) == 60


@pytest.mark.parametrize("name", ["\u0441\u043e\u0431\u0430\u043a\u0430", "\u03b3\u03ac\u03c4\u03b1", "\u0642\u0637"])
def test_names_in_other_scripts_are_drawn(name):
    """Russian, Greek, Arabic: matplotlib's font has their letters, so each is drawn in its own form."""
    if name == "\u0642\u0637" and not features.check("raqm"):
        pytest.skip("Pillow cannot join Arabic letters here")
    text, font = label_text(name, 3, 20)
    assert text == name
    from fontTools.ttLib import TTFont  # which matplotlib needs

    assert {ord(letter) for letter in name} <= set(TTFont(font.path).getBestCmap())


def test_names_without_a_font_are_numbers(monkeypatch, capsys):
    name = "\U000f0000"  # of private use, so no font of a system has it
    find_font.cache_clear()
    for _ in range(2):
        assert label_text(name, 3, 20)[0] == "3"
    assert capsys.readouterr().err.count("labels show its number, 3") == 1
    found = Detections(torch.tensor([[4.0, 4, 50, 40]]), torch.tensor([0.5]), torch.tensor([3]), [name], (60, 80))
    number = Detections(found.boxes, found.scores, found.labels, ["3"], found.size)
    image = Image.new("RGB", (80, 60))
    assert annotate(image, found).tobytes() == annotate(image, number).tobytes()


def test_cjk_names_use_a_font_of_the_system(tmp_path, monkeypatch):
    """A font with the character that is asked for, at a place where the system keeps fonts: here DejaVu in another
    name, for a letter that Pillow's own font lacks."""
    source = next(path for path in system_fonts() if Path(path).name == "DejaVuSans.ttf")
    shutil.copy(source, tmp_path / "Han-Regular.ttf")
    (tmp_path / "Broken-Regular.ttf").write_text("hello")
    monkeypatch.setattr("fpnssd.inference.draw.system_fonts", lambda: tuple(map(str, sorted(tmp_path.iterdir()))))
    find_font.cache_clear()
    assert label_text("\u0436", 1, 20)[1].path == str(tmp_path / "Han-Regular.ttf")
    find_font.cache_clear()


def test_crowded_labels_still_keep_off_each_other():
    """More labels at one box than there are places at it: they go elsewhere in the picture."""
    taken = []
    for _ in range(60):
        taken.append(place_label([100, 100, 200, 200], (40, 15), (300, 300), taken))
        assert not covered_areas(np.array([taken[-1][:2]]), (40, 15), taken[:-1]).any()


def test_names_are_not_taken_twice():
    """By another ending or in another case neither."""
    files = ["x/a.jpg", "y/a.jpg", "a.jpg", "a.png", "A.JPG", "b.c.jpg", "a.mp4", "camera:0"]
    names = ["a.jpg", "a_2.jpg", "a_3.jpg", "a_4.png", "A_5.JPG", "b.c.jpg", "a_6.mp4", "camera0.mp4"]
    assert [str(source.name) for source in find_sources(files)] == names
