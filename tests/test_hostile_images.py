"""Image files that attack whoever opens them, or whose metadata is broken: each costs little, or is a DataError."""

import contextlib
import io
import itertools
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from malformed import encoded
from PIL import Image, ImageOps, features

from create_data_lists import main as create_data_lists
from fpnssd.data.image_headers import MAX_SCANS, exif_orientation, exif_with, prepare
from fpnssd.data.images import DataError, load_image, open_image

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
FORMATS = ["JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "TGA", "PPM"]
FORMATS += [name for name, feature in (("AVIF", "avif"), ("JPEG2000", "jpg_2000")) if features.check(feature)]
with_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def jpeg_segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def with_exif(form, exif):
    """IMAGE with an EXIF block of any bytes, in one segment or, of a JPEG, in as many as it takes."""
    if form == "JPEG":
        data = encoded(IMAGE, form)
        parts = (exif[k : k + 60_000] for k in range(0, len(exif), 60_000))
        return data[:2] + b"".join(jpeg_segment(0xE1, b"Exif\0\0" + part) for part in parts) + data[20:]
    if form == "PNG":
        data = encoded(IMAGE, form)
        return data[:33] + png_chunk(b"eXIf", exif) + data[33:]
    if form == "AVIF":  # Pillow refuses to write what it cannot parse: put it where a whole block was
        whole = Image.Exif()
        whole[0x010E] = "x" * len(exif)
        data = encoded(IMAGE, form, exif=whole.tobytes())
        place = re.search(rb"II\*\0|MM\0\*", data).start()
        exif = exif.ljust(26, b"\xee")
        return data[:place] + exif + data[place + len(exif) :]
    return encoded(IMAGE, form, exif=exif)


def tiff(entries, data=b""):
    """An uncompressed TIFF of IMAGE: its tags, then more of them, each (tag, type, count, value or offset)."""
    names = {tag for tag, *_ in entries}
    start = 8 + 2 + 12 * (9 + len(entries)) + 4
    own = [(256, 4, 1, 64), (257, 4, 1, 48), (258, 3, 3, start), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, start + 8)]
    own += [(277, 3, 1, 3), (278, 4, 1, 48), (279, 4, 1, 64 * 48 * 3)]
    rows = sorted([entry for entry in own if entry[0] not in names] + entries)
    directory = b"".join(struct.pack("<HHII", *row) for row in rows) + bytes(12 * (9 + len(entries) - len(rows)))
    pixels = struct.pack("<4H", 8, 8, 8, 0) + IMAGE.tobytes()
    return b"II*\0" + struct.pack("<IH", 8, len(rows)) + directory + bytes(4) + pixels + data


def overlapping_tags(size, count):
    """An EXIF block of `size` bytes with `count` tags, each of which holds nearly all of it."""
    tags = b"".join(struct.pack("<HHII", 1000 + k, 7, size - 16, 0) for k in range(count))
    return (b"II*\0" + struct.pack("<IH", 8, count) + tags).ljust(size, b"\0")


def post_script(marker):
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(" + str(marker).encode() + b") (w) file closefile\n"


def iptc(content):
    """An IPTC file, in which Pillow would open any image by a bare Image.open."""
    fields = {(3, 60): b"\1\1", (3, 65): b"\1", (3, 20): b"\0\x40", (3, 30): b"\0\x30", (3, 120): b"\1"}
    fields[8, 10] = content
    return b"".join(bytes([0x1C, *key]) + struct.pack(">H", len(value)) + value for key, value in fields.items())


def not_images(marker):
    png = encoded(Image.new("RGB", (600, 600)), "PNG")
    cards = (f"{name:<8}= {value:>20}".ljust(80) for name, value in zip(
        ("SIMPLE", "BITPIX", "NAXIS", "NAXIS1", "NAXIS2"), ("T", 8, 2, 9000, 9000), strict=True))  # fmt: skip
    yield "eps", post_script(marker)
    yield "iptc", iptc(post_script(marker))
    yield "ico", b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 24, len(png), 22) + png
    yield "fits", ("".join(cards) + "END").ljust(2880).encode() + bytes(2000)
    yield "pdf", b"%PDF-1.4\n"
    yield "wmf", b"\xd7\xcd\xc6\x9a\0\0" + bytes(60)


def test_only_formats_that_decode_their_own_pixels_are_opened(tmp_path):
    for name, data in not_images(tmp_path / "written"):
        path = tmp_path / f"{name}.jpg"
        path.write_bytes(data)
        for source in (data, path):
            with pytest.raises(DataError, match="is not a readable image"):
                load_image(source)
    assert not (tmp_path / "written").exists()


def test_a_data_list_leaves_them_out(tmp_path, capsys):
    images, labels = tmp_path / "images" / "train", tmp_path / "labels" / "train"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    attacks = dict(not_images(tmp_path / "written")) | {"good": encoded(IMAGE, "JPEG"), "good2": encoded(IMAGE, "PNG")}
    for name, data in attacks.items():
        (images / f"{name}.jpg").write_bytes(data)
        (labels / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [thing]\n")
    create_data_lists(
        ["--yolo", str(tmp_path / "data.yaml"), "--splits", "train", "--out", str(tmp_path / "out"), "--allow-loss"]
    )
    assert '"images": [' in (tmp_path / "out" / "train.json").read_text()
    listed = (tmp_path / "out" / "train.json").read_text()
    assert [name for name in attacks if f"{name}.jpg" in listed] == ["good", "good2"]
    assert "not an image" in capsys.readouterr().out
    assert not (tmp_path / "written").exists()


def test_the_endpoint_refuses_them_before_the_network(tmp_path):
    app = pytest.importorskip("app")
    service = app.Service(None, app.Limits())
    attack, cut = iptc(post_script(tmp_path / "written")), encoded(IMAGE, "JPEG")[:400]
    for data, said in ((attack, "is not a readable image"), (cut, "is damaged")):
        with pytest.raises(DataError, match=f"a.jpg {said}"):
            service.run_network(data, "a.jpg")
    assert not (tmp_path / "written").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


BROKEN_EXIF = [
    b"no TIFF header here",
    b"",
    b"II*\0\xff\xff\xff\x7f",
    b"MM\0*\0\0\0\x08\xff\xff" + bytes(30),
    b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x8769, 4, 1, 2**31),
]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", pytest.param("AVIF", marks=with_avif)])
@pytest.mark.parametrize("exif", BROKEN_EXIF)
def test_a_broken_exif_block_costs_no_image(tmp_path, form, exif):
    plain, data = encoded(IMAGE, form), with_exif(form, exif)
    with Image.open(io.BytesIO(plain)) as opened:
        expected = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(data)), expected)
    (tmp_path / "a.jpg").write_bytes(data)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.jpg")), expected)
    if form != "AVIF":  # which plain Pillow does not open
        np.testing.assert_array_equal(np.asarray(load_image(Image.open(io.BytesIO(data)))), expected)


@pytest.mark.parametrize("kind", [0x8769, 0x8825])
def test_a_broken_directory_costs_no_tiff(kind):
    for place in (2**31, 5, 60):
        np.testing.assert_array_equal(np.asarray(load_image(tiff([(kind, 4, 1, place)]))), np.asarray(IMAGE))


@pytest.mark.parametrize("marker", [*range(0xE1, 0xEE), 0xEF, 0xFE])
def test_other_broken_segments_cost_no_jpeg(marker):
    data = encoded(IMAGE, "JPEG")
    expected = np.asarray(load_image(data))
    for content in (
        b"MPF\0II*\0\x08\0\0\0\x01\0\x01\xb0\x04\0\x01\0\0\0\x05\0\0\0",
        b"ICC_PROFILE\0",
        b"Photoshop 3.0\08BIM",
    ):
        broken = data[:2] + jpeg_segment(marker, content) + data[2:]
        np.testing.assert_array_equal(np.asarray(load_image(broken)), expected)


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"pHYs", b"gAMA", b"sRGB", b"cHRM"])
def test_other_broken_chunks_cost_no_png(kind):
    data = encoded(IMAGE, "PNG")
    bomb = b"a\0\0" + zlib.compress(bytes(3_000_000))  # more than Pillow takes
    for chunk in (png_chunk(kind, b""), png_chunk(kind, bomb), png_chunk(kind, b"abc")[:-1] + b"!"):
        np.testing.assert_array_equal(np.asarray(load_image(data[:33] + chunk + data[33:])), np.asarray(IMAGE))


@pytest.mark.parametrize("turn", range(1, 9))
def test_the_orientation_is_kept(turn):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x0131] = "maker", turn, "software"
    for form in ("JPEG", "PNG", "WEBP", "TIFF"):
        data = encoded(IMAGE, form, exif=exif)
        with Image.open(io.BytesIO(data)) as opened:
            expected = np.asarray(ImageOps.exif_transpose(opened))
        np.testing.assert_array_equal(np.asarray(load_image(data)), expected)
        np.testing.assert_array_equal(np.asarray(load_image(Image.open(io.BytesIO(data)))), expected)
    assert exif_orientation(exif_with(turn)) == turn
    assert exif_orientation(exif.tobytes()) == turn


# ---------------------------------------------------------------------------------------------------------------------
# Small files that would take much memory or time


def small_bombs():
    tags = overlapping_tags(2_000_000, 200)  # 400 MB once parsed
    for form in ("JPEG", "PNG", "WEBP", "AVIF"):
        if form != "AVIF" or features.check("avif"):
            yield form, with_exif(form, tags)
    bomb = tiff([(1000 + k, 7, 2_000_000, 0) for k in range(200)], bytes(2_000_000))
    yield "TIFF", bomb
    yield "TIFF by another of its headers", b"II\0*" + bomb[4:]
    directory = struct.pack("<H", 200) + b"".join(struct.pack("<HHII", 1000 + k, 7, 2_000_000, 0) for k in range(200))
    place = len(tiff([(34665, 4, 1, 0)]))
    yield "EXIF of TIFF", tiff([(34665, 4, 1, place)], directory + bytes(2_000_000))
    yield "strips", tiff([(273, 4, 500_000, 200)], bytes(2_000_000))
    yield "bits per sample", tiff([(258, 3, 900_000, 200)], bytes(2_000_000))
    yield "text", encoded(IMAGE, "PNG")[:33] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))
    yield "profile", encoded(IMAGE, "PNG")[:33] + png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))


@pytest.mark.parametrize("bomb", list(small_bombs()), ids=lambda bomb: bomb[0])
def test_metadata_takes_no_more_memory_than_the_file(bomb):
    data = bomb[1]
    tracemalloc.start()
    try:
        load_image(data)
    except DataError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 5 * len(data) + 2**20


def test_headers_that_lie_are_refused():
    tile = tiff([(322, 4, 1, 16_384), (323, 4, 1, 16_384), (324, 4, 1, 200), (325, 4, 1, 100), (259, 3, 1, 8)])
    progressive = encoded(IMAGE, "JPEG", progressive=True)
    scan, end = progressive.rindex(b"\xff\xda"), progressive.rindex(b"\xff\xd9")
    scans = progressive[:scan] + progressive[scan:end] * MAX_SCANS + progressive[end:]
    canvas = b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(6) + b"\x2c"
    canvas += struct.pack("<4HB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0;"
    for data, said in (
        (encoded(Image.new("1", (1, 65_536)), "PNG"), "1 x 65536 pixels, with a side of more than 65,535"),
        (tile, "tiles have 16384 x 16384"), (scans, "more than 500 scans"), (canvas, "refused"),
        (b"P2\n1 1 255\n7", "not a binary"), (b"P5\n" + b" " * 70_000 + b"1 1 255 a", "64 kB"),
        (b"P5\n1500 1500\n254\n" + bytes(1500 * 1500), "takes too long"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            load_image(data)


def bmp(width, height, codes):
    """A run-length coded BMP of 256 colours."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(codes), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + header + bytes(1024) + codes


def test_run_length_codes_are_refused():
    plain = b"\x01\x07" * 64 + b"\0\0"  # a row of 64 runs of one pixel
    for start in (0, 14):  # with its file header, and as the DIB that it is without
        with pytest.raises(DataError, match="run-length coded BMP"):
            load_image(bmp(64, 48, plain * 48 + b"\0\1")[start:])


def test_a_jpeg_of_many_scans_in_a_tiff_is_refused():
    """By libtiff, which counts them."""
    jpeg = encoded(Image.new("L", (64, 48)), "JPEG", progressive=True)  # its scans are short
    scan, end = jpeg.rindex(b"\xff\xda"), jpeg.rindex(b"\xff\xd9")
    for repeated, refused in ((1, False), (300, True)):
        data = jpeg[:scan] + jpeg[scan:end] * repeated + jpeg[end:]
        place = len(tiff([]))
        entries = [(258, 3, 1, 8), (259, 3, 1, 7), (262, 3, 1, 1), (273, 4, 1, place), (277, 3, 1, 1)]
        data = tiff([*entries, (279, 4, 1, len(data))]).ljust(place, b"\0")[:place] + data
        with pytest.raises(DataError, match="damaged") if refused else contextlib.nullcontext():
            assert load_image(data).size == (64, 48)


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow reads no JPEG 2000")
def test_many_tiles_are_refused():
    for boxed in (False, True):
        data = encoded(IMAGE, "JPEG2000", tile_size=(1, 1), num_resolutions=1, no_jp2=not boxed)
        with pytest.raises(DataError, match="3,072 tiles of 1 x 1 pixels"):
            load_image(data)
        assert load_image(encoded(IMAGE, "JPEG2000", tile_size=(16, 16), no_jp2=not boxed)).size == (64, 48)


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow reads no JPEG 2000")
def test_the_size_that_counts_is_the_one_that_is_decoded():
    data = bytearray(encoded(IMAGE, "JPEG2000"))
    place = data.index(b"ihdr")
    data[place + 4 : place + 12] = struct.pack(">II", 10, 10)
    with pytest.raises(DataError, match="64 x 48 pixels"):
        load_image(bytes(data))
    with pytest.raises(DataError, match="3072|64 x 48"):
        load_image(encoded(IMAGE, "JPEG2000", no_jp2=True), max_pixels=3000)


def test_memory_is_bounded_before_anything_is_decoded():
    data = encoded(IMAGE, "PNG")
    assert load_image(data, max_bytes=5 * 64 * 48).size == (64, 48)
    with pytest.raises(DataError, match="refused, shrink it"):
        load_image(data, max_bytes=5 * 64 * 48 - 1)
    with pytest.raises(DataError, match="WEBP"):  # whose decoder takes more for each pixel
        load_image(encoded(IMAGE, "WEBP"), max_bytes=5 * 64 * 48)


def test_comments_of_a_gif_are_dropped_unread():
    data = encoded(
        IMAGE.convert("P"), "GIF", save_all=True, append_images=[Image.new("P", (64, 48), k) for k in (1, 2)]
    )
    expected = np.asarray(load_image(data))
    place = data.index(b"\x21\xf9")
    commented = data[:place] + b"\x21\xfe" + (b"\xff" + b"a" * 255) * 1000 + b"\0" + data[place:]
    assert len(prepare(io.BytesIO(commented)).read()) <= len(data)
    np.testing.assert_array_equal(np.asarray(load_image(commented)), expected)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_frames_are_not_counted(form, monkeypatch):
    frames = [Image.new("RGB", (8, 8), (k, k, 0)) for k in range(100)]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    with open_image(io.BytesIO(data), "frames") as image:
        assert image.is_animated
        sought = []
        for name in {"seek", "_seek"} & set(dir(type(image))):
            theirs = getattr(image, name)
            monkeypatch.setattr(
                image, name, lambda frame, *rest, theirs=theirs: (sought.append(frame), theirs(frame, *rest))
            )
        assert image.is_animated
        image.load()
    assert max(sought, default=0) <= 1  # whether there is a second frame is all that is asked


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cut_short_is_named(form):
    data = encoded(IMAGE.convert("P") if form == "GIF" else IMAGE, form)
    refused = 0
    for end in range(0, len(data) - 1, max(1, len(data) // 40)):
        try:
            load_image(data[:end], "cut.xyz")
        except DataError as error:
            refused += "cut.xyz" in str(error)
    assert refused >= 30


def test_binary_pnm_files_of_any_maximum_are_read():
    rng = np.random.default_rng(0)
    for kind, largest in itertools.product((5, 6), (1, 7, 254, 255, 300, 4095, 65535)):
        samples = rng.integers(0, largest + 1, (5, 7, 3) if kind == 6 else (5, 7))
        body = samples.astype(">u2" if largest > 255 else np.uint8).tobytes()
        with open_image(io.BytesIO(b"P%d\n# said\n7 5\n%d\n" % (kind, largest) + body), "odd") as image:
            scale = 65535 if image.mode[0] == "I" else 255
            assert abs(np.asarray(image) - samples * scale / largest).max() <= 1
