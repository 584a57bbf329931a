"""Writes the detections of detect.py: annotated copies, JSON lines, COCO results, VOC XML, YOLO text, crops."""

import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TextIO
from xml.etree import ElementTree

from PIL import Image
from tqdm import tqdm

from fpnssd.data.images import IMAGE_SUFFIXES
from fpnssd.evaluation.result_files import file_name_of
from fpnssd.inference.detector import Detections
from fpnssd.inference.draw import annotate
from fpnssd.inference.video import VIDEO_SUFFIXES, is_video
from utils import InputError, atomic_write, check_outputs, error_message, file_ids, output_mark, write_text

JSON, COCO, VOC_XML, YOLO = "JSON lines", "COCO results", "VOC annotation", "YOLO labels"  # kinds of outputs
# Characters that XML 1.0 cannot contain, not even escaped.
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class OutputPaths:
    """Where each kind of output goes; None for those that are not requested."""

    pictures: Path | None = None  # folder of annotated copies, and of annotated videos
    json: str | None = None  # file that gets a line per image; "-" is standard output
    coco: Path | None = None  # file in the COCO results format
    voc_xml: Path | None = None  # folder
    yolo: Path | None = None  # folder
    crops: Path | None = None  # folder that gets a folder for each class

    def folders(self) -> list[Path]:
        """The folders that outputs go to."""
        return [path for path in (self.pictures, self.voc_xml, self.yolo, self.crops) if path]

    def files(self, names: Sequence[PurePath]) -> list[tuple[str, Path]]:
        """(kind, path) of every file that will be written for inputs of these names, for utils.check_outputs, as far as
        it is known before they are read: crops and the files of video frames depend on the detections.

        Raises:
            InputError: if the JSON or COCO results would be written to a picture, as when the shell expands
                --json *.jpg to --json a.jpg b.jpg.
        """
        for option, path in (("--json", self.json), ("--coco", self.coco)):
            if path and Path(path).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                raise InputError(f"{option} {path}: that is not a text file; name the file before the pictures")
        files = [(JSON, Path(self.json))] if self.json and self.json != "-" else []
        files += [(COCO, self.coco)] if self.coco else []
        for name in names:
            if self.pictures:
                files.append(("video" if is_video(name.name) else "picture", self.pictures / name))
            if self.voc_xml:
                files.append((VOC_XML, self.voc_xml / name.with_suffix(".xml")))
            if self.yolo:
                files.append((YOLO, self.yolo / name.with_suffix(".txt")))
        return files


def failure_message(source: str, error: Exception) -> str:
    """The message for an input that failed: the error, with its class if it is unexpected, and the input."""
    message = error_message(error)
    if not isinstance(error, (InputError, OSError)):
        message = f"{type(error).__name__}: {message}"
    return message if Path(source).name in message else f"{source}: {message}"


class Outputs:
    """A context manager that writes the results of one image after the other; failures are printed and counted.

    JSON lines and COCO rows are written as they come, so that endless inputs take no memory. At the end of the block,
    however it ends, the COCO file is completed.

    Args:
        paths: where the outputs are written.
        names: of the inputs (see OutputPaths.files).
        inputs: files that must not be overwritten.
        overwrite: whether other files that this program did not write may be overwritten.
        yolo_scores: write the sixth column of YOLO.

    Attributes:
        failures: images and videos that failed, and single outputs of an image.
        images: images written; the frames of a video do not count.
        objects: how many objects of each class were detected in them.

    Raises:
        InputError: before anything is written, for an output that would replace an input or a file of the user's.
    """

    def __init__(
        self,
        paths: OutputPaths,
        names: Sequence[PurePath] = (),
        inputs: Iterable[str] = (),
        overwrite: bool = False,
        yolo_scores: bool = True,
    ) -> None:
        self.paths, self.yolo_scores, self.failures = paths, yolo_scores, 0
        self.images, self.objects = 0, Counter[str]()
        self._overwrite, self._inputs = overwrite, file_ids(inputs)
        for path in (paths.pictures / name for name in names if paths.pictures):
            if file_ids([path]) & self._inputs:
                raise InputError(
                    f"the annotated copy would replace the input {path}: pass --out FOLDER for another folder, or "
                    "--no-pictures"
                )
        check_outputs(paths.files(names), self._inputs, overwrite)
        self._json: TextIO | None = None
        self._coco: TextIO | None = None
        self._rows = 0

    def __enter__(self) -> "Outputs":
        self._stack = contextlib.ExitStack()
        if self.paths.json == "-":
            self._json = sys.stdout
        elif self.paths.json:
            Path(self.paths.json).parent.mkdir(parents=True, exist_ok=True)
            self._json = self._stack.enter_context(open(self.paths.json, "w", encoding="utf-8"))
        if self.paths.coco:
            temporary = self._stack.enter_context(atomic_write(self.paths.coco, COCO))
            self._coco = self._stack.enter_context(open(temporary, "w", encoding="utf-8"))
            self._coco.write("[")
            self._stack.callback(self._coco.write, "]\n")
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()  # without the error: results before it are kept

    @contextlib.contextmanager
    def failures_of(self, source: str) -> Iterator[None]:
        """A context manager that prints and counts errors as failures of this input, and suppresses them."""
        try:
            yield
        except BrokenPipeError:  # the reader of the output has closed it
            raise
        except Exception as error:  # decoders, networks and encoders may raise nearly any exception
            self.fail(source, error)

    def fail(self, source: str, error: Exception) -> None:
        self.failures += 1
        tqdm.write(f"detect: {failure_message(source, error)}", file=sys.stderr)

    def print(self, text: str) -> None:
        """Prints to standard output, unless the JSON is written there."""
        if self._json is not sys.stdout:
            tqdm.write(text, file=sys.stdout)

    def write(
        self,
        name: PurePath,
        image: Image.Image,
        detections: Detections,
        image_id: int,
        frame: dict[str, float] | None = None,
    ) -> None:
        """Writes all requested outputs of one image. A failure of one output is printed and counted, and does not stop
        the others.

        Args:
            name: of its files, below each output folder.
            image: RGB.
            detections: with the input's path as their source.
            image_id: in the COCO results.
            frame: number and time of a video's frame ("frame", "seconds"), for JSON; no annotated copy is written.
        """
        source, count = detections.source, _count(detections)
        shown = f"{source}: {count}"
        if self._coco:
            # The id is only a position; from the name eval.py detects rows of another list's images.
            file_name = {"file_name": source if frame is None else name.as_posix()}
            rows = [json.dumps(row | file_name) for row in detections.to_coco(image_id)]
            self._coco.write("".join((",\n" if self._rows + k else "") + row for k, row in enumerate(rows)))
            self._rows += len(rows)
        if self._json:
            mark = "" if self._json is sys.stdout else output_mark(JSON)  # on every line, as any may be the last
            print(json.dumps(detections.to_dict() | (frame or {})) + mark, file=self._json, flush=True)
        if self.paths.pictures and frame is None:
            with self.failures_of(source):
                path = self.paths.pictures / name
                save_picture(path, annotate(image, detections))
                shown = f"{source} -> {path}: {count}"
        if self.paths.voc_xml:
            with self.failures_of(source):
                path = self.paths.voc_xml / name.with_suffix(".xml")
                self._check(VOC_XML, path, frame)
                write_voc_xml(path, detections, name.name)
        if self.paths.yolo:
            with self.failures_of(source):
                path = self.paths.yolo / name.with_suffix(".txt")
                self._check(YOLO, path, frame)
                write_yolo(path, detections, self.yolo_scores)
        if self.paths.crops:
            with self.failures_of(source):
                for path, crop in crops(self.paths.crops, name, image, detections):
                    check_outputs([("picture", path)], self._inputs, self._overwrite)
                    save_picture(path, crop)
        if frame is None:
            self.images += 1
            self.objects.update(detections.names)
            self.print("\n".join([shown, *(f"  {line}" for line in describe(detections))]))

    def print_total(self) -> None:
        """Prints how many objects of each class several images have, most frequent first."""
        if self.images > 1:
            classes = ", ".join(f"{name} {count}" for name, count in self.objects.most_common()) or "no objects"
            self.print(f"{self.images} images: {classes}" + (f"; {self.failures} failures" if self.failures else ""))

    def _check(self, kind: str, path: Path, frame: dict[str, float] | None) -> None:
        """Checks a file of a video's frame; those of images were checked before any work."""
        if frame is not None:
            check_outputs([(kind, path)], self._inputs, self._overwrite)


def _count(detections: Detections) -> str:
    if len(detections) == 0:
        return "0 objects (a lower --min-score shows less confident ones)"
    return "1 object" if len(detections) == 1 else f"{len(detections)} objects"


def describe(detections: Detections) -> Iterator[str]:
    """A line for each object: "dog 0.93 at 12,40,200,310" (left, top, right, bottom in pixels)."""
    for box, score, _, name in detections.rows():
        yield f"{name} {score:.2f} at {','.join(str(round(edge)) for edge in box)}"


# ---------------------------------------------------------------------------------------------------------------------
# Files of one image


def save_picture(path: Path, picture: Image.Image) -> None:
    """Writes a picture in the format of its name's ending; as JPEG where Pillow cannot write that."""
    picture_format = Image.registered_extensions().get(path.suffix.lower(), "JPEG")
    if picture_format not in Image.SAVE:
        picture_format = "JPEG"
    with atomic_write(path, "picture") as temporary:
        picture.save(temporary, picture_format, quality=92)


def write_voc_xml(path: Path, detections: Detections, file_name: str) -> None:
    """Writes detections as a VOC annotation: 1-based inclusive corners, and the score beside them.

    Args:
        path: the XML file.
        detections: of one image.
        file_name: the image's, for <filename>.

    Raises:
        InputError: for a name with characters that XML cannot hold.
    """
    for text in (file_name, *detections.names):
        if NOT_IN_XML.search(text):
            raise InputError(f"{path}: XML cannot hold the name {text!r}")
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = file_name
    size = ElementTree.SubElement(root, "size")
    for tag, value in (("width", detections.size[1]), ("height", detections.size[0]), ("depth", 3)):
        ElementTree.SubElement(size, tag).text = str(value)
    for (x0, y0, x1, y1), score, _, name in detections.rows():
        element = ElementTree.SubElement(root, "object")
        for tag, text in (("name", name), ("difficult", "0"), ("score", f"{score:.6f}")):
            ElementTree.SubElement(element, tag).text = text
        corners = ElementTree.SubElement(element, "bndbox")
        for tag, edge in (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1)):
            ElementTree.SubElement(corners, tag).text = f"{edge:.3f}"
    ElementTree.indent(root)
    with atomic_write(path, VOC_XML) as temporary:
        ElementTree.ElementTree(root).write(temporary, encoding="utf-8")


def write_yolo(path: Path, detections: Detections, scores: bool = True) -> None:
    """Writes detections as YOLO text: class from 0, centre and sides in 0..1 of the image, score, a line each.

    Args:
        path: the text file.
        detections: of one image.
        scores: False omits the sixth column, for programs that read five columns.
    """
    height, width = detections.size
    lines = []
    for (x0, y0, x1, y1), score, label, _ in detections.rows():
        numbers = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
        numbers += [score] if scores else []
        lines.append(" ".join([str(label - 1), *(f"{number:.6f}" for number in numbers)]) + "\n")
    write_text(path, "".join(lines), YOLO)


def crops(
    folder: Path, name: PurePath, image: Image.Image, detections: Detections
) -> Iterator[tuple[Path, Image.Image]]:
    """Each detection cut out of its image, with a path for it: CLASS/NAME_1.jpg and so on, best first."""
    for number, (box, _, _, label_name) in enumerate(detections.rows(), start=1):
        left, top, right, bottom = (round(edge) for edge in box)
        crop = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))  # at least a pixel
        yield folder / file_name_of(label_name) / name.with_name(f"{name.stem}_{number}.jpg"), crop
