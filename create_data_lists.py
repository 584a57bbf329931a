"""A VOC, COCO or YOLO data set -> one checked data list (COCO JSON) a split.

    python create_data_lists.py --voc VOCdevkit/VOC2012 --splits train val --out data/voc2012
    python create_data_lists.py --voc VOCdevkit/VOC2007 VOCdevkit/VOC2012 --splits trainval test --out data/voc0712
    python create_data_lists.py --coco train.json val.json --images train2017 val2017 --splits train val --out data/coco
    python create_data_lists.py --yolo mydata/data.yaml --splits train val --out data/mine
    python create_data_lists.py --download voc2007 voc2012 --splits trainval test --out data/voc0712

Every annotation is parsed and every image decoded. Boxes that leave the image are clipped to it; boxes, objects and
images that cannot be used are left out; all are counted in a table and named in OUT/check.json; OUT/check.png shows
classes, box sizes and aspects beside the priors. --strict makes no lists if anything was left out or changed.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import defusedxml.ElementTree as ElementTree
import yaml
from defusedxml import DefusedXmlException
from torchvision.datasets import VOCDetection
from tqdm import tqdm

from data_check import (
    NOTED,
    Problem,
    RawObject,
    Record,
    Split,
    check_image,
    describe_splits,
    finish_splits,
    format_report,
    write_report,
)
from images import DataError
from utils import InputError, in_threads, whole_number, written_whole

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
DOWNLOADS = {"voc2007": ("trainval", "test"), "voc2012": ("trainval",)}  # the image sets that have archives


@dataclass
class Found:
    """What a reader found for a split: for each image a function without arguments that returns its Record."""

    name: str
    image_root: Path
    records: list
    problems: list = field(default_factory=list)


@dataclass
class Classes:
    """Which objects are listed, as what: names in label order, their ids in the list, name in the data -> name."""

    names: tuple
    ids: tuple
    sources: dict


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.download:
            args.voc = [download_voc(name, Path(args.root)) for name in args.download]
        known = None  # classes that the data itself names, with their ids
        if args.voc:
            found = [read_voc(args.voc, split, args.unlabelled) for split in args.splits]
            if args.unlabelled:
                known = {name: label for label, name in enumerate(VOC_CLASSES, start=1)}
        elif args.coco:
            found, known = read_coco(args.coco, args.splits, args.images)
        else:
            found, known = read_yolo(args.yolo, args.splits)
        create_data_lists(found, Path(args.out), known, args.classes, args.strict, args.image_size)
    except (InputError, OSError) as error:
        sys.exit(f"create_data_lists: {error}")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s SOURCE [options]"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--voc", nargs="+", type=Path, metavar="FOLDER", help="with Annotations, ImageSets/Main and JPEGImages"
    )
    source.add_argument("--coco", nargs="+", type=Path, metavar="JSON", help="a file for each of --splits")
    source.add_argument("--yolo", type=Path, metavar="YAML", help="data.yaml with names and the splits' images")
    source.add_argument("--download", nargs="+", choices=DOWNLOADS, help="fetch these and read them as --voc")
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="their names (train val)")
    parser.add_argument("--images", nargs="+", type=Path, metavar="FOLDER", help="for --coco: one, or one for each")
    parser.add_argument("--root", default="data", help="where --download puts its VOCdevkit (data)")
    parser.add_argument("--out", required=True, help="folder that gets SPLIT.json for each split")
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="the classes in label order, one a line; 'vehicle = car, bus' joins",
    )
    parser.add_argument(
        "--unlabelled", action="store_true", help="for --voc: images need no annotation, as in VOC's test sets"
    )
    parser.add_argument("--strict", action="store_true", help="write no lists if anything is left out or changed")
    parser.add_argument("--image-size", type=whole_number(1), default=300, help="of the network, for the check (300)")
    args = parser.parse_args(argv)
    if len(set(args.splits)) < len(args.splits):
        parser.error(f"--splits names one twice: {' '.join(args.splits)}")
    return args


def create_data_lists(found, out, known=None, class_file=None, strict=False, image_size=300):
    """Checks what the readers found and writes out/SPLIT.json for each split, all or none, and out/check.json, .png.

    known: {name: id} of the classes that the data names itself, else they come from its objects. Returns the report.
    DataError where a list cannot be made, or must not be for being `strict`.
    """
    splits = [check_split(part, image_size) for part in found]
    classes = choose_classes(splits, known, class_file)
    splits = finish_splits(splits, classes.names, classes.sources)
    report = describe_splits(splits, classes.names, image_size)
    print(format_report(report))
    write_report(report, out)
    print(f"{out / 'check.json'} names every one of these; {out / 'check.png'} shows sizes and aspects")
    empty = [split.name for split in splits if not split.images]
    if empty:
        raise DataError(f"no usable image in {', '.join(empty)}: no list was written")
    serious = Counter()
    for row in report["problems"]:
        if row["kind"] not in NOTED:
            serious[row["kind"]] += row["count"]
    if strict and serious:
        told = "; ".join(f"{count} x {kind}" for kind, count in serious.most_common())
        raise DataError(f"--strict: {told}. No list was written")
    for split in splits:
        with written_whole(out / f"{split.name}.json") as temporary:
            Path(temporary).write_text(json.dumps(to_coco(split, classes)), encoding="utf-8")
        print(f"wrote {out / split.name}.json")
    return report


def check_split(found, image_size):
    """A Split of what can be used of a Found."""
    split = Split(found.name, found.image_root, [], list(found.problems))
    start = time.perf_counter()

    def check(parse):
        try:
            record = parse()
        except DataError as error:
            return None, [Problem(error.kind, str(error))]
        return check_image(record, found.image_root, image_size)

    results = in_threads(check, found.records)  # decoding leaves Python's lock
    for image, problems in tqdm(results, f"checking {found.name}", len(found.records), disable=None, unit="image"):
        split.problems += problems
        if image is not None:
            split.images.append(image)
    seconds, count = time.perf_counter() - start, len(found.records)
    print(f"{found.name}: {count} images checked in {seconds:.1f} s ({1e4 * seconds / max(1, count):.0f} s per 10,000)")
    return split


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
        image_root = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    found = Found(name, image_root, [])
    for folder, split_file in zip(folders, split_files, strict=True):
        if not split_file.is_file():
            print(f"note: {folder} has no split {name!r}")
            continue
        # VOC's lists of one class have a flag behind the name; other people's names have spaces.
        annotations, lines = folder / "Annotations", read_lines(split_file)
        names = [line if (annotations / f"{line}.xml").is_file() else line.split()[0] for line in lines]
        for image_name, count in Counter(names).items():
            if count > 1:
                found.problems.append(Problem("image named twice", f"{split_file} names {image_name} {count} times"))
            found.records.append(partial(read_voc_record, folder, image_name, image_root, unlabelled))
    if not found.records:
        raise DataError(f"split {name!r} is empty: {split_files[0]} names no image")
    return found


def read_voc_record(folder, image_name, image_root, unlabelled=False):
    """A Record of Annotations/NAME.xml and the image of the same name; DataError names what is wrong."""
    annotation = folder / "Annotations" / f"{image_name}.xml"
    without = unlabelled and not annotation.exists()
    size, objects = (None, []) if without else parse_voc_xml(annotation)
    # By the split's own name for it: <filename> is often wrong in folders that somebody renamed.
    stem = folder / "JPEGImages" / image_name
    path = next((path for ending in IMAGE_ENDINGS if (path := Path(f"{stem}{ending}")).is_file()), None)
    if path is None:
        raise DataError(f"{stem} with any of {', '.join(IMAGE_ENDINGS)}", "image missing")
    return Record(_relative(path, image_root), str(annotation), objects, size)


def _relative(path, folder):
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


# ---------------------------------------------------------------------------------------------------------------------
# YOLO


def read_yolo(path, names):
    """(a Found for each split, {class name: id}) of a data.yaml.

    It holds `path`, `names`, and for each split a folder of images, a text file that lists them, or several of these.
    Labels lie in .../labels/x.txt for .../images/x.jpg.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        classes = content["names"]
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no data.yaml with `names`: {error!s:.300}") from error
    classes = dict(enumerate(classes)) if isinstance(classes, list) else {int(k): v for k, v in classes.items()}
    root = path.parent / str(content.get("path") or ".")
    found = []
    for name in names:
        if not content.get(name):
            raise DataError(f"no split {name!r} in {path}; it has {', '.join(k for k in content if k != 'names')}")
        places = content[name] if isinstance(content[name], list) else [content[name]]
        images = [image for place in places for image in yolo_images(path, root / str(place))]
        if not images:
            raise DataError(f"split {name!r} is empty: no image in {', '.join(map(str, places))} below {root}")
        records = [partial(read_yolo_record, image, root, classes) for image in dict.fromkeys(images)]
        twice = [str(image) for image, count in Counter(images).items() if count > 1]
        found.append(Found(name, root, records, [Problem("image named twice", image) for image in twice]))
    return found, {str(name): number for number, name in sorted(classes.items())}


def yolo_images(yaml_path, place):
    """The images that one entry of a data.yaml means."""
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if file.suffix in IMAGE_ENDINGS)
    if place.suffix == ".txt" and place.is_file():
        return [place.parent / line for line in read_lines(place)]
    raise DataError(f"{yaml_path} names {place}, which is neither a folder nor a text file")


def read_yolo_record(image, root, classes):
    """A Record of an image and its label file; without one the image has no objects. Polygons become boxes."""
    parts = list(image.parts)
    where = [i for i, part in enumerate(parts) if part == "images"]
    if where:
        parts[where[-1]] = "labels"
    label_file = Path(*parts).with_suffix(".txt")
    record = Record(_relative(image, root), str(label_file), [], in_unit=True)
    for line in read_lines(label_file) if label_file.is_file() else []:
        try:
            label, *numbers = (float(word) for word in line.split())
        except ValueError:
            raise DataError(f"{label_file}: {line[:80]!r} is not all numbers", "number unreadable") from None
        if len(numbers) == 4:
            x, y, width, height = numbers
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        elif len(numbers) >= 6 and len(numbers) % 2 == 0:
            xs, ys = numbers[::2], numbers[1::2]
            box = (min(xs), min(ys), max(xs), max(ys))
            record.problems.append(Problem("polygon instead of a box", f"{label_file}: {line[:80]}"))
        else:
            sentence = f"{label_file}: {line[:80]!r} is neither 'class x y width height' nor a polygon"
            raise DataError(sentence, "annotation incomplete")
        if label in classes:
            record.objects.append(RawObject(str(classes[label]), box, said=f"{line[:80]!r}"))
        else:
            record.problems.append(Problem("object of an unknown class", f"{label_file}: {line[:80]}"))
    return record


# ---------------------------------------------------------------------------------------------------------------------
# Classes and writing


def choose_classes(splits, known=None, class_file=None):
    """The Classes of the file, else those the data names, else VOC's if they hold all objects, else theirs, sorted."""
    met = {one.name for split in splits for image in split.images for one in image.objects}
    if class_file:
        joined = read_class_file(class_file)
        strange = sorted(name for parts in joined.values() for name in parts if name not in {*met, *(known or ())})
        if strange:
            print(f"note: {class_file} names {', '.join(strange)}, of which the data has no object", file=sys.stderr)
        ids = [next((known[part] for part in parts if known and part in known), 0) for parts in joined.values()]
        ids = tuple(ids) if all(ids) and len(set(ids)) == len(ids) else tuple(range(1, len(ids) + 1))
        return Classes(tuple(joined), ids, {part: name for name, parts in joined.items() for part in parts})
    if known:
        return Classes(tuple(known), tuple(known.values()), {name: name for name in known})
    if not met:
        raise DataError("no image has an object, so the classes are unknown: name them with --classes FILE")
    strange = sorted(met - set(VOC_CLASSES))
    names = tuple(sorted(met)) if strange else VOC_CLASSES
    if strange and len(strange) < len(met):
        print(
            f"note: {', '.join(strange)} are no VOC classes, so these are taken as {len(names)} classes of their own; "
            "if that is a slip, mend it or pass --classes FILE",
            file=sys.stderr,
        )
    return Classes(names, tuple(range(1, len(names) + 1)), {name: name for name in names})


def read_class_file(path):
    """{name: the names in the data that it stands for}, from lines 'name' or 'name = one, another'."""
    joined = defaultdict(list)
    lines = read_lines(path)
    for line in lines:
        name, joins, parts = line.partition("=")
        joined[name.strip()] += [part.strip() for part in (parts if joins else name).split(",")]
    every = [part for parts in joined.values() for part in parts]
    if not lines or len(joined) < len(lines) or len(set(every)) < len(every) or not all(every) or "" in joined:
        raise DataError(f"class file {path} must name each class once, one a line; it has {lines}")
    return dict(joined)


def read_lines(path):
    """A text file's lines without white space around them, and without the empty ones."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text file", "annotation does not parse") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def to_coco(split, classes):
    """The data list as builtins. `difficult` stands beside `iscrowd`; boxes are x, y, width, height, 0-based."""
    images, annotations = [], []
    id_of = dict(zip(classes.names, classes.ids, strict=True))
    for number, image in enumerate(split.images, start=1):
        image_id = number if image.image_id is None else image.image_id
        height, width = image.size
        row = {"id": image_id, "file_name": image.file_name, "height": height, "width": width}
        images.append({**row, "apply_exif": True} if image.apply_exif else row)
        for one in image.objects:
            x0, y0, x1, y1 = one.box
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": id_of[one.name],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0) if one.area is None else one.area,
                "iscrowd": int(one.crowd),
                "difficult": int(one.difficult),
            }
            if one.truncated is not None:
                annotation["truncated"] = int(one.truncated)
            annotations.append(annotation)
    return {
        "info": {"image_root": str(split.image_root.resolve()), "split": split.name},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": class_id, "name": name} for name, class_id in id_of.items()],
    }


if __name__ == "__main__":
    main()
