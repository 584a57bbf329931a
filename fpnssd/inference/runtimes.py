"""Exported files as detectors: those that are named, and those that lie beside a checkpoint.

What export.py writes carries the classes, the configuration and the SHA-256 of the checkpoint it was made of, so that a
file beside a checkpoint is only used while it is that checkpoint's.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from fpnssd.inference.detector import Detector
from model import ModelConfig, priors_of
from utils import InputError, hash_file

CONFIG_KEY, SOURCE_KEY = "fpn_ssd", "fpn_ssd_source"  # of the files' own metadata
SUFFIXES = {"openvino": ".xml", "onnx": ".onnx"}  # the faster one first
OPENVINO_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}  # our names -> OpenVINO's


def need(*packages):
    for name in packages:
        try:
            __import__(name)
        except ImportError:
            raise InputError(f"{name} is not installed: pip install -r requirements-deploy.txt") from None


def exported_path(checkpoint, runtime, ending=""):
    """runs/lite/best.pth.tar -> runs/lite/best.xml; a runtime that is none means a checkpoint."""
    base = str(checkpoint).removesuffix(".tar").removesuffix(".pth")
    return Path(base + ending + SUFFIXES.get(runtime, ".pth.tar"))


def detector_beside(checkpoint, runtime="auto", make=False):
    """A Detector of the file that was exported from this very checkpoint, if there is one or `make` allows for one.

    None, and why on stderr if `make`, where there is none; with a runtime by name an InputError instead.
    """
    reason = ""
    for kind in SUFFIXES if runtime == "auto" else [runtime]:
        path = exported_path(checkpoint, kind)
        try:
            if path.is_file():
                detector = load_exported(path)
                if detector.about["exported_from"] == hash_file(checkpoint):
                    return detector
            if make:
                return _export(checkpoint, path, kind)
        except (InputError, OSError, RuntimeError) as error:
            reason = str(error)
    if runtime != "auto":
        raise InputError(f"{checkpoint} cannot run on {runtime}: {reason}")
    if make:
        print(f"{checkpoint} runs on torch, as it could not be converted: {reason}", file=sys.stderr)
    return None


def _export(checkpoint, path, kind):
    need(kind if kind == "openvino" else "onnxruntime")
    import export

    print(f"converting {checkpoint} once: {path} ...", file=sys.stderr)
    (export.export_onnx if kind == "onnx" else export.export_openvino)(checkpoint, path)
    return load_exported(path)


def load_exported(path, device="auto", precision="auto"):
    """A Detector of a file that export.py wrote; runs on the CPU.

    precision: auto is what its runtime finds fast: OpenVINO takes bf16 on processors with instructions for it. ONNX
    Runtime knows fp32 alone.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}: python export.py makes one of a checkpoint")
    if device not in ("auto", "cpu"):
        raise InputError(f"exported files run on the CPU here, not on {device!r}")
    load, runtime = (_load_onnx, "onnx") if path.suffix.lower() == ".onnx" else (_load_openvino, "openvino")
    forward, texts, precision = load(path, precision)
    try:
        config = ModelConfig.from_dict(json.loads(texts.get(CONFIG_KEY, "")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} carries no configuration of ours ({error}): was it made by export.py?") from error
    about = {"source": str(path), "runtime": runtime, "device": "cpu", "precision": precision}
    return Detector(forward, config, priors_of(config), about | {"exported_from": texts.get(SOURCE_KEY)})


def _load_onnx(path, precision):
    if precision not in ("auto", "fp32"):
        raise InputError(f"{path} runs in fp32, not in {precision}: its OpenVINO file and its checkpoint can")
    need("onnxruntime")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class
        raise InputError(f"{path} is no ONNX file that can be read: {str(error)[:200]}") from error
    if [output.name for output in session.get_outputs()] != ["offsets", "logits"]:
        raise InputError(f"{path} decodes by itself, for other programs: here the file of export.py --to onnx serves")

    def forward(squares):
        return tuple(
            torch.from_numpy(array) for array in session.run(["offsets", "logits"], {"images": squares.numpy()})
        )

    return forward, session.get_modelmeta().custom_metadata_map, "fp32"


def _load_openvino(path, precision):
    if precision not in ("auto", *OPENVINO_PRECISIONS):
        raise InputError(f"precision {precision!r} is none of auto, {', '.join(OPENVINO_PRECISIONS)}")
    need("openvino")
    import openvino

    hints = {"PERFORMANCE_HINT": "LATENCY"}
    if precision != "auto":
        hints["INFERENCE_PRECISION_HINT"] = OPENVINO_PRECISIONS[precision]
    try:
        network = openvino.Core().read_model(path)
        compiled = openvino.compile_model(network, "CPU", hints)
    except RuntimeError as error:
        raise InputError(f"{path} is no OpenVINO file that can be read: {str(error)[:200]}") from error

    def forward(squares):
        # A request of its own for each call: one shared by threads would mix their answers.
        answer = compiled.create_infer_request().infer([squares.contiguous().numpy()])
        return tuple(torch.from_numpy(np.array(answer[k])) for k in range(2))

    keys = [key for key in (CONFIG_KEY, SOURCE_KEY) if network.has_rt_info(key)]
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    name = next((ours for ours, theirs in OPENVINO_PRECISIONS.items() if theirs == taken), taken)
    return forward, {key: network.get_rt_info(key).astype(str) for key in keys}, name
