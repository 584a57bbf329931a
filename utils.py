"""Errors, command-line arguments, device and precision, atomic file writes, and checks of output files."""

import argparse
import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

# ---------------------------------------------------------------------------------------------------------------------
# Errors and arguments


class InputError(ValueError):
    """The user's input cannot be used. The message names it and says what to do; commands print it alone."""


def error_message(error: BaseException) -> str:
    """The error as one line: the last line of the message, which for a DataLoader worker is a whole traceback."""
    last_line = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return re.sub(r"^(\w+\.)+\w*Error: ", "", last_line)  # the class name that a traceback puts before the message


def whole_number(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    parse.__name__ = "whole number"  # argparse prints this name where int() fails
    return parse


class HelpFormatter(argparse.HelpFormatter):
    """Adds defaults to help texts, except None, False and []; a file of this project is shown by its relative path."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default in ([], argparse.SUPPRESS):
            return action.help
        values = default if isinstance(default, list) else [default]
        shown = " ".join(str(value).removeprefix(f"{Path(__file__).parent}{os.sep}") for value in values)
        return f"{action.help} (default: {shown.replace('%', '%%')})"


def escape_unprintable() -> None:
    """Prints characters that standard output cannot encode as escapes from now on, instead of raising an error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


# ---------------------------------------------------------------------------------------------------------------------
# Device and precision


def pick_device(name: str = "auto") -> torch.device:
    """The device of this name.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps"; or "auto", the first of cuda, mps and cpu that is available.

    Raises:
        InputError: if this machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in available.items() if present)
    if not available.get(name.split(":")[0], False):
        present = ", ".join(kind for kind, present in available.items() if present)
        raise InputError(f"device {name!r} is not available; this machine has {present} (--device auto picks one)")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r} does not exist: this machine has {torch.cuda.device_count()} GPUs, from cuda:0"
        )
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 on this device.

    CPUs need AMX or AVX512-BF16 instructions for it: without them bf16 is emulated, and several times slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # torch has no public function for this in all versions that requirements.txt allows.
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, probe)() for probe in probes if hasattr(torch.cpu, probe))
    return False


def has_fast_fp16(device: torch.device) -> bool:
    """Whether float16 is faster than float32 on this device: a GPU of compute capability 6.0, 6.2, or 7.0 and newer.

    GPUs of 6.1 (GTX 10xx, P40) run fp16 at 1/64 of fp32 speed.
    """
    if device.type != "cuda":
        return False
    capability = torch.cuda.get_device_capability(device)
    return capability in ((6, 0), (6, 2)) or capability >= (7, 0)


def pick_precision(name: str, device: torch.device, training: bool = False) -> str:
    """The precision of this name on this device.

    Args:
        name: "fp32", "bf16", "fp16"; or "auto", the fastest that is safe.
        device: where the network runs.
        training: whether gradients are computed too. Then "auto" is fp32 on a CPU, where the gradients of depthwise
            convolutions are slow in bf16, and fp16 on a GPU that has fast fp16 but no bf16 (P100, V100, T4): training
            scales the loss, so that small gradients do not vanish.

    Raises:
        InputError: for any other name.
    """
    if name == "auto":
        if training and device.type == "cpu":
            return "fp32"
        if has_fast_bf16(device):
            return "bf16"
        return "fp16" if training and has_fast_fp16(device) else "fp32"
    if name not in ("fp32", "bf16", "fp16"):
        raise InputError(f"precision {name!r} is not one of auto, fp32, bf16, fp16")
    return name


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a network runs in `precision` ("fp32", "bf16" or "fp16") on `device`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


@contextlib.contextmanager
def fast_products(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """While the block runs, fp32 convolutions and matrix products use the fast units of the device, if `enabled`.

    They multiply in tf32 on a GPU (10 bits of mantissa), in bf16 on a CPU with instructions for it (7 bits), and add in
    fp32. CPUs without them, and versions of torch without these settings, stay with fp32.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled
    parts = [getattr(torch.backends.mkldnn, name, None) for name in ("conv", "matmul")]
    if device.type != "cpu" or not enabled or not has_fast_bf16(device) or None in parts:
        yield
        return
    before = [part.fp32_precision for part in parts]  # type: ignore[union-attr]
    try:
        for part in parts:
            part.fp32_precision = "bf16"  # type: ignore[union-attr]
        yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def write_text(path: str | Path, text: str, kind: str | None = None) -> None:
    """Writes a UTF-8 file atomically (see atomic_write)."""
    with atomic_write(path, kind) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_write(path: str | Path, kind: str | None = None) -> Iterator[str]:
    """Yields the path of an empty temporary file beside `path`, which replaces `path` when the block ends.

    If the block raises, `path` is unchanged. If `path` is a symbolic link, its target is replaced. A device, a pipe or
    an open stream (/dev/null, /dev/stdout, a fifo) is written to, not replaced.

    Args:
        path: the file to write. Missing folders are made.
        kind: kind of output, whose mark is added to the file (see check_outputs).
    """
    path = Path(path)
    if (descriptor := _open_descriptor(path)) is not None or is_special(path):
        with tempfile.TemporaryDirectory() as scratch:
            temporary = os.path.join(scratch, "content")
            Path(temporary).touch()
            yield temporary
            sys.stdout.flush()  # /dev/stdout: after what was printed
            with open(temporary, "rb") as content, open(path if descriptor is None else descriptor, "wb") as stream:
                shutil.copyfileobj(content, stream)
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file name has at most 255 bytes; a character has at most four.
    temporary = str(path.parent / f".{path.name[:50]}.{secrets.token_hex(4)}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less the umask
    try:
        yield temporary
        if kind:
            _append_mark(temporary, kind)
        with open(temporary, "rb+") as file:  # opened for writing: Windows cannot fsync read-only files
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if sys.platform != "win32":  # where folders cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # so that the new name survives a power failure too
            finally:
                os.close(folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs never replace the user's files

BINARY_KINDS = ("picture", "video", "checkpoint", "exported")
EXPORT_KEY = "fpn_ssd_source"  # in the metadata at the end of exported files
MODEL_SUFFIXES = (".pth", ".tar", ".pt", ".onnx", ".bin", ".safetensors")


def check_outputs(outputs: Iterable[tuple[str, str | Path | None]], inputs: Iterable = (), overwrite=False) -> None:
    """Checks that no output would replace one of the user's files. Commands call it before any other work.

    An output may be a new file, or a file that this program wrote before as the same kind of output, but never an
    input. Its own files end in a mark: 16 spaces and tabs that encode the kind in binary. Parsers of JSON, XML, HTML
    and of the text files of YOLO and VOC ignore trailing blanks; in a picture or video the mark follows the content,
    in a box of type free; in a checkpoint it is the comment of the zip archive. Exported files have metadata instead.

    Args:
        outputs: pairs (kind, path); paths that are None or "-", devices and pipes are skipped. Kinds are names such as
            "report"; those of BINARY_KINDS are not text.
        inputs: the paths of the input files, or the result of file_ids for them if this function is called often.
        overwrite: whether existing files other than inputs may be replaced (--overwrite).

    Raises:
        InputError: for the first output that may not be written; the message says what to do.
    """
    ids = inputs if isinstance(inputs, frozenset) else file_ids(path for path in inputs if path)
    seen: set[str] = set()
    for kind, name in outputs:
        if name is None or str(name) == "-" or is_special(Path(name)) or _descriptor_number(name) is not None:
            continue
        path = Path(name)
        if (real := os.path.realpath(path)) in seen:
            raise InputError(f"{path} would be written twice: name different files")
        seen.add(real)
        if kind not in BINARY_KINDS and path.suffix.lower() in MODEL_SUFFIXES:
            raise InputError(f"{path} is the name of a model, but a {kind} would be written to it: choose another name")
        if path.is_dir():
            raise InputError(f"{path} is a folder, but a {kind} would be written to it: name a file")
        if blocking := next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None):
            raise InputError(f"{path} cannot be written: {blocking} is a file, not a folder")
        if file_ids([path]) & ids:
            raise InputError(f"{path} is an input and would be overwritten: choose another name")
        if path.exists() and not overwrite and not is_own_output(path, kind):
            raise InputError(
                f"{path} exists already and is not a {kind} file that this program wrote: choose another name, or add "
                "--overwrite to replace it"
            )


def file_ids(paths: Iterable[str | Path]) -> frozenset:
    """Device and inode numbers of the files, which do not depend on the path; missing files are skipped."""
    ids = set()
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(path)
            ids.add((status.st_dev, status.st_ino))
    return frozenset(ids)


def is_own_output(path: Path, kind: str) -> bool:
    """Whether this program wrote the file as this kind of output (see check_outputs)."""
    if kind == "exported" and path.suffix == ".bin":  # OpenVINO's weights beside its .xml
        path = path.with_suffix(".xml")
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**16))
            end = file.read()
    except OSError:
        return False
    return EXPORT_KEY.encode() in end if kind == "exported" else end.rstrip(b"\n").endswith(output_mark(kind).encode())


def output_mark(kind: str) -> str:
    """16 spaces and tabs that encode the kind of an output in binary."""
    return f"{zlib.crc32(kind.encode()) % 2**16:016b}".replace("0", " ").replace("1", "\t")


def _append_mark(path: str, kind: str) -> None:
    """Adds the mark of an output of this kind to a file."""
    mark = output_mark(kind).encode()
    with open(path, "rb+") as file:
        is_zip = file.read(4) == b"PK\3\4"
        size = file.seek(0, os.SEEK_END)
        if is_zip:  # its last two bytes are the length of its comment
            file.seek(size - 2)
            file.write(len(mark).to_bytes(2, "little") + mark)
        elif kind in BINARY_KINDS:  # a box of ISO 14496-12: length, type, content
            file.write((8 + len(mark)).to_bytes(4, "big") + b"free" + mark)
        else:
            file.seek(max(0, size - 1))
            newline = file.read(1) == b"\n"
            file.seek(size - newline)
            file.write(mark + b"\n")


def is_special(path: Path) -> bool:
    """Whether something exists at `path` that is neither a regular file nor a folder: a device, a pipe, a socket."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _open_descriptor(path: Path) -> int | None:
    """A copy of the descriptor that /dev/stdout, /dev/stderr or /dev/fd/N stands for; None for other paths.

    A copy shares the position in the file that standard output may be redirected to: opening it anew would not.
    """
    number = _descriptor_number(path)
    return None if number is None else os.dup(number)


def _descriptor_number(path: str | Path) -> int | None:
    """The number of the open descriptor that /dev/stdout, /dev/stderr or /dev/fd/N stands for; None for other paths."""
    if match := re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", str(path)):
        return int(match[1])
    return {"/dev/stdout": 1, "/dev/stderr": 2}.get(str(path))
