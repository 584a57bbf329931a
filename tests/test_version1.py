"""version1.pth.tar, written by the last revision that called the backbone a trunk: it works in every command.

Its network is random, with class heads that find something; the values are those that that revision printed.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detect
import eval as eval_script
import export
from fpnssd.inference.runtimes import load_exported
from model import FPNSSD, load_checkpoint
from train import main as train_main
from utils import InputError

PATH = Path(__file__).with_name("version1.pth.tar")
BOXES = [
    [64.9942398071289, 22.448776245117188, 91.69054412841797, 40.15916061401367],
    [33.89679718017578, 0.0, 61.06684112548828, 28.459976196289062],
    [35.39665603637695, 19.586055755615234, 56.66971206665039, 48.812416076660156],
]
SCORES, NAMES = [0.9741947650909424, 0.9608988761901855, 0.9585323333740234], ["cat", "cat", "dog"]


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    y, x = np.mgrid[:90, :120]
    path = tmp_path_factory.mktemp("version1") / "photo.png"
    Image.fromarray(np.stack([2 * x, 2 * y, (x * y) % 256], axis=2).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def lists(photograph):
    """train.json and val.json of that photograph, with its two best detections as objects."""
    annotations = [
        {
            "id": number,
            "image_id": 1,
            "category_id": 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
        }
        for number, (x0, y0, x1, y1) in enumerate(BOXES[:2], start=1)
    ]
    content = {
        "info": {"image_root": str(photograph.parent)},
        "images": [{"id": 1, "file_name": photograph.name, "height": 90, "width": 120}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    for split in ("train", "val"):
        (photograph.parent / f"{split}.json").write_text(json.dumps(content))
    return photograph.parent


def test_torch_load():
    assert PATH.stat().st_size < 200_000
    model = torch.load(PATH)["model"]  # torch's safe default
    assert isinstance(model, FPNSSD)
    assert (model.config.backbone, model.config.format_version) == ("test_efficientnet_gn", 2)
    assert model.priors.shape == (208, 4)
    # P4's second cell, as 64 cells of two priors are before it: its fourth shape is the tall one of ratio 2.
    assert model.priors[64 * 2 + 3].tolist() == pytest.approx([0.125, 0.125, 0.2 / 2**0.5, 0.2 * 2**0.5], abs=1e-6)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_detect(photograph, tmp_path):
    arguments = [str(photograph), "--checkpoint", str(PATH), "--no-pictures", "--json", str(tmp_path / "found.jsonl")]
    detect.main([*arguments, "--precision", "fp32", "--max-overlap", "0.45"])
    found = detect.load_detector(PATH, "cpu", "torch", "fp32").predict(photograph, max_overlap=0.45)
    torch.testing.assert_close(found.boxes[:3], torch.tensor(BOXES), rtol=0, atol=0.01)
    assert found.scores[:3].tolist() == pytest.approx(SCORES, abs=1e-4)
    assert found.names[:3] == NAMES
    objects = json.loads((tmp_path / "found.jsonl").read_text())["objects"]
    assert [one["name"] for one in objects[:3]] == NAMES


def test_eval(lists, tmp_path):
    """The best detections are the two objects exactly, so average precision of cats is 1."""
    eval_script.main(
        [str(PATH), "--data", str(lists), "--json", str(tmp_path / "m.json"), "--precision", "fp32", "--intervals", "0"]
    )
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["per_class"]["cat"]["voc2007_ap50"] == pytest.approx(1.0)


def test_export(tmp_path):
    """The new file is of version 2, and the same network."""
    export.main([str(PATH), "--to", "fp16", "--out", str(tmp_path / "new.pth.tar")])
    content = load_checkpoint(tmp_path / "new.pth.tar")
    old = load_checkpoint(PATH)["model"]
    assert content["format_version"] == 2
    assert content["model"].config == old.config
    state = content["model"].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in old.state_dict().items())


def test_weights_of_a_training(lists, in_tmp, capsys):
    settings = ["backbone=test_efficientnet_gn", "image_size=64", "fpn_channels=2", "epochs=1", "batch_size=1"]
    settings += ["nominal_batch=1", "workers=0", "precision=fp32", "name=new", "warmup_steps=0"]
    train_main(["--data", str(lists), "--weights", str(PATH), "--device", "cpu", "--set", *settings])
    assert "backbone.conv_stem" not in capsys.readouterr().out.split("left out")[-1]
    state = load_checkpoint("runs/new/last.pth.tar")["model"].state_dict()
    old = load_checkpoint(PATH)["model"].state_dict()
    assert torch.equal(state["backbone.conv_stem.weight"], old["backbone.conv_stem.weight"])  # the stem is frozen


def test_odd_onnx_files_are_sentences(tmp_path):
    """Of another input, of other outputs, and with a configuration that nests too deeply."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    def write(kind, shape, config):
        inputs = [helper.make_tensor_value_info("images", kind, shape)]
        names = ("offsets", "logits")
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        nodes = [helper.make_node("Cast", ["images"], [name], to=TensorProto.FLOAT) for name in names]
        opset = [helper.make_opsetid("", 18)]
        model = helper.make_model(helper.make_graph(nodes, "odd", inputs, outputs), opset_imports=opset, ir_version=9)
        helper.set_model_props(model, {"fpn_ssd": config})
        onnx.save(model, str(tmp_path / "odd.onnx"))
        with pytest.raises(InputError) as error:
            load_exported(tmp_path / "odd.onnx")
        return str(error.value)

    config = json.dumps(asdict(load_checkpoint(PATH)["model"].config))
    assert "does not run on an image" in write(TensorProto.FLOAT, ["B", 3, 64, 64], config)
    assert "its configuration needs [(1, 208, 4), (1, 208, 3)]" in write(TensorProto.UINT8, ["B", 3, 64, 64], config)
    assert "has no configuration" in write(TensorProto.UINT8, ["B", 3, 64, 64], "[" * 100_000)
