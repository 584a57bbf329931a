"""What workers hold in memory: a pixel cache of a gigabyte and more, and a list of a million images.

    python -m benchmarks.memory cache
    python -m benchmarks.memory scale --images 1000000

Private memory is Private_Clean + Private_Dirty of /proc/PID/smaps_rollup: what this process alone holds. Linux only.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import DetectionDataset, EpochSampler, make_loader
from fpnssd.data.augment import AugmentConfig
from fpnssd.data.data_list import DataList
from fpnssd.data.pixel_cache import PixelCache, cache_path

MB = 2**20
BATCHES = 60  # before memory is looked at


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("cache", "scale", "load"))
    parser.add_argument("--images", type=int, default=None, help="of the list (2,000 for cache, 1,000,000 for scale)")
    parser.add_argument("--list", help=argparse.SUPPRESS)  # for load, which scale starts in a process of its own
    args = parser.parse_args(argv)
    if args.what == "load":
        print(json.dumps(load_and_begin(args.list)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "cache":
            report = measure_cache(Path(folder), args.images or 2_000)
        else:
            report = measure_scale(Path(folder), args.images or 1_000_000)
    for name, value in report.items():
        print(f"{name:55} {value:10.1f}")


def private_mb(process):
    """Private_Clean + Private_Dirty of a process, in MB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def peak_mb():
    """The most that this process ever held, in MB; getrusage's would begin at what its parent held."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def write_list(folder, count, objects=1):
    """A data list that names one noisy photograph of 500 x 375 so many times."""
    noise = np.random.default_rng(0).integers(0, 256, (38, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(folder / "a.jpg")
    rng = np.random.default_rng(0)
    with open(folder / "list.json", "w") as file:  # by hand: as Python objects a million images take gigabytes
        file.write('{"info": {"image_root": "."}, "categories": [')
        file.write(", ".join(json.dumps({"id": c, "name": f"class {c}"}) for c in range(1, 21)) + '], "images": [')
        name = f'"file_name": "{"./" * 12}a.jpg", "height": 375, "width": 500'
        file.write(",\n".join(f'{{"id": {i}, {name}}}' for i in range(count)) + '], "annotations": [')
        for first in range(0, count, 10_000):
            rows = []
            for i in range(first, min(first + 10_000, count)):
                for n, (x, y, c) in enumerate(rng.integers(1, (300, 200, 21), (objects, 3)).tolist()):
                    box = f'"bbox": [{x}, {y}, 150.5, 120.0], "area": 18060.0, "iscrowd": 0, "difficult": 0'
                    rows.append(f'{{"id": {i * objects + n}, "image_id": {i}, "category_id": {c}, {box}}}')
            file.write((",\n" if first else "") + ",\n".join(rows))
        file.write("]}")
    return folder / "list.json"


def measure_cache(folder, count):
    """A worker's private memory after an epoch from the cache, less the same worker's after one from JPEG."""
    data_list = DataList.load(write_list(folder, count))
    cache = PixelCache.build(data_list)
    private = {}
    for name, used in (("without the cache", None), ("with the cache", cache)):
        dataset = DetectionDataset(data_list, augment=AugmentConfig(), cache=used)
        sampler = EpochSampler(len(dataset))
        loader = make_loader(dataset, 32, sampler, workers=1)
        for epoch in range(2):
            sampler.epoch = epoch
            for _ in loader:
                pass
        private[name] = private_mb(loader._iterator._workers[0].pid)
        del loader
    size = cache_path(data_list, 0).stat().st_size / MB
    rise = private["with the cache"] - private["without the cache"]
    return {
        "cache, MB": size,
        **{f"a worker's private memory {name}, MB": value for name, value in private.items()},
        "difference, % of the cache": 100 * rise / size,
    }


def measure_scale(folder, count):
    """Loading a list with 5 objects an image, parsed the first time and mapped the second, up to the first batch."""
    path = write_list(folder, count, objects=5)
    report = {"JSON, MB": path.stat().st_size / MB}
    for start in ("cold", "warm"):
        command = [sys.executable, "-m", "benchmarks.memory", "load", "--list", str(path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        report |= {f"{start}: {name}": value for name, value in json.loads(done.stdout).items()}
    arrays = path.with_suffix(".arrays")  # small lists are parsed each time
    report["arrays kept beside it, MB"] = arrays.stat().st_size / MB if arrays.exists() else 0.0
    return report


def load_and_begin(path):
    """In a fresh process: what the list costs, and the time to the first batch; workers forked and spawned."""
    before = peak_mb()
    begun = time.perf_counter()
    data_list = DataList.load(path)
    report = {"seconds to load": time.perf_counter() - begun}
    report["peak memory of loading, MB"] = peak_mb() - before
    (Path(path).parent / "tiny").mkdir(exist_ok=True)
    tiny = DataList.load(write_list(Path(path).parent / "tiny", 32 * BATCHES))
    for start_method in ("fork", "spawn"):
        private, first_batch = {}, {}
        for name, chosen in (("list", data_list), ("tiny", tiny)):
            begun = time.perf_counter()
            dataset = DetectionDataset(chosen, augment=AugmentConfig())
            loader = make_loader(dataset, 32, EpochSampler(len(dataset)), workers=2, start_method=start_method)
            batches = iter(loader)
            next(batches)
            seconds = time.perf_counter() - begun
            for _ in range(BATCHES - 2):
                next(batches)
            private[name] = max(private_mb(worker.pid) for worker in loader._iterator._workers)
            first_batch[name] = seconds
            del batches, loader
        report[f"{start_method}: seconds to the first batch, list loaded"] = first_batch["list"]
        report[f"{start_method}: of a tiny list's, times"] = first_batch["list"] / first_batch["tiny"]
        report[f"{start_method}: a worker's private memory, MB"] = private["list"]
        report[f"{start_method}: of it because of the list, MB"] = private["list"] - private["tiny"]
    return report


if __name__ == "__main__":
    main()
