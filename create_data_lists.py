"""A VOC folder -> one checked data list (COCO JSON) a split.

    python create_data_lists.py --voc VOCdevkit/VOC2012 --splits train val --out data/voc2012

Every annotation is parsed and every photograph decoded. Boxes that leave the image are clipped to it; boxes, objects
and images that cannot be used are left out; both are counted, and named in OUT/problems.txt. VOC's boxes are 1-based
and inclusive: xmin-1, ymin-1, xmax, ymax are the continuous edges written here.
"""

import argparse
import json
import math
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import defusedxml.ElementTree as ElementTree
from defusedxml import DefusedXmlException
from tqdm import tqdm

from datasets import DataError, read_image
from utils import InputError, written_whole

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


@dataclass
class Annotation:
    """One image's XML, before anything is decided about it: objects are (name, corners, difficult)."""

    size: tuple | None  # (height, width), None where the XML does not say
    objects: list


@dataclass
class Split:
    """What a split's list will hold, and what was wrong on the way: (kind, sentence) pairs."""

    name: str
    images: list = field(default_factory=list)  # (file_name, (height, width), [(name, box xyxy, difficult)])
    problems: list = field(default_factory=list)


def main(argv=None):
    args = parse_args(argv)
    try:
        create_data_lists(Path(args.voc), args.splits, Path(args.out), read_class_file(args.classes))
    except (InputError, OSError) as error:
        sys.exit(f"create_data_lists: {error}")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--voc", required=True, help="folder with Annotations, ImageSets/Main and JPEGImages")
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="names of files in ImageSets/Main")
    parser.add_argument("--out", required=True, help="folder that gets SPLIT.json for each split")
    parser.add_argument("--classes", help="text file, one class name a line, in label order; else from the data")
    return parser.parse_args(argv)


def create_data_lists(voc, splits, out, classes=None):
    """Writes out/SPLIT.json for each split, all or none of them, and out/problems.txt. DataError where it cannot."""
    found = [read_voc_split(voc, split) for split in splits]
    if classes is None:
        classes = choose_classes(found)
    for split in found:
        check_classes(split, classes)
        if not split.images:
            raise DataError(f"split {split.name!r} of {voc} has no usable image; {describe_problems(split.problems)}")
    for split in found:
        with written_whole(out / f"{split.name}.json") as temporary:
            Path(temporary).write_text(json.dumps(to_coco(split, classes, voc / "JPEGImages")), encoding="utf-8")
        print(summary(split, out))
    with written_whole(out / "problems.txt") as temporary:
        lines = [f"{split.name}: {kind}: {sentence}\n" for split in found for kind, sentence in split.problems]
        Path(temporary).write_text("".join(lines), encoding="utf-8")
    print(f"{len(classes)} classes: {', '.join(classes)}")


def read_class_file(path):
    """Names, one a line; None without a path."""
    if path is None:
        return None
    names = read_lines(path)
    if not names or len(set(names)) != len(names):
        raise DataError(f"class file {path} must name each class once, one a line; it has {names}")
    return tuple(names)


def read_lines(path):
    """A text file's lines without white space around them, and without the empty ones."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text file") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_voc_split(voc, name):
    """The images of ImageSets/Main/NAME.txt, checked."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        if not (voc / folder).is_dir():
            raise DataError(f"{voc} is no VOC folder: it has no {folder}")
    split_file = voc / "ImageSets" / "Main" / f"{name}.txt"
    if not split_file.is_file():
        there = ", ".join(sorted(file.stem for file in split_file.parent.glob("*.txt"))) or "none"
        raise DataError(f"no split {name!r}: {split_file} is missing; splits there: {there}")
    # VOC's lists of one class have a flag behind the name; other people's names have spaces.
    xml_of = voc / "Annotations"
    image_ids = [line if (xml_of / f"{line}.xml").is_file() else line.split()[0] for line in read_lines(split_file)]
    if not image_ids:
        raise DataError(f"split {name!r} is empty: {split_file} names no image")
    split = Split(name)
    with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock
        checked = pool.map(lambda image_id: check_voc_image(voc, image_id), dict.fromkeys(image_ids))
        for image, problems in tqdm(checked, total=len(set(image_ids)), desc=f"checking {name}", unit="image"):
            split.problems += problems
            if image is not None:
                split.images.append(image)
    repeated = len(image_ids) - len(set(image_ids))
    if repeated:
        split.problems.append(("image named twice, listed once", f"{split_file} repeats {repeated} names"))
    return split


def check_voc_image(voc, image_id):
    """(file_name, size, objects) or None where the image cannot be used, and the problems met."""
    xml = voc / "Annotations" / f"{image_id}.xml"
    try:
        annotation = parse_voc_xml(xml)
    except DataError as error:
        return None, [("annotation unusable, image left out", str(error))]
    folder = voc / "JPEGImages"
    # By the split's own name for it: <filename> is often wrong in folders that somebody renamed.
    path = next((path for ending in IMAGE_ENDINGS if (path := folder / f"{image_id}{ending}").is_file()), None)
    if path is None:
        return None, [("image missing, left out", f"{folder / image_id} with {', '.join(IMAGE_ENDINGS)}")]
    if not path.resolve().is_relative_to(folder.resolve()):
        return None, [("image outside the image folder, left out", str(path))]
    try:
        image = read_image(path)
    except DataError as error:
        return None, [("image unusable, left out", str(error))]
    size = (image.height, image.width)
    problems = []
    if annotation.size not in (None, size):
        said = f"{annotation.size[1]:g}x{annotation.size[0]:g}"
        sentence = f"{xml} says {said}, {path} is {size[1]}x{size[0]}"
        return None, [("size differs from the annotation's, image left out", sentence)]
    objects = []
    for name, corners, difficult in annotation.objects:
        box, problem = check_voc_box(corners, size)
        if problem:
            problems.append((problem, f"{xml}: {name} {corners} in {size[1]}x{size[0]}"))
        if box is not None:
            objects.append((name, box, difficult))
    return (path.relative_to(folder).as_posix(), size, objects), problems


def parse_voc_xml(xml):
    """An Annotation; DataError names the file and what is wrong with it."""
    try:
        root = ElementTree.parse(xml).getroot()
    except FileNotFoundError:
        raise DataError(f"{xml} is missing") from None
    except (ElementTree.ParseError, DefusedXmlException, ValueError) as error:
        raise DataError(f"{xml} does not parse: {error!s:.200}") from None

    def number(element, tag):
        text = element.findtext(tag)
        try:
            return float(text)
        except (TypeError, ValueError):
            raise DataError(f"{xml}: <{tag}> is {text!r}, not a number") from None

    size = root.find("size")
    objects = []
    for element in root.findall("object"):
        box, name = element.find("bndbox"), (element.findtext("name") or "").strip()
        if box is None or not name:
            raise DataError(f"{xml}: an <object> without {'<bndbox>' if box is None else '<name>'}")
        corners = tuple(number(box, tag) for tag in ("xmin", "ymin", "xmax", "ymax"))
        objects.append((name, corners, (element.findtext("difficult") or "0").strip() == "1"))
    return Annotation(
        size=None if size is None else (number(size, "height"), number(size, "width")),
        objects=objects,
    )


def check_voc_box(corners, size):
    """VOC's (xmin, ymin, xmax, ymax) -> (box xyxy in continuous pixels or None, what was wrong or None)."""
    if not all(math.isfinite(corner) for corner in corners):
        return None, "box not finite, left out"
    xmin, ymin, xmax, ymax = corners
    left, top, right, bottom = xmin - 1, ymin - 1, xmax, ymax
    if xmax < xmin or ymax < ymin:
        return None, "box inverted, left out"
    # A box of one pixel has xmax == xmin; one written by a tool with exclusive corners is empty. Both are useless.
    if xmax == xmin or ymax == ymin:
        return None, "box empty, left out"
    height, width = size
    clipped = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
    if clipped[2] - clipped[0] <= 0 or clipped[3] - clipped[1] <= 0:
        return None, "box outside the image, left out"
    return clipped, None if clipped == (left, top, right, bottom) else "box partly outside the image, clipped"


# ---------------------------------------------------------------------------------------------------------------------
# Classes and writing


def choose_classes(splits):
    """VOC's classes in VOC's order if all names are VOC's, else the names found, sorted."""
    names = {name for split in splits for _, _, objects in split.images for name, _, _ in objects}
    if not names:
        raise DataError("no image has an object, so the classes are unknown: name them with --classes FILE")
    strange = sorted(names - set(VOC_CLASSES))
    if not strange:
        return VOC_CLASSES
    if len(strange) < len(names):
        print(
            f"note: {', '.join(strange)} are no VOC classes, so these are taken as {len(names)} classes of their own; "
            "if that is a slip, mend it or pass --classes FILE",
            file=sys.stderr,
        )
    return tuple(sorted(names))


def check_classes(split, classes):
    for file_name, _, objects in split.images:
        for name, _, _ in objects:
            if name not in classes:
                raise DataError(
                    f"{file_name} in split {split.name!r} has an object of class {name!r}, which is none of the "
                    f"{len(classes)} classes: {', '.join(classes)}. Mend the annotation or the class file"
                )


def to_coco(split, classes, image_root):
    """The data list as builtins. `difficult` stands beside `iscrowd`; boxes are x, y, width, height, 0-based."""
    images, annotations = [], []
    label_of = {name: label for label, name in enumerate(classes, start=1)}
    for image_id, (file_name, (height, width), objects) in enumerate(split.images, start=1):
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for name, (x0, y0, x1, y1), difficult in objects:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": label_of[name],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
                "difficult": int(difficult),
            }
            annotations.append(annotation)
    return {
        "info": {"image_root": str(image_root.resolve()), "split": split.name},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label, "name": name} for name, label in label_of.items()],
    }


def describe_problems(problems):
    """'12 x box clipped, for example ...; 1 x ...' for a person to read."""
    first = {}
    for kind, sentence in problems:
        first.setdefault(kind, sentence)
    counts = Counter(kind for kind, _ in problems)
    return "; ".join(f"{count} x {kind}, e.g. {first[kind]}" for kind, count in counts.most_common()) or "no problems"


def summary(split, out):
    objects = [difficult for _, _, objects in split.images for _, _, difficult in objects]
    empty = sum(not objects for _, _, objects in split.images)
    return (
        f"{out / (split.name + '.json')}: {len(split.images)} images ({empty} without objects), {len(objects)} objects "
        f"({sum(objects)} difficult); {describe_problems(split.problems)}"
    )


if __name__ == "__main__":
    main()
