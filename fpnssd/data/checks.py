"""Checks images and boxes before training: `check_image` one image, `finish_splits` all of them together.

Every problem has a kind, a key of ACTIONS, and a place. check_report.py prints and draws them.
"""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fpnssd.data.annotations import Problem, RawObject, Record, SplitAnnotations, name_problem
from fpnssd.data.images import DataError, open_image, orientation, to_rgb, upright
from fpnssd.data.near_duplicates import SAME_SCENE, describe, nearest

Box = tuple[float, float, float, float]

# Kinds of problems, and what is done about each. --strict fails on all but those that are only noted.
LEFT_OUT = {
    "annotation missing": "image left out",
    "annotation does not parse": "image left out",
    "annotation with entities": "image left out",
    "annotation of another format": "image left out",
    "annotation incomplete": "image left out",
    "number unreadable": "image left out",
    "file name unusable": "image left out",
    "image missing": "image left out",
    "image outside the image folder": "image left out",
    "file is not an image": "image left out",
    "image damaged": "image left out",
    "image too large": "image left out",
    "size differs from the annotation's": "image left out",
    "image is in a later split too": "left out of the earlier split",
    "box not finite": "object left out",
    "box inverted": "object left out",
    "box empty": "object left out",
    "box outside the image": "object left out",
    "object twice": "listed once",
    "object of an unknown class": "object left out",
    "object of an unknown image": "object left out",
    "object without a box": "object left out",
    "box in pixels, not in 0..1": "object left out",
    "label file without an image": "label file left out",
    "folder without label files": "images kept as background images",
}
REPAIRED = {
    "box partly outside the image": "clipped",
    "image named twice": "listed once",
    "EXIF rotation applied": "boxes are those of the turned image",
    "polygon instead of a box": "its enclosing box",
    "rotated box": "its enclosing box",
    "label files in two places differ": "the first is read",
    "flag unreadable": "object kept, the flag is taken as not set",
    "area unusable": "the box's area is used",
}
NOTED = {
    "EXIF rotation not applied": "the annotation's size is that of the image as stored",
    "image of another mode": "made RGB: transparency filled with the mean colour, more than 8 bits scaled",
    "animated image": "its first frame is used",
    "image twice in the split": "kept",
    "image nearly in a later split too": "kept, but the score on the later split is biased",
    "image without objects": "kept as a background image",
    "image without a label file": "kept as a background image",
    "label file is empty": "image kept as a background image",
    "label file of two images": "read for both",
    "confidence after the box": "not used",
    "two classes on one box": "kept",
    "box under a pixel at network size": "kept, though too small to be learnt or detected",
    "class without objects": "kept",
    "class that was not chosen": "object left out",
}
ACTIONS = {**LEFT_OUT, **REPAIRED, **NOTED}


@dataclass
class CheckedImage:
    """An image as it goes into the data list."""

    file_name: str
    size: tuple[int, int]  # (height, width), turned by EXIF if apply_exif
    apply_exif: bool  # whether to turn the image by its EXIF orientation
    objects: list[RawObject]  # boxes in pixels, clipped
    digest: bytes  # of the decoded pixels
    image_id: int | str | None
    descriptor: np.ndarray  # (480,) float16, see near_duplicates.describe


CheckResult = tuple[CheckedImage | None, list[Problem], int | None]
"""Result of checking one image: the checked image (None if it is left out), its problems, and the number of annotated
objects (None if the annotation cannot be read)."""


@dataclass
class Split:
    """A checked split: the images of its data list, and all problems."""

    name: str
    image_root: Path
    images: list[CheckedImage]
    problems: list[Problem]
    total: int = 0  # number of images in the data set
    unread: int = 0  # number of these whose annotation is missing or cannot be parsed
    annotated: int = 0  # number of objects in the other annotations


# ---------------------------------------------------------------------------------------------------------------------
# One image


def check_image(record: Record, image_root: Path, image_size: int = 300) -> tuple[CheckedImage | None, list[Problem]]:
    """Decodes an image and checks it with its objects.

    Args:
        record: the image as its annotation describes it.
        image_root: the folder that its file name is relative to.
        image_size: of the network, in pixels.

    Returns:
        The checked image, None if it cannot be used; and the problems.
    """
    problems = list(record.problems)
    path = image_root / record.file_name
    try:
        if problem := name_problem(record.file_name):
            raise DataError(f"image {path}: its name {problem}: rename it", "file name unusable")
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(image_root)):
            raise DataError(f"{path} is not below {image_root}", "image outside the image folder")
        with open_image(path) as image:
            if image.mode != "RGB" or image.has_transparency_data:
                transparent = ", transparent" if image.has_transparency_data else ""
                problems.append(Problem("image of another mode", f"{path}: {image.mode}{transparent}"))
            if getattr(image, "is_animated", False):  # n_frames would decode all frames of a GIF to count them
                problems.append(Problem("animated image", str(path)))
            apply_exif, problem = judge_exif(image, None if record.turned else record.size)
            if problem:
                problems.append(Problem(problem, str(path)))
            pixels = to_rgb(upright(image) if apply_exif else image, str(path))
        size = (pixels.height, pixels.width)
        if record.size not in ((None, size, size[::-1]) if record.turned else (None, size)):
            annotated, actual = ("x".join(f"{side:g}" for side in reversed(s)) for s in (record.size, size))
            sentence = f"{record.annotation} says {annotated}, {path} is {actual}"
            raise DataError(sentence, "size differs from the annotation's")
    except DataError as error:
        return None, [*problems, Problem(error.kind, str(error))]
    objects, box_problems = check_objects(record, size, image_size)
    problems += [Problem(kind, f"{record.annotation}: {text}") for kind, text in box_problems]
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16, salt=f"{size[1]}".encode()).digest()
    descriptor = describe(pixels).astype(np.float16)
    return CheckedImage(record.file_name, size, apply_exif, objects, digest, record.image_id, descriptor), problems


def judge_exif(image: Image.Image, annotated_size: tuple[float, float] | None) -> tuple[bool, str | None]:
    """Decides whether boxes refer to the stored pixels or to the image turned by its EXIF orientation.

    The annotated size decides if the turn swaps sides of different lengths. Without a size the boxes were probably
    drawn in a viewer, which applies the orientation.

    Args:
        image: a PIL image, which need not be decoded.
        annotated_size: (height, width), None where the annotation has none.

    Returns:
        Whether to turn the image; and the kind of problem, None where the image has no orientation.
    """
    turn = orientation(image)
    if turn == 1:
        return False, None
    stored = (image.height, image.width)
    turned = stored[::-1] if turn >= 5 else stored
    if annotated_size is None or (annotated_size == turned and turned != stored):
        return True, "EXIF rotation applied"
    return False, "EXIF rotation not applied"


def check_objects(
    record: Record, size: tuple[int, int], image_size: int
) -> tuple[list[RawObject], list[tuple[str, str]]]:
    """Checks the objects of an image.

    Args:
        record: the image with its objects.
        size: (height, width) of the decoded image.
        image_size: of the network, in pixels.

    Returns:
        The usable objects, with clipped boxes in pixels; and (kind, text) of each problem.
    """
    height, width = size
    kept, problems = [], []
    seen: dict[Box, list[str]] = {}  # box -> the classes of the objects that have it
    for obj in record.objects:
        text = f"{obj.name} {obj.text or obj.box} in {width}x{height}"
        box = tuple(c * s for c, s in zip(obj.box, (width, height) * 2, strict=True)) if record.normalized else obj.box
        clipped, kind = check_box(box, size)
        if kind:
            problems.append((kind, text))
        if clipped is None:
            continue
        others = seen.setdefault(clipped, [])
        if obj.name in others:
            problems.append(("object twice", text))
            continue
        if others:
            problems.append(("two classes on one box", f"{text}, also {', '.join(others)}"))
        others.append(obj.name)
        x0, y0, x1, y1 = clipped
        if min((x1 - x0) / width, (y1 - y0) / height) * image_size < 1:
            problems.append(("box under a pixel at network size", text))
        kept.append(obj._replace(box=clipped, area=obj.area if kind is None else None))
    return kept, problems


def check_box(box: Box, size: tuple[int, int]) -> tuple[Box | None, str | None]:
    """Checks a box, xyxy in pixels, in an image of `size` (height, width).

    Returns:
        The box clipped to the image, None if it cannot be used; and the kind of problem or None.
    """
    if not all(math.isfinite(edge) for edge in box):
        return None, "box not finite"
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0:
        return None, "box inverted"
    if x1 == x0 or y1 == y0:
        return None, "box empty"
    height, width = size
    clipped = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        return None, "box outside the image"
    corner = np.array(clipped[:2], np.float32)
    sides = np.array((clipped[2] - clipped[0], clipped[3] - clipped[1]), np.float32)
    if (corner + sides <= corner).any():  # a list's boxes are x, y, width, height, read as float32
        return None, "box empty"
    # Rounding errors in the annotation are not reported.
    moved = max(abs(a - b) for a, b in zip(clipped, box, strict=True))
    return clipped, "box partly outside the image" if moved > 0.01 else None


# ---------------------------------------------------------------------------------------------------------------------
# All images


def collect_results(name: str, annotations: SplitAnnotations, results: Sequence[CheckResult]) -> Split:
    """A split of checked images.

    Args:
        name: of the split.
        annotations: what the reader returned: the images' folder, and problems that belong to no image.
        results: of the split's images.
    """
    split = Split(name, annotations.image_root, [], list(annotations.problems), total=len(results))
    split.annotated = count_left_out(annotations.problems)
    for image, problems, annotated in results:
        split.problems += problems
        split.unread += annotated is None
        split.annotated += annotated or 0
        if image is not None:
            split.images.append(image)
    return split


def count_left_out(problems: Sequence[Problem]) -> int:
    """Number of objects that the reader left out."""
    return sum(ACTIONS[problem.kind] == "object left out" for problem in problems)


def finish_splits(splits: Sequence[Split], classes: Sequence[str], sources: Mapping[str, str]) -> list[Split]:
    """Checks all images together: the same image twice or nearly so, classes without objects.

    Args:
        splits: in the order of the command line; an image in two of them stays in the later one.
        classes: names in label order.
        sources: {name in the annotations: one of `classes`}. Objects of other names are left out.

    Returns:
        New splits, without duplicates and unused classes, with all problems.
    """
    finished: list[Split] = []
    later: dict[bytes, str] = {}  # digest of an image -> split and file name, in later splits
    for split in reversed(splits):
        images, problems = [], list(split.problems)
        seen: dict[bytes, str] = {}
        for image in split.images:
            if image.digest in later:
                sentence = f"{split.name}'s {image.file_name} is {later[image.digest]}"
                problems.append(Problem("image is in a later split too", sentence))
                continue
            if image.digest in seen:
                sentence = f"{image.file_name} has the pixels of {seen[image.digest]}"
                problems.append(Problem("image twice in the split", sentence))
            seen[image.digest] = image.file_name
            objects = {}  # by name and box: classes that were joined may have both marked one object
            for obj in image.objects:
                sentence = f"{image.file_name}: {obj.name} {obj.text or obj.box}"
                if obj.name not in sources:
                    problems.append(Problem("class that was not chosen", sentence))
                elif (sources[obj.name], obj.box) in objects:
                    problems.append(Problem("object twice", sentence))
                else:
                    objects[sources[obj.name], obj.box] = obj._replace(name=sources[obj.name])
            if not objects:
                problems.append(Problem("image without objects", image.file_name))
            images.append(replace(image, objects=list(objects.values())))
        present = {obj.name for image in images for obj in image.objects}
        problems += [Problem("class without objects", name) for name in classes if name not in present]
        later |= {digest: f"{split.name}'s {file_name}" for digest, file_name in seen.items()}
        problems += near_problems(split.name, images, finished)
        finished.append(replace(split, images=images, problems=problems))
    return finished[::-1]


def near_problems(name: str, images: Sequence[CheckedImage], later: Sequence[Split]) -> list[Problem]:
    """Returns a problem for each image of a split that is a near-duplicate of an image in a later split."""
    others = [(split.name, image) for split in later for image in split.images]
    if not images or not others:
        return []
    rows, similarity, mirrored = nearest(
        np.stack([image.descriptor for image in images]), np.stack([image.descriptor for _, image in others])
    )
    problems = []
    for place in np.flatnonzero(similarity >= SAME_SCENE):
        split, other = others[rows[place]]
        nearly = "nearly the mirror image of" if mirrored[place] else "nearly"
        sentence = f"{name}'s {images[place].file_name} is {nearly} {split}'s {other.file_name}"
        problems.append(Problem("image nearly in a later split too", f"{sentence} ({similarity[place]:.2f})"))
    return problems
