"""Finds image files and reads them as RGB; a file that cannot be read raises a DataError with its name."""

import contextlib
import io
import os
import warnings
from collections import Counter, deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from fpnssd.data.augment import FILL, resize
from fpnssd.data.image_headers import ORIENTATION, HeaderError, exif_orientation, exif_with, prepare
from utils import InputError

try:
    import pillow_heif  # type: ignore[import-not-found]
except ImportError:  # optional: without it, HEIC and HEIF files are skipped
    pass
else:
    pillow_heif.register_heif_opener()

Image.init()  # registers Pillow's own formats

# The raster formats that Pillow decodes itself. Never add one whose plugin starts another program (EPS), renders
# vectors (WMF), opens an embedded picture (IPTC, ICO, ICNS, FITS, MIC), or only identifies its files (GRIB, MPEG).
_WANTED = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000", "MPO", "TGA", "PPM", "HEIF")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)  # MPO has no opener: its files are opened as JPEG
IMAGE_SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _WANTED)
MAX_PIXELS = 89_000_000  # per image: larger ones are refused before they are decoded
MAX_SIDE = 65_535  # as in JPEG; fit_image takes memory for the longer side times the network's

SLOW_PIXELS = 2_000_000  # per image of a format that Pillow decodes in Python, seconds per megapixel


class DataError(InputError):
    """A data list or an image that cannot be used.

    Args:
        message: names the file and says what to do.
        kind: the problem without names, for counting.
    """

    def __init__(self, message: str, kind: str = "unusable"):
        super().__init__(message)
        self.kind = kind


class ImageWarning(UserWarning):
    """An image lost much of its content in the conversion to 8 bits."""


def is_image_name(path: str | os.PathLike) -> bool:
    """Whether a file name has the ending of an image, in upper or lower case."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def find_images(
    folder: str | os.PathLike, suffixes: Collection[str] = IMAGE_SUFFIXES
) -> tuple[list[Path], Counter[str]]:
    """Lists the image files in a folder and the folders below it.

    Symbolic links are followed, but each real folder is listed only once, so a link to a parent is harmless.

    Args:
        folder: folder to search.
        suffixes: endings to search for, in lower case with their dot; names are compared in lower case.

    Returns:
        The files' paths, sorted, each beginning with `folder`; and the number of skipped files by their ending in
        lower case ("no ending" for none). Hidden files and folders, whose names begin with a dot, count as "hidden".

    Raises:
        DataError: a folder cannot be listed.
    """
    images: list[Path] = []
    skipped: Counter[str] = Counter()
    folders, links, seen = [Path(folder)], deque[Path](), set[str]()
    while folders or links:  # links last, so that a folder that is also linked keeps its own path
        current = folders.pop() if folders else links.popleft()
        if (real := os.path.realpath(current)) in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.listdir(current))
        except OSError as error:
            raise DataError(f"folder {current} cannot be listed: {error.strerror}") from error
        for entry in entries:
            path = current / entry
            if entry.startswith("."):
                skipped["hidden"] += 1
            elif os.path.isdir(path):
                (links if path.is_symlink() else folders).append(path)
            elif path.suffix.lower() in suffixes:
                images.append(path)
            else:
                skipped[path.suffix.lower() or "no ending"] += 1
    return sorted(images), skipped


@contextlib.contextmanager
def open_image(
    source: str | os.PathLike | BinaryIO,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int | None = None,
) -> Iterator[Image.Image]:
    """A context manager that opens an image, not yet decoded, with its metadata reduced to the EXIF orientation.

    Args:
        source: a path, or a file open for reading.
        name: name of the image in messages; by default its path.
        max_pixels: an image with more is refused before it is decoded, as one with a side above MAX_SIDE is.
        max_bytes: an image is refused whose decoding would take more memory (see decoding_bytes); None for no limit.

    Raises:
        DataError: for any error here or in the with block, with the image's name.
    """
    name = name or str(source)
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(source, "rb")) if isinstance(source, (str, os.PathLike)) else source
            image = stack.enter_context(Image.open(prepare(file), formats=FORMATS))
            if isinstance(exif := image.info.get("exif"), bytes):
                image.info["exif"] = exif_with(exif_orientation(exif))
            # Pillow reads 16 bits a channel of a colour image as 8, by leaving out the lower ones.
            image.info["16 bits"] = image.mode in ("RGB", "RGBA") and ";16" in str(image.tile)
            if max(image.size) > MAX_SIDE:
                sentence = f"{image.width} x {image.height} pixels, with a side of more than {MAX_SIDE:,}"
                raise Image.DecompressionBombError(sentence)
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, more than {max_pixels:,}")
            if image.tile and image.tile[0][0] == "ppm" and image.width * image.height > SLOW_PIXELS:
                raise HeaderError("its samples have another maximum than 255 or 65,535, which takes too long to decode")
            if max_bytes is not None and (needed := decoding_bytes(image)) > max_bytes:
                sentence = f"{image.width} x {image.height} pixels of {image.format} take {needed / 1e6:.0f} MB"
                raise Image.DecompressionBombError(f"{sentence}, more than {max_bytes / 1e6:.0f}")
            yield image
    except FileNotFoundError:
        raise DataError(f"image {name} is missing", "image missing") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"image {name} is not a readable image", "file is not an image") from None
    except Image.DecompressionBombError as error:  # raised before anything is decoded
        raise DataError(f"image {name} is refused, shrink it or cut it up: {error}", "image too large") from None
    except HeaderError as error:
        raise DataError(f"image {name} is refused: {error}", "image damaged") from None
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders may raise nearly any exception: struct.error, TypeError, RuntimeError
        raise DataError(f"image {name} is damaged: {error}", "image damaged") from error


# Maximum bytes per pixel of decoders, the RGB result (4) included, measured with Pillow 12.3 and 12 megapixels.
_DECODER_COST = {"JPEG2000": 26, "AVIF": 20, "WEBP": 18, "TIFF": 17, "HEIF": 20}


def decoding_bytes(image: Image.Image) -> int:
    """Estimates the maximum memory of load_image for an image that open_image has opened."""
    bands = len(image.getbands())
    cost = 5 if image.mode in ("1", "L", "P", "RGB") and not image.has_transparency_data else 10
    if image.info.get("progressive"):  # libjpeg keeps all coefficients, 2 bytes each
        cost += 2 * bands
    if orientation(image) > 1:  # a turned copy
        cost += max(bands, 4)
    return max(cost, _DECODER_COST.get(image.format or "", 0)) * image.width * image.height


def read_image(path: str | os.PathLike, apply_exif: bool = False) -> Image.Image:
    """Returns the decoded RGB image of a file, turned by its EXIF orientation if apply_exif.

    Raises:
        DataError: the file is missing, damaged, too large or not an image; the message names it.
    """
    with open_image(path) as image:
        return to_rgb(upright(image) if apply_exif else image, str(path))


def load_image(
    source: "str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor",
    name: str = "from bytes",
    max_pixels: int = MAX_PIXELS,
    max_bytes: int | None = None,
) -> Image.Image:
    """Returns an upright RGB image (by its EXIF orientation) from a file, PIL image, array or tensor.

    Args:
        source: a path, the bytes of a file, a PIL image, a numpy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of
            uint8, uint16 or floats 0..1, or a tensor (3, H, W) or (1, H, W) of uint8 or floats 0..1. Channels are RGB
            or RGBA; OpenCV's arrays are BGR: give array[..., ::-1].
        name: name of an image of bytes in messages.
        max_pixels, max_bytes: as for open_image, for paths and bytes.

    Returns:
        A PIL image, mode RGB. `source` is never changed, but an upright RGB PIL image is returned itself: copy it
        before you draw on it. More than 8 bits a channel become 8 as to_rgb says; transparency is filled.

    Raises:
        InputError: it is not an image; a DataError, with its name, if it is a file that cannot be read.
    """
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        is_path = isinstance(source, (str, os.PathLike))
        file, name = (source, str(source)) if is_path else (io.BytesIO(source), name)
        with open_image(file, name, max_pixels, max_bytes) as image:
            return to_rgb(upright(image), f"image {name}")
    if isinstance(source, Image.Image):
        if source.width * source.height > MAX_PIXELS:
            raise DataError(f"an image of {source.width} x {source.height} pixels is refused: shrink it")
        try:
            return to_rgb(upright(source))
        except MemoryError:
            raise
        except Exception as error:  # as in open_image
            raise DataError(f"an image is damaged: {error}") from error
    if isinstance(source, torch.Tensor):
        if source.dim() != 3 or source.shape[0] not in (1, 3):
            raise InputError(
                f"a tensor of shape {tuple(source.shape)} is not an image: expected (3, H, W) or (1, H, W)"
            )
        if source.is_floating_point():
            source = source.float()  # numpy has no bfloat16
        source = source.detach().cpu().permute(1, 2, 0).numpy()
    if isinstance(source, np.ndarray):
        return _from_array(source)
    raise InputError(
        f"an object of type {type(source).__name__} is not an image: pass a path, bytes, PIL image, array or tensor"
    )


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise InputError(f"an array of shape {array.shape} is not an image: expected (H, W), (H, W, 3) or (H, W, 4)")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise InputError(f"an array of {array.shape[1]} x {array.shape[0]} pixels is refused: shrink it")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise InputError("an array of floats must be finite and in 0..1")
        array = (array * 255).round()
    elif array.dtype == np.uint16:
        low, high = _grey_range(int(array.min()), int(array.max()), (0, 65535))
        array = _to_grey_levels(array, low, high)
    elif array.dtype != np.uint8:
        raise InputError(f"an array of {array.dtype} is not an image: expected uint8, uint16 or floats in 0..1")
    return to_rgb(Image.fromarray(array.astype(np.uint8)))


# ---------------------------------------------------------------------------------------------------------------------
# Pixels

_TURN = Image.Transpose
_TURNS = dict(  # by EXIF orientation
    enumerate((_TURN.FLIP_LEFT_RIGHT, _TURN.ROTATE_180, _TURN.FLIP_TOP_BOTTOM, _TURN.TRANSPOSE, _TURN.ROTATE_270,
               _TURN.TRANSVERSE, _TURN.ROTATE_90), start=2)
)  # fmt: skip


def orientation(image: Image.Image) -> int:
    """Returns an image's EXIF orientation, 1 (upright) to 8; also 1 if it has none or its EXIF block is broken."""
    if isinstance(exif := image.info.get("exif"), bytes):
        return exif_orientation(exif)
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # struct.error, ValueError, SyntaxError and more
        return 1
    return value if value in range(1, 9) else 1


def upright(image: Image.Image) -> Image.Image:
    """Returns an image turned by its EXIF orientation; the image itself if it is upright."""
    image.load()  # which already turns a TIFF
    turn = _TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, name: str = "an image") -> Image.Image:
    """Returns a PIL image of any mode as 8-bit RGB; the image itself if it is that already.

    Transparency is filled with the mean colour FILL. More than 8 bits per channel are reduced by one rule:

    - The full scale is that of the file: SMinSampleValue and SMaxSampleValue of a TIFF, else its bits per sample,
      else 0..65535 for 16 bits (a value becomes value // 257); 0..1 for floats within it. Integers of 32 bits and
      other floats have the smallest of 0..255, 0..65535 and 0..2^32 - 1 that holds them.
    - Where no pixel reaches a quarter of it, or where it leaves fewer than 16 grey levels, as for a thermal camera or
      12 bits stored in 16, the image's own minimum and maximum become 0 and 255; a warning says so once in a process.
    - An image with fewer than 16 grey levels after that is reported in a warning.
    - Colours of 16 bits keep their upper 8; an image with at most 16 levels after that, as of 12 bits, is reported too.

    Args:
        image: decoded or not.
        name: name of the image in warnings.
    """
    image.load()
    if image.info.get("16 bits") and (levels := _count_levels(image)) <= 16:
        sentence = (
            f"{name} is dark or flat: {levels} levels are left of its 16 bits a channel; stretch its range beforehand"
        )
        warnings.warn(sentence, ImageWarning, stacklevel=2)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":
        return _grey_to_rgb(image, name)
    if image.has_transparency_data:
        opaque = Image.new("RGB", image.size)
        for top, band in _bands(image):
            band = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", band.size, FILL), band)
            opaque.paste(band.convert("RGB"), (0, top))
        return opaque
    return image.convert("RGB")


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yields (first row, copy) of horizontal bands of an image of about a megapixel, so that no whole copy is made."""
    rows = max(1, 2**20 // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _grey_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image of mode I, I;16 or F as RGB, by the rule in to_rgb."""
    ends = np.array([(band.min(), band.max()) for _, band in _value_bands(image)], dtype=np.float64)
    smallest, largest = float(ends.min()), float(ends.max())
    low, high = _grey_range(smallest, largest, _full_scale(image, smallest, largest))
    grey = Image.new("L", image.size)
    for top, band in _value_bands(image):
        grey.paste(Image.fromarray(_to_grey_levels(band, low, high)), (0, top))
    if (levels := _count_levels(grey)) < 16:
        warnings.warn(f"{name} has {levels} grey levels ({smallest:g} to {largest:g})", ImageWarning, stacklevel=2)
    return grey.convert("RGB")


def _count_levels(image: Image.Image) -> int:
    """The number of distinct values in 0..255 of an image of mode L, RGB or RGBA."""
    return int(np.reshape(image.histogram(), (-1, 256))[:3].any(axis=0).sum())


def _value_bands(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """The bands as arrays (rows, W) of their own type, values that are not finite as 0."""
    for top, band in _bands(image):
        yield top, np.nan_to_num(np.asarray(band), posinf=0, neginf=0)


def _full_scale(image: Image.Image, smallest: float, largest: float) -> tuple[float, float]:
    """The values of black and white in a grey image of more than 8 bits."""
    tags = getattr(image, "tag_v2", {})
    try:
        low, high = (float(np.ravel(tags[tag])[0]) for tag in (340, 341))  # SMinSampleValue, SMaxSampleValue
        if np.isfinite([low, high]).all() and low < high:
            return low, high
    except (KeyError, IndexError, TypeError, ValueError):
        pass
    if image.mode.startswith("I;16"):
        bits = tags.get(258, (16,))[0]
        return 0, 2 ** (bits if 8 < bits <= 16 else 16) - 1
    choices = [1, 255, 65535, 2**32 - 1] if image.mode == "F" else [255, 65535, 2**32 - 1]
    fitting = [high for high in choices if smallest >= 0 and largest <= high]
    return (0, fitting[0]) if fitting else (smallest, largest)


def _grey_range(smallest: float, largest: float, full: tuple[float, float]) -> tuple[float, float]:
    """The values that become 0 and 255, by the rule in to_rgb; warns where they are not those of the full scale."""
    low, high = full
    dark, flat = largest - low < (high - low) / 4, (largest - smallest) * 255 < 16 * (high - low)
    if not (dark or flat) or smallest == largest:
        return low, high
    sentence = "images of more than 8 bits that would be nearly black or flat are stretched to their own range"
    warnings.warn(sentence, ImageWarning, stacklevel=1)  # stacklevel 1, so that Python prints it once
    return smallest, largest


def _to_grey_levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of values between low and high, rounded down if they are integers: value // 257 for 0..65535."""
    levels = (values.astype(np.float64) - low) * 255 / ((high - low) or 1)
    if values.dtype.kind == "f":
        levels = levels.round()
    return levels.clip(0, 255).astype(np.uint8)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Returns an RGB PIL image as uint8 (3, H, W), channels last in memory."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top, band in _bands(image):
        pixels[top : top + band.height] = np.asarray(band)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def fit_image(image: Image.Image, side: int) -> torch.Tensor:
    """Returns an RGB PIL image squashed to uint8 (3, side, side): the network's input outside of training."""
    # To avoid a full copy of a large image, its bands are resized in width first, then all together in height.
    rows = [resize(to_pixels(band), side, band.height).permute(1, 2, 0) for _, band in _bands(image)]
    return resize(torch.cat(rows).permute(2, 0, 1), side, side)
