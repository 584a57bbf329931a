"""torch.load for untrusted files: the memory and time that they would take is checked before anything is built.

torch's weights_only loader runs no foreign code, but it builds whatever a file describes: 2 kB of nested tuples take
minutes to hash, a compressed archive grows a thousandfold. Here the archive and the opcodes of the pickle are checked
first.
"""

import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from utils import InputError

MAX_OBJECTS, MAX_DEPTH = 5_000_000, 100  # an object counts once per reference
# The names a pickle may hold beside torch's dtypes and storages; torch.load refuses more of them.
NAMES = {
    "model build_model",
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
}
CONSTANTS = {
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
# How many objects an opcode pops from the stack; "mark": all above the mark.
BUILT_FROM: dict[str, int | str] = {
    "EMPTY_TUPLE": 0, "EMPTY_LIST": 0, "EMPTY_DICT": 0, "EMPTY_SET": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3,
    "TUPLE": "mark", "LIST": "mark", "DICT": "mark", "FROZENSET": "mark", "REDUCE": 2, "BINPERSID": 1,
}  # fmt: skip
ADDED_TO: dict[str, int | str] = {
    "APPEND": 1,
    "SETITEM": 2,
    "BUILD": 1,
    "APPENDS": "mark",
    "SETITEMS": "mark",
    "ADDITEMS": "mark",
}


class CheckpointError(InputError):
    """A file that is not a checkpoint of this project, or is not safe to load."""


def load_tensors(path: str | Path) -> Any:
    """Loads the content of a checkpoint to the CPU, by torch.load with weights_only=True.

    Args:
        path: a zip file that torch.save wrote.

    Raises:
        CheckpointError: for any other file, one that refers to code, or one that would cost much more memory or time
            than its size; nothing in it has been run.
    """
    check_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError as error:  # of model.build_model
        raise CheckpointError(f"{path} was refused, and nothing in it was run: {error}") from error
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        EOFError,
        AttributeError,
    ) as error:
        # Without torch's own message, which advises to load the file unsafely.
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__} while it was read)"
        ) from error
    return content


def check_file(path: str | Path, old_format: bool = False) -> None:
    """Raises CheckpointError unless the cost of torch.load is in proportion to the size of the file.

    Args:
        path: the file.
        old_format: also accept the format of torch before 1.6, in which weights of backbones are still published.
    """
    size = os.path.getsize(path)
    try:
        if zipfile.is_zipfile(path):
            _check_pickle(pickle_of_zip(path), size)
            return
        with open(path, "rb") as file:
            if file.read(1) == b"\x80":
                if not old_format:
                    raise CheckpointError("is a pickle that may run code" + HINT.format(path))
                file.seek(0)
                for _ in range(5):  # magic number, protocol, system, content, keys of the storages; then these
                    _check_pickle(file, size)
                return
    except CheckpointError as error:
        raise CheckpointError(f"{path} was refused, and nothing in it was run: it {error}") from None
    except Exception as error:  # any exception that zipfile and pickletools raise for a damaged file
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({error})") from error
    raise CheckpointError(f"{path} is not a checkpoint of train.py: it is not a zip file, or truncated")


HINT = (
    "; checkpoints of train.py refer to no names other than torch's. If it is of the original FPN-SSD300 project, "
    "python -m fpnssd.legacy.convert {} NEW.pth.tar converts it without running it"
)


def pickle_of_zip(path: str | Path) -> IO[bytes]:
    """The pickle of a zip file that torch.save wrote.

    Raises:
        CheckpointError: for other zip files: compressed ones, TorchScript, overlapping entries.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        first = min((entry.header_offset for entry in entries), default=-1)
        if first != 0 or archive.start_dir != _directory_offset(path, len(archive.comment)):
            raise CheckpointError("has bytes around its archive, which torch.save never writes")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError("is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise CheckpointError("describes more bytes than it has")
        names = [entry.filename for entry in entries if entry.filename.casefold().endswith("/data.pkl")]
        if len({entry.filename.partition("/")[0] for entry in entries}) != 1:
            raise CheckpointError("has more than one folder, which torch.save never writes")
        if len(names) != 1 or any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise CheckpointError("is a zip file without data.pkl, so torch.save did not write it")
        return archive.open(names[0])


def _directory_offset(path: str | Path, comment_bytes: int) -> int | None:
    """Where the end of a zip file says that its directory is; None if readers may disagree on where it ends.

    torch's reader believes it. zipfile corrects it where bytes precede the archive, and may so read another directory.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # else torch reads its older format
            return None
        file.seek(-min(98 + comment_bytes, os.path.getsize(path)), os.SEEK_END)
        place, tail = file.tell(), file.read()
    end = tail[-22 - comment_bytes :]
    if end[:4] != b"PK\5\6" or int.from_bytes(end[20:22], "little") != comment_bytes:
        return None
    record, locator = tail[-98 - comment_bytes :][:56], tail[-42 - comment_bytes :][:20]
    if locator[:4] != b"PK\6\7":
        return int.from_bytes(end[16:20], "little")
    named = int.from_bytes(locator[8:16], "little")  # where the 64 bit record is; readers may also take the one before
    return int.from_bytes(record[48:], "little") if record[:4] == b"PK\6\6" and named == place else None


def _check_pickle(file: IO[bytes], size: int) -> None:
    """Raises CheckpointError for a pickle that names code, or describes more objects than any checkpoint has.

    Simulates the pickle's stack with [objects, depth, numbers] in place of each object. An object counts once per
    reference, as hashing and printing visit it that often.
    """
    stack: list[list] = []
    marks: list[int] = []  # how many objects the stack had at each mark
    memo: dict[int, list] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in CONSTANTS:
            stack.append([1, 0, argument])
        elif name == "GLOBAL":
            _check_name(argument)
            stack.append([1, 0, None])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in BUILT_FROM:
            parts = _take(stack, marks, BUILT_FROM[name])
            if name == "BINPERSID":
                _check_storage(parts[0], size)
            stack.append(_joined([1, 0, [part[2] for part in parts] if name == "TUPLE" else None], parts))
        elif name in ADDED_TO:
            parts = _take(stack, marks, ADDED_TO[name])
            _joined(stack[-1], parts)
        elif name == "STOP":
            return
        elif name != "PROTO":
            raise CheckpointError(f"has the opcode {name}, which torch.save never writes")
    raise CheckpointError("ends before its content does")


def _take(stack: list[list], marks: list[int], count: int | str) -> list[list]:
    """Removes the last `count` objects from the stack, or those after the last mark."""
    start = marks.pop() if isinstance(count, str) else len(stack) - count
    parts = stack[start:]
    del stack[start:]
    return parts


def _joined(target: list, parts: list[list]) -> list:
    target[0] += sum(part[0] for part in parts)
    target[1] = max([target[1], *(part[1] + 1 for part in parts)])
    if target[0] > MAX_OBJECTS or target[1] > MAX_DEPTH:
        raise CheckpointError("nests its objects deeper or repeats them more often than any checkpoint")
    return target


def _check_name(argument: str) -> None:
    module, _, name = argument.partition(" ")
    of_torch = module in ("torch", "torch.storage") and (
        name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
    )
    if argument not in NAMES and not of_torch:
        raise CheckpointError(f"names {module}.{name}" + HINT.format("OLD"))


def _check_storage(saved: list, size: int) -> None:
    """saved: of ("storage", type, key, device, number of elements), with what the older format adds."""
    number = saved[2][4] if isinstance(saved[2], list) and len(saved[2]) >= 5 else None
    if not isinstance(number, int) or not 0 <= number <= size:
        raise CheckpointError("describes more numbers than it has")
