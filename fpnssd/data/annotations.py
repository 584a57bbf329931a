"""What an annotation says of an image, whatever its form: the types that the readers return and checks.py judges.

voc.py, coco.py and yolo.py read the three formats. A reader opens the splits' own files alone; an image's annotation is
parsed when its record is called.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fpnssd.data.images import DataError


class Problem(NamedTuple):
    """Something wrong, or worth a note, in a data set."""

    kind: str  # a key of checks.ACTIONS
    where: str  # the file, and the value


class RawObject(NamedTuple):
    """An object as an annotation file gives it, before any check."""

    name: str  # class
    box: tuple[float, float, float, float]  # xyxy, continuous pixels; 0..1 of the image in a `normalized` record
    difficult: bool = False
    crowd: bool = False
    area: float | None = None  # square pixels, where it is not the box's
    text: str = ""  # the box as the file writes it, for messages
    truncated: bool | None = None  # cut off by the image's edge or hidden in part; None: the file does not say


@dataclass
class Record:
    """An image as its annotation file describes it, before any check."""

    file_name: str  # relative to the image folder
    annotation: str  # the annotation file
    objects: list[RawObject]
    size: tuple[float, float] | None = None  # (height, width); None: the file does not say
    normalized: bool = False  # boxes are in 0..1 of the image
    image_id: int | str | None = None
    problems: list[Problem] = field(default_factory=list)  # met while reading


@dataclass
class SplitAnnotations:
    """What a reader returns for a split."""

    name: str
    image_root: Path
    records: list[Callable[[], Record]]  # one a image; calling it parses the image's annotation, or raises DataError
    problems: list[Problem] = field(default_factory=list)


def read_lines(path: str | Path) -> list[str]:
    """Returns a UTF-8 text file's lines, stripped, without empty ones.

    Raises:
        DataError: it is no UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text file", "annotation does not parse") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def relative_path(path: Path, folder: Path) -> str:
    """The path seen from the folder, with forward slashes; one that is not below it starts with ../"""
    return Path(os.path.relpath(path, folder)).as_posix()
