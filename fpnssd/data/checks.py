"""Opens every image and looks at every box before training does; what is wrong goes into a table, a JSON and a picture.

`check_image` judges one image, `finish_splits` what only shows in all of them together, `write_report` tells it.
annotations.py says what there is, create_data_lists.py calls these.
"""

import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

from fpnssd.data.annotations import Problem, name_problem
from fpnssd.data.images import DataError, open_image, orientation, to_rgb, upright
from model import ModelConfig, make_priors
from utils import atomic_write, write_text

# What can be wrong, and what is done about it. --strict fails on all but what is only noted.
LEFT_OUT = {
    "annotation missing": "image left out",
    "annotation does not parse": "image left out",
    "annotation with entities": "image left out",
    "annotation of another format": "image left out",
    "annotation incomplete": "image left out",
    "number unreadable": "image left out",
    "file name unusable": "image left out",
    "image missing": "image left out",
    "image outside the image folder": "image left out",
    "file is no image": "image left out",
    "image damaged": "image left out",
    "image too large": "image left out",
    "size differs from the annotation's": "image left out",
    "image is in a later split too": "left out of the earlier split",
    "box not finite": "object left out",
    "box inverted": "object left out",
    "box empty": "object left out",
    "box outside the image": "object left out",
    "object twice": "listed once",
    "object of an unknown class": "object left out",
    "object of an unknown image": "object left out",
    "object without a box": "object left out",
    "box in pixels, not in 0..1": "object left out",
    "label file without an image": "label file left out",
    "folder without label files": "images kept: they teach background",
}
REPAIRED = {
    "box partly outside the image": "clipped",
    "image named twice": "listed once",
    "EXIF rotation applied": "boxes are those of the turned image",
    "polygon instead of a box": "its enclosing box",
    "label files in two places differ": "the first is read",
    "flag unreadable": "object kept, the flag is taken as not set",
    "area unusable": "the box's area is used",
}
NOTED = {
    "EXIF rotation not applied": "the annotation's size is that of the image as stored",
    "greyscale image": "made RGB",
    "CMYK image": "made RGB",
    "palette image": "made RGB",
    "16-bit image": "lower 8 bits dropped",
    "image with transparency": "filled with the mean colour",
    "animated image": "its first frame is used",
    "image twice in the split": "kept",
    "image without objects": "kept: it teaches background",
    "image without a label file": "kept: it teaches background",
    "label file is empty": "kept: the image teaches background",
    "label file of two images": "read for both",
    "confidence after the box": "not used",
    "two classes on one box": "kept",
    "box under a pixel at network size": "kept: nothing can be learnt from it, and it counts as missed",
    "class without objects": "kept",
    "class that was not chosen": "object left out",
}
ACTIONS = {**LEFT_OUT, **REPAIRED, **NOTED}
MOST_MATCHED = 10_000  # objects that are compared with the priors; of more, a sample


@dataclass
class CheckedImage:
    """What goes into the data list."""

    file_name: str
    size: tuple  # (height, width), turned by EXIF if apply_exif
    apply_exif: bool
    objects: list  # of RawObject, boxes in pixels, clipped
    digest: bytes  # of the decoded pixels
    image_id: int | str | None


@dataclass
class Split:
    """What a split's list will hold, and what was wrong on the way."""

    name: str
    image_root: Path
    images: list  # of CheckedImage
    problems: list  # of Problem
    given: int = 0  # images that the data set names
    unread: int = 0  # of these, the ones whose annotation is missing or cannot be parsed
    annotated: int = 0  # objects in the annotations of the others


# ---------------------------------------------------------------------------------------------------------------------
# One image


def check_image(record, image_root, image_size=300):
    """(CheckedImage, or None where it cannot be used; problems). Decodes the image."""
    problems = list(record.problems)
    path = image_root / record.file_name
    try:
        if problem := name_problem(record.file_name):
            raise DataError(f"image {path}: its name {problem}: rename it", "file name unusable")
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(image_root)):
            raise DataError(f"{path} is not below {image_root}", "image outside the image folder")
        with open_image(path) as image:
            problems += [Problem(kind, str(path)) for kind in kinds_of_image(image)]
            apply_exif, problem = judge_exif(image, record.size)
            if problem:
                problems.append(Problem(problem, str(path)))
            pixels = to_rgb(upright(image) if apply_exif else image, str(path))
        size = (pixels.height, pixels.width)
        if record.size not in (None, size):
            said, found = ("x".join(f"{side:g}" for side in reversed(s)) for s in (record.size, size))
            sentence = f"{record.annotation} says {said}, {path} is {found}"
            raise DataError(sentence, "size differs from the annotation's")
    except DataError as error:
        return None, [*problems, Problem(error.kind, str(error))]
    objects, box_problems = check_objects(record, size, image_size)
    problems += [Problem(kind, f"{record.annotation}: {text}") for kind, text in box_problems]
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16, salt=f"{size[1]}".encode()).digest()
    return CheckedImage(record.file_name, size, apply_exif, objects, digest, record.image_id), problems


def kinds_of_image(image):
    """Which NOTED kinds of image a PIL image, opened but not decoded, is."""
    mode = image.mode
    if mode.startswith("I"):
        yield "16-bit image"
    elif mode in ("1", "L", "LA", "La"):
        yield "greyscale image"
    elif mode == "CMYK":
        yield "CMYK image"
    elif mode in ("P", "PA"):
        yield "palette image"
    if image.has_transparency_data:
        yield "image with transparency"
    if getattr(image, "is_animated", False):  # n_frames would decode all frames of a GIF to count them
        yield "animated image"


def judge_exif(image, said_size):
    """(whether the boxes are measured in the image as its EXIF orientation turns it, the problem to name or None).

    The size that an annotation gives tells it, if the turn swaps unlike sides. Without a size, boxes were drawn in a
    viewer, which turns.
    """
    turn = orientation(image)
    if turn == 1:
        return False, None
    stored = (image.height, image.width)
    turned = stored[::-1] if turn >= 5 else stored
    if said_size is None or (said_size == turned and turned != stored):
        return True, "EXIF rotation applied"
    return False, "EXIF rotation not applied"


def check_objects(record, size, image_size):
    """The record's objects that can be used, boxes in pixels and clipped; and (kind, text) of what is wrong."""
    height, width = size
    kept, problems, seen = [], [], {}
    for one in record.objects:
        said = f"{one.name} {one.text or one.box} in {width}x{height}"
        box = tuple(c * s for c, s in zip(one.box, (width, height) * 2, strict=True)) if record.normalized else one.box
        clipped, kind = check_box(box, size)
        if kind:
            problems.append((kind, said))
        if clipped is None:
            continue
        others = seen.setdefault(clipped, [])
        if one.name in others:
            problems.append(("object twice", said))
            continue
        if others:
            problems.append(("two classes on one box", f"{said}, also {', '.join(others)}"))
        others.append(one.name)
        x0, y0, x1, y1 = clipped
        if min((x1 - x0) / width, (y1 - y0) / height) * image_size < 1:
            problems.append(("box under a pixel at network size", said))
        kept.append(one._replace(box=clipped, area=one.area if kind is None else None))
    return kept, problems


def check_box(box, size):
    """xyxy in pixels -> (the box clipped to the image, or None where nothing can be done; the problem or None)."""
    if not all(math.isfinite(edge) for edge in box):
        return None, "box not finite"
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0:
        return None, "box inverted"
    if x1 == x0 or y1 == y0:
        return None, "box empty"
    height, width = size
    clipped = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        return None, "box outside the image"
    # What rounding adds is no problem worth a line.
    moved = max(abs(a - b) for a, b in zip(clipped, box, strict=True))
    return clipped, "box partly outside the image" if moved > 0.01 else None


# ---------------------------------------------------------------------------------------------------------------------
# All images


def finish_splits(splits, classes, sources):
    """What only shows in all images together: twins, classes. Returns new Splits that hold what can be listed.

    classes: the names that count, in order; sources: name in the annotations -> one of them.
    """
    finished, later = [], {}  # digest -> where it is, in the splits behind
    for split in reversed(splits):
        images, problems, seen = [], list(split.problems), {}
        for image in split.images:
            if image.digest in later:
                sentence = f"{split.name}'s {image.file_name} is {later[image.digest]}"
                problems.append(Problem("image is in a later split too", sentence))
                continue
            if image.digest in seen:
                sentence = f"{image.file_name} has the pixels of {seen[image.digest]}"
                problems.append(Problem("image twice in the split", sentence))
            seen[image.digest] = image.file_name
            objects = {}  # by name and box: classes that were joined may have both marked one object
            for one in image.objects:
                sentence = f"{image.file_name}: {one.name} {one.text or one.box}"
                if one.name not in sources:
                    problems.append(Problem("class that was not chosen", sentence))
                elif (sources[one.name], one.box) in objects:
                    problems.append(Problem("object twice", sentence))
                else:
                    objects[sources[one.name], one.box] = one._replace(name=sources[one.name])
            objects = list(objects.values())
            if not objects:
                problems.append(Problem("image without objects", image.file_name))
            images.append(replace(image, objects=objects))
        there = {one.name for image in images for one in image.objects}
        problems += [Problem("class without objects", name) for name in classes if name not in there]
        later |= {digest: f"{split.name}'s {file_name}" for digest, file_name in seen.items()}
        finished.append(replace(split, images=images, problems=problems))
    return finished[::-1]


def describe_splits(splits, classes, image_size=300):
    """The report as builtins: counts of each split and class, box sizes and aspects, problems with every place."""
    report = {"image_size": image_size, "splits": {}, "problems": []}
    for split in splits:
        objects = [one for image in split.images for one in image.objects]
        counts = Counter(one.name for one in objects)
        report["splits"][split.name] = {
            "images": len(split.images),
            "without_objects": sum(not image.objects for image in split.images),
            "objects": len(objects),
            "difficult": sum(one.difficult for one in objects),
            "crowd": sum(one.crowd for one in objects),
            "classes": {name: counts[name] for name in classes},
            "boxes": describe_boxes(split, image_size),
        }
    places = defaultdict(list)
    for split in splits:
        for problem in split.problems:
            places[problem.kind, split.name].append(problem.where)
    for kind in ACTIONS:
        for split in splits:
            if where := places.get((kind, split.name)):
                row = {"kind": kind, "split": split.name, "count": len(where), "done": ACTIONS[kind], "where": where}
                report["problems"].append(row)
    return report


def describe_boxes(split, image_size):
    """Histograms of the boxes as the network sees them, squashed to a square, and how the priors suit them."""
    boxes = np.array(
        [
            np.divide(one.box, (image.size[1], image.size[0]) * 2)
            for image in split.images
            for one in image.objects
            if not one.crowd
        ]
    ).reshape(-1, 4)  # 0..1
    sides = boxes[:, 2:] - boxes[:, :2]
    lengths = image_size * np.sqrt(sides.prod(axis=1))
    aspects = sides[:, 0] / sides[:, 1].clip(min=1e-9)
    length_edges = [round(image_size * 2 ** (k / 2), 2) for k in range(-16, 1)]  # steps of sqrt 2 up to the whole image
    aspect_edges = [round(2 ** (k / 2), 3) for k in range(-8, 9)]
    return {
        "side_pixels": _histogram(lengths, length_edges),
        "aspect": _histogram(aspects, aspect_edges),
        "unmatched_share": unmatched_share(boxes, image_size),
    }


def _histogram(values, edges):
    """Counts between edges; what lies beyond is counted in the first and the last."""
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    return {"edges": edges, "counts": counts.tolist()}


def default_priors(image_size):
    """The priors (P, 4), cxcywh in 0..1, of ModelConfig's shapes on maps of strides 8, 16, .. 512."""
    sides = [math.ceil(image_size / 2**k) for k in range(3, 10)]
    return make_priors(ModelConfig(classes=("any",), image_size=image_size), [(side, side) for side in sides])


def unmatched_share(boxes, image_size, min_overlap=0.5):
    """Share of boxes (n, 4), xyxy in 0..1, that no prior overlaps by so much; of a sample where there are many."""
    if len(boxes) == 0:
        return None
    if len(boxes) > MOST_MATCHED:
        boxes = boxes[np.random.default_rng(0).choice(len(boxes), MOST_MATCHED, replace=False)]
    priors = box_convert(default_priors(image_size), "cxcywh", "xyxy")
    best = [box_iou(part, priors).amax(dim=1) for part in torch.from_numpy(boxes).float().split(512)]
    return float((torch.cat(best) < min_overlap).double().mean())


# ---------------------------------------------------------------------------------------------------------------------
# Telling it


def format_report(report):
    """The table: what was wrong, what was done, an example; then what there is."""
    lines = []
    if report["problems"]:
        rows = [
            (row["split"], row["kind"], str(row["count"]), row["done"], _shortened(row["where"][0]))
            for row in report["problems"]
        ]
        lines += _table([("split", "found", "count", "what is done", "for example"), *rows]) + [""]
    else:
        lines += ["nothing wrong was found", ""]
    names = ("images", "without_objects", "objects", "difficult", "crowd")
    rows = [(split, *(str(part[name]) for name in names)) for split, part in report["splits"].items()]
    lines += _table([("split", *(name.replace("_", " ") for name in names)), *rows]) + [""]
    splits = report["splits"].values()
    classes = next(iter(splits))["classes"]
    rows = [(name, *(str(part["classes"][name]) for part in splits)) for name in classes]
    lines += _table([("class", *report["splits"]), *rows]) + [""]
    for split, part in report["splits"].items():
        share = part["boxes"]["unmatched_share"]
        if share is not None:
            lines.append(f"{split}: no prior overlaps {100 * share:.1f} % of the objects by 0.5 or more")
    return "\n".join(lines)


def _shortened(text, most=110):
    return text if len(text) <= most else f"{text[: most // 2 - 2]} .. {text[-most // 2 + 2 :]}"


def _table(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def draw_report(report, path):
    """The histograms as a picture: classes, sizes and aspects, with the priors' scales and ratios as lines."""
    from matplotlib.figure import Figure  # here, because it takes a second

    config = ModelConfig(classes=("any",), image_size=report["image_size"])
    ratios = sorted({1.0, *(r for level in config.aspect_ratios for ratio in level for r in (ratio, 1 / ratio))})
    classes = list(next(iter(report["splits"].values()))["classes"])
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_class, by_side, by_aspect = figure.subplots(1, 3)
    for number, (split, part) in enumerate(report["splits"].items()):
        places = np.arange(len(classes)) + 0.8 * (number / len(report["splits"]) - 0.5)
        counts = [part["classes"][name] for name in classes]
        by_class.barh(places, counts, 0.8 / len(report["splits"]), align="edge", label=split)
        for axis, name in ((by_side, "side_pixels"), (by_aspect, "aspect")):
            histogram = part["boxes"][name]
            total = max(1, sum(histogram["counts"]))
            axis.stairs([c / total for c in histogram["counts"]], histogram["edges"], label=split, linewidth=2)
    by_class.set_yticks(range(len(classes)), classes, fontsize=7 if len(classes) < 40 else 3)
    by_class.invert_yaxis()
    by_class.set(xscale="symlog", title="objects of each class")
    by_class.legend()
    sides = [scale * report["image_size"] for scale in config.scales]
    for axis, lines in ((by_side, sides), (by_aspect, ratios)):
        for line in lines:
            axis.axvline(line, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", ylabel="share of objects")
    by_side.set(title=f"sqrt(area) in pixels at {report['image_size']}; dotted: the priors' scales")
    by_aspect.set(title="width / height; dotted: the priors' ratios")
    for axis in (by_side, by_aspect):
        axis.set_xticks(axis.get_xticks(), minor=False)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    with atomic_write(path, "picture") as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def write_report(report, out):
    """check.json and check.png in the folder `out`."""
    write_text(out / "check.json", json.dumps(report, indent=1), "check")
    draw_report(report, out / "check.png")
