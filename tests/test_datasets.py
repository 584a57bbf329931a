"""The view against zoom-out, crop and flip one after another; colour against float arithmetic; loading by key."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import (
    FILL,
    NO_AUGMENTATION,
    AugmentConfig,
    DataError,
    DataList,
    DetectionDataset,
    EpochSampler,
    collate,
    fit_image,
    make_loader,
    move_boxes,
    read_image,
    render_view,
    sample_colour_matrix,
    sample_view,
)


def noise_image(width, height, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------------------
# The view


@pytest.mark.parametrize("flip", [False, True])
def test_view_is_zoom_out_crop_and_flip_one_after_another(flip):
    image = noise_image(200, 120)
    boxes = np.array([[20.0, 10.0, 90.0, 100.0], [150.0, 60.0, 200.0, 120.0]])
    # Zoom out: a canvas of 600 x 360 with the image at (150, 90). Crop (100, 60) to (400, 360) out of it: 300 x 300.
    canvas = Image.new("RGB", (600, 360), FILL)
    canvas.paste(image, (150, 90))
    step_by_step = canvas.crop((100, 60, 400, 360)).resize((150, 150), Image.Resampling.BILINEAR)
    expected_boxes = (boxes + [150 - 100, 90 - 60, 150 - 100, 90 - 60]) / 2
    if flip:
        step_by_step = step_by_step.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected_boxes = np.stack([150 - expected_boxes[:, 2], expected_boxes[:, 1],
                                   150 - expected_boxes[:, 0], expected_boxes[:, 3]], axis=1)  # fmt: skip
    view = np.array([100 - 150, 60 - 90, 400 - 150, 360 - 90], dtype=float)
    pixels, placement = render_view(image, view, 150, flip)
    np.testing.assert_allclose(move_boxes(boxes, placement, 150, flip), expected_boxes)
    difference = np.abs(pixels.astype(int) - np.asarray(step_by_step).astype(int))
    # At the image's edge the step-by-step way blends photograph and fill: one pixel on either side.
    x0, y0, x1, y1 = 25, 15, 125, 75  # where the image lies
    if flip:
        x0, x1 = 150 - x1, 150 - x0
    edge = np.zeros((150, 150), dtype=bool)
    edge[y0 - 1 : y1 + 1, x0 - 1 : x1 + 1] = True
    edge[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = False
    assert difference[~edge].max() <= 1
    assert (pixels[0, 0] == FILL).all()


def test_boxes_move_with_their_pixels():
    """A painted rectangle is found in the augmented pixels where the moved box says it is."""
    rng = np.random.default_rng(0)
    config = AugmentConfig(colour=0)
    for case in range(200):
        width, height = rng.integers(200, 500, size=2)
        x0, y0 = rng.integers(0, width - 60), rng.integers(0, height - 60)
        box = np.array([[x0, y0, x0 + rng.integers(30, width - x0), y0 + rng.integers(30, height - y0)]], dtype=float)
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        left, top, right, bottom = box[0].astype(int)
        pixels[top:bottom, left:right] = (0, 255, 0)
        view, flip = sample_view(rng, (height, width), box, config), bool(case % 2)
        square, placement = render_view(Image.fromarray(pixels), view, 300, flip)
        (moved,) = move_boxes(box, placement, 300, flip)
        green = (square[..., 1] > 127) & (square[..., 0] < 64)
        columns, rows = np.flatnonzero(green.any(axis=0)), np.flatnonzero(green.any(axis=1))
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert np.abs(found - moved).max() <= 1.0


def test_views_obey_the_sampled_rules():
    rng = np.random.default_rng(0)
    boxes = np.array([[50.0, 50.0, 200.0, 250.0]])
    config = AugmentConfig(zoom_out=0, crop_min_overlaps=(0.5,))
    crops = 0
    for _ in range(300):
        view = sample_view(rng, (300, 400), boxes, config)
        if tuple(view) == (0, 0, 400, 300):
            continue  # no crop was found in so many trials
        crops += 1
        assert (view[:2] >= 0).all()
        assert (view[2:] <= (400, 300)).all()
        assert 0.5 <= (view[2] - view[0]) / (view[3] - view[1]) <= 2
        width, height = np.minimum(view[2:], boxes[0, 2:]) - np.maximum(view[:2], boxes[0, :2])
        union = 150 * 200 + (view[2:] - view[:2]).prod() - width * height
        assert width * height / union >= 0.5
        assert (view[:2] <= (125, 150)).all()  # the object's centre is inside
        assert (view[2:] >= (125, 150)).all()
    assert crops > 150
    zoomed = [sample_view(rng, (300, 400), boxes[:0], AugmentConfig(zoom_out=1)) for _ in range(300)]
    ratios = [(view[2] - view[0]) / 400 for view in zoomed]
    assert 1 <= min(ratios) < 1.2
    assert 3.8 < max(ratios) <= 4
    assert all((view[:2] <= 0).all() and (view[2:] >= (400, 300)).all() for view in zoomed)


# ---------------------------------------------------------------------------------------------------------------------
# Colour


def test_colour_matrix_is_the_linear_steps_rounded_once():
    yiq = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    pixels = np.asarray(noise_image(60, 40)).astype(float)
    config = AugmentConfig(colour=1)
    for seed in range(50):
        matrix = sample_colour_matrix(np.random.default_rng(seed), config)
        # The same draws in the same order.
        rng = np.random.default_rng(seed)
        draws = []
        for low, high in ((-32, 32), (-0.5, 0.5), (-0.5, 0.5), (-18, 18)):
            rng.random()
            draws.append(rng.uniform(low, high))
        shift, contrast, saturation, degrees = draws[0], 1 + draws[1], 1 + draws[2], math.radians(draws[3])
        expected = pixels + shift
        luma = expected @ yiq[0]
        expected = saturation * expected + (1 - saturation) * luma[..., None]
        y, i, q = np.moveaxis(expected @ yiq.T, -1, 0)
        i, q = i * math.cos(degrees) - q * math.sin(degrees), i * math.sin(degrees) + q * math.cos(degrees)
        expected = np.stack([y, i, q], axis=-1) @ np.linalg.inv(yiq).T * contrast
        image = Image.fromarray(pixels.astype(np.uint8)).convert("RGB", tuple(matrix.flatten()))
        assert np.abs(np.asarray(image) - expected.clip(0, 255)).max() <= 0.5 + 1e-3


def test_colour_that_is_off_is_off():
    assert sample_colour_matrix(np.random.default_rng(0), NO_AUGMENTATION) is None


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
