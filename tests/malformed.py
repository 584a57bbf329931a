"""Pictures that are none, for tests of what takes pictures from anybody."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

FORMS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
ANIMATED = ("GIF", "WEBP", "PNG", "TIFF")


def malformed_pictures(count, seed=0):
    """`count` files as bytes: by turns cut short, with bits flipped, with another head, noise, of absurd sizes,
    empty or without any pixel, and animated (which are fine, but odd)."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    whole = [encoded(Image.fromarray(pixels), form) for form in FORMS]
    frames = [Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(3)]
    nothing = (b"", png_header(0, 0), png_header(0, 100), b"GIF89a" + bytes(7), b"%PDF-1.4 %", b"hello")
    for number in range(count):
        turn, kind = divmod(number, 10)
        data = bytearray(whole[rng.integers(len(whole))])
        if kind in (0, 1):
            data = data[: rng.integers(0, len(data))]
        elif kind in (2, 3, 4):
            for place in rng.integers(0, len(data) if kind == 2 else min(len(data), 200), 8):
                data[place] ^= 1 << int(rng.integers(8))
        elif kind == 5:
            data[:64] = rng.bytes(64)
        elif kind == 6:
            data = rng.bytes(int(rng.integers(0, 2000)))
        elif kind == 7:
            data = png_header(*(int(side) for side in 2 ** rng.integers(13, 31, 2)))
        elif kind == 8:
            data = nothing[turn % len(nothing)]
        else:
            form = ANIMATED[turn % len(ANIMATED)]
            data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        yield bytes(data)


def encoded(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png_header(width, height):
    """A PNG of these sizes without any pixel."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def resident_bytes(process="self"):
    """What a process holds in memory now; Linux only."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * 4096
