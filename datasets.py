"""Data list -> (image, target): reading, SSD's augmentation, loading.

    dataset = DetectionDataset(DataList.load("data/vocreal/train.json"), image_size=300, augment=True, seed=0)
    loader = make_loader(dataset, batch_size=32, epoch_sampler=EpochSampler(len(dataset), seed=0))

An augmented sample is two sampled things: a view, the rectangle of the original image that fills the network's square
(larger than the image when SSD zooms out), and a 3x4 colour matrix. Each costs one pass over few pixels.
"""

import json
import math
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from utils import InputError

FILL = (124, 116, 104)  # ImageNet's mean colour: what lies outside the image


class DataError(InputError):
    """A data list or an image that cannot be used; says which, and what to do."""


@dataclass
class DataList:
    """A COCO JSON file, as arrays. Objects of image i are rows first[i]:first[i + 1]."""

    path: str
    image_root: Path
    file_names: list
    image_ids: list
    sizes: np.ndarray  # (images, 2) int64, height and width
    first: np.ndarray  # (images + 1,) int64
    boxes: np.ndarray  # (objects, 4) float32, xyxy in pixels
    labels: np.ndarray  # (objects,) int64, 1..C
    difficult: np.ndarray  # (objects,) bool
    crowd: np.ndarray  # (objects,) bool
    classes: tuple  # names of labels 1..C
    category_ids: tuple  # their ids in the file

    def __len__(self):
        return len(self.file_names)

    def target(self, index):
        """dict of boxes (n, 4), labels, difficult, crowd (n,), image_id, size (h, w), as numpy arrays."""
        rows = slice(self.first[index], self.first[index + 1])
        return {
            "boxes": self.boxes[rows],
            "labels": self.labels[rows],
            "difficult": self.difficult[rows],
            "crowd": self.crowd[rows],
            "image_id": self.image_ids[index],
            "size": tuple(int(side) for side in self.sizes[index]),
        }

    def image_path(self, index):
        return self.image_root / self.file_names[index]

    @classmethod
    def load(cls, path, images=None):
        """Reads a list as create_data_lists.py writes it; images: overrides info.image_root.

        DataError names what is wrong: no COCO JSON, an id that is unknown or there twice, a box that is empty or
        leaves its image.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no data list {str(path)!r}: python create_data_lists.py makes one")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls._from_coco(path, content, images)
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(f"{path} is no COCO JSON data list ({type(error).__name__}: {error})") from error

    @classmethod
    def _from_coco(cls, path, content, images):
        # An image root that is no absolute path is meant from where the list lies.
        root = Path(images) if images else path.parent / content.get("info", {}).get("image_root", ".")
        category_ids = tuple(category["id"] for category in content["categories"])
        label_of = {category_id: label for label, category_id in enumerate(category_ids, start=1)}
        row_of = {image["id"]: row for row, image in enumerate(content["images"])}
        if len(row_of) != len(content["images"]) or len(label_of) != len(category_ids):
            raise DataError(f"{path} gives the same id to two images or categories")
        objects = content["annotations"]
        for entry in objects:
            for key, known in (("image_id", row_of), ("category_id", label_of)):
                if entry[key] not in known:
                    raise DataError(f"{path}: annotation {entry.get('id')} names {key} {entry[key]!r}, not in the file")
        rows = np.array([row_of[entry["image_id"]] for entry in objects], dtype=np.int64)
        order = np.argsort(rows, kind="stable")
        boxes = np.array([entry["bbox"] for entry in objects], dtype=np.float32).reshape(-1, 4)[order]
        boxes[:, 2:] += boxes[:, :2]
        sizes = np.array([(i["height"], i["width"]) for i in content["images"]], dtype=np.int64).reshape(-1, 2)
        limits = np.concatenate([sizes, sizes], axis=1)[:, ::-1][rows[order]]  # (n, 4): width, height, width, height
        # Written so that NaN is bad too. A hundredth of a pixel is what rounding may add.
        good = (boxes >= -0.01).all(axis=1) & (boxes <= limits + 0.01).all(axis=1)
        bad = ~(good & (boxes[:, 2:] > boxes[:, :2]).all(axis=1))
        if bad.any():
            entry = objects[order[bad.argmax()]]
            problem = f"annotation {entry.get('id')} has a box {entry['bbox']} that is empty or leaves its image"
            raise DataError(f"{path}: {problem}; list the data anew")

        def column(values, dtype):
            return np.array(list(values), dtype=dtype)[order]

        return cls(
            path=str(path),
            image_root=root,
            file_names=[image["file_name"] for image in content["images"]],
            image_ids=[image["id"] for image in content["images"]],
            sizes=sizes,
            first=np.searchsorted(rows[order], np.arange(len(row_of) + 1)),
            boxes=boxes,
            labels=column((label_of[entry["category_id"]] for entry in objects), np.int64),
            difficult=column((entry.get("difficult", 0) for entry in objects), bool),
            crowd=column((entry.get("iscrowd", 0) for entry in objects), bool),
            classes=tuple(category["name"] for category in content["categories"]),
            category_ids=category_ids,
        )


def read_image(path):
    """An RGB PIL image, fully decoded; a DataError that names the file otherwise."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"image {path} is missing (--images FOLDER if the photographs moved)") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image {path} cannot be read: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation


@dataclass(frozen=True)
class AugmentConfig:
    """SSD's augmentation (arXiv:1512.02325, section 2.2 and 3.6); every probability and range."""

    zoom_out: float = 0.5  # probability
    zoom_out_max: float = 4.0  # the view's sides, up to so many times the image's
    crop_min_overlaps: tuple = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # drawn evenly; 1 is no crop
    crop_trials: int = 50
    crop_min_side: float = 0.3
    crop_max_aspect: float = 2.0
    flip: float = 0.5  # probability
    brightness: float = 32.0  # grey levels, added
    contrast: float = 0.5  # factor 1 +- this
    saturation: float = 0.5  # factor 1 +- this
    hue: float = 18.0  # degrees
    colour: float = 0.5  # probability of each of the four


NO_AUGMENTATION = AugmentConfig(zoom_out=0, crop_min_overlaps=(1.0,), flip=0, colour=0)


def sample_view(rng, size, boxes, config):
    """SSD's zoom-out and IoU crop in one: a rectangle (x0, y0, x1, y1) in pixels of the image, which it may exceed.

    size: (height, width); boxes (n, 4). A crop must overlap some object by the drawn IoU and hold some object's centre.
    """
    height, width = size
    view = np.array([0.0, 0.0, width, height])
    if rng.random() < config.zoom_out:
        ratio = rng.uniform(1, config.zoom_out_max)
        left, top = rng.uniform(0, (ratio - 1) * width), rng.uniform(0, (ratio - 1) * height)
        view = np.array([-left, -top, ratio * width - left, ratio * height - top])
    min_overlap = config.crop_min_overlaps[rng.integers(len(config.crop_min_overlaps))]
    if min_overlap >= 1 or len(boxes) == 0:
        return view
    canvas_sides = view[2:] - view[:2]
    for _ in range(config.crop_trials):
        sides = canvas_sides * rng.uniform(config.crop_min_side, 1, size=2)
        corner = view[:2] + rng.uniform(0, 1, size=2) * (canvas_sides - sides)
        if not 1 / config.crop_max_aspect <= sides[0] / sides[1] <= config.crop_max_aspect:
            continue
        crop = np.concatenate([corner, corner + sides])
        if _overlaps(crop, boxes).max() >= min_overlap and centre_inside(boxes, crop).any():
            return crop
    return view


def _overlaps(crop, boxes):
    """IoU of one rectangle (4,) with boxes (n, 4)."""
    sides = np.minimum(crop[2:], boxes[:, 2:]) - np.maximum(crop[:2], boxes[:, :2])
    intersection = sides.clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return intersection / (areas + (crop[2:] - crop[:2]).prod() - intersection)


def centre_inside(boxes, view):
    """Which boxes (n, 4) have their centre in the view (4,): the ones SSD keeps."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centres >= view[:2]) & (centres < view[2:])).all(axis=1)


# RGB -> YIQ (NTSC): Y is luma, I and Q the plane that hue turns and saturation scales.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_LUMA = _YIQ[0]


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
    # Contrast is a plain factor and saturation and hue are linear, so the order of these three changes nothing.
    blend = saturation * np.eye(3) + (1 - saturation) * np.tile(_LUMA, (3, 1))
    turn = np.array(
        [[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]],
    )
    linear = contrast * (np.linalg.inv(_YIQ) @ turn @ _YIQ @ blend)
    matrix = np.concatenate([linear, linear @ np.full((3, 1), shift)], axis=1)
    return None if np.allclose(matrix, np.eye(3, 4)) else matrix


def render_view(image, view, side, flip=False, colour_matrix=None):
    """What the network sees of a PIL image: uint8 (side, side, 3), and where its pixels went.

    The part of the view that the image covers is resized once, into whole pixels of a square of the mean colour.
    Returns (pixels, (scale_x, scale_y, shift_x, shift_y)): x in the image lies at x * scale_x + shift_x in the square,
    before the flip. Exact: rounding to whole pixels is part of these numbers, so boxes move with their pixels.
    """
    frame = np.array([0.0, 0.0, image.width, image.height])
    part = np.concatenate([np.maximum(view[:2], frame[:2]), np.minimum(view[2:], frame[2:])])
    to_square = side / (view[2:] - view[:2])
    corner = np.rint((part[:2] - view[:2]) * to_square).astype(int).clip(0, side - 1)
    opposite = np.rint((part[2:] - view[:2]) * to_square).astype(int).clip(corner + 1, side)
    patch = image.resize(tuple(opposite - corner), Image.Resampling.BILINEAR, box=tuple(part), reducing_gap=2)
    if colour_matrix is not None:
        patch = patch.convert("RGB", tuple(colour_matrix.flatten()))
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = FILL
    square[corner[1] : opposite[1], corner[0] : opposite[0]] = patch
    scale = (opposite - corner) / (part[2:] - part[:2])
    shift = corner - part[:2] * scale
    return (np.ascontiguousarray(square[:, ::-1]) if flip else square), (*scale, *shift)


def move_boxes(boxes, placement, side, flip=False):
    """Boxes (n, 4) of the image, in pixels of the square that render_view made, clipped to it."""
    scale_x, scale_y, shift_x, shift_y = placement
    moved = boxes * np.array([scale_x, scale_y] * 2) + np.array([shift_x, shift_y] * 2)
    if flip:
        moved[:, [0, 2]] = side - moved[:, [2, 0]]
    return moved.clip(0, side)


def fit_image(image, side):
    """The whole PIL image squashed to uint8 (3, side, side): what the network sees outside training."""
    pixels, _ = render_view(image, np.array([0.0, 0.0, image.width, image.height]), side)
    return torch.from_numpy(pixels).permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Samples and batches


class DetectionDataset(Dataset):
    """dataset[epoch, index, occurrence] -> a sample; dataset[index] is its first time in epoch 0.

    A sample: image uint8 (3, S, S), boxes_unit (n, 4) float32 xyxy in 0..1 of the square, labels, difficult, crowd
    (n,), image_id, size (h, w) of the original. Its randomness comes from the seed and these three numbers alone, so
    it does not matter which worker makes it, or in which order.
    """

    def __init__(self, data_list, image_size=300, augment=NO_AUGMENTATION, seed=0):
        self.data_list = data_list
        self.image_size = image_size
        self.augment = augment
        self.seed = seed

    def __len__(self):
        return len(self.data_list)

    def __getitem__(self, key):
        epoch, index, occurrence = key if isinstance(key, tuple) else (0, key, 0)
        rng = np.random.default_rng([self.seed, epoch, index, occurrence])
        target = self.data_list.target(index)
        path = self.data_list.image_path(index)
        image = read_image(path)
        if (image.height, image.width) != target["size"]:
            raise DataError(
                f"image {path} is {image.width}x{image.height} pixels, but {self.data_list.path} says "
                f"{target['size'][1]}x{target['size'][0]}: list the data anew"
            )
        boxes = target["boxes"].astype(np.float64)
        view = sample_view(rng, target["size"], boxes[~target["crowd"]], self.augment)
        flip = bool(rng.random() < self.augment.flip)
        colour_matrix = sample_colour_matrix(rng, self.augment)
        pixels, placement = render_view(image, view, self.image_size, flip, colour_matrix)
        moved = move_boxes(boxes, placement, self.image_size, flip)
        # What is left under a pixel wide or high is nothing to learn from; any part of a crowd is still a crowd.
        kept = (centre_inside(boxes, view) | target["crowd"]) & (moved[:, 2:] - moved[:, :2] >= 1).all(axis=1)
        return {
            "image": torch.from_numpy(pixels).permute(2, 0, 1),  # uint8 (3, S, S)
            "boxes_unit": torch.from_numpy((moved[kept] / self.image_size).astype(np.float32)),  # (n, 4)
            "labels": torch.from_numpy(target["labels"][kept]),
            "difficult": torch.from_numpy(target["difficult"][kept]),
            "crowd": torch.from_numpy(target["crowd"][kept]),
            "image_id": target["image_id"],
            "size": target["size"],
        }


def collate(samples):
    """Samples -> a batch: image (B, 3, S, S), objects padded to the most of any image (label 0 is padding)."""

    def padded(name):
        return torch.nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True)

    return {
        "image": torch.stack([sample["image"] for sample in samples]),  # uint8 (B, 3, S, S)
        "boxes_unit": padded("boxes_unit"),  # (B, N, 4)
        "labels": padded("labels"),  # (B, N)
        "difficult": padded("difficult"),
        "crowd": padded("crowd"),
        "image_id": [sample["image_id"] for sample in samples],
        "size": [sample["size"] for sample in samples],
    }


class EpochSampler(Sampler):
    """Yields (epoch, index, occurrence) in an order drawn from the seed and the epoch, `start` samples in."""

    def __init__(self, length, seed=0):
        self.length = length
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def __len__(self):
        return self.length - self.start

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        return ((self.epoch, int(index), 0) for index in order[self.start :])


def _start_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which stops the workers itself
    torch.set_num_threads(1)


def make_loader(dataset, batch_size, epoch_sampler=None, workers=0, pin_memory=False):
    """Batches in the sampler's order, the last one short left out; without a sampler every image once, in order."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=epoch_sampler,
        drop_last=epoch_sampler is not None,
        num_workers=workers,
        persistent_workers=workers > 0 and epoch_sampler is not None,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        collate_fn=collate,
    )
