"""Reads data sets in YOLO format: a data.yaml, and a text file of labels for each image.

    read_yolo(Path("mydata/data.yaml"), ["train"])  # ([SplitAnnotations], {class name: id})

A line of a label file is `class x y width height`, the centre and the sides in 0..1 of the image; a sixth column is a
confidence, which is not used. More columns are a polygon, whose enclosing box is taken, or key points behind a box
where data.yaml has `kpt_shape`.
"""

import contextlib
import filecmp
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fpnssd.data.annotations import Problem, RawObject, Record, SplitAnnotations, read_lines, relative_path
from fpnssd.data.images import DataError
from fpnssd.data.yolo_config import SAME_SPLIT, YoloConfig, normalize_path, read_config
from fpnssd.data.yolo_labels import LabelFinder

OUT_OF_UNIT = (-1.0, 2.0)  # a box beyond these is in other units than 0..1 of the image
TOLERANCE = 0.01  # in 0..1 of the image, by which key points may leave their box


def read_yolo(
    path: Path, names: Sequence[str], unlabelled: bool = False
) -> tuple[list[SplitAnnotations], dict[str, int]]:
    """Finds the images and label files of a data set, and checks the class ids and columns of all labels together.

    Args:
        path: data.yaml, Darknet's obj.data, a text file of class names; or a folder that has one of them.
        names: the splits to read.
        unlabelled: allow splits in which no image has a label file.

    Returns:
        The splits, and {class name: id in the label files}.

    Raises:
        DataError: the data set's file cannot be used; a split is missing or has no image or label file; the labels
            count classes from another number, or may be key points without `kpt_shape`.
    """
    config = read_config(path)
    images: dict[str, list[Path]] = {}
    for name in names:
        images[name], skipped = config.find_split(name, len(names) - 1)
        del skipped[".txt"]  # label files beside the images
        if skipped:
            endings = ", ".join(f"{count} x {ending}" for ending, count in sorted(skipped.items()))
            print(f"note: {name}: skipped files that are not images: {endings}")
    root = _common_root(config, [image for part in images.values() for image in part])
    splits, labels = [], []
    for name, part in images.items():
        split, files = _read_split(name, part, root, config, unlabelled)
        splits.append(split)
        labels += files
    _check_labels(labels, config)
    return splits, {name: number for number, name in config.classes.items()}


def find_yolo_splits(path: Path) -> set[str]:
    """The splits that a data set has, for `read_yolo`'s path; two of the same folder count as one."""
    config = read_config(path)
    if not config.splits:
        return {name for name in ("train", *SAME_SPLIT) if config.folder_of(name)}
    names = {name for name, places in config.splits.items() if places}
    same = {name for name in SAME_SPLIT if name in names and config.splits[name] == config.splits.get("train")}
    return names - same


def _common_root(config: YoloConfig, images: list[Path]) -> Path:
    """The data set's folder, or, where images lie outside of it, the folder that all images share."""
    outside = [image for image in images if not image.is_relative_to(config.root)]
    if not any(image.is_file() for image in outside):  # a missing image does not change the root
        return config.root
    folders = [image.parent for image in images if image.is_relative_to(config.root) or image.is_file()]
    return Path(os.path.commonpath(folders))


def _read_split(
    name: str, images: list[Path], root: Path, config: YoloConfig, unlabelled: bool
) -> tuple[SplitAnnotations, list[Path]]:
    """Returns the split, whose label files are read later; and the paths of these files."""
    finder = LabelFinder(config.root)
    counts = Counter(normalize_path(image) for image in images)
    split = SplitAnnotations(name, root, [])
    split.problems += [Problem("image named twice", str(image)) for image, count in counts.items() if count > 1]
    labels: Counter[Path] = Counter()
    without = []
    for image in counts:
        files = finder.find(image)
        split.records.append(partial(read_record, image, files[0] if files else None, root, config))
        if not files:
            if image.is_file():  # a missing image is reported by read_record
                without.append(image)
            continue
        labels[files[0]] += 1
        if any(not filecmp.cmp(files[0], other, shallow=False) for other in files[1:]):
            split.problems.append(Problem("label files in two places differ", ", ".join(map(str, files))))
    if not labels and not unlabelled:
        example = next(iter(counts))
        places = ", ".join(map(str, finder.places(example)))
        strays = finder.without_image()
        hint = f". {len(strays)} label files have no image of their name, such as {strays[0]}" if strays else ""
        raise DataError(
            f"split {name!r}: none of its {len(counts)} images has a label file. For {example} these were "
            f"searched: {places}{hint}. If the images are meant to have none, pass --unlabelled"
        )
    split.problems += [Problem("label file of two images", str(file)) for file, count in labels.items() if count > 1]
    split.problems += [Problem("image without a label file", str(image)) for image in without]
    split.problems += [Problem("label file without an image", str(file)) for file in finder.without_image()]
    if not unlabelled:
        missing, total = (Counter(image.parent for image in some) for some in (without, counts))
        split.problems += [
            Problem("folder without label files", f"{folder}: none of its {count} images")
            for folder, count in missing.items()
            if 1 < count == total[folder]
        ]
    return split, list(labels)


def _check_labels(files: Sequence[Path], config: YoloConfig) -> None:
    """Raises a DataError if every object would get the name of another class, or a wrong box.

    The ids may count from another number than the names, or the lines be boxes and key points without `kpt_shape`.
    """
    ids: set[float] = set()
    lengths: set[int] = set()
    point_sizes = {2, 3}  # sizes of a key point for which all lines could be boxes with key points
    for file in files:
        with contextlib.suppress(DataError, OSError):  # read_record reports it
            for label, numbers in [parse_line(file, line) for line in read_lines(file)]:
                ids.add(label)
                lengths.add(len(numbers))
                point_sizes = {size for size in point_sizes if are_key_points(numbers, size)}
    if len(lengths) == 1 and point_sizes and not config.kpt_shape_given:
        (length,) = lengths
        shapes = " or ".join(f"[{(length - 4) // size}, {size}]" for size in sorted(point_sizes))
        raise DataError(
            f"every label has {length + 1} columns, of which 2 to 5 are a box that contains the points behind it: if "
            f"these are key points, add `kpt_shape: {shapes}` to {config.path}; if all columns are a polygon, add "
            "`kpt_shape: null`"
        )
    known = set(config.classes)
    for shift in (1, -1):
        # Class names are numbered from 0: ids up to their number, without a 0, count from 1.
        reach = shift == 1 and known == set(range(len(known))) and ids and 0 not in ids and max(ids) >= len(known)
        if reach or (ids - known and {label - shift for label in ids} <= known):
            raise DataError(
                f"ids start at {1 if shift == 1 else 0} in the label files: they go from {min(ids):g} to {max(ids):g}, "
                f"those of {config.path} from {min(known)} to {max(known)}, so each object would get the name of "
                "another class. Correct the ids or the names, for example "
                f"`names: {{{min(known) + shift}: {config.classes[min(known)]}, ..}}`"
            )


def are_key_points(numbers: Sequence[float], size: int) -> bool:
    """Whether numbers are a box in 0..1 and key points in it.

    Args:
        numbers: of a line, without its class.
        size: numbers of a key point: 2 (x, y), or 3, the last of which is 0, 1 or 2 (visibility).
    """
    if len(numbers) < 6 or (len(numbers) - 4) % size:
        return False
    box, points = np.array(numbers[:4]), np.array(numbers[4:]).reshape(-1, size)
    low, high = box[:2] - box[2:] / 2 - TOLERANCE, box[:2] + box[2:] / 2 + TOLERANCE
    marked = points[points[:, :2].any(axis=1), :2]  # (0, 0) is a key point that was not marked
    return bool(
        (box[2:] > 0).all()
        and (low >= -2 * TOLERANCE).all()
        and (high <= 1 + 2 * TOLERANCE).all()
        and ((low <= marked) & (marked <= high)).all()
        and (size == 2 or np.isin(points[:, 2], (0, 1, 2)).all())
    )


# ---------------------------------------------------------------------------------------------------------------------
# One image


def read_record(image: Path, label_file: Path | None, root: Path, config: YoloConfig) -> Record:
    """Reads an image's label file.

    Args:
        image: its absolute path.
        label_file: None for an image without one, which has no objects.
        root: of the data list's file names.
        config: of the data set.

    Raises:
        DataError: the file is not a text file, a line is not a label, or the image is missing and outside of the root.
    """
    if not image.is_relative_to(root):
        raise DataError(f"image {image} is missing", "image missing")
    record = Record(relative_path(image, root), str(label_file or image), [], normalized=True)
    lines = read_lines(label_file) if label_file else []
    if label_file and not lines:
        record.problems.append(Problem("label file is empty", str(label_file)))
    for line in lines:
        label, numbers = parse_line(label_file, line)
        where = f"{label_file}: {line[:80]}"
        box, kind = find_box(numbers, config.kpt_shape)
        if box is None:
            raise DataError(
                f"{label_file}: {line[:80]!r} is neither 'class x y width height' nor "
                + (f"that and key points of {config.kpt_shape}" if config.kpt_shape else "a polygon"),
                "annotation incomplete",
            )
        if kind:
            record.problems.append(Problem(kind, where))
        if any(not OUT_OF_UNIT[0] <= edge <= OUT_OF_UNIT[1] for edge in box if edge == edge):
            record.problems.append(Problem("box in pixels, not in 0..1", where))
        elif label in config.classes:
            record.objects.append(RawObject(config.classes[int(label)], box, text=f"{line[:80]!r}"))
        else:
            record.problems.append(Problem("object of an unknown class", where))
    return record


def parse_line(file: Path | None, line: str) -> tuple[float, list[float]]:
    """The class id of a line and the numbers behind it; raises a DataError if one is not a number."""
    try:
        label, *numbers = (float(word) for word in line.split())
    except ValueError:
        raise DataError(f"{file}: {line[:80]!r} is not all numbers", "number unreadable") from None
    return label, numbers


def find_box(
    numbers: Sequence[float], kpt_shape: tuple[int, int] | None
) -> tuple[tuple[float, float, float, float] | None, str | None]:
    """Returns the box of a label line.

    Args:
        numbers: of a line, without its class.
        kpt_shape: (key points, numbers of each) where the data set has them.

    Returns:
        (xyxy in 0..1 of the image, the kind of problem to note or None); (None, None) if the numbers are not a label.
    """
    behind = len(numbers) - 4
    points = kpt_shape[0] * kpt_shape[1] if kpt_shape else 0
    scored = behind == points + 1 or behind == 1
    if scored and not 0 <= numbers[-1] <= 1:
        return None, None
    if behind in (0, points) or scored:
        x, y, width, height = numbers[:4]
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        return box, "confidence after the box" if scored else None
    if behind >= 2 and behind % 2 == 0 and not kpt_shape:
        xs, ys = numbers[::2], numbers[1::2]
        return (min(xs), min(ys), max(xs), max(ys)), "polygon instead of a box"
    return None, None
