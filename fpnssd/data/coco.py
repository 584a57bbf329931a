"""COCO's form: one JSON file a split, with images, annotations and categories."""

import json
from pathlib import Path

from fpnssd.data.annotations import Problem, RawObject, Record, SplitAnnotations
from fpnssd.data.images import DataError


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
    found = SplitAnnotations(split, Path(root), [])
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
