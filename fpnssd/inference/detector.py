"""A detector to ask: from a checkpoint or an exported file, for pictures of any kind, on any runtime.

    detector = load_detector("checkpoint/fpnssd300_lite_voc.pth.tar")
    for found in detector.predict(["a.jpg", Image.open("b.png"), array], min_score=0.4):
        print(found.names, found.scores, found.boxes)

Asking is safe from several threads at once: nothing in a Detector changes after it was made.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fpnssd.data.images import fit_image, load_image
from fpnssd.inference.runtimes import SUFFIXES, exported_path, load_exported, load_exported_from, runtime_of
from model import DETECTION, FPNSSD, load_checkpoint, postprocess
from utils import InputError, autocast, pick_device, pick_precision

RUNTIMES = ("auto", "torch", "onnx", "openvino")
MIN_SCORE = DETECTION.min_score


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
        """Detections of one picture, or a list of them for several; see load_image for what a picture may be.

        suppress: names of classes to leave out. InputError names a picture that cannot be read.
        """
        if isinstance(images, (list, tuple)):
            return list(self.stream(images, min_score, max_overlap, top_k, suppress, batch_size))
        (found,) = self.stream([images], min_score, max_overlap, top_k, suppress)
        return found

    def stream(
        self,
        images,
        min_score=MIN_SCORE,
        max_overlap=DETECTION.max_overlap,
        top_k=DETECTION.top_k,
        suppress=None,
        batch_size=8,
    ):
        """The same one after the other for any number of pictures, `batch_size` at a time."""
        check_knobs(min_score, max_overlap, top_k)
        unknown = sorted(set(suppress or ()) - set(self.classes))
        if unknown:
            raise InputError(f"cannot suppress {', '.join(unknown)}: the model knows {', '.join(self.classes)}")
        pending = []
        for image in images:
            pending.append((load_image(image), os.fspath(image) if isinstance(image, (str, os.PathLike)) else ""))
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

    def decode(
        self,
        offsets,
        logits,
        sizes,
        sources,
        min_score=MIN_SCORE,
        max_overlap=DETECTION.max_overlap,
        top_k=DETECTION.top_k,
        suppress=None,
    ):
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


def load_detector(path_or_model, device="auto", runtime="auto", precision="auto"):
    """A Detector of a checkpoint, an exported file, or a model.

    Args:
        path_or_model: a checkpoint, an exported .onnx or OpenVINO .xml file, or an FPNSSD, which stays on its device
            unless another one is named.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        runtime: "torch", or "onnx" or "openvino" for the exported file beside a checkpoint; "auto" takes such a file on
            a CPU if it was made from this very checkpoint, and says so on stderr, and is torch otherwise.
        precision: "auto", "fp32", "bf16" or "fp16".

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if the file cannot be read, or cannot run as asked.
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
            raise InputError(f"{path} is for the runtime {kind}, not {runtime}: give the checkpoint it was made from")
        return Detector(*load_exported(path, device, precision))
    if runtime in SUFFIXES:
        if device not in ("auto", "cpu"):
            raise InputError(f"runtime {runtime} runs on the CPU, not on {device!r}: leave --device alone")
        return Detector(*load_exported_from(path, runtime, precision))
    place = pick_device(device)
    if runtime == "auto" and precision == "auto" and place.type == "cpu" and (exported := _exported_beside(path)):
        return exported
    checkpoint = load_checkpoint(path)
    model = checkpoint["model"].to(place, memory_format=torch.channels_last)
    detector = torch_detector(model, precision, str(path))
    detector.about["training"] = checkpoint.get("train_config", {})
    return detector


def _exported_beside(checkpoint):
    """A Detector of the first exported file that lies beside a checkpoint and belongs to it; None if none does."""
    for runtime in SUFFIXES:
        path = exported_path(checkpoint, runtime)
        if checkpoint.is_file() and path.is_file():
            try:
                detector = Detector(*load_exported_from(checkpoint, runtime))
            except (InputError, OSError, RuntimeError):
                continue  # damaged, of another checkpoint, or its runtime is not installed
            print(f"using {path}, exported from {checkpoint} (--runtime torch for the checkpoint)", file=sys.stderr)
            return detector
    return None


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
