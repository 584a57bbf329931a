"""The report of a data set's check: a table, check.json and check.png.

Counts of each split and class, box sizes and aspects as the network sees them, every problem with all places.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

from fpnssd.data.checks import ACTIONS, Split
from fpnssd.model_config import ASPECT_RATIOS, SCALES
from model import ModelConfig, make_priors
from utils import atomic_write, write_text

MOST_MATCHED = 10_000  # objects compared with the priors; a sample if there are more

Report = dict[str, Any]


def describe_splits(splits: Sequence[Split], classes: Sequence[str], image_size: int = 300) -> Report:
    """Returns the report, which is the content of check.json.

    Args:
        splits: checked, as `checks.finish_splits` returns them.
        classes: names in label order.
        image_size: of the network, in pixels.
    """
    report: Report = {"image_size": image_size, "splits": {}, "problems": []}
    for split in splits:
        objects = [obj for image in split.images for obj in image.objects]
        counts = Counter(obj.name for obj in objects)
        report["splits"][split.name] = {
            "images": len(split.images),
            "without_objects": sum(not image.objects for image in split.images),
            "objects": len(objects),
            "difficult": sum(obj.difficult for obj in objects),
            "crowd": sum(obj.crowd for obj in objects),
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


def describe_boxes(split: Split, image_size: int) -> Report:
    """Histograms of the boxes in images resized to a square, without crowds; and the share that no prior matches."""
    boxes = np.array(
        [
            np.divide(obj.box, (image.size[1], image.size[0]) * 2)
            for image in split.images
            for obj in image.objects
            if not obj.crowd
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


def _histogram(values: np.ndarray, edges: Sequence[float]) -> Report:
    """Counts between edges; values beyond them count in the first and the last."""
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    return {"edges": edges, "counts": counts.tolist()}


def default_priors(image_size: int) -> torch.Tensor:
    """The priors (P, 4), cxcywh in 0..1, of ModelConfig's shapes on maps of strides 8, 16, .. 512."""
    sides = [math.ceil(image_size / 2**k) for k in range(3, 10)]
    return make_priors(ModelConfig(classes=("any",), image_size=image_size), [(side, side) for side in sides])


def unmatched_share(boxes: np.ndarray, image_size: int, min_iou: float = 0.5) -> float | None:
    """Share of boxes without a prior of IoU `min_iou` or more, estimated on a sample if there are many; None for none.

    Args:
        boxes: (n, 4), xyxy in 0..1 of the image.
        image_size: of the network, in pixels.
        min_iou: the IoU threshold of matching.
    """
    if len(boxes) == 0:
        return None
    if len(boxes) > MOST_MATCHED:
        boxes = boxes[np.random.default_rng(0).choice(len(boxes), MOST_MATCHED, replace=False)]
    priors = box_convert(default_priors(image_size), "cxcywh", "xyxy")
    best = [box_iou(part, priors).amax(dim=1) for part in torch.from_numpy(boxes).float().split(512)]
    return float((torch.cat(best) < min_iou).double().mean())


# ---------------------------------------------------------------------------------------------------------------------
# The table, the file and the picture


def format_report(report: Report) -> str:
    """Tables for the terminal: problems, what was done, an example; then images and objects of splits and classes."""
    lines = []
    if report["problems"]:
        rows = [
            (row["split"], row["kind"], str(row["count"]), row["done"], _shortened(row["where"][0]))
            for row in report["problems"]
        ]
        lines += _table([("split", "problem", "count", "what is done", "for example"), *rows]) + [""]
    else:
        lines += ["no problems", ""]
    names = ("images", "without_objects", "objects", "difficult", "crowd")
    rows = [(split, *(str(part[name]) for name in names)) for split, part in report["splits"].items()]
    lines += _table([("split", "images", "without objects", "objects", "difficult", "iscrowd"), *rows]) + [""]
    splits = report["splits"].values()
    classes = next(iter(splits))["classes"]
    rows = [(name, *(str(part["classes"][name]) for part in splits)) for name in classes]
    lines += _table([("class", *report["splits"]), *rows]) + [""]
    for split, part in report["splits"].items():
        share = part["boxes"]["unmatched_share"]
        if share is not None:
            lines.append(f"{split}: {100 * share:.1f} % of the objects have no prior with an IoU of 0.5 or more")
    return "\n".join(lines)


def _shortened(text: str, most: int = 110) -> str:
    return text if len(text) <= most else f"{text[: most // 2 - 2]} .. {text[-most // 2 + 2 :]}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def draw_report(report: Report, path: Path) -> None:
    """Draws the histograms of sizes and aspects, with the priors' scales and ratios as dotted lines."""
    from matplotlib.figure import Figure  # here, because it takes a second

    image_size = report["image_size"]
    scales = [scale * image_size for scale in SCALES]
    ratios = {1.0, *(r for level in ASPECT_RATIOS for ratio in level for r in (ratio, 1 / ratio))}
    panels = (
        ("side_pixels", scales, f"sqrt(area) in pixels at {image_size}; dotted: the priors' scales"),
        ("aspect", ratios, "width / height; dotted: the priors' ratios"),
    )
    figure = Figure(figsize=(11, 4.2))
    for axis, (name, lines, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for split, part in report["splits"].items():
            edges, counts = part["boxes"][name]["edges"], np.array(part["boxes"][name]["counts"])
            axis.stairs(counts / max(1, counts.sum()), edges, label=split, linewidth=2)
        for line in lines:
            axis.axvline(line, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", ylabel="share of objects", title=title)
        axis.set_xticks(edges[::4], [f"{edge:.3g}" for edge in edges[::4]])
        axis.minorticks_off()
        axis.legend()
    with atomic_write(path, "picture") as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def write_report(report: Report, out: Path, picture: bool = True) -> None:
    """Writes check.json and, if `picture`, check.png in the folder `out`."""
    write_text(out / "check.json", json.dumps(report, indent=1), "check")
    if picture:
        draw_report(report, out / "check.png")
