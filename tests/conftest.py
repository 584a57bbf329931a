"""What several test files build on: where the real photographs are, and a small data set drawn once."""

from pathlib import Path

import pytest

from create_data_lists import create_data_lists, read_voc
from synthetic import draw_dataset

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def voc_real():
    """Real photographs in VOC's layout; the test skips where they are not."""
    folder = SHARED / "VOCdevkit" / "VOCreal"
    if not folder.is_dir():
        pytest.skip("no ../shared photographs here")
    return folder


@pytest.fixture(scope="session")
def bccd():
    """The blood cells in VOC's layout; the test skips where they are not."""
    folder = SHARED / "BCCD"
    if not folder.is_dir():
        pytest.skip("no ../shared photographs here")
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A folder with a drawn VOC folder (voc) of 12 and 6 images, and its data lists (train.json, val.json)."""
    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder / "voc", {"train": 12, "val": 6}, seed=3)
    create_data_lists([read_voc([folder / "voc"], split) for split in ("train", "val")], folder)
    return folder
