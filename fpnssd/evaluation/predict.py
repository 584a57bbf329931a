"""Runs a detector over a data list; training, eval.py and export.py score with it.

predict_fn = Predictor(detector)
detections, seconds = predict(predict_fn, data_list, detector.config.image_size)
metrics = evaluate(predict_fn, data_list, detector.config.image_size)
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from datasets import DetectionDataset, make_loader
from fpnssd.data.data_list import DataList
from fpnssd.data.images import DataError
from fpnssd.evaluation.metrics import ImageDetections, compute_metrics
from fpnssd.inference.detector import Detector
from fpnssd.training import distributed
from model import EVALUATION, postprocess
from utils import InputError

PredictFn = Callable[[torch.Tensor, Sequence[tuple[int, int]]], list[ImageDetections]]


class Predictor:
    """Detections of preprocessed batches, with the thresholds of an evaluation, on the CPU.

    Args:
        detector: the network and its priors.
        min_score: score threshold.
        max_overlap: NMS IoU threshold.
        top_k: maximum number of detections per image.
        flip: average the class probabilities and the offsets of each image and its mirror image.

    Attributes:
        seconds: time spent so far in the network ("forward") and in decoding ("decode").

    Raises:
        InputError: with flip, if the priors are not symmetric.
    """

    def __init__(
        self,
        detector: Detector,
        min_score: float = EVALUATION.min_score,
        max_overlap: float = EVALUATION.max_overlap,
        top_k: int = EVALUATION.top_k,
        flip: bool = False,
    ) -> None:
        self.detector, self.thresholds = detector, (min_score, max_overlap, top_k)
        self.mirror = mirror_index(detector.priors) if flip else None
        self.seconds = {"forward": 0.0, "decode": 0.0}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> list[ImageDetections]:
        """
        Args:
            images: uint8 (B, 3, S, S), RGB.
            sizes: (height, width) of each original image, in pixels.

        Returns:
            For each image its boxes (m, 4) in pixels of the original, scores (m,) and labels (m,), best first.
        """
        start = self._now()
        offsets, logits = self.detector.forward(images)
        if self.mirror is not None:
            mirrored_offsets, mirrored_logits = self.detector.forward(images.flip(3))
            sign = offsets.new_tensor([-1, 1, 1, 1])  # mirroring turns the x offset of a centre around
            offsets = (offsets + sign * mirrored_offsets[:, self.mirror]) / 2
            logits = ((logits.softmax(dim=2) + mirrored_logits[:, self.mirror].softmax(dim=2)) / 2).log()
        middle = self._now()
        results = postprocess(offsets, logits, self.detector.priors.to(offsets.device), sizes, *self.thresholds)
        results = [{name: tensor.cpu() for name, tensor in result.items()} for result in results]
        self.seconds["forward"] += middle - start
        self.seconds["decode"] += self._now() - middle
        return results

    def _now(self) -> float:
        if self.detector.info["device"] == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def mirror_index(priors: torch.Tensor) -> torch.Tensor:
    """The horizontally mirrored partner of each prior.

    Args:
        priors: (P, 4) cxcywh in 0..1.

    Returns:
        int64 (P,): indices into `priors`.

    Raises:
        InputError: if a prior has no mirror image among them.
    """
    mirrored = priors * priors.new_tensor([-1, 1, 1, 1]) + priors.new_tensor([1, 0, 0, 0])
    distances = [torch.cdist(part, priors, p=1).min(dim=1) for part in mirrored.split(1024)]
    if max(part.values.max().item() for part in distances) > 1e-4:
        raise InputError("the priors are not symmetric, so --flip cannot be used with this detector")
    return torch.cat([part.indices for part in distances])


def predict(
    predict_fn: PredictFn, data_list: DataList, image_size: int = 300, batch_size: int = 16, workers: int = 2
) -> tuple[list[ImageDetections] | None, dict[str, float]]:
    """Runs predict_fn over every image of a data list.

    With several processes (torchrun) each one predicts every num_processes-th image.

    Args:
        predict_fn: as Predictor.__call__.
        data_list: the images.
        image_size: side S of the square the images are resized to, in pixels.
        batch_size: images per call.
        workers: processes that load images.

    Returns:
        The detections of each image in the order of the list (None in all but the main process), and seconds by stage.
    """
    rows = range(distributed.rank(), len(data_list), distributed.num_processes())
    loader = make_loader(Subset(DetectionDataset(data_list, image_size), rows), batch_size, workers=workers)
    detections: list[ImageDetections] = []
    inside, start = 0.0, time.perf_counter()
    hidden = None if distributed.is_main() else True  # None: hidden if stderr is not a terminal
    for batch in tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=hidden):
        begun = time.perf_counter()
        detections += predict_fn(batch["image"], batch["size"])
        inside += time.perf_counter() - begun
    seconds = {"load": time.perf_counter() - start - inside, **getattr(predict_fn, "seconds", {"predict": inside})}
    shares = distributed.gather(detections)
    if shares is None:
        return None, seconds
    return [shares[row % len(shares)][row // len(shares)] for row in range(len(data_list))], seconds


def evaluate(
    predict_fn: PredictFn, data_list: DataList, image_size: int = 300, batch_size: int = 16, workers: int = 2
) -> dict | None:
    """metrics.compute_metrics of predict_fn on a data list; arguments as for predict. None but in the main process."""
    detections, _ = predict(predict_fn, data_list, image_size, batch_size, workers)
    return None if detections is None else compute_metrics(data_list, detections)


def check_same_classes(classes: Sequence[str], data_list: DataList, source: str) -> None:
    """Raises DataError unless a data list has exactly these classes in this order; source: whose they are."""
    if tuple(classes) != tuple(data_list.classes):
        raise DataError(
            f"{source} has {len(classes)} classes ({_first_names(classes)}), but {data_list.path} has "
            f"{len(data_list.classes)} ({_first_names(data_list.classes)}): use a list made with the same classes"
        )


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
