"""Annotations in a form common to all formats: the types that voc.py, coco.py and yolo.py return and checks.py checks.

A reader opens only the files that describe a split. The annotation of an image is parsed when its record is called.
"""

import codecs
import contextlib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fpnssd.data.images import DataError

ALL = "all"  # the name of all images together, where a data set has no splits
NOT_GIVEN = {"", "none", "null", "unspecified", "unknown"}  # None as a text, and what tools write for it
_NOT_IN_XML = re.compile("[\x00-\x08\x0a-\x1f\ufffe\uffff]")


class Problem(NamedTuple):
    """Something wrong, or worth a note, in a data set."""

    kind: str  # a key of checks.ACTIONS
    where: str  # the file, and the value


class RawObject(NamedTuple):
    """An object of an annotation file, before any check."""

    name: str  # class
    box: tuple[float, float, float, float]  # xyxy, continuous pixels; 0..1 of the image in a `normalized` record
    difficult: bool = False
    crowd: bool = False
    area: float | None = None  # square pixels, where it is not the box's
    text: str = ""  # the box as the file writes it, for messages
    truncated: bool | None = None  # cut off by the image's edge or hidden in part; None: the file does not say


@dataclass
class Record:
    """An image and its objects, as read from its annotation file, before any check."""

    file_name: str  # relative to the image folder
    annotation: str  # the annotation file
    objects: list[RawObject]
    size: tuple[float, float] | None = None  # (height, width); None: the file does not say
    normalized: bool = False  # boxes are in 0..1 of the image
    turned: bool = False  # boxes are of the image turned by its EXIF orientation, even if the size is that as stored
    image_id: int | str | None = None
    problems: list[Problem] = field(default_factory=list)  # found while reading


@dataclass
class SplitAnnotations:
    """What a reader returns for a split."""

    name: str
    image_root: Path
    records: list[Callable[[], Record]]  # one per image; calling it parses the image's annotation, or raises DataError
    problems: list[Problem] = field(default_factory=list)


def read_text(path: str | Path) -> str:
    """Returns the content of a text file in UTF-8, or in UTF-16 with its byte order mark.

    Raises:
        DataError: the file is neither.
    """
    content = Path(path).read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a UTF-8 text file", "annotation does not parse") from None


def read_lines(path: str | Path) -> list[str]:
    """Returns the lines of a text file (see read_text), stripped, without empty ones."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def relative_path(path: Path, folder: Path) -> str:
    """The path relative to the folder, with forward slashes; it starts with ../ if it is not below the folder."""
    return Path(os.path.relpath(path, folder)).as_posix()


def name_problem(name: str) -> str | None:
    """Why a file or class name cannot be written to UTF-8 text files and XML; None if it can."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not UTF-8"
    return "has a control character" if _NOT_IN_XML.search(name) else None


# ---------------------------------------------------------------------------------------------------------------------
# Values: numbers may be strings, and missing values are written in several ways


def parse_number(value: object) -> float:
    """Returns a number, or a string that holds one, as a float; NaN and infinity are accepted.

    Raises:
        ValueError: anything else; booleans too.
    """
    if isinstance(value, (int, float, str)) and not isinstance(value, bool) and "_" not in str(value):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    raise ValueError(f"{value!r:.80} is not a number")


def parse_flag(value: object) -> bool | None:
    """Returns a flag (1 or 0, true or false, also as strings) as a bool; None if it is empty, None or "Unspecified".

    Raises:
        ValueError: anything else.
    """
    word = str(value).strip().lower()
    if word in NOT_GIVEN:
        return None
    if word in ("true", "false"):
        return word == "true"
    with contextlib.suppress(ValueError):
        if (number := parse_number(value)) in (0, 1):
            return bool(number)
    raise ValueError(f"{value!r:.80} is neither 0 nor 1, true nor false")


def parse_flags(values: Mapping[str, object], where: str, problems: list[Problem]) -> dict[str, Any]:
    """Returns the flags difficult, crowd and truncated of a RawObject; an unreadable one is not set, but reported.

    Args:
        values: {field of the file: value as written}; COCO calls the field of crowds `iscrowd`.
        where: the file and the object, for problems.
        problems: list to which a problem is appended for each unreadable flag.
    """
    flags: dict[str, bool | None] = {}
    for field_name, value in values.items():
        flag = None
        try:
            flag = parse_flag(value)
        except ValueError as error:
            problems.append(Problem("flag unreadable", f"{where}: {field_name} {error}"))
        flags["crowd" if field_name == "iscrowd" else field_name] = flag
    return {**flags, "difficult": bool(flags["difficult"]), "crowd": bool(flags["crowd"])}


def rotated_box(box: tuple[float, float, float, float], degrees: object) -> tuple[float, float, float, float]:
    """The box around a box that is turned about its centre.

    Args:
        box: xyxy, before the turn.
        degrees: the angle; None, or anything that is not a finite number, for none.
    """
    try:
        angle = parse_number(degrees)
    except ValueError:
        return box
    if not math.isfinite(angle) or angle % 180 == 0:
        return box
    turn = math.radians(angle)
    x0, y0, x1, y1 = box
    width = abs((x1 - x0) * math.cos(turn)) + abs((y1 - y0) * math.sin(turn))
    height = abs((x1 - x0) * math.sin(turn)) + abs((y1 - y0) * math.cos(turn))
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def parse_size(height: object, width: object) -> tuple[float, float] | None:
    """(height, width) of an image; None where either is missing, empty, 0 or negative, as some tools write it.

    Raises:
        ValueError: either is not a number.
    """
    if any(str(side).strip().lower() in NOT_GIVEN for side in (height, width)):
        return None
    size = parse_number(height), parse_number(width)
    return None if min(size) <= 0 else size
