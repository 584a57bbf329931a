"""What several scripts need: an error to show, where to compute and how precisely, a file whole or not at all."""

import argparse
import contextlib
import os
import tempfile
from pathlib import Path

import torch


class InputError(ValueError):
    """What a person gave cannot be used. The message names it and says what to do; the scripts print it alone."""


def explain(error):
    """An error as one line. From a loader's worker it arrives as a whole traceback, the sentence last."""
    return str(error).strip().splitlines()[-1].removeprefix("datasets.DataError: ")


def whole_number(least):
    """A type for argparse: int(text), at least `least`."""

    def parse(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    parse.__name__ = "whole number"  # argparse names it when int() fails
    return parse


def pick_device(name="auto"):
    """torch.device for "auto", "cpu", "cuda" or "mps"; auto takes the first of cuda, mps, cpu that is there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name.split(":")[0], False):
        there = ", ".join(kind for kind, there in available.items() if there)
        raise InputError(f"device {name!r} is not available here; there is: {there} (--device auto picks one)")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r} is not there: this machine has {torch.cuda.device_count()} GPUs, from cuda:0"
        )
    return device


def has_fast_bf16(device):
    """Whether bfloat16 is faster than float32 on this device.

    On a CPU that takes AMX or AVX512-BF16 instructions: without them bf16 is emulated, and several times slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # torch has no public question for this in all versions that requirements.txt admits.
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, probe)() for probe in probes if hasattr(torch.cpu, probe))
    return False


def pick_precision(name, device):
    """ "fp32" or "bf16" for "auto", "fp32" or "bf16"; auto is bf16 where that is faster."""
    if name == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    if name not in ("fp32", "bf16"):
        raise InputError(f"precision {name!r} is none of auto, fp32, bf16")
    return name


def autocast(device, precision):
    """The context in which a network runs in `precision` ("fp32" or "bf16") on `device`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def written_whole(path):
    """Yields a temporary path beside `path`; moves it there when the block ends well, else leaves `path` as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private; results are not
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
