"""Which prior answers for which object, and the MultiBox loss (SSD, Liu et al., arXiv:1512.02325, section 2.2).

A batch's objects come padded: boxes_unit (B, N, 4) xyxy in 0..1, labels (B, N) with 0 where there is no object,
difficult and crowd (B, N) bool. Nothing here loops over images or waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert

from model import encode_boxes

IGNORED = -1  # a prior that is neither positive nor mined


def match(priors, batch, min_overlap=0.5, difficult_positive=True):
    """Which object each prior answers for.

    Every object claims a prior of its own, the pairs of highest IoU first (ties: lower object, then lower prior);
    of the other priors, those of IoU >= min_overlap answer for the object they overlap most (ties: lower object).
    Crowds (and difficult objects, unless difficult_positive) claim none, and a prior that lies in one by half of its
    own area or more is IGNORED, if it answers for nothing else.

    priors (P, 4) cxcywh -> labels (B, P) int64: 0 background, 1..C, IGNORED; matched (B, P) int64: the object's index.
    """
    boxes, labels = batch["boxes_unit"], batch["labels"]
    batch_size, num_objects = labels.shape
    num_priors = len(priors)
    if num_objects == 0:
        nothing = labels.new_zeros(batch_size, num_priors)
        return nothing, nothing
    is_object = labels > 0
    set_aside = is_object & (batch["crowd"] if difficult_positive else batch["crowd"] | batch["difficult"])
    wanted = is_object & ~set_aside

    priors_xyxy = box_convert(priors, "cxcywh", "xyxy")
    iou, share_inside = _overlaps(boxes, priors_xyxy)  # (B, N, P)
    iou = torch.where(wanted[..., None], iou, -1.0)

    best_overlap, matched = iou.max(dim=1)  # (B, P); the first of equals
    positive = best_overlap >= min_overlap
    claimed = _claim_priors(iou)  # (B, N), -1 where nothing could be claimed
    # One more prior than there are takes the claims of those who claim nothing.
    slots = torch.where(claimed >= 0, claimed, num_priors)
    objects = torch.arange(num_objects, device=labels.device).expand(batch_size, -1)
    matched = F.pad(matched, (0, 1)).scatter(1, slots, objects)[:, :-1]
    positive = F.pad(positive, (0, 1)).scatter(1, slots, True)[:, :-1]

    prior_labels = torch.where(positive, labels.gather(1, matched), 0)
    in_aside = (share_inside >= 0.5) & set_aside[..., None]  # (B, N, P)
    return torch.where(~positive & in_aside.any(dim=1), IGNORED, prior_labels), matched


def _claim_priors(iou):
    """iou (B, N, P), -1 in the rows of objects that claim none -> the prior each object claims (B, N), or -1.

    The others of an image take at most N - 1 priors, so an object finds its own among its best N: the greedy choice,
    one pair an image at a time, runs on (B, N, N) and not on all priors.
    """
    batch_size, num_objects, num_priors = iou.shape
    count = min(num_objects, num_priors)
    # topk leaves the order of equals open, so it sorts whole numbers without equals: the bits of a float >= 0 are in
    # the order of its value, and below them the lower prior comes first.
    bits = iou.clamp(min=0).view(torch.int32).long()
    falling = torch.arange(num_priors - 1, -1, -1, device=iou.device)
    best_priors = (bits * num_priors + falling).topk(count, dim=2).indices  # (B, N, K)
    best_overlaps = iou.gather(2, best_priors)

    claimed = torch.full((batch_size, num_objects), -1, device=iou.device)
    rows = torch.arange(num_objects, device=iou.device)[None, :, None]
    for _ in range(num_objects):
        overlap, pair = best_overlaps.flatten(1).max(dim=1)  # (B,): the first of equals is the lower object
        chosen = torch.div(pair, count, rounding_mode="floor")[:, None]
        prior = best_priors.flatten(1).gather(1, pair[:, None])  # (B, 1)
        there_is = overlap[:, None] >= 0
        claimed = torch.where(there_is & (rows[..., 0] == chosen), prior, claimed)
        gone = (rows == chosen[..., None]) | (best_priors == prior[..., None])
        best_overlaps = torch.where(gone & there_is[..., None], -1.0, best_overlaps)
    return claimed


def _overlaps(boxes, priors_xyxy):
    """IoU, and the share of each prior's area that lies in each box (COCO's overlap with crowds).

    boxes (B, N, 4), priors_xyxy (P, 4) -> both (B, N, P). torchvision's box_iou gives the first alone, and slower.
    """
    left, top, right, bottom = boxes[..., None, :].unbind(-1)  # (B, N, 1)
    prior_left, prior_top, prior_right, prior_bottom = priors_xyxy.unbind(-1)  # (P,)
    width = torch.minimum(right, prior_right) - torch.maximum(left, prior_left)
    height = torch.minimum(bottom, prior_bottom) - torch.maximum(top, prior_top)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    box_area, prior_area = (right - left) * (bottom - top), (prior_right - prior_left) * (prior_bottom - prior_top)
    return intersection / (box_area + prior_area - intersection), intersection / prior_area


class MultiBoxLoss(nn.Module):
    """Smooth L1 over positive priors, cross-entropy over them and the hardest negatives.

    An image mines max(negative_ratio * its positives, min_negatives) negatives, so images without objects teach too.
    forward -> dict of scalars: box, class (each divided by the batch's number of positives, at least 1).
    """

    def __init__(self, priors, min_overlap=0.5, negative_ratio=3, min_negatives=8, difficult_positive=True):
        super().__init__()
        self.register_buffer("priors", priors.detach().clone(), persistent=False)
        self.min_overlap = min_overlap
        self.negative_ratio = negative_ratio
        self.min_negatives = min_negatives
        self.difficult_positive = difficult_positive

    def forward(self, offsets, logits, batch):
        """offsets (B, P, 4), logits (B, P, C + 1), batch: padded objects, see the head of this file."""
        labels, matched = match(self.priors, batch, self.min_overlap, self.difficult_positive)  # (B, P)
        positive = labels > 0
        num_positives = positive.sum().clamp(min=1)
        return {
            "box": self._box_loss(offsets, batch["boxes_unit"], positive, matched) / num_positives,
            "class": self._class_loss(logits, labels) / num_positives,
        }

    def _box_loss(self, offsets, boxes_unit, positive, matched):
        if boxes_unit.shape[1] == 0:
            return offsets.sum() * 0
        boxes = boxes_unit.gather(1, matched[..., None].expand(-1, -1, 4))  # (B, P, 4)
        # Padding has no sides, and their logarithm no value: priors without an object aim at themselves.
        boxes_cxcywh = torch.where(positive[..., None], box_convert(boxes, "xyxy", "cxcywh"), self.priors)
        losses = F.smooth_l1_loss(offsets, encode_boxes(boxes_cxcywh, self.priors), reduction="none").sum(dim=2)
        return torch.where(positive, losses, 0).sum()

    def _class_loss(self, logits, labels):
        losses = F.cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none")
        losses = losses.view_as(labels)  # (B, P)
        positive = labels > 0
        # Mined by their own loss, largest first; what is no negative sorts last and weighs nothing.
        negatives = torch.where(labels == 0, losses, 0).sort(dim=1, descending=True).values
        count = (self.negative_ratio * positive.sum(dim=1, keepdim=True)).clamp(min=self.min_negatives)
        rank = torch.arange(labels.shape[1], device=labels.device)
        return torch.where(positive, losses, 0).sum() + torch.where(rank < count, negatives, 0).sum()
