"""The checkpoint of the original FPN-SSD300 project -> one of ours, without running any code that is in it.

    python -m fpnssd.legacy.convert checkpoint_ssd300_280.pth.tar checkpoint/original.pth.tar

The old file pickles whole objects: {"epoch", "model", "optimizer"}. Here the pickle is read with inert stand-ins for
the project's three classes and for what torch.nn, torch.optim and torchvision.models name; only torch's own ways to
rebuild a tensor, and plain containers, do anything. Whatever else a file names is refused.
"""

import argparse
import io
import pickle
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import torch

from fpnssd.data.voc import VOC_CLASSES
from fpnssd.legacy.network import original_config
from fpnssd.safe_load import CheckpointError
from model import FPNSSD, save_checkpoint
from utils import InputError, check_outputs, error_message

PROJECT_CLASSES = {"SSD300", "FPNBase", "PredictionConvolutions"}  # from whatever module they were run in
INERT_MODULES = ("torch.nn", "torch.optim", "torchvision.models")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # how files of torch before 1.6 begin
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("old", help="the original project's file")
    parser.add_argument("new", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that this program did not write, too")
    args = parser.parse_args(argv)
    try:
        check_outputs([("checkpoint", args.new)], [args.old], args.overwrite)
        model, said = convert(args.old)
        save_checkpoint(args.new, model, "checkpoint")
    except (InputError, OSError) as error:
        sys.exit(f"convert: {error_message(error)}")
    print(f"{args.old}: {said}")
    print(f"wrote {args.new}: {len(model.config.classes)} classes, {len(model.priors)} priors")


def convert(path, classes=VOC_CLASSES):
    """(FPNSSD in the original's configuration, a sentence on what was left out). CheckpointError for other files."""
    content = read_old(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), Inert):
        raise CheckpointError(f"{path} is not the original project's: it has no module under 'model'")
    old = OrderedDict(tensors_of(content["model"]))
    model = FPNSSD(original_config(classes))
    state, unused = translated(old, model.state_dict(), path)
    model.load_state_dict(state)
    dropped = ["the optimizer"] * ("optimizer" in content)
    dropped += ["base.resnet.fc"] * any(name.startswith("base.resnet.fc.") for name in unused)
    others = [name for name in unused if not name.startswith("base.resnet.fc.")]
    said = f"epoch {content.get('epoch', 'unknown')}; left out: {', '.join(dropped + others) or 'nothing'}"
    return model.eval(), said


def translated(old, wanted, path):
    """(our names -> tensors, the old names that nothing asked for)."""
    state, used = {}, set()
    for name, tensor in wanted.items():
        source = old_name(name)
        if source is None:  # the image's mean and std: ours alone
            state[name] = tensor
            continue
        if source not in old:
            raise CheckpointError(f"{path} lacks {source!r} ({tuple(tensor.shape)}): another network than FPN-SSD300")
        if old[source].shape != tensor.shape:
            shapes = f"{tuple(old[source].shape)}, not {tuple(tensor.shape)}"
            raise CheckpointError(f"{path}: {source!r} has the shape {shapes}: another network, or other classes")
        state[name] = old[source]
        used.add(source)
    return state, [name for name in old if name not in used]


def old_name(name):
    """Our name of a tensor -> the original's; None for what only ours has."""
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
    """Stands for an object of a class that is not trusted: takes its state as attributes, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


def tensors_of(module, prefix=""):
    """(dotted name, tensor) of a module's parameters and buffers, as state_dict would name them."""
    attributes = vars(module)
    for kind in ("_parameters", "_buffers"):
        for name, tensor in (attributes.get(kind) or {}).items():
            if isinstance(tensor, torch.Tensor):
                yield prefix + name, tensor
    for name, child in (attributes.get("_modules") or {}).items():
        if isinstance(child, Inert):
            yield from tensors_of(child, f"{prefix}{name}.")


class InertUnpickler(pickle.Unpickler):
    """Builds containers, numbers, tensors and Inert objects, and refuses every other name.

    take_storage(dtype, key, numel) -> a flat tensor.
    """

    def __init__(self, file, take_storage=None):
        super().__init__(file)
        self.take_storage = take_storage

    def find_class(self, module, name):
        if name in PROJECT_CLASSES or module.startswith(tuple(f"{known}." for known in INERT_MODULES)):
            return Inert
        module = "builtins" if module == "__builtin__" else module  # torch writes Python 2's name
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        raise CheckpointError(f"names {module}.{name}, which is not one of those that are allowed")

    def persistent_load(self, saved):
        if isinstance(saved, tuple) and len(saved) >= 2 and saved[0] == "module":
            return saved[1]  # a class with its source text, which nobody looks at
        if isinstance(saved, tuple) and len(saved) >= 5 and saved[0] == "storage" and self.take_storage:
            _, dtype, key, _, numel = saved[:5]
            if isinstance(dtype, torch.dtype) and isinstance(numel, int) and numel >= 0:
                view = saved[5] if len(saved) > 5 else None
                storage = self.take_storage(dtype, str(key), numel)
                return storage if view is None else storage[view[1] : view[1] + view[2]]
        raise CheckpointError(f"holds something that is no tensor's storage: {str(saved)[:80]}")


def rebuild_tensor(storage, offset, size, stride, *_):
    return torch.as_strided(storage, tuple(size), tuple(stride), offset)  # refuses to leave the storage


def rebuild_parameter(tensor, *_):
    return tensor


def inert_value(*_):
    return Inert()


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch", "device"): inert_value,
    ("torch", "Size"): tuple,
}


def read_old(path):
    """What the file pickles, in either of torch's containers; CheckpointError if it names anything not allowed."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused, and nothing in it was run: it {error}") from None
    except Exception as error:  # whatever a damaged or foreign pickle makes the reader raise
        raise CheckpointError(f"{path} is no checkpoint that can be read ({type(error).__name__}: {error})") from error


def _read_zip(path):
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder, storages = pickled.removesuffix("data.pkl"), {}

        def take_storage(dtype, key, numel):
            if key not in storages:
                entry = archive.getinfo(f"{folder}data/{key}")
                if entry.file_size != numel * dtype.itemsize or entry.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"has {entry.file_size} bytes for {numel} numbers of {dtype}")
                data = bytearray(archive.read(f"{folder}data/{key}"))
                storages[key] = torch.frombuffer(data, dtype=dtype) if numel else torch.empty(0, dtype=dtype)
            return storages[key]

        return InertUnpickler(io.BytesIO(archive.read(pickled)), take_storage).load()


def _read_legacy(path):
    total = Path(path).stat().st_size
    with open(path, "rb") as file:
        if InertUnpickler(file).load() != LEGACY_MAGIC:
            raise CheckpointError("is neither a zip file nor of torch's older format")
        for _ in ("protocol", "machine"):
            InertUnpickler(file).load()
        storages = {}

        def take_storage(dtype, key, numel):
            if key not in storages:
                if (sum(s.nbytes for s in storages.values()) + numel * dtype.itemsize) > total:
                    raise CheckpointError(f"claims more numbers than its {total} bytes can hold")
                storages[key] = torch.empty(numel, dtype=dtype)  # filled below: the numbers come last
            return storages[key]

        content = InertUnpickler(file, take_storage).load()
        for key in InertUnpickler(file).load():
            storage, numel = storages[key], int.from_bytes(file.read(8), "little")
            data = bytearray(file.read(storage.nbytes))
            if numel != len(storage) or len(data) != storage.nbytes:
                raise CheckpointError("ends before its numbers do")
            if numel:
                storage.copy_(torch.frombuffer(data, dtype=storage.dtype))
        return content


if __name__ == "__main__":
    main()
