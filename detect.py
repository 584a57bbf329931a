"""Finds objects in photographs: annotated copies, and what is where in the form that you need.

    python detect.py photo.jpg                              # detected_img/photo.jpg, and a line an object
    python detect.py holiday/ "more/*.png" --checkpoint runs/lite/best.pth.tar --json found.jsonl
    cat photo.jpg | python detect.py - --json - --no-pictures
    python detect.py clip.mp4 camera:0                      # with pip install av; Ctrl-C ends a camera

In Python, with torch's safe loading left on:

    from detect import detect
    checkpoint = torch.load("checkpoint/fpnssd300_lite_voc.pth.tar")
    model = checkpoint["model"].to(device)
    annotated = detect(image, min_score=0.4, max_overlap=0.5, top_k=200)  # PIL in, PIL out; model=... optional

For boxes rather than pictures: load_detector(path).predict(images), in detector.py.
"""

import argparse
import contextlib
import glob
import itertools
import json
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from fpnssd.data.images import IMAGE_SUFFIXES, DataError, load_image
from fpnssd.evaluation.result_files import file_name_of, write_voc_xml, write_yolo
from fpnssd.inference.detector import MIN_SCORE, RUNTIMES, Detections, Detector, check_knobs, load_detector
from fpnssd.inference.draw import annotate
from fpnssd.inference.video import Video, is_video, written_video
from model import DEFAULT_CHECKPOINT, last_loaded_model, load_checkpoint
from utils import InputError, atomic_write, error_message, escape_unprintable, whole_number, write_text

__all__ = ["Detections", "Detector", "annotate", "detect", "load_detector", "predict"]

_in_use = (None, None)  # the model that detect() used last, and its Detector


# ---------------------------------------------------------------------------------------------------------------------
# In Python


def detect(image, min_score=MIN_SCORE, max_overlap=0.5, top_k=200, suppress=None, model=None):
    """An annotated copy of a picture (see images.load_image) as a PIL image.

    suppress: names of classes to leave out. model: an FPNSSD or a Detector; without it the one last loaded in this
    process, else the one that ships, and which one it is gets printed when it changes.
    """
    picture = load_image(image)
    return annotate(picture, _detector(model).predict(picture, min_score, max_overlap, top_k, suppress))


def predict(images, min_score=MIN_SCORE, max_overlap=0.5, top_k=200, suppress=None, model=None):
    """Detections of a picture, or a list of them for a list; `model` as for detect."""
    return _detector(model).predict(images, min_score, max_overlap, top_k, suppress)


def _detector(model):
    global _in_use
    if isinstance(model, Detector):
        return model
    if model is None:
        model, source = last_loaded_model(), "the model last loaded"
        if model is None:
            model, source = load_checkpoint(DEFAULT_CHECKPOINT)["model"], DEFAULT_CHECKPOINT
        if _in_use[0] is not model:
            _in_use = (model, load_detector(model))
            about = _in_use[1].config
            print(f"detect: using {source} ({about.backbone}, {len(about.classes)} classes)", file=sys.stderr)
        return _in_use[1]
    return load_detector(model)


# ---------------------------------------------------------------------------------------------------------------------
# On the command line


def main(argv=None):
    args = parse_args(argv)
    escape_unprintable()
    try:
        check_knobs(args.min_score, args.max_overlap, args.top_k)
        sources = list(find_sources(args.images))
        detector = load_detector(args.checkpoint, args.device, args.runtime, args.precision)
        suppress = classes_to_suppress(args, detector.classes)
        with Writers(args, detector.classes, sources) as writers:
            pictures = [(place, source) for place, source in enumerate(sources, start=1) if not is_video(source)]
            found = answers(detector, readable(pictures, writers), args, suppress)
            for (place, source), picture, one in tqdm(found, total=len(pictures), unit="picture", disable=None):
                writers.write(source, picture, one, place)
            for source in sources:
                if is_video(source):
                    detect_in_video(detector, source, args, suppress, writers)
    except (InputError, OSError) as error:
        sys.exit(f"detect: {error_message(error)}")
    except KeyboardInterrupt:
        sys.exit("detect: stopped; what was found so far is written")
    if writers.failures:
        sys.exit(1)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="files, folders, globs, videos, camera:0, - for standard input"
    )
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="or an exported .onnx or .xml file")
    parser.add_argument("--out", default="detected_img", help="folder that gets the annotated copies")
    parser.add_argument("--no-pictures", action="store_true", help="write no annotated copies")
    parser.add_argument("--json", metavar="FILE", help="gets a line of JSON a picture; - is standard output")
    parser.add_argument(
        "--coco", metavar="FILE", help="gets all in COCO's result format: ids are places in the call; then frames"
    )
    parser.add_argument("--voc-xml", metavar="FOLDER", help="gets VOC's XML, one file a picture")
    parser.add_argument("--yolo", metavar="FOLDER", help="gets YOLO's txt, one file a picture, with the score last")
    parser.add_argument("--crops", metavar="FOLDER", help="gets what was found, cut out, in a folder a class")
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="look for these alone")
    parser.add_argument("--suppress", nargs="+", default=[], metavar="NAME", help="leave these out")
    parser.add_argument("--min-score", type=float, default=MIN_SCORE)
    parser.add_argument("--max-overlap", type=float, default=0.5)
    parser.add_argument("--top-k", type=whole_number(1), default=200)
    parser.add_argument("--batch-size", type=whole_number(1), default=8)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--runtime", default="auto", choices=RUNTIMES)
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    return parser.parse_args(argv)


def classes_to_suppress(args, classes):
    unknown = sorted(set(args.classes + args.suppress) - set(classes))
    if unknown:
        raise InputError(f"no class {', '.join(unknown)}: the model knows {', '.join(classes)}")
    left_out = {name for name in classes if args.classes and name not in args.classes}
    return sorted(left_out | set(args.suppress))


def find_sources(names):
    """Paths of pictures and videos, cameras, and "-", in the order asked for; folders give what is in them, sorted."""
    for name in names:
        path = Path(name)
        if name == "-":
            yield name
        elif path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES or is_video(p.name))
            if not inside:
                raise InputError(f"folder {name} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
            yield from map(str, inside)
        elif not path.exists() and glob.has_magic(name):
            matching = sorted(glob.glob(name, recursive=True))
            if not matching:
                raise InputError(f"nothing matches {name!r}")
            yield from matching
        else:
            yield name


def readable(sources, writers):
    """((place, source), picture) of those that can be read; the others are said, and counted."""
    for place, source in sources:
        try:
            yield (place, source), load_image(sys.stdin.buffer.read() if source == "-" else source)
        except (InputError, OSError) as error:
            writers.fail(error)


def answers(detector, pictures, args, suppress):
    """(key, picture, Detections) for pairs (key, picture), a batch at a time."""
    pictures = iter(pictures)
    while batch := list(itertools.islice(pictures, args.batch_size)):
        found = detector.predict([p for _, p in batch], args.min_score, args.max_overlap, args.top_k, suppress)
        for (key, picture), one in zip(batch, found, strict=True):
            yield key, picture, one


def detect_in_video(detector, source, args, suppress, writers):
    """Frame by frame; what is written stays if the video proves damaged on the way, or at Ctrl-C."""
    try:
        video = Video(source)
        path = Path(args.out) / free_name(f"{Path(source.replace(':', '')).stem}.mp4", writers.taken)
        if not args.no_pictures:
            writers.keep_off(path)
        with contextlib.nullcontext() if args.no_pictures else written_video(path, video) as write_frame:
            found = answers(detector, frames_of(video, writers), args, suppress)
            frames = tqdm(found, total=video.num_frames or None, unit="frame", disable=None)
            with stopped_by_ctrl_c(source, writers):
                for (number, time), picture, one in frames:
                    if write_frame:
                        write_frame(annotate(picture, one), time)
                    frame = {"frame": number, "seconds": float(time * video.time_base)}
                    writers.write(source, picture, one, writers.next_frame(), frame)
        writers.say(f"{source} -> {path}" if write_frame else source)
    except (InputError, OSError) as error:
        writers.fail(error)


@contextlib.contextmanager
def stopped_by_ctrl_c(source, writers):
    try:
        yield
    except KeyboardInterrupt:
        writers.say(f"{source}: stopped")


def frames_of(video, writers):
    """((number from 1, time), picture) of a Video, until it ends, proves damaged or Ctrl-C comes while it is read."""
    try:
        for number, (picture, time) in enumerate(video, start=1):
            yield (number, time), picture
    except DataError as error:
        writers.fail(error)
    except KeyboardInterrupt:
        writers.say(f"{video.source}: stopped")


class Writers:
    """Everything that was asked for, written picture after picture; what failed is counted."""

    def __init__(self, args, classes, sources):
        self.args, self.classes = args, classes
        self.photographs = {Path(source).resolve() for source in sources}
        self.taken, self.coco, self.failures = set(), [], 0
        self.last_id = len(sources)  # of COCO's: places of sources come first

    def next_frame(self):
        """The COCO id of another frame."""
        self.last_id += 1
        return self.last_id

    def __enter__(self):
        for option, path in (("--json", self.args.json), ("--coco", self.args.coco)):
            if path and (Path(path).suffix.lower() in IMAGE_SUFFIXES or is_video(path)):
                raise InputError(f"{option} {path}: that is no file to write text to; name one before the pictures")
        self.stack = contextlib.ExitStack()
        self.lines = None
        if self.args.json:
            Path(self.args.json).parent.mkdir(parents=True, exist_ok=True)
            to_stdout = self.args.json == "-"
            self.lines = (
                sys.stdout if to_stdout else self.stack.enter_context(open(self.args.json, "w", encoding="utf-8"))
            )
        return self

    def __exit__(self, kind, error, traceback):
        self.stack.close()
        if self.args.coco and kind in (None, KeyboardInterrupt):
            write_text(self.args.coco, json.dumps(self.coco))

    def fail(self, error):
        self.failures += 1
        tqdm.write(f"detect: {error_message(error)}", file=sys.stderr)

    def write(self, source, picture, found, image_id, frame=None):
        """image_id: COCO's. frame: of a video, its number and "seconds"; its annotated copy goes elsewhere."""
        found.source = source
        file_name = "stdin.jpg" if source == "-" else Path(source).name
        if frame:
            file_name = f"{Path(source.replace(':', '')).stem}_{frame['frame']:06d}.jpg"
        name = free_name(file_name, self.taken)
        said = f"{source}: {len(found)} objects"
        try:
            if not (frame or self.args.no_pictures):
                path = self.save_picture(Path(self.args.out) / name, annotate(picture, found))
                said = f"{source} -> {path}: {len(found)} objects"
            if self.args.voc_xml:
                write_voc_xml(Path(self.args.voc_xml) / f"{Path(name).stem}.xml", found, name)
            if self.args.yolo:
                write_yolo(Path(self.args.yolo) / f"{Path(name).stem}.txt", found)
            if self.args.crops:
                self.save_crops(name, picture, found)
        except (InputError, OSError) as error:
            self.fail(error)
        self.coco += found.to_coco(image_id)
        if self.lines:
            print(json.dumps(found.to_dict() | (frame or {})), file=self.lines, flush=True)
        if not frame:
            self.say("\n".join([said, *(f"  {line}" for line in describe(found))]))

    def say(self, text):
        if self.lines is not sys.stdout:
            tqdm.write(text, file=sys.stdout)

    def keep_off(self, path):
        if path.resolve() in self.photographs:
            raise DataError(f"{path} is itself one of the photographs: choose another --out")

    def save_picture(self, path, picture):
        self.keep_off(path)
        with atomic_write(path) as temporary:
            picture.save(temporary, picture_format(path), quality=92)
        return path

    def save_crops(self, name, picture, found):
        for number, (box, _, _, label) in enumerate(found.rows(), start=1):
            left, top, right, bottom = (round(edge) for edge in box)
            part = picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
            self.save_picture(Path(self.args.crops) / file_name_of(label) / f"{Path(name).stem}_{number}.jpg", part)


def describe(found):
    """A line an object: 'dog 0.93 at 12,40,200,310' (left, top, right, bottom in pixels)."""
    for box, score, _, name in found.rows():
        yield f"{name} {score:.2f} at {','.join(str(round(edge)) for edge in box)}"


def free_name(file_name, taken):
    """The file name, numbered if another photograph of this call has it already, with whatever ending (forms of answers
    have their own) and in whatever case (which some file systems do not tell apart)."""
    path, number = Path(file_name), 1
    stem = path.stem
    while stem.casefold() in taken:
        number += 1
        stem = f"{path.stem}_{number}"
    taken.add(stem.casefold())
    return f"{stem}{path.suffix}"


def picture_format(path):
    """PIL's format by the file's ending; JPEG for endings it cannot write."""
    Image.init()
    name = Image.registered_extensions().get(path.suffix.lower(), "JPEG")
    return name if name in Image.SAVE else "JPEG"


if __name__ == "__main__":
    main()
