"""The cache gives what decoding gives, whatever happened to it before: stale, cut short, killed, built twice."""

import errno
import json
import multiprocessing
import os
import pickle
import signal
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import DetectionDataset, EpochSampler, make_loader
from fpnssd.data import pixel_cache
from fpnssd.data.augment import AugmentConfig
from fpnssd.data.data_list import DataList
from fpnssd.data.pixel_cache import PixelCache, cache_path, stored_sizes
from utils import InputError


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
    assert sorted(tmp_path.glob("list.*")) == sorted([tmp_path / "list.json", cache_path(data_list, 0)])


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
    (file,) = folder.glob("list.whole.*.pixels")
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("spoil", [change_image, change_list, cut])
def test_stale_and_cut_ones_are_made_anew(tmp_path, capsys, spoil):
    PixelCache.build(make_list(tmp_path))
    spoil(tmp_path)
    capsys.readouterr()
    data_list = DataList.load(tmp_path / "list.json")
    cache = PixelCache.build(data_list)
    assert "decoding 8 images once" in capsys.readouterr().err
    assert same_as_decoding(data_list, cache)
    assert list(tmp_path.glob("*pixels*")) == [cache.path]  # no room is wasted on the stale one


def test_files_of_others_stay(tmp_path):
    """Other lists' and other sizes' caches, and what another process is writing; not what a killed build left."""
    data_list = make_list(tmp_path)
    key = "0123456789abcdef"
    names = [f"list.40.{key}.pixels", f"list.whole.x.whole.{key}.pixels", f"my.list.whole.{key}.pixels", "a.pixels"]
    names += [f"list.whole.{key}.pixels.00000001.unfinished", f"list.whole.{key}.pixels.00000002.unfinished"]
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / names[-1], (0, 0))
    PixelCache.build(data_list)
    assert [name for name in names if not (tmp_path / name).exists()] == names[-1:]


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    data_list = make_list(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(pixel_cache.shutil, "disk_usage", lambda _: usage(100, 99, 1))
    with pytest.raises(InputError, match=r"list\.whole\.\w{16}\.pixels takes 0\.00 GB.*cache_side=400.*--cache off"):
        PixelCache.build(data_list)
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pixel_cache.os, "fsync", full)
    with pytest.raises(InputError, match="make room"):
        PixelCache.build(data_list)
    assert not list(tmp_path.glob("list*pixels*"))


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    data_list = make_list(tmp_path)
    (tmp_path / "5.jpg").write_text("no image")
    with pytest.raises(InputError, match=r"5\.jpg is not a readable image"):
        PixelCache.build(data_list)
    assert not list(tmp_path.glob("list*pixels*"))


def test_workers_read_it(tmp_path):
    data_list = make_list(tmp_path)
    cache = PixelCache.build(data_list)
    plain = make_loader(DetectionDataset(data_list, 64), 4, EpochSampler(8))
    # Pickled, as for a worker that is spawned.
    cached = DetectionDataset(data_list, 64, cache=pickle.loads(pickle.dumps(cache)))
    for a, b in zip(plain, make_loader(cached, 4, EpochSampler(8), workers=2, start_method="fork"), strict=True):
        assert torch.equal(a["image"], b["image"])


# ---------------------------------------------------------------------------------------------------------------------
# Killed, and two at once


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def build_in_a_process(data_list, module=None, killed_at=None):
    """Starts a process that builds the cache, and that is killed where it calls a function of a module."""

    def build():
        if module:
            setattr(module, killed_at, kill)
        PixelCache.build(data_list)

    # Forked, so that it begins at once; decoding uses none of torch's threads, which a fork would lose.
    process = multiprocessing.get_context("fork").Process(target=build)
    process.start()
    return process


@pytest.mark.parametrize(("module", "killed_at"), [(Image.Image, "tobytes"), (os, "fsync"), (os, "replace")])
def test_killed_while_it_is_made(tmp_path, capsys, module, killed_at):
    data_list = make_list(tmp_path)
    process = build_in_a_process(data_list, module, killed_at)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.unfinished"))) == 1
    assert same_as_decoding(data_list, PixelCache.build(data_list))
    assert "decoding 8 images once" in capsys.readouterr().err


def test_two_builds_at_once(tmp_path):
    data_list = make_list(tmp_path, count=40)
    processes = [build_in_a_process(data_list) for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    (path,) = tmp_path.glob("*pixels*")
    assert same_as_decoding(data_list, PixelCache(path, stored_sizes(data_list.sizes, 0)))


def test_the_other_processes_of_a_training_wait(tmp_path, monkeypatch):
    data_list = make_list(tmp_path)
    monkeypatch.setattr(pixel_cache.time, "sleep", lambda _: PixelCache.build(data_list))  # the first one, meanwhile
    monkeypatch.setattr(PixelCache, "_write", once(PixelCache._write))
    assert same_as_decoding(data_list, PixelCache.build(data_list, wait=True))


def once(function):
    calls = []

    def wrapper(*args):
        calls.append(args)
        assert len(calls) == 1
        return function(*args)

    return wrapper


@pytest.mark.parametrize("spoil", [os.unlink, lambda path: os.truncate(path, 100)])
def test_a_file_that_is_gone_or_cut_during_training_means_decoding(tmp_path, spoil):
    data_list = make_list(tmp_path)
    cache = PixelCache.build(data_list)
    spoil(cache.path)
    assert cache.read(7) is None
    assert same_as_decoding(data_list, cache)
