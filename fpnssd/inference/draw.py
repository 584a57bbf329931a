"""Draws detections on an image: boxes in the colours of their classes, and labels that do not overlap."""

import functools
import importlib.util
import os
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from fpnssd.inference.detector import Detections

Colour = tuple[int, int, int]  # RGB, 0..255
Box = Sequence[float]  # left, top, right, bottom in pixels

# Chosen among saturated colours so that the nearest two of the first 20 are 40 apart in CIELAB (a difference of 2 is
# just visible), each far from those before it.
PALETTE: tuple[Colour, ...] = (
    (255, 0, 0), (0, 0, 255), (0, 255, 0), (105, 195, 255), (165, 135, 0), (255, 15, 135), (0, 255, 165), (0, 105, 255),
    (255, 0, 255), (255, 135, 0), (0, 255, 255), (0, 105, 0), (135, 15, 165), (240, 240, 0), (180, 30, 45),
    (45, 135, 120), (210, 150, 255), (105, 195, 30), (255, 195, 150), (135, 30, 90), (0, 90, 150), (105, 60, 30),
    (180, 225, 150), (240, 135, 165),
)  # fmt: skip
MAX_LABELS = 300  # with more detections only the best ones get a label
FONT_SUFFIXES = {".ttf", ".otf", ".ttc"}


def class_colour(label: int) -> Colour:
    """The colour of a class: distinct for labels 1..24; each further round of 24 is a third darker."""
    round_number, place = divmod(label - 1, len(PALETTE))
    red, green, blue = (round(value * (2 / 3) ** round_number) for value in PALETTE[place])
    return red, green, blue


def text_colour(background: Colour) -> str:
    """ "black" or "white", whichever is legible on a background (by its luma, ITU-R BT.601)."""
    red, green, blue = background
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "white"


def annotate(image: Image.Image, detections: Detections) -> Image.Image:
    """Draws detections on a copy of an image. Line width and text grow with the image; better detections are on top.

    Args:
        image: RGB, as large as the detections' `size`.
        detections: boxes in pixels of the image.

    Returns:
        A new RGB image.
    """
    annotated = image.copy()
    draw = ImageDraw.Draw(annotated)
    side = min(max(annotated.size), 5 * min(annotated.size))
    line, text_size = max(2, round(side / 250)), max(11, round(side / 40))
    rows = detections.rows()
    for box, _, label, _ in reversed(rows):
        draw.rectangle(box, outline=class_colour(label), width=line)

    plates: list[Box] = []
    texts = []
    for box, score, label, name in rows[:MAX_LABELS]:  # the best detections choose their places first
        shown_name, font = label_text(name, label, text_size)
        text = f"{shown_name} {score:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        plate_size = (right - left + 2 * line, bottom - top + 2 * line)
        plates.append(place_label(box, plate_size, annotated.size, plates))
        texts.append((text, font, (line - left, line - top), class_colour(label)))
    for plate, (text, font, (x, y), colour) in reversed(list(zip(plates, texts, strict=True))):
        draw.rectangle(tuple(plate), fill=colour)
        draw.text((plate[0] + x, plate[1] + y), text, font=font, fill=text_colour(colour))
    return annotated


# ---------------------------------------------------------------------------------------------------------------------
# Where labels go


def place_label(box: Box, size: tuple[float, float], image_size: tuple[int, int], placed: Sequence[Box]) -> Box:
    """A place for the label of a box, inside the image, that covers as little as possible of the labels before it.

    The first free one of: above the box, inside its upper edge, at its upper right, below it, inside its lower edge;
    then the places nearest to its upper left corner in rows over the whole image.

    Args:
        box: what the label belongs to.
        size: (width, height) of the label.
        image_size: (width, height) of the image.
        placed: the labels placed before.
    """
    (left, top, right, bottom), (width, height) = box, size
    limit = np.maximum(0, np.subtract(image_size, size))
    corners = [(left, top - height), (left, top), (right - width, top), (left, bottom), (left, bottom - height)]
    places = np.clip(corners, 0, limit)
    areas = covered_areas(places, size, placed)
    if areas.all():
        columns, rows = np.meshgrid(np.arange(0, limit[0] + 1, width), np.arange(0, limit[1] + 1, height))
        grid = np.stack([columns.ravel(), rows.ravel()], axis=1)
        nearest_first = np.hypot(*(grid - (left, top)).T).argsort(kind="stable")
        places = np.concatenate([places, grid[nearest_first]])
        areas = covered_areas(places, size, placed)
    x, y = places[areas.argmin()].tolist()  # the first of the least covered
    return x, y, x + width, y + height


def covered_areas(places: np.ndarray, size: tuple[float, float], placed: Sequence[Box]) -> np.ndarray:
    """How much (n,) a box of this size covers of the boxes `placed`, with its upper left corner at each of `places`
    (n, 2)."""
    boxes = np.reshape(placed, (-1, 4))
    low = np.maximum(places[:, None], boxes[:, :2])
    high = np.minimum(places[:, None] + size, boxes[:, 2:])
    return (high - low).clip(min=0).prod(axis=2).sum(axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Fonts


def label_text(name: str, label: int, size: int) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """The name of a class and a font of this size that has its characters; without such a font the class's number."""
    name = " ".join(unicodedata.normalize("NFC", name).split())
    path = find_font(name, label)
    if path is None:
        return str(label), ImageFont.load_default(size)
    return name, open_font(path, size)


@functools.lru_cache(32)
def open_font(path: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font file in this size; "" is Pillow's own font, which has Latin letters."""
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@functools.cache
def find_font(name: str, label: int) -> str | None:
    """The first font file with every character of a class's name ("" is Pillow's own font). None, and a note on stderr,
    if no installed font has them."""
    shaped = any(unicodedata.bidirectional(character) in ("R", "AL") for character in name)
    if not shaped or features.check("raqm"):  # without raqm Pillow draws Arabic and Hebrew from left to right, unjoined
        for path in ("", *system_fonts()):
            if has_characters(path, name):
                return path
    print(f"no installed font has the characters of {name!r}: labels show its number, {label}", file=sys.stderr)
    return None


def has_characters(path: str, text: str) -> bool:
    """Whether a font file has a glyph for every visible character of a text."""
    try:
        font = open_font(path, 16)
        absent = _glyph(font, "\U0010ffff")  # not a character: drawn like any that the font lacks
        visible = {c for c in text if not c.isspace() and unicodedata.category(c) != "Cf"}
        return all(_glyph(font, character) not in (None, absent) for character in visible)
    except (OSError, ValueError):  # a damaged font, one of bitmaps in another size; half a character in the text
        return False


def _glyph(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, character: str) -> tuple[tuple[int, int], bytes] | None:
    """The form of a character; None if it is blank."""
    mask = font.getmask(character)
    return (mask.size, bytes(mask)) if mask.getbbox() else None


@functools.cache
def system_fonts() -> tuple[str, ...]:
    """The font files of this machine: matplotlib's DejaVu Sans first (Latin, Cyrillic, Greek, Arabic), then the
    system's, regular weights first."""
    folders = {
        "darwin": ["/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"],
        "win32": [os.path.join(os.environ.get("WINDIR", r"C:\Windows"), "Fonts")],
    }.get(sys.platform, ["/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts"])
    paths = []
    matplotlib = importlib.util.find_spec("matplotlib")  # its folder alone: importing it takes most of a second
    if matplotlib and matplotlib.origin:
        paths.append(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")
    for folder in folders:
        files = [path for path in Path(folder).expanduser().rglob("*") if path.suffix.lower() in FONT_SUFFIXES]
        paths += sorted(files, key=lambda path: ("regular" not in path.name.lower(), path))
    # Apple's last resort draws every character as the frame of its script.
    return tuple(str(path) for path in paths if path.is_file() and not path.name.startswith("LastResort"))
