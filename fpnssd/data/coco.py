"""Reads data sets in COCO format: one JSON file per split, with images, annotations and categories.

read_coco(["train.json"], ["train"], ["train2017"])  # ([SplitAnnotations], {category name: id})
"""

import contextlib
import json
import math
import posixpath
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ijson

from fpnssd.data.annotations import (
    Problem,
    RawObject,
    Record,
    SplitAnnotations,
    name_problem,
    parse_flags,
    parse_number,
    parse_size,
    rotated_box,
)
from fpnssd.data.images import DataError

SAMPLED_IMAGES = 50  # searched for in a folder to decide whether it is the image folder


@dataclass
class CocoFile:
    """The split and the categories of a COCO file. merge_categories decides which categories are classes."""

    path: Path
    split: SplitAnnotations
    categories: dict[int | str, dict]  # id -> the file's entry, its name a text
    used: set[int | str] = field(default_factory=set)  # ids of categories that have annotations


def read_coco_json(path: Path) -> dict[str, Any]:
    """Reads a COCO file's lists of images, annotations and categories, each of dicts, and its `info`, a dict.

    The file may be in UTF-8, -16 or -32, with or without a byte order mark, and have no annotations.

    Raises:
        DataError: the file is not JSON, or a part has another type.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder: pass its JSON files of annotations") from None
    except RecursionError:
        raise DataError(f"{path} is not a COCO JSON file: it is nested too deeply") from None
    except ValueError as error:  # of the JSON, or of its encoding
        raise DataError(f"{path} is not a COCO JSON file ({type(error).__name__}: {error!s:.200})") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path} is not a COCO JSON file: it holds a {type(content).__name__}, not images and categories"
        )
    parts: dict[str, Any] = {"info": content["info"] if isinstance(content.get("info"), dict) else {}}
    for key in ("images", "annotations", "categories"):
        part = content.get(key)
        if part is None and key == "annotations":
            part = []
        if not isinstance(part, list) or not all(isinstance(entry, dict) for entry in part):
            problem = f"has no {key}" if key not in content else f"has {key} that are not a list of objects"
            raise DataError(f"{path} is not a COCO JSON file: it {problem}")
        parts[key] = part
    return parts


def stream_coco_json(path: Path) -> dict[str, Any]:
    """Reads a COCO file in UTF-8 without ever holding all of its annotations.

    Args:
        path: the file, which is read several times.

    Returns:
        As read_coco_json, but `images` and `annotations` are iterators.

    Raises:
        ijson.JSONError: the file is not JSON, is not UTF-8, or has no images or categories; also raised while iterating
            over them.
    """

    def entries(prefix: str) -> Iterator[Any]:
        with open(path, "rb") as file:
            yield from ijson.items(file, prefix, use_float=True)

    keys = ("file_name", "height", "width", "id", "apply_exif")
    images = ({key: entry[key] for key in keys if key in entry} for entry in entries("images.item"))
    categories, info = list(entries("categories.item")), next(entries("info"), None)
    if next(entries("images.item"), None) is None or not categories:
        raise ijson.JSONError(f"{path} has no images or no categories")
    info = info if isinstance(info, dict) else {}
    return {"info": info, "images": images, "annotations": entries("annotations.item"), "categories": categories}


def parse_id(value: object) -> int | str:
    """Normalizes an id: 1, 1.0 and "1" become 1; other strings, such as "007", are unchanged.

    Raises:
        ValueError: the value is neither a string nor a 64-bit integer.
    """
    if isinstance(value, str):
        plain = re.sub(r"\.0+$", "", value.strip())
        return int(plain) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", plain) else value
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(number, bool) or not isinstance(number, int) or not -(2**63) <= number < 2**63:
        raise ValueError(f"the id {value!r:.80}, which is neither a whole number nor a text")
    return number


def read_coco(
    files: Sequence[str | Path], names: Sequence[str], image_folders: Sequence[str | Path] | None = None
) -> tuple[list[SplitAnnotations], dict[str, int]]:
    """Reads one COCO file for each split.

    Args:
        files: the JSON files.
        names: the splits, one for each file.
        image_folders: one for all files or one for each. If not given, find_image_root
            searches the usual folders.

    Returns:
        The splits, and the categories of all files: {name: id}, without Roboflow's root category.

    Raises:
        DataError: numbers of files and names or folders differ, a file is not COCO JSON, or two categories conflict.
    """
    if len(files) != len(names):
        raise DataError(f"--coco has {len(files)} files for {len(names)} --splits: name one for each")
    if image_folders and len(image_folders) not in (1, len(files)):
        raise DataError(f"--images has {len(image_folders)} folders for {len(files)} files: name one, or one for each")
    folders: list[str | Path | None] = [*(image_folders or [None])]
    folders *= len(files) // len(folders)
    read = [
        read_coco_file(Path(path), name, None if folder is None else Path(folder))
        for path, name, folder in zip(files, names, folders, strict=True)
    ]
    return [file.split for file in read], merge_categories(read)


# ---------------------------------------------------------------------------------------------------------------------
# Categories


def read_categories(path: Path, entries: list[dict]) -> dict[int | str, dict]:
    """{id: entry} of a file's categories, their names as texts; DataError where one has no id or name."""
    categories = {}
    for entry in entries:
        name = entry.get("name")
        if isinstance(name, int | float) and not isinstance(name, bool):
            name = str(name)
        if not isinstance(name, str) or not name.strip() or (problem := name_problem(name)):
            why = f" {problem}" if isinstance(name, str) and name.strip() else " is not a class name"
            raise DataError(f"{path} is not a COCO JSON file: category {entry.get('id')!r:.80}: {name!r:.80}{why}")
        try:
            category_id = parse_id(entry.get("id"))
        except ValueError as error:
            raise DataError(f"{path} is not a COCO JSON file: category {name!r:.80} has {error}") from None
        if category_id in categories:
            raise DataError(f"{path} gives two categories the same id {category_id!r}")
        categories[category_id] = {**entry, "name": name.strip()}
    return categories


def merge_categories(files: Sequence[CocoFile]) -> dict[str, int]:
    """{name: id} of the categories of all files.

    A category that has no objects and is the supercategory of another one is not a class: Roboflow writes the name of
    the project as category 0. If any id is not an integer of at least 0, all classes get the ids 1..C.

    Raises:
        DataError: one name has two ids, or one id two names.
    """
    used = set().union(*(file.used for file in files))
    ids: dict[str, int | str] = {}
    names: dict[int | str, str] = {}
    for file in files:
        for category_id, entry in file.categories.items():
            name = entry["name"]
            children = (other for other_id, other in file.categories.items() if other_id != category_id)
            if category_id not in used and any(child.get("supercategory") == name for child in children):
                note = f"category {category_id!r}, {name!r}, is a supercategory without objects, not a class"
                print(f"note: {file.path}: {note}", file=sys.stderr)
                continue
            if names.setdefault(category_id, name) != name:
                raise DataError(
                    f"{file.path} gives category {name!r} the id that {files[0].path} gives "
                    f"{names[category_id]!r}: {category_id}"
                )
            if ids.setdefault(name, category_id) != category_id:
                raise DataError(
                    f"{file.path} gives category {name!r} the id {category_id}, {files[0].path} {ids[name]}"
                )
    if not ids:
        raise DataError(f"{files[0].path} has no categories, so the classes are unknown")
    whole = {
        name: category_id for name, category_id in ids.items() if isinstance(category_id, int) and category_id >= 0
    }
    return whole if len(whole) == len(ids) else {name: label for label, name in enumerate(ids, start=1)}


# ---------------------------------------------------------------------------------------------------------------------
# Images and annotations


def read_coco_file(path: Path, split: str, folder: Path | None) -> CocoFile:
    """Reads the images of a COCO file with their objects; raises a DataError if the file cannot be used."""
    content = read_coco_json(path)
    categories = read_categories(path, content["categories"])
    problems: list[Problem] = []
    records = read_images(path, content["images"], problems)
    # Label Studio writes the size of the image as stored, and boxes in pixels of the image as shown, which is turned.
    for record in records.values():
        record.turned = content["info"].get("contributor") == "Label Studio"
    if not records:
        raise DataError(f"split {split!r} is empty: {path} lists no image")
    unique = list({id(record): record for record in records.values()}.values())
    root = folder or find_image_root(path, split, content["info"].get("image_root"), unique)
    file = CocoFile(path, SplitAnnotations(split, root, [], problems), categories)
    for entry in content["annotations"]:
        text = f"{path}: annotation {entry.get('id')!r:.80}"
        record = look_up(records, entry.get("image_id"))
        category = look_up(categories, entry.get("category_id"))
        if record is None:
            problems.append(Problem("object of an unknown image", f"{text} names image {entry.get('image_id')!r:.80}"))
        elif category is None:
            problems.append(Problem("object of an unknown class", f"{text}: category {entry.get('category_id')!r:.80}"))
        else:
            file.used.add(parse_id(entry["category_id"]))
            if (obj := read_object(entry, category["name"], text, problems)) is not None:
                record.objects.append(obj)
    file.split.records = [lambda record=record: record for record in unique]
    return file


def look_up(table: dict, key: object) -> Any:
    """The value of an id in `table`, None if the id is not in it."""
    try:
        return table.get(parse_id(key))
    except ValueError:
        return None


def read_images(path: Path, entries: list[dict], problems: list[Problem]) -> dict[int | str, Record]:
    """{id: Record} of a file's images; two ids of one file name share a record. DataError where one is unusable."""
    records: dict[int | str, Record] = {}
    by_name: dict[str, Record] = {}
    for entry in entries:
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            shown = "no file_name" if name is None else f"the file_name {name!r:.80}, which is not a text"
            raise DataError(f"{path} is not a COCO JSON file: image {entry.get('id')!r:.80} has {shown}")
        try:
            image_id = parse_id(entry.get("id"))
        except ValueError as error:
            raise DataError(f"{path} is not a COCO JSON file: image {name!r:.80} has {error}") from None
        if image_id in records:
            raise DataError(f"{path} gives two images the id {image_id!r}")
        try:
            size = parse_size(entry.get("height"), entry.get("width"))
        except ValueError:
            sides = f"{entry['width']!r:.80} x {entry['height']!r:.80}"
            raise DataError(f"{path}: image {image_id!r} has a size that is not a number: {sides}") from None
        name = name.replace("\\", "/")  # Windows
        # A string id stays a string: results have to use the ids of the file.
        written_id = entry["id"] if isinstance(entry["id"], str) else image_id
        record = Record(name, str(path), [], size, image_id=written_id)
        records[image_id] = by_name.setdefault(posixpath.normpath(name), record)
        if records[image_id] is not record:
            where = f"{path}: {name} is image {records[image_id].image_id!r} and {written_id!r}"
            problems.append(Problem("image named twice", where))
    return records


def find_image_root(path: Path, split: str, image_root: object, records: Sequence[Record]) -> Path:
    """Returns the folder that the file names of a COCO file are relative to: the one with the most images of a sample.

    The candidates are `info.image_root`, which data lists have, and the folders that tools export images to: beside the
    file or its parent folder, in `images`, `data`, or a folder named like the split.

    Raises:
        DataError: no image of a sample is in any of them.
    """
    subset = path.stem.partition("_")[2] or path.stem  # of instances_train2017.json: train2017
    below = ("", "images", "data", subset, path.stem, split, f"images/{subset}", f"images/{split}")
    folders = [folder / part for folder in (path.parent, path.parent.parent) for part in below]
    if isinstance(image_root, str):
        folders.insert(0, path.parent / image_root)
    sample = records[:: max(1, len(records) // SAMPLED_IMAGES)]

    def count(folder: Path) -> int:
        return sum((folder / record.file_name).is_file() for record in sample)

    best = max(folders, key=count)
    if count(best) == 0:
        looked = ", ".join(dict.fromkeys(str(folder) for folder in folders[:3]))
        raise DataError(
            f"no image of {path} can be found, such as {sample[0].file_name:.200}: it is not in {looked} or similar "
            "folders. Name the image folder with --images",
            "image missing",
        )
    return best


def read_object(entry: dict, name: str, text: str, problems: list[Problem]) -> RawObject | None:
    """Returns the object of an annotation, None if it has no box; problems are appended to `problems`."""
    box, segmentation = entry.get("bbox"), entry.get("segmentation")
    edges: tuple[float, float, float, float] | None
    try:
        x, y, width, height = (parse_number(edge) for edge in (box if isinstance(box, list) else ()))
        edges = (x, y, x + width, y + height)
    except ValueError:
        edges = None if box else enclosing_box(segmentation)
        if edges is None:
            mask = isinstance(segmentation, dict) and not box
            why = "a mask as its segmentation and no bbox" if mask else f"the box {box!r:.200}"
            problems.append(Problem("object without a box", f"{text} has {why}"))
            return None
        problems.append(Problem("polygon instead of a box", text))
    attributes = entry.get("attributes")  # CVAT's
    if isinstance(attributes, dict) and (turned := rotated_box(edges, attributes.get("rotation"))) != edges:
        problems.append(Problem("rotated box", f"{text}: {attributes['rotation']!r:.80} degrees"))
        edges = turned
    values = {flag: entry.get(flag) for flag in ("difficult", "iscrowd", "truncated")}
    flags = parse_flags(values, text, problems)
    area = None
    if str(entry.get("area", "")).strip() not in ("", "None"):
        with contextlib.suppress(ValueError):
            area = parse_number(entry["area"])
        if area is None or not 0 < area < math.inf:
            problems.append(Problem("area unusable", f"{text} has the area {entry['area']!r:.80}"))
            area = None
    return RawObject(name, edges, area=area, text=f"annotation {entry.get('id')!r:.80} {box!r:.200}", **flags)


def enclosing_box(segmentation: object) -> tuple[float, float, float, float] | None:
    """xyxy around COCO's polygons: [x, y, x, y, ...], or a list of such or of [x, y] pairs; None for anything else."""
    if not isinstance(segmentation, list):
        return None
    parts = segmentation if all(isinstance(part, list) for part in segmentation) else [segmentation]
    try:
        numbers = [parse_number(number) for part in parts for number in part]
    except ValueError:
        return None
    if len(numbers) < 6 or any(len(part) % 2 for part in parts) or not all(map(math.isfinite, numbers)):
        return None
    xs, ys = numbers[::2], numbers[1::2]
    return min(xs), min(ys), max(xs), max(ys)
