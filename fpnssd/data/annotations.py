"""Annotations in VOC's and COCO's form -> what they say of each image, for create_data_lists.py to check.

    read_voc(["VOCdevkit/VOC2012"], "train")  # a Found
    read_coco(["train.json"], ["train"], ["train2017"])  # ([Found], {category name: id})

A reader looks at the splits' own files alone; an image's annotation is parsed when its record is asked for.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import defusedxml.ElementTree as ElementTree
from defusedxml import DefusedXmlException
from torchvision.datasets import VOCDetection

from fpnssd.data.checks import Problem, RawObject, Record
from fpnssd.data.images import DataError

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on

VOC_ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
DOWNLOADS = {"voc2007": ("trainval", "test"), "voc2012": ("trainval",)}  # the image sets that have archives


@dataclass
class Found:
    """What a reader found for a split: for each image a function without arguments that returns its Record."""

    name: str
    image_root: Path
    records: list
    problems: list = field(default_factory=list)


def read_lines(path):
    """A text file's lines without white space around them, and without the empty ones."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text file", "annotation does not parse") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


# ---------------------------------------------------------------------------------------------------------------------
# VOC


def read_voc(folders, name, unlabelled=False):
    """The images of ImageSets/Main/NAME.txt in VOC folders, those that have it; unlabelled: some have no annotation."""
    folders = [Path(folder) for folder in folders]
    for folder in folders:
        for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
            if not (folder / part).is_dir():
                raise DataError(f"{folder} is no VOC folder: it has no {part}")
    split_files = [folder / "ImageSets" / "Main" / f"{name}.txt" for folder in folders]
    if not any(file.is_file() for file in split_files):
        there = sorted({file.stem for split_file in split_files for file in split_file.parent.glob("*.txt")})
        raise DataError(f"no split {name!r}: {split_files[0]} is missing; splits there: {', '.join(there) or 'none'}")
    # One folder's photographs lie in it; several folders' are named from where they all lie.
    image_root = folders[0] / "JPEGImages"
    if len(folders) > 1:
        folders = [folder.resolve() for folder in folders]
        try:
            image_root = Path(os.path.commonpath(folders))
        except ValueError:  # Windows
            raise DataError(f"{folders[0]} and the other folders have to be on one drive") from None
    found = Found(name, image_root, [])
    for folder, split_file in zip(folders, split_files, strict=True):
        if not split_file.is_file():
            print(f"note: {folder} has no split {name!r}")
            continue
        # VOC's lists of one class have a flag behind the name; other people's names have spaces.
        lines = read_lines(split_file)
        names = [line if is_name(folder, line) else line.split()[0] for line in lines]
        for image_name, count in Counter(names).items():
            if count > 1:
                found.problems.append(Problem("image named twice", f"{split_file} names {image_name} {count} times"))
            found.records.append(partial(read_voc_record, folder, image_name, image_root, unlabelled))
    if not found.records:
        raise DataError(f"split {name!r} is empty: {split_files[0]} names no image")
    return found


def is_name(folder, line):
    """Whether a whole line of an image set is a name, of an annotation or an image."""
    if (folder / "Annotations" / f"{line}.xml").is_file():
        return True
    return any((folder / "JPEGImages" / f"{line}{ending}").is_file() for ending in VOC_ENDINGS)


def read_voc_record(folder, image_name, image_root, unlabelled=False):
    """A Record of Annotations/NAME.xml and the image of the same name; DataError names what is wrong."""
    annotation = folder / "Annotations" / f"{image_name}.xml"
    without = unlabelled and not annotation.exists()
    size, objects = (None, []) if without else parse_voc_xml(annotation)
    # By the split's own name for it: <filename> is often wrong in folders that somebody renamed.
    stem = folder / "JPEGImages" / image_name
    path = next((path for ending in VOC_ENDINGS if (path := Path(f"{stem}{ending}")).is_file()), None)
    if path is None:
        raise DataError(f"{stem} with any of {', '.join(VOC_ENDINGS)}", "image missing")
    return Record(relative_path(path, image_root), str(annotation), objects, size)


def relative_path(path, folder):
    """The path seen from the folder, with forward slashes; one that is not below it starts with ../"""
    return Path(os.path.relpath(path, folder)).as_posix()


def parse_voc_xml(path):
    """((height, width) or None, RawObjects) of a VOC annotation; DataError names the file and what is wrong with it.

    VOC's boxes are 1-based and inclusive: xmin-1, ymin-1, xmax, ymax are the continuous edges.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise DataError(f"{path} is missing", "annotation missing") from None
    except DefusedXmlException as error:
        raise DataError(f"{path} is refused: {error}", "annotation with entities") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path} does not parse: {error!s:.200}", "annotation does not parse") from None

    def number(element, tag):
        text = element.findtext(tag)
        try:
            return float(text)
        except (TypeError, ValueError):
            raise DataError(f"{path}: <{tag}> is {text!r}, not a number", "number unreadable") from None

    size = root.find("size")
    objects = []
    for element in root.findall("object"):
        box, name = element.find("bndbox"), (element.findtext("name") or "").strip()
        if box is None or not name:
            lacking = "<bndbox>" if box is None else "<name>"
            raise DataError(f"{path}: an <object> without {lacking}", "annotation incomplete")
        xmin, ymin, xmax, ymax = (number(box, tag) for tag in ("xmin", "ymin", "xmax", "ymax"))
        # xmax == xmin is one pixel to VOC, which has no such box, and nothing to tools with exclusive corners.
        edges = (xmin - (xmax > xmin), ymin - (ymax > ymin), xmax, ymax)
        difficult = (element.findtext("difficult") or "0").strip() == "1"
        truncated = {"0": False, "1": True}.get((element.findtext("truncated") or "").strip())
        said = f"({xmin:g}, {ymin:g}, {xmax:g}, {ymax:g})"
        objects.append(RawObject(name, edges, difficult, said=said, truncated=truncated))
    return None if size is None else (number(size, "height"), number(size, "width")), objects


def download_voc(name, root):
    """Fetches and unpacks a VOC year below `root` with torchvision, checksums checked; returns its folder.

    An archive that is there whole is not fetched again, and one that is not is; so is unpacking.
    """
    year = name.removeprefix("voc")
    folder = root / "VOCdevkit" / f"VOC{year}"
    for image_set in DOWNLOADS[name]:
        done = folder / f".unpacked_{image_set}"
        if done.is_file():
            continue
        try:
            VOCDetection(root, year, image_set, download=True)
        except (RuntimeError, OSError) as error:  # an archive with a wrong checksum, no network, no room
            raise DataError(
                f"{name} {image_set} cannot be fetched into {root}: {error}. Try again, or unpack its archive there "
                f"yourself and use --voc {folder}"
            ) from error
        done.touch()
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# COCO


def read_coco(files, names, image_folders=None):
    """(a Found for each COCO JSON file, {category name: id}); image_folders: one for all, or one for each."""
    if len(files) != len(names):
        raise DataError(f"--coco has {len(files)} files for {len(names)} --splits: name one for each")
    if image_folders and len(image_folders) not in (1, len(files)):
        raise DataError(f"--images has {len(image_folders)} folders for {len(files)} files: name one, or one for each")
    folders = list(image_folders or [None])
    if len(folders) == 1:
        folders *= len(files)
    known, found = {}, []
    for path, name, folder in zip(files, names, folders, strict=True):
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            part, categories = read_coco_file(Path(path), content, name, folder)
        except FileNotFoundError:
            raise DataError(f"{path} is missing") from None
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no COCO JSON file ({type(error).__name__}: {error})") from error
        for category, category_id in categories.items():
            other = next((name for name, one in known.items() if one == category_id and name != category), None)
            if other is not None:
                raise DataError(
                    f"{path} gives category {category!r} the id that {files[0]} gives {other!r}: {category_id}"
                )
            if known.setdefault(category, category_id) != category_id:
                raise DataError(
                    f"{path} gives category {category!r} the id {category_id}, {files[0]} {known[category]}"
                )
        found.append(part)
    return found, known


def read_coco_file(path, content, split, folder):
    """(Found, {category name: id}) of one file's content."""
    name_of = {category["id"]: category["name"] for category in content["categories"]}
    if len(name_of) < len(content["categories"]) or len(set(name_of.values())) < len(name_of):
        raise DataError(f"{path} gives two categories the same id or name")
    root = folder or path.parent / content.get("info", {}).get("image_root", ".")
    records = {}
    for image in content["images"]:
        size = (image["height"], image["width"]) if "height" in image and "width" in image else None
        if size and not all(isinstance(side, int | float) for side in size):
            raise DataError(f"{path}: image {image['id']!r} has a size that is no number: {size[1]!r} x {size[0]!r}")
        record = Record(image["file_name"], str(path), [], size, image_id=image["id"])
        if records.setdefault(image["id"], record) is not record:
            raise DataError(f"{path} gives two images the id {image['id']!r}")
    found = Found(split, Path(root), [])
    for entry in content.get("annotations", []):
        said = f"{path}: annotation {entry.get('id')}"
        record, name = records.get(entry.get("image_id")), name_of.get(entry.get("category_id"))
        box = entry.get("bbox") or ()
        if record is None:
            found.problems.append(
                Problem("object of an unknown image", f"{said} names image {entry.get('image_id')!r}")
            )
        elif name is None:
            problem = Problem("object of an unknown class", f"{said}: category {entry.get('category_id')!r}")
            found.problems.append(problem)
        elif len(box) != 4 or not all(isinstance(edge, int | float) for edge in box):
            found.problems.append(Problem("object without a box", f"{said} has the box {entry.get('bbox')!r}"))
        else:
            x, y, width, height = box
            flags = bool(entry.get("difficult", 0)), bool(entry.get("iscrowd", 0))
            truncated = None if entry.get("truncated") is None else bool(entry["truncated"])
            edges = (x, y, x + width, y + height)
            record.objects.append(RawObject(name, edges, *flags, entry.get("area"), said, truncated))
    found.records = [lambda record=record: record for record in records.values()]
    if not found.records:
        raise DataError(f"split {split!r} is empty: {path} lists no image")
    return found, {name: category_id for category_id, name in name_of.items()}
