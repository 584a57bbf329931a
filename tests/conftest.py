"""What several test files build on: where the real photographs are, and a small data set drawn once."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from create_data_lists import create_data_lists
from fpnssd.data import check_report
from fpnssd.data.synthetic import draw_dataset
from fpnssd.data.voc import read_voc
from fpnssd.training import pictures, progress
from utils import write_text

CHROMIUM = "/usr/bin/chromium"
DRAW_REPORT = check_report.draw_report
SHARED = Path(os.environ.get("FPNSSD_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def voc_real():
    """Real photographs in VOC's layout; the test skips where they are not."""
    folder = SHARED / "VOCdevkit" / "VOCreal"
    if not folder.is_dir():
        pytest.skip("no photographs in ../shared or FPNSSD_SHARED")
    return folder


@pytest.fixture(scope="session")
def bccd():
    """The blood cells in VOC's layout; the test skips where they are not."""
    folder = SHARED / "BCCD"
    if not folder.is_dir():
        pytest.skip("no photographs in ../shared or FPNSSD_SHARED")
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A folder with a drawn VOC folder (voc) of 12 and 6 images, and its data lists (train.json, val.json)."""
    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder / "voc", {"train": 12, "val": 6}, seed=3)
    create_data_lists([read_voc([folder / "voc"], split) for split in ("train", "val")], folder, picture=False)
    for name in ("train.json", "val.json"):  # absolute, so that tests can copy a list without its images
        content = json.loads((folder / name).read_text())
        content["info"]["image_root"] = str(folder / "voc" / "JPEGImages")
        write_text(folder / name, json.dumps(content), "data list")
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_check_picture():
    """create_data_lists draws no check.png, which takes most of its time on a small data set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_report, "draw_report", lambda report, path: None)
        yield


@pytest.fixture
def check_picture(monkeypatch):
    """create_data_lists draws check.png."""
    monkeypatch.setattr(check_report, "draw_report", DRAW_REPORT)


@pytest.fixture(scope="session", autouse=True)
def no_training_pictures():
    """Trainings draw neither curves nor detections, which takes most of the time of a tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "draw_curves", lambda log, path: None)
        patch.setattr(progress, "draw_detections", lambda *arguments: Image.new("RGB", (8, 8)))
        yield


@pytest.fixture
def training_pictures(monkeypatch):
    """Trainings draw curves and detections."""
    monkeypatch.setattr(progress, "draw_curves", pictures.draw_curves)
    monkeypatch.setattr(progress, "draw_detections", pictures.draw_detections)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")  # a loader's worker that outlives its test would hold the browser's pipes open
def browser():
    """Debian's Chromium without a window, one for a test file. Where it is missing the test skips; in CI it fails."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).is_file():
        if os.environ.get("CI"):
            pytest.fail(f"{CHROMIUM} is missing: .ci/run installs it")
        pytest.skip(f"no {CHROMIUM} here (Debian: apt-get install chromium)")
    arguments = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()
