"""An output is never one of the user's files: each command, each kind of file in its way, and the command run again."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import create_data_lists
import datasets
import eval as eval_script
import export
from fpnssd.legacy import convert
from model import load_checkpoint
from utils import InputError, atomic_write, check_outputs, is_own_output, write_text

CHECKPOINT = Path(__file__).with_name("version1.pth.tar")
USERS_FILES = (
    "best.pth.tar",
    "model.onnx",
    "photo.jpg",
    "list.json",
    "label.txt",
    "label.xml",
    "results.json",
    "empty",
)


@pytest.fixture
def mine(tmp_path):
    """A folder of the user's files, a data list of one photograph, and the content of all of them."""
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(CHECKPOINT, folder / "best.pth.tar")
    Image.fromarray(np.arange(90 * 120 * 3, dtype=np.uint8).reshape(90, 120, 3)).save(folder / "photo.jpg")
    (folder / "model.onnx").write_bytes(b"\x08\x08 of another project")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0}
    content = {
        "info": {"image_root": str(folder)},
        "images": [{"id": 1, "file_name": "photo.jpg", "height": 90, "width": 120}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (folder / "list.json").write_text(json.dumps(content))
    row = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.9}
    (folder / "results.json").write_text(json.dumps([row]))
    (folder / "label.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (folder / "label.xml").write_text("<annotation/>\n")
    (folder / "empty").write_bytes(b"")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(main, arguments, folder, capsys):
    """Whether the command ends with a sentence that says what to do, and every file is as it was."""
    before = contents(folder)
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert capsys.readouterr().out == ""  # before any work
    assert contents(folder) == before
    return any(way in str(error.value) for way in ("--overwrite", "another name", "different files", "name a file"))


@pytest.mark.parametrize("option", ["--json", "--report", "--save-detections"])
@pytest.mark.parametrize("name", USERS_FILES)
def test_eval(option, name, mine, capsys):
    arguments = [CHECKPOINT, "--data", mine, "--split", "list", option, mine / name]
    assert refused(eval_script.main, arguments, mine, capsys)


def test_eval_where_the_checkpoint_was_meant_as_the_argument(mine, capsys):
    assert refused(
        eval_script.main, ["--report", mine / "best.pth.tar", "--data", mine, "--split", "list"], mine, capsys
    )


def test_eval_onto_the_list_that_it_reads_even_with_overwrite(mine, capsys):
    """Under another name of the same file, too."""
    os.link(mine / "list.json", mine / "hard")
    (mine / "soft").symlink_to(mine / "list.json")
    for name in ("list.json", "hard", "soft"):
        arguments = [CHECKPOINT, "--data", mine, "--split", "list", "--save-detections", mine / name, "--overwrite"]
        assert refused(eval_script.main, arguments, mine, capsys)


def test_eval_two_outputs_of_one_name(mine, capsys):
    arguments = [CHECKPOINT, "--data", mine, "--split", "list", "--json", mine / "new", "--report", mine / "new"]
    assert refused(eval_script.main, arguments, mine, capsys)


def test_eval_voc_files(mine, capsys):
    (mine / "comp4_det_list_dog.txt").write_text("photo 0.9 1 1 5 5\n")
    assert refused(eval_script.main, [CHECKPOINT, "--data", mine, "--split", "list", "--voc-files", mine], mine, capsys)


def test_eval_again(mine, tmp_path):
    """The same command twice; the second time it replaces its own files, but none that became another kind."""
    out = tmp_path / "out"
    arguments = [
        CHECKPOINT,
        "--data",
        mine,
        "--split",
        "list",
        "--intervals",
        "0",
        "--workers",
        "0",
        "--voc-files",
        out / "voc",
    ]
    for option, name in (("--json", "m.json"), ("--report", "r.html"), ("--save-detections", "d.json")):
        arguments += [option, out / name]
    arguments = [str(argument) for argument in arguments]
    eval_script.main(arguments)
    assert json.loads((out / "d.json").read_text())
    eval_script.main(arguments)
    with pytest.raises(SystemExit, match=r"d\.json exists already and is not a metrics file"):
        eval_script.main([*arguments[:5], "--json", str(out / "d.json")])
    eval_script.main([*arguments[:9], "--json", str(out / "d.json"), "--overwrite"])
    assert json.loads((out / "d.json").read_text())["images"] == 1


@pytest.mark.parametrize("name", ["train.json", "val.json", "check.json", "check.png"])
def test_create_data_lists(name, drawn, tmp_path, capsys):
    (tmp_path / name).write_text('{"images": "of the user"}')
    arguments = ["--voc", drawn / "voc", "--splits", "train", "val", "--out", tmp_path]
    assert refused(create_data_lists.main, arguments, tmp_path, capsys)


def test_create_data_lists_with_a_split_called_check(drawn, tmp_path, capsys):
    shutil.copy(drawn / "voc" / "ImageSets" / "Main" / "val.txt", drawn / "voc" / "ImageSets" / "Main" / "check.txt")
    arguments = ["--voc", drawn / "voc", "--splits", "check", "--out", tmp_path / "out"]
    assert refused(create_data_lists.main, arguments, tmp_path, capsys)


def test_create_data_lists_again(drawn, tmp_path):
    arguments = ["--voc", str(drawn / "voc"), "--splits", "val", "--out", str(tmp_path)]
    create_data_lists.main(arguments)
    create_data_lists.main(arguments)
    assert len(json.loads((tmp_path / "val.json").read_text())["images"]) == 6


@pytest.mark.parametrize(("option", "name"), [("fp16", "x.pth.tar"), ("onnx", "x.onnx"), ("openvino", "x.bin")])
def test_export(option, name, mine, capsys):
    for other in ("best.pth.tar", "model.onnx", "label.xml"):
        shutil.copy(mine / other, mine / name)
        assert refused(export.main, [CHECKPOINT, "--to", option, "--out", mine / "x"], mine, capsys)


def test_export_onto_its_checkpoint(mine, capsys):
    arguments = [mine / "best.pth.tar", "--to", "fp16", "--out", mine / "best", "--overwrite"]
    assert refused(export.main, arguments, mine, capsys)


def test_export_again(mine):
    for _ in range(2):
        export.main([str(mine / "best.pth.tar"), "--to", "fp16"])
    assert len(load_checkpoint(mine / "best_fp16.pth.tar")["model"].priors) == 208
    assert not is_own_output(mine / "best.pth.tar", "checkpoint")


def test_preview(drawn, mine, capsys):
    for name in USERS_FILES:
        assert refused(datasets.main, [drawn / "val.json", "--preview", mine / name], mine, capsys)
    for _ in range(2):
        datasets.main([str(drawn / "val.json"), "--preview", str(mine / "preview.png"), "--count", "1"])
    assert Image.open(mine / "preview.png").size == (300, 300)


def test_convert(mine, capsys, monkeypatch):
    (mine / "old").write_bytes(b"an old checkpoint")
    for name in (*USERS_FILES, "old"):
        assert refused(convert.main, [mine / "old", mine / name], mine, capsys)
    monkeypatch.setattr(convert, "convert", lambda path: (torch.load(CHECKPOINT)["model"], "epoch 1"))
    for _ in range(2):
        convert.main([str(mine / "old"), str(mine / "new.pth.tar")])
    assert load_checkpoint(mine / "new.pth.tar")["model"].config.classes == ("cat", "dog")


def test_devices_standard_output_and_new_files_are_no_matter(tmp_path):
    check_outputs([("metrics", "/dev/null"), ("report", "/dev/null"), ("COCO results", "-"), ("check", None)])
    check_outputs([("metrics", "/dev/stdout"), ("report", tmp_path / "new" / "report.html")])
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_written_is_said_before_any_work(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match="is a folder"):
        check_outputs([("report", tmp_path)])
    with pytest.raises(InputError, match="file is a file, not a folder"):
        check_outputs([("report", tmp_path / "file" / "report.html")])


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "bmp", "tif", "avif", "jp2", "ppm", "tga"])
def test_marked_pictures_are_still_pictures(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    picture = Image.effect_noise((60, 40), 50).convert("RGB")
    with atomic_write(path, "picture") as temporary:
        picture.save(temporary, Image.registered_extensions()[path.suffix])
    assert is_own_output(path, "picture")
    with Image.open(path) as read:
        read.load()
        assert (read.size, getattr(read, "n_frames", 1)) == ((60, 40), 1)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}\n', "<a/>", "0 0.5 0.5 0.1 0.1\n"])
def test_marked_text_reads_as_before(text, tmp_path):
    write_text(tmp_path / "a", text, "report")
    read = (tmp_path / "a").read_text()
    assert read.strip() == text.strip()
    assert len(read.splitlines()) == max(1, len(text.splitlines()))
    assert is_own_output(tmp_path / "a", "report")
    assert not is_own_output(tmp_path / "a", "metrics")
