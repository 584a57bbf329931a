"""Image files -> RGB pixels; what cannot be read is a DataError that names the file."""

import contextlib

import numpy as np
import torch
from PIL import Image, ImageOps

from fpnssd.data.augment import FILL, resize
from utils import InputError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_PIXELS = 89_000_000  # of one image: more is refused before any of it is decoded

Image.init()  # all of PIL's formats are known from here on


class DataError(InputError):
    """A data list or an image that cannot be used; says which, and what to do. kind: what it is, without names."""

    def __init__(self, message, kind="unusable"):
        super().__init__(message)
        self.kind = kind


@contextlib.contextmanager
def open_image(path, name=None, max_pixels=MAX_PIXELS):
    """A PIL image, not yet decoded, for a with block; what goes wrong inside is a DataError that names the file.

    path: or an open file, with a name for it.
    """
    file, path = path, name or path
    try:
        formats = [name for name in Image.ID if name != "EPS"]  # for that one PIL starts Ghostscript, and waits for it
        with Image.open(file, formats=formats) as image:
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
