"""Compares ways to suppress overlapping detections: hard NMS, Gaussian soft-NMS, and NMS with voted boxes.

    python -m experiments.decoding CHECKPOINT --data data/vocreal --split val

The network runs once; each method gets all pairs of prior and class with a score above 0.01, class by class.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from datasets import DetectionDataset, make_loader
from fpnssd.data.data_list import DataList
from fpnssd.evaluation.metrics import compute_metrics
from fpnssd.inference.detector import Detector, load_detector
from model import EVALUATION, above_score, boxes_in_pixels, decode_offsets

# boxes (n, 4) xyxy and scores (n,) of one class, best first -> those that are kept, in any order
Method = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
MOST = 400  # candidates of a class that soft-NMS rescores
SCORES = ("voc2007_ap50", "coco_ap", "coco_ap75", "coco_ap_small", "coco_ap_medium", "coco_ap_large")


def hard_nms(boxes: Tensor, scores: Tensor, max_overlap: float) -> tuple[Tensor, Tensor]:
    """Greedy NMS: drops boxes that overlap a better one by more than max_overlap."""
    kept = nms(boxes, scores, max_overlap)
    return boxes[kept], scores[kept]


def voted_nms(boxes: Tensor, scores: Tensor, max_overlap: float, sigma: float) -> tuple[Tensor, Tensor]:
    """Greedy NMS whose boxes become means of the candidates that overlap them by at least half (arXiv 1505.01749).

    Weights are score * exp(-(1 - IoU)^2 / sigma), as in arXiv 1809.08545 without its variances.
    """
    kept = nms(boxes, scores, max_overlap)
    overlaps = box_iou(boxes[kept], boxes)
    weights = scores * torch.exp(-((1 - overlaps) ** 2) / sigma) * (overlaps >= 0.5)
    return weights @ boxes / weights.sum(dim=1, keepdim=True), scores[kept]


def soft_nms(boxes: Tensor, scores: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Soft-NMS (arXiv 1704.04503): lowers the scores of boxes that overlap a better one by exp(-IoU^2 / sigma)."""
    boxes, scores = boxes[:MOST], scores[:MOST].clone()
    overlaps = box_iou(boxes, boxes)
    final = torch.zeros_like(scores)
    for _ in range(len(scores)):
        best = int(scores.argmax())
        if scores[best] < EVALUATION.min_score:
            break
        final[best] = scores[best]
        scores *= torch.exp(-(overlaps[best] ** 2) / sigma)
        scores[best] = 0
    return boxes[final > 0], final[final > 0]


METHODS: dict[str, Method] = {
    **{f"hard, {t}": lambda b, s, t=t: hard_nms(b, s, t) for t in (0.45, 0.5, 0.55, 0.6)},
    **{f"voted, 0.45, {x}": lambda b, s, x=x: voted_nms(b, s, 0.45, x) for x in (0.025, 0.05, 0.1)},
    **{f"soft, {x}": lambda b, s, x=x: soft_nms(b, s, x) for x in (0.3, 0.5)},
}


@torch.no_grad()
def candidates_of(detector: Detector, data_list: DataList) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each image boxes (n, 4) xyxy in pixels, scores (n,) and labels (n,) above EVALUATION.min_score, best first."""
    candidates = []
    for batch in make_loader(DetectionDataset(data_list, detector.config.image_size), 16, workers=1):
        offsets, logits = detector.forward(batch["image"])
        for i, size in enumerate(batch["size"]):
            scores = logits[i].softmax(dim=1)[:, 1:]
            prior_index, labels = above_score(scores, EVALUATION.min_score).nonzero(as_tuple=True)
            boxes = boxes_in_pixels(decode_offsets(offsets[i], detector.priors)[prior_index], size)
            found = scores[prior_index, labels]
            order = found.argsort(descending=True, stable=True)
            order = order[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)[order]]
            candidates.append((boxes[order], found[order], labels[order] + 1))
    return candidates


def suppress(candidates: tuple[Tensor, Tensor, Tensor], method: Method) -> dict[str, Tensor]:
    """The detections of one image by a method, best first."""
    boxes, scores, labels = candidates
    kept = [(*method(boxes[labels == label], scores[labels == label]), int(label)) for label in labels.unique()]
    parts = {
        "boxes": [boxes[:0], *(b for b, _, _ in kept)],
        "scores": [scores[:0], *(s for _, s, _ in kept)],
        "labels": [labels[:0], *(torch.full((len(s),), label) for _, s, label in kept)],
    }
    joined = {name: torch.cat(part) for name, part in parts.items()}
    order = joined["scores"].argsort(descending=True, stable=True)[: EVALUATION.top_k]
    return {name: tensor[order] for name, tensor in joined.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--data", default="data/vocreal", help="folder of data lists")
    parser.add_argument("--split", default="val", help="name of the data list")
    args = parser.parse_args(argv)
    data_list = DataList.load(Path(args.data) / f"{args.split}.json")
    candidates = candidates_of(load_detector(args.checkpoint, "cpu", "torch", "fp32"), data_list)
    print("| method |", " | ".join(SCORES), "| CPU s |")
    for name, method in METHODS.items():
        start = time.process_time()
        detections = [suppress(one, method) for one in candidates]
        seconds = time.process_time() - start
        metrics = compute_metrics(data_list, detections)
        print(f"| {name} |", " | ".join(f"{100 * metrics[score]:.1f}" for score in SCORES), f"| {seconds:.1f} |")


if __name__ == "__main__":
    main()
