"""Exported files answer like the original, in any batch, from any thread, for eval.py and detect.py too."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sure_network import save_sure_network

from datasets import DetectionDataset
from detect import main as detect_main
from eval import main as eval_main
from export import add_decoding, compare, export_openvino, export_with_decoding, main
from fpnssd.data.data_list import DataList
from fpnssd.inference.detector import load_detector
from fpnssd.inference.runtimes import load_exported
from model import FPNSSD, ModelConfig, load_checkpoint, postprocess, priors_of, save_checkpoint
from utils import InputError


@pytest.fixture(scope="module")
def folder(drawn, tmp_path_factory):
    """With small.pth.tar, its exports small.onnx, .xml and small_detect.onnx, and what export.py said in said.txt."""
    folder = tmp_path_factory.mktemp("export")
    save_sure_network(folder / "small.pth.tar", DataList.load(drawn / "val.json").classes)
    with open(folder / "said.txt", "w", encoding="utf-8") as said, contextlib.redirect_stdout(said):
        main([str(folder / "small.pth.tar"), "--to", "onnx", "openvino", "--decode", "--data", str(drawn)])
    return folder


def test_half_precision_is_half_the_file_and_nearly_the_same_network(folder, tmp_path, capsys):
    main([str(folder / "small.pth.tar"), "--to", "fp16", "--out", str(tmp_path / "half")])
    assert "wrote" in capsys.readouterr().out
    path = tmp_path / "half.pth.tar"
    assert path.stat().st_size < 0.55 * (folder / "small.pth.tar").stat().st_size
    stored = dict(load_checkpoint(folder / "small.pth.tar")["model"].state_dict())
    loaded = load_checkpoint(path)["model"].state_dict()
    parameters = dict(load_checkpoint(path)["model"].named_parameters())
    for name, tensor in loaded.items():
        assert tensor.dtype == stored[name].dtype
        wanted = stored[name].half().float() if name in parameters else stored[name]
        assert torch.equal(tensor, wanted), name
    with pytest.raises(SystemExit, match="is an input"):
        main([str(path), "--to", "fp16", "--out", str(path)])


def noise(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", ["small.onnx", "small.xml"])
def test_exports_answer_like_the_original(folder, name):
    original = load_detector(folder / "small.pth.tar", runtime="torch", precision="fp32")
    exported = load_detector(folder / name, precision="fp32")
    assert exported.info["precision"] == "fp32"
    assert exported.config == original.config
    assert torch.equal(exported.priors, original.priors)
    for count in (1, 2, 5):
        for mine, theirs in zip(original.forward(noise(count)), exported.forward(noise(count)), strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)
    assert exported.info["runtime"] == {"small.onnx": "onnx", "small.xml": "openvino"}[name]


@pytest.mark.parametrize("name", ["small.onnx", "small.xml"])
def test_threads_get_their_own_answers(folder, name):
    exported = load_detector(folder / name)
    batches = [noise(2, seed) for seed in range(12)]
    expected = [exported.forward(batch)[1] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(exported.forward, batches), expected, strict=True):
            torch.testing.assert_close(found[1], wanted)


@pytest.mark.parametrize("name", ["small.onnx", "small.xml"])
def test_eval_and_detect_take_them(folder, drawn, tmp_path, capsys, name):
    common = ["--data", str(drawn), "--workers", "0", "--intervals", "0"]
    numbers = []
    for source in ("small.pth.tar", name):
        eval_main([str(folder / source), *common, "--precision", "fp32", "--json", str(tmp_path / "m.json")])
        numbers.append(json.loads((tmp_path / "m.json").read_text()))
    assert numbers[1]["settings"]["runtime"] in ("onnx", "openvino")
    for key in ("voc2007_ap50", "coco_ap"):
        assert numbers[0][key] == pytest.approx(numbers[1][key], abs=0.003)
    photograph = next((drawn / "voc" / "JPEGImages").glob("val_*.jpg"))
    arguments = [
        "--checkpoint",
        str(folder / name),
        "--json",
        str(tmp_path / "d"),
        "--no-pictures",
        "--min-score",
        "0.1",
        "--precision",
        "fp32",
    ]
    detect_main([str(photograph), *arguments])
    found = json.loads((tmp_path / "d").read_text())["objects"]
    original = load_detector(folder / "small.pth.tar", runtime="torch", precision="fp32")
    wanted = original.predict(photograph, min_score=0.1)
    assert [one["name"] for one in found] == wanted.names
    np.testing.assert_allclose([one["box"] for one in found], wanted.boxes.numpy(), atol=0.1)


def test_command_line_compares(folder):
    said = (folder / "said.txt").read_text(encoding="utf-8")
    assert said.count("largest difference on 6 photographs: score") == 2
    assert said.count("voc2007_ap50") == 2
    assert "small_detect.onnx" in said
    assert re.search(r"the same detections in [56] of 6 images", said)  # near-equal scores may change places


def test_8_bits_are_smaller_and_near(folder, drawn, tmp_path):
    export_openvino(folder / "small.pth.tar", tmp_path / "int8.xml", int8_list=drawn / "train.json")
    assert (tmp_path / "int8.bin").stat().st_size < 0.4 * (folder / "small.bin").stat().st_size
    detectors = [load_detector(folder / "small.pth.tar", runtime="torch"), load_detector(tmp_path / "int8.xml")]
    data_list = DataList.load(drawn / "val.json")
    images = torch.stack([DetectionDataset(data_list, 64)[row]["image"] for row in range(len(data_list))])
    exact, rounded = (detector.forward(images)[1].softmax(dim=2) for detector in detectors)
    off = (exact - rounded).abs().mean()
    assert 0 < off < 0.5 * (exact - exact.roll(1, dims=0)).abs().mean()  # far nearer than to another image's answer


@pytest.fixture
def lonely(folder, tmp_path):
    """A checkpoint without anything beside it."""
    return Path(shutil.copy(folder / "small.pth.tar", tmp_path))


def test_only_what_was_made_of_this_checkpoint_is_taken(folder, lonely, capsys):
    for suffix in (".onnx", ".xml", ".bin"):
        shutil.copy(folder / f"small{suffix}", lonely.parent)
    assert load_detector(lonely).info["runtime"] == "openvino"
    assert f"using {lonely.parent / 'small.xml'}, exported from {lonely}" in capsys.readouterr().err
    assert load_detector(lonely, runtime="onnx").info["runtime"] == "onnx"
    assert load_detector(lonely, precision="fp32").info["runtime"] == "torch"
    assert load_detector(lonely, runtime="torch").info["runtime"] == "torch"
    assert capsys.readouterr().err == ""
    checkpoint = torch.load(lonely)
    checkpoint["model"].class_heads[0].bias.data += 1
    save_checkpoint(lonely, checkpoint["model"])
    assert load_detector(lonely).info["runtime"] == "torch"
    with pytest.raises(
        ValueError, match=r"small\.onnx was exported from a different checkpoint .*--to onnx creates it again"
    ):
        load_detector(lonely, runtime="onnx")
    lonely.with_name("small.xml").write_text("hello")  # damaged
    assert load_detector(lonely).info["runtime"] == "torch"


def test_inference_writes_no_file(lonely):
    """A named runtime needs its exported file; auto is torch without one."""
    assert load_detector(lonely).info["runtime"] == "torch"
    with pytest.raises(ValueError, match=r"no onnx file beside it: python export\.py .* --to onnx creates it"):
        load_detector(lonely, runtime="onnx")
    assert [path.name for path in lonely.parent.iterdir()] == ["small.pth.tar"]


def test_runtimes_that_are_not_installed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert load_detector(folder / "small.pth.tar").info["runtime"] == "torch"
    with pytest.raises(ValueError, match=r"onnxruntime is not installed: pip install -e '\.\[deploy\]'"):
        load_detector(folder / "small.pth.tar", runtime="onnx")


def test_exported_files_run_on_the_cpu_of_a_machine_with_a_gpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_detector(folder / "small.pth.tar", runtime="onnx").info["device"] == "cpu"
    with pytest.raises(ValueError, match="runtime onnx runs on the CPU, not on 'cuda': omit --device"):
        load_detector(folder / "small.pth.tar", "cuda", runtime="onnx")
    with pytest.raises(ValueError, match=r"small\.onnx runs in fp32, not in bf16"):
        load_detector(folder / "small.pth.tar", runtime="onnx", precision="bf16")


def test_comparison_sees_another_network(folder, tmp_path):
    torch.manual_seed(1)
    config = load_detector(folder / "small.pth.tar").config
    save_checkpoint(tmp_path / "other.pth.tar", FPNSSD(config))
    detectors = [
        load_detector(path, runtime="torch") for path in (folder / "small.pth.tar", tmp_path / "other.pth.tar")
    ]
    assert compare(*detectors)["largest"]["score"] > 0.05
    assert compare(detectors[0], detectors[0])["largest"] == {"score": 0, "box": 0}


def test_outputs_that_are_not_finite_are_no_likeness(folder):
    good, bad = (load_detector(folder / "small.pth.tar", runtime="torch") for _ in range(2))
    bad.forward = lambda images: tuple(part / 0 for part in good.forward(images))
    with pytest.raises(InputError, match="outputs are not finite"):
        compare(good, bad)


def test_8_bits_are_for_openvino(capsys):
    with pytest.raises(SystemExit):
        main(["x.pth.tar", "--int8", "x.json"])
    assert "--int8 needs --to openvino" in capsys.readouterr().err


def test_bad_files_are_named(folder, tmp_path):
    for suffix in (".onnx", ".xml"):
        (tmp_path / f"bad{suffix}").write_text("hello")
        with pytest.raises(ValueError, match=rf"bad\{suffix} is not a readable .* file"):
            load_exported(tmp_path / f"bad{suffix}")
        with pytest.raises(FileNotFoundError, match="export.py creates one"):
            load_exported(tmp_path / f"none{suffix}")
    with pytest.raises(ValueError, match="run on the CPU, not on"):
        load_exported(folder / "small.onnx", "cuda")
    with pytest.raises(ValueError, match=r"small\.onnx runs in fp32, not in bf16"):
        load_exported(folder / "small.onnx", precision="bf16")
    with pytest.raises(ValueError, match="precision 'fp8' is not one of auto, fp32, bf16, fp16"):
        load_exported(folder / "small.xml", precision="fp8")
    with pytest.raises(ValueError, match=r"for the runtime openvino, not onnx"):
        load_detector(folder / "small.xml", runtime="onnx")
    plain = onnx.load(folder / "small.onnx")
    del plain.metadata_props[:]
    onnx.save(plain, tmp_path / "plain.onnx")
    with pytest.raises(ValueError, match=r"plain\.onnx has no configuration"):
        load_exported(tmp_path / "plain.onnx")


def test_files_that_decode_by_themselves_are_for_others(folder, tmp_path):
    exported = onnx.load(folder / "small.onnx")
    exported = add_decoding(exported, load_exported(folder / "small.onnx").priors, 6, 10)
    onnx.save(exported, tmp_path / "decoded.onnx")
    with pytest.raises(ValueError, match=r"decoded\.onnx includes decoding"):
        load_exported(tmp_path / "decoded.onnx")


def test_priors_without_weights():
    config = ModelConfig(("a",), "resnet18", image_size=64, fpn_channels=16)
    assert torch.equal(priors_of(config), FPNSSD(config).priors)


@pytest.mark.parametrize(
    ("min_score", "max_overlap", "top_k"), [(0.01, 0.45, 200), (0.2, 0.1, 5), (0.0, 1.0, 1000), (1, 0.5, 7)]
)
def test_decoding_inside_is_postprocess(folder, tmp_path, min_score, max_overlap, top_k):
    detector = load_detector(folder / "small.onnx")  # the same runtime, so that decoding alone is compared
    exported = onnx.load(folder / "small.onnx")
    exported = add_decoding(exported, detector.priors, len(detector.classes), top_k)
    onnx.save(exported, tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    images = noise(3)
    knobs = {"min_score": np.float32([min_score]), "max_overlap": np.float32([max_overlap])}
    boxes, scores, labels, count = session.run(None, {"images": images.numpy(), **knobs})
    assert boxes.shape == (3, top_k, 4)
    wanted = postprocess(*detector.forward(images), detector.priors, [(1, 1)] * 3, min_score, max_overlap, top_k)
    for k, one in enumerate(wanted):
        found = len(one["labels"])
        assert count[k] == found
        assert labels[k, :found].tolist() == one["labels"].tolist()
        np.testing.assert_allclose(scores[k, :found], one["scores"].numpy(), atol=1e-6)
        np.testing.assert_allclose(boxes[k, :found], one["boxes"].numpy(), atol=1e-5)
        assert not boxes[k, found:].any()
        assert not scores[k, found:].any()
        assert not labels[k, found:].any()


def test_the_lines_of_the_docs_run_without_torch(folder, drawn, tmp_path):
    """docs/inference.md's lines for best_detect.onnx, in a process that may import neither torch nor this project."""
    text = (Path(__file__).parents[1] / "docs" / "inference.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "best_detect.onnx" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    export_with_decoding(folder / "small.onnx", tmp_path / "best_detect.onnx")
    photograph = next((drawn / "voc" / "JPEGImages").glob("val_*.jpg"))
    shutil.copy(photograph, tmp_path / "photo.jpg")
    blocked = "import sys; sys.modules |= dict.fromkeys(['torch', 'torchvision', 'timm', 'model', 'utils', 'fpnssd'])\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", blocked + code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    detections = load_detector(folder / "small.onnx").predict(photograph)
    lines = done.stdout.splitlines()
    assert len(lines) == len(detections) > 0
    for line, box, score, name in zip(lines, detections.boxes, detections.scores, detections.names, strict=True):
        shown_name, shown_score, _, *shown_box = line.split()
        assert shown_name == name
        assert float(shown_score) == pytest.approx(score.item(), abs=0.02)  # Pillow resamples as torch does, nearly
        np.testing.assert_allclose([float(edge) for edge in shown_box], box.numpy(), atol=1.5)
