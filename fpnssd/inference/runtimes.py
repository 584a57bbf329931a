"""Runs the files that export.py writes, with ONNX Runtime or OpenVINO.

Each file carries the model's configuration and the SHA-256 of the checkpoint it was made from. Nothing here writes a
file: `python export.py` does.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from model import ModelConfig, priors_of
from utils import EXPORT_KEY, InputError, hash_file

CONFIG_KEY, SOURCE_KEY = "fpn_ssd", EXPORT_KEY  # keys in the metadata of the files
SUFFIXES = {"openvino": ".xml", "onnx": ".onnx"}  # OpenVINO first, as it is faster on most CPUs
OPENVINO_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}  # our names -> OpenVINO's

Forward = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Exported(NamedTuple):
    """The arguments of a Detector: Detector(*load_exported(path))."""

    forward: Forward  # uint8 (B, 3, S, S) -> offsets (B, P, 4), logits (B, P, C + 1), float32
    config: ModelConfig
    priors: torch.Tensor  # (P, 4) float32, cxcywh in 0..1
    info: dict[str, Any]  # source, runtime, device, precision, exported_from


def import_optional(name: str) -> ModuleType:
    """Imports a package of the extra `deploy`; InputError says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{name} is not installed: pip install -e '.[deploy]'") from None


def runtime_of(path: str | Path) -> str:
    """The runtime that a file is for, by its ending: "onnx", "openvino", or "torch" for every other one."""
    kinds = {suffix: runtime for runtime, suffix in SUFFIXES.items()}
    return kinds.get(Path(path).suffix.lower(), "torch")


def exported_path(checkpoint: str | Path, runtime: str, ending: str = "") -> Path:
    """The name of an export of a checkpoint: best.pth.tar -> best.xml, or best.pth.tar for runtime "torch"."""
    base = str(checkpoint).removesuffix(".tar").removesuffix(".pth")
    return Path(base + ending + SUFFIXES.get(runtime, ".pth.tar"))


def load_exported_from(checkpoint: str | Path, runtime: str, precision: str = "auto") -> Exported:
    """Loads the exported file beside a checkpoint, if it was made from this version of the checkpoint.

    Args:
        checkpoint: path of a .pth.tar file.
        runtime: "onnx" or "openvino".
        precision: as for load_exported.

    Raises:
        InputError: if there is no such file, it cannot be read, or it contains the hash of another checkpoint.
    """
    path = exported_path(checkpoint, runtime)
    how = f"python export.py {checkpoint} --to {runtime} creates it"
    if not path.is_file():
        raise InputError(f"{checkpoint} has no {runtime} file beside it: {how}")
    exported = load_exported(path, precision=precision)
    if exported.info["exported_from"] != hash_file(checkpoint):
        raise InputError(f"{path} was exported from a different checkpoint than {checkpoint}: {how} again")
    return exported


def load_exported(path: str | Path, device: str = "auto", precision: str = "auto") -> Exported:
    """Loads a file that export.py wrote. It runs on the CPU, from any number of threads.

    Args:
        path: an .onnx file or OpenVINO's .xml, with its .bin beside it.
        device: "auto" or "cpu".
        precision: "auto" lets the runtime choose; OpenVINO also takes fp32, bf16 and fp16, ONNX Runtime fp32.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if it cannot be read, was not made by export.py, or cannot run on this device or in this precision.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}: python export.py creates one from a checkpoint")
    if device not in ("auto", "cpu"):
        raise InputError(f"exported files run on the CPU, not on {device!r}: omit --device")
    runtime = runtime_of(path)
    forward, metadata, precision = (_load_onnx if runtime == "onnx" else _load_openvino)(path, precision)
    try:
        config = ModelConfig.from_dict(json.loads(metadata.get(CONFIG_KEY, "")))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} has no configuration ({error}): was it made by export.py?") from error
    priors = priors_of(config)
    _check_network(forward, config, len(priors), path)
    info = {"source": str(path), "runtime": runtime, "device": "cpu", "precision": precision}
    return Exported(forward, config, priors, info | {"exported_from": metadata.get(SOURCE_KEY)})


def _check_network(forward: Forward, config: ModelConfig, num_priors: int, path: Path) -> None:
    """Raises InputError unless the network returns offsets and logits for an image of the configured size."""
    shapes = [(1, num_priors, 4), (1, num_priors, len(config.classes) + 1)]
    try:
        outputs = forward(torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.uint8))
        actual = [tuple(output.shape) for output in outputs if output.dtype == torch.float32]
    except Exception as error:  # the runtimes' exceptions have no common class
        raise InputError(f"{path} does not run on an image of its configuration: {str(error)[:200]}") from error
    if actual != shapes:
        raise InputError(f"{path} returns float32 outputs {actual}, but its configuration needs {shapes}")


def _load_onnx(path: Path, precision: str) -> tuple[Forward, dict[str, str], str]:
    if precision not in ("auto", "fp32"):
        raise InputError(f"{path} runs in fp32, not in {precision}: the OpenVINO file and the checkpoint can")
    onnxruntime = import_optional("onnxruntime")
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class
        raise InputError(f"{path} is not a readable ONNX file: {str(error)[:200]}") from error
    if [output.name for output in session.get_outputs()] != ["offsets", "logits"]:
        raise InputError(f"{path} includes decoding, for other programs: use the file of export.py --to onnx here")

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        offsets, logits = session.run(["offsets", "logits"], {"images": images.numpy()})
        return torch.from_numpy(offsets), torch.from_numpy(logits)

    return forward, session.get_modelmeta().custom_metadata_map, "fp32"


def _load_openvino(path: Path, precision: str) -> tuple[Forward, dict[str, str], str]:
    if precision not in ("auto", *OPENVINO_PRECISIONS):
        raise InputError(f"precision {precision!r} is not one of auto, {', '.join(OPENVINO_PRECISIONS)}")
    openvino = import_optional("openvino")
    hints = {"PERFORMANCE_HINT": "LATENCY"}
    if precision != "auto":
        hints["INFERENCE_PRECISION_HINT"] = OPENVINO_PRECISIONS[precision]
    try:
        network = openvino.Core().read_model(path)
        compiled = openvino.compile_model(network, "CPU", hints)
    except RuntimeError as error:
        raise InputError(f"{path} is not a readable OpenVINO file: {str(error)[:200]}") from error

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # A new request each time: the outputs of a shared one would be overwritten by other threads.
        outputs = compiled.create_infer_request().infer([images.contiguous().numpy()])
        return torch.from_numpy(np.array(outputs[0])), torch.from_numpy(np.array(outputs[1]))

    keys = [key for key in (CONFIG_KEY, SOURCE_KEY) if network.has_rt_info(key)]
    in_use = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    name = next((ours for ours, theirs in OPENVINO_PRECISIONS.items() if theirs == in_use), in_use)
    return forward, {key: network.get_rt_info(key).astype(str) for key in keys}, name
