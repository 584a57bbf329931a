"""How long scoring takes at the size of VOC2007 test: 4,952 images, 14,976 objects, 200 detections an image.

    python -m benchmarks.metrics ../shared/voc_lists
    python -m benchmarks.metrics                        # drawn objects, as many, if the lists are not there

Detections are simulated: some near objects, most anywhere. In one run: both VOC protocols over all classes against the
usual loop over detections in Python, COCO's twelve numbers against pycocotools, and five times the size against one.

    python -m benchmarks.metrics ../shared/voc_lists --coverage 150     # images of a list

asks instead how often the 95 % intervals of small lists hold the AP of the large one that they are drawn from.
"""

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpnssd.data.data_list import DataList, Strings
from fpnssd.evaluation import intervals, metrics

NUM_CLASSES = 20


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("lists", nargs="?", help="folder with voc07_test.txt and voc07_test_difficult.txt")
    parser.add_argument("--part", choices=("voc", "voc x 5"), help=argparse.SUPPRESS)  # run in processes of their own
    parser.add_argument("--coverage", type=int, metavar="IMAGES", help="test intervals of lists of so many images")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.coverage:
        coverage(read_lists(args.lists), args.coverage)
        return
    if args.part:
        print(json.dumps(time_voc(read_lists(args.lists), 5 if args.part.endswith("5") else 1)))
        return
    measured = {}
    for part in ("voc", "voc x 5"):
        command = [sys.executable, "-m", "benchmarks.metrics", "--part", part, *([args.lists] if args.lists else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        measured[part] = json.loads(done.stdout)
        print(f"{part:8} {measured[part]['detections']:9,} detections: {measured[part]['seconds']:6.2f} s, ", end="")
        print(f"peak memory {measured[part]['peak_mb']:6.0f} MB ({measured[part]['before_mb']:.0f} before scoring)")
    times, memory = (measured["voc x 5"][name] / measured["voc"][name] for name in ("seconds", "peak_mb"))
    print(f"five times the size: {times:.2f} times the time, {memory:.2f} times the memory")
    data_list = read_lists(args.lists)
    detections = simulate(data_list)
    against_loop(data_list, detections)
    against_pycocotools(data_list, detections)


def read_lists(folder, seed=0):
    """VOC2007 test as a DataList without photographs, or one of drawn boxes of its size."""
    rng = np.random.default_rng(seed)
    if folder:
        lines = (Path(folder) / "voc07_test.txt").read_text().splitlines()
        flags = (Path(folder) / "voc07_test_difficult.txt").read_text().splitlines()
        rows = [np.array(line.split()[1:], dtype=float).reshape(-1, 5) for line in lines]
        boxes = [part[:, :4] - (1, 1, 0, 0) for part in rows]
        labels = [part[:, 4].astype(np.int32) + 1 for part in rows]
        difficult = [np.array(line.split()[1:], dtype=int).astype(bool) for line in flags]
    else:
        counts = rng.multinomial(14_976 - 4_952, np.full(4_952, 1 / 4_952)) + 1
        corners = [rng.uniform(0, 300, (count, 2)) for count in counts]
        boxes = [np.concatenate([c, c + rng.uniform(10, 200, c.shape)], axis=1) for c in corners]
        labels = [rng.integers(1, NUM_CLASSES + 1, count).astype(np.int32) for count in counts]
        difficult = [rng.random(count) < 0.2 for count in counts]
    counts = [len(part) for part in boxes]
    return DataList(
        path="voc07_test",
        image_root=Path(),
        classes=tuple(f"class {label}" for label in range(1, NUM_CLASSES + 1)),
        category_ids=tuple(range(1, NUM_CLASSES + 1)),
        file_names=Strings.of([""] * len(counts)),
        image_ids=np.arange(len(counts)),
        sizes=np.full((len(counts), 2), 500),
        apply_exif=np.zeros(len(counts), dtype=bool),
        first=np.cumsum([0, *counts]),
        boxes=np.concatenate(boxes).astype(np.float32),
        labels=np.concatenate(labels),
        difficult=np.concatenate(difficult),
        crowd=np.zeros(sum(counts), dtype=bool),
    )


def simulate(data_list, per_image=200, seed=0):
    """As many detections an image, best first: three near each object, the rest anywhere."""
    rng = np.random.default_rng(seed)
    detections = []
    for index in range(len(data_list)):
        target = data_list.target(index)
        boxes, labels = np.repeat(target["boxes"], 3, axis=0)[:per_image], np.repeat(target["labels"], 3)[:per_image]
        boxes = boxes + rng.normal(0, 12, boxes.shape)
        corners = rng.uniform(0, 400, (per_image - len(boxes), 2))
        boxes = np.concatenate([boxes, np.concatenate([corners, corners + rng.uniform(5, 200, corners.shape)], axis=1)])
        boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:] - 1), boxes[:, 2:]], axis=1)
        labels = np.concatenate([labels, rng.integers(1, NUM_CLASSES + 1, len(corners))])
        scores = np.concatenate([rng.beta(3, 2, len(boxes) - len(corners)), rng.beta(1, 4, len(corners))])
        order = np.argsort(-scores)
        detections.append(
            {
                "boxes": torch.from_numpy(boxes[order].astype(np.float32)),
                "scores": torch.from_numpy(scores[order].astype(np.float32)),
                "labels": torch.from_numpy(labels[order]),
            }
        )
    return detections


def repeat_list(data_list, times):
    """The same images so many times, one after another."""
    first = data_list.first
    firsts = [first[:1], *(first[1:] + k * first[-1] for k in range(times))]
    arrays = {name: np.concatenate([getattr(data_list, name)] * times) for name in ("boxes", "labels", "difficult")}
    return DataList(
        path=data_list.path,
        image_root=data_list.image_root,
        classes=data_list.classes,
        category_ids=data_list.category_ids,
        file_names=Strings.of([""] * (times * len(data_list))),
        image_ids=np.arange(times * len(data_list)),
        sizes=np.concatenate([data_list.sizes] * times),
        apply_exif=np.zeros(times * len(data_list), dtype=bool),
        first=np.concatenate(firsts),
        crowd=np.zeros(times * len(data_list.boxes), dtype=bool),
        **arrays,
    )


def voc_both(data_list, detections):
    """Both VOC protocols over all classes: {label: (voc2007, voc2010)}."""
    ranked = metrics.rank(data_list, detections)
    status = metrics.match_voc(data_list, ranked)
    scores = {}
    for label in range(1, len(data_list.classes) + 1):
        found = metrics.true_positives(status[ranked.of(label)])
        objects = int((data_list.counted & (data_list.labels == label)).sum())
        scores[label] = (metrics.voc2007_ap(found, objects), metrics.voc2010_ap(found, objects))
    return scores


def time_voc(data_list, times):
    detections = simulate(data_list) * times
    data_list = repeat_list(data_list, times)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    voc_both(data_list, detections)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    count = sum(len(d["scores"]) for d in detections)
    return {"detections": count, "seconds": seconds, "peak_mb": peak, "before_mb": before}


# ---------------------------------------------------------------------------------------------------------------------
# The usual ways


def against_loop(data_list, detections):
    """One detection after another in Python, on a tenth of the images, beside ours on the same."""
    part = repeat_list(data_list, 1)
    count = len(data_list) // 10
    part.first, part.sizes = part.first[: count + 1], part.sizes[:count]
    for name in ("boxes", "labels", "difficult", "crowd"):
        setattr(part, name, getattr(part, name)[: part.first[-1]])
    start = time.perf_counter()
    ours = voc_both(part, detections[:count])
    our_seconds = time.perf_counter() - start
    start = time.perf_counter()
    theirs = {label: loop_ap(part, detections[:count], label) for label in ours}
    seconds = time.perf_counter() - start
    worst = max(abs(ours[label][1] - theirs[label]) for label in ours)
    print(f"{count} images: a loop over detections {seconds:.2f} s, ours {our_seconds:.2f} s, ", end="")
    print(f"{seconds / our_seconds:.1f} times; largest difference of VOC2010 AP {worst:.1e}")


def loop_ap(data_list, detections, label):
    """VOC2010 AP of a class, as the devkit writes it down."""
    rows = [
        (float(score), image, box)
        for image, d in enumerate(detections)
        for box, score in zip(
            d["boxes"][d["labels"] == label].double().numpy(), d["scores"][d["labels"] == label], strict=True
        )
    ]
    rows.sort(key=lambda row: -row[0])
    claimed, is_true = set(), []
    for _, image, box in rows:
        best, which = -np.inf, None
        for row in range(data_list.first[image], data_list.first[image + 1]):
            if data_list.labels[row] != label:
                continue
            overlap = metrics.paired_iou(box[None], data_list.boxes[row][None].astype(np.float64))[0]
            if overlap > best:
                best, which = overlap, row
        if best >= 0.5 and data_list.difficult[which]:
            continue
        is_true.append(best >= 0.5 and which not in claimed)
        if best >= 0.5:
            claimed.add(which)
    objects = int(((data_list.labels == label) & ~data_list.difficult).sum())
    tp = np.cumsum(is_true)
    recall, precision = np.r_[0, tp / objects, 1], np.r_[0, tp / np.arange(1, len(tp) + 1), 0]
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    changes = np.flatnonzero(recall[1:] != recall[:-1])
    return float(((recall[changes + 1] - recall[changes]) * precision[changes + 1]).sum())


def against_pycocotools(data_list, detections):
    start = time.perf_counter()
    ranked = metrics.rank(data_list, detections)
    ours, _ = metrics.coco_metrics(data_list, ranked)
    our_seconds = time.perf_counter() - start
    results = metrics._coco_results(ranked)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = metrics._coco_truth(data_list).dataset
        truth.createIndex()
        start = time.perf_counter()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        seconds = time.perf_counter() - start
    worst = max(abs(ours[name] - value) for name, value in zip(metrics.COCO_NAMES, evaluation.stats, strict=True))
    print(
        f"COCO's twelve: pycocotools {seconds:.1f} s, ours {our_seconds:.1f} s, {seconds / our_seconds:.1f} times; ",
        end="",
    )
    print(f"largest difference {worst:.1e}")


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def coverage(data_list, images, lists=60, samples=200):
    """Prints the share of lists, drawn from the large one, whose interval holds its AP, and how far they are off."""
    matched = intervals.match(data_list, metrics.rank(data_list, simulate(data_list, per_image=30)))
    everything = intervals.resampled(data_list, matched, np.ones((1, len(data_list))))
    rng = np.random.default_rng(0)
    held = {name: [] for name in intervals.NAMES}
    for _ in range(lists):
        chosen = rng.choice(len(data_list), images, replace=False)
        weights = np.zeros((samples + 1, len(data_list)))
        weights[0, chosen] = 1  # the list itself
        weights[1:, chosen] = intervals.draw_weights(images, samples, int(rng.integers(2**31)))
        for name, scores in intervals.resampled(data_list, matched, weights).items():
            truth, whole, (low, high) = everything[name][0], scores[0], np.percentile(scores[1:], [2.5, 97.5])
            basic, plain = 2 * whole - high <= truth <= 2 * whole - low, low <= truth <= high
            held[name].append((basic, plain, whole - truth, scores[1:].mean() - whole))
    print(f"{lists} lists of {images} images: share of intervals that hold the whole's AP; off by, in points")
    for name, rows in held.items():
        basic, plain, bias, of_resamples = np.mean(rows, axis=0)
        print(
            f"{name:14} basic {100 * basic:3.0f} %, plain percentiles {100 * plain:3.0f} %; "
            f"lists {100 * bias:+.1f}, their resamples {100 * of_resamples:+.1f} more"
        )


if __name__ == "__main__":
    main()
