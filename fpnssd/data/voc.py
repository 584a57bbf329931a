"""PASCAL VOC's form: a folder with Annotations/NAME.xml, ImageSets/Main/SPLIT.txt and JPEGImages/NAME.jpg."""

import os
from collections import Counter
from functools import partial
from pathlib import Path

import defusedxml.ElementTree as ElementTree
from defusedxml import DefusedXmlException
from torchvision.datasets import VOCDetection

from fpnssd.data.annotations import Problem, RawObject, Record, SplitAnnotations, read_lines, relative_path
from fpnssd.data.images import DataError

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on

VOC_ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
DOWNLOADS = {"voc2007": ("trainval", "test"), "voc2012": ("trainval",)}  # the image sets that have archives


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
    found = SplitAnnotations(name, image_root, [])
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
        objects.append(RawObject(name, edges, difficult, text=said, truncated=truncated))
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
