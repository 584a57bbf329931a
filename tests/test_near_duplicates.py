"""Nearly equal photographs are found as they are and mirrored; unlike ones are not."""

import io

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageOps

from fpnssd.data.near_duplicates import SAME_SCENE, describe, mirror, near_pairs

PHOTOGRAPHS = {
    name: Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    for name in ("astronaut", "chelsea", "coffee", "rocket", "camera")
}


def recompressed(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=30)
    return Image.open(stream)


COPIES = {
    "recompressed": recompressed,
    "a third of the size": lambda image: image.resize((image.width // 3, image.height // 3)),
    "brighter": lambda image: image.point(lambda value: int(255 * (value / 255) ** 0.6)),
    "one side lost": lambda image: image.crop((image.width // 40, 0, image.width, image.height)),
    "grey": lambda image: image.convert("L"),
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("mirrored", [False, True])
def test_copies_are_found_and_nothing_else(kind, mirrored):
    names = list(PHOTOGRAPHS)
    copies = [COPIES[kind](image) for image in PHOTOGRAPHS.values()]
    copies = [ImageOps.mirror(image) if mirrored else image for image in copies]
    first = np.stack([describe(image) for image in PHOTOGRAPHS.values()])
    pairs = list(near_pairs(first, np.stack([describe(image) for image in copies]), rows=2))
    assert [(names[i], names[j]) for i, j, _, _ in pairs] == [(name, name) for name in names]
    assert {turned for _, _, _, turned in pairs} == {mirrored}


def test_mirrored_descriptor_is_that_of_the_mirrored_picture():
    image = PHOTOGRAPHS["coffee"].resize((160, 160))  # a whole number of pixels a cell
    assert np.allclose(mirror(describe(image)[None])[0], describe(ImageOps.mirror(image)), atol=1e-6)


def test_pairs_among_themselves_come_once():
    images = [PHOTOGRAPHS["rocket"], PHOTOGRAPHS["coffee"], PHOTOGRAPHS["rocket"], Image.new("RGB", (90, 60), "red")]
    pairs = list(near_pairs(np.stack([describe(image) for image in images]), rows=1))
    assert [(i, j) for i, j, _, _ in pairs] == [(0, 2)]
    assert pairs[0][2] == pytest.approx(1.0, abs=1e-6)
    assert pairs[0][2] > SAME_SCENE
