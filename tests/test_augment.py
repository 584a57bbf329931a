"""The view against zoom-out, crop and flip one after another; colour in float; mosaic, copy-paste."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

from fpnssd.data.augment import (
    FILL,
    NO_AUGMENTATION,
    AugmentConfig,
    augment,
    change_colour,
    copy_paste,
    mosaic,
    move_boxes,
    render_view,
    sample_colour_matrix,
    sample_view,
)
from fpnssd.data.images import to_pixels


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
    pixels, placement = render_view(to_pixels(image), view, 150, 150, flip)
    pixels = pixels.permute(1, 2, 0).numpy()
    np.testing.assert_allclose(move_boxes(boxes, placement, 150, 150, flip), expected_boxes)
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
        square, placement = render_view(to_pixels(Image.fromarray(pixels)), view, 300, 300, flip)
        square = square.permute(1, 2, 0).numpy()
        (moved,) = move_boxes(box, placement, 300, 300, flip)
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


def overlap(a, b):
    """IoU of two boxes, by hand."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def view_step_by_step(rng, width, height, boxes):
    """SSD's zoom-out and IoU crop as its authors' and followers' loops do them: one trial after another, no arrays.

    Returns the view in pixels of the image, as sample_view.
    """
    canvas_width, canvas_height, left, top = width, height, 0.0, 0.0
    if rng.random() < 0.5:
        ratio = rng.uniform(1, 4)
        canvas_width, canvas_height = width * ratio, height * ratio
        left, top = rng.uniform(0, canvas_width - width), rng.uniform(0, canvas_height - height)
    moved = [(x0 + left, y0 + top, x1 + left, y1 + top) for x0, y0, x1, y1 in boxes]
    while True:
        least = rng.choice([None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
        if least is None:
            return -left, -top, canvas_width - left, canvas_height - top
        for _ in range(50):
            w, h = rng.uniform(0.3 * canvas_width, canvas_width), rng.uniform(0.3 * canvas_height, canvas_height)
            if w / h < 0.5 or w / h > 2:
                continue
            x, y = rng.uniform(0, canvas_width - w), rng.uniform(0, canvas_height - h)
            crop = (x, y, x + w, y + h)
            if max(overlap(crop, box) for box in moved) < least:
                continue
            if any(x < (b[0] + b[2]) / 2 < x + w and y < (b[1] + b[3]) / 2 < y + h for b in moved):
                return x - left, y - top, x + w - left, y + h - top


def describe_view(view, width, height, boxes):
    """Scale, aspect, and the best IoU with an object."""
    w, h = view[2] - view[0], view[3] - view[1]
    return math.sqrt(w * h / (width * height)), w / h, max(overlap(view, box) for box in boxes)


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.long)], ids=["1,000", "10,000"])
def test_views_are_distributed_as_ssds(count):
    """A two-sample Kolmogorov-Smirnov test of scale, aspect and IoU against the loops above."""
    ours, theirs, layouts = np.random.default_rng(1), np.random.default_rng(2), np.random.default_rng(3)
    samples = []
    for _ in range(count):
        width, height = layouts.integers(200, 501, size=2)
        corners = layouts.uniform(0, 0.8, size=(layouts.integers(1, 4), 2))
        boxes = np.concatenate([corners, corners + layouts.uniform(0.05, 0.2, corners.shape)], axis=1)
        boxes = boxes * [width, height, width, height]
        views = (
            sample_view(ours, (height, width), boxes, AugmentConfig()),
            view_step_by_step(theirs, width, height, boxes),
        )
        samples.append([describe_view(view, width, height, boxes) for view in views])
    samples = np.array(samples)  # (count, 2, 3)
    for quantity in range(3):
        assert ks_2samp(samples[:, 0, quantity], samples[:, 1, quantity]).pvalue > 0.01
    # And the test can tell: without zoom-out it would fail.
    plain = [sample_view(ours, (300, 400), boxes[:1], AugmentConfig(zoom_out=0)) for _ in range(count)]
    scales = [describe_view(view, 400, 300, boxes[:1])[0] for view in plain]
    assert ks_2samp(scales, samples[:, 1, 0]).pvalue < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def photograph(boxes, colour, size=(120, 160), **flags):
    """A black photograph with its objects painted."""
    pixels = torch.zeros(3, *size, dtype=torch.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[:, y0:y1, x0:x1] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    count = len(boxes)
    return pixels, {
        "boxes": np.array(boxes, dtype=float).reshape(-1, 4),
        "labels": np.arange(1, count + 1),
        "difficult": np.zeros(count, dtype=bool),
        "crowd": flags.get("crowd", np.zeros(count, dtype=bool)),
        "size": size,
    }


def test_objects_are_dropped_by_the_rule():
    """An object stays if its centre is in the view and min_side pixels of it are left; a crowd needs no centre."""
    boxes = [(10, 10, 60, 60), (100, 10, 150, 60), (30, 80, 31, 110)]
    config = AugmentConfig(zoom_out=0, crop_min_overlaps=(1.0,), flip=0, colour=0)
    _, objects = augment(np.random.default_rng(0), *photograph(boxes, (9, 9, 9)), 160, 120, config)
    assert objects["labels"].tolist() == [1, 2, 3]
    _, objects = augment(np.random.default_rng(0), *photograph(boxes, (9, 9, 9)), 80, 60, config)
    assert objects["labels"].tolist() == [1, 2]  # the third is half a pixel wide
    crop = AugmentConfig(zoom_out=0, crop_min_overlaps=(0.9,), flip=0, colour=0)
    crowd = np.array([False, True, True])
    for seed in range(20):
        _, objects = augment(np.random.default_rng(seed), *photograph(boxes, (9, 9, 9), crowd=crowd), 300, 300, crop)
        assert objects["labels"][0] == 1  # crops look for what is no crowd
        assert (objects["boxes"][:, 2:] - objects["boxes"][:, :2] >= 1).all()


def test_an_image_stored_smaller_gives_the_same_boxes():
    image = noise_image(400, 200)
    boxes = np.array([[40.0, 20.0, 200.0, 160.0]])
    view = np.array([20.0, -40.0, 300.0, 180.0])
    whole, placement = render_view(to_pixels(image), view, 300, 300)
    half, half_placement = render_view(to_pixels(image.resize((200, 100))), view, 300, 300, size=(200, 400))
    expected = move_boxes(boxes, placement, 300, 300)
    assert np.abs(move_boxes(boxes, half_placement, 300, 300) - expected).max() < 1.5
    assert (whole.float() - half.float()).abs().mean() < 6


def test_mosaic_holds_four_photographs_with_their_boxes():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    photographs = [photograph([(40, 30, 120, 90)], colour) for colour in colours]
    config = AugmentConfig(zoom_out=0, crop_min_overlaps=(1.0,), colour=0)
    orders = set()
    for seed in range(8):
        square, objects = mosaic(np.random.default_rng(seed), photographs, 300, config)
        assert square.shape == (3, 300, 300)
        assert len(objects["labels"]) == 4
        for box, colour in zip(objects["boxes"], colours, strict=True):
            mask = (square == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(dim=0)
            rows, columns = torch.where(mask)
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(np.array(found) - box).max() <= 2  # resizing blurs an edge
        orders.add(tuple(np.argsort(objects["boxes"][:, 0] + 1000 * objects["boxes"][:, 1])))
    assert len(orders) > 3  # the first is not always in the same corner


def test_pasted_objects_are_there_and_cover_little():
    config = AugmentConfig(copy_paste=1, colour=0)
    target, donor = (
        photograph([(20, 20, 80, 80)], (200, 0, 0)),
        photograph([(10, 10, 50, 60), (60, 60, 90, 110)], (0, 200, 0)),
    )
    counts = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        pixels, objects = augment(rng, *target, 300, 300, NO_AUGMENTATION)
        before = pixels.clone()
        pasted, both = copy_paste(rng, pixels, objects, donor, config)
        assert torch.equal(pixels, before)  # the sample itself is not written to
        counts.append(len(both["labels"]) - 1)
        assert both["boxes"][0].tolist() == objects["boxes"][0].tolist()
        for x0, y0, x1, y1 in both["boxes"][1:].astype(int):
            assert (pasted[1, y0:y1, x0:x1] == 200).all()
            shared = max(0, min(x1, both["boxes"][0][2]) - max(x0, both["boxes"][0][0])) * max(
                0, min(y1, both["boxes"][0][3]) - max(y0, both["boxes"][0][1])
            )
            assert shared <= 0.1 * np.prod(both["boxes"][0][2:] - both["boxes"][0][:2])
    assert set(counts) >= {1, 2}
    empty = photograph([], (0, 0, 0))
    _, none = copy_paste(np.random.default_rng(0), pixels, objects, empty, config)
    assert none["labels"].tolist() == objects["labels"].tolist()


def test_objects_inside_of_a_pasted_one_come_with_it():
    """In a green object that is pasted lie a blue one, which is labelled too, and one whose centre is outside."""
    config = AugmentConfig(copy_paste=1, copy_paste_most=1, colour=0, copy_paste_scale=(1, 1))
    sample = photograph([(0, 0, 10, 10)], (200, 0, 0))
    donor_pixels, target = photograph([(10, 10, 90, 70), (30, 30, 50, 60), (80, 20, 120, 40)], (0, 200, 0))
    donor_pixels[:, 30:60, 30:50] = torch.tensor([0, 0, 200], dtype=torch.uint8)[:, None, None]
    counts = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        pixels, objects = augment(rng, *sample, 300, 300, NO_AUGMENTATION)
        pasted, both = copy_paste(rng, pixels, objects, (donor_pixels, target), config)
        boxes = both["boxes"][1:]
        counts.add(len(boxes))
        if len(boxes) == 2:
            inner = boxes[(boxes[:, 2:] - boxes[:, :2]).prod(axis=1).argmin()]
            rows, columns = torch.where((pasted[2] > 150) & (pasted[1] < 50))
            found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert np.abs(found - inner).max() <= 2
    assert counts >= {1, 2}  # the others alone, and the two


def test_options_are_closed():
    config = AugmentConfig(mosaic=0.5, copy_paste=0.5, flip=0.2)
    assert config.closed() == AugmentConfig(flip=0.2)


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
        changed = change_colour(torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1), matrix)
        assert np.abs(changed.permute(1, 2, 0).numpy() - expected.clip(0, 255)).max() <= 0.5 + 1e-3


def test_colour_that_is_off_is_off():
    assert sample_colour_matrix(np.random.default_rng(0), NO_AUGMENTATION) is None
