"""Detect objects in images, videos and camera streams: annotated copies, detections as JSON, COCO, VOC XML or YOLO.

    python detect.py photo.jpg                              # detected_img/photo.jpg, and a line for each object
    python detect.py holiday/ "more/*.png" --checkpoint runs/lite/best.pth.tar --json found.jsonl
    cat photo.jpg | python detect.py - --json - --no-pictures
    python detect.py clip.mp4 camera:0                      # with pip install av; Ctrl-C ends a camera

In Python; importing detect lets torch.load keep its safe default, weights_only=True:

    import torch
    from detect import detect
    model = torch.load("checkpoint/fpnssd300_lite_voc.pth.tar")["model"]
    annotated = detect("photo.jpg", min_score=0.4, max_overlap=0.5, top_k=200)  # a PIL image; model=... is optional

For boxes instead of an annotated image: load_detector(path).predict(images).
"""

import argparse
import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from fpnssd.data.images import DataError, load_image
from fpnssd.inference.detector import (
    RUNTIMES,
    Detections,
    Detector,
    ImageLike,
    batched,
    check_thresholds,
    load_detector,
)
from fpnssd.inference.draw import annotate
from fpnssd.inference.inputs import Source, find_sources, unused_name
from fpnssd.inference.outputs import OutputPaths, Outputs
from fpnssd.inference.video import Video, write_video
from model import DEFAULT_CHECKPOINT, DETECTION, FPNSSD, last_loaded_model, load_checkpoint
from utils import HelpFormatter, InputError, error_message, escape_unprintable, whole_number

__all__ = ["Detections", "Detector", "annotate", "detect", "load_detector", "predict"]

PredictFn = Callable[[Sequence[Image.Image], Sequence[str]], list[Detections]]  # called with images and their sources

# ---------------------------------------------------------------------------------------------------------------------
# In Python

_default_lock = threading.Lock()
_default: tuple[FPNSSD, Detector] | None = None  # the model that detect() and predict() use without model=


def detect(
    image: ImageLike,
    min_score: float = DETECTION.min_score,
    max_overlap: float = DETECTION.max_overlap,
    top_k: int = DETECTION.top_k,
    suppress: Iterable[str] | None = None,
    model: FPNSSD | Detector | None = None,
) -> Image.Image:
    """Draws the objects in an image.

    Args:
        image: a path, PIL image, bytes, RGB array or tensor (see fpnssd.data.images.load_image). It is not changed.
        min_score: score threshold: detections score above it.
        max_overlap: NMS IoU threshold within a class.
        top_k: maximum number of detections.
        suppress: names of classes that are not detected.
        model: an FPNSSD or a Detector. Without it, the model last loaded in this process, or else the shipped one; a
            change of the model is printed to stderr.

    Returns:
        An annotated RGB copy of the image, upright.

    Raises:
        InputError: for an image that cannot be read, an unknown class or a threshold out of range.
    """
    loaded = load_image(image)
    (detections,) = _detector(model).predict_images([loaded], min_score, max_overlap, top_k, suppress)
    return annotate(loaded, detections)


def predict(
    images: ImageLike | list[ImageLike] | tuple[ImageLike, ...],
    min_score: float = DETECTION.min_score,
    max_overlap: float = DETECTION.max_overlap,
    top_k: int = DETECTION.top_k,
    suppress: Iterable[str] | None = None,
    model: FPNSSD | Detector | None = None,
) -> Detections | list[Detections]:
    """Detections of one or several images.

    Args:
        images: an image, or a list or tuple of images, in any form that detect takes.
        min_score: score threshold.
        max_overlap: NMS IoU threshold within a class.
        top_k: maximum number of detections per image.
        suppress: names of classes that are not detected.
        model: an FPNSSD or a Detector; None as in detect.

    Returns:
        Detections of a single image; a list of them for a list or tuple.

    Raises:
        InputError: as detect.
    """
    return _detector(model).predict(images, min_score, max_overlap, top_k, suppress)


def _detector(model: FPNSSD | Detector | None) -> Detector:
    global _default
    if isinstance(model, Detector):
        return model
    if model is not None:
        return load_detector(model)
    with _default_lock:
        last_loaded, source = last_loaded_model(), "the model last loaded"
        if last_loaded is None:
            last_loaded, source = load_checkpoint(DEFAULT_CHECKPOINT)["model"], DEFAULT_CHECKPOINT
        if _default is None or _default[0] is not last_loaded:
            _default = (last_loaded, load_detector(last_loaded))
            config = last_loaded.config
            print(f"detect: using {source} ({config.backbone}, {len(config.classes)} classes)", file=sys.stderr)
        return _default[1]


# ---------------------------------------------------------------------------------------------------------------------
# On the command line


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    escape_unprintable()
    try:
        check_thresholds(args.min_score, args.max_overlap, args.top_k)
        paths = output_paths(args)
        sources = find_sources(args.images, [Path(args.out), *paths.folders()])
        inputs = [args.checkpoint, *(source.path for source in sources)]
        outputs = Outputs(
            paths, [source.name for source in sources], inputs, args.overwrite, yolo_scores=args.yolo_columns == 6
        )
        detector = load_detector(args.checkpoint, args.device, args.runtime, args.precision)
        suppress = classes_to_suppress(args.classes, args.suppress, detector.classes)

        def predict_fn(images: Sequence[Image.Image], names: Sequence[str]) -> list[Detections]:
            return detector.predict_images(images, args.min_score, args.max_overlap, args.top_k, suppress, names)

        with sigterm_as_ctrl_c(), outputs:
            run(sources, predict_fn, outputs, args.batch_size)
        outputs.print_total()
    except (InputError, OSError) as error:
        sys.exit(f"detect: {error_message(error)}")
    except KeyboardInterrupt:
        sys.exit("detect: stopped; results so far are written")
    if outputs.failures:
        sys.exit(1)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=(__doc__ or "").split("\n\n")[0], formatter_class=HelpFormatter
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, folders (searched recursively), globs, videos, camera:0, - for standard input",
    )
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="checkpoint, or exported .onnx or .xml file")
    parser.add_argument("--out", default="detected_img", help="folder for the annotated copies")
    parser.add_argument("--no-pictures", action="store_true", help="do not write annotated copies")
    parser.add_argument("--json", metavar="FILE", help="write a line of JSON per image; - for standard output")
    parser.add_argument(
        "--coco",
        metavar="FILE",
        help="write COCO results; image ids number the inputs from 1, then the video frames",
    )
    parser.add_argument("--voc-xml", metavar="FOLDER", help="write VOC annotations, one XML file per image")
    parser.add_argument("--yolo", metavar="FOLDER", help="write YOLO labels, one text file per image")
    parser.add_argument(
        "--yolo-columns", type=int, choices=(5, 6), default=6, help="6 adds the score as the last column"
    )
    parser.add_argument("--crops", metavar="FOLDER", help="write a crop of each object, in a folder per class")
    parser.add_argument("--overwrite", action="store_true", help="also replace files that this program did not write")
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="detect only these classes")
    parser.add_argument("--suppress", nargs="+", default=[], metavar="NAME", help="do not detect these classes")
    parser.add_argument("--min-score", type=float, default=DETECTION.min_score, help="score threshold")
    parser.add_argument("--max-overlap", type=float, default=DETECTION.max_overlap, help="NMS IoU threshold")
    parser.add_argument("--top-k", type=whole_number(1), default=DETECTION.top_k, help="maximum detections per image")
    parser.add_argument("--batch-size", type=whole_number(1), default=8, help="images per forward pass")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--runtime", default="auto", choices=RUNTIMES, help="onnx and openvino need an exported file")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    return parser.parse_args(argv)


def output_paths(args: argparse.Namespace) -> OutputPaths:
    return OutputPaths(
        pictures=None if args.no_pictures else Path(args.out),
        json=args.json,
        coco=Path(args.coco) if args.coco else None,
        voc_xml=Path(args.voc_xml) if args.voc_xml else None,
        yolo=Path(args.yolo) if args.yolo else None,
        crops=Path(args.crops) if args.crops else None,
    )


def classes_to_suppress(selected: Sequence[str], suppressed: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The classes not to detect: the suppressed ones and, if any are selected, all others."""
    unknown = sorted({*selected, *suppressed} - set(classes))
    if unknown:
        raise InputError(f"unknown class {', '.join(unknown)}: the model has {', '.join(classes)}")
    return sorted({name for name in classes if name in suppressed or (selected and name not in selected)})


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """In the with block SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that both end a run in the same way."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------------------------------------------------------------
# Images and videos


def run(sources: Sequence[Source], predict_fn: PredictFn, outputs: Outputs, batch_size: int) -> None:
    """Writes the detections of all inputs: of the images, then of the videos.

    A failure in one input is printed and counted, and does not stop the others. Ctrl-C in a video completes its output.

    Raises:
        KeyboardInterrupt: at Ctrl-C, unless it was in the last video.
    """
    images = [source for source in sources if not source.is_video]
    with tqdm(total=len(images), unit="image", disable=None) as progress:
        for batch in batched(images, batch_size):
            for source, image, detections in predict_each(load_each(batch, outputs), predict_fn, outputs):
                with outputs.failures_of(source.path):
                    outputs.write(source.name, image, detections, source.number)
            progress.update(len(batch))

    videos = [source for source in sources if source.is_video]
    used_names = {str(source.name.with_suffix("")).casefold() for source in sources}
    frame_ids = itertools.count(len(sources) + 1)
    for number, source in enumerate(videos, start=1):
        with outputs.failures_of(source.path):
            stopped = detect_in_video(source, predict_fn, outputs, batch_size, used_names, frame_ids)
            if stopped and number < len(videos):
                raise KeyboardInterrupt


def load_each(sources: Sequence[Source], outputs: Outputs) -> list[tuple[Source, Image.Image]]:
    """The inputs that can be read, with their images."""
    loaded = []
    for source in sources:
        with outputs.failures_of(source.path):
            loaded.append((source, source.load()))
    return loaded


def predict_each(
    batch: Sequence[tuple[Source, Image.Image]], predict_fn: PredictFn, outputs: Outputs
) -> Iterator[tuple[Source, Image.Image, Detections]]:
    """Adds the detections to each image of a batch. If the batch fails, each image is tried on its own."""
    results: list[Detections] = []
    try:
        if batch:
            results = predict_fn([image for _, image in batch], [source.path for source, _ in batch])
    except Exception as error:  # caused by the values of one image, or by the device's memory
        if len(batch) == 1:
            outputs.fail(batch[0][0].path, error)
        else:
            for item in batch:
                yield from predict_each([item], predict_fn, outputs)
        return
    for (source, image), detections in zip(batch, results, strict=True):
        yield source, image, detections


def detect_in_video(
    source: Source,
    predict_fn: PredictFn,
    outputs: Outputs,
    batch_size: int,
    used_names: set[str],
    frame_ids: Iterator[int],
) -> bool:
    """Writes the detections of each frame, and an annotated video.

    If the video is damaged or Ctrl-C stops it, the results of the frames before that are kept.

    Args:
        source: a video or camera.
        predict_fn: called with the frames of a batch and their names.
        outputs: where the detections are written.
        batch_size: frames per batch.
        used_names: names of other outputs, which frames must not use.
        frame_ids: image ids for the COCO results.

    Returns:
        Whether Ctrl-C ended it.

    Raises:
        DataError: for a video that cannot be opened or written.
    """
    video = Video(source.path)
    frames = Frames(video)
    path = outputs.paths.pictures / source.name if outputs.paths.pictures else None
    progress = tqdm(total=video.num_frames or None, unit="frame", disable=None)
    with progress, write_video(path, video) if path else contextlib.nullcontext() as write_frame:
        try:
            for batch in batched(frames, batch_size):
                for (number, image, time), detections in zip(batch, frames.predict(batch, predict_fn), strict=False):
                    if write_frame:
                        write_frame(annotate(image, detections), time)
                    name = unused_name(source.name.with_name(f"{source.name.stem}_{number:06d}.jpg"), used_names)
                    frame = {"frame": number, "seconds": float(time * video.time_base)}
                    outputs.write(name, image, detections, next(frame_ids), frame)
                progress.update(len(batch))
        except KeyboardInterrupt:
            frames.stopped = True
    if frames.error:
        outputs.fail(source.path, frames.error)
    ending = ": stopped" if frames.stopped else ""
    outputs.print(f"{source.path} -> {path}{ending}" if path and path.exists() else f"{source.path}{ending}")
    return frames.stopped


class Frames:
    """The frames of a video, up to its end, an error or Ctrl-C: iterates over (number from 1, image, time).

    Attributes:
        error: the error that ended the iteration, if any.
        stopped: whether Ctrl-C ended it. The frames read before are still processed.
    """

    def __init__(self, video: Video) -> None:
        self.video, self.stopped = video, False
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[tuple[int, Image.Image, int]]:
        try:
            for number, (image, time) in enumerate(self.video, start=1):
                yield number, image, time
                if self.error:
                    return
        except KeyboardInterrupt:
            self.stopped = True
        except DataError as error:
            self.error = error

    def predict(self, batch: Sequence[tuple[int, Image.Image, int]], predict_fn: PredictFn) -> list[Detections]:
        """Detections of a batch of frames; a failure is stored in `error` and ends the video without them."""
        try:
            return predict_fn([image for _, image, _ in batch], [self.video.source] * len(batch))
        except Exception as error:
            self.error = error
            return []


if __name__ == "__main__":
    main()
