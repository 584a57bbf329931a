"""What several scripts need: an error to show, where to compute and how precisely, a file whole or not at all."""

import argparse
import ast
import colorsys
import contextlib
import ctypes
import hashlib
import os
import platform
import re
import sys
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import torch

MALLOC_OPTIONS = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}  # the numbers of glibc's malloc.h
MALLOC_DEFAULTS = {"trim_threshold": 128 * 2**10, "mmap_threshold": 128 * 2**10, "mmap_max": 65536}


class InputError(ValueError):
    """What a person gave cannot be used. The message names it and says what to do; the scripts print it alone."""


def error_message(error):
    """An error as one line. From a loader's worker it arrives as a whole traceback, the sentence last."""
    last_line = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return re.sub(r"^(\w+\.)+\w*Error: ", "", last_line)  # a traceback's name of ours, as in images.DataError


def whole_number(least):
    """A type for argparse: int(text), at least `least`."""

    def parse(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    parse.__name__ = "whole number"  # argparse names it when int() fails
    return parse


def tune_malloc(**options):
    """Sets options of glibc's malloc (man mallopt) in this process; does nothing where there is another libc."""
    if platform.libc_ver()[0] == "glibc":
        for name, value in options.items():
            ctypes.CDLL(None).mallopt(MALLOC_OPTIONS[name], value)


@contextlib.contextmanager
def memory_kept(device):
    """On a CPU, freed memory stays with the process meanwhile, for the next tensors: fetching that of each activation
    anew, page by page, made a training step 1.3 times as long (benchmarks/train.py)."""
    if device.type != "cpu":
        yield
        return
    tune_malloc(mmap_max=0, trim_threshold=-1)
    try:
        yield
    finally:
        tune_malloc(**MALLOC_DEFAULTS)


def set_fields(config, assignments):
    """A copy of a dataclass with fields set from "field=value" texts; "part.field=value" reaches a dataclass inside.

    InputError for a field it has not, or a value that is not of the field's type.
    """
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        config = _set_field(config, name.split("."), text, assignment)
    return config


def _set_field(config, names, text, assignment):
    types = {field.name: field.type for field in fields(config)}
    if names[0] not in types:
        kind = type(config).__name__
        raise InputError(f"--set {assignment}: {kind} has no field {names[0]!r}; it has {', '.join(types)}")
    expected, old = types[names[0]], getattr(config, names[0])
    if is_dataclass(old) and len(names) > 1:
        return replace(config, **{names[0]: _set_field(old, names[1:], text, assignment)})
    try:
        value = text if expected is str else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected or len(names) > 1:
        hint = f"; it has fields of its own, as {names[0]}.{fields(old)[0].name}" if is_dataclass(old) else ""
        raise InputError(f"--set {assignment}: {text!r} is no {expected.__name__}{hint}")
    return replace(config, **{names[0]: value})


def in_threads(function, items, ahead=64):
    """function(item) for each item, in order, computed by one thread a core, at most `ahead` items ahead."""
    items, running = iter(items), deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > ahead:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def evenly_spaced(length, count):
    """At most `count` of the rows 0..length - 1, from the first to the last."""
    count = min(count, length)
    return [round(k * (length - 1) / max(count - 1, 1)) for k in range(count)]


def class_colour(label):
    """An RGB colour for a label, far in hue from its neighbours' (steps of the golden ratio)."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


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
    """ "fp32", "bf16" or "fp16" for these or "auto"; auto is bf16 where that is faster."""
    if name == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    if name not in ("fp32", "bf16", "fp16"):
        raise InputError(f"precision {name!r} is none of auto, fp32, bf16, fp16")
    return name


def autocast(device, precision):
    """The context in which a network runs in `precision` ("fp32", "bf16" or "fp16") on `device`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def hash_file(path):
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def print_anything():
    """From now on, characters that the output's encoding lacks are printed as escapes, and end no run."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def file_name_of(text):
    """A text, as a class's name, as a file name of any system: what has a meaning in paths becomes an underscore."""
    return re.sub(r"[^\w .+-]", "_", text).strip(" .") or "_"


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`; moves it there when the block ends well, else leaves `path` as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # to write: Windows syncs no other
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private; results are not
        os.replace(temporary, path)
        if sys.platform != "win32":  # where folders are not opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name has to outlive a power cut too
            finally:
                os.close(folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
