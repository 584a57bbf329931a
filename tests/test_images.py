"""Reading image files: which are images, which are opened at all, and what of a damaged or hostile file is refused."""

import io
import os
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpnssd.data.augment import resize
from fpnssd.data.images import (
    FORMATS,
    IMAGE_SUFFIXES,
    DataError,
    ImageWarning,
    find_images,
    fit_image,
    is_image_name,
    load_image,
    to_pixels,
)


def test_formats_are_those_that_decode_their_own_pixels():
    # From reading Pillow's plugins: these start programs, draw, open a file inside of the file, or are stubs.
    assert not {"EPS", "WMF", "IPTC", "ICO", "ICNS", "FITS", "MIC", "FPX", "MPEG", "GRIB", "BUFR", "HDF5"} & set(
        FORMATS
    )
    assert {".jpg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff", ".jp2"} <= IMAGE_SUFFIXES
    assert {".mpo", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"} <= IMAGE_SUFFIXES
    assert not {".eps", ".ps", ".pdf", ".wmf", ".emf", ".mpg", ".iim", ".ico", ".icns", ".fits"} & IMAGE_SUFFIXES
    assert is_image_name("Photo.JPG")
    assert is_image_name(Path("a/b.Tif"))
    assert not is_image_name("jpg")


def test_find_images_walks_folders_in_order_and_counts_the_rest(tmp_path):
    for name in (
        "b.JPG", "a/c.webp", "a/deep/er/d.Jfif", "z.txt", "a/Z.TXT", "README", "._b.jpg", "Thumbs.db", "a/.DS_Store",
        ".ipynb_checkpoints/b-checkpoint.jpg", "a/movie.mp4",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    images, passed_over = find_images(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in images] == ["a/c.webp", "a/deep/er/d.Jfif", "b.JPG"]
    assert passed_over == {
        ".txt": 2, "no ending": 1, "hidden": 3, ".db": 1, ".mp4": 1,
    }  # fmt: skip
    images, passed_over = find_images(tmp_path, IMAGE_SUFFIXES | {".mp4"})
    assert tmp_path / "a/movie.mp4" in images
    assert ".mp4" not in passed_over


def test_find_images_follows_each_linked_folder_once(tmp_path):
    inside, elsewhere = tmp_path / "inside", tmp_path / "elsewhere"
    for folder in (inside / "z_real", elsewhere):
        folder.mkdir(parents=True)
        (folder / "photo.jpg").touch()
    (inside / "a_link").symlink_to(inside / "z_real", target_is_directory=True)
    (inside / "away").symlink_to(elsewhere, target_is_directory=True)
    (inside / "z_real" / "up").symlink_to(inside, target_is_directory=True)
    (elsewhere / "back").symlink_to(inside, target_is_directory=True)
    (inside / "itself").symlink_to(inside / "itself")
    images, _ = find_images(inside)
    assert images == [inside / "away" / "photo.jpg", inside / "z_real" / "photo.jpg"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_find_images_names_a_folder_that_it_may_not_list(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(DataError, match="closed cannot be listed"):
        find_images(tmp_path)


def test_find_images_of_no_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nowhere cannot be listed"):
        find_images(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# More than 8 bits


def grey_levels(array, **tags):
    """What load_image makes of a grey TIFF of an array, (H, W)."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "TIFF", tiffinfo=tags.get("tags", {}))
    rgb = np.asarray(load_image(stream.getvalue()))
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0]


def ramp(low, high, dtype):
    return np.linspace(low, high, 64 * 64).reshape(64, 64).astype(dtype)


def test_floats_from_0_to_1_have_their_full_scale():
    values = ramp(0, 0.8, np.float32)
    np.testing.assert_array_equal(grey_levels(values), np.rint(values.astype(np.float64) * 255))


def test_16_bits_keep_their_upper_half():
    values = ramp(0, 65_000, np.uint16)
    np.testing.assert_array_equal(grey_levels(values), values // 257)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        (ramp(0, 4095, np.uint16), 0, 4095),  # 12 bits in 16
        (ramp(7000, 9000, np.uint16), 7000, 9000),  # a thermal camera's counts
        (ramp(29_000, 31_500, np.uint16), 29_000, 31_500),  # hundredths of a kelvin
        (ramp(-20, 35, np.float32), -20, 35),  # degrees
        (ramp(100, 3000, np.int32), 100, 3000),
        (ramp(0, 2**31 - 1, np.int32), 0, 2**32 - 1),
        (ramp(0, 255, np.int32), 0, 255),
    ],
)
@pytest.mark.filterwarnings("ignore::fpnssd.data.images.ImageWarning")
def test_a_range_that_would_be_black_is_stretched(values, low, high):
    expected = (values.astype(np.float64) - low) * 255 / (high - low)
    assert abs(grey_levels(values) - expected).max() <= 1
    assert len(np.unique(grey_levels(values))) > 100


def test_the_file_says_its_range():
    values = ramp(100, 1000, np.uint16)
    expected = values.astype(np.float64) * 255 / 1200
    assert abs(grey_levels(values, tags={340: 0, 341: 1200}) - expected).max() <= 1


def test_a_stretched_range_is_said_once_and_few_levels_with_the_name(tmp_path):
    for number in range(3):
        Image.fromarray(ramp(7000, 9000 + number, np.uint16)).save(tmp_path / f"{number}.png")
    Image.fromarray(ramp(500, 507, np.uint16)).save(tmp_path / "few.png")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for path in sorted(tmp_path.iterdir()):
            load_image(path)
    sentences = [str(warning.message) for warning in said]
    assert sum("are stretched" in sentence for sentence in sentences) == 1
    assert [sentence for sentence in sentences if "few.png has 8 grey levels" in sentence]
    assert len(sentences) == 2


@pytest.mark.parametrize("form", ["png", "tif"])
def test_colours_of_16_bits_that_hold_12_are_named(tmp_path, form, recwarn):
    """Pillow keeps the upper byte alone: 0..4095 become 0..15."""
    values = ramp(0, 1, np.float64)[..., None].repeat(3, axis=2)
    for name, largest in (("full", 65_535), ("dark", 4095)):
        write_rgb16(tmp_path / f"{name}.{form}", (values * largest).astype(np.uint16))
    assert np.asarray(load_image(tmp_path / f"full.{form}")).max() == 255
    assert not recwarn
    assert np.asarray(load_image(tmp_path / f"dark.{form}")).max() == 15
    assert f"dark.{form} is dark or flat: 16 levels are left" in str(recwarn.pop(ImageWarning).message)


def write_rgb16(path, array):
    """A PNG or TIFF of uint16 (H, W, 3), by hand: Pillow writes none."""
    height, width, _ = array.shape
    if path.suffix == ".png":
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
        chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in (*chunks, (b"IEND", b""))))
    else:
        entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2)]
        entries += [(273, 4, 1, 128), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, array.nbytes)]
        tags = b"".join(struct.pack("<HHII", *entry) for entry in entries)
        bits = struct.pack("<3H", 16, 16, 16)
        path.write_bytes(b"II*\0" + struct.pack("<IH", 8, 9) + tags + bytes(4) + bits + array.astype("<u2").tobytes())


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_an_image_in_memory_is_not_copied():
    image = Image.new("RGB", (8, 8))
    assert load_image(image) is image


# ---------------------------------------------------------------------------------------------------------------------
# The network's input


def test_large_images_are_fitted_in_bands():
    """As exactly as in one piece, and without a copy of the whole: that would be 24 MB of numpy's memory here."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)).resize((4000, 2000))
    expected = resize(to_pixels(image), 300, 300)
    tracemalloc.start()
    fitted = fit_image(image, 300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(fitted, expected)
    assert peak < 12 * 2**20
    for size in ((1, 1), (7, 500), (500, 7), (300, 300), (299, 301)):
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        assert torch.equal(fit_image(image, 300), resize(to_pixels(image), 300, 300))
