"""Reads data sets in PASCAL VOC format.

    read_voc(["VOCdevkit/VOC2012"], "train")  # a SplitAnnotations

A VOC folder holds Annotations/NAME.xml, JPEGImages/NAME.jpg (or another image ending) and ImageSets/Main/SPLIT.txt, the
names of a split's images. Two other layouts are read: a folder per split with XML files beside the images (Roboflow),
and folders without split files (labelling tools), which are read as one split.
"""

import codecs
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

import defusedxml.ElementTree as ElementTree
from defusedxml import DefusedXmlException
from torchvision.datasets import VOCDetection

from fpnssd.data.annotations import (
    Problem,
    RawObject,
    Record,
    SplitAnnotations,
    parse_flags,
    parse_number,
    parse_size,
    read_lines,
    relative_path,
    rotated_box,
)
from fpnssd.data.images import DataError, is_image_name
from fpnssd.data.yolo_config import SAME_SPLIT
from fpnssd.data.yolo_labels import IMAGE_FOLDERS

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on

DOWNLOADS = {"voc2007": ("trainval", "test"), "voc2012": ("trainval",)}  # name -> image sets that can be downloaded
ANNOTATION_FOLDERS = ("annotations", "annotation", "labels", "label", "xmls", "xml")  # of data sets without split files
COMMON_ENDINGS = (".jpg", ".jpeg", ".png")  # order of preference among files of one name


# ---------------------------------------------------------------------------------------------------------------------
# The images of a split


class VocFolder:
    """Finds the annotations and images of a split of a VOC folder.

    Args:
        folder: the VOC folder.
        split: the split's name.
        whole: take all images of a folder without split files: XML files and images in one folder, or in two such as
            Annotations and images.

    Raises:
        DataError: the folder has neither VOC's layout nor a folder of the split's name with XML files.
    """

    def __init__(self, folder: Path, split: str, whole: bool = False):
        self.folder, self.split, self.whole = folder, split, whole
        self.annotations, self.images = folder / "Annotations", folder / "JPEGImages"
        self.split_file = folder / "ImageSets" / "Main" / f"{split}.txt"
        self._files: dict[str, dict[str, Path]] = {}  # folder -> image files by their names with and without ending
        same = (split, *SAME_SPLIT) if split in SAME_SPLIT else (split,)
        below = [folder / name for name in same if any((folder / name).glob("*.xml"))]
        if not whole and not self.annotations.exists() and below:
            self.whole, folder = True, below[0]  # Roboflow's
        if self.whole:
            self.annotations, self.images = whole_folders(folder)
            return
        for part in (self.annotations, self.split_file.parent, self.images):
            if not part.is_dir():
                advice = ". Without --splits, XML files and images of any folder are divided into train and val"
                others = "" if self.split_file.parent.is_dir() else ", ".join(sorted(find_voc_splits([folder])))
                if others:
                    advice = (
                        f", nor a folder {split} with XML files; those that have are {others}: name some with --splits"
                    )
                raise DataError(
                    f"{folder} is not a VOC folder: it has no {part.relative_to(folder).as_posix()}{advice}"
                )

    def has_split(self) -> bool:
        return self.whole or self.split_file.is_file()

    def names(self) -> list[str]:
        """Names of the images of the split, without endings, in the order of the split file."""
        if self.whole:
            entries = (file for folder in {self.annotations, self.images} for file in folder.iterdir())
            files = (file for file in entries if file.suffix.lower() == ".xml" or is_image_name(file))
            return sorted({file.stem for file in files if not file.name.startswith("._")})
        return [self.name_in(line) for line in read_lines(self.split_file)]

    def name_in(self, line: str) -> str:
        """The image name in a line of a split file, without ending.

        VOC's per-class lists have a flag after the name. Other lists have names with blanks, quotes, an ending or a
        folder. The first interpretation for which an annotation or an image exists is used.
        """
        for text in (line, re.sub(r"\s+-?[01]$", "", line)):
            name = without_image_ending(text.strip("\"' ").replace("\\", "/"))
            for reading in (name, os.path.basename(name)):
                if (self.annotations / f"{reading}.xml").is_file() or self.find_image(reading):
                    return reading
        return name

    def find_image(self, name: str) -> Path | None:
        """The image file of this name; an ending may be missing, or be in capitals."""
        folder, name = os.path.split(self.images / name)
        if folder not in self._files:
            self._files[folder] = images_by_name(folder)
        return self._files[folder].get(name)


def whole_folders(folder: Path) -> tuple[Path, Path]:
    """The XML folder and the image folder of a data set without split files; raises a DataError if one is missing."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    below = {entry.name.lower(): entry for entry in sorted(folder.iterdir(), reverse=True) if entry.is_dir()}
    places = [folder, *(below[name] for name in ANNOTATION_FOLDERS if name in below)]
    annotations = next((place for place in reversed(places) if any(place.glob("*.xml"))), None)
    if annotations is None:
        raise DataError(f"{folder} has no XML files, nor has a folder Annotations in it")
    places = [*(below[name] for name in sorted(IMAGE_FOLDERS) if name in below), folder, annotations]
    for place in places:
        if images_by_name(str(place)):
            return annotations, place
    raise DataError(f"{folder} has no images, nor has a folder JPEGImages or images in it")


def find_voc_splits(folders: Iterable[str | Path]) -> set[str]:
    """The splits that VOC folders have: files in ImageSets/Main, or Roboflow's folders with XML files and images."""
    names: set[str] = set()
    for folder in map(Path, folders):
        here = {file.stem for file in (folder / "ImageSets" / "Main").glob("[!.]*.txt")}
        # dog_train.txt is the list of a class, not a split.
        names |= {name for name in here if not any(name.endswith(f"_{other}") for other in here)}
        if not here and not (folder / "Annotations").exists():
            parts = {
                file.parent for file in folder.glob("*/*.xml") if file.parent.name.lower() not in ANNOTATION_FOLDERS
            }
            names |= {part.name for part in parts if images_by_name(str(part))}
    return names


def without_image_ending(name: str) -> str:
    return os.path.splitext(name)[0] if is_image_name(name) else name


def images_by_name(folder: str) -> dict[str, Path]:
    """{name: file} of the images in a folder, by names with and without ending; {} if the folder does not exist."""
    try:
        entries = [Path(folder, entry) for entry in os.listdir(folder) if is_image_name(entry)]
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return {}
    rank = {ending: place for place, ending in enumerate(COMMON_ENDINGS)}
    entries.sort(key=lambda path: (rank.get(path.suffix.lower(), len(rank)), path.name))
    return {path.stem: path for path in reversed(entries)} | {path.name: path for path in entries}


def read_voc(
    folders: Iterable[str | Path], name: str, unlabelled: bool = False, whole: bool = False
) -> SplitAnnotations:
    """Lists the images of a split in one or several VOC folders.

    Args:
        folders: VOC folders. Those without the split are skipped with a note.
        name: the split, as in ImageSets/Main/NAME.txt.
        unlabelled: images may lack an annotation, as in VOC's test sets; they have no objects.
        whole: take all images of folders without split files.

    Returns:
        The split. Its records parse the XML files when called.

    Raises:
        DataError: a folder is not a VOC folder, none has the split, or it is empty.
    """
    sources = [VocFolder(Path(folder), name, whole) for folder in folders]
    if not any(source.has_split() for source in sources):
        existing = sorted({file.stem for source in sources for file in source.split_file.parent.glob("[!.]*.txt")})
        missing = sources[0].split_file
        raise DataError(f"no split {name!r}: {missing} is missing; existing splits: {', '.join(existing) or 'none'}")
    split = SplitAnnotations(name, common_image_root(sources), [])
    for source in sources:
        if not source.has_split():
            print(f"note: {source.folder} has no split {name!r}")
            continue
        for image_name, count in Counter(source.names()).items():
            if count > 1:
                where = f"{source.split_file} names {image_name} {count} times"
                split.problems.append(Problem("image named twice", where))
            split.records.append(partial(read_voc_record, source, image_name, split.image_root, unlabelled))
    if not split.records:
        raise DataError(f"split {name!r} is empty: {sources[0].split_file} names no image")
    return split


def common_image_root(sources: Sequence[VocFolder]) -> Path:
    """The image root of the list: JPEGImages of a single VOC folder, or the common parent of several folders."""
    if len(sources) == 1:
        return sources[0].images
    for source in sources:
        folder = source.folder.resolve()  # not of what is below: JPEGImages may be a link to elsewhere
        source.images = folder / source.images.relative_to(source.folder)
        source.annotations = folder / source.annotations.relative_to(source.folder)
    return Path(os.path.commonpath([source.folder.resolve() for source in sources]))


def read_voc_record(source: VocFolder, name: str, image_root: Path, unlabelled: bool = False) -> Record:
    """Reads Annotations/NAME.xml and finds the image of the same name.

    <filename> is ignored, because it is often wrong after files were renamed.

    Raises:
        DataError: the image is missing, or the annotation is missing or unusable.
    """
    annotation = source.annotations / f"{name}.xml"
    record = Record("", str(annotation), [])
    if not unlabelled or annotation.exists():
        record.size, record.objects, record.problems = parse_voc_xml(annotation)
    path = source.find_image(name)
    if path is None:
        endings = ", ".join((*COMMON_ENDINGS, "or any other image ending"))
        raise DataError(f"{source.images / name} with any of {endings}", "image missing")
    record.file_name = relative_path(path, image_root)
    return record


# ---------------------------------------------------------------------------------------------------------------------
# One XML file


def parse_voc_xml(path: Path) -> tuple[tuple[float, float] | None, list[RawObject], list[Problem]]:
    """Parses a VOC annotation.

    VOC's boxes are 1-based and inclusive: xmin-1, ymin-1, xmax, ymax are the continuous edges.

    Returns:
        (height, width), None where it is not given; the objects; and problems with them.

    Raises:
        DataError: the file is missing, does not parse, is not VOC's, or an object lacks its class or a number.
    """
    root = parse_xml(path)
    require_voc(root, path)
    try:
        size = parse_size(root.findtext("size/height"), root.findtext("size/width"))
    except ValueError as error:
        raise DataError(f"{path}: <size>: {error}", "number unreadable") from None
    objects: list[RawObject] = []
    problems: list[Problem] = []
    for element in root.findall("object"):
        box, name = element.find("bndbox"), (element.findtext("name") or "").strip()
        if box is None or not name:
            lacking = "<bndbox>" if box is None else "<name>"
            raise DataError(f"{path}: an <object> without {lacking}", "annotation incomplete")
        xmin, ymin, xmax, ymax = (read_number(box, tag, path) for tag in ("xmin", "ymin", "xmax", "ymax"))
        # xmax == xmin is one pixel in VOC, which has no such box, and an empty box in tools with exclusive corners.
        edges = (xmin - (xmax > xmin), ymin - (ymax > ymin), xmax, ymax)
        for attribute in element.findall("attributes/attribute"):  # CVAT's
            degrees = attribute.findtext("value") if attribute.findtext("name") == "rotation" else None
            if (turned := rotated_box(edges, degrees)) != edges:
                problems.append(Problem("rotated box", f"{path}: {name}: {degrees!r:.80} degrees"))
                edges = turned
        values = {flag: element.findtext(flag) for flag in ("difficult", "crowd", "truncated")}
        flags = parse_flags(values, f"{path}: {name}", problems)
        objects.append(RawObject(name, edges, text=f"({xmin:g}, {ymin:g}, {xmax:g}, {ymax:g})", **flags))
    return size, objects, problems


def parse_xml(path: Path) -> Element:
    """The root of an XML file, in any encoding that Python knows; DataError says why it cannot be parsed."""
    try:
        content = path.read_bytes()
        try:
            return ElementTree.fromstring(content)
        except (LookupError, ValueError) as error:
            # The parser supports few encodings. Decoded text is parsed without regard to the declared one.
            if isinstance(error, DefusedXmlException):
                raise
            return ElementTree.fromstring(decode_xml(content))
    except FileNotFoundError:
        raise DataError(f"{path} is missing", "annotation missing") from None
    except DefusedXmlException as error:
        raise DataError(f"{path} is refused: {error}", "annotation with entities") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise DataError(f"{path} does not parse: {error!s:.200}", "annotation does not parse") from None


def decode_xml(content: bytes) -> str:
    """Decodes an XML file by the encoding that it declares; LookupError or UnicodeDecodeError where that fails."""
    declared = re.match(rb"\s*<\?xml[^>]*encoding\s*=\s*[\"']([\w.:-]+)", content.removeprefix(codecs.BOM_UTF8))
    return content.decode("ascii" if content.isascii() or declared is None else declared[1].decode("ascii"))


def require_voc(root: Element, path: Path) -> None:
    """Raises a DataError where an XML file is not VOC's, or has objects where VOC has none.

    Without this check the image would be listed as one without objects.
    """
    if root.tag != "annotation":
        sentence = f"{path} has the root <{root.tag:.80}>, where VOC has <annotation>"
        raise DataError(sentence, "annotation of another format")
    for child in root:
        tags = {str(element.tag).rpartition("}")[2].lower() for element in child.iter()}
        if child.tag != "object" and tags & {"object", "bndbox"}:
            sentence = f"{path} has objects in or as <{child.tag:.80}>, not <object> directly in <annotation>"
            raise DataError(sentence, "annotation of another format")


def read_number(element: Element, tag: str, path: Path) -> float:
    """The number in an element's child; DataError names the file, the child and its text."""
    text = element.findtext(tag)
    try:
        return parse_number(text)
    except ValueError:
        raise DataError(f"{path}: <{tag}> is {text!r:.80}, not a number", "number unreadable") from None


# ---------------------------------------------------------------------------------------------------------------------
# VOC's own archives


def download_voc(name: str, root: Path) -> Path:
    """Downloads and unpacks a VOC year with torchvision, which compares checksums.

    A complete archive is not downloaded again, but unpacked again if unpacking was interrupted; a truncated one is.

    Args:
        name: a key of DOWNLOADS.
        root: the folder in which VOCdevkit is created.

    Returns:
        The VOC folder.

    Raises:
        DataError: no network, a full disk, or a wrong checksum.
    """
    year = name.removeprefix("voc")
    folder = root / "VOCdevkit" / f"VOC{year}"
    for image_set in DOWNLOADS[name]:
        done = folder / f".unpacked_{image_set}"
        if done.is_file():
            continue
        try:
            VOCDetection(root, year, image_set, download=True)
        except (RuntimeError, OSError) as error:  # a wrong checksum, no network, a full disk
            raise DataError(
                f"{name} {image_set} cannot be downloaded to {root}: {error}. Try again, or unpack its archive there "
                f"yourself and use --voc {folder}"
            ) from error
        done.touch()
    return folder
