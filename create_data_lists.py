"""Makes checked data lists (COCO JSON), one per split, from a data set in VOC, COCO or YOLO format.

    python create_data_lists.py --voc VOCdevkit/VOC2012 --splits train val --out data/voc2012
    python create_data_lists.py --voc VOCdevkit/VOC2007 VOCdevkit/VOC2012 --splits trainval test --out data/voc0712
    python create_data_lists.py --coco train.json val.json --images train2017 val2017 --splits train val --out data/coco
    python create_data_lists.py --yolo mydata/data.yaml --splits train val --out data/mine
    python create_data_lists.py --voc mine --out data/mine  # images and XML files without splits
    python create_data_lists.py --download voc2007 voc2012 --splits trainval test --out data/voc0712

Every annotation is parsed and every image decoded. Boxes that leave the image are clipped to it; boxes, objects and
images that cannot be used are left out; all are counted in a table and named in OUT/check.json; OUT/check.png shows
box sizes and aspects beside the priors. No list is made for a split without objects (unless --unlabelled), or
of one that loses more than half of its objects (unless --allow-loss); --strict makes none if anything was
left out or changed.

Data without splits are divided into train and val: each class by --val-share, reproducibly for a given --seed.
Near-duplicates, frames of one video and Roboflow's copies of a photograph stay in one split.
"""

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fpnssd.data.annotations import ALL, Problem, Record, SplitAnnotations, name_problem, read_lines, relative_path
from fpnssd.data.check_report import Report, describe_splits, format_report, write_report
from fpnssd.data.checks import (
    LEFT_OUT,
    NOTED,
    CheckResult,
    Split,
    check_image,
    collect_results,
    count_left_out,
    finish_splits,
)
from fpnssd.data.coco import read_coco
from fpnssd.data.data_list import DataList
from fpnssd.data.images import DataError
from fpnssd.data.split import VAL_SHARE, divide_results, split_to_divide
from fpnssd.data.threads import map_in_threads
from fpnssd.data.voc import DOWNLOADS, VOC_CLASSES, download_voc, find_voc_splits, read_voc
from fpnssd.data.yolo import find_yolo_splits, read_yolo
from utils import InputError, check_outputs, escape_unprintable, whole_number, write_text


@dataclass
class Classes:
    """The classes of the lists."""

    ids: dict[str, int]  # name -> category id, in label order
    sources: dict[str, str]  # name in the annotations -> name in the lists; objects of other names are left out


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    escape_unprintable()
    try:
        check_outputs(outputs_of(args), [*(args.coco or ()), args.yolo, args.classes], args.overwrite)
        if args.download:
            args.voc = [download_voc(name, Path(args.root)) for name in args.download]
        names, val_share = choose_splits(args)
        known = None  # classes that the data set itself names, with their ids
        if args.voc:
            whole = len(names) == 1 and not find_voc_splits(args.voc)
            annotations = [read_voc(args.voc, split, args.unlabelled, whole) for split in names]
        elif args.coco:
            annotations, known = read_coco(args.coco, names, args.images)
        else:
            annotations, known = read_yolo(args.yolo, names, args.unlabelled)
        options = {name: getattr(args, name) for name in ("strict", "image_size", "unlabelled", "allow_loss", "seed")}
        create_data_lists(annotations, Path(args.out), known, args.classes, val_share=val_share, **options)
    except (InputError, OSError) as error:
        sys.exit(f"create_data_lists: {error}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s SOURCE [options]",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--voc", nargs="+", type=Path, metavar="FOLDER", help="with Annotations, ImageSets/Main and JPEGImages"
    )
    source.add_argument("--coco", nargs="+", type=Path, metavar="JSON", help="one file for each of --splits")
    source.add_argument("--yolo", type=Path, metavar="PATH", help="data.yaml, obj.data or classes.txt, or its folder")
    source.add_argument("--download", nargs="+", choices=DOWNLOADS, help="download these and read them as --voc")
    parser.add_argument(
        "--splits", nargs="+", help="names of the splits (default: train val, or the split that is divided)"
    )
    parser.add_argument(
        "--val-share",
        type=share,
        metavar="SHARE",
        help="divide the data into train and val; share of each class that goes to val",
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of that division (default: 0)")
    parser.add_argument(
        "--images", nargs="+", type=Path, metavar="FOLDER", help="of --coco: one for all files, or one for each"
    )
    parser.add_argument("--root", default="data", help="folder to which --download writes VOCdevkit (default: data)")
    parser.add_argument("--out", required=True, help="folder to which SPLIT.json of each split is written")
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="the classes in label order, one per line; 'vehicle = car, bus' merges two. Or voc: VOC's twenty",
    )
    parser.add_argument(
        "--unlabelled", action="store_true", help="allow images without annotation and splits without objects"
    )
    parser.add_argument("--allow-loss", action="store_true", help="write lists even if most objects were left out")
    parser.add_argument("--overwrite", action="store_true", help="also replace files that this program did not write")
    parser.add_argument("--strict", action="store_true", help="write no lists if anything is left out or changed")
    parser.add_argument(
        "--image-size", type=whole_number(1), default=300, help="of the network, for the check (default: 300)"
    )
    args = parser.parse_args(argv)
    if args.splits and len(set(args.splits)) < len(args.splits):
        parser.error(f"--splits names one twice: {' '.join(args.splits)}")
    if args.splits and args.val_share and len(args.splits) > 1:
        parser.error("--val-share divides one split: name that alone with --splits")
    return args


def share(text: str) -> float:
    """An argparse type: a number between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def choose_splits(args: argparse.Namespace) -> tuple[list[str], float | None]:
    """The splits to read; and the share of val if a single split is to be divided into train and val, else None.

    Raises:
        InputError: --val-share is given for data that has several splits, and no --splits says which is meant.
    """
    if args.splits:
        return args.splits, args.val_share
    if args.coco:
        existing = {"train", "val"} if len(args.coco) > 1 else set()
    else:
        existing = find_yolo_splits(args.yolo) if args.yolo else find_voc_splits(args.voc)
    if (name := split_to_divide(existing)) is None:
        if args.val_share is not None:
            raise InputError(f"--val-share: say with --splits which of {', '.join(sorted(existing))} is to be divided")
        return ["train", "val"], None
    if name == ALL:
        print("the data set has no splits: it is divided into train and val")
    else:
        print(f"the data set has no val: its split {name!r} is divided into train and val")
    return [name], VAL_SHARE if args.val_share is None else args.val_share


def outputs_of(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """(kind, path) of each file that will be written, for utils.check_outputs."""
    out = Path(args.out)
    names = args.splits if args.splits and args.val_share is None else ["train", "val"]
    lists = [("data list", out / f"{name}.json") for name in names]
    return [("check", out / "check.json"), ("picture", out / "check.png"), *lists]


def create_data_lists(
    annotations: Sequence[SplitAnnotations],
    out: Path,
    known: dict[str, int] | None = None,
    class_file: Path | None = None,
    strict: bool = False,
    image_size: int = 300,
    unlabelled: bool = False,
    allow_loss: bool = False,
    val_share: float | None = None,
    seed: int = 0,
    picture: bool = True,
) -> Report:
    """Checks the splits that a reader returned and writes OUT/SPLIT.json for each, all or none, and check.json, .png.

    Args:
        annotations: what the reader returned for each split.
        out: the folder to write to.
        known: {class name: category id} from the data set itself; None takes the classes from the objects.
        class_file: the argument of --classes: a file, or the word "voc".
        strict: write no lists if anything was left out or changed.
        image_size: of the network, for the statistics.
        unlabelled: allow splits without objects.
        allow_loss: allow splits that lost more than half of their objects.
        val_share: of each class, in 0..1, to divide the annotations into train and val; None keeps the splits.
        seed: of that division.
        picture: also draw OUT/check.png.

    Returns:
        The report, as in check.json.

    Raises:
        DataError: a list cannot be made, or one of the rules above forbids it.
    """
    splits: list[Split] = []
    for part in annotations:
        results = check_images(part, image_size)
        if val_share is None:
            splits.append(collect_results(part.name, part, results))
        else:
            splits += divide_results(part, results, val_share, seed)
    if not any(split.images for split in splits):
        problems = [problem for split in splits for problem in split.problems]
        raise DataError(f"no image can be used ({len(problems)} problems): {problems[0].kind}: {problems[0].where}")
    classes = choose_classes(splits, known, class_file, unlabelled)
    splits = finish_splits(splits, tuple(classes.ids), classes.sources)
    report = describe_splits(splits, tuple(classes.ids), image_size)
    print(format_report(report))
    write_report(report, out, picture)
    print(f"{out / 'check.json'} names every problem")
    for split in splits:
        check_split(split, unlabelled, allow_loss, strict)
    lists = {out / f"{split.name}.json": to_coco(split, classes, out) for split in splits}
    for path, content in lists.items():
        DataList.from_coco(path, content)  # raises where train.py could not read the list
    for path, content in lists.items():
        write_text(path, json.dumps(content), "data list")
        print(f"wrote {path}")
    return report


def check_split(split: Split, unlabelled: bool, allow_loss: bool, strict: bool) -> None:
    """Rejects a split that cannot be used for training.

    Raises:
        DataError: it has no image; it has no objects and is not `unlabelled`; it lost more than half of its objects, or
            more than half of its annotations cannot be read, and `allow_loss` is not set; no box is larger than a
            pixel, so that they must have another unit; or `strict` is set and anything was left out or changed.
    """
    if not split.images:
        raise DataError(f"no usable image in {split.name}: no list was written")
    kinds = Counter(problem.kind for problem in split.problems)
    objects = [obj for image in split.images for obj in image.objects]
    # Objects of classes that were not chosen, and second copies of an object, do not count as lost.
    expected = split.annotated - kinds["class that was not chosen"] - kinds["object twice"]
    if all(obj.crowd for obj in objects) and not unlabelled:
        but = f" but {len(objects)} with iscrowd 1, which training ignores" if objects else ""
        raise DataError(
            f"{split.name} has no objects{but} ({split.annotated} were annotated), so no list was written"
            f"{reasons(split)}. If its images are meant to have none, pass --unlabelled"
        )
    for what, lost, total in (
        ("objects", expected - len(objects), expected),
        ("annotations", split.unread, split.total),
    ):
        if lost > total / 2 and not allow_loss:
            raise DataError(
                f"{split.name} would lose {lost} of its {total} {what}, so no list was written{reasons(split)}. "
                "If that is right, pass --allow-loss"
            )
    if objects and all(max(x1 - x0, y1 - y0) <= 1 for x0, y0, x1, y1 in (obj.box for obj in objects)):
        raise DataError(
            f"{split.name}: none of the {len(objects)} boxes is larger than a pixel, so no list was written. If they "
            "are in 0..1 of the image, multiply them by its width and height; only YOLO's boxes are relative"
        )
    serious = [(kind, count) for kind, count in kinds.most_common() if kind not in NOTED]
    if strict and serious:
        counts = "; ".join(f"{count} x {kind}" for kind, count in serious)
        raise DataError(f"--strict: {split.name} has {counts}. No list was written")


def reasons(split: Split) -> str:
    """The three commonest kinds of what was left out of a split, each with an example; "" where there are none."""
    kinds = Counter(p.kind for p in split.problems if p.kind in LEFT_OUT or p.kind == "class that was not chosen")
    examples = {problem.kind: problem.where for problem in reversed(split.problems)}
    parts = [f"{kind} ({count}), as in {examples[kind]}" for kind, count in kinds.most_common(3)]
    return ": " + "; ".join(parts) if parts else ""


def check_images(annotations: SplitAnnotations, image_size: int) -> list[CheckResult]:
    """Reads and checks all images of a split, in threads."""

    def check(parse: Callable[[], Record]) -> CheckResult:
        try:
            record = parse()
        except DataError as error:
            return None, [Problem(error.kind, str(error))], None
        annotated = len(record.objects) + count_left_out(record.problems)
        return *check_image(record, annotations.image_root, image_size), annotated

    results = map_in_threads(check, annotations.records)  # decoding releases the GIL
    return list(tqdm(results, f"checking {annotations.name}", len(annotations.records), disable=None, unit="image"))


# ---------------------------------------------------------------------------------------------------------------------
# Classes and writing


def choose_classes(
    splits: Sequence[Split],
    known: dict[str, int] | None = None,
    class_file: Path | None = None,
    unlabelled: bool = False,
) -> Classes:
    """Chooses the classes of the lists and prints the choice.

    They are those of `class_file`, or else `known`, those that the data set itself names. A VOC folder names none: see
    classes_of_objects.

    Args:
        splits: checked, with all objects.
        known: {name: category id}.
        class_file: a file of class names, or the word "voc".
        unlabelled: splits need no objects.

    Raises:
        DataError: the class file cannot be used, or there are no objects to take the classes from.
    """
    present, known = {obj.name for split in splits for image in split.images for obj in image.objects}, known or {}
    if class_file:
        joined = {name: [name] for name in VOC_CLASSES} if str(class_file) == "voc" else read_class_file(class_file)
        absent = sorted(name for parts in joined.values() for name in parts if name not in {*present, *known})
        if absent:
            print(
                f"note: the data set has no objects of {', '.join(absent)}, which {class_file} names", file=sys.stderr
            )
        known_ids = [[known[part] for part in parts if part in known] for parts in joined.values()]
        ids = [of_class[0] for of_class in known_ids if of_class]
        if len(set(ids)) < len(joined):
            ids = list(range(1, len(joined) + 1))
        print(f"classes: the {len(joined)} of --classes {class_file}")
        sources = {part: name for name, parts in joined.items() for part in parts}
        return Classes(dict(zip(joined, ids, strict=True)), sources)
    if known:
        print(f"classes: the {len(known)} that the data set names")
        return Classes(known, {name: name for name in known})
    if not present and not unlabelled:
        causes = next((text for split in splits if (text := reasons(split))), "")
        raise DataError(f"no image has an object, so the classes are unknown: name them with --classes FILE{causes}")
    names = classes_of_objects(present)
    return Classes({name: label for label, name in enumerate(names, start=1)}, {name: name for name in names})


def classes_of_objects(present: set[str]) -> tuple[str, ...]:
    """The classes of a data set that names none itself: those of its objects, sorted.

    If there are no objects, or only objects of VOC's classes, of more than half of them, the classes are VOC's twenty,
    in VOC's order. Prints the choice.
    """
    of_voc = present & set(VOC_CLASSES)
    most = len(of_voc) > len(VOC_CLASSES) / 2
    if not present or (most and of_voc == present):
        print(f"classes: VOC's {len(VOC_CLASSES)}, in VOC's order; the data set has objects of {len(present)}")
        return VOC_CLASSES
    hint = " (VOC's twenty: --classes voc)" if of_voc == present else ""
    print(f"classes: the {len(present)} of the objects, sorted{hint}")
    if most:
        names = ", ".join(sorted(present - of_voc))
        print(f"note: {names} are not VOC classes, the others are; if that is a mistake, correct it", file=sys.stderr)
    return tuple(sorted(present))


def read_class_file(path: Path) -> dict[str, list[str]]:
    """Returns {class name: its names in the data}, from lines 'name' or 'name = first, second'.

    Raises:
        DataError: the file names no class or one twice, or a name cannot be written to lists and XML.
    """
    joined: defaultdict[str, list[str]] = defaultdict(list)
    lines = read_lines(path)
    for line in lines:
        name, joins, parts = line.partition("=")
        joined[name.strip()] += [part.strip() for part in (parts.split(",") if joins else [name])]
    every = [part for parts in joined.values() for part in parts]
    if not lines or len(joined) < len(lines) or len(set(every)) < len(every) or not all(every) or "" in joined:
        raise DataError(f"class file {path} must name each class once, one a line; it has {lines}")
    for name in joined:
        if problem := name_problem(name):
            raise DataError(f"class file {path}: {name!r} {problem}")
    return dict(joined)


def to_coco(split: Split, classes: Classes, out: Path) -> dict[str, Any]:
    """Returns a data list as builtins: COCO's form, with `difficult` beside `iscrowd`.

    Boxes are x, y, width, height in pixels, from 0 at the image's edge.

    Args:
        split: checked.
        classes: of the lists.
        out: the folder of the list.
    """
    images: list[dict] = []
    annotations: list[dict] = []
    for number, image in enumerate(split.images, start=1):
        image_id = number if image.image_id is None else image.image_id
        height, width = image.size
        row = {"id": image_id, "file_name": image.file_name, "height": height, "width": width}
        images.append({**row, "apply_exif": True} if image.apply_exif else row)
        for obj in image.objects:
            x0, y0, x1, y1 = obj.box
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": classes.ids[obj.name],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0) if obj.area is None else obj.area,
                "iscrowd": int(obj.crowd),
                "difficult": int(obj.difficult),
            }
            if obj.truncated is not None:
                annotation["truncated"] = int(obj.truncated)
            annotations.append(annotation)
    return {
        "info": {"image_root": image_root_for(split.image_root, out), "split": split.name},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": class_id, "name": name} for name, class_id in classes.ids.items()],
    }


def image_root_for(image_root: Path, out: Path) -> str:
    """The image root as it is written to a list in the folder `out`.

    It is relative to `out` if both have a common parent folder, which can then be moved as a whole; it is absolute if
    the only common parent is the root of the file system, or if they are on different drives of Windows.
    """
    root, folder = image_root.resolve(), out.resolve()
    try:
        common = Path(os.path.commonpath([root, folder]))
    except ValueError:  # Windows: on two drives
        return root.as_posix()
    return root.as_posix() if common == Path(common.anchor) else relative_path(root, folder)


if __name__ == "__main__":
    main()
