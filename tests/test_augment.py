"""The view against zoom-out, crop and flip one after another; colour in float; mosaic, copy-paste."""

import math

import numpy as np
import pytest
from PIL import Image

from augment import (
    FILL,
    NO_AUGMENTATION,
    AugmentConfig,
    move_boxes,
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
    pixels, placement = render_view(image, view, 150, 150, flip)
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
        square, placement = render_view(Image.fromarray(pixels), view, 300, 300, flip)
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
