"""Reads the folder of Parquet files that bulk_detect.py writes as detections of a data list."""

import os
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from fpnssd.data.data_list import DataList
from fpnssd.data.images import DataError
from fpnssd.evaluation.metrics import ImageDetections
from fpnssd.evaluation.result_files import same_file

COLUMNS = ("path", "height", "width", "boxes", "scores", "names", "error")


def read_parquet(
    folder: str | Path, data_list: DataList, skip_bad: bool = False
) -> tuple[list[ImageDetections], dict[str, int]]:
    """Reads the detections of a data list's images; rows of other pictures are ignored.

    A row belongs to an image if one of the two paths ends in the other, both taken as relative to an unknown folder; of
    two such rows the one with the image's own path counts, and of two such images the one with the row's.

    Args:
        folder: that bulk_detect.py wrote.
        data_list: the images. Classes are compared by name.
        skip_bad: evaluate images without a row, or with a row that cannot be used, as images without detections.

    Returns:
        One dict (boxes, scores, labels) per image, in the order of the data list and best first; and how many images
        have no detections, by reason.

    Raises:
        DataError: if pyarrow is not installed, the folder has other files, two rows may be of one image or one row of
            two images, or, without skip_bad, an image has no detections; names the first one.
    """
    rows = _rows_by_image(folder, data_list)
    label_of = {name: label for label, name in enumerate(data_list.classes, start=1)}
    detections, problems, first = [], Counter[str](), dict[str, str]()
    for index in range(len(data_list)):
        row = rows.get(index)
        if problem := _problem(row, tuple(data_list.sizes[index].tolist()), label_of):
            problems[problem] += 1
            first.setdefault(problem, str(data_list.image_path(index)))
            row = None
        detections.append(_as_tensors(row, label_of))
    if problems and not skip_bad:
        reasons = "; ".join(f"{count} images: {problem}, first {first[problem]}" for problem, count in problems.items())
        raise DataError(f"{folder}: {reasons}. --skip-bad evaluates them as images without detections")
    return detections, dict(problems)


def _rows_by_image(folder: str | Path, data_list: DataList) -> dict[int, dict[str, Any]]:
    """The row of each image that has one, by the image's place in the data list."""
    files = sorted(str(path) for path in Path(folder).glob("*.parquet"))
    if not files:
        checkpoints = [Path(folder) / f"{name}.pth.tar" for name in ("best", "last")]
        hint = next((f": name {checkpoint}" for checkpoint in checkpoints if checkpoint.is_file()), "")
        raise DataError(f"{folder} holds no Parquet files of bulk_detect.py{hint}")
    try:
        import pyarrow as pa  # optional
        from pyarrow import dataset
    except ImportError as error:
        raise DataError(f"{folder}: reading Parquet needs pyarrow: pip install -e '.[bulk]'") from error
    by_name: dict[str, list[int]] = defaultdict(list)
    for index in range(len(data_list)):
        by_name[data_list.image_path(index).name].append(index)
    rows: dict[int, dict[str, Any]] = {}
    exact: set[int] = set()  # images whose row has their own path
    try:
        for batch in dataset.dataset(files, format="parquet").to_batches(columns=list(COLUMNS)):
            for number, path in enumerate(batch["path"].to_pylist()):
                for index in by_name.get(PurePosixPath(path).name, ()):
                    if not same_file(path, data_list.file_names[index]):
                        continue
                    own = os.path.abspath(path) == os.path.abspath(data_list.image_path(index))
                    if index in exact and not own:
                        continue
                    if index in rows and own == (index in exact):
                        both = f"{rows[index]['path']} and {path}"
                        raise DataError(f"{folder}: {both} may both be {data_list.image_path(index)}")
                    exact |= {index} if own else set()
                    rows[index] = {name: batch[name][number].as_py() for name in COLUMNS}
    except (pa.ArrowInvalid, KeyError) as error:
        raise DataError(f"{folder} is not a result of bulk_detect.py: {error}") from error
    of_path: dict[str, list[int]] = defaultdict(list)
    for index, row in rows.items():
        of_path[row["path"]].append(index)
    for path, indexes in of_path.items():
        if len(indexes) > 1 and not exact.intersection(indexes):
            images = " and ".join(str(data_list.image_path(index)) for index in indexes[:2])
            raise DataError(f"{folder}: {path} may be both {images}")
        for index in indexes:
            if len(indexes) > 1 and index not in exact:
                del rows[index]
    return rows


def _problem(row: dict[str, Any] | None, size: tuple[int, int], label_of: dict[str, int]) -> str | None:
    """What is wrong with an image's row, or None."""
    if row is None:
        return "no row"
    if row["error"]:
        return "bulk_detect.py could not read them"
    if (row["height"], row["width"]) != size:
        return "another size than in the data list"
    unknown = sorted(set(row["names"]) - set(label_of))
    return f"classes that the data list lacks ({', '.join(unknown)})" if unknown else None


def _as_tensors(row: dict[str, Any] | None, label_of: dict[str, int]) -> ImageDetections:
    row = row or {"boxes": [], "scores": [], "names": []}
    return {
        "boxes": torch.tensor(row["boxes"], dtype=torch.float64).reshape(-1, 4),
        "scores": torch.tensor(row["scores"], dtype=torch.float64),
        "labels": torch.tensor([label_of[name] for name in row["names"]], dtype=torch.long),
    }
