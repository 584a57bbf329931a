"""Samples by key, in any order and by any worker; batches."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.memory import private_mb
from datasets import DetectionDataset, EpochSampler, balanced_weights, collate, draw_batch, main, make_loader
from fpnssd.data.augment import AugmentConfig
from fpnssd.data.data_list import DataList
from fpnssd.data.images import DataError, fit_image, read_image
from utils import error_message


def test_sample_without_augmentation(drawn):
    data_list = DataList.load(drawn / "train.json")
    sample = DetectionDataset(data_list)[2]
    target = data_list.target(2)
    height, width = target["size"]
    assert torch.equal(sample["image"], fit_image(read_image(data_list.image_path(2)), 300))
    np.testing.assert_allclose(sample["boxes_norm"], target["boxes"] / [width, height, width, height], rtol=1e-5)


def batches(dataset, workers, epoch, start_method=None):
    sampler = EpochSampler(len(dataset), seed=5)
    sampler.set_epoch(epoch)
    return list(make_loader(dataset, 4, sampler, workers, start_method=start_method))


def test_samples_depend_on_their_key_alone(drawn):
    config = AugmentConfig(mosaic=0.3, copy_paste=0.3)
    dataset = DetectionDataset(DataList.load(drawn / "train.json"), 64, config, seed=5)
    alone = batches(dataset, 0, epoch=1)
    assert len(alone) == 3
    for workers, start_method in ((1, "fork"), (2, "fork"), (2, "spawn")):
        for a, b in zip(alone, batches(dataset, workers, 1, start_method), strict=True):
            assert a["image_id"] == b["image_id"]
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["boxes_norm"], b["boxes_norm"])
    other = batches(dataset, 0, epoch=2)
    assert [b["image_id"] for b in alone] != [b["image_id"] for b in other]
    assert not torch.equal(dataset[1, 0, 0]["image"], dataset[2, 0, 0]["image"])
    assert not torch.equal(dataset[1, 0, 0]["image"], dataset[1, 0, 1]["image"])


def test_sampler_resumes_where_it_stopped():
    whole = EpochSampler(10, seed=1)
    rest = EpochSampler(10, seed=1)
    whole.epoch = rest.epoch = 3
    rest.start = 4
    assert list(rest) == list(whole)[4:]
    assert sorted(index for _, index, _ in whole) == list(range(10))
    assert len(rest) == 6


def test_processes_share_an_epoch():
    """Step by step, the batches of several processes hold what one process's batch holds."""
    alone = EpochSampler(20, seed=2)
    parts = [EpochSampler(20, seed=2, rank=rank, num_processes=2) for rank in range(2)]
    alone.start = parts[0].start = parts[1].start = 4
    expected, shares = list(alone), [list(part) for part in parts]
    assert [len(part) for part in parts] == [8, 8]
    for step in range(4):
        together = {key for share in shares for key in share[2 * step : 2 * step + 2]}
        assert together == set(expected[4 * step : 4 * step + 4])


def test_weighted_sampling_keeps_its_shares():
    weights = np.array([1.0, 1.0, 2.0, 4.0, 0.0])
    counts = np.zeros(5)
    for epoch in range(200):
        sampler = EpochSampler(5, seed=1, weights=weights)
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(set(keys)) == 5  # an index that comes again has another occurrence
        for index in range(5):
            drawn = sorted(occurrence for _, i, occurrence in keys if i == index)
            assert drawn == list(range(len(drawn)))
            assert abs(len(drawn) - 5 * weights[index] / 8) < 1  # rounded up or down, no further
            counts[index] += len(drawn)
    np.testing.assert_allclose(counts / counts.sum(), weights / 8, atol=0.02)


@pytest.mark.parametrize("weights", [None, np.array([1.0, 1.0, 2.0, 4.0])])
def test_an_epoch_of_several_passes(weights):
    keys = list(EpochSampler(4, seed=1, weights=weights, repeats=4))
    expected = [4, 4, 4, 4] if weights is None else [2, 2, 4, 8]
    assert sorted(keys) == [(0, index, n) for index, count in enumerate(expected) for n in range(count)]
    assert keys != sorted(keys)


def test_balanced_weights_by_hand(tmp_path):
    """Four images; class 1 is on three of them, class 2 on one, which weighs by its rarest; one has no object."""
    images = [{"id": i, "file_name": f"{i}", "width": 10, "height": 20} for i in range(5)]
    objects = [(0, 1), (1, 1), (2, 1), (2, 1), (2, 3), (3, 3)]
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": [0, 0, 5, 5], "iscrowd": int(i == 3)}
        for n, (i, c) in enumerate(objects)
    ]
    categories = [{"id": c, "name": str(c)} for c in (1, 3)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "x.json").write_text(json.dumps(content))
    data_list = DataList.load(tmp_path / "x.json")
    np.testing.assert_allclose(balanced_weights(data_list, 1.0), [5 / 3, 5 / 3, 5, 5 / 3, 5 / 3])
    np.testing.assert_allclose(balanced_weights(data_list, 0.5), np.sqrt([5 / 3, 5 / 3, 5, 5 / 3, 5 / 3]))
    np.testing.assert_allclose(balanced_weights(data_list, 0.0), np.ones(5))


def test_balancing_evens_out_classes(drawn):
    data_list = DataList.load(drawn / "train.json")
    rare = int(np.bincount(data_list.labels)[1:].argmin()) + 1
    with_rare = {i for i in range(len(data_list)) if rare in data_list.target(i)["labels"]}
    shares = []
    for power in (0.0, 1.0):
        drawn_rows = []
        for epoch in range(20):
            sampler = EpochSampler(len(data_list), weights=balanced_weights(data_list, power))
            sampler.set_epoch(epoch)
            drawn_rows += [index for _, index, _ in sampler]
        shares.append(np.mean([row in with_rare for row in drawn_rows]))
    assert shares[1] > shares[0]


def test_mosaic_and_copy_paste_end_before_the_training(drawn):
    data_list = DataList.load(drawn / "train.json")
    strong = AugmentConfig(mosaic=1, copy_paste=1, close_epochs=2)
    plain = DetectionDataset(data_list, 64, strong.closed(), num_epochs=10)
    dataset = DetectionDataset(data_list, 64, strong, num_epochs=10)
    for epoch, same in ((0, False), (7, False), (8, True), (9, True)):
        assert torch.equal(dataset[epoch, 1, 0]["image"], plain[epoch, 1, 0]["image"]) == same


def test_preview_shows_the_boxes(drawn, tmp_path, capsys):
    preview = ["--preview", str(tmp_path / "p.png"), "--count", "6", "--image-size", "128", "--plain"]
    main([str(drawn / "train.json"), *preview])
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    assert picture.shape == (2 * 132 + 4, 4 * 132 + 4, 3)
    assert "6 of 12 images" in capsys.readouterr().out
    data_list = DataList.load(drawn / "train.json")
    keys = list(EpochSampler(12, 0))[:6]
    for number, key in enumerate(keys):
        sample = DetectionDataset(data_list, 128)[key]
        top, left = 132 * (number // 4) + 4, 132 * (number % 4) + 4
        shown = picture[top : top + 128, left : left + 128].astype(int)
        changed = np.abs(shown - sample["image"].permute(1, 2, 0).numpy()).sum(axis=2) > 0
        for x0, y0, x1, _ in (sample["boxes_norm"] * 128).round().int().tolist():
            assert changed[min(y0, 127), x0 : min(x1, 127)].mean() > 0.9  # the upper edge is drawn
        assert changed.any() == bool(len(sample["labels"]))
    main([str(drawn / "train.json"), "--preview", str(tmp_path / "p.jpg"), "--count", "1"])
    assert Image.open(tmp_path / "p.jpg").format == "JPEG"
    with pytest.raises(SystemExit, match=r"--preview p\.xyz: \.xyz is not a picture's"):
        main([str(drawn / "train.json"), "--preview", "p.xyz"])
    with pytest.raises(SystemExit, match="AugmentConfig has no field 'mosiac'"):
        main([str(drawn / "train.json"), "--set", "mosiac=1"])


def test_batches_can_be_drawn_without_objects(drawn):
    sample = DetectionDataset(DataList.load(drawn / "train.json"), 64)[0]
    empty = {**sample, **{k: sample[k][:0] for k in ("boxes_norm", "labels", "difficult", "crowd")}}
    assert draw_batch(collate([empty, empty]), ("a",)).size == (2 * 68 + 4, 72)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_a_workers_garbage_collection_copies_nothing(drawn):
    kept = [[] for _ in range(500_000)]  # 36 MB of the main process, which a forked worker shares

    class Collecting(DetectionDataset):
        def __getitem__(self, key):
            before = private_mb("self")
            gc.collect()
            return super().__getitem__(key) | {"size": private_mb("self") - before}

    dataset = Collecting(DataList.load(drawn / "train.json"), 64)
    (copied,) = next(iter(make_loader(dataset, 1, workers=1, start_method="fork")))["size"]
    assert copied < 10
    assert len(kept) == 500_000


def test_error_of_a_worker_is_one_sentence(tmp_path):
    images = [{"id": 1, "file_name": "absent.jpg", "width": 10, "height": 20}]
    (tmp_path / "x.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    dataset = DetectionDataset(DataList.load(tmp_path / "x.json"))
    with pytest.raises(DataError) as caught:
        list(make_loader(dataset, 1, workers=1))
    assert error_message(caught.value).startswith(f"image {tmp_path / 'absent.jpg'} is missing")


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from fpnssd.data.data_list import DataList
from datasets import DetectionDataset, EpochSampler, make_loader
from fpnssd.training.failures import StopOnSignal

dataset = DetectionDataset(DataList.load(sys.argv[2]))
with StopOnSignal() as stop:
    batches = iter(make_loader(dataset, 1, EpochSampler(len(dataset)), workers=2))
    os.killpg(0, signal.SIGTERM)  # the workers are just starting
    print("batches after the signal:", len(list(batches)), stop.requested)
"""


def test_workers_leave_a_signal_to_the_group_to_the_main_process(drawn):
    """A scheduler's SIGTERM: whoever trains stops where nothing is half done, which takes some batches more."""
    root, path = Path(__file__).parents[1], drawn / "train.json"
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, root, path], capture_output=True, text=True, start_new_session=True
    )
    assert "batches after the signal: 12 True" in done.stdout, done.stderr


def test_collate_pads_with_label_zero(drawn):
    dataset = DetectionDataset(DataList.load(drawn / "train.json"), 64)
    samples = [dataset[i] for i in range(12)]
    batch = collate(samples)
    counts = [len(sample["labels"]) for sample in samples]
    assert batch["image"].shape == (12, 3, 64, 64)
    assert batch["image"].dtype == torch.uint8
    assert batch["boxes_norm"].shape == (12, max(counts), 4)
    assert (batch["labels"] > 0).sum(dim=1).tolist() == counts
    empty = {**samples[0], **{k: samples[0][k][:0] for k in ("boxes_norm", "labels", "difficult", "crowd")}}
    assert collate([empty, empty])["boxes_norm"].shape == (2, 0, 4)
