"""Reading image files: which are images, which are opened at all, and what of a damaged or hostile file is refused."""

import io
import os
import tracemalloc
import warnings
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
    _warn_once,
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
        ".txt": 2, "no ending": 1, "._*": 1, "Thumbs.db": 1, ".DS_Store": 1, ".ipynb_checkpoints": 1, ".mp4": 1,
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
    _warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for path in sorted(tmp_path.iterdir()):
            load_image(path)
    sentences = [str(warning.message) for warning in said]
    assert sum("are stretched" in sentence for sentence in sentences) == 1
    assert [sentence for sentence in sentences if "few.png has 8 grey levels" in sentence]
    assert len(sentences) == 2


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
