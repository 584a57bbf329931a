"""SSD's augmentation as two sampled things, each of which costs one pass over few pixels; mosaic and copy-paste on top.

A *view* is the rectangle of the original image that fills the network's square: SSD's zoom-out, IoU crop and flip in
one, larger than the image when SSD zooms out. A *colour matrix* (3x4) holds brightness, contrast, saturation and hue.

    photograph = Photograph(pixels, boxes, labels, difficult, crowd, size)
    pixels, objects = augment(np.random.default_rng(0), photograph, 300, 300, AugmentConfig())
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch.nn.functional import conv2d, interpolate

FILL = (124, 116, 104)  # ImageNet's mean colour: what lies outside the image


@dataclass(frozen=True)
class AugmentConfig:
    """SSD's augmentation (arXiv:1512.02325, sections 2.2 and 3.6) and two options; every probability and range."""

    zoom_out: float = 0.5  # probability
    zoom_out_max: float = 4.0  # the view's sides, up to so many times the image's
    crop_min_overlaps: tuple = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # drawn evenly; 1 is no crop
    crop_trials: int = 50  # for a drawn overlap; without a hit another one is drawn
    crop_min_side: float = 0.3
    crop_max_aspect: float = 2.0
    flip: float = 0.5  # probability
    min_side: float = 1.0  # pixels of the square: objects of which a view leaves less, in width or height, are dropped

    brightness: float = 32.0  # grey levels, added
    contrast: float = 0.5  # factor 1 +- this
    saturation: float = 0.5  # factor 1 +- this
    hue: float = 18.0  # degrees
    colour: float = 0.5  # probability of each of the four

    mosaic: float = 0.0  # probability: four images, each with a view of its own, share the square
    mosaic_margin: float = 0.25  # they meet at least so far from the square's edges
    copy_paste: float = 0.0  # probability: objects of another image are pasted in, as rectangles
    copy_paste_most: int = 3  # objects
    copy_paste_scale: tuple = (0.5, 1.5)  # factor on the size they have in their own image's square
    copy_paste_max_cover: float = 0.1  # of any object that is there already
    close_epochs: int = 10  # so many epochs at the end go without mosaic and copy-paste

    def closed(self):
        """The same without mosaic and copy-paste."""
        return replace(self, mosaic=0.0, copy_paste=0.0)


NO_AUGMENTATION = AugmentConfig(zoom_out=0, crop_min_overlaps=(1.0,), flip=0, colour=0)


@dataclass
class Photograph:
    """A decoded image and its objects. The image may be stored smaller than `size`, in which the boxes are measured."""

    pixels: torch.Tensor  # uint8 (3, H, W); fastest if it lies channels last, as decoders give it
    boxes: np.ndarray  # (n, 4) float64 xyxy in pixels of `size`
    labels: np.ndarray  # (n,)
    difficult: np.ndarray  # (n,) bool
    crowd: np.ndarray  # (n,) bool
    size: tuple  # (height, width) of the original


# ---------------------------------------------------------------------------------------------------------------------
# The view


def sample_view(rng, size, boxes, config):
    """SSD's zoom-out and IoU crop in one: a rectangle (x0, y0, x1, y1) in pixels of the image, which it may exceed.

    size: (height, width); boxes (n, 4). A crop must overlap some object by the drawn IoU and hold some object's centre;
    when no trial does, another IoU is drawn.
    """
    height, width = size
    view = np.array([0.0, 0.0, width, height])
    if rng.random() < config.zoom_out:
        ratio = rng.uniform(1, config.zoom_out_max)
        left, top = rng.uniform(0, (ratio - 1) * width), rng.uniform(0, (ratio - 1) * height)
        view = np.array([-left, -top, ratio * width - left, ratio * height - top])
    if len(boxes) == 0:
        return view
    for _ in range(20):  # "no crop" is among the choices, so that one round in seven is the last whatever the objects
        min_overlap = config.crop_min_overlaps[rng.integers(len(config.crop_min_overlaps))]
        if min_overlap >= 1:
            return view
        crops = _sample_crops(rng, view, config)  # all trials at once: (trials, 4)
        good = (centres_inside(crops, boxes) & (_overlaps(crops, boxes).max(axis=1) >= min_overlap)[:, None]).any(
            axis=1
        )
        if good.any():
            return crops[good.argmax()]
    return view


def _sample_crops(rng, canvas, config):
    """Rectangles (n, 4) inside the canvas (4,), n up to config.crop_trials: those whose aspect is allowed."""
    canvas_sides = canvas[2:] - canvas[:2]
    draws = rng.random((config.crop_trials, 4))
    sides = canvas_sides * (config.crop_min_side + (1 - config.crop_min_side) * draws[:, :2])
    corners = canvas[:2] + draws[:, 2:] * (canvas_sides - sides)
    aspects = sides[:, 0] / sides[:, 1]
    allowed = (aspects <= config.crop_max_aspect) & (aspects >= 1 / config.crop_max_aspect)
    return np.concatenate([corners, corners + sides], axis=1)[allowed]


def _columns(boxes):
    """x0, y0, x1, y1 of boxes (n, 4). On arrays as small as these, few operations matter more than short ones."""
    return boxes[:, 0], boxes[:, 1], boxes[:, 2], boxes[:, 3]


def _shared_areas(rectangles, boxes):
    """(m, n): the area that each of rectangles (m, 4) shares with each of boxes (n, 4)."""
    x0, y0, x1, y1 = _columns(boxes)
    left, top, right, bottom = _columns(rectangles[:, :, None])
    width = np.minimum(right, x1) - np.maximum(left, x0)
    height = np.minimum(bottom, y1) - np.maximum(top, y0)
    return np.maximum(width, 0) * np.maximum(height, 0)


def _areas(boxes):
    x0, y0, x1, y1 = _columns(boxes)
    return (x1 - x0) * (y1 - y0)


def _overlaps(rectangles, boxes):
    """IoU of rectangles (m, 4) with boxes (n, 4): (m, n)."""
    shared = _shared_areas(rectangles, boxes)
    return shared / (_areas(rectangles)[:, None] + _areas(boxes) - shared)


def centres_inside(views, boxes):
    """(m, n): whether the centre of each of boxes (n, 4) lies in each of views (m, 4)."""
    x0, y0, x1, y1 = _columns(boxes)
    left, top, right, bottom = _columns(views[:, :, None])
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return (x >= left) & (x < right) & (y >= top) & (y < bottom)


def render_view(pixels, view, width, height, flip=False, colour_matrix=None, size=None):
    """What the view (4,) of an image, uint8 (3, H, W), shows: uint8 (3, height, width), and where its pixels went.

    The part of the view that the image covers, in whole pixels, is resized once, into whole pixels of a rectangle of
    the mean colour. size: (height, width) in whose pixels the view is measured, where the image is stored smaller.
    Returns (pixels, (scale_x, scale_y, shift_x, shift_y)): x of `size` lies at x * scale_x + shift_x in the rectangle,
    before the flip. Exact: rounding to whole pixels is part of these numbers, so boxes move with their pixels.
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


def resize(pixels, width, height):
    """uint8 (3, H, W) -> uint8 (3, height, width), bilinear, each pixel an average of all that fall on it."""
    return interpolate(pixels[None], (height, width), mode="bilinear", antialias=True)[0]


@lru_cache(maxsize=4)
def _filled(width, height):
    """uint8 (3, height, width) of the fill colour, lying channels last."""
    return torch.tensor(FILL, dtype=torch.uint8).expand(height, width, 3).contiguous().permute(2, 0, 1)


def move_boxes(boxes, placement, width, height, flip=False):
    """Boxes (n, 4) of the image, in pixels of the rectangle that render_view made, clipped to it."""
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


def sample_colour_matrix(rng, config):
    """A 3x4 matrix (linear part, then offset in grey levels) that changes brightness, contrast, saturation and hue.

    The definition of the change: brightness adds, contrast scales, saturation blends with luma, hue turns in YIQ, with
    no rounding or clipping in between. SSD's order: brightness first, contrast second or last. None: no change.
    """

    def factor(spread):
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


def change_colour(pixels, matrix):
    """A 3x4 matrix applied to uint8 (3, H, W), rounded and clipped once."""
    matrix = torch.from_numpy(matrix).float()
    changed = conv2d(pixels[None].float(), matrix[:, :3, None, None], matrix[:, 3])
    return changed.round_().clamp_(0, 255).to(torch.uint8)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def augment(rng, photograph, width, height, config):
    """One photograph, seen through a sampled view: pixels uint8 (3, height, width), and the objects left in it.

    The objects are a dict of boxes (n, 4) in those pixels, labels, difficult, crowd (n,). SSD's rule for what is left:
    the object's centre lies in the view (a crowd needs none), and config.min_side pixels of it, both ways.
    """
    boxes, crowd = photograph.boxes, photograph.crowd
    view = sample_view(rng, photograph.size, boxes[~crowd], config)
    flip = bool(rng.random() < config.flip)
    colour_matrix = sample_colour_matrix(rng, config)
    pixels, placement = render_view(photograph.pixels, view, width, height, flip, colour_matrix, photograph.size)
    moved = move_boxes(boxes, placement, width, height, flip)
    kept = centres_inside(view[None], boxes)[0] | crowd
    kept &= (moved[:, 2:] - moved[:, :2] >= config.min_side).all(axis=1)
    objects = {
        "boxes": moved[kept],
        "labels": photograph.labels[kept],
        "difficult": photograph.difficult[kept],
        "crowd": crowd[kept],
    }
    return pixels, objects


def mosaic(rng, photographs, side, config):
    """Four photographs around a point of the square (YOLOv4, arXiv:2004.10934), each augmented on its own."""
    low, high = config.mosaic_margin * side, (1 - config.mosaic_margin) * side
    x, y = (round(rng.uniform(low, high)) for _ in range(2))
    square = _filled(side, side).clone()
    parts = [(0, 0, x, y), (x, 0, side, y), (0, y, x, side), (x, y, side, side)]
    gathered = []
    for number, photograph in zip(rng.permutation(4), photographs, strict=True):
        x0, y0, x1, y1 = parts[number]
        square[:, y0:y1, x0:x1], objects = augment(rng, photograph, x1 - x0, y1 - y0, config)
        objects["boxes"] = objects["boxes"] + (x0, y0, x0, y0)
        gathered.append(objects)
    return square, _joined(gathered)


def copy_paste(rng, pixels, objects, donor, config):
    """Pastes objects of the donor, a Photograph, into a sample as rectangles, where they cover little of what is there.

    The idea is Dwibedi et al.'s (arXiv:1708.01642), with boxes for want of masks.
    """
    height, width = pixels.shape[1:]
    usable = np.flatnonzero(~donor.crowd)
    count = min(len(usable), int(rng.integers(1, config.copy_paste_most + 1)))
    pixels = pixels.clone()
    to_square = np.array([width, height]) / (donor.size[1], donor.size[0])
    for row in rng.choice(usable, count, replace=False):
        box = donor.boxes[row]
        sides = np.rint((box[2:] - box[:2]) * to_square * rng.uniform(*config.copy_paste_scale)).astype(int)
        if (sides < max(config.min_side, 1)).any() or (sides > (width, height)).any():
            continue
        place = _free_place(rng, sides, (width, height), objects["boxes"], config.copy_paste_max_cover)
        if place is None:
            continue
        flip, colour_matrix = bool(rng.random() < config.flip), sample_colour_matrix(rng, config)
        patch, _ = render_view(donor.pixels, box, *sides.tolist(), flip, colour_matrix, donor.size)
        x0, y0, x1, y1 = place.tolist()
        pixels[:, y0:y1, x0:x1] = patch
        pasted = {name: getattr(donor, name)[row : row + 1] for name in ("labels", "difficult", "crowd")}
        objects = _joined([objects, {"boxes": place[None].astype(float), **pasted}])
    return pixels, objects


def _free_place(rng, sides, square, boxes, max_cover):
    """A rectangle of these sides that covers at most max_cover of each of boxes (n, 4); None after ten trials."""
    corners = rng.integers(0, np.array(square) - sides + 1, size=(10, 2))
    places = np.concatenate([corners, corners + sides], axis=1)
    covered = _shared_areas(places, boxes) / _areas(boxes)
    free = (covered <= max_cover).all(axis=1)
    return places[free.argmax()] if free.any() else None


def _joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
