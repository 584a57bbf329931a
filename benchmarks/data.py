"""How fast samples are made, beside torchvision's SSD transforms, in one run on one core.

    python -m benchmarks.data data/vocreal/train.json
    python -m benchmarks.data                          # drawn images of 500 x 375, if there are no photographs

Three ways from a JPEG file to a finished uint8 sample of 300 x 300 with its boxes take turns on the same images: ours,
ours from the pixel cache, and torchvision's v2 transforms (photometric distort, zoom-out, IoU crop, flip, resize,
sanitize) on what torchvision.io.decode_jpeg gives. Printed are images per second and the ratios of the medians, the
loader's speed with 1 and 2 workers, the cores that 1,500 images/s would take, and what the colour changes do.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from datasets import DetectionDataset, EpochSampler, make_loader
from fpnssd.data.augment import FILL, AugmentConfig, change_colour, sample_colour_matrix
from fpnssd.data.data_list import DataList
from fpnssd.data.images import fit_image
from fpnssd.data.pixel_cache import PixelCache


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("list", nargs="?", help="a data list; without one, images are drawn")
    parser.add_argument("--images", type=int, default=200, help="of the list, those nearest to 500 x 375 pixels (200)")
    parser.add_argument("--rounds", type=int, default=7, help="each way's turns (7)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        data_list = DataList.load(args.list or draw_list(Path(folder), args.images))
        data_list.path = str(Path(folder) / "list.json")  # the cache goes there
        chosen = nearest_to_voc(data_list, args.images)
        sizes = data_list.sizes[chosen]
        print(
            f"{len(chosen)} images of {args.list or 'drawn shapes'}, on average {sizes.mean(0).round()} pixels (h, w)"
        )
        measure(data_list, chosen, args.rounds)
        loader_speed(data_list)
        colour_change(data_list, chosen[:50])


def draw_list(folder, count):
    """Drawn images as large as VOC's photographs, since the sizes that synthetic.py draws are others."""
    from create_data_lists import create_data_lists
    from fpnssd.data.synthetic import draw_dataset
    from fpnssd.data.voc import read_voc

    draw_dataset(folder / "voc", {"train": count})
    for path in (folder / "voc" / "JPEGImages").glob("*.jpg"):
        Image.open(path).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    for path in (folder / "voc" / "Annotations").glob(
        "*.xml"
    ):  # boxes stay as drawn: all lie inside 500 x 375 or are clipped
        text = path.read_text()
        start, end = text.index("<size>"), text.index("</size>") + len("</size>")
        path.write_text(text[:start] + text[end:])
    create_data_lists([read_voc([folder / "voc"], "train")], folder)
    return folder / "train.json"


def nearest_to_voc(data_list, count):
    areas = data_list.sizes.prod(axis=1)
    return np.argsort(np.abs(areas - 500 * 375), kind="stable")[:count].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# One core


def measure(data_list, chosen, rounds):
    """The three ways in turn, each over all chosen images; prints medians and ratios."""
    torch.set_num_threads(1)
    all_cores = os.sched_getaffinity(0)
    cache = PixelCache.build(data_list)
    ways = {
        "torchvision v2": TorchvisionChain(data_list),
        "ours, from JPEG": DetectionDataset(data_list, augment=AugmentConfig()),
        "ours, from the cache": DetectionDataset(data_list, augment=AugmentConfig(), cache=cache),
    }
    os.sched_setaffinity(0, {min(all_cores)})
    seconds = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first warms up
        for name, way in ways.items():
            start = time.perf_counter()
            for index in chosen:
                way[turn, index, 0]
            if turn:
                seconds[name].append((time.perf_counter() - start) / len(chosen))
    os.sched_setaffinity(0, all_cores)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        ratio = medians["torchvision v2"] / median
        per_second = 1 / median
        print(
            f"{name:22} {1e3 * median:6.2f} ms  {per_second:6.1f} images/s per core  {ratio:5.2f} x torchvision's"
            f"  {1500 / per_second:5.1f} cores for 1,500 images/s"
        )


class TorchvisionChain:
    """torchvision's reference SSD transforms, on the same files."""

    def __init__(self, data_list):
        self.data_list = data_list
        self.transforms = v2.Compose(
            [
                v2.RandomPhotometricDistort(),
                v2.RandomZoomOut(fill=dict.fromkeys([tv_tensors.Image], FILL)),
                v2.RandomIoUCrop(),
                v2.RandomHorizontalFlip(),
                v2.Resize((300, 300), antialias=True),
                v2.SanitizeBoundingBoxes(),
            ]
        )

    def __getitem__(self, key):
        _, index, _ = key
        target = self.data_list.target(index)
        image = decode_jpeg(read_file(str(self.data_list.image_path(index))), ImageReadMode.RGB)
        boxes = tv_tensors.BoundingBoxes(torch.tensor(target["boxes"]), format="XYXY", canvas_size=target["size"])
        return self.transforms(tv_tensors.Image(image), {"boxes": boxes, "labels": torch.tensor(target["labels"])})


# ---------------------------------------------------------------------------------------------------------------------
# The loader, and colour


def loader_speed(data_list, batch_size=32):
    """Images per second through make_loader, from JPEG and from the cache."""
    for cached in (False, True):
        cache = PixelCache.build(data_list) if cached else None
        dataset = DetectionDataset(data_list, augment=AugmentConfig(), cache=cache)
        for workers in (1, 2):
            sampler = EpochSampler(len(dataset))
            loader = make_loader(dataset, min(batch_size, len(dataset)), sampler, workers)
            speeds = []
            for epoch in range(3):  # the first starts the workers
                sampler.set_epoch(epoch)
                start, images = time.perf_counter(), 0
                for batch in loader:
                    images += len(batch["image"])
                speeds.append(images / (time.perf_counter() - start))
            kind = "from the cache" if cached else "from JPEG"
            print(f"loader, {kind:14} {workers} workers: {max(speeds[1:]):6.1f} images/s")


def colour_change(data_list, chosen, draws=40):
    """Mean and spread, over images and draws, of what the colour change does to channels' means and to pixels."""
    torch.manual_seed(0)
    rng, distort = np.random.default_rng(0), v2.RandomPhotometricDistort()
    changes = {"ours": [], "torchvision v2": []}
    for index in chosen:
        pixels = fit_image(data_list.read_image(index), 64)
        for _ in range(draws):
            matrix = sample_colour_matrix(rng, AugmentConfig())
            changes["ours"].append((pixels if matrix is None else change_colour(pixels, matrix)).float() - pixels)
            changes["torchvision v2"].append(distort(pixels).float() - pixels)
    for name, values in changes.items():
        values = torch.stack(values)  # (images x draws, 3, 64, 64)
        means = values.mean(dim=(2, 3))
        said = [
            f"mean of R, G, B {_rounded(means.mean(0))}",
            f"spread of an image's mean {_rounded(means.std(0))}",
            f"of a pixel {_rounded(values.std(dim=(0, 2, 3)))} grey levels",
        ]
        print(f"colour change, {name}: {', '.join(said)}")


def _rounded(values):
    return " ".join(f"{value:.1f}" for value in values.tolist())


if __name__ == "__main__":
    main()
