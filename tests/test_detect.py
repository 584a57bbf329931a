"""The published usage in a fresh process, the command line, and pictures that people can read."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detect import annotate, detect, find_objects, free_name, main
from model import FPNSSD, ModelConfig, load_checkpoint, save_checkpoint
from utils import class_colour

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With small.pth.tar, whose network finds something in noise, and photo.jpg."""
    folder = tmp_path_factory.mktemp("detect")
    torch.manual_seed(0)
    model = FPNSSD(ModelConfig(("cat", "dog"), "resnet18", image_size=64, fpn_channels=16))
    torch.nn.init.normal_(model.class_heads[1].weight, std=0.5)
    save_checkpoint(folder / "small.pth.tar", model)
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
    assert "using the model last loaded (resnet18, 2 classes)" in result.stderr


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


def test_without_any_model_the_missing_file_is_named(folder):
    result = run_python("from detect import detect\nfrom PIL import Image\ndetect(Image.open('photo.jpg'))", folder)
    assert "no checkpoint 'checkpoint/fpnssd300_lite_voc.pth.tar'" in result.stderr


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


def test_photographs_are_never_overwritten(folder, tmp_path, capsys):
    before = (folder / "photo.jpg").read_bytes()
    with pytest.raises(SystemExit):
        main([str(folder / "photo.jpg"), "--checkpoint", str(folder / "small.pth.tar"), "--out", str(folder)])
    assert "is itself one of the photographs" in capsys.readouterr().err
    assert (folder / "photo.jpg").read_bytes() == before
    other = tmp_path / "photo.jpg"
    other.write_bytes(before)
    with pytest.raises(SystemExit):  # nor another one of the same call
        main(
            [str(folder / "photo.jpg"), str(other)]
            + ["--checkpoint", str(folder / "small.pth.tar"), "--out", str(tmp_path)]
        )
    assert other.read_bytes() == before


def test_suppressed_classes_are_gone(folder):
    model = load_checkpoint(folder / "small.pth.tar")["model"]
    image = Image.open(folder / "photo.jpg")
    labels = find_objects(image, model, min_score=0.1)["labels"].unique().tolist()
    assert labels == [1, 2]
    everything = find_objects(image, model, min_score=0.1, top_k=10_000)
    without = find_objects(image, model, min_score=0.1, top_k=10_000, suppress=["cat"])
    assert without["labels"].unique().tolist() == [2]
    dogs = everything["labels"] == 2
    torch.testing.assert_close(without["scores"], everything["scores"][dogs])  # no dog gains from it
    torch.testing.assert_close(without["boxes"], everything["boxes"][dogs])
    with pytest.raises(ValueError, match="cannot suppress cow"):
        detect(image, suppress=["cow"], model=model)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_kinds_of_pictures(folder, mode):
    model = load_checkpoint(folder / "small.pth.tar")["model"]
    image = Image.open(folder / "photo.jpg").convert(mode)
    assert detect(image, model=model).mode == "RGB"


def test_boxes_and_labels_are_drawn_inside_the_picture():
    image = Image.new("RGB", (300, 200), "gray")
    box = [40.0, 50.0, 200.0, 150.0]
    detections = {"boxes": torch.tensor([box]), "scores": torch.tensor([0.875]), "labels": torch.tensor([2])}
    picture = annotate(image, detections, ("cat", "dog"))
    assert picture.getpixel((120, 150)) == class_colour(2)  # the lower edge
    assert picture.getpixel((41, 100)) == class_colour(2)
    assert picture.getpixel((120, 100)) == (128, 128, 128)  # the inside is left alone
    # The label at the corner of the frame moves inside: its plate covers as many pixels as in the middle.
    for corner in ([-5.0, -5.0, 300.0, 200.0], [280.0, 190.0, 300.0, 200.0]):
        detections["boxes"] = torch.tensor([corner])
        plate = (np.asarray(annotate(image, detections, ("cat", "dog"))) == class_colour(2)).all(axis=2)
        assert plate.sum() > 400


def test_colours_differ():
    colours = [class_colour(label) for label in range(1, 21)]
    distances = [sum(abs(a - b) for a, b in zip(c, d, strict=True)) for i, c in enumerate(colours) for d in colours[:i]]
    assert min(distances) > 20


def test_names_are_not_taken_twice():
    taken = set()
    assert [free_name("a.jpg", taken) for _ in range(3)] == ["a.jpg", "a_2.jpg", "a_3.jpg"]
