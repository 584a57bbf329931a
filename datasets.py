"""Data list -> samples -> batches.

    dataset = DetectionDataset(DataList.load("data/vocreal/train.json"), augment=AugmentConfig(), seed=0)
    loader = make_loader(dataset, batch_size=32, epoch_sampler=EpochSampler(len(dataset), seed=0))

    python datasets.py data/vocreal/train.json --preview preview.png     # what training will see

The augmentation itself is in augment.py, the cache of decoded images in pixel_cache.py.
"""

import argparse
import contextlib
import hashlib
import json
import pickle
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

from augment import FILL, NO_AUGMENTATION, AugmentConfig, Photograph, augment, copy_paste, mosaic, resize
from utils import (
    MALLOC_DEFAULTS,
    InputError,
    class_colour,
    explain,
    set_fields,
    tune_malloc,
    whole_number,
    written_whole,
)

MAX_PIXELS = 89_000_000  # of one image: more is refused before any of it is decoded
ARRAYS_VERSION = 2  # of the fields that such a file holds (see DataList)
ARRAYS_FROM = 32 * 2**20  # bytes of JSON: larger lists keep their arrays in a file beside them


class DataError(InputError):
    """A data list or an image that cannot be used; says which, and what to do. kind: what it is, without names."""

    def __init__(self, message, kind="unusable"):
        super().__init__(message)
        self.kind = kind


class Strings:
    """A list of strings as two arrays: worker processes share these, where each would copy a list of str."""

    def __init__(self, data, ends):
        self.data, self.ends = data, ends  # uint8 (bytes,), UTF-8; int64 (n,)

    @classmethod
    def of(cls, strings):
        encoded = [string.encode("utf-8") for string in strings]
        ends = np.cumsum([len(piece) for piece in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        start = self.ends[index - 1] if index > 0 else 0
        return self.data[start : self.ends[index]].tobytes().decode("utf-8")


@dataclass
class DataList:
    """A COCO JSON file, as arrays. Objects of image i are rows first[i]:first[i + 1]."""

    path: str
    image_root: Path
    classes: tuple  # names of labels 1..C
    category_ids: tuple  # their ids in the file
    file_names: Strings  # relative to image_root
    image_ids: np.ndarray  # (images,) int64; Strings where the file has other ids than integers
    sizes: np.ndarray  # (images, 2) int32, height and width
    apply_exif: np.ndarray  # (images,) bool: sizes and boxes are those of the image turned by its EXIF orientation
    first: np.ndarray  # (images + 1,) int64
    boxes: np.ndarray  # (objects, 4) float32, xyxy in pixels
    labels: np.ndarray  # (objects,) int32, 1..C
    difficult: np.ndarray  # (objects,) bool
    crowd: np.ndarray  # (objects,) bool
    areas: np.ndarray | None = None  # (objects,) float32, square pixels; None where they are the boxes' areas
    truncated: np.ndarray | None = None  # (objects,) int8: 1, 0, or -1 where it is not known; None if it never is
    arrays_file: Path | None = None  # where the arrays are mapped from, if they are

    def __len__(self):
        return len(self.sizes)

    @property
    def object_images(self):
        """(objects,): the row of each object's image."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))

    @property
    def counted(self):
        """(objects,) bool: neither difficult nor a crowd, so that finding it counts and missing it too."""
        return ~(self.difficult | self.crowd)

    @property
    def object_areas(self):
        """(objects,) square pixels: the file's own, as those of COCO's outlines, or the boxes'."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        return sides.prod(axis=1) if self.areas is None else self.areas

    def image_id(self, index):
        """As the file has it: an int, or a string."""
        image_id = self.image_ids[index]
        return image_id if isinstance(image_id, str) else int(image_id)

    def target(self, index):
        """dict of boxes (n, 4), labels, difficult, crowd (n,), image_id, size (h, w), as numpy arrays."""
        rows = slice(self.first[index], self.first[index + 1])
        return {
            "boxes": self.boxes[rows],
            "labels": self.labels[rows].astype(np.int64),
            "difficult": self.difficult[rows],
            "crowd": self.crowd[rows],
            "image_id": self.image_id(index),
            "size": tuple(self.sizes[index].tolist()),
        }

    def image_path(self, index):
        return self.image_root / self.file_names[index]

    def read_image(self, index):
        """The whole image as PIL's, RGB, of the size that the list says; DataError otherwise."""
        path, (height, width) = self.image_path(index), self.sizes[index]
        try:
            image = read_image(path, self.apply_exif[index])
        except DataError as error:
            sentence = f"{error}; {self.path} lists it (--images FOLDER if the photographs moved)"
            raise DataError(sentence, error.kind) from error
        if (image.height, image.width) != (height, width):
            raise DataError(
                f"image {path} is {image.width}x{image.height} pixels, but {self.path} says {width}x{height}: "
                "list the data anew"
            )
        return image

    @classmethod
    def load(cls, path, images=None):
        """Reads a list as create_data_lists.py writes it; images: overrides info.image_root.

        A large list's arrays are kept in a file beside it, which the next loads map into memory instead of reading the
        JSON. DataError names what is wrong: no COCO JSON, an id that is unknown or there twice, a box that is empty or
        leaves its image.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no data list {str(path)!r}: python create_data_lists.py makes one")
        if path.stat().st_size < ARRAYS_FROM:
            return cls._from_json(path, images)
        arrays_file, content_hash = path.with_suffix(".arrays"), hash_file(path)
        if _stored_hash(arrays_file) != content_hash:
            data_list = cls._from_json(path)
            try:
                data_list._write_arrays(arrays_file, content_hash)
            except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where a disk is full
                print(f"note: cannot write {arrays_file} ({error}): {path} is parsed each time", file=sys.stderr)
                return replace(data_list, image_root=Path(images)) if images else data_list
        return cls._from_arrays(path, images, arrays_file)

    @classmethod
    def _from_json(cls, path, images=None):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls._from_coco(path, content, images)
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(f"{path} is no COCO JSON data list ({type(error).__name__}: {error})") from error

    @classmethod
    def _from_coco(cls, path, content, images):
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
        rows = np.fromiter((row_of[entry["image_id"]] for entry in objects), np.int64, len(objects))
        order = np.argsort(rows, kind="stable")
        boxes = np.array([entry["bbox"] for entry in objects], dtype=np.float32).reshape(-1, 4)[order]
        boxes[:, 2:] += boxes[:, :2]
        sizes = np.array([(i["height"], i["width"]) for i in content["images"]], dtype=np.int32).reshape(-1, 2)
        limits = sizes[rows[order]][:, [1, 0, 1, 0]]  # (n, 4): width, height, width, height
        # Written so that NaN is bad too. A hundredth of a pixel is what rounding may add.
        good = (boxes >= -0.01).all(axis=1) & (boxes <= limits + 0.01).all(axis=1)
        bad = ~(good & (boxes[:, 2:] > boxes[:, :2]).all(axis=1))
        if bad.any():
            entry = objects[order[bad.argmax()]]
            problem = f"annotation {entry.get('id')} has a box {entry['bbox']} that is empty or leaves its image"
            raise DataError(f"{path}: {problem}; list the data anew")
        image_ids = [image["id"] for image in content["images"]]
        whole = all(isinstance(image_id, int) for image_id in image_ids)

        def column(values, dtype):
            return np.fromiter(values, dtype, len(objects))[order]

        box_areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        areas = column((entry.get("area", np.nan) for entry in objects), np.float32)
        areas = np.where(np.isnan(areas), box_areas, areas)
        truncated = column((entry.get("truncated", -1) for entry in objects), np.int8)
        return cls(
            path=str(path),
            # An image root that is no absolute path is meant from where the list lies.
            image_root=Path(images) if images else path.parent / content.get("info", {}).get("image_root", "."),
            classes=tuple(category["name"] for category in content["categories"]),
            category_ids=category_ids,
            file_names=Strings.of([image["file_name"] for image in content["images"]]),
            image_ids=np.array(image_ids, dtype=np.int64) if whole else Strings.of(map(str, image_ids)),
            sizes=sizes,
            apply_exif=np.array([image.get("apply_exif", False) for image in content["images"]], dtype=bool),
            first=np.searchsorted(rows[order], np.arange(len(row_of) + 1)),
            boxes=boxes,
            labels=column((label_of[entry["category_id"]] for entry in objects), np.int32),
            difficult=column((entry.get("difficult", 0) for entry in objects), bool),
            crowd=column((entry.get("iscrowd", 0) for entry in objects), bool),
            areas=None if np.allclose(areas, box_areas, rtol=1e-3) else areas,
            truncated=truncated if (truncated >= 0).any() else None,
        )

    def _write_arrays(self, arrays_file, content_hash):
        root, beside = self.image_root, arrays_file.parent
        content = {"version": ARRAYS_VERSION, "content_hash": content_hash}
        content["image_root"] = str(root.relative_to(beside) if root.is_relative_to(beside) else root)
        content |= {"classes": list(self.classes), "category_ids": list(self.category_ids)}
        for name, value in vars(self).items():
            if isinstance(value, Strings):
                content |= {f"{name}.data": torch.tensor(value.data), f"{name}.ends": torch.tensor(value.ends)}
            elif isinstance(value, np.ndarray):
                content[name] = torch.from_numpy(value)
        with written_whole(arrays_file) as temporary:
            torch.save(content, temporary)

    @classmethod
    def _from_arrays(cls, path, images, arrays_file):
        content = torch.load(arrays_file, mmap=True, weights_only=True)
        fields = {name: value for name, value in content.items() if not isinstance(value, torch.Tensor)}
        arrays = {name: value.numpy() for name, value in content.items() if isinstance(value, torch.Tensor)}
        for array in arrays.values():
            array.view(np.uint8).max(initial=0)  # one pass in order now, in place of page faults here and there later
        for name in ("file_names", "image_ids"):
            if f"{name}.data" in arrays:
                arrays[name] = Strings(arrays.pop(f"{name}.data"), arrays.pop(f"{name}.ends"))
        return cls(
            path=str(path),
            image_root=Path(images) if images else Path(path).parent / fields["image_root"],
            classes=tuple(fields["classes"]),
            category_ids=tuple(fields["category_ids"]),
            arrays_file=arrays_file,
            **arrays,
        )

    def __reduce_ex__(self, protocol):
        if self.arrays_file is None:
            return super().__reduce_ex__(protocol)
        # A spawned worker maps the same file: nothing is copied.
        return DataList._from_arrays, (self.path, self.image_root, self.arrays_file)


def _stored_hash(arrays_file):
    """The hash of the JSON that an arrays file was made of; None where there is no such file, or no whole one."""
    try:
        content = torch.load(arrays_file, mmap=True, weights_only=True)
        return content["content_hash"] if content["version"] == ARRAYS_VERSION else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
        return None


def hash_file(path):
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Images


@contextlib.contextmanager
def open_image(path, name=None, max_pixels=MAX_PIXELS):
    """A PIL image, not yet decoded, for a with block; what goes wrong inside is a DataError that names the file.

    path: or an open file, with a name for it.
    """
    file, path = path, name or path
    try:
        with Image.open(file) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, more than {max_pixels:,}")
            yield image
    except FileNotFoundError:
        raise DataError(f"image {path} is missing", "image missing") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"image {path} is no image that can be read", "file is no image") from None
    except Image.DecompressionBombError as error:  # raised before anything is decoded
        raise DataError(f"image {path} is refused, shrink it or cut it up: {error}", "image too large") from None
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"image {path} is damaged: {error}", "image damaged") from error


def read_image(path, apply_exif=False):
    """A decoded RGB PIL image, turned by its EXIF orientation if asked to; DataError names the file otherwise."""
    with open_image(path) as image:
        return to_rgb(ImageOps.exif_transpose(image) if apply_exif else image)


def to_rgb(image):
    """A PIL image of any kind as 8-bit RGB: 16 bits lose their lower half, what is transparent gets the fill colour."""
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would cut it off at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, FILL)
        return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def to_pixels(image):
    """An RGB PIL image as uint8 (3, H, W), lying channels last."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def fit_image(image, side):
    """The whole RGB PIL image squashed to uint8 (3, side, side): what the network sees outside training."""
    return resize(to_pixels(image), side, side)


# ---------------------------------------------------------------------------------------------------------------------
# Samples and batches


class DetectionDataset(Dataset):
    """dataset[epoch, index, occurrence] -> a sample; dataset[index] is its first time in epoch 0.

    A sample: image uint8 (3, S, S), boxes_unit (n, 4) float32 xyxy in 0..1 of the square, labels, difficult, crowd
    (n,), image_id, size (h, w) of the original, key: the three numbers. Its randomness comes from the seed and the key
    alone, so it does not matter which worker makes it, or in which order. cache: a PixelCache of the list. num_epochs:
    of the training, so that mosaic and copy-paste can end augment.close_epochs before it does.
    """

    def __init__(self, data_list, image_size=300, augment=NO_AUGMENTATION, seed=0, cache=None, num_epochs=None):
        self.data_list = data_list
        self.image_size = image_size
        self.augment = augment
        self.seed = seed
        self.cache = cache
        self.num_epochs = num_epochs

    def __len__(self):
        return len(self.data_list)

    def photograph(self, index):
        target = self.data_list.target(index)
        pixels = self.cache.read(index) if self.cache else None
        return Photograph(
            pixels=to_pixels(self.data_list.read_image(index)) if pixels is None else pixels,
            boxes=target["boxes"].astype(np.float64),
            labels=target["labels"],
            difficult=target["difficult"],
            crowd=target["crowd"],
            size=target["size"],
        )

    def __getitem__(self, key):
        epoch, index, occurrence = key if isinstance(key, tuple) else (0, key, 0)
        rng = np.random.default_rng([self.seed, epoch, index, occurrence])
        config, side = self.augment, self.image_size
        if self.num_epochs is not None and epoch >= self.num_epochs - config.close_epochs:
            config = config.closed()
        photograph = self.photograph(index)
        if rng.random() < config.mosaic:
            others = rng.integers(len(self), size=3).tolist()
            pixels, objects = mosaic(rng, [photograph, *map(self.photograph, others)], side, config)
        else:
            pixels, objects = augment(rng, photograph, side, side, config)
        if rng.random() < config.copy_paste:
            donor = self.photograph(int(rng.integers(len(self))))
            pixels, objects = copy_paste(rng, pixels, objects, donor, config)
        return {
            "image": pixels,  # uint8 (3, S, S)
            "boxes_unit": torch.from_numpy((objects["boxes"] / side).astype(np.float32)),  # (n, 4)
            "labels": torch.from_numpy(objects["labels"]),
            "difficult": torch.from_numpy(objects["difficult"]),
            "crowd": torch.from_numpy(objects["crowd"]),
            "image_id": self.data_list.image_id(index),
            "size": photograph.size,
            "key": (epoch, index, occurrence),
        }


def collate(samples):
    """Samples -> a batch: image (B, 3, S, S), objects padded to the most of any image (label 0 is padding).

    default_collate stacks: in a worker it writes right into the memory that the main process reads.
    """

    def padded(name):
        rows = torch.nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True)
        return default_collate(list(rows))

    return {
        # Pixels lie channels last, which is what the network wants: (B, S, S, 3), then turned.
        "image": default_collate([sample["image"].permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2),
        "boxes_unit": padded("boxes_unit"),  # (B, N, 4)
        "labels": padded("labels"),  # (B, N)
        "difficult": padded("difficult"),
        "crowd": padded("crowd"),
        "image_id": [sample["image_id"] for sample in samples],
        "size": [sample["size"] for sample in samples],
        "key": [sample["key"] for sample in samples],
    }


def balanced_weights(data_list, power):
    """How often to draw each image, (images,): (images / images with its rarest class) ** power.

    0 is all alike, 0.5 the square root of LVIS (arXiv:1908.03195), 1 full balance. Images without objects count as the
    commonest class.
    """
    rows = data_list.object_images[~data_list.crowd]
    labels = data_list.labels[~data_list.crowd]
    with_class = np.bincount(np.unique(np.stack([rows, labels]), axis=1)[1], minlength=len(data_list.classes) + 1)
    weight_of = (len(data_list) / with_class.clip(min=1)) ** power
    weights = np.full(len(data_list), weight_of[1:][with_class[1:] > 0].min(initial=weight_of.max()))
    np.maximum.at(weights, rows, weight_of[labels])
    return weights


class EpochSampler(Sampler):
    """Yields (epoch, index, occurrence) in an order drawn from the seed and the epoch, `start` samples in.

    Without weights each index comes once; with weights (n,) it comes n * its share of them times, rounded up or down at
    random, the occurrence counting them. Of several processes each takes every num_processes-th sample from its rank
    on, so that together their batches are those of one process with a batch as large as theirs together. limit: of an
    epoch's samples only so many, those that fill whole batches.
    """

    def __init__(self, length, seed=0, weights=None, rank=0, num_processes=1, limit=None):
        self.length = length
        self.limit = length if limit is None else limit
        self.seed = seed
        self.cumulative = None if weights is None else np.cumsum(weights / np.sum(weights))
        self.rank, self.num_processes = rank, num_processes
        self.epoch = 0
        self.start = 0

    def __len__(self):
        return len(range(self.start + self.rank, self.limit, self.num_processes))

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.cumulative is None:
            order, occurrences = rng.permutation(self.length), np.zeros(self.length, dtype=int)
        else:
            # Systematic sampling: evenly spaced points on the weights laid end to end.
            points = (rng.random() + np.arange(self.length)) / self.length
            drawn = np.searchsorted(self.cumulative, points, side="right").clip(max=self.length - 1)
            shuffled = rng.permutation(self.length)
            order, occurrences = drawn[shuffled], (np.arange(self.length) - np.searchsorted(drawn, drawn))[shuffled]
        for position in range(self.start + self.rank, self.limit, self.num_processes):
            yield self.epoch, int(order[position]), int(occurrences[position])


def _start_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which stops the workers itself
    torch.set_num_threads(1)
    # glibc would keep the room of batches in its heap, in pieces: up to 200 MB a worker. Above 4 MB it gives room back,
    # which a training on the CPU told it not to before the fork.
    tune_malloc(**MALLOC_DEFAULTS | {"mmap_threshold": 4 * 2**20})


def make_loader(dataset, batch_size, epoch_sampler=None, workers=0, pin_memory=False, start_method=None):
    """Batches in the sampler's order, the last one short left out; without a sampler every image once, in order.

    start_method: fork, spawn or forkserver for the worker processes; None is the system's.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=epoch_sampler,
        drop_last=epoch_sampler is not None,
        num_workers=workers,
        persistent_workers=workers > 0 and epoch_sampler is not None,
        prefetch_factor=4 if workers else None,
        multiprocessing_context=start_method if workers else None,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        collate_fn=collate,
        generator=torch.Generator(),  # the loader draws a number for each pass: not out of the training's generator
    )


# ---------------------------------------------------------------------------------------------------------------------
# Looking at it


def draw_batch(batch, classes, columns=4):
    """A batch as one PIL image, a grid of its samples with their boxes and class names."""
    pictures = []
    for image, boxes, labels, difficult, crowd in zip(
        *(batch[name] for name in ("image", "boxes_unit", "labels", "difficult", "crowd")), strict=True
    ):
        real = labels > 0
        if real.any():
            marks = [" (difficult)" * d + " (crowd)" * c for d, c in zip(difficult[real], crowd[real], strict=True)]
            names = [classes[label - 1] + mark for label, mark in zip(labels[real].tolist(), marks, strict=True)]
            colours = [class_colour(label) for label in labels[real].tolist()]
            image = draw_bounding_boxes(image, boxes[real] * image.shape[-1], names, colours, width=2)
        pictures.append(image)
    return to_pil_image(make_grid(pictures, nrow=columns, padding=4, pad_value=255))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draws augmented samples of a data list, as training will see them.")
    parser.add_argument("list", help="a data list, such as data/voc2012/train.json")
    parser.add_argument("--preview", default="preview.png", metavar="PICTURE", help="file to write (preview.png)")
    parser.add_argument("--images", help="folder of the photographs, if not where the data list says")
    parser.add_argument("--count", type=whole_number(1), default=16, help="samples (16)")
    parser.add_argument("--image-size", type=whole_number(1), default=300, help="side of a sample (300)")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--plain", action="store_true", help="without augmentation")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="of AugmentConfig, as mosaic=0.5"
    )
    args = parser.parse_args(argv)
    try:
        data_list = DataList.load(args.list, args.images)
        if len(data_list) == 0:
            raise DataError(f"{args.list} lists no images")
        config = set_fields(NO_AUGMENTATION if args.plain else AugmentConfig(), args.set)
        dataset = DetectionDataset(data_list, args.image_size, config, args.seed)
        keys = list(EpochSampler(len(dataset), args.seed))[: args.count]
        picture = draw_batch(collate([dataset[key] for key in keys]), data_list.classes)
        with written_whole(args.preview) as temporary:
            picture.save(temporary, Path(args.preview).suffix.lstrip(".") or "png")
    except (InputError, OSError, KeyError) as error:
        sys.exit(f"datasets: {explain(error)}")
    print(f"{args.preview}: {len(keys)} of {len(data_list)} images")


if __name__ == "__main__":
    main()
