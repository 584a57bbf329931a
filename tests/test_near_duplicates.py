"""Nearly equal photographs are found as they are and mirrored; unlike ones are not."""

import io

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageOps

from fpnssd.data.near_duplicates import SAME_SCENE, describe, group_near, mirror, nearest

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
    copies = [COPIES[kind](image) for image in PHOTOGRAPHS.values()]
    copies = [ImageOps.mirror(image) if mirrored else image for image in copies]
    first, second = (np.stack([describe(image) for image in part]) for part in (PHOTOGRAPHS.values(), copies))
    count = len(copies)
    rows, similarities, turned = nearest(first, second, rows=2)
    assert (rows == np.arange(count)).all()
    assert (similarities >= SAME_SCENE).all()
    assert (turned == mirrored).all()
    groups = group_near(np.concatenate([first, second]), np.arange(2 * count))
    assert groups.tolist() == [*range(count)] * 2


def test_mirrored_descriptor_is_that_of_the_mirrored_picture():
    image = PHOTOGRAPHS["coffee"].resize((160, 160))  # a whole number of pixels a cell
    assert np.allclose(mirror(describe(image)[None])[0], describe(ImageOps.mirror(image)), atol=1e-6)


def test_equal_pictures_are_one_group():
    images = [PHOTOGRAPHS["rocket"], PHOTOGRAPHS["coffee"], PHOTOGRAPHS["rocket"], Image.new("RGB", (90, 60), "red")]
    assert group_near(np.stack([describe(image) for image in images]), np.arange(4)).tolist() == [0, 1, 0, 3]
