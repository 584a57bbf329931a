"""A detector to ask: from a checkpoint or an exported file, for pictures of any kind, on any runtime.

    detector = load_detector("checkpoint/fpnssd300_lite_voc.pth.tar")
    for found in detector.predict(["a.jpg", Image.open("b.png"), array], min_score=0.4):
        print(found.names, found.scores, found.boxes)

Asking is safe from several threads at once: nothing in a Detector changes after it was made.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from fpnssd.data.images import MAX_PIXELS, DataError, fit_image, open_image, to_rgb
from model import FPNSSD, load_checkpoint, postprocess
from utils import InputError, autocast, pick_device, pick_precision

RUNTIMES = ("auto", "torch", "onnx", "openvino")
MIN_SCORE = 0.4  # for looking at: F1 was highest there on 200 photographs (README, Results)
WORTH_CONVERTING = 100  # pictures: converting takes seconds, and saves a fraction of the network's time for each


@dataclass
class Detections:
    """What was found in one picture, best first."""

    boxes: torch.Tensor  # (m, 4) float32, xyxy in pixels of the picture (turned upright, if its EXIF says so)
    scores: torch.Tensor  # (m,) float32
    labels: torch.Tensor  # (m,) int64, 1..C
    names: list  # of the m classes
    size: tuple  # (height, width) of the picture
    source: str = ""  # the file's name, if it came from a file

    def __len__(self):
        return len(self.names)

    def rows(self):
        """(box, score, label, name) of each, as builtins."""
        return list(zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.names, strict=True))

    def to_dict(self):
        """Builtins alone, for JSON."""
        objects = [{"name": n, "label": k, "score": s, "box": box} for box, s, k, n in self.rows()]
        return {"source": self.source, "height": self.size[0], "width": self.size[1], "objects": objects}

    def to_coco(self, image_id, category_ids=None):
        """Rows of COCO's result format; category_ids: of labels 1..C, the labels themselves if not given."""
        return [
            {
                "image_id": image_id,
                "category_id": category_ids[label - 1] if category_ids else label,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }
            for (x0, y0, x1, y1), score, label, _ in self.rows()
        ]

    def to_supervision(self):
        """supervision.Detections, with class_id 0..C-1 as that library counts."""
        import supervision  # only who asks for it needs it

        return supervision.Detections(
            xyxy=self.boxes.numpy().reshape(-1, 4),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy() - 1,
            data={"class_name": np.array(self.names, dtype=str)},
        )


class Detector:
    """A network and how it is run. forward: uint8 (B, 3, S, S) -> offsets (B, P, 4), logits (B, P, C + 1), float32."""

    def __init__(self, forward, config, priors, about):
        self.forward, self.config, self.priors, self.about = forward, config, priors, about

    @property
    def classes(self):
        return self.config.classes

    def predict(self, images, min_score=MIN_SCORE, max_overlap=0.5, top_k=200, suppress=None, batch_size=8):
        """Detections of one picture, or a list of them for several; see as_image for what a picture may be.

        suppress: names of classes to leave out. InputError names a picture that cannot be read.
        """
        if isinstance(images, (list, tuple)):
            return list(self.stream(images, min_score, max_overlap, top_k, suppress, batch_size))
        (found,) = self.stream([images], min_score, max_overlap, top_k, suppress)
        return found

    def stream(self, images, min_score=MIN_SCORE, max_overlap=0.5, top_k=200, suppress=None, batch_size=8):
        """The same one after the other for any number of pictures, `batch_size` at a time."""
        check_knobs(min_score, max_overlap, top_k)
        unknown = sorted(set(suppress or ()) - set(self.classes))
        if unknown:
            raise InputError(f"cannot suppress {', '.join(unknown)}: the model knows {', '.join(self.classes)}")
        pending = []
        for image in images:
            pending.append((as_image(image), os.fspath(image) if isinstance(image, (str, os.PathLike)) else ""))
            if len(pending) == batch_size:
                yield from self._answer(pending, min_score, max_overlap, top_k, suppress)
                pending = []
        if pending:
            yield from self._answer(pending, min_score, max_overlap, top_k, suppress)

    def _answer(self, pictures, min_score, max_overlap, top_k, suppress):
        offsets, logits = self.look([picture for picture, _ in pictures])
        sizes = [(picture.height, picture.width) for picture, _ in pictures]
        yield from self.decode(
            offsets, logits, sizes, [s for _, s in pictures], min_score, max_overlap, top_k, suppress
        )

    def look(self, pictures):
        """(offsets, logits) of RGB PIL images: what the network says of them, for decode."""
        return self.forward(torch.stack([fit_image(picture, self.config.image_size) for picture in pictures]))

    def decode(self, offsets, logits, sizes, sources, min_score=MIN_SCORE, max_overlap=0.5, top_k=200, suppress=None):
        """What forward said of pictures of these sizes, as Detections; the network does not run again."""
        logits = without_classes(logits, [self.classes.index(name) + 1 for name in suppress or ()])
        found = postprocess(offsets, logits, self.priors.to(offsets.device), sizes, min_score, max_overlap, top_k)
        for one, size, source in zip(found, sizes, sources, strict=True):
            names = [self.classes[label - 1] for label in one["labels"].tolist()]
            yield Detections(
                **{name: tensor.cpu() for name, tensor in one.items()}, names=names, size=size, source=source
            )


def check_knobs(min_score, max_overlap, top_k):
    for name, value in (("min_score", min_score), ("max_overlap", max_overlap)):
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {value}; it must lie in 0..1")
    if top_k < 1:
        raise InputError(f"top_k is {top_k}; it must be at least 1")


def without_classes(logits, labels):
    """A copy of logits (B, P, C + 1) in which these labels' share went to background.

    Spread over the other classes, as leaving the labels out would, it would raise their scores.
    """
    if not labels:
        return logits
    logits = logits.clone()
    for label in labels:
        logits[..., 0] = torch.logaddexp(logits[..., 0], logits[..., label])
        logits[..., label] = -torch.inf
    return logits


# ---------------------------------------------------------------------------------------------------------------------
# Where a detector comes from


def load_detector(path_or_model, device="auto", runtime="auto", precision="auto", pictures=1):
    """A Detector of a checkpoint, an exported .onnx or OpenVINO .xml file, or an FPNSSD.

    runtime: torch, or onnx or openvino, for which a checkpoint is converted once; auto, where a checkpoint is to run on
    a CPU, takes a converted file that lies beside it, makes one if more than WORTH_CONVERTING `pictures` are to come
    and requirements-deploy.txt is installed, and is torch otherwise. precision: auto, fp32, bf16 or fp16, of torch
    and of an exported file. An FPNSSD stays where it is unless a device is named.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"runtime {runtime!r} is none of {', '.join(RUNTIMES)}")
    if isinstance(path_or_model, FPNSSD):
        model = path_or_model if device == "auto" else path_or_model.to(pick_device(device))
        return torch_detector(model, precision, "a model")
    path = Path(path_or_model)
    kind = runtime_of(path)
    if kind != "torch":
        if runtime not in ("auto", kind):
            raise InputError(f"{path} is for the runtime {kind}, not {runtime}: give the checkpoint it was made of")
        from fpnssd.inference import runtimes  # what it needs is installed where exported files are

        return runtimes.load_exported(path, device, precision)
    place = pick_device(device)
    on_cpu = place.type == "cpu" and precision == "auto"
    if runtime not in ("auto", "torch") and not on_cpu:
        raise InputError(f"runtime {runtime} runs on the CPU, at the precision it finds fast: leave --precision alone")
    if runtime != "torch" and on_cpu and path.is_file():
        from fpnssd.inference import runtimes

        make = pictures > WORTH_CONVERTING or runtime != "auto"
        if detector := runtimes.detector_beside(path, runtime, make):
            return detector
    checkpoint = load_checkpoint(path)
    model = checkpoint["model"].to(place, memory_format=torch.channels_last)
    detector = torch_detector(model, precision, str(path))
    detector.about["training"] = checkpoint.get("train_config", {})
    return detector


def runtime_of(path):
    """The runtime that a file is for, by its ending."""
    return {".onnx": "onnx", ".xml": "openvino"}.get(Path(path).suffix.lower(), "torch")


def torch_detector(model, precision="auto", source="a model"):
    precision = pick_precision(precision, model.priors.device)

    @torch.no_grad()
    def forward(squares):
        if model.training:  # somebody's own model
            model.eval()
        device = model.priors.device  # now, as its owner may have moved it
        squares = squares.to(device).contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            offsets, logits = model(squares)
        return offsets.float(), logits.float()

    about = {"source": source, "runtime": "torch", "device": model.priors.device.type, "precision": precision}
    return Detector(forward, model.config, model.priors, about)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of any kind


def as_image(picture, name="from bytes", max_pixels=MAX_PIXELS):
    """A new RGB PIL image, upright, of a path, PIL image, bytes, numpy array or tensor; InputError otherwise.

    Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8, uint16 or float 0..1; tensors (3, H, W) or (1, H, W)
    uint8 or float 0..1. What is given is never changed. 16 bits lose their lower half, transparency is filled.
    name: of bytes, for messages. max_pixels: files with more are refused before they are decoded.
    """
    if isinstance(picture, (str, os.PathLike)):
        with open_image(picture, max_pixels=max_pixels) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    if isinstance(picture, (bytes, bytearray, memoryview)):
        with open_image(io.BytesIO(picture), name, max_pixels) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    if isinstance(picture, Image.Image):
        if picture.width * picture.height > MAX_PIXELS:
            raise DataError(f"a picture of {picture.width} x {picture.height} pixels is refused: shrink it")
        try:
            return to_rgb(ImageOps.exif_transpose(picture))
        except MemoryError:
            raise
        except Exception as error:  # as in open_image
            raise DataError(f"a picture is damaged: {error}") from error
    if isinstance(picture, torch.Tensor):
        if picture.dim() != 3 or picture.shape[0] not in (1, 3):
            raise InputError(f"a tensor of shape {tuple(picture.shape)} is no picture: (3, H, W) or (1, H, W)")
        if picture.is_floating_point():
            picture = picture.float()  # numpy knows no bfloat16
        picture = picture.detach().cpu().permute(1, 2, 0).numpy()
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    raise InputError(f"a {type(picture).__name__} is no picture: a path, bytes, PIL image, array or tensor is")


def _from_array(array):
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise InputError(f"an array of shape {array.shape} is no picture: (H, W), (H, W, 3) or (H, W, 4)")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise InputError(f"an array of {array.shape[1]} x {array.shape[0]} pixels is refused: shrink it")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise InputError("an array of floats has to lie in 0..1 and be finite")
        array = (array * 255).round()
    elif array.dtype == np.uint16:
        array = array // 257
    elif array.dtype != np.uint8:
        raise InputError(f"an array of {array.dtype} is no picture: uint8, uint16 or float 0..1 is")
    return to_rgb(Image.fromarray(array.astype(np.uint8)))
