"""Draws a small data set in VOC's layout: six kinds of shape on cluttered backgrounds. Needs no download.

    python -m fpnssd.data.synthetic --out data/synthetic_voc --train 300 --val 60 --seed 0

Objects have all three of COCO's sizes, overlap and are truncated by the frame; those that are mostly hidden are
`difficult`; some images have none. An image depends only on the seed, its split and its number.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from utils import HelpFormatter, InputError, atomic_write, check_outputs, write_text

EMPTY_SHARE = 0.06  # images without objects
SUPERSAMPLE = 2  # shapes are drawn larger and shrunk, for smooth edges
SIDES = ((24, 32), (32, 96), (96, 200))  # of objects in pixels: COCO's small, medium, large
SIDE_ODDS = (0.15, 0.5, 0.35)
LITTLE_VISIBLE = 0.35  # below this share of its pixels an object is difficult


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter
    )
    parser.add_argument("--out", default="data/synthetic_voc", help="folder to write")
    parser.add_argument("--train", type=int, default=300, help="number of images for training")
    parser.add_argument("--val", type=int, default=60, help="number of images for evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="also replace files that this program did not write")
    args = parser.parse_args(argv)
    out, counts = Path(args.out), {"train": args.train, "val": args.val}
    try:
        check_outputs(outputs_of(out, counts), overwrite=args.overwrite)
        draw_dataset(out, counts, args.seed)
    except (InputError, OSError) as error:
        sys.exit(f"synthetic: {error}")
    print(f"{args.out}: {args.train} images for training, {args.val} for evaluation, classes {', '.join(SHAPES)}")


def draw_dataset(out: Path, counts: Mapping[str, int], seed: int = 0) -> None:
    """Writes a data set in VOC's layout.

    Args:
        out: folder that gets Annotations, JPEGImages and ImageSets/Main.
        counts: number of images of each split, by its name.
        seed: of the randomness.
    """
    for split_number, (split, count) in enumerate(counts.items()):
        names = [f"{split}_{number:05}" for number in range(count)]
        for number, name in enumerate(names):
            image, objects = draw_image(np.random.default_rng([seed, split_number, number]))
            with atomic_write(out / "JPEGImages" / f"{name}.jpg", "picture") as temporary:
                image.save(temporary, "JPEG", quality=90)
            write_text(out / "Annotations" / f"{name}.xml", to_xml(name, image.size, objects), "annotation")
        write_text(out / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{name}\n" for name in names), "split")


def outputs_of(out: Path, counts: Mapping[str, int]) -> Iterator[tuple[str, Path]]:
    """(kind, path) of each file that draw_dataset writes, for utils.check_outputs."""
    for split, count in counts.items():
        for number in range(count):
            yield "picture", out / "JPEGImages" / f"{split}_{number:05}.jpg"
            yield "annotation", out / "Annotations" / f"{split}_{number:05}.xml"
        yield "split", out / "ImageSets" / "Main" / f"{split}.txt"


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: each draws itself in white on a mask, in the square from (0, 0) to (side, side)


def _polygon(radii: Sequence[float], turn: float = 0.0) -> list[tuple[float, float]]:
    """Vertices in the unit square at these distances from its centre, at equal angles, the first above it."""
    angles = [2 * math.pi * i / len(radii) - math.pi / 2 + turn for i in range(len(radii))]
    return [(0.5 + r * math.cos(a), 0.5 + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _filled(vertices: Sequence[tuple[float, float]]) -> Callable[[ImageDraw.ImageDraw, int], None]:
    return lambda draw, side: draw.polygon([(side * x, side * y) for x, y in vertices], fill=255)


def _circle(draw: ImageDraw.ImageDraw, side: int) -> None:
    draw.ellipse([0, 0, side, side], fill=255)


def _ring(draw: ImageDraw.ImageDraw, side: int) -> None:
    _circle(draw, side)
    draw.ellipse([0.28 * side, 0.28 * side, 0.72 * side, 0.72 * side], fill=0)


def _cross(draw: ImageDraw.ImageDraw, side: int) -> None:
    draw.rectangle([0.34 * side, 0, 0.66 * side, side], fill=255)
    draw.rectangle([0, 0.34 * side, side, 0.66 * side], fill=255)


SHAPES = {
    "circle": _circle,
    "cross": _cross,
    "ring": _ring,
    "square": _filled(_polygon([0.7] * 4, turn=math.pi / 4)),
    "star": _filled(_polygon([0.5, 0.2] * 5)),
    "triangle": _filled(_polygon([0.55] * 3)),
}


def draw_mask(rng: np.random.Generator, name: str, side: int) -> Image.Image:
    """Returns a shape as a mask of mode L, rotated and stretched at random; its longer side is about `side` pixels."""
    large = SUPERSAMPLE * side
    mask = Image.new("L", (large, large))
    SHAPES[name](ImageDraw.Draw(mask), large)
    mask = mask.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR, expand=True)
    aspect = math.exp(rng.uniform(-0.4, 0.4))
    width, height = side * min(1, aspect), side * min(1, 1 / aspect)
    return mask.resize((max(6, round(width)), max(6, round(height))), Image.Resampling.BOX)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def draw_image(rng: np.random.Generator) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Draws an image with up to seven objects.

    Returns:
        An RGB image, and its objects: dicts of name, box (xmin, ymin, xmax, ymax, in whole pixels that count from 1 and
        belong to the object, as in VOC), difficult and truncated.
    """
    width, height = (int(side) for side in rng.integers(280, 401, size=2))
    image = draw_background(rng, width, height)
    owner = np.full((height, width), -1)  # which object each pixel shows
    drawn = []  # (name, number of pixels it would have alone and inside of the frame)
    count = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, 8))
    for number in range(count):
        name = str(rng.choice(list(SHAPES)))
        low, high = SIDES[rng.choice(len(SIDES), p=SIDE_ODDS)]
        mask = draw_mask(rng, name, int(rng.integers(low, high)))
        # Up to a third of a shape may lie outside the frame.
        x = int(rng.integers(-mask.width // 3, width - 2 * mask.width // 3))
        y = int(rng.integers(-mask.height // 3, height - 2 * mask.height // 3))
        colour = tuple(int(c) for c in rng.integers(0, 256, size=3))
        image.paste(colour, (x, y), mask)
        solid = np.asarray(mask) > 127
        drawn.append((name, int(solid.sum())))
        inside = solid[max(0, -y) : height - y, max(0, -x) : width - x]
        region = owner[max(0, y) : y + mask.height, max(0, x) : x + mask.width]
        region[inside] = number
    noise = rng.normal(0, rng.uniform(0, 8), size=(height, width, 1))
    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    objects = [describe_object(owner == number, name, pixels) for number, (name, pixels) in enumerate(drawn)]
    return image, [obj for obj in objects if obj is not None]


def describe_object(visible: np.ndarray, name: str, pixels: int) -> dict[str, Any] | None:
    """Returns the annotation of an object, as in draw_image; None if less than a tenth of it is visible.

    Args:
        visible: (H, W) bool, which pixels of the image show it.
        name: of its class.
        pixels: number of pixels it would have alone and inside of the frame.
    """
    share = visible.sum() / pixels
    if share < 0.1:
        return None
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    height, width = visible.shape
    truncated = rows[0] == 0 or columns[0] == 0 or rows[-1] == height - 1 or columns[-1] == width - 1
    return {
        "name": name,
        "box": (int(columns[0]) + 1, int(rows[0]) + 1, int(columns[-1]) + 1, int(rows[-1]) + 1),
        "difficult": bool(share < LITTLE_VISIBLE),
        "truncated": bool(truncated),
    }


def draw_background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Returns an RGB image of blurred patches of colour and strokes, as clutter."""
    coarse = rng.integers(0, 256, size=(int(rng.integers(3, 9)), int(rng.integers(3, 9)), 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(10, 40))):
        colour = tuple(int(c) for c in rng.integers(0, 256, size=3))
        points = [(int(x), int(y)) for x, y in zip(rng.integers(0, width, 3), rng.integers(0, height, 3), strict=True)]
        draw.line(points, fill=colour, width=int(rng.integers(1, 5)), joint="curve")
    return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.5))))


def to_xml(name: str, size: tuple[int, int], objects: Sequence[dict[str, Any]]) -> str:
    """Returns a VOC annotation.

    Args:
        name: of the image, without its ending.
        size: (width, height) in pixels.
        objects: as draw_image returns them.
    """
    width, height = size
    lines = [f"<annotation><folder>synthetic</folder><filename>{escape(name)}.jpg</filename>"]
    lines.append(f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>")
    for obj in objects:
        corners = zip(("xmin", "ymin", "xmax", "ymax"), obj["box"], strict=True)
        lines.append(
            f"<object><name>{obj['name']}</name><truncated>{int(obj['truncated'])}</truncated>"
            f"<difficult>{int(obj['difficult'])}</difficult>"
            f"<bndbox>{''.join(f'<{tag}>{value}</{tag}>' for tag, value in corners)}</bndbox></object>"
        )
    return "\n".join([*lines, "</annotation>", ""])


if __name__ == "__main__":
    main()
