"""Find image files and read them as RGB; what cannot be read raises a DataError that names the file."""

import contextlib
import io
import os
from collections import Counter, deque
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from fpnssd.data.augment import FILL, resize
from utils import InputError

try:
    import pillow_heif
except ImportError:  # optional: without it, HEIC and HEIF files are passed over
    pass
else:
    pillow_heif.register_heif_opener()

Image.init()  # registers Pillow's own formats

# The raster formats that Pillow decodes itself. Never add one whose plugin starts another program (EPS), draws (WMF),
# opens a picture inside of the file by itself (IPTC, ICO, ICNS, FITS, MIC), or only recognises its files (GRIB, MPEG).
_WANTED = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000", "MPO", "TGA", "PPM", "HEIF")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)  # MPO has no opener: its files are opened as JPEG
IMAGE_SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _WANTED)
MAX_PIXELS = 89_000_000  # of one image: more is refused before any of it is decoded

_JUNK_FOLDERS = {".ipynb_checkpoints"}
_JUNK_FILES = {"thumbs.db": "Thumbs.db", ".ds_store": ".DS_Store"}


class DataError(InputError):
    """A data list or an image that cannot be used; says which, and what to do. kind: what it is, without names."""

    def __init__(self, message, kind="unusable"):
        super().__init__(message)
        self.kind = kind


def is_image_name(path: str | os.PathLike) -> bool:
    """Whether a file's name ends as an image's does, in upper or lower case."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def find_images(folder: str | os.PathLike, suffixes=IMAGE_SUFFIXES) -> tuple[list[Path], Counter]:
    """Lists the image files in a folder and the folders below it.

    Linked folders are followed, each real folder once, so that a link to a parent does no harm.

    Args:
        folder: where to look.
        suffixes: endings to look for, in lower case with their dot; names are compared in lower case.

    Returns:
        The files' paths, sorted, each beginning with `folder`; and how many files were passed over, by their ending in
        lower case ("no ending" for none). What systems and notebooks leave behind is passed over too, and counted as
        ".ipynb_checkpoints", "._*", "Thumbs.db" and ".DS_Store".

    Raises:
        DataError: a folder cannot be listed.
    """
    images, passed_over = [], Counter()
    folders, links, seen = [Path(folder)], deque(), set()
    while folders or links:  # links last: a folder keeps its own name where a link leads to it too
        current = folders.pop() if folders else links.popleft()
        if (real := os.path.realpath(current)) in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.listdir(current))
        except OSError as error:
            raise DataError(f"folder {current} cannot be listed: {error.strerror}") from error
        for entry in entries:
            path, name = current / entry, entry.lower()
            if os.path.isdir(path):
                if name in _JUNK_FOLDERS:
                    passed_over[name] += sum(len(files) for _, _, files in os.walk(path))
                else:
                    (links if path.is_symlink() else folders).append(path)
            elif name.startswith("._") or name in _JUNK_FILES:
                passed_over[_JUNK_FILES.get(name, "._*")] += 1
            elif path.suffix.lower() in suffixes:
                images.append(path)
            else:
                passed_over[path.suffix.lower() or "no ending"] += 1
    return sorted(images), passed_over


@contextlib.contextmanager
def open_image(path, name=None, max_pixels=MAX_PIXELS):
    """A PIL image, not yet decoded, for a with block; what goes wrong inside is a DataError that names the file.

    path: or an open file, with a name for it.
    """
    file, path = path, name or path
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, more than {max_pixels:,}")
            yield image
    except FileNotFoundError:
        raise DataError(f"image {path} is missing", "image missing") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"image {path} is no image that can be read", "file is no image") from None
    except Image.DecompressionBombError as error:  # raised before anything is decoded
        raise DataError(f"image {path} is refused, shrink it or cut it up: {error}", "image too large") from None
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly anything: struct.error, TypeError, RuntimeError
        raise DataError(f"image {path} is damaged: {error}", "image damaged") from error


def read_image(path, apply_exif=False):
    """A decoded RGB PIL image, turned by its EXIF orientation if asked to; DataError names the file otherwise."""
    with open_image(path) as image:
        return to_rgb(ImageOps.exif_transpose(image) if apply_exif else image)


def to_rgb(image):
    """A PIL image of any kind as 8-bit RGB: 16 bits lose their lower half, what is transparent gets the fill colour."""
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would cut it off at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, FILL)
        return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def to_pixels(image):
    """An RGB PIL image as uint8 (3, H, W), lying channels last."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def fit_image(image, side):
    """The whole RGB PIL image squashed to uint8 (3, side, side): what the network sees outside training."""
    return resize(to_pixels(image), side, side)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of any kind


def load_image(picture, name="from bytes", max_pixels=MAX_PIXELS):
    """An upright RGB PIL image of a path, PIL image, bytes, numpy array or tensor; InputError otherwise.

    Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8, uint16 or float 0..1; tensors (3, H, W) or (1, H, W)
    uint8 or float 0..1. What is given is never changed. 16 bits lose their lower half, transparency is filled.
    name: of bytes, for messages. max_pixels: files with more are refused before they are decoded.
    """
    if isinstance(picture, (str, os.PathLike)):
        with open_image(picture, max_pixels=max_pixels) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    if isinstance(picture, (bytes, bytearray, memoryview)):
        with open_image(io.BytesIO(picture), name, max_pixels) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    if isinstance(picture, Image.Image):
        if picture.width * picture.height > MAX_PIXELS:
            raise DataError(f"a picture of {picture.width} x {picture.height} pixels is refused: shrink it")
        try:
            return to_rgb(ImageOps.exif_transpose(picture))
        except MemoryError:
            raise
        except Exception as error:  # as in open_image
            raise DataError(f"a picture is damaged: {error}") from error
    if isinstance(picture, torch.Tensor):
        if picture.dim() != 3 or picture.shape[0] not in (1, 3):
            raise InputError(f"a tensor of shape {tuple(picture.shape)} is no picture: (3, H, W) or (1, H, W)")
        if picture.is_floating_point():
            picture = picture.float()  # numpy knows no bfloat16
        picture = picture.detach().cpu().permute(1, 2, 0).numpy()
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    raise InputError(f"a {type(picture).__name__} is no picture: a path, bytes, PIL image, array or tensor is")


def _from_array(array):
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise InputError(f"an array of shape {array.shape} is no picture: (H, W), (H, W, 3) or (H, W, 4)")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise InputError(f"an array of {array.shape[1]} x {array.shape[0]} pixels is refused: shrink it")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise InputError("an array of floats has to lie in 0..1 and be finite")
        array = (array * 255).round()
    elif array.dtype == np.uint16:
        array = array // 257
    elif array.dtype != np.uint8:
        raise InputError(f"an array of {array.dtype} is no picture: uint8, uint16 or float 0..1 is")
    return to_rgb(Image.fromarray(array.astype(np.uint8)))
