"""Reading image files: which are images, which are opened at all, and what of a damaged or hostile file is refused."""

import os
from pathlib import Path

import pytest

from fpnssd.data.images import FORMATS, IMAGE_SUFFIXES, DataError, find_images, is_image_name


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
