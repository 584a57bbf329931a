"""Decoded images of a data list in one file, which all worker processes read: training decodes each JPEG only once.

    cache = PixelCache.build(data_list)         # made where there is none that fits; seconds to minutes
    pixels = cache.read(0)                      # uint8 (3, H, W); None if they are damaged

The file lies beside the data list: an identity of what went in, a table of offsets, then the pixels, 3 bytes each. It
is read with plain reads, not mapped: the system's page cache holds it once for all processes either way, but a mapped
page that one worker alone has touched counts as that worker's memory, and a file cut short would kill it.
"""

import errno
import hashlib
import os
import shutil
import sys
import zlib
from pathlib import Path

import filelock
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fpnssd.data.threads import map_in_threads
from utils import InputError

FORMAT = b"FPN-SSD pixels 1"  # 16 bytes
HEADER_BYTES = 64  # format, identity (32), number of images (8, little-endian), zeros
ROW = np.dtype([("offset", "<i8"), ("width", "<i4"), ("height", "<i4"), ("checksum", "<u4")])


class PixelCache:
    """One file of decoded images. `build` makes it, `read` reads it; a pickled one opens the same file again."""

    def __init__(self, path):
        self.path = Path(path)
        count = int.from_bytes(self._header()[48:56], "little")
        self.table = np.memmap(self.path, ROW, "r", HEADER_BYTES, (count,)) if count else np.empty(0, ROW)
        self._file, self._process = None, None
        self._checked = np.zeros(count, dtype=bool)

    def __reduce__(self):
        return PixelCache, (self.path,)

    @classmethod
    def build(cls, data_list, side=0):
        """The cache of a DataList, made first if it is missing, stale or cut short. InputError says why it cannot be.

        side: images whose shorter side is longer are stored shrunk to it; 0 stores them whole. Safe to be killed, and
        to be called by several processes at once: one builds, the others wait for it.
        """
        path = cache_path(data_list, side)
        identity = cache_identity(data_list, side)
        sizes = stored_sizes(data_list.sizes, side)
        try:
            if _fits(path, identity, sizes):
                return cls(path)
            lock = filelock.FileLock(f"{path}.lock")
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                print(f"waiting for another process that is making {path}", file=sys.stderr)
                lock.acquire()
            try:
                if not _fits(path, identity, sizes):
                    _write(path, data_list, sizes, identity)
            finally:
                lock.release()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_room(path, sizes) from error
            raise InputError(f"cannot cache pixels in {path}: {error}; --cache off does without") from error
        return cls(path)

    def __len__(self):
        return len(self.table)

    def read(self, index):
        """The image as uint8 (3, H, W), channels last; None, and a warning, if its bytes are not those once written.

        A process checks each image when it first reads it. A damaged file is deleted, for the next run to make anew;
        a process that had not opened it by then gets None for every image.
        """
        offset, width, height, checksum = self.table[index].tolist()
        try:
            data = self._read_at(offset, 3 * width * height)
        except FileNotFoundError:
            return None
        if not self._checked[index]:
            if zlib.crc32(data) != checksum:
                print(f"warning: {self.path} is damaged; decoding instead, it will be made anew", file=sys.stderr)
                self.path.unlink(missing_ok=True)
                return None
            self._checked[index] = True
        return torch.from_numpy(data).view(height, width, 3).permute(2, 0, 1)

    def _header(self):
        with open(self.path, "rb") as file:
            return file.read(HEADER_BYTES)

    def _read_at(self, offset, length):
        if self._process != os.getpid():  # a forked worker must not share the position in the file
            self._file, self._process = open(self.path, "rb", buffering=0), os.getpid()  # noqa: SIM115
        data = np.empty(length, np.uint8)
        self._file.seek(offset)
        read = self._file.readinto(data)
        data[read:] = 0  # a file cut short is found out by its checksum
        return data


def cache_path(data_list, side):
    """Where the cache lies: beside the list, a name for each stored size."""
    path = Path(data_list.path)
    return path.with_name(f"{path.stem}.{side or 'whole'}.pixels")


def cache_identity(data_list, side):
    """32 bytes that differ when the listed images, their files' sizes or times, or the stored size differ."""
    digest = hashlib.blake2b(FORMAT + f"{data_list.image_root.resolve()} {side}".encode(), digest_size=32)
    for array in (data_list.file_names.data, data_list.file_names.ends, data_list.sizes, data_list.apply_exif):
        digest.update(np.ascontiguousarray(array))
    for index in range(len(data_list)):
        try:
            status = data_list.image_path(index).stat()
        except OSError:
            continue  # reading it will say so
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.digest()


def stored_sizes(sizes, side):
    """(n, 2) height and width: the shorter one at most `side`, if that is not 0."""
    if not side:
        return sizes.astype(np.int64)
    scale = np.minimum(1, side / sizes.min(axis=1, keepdims=True))
    return np.rint(sizes * scale).astype(np.int64).clip(min=1)


def _total_bytes(sizes):
    return HEADER_BYTES + len(sizes) * ROW.itemsize + 3 * int(sizes.prod(axis=1).sum())


def _fits(path, identity, sizes):
    """Whether the file is whole and of these images."""
    if not path.is_file() or path.stat().st_size != _total_bytes(sizes):
        return False
    with open(path, "rb") as file:
        return file.read(48) == FORMAT + identity


def _no_room(path, sizes):
    free = shutil.disk_usage(path.parent).free
    return InputError(
        f"{path} takes {_total_bytes(sizes) / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free: make room, store "
        "images smaller (--set cache_side=400), or do without (--cache off)"
    )


def _write(path, data_list, sizes, identity):
    path.unlink(missing_ok=True)  # stale: its room may be needed
    if shutil.disk_usage(path.parent).free < _total_bytes(sizes):
        raise _no_room(path, sizes)
    print(f"{path}: decoding {len(sizes)} images once, {_total_bytes(sizes) / 1e9:.2f} GB", file=sys.stderr)
    table = np.zeros(len(sizes), ROW)
    table["height"], table["width"] = sizes.T
    lengths = 3 * sizes.prod(axis=1)
    table["offset"] = HEADER_BYTES + table.nbytes + np.cumsum(lengths) - lengths

    def decoded(index):
        image, (height, width) = data_list.read_image(index), sizes[index].tolist()
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        data = image.tobytes()
        return data, zlib.crc32(data)

    unfinished = Path(f"{path}.unfinished")  # of the one process that holds the lock, or of one that was killed
    try:
        with open(unfinished, "wb") as file:
            file.write((FORMAT + identity + len(sizes).to_bytes(8, "little")).ljust(HEADER_BYTES, b"\0"))
            file.write(table)
            results = map_in_threads(decoded, range(len(sizes)))
            bar = tqdm(results, total=len(sizes), desc="decoding", unit="image", disable=None)
            for index, (data, checksum) in enumerate(bar):
                file.write(data)
                table["checksum"][index] = checksum
            file.seek(HEADER_BYTES)
            file.write(table)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
