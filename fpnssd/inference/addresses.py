"""Lists millions of pictures by their addresses, and reads them.

An address is a local path, s3://... or gs://..., or FILE.parquet#ROW for bytes in a row (from 0) of a Parquet file.
"""

import glob
import io
import re
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from fpnssd.data.images import IMAGE_SUFFIXES, DataError, find_images, is_image_name, load_image
from utils import InputError

PARQUET = ".parquet"
PARQUET_ROW = re.compile(r"(.+\.parquet)#(\d+)", re.IGNORECASE | re.DOTALL)
BYTES_COLUMNS = ("bytes", "image.bytes")  # of Parquet files; the second is that of Hugging Face's data sets
READ_AHEAD = 2**20  # bytes of a Parquet file read at a time; by default pyarrow reads a row group's column whole


def resolve(address: str) -> tuple[Any, str]:
    """The pyarrow file system that an address belongs to, and its path there.

    Args:
        address: a local path, or one of s3://, gs:// and other schemes of pyarrow.fs. Credentials and servers come from
            the environment, such as AWS_ENDPOINT_URL; s3://anonymous@bucket/ needs no credentials.

    Raises:
        InputError: for a scheme that pyarrow does not support, or a bucket that cannot be reached.
    """
    from pyarrow import fs  # optional

    remote = re.match(r"(\w+://[^/]*)(.*)", address, re.DOTALL)
    if not remote:
        return fs.LocalFileSystem(), address
    try:
        system, base = _file_system(f"{remote[1]}/")
    except (ValueError, OSError) as error:
        raise InputError(f"{address} cannot be reached: {error}") from error
    return system, base.rstrip("/") + remote[2]


@cache
def _file_system(root: str) -> tuple[Any, str]:
    """(pyarrow file system, path) of a bucket or host."""
    from pyarrow import fs  # optional

    return fs.FileSystem.from_uri(root)


# ---------------------------------------------------------------------------------------------------------------------
# Listing


def list_addresses(inputs: Sequence[str]) -> Iterator[str]:
    """Yields the address of each picture of the inputs; a picture that is named twice is yielded twice.

    Args:
        inputs: folders (searched recursively), globs of local files, pictures; text files with an address per line;
            Parquet files with a column "path" of addresses, or with encoded pictures in "bytes" or "image.bytes".
            Folders without pictures are searched for Parquet files. All but globs may be local or remote (see resolve).

    Raises:
        InputError: for an input that does not exist, cannot be read, or has no pictures.
    """
    for argument in inputs:
        empty = True
        for address in _expand(argument):
            empty = False
            # Arrow strings are UTF-8: other bytes of a file name become escapes, and the file is reported as missing.
            yield address.encode("utf-8", "backslashreplace").decode()
        if empty:
            raise InputError(f"{argument} has no pictures")


def _expand(argument: str) -> Iterator[str]:
    if "://" not in argument and not Path(argument).exists() and glob.has_magic(argument):
        matching = sorted(glob.glob(argument, recursive=True))
        files: Iterator[str] = (match for match in matching if not Path(match).is_dir())
    else:
        files = _files_of(argument)
    for file in files:
        suffix = Path(file).suffix.lower()
        if suffix == ".txt":
            yield from _read_lines(file)
        elif suffix == PARQUET:
            yield from _parquet_addresses(file)
        else:
            yield file


def _files_of(argument: str) -> Iterator[str]:
    """The pictures of a folder, its Parquet files if it has none; or the argument itself if it is a file."""
    from pyarrow import fs  # optional

    if "://" not in argument and Path(argument).is_dir():
        files: Iterator[str] = map(str, find_images(argument, IMAGE_SUFFIXES | {PARQUET})[0])
    else:
        system, path = resolve(argument)
        kind = system.get_file_info(path).type
        if kind == fs.FileType.NotFound:
            hint = ": globs are for local files, name a remote folder" if glob.has_magic(argument) else ""
            raise InputError(f"{argument} does not exist{hint}")
        if kind == fs.FileType.File:
            yield argument
            return
        files = _files_below(argument, system, path)
    tables, has_pictures = [], False
    for file in files:
        if is_image_name(file):
            has_pictures = True
            yield file
        elif file.lower().endswith(PARQUET):
            tables.append(file)
    if not has_pictures:
        yield from tables


def _files_below(address: str, system: Any, path: str) -> Iterator[str]:
    """The files of a remote folder and of those below it, a folder in memory at a time."""
    from pyarrow import fs  # optional

    address = address.rstrip("/")
    for entry in sorted(system.get_file_info(fs.FileSelector(path)), key=lambda entry: entry.base_name):
        if entry.type == fs.FileType.Directory:
            yield from _files_below(f"{address}/{entry.base_name}", system, entry.path)
        else:
            yield f"{address}/{entry.base_name}"


def _read_lines(address: str) -> Iterator[str]:
    system, path = resolve(address)
    with system.open_input_stream(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape") as lines:
        for line in lines:
            if line.strip():
                yield line.rstrip("\r\n")


def _parquet_addresses(address: str) -> Iterator[str]:
    """The addresses that a Parquet file lists, or those of its rows if it holds pictures."""
    with open_parquet(address) as file:
        columns = {file.schema.column(number).path for number in range(len(file.schema))}
        if columns.intersection(BYTES_COLUMNS):
            yield from (f"{address}#{row}" for row in range(file.metadata.num_rows))
        elif "path" in columns:
            for batch in file.iter_batches(columns=["path"]):
                yield from (path for path in batch.column(0).to_pylist() if path)
        else:
            raise InputError(
                f"{address} has no column path, bytes or image.bytes, but {', '.join(sorted(columns))}: rename one"
            )


def open_parquet(address: str) -> Any:
    """Opens a pyarrow.parquet.ParquetFile, a context manager; its pages are read as they are needed.

    Raises:
        InputError: if it is not a Parquet file.
    """
    import pyarrow as pa  # optional
    from pyarrow import parquet

    system, path = resolve(address)
    try:
        return parquet.ParquetFile(system.open_input_file(path), buffer_size=READ_AHEAD, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise InputError(f"{address} is not a Parquet file: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class PictureReader:
    """Reads pictures by their addresses, in any number of threads.

    Rows of a Parquet file are read fastest in order: the reader continues from the row that it read last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: Iterator[bytes | None] = iter(())
        self._next = ("", 0)  # file and number of the row that _rows yields next

    def load(self, address: str) -> Image.Image:
        """The picture as RGB, upright.

        Raises:
            DataError: it is missing or cannot be read; the messages are those of load_image.
        """
        if row := PARQUET_ROW.fullmatch(address):
            return load_image(self._read_row(row[1], int(row[2]), address), address)
        if "://" not in address:
            return load_image(address)
        system, path = resolve(address)
        try:
            with system.open_input_stream(path) as stream:
                content = stream.read()
        except FileNotFoundError:
            raise DataError(f"image {address} is missing", "image missing") from None
        except OSError as error:
            raise DataError(f"image {address} cannot be read: {error}", "image cannot be read") from error
        return load_image(content, address)

    def _read_row(self, file: str, row: int, address: str) -> bytes:
        with self._lock:
            if self._next[0] != file or self._next[1] > row:
                self._rows, self._next = _stored_pictures(file, row), (file, row)
            (_, following), self._next = self._next, ("", 0)  # an iterator that fails or ends is not used again
            for number, content in enumerate(self._rows, start=following):
                if number == row and content is not None:
                    self._next = (file, number + 1)
                    return content
                if number == row:
                    break
        raise DataError(f"image {address} is missing", "image missing")


def _stored_pictures(address: str, start: int) -> Iterator[bytes | None]:
    """The encoded pictures of a Parquet file from row `start` on; None where a row has none."""
    with open_parquet(address) as file:
        names = {file.schema.column(number).path for number in range(len(file.schema))}
        column = next(name for name in BYTES_COLUMNS if name in names)
        groups = range(file.metadata.num_row_groups)
        first = 0
        while first < len(groups) and start >= (size := file.metadata.row_group(first).num_rows):
            start, first = start - size, first + 1
        for batch in file.iter_batches(batch_size=8, row_groups=groups[first:], columns=[column]):
            for value in batch.column(0).slice(start):
                content = value.as_py()
                yield content["bytes"] if isinstance(content, dict) else content
            start = max(0, start - len(batch))
