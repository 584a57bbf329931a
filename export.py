"""A checkpoint as ONNX or OpenVINO, compared with the original before it is called done.

    python export.py runs/lite/best.pth.tar --to onnx openvino                 # runs/lite/best.onnx, best.xml
    python export.py runs/lite/best.pth.tar --to openvino --data data/vocreal  # compared on real photographs: AP too
    python export.py runs/lite/best.pth.tar --to openvino --int8 data/vocreal/train.json
    python eval.py runs/lite/best.xml --data data/vocreal                      # as does detect.py

The files take uint8 images (B, 3, S, S), B as you like, and answer with offsets (B, P, 4) and logits (B, P, C + 1):
preprocessing is inside, decoding is model.postprocess. They carry the classes and the configuration. What this needs is
in requirements-deploy.txt.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from datasets import DataList, DetectionDataset
from detector import Detector, load_detector
from eval import Predictor, evaluate
from model import ModelConfig, decode_offsets, load_checkpoint, priors_of
from utils import InputError, explain, whole_number, written_whole

CONFIG_KEY = "fpn_ssd"  # of the files' own metadata
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
CALIBRATION_IMAGES = 300
BATCH = torch.export.Dim("batch", min=1, max=4096)


def main(argv=None):
    args = parse_args(argv)
    try:
        data_list = DataList.load(Path(args.data) / f"{args.split}.json", args.images) if args.data else None
        original = load_detector(args.checkpoint, "cpu", precision="fp32")
        for kind in args.to:
            path = Path(args.out or Path(args.checkpoint).with_suffix("").with_suffix("")).with_suffix(SUFFIXES[kind])
            if kind == "onnx":
                export_onnx(args.checkpoint, path)
            else:
                export_openvino(args.checkpoint, path, args.int8, args.images)
            print(f"wrote {path}, {size_of(path) / 1e6:.1f} MB")
            print(format_comparison(compare(original, load_exported(path), data_list, args.count)))
    except (InputError, OSError) as error:
        sys.exit(f"export: {explain(error)}")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--to", nargs="+", choices=SUFFIXES, default=["onnx"])
    parser.add_argument("--out", help="file to write, without its ending; else beside the checkpoint")
    parser.add_argument("--int8", metavar="LIST", help="OpenVINO in 8 bits, calibrated on images of this data list")
    parser.add_argument("--data", help="folder of data lists, to compare on photographs")
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", help="folder of the photographs, if not where the data list says")
    parser.add_argument("--count", type=whole_number(1), default=32, help="images to compare outputs on")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def export_onnx(checkpoint, path):
    """Writes the checkpoint's network as ONNX with a dynamic batch."""
    need("onnx", "onnxscript")
    import onnx

    model = load_checkpoint(checkpoint)["model"]
    side = model.config.image_size
    with written_whole(path) as temporary:
        torch.onnx.export(
            model, (example_of(side),), temporary, input_names=["images"], output_names=["offsets", "logits"],
            dynamic_shapes={"images": {0: BATCH}}, dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
        exported = onnx.load(temporary)
        onnx.helper.set_model_props(exported, {CONFIG_KEY: config_text(model)})
        onnx.checker.check_model(exported)
        onnx.save(exported, temporary)


def export_openvino(checkpoint, path, int8_list=None, images=None):
    """Writes the checkpoint's network as OpenVINO's .xml and .bin; in 8 bits if calibrated on a data list."""
    need("openvino", *(["nncf"] if int8_list else []))
    import openvino

    model = load_checkpoint(checkpoint)["model"]
    side = model.config.image_size
    program = torch.export.export(model, (example_of(side),), dynamic_shapes={"images": {0: BATCH}})
    exported = openvino.convert_model(program)
    if int8_list:
        exported = quantised(exported, DataList.load(int8_list, images), side)
    exported.set_rt_info(config_text(model), CONFIG_KEY)
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(exported, path, compress_to_fp16=False)


def quantised(exported, data_list, side):
    """8-bit weights and activations, from what CALIBRATION_IMAGES of the list, evenly spaced, make of them."""
    import nncf

    rows = np.unique(np.linspace(0, len(data_list) - 1, CALIBRATION_IMAGES).astype(int)).tolist()
    samples = torch.utils.data.Subset(DetectionDataset(data_list, side), rows)
    calibration = nncf.Dataset(samples, lambda sample: sample["image"][None].numpy())
    return nncf.quantize(exported, calibration, subset_size=len(rows), preset=nncf.QuantizationPreset.MIXED)


def example_of(side):
    return torch.zeros(2, 3, side, side, dtype=torch.uint8)  # of one, the batch would become a constant


def config_text(model):
    return json.dumps(asdict(model.config))


def need(*packages):
    for name in packages:
        try:
            __import__(name)
        except ImportError:
            raise InputError(f"{name} is not installed: pip install -r requirements-deploy.txt") from None


def size_of(path):
    return sum(p.stat().st_size for p in (Path(path), Path(path).with_suffix(".bin")) if p.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_exported(path, device="auto"):
    """A Detector of a file that export.py wrote; runs on the CPU, as precisely as its runtime finds fast."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}: python export.py makes one of a checkpoint")
    if device not in ("auto", "cpu"):
        raise InputError(f"exported files run on the CPU here, not on {device!r}")
    forward, text, runtime = (_load_onnx if path.suffix.lower() == ".onnx" else _load_openvino)(path)
    try:
        config = ModelConfig(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} carries no configuration of ours ({error}): was it made by export.py?") from error
    about = {"source": str(path), "runtime": runtime, "device": "cpu", "precision": "auto"}
    return Detector(forward, config, priors_of(config), about)


def _load_onnx(path):
    need("onnxruntime")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class
        raise InputError(f"{path} is no ONNX file that can be read: {str(error)[:200]}") from error

    def forward(squares):
        return tuple(
            torch.from_numpy(array) for array in session.run(["offsets", "logits"], {"images": squares.numpy()})
        )

    return forward, session.get_modelmeta().custom_metadata_map.get(CONFIG_KEY, ""), "onnx"


def _load_openvino(path):
    need("openvino")
    import openvino

    try:
        network = openvino.Core().read_model(path)
        compiled = openvino.compile_model(network, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    except RuntimeError as error:
        raise InputError(f"{path} is no OpenVINO file that can be read: {str(error)[:200]}") from error

    def forward(squares):
        # A request of its own for each call: one shared by threads would mix their answers.
        answer = compiled.create_infer_request().infer([squares.contiguous().numpy()])
        return tuple(torch.from_numpy(np.array(answer[k])) for k in range(2))

    text = network.get_rt_info(CONFIG_KEY).astype(str) if network.has_rt_info(CONFIG_KEY) else ""
    return forward, text, "openvino"


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def compare(original, exported, data_list=None, count=32):
    """How far an exported Detector is from the original: largest differences of scores and of boxes in 0..1 (where the
    score is 0.05 or more), and both VOC2007 and COCO AP if there is a data list; on noise if there is none."""
    side = original.config.image_size
    if data_list is None:
        images = torch.randint(
            0, 256, (8, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
    else:
        rows = np.unique(np.linspace(0, len(data_list) - 1, count).astype(int)).tolist()
        images = torch.stack([DetectionDataset(data_list, side)[row]["image"] for row in rows])
    largest = {"score": 0.0, "box": 0.0}
    for batch in images.split(8):
        (offsets, logits), (other_offsets, other_logits) = original.forward(batch), exported.forward(batch)
        scores, other_scores = logits.softmax(dim=2)[..., 1:], other_logits.softmax(dim=2)[..., 1:]
        seen = scores.amax(dim=2) >= 0.05
        boxes, other_boxes = (decode_offsets(o, original.priors)[seen] for o in (offsets, other_offsets))
        largest["score"] = max(largest["score"], (scores - other_scores).abs().max().item())
        largest["box"] = max(largest["box"], (boxes - other_boxes).abs().max().item() if len(boxes) else 0.0)
    result = {"images": len(images), "real": data_list is not None, "largest": largest}
    if data_list is not None:
        metrics = [evaluate(Predictor(detector), data_list, side) for detector in (original, exported)]
        result["ap"] = {name: [m[name] for m in metrics] for name in ("voc2007_ap50", "coco_ap")}
    return result


def format_comparison(result):
    largest, kind = result["largest"], "photographs" if result["real"] else "images of noise (--data for photographs)"
    lines = [
        f"  largest difference on {result['images']} {kind}: score {largest['score']:.2g}, box {largest['box']:.2g} of "
        "the image"
    ]
    for name, (before, after) in result.get("ap", {}).items():
        if before is not None:
            lines.append(f"  {name} {100 * before:.2f} -> {100 * after:.2f} ({100 * (after - before):+.2f})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
