"""VOC's format as other tools write it: names in split files, endings, flags, sizes, encodings; and what is no VOC."""

import pytest
from PIL import Image

from fpnssd.data.images import DataError
from fpnssd.data.voc import parse_voc_xml, read_voc

OBJECT = "<object><name>dog</name>{}<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>6</ymax></bndbox></object>"


def annotation(body="", flags=""):
    return f"<annotation><filename>wrong.png</filename>{body}{OBJECT.format(flags)}</annotation>"


def make_voc(root, names, ending=".jpg", split="train", lines=None):
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(root / "JPEGImages" / f"{name}{ending}", "PNG")
        (root / "Annotations" / f"{name}.xml").write_text(annotation())
    lines = "\n".join(names if lines is None else lines)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    return root


def file_names(voc, **options):
    return [parse().file_name for parse in read_voc([voc], "train", **options).records]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("my photo", "my photo"),
        ("my photo 1", "my photo"),
        ("my photo  -1", "my photo"),
        ('"my photo"', "my photo"),
        ("'my photo' 1", "my photo"),
        ('"my photo.jpg" -1', "my photo"),
        ("my photo.JPG", "my photo"),
        ("JPEGImages/my photo.jpg", "my photo"),
        ("C:\\data\\my photo.jpg", "my photo"),
        ("/elsewhere/my photo.jpg 0", "my photo"),
        ("photo 1", "photo 1"),  # there are both: the whole name counts
        ("photo", "photo"),
        ("photo -1", "photo"),
        ("v1.2", "v1.2"),
        ("v1.2.jpg", "v1.2"),
    ],
)
def test_lines_of_split_files(tmp_path, line, name):
    make_voc(tmp_path, ["my photo", "photo", "photo 1", "v1.2"], lines=[line])
    assert file_names(tmp_path) == [f"{name}.jpg"]
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes(f"{line}\r\n\r\n".encode("utf-16"))
    assert file_names(tmp_path) == [f"{name}.jpg"]


def test_lines_without_any_file_are_named(tmp_path):
    make_voc(tmp_path, ["a"], lines=["a", '"no such".jpg 1', "a\0b"])
    first, *others = read_voc([tmp_path], "train").records
    assert first().file_name == "a.jpg"
    for parse in others:
        with pytest.raises(DataError) as raised:
            parse()
        assert raised.value.kind in ("annotation missing", "annotation does not parse")


@pytest.mark.parametrize("ending", [".bmp", ".tif", ".webp", ".Jpg", ".gif", ".jfif", ".JPE", ".TIFF", ".ppm", ".jp2"])
def test_every_image_ending_is_found(tmp_path, ending):
    make_voc(tmp_path, ["a", "sub/b"][:1], ending=ending)
    assert file_names(tmp_path) == [f"a{ending}"]


def test_usual_endings_come_first(tmp_path):
    make_voc(tmp_path, ["a"], ending=".bmp")
    for ending in (".png", ".JPG"):
        Image.new("RGB", (8, 8)).save(tmp_path / "JPEGImages" / f"a{ending}")
    (tmp_path / "JPEGImages" / "a.txt").write_text("no image")
    assert file_names(tmp_path) == ["a.JPG"]


def test_names_may_have_folders(tmp_path):
    make_voc(tmp_path, ["a"])
    for part in ("Annotations", "JPEGImages"):
        (tmp_path / part / "sub").mkdir()
    (tmp_path / "Annotations" / "a.xml").rename(tmp_path / "Annotations" / "sub" / "a.xml")
    (tmp_path / "JPEGImages" / "a.jpg").rename(tmp_path / "JPEGImages" / "sub" / "a.jpg")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("sub/a\n")
    assert file_names(tmp_path) == ["sub/a.jpg"]


def test_annotations_beside_the_images(tmp_path):
    """Roboflow's export: SPLIT/NAME.jpg and SPLIT/NAME.xml, no split files."""
    make_voc(tmp_path / "made", ["a", "b"])
    (tmp_path / "voc").mkdir()
    (tmp_path / "made" / "JPEGImages").rename(tmp_path / "voc" / "train")
    for name in ("a", "b"):
        (tmp_path / "made" / "Annotations" / f"{name}.xml").rename(tmp_path / "voc" / "train" / f"{name}.xml")
    (tmp_path / "voc" / "train" / "._a.jpg").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(tmp_path / "voc" / "train" / "c.png")
    *found, without = read_voc([tmp_path / "voc"], "train").records
    assert [parse().file_name for parse in found] == ["a.jpg", "b.jpg"]
    with pytest.raises(DataError, match=r"c\.xml is missing"):
        without()


@pytest.mark.parametrize(
    ("text", "difficult", "truncated", "crowd"),
    [
        ("<difficult>1</difficult><truncated>0</truncated>", True, False, False),
        ("<difficult>true</difficult><truncated>False</truncated>", True, False, False),
        ("<difficult> 0 </difficult><truncated>1</truncated><crowd>1</crowd>", False, True, True),
        ("<difficult>1.0</difficult><truncated>Unspecified</truncated>", True, None, False),
        ("<difficult>Unspecified</difficult><truncated/>", False, None, False),
        ("", False, None, False),
    ],
)
def test_flags(tmp_path, text, difficult, truncated, crowd):
    (tmp_path / "a.xml").write_text(annotation(flags=text))
    _, (one,), problems = parse_voc_xml(tmp_path / "a.xml")
    assert (one.difficult, one.truncated, one.crowd, problems) == (difficult, truncated, crowd, [])
    assert one.box == (0, 0, 5, 6)


def test_a_box_that_cvat_turned(tmp_path):
    attributes = "<attributes><attribute><name>rotation</name><value>-90.0</value></attribute></attributes>"
    (tmp_path / "a.xml").write_text(annotation(flags=attributes))
    _, (one,), (problem,) = parse_voc_xml(tmp_path / "a.xml")
    assert one.box == pytest.approx((-0.5, 0.5, 5.5, 5.5))  # was 0, 0, 5, 6
    assert problem.kind == "rotated box"


def test_folders_of_splits_by_another_name_and_of_classes(tmp_path):
    for folder, name in (("train", "a"), ("valid", "b"), ("cats/cats", "c")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{name}.xml").write_text(annotation())
        Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{name}.jpg")
    (parse,) = read_voc([tmp_path], "val").records
    assert parse().file_name == "b.jpg"
    with pytest.raises(DataError, match="nor a folder train with XML files; those that have are cats: name some"):
        read_voc([tmp_path / "cats"], "train")


def test_several_folders_whose_images_are_links(tmp_path):
    for year in ("2007", "2012"):
        make_voc(tmp_path / year, [f"a{year}"])
        (tmp_path / year / "JPEGImages").rename(tmp_path / f"elsewhere{year}")
        (tmp_path / year / "JPEGImages").symlink_to(tmp_path / f"elsewhere{year}", target_is_directory=True)
    split = read_voc([tmp_path / "2007", tmp_path / "2012"], "train")
    assert [parse().file_name for parse in split.records] == [f"{y}/JPEGImages/a{y}.jpg" for y in ("2007", "2012")]
    assert split.image_root == tmp_path


@pytest.mark.parametrize("value", ["2", "yes", "-1", "maybe"])
def test_other_flags_are_named_and_not_set(tmp_path, value):
    (tmp_path / "a.xml").write_text(annotation(flags=f"<difficult>{value}</difficult>"))
    _, (one,), (problem,) = parse_voc_xml(tmp_path / "a.xml")
    assert one.difficult is False
    assert (problem.kind, f"a.xml: dog: difficult '{value}'" in problem.where) == ("flag unreadable", True)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("<width>0</width><height>0</height>", None),
        ("<width>-1</width><height>8</height>", None),
        ("<width/><height/>", None),
        ("<width>null</width><height>8</height>", None),
        ("<height>8</height>", None),
        ("", None),
        ("<width>9</width><height> 8.0 </height>", (8, 9)),
    ],
)
def test_sizes(tmp_path, size, expected):
    (tmp_path / "a.xml").write_text(annotation(f"<size>{size}</size>"))
    assert parse_voc_xml(tmp_path / "a.xml")[0] == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (annotation().replace("annotation>", "annotations>"), "the root <annotations>"),
        (annotation().replace("annotation>", "Annotation>"), "the root <Annotation>"),
        (annotation().replace("<annotation>", '<annotation xmlns="http://x.org">'), "the root <{http://x.org}annot"),
        (annotation().replace("object>", "Object>"), "as <Object>, not <object>"),
        (
            annotation().replace("<object>", "<objects><object>").replace("</object>", "</object></objects>"),
            "<objects>",
        ),
        (annotation().replace("object>", "item>"), "<item>"),
        (annotation().replace("<object>", '<o:object xmlns:o="x">').replace("</object>", "</o:object>"), "object>"),
        ("<!DOCTYPE html><html><body>404 Not Found</body></html>", "the root <html>"),
    ],
)
def test_xml_of_another_format_is_named(tmp_path, text, said):
    """None of these passes for an image without objects."""
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(DataError) as raised:
        parse_voc_xml(tmp_path / "a.xml")
    assert raised.value.kind == "annotation of another format"
    assert said in str(raised.value)


def test_parts_of_an_object_are_no_objects(tmp_path):
    """VOC marks heads and hands of some persons, each with a box, inside of the object."""
    part = "<part><name>head</name><bndbox><xmin>2</xmin></bndbox></part>"
    (tmp_path / "a.xml").write_text(annotation(flags=part))
    assert [one.name for one in parse_voc_xml(tmp_path / "a.xml")[1]] == ["dog"]


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("gb2312", "狗"), ("shift_jis", "犬"), ("windows-1251", "пёс"), ("utf-16", "köter"), ("iso-8859-1", "köter")],
)
def test_encodings(tmp_path, encoding, name):
    text = f'<?xml version="1.0" encoding="{encoding}"?>{annotation().replace("dog", name)}'
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    assert parse_voc_xml(tmp_path / "a.xml")[1][0].name == name


def test_unknown_encodings(tmp_path):
    """An ASCII file is the same in all of them; another one is named."""
    for name in ("ansi", "unicode", "UTF8MB4"):
        text = f'<?xml version="1.0" encoding="{name}"?>\n{annotation()}'
        (tmp_path / "a.xml").write_text(text)
        assert parse_voc_xml(tmp_path / "a.xml")[1][0].name == "dog"
        (tmp_path / "a.xml").write_text(text.replace("dog", "köter"), encoding="latin-1")
        with pytest.raises(DataError, match=r"a\.xml does not parse"):
            parse_voc_xml(tmp_path / "a.xml")


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"{}", b"<annotation>" + b"<a>" * 50_000, b"\xff\xfe<\0", b"<a>\x01</a>"]
)
def test_files_that_are_no_xml(tmp_path, content):
    (tmp_path / "a.xml").write_bytes(content)
    with pytest.raises(DataError) as raised:
        parse_voc_xml(tmp_path / "a.xml")
    assert raised.value.kind == "annotation does not parse"
