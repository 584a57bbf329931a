"""Data lists, images and what is wrong with them; samples by key; batches."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from augment import AugmentConfig
from datasets import DataError, DataList, DetectionDataset, EpochSampler, collate, fit_image, make_loader, read_image


def noise_image(width, height, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------------------
# Data lists and images


def write_list(path, **changes):
    content = {
        "info": {"image_root": "."},
        "images": [{"id": 7, "file_name": "a.jpg", "width": 10, "height": 20}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 1, "difficult": 1}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
        **changes,
    }
    path.write_text(json.dumps(content))
    return path


def test_data_list_is_read(tmp_path):
    data_list = DataList.load(write_list(tmp_path / "x.json"))
    target = data_list.target(0)
    assert target["boxes"].tolist() == [[1, 2, 4, 6]]
    assert (target["labels"].tolist(), target["image_id"], target["size"]) == ([2], 7, (20, 10))
    assert target["difficult"].tolist() == target["crowd"].tolist() == [True]
    assert data_list.image_path(0) == tmp_path / "a.jpg"
    assert DataList.load(tmp_path / "x.json", images="/photos").image_path(0).as_posix() == "/photos/a.jpg"


def test_data_list_without_objects(tmp_path):
    data_list = DataList.load(write_list(tmp_path / "x.json", annotations=[]))
    assert data_list.target(0)["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"annotations": [{"id": 5, "image_id": 8, "category_id": 1, "bbox": [0, 0, 1, 1]}]}, "5 names image_id 8"),
        ({"annotations": [{"id": 5, "image_id": 7, "category_id": 2, "bbox": [0, 0, 1, 1]}]}, "category_id 2"),
        (
            {"annotations": [{"id": 5, "image_id": 7, "category_id": 1, "bbox": [0, 0, 0, 1]}]},
            "5 has a box",
        ),
        ({"annotations": [{"id": 5, "image_id": 7, "category_id": 1, "bbox": [5, 5, 9, 9]}]}, "leaves its image"),
        ({"images": [{"id": 7, "file_name": "a", "width": 1, "height": 2}] * 2}, "same id to two images"),
        ({"images": [{"id": 7}]}, "no COCO JSON data list"),
    ],
)
def test_bad_data_lists_are_named(tmp_path, changes, said):
    with pytest.raises(DataError, match=said):
        DataList.load(write_list(tmp_path / "x.json", **changes))


def test_what_is_no_data_list(tmp_path):
    (tmp_path / "x.json").write_text("<xml/>")
    with pytest.raises(DataError, match=r"x\.json is no COCO JSON"):
        DataList.load(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="create_data_lists"):
        DataList.load(tmp_path / "y.json")


def test_bad_images_are_named(tmp_path):
    noise_image(50, 50).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("hello")
    for name in ("cut", "text", "absent"):
        with pytest.raises(DataError, match=f"{name}.jpg"):
            read_image(tmp_path / f"{name}.jpg")


def test_image_of_another_size_is_refused(tmp_path):
    noise_image(50, 50).save(tmp_path / "a.jpg")
    dataset = DetectionDataset(DataList.load(write_list(tmp_path / "x.json")))
    with pytest.raises(DataError, match=r"a\.jpg is 50x50 pixels, but .*x\.json says 10x20"):
        dataset[0]


# ---------------------------------------------------------------------------------------------------------------------
# Samples and batches


def test_sample_without_augmentation(drawn):
    data_list = DataList.load(drawn / "train.json")
    sample = DetectionDataset(data_list)[2]
    target = data_list.target(2)
    height, width = target["size"]
    assert torch.equal(sample["image"], fit_image(read_image(data_list.image_path(2)), 300))
    np.testing.assert_allclose(sample["boxes_unit"], target["boxes"] / [width, height, width, height], rtol=1e-5)


def batches(dataset, workers, epoch):
    sampler = EpochSampler(len(dataset), seed=5)
    sampler.epoch = epoch
    return list(make_loader(dataset, 4, sampler, workers))


def test_samples_depend_on_their_key_alone(drawn):
    dataset = DetectionDataset(DataList.load(drawn / "train.json"), 64, AugmentConfig(), seed=5)
    alone = batches(dataset, 0, epoch=1)
    assert len(alone) == 3
    for workers in (1, 2):
        for a, b in zip(alone, batches(dataset, workers, epoch=1), strict=True):
            assert a["image_id"] == b["image_id"]
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["boxes_unit"], b["boxes_unit"])
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


def test_collate_pads_with_label_zero(drawn):
    dataset = DetectionDataset(DataList.load(drawn / "train.json"), 64)
    samples = [dataset[i] for i in range(12)]
    batch = collate(samples)
    counts = [len(sample["labels"]) for sample in samples]
    assert batch["image"].shape == (12, 3, 64, 64)
    assert batch["image"].dtype == torch.uint8
    assert batch["boxes_unit"].shape == (12, max(counts), 4)
    assert (batch["labels"] > 0).sum(dim=1).tolist() == counts
    empty = {**samples[0], **{k: samples[0][k][:0] for k in ("boxes_unit", "labels", "difficult", "crowd")}}
    assert collate([empty, empty])["boxes_unit"].shape == (2, 0, 4)
