"""Image files are made safe to open: their metadata is reduced to the EXIF orientation, and absurd headers are refused.

Pillow parses metadata when it opens a file. A broken block then costs an image whose pixels are whole, and a small file
can hold tags that take gigabytes once parsed. Nothing here needs metadata other than the orientation.
"""

import io
import re
import struct
import zlib
from typing import BinaryIO

import numpy as np

ORIENTATION = 0x0112  # EXIF tag: 1 upright, 2..8 mirrored or turned
MAX_SCANS = 500  # of a progressive JPEG; encoders write about ten, and each costs a pass over the whole image
MAX_COMMENTS = 10_000  # of a plain PPM
MAX_STRIPS = 100_000  # strips or tiles of a TIFF
MAX_TILES_A_MEGAPIXEL = 2000  # of a JPEG 2000, whose decoder takes 8 kB for each; tiles have 256 x 256 pixels or more
MAX_TAG_VALUES = 400_000  # numbers in the tags of a TIFF; two of its colour palettes of 16 bits

_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_STRIPS = {273, 279, 324, 325}  # offsets and lengths of strips and tiles
_TIFF_SIDES = {322, 323}  # of a tile
_TIFF_DIRECTORIES = {34665, 34853, 40965}  # EXIF, GPS and interoperability
_DIB_HEADERS = {struct.pack("<I", size) for size in (12, 40, 52, 56, 64, 108, 124)}  # a BMP without its file header
_PPM_COMMENT = re.compile(rb"#[^\r\n]*")
_PPM_HEADER = re.compile(rb"P([2356])%b(\d+)%b(\d+)%b(\d+)\s" % ((rb"(?:\s|#[^\r\n]*[\r\n])+",) * 3))
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


class HeaderError(Exception):
    """A file's header is absurd or hostile; the message says what is wrong."""


def prepare(file: BinaryIO) -> BinaryIO:
    """Returns a file for PIL.Image.open with the same pixels and no metadata but the orientation.

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
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _check_tiff(file)
        return file
    if head[:2] == b"BM" or head[:4] in _DIB_HEADERS:
        _check_bmp(file)
        return file
    for matches, clean in _CLEANERS:
        if matches(head):
            return io.BytesIO(clean(file.read()))
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


def _xmp_orientation(xmp: bytes) -> int:
    match = _XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else 1


# ---------------------------------------------------------------------------------------------------------------------
# One function for each format: bytes of a file -> bytes without metadata


def _clean_jpeg(data: bytes) -> bytes:
    """Keeps the segments that decoding needs; a file of several images (MPO) becomes its first one."""
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise HeaderError(f"it has more than {MAX_SCANS} scans")
    kept, orientation, xmp_orientation, place = [], None, 1, 2
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
            orientation = orientation or exif_orientation(segment[4:])
        elif marker == 0xE1:
            xmp_orientation = max(xmp_orientation, _xmp_orientation(segment))
        elif marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):  # JFIF, Adobe; no APPn, comment
            kept.append(segment)
        place = end
    orientation = xmp_orientation if orientation in (None, 1) else orientation
    if orientation > 1:
        exif = exif_with(orientation)
        kept.insert(0, b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif)
    return b"".join([data[:2], *kept, data[place:]])


def _clean_png(data: bytes) -> bytes:
    """Keeps the critical chunks, transparency and animation."""
    orientation, kept, start, place = 1, [data[:8]], 8, 8
    while place + 12 <= len(data):
        (length,), kind = struct.unpack_from(">L", data, place), data[place + 4 : place + 8]
        content, end = (place + 8, place + 8 + length), place + 12 + length
        if kind[0] & 0x20 and kind not in (b"tRNS", b"acTL", b"fcTL", b"fdAT"):  # a small first letter: ancillary
            kept.append(data[start:place])
            start = end
            if kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                orientation = max(orientation, _png_orientation(kind, data[slice(*content)]))
        elif kind == b"IHDR" and orientation == 1:
            kept.append(data[start:end])
            start = end
        place = end
    kept.append(data[start:])
    if orientation > 1:
        body = b"eXIf" + exif_with(orientation).removeprefix(b"Exif\0\0")
        kept.insert(2, struct.pack(">L", len(body) - 4) + body + struct.pack(">L", zlib.crc32(body)))
    return b"".join(kept)


def _png_orientation(kind: bytes, content: bytes) -> int:
    """Of the EXIF chunk, of XMP, or of EXIF as hexadecimal text, which ImageMagick used to write."""
    if kind == b"eXIf":
        return exif_orientation(content)
    if content.startswith(b"XML:com.adobe.xmp\0"):
        return _xmp_orientation(content)
    if content.startswith(b"Raw profile type exif\0"):
        text = content[22:]
        try:
            if kind == b"zTXt":
                text = zlib.decompressobj().decompress(text[1:], 2**18)
            return exif_orientation(bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:])))
        except (ValueError, zlib.error):
            pass
    return 1


def _clean_gif(data: bytes) -> bytes:
    """Drops the extensions other than graphic control: Pillow takes minutes to join a comment of many blocks."""

    def colours(flags):
        return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0

    def end_of_blocks(place):
        while place < len(data) and data[place]:
            place += data[place] + 1
        return place + 1

    if len(data) < 13:
        return data
    start, place = 0, 13 + colours(data[10])
    kept = []
    while place + 10 < len(data):
        if data[place] == 0x21:  # an extension
            end = end_of_blocks(place + 2)
            if data[place + 1] != 0xF9:
                kept.append(data[start:place])
                start = end
            place = end
        elif data[place] == 0x2C:  # an image
            place = end_of_blocks(place + 11 + colours(data[place + 9]))
        else:
            break
    return b"".join([*kept, data[start:]])


def _clean_avif(data: bytes) -> bytes:
    """Renames the EXIF item, so that it is passed over: an AVIF's orientation is a property of the image itself."""
    return re.sub(rb"(infe[\x02\x03]\0\0.(?:..|....)\0\0)Exif", rb"\1skip", data, flags=re.DOTALL)


def _clean_ppm(data: bytes) -> bytes:
    """Rewrites what Pillow decodes in Python, seconds a megapixel: plain text, and maxima other than 255 or 65535."""
    if data[1:2] in b"123" and data.count(b"#") > MAX_COMMENTS:
        raise HeaderError(f"it has more than {MAX_COMMENTS:,} comments")
    head, plain = data[:65_536], data[1:2] in b"123"
    if len(data) > len(head) and len(_PPM_COMMENT.sub(b"", head).split(None, 3)) < 4:
        raise HeaderError("its header is longer than 64 kB")
    match = _PPM_HEADER.match(head)
    kind, width, height, largest = (int(part) for part in match.groups()) if match else (0, 0, 0, 0)
    if match is None or not 0 < largest < 65_536 or (kind > 3 and largest in (255, 65_535)):
        return _PPM_COMMENT.sub(b"", data) if plain else data
    if plain:
        text = _PPM_COMMENT.sub(b"", data[match.end() :])
        samples = np.fromstring(text.decode("latin-1"), np.int64, sep=" ")
        if len(samples) and not 0 <= samples.min() <= samples.max() <= largest:
            raise HeaderError("it has a sample outside of its range")
    else:
        wide = np.dtype(">u2" if largest > 255 else np.uint8)
        samples = np.frombuffer(data, wide, (len(data) - match.end()) // wide.itemsize, match.end())
    grey = kind in (2, 5)
    scaled_to = 65535 if grey and largest > 255 else 255
    table = np.rint(np.arange(largest + 1) / largest * scaled_to).astype(">u2" if scaled_to > 255 else np.uint8)
    pixels = table[samples[: width * height * (1 if grey else 3)].clip(max=largest)].tobytes()
    return b"P%d\n%d %d\n%d\n" % (5 if grey else 6, width, height, scaled_to) + pixels


def _check_jpeg2000(data: bytes) -> bytes:
    """Refuses a file whose header and codestream differ in size: the second is what is decoded."""
    place = data.find(b"\xff\x4f\xff\x51")
    if place < 0 or len(data) < place + 24:
        raise HeaderError("it has no codestream")
    right, bottom, left, top = struct.unpack_from(">4L", data, place + 8)
    header = data.find(b"ihdr", 0, place)
    if header >= 0 and struct.unpack_from(">2L", data, header + 4) != (bottom - top, right - left):
        raise HeaderError(f"its header and its codestream ({right - left} x {bottom - top} pixels) differ in size")
    tile_width, tile_height, tile_left, tile_top = struct.unpack_from(">4L", data.ljust(place + 40, b"\0"), place + 24)
    if tile_width and tile_height:
        tiles = -((tile_left - right) // tile_width) * -((tile_top - bottom) // tile_height)
        if tiles > 100 + MAX_TILES_A_MEGAPIXEL * (right - left) * (bottom - top) / 1e6:
            raise HeaderError(f"it has {tiles:,} tiles of {tile_width} x {tile_height} pixels")
    return data


def _check_bmp(file: BinaryIO) -> None:
    """Refuses run-length coding that Pillow, which decodes it in Python, needs much memory or time for."""
    head = file.read(34)
    file_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = 14 if head[:2] == b"BM" else 0
    if len(head) < start + 20:
        return
    width, height, _, compression = struct.unpack_from("<IiII", head, start + 4)
    if compression not in (1, 2):  # RLE8 and RLE4
        return
    pixels = width * abs(height)
    if 255 * width > 4 * pixels + 2**24:  # one code can skip 255 rows, also of an image that has fewer
        raise HeaderError(f"it is run-length coded and has only {abs(height)} rows of {width:,} pixels")
    if file_bytes > 2 * pixels + 4 * abs(height) + 2**16:  # codes without pixels; the longest sensible one has 2 bytes
        raise HeaderError(f"it has {file_bytes:,} bytes of run-length codes for {pixels:,} pixels")


_CLEANERS = (
    (lambda head: head[:3] == b"\xff\xd8\xff", _clean_jpeg),
    (lambda head: head[:8] == b"\x89PNG\r\n\x1a\n", _clean_png),
    (lambda head: head[:4] == b"GIF8", _clean_gif),
    (lambda head: head[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1"), _clean_avif),
    (lambda head: head[:1] == b"P" and head[1:2] in b"0123456fy", _clean_ppm),
    (lambda head: head[:4] == b"\xff\x4f\xff\x51" or head[4:8] == b"jP  ", _check_jpeg2000),
)


# ---------------------------------------------------------------------------------------------------------------------
# TIFF: its tags are its header, so they are checked and stay


def _check_tiff(file: BinaryIO) -> None:
    """Walks the first directory and those below it; Pillow reads every value of each into memory."""
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = head[2 if order == "<" else 3] == 43
    file_bytes = file.seek(0, io.SEEK_END)
    pending, seen = (
        [struct.unpack_from(order + ("Q" if big else "L"), head.ljust(16, b"\0"), 8 if big else 4)[0]],
        set(),
    )
    total_bytes = total_values = 0
    sides = []
    while pending:
        start = pending.pop()
        if start in seen:
            continue
        seen.add(start)
        for tag, kind, count, value in _tiff_entries(file, start, order, big):
            size = _TIFF_BYTES.get(kind, 1)
            count = min(count, max(0, file_bytes - value) // size) if count * size > 4 else count  # what can be read
            total_bytes += count * size
            if tag in _TIFF_STRIPS:
                if count > MAX_STRIPS:
                    raise HeaderError(f"it has {count:,} strips or tiles")
            elif kind not in (1, 2, 6, 7):  # texts and bytes stay as they are, numbers become Python's
                total_values += count
            if tag in _TIFF_SIDES:
                sides.append(value)
            if tag in _TIFF_DIRECTORIES:
                pending.append(value)
    if total_bytes > 4 * file_bytes or total_values > MAX_TAG_VALUES:
        raise HeaderError(f"its tags hold {total_bytes:,} bytes in a file of {file_bytes:,}")
    if len(sides) == 2 and sides[0] * sides[1] > 2**24:
        raise HeaderError(f"its tiles have {sides[0]} x {sides[1]} pixels")
    file.seek(0)


def _tiff_entries(file: BinaryIO, start: int, order: str, big: bool):
    """Yields (tag, type, number of values, value or offset) of one directory."""
    count_format, entry_format = ("Q", "HHQQ") if big else ("H", "HHLL")
    file.seek(start)
    head = file.read(struct.calcsize(order + count_format))
    if len(head) < struct.calcsize(order + count_format):
        return
    (count,) = struct.unpack(order + count_format, head)
    size = struct.calcsize(order + entry_format)
    data = file.read(size * min(count, 65_536))
    for place in range(0, len(data) - size + 1, size):
        tag, kind, values, value = struct.unpack_from(order + entry_format, data, place)
        if kind == 3:  # a short lies at the beginning of the field
            (value,) = struct.unpack_from(order + "H", data, place + struct.calcsize(order + entry_format[:3]))
        yield tag, kind, values, value
