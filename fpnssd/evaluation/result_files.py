"""Detections of a whole data list as files: the COCO results format and the files of the VOC evaluation server.

write_coco("detections.json", data_list, detections)
detections, problems = read_coco("detections.json", data_list)   # of this or any other detector
write_voc("comp4", data_list, detections, "val")
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from fpnssd.data.coco import parse_id
from fpnssd.data.data_list import DataList
from fpnssd.data.images import DataError
from utils import write_text


def write_coco(path: str | Path, data_list: DataList, detections: Sequence[dict[str, torch.Tensor]]) -> None:
    """Writes the COCO results format: a JSON list of rows with image_id, file_name, category_id, bbox (x, y,
    width, height) and score. file_name is not part of the format: read_coco uses it to detect files of another list.

    Args:
        path: of the file.
        data_list: whose image and category ids are written.
        detections: one dict (boxes, scores, labels) per image, in the order of the data list.
    """
    rows = []
    for index, result in enumerate(detections):
        image = {"image_id": data_list.image_id(index), "file_name": data_list.file_names[index]}
        for (x0, y0, x1, y1), score, label in _rows(result):
            box = [x0, y0, x1 - x0, y1 - y0]
            category_id = data_list.category_ids[label - 1]
            rows.append({**image, "category_id": category_id, "bbox": box, "score": score})
    write_text(path, json.dumps(rows), "COCO results")


def write_voc(
    folder: str | Path, data_list: DataList, detections: Sequence[dict[str, torch.Tensor]], split: str
) -> None:
    """Writes comp4_det_SPLIT_CLASS.txt for each class, as the VOC evaluation server takes them: a line per
    detection with image name, score, and xmin, ymin, xmax, ymax counted from 1.

    Args:
        folder: of the files.
        data_list: the images.
        detections: one dict (boxes, scores, labels) per image, in the order of the data list.
        split: for the files' names.

    Raises:
        DataError: if two classes (as a/b and a:b) would have one file name, two images one name, or a name has a
            blank; nothing is written then.
    """
    paths = voc_result_paths(folder, data_list, split)
    lines: dict[int, list[str]] = {label: [] for label in paths.values()}
    for index, result in enumerate(detections):
        name = Path(data_list.file_names[index]).stem
        for (x0, y0, x1, y1), score, label in _rows(result):
            lines[label].append(f"{name} {score:.6f} {x0 + 1:.3f} {y0 + 1:.3f} {x1:.3f} {y1:.3f}\n")
    for path, label in paths.items():
        write_text(path, "".join(lines[label]), "VOC results")


def voc_result_paths(folder: str | Path, data_list: DataList, split: str) -> dict[Path, int]:
    """The file that write_voc writes for each class, with the class's label; raises as write_voc."""
    names = Counter(stems_of(data_list))
    if bad := next((name for name, count in names.items() if count > 1 or name.split() != [name]), None):
        raise DataError(
            f"the VOC server's files cannot name image {bad!r} of {data_list.path}: the name has a blank, or is that "
            "of two images"
        )
    paths: dict[Path, int] = {}
    for label, name in enumerate(data_list.classes, start=1):
        path = Path(folder) / f"comp4_det_{split}_{file_name_of(name)}.txt"
        if path in paths:
            first = data_list.classes[paths[path] - 1]
            raise DataError(f"classes {first!r} and {name!r} would both be {path}: rename one in {data_list.path}")
        paths[path] = label
    return paths


def file_name_of(text: str) -> str:
    """A text, such as a class name, as a file name: characters that are special in paths become underscores."""
    return re.sub(r"[^\w .+-]", "_", text).strip(" .") or "_"


def _rows(result: dict[str, torch.Tensor]) -> Iterator[tuple[list[float], float, int]]:
    """(box, score, label) of each detection, as builtins."""
    return zip(
        result["boxes"].double().tolist(), result["scores"].double().tolist(), result["labels"].tolist(), strict=True
    )


def read_coco(
    path: str | Path, data_list: DataList, skip_bad: bool = False
) -> tuple[list[dict[str, torch.Tensor]], dict[str, int]]:
    """Reads detections in the COCO results format.

    Args:
        path: of a JSON list, in any order.
        data_list: whose image and category ids the file uses. Rows may have a file_name; it has to be that of the image
            with the row's id.
        skip_bad: leave invalid detections out instead of raising.

    Returns:
        One dict (boxes, scores, labels) per image, in the order of the data list and best first; and how many
        detections were left out, by reason.

    Raises:
        DataError: names what is wrong with the file, and the first invalid row: its number, from 1, and content.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a list of detections in the COCO results format, but a {type(rows).__name__}")
    row_of = rows_by_id(data_list)
    label_of: dict[int | str, int] = {key: label for label, key in enumerate(data_list.category_ids, start=1)}
    kept: list[list[tuple[float, tuple[float, ...], int]]] = [[] for _ in range(len(data_list))]
    problems: Counter[str] = Counter()
    first: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        try:
            index, label = _parse_row(row, row_of, label_of, data_list)
        except ValueError as problem:
            problems[str(problem)] += 1
            first.setdefault(str(problem), f"row {number}, {json.dumps(row):.200}")
            continue
        x, y, width, height = row["bbox"]
        kept[index].append((row["score"], (x, y, x + width, y + height), label))
    if problems and (not skip_bad or problems.total() == len(rows)):
        reasons = "; ".join(f"{count} x {problem}, first {first[problem]}" for problem, count in problems.items())
        categories = ", ".join(f"{k} {name}" for k, name in zip(data_list.category_ids, data_list.classes, strict=True))
        found = {row["category_id"] for row in rows if isinstance(row, dict) and _is_number(row.get("category_id"))}
        if (
            list(data_list.category_ids) == list(range(len(data_list.classes)))
            and len(data_list.classes) in found
            and 0 not in found
        ):
            reasons += "; category ids start at 1 in the file and at 0 in the list, so that each is of another class"
        raise DataError(
            f"{path}: {reasons}. {data_list.path} has {len(data_list)} images (ids {_examples(data_list)}) and the "
            f"categories {categories:.300}. "
            + ("No row is left to evaluate" if problems.total() == len(rows) else "--skip-bad evaluates the rest")
        )
    return [_as_tensors(sorted(of_image, key=lambda row: -row[0])) for of_image in kept], dict(problems)


def rows_by_id(data_list: DataList) -> dict[int | str, int]:
    """The row of each image id; also of file names without ending that are no numbers, which Ultralytics writes as ids,
    if only one image has the name and no image has it as its id."""
    names = stems_of(data_list)
    counts = Counter(names)
    of_names: dict[int | str, int] = {name: row for row, name in enumerate(names) if counts[name] == 1}
    return of_names | {parse_id(data_list.image_id(row)): row for row in range(len(data_list))}


def stems_of(data_list: DataList) -> list[str]:
    """The name of each image without folder and ending."""
    return [PurePosixPath(data_list.file_names[row]).stem for row in range(len(data_list))]


def _parse_row(
    row: Any, row_of: dict[Any, int], label_of: dict[int | str, int], data_list: DataList
) -> tuple[int, int]:
    """The row of a detection's image in the data list, and its label.

    Raises:
        ValueError: what is wrong with the detection.
    """
    if not isinstance(row, dict):
        raise ValueError("not a dict of image_id, category_id, bbox, score")
    for name in ("image_id", "category_id", "bbox", "score"):
        if name not in row:
            raise ValueError(f"{name} is missing")
    bbox, score = row["bbox"], row["score"]
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise ValueError("bbox is not four numbers")
    if not _is_number(score):
        raise ValueError("score is not a number")
    for name, numbers in (("bbox", bbox), ("score", [score])):
        if not all(abs(number) < 1e300 for number in numbers):  # NaN, infinite, or an integer that no float can hold
            raise ValueError(f"{name} is not finite")
    if bbox[2] < 0 or bbox[3] < 0:
        raise ValueError("negative width or height")
    index, label = _look_up(row, "image_id", row_of), _look_up(row, "category_id", label_of)
    if "file_name" in row and not same_file(str(row["file_name"]), data_list.file_names[index]):
        raise ValueError("file_name is not that of the image with this image_id, so the ids are those of another list")
    return index, label


def _look_up(row: dict[str, Any], name: str, known: dict[Any, int]) -> int:
    try:
        key = parse_id(row[name])
    except ValueError:
        raise ValueError(f"{name} is not an id") from None
    if key not in known:
        raise ValueError(f"unknown {name}")
    return known[key]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def same_file(first: str, second: str) -> bool:
    """Whether two paths, each relative to an unknown folder, can be one file: the shorter one ends the longer one."""
    a, b = (PurePosixPath(path.replace("\\", "/")).parts for path in (first, second))
    a, b = (parts[len(parts) - parts[::-1].index("..") :] if ".." in parts else parts for parts in (a, b))
    shared = min(len(a), len(b))
    return shared > 0 and a[-shared:] == b[-shared:]


def _examples(data_list: DataList) -> str:
    """Image ids as text: all if there are few, otherwise the first and the last."""
    count = len(data_list)
    if count > 3:
        return f"{data_list.image_id(0)!r} .. {data_list.image_id(count - 1)!r}"
    return ", ".join(repr(data_list.image_id(row)) for row in range(count))


def _as_tensors(rows: list[tuple[float, tuple[float, ...], int]]) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor([box for _, box, _ in rows], dtype=torch.float64).reshape(-1, 4),
        "scores": torch.tensor([score for score, _, _ in rows], dtype=torch.float64),
        "labels": torch.tensor([label for _, _, label in rows], dtype=torch.long),
    }
