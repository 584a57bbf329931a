"""Converts a checkpoint of the original FPN-SSD300 project to one of this project, without running code of the file.

    python -m fpnssd.legacy.convert checkpoint_ssd300_280.pth.tar checkpoint/original.pth.tar

The old file pickles whole objects: {"epoch", "model", "optimizer"}. torch.load reads it here with a restricted
unpickler: classes of the original project, torch.nn, torch.optim and torchvision.models become objects that only hold
attributes, torch's functions that rebuild tensors and plain containers are allowed, and any other name is refused.
"""

import argparse
import pickle
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fpnssd.data.voc import VOC_CLASSES
from fpnssd.legacy.network import original_config
from fpnssd.safe_load import CheckpointError, pickle_of_zip
from model import FPNSSD, save_checkpoint
from utils import InputError, check_outputs, error_message

PROJECT_CLASSES = {"SSD300", "FPNBase", "PredictionConvolutions"}  # in whatever module they were defined
INERT_MODULES = ("torch.nn.", "torch.optim.", "torchvision.models.")
ALLOWED = {
    "collections.OrderedDict", "collections.defaultdict", "builtins.dict", "builtins.list", "builtins.set",
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter",
    "torch.device", "torch.Size",
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.add_argument("old", help="the original project's file")
    parser.add_argument("new", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="also replace a file that this program did not write")
    args = parser.parse_args(argv)
    try:
        check_outputs([("checkpoint", args.new)], [args.old], args.overwrite)
        model, summary = convert(args.old)
        save_checkpoint(args.new, model, "checkpoint")
    except (InputError, OSError) as error:
        sys.exit(f"convert: {error_message(error)}")
    print(f"{args.old}: {summary}")
    print(f"wrote {args.new}: {len(model.config.classes)} classes, {len(model.priors)} priors")


def convert(path: str | Path, classes: Sequence[str] = VOC_CLASSES) -> tuple[FPNSSD, str]:
    """The original project's checkpoint as a model of this project.

    Args:
        path: of the old file.
        classes: names of its classes, without background.

    Returns:
        The model, and a summary of what was not copied.

    Raises:
        CheckpointError: for other files, networks and numbers of classes.
    """
    content = read_old(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), Inert):
        raise CheckpointError(f"{path} is not the original project's: it has no module under 'model'")
    old = dict(tensors_of(content["model"]))
    model = FPNSSD(original_config(classes))
    state = translate(old, model.state_dict(), path)
    model.load_state_dict(state)
    used = {old_name(name) for name in state}
    left_out = ["the optimizer"] * ("optimizer" in content)
    left_out += OrderedDict.fromkeys(
        "base.resnet.fc" if name.startswith("base.resnet.fc.") else name for name in old if name not in used
    )
    return model.eval(), f"epoch {content.get('epoch', 'unknown')}; left out: {', '.join(left_out) or 'nothing'}"


def translate(old: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The old tensors under the names of `wanted`; what only this project has keeps its value there.

    Raises:
        CheckpointError: for a tensor that is missing or has another shape.
    """
    state = {}
    for name, tensor in wanted.items():
        source = old_name(name)
        if source is not None and source not in old:
            raise CheckpointError(f"{path} lacks {source!r} ({tuple(tensor.shape)}): another network than FPN-SSD300")
        state[name] = tensor if source is None else old[source]
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)}, not {tuple(tensor.shape)}"
            raise CheckpointError(f"{path}: {source!r} has the shape {shapes}: another network, or other classes")
    return state


def old_name(name: str) -> str | None:
    """The original project's name of one of our tensors; None for the image's mean and std, which only ours has."""
    part, _, rest = name.partition(".")
    if part == "backbone":
        return f"base.resnet.{rest}"
    if part in ("box_heads", "class_heads"):
        level, _, tensor = rest.partition(".")
        return f"pred_convs.{'loc' if part == 'box_heads' else 'cl'}_p{int(level) + 3}.{tensor}"
    if rest == "lengths":
        return "rescale_factors"
    if part == "fpn":
        kind, _, tensor = rest.partition(".")
        number, _, tensor_of_list = tensor.partition(".")
        names = {
            "top": lambda: f"base.toplayer.{tensor}",
            "laterals": lambda: f"base.lat_p{int(number) + 3}.{tensor_of_list}",
            "smooths": lambda: f"base.smooth{2 - int(number)}.{tensor_of_list}",  # smooth1 is P4's
            "extras": lambda: f"base.conv{int(number) + 6}.{tensor_of_list}",
            "norms": lambda: f"base.bn{int(number) + 6}.{tensor_of_list}",
        }
        return names[kind]()
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Reading without running


class Inert:
    """Replaces an object of an untrusted class: keeps its state as attributes, and does nothing."""

    dump_patches = False  # torch.load asks a module for it where its source code has changed

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class RestrictedUnpickler(pickle.Unpickler):
    """Resolves the names in ALLOWED, classes of modules as Inert, and no other; torch.load adds its storages."""

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # torch writes Python 2's name
        if f"{module}.{name}" in ALLOWED:
            return super().find_class(module, name)
        if name in PROJECT_CLASSES or module.startswith(INERT_MODULES):
            return Inert
        raise CheckpointError(f"names {module}.{name}, which is not one of those that are allowed")


# The parts of the module pickle that torch.load uses.
RESTRICTED_PICKLE = SimpleNamespace(
    __name__="restricted_pickle",
    Unpickler=RestrictedUnpickler,
    load=lambda file, **options: RestrictedUnpickler(file, **options).load(),
)


def read_old(path: str | Path) -> Any:
    """The content of a file of torch.save, in its zip format or the one before torch 1.6.

    Raises:
        CheckpointError: for other files, and for names that are not allowed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        with open(path, "rb") as file:
            first = file.read(1)
        if zipfile.is_zipfile(path):
            pickle_of_zip(path)  # nothing compressed, no TorchScript
        elif first != b"\x80":  # torch.load would also unpack tar files
            raise CheckpointError("is neither a zip file nor of torch's older format")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the source code of the original's classes is not here
            return torch.load(path, map_location="cpu", pickle_module=RESTRICTED_PICKLE, weights_only=False)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused, and nothing in it was run: it {error}") from None
    except Exception as error:  # any exception that a damaged or foreign pickle causes
        raise CheckpointError(f"{path} is not a readable checkpoint ({type(error).__name__}: {error})") from error


def tensors_of(module: Inert, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of a module's parameters and buffers, as state_dict would name them."""
    attributes = vars(module)
    for kind in ("_parameters", "_buffers"):
        for name, tensor in (attributes.get(kind) or {}).items():
            if isinstance(tensor, Tensor):
                yield prefix + name, tensor.detach()
    for name, child in (attributes.get("_modules") or {}).items():
        if isinstance(child, Inert):
            yield from tensors_of(child, f"{prefix}{name}.")


if __name__ == "__main__":
    main()
