"""A detector for images of any kind, made from a checkpoint, a model or an exported file.

    detector = load_detector("checkpoint/fpnssd300_lite_voc.pth.tar")
    for detections in detector.predict(["a.jpg", Image.open("b.png"), array], min_score=0.4):
        print(detections.names, detections.scores, detections.boxes)

A Detector can be used by several threads at once.
"""

import contextlib
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from PIL import Image

from fpnssd.data.images import fit_image, load_image
from fpnssd.inference.runtimes import SUFFIXES, Forward, exported_path, load_exported, load_exported_from, runtime_of
from model import DETECTION, FPNSSD, ModelConfig, load_checkpoint, postprocess
from utils import InputError, autocast, pick_device, pick_precision

RUNTIMES = ("auto", "torch", "onnx", "openvino")
# What load_image reads: a path, an encoded file's bytes, a PIL image, an RGB array or tensor.
ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor
T = TypeVar("T")


@dataclass
class Detections:
    """The detections of one image, best first.

    Indexing selects some of them: `detections[detections.scores > 0.5]`, `detections[:3]`, `detections[[0, 2]]`.
    """

    boxes: torch.Tensor  # (m, 4) float32, xyxy in pixels of the image (turned upright, if its EXIF says so)
    scores: torch.Tensor  # (m,) float32
    labels: torch.Tensor  # (m,) int64, 1..C
    names: list[str]  # of the m classes
    size: tuple[int, int]  # (height, width) of the image
    source: str = ""  # the image's path, if it came from a file
    category_ids: tuple[int, ...] = ()  # of labels 1..C in the training list; () means 1..C

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, selection: Any) -> "Detections":
        """The selected detections, as Detections.

        Args:
            selection: an index, a slice, a list or tensor of indices, or a bool mask (m,).
        """
        rows = torch.arange(len(self))[selection].reshape(-1)
        return replace(
            self,
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
            names=[self.names[row] for row in rows.tolist()],
        )

    def rows(self) -> list[tuple[list[float], float, int, str]]:
        """(box, score, label, name) of each detection, as builtins."""
        return list(zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.names, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Builtins alone, for JSON: source, height, width, and objects with name, label, score and box."""
        objects = [
            {"name": name, "label": label, "score": score, "box": box} for box, score, label, name in self.rows()
        ]
        return {"source": self.source, "height": self.size[0], "width": self.size[1], "objects": objects}

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Rows of the COCO results format.

        Args:
            image_id: the image's, for all rows.
            category_ids: of labels 1..C; those of the list that the model was trained on, if not given.
        """
        ids = category_ids or self.category_ids
        return [
            {
                "image_id": image_id,
                "category_id": ids[label - 1] if ids else label,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }
            for (x0, y0, x1, y1), score, label, _ in self.rows()
        ]

    def to_supervision(self) -> Any:
        """supervision.Detections, with class_id 0..C-1 as in that library (pip install supervision)."""
        import supervision  # optional

        return supervision.Detections(
            xyxy=self.boxes.numpy().reshape(-1, 4),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy() - 1,
            data={"class_name": np.array(self.names, dtype=str)},
        )


class Detector:
    """A network on its runtime, with its priors and configuration. load_detector makes one.

    Attributes:
        forward: uint8 (B, 3, S, S) RGB -> offsets (B, P, 4), logits (B, P, C + 1), float32.
        config: configuration of the model.
        priors: (P, 4) float32, cxcywh in 0..1.
        info: source, runtime, device, precision; of a checkpoint its training configuration ("training"), of an
            exported file the SHA-256 of the checkpoint it was made from ("exported_from").
    """

    def __init__(self, forward: Forward, config: ModelConfig, priors: torch.Tensor, info: dict[str, Any]) -> None:
        self.forward, self.config, self.priors, self.info = forward, config, priors, info

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of labels 1..C."""
        return self.config.classes

    @overload
    def predict(
        self, images: list[ImageLike] | tuple[ImageLike, ...], min_score: float = ..., max_overlap: float = ...,
        top_k: int = ..., suppress: Iterable[str] | None = ..., batch_size: int = ...,
    ) -> list[Detections]: ...  # fmt: skip

    @overload
    def predict(
        self, images: ImageLike, min_score: float = ..., max_overlap: float = ..., top_k: int = ...,
        suppress: Iterable[str] | None = ..., batch_size: int = ...,
    ) -> Detections: ...  # fmt: skip

    def predict(
        self,
        images: ImageLike | list[ImageLike] | tuple[ImageLike, ...],
        min_score: float = DETECTION.min_score,
        max_overlap: float = DETECTION.max_overlap,
        top_k: int = DETECTION.top_k,
        suppress: Iterable[str] | None = None,
        batch_size: int = 8,
    ) -> Detections | list[Detections]:
        """Detects objects in images of any kind.

        Args:
            images: one image, or a list of them; see load_image for what an image may be. Arrays are RGB.
            min_score: score threshold: detections score above it.
            max_overlap: NMS IoU threshold within a class.
            top_k: maximum number of detections per image.
            suppress: names of classes that are not detected.
            batch_size: images that are loaded and run through the network at a time.

        Returns:
            Detections of one image, or a list of them for a list.

        Raises:
            InputError: for an image that cannot be read, which it names, or a threshold out of range.
        """
        several = isinstance(images, (list, tuple))
        results: list[Detections] = []
        for batch in batched(images if isinstance(images, (list, tuple)) else [images], batch_size):
            sources = [os.fspath(image) if isinstance(image, (str, os.PathLike)) else "" for image in batch]
            loaded = [load_image(image) for image in batch]
            results += self.predict_images(loaded, min_score, max_overlap, top_k, suppress, sources)
        return results if several else results[0]

    def predict_images(
        self,
        images: Sequence[Image.Image],
        min_score: float = DETECTION.min_score,
        max_overlap: float = DETECTION.max_overlap,
        top_k: int = DETECTION.top_k,
        suppress: Iterable[str] | None = None,
        sources: Sequence[str] | None = None,
    ) -> list[Detections]:
        """Detects objects in one batch of images that load_image returned; otherwise as predict.

        Args:
            images: RGB.
            sources: where each came from, for Detections.source.
        """
        check_thresholds(min_score, max_overlap, top_k)
        offsets, logits = self.run_network(images)
        sizes = [(image.height, image.width) for image in images]
        return self.postprocess(offsets, logits, sizes, min_score, max_overlap, top_k, suppress, sources)

    def run_network(self, images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's raw outputs for RGB images: offsets (B, P, 4), logits (B, P, C + 1), for postprocess."""
        return self.forward(torch.stack([fit_image(image, self.config.image_size) for image in images]))

    def postprocess(
        self,
        offsets: torch.Tensor,
        logits: torch.Tensor,
        sizes: Sequence[tuple[int, int]],
        min_score: float = DETECTION.min_score,
        max_overlap: float = DETECTION.max_overlap,
        top_k: int = DETECTION.top_k,
        suppress: Iterable[str] | None = None,
        sources: Sequence[str] | None = None,
    ) -> list[Detections]:
        """Decodes raw outputs; the network does not run again.

        Args:
            offsets, logits: from run_network.
            sizes: (height, width) of each image, in pixels.
            min_score, max_overlap, top_k, suppress, sources: as for predict_images.

        Raises:
            InputError: for an unknown class, a threshold out of range, or outputs that are NaN.
        """
        suppressed = set(suppress or ())
        unknown = sorted(suppressed - set(self.classes))
        if unknown:
            raise InputError(f"cannot suppress {', '.join(unknown)}: the classes are {', '.join(self.classes)}")
        logits = suppress_classes(logits, [self.classes.index(name) + 1 for name in suppressed])
        try:
            results = postprocess(offsets, logits, self.priors.to(offsets.device), sizes, min_score, max_overlap, top_k)
        except InputError as error:
            raise InputError(f"{self.info['source']}: {error}") from error
        return [
            Detections(
                boxes=result["boxes"].cpu(),
                scores=result["scores"].cpu(),
                labels=result["labels"].cpu(),
                names=[self.classes[label - 1] for label in result["labels"].tolist()],
                size=size,
                source=source,
                category_ids=self.config.category_ids,
            )
            for result, size, source in zip(results, sizes, sources or [""] * len(sizes), strict=True)
        ]


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter; items are taken from an iterator only as they are needed."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def check_thresholds(min_score: float, max_overlap: float, top_k: int) -> None:
    """Raises InputError for a threshold that is out of range."""
    for name, value in (("min_score", min_score), ("max_overlap", max_overlap)):
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {value}; it must lie in 0..1")
    if top_k < 1:
        raise InputError(f"top_k is {top_k}; it must be at least 1")


def suppress_classes(logits: torch.Tensor, labels: Iterable[int]) -> torch.Tensor:
    """Logits in which background has the probability of some classes besides its own.

    Omitting these classes from the softmax would instead raise the scores of all others.

    Args:
        logits: (B, P, C + 1).
        labels: classes to suppress, 1..C.

    Returns:
        (B, P, C + 1); `logits` themselves if there is nothing to suppress.
    """
    labels = list(labels)
    if not labels:
        return logits
    logits = logits.clone()
    for label in labels:
        logits[..., 0] = torch.logaddexp(logits[..., 0], logits[..., label])
        logits[..., label] = -torch.inf
    return logits


# ---------------------------------------------------------------------------------------------------------------------
# Loading a detector


def load_detector(
    path_or_model: str | os.PathLike | FPNSSD, device: str = "auto", runtime: str = "auto", precision: str = "auto"
) -> Detector:
    """Makes a Detector from a checkpoint, an exported file or a model.

    Args:
        path_or_model: a checkpoint, an exported .onnx or OpenVINO .xml file, or an FPNSSD, which stays on its device
            unless another one is named.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        runtime: "torch", or "onnx" or "openvino" for the exported file beside a checkpoint; "auto" takes such a file on
            a CPU if it was made from this very checkpoint, and prints so on stderr, and is torch otherwise.
        precision: "auto", "fp32", "bf16" or "fp16".

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if the file cannot be read, or cannot run on this device, runtime or precision.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"runtime {runtime!r} is not one of {', '.join(RUNTIMES)}")
    if isinstance(path_or_model, FPNSSD):
        if runtime in SUFFIXES:
            raise InputError(f"a model runs on torch, not on {runtime}: give the path of its checkpoint")
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
            raise InputError(f"runtime {runtime} runs on the CPU, not on {device!r}: omit --device")
        return Detector(*load_exported_from(path, runtime, precision))
    place = pick_device(device)
    if runtime == "auto" and precision == "auto" and place.type == "cpu" and (exported := _exported_beside(path)):
        return exported
    checkpoint = load_checkpoint(path)
    model = checkpoint["model"].to(place, memory_format=torch.channels_last)
    return torch_detector(model, precision, str(path), training=checkpoint.get("train_config", {}))


def _exported_beside(checkpoint: Path) -> Detector | None:
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


def torch_detector(
    model: FPNSSD, precision: str = "auto", source: str = "a model", training: dict[str, Any] | None = None
) -> Detector:
    """A Detector that runs a model where it is. The model may be moved or trained meanwhile.

    Args:
        model: used as it is, not copied. It predicts in evaluation mode; then the mode of each module is restored.
        precision: "auto", "fp32", "bf16" or "fp16".
        source: a name for it, for Detector.info.
        training: its training configuration, for Detector.info.
    """
    precision = pick_precision(precision, model.priors.device)

    @torch.no_grad()
    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device = model.priors.device
        images = images.to(device).contiguous(memory_format=torch.channels_last)
        with evaluation_mode(model), autocast(device, precision):
            offsets, logits = model(images)
        return offsets.float(), logits.float()

    info = {"source": source, "runtime": "torch", "device": model.priors.device.type, "precision": precision}
    return Detector(forward, model.config, model.priors, info | ({} if training is None else {"training": training}))


_mode_lock = threading.Lock()
# Of each predicting model: the number of running calls, and the modules to put back into training mode.
_predicting: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode for a with block; afterwards, also after an error, each of its modules is in
    the mode it was in before. Of blocks in several threads the first one sets the mode and the last one restores it."""
    with _mode_lock:
        calls, in_training = _predicting.get(model, (0, []))
        if not calls:
            in_training = [module for module in model.modules() if module.training]
            for module in in_training:
                module.training = False
        _predicting[model] = (calls + 1, in_training)
    try:
        yield
    finally:
        with _mode_lock:
            calls, in_training = _predicting[model]
            if calls > 1:
                _predicting[model] = (calls - 1, in_training)
            else:
                del _predicting[model]
                for module in in_training:
                    module.training = True
