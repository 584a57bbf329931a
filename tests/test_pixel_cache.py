"""What the cache gives is what decoding gives, whatever happened to it before: stale, damaged, killed, built twice."""

import errno
import json
import multiprocessing
import os
import random
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import DetectionDataset, EpochSampler, make_loader
from fpnssd.data import pixel_cache
from fpnssd.data.augment import AugmentConfig
from fpnssd.data.data_list import DataList
from fpnssd.data.pixel_cache import PixelCache, cache_path
from utils import InputError

ROOT = Path(__file__).parents[1]


def make_list(folder, count=8, sides=(30, 90), seed=0):
    """A data list of noisy JPEGs of several sizes, one of them turned by EXIF."""
    rng = np.random.default_rng(seed)
    images = []
    for number in range(count):
        width, height = (int(side) for side in rng.integers(*sides, size=2))
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        exif = Image.Exif()
        if number == 1:
            exif[0x0112] = 6
        image.save(folder / f"{number}.jpg", exif=exif)
        if number == 1:
            width, height = height, width
        image = {"id": number, "file_name": f"{number}.jpg", "width": width, "height": height}
        images.append({**image, "apply_exif": number == 1})
    content = {
        "info": {"image_root": "."},
        "images": images,
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 20, 24]}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "list.json").write_text(json.dumps(content))
    return DataList.load(folder / "list.json")


def same_as_decoding(data_list, cache):
    plain, cached = DetectionDataset(data_list), DetectionDataset(data_list, cache=cache)
    return all(torch.equal(plain[i]["image"], cached[i]["image"]) for i in range(len(data_list)))


def test_the_same_samples(tmp_path):
    data_list = make_list(tmp_path)
    cache = PixelCache.build(data_list)
    assert len(cache) == 8
    for index in range(8):
        expected = torch.from_numpy(np.array(data_list.read_image(index))).permute(2, 0, 1)
        assert torch.equal(cache.read(index), expected)
    assert same_as_decoding(data_list, cache)
    augmented = [DetectionDataset(data_list, augment=AugmentConfig(mosaic=0.5), cache=c) for c in (None, cache)]
    for index in range(8):
        assert torch.equal(augmented[0][3, index, 0]["image"], augmented[1][3, index, 0]["image"])


def test_it_is_made_once(tmp_path, capsys):
    data_list = make_list(tmp_path)
    PixelCache.build(data_list)
    assert "decoding 8 images once" in capsys.readouterr().err
    before = cache_path(data_list, 0).stat()
    PixelCache.build(DataList.load(tmp_path / "list.json"))
    assert capsys.readouterr().err == ""
    assert cache_path(data_list, 0).stat().st_mtime_ns == before.st_mtime_ns
    assert sorted(path.name for path in tmp_path.glob("list.*")) == [
        "list.json", "list.whole.pixels", "list.whole.pixels.lock"
    ]  # fmt: skip


def test_smaller_ones(tmp_path):
    data_list = make_list(tmp_path)
    cache = PixelCache.build(data_list, side=40)
    for index, (height, width) in enumerate(data_list.sizes.tolist()):
        short, long = sorted(cache.read(index).shape[1:])
        assert short == min(40, height, width)
        assert abs(long - max(height, width) * short / min(height, width)) <= 0.5
    PixelCache.build(data_list)
    assert cache_path(data_list, 40) != cache_path(data_list, 0)
    plain, small = DetectionDataset(data_list)[0], DetectionDataset(data_list, cache=cache)[0]
    np.testing.assert_allclose(plain["boxes_norm"], small["boxes_norm"], atol=1e-5)


def change_image(folder):
    time.sleep(0.01)  # a file system's clock may tick no faster
    Image.new("RGB", Image.open(folder / "3.jpg").size, "red").save(folder / "3.jpg")


def change_list(folder):
    content = json.loads((folder / "list.json").read_text())
    content["images"] = content["images"][::-1]
    (folder / "list.json").write_text(json.dumps(content))


def cut(folder):
    file = folder / "list.whole.pixels"
    os.truncate(file, file.stat().st_size - 1)


def other_file(folder):
    (folder / "list.whole.pixels").write_text("something else")


@pytest.mark.parametrize("spoil", [change_image, change_list, cut, other_file])
def test_stale_and_cut_ones_are_made_anew(tmp_path, capsys, spoil):
    PixelCache.build(make_list(tmp_path))
    spoil(tmp_path)
    capsys.readouterr()
    data_list = DataList.load(tmp_path / "list.json")
    cache = PixelCache.build(data_list)
    assert "decoding 8 images once" in capsys.readouterr().err
    assert same_as_decoding(data_list, cache)


@pytest.mark.parametrize("place", ["pixels", "table"])
def test_damaged_bytes_never_reach_a_sample(tmp_path, capsys, place):
    data_list = make_list(tmp_path)
    path = cache_path(data_list, 0)
    offset = int(PixelCache.build(data_list).table[2]["offset"])
    with open(path, "r+b") as file:
        file.seek(offset + 10 if place == "pixels" else pixel_cache.HEADER_BYTES + 2 * pixel_cache.ROW.itemsize + 1)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    cache = PixelCache.build(data_list)
    assert same_as_decoding(data_list, cache)
    assert "is damaged" in capsys.readouterr().err
    assert not path.exists()
    assert same_as_decoding(data_list, PixelCache.build(data_list))
    assert path.exists()


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    data_list = make_list(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(pixel_cache.shutil, "disk_usage", lambda _: usage(100, 99, 1))
    with pytest.raises(InputError, match=r"list\.whole\.pixels takes 0\.00 GB.*cache_side=400.*--cache off"):
        PixelCache.build(data_list)
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pixel_cache.os, "fsync", full)
    with pytest.raises(InputError, match="make room"):
        PixelCache.build(data_list)
    assert [path.name for path in tmp_path.glob("list*pixels*")] == ["list.whole.pixels.lock"]


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    data_list = make_list(tmp_path)
    (tmp_path / "5.jpg").write_text("no image")
    with pytest.raises(InputError, match=r"5\.jpg is no image"):
        PixelCache.build(data_list)
    assert [path.name for path in tmp_path.glob("list*pixels*")] == ["list.whole.pixels.lock"]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_read_it(tmp_path, start_method):
    data_list = make_list(tmp_path)
    cache = PixelCache.build(data_list)
    cache.read(0)  # the file is open before workers start
    plain = make_loader(DetectionDataset(data_list, 64), 4, EpochSampler(8))
    cached = make_loader(
        DetectionDataset(data_list, 64, cache=cache), 4, EpochSampler(8), workers=2, start_method=start_method
    )
    for a, b in zip(plain, cached, strict=True):
        assert torch.equal(a["image"], b["image"])


# ---------------------------------------------------------------------------------------------------------------------
# Killed, and two at once


def start_build(data_list):
    """A process that builds the cache, just started."""
    # Forked, so that it begins at once; decoding uses none of torch's threads, which a fork would lose.
    process = multiprocessing.get_context("fork").Process(target=PixelCache.build, args=(data_list,))
    process.start()
    return process


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_while_it_is_made(tmp_path, kills):
    data_list = make_list(tmp_path, count=200, sides=(200, 400))
    path = cache_path(data_list, 0)
    start = time.perf_counter()
    PixelCache.build(data_list)
    seconds = time.perf_counter() - start
    moments, unfinished = random.Random(0), 0
    for _ in range(kills):
        path.unlink(missing_ok=True)
        process = start_build(data_list)
        time.sleep(moments.uniform(0, seconds))
        process.kill()
        process.join()
        unfinished += not path.exists()
        if path.exists():  # whatever has the name is whole
            assert same_as_decoding(data_list, PixelCache(path))
        assert same_as_decoding(data_list, PixelCache.build(data_list))
    assert unfinished > 0  # some of the kills did hit it


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.long)])
def test_two_builds_at_once(tmp_path, rounds):
    data_list = make_list(tmp_path, count=100, sides=(200, 400))
    for _ in range(rounds):
        cache_path(data_list, 0).unlink(missing_ok=True)
        processes = [start_build(data_list) for _ in range(2)]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        assert same_as_decoding(data_list, PixelCache(cache_path(data_list, 0)))
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_file_that_is_gone_means_decoding(tmp_path):
    """Another worker found it damaged and deleted it, before this one had opened it."""
    data_list = make_list(tmp_path)
    cache = PixelCache.build(data_list)
    cache_path(data_list, 0).unlink()
    assert cache.read(0) is None
    assert same_as_decoding(data_list, cache)
