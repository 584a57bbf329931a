"""SSD's augmentation as one resampling and one colour matrix for each image; mosaic and copy-paste, which build on it.

A *view* is the rectangle of the original image that fills the network's input: the result of SSD's zoom-out and IoU
crop, larger than the image where SSD zooms out. A *colour matrix* (3, 4) holds brightness, contrast, saturation, hue.
Both are sampled first, and then each pixel of the result is computed once.

    pixels, objects = augment(np.random.default_rng(0), pixels, target, 300, 300, AugmentConfig())

`pixels` is uint8 (3, H, W), best channels last in memory, as images are decoded, and may be those of a smaller copy.
`target` is what DataList.target returns: boxes in pixels of the original, whose height and width is `size`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn.functional import conv2d, interpolate

FILL = (124, 116, 104)  # RGB of what lies outside of the image: ImageNet's mean colour

Rng = np.random.Generator
Objects = dict[str, np.ndarray]  # boxes (n, 4), labels, difficult, crowd (n,) of a sample
Target = dict[str, Any]  # the same of an image, and its size, (height, width)
Placement = tuple[float, float, float, float]  # see render_view


@dataclass(frozen=True)
class AugmentConfig:
    """Probabilities and ranges of SSD's augmentation (arXiv:1512.02325, 2.2 and 3.6), mosaic and copy-paste."""

    zoom_out: float = 0.5  # probability
    zoom_out_max: float = 4.0  # largest ratio of the view's sides to the image's
    crop_min_overlaps: tuple = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # IoU thresholds, equally likely; 1 is no crop
    crop_trials: int = 50  # random crops for each sampled threshold; if none reaches it, another one is sampled
    crop_min_side: float = 0.3  # smallest ratio of the crop's sides to the view's
    crop_max_aspect: float = 2.0  # largest ratio of the crop's sides to each other
    flip: float = 0.5  # probability
    min_side: float = 1.0  # objects with less width or height in the result, in pixels, are dropped

    brightness: float = 32.0  # grey levels, added
    contrast: float = 0.5  # factor 1 +- this
    saturation: float = 0.5  # factor 1 +- this
    hue: float = 18.0  # degrees
    colour: float = 0.5  # probability of each of the four

    mosaic: float = 0.0  # probability: four images, each with a view of its own, share the square
    mosaic_margin: float = 0.25  # smallest distance of the point where they meet from the edges, relative to the side
    copy_paste: float = 0.0  # probability: objects of another image are pasted in, as rectangles
    copy_paste_most: int = 3  # largest number of pasted objects
    copy_paste_scale: tuple = (0.5, 1.5)  # range of the factor on an object's size, its image resized to the square
    copy_paste_max_cover: float = 0.1  # largest part of an object that a pasted one covers
    close_epochs: int = 10  # number of epochs at the end of a training without mosaic and copy-paste

    def closed(self) -> "AugmentConfig":
        """Returns the same settings without mosaic and copy-paste."""
        return replace(self, mosaic=0.0, copy_paste=0.0)


NO_AUGMENTATION = AugmentConfig(zoom_out=0, crop_min_overlaps=(1.0,), flip=0, colour=0)


# ---------------------------------------------------------------------------------------------------------------------
# The view


def sample_view(rng: Rng, size: tuple[int, int], boxes: np.ndarray, config: AugmentConfig) -> np.ndarray:
    """Samples SSD's zoom-out and IoU crop as one rectangle.

    A crop has to reach the sampled IoU with one object and to contain the centre of one; if no trial does, another IoU
    is sampled.

    Args:
        rng: source of the randomness.
        size: height and width of the image in pixels.
        boxes: (n, 4) xyxy in pixels of the image.
        config: probabilities and ranges.

    Returns:
        (4,) xyxy in pixels of the image, beyond which it may extend.
    """
    height, width = size
    view = np.array([0.0, 0.0, width, height])
    if rng.random() < config.zoom_out:
        ratio = rng.uniform(1, config.zoom_out_max)
        left, top = rng.uniform(0, (ratio - 1) * width), rng.uniform(0, (ratio - 1) * height)
        view = np.array([-left, -top, ratio * width - left, ratio * height - top])
    if len(boxes) == 0:
        return view
    for _ in range(20):  # one choice in seven is no crop, so 20 rounds nearly always suffice
        min_overlap = config.crop_min_overlaps[rng.integers(len(config.crop_min_overlaps))]
        if min_overlap >= 1:
            return view
        crops = _sample_crops(rng, view, config)  # all trials at once: (trials, 4)
        good = centres_inside(crops, boxes).any(axis=1) & (_overlaps(crops, boxes).max(axis=1) >= min_overlap)
        if good.any():
            return crops[good.argmax()]
    return view


def _sample_crops(rng: Rng, canvas: np.ndarray, config: AugmentConfig) -> np.ndarray:
    """Returns crop_trials random rectangles inside the canvas (4,), less those of extreme aspect: (n, 4)."""
    canvas_sides = canvas[2:] - canvas[:2]
    draws = rng.random((config.crop_trials, 4))
    sides = canvas_sides * (config.crop_min_side + (1 - config.crop_min_side) * draws[:, :2])
    corners = canvas[:2] + draws[:, 2:] * (canvas_sides - sides)
    aspects = sides[:, 0] / sides[:, 1]
    allowed = (aspects <= config.crop_max_aspect) & (aspects >= 1 / config.crop_max_aspect)
    return np.concatenate([corners, corners + sides], axis=1)[allowed]


def _columns(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x0, y0, x1, y1 of boxes (n, 4). Such small arrays are fastest with few numpy calls."""
    return boxes[:, 0], boxes[:, 1], boxes[:, 2], boxes[:, 3]


def _intersections(rectangles: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Areas (m, n) of the intersections of rectangles (m, 4) with boxes (n, 4)."""
    x0, y0, x1, y1 = _columns(boxes)
    left, top, right, bottom = _columns(rectangles[:, :, None])
    width = np.minimum(right, x1) - np.maximum(left, x0)
    height = np.minimum(bottom, y1) - np.maximum(top, y0)
    return np.maximum(width, 0) * np.maximum(height, 0)


def _areas(boxes: np.ndarray) -> np.ndarray:
    x0, y0, x1, y1 = _columns(boxes)
    return (x1 - x0) * (y1 - y0)


def _overlaps(rectangles: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU (m, n) of rectangles (m, 4) with boxes (n, 4)."""
    shared = _intersections(rectangles, boxes)
    return shared / (_areas(rectangles)[:, None] + _areas(boxes) - shared)


def centres_inside(views: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Returns (m, n) bool: whether each of the views (m, 4) contains the centre of each of the boxes (n, 4)."""
    x0, y0, x1, y1 = _columns(boxes)
    left, top, right, bottom = _columns(views[:, :, None])
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return (x >= left) & (x < right) & (y >= top) & (y < bottom)


def render_view(
    pixels: torch.Tensor,
    view: np.ndarray,
    width: int,
    height: int,
    flip: bool = False,
    colour_matrix: np.ndarray | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, Placement]:
    """Renders the part of an image that a view shows. What lies outside of the image has the colour FILL.

    Args:
        pixels: uint8 (3, H, W).
        view: (4,) xyxy in pixels of `size`.
        width, height: of the result, in pixels.
        flip: whether to mirror it left to right.
        colour_matrix: (3, 4), see change_colour; None changes no colour.
        size: height and width of the original, where `pixels` are those of a smaller copy.

    Returns:
        uint8 (3, height, width), and its placement (scale_x, scale_y, shift_x, shift_y): a point x of the original lies
        at x * scale_x + shift_x in the result, before the flip. The part of the image is rounded to whole pixels before
        it is resized, and so is where it goes; the placement includes both, so boxes move exactly with their pixels.
    """
    frame, target = np.array([pixels.shape[2], pixels.shape[1]]), np.array([width, height])
    stored = 1.0 if size is None else frame / (size[1], size[0])
    near, far = view[:2] * stored, view[2:] * stored
    first = np.rint(near).clip(0, frame - 1)
    last = np.rint(far).clip(first + 1, frame)
    # Edges of the view inside the image move to whole pixels with it.
    near, far = np.where(near < 0, near, first), np.where(far > frame, far, last)
    to_target = target / (far - near)
    corner = np.rint((first - near) * to_target).clip(0, target - 1)
    opposite = np.rint((last - near) * to_target).clip(corner + 1, target)
    scale = (opposite - corner) / (last - first)
    shift = corner - first * scale

    (x0, y0), (x1, y1) = first.astype(int).tolist(), last.astype(int).tolist()
    (left, top), (right, bottom) = corner.astype(int).tolist(), opposite.astype(int).tolist()
    patch = resize(pixels[:, y0:y1, x0:x1], right - left, bottom - top)
    if colour_matrix is not None:
        patch = change_colour(patch, colour_matrix)
    if patch.shape[1:] != (height, width):
        rectangle = _filled(width, height).clone()
        rectangle[:, top:bottom, left:right] = patch
        patch = rectangle
    return (patch.flip(2) if flip else patch), (*(scale * stored), *shift)


def resize(pixels: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Resizes uint8 (3, H, W) to uint8 (3, height, width): bilinear, with antialiasing, as PIL does."""
    return interpolate(pixels[None], (height, width), mode="bilinear", antialias=True)[0]


@lru_cache(maxsize=4)
def _filled(width: int, height: int) -> torch.Tensor:
    """uint8 (3, height, width) of the colour FILL, channels last in memory."""
    return torch.tensor(FILL, dtype=torch.uint8).expand(height, width, 3).contiguous().permute(2, 0, 1)


def move_boxes(boxes: np.ndarray, placement: Placement, width: int, height: int, flip: bool = False) -> np.ndarray:
    """Transforms boxes (n, 4) of the original to pixels of what render_view made of it, and clips them to that.

    Args:
        boxes: (n, 4) xyxy in pixels of the original.
        placement, width, height, flip: as render_view returned and took them.
    """
    scale_x, scale_y, shift_x, shift_y = placement
    moved = boxes * (scale_x, scale_y, scale_x, scale_y) + (shift_x, shift_y, shift_x, shift_y)
    if flip:
        moved[:, [0, 2]] = width - moved[:, [2, 0]]
    return moved.clip(0, (width, height, width, height))


# ---------------------------------------------------------------------------------------------------------------------
# Colour

# RGB -> YIQ (NTSC): Y is luma, I and Q the plane that hue turns and saturation scales.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_FROM_YIQ = np.linalg.inv(_YIQ)


def sample_colour_matrix(rng: Rng, config: AugmentConfig) -> np.ndarray | None:
    """Samples SSD's changes of brightness, contrast, saturation and hue as one matrix.

    Brightness is added, contrast is a factor on everything, saturation one on the distance from luma, hue a rotation
    in the IQ plane of YIQ; there is no rounding or clipping in between, as there is in SSD's own code.

    Returns:
        (3, 4) float64: the linear part, then the offset in grey levels; None for no change.
    """

    def factor(spread: float) -> float:
        return 1 + rng.uniform(-spread, spread) if rng.random() < config.colour else 1.0

    shift = rng.uniform(-config.brightness, config.brightness) if rng.random() < config.colour else 0.0
    contrast, saturation = factor(config.contrast), factor(config.saturation)
    angle = math.radians(rng.uniform(-config.hue, config.hue)) if rng.random() < config.colour else 0.0
    if (shift, contrast, saturation, angle) == (0, 1, 1, 0):
        return None
    # Contrast is a plain factor and saturation and hue are linear, so the order of these three changes nothing.
    cos, sin = saturation * math.cos(angle), saturation * math.sin(angle)
    linear = contrast * (_FROM_YIQ @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _YIQ)
    return np.concatenate([linear, shift * linear.sum(axis=1, keepdims=True)], axis=1)


def change_colour(pixels: torch.Tensor, matrix: np.ndarray) -> torch.Tensor:
    """Applies a colour matrix (3, 4) to uint8 (3, H, W); rounds and clips once."""
    weight = torch.from_numpy(matrix).float()
    changed = conv2d(pixels[None].float(), weight[:, :3, None, None], weight[:, 3])
    return changed.round_().clamp_(0, 255).to(torch.uint8)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def augment(
    rng: Rng, pixels: torch.Tensor, target: Target, width: int, height: int, config: AugmentConfig
) -> tuple[torch.Tensor, Objects]:
    """Renders a photograph through a sampled view, with sampled colours.

    An object is kept if its centre lies in the view, which is SSD's rule (a crowd's need not), and if config.min_side
    pixels of its width and height are left.

    Args:
        rng: source of the randomness.
        pixels, target: the image and its objects.
        width, height: of the result, in pixels.
        config: probabilities and ranges.

    Returns:
        uint8 (3, height, width), and the objects in it: boxes (n, 4) float64 in its pixels, labels (n,) int64,
        difficult and crowd (n,) bool.
    """
    boxes, crowd, size = target["boxes"].astype(np.float64), target["crowd"], target["size"]
    view = sample_view(rng, size, boxes[~crowd], config)
    flip = bool(rng.random() < config.flip)
    colour_matrix = sample_colour_matrix(rng, config)
    rendered, placement = render_view(pixels, view, width, height, flip, colour_matrix, size)
    moved = move_boxes(boxes, placement, width, height, flip)
    kept = centres_inside(view[None], boxes)[0] | crowd
    kept &= (moved[:, 2:] - moved[:, :2] >= config.min_side).all(axis=1)
    return rendered, {"boxes": moved[kept], **_rows(target, kept)}


def _rows(target: Target, rows: np.ndarray | slice) -> Objects:
    """Some of a target's objects, without their boxes."""
    return {name: target[name][rows] for name in ("labels", "difficult", "crowd")}


def mosaic(
    rng: Rng, images: Sequence[tuple[torch.Tensor, Target]], side: int, config: AugmentConfig
) -> tuple[torch.Tensor, Objects]:
    """Joins four images around a random point of a square (YOLOv4, arXiv:2004.10934), each augmented on its own.

    Returns:
        uint8 (3, side, side), and the objects in it, as augment does.
    """
    low, high = config.mosaic_margin * side, (1 - config.mosaic_margin) * side
    x, y = (round(rng.uniform(low, high)) for _ in range(2))
    square = _filled(side, side).clone()
    parts = [(0, 0, x, y), (x, 0, side, y), (0, y, x, side), (x, y, side, side)]
    gathered = []
    for number, (pixels, target) in zip(rng.permutation(4), images, strict=True):
        x0, y0, x1, y1 = parts[number]
        square[:, y0:y1, x0:x1], objects = augment(rng, pixels, target, x1 - x0, y1 - y0, config)
        objects["boxes"] = objects["boxes"] + (x0, y0, x0, y0)
        gathered.append(objects)
    return square, _joined(gathered)


def copy_paste(
    rng: Rng, pixels: torch.Tensor, objects: Objects, donor: tuple[torch.Tensor, Target], config: AugmentConfig
) -> tuple[torch.Tensor, Objects]:
    """Pastes objects of another image into a sample, where they cover little of the objects in it.

    Cut, paste and learn (arXiv:1708.01642), but with rectangles, because there are no masks: the other objects of the
    donor whose centres a rectangle shows come with it, and its crowds, as in augment.

    Args:
        rng: source of the randomness.
        pixels, objects: the sample, as augment returns it; both stay as they are.
        donor: pixels and target of the image whose objects to paste.
        config: probabilities and ranges.

    Returns:
        The new pixels, and the objects with the pasted ones after them.
    """
    height, width = pixels.shape[1:]
    donor_pixels, target = donor
    donor_boxes = target["boxes"].astype(np.float64)
    usable = np.flatnonzero(~target["crowd"])
    count = min(len(usable), int(rng.integers(1, config.copy_paste_most + 1)))
    pixels = pixels.clone()
    to_square = np.array([width, height]) / (target["size"][1], target["size"][0])
    for row in rng.choice(usable, count, replace=False):
        box = donor_boxes[row]
        sides = np.rint((box[2:] - box[:2]) * to_square * rng.uniform(*config.copy_paste_scale)).astype(int)
        if (sides < max(config.min_side, 1)).any() or (sides > (width, height)).any():
            continue
        place = _free_place(rng, sides, (width, height), objects["boxes"], config.copy_paste_max_cover)
        if place is None:
            continue
        flip, colour_matrix = bool(rng.random() < config.flip), sample_colour_matrix(rng, config)
        patch_width, patch_height = sides.tolist()
        patch, placement = render_view(
            donor_pixels, box, patch_width, patch_height, flip, colour_matrix, target["size"]
        )
        x0, y0, x1, y1 = place.tolist()
        pixels[:, y0:y1, x0:x1] = patch
        moved = move_boxes(donor_boxes, placement, patch_width, patch_height, flip)
        shown = centres_inside(box[None], donor_boxes)[0] | target["crowd"]
        shown &= (moved[:, 2:] - moved[:, :2] >= max(config.min_side, 1)).all(axis=1)
        moved[row], shown[row] = (0, 0, patch_width, patch_height), True
        objects = _joined([objects, {"boxes": moved[shown] + (x0, y0, x0, y0), **_rows(target, shown)}])
    return pixels, objects


def _free_place(
    rng: Rng, sides: np.ndarray, square: tuple[int, int], boxes: np.ndarray, max_cover: float
) -> np.ndarray | None:
    """A random rectangle (4,) of these sides that covers at most max_cover of each box; None after ten trials."""
    corners = rng.integers(0, np.array(square) - sides + 1, size=(10, 2))
    places = np.concatenate([corners, corners + sides], axis=1)
    covered = _intersections(places, boxes) / _areas(boxes)
    free = (covered <= max_cover).all(axis=1)
    return places[free.argmax()] if free.any() else None


def _joined(parts: Sequence[Objects]) -> Objects:
    """The objects of all parts, one after another."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
