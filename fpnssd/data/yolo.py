"""Reads data sets in YOLO's format: a data.yaml, and a text file of labels for each image.

    read_yolo(Path("mydata/data.yaml"), ["train"])  # ([SplitAnnotations], {class name: number})

An image's label file is read when its record is asked for.
"""

from collections import Counter
from functools import partial
from pathlib import Path

import yaml

from fpnssd.data.annotations import Problem, RawObject, Record, SplitAnnotations, read_lines, relative_path
from fpnssd.data.images import IMAGE_SUFFIXES, DataError


def read_yolo(path, names):
    """(a SplitAnnotations for each split, {class name: id}) of a data.yaml.

    It holds `path`, `names`, and for each split a folder of images, a text file that lists them, or several of these.
    Labels lie in .../labels/x.txt for .../images/x.jpg.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        names_given = content["names"]
        pairs = enumerate(names_given) if isinstance(names_given, list) else names_given.items()
        classes = {int(number): name for number, name in pairs}
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no data.yaml with `names`: {error!s:.300}") from error
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
        found.append(SplitAnnotations(name, root, records, [Problem("image named twice", image) for image in twice]))
    return found, {str(name): number for number, name in sorted(classes.items())}


def yolo_images(yaml_path, place):
    """The images that one entry of a data.yaml means."""
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
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
    record = Record(relative_path(image, root), str(label_file), [], normalized=True)
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
            record.objects.append(RawObject(str(classes[label]), box, text=f"{line[:80]!r}"))
        else:
            record.problems.append(Problem("object of an unknown class", f"{label_file}: {line[:80]}"))
    return record
