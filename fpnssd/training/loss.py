"""Matching of priors with ground truth, and the losses (SSD, Liu et al., arXiv:1512.02325, section 2.2, and others).

    loss = MultiBoxLoss(model.priors, model.level_counts, matching="atss", class_loss="focal")
    matches = loss.match(batch)
    terms = loss(offsets, logits, batch, matches, matches.num_positives.clamp(min=1))  # {"box": ..., "class": ...}

The ground truth of a batch is padded: boxes_norm (B, N, 4) xyxy in 0..1, labels (B, N) with 0 for padding, difficult
and crowd (B, N) bool. There is no loop over images and no GPU synchronisation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from model import decode_offsets, encode_boxes
from utils import InputError

IGNORED = -1  # the label of a prior that is neither a positive nor a negative
EPS = 1e-9  # of the image's area, far below a pixel's: keeps divisions finite

Matching = Literal["multibox", "atss"]
BoxLoss = Literal["smooth_l1", "giou"]
ClassLoss = Literal["ohem", "focal", "quality"]


# ---------------------------------------------------------------------------------------------------------------------
# Matching


class Matches(NamedTuple):
    """The ground truth that each prior is trained on."""

    labels: Tensor  # (B, P) int64: 1..C for positives, 0 for background, IGNORED
    gt_index: Tensor  # (B, P) int64: the matched ground-truth box of the image for positives; undefined elsewhere

    @property
    def num_positives(self) -> Tensor:
        """() int64, on the device."""
        return (self.labels > 0).sum()


def assign_by_iou(iou: Tensor, boxes: Tensor, priors: Tensor, min_iou: float = 0.5) -> Tensor:
    """SSD's rule: a prior may be matched with every box of IoU >= min_iou.

    Args:
        iou: (B, N, P), of every ground-truth box and prior.
        boxes: (B, N, 4) xyxy in 0..1; not used.
        priors: (P, 4) cxcywh; not used.
        min_iou: the IoU threshold.

    Returns:
        (B, N, P) bool: the pairs that may be matched.
    """
    return iou >= min_iou


def assign_atss(
    iou: Tensor, boxes: Tensor, priors: Tensor, level_counts: list[tuple[int, int]], nearest: int = 9
) -> Tensor:
    """ATSS (Zhang et al., arXiv:1912.02424): an IoU threshold for each box, from the priors around its centre.

    The candidates of a box are the priors of the `nearest` cells of each level. Those of IoU >= mean + standard
    deviation of the candidates' IoU, with their centre inside the box, may be matched. Where cells are equally far, the
    prior of lower index is taken, on every device.

    Args:
        iou: (B, N, P), of every ground-truth box and prior.
        boxes: (B, N, 4) xyxy in 0..1.
        priors: (P, 4) cxcywh.
        level_counts: (priors, priors per cell) of each level.
        nearest: cells per level.

    Returns:
        (B, N, P) bool: the pairs that may be matched.
    """
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2  # (B, N, 2)
    distances = (centres[..., None, :] - priors[:, :2]).square().sum(dim=-1)  # (B, N, P)
    candidates, first = [], 0
    for count, per_cell in level_counts:
        of_level = distances[..., first : first + count]
        candidates.append(first + _ordered(of_level, min(nearest * per_cell, count), largest=False))
        first += count
    candidates = torch.cat(candidates, dim=2)  # (B, N, K)
    candidate_iou = iou.gather(2, candidates)
    threshold = candidate_iou.mean(dim=2, keepdim=True) + candidate_iou.std(dim=2, keepdim=True)
    chosen = torch.zeros_like(iou, dtype=torch.bool).scatter(2, candidates, candidate_iou >= threshold)
    low, high = boxes[..., None, :2], boxes[..., None, 2:]  # (B, N, 1, 2)
    return chosen & ((priors[:, :2] > low) & (priors[:, :2] < high)).all(dim=-1)


AssignRule = Callable[[Tensor, Tensor, Tensor], Tensor]


def match(
    priors: Tensor, batch: dict[str, Any], rule: AssignRule = assign_by_iou, difficult_positive: bool = True
) -> Matches:
    """Matches every prior with a ground-truth box of its image, or with background.

    Every box gets a prior of its own first (force_match). Each other prior is matched with the box of highest IoU (of
    equals the first) among those that `rule` allows. Crowds, and difficult objects unless difficult_positive, are
    matched with no prior. A prior is IGNORED, unless it is a positive, if half of its area or more lies in one of
    these, if `rule` would match it with one, or if it is the prior of highest IoU with one.

    Args:
        priors: (P, 4) cxcywh in 0..1.
        batch: boxes_norm (B, N, 4) xyxy in 0..1, labels, difficult, crowd (B, N).
        rule: called with iou (B, N, P), boxes and priors, returns (B, N, P) bool: the pairs that may be matched.
        difficult_positive: whether priors are trained on difficult objects.
    """
    boxes, labels = batch["boxes_norm"], batch["labels"]
    batch_size, num_boxes = labels.shape
    num_priors = len(priors)
    if num_boxes == 0:
        background = labels.new_zeros(batch_size, num_priors)
        return Matches(background, background)
    is_object = labels > 0
    ignored_gt = is_object & (batch["crowd"] if difficult_positive else batch["crowd"] | batch["difficult"])
    valid_gt = is_object & ~ignored_gt

    iou, share_inside = _pairwise_iou(boxes, box_convert(priors, "cxcywh", "xyxy"))  # (B, N, P)
    allowed = rule(iou, boxes, priors) & is_object[..., None]
    best_of_box = torch.zeros_like(allowed).scatter(2, iou.argmax(dim=2, keepdim=True), True) & (iou > 0)
    near_ignored = (share_inside >= 0.5) | allowed | best_of_box
    iou = torch.where(valid_gt[..., None], iou, -1.0)
    allowed = allowed & valid_gt[..., None]

    best_iou, gt_index = torch.where(allowed, iou, -1.0).max(dim=1)  # (B, P); the first of equals
    positive = best_iou >= 0
    forced = force_match(iou)  # (B, N)
    # Boxes without a prior of their own write to an extra dummy column, which is cut off.
    slots = torch.where(forced >= 0, forced, num_priors)
    rows = torch.arange(num_boxes, device=labels.device).expand(batch_size, -1)
    gt_index = F.pad(gt_index, (0, 1)).scatter(1, slots, rows)[:, :-1]
    positive = F.pad(positive, (0, 1)).scatter(1, slots, True)[:, :-1]

    prior_labels = torch.where(positive, labels.gather(1, gt_index), 0)
    is_ignored = (near_ignored & ignored_gt[..., None]).any(dim=1)  # (B, P)
    return Matches(torch.where(~positive & is_ignored, IGNORED, prior_labels), gt_index)


def force_match(iou: Tensor) -> Tensor:
    """Gives each ground-truth box one prior of its own, greedily, the pair of highest IoU first.

    Ties are resolved in favour of the first box, then the first prior. The other boxes of an image take at most N - 1
    priors, so a box finds its prior among its N best: the loop runs on (B, N, N), not on all priors.

    Args:
        iou: (B, N, P) float32; -1 in the rows of boxes that get none.

    Returns:
        (B, N) int64: the prior of each box, or -1.
    """
    batch_size, num_boxes, num_priors = iou.shape
    count = min(num_boxes, num_priors)
    best_priors = _ordered(iou.clamp(min=0), count, largest=True)  # (B, N, K)
    best_iou = iou.gather(2, best_priors)
    forced = torch.full((batch_size, num_boxes), -1, device=iou.device)
    rows = torch.arange(num_boxes, device=iou.device)[None, :, None]  # (1, N, 1)
    for _ in range(num_boxes):
        highest, pair = best_iou.flatten(1).max(dim=1, keepdim=True)  # (B, 1); the first of equals
        row = torch.div(pair, count, rounding_mode="floor")
        prior = best_priors.flatten(1).gather(1, pair)
        exists = highest >= 0
        forced = torch.where(exists & (rows[..., 0] == row), prior, forced)
        used = (rows == row[..., None]) | (best_priors == prior[..., None])
        best_iou = torch.where(used & exists[..., None], -1.0, best_iou)
    return forced


def _ordered(values: Tensor, count: int, largest: bool) -> Tensor:
    """Indices (..., count) of the largest or smallest values of the last dimension, ties by lower index.

    topk does not define the order of ties, and devices break them differently. The bits of float32 values >= 0, read as
    integers, have the order of the values: with the index below them there are no ties.

    Args:
        values: (..., n) float32, >= 0.
    """
    length = values.shape[-1]
    index = torch.arange(length, device=values.device)
    keys = values.view(torch.int32).long() * length + (length - 1 - index if largest else index)
    return keys.topk(count, largest=largest).indices


def _pairwise_iou(boxes: Tensor, priors_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """IoU, and the share of each prior's area that lies in each box (COCO's overlap with crowds).

    torchvision's box_iou returns the first alone, and is slower.

    Args:
        boxes: (B, N, 4) xyxy.
        priors_xyxy: (P, 4).

    Returns:
        Both (B, N, P).
    """
    left, top, right, bottom = boxes[..., None, :].unbind(-1)  # (B, N, 1)
    prior_left, prior_top, prior_right, prior_bottom = priors_xyxy.unbind(-1)  # (P,)
    width = torch.minimum(right, prior_right) - torch.maximum(left, prior_left)
    height = torch.minimum(bottom, prior_bottom) - torch.maximum(top, prior_top)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    box_area, prior_area = (right - left) * (bottom - top), (prior_right - prior_left) * (prior_bottom - prior_top)
    return intersection / (box_area + prior_area - intersection), intersection / prior_area


# ---------------------------------------------------------------------------------------------------------------------
# Box losses: offsets (B, P, 4), targets_cxcywh (B, P, 4) in 0..1, priors (P, 4) -> (B, P)


def smooth_l1_box_loss(offsets: Tensor, targets_cxcywh: Tensor, priors: Tensor) -> Tensor:
    """Smooth L1 of the offsets, summed over the four (SSD, equation 2; Fast R-CNN, arXiv:1504.08083)."""
    return F.smooth_l1_loss(offsets, encode_boxes(targets_cxcywh, priors), reduction="none").sum(dim=2)


def giou_box_loss(offsets: Tensor, targets_cxcywh: Tensor, priors: Tensor) -> Tensor:
    """1 - generalised IoU of the decoded boxes (Rezatofighi et al., arXiv:1902.09630).

    torchvision's loss of this name selects pairs with a mask, which synchronises with the GPU, and adds 1e-7 to
    areas, which can be that small as fractions of the image.
    """
    predicted, targets = _to_xyxy(decode_offsets(offsets, priors)), _to_xyxy(targets_cxcywh)
    iou, union = _elementwise_iou(predicted, targets)
    sides = torch.maximum(predicted[..., 2:], targets[..., 2:]) - torch.minimum(predicted[..., :2], targets[..., :2])
    enclosing = sides.prod(dim=-1)
    return 1 - iou + (enclosing - union) / enclosing.clamp(min=EPS)


def _to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    return box_convert(boxes_cxcywh, "cxcywh", "xyxy")


def _elementwise_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and union (...) of boxes (..., 4) xyxy, pair by pair."""
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(dim=-1)
    union = sum((box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (a, b)) - shared
    return shared / union.clamp(min=EPS), union


# ---------------------------------------------------------------------------------------------------------------------
# Class losses: logits (B, P, C + 1), labels (B, P) as in Matches, quality (B, P): IoU of the predicted box -> scalar


def ohem_class_loss(
    logits: Tensor, labels: Tensor, quality: Tensor | None, negative_ratio: int = 3, min_negatives: int = 8
) -> Tensor:
    """Cross-entropy of the positives and of each image's hardest negatives (SSD, section 2.2).

    Online hard example mining: an image uses max(negative_ratio * its positives, min_negatives) negatives, so that
    images without objects contribute to the loss too.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none").view_as(labels)
    positive = labels > 0
    # Sorted by loss, largest first; all others than negatives are 0, and come last.
    negatives = torch.where(labels == 0, losses, 0).sort(dim=1, descending=True).values
    count = (negative_ratio * positive.sum(dim=1, keepdim=True)).clamp(min=min_negatives)
    rank = torch.arange(labels.shape[1], device=labels.device)
    return torch.where(positive, losses, 0).sum() + torch.where(rank < count, negatives, 0).sum()


def focal_class_loss(
    logits: Tensor, labels: Tensor, quality: Tensor | None, gamma: float = 2.0, alpha: float = 0.25
) -> Tensor:
    """Focal loss of all priors (Lin et al., arXiv:1708.02002, equation 5), with softmax instead of sigmoids.

    -a (1 - p)^gamma log p, where p is the probability of the true class and a is alpha for objects, 1 - alpha for
    background.
    """
    log_p = logits.log_softmax(dim=2).gather(2, labels.clamp(min=0)[..., None])[..., 0]  # (B, P)
    weights = torch.where(labels > 0, alpha, 1 - alpha)
    losses = -weights * (1 - log_p.exp()) ** gamma * log_p
    return torch.where(labels != IGNORED, losses, 0).sum()


def quality_class_loss(logits: Tensor, labels: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """Quality focal loss (Li et al., arXiv:2006.04388, equation 3), with softmax instead of sigmoids.

    The target of a positive is the IoU q of its predicted box for its class and 1 - q for background: cross-entropy
    with these shares, weighted by |q - p|^beta, p being the score of the class (of background for negatives).
    """
    log_p = logits.log_softmax(dim=2)
    background, own = log_p[..., 0], log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0]  # (B, P)
    positive = labels > 0
    target = torch.where(positive, quality, 1.0)
    cross_entropy = -target * own - torch.where(positive, (1 - quality) * background, 0)
    losses = (target - own.exp()).abs() ** beta * cross_entropy
    return torch.where(labels != IGNORED, losses, 0).sum()


# ---------------------------------------------------------------------------------------------------------------------
# The complete loss

ASSIGN_RULES = {"multibox": assign_by_iou, "atss": assign_atss}
BOX_LOSSES = {"smooth_l1": smooth_l1_box_loss, "giou": giou_box_loss}
CLASS_LOSSES = {"ohem": ohem_class_loss, "focal": focal_class_loss, "quality": quality_class_loss}


def _choose(name: str, value: str, choices: dict[str, Any]) -> Any:
    if value not in choices:
        raise InputError(f"{name} {value!r} is not one of {', '.join(choices)}")
    return choices[value]


class MultiBoxLoss(nn.Module):
    """Matching, a box loss over positive priors and a class loss.

    Matching and losses are two calls, so that a caller can count the positives of several batches and processes before
    it divides by them.

    Args:
        priors: (P, 4) cxcywh in 0..1.
        level_counts: (priors, priors per cell) of each level, as in FPNSSD.level_counts; "atss" needs it.
        matching: "multibox" (SSD: IoU >= min_iou) or "atss".
        box_loss: "smooth_l1" or "giou".
        class_loss: "ohem", "focal" or "quality".
        min_iou: the IoU threshold of "multibox".
        negative_ratio, min_negatives: of "ohem" (see ohem_class_loss).
        difficult_positive: whether difficult objects are positives; otherwise they are ignored.

    Raises:
        InputError: for an unknown matching or loss.
    """

    def __init__(
        self,
        priors: Tensor,
        level_counts: list[tuple[int, int]] | None = None,
        matching: Matching = "multibox",
        box_loss: BoxLoss = "smooth_l1",
        class_loss: ClassLoss = "ohem",
        min_iou: float = 0.5,
        negative_ratio: int = 3,
        min_negatives: int = 8,
        difficult_positive: bool = True,
    ):
        super().__init__()
        self.register_buffer("priors", priors.detach().clone(), persistent=False)
        if matching == "atss" and level_counts is None:
            raise InputError("matching 'atss' needs level_counts (FPNSSD.level_counts)")
        settings = {"level_counts": level_counts} if matching == "atss" else {"min_iou": min_iou}
        self.rule = partial(_choose("matching", matching, ASSIGN_RULES), **settings)
        self.box_loss = _choose("box_loss", box_loss, BOX_LOSSES)
        self.class_loss = _choose("class_loss", class_loss, CLASS_LOSSES)
        if class_loss == "ohem":
            self.class_loss = partial(ohem_class_loss, negative_ratio=negative_ratio, min_negatives=min_negatives)
        self.difficult_positive = difficult_positive

    def match(self, batch: dict[str, Any]) -> Matches:
        """Matches the priors with a batch's ground truth (see match())."""
        return match(self.priors, batch, self.rule, self.difficult_positive)

    def forward(
        self, offsets: Tensor, logits: Tensor, batch: dict[str, Any], matches: Matches, normaliser: Tensor | float
    ) -> dict[str, Tensor]:
        """The loss terms of a batch.

        Args:
            offsets: (B, P, 4), of the network.
            logits: (B, P, C + 1), of the network.
            batch: its boxes_norm (B, N, 4) are read.
            matches: of `match` for this batch.
            normaliser: divisor of the sums: usually the number of positives of all batches of the step, at least 1.

        Returns:
            {"box": (), "class": ()}.
        """
        positive = matches.labels > 0
        targets = self.box_targets(batch["boxes_norm"], matches)
        box_losses = torch.where(positive, self.box_loss(offsets, targets, self.priors), 0)
        class_loss = self.class_loss(logits, matches.labels, self.quality(offsets, targets))
        return {"box": box_losses.sum() / normaliser, "class": class_loss / normaliser}

    def box_targets(self, boxes_norm: Tensor, matches: Matches) -> Tensor:
        """(B, P, 4) cxcywh: the matched box of each positive prior.

        Other priors have themselves as target: their loss is not used, but the log of an empty box would not be finite.
        """
        if boxes_norm.shape[1] == 0:
            return self.priors.expand(len(boxes_norm), -1, -1)
        index = matches.gt_index[..., None].expand(-1, -1, 4)
        boxes = box_convert(boxes_norm, "xyxy", "cxcywh").gather(1, index)
        return torch.where((matches.labels > 0)[..., None], boxes, self.priors)

    @torch.no_grad()
    def quality(self, offsets: Tensor, targets_cxcywh: Tensor) -> Tensor | None:
        """(B, P): IoU of the predicted boxes with their targets; None unless class_loss is quality."""
        if self.class_loss is not quality_class_loss:
            return None
        return _elementwise_iou(_to_xyxy(decode_offsets(offsets, self.priors)), _to_xyxy(targets_cxcywh))[0]
