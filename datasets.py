"""Data list -> samples -> batches.

    dataset = DetectionDataset(DataList.load("data/vocreal/train.json"), augment=AugmentConfig(), seed=0)
    loader = make_loader(dataset, batch_size=32, epoch_sampler=EpochSampler(len(dataset), seed=0))

    python datasets.py data/vocreal/train.json --preview preview.png     # what training will see

The list is in data_list.py, the augmentation in augment.py, the cache of decoded images in pixel_cache.py.
"""

import argparse
import gc
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

from fpnssd.data.augment import NO_AUGMENTATION, AugmentConfig, augment, copy_paste, mosaic
from fpnssd.data.data_list import DataList
from fpnssd.data.images import DataError, to_pixels
from fpnssd.data.pixel_cache import PixelCache
from fpnssd.inference.draw import class_colour
from fpnssd.training.config import set_fields
from fpnssd.training.cpu_memory import MALLOC_DEFAULTS, tune_malloc
from utils import HelpFormatter, InputError, atomic_write, check_outputs, error_message, whole_number

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
Key = tuple[int, int, int]  # epoch, index of the image, occurrence of the image in the epoch


@dataclass(eq=False, repr=False)
class DetectionDataset(Dataset[dict[str, Any]]):
    """The images of a data list, augmented, and their ground truth.

    dataset[epoch, index, occurrence] is a sample: image uint8 (3, S, S); boxes_norm float32 (n, 4), xyxy in 0..1 of the
    square; labels int64 (n,), 1..C; difficult and crowd bool (n,); image_id; size, (height, width) of the original;
    key, the three numbers. dataset[index] is dataset[0, index, 0]. The augmentation of a sample depends only on the
    seed and the key: not on the worker or the order.

    Args:
        data_list: the images and their objects.
        image_size: S, side of the network's input in pixels.
        augment: probabilities and ranges of the augmentation.
        seed: of the augmentation.
        cache: decoded images of the same data list; None decodes files.
        num_epochs: length of the training, so that mosaic and copy-paste end augment.close_epochs before it does; None
            never ends them.
    """

    data_list: DataList
    image_size: int = 300
    augment: AugmentConfig = NO_AUGMENTATION
    seed: int = 0
    cache: PixelCache | None = None
    num_epochs: int | None = None

    def __len__(self) -> int:
        return len(self.data_list)

    def load(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Returns an image before augmentation: uint8 (3, H, W), possibly of a smaller copy, and its target.

        Raises:
            DataError: the image cannot be read.
        """
        pixels = self.cache.read(index) if self.cache else None
        if pixels is None:
            pixels = to_pixels(self.data_list.read_image(index))
        return pixels, self.data_list.target(index)

    def __getitem__(self, key: int | Key) -> dict[str, Any]:
        epoch, index, occurrence = key if isinstance(key, tuple) else (0, key, 0)
        rng = np.random.default_rng([self.seed, epoch, index, occurrence])
        config, side = self.augment, self.image_size
        if self.num_epochs is not None and epoch >= self.num_epochs - config.close_epochs:
            config = config.closed()
        pixels, target = self.load(index)
        if rng.random() < config.mosaic:
            others = rng.integers(len(self), size=3).tolist()
            pixels, objects = mosaic(rng, [(pixels, target), *map(self.load, others)], side, config)
        else:
            pixels, objects = augment(rng, pixels, target, side, side, config)
        if rng.random() < config.copy_paste:
            donor = self.load(int(rng.integers(len(self))))
            pixels, objects = copy_paste(rng, pixels, objects, donor, config)
        boxes_norm = (objects.pop("boxes") / side).astype(np.float32)  # pixels of the square -> 0..1
        return {
            "image": pixels,  # uint8 (3, S, S)
            "boxes_norm": torch.from_numpy(boxes_norm),  # (n, 4)
            **{name: torch.from_numpy(values) for name, values in objects.items()},  # labels, difficult, crowd (n,)
            "image_id": target["image_id"],
            "size": target["size"],
            "key": (epoch, index, occurrence),
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes a batch of samples of DetectionDataset.

    Returns:
        image uint8 (B, 3, S, S), channels last in memory; boxes_norm (B, N, 4), labels, difficult and crowd (B, N),
        where N is the largest number of objects per image, and padding has label 0; lists of image_id, size and key.
    """
    # In a worker, default_collate stacks directly into shared memory.

    def padded(name):
        rows = torch.nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True)
        return default_collate(list(rows))

    return {
        # Channels-last memory, as the network uses: stacked as (B, S, S, 3), then permuted to (B, 3, S, S).
        "image": default_collate([sample["image"].permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2),
        "boxes_norm": padded("boxes_norm"),  # (B, N, 4)
        **{name: padded(name) for name in ("labels", "difficult", "crowd")},  # (B, N)
        **{name: [sample[name] for sample in samples] for name in ("image_id", "size", "key")},
    }


def balanced_weights(data_list: DataList, power: float) -> np.ndarray:
    """Returns sampling weights that draw images of rare classes more often.

    Args:
        data_list: the images to weight.
        power: 0 gives all images the same weight, 0.5 is the square root of LVIS (arXiv:1908.03195), 1 balances fully.

    Returns:
        (images,) float64: (images / images with the rarest class of this one) ** power. Images without objects have the
        weight of the commonest class.
    """
    with_class = images_per_class(data_list)
    weight_of = (len(data_list) / with_class.clip(min=1)) ** power
    weights = np.full(len(data_list), weight_of[with_class > 0].min(initial=weight_of.max(initial=1.0)))
    objects = ~data_list.crowd
    np.maximum.at(weights, data_list.object_images[objects], weight_of[data_list.labels[objects] - 1])
    return weights


def images_per_class(data_list: DataList) -> np.ndarray:
    """(C,) the number of images with an object of each class; crowds do not count."""
    objects = np.stack([data_list.object_images, data_list.labels])[:, ~data_list.crowd]
    return np.bincount(np.unique(objects, axis=1)[1] - 1, minlength=len(data_list.classes))


class EpochSampler(Sampler[Key]):
    """Yields (epoch, index, occurrence) in an order drawn from the seed and the epoch.

    Several processes together draw the batches that one process would with their batch sizes added up: each takes every
    num_processes-th sample, beginning with its rank.

    Args:
        length: number of images.
        seed: of the order.
        weights: (length,) how often to draw each image: length times its share of the sum, rounded up or down at
            random, `occurrence` counting them. None draws each image once. Both times `repeats`.
        rank: of this process.
        num_processes: that train together.
        limit: number of samples of an epoch, to drop an incomplete last batch; None for all.
        repeats: passes through the images in an epoch; `occurrence` counts them.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        weights: np.ndarray | None = None,
        rank: int = 0,
        num_processes: int = 1,
        limit: int | None = None,
        repeats: int = 1,
    ):
        self.length, self.total = length, length * repeats
        self.limit = self.total if limit is None else limit
        self.seed = seed
        self.cumulative = None if weights is None else np.cumsum(weights / np.sum(weights))
        self.rank, self.num_processes = rank, num_processes
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch that the next iteration yields, and how many of its samples to skip (on resuming)."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return len(range(self.start + self.rank, self.limit, self.num_processes))

    def __iter__(self) -> Iterator[Key]:
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.cumulative is None:
            occurrences, order = np.divmod(rng.permutation(self.total), self.length)
        else:
            # Systematic sampling: evenly spaced points on the cumulative weights.
            points = (rng.random() + np.arange(self.total)) / self.total
            drawn = np.searchsorted(self.cumulative, points, side="right").clip(max=self.length - 1)
            shuffled = rng.permutation(self.total)
            order, occurrences = drawn[shuffled], (np.arange(self.total) - np.searchsorted(drawn, drawn))[shuffled]
        for position in range(self.start + self.rank, self.limit, self.num_processes):
            yield self.epoch, int(order[position]), int(occurrences[position])


def _start_worker(_: int) -> None:
    # Ctrl-C and SIGTERM reach the whole process group. The main process stops its workers, if necessary with SIGTERM:
    # so workers ignore Ctrl-C and the first SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by WorkerLoader
    torch.set_num_threads(1)
    # Garbage collection writes to every object it visits, and so copies the pages that a fork shares.
    gc.freeze()
    # glibc would keep the memory of batches in a fragmented heap: up to 200 MB a worker. Blocks above 4 MB go back to
    # the system; training on the CPU disables that before the fork.
    tune_malloc(**MALLOC_DEFAULTS | {"mmap_threshold": 4 * 2**20})


class WorkerLoader(DataLoader):
    """A DataLoader whose workers start with blocked stop signals, which could end them before _start_worker."""

    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def make_loader(
    dataset: Dataset,
    batch_size: int,
    epoch_sampler: EpochSampler | None = None,
    workers: int = 0,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> DataLoader:
    """Returns a loader of batches (see collate).

    Args:
        dataset: whose samples to load.
        batch_size: samples in a batch.
        epoch_sampler: their order, in which case an incomplete last batch is dropped; None is the list's order.
        workers: number of worker processes; 0 loads in this process.
        pin_memory: whether batches lie in pinned memory, from which they are copied to a GPU faster.
        start_method: fork, spawn or forkserver for the worker processes; None is the system's default.
    """
    return WorkerLoader(
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
        generator=torch.Generator(),  # draws a seed per pass, and leaves the global generator unchanged
    )


# ---------------------------------------------------------------------------------------------------------------------
# Preview


def draw_batch(batch: dict[str, Any], classes: Sequence[str], columns: int = 4) -> Image.Image:
    """Returns a grid of the samples of a batch, `columns` wide, with their boxes and class names."""
    pictures = []
    for image, boxes, labels, difficult, crowd in zip(
        *(batch[name] for name in ("image", "boxes_norm", "labels", "difficult", "crowd")), strict=True
    ):
        real = labels > 0
        if real.any():
            marks = [" (difficult)" * d + " (iscrowd)" * c for d, c in zip(difficult[real], crowd[real], strict=True)]
            names = [classes[label - 1] + mark for label, mark in zip(labels[real].tolist(), marks, strict=True)]
            colours = [class_colour(label) for label in labels[real].tolist()]
            image = draw_bounding_boxes(image, boxes[real] * image.shape[-1], names, colours, width=2)
        pictures.append(image)
    return to_pil_image(make_grid(pictures, nrow=columns, padding=4, pad_value=255))


def main(argv: Sequence[str] | None = None) -> None:
    description = "Draws augmented samples of a data list, as training will see them."
    parser = argparse.ArgumentParser(allow_abbrev=False, description=description, formatter_class=HelpFormatter)
    parser.add_argument("list", help="a data list, such as data/voc2012/train.json")
    parser.add_argument("--preview", default="preview.png", metavar="PICTURE", help="file to write")
    parser.add_argument("--images", help="folder of the images, if not that of the data list")
    parser.add_argument("--count", type=whole_number(1), default=16, help="number of samples")
    parser.add_argument("--image-size", type=whole_number(1), default=300, help="side of a sample in pixels")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the order and the augmentation")
    parser.add_argument("--overwrite", action="store_true", help="also replace a file that this program did not write")
    parser.add_argument("--plain", action="store_true", help="do not augment")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of AugmentConfig, such as mosaic=0.5",
    )
    args = parser.parse_args(argv)
    try:
        check_outputs([("picture", args.preview)], [args.list], args.overwrite)
        ending = Path(args.preview).suffix.lower()
        picture_format = Image.registered_extensions().get(ending)
        if picture_format not in Image.SAVE:
            raise InputError(f"--preview {args.preview}: {ending or 'no ending'} is not a picture's: .png and .jpg are")
        data_list = DataList.load(args.list, args.images)
        if len(data_list) == 0:
            raise DataError(f"{args.list} lists no images")
        config = set_fields(NO_AUGMENTATION if args.plain else AugmentConfig(), args.set)
        dataset = DetectionDataset(data_list, args.image_size, config, args.seed)
        keys = list(EpochSampler(len(dataset), args.seed))[: args.count]
        picture = draw_batch(collate([dataset[key] for key in keys]), data_list.classes)
        with atomic_write(args.preview, "picture") as temporary:
            picture.save(temporary, picture_format)
    except (InputError, OSError) as error:
        sys.exit(f"datasets: {error_message(error)}")
    print(f"{args.preview}: {len(keys)} of {len(data_list)} images")


if __name__ == "__main__":
    main()
