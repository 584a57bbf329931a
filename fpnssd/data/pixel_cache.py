"""Decoded images of a data list in one file, which all worker processes read: training decodes each JPEG only once.

    cache = PixelCache.build(data_list)  # decodes all images, unless the file exists already
    pixels = cache.read(0)  # uint8 (3, H, W)

The file holds the pixels alone, 3 bytes each, one image after another. Its name ends in a key of the images that went
in, and it gets that name only when it is whole. It is read, not mapped into memory: a mapped page counts as memory of
each worker that has touched it, and a truncated file would kill the worker.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fpnssd.data.data_list import DataList
from fpnssd.data.threads import map_in_threads
from utils import InputError

ABANDONED = 600  # seconds without a write after which an unfinished file is left over from a build that was killed


class PixelCache:
    """The decoded images of a data list.

    Args:
        path: of the file.
        sizes: (n, 2) int64, height and width of each image in it.
    """

    def __init__(self, path: Path, sizes: np.ndarray):
        self.path, self.sizes = path, sizes
        self.ends = np.cumsum(3 * sizes.prod(axis=1))

    @classmethod
    def build(cls, data_list: DataList, side: int = 0, wait: bool = False) -> "PixelCache":
        """Returns the cache of a data list, which is created beside the list unless there is one of the same images.

        Args:
            data_list: whose images to decode.
            side: images whose shorter side is longer are stored shrunk to it; 0 stores all of them whole.
            wait: wait until another process has created the file, as all but one process per machine do in a training.

        Raises:
            DataError: an image cannot be read.
            InputError: the disk is full, or the file cannot be written.
        """
        sizes = stored_sizes(data_list.sizes, side)
        path = cache_path(data_list, side)
        cache = cls(path, sizes)
        while wait and not cache._is_whole():
            time.sleep(1)
        try:
            if not cache._is_whole():
                _delete_stale(path)
                cache._write(data_list)
        except OSError as error:
            sentence = f"cannot cache pixels in {path}: {error}; make room, or use --cache off"
            raise InputError(sentence) from error
        return cache

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_bytes(self) -> int:
        return int(self.ends[-1]) if len(self) else 0

    def read(self, index: int) -> torch.Tensor | None:
        """Returns an image as uint8 (3, H, W), channels last in memory; None if the file was deleted or truncated."""
        height, width = self.sizes[index].tolist()
        count = 3 * height * width
        try:
            pixels = np.fromfile(self.path, np.uint8, count, offset=int(self.ends[index]) - count)
        except FileNotFoundError:  # a build for changed images deleted it
            return None
        return torch.from_numpy(pixels).view(height, width, 3).permute(2, 0, 1) if len(pixels) == count else None

    def _is_whole(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.num_bytes

    def _write(self, data_list: DataList) -> None:
        if (free := shutil.disk_usage(self.path.parent).free) < self.num_bytes:
            raise InputError(
                f"{self.path} takes {self.num_bytes / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free: make "
                "room, store images smaller (--set cache_side=400), or use --cache off"
            )
        print(f"{self.path}: decoding {len(self)} images once, {self.num_bytes / 1e9:.2f} GB", file=sys.stderr)

        def decode(index: int) -> bytes:
            image, (height, width) = data_list.read_image(index), self.sizes[index].tolist()
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            return image.tobytes()

        # Two builds at once each write a file of their own, and the second one to finish replaces the first one's.
        unfinished = Path(f"{self.path}.{secrets.token_hex(4)}.unfinished")
        try:
            with open(unfinished, "xb") as file:
                decoded = map_in_threads(decode, range(len(self)))
                for pixels in tqdm(decoded, total=len(self), desc="decoding", unit="image", disable=None):
                    file.write(pixels)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)


def stored_sizes(sizes: np.ndarray, side: int) -> np.ndarray:
    """Returns (n, 2) int64 height and width, shrunk so that the shorter one is at most `side`; 0 shrinks none."""
    if not side:
        return sizes.astype(np.int64)
    scale = np.minimum(1, side / sizes.min(axis=1, keepdims=True))
    return np.rint(sizes * scale).astype(np.int64).clip(min=1)


def cache_path(data_list: DataList, side: int) -> Path:
    """Returns the path of a list's cache: LIST.SIDE.KEY.pixels beside the list.

    The key is another one if the order, name, size in pixels or bytes, time or EXIF turn of any image changes.
    """
    digest = hashlib.blake2b(digest_size=8)
    for index, (height, width) in enumerate(data_list.sizes.tolist()):
        try:
            status = os.stat(data_list.image_path(index))
            file = (status.st_size, status.st_mtime_ns)
        except OSError:  # reported when the image is read
            file = (0, 0)
        turned = bool(data_list.apply_exif[index])
        digest.update(repr((data_list.file_names[index], height, width, turned, *file)).encode())
    list_path = Path(data_list.path)
    return list_path.with_name(f"{list_path.stem}.{side or 'whole'}.{digest.hexdigest()}.pixels")


def _delete_stale(path: Path) -> None:
    """Deletes what `path` replaces: caches of this list and side with another key, and files of killed builds."""
    list_and_side = path.name.rsplit(".", 2)[0]
    own = re.compile(re.escape(list_and_side) + r"\.[0-9a-f]{16}\.pixels(\.[0-9a-f]{8}\.unfinished)?")
    for other in path.parent.iterdir():
        match = own.fullmatch(other.name)
        with contextlib.suppress(FileNotFoundError):  # another build may end meanwhile
            if match and (not match[1] or time.time() - other.stat().st_mtime > ABANDONED):
                other.unlink()
