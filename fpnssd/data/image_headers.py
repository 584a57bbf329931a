"""Makes image files safe to open: removes unneeded metadata, and refuses headers with implausible values.

Pillow parses metadata when it opens a file. A broken block then makes an intact image unreadable, and a small file
can have tags that take gigabytes once parsed. Nothing here needs metadata other than the EXIF orientation.
"""

import io
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

ORIENTATION = 0x0112  # EXIF tag: 1 upright, 2..8 mirrored or turned
MAX_SCANS = 500  # of a progressive JPEG; encoders write about ten, and each costs a pass over the whole image
MAX_TILES_A_MEGAPIXEL = 2000  # of a JPEG 2000, whose decoder takes 8 kB for each; tiles have 256 x 256 pixels or more
MAX_TAG_VALUES = 400_000  # numbers in the tags of a TIFF; two of its colour palettes of 16 bits

_PNG_KEPT = (b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf")  # transparency, animation, EXIF
_TIFF_HEADERS = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"II+\0", b"MM\0+")  # all that Pillow opens
_TIFF_BYTE_TYPES = (1, 2, 6, 7)  # bytes and text, which stay as they are; other values become Python's numbers
_TIFF_TILE_SIDES = (322, 323)
_TIFF_DIRECTORIES = (34665, 34853, 40965)  # EXIF, GPS and interoperability
_DIB_HEADERS = {struct.pack("<I", size) for size in (12, 40, 52, 56, 64, 108, 124)}  # a BMP without its file header
_PNM_HEADER = re.compile(rb"P[456](?:(?:\s|#[^\r\n]*[\r\n])+\d+){2,3}\s")


class HeaderError(Exception):
    """A file's header is implausible or hostile; the message says why."""


def prepare(file: BinaryIO) -> BinaryIO:
    """Returns a file for PIL.Image.open with the same pixels, without metadata that is costly to parse.

    Args:
        file: an image file of any format, open for reading in binary mode and seekable.

    Returns:
        `file` itself where nothing had to change, else a file in memory.

    Raises:
        HeaderError: opening or decoding the file would take far more memory or time than its size justifies.
    """
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    if head[:3] == b"\xff\xd8\xff":
        return io.BytesIO(_clean_jpeg(file.read()))
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return io.BytesIO(_clean_png(file.read()))
    if head[:4] == b"GIF8":
        return io.BytesIO(_clean_gif(file.read()))
    if head[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1"):
        return io.BytesIO(_clean_avif(file.read()))
    if head[:4] in _TIFF_HEADERS:
        _check_tiff(file)
    elif head[:2] == b"BM" or head[:4] in _DIB_HEADERS:
        _check_bmp(file)
    elif head[:4] == b"\xff\x4f\xff\x51" or head[4:8] == b"jP  ":
        _check_jpeg2000(file.read())
    elif re.match(rb"P[1-6]", head) and not _PNM_HEADER.match(file.read(2**16)):
        raise HeaderError("it is not a binary PBM, PGM or PPM file, or its header is longer than 64 kB")
    file.seek(0)
    return file


def exif_orientation(exif: bytes) -> int:
    """Returns the orientation (1..8) of an EXIF block; 1 where there is none or the block is broken."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2], "")
    try:
        (start,) = struct.unpack_from(order + "L", exif, 4) if order else (len(exif),)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, place)
            if tag == ORIENTATION:
                (value,) = struct.unpack_from(order + ("L" if kind == 4 else "H"), exif, place + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def exif_with(orientation: int) -> bytes:
    """Returns an EXIF block that holds the orientation alone."""
    return b"Exif\0\0MM\0*" + struct.pack(">LHHHLHHL", 8, 1, ORIENTATION, 3, 1, orientation, 0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Formats of which Pillow parses too much: bytes of a file -> bytes of the same pixels


def _clean_jpeg(data: bytes) -> bytes:
    """Keeps the segments that decoding needs; a file of several images (MPO) becomes its first one."""
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise HeaderError(f"it has more than {MAX_SCANS} scans")
    kept, orientation, place = [], 1, 2
    while data[place : place + 1] == b"\xff" and len(data) - place >= 4:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker in (0x00, 0x01, 0xDA) or 0xD0 <= marker <= 0xD9:  # from the start of the scan on: unchanged
            break
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        segment = data[place:end]
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            orientation = max(orientation, exif_orientation(segment[4:]))
        elif marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):  # JFIF, Adobe; no APPn, comment
            kept.append(segment)
        place = end
    exif = exif_with(orientation)
    return b"".join([data[:2], b"\xff\xe1", struct.pack(">H", len(exif) + 2), exif, *kept, data[place:]])


def _clean_png(data: bytes) -> bytes:
    """Keeps the critical chunks, whose names begin with a capital, and few others."""
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        kind = data[place + 4 : place + 8]
        if not kind[0] & 0x20 or kind in _PNG_KEPT:
            kept.append(data[place:end])
        place = end
    return b"".join([*kept, data[place:]])


def _clean_gif(data: bytes) -> bytes:
    """Drops the extensions other than graphic control: Pillow takes minutes to join a comment of many blocks."""

    def palette_bytes(flags: int) -> int:
        return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0

    place = 13 + palette_bytes(data[10])
    kept = [data[:place]]
    while data[place : place + 1] in (b"!", b","):  # an extension or an image
        is_image = data[place] == ord(",")
        end = place + (11 + palette_bytes(data[place + 9]) if is_image else 2)
        while data[end : end + 1] > b"\0":  # length of a block
            end += data[end] + 1
        if is_image or data[place + 1] == 0xF9:
            kept.append(data[place : end + 1])
        place = end + 1
    return b"".join([*kept, data[place:]])


def _clean_avif(data: bytes) -> bytes:
    """Renames the EXIF item, so that it is ignored: an AVIF's orientation is a property of the image itself."""
    # infe: version, flags (3 bytes), id (2 or 4), protection (2), type.
    return re.sub(rb"(infe[\x02\x03]...(?:..|....)..)Exif", rb"\1skip", data, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------------
# Formats that are read unchanged or refused


def _check_jpeg2000(data: bytes) -> None:
    """Refuses a file whose header and codestream differ in size: decoders use the second."""
    place = data.find(b"\xff\x4f\xff\x51")
    if place < 0 or len(data) < place + 40:
        raise HeaderError("it has no codestream")
    right, bottom, left, top, *tile, tile_left, tile_top = struct.unpack_from(">8L", data, place + 8)
    width, height = right - left, bottom - top
    header = data.find(b"ihdr", 0, place)
    if header >= 0 and struct.unpack_from(">2L", data, header + 4) != (height, width):
        raise HeaderError(f"its header and its codestream ({width} x {height} pixels) differ in size")
    if all(tile):
        tiles = -((tile_left - right) // tile[0]) * -((tile_top - bottom) // tile[1])
        if tiles > 100 + MAX_TILES_A_MEGAPIXEL * width * height / 1e6:
            raise HeaderError(f"it has {tiles:,} tiles of {tile[0]} x {tile[1]} pixels")


def _check_bmp(file: BinaryIO) -> None:
    """Refuses run-length coding: Pillow decodes it in Python, and a few bytes of it can skip gigabytes."""
    head = file.read(34).ljust(34, b"\0")
    header_bytes, compression = struct.unpack_from("<I12xI", head, 14 if head[:2] == b"BM" else 0)
    if header_bytes > 12 and compression in (1, 2):  # the oldest header has no compression
        raise HeaderError("it is a run-length coded BMP: save it without compression")


def _check_tiff(file: BinaryIO) -> None:
    """Walks the first directory and those below it; Pillow reads every value of each into memory."""
    head = file.read(16).ljust(16, b"\0")
    order = "<" if head[:2] == b"II" else ">"
    big = head[2] == ord("+")  # as Pillow decides it
    file_bytes = file.seek(0, io.SEEK_END)
    pending = list(struct.unpack_from(order + ("Q" if big else "L"), head, 8 if big else 4))
    seen: set[int] = set()
    values = numbers = 0
    sides = []
    while pending:
        start = pending.pop()
        if start in seen:
            continue
        seen.add(start)
        for tag, kind, count, value in _tiff_entries(file, start, order, big):
            values += count
            numbers += 0 if kind in _TIFF_BYTE_TYPES else count
            if tag in _TIFF_TILE_SIDES:
                sides.append(value)
            if tag in _TIFF_DIRECTORIES:
                pending.append(value)
    if values > 4 * file_bytes or numbers > MAX_TAG_VALUES:
        raise HeaderError(f"its tags have {values:,} values, in a file of {file_bytes:,} bytes")
    if len(sides) == 2 and sides[0] * sides[1] > 2**24:
        raise HeaderError(f"its tiles have {sides[0]} x {sides[1]} pixels")


def _tiff_entries(file: BinaryIO, start: int, order: str, big: bool) -> Iterator[tuple[int, int, int, int]]:
    """Yields (tag, type, number of values, value or offset) of one directory."""
    count_size, entry_format = (8, order + "HHQQ") if big else (2, order + "HHLL")
    file.seek(start)
    count = int.from_bytes(file.read(count_size), "little" if order == "<" else "big")
    size = struct.calcsize(entry_format)
    data = file.read(size * min(count, 65_536))
    for place in range(0, len(data) - size + 1, size):
        tag, kind, values, value = struct.unpack_from(entry_format, data, place)
        if kind == 3:  # a short lies at the beginning of the field
            (value,) = struct.unpack_from(order + "H", data, place + struct.calcsize(entry_format[:4]))
        yield tag, kind, values, value
