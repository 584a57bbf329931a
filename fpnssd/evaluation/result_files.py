"""Detections as files: COCO's result format, ours and other detectors', and what VOC's server takes.

write_coco("detections.json", data_list, detections)
detections, problems = read_coco("detections.json", data_list)
write_voc("comp4", data_list, detections, "val")
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

import torch

from fpnssd.data.images import DataError
from utils import write_text


def write_coco(path, data_list, detections):
    """One dict (boxes, scores, labels) an image -> a JSON list of image_id, category_id, bbox (x, y, w, h), score."""
    rows = []
    for index, result in enumerate(detections):
        image_id = data_list.image_id(index)
        for (x0, y0, x1, y1), score, label in _rows(result):
            box = [x0, y0, x1 - x0, y1 - y0]
            category_id = data_list.category_ids[label - 1]
            rows.append({"image_id": image_id, "category_id": category_id, "bbox": box, "score": score})
    write_text(path, json.dumps(rows), "COCO results")


def write_voc(folder, data_list, detections, split):
    """comp4_det_SPLIT_CLASS.txt for each class: image name, score, 1-based inclusive xmin, ymin, xmax, ymax.

    DataError, with nothing written, if two classes have one file name (a/b and a:b).
    """
    paths = voc_result_paths(folder, data_list, split)
    lines = {label: [] for label in range(1, len(data_list.classes) + 1)}
    for index, result in enumerate(detections):
        name = Path(data_list.file_names[index]).stem
        for (x0, y0, x1, y1), score, label in _rows(result):
            lines[label].append(f"{name} {score:.6f} {x0 + 1:.3f} {y0 + 1:.3f} {x1:.3f} {y1:.3f}\n")
    for path, label in paths.items():
        write_text(path, "".join(lines[label]), "VOC results")


def voc_result_paths(folder, data_list, split):
    """{the path that write_voc writes: label} of each class."""
    paths = {}
    for label, name in enumerate(data_list.classes, start=1):
        path = Path(folder) / f"comp4_det_{split}_{file_name_of(name)}.txt"
        if path in paths:
            first = data_list.classes[paths[path] - 1]
            raise DataError(f"classes {first!r} and {name!r} would both be {path}: rename one in {data_list.path}")
        paths[path] = label
    return paths


def file_name_of(text):
    """A text, as a class's name, as a file name of any system: what has a meaning in paths becomes an underscore."""
    return re.sub(r"[^\w .+-]", "_", text).strip(" .") or "_"


def _rows(result):
    return zip(
        result["boxes"].double().tolist(), result["scores"].double().tolist(), result["labels"].tolist(), strict=True
    )


def read_coco(path, data_list, skip_bad=False):
    """(one dict an image in the list's order, best first; {what is wrong: how many}).

    DataError names what is wrong with the file, and with the first bad detection unless these are to be skipped.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} is no list of detections in COCO's result format, but a {type(rows).__name__}")
    row_of = {data_list.image_id(index): index for index in range(len(data_list))}
    label_of = {category_id: label for label, category_id in enumerate(data_list.category_ids, start=1)}
    found = [[] for _ in range(len(data_list))]
    problems, first = Counter(), {}
    for number, row in enumerate(rows):
        problem = _problem(row, row_of, label_of)
        if problem:
            problems[problem] += 1
            first.setdefault(problem, f"number {number}, {json.dumps(row):.200}")
            continue
        x, y, width, height = row["bbox"]
        box = (x, y, x + width, y + height)
        found[row_of[row["image_id"]]].append((row["score"], box, label_of[row["category_id"]]))
    if problems and not skip_bad:
        told = "; ".join(f"{count} x {problem}, first {first[problem]}" for problem, count in problems.items())
        categories = ", ".join(f"{k} {name}" for k, name in zip(data_list.category_ids, data_list.classes, strict=True))
        raise DataError(
            f"{path}: {told}. {data_list.path} has {len(data_list)} images and the categories {categories:.300}. "
            "--skip-bad scores the rest"
        )
    return [_as_tensors(sorted(of_image, key=lambda row: -row[0])) for of_image in found], dict(problems)


def _problem(row, row_of, label_of):
    """What is wrong with a detection, or None."""
    try:
        numbers = [*row["bbox"], row["score"]]
        if len(numbers) != 5:
            return "bbox is not four numbers"
        if not all(math.isfinite(number) for number in numbers):
            return "not a finite number"
        if numbers[2] < 0 or numbers[3] < 0:
            return "negative width or height"
        if row["image_id"] not in row_of:
            return "unknown image_id"
        if row["category_id"] not in label_of:
            return "unknown category_id"
    except (KeyError, TypeError):
        return "not a dict of image_id, category_id, bbox, score"
    return None


def _as_tensors(rows):
    return {
        "boxes": torch.tensor([box for _, box, _ in rows], dtype=torch.float64).reshape(-1, 4),
        "scores": torch.tensor([score for score, _, _ in rows], dtype=torch.float64),
        "labels": torch.tensor([label for _, _, label in rows], dtype=torch.long),
    }
