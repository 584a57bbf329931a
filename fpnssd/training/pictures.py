"""Pictures of a training: the curves of its log, and detections in images of the evaluation list."""

import csv
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torchvision.ops import box_iou

from fpnssd.data.data_list import DataList, evenly_spaced
from fpnssd.inference.detector import Detections
from fpnssd.inference.draw import annotate
from model import above_score
from utils import InputError, atomic_write

VAL_IMAGES = 8
VAL_MIN_SCORE = 0.25  # lower than in detect.py: detections appear earlier in the training
SHEET_IMAGES = 48  # of val.jpg


def draw_detections(
    data_list: DataList,
    detections: list[dict[str, torch.Tensor]],
    min_score: float = VAL_MIN_SCORE,
    count: int = VAL_IMAGES,
    side: int = 300,
) -> Image.Image:
    """A grid of images of a list, evenly spaced, with their detections, and the missed objects in white.

    Args:
        data_list: the images and their objects.
        detections: of all its images.
        min_score: score threshold.
        count: maximum number of images.
        side: of one image in it, in pixels.
    """
    shown = evenly_spaced(len(data_list), count)
    num_rows = max(1, round(math.sqrt(0.75 * len(shown))))  # about 4:3
    columns = math.ceil(len(shown) / num_rows)
    grid = Image.new("RGB", (columns * side, num_rows * side))
    for place, index in enumerate(shown):
        kept = above_score(detections[index]["scores"], min_score)
        boxes, scores, labels = (detections[index][name][kept] for name in ("boxes", "scores", "labels"))
        height, width = data_list.sizes[index].tolist()
        scale = side / torch.tensor([width, height, width, height])
        missed = missed_objects(data_list, index, boxes, labels) * scale
        boxes = boxes * scale
        names = [data_list.classes[label - 1] for label in labels.tolist()]
        image = data_list.read_image(index).resize((side, side))
        picture = annotate(image, Detections(boxes, scores, labels, names, (side, side)))
        draw = ImageDraw.Draw(picture)
        for box in missed.tolist():
            draw.rectangle(box, outline="black", width=4)
            draw.rectangle(box, outline="white", width=2)
        grid.paste(picture, (place % columns * side, place // columns * side))
    return grid


def missed_objects(data_list: DataList, index: int, boxes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The objects of an image that no detection of their class overlaps with an IoU of 0.5.

    Args:
        data_list, index: the image.
        boxes: (m, 4) of its detections, xyxy in pixels.
        labels: (m,)

    Returns:
        (n, 4) xyxy in pixels, without difficult objects and crowds.
    """
    target = data_list.target(index)
    counted = torch.from_numpy(~(target["difficult"] | target["crowd"]))
    objects, classes = torch.from_numpy(target["boxes"])[counted], torch.from_numpy(target["labels"])[counted]
    overlaps = (box_iou(objects, boxes.float()) >= 0.5) & (classes[:, None] == labels)
    return objects[~overlaps.any(dim=1)]


def read_log(path: str | Path) -> dict[str, tuple[list[float], list[float]]]:
    """A log.csv as {column: (epochs, values)}, without the rows in which the column is empty.

    Raises:
        InputError: if it has no row with an epoch.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "epoch" not in rows[0]:
        raise InputError(f"{path} is not the log of a training: it has no row with an epoch")
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, text in row.items():
            try:
                value, epoch = float(text), float(row["epoch"])
            except (TypeError, ValueError):
                continue  # empty: not evaluated after this epoch
            epochs, values = columns.setdefault(name, ([], []))
            epochs.append(epoch)
            values.append(value)
    return columns


def draw_curves(log: str | Path, path: str | Path) -> None:
    """Writes a PNG of the losses, scores in percent and learning rate over the epochs of a log.csv."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, scores, rate = figure.subplots(1, 3)
    for name, (epochs, values) in read_log(log).items():
        marker = "o" if len(epochs) < 30 else None
        if name.startswith("loss_"):
            losses.plot(epochs, values, marker=marker, markersize=3, label=name.removeprefix("loss_"))
        elif name in ("voc2007_ap50", "voc2010_ap50", "coco_ap", "coco_ap50", "coco_ap75"):
            scores.plot(epochs, [100 * value for value in values], marker=marker, markersize=3, label=name)
        elif name == "lr":
            rate.plot(epochs, values, label="at the end of the epoch")
    losses.set(title="training loss", ylabel="mean of the epoch")
    scores.set(title="scores on the evaluation list", ylabel="AP, percent")
    rate.set(title="learning rate (of all but the backbone)")
    for axis in (losses, scores, rate):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
