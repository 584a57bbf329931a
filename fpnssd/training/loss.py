"""Which prior answers for which object, and the losses (SSD, Liu et al., arXiv:1512.02325, section 2.2, and others).

    loss = MultiBoxLoss(model.priors, model.level_counts, class_loss="focal", matching="atss")
    matches = loss.match(batch)
    terms = loss(offsets, logits, batch, matches, matches.num_positives.clamp(min=1))  # {"box": ..., "class": ...}

A batch's objects come padded: boxes_norm (B, N, 4) xyxy in 0..1, labels (B, N) with 0 where there is no object,
difficult and crowd (B, N) bool. Nothing here loops over images or waits for the device.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert

from model import decode_offsets, encode_boxes

IGNORED = -1  # a prior that is neither positive nor mined
TINY = 1e-9  # of the image's area: far below a pixel's


# ---------------------------------------------------------------------------------------------------------------------
# Matching


class Matches(NamedTuple):
    """What each prior answers for."""

    labels: torch.Tensor  # (B, P) int64: 0 background, 1..C, IGNORED
    objects: torch.Tensor  # (B, P) int64: which object of its image, where the label is one of 1..C

    @property
    def num_positives(self):
        """() int64, on the device."""
        return (self.labels > 0).sum()


def overlap_rule(iou, boxes, priors, min_overlap=0.5):
    """SSD's: every pair of IoU >= min_overlap. (B, N, P) bool: pairs in which the prior may answer for the object."""
    return iou >= min_overlap


def atss_rule(iou, boxes, priors, level_counts, nearest=9):
    """ATSS (Zhang et al., arXiv:1912.02424): of the priors nearest to an object's centre, those that overlap it well.

    Candidates are the priors of the `nearest` cells of each level; well is the mean plus the standard deviation of the
    candidates' IoU, with the prior's centre inside of the object. level_counts: (priors, priors a cell) of each level.
    """
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2  # (B, N, 2)
    distances = (centres[..., None, :] - priors[:, :2]).square().sum(dim=-1)  # (B, N, P)
    candidates, begin = [], 0
    for count, per_cell in level_counts:
        of_level = distances[..., begin : begin + count]
        candidates.append(begin + of_level.topk(min(nearest * per_cell, count), dim=2, largest=False).indices)
        begin += count
    candidates = torch.cat(candidates, dim=2)  # (B, N, K)
    overlaps = iou.gather(2, candidates)
    well = overlaps >= overlaps.mean(dim=2, keepdim=True) + overlaps.std(dim=2, keepdim=True)
    eligible = torch.zeros_like(iou, dtype=torch.bool).scatter(2, candidates, well)
    low, high = boxes[..., None, :2], boxes[..., None, 2:]  # (B, N, 1, 2)
    return eligible & ((priors[:, :2] > low) & (priors[:, :2] < high)).all(dim=-1)


def match(priors, batch, rule=overlap_rule, difficult_positive=True):
    """Which object each prior answers for -> Matches.

    Every object claims a prior of its own, the pairs of highest IoU first (ties: lower object, then lower prior);
    of the other priors, those that `rule` allows answer for the object they overlap most (ties: lower object).
    Crowds (and difficult objects, unless difficult_positive) claim none, and a prior that lies in one by half of its
    own area or more is IGNORED, if it answers for nothing else. priors: (P, 4) cxcywh.
    """
    boxes, labels = batch["boxes_norm"], batch["labels"]
    batch_size, num_objects = labels.shape
    num_priors = len(priors)
    if num_objects == 0:
        nothing = labels.new_zeros(batch_size, num_priors)
        return Matches(nothing, nothing)
    is_object = labels > 0
    set_aside = is_object & (batch["crowd"] if difficult_positive else batch["crowd"] | batch["difficult"])
    wanted = is_object & ~set_aside

    priors_xyxy = box_convert(priors, "cxcywh", "xyxy")
    iou, share_inside = _overlaps(boxes, priors_xyxy)  # (B, N, P)
    iou = torch.where(wanted[..., None], iou, -1.0)
    eligible = rule(iou, boxes, priors) & wanted[..., None]

    best_overlap, matched = torch.where(eligible, iou, -1.0).max(dim=1)  # (B, P); the first of equals
    positive = best_overlap >= 0
    claimed = _claim_priors(iou)  # (B, N), -1 where nothing could be claimed
    # One more prior than there are takes the claims of those who claim nothing.
    slots = torch.where(claimed >= 0, claimed, num_priors)
    objects = torch.arange(num_objects, device=labels.device).expand(batch_size, -1)
    matched = F.pad(matched, (0, 1)).scatter(1, slots, objects)[:, :-1]
    positive = F.pad(positive, (0, 1)).scatter(1, slots, True)[:, :-1]

    prior_labels = torch.where(positive, labels.gather(1, matched), 0)
    in_aside = (share_inside >= 0.5) & set_aside[..., None]  # (B, N, P)
    return Matches(torch.where(~positive & in_aside.any(dim=1), IGNORED, prior_labels), matched)


def _claim_priors(iou):
    """iou (B, N, P), -1 in the rows of objects that claim none -> the prior each object claims (B, N), or -1.

    Of one image, as a loop:

        while there is an iou[n, p] >= 0 of an object and a prior that are both free:
            n, p = those of the highest (of equals the first)
            claimed[n] = p, and neither is free any more

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


# ---------------------------------------------------------------------------------------------------------------------
# Box losses: (B, P, 4) offsets and priors (P, 4), boxes_cxcywh (B, P, 4) in 0..1 to be met -> (B, P)


def smooth_l1_box_loss(offsets, boxes_cxcywh, priors):
    """Smooth L1 of the offsets, summed over the four (SSD, equation 2; Fast R-CNN, arXiv:1504.08083)."""
    return F.smooth_l1_loss(offsets, encode_boxes(boxes_cxcywh, priors), reduction="none").sum(dim=2)


def giou_box_loss(offsets, boxes_cxcywh, priors):
    """1 - generalised IoU of the decoded boxes (Rezatofighi et al., arXiv:1902.09630)."""
    predicted, wanted = _corners(decode_offsets(offsets, priors)), _corners(boxes_cxcywh)
    iou, union, around = _iou_union_around(predicted, wanted)
    area = around.prod(dim=-1)
    return 1 - iou + (area - union) / area.clamp(min=TINY)


def ciou_box_loss(offsets, boxes_cxcywh, priors):
    """1 - complete IoU: overlap, distance of the centres and aspect (Zheng et al., arXiv:1911.08287)."""
    decoded = decode_offsets(offsets, priors)
    iou, _, around = _iou_union_around(_corners(decoded), _corners(boxes_cxcywh))
    distance = (decoded[..., :2] - boxes_cxcywh[..., :2]).square().sum(dim=-1)
    angles = [torch.atan(b[..., 2] / b[..., 3].clamp(min=TINY)) for b in (decoded, boxes_cxcywh)]
    aspect = 4 / math.pi**2 * (angles[1] - angles[0]).square()
    with torch.no_grad():  # as in the paper's own code: the trade-off is no path for the gradient
        weight = aspect / (1 - iou + aspect).clamp(min=TINY)
    return 1 - iou + distance / around.square().sum(dim=-1).clamp(min=TINY) + weight * aspect


# torchvision's losses of these names pick pairs with a mask, for which the host has to wait for the device.
def _corners(boxes_cxcywh):
    return box_convert(boxes_cxcywh, "cxcywh", "xyxy")


def _iou_union_around(a, b):
    """IoU (...), union (...) and sides (..., 2) of the smallest box around both, of boxes (..., 4) xyxy."""
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(dim=-1)
    union = sum((box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (a, b)) - shared
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    return shared / union.clamp(min=TINY), union, around


# ---------------------------------------------------------------------------------------------------------------------
# Class losses: logits (B, P, C + 1), labels (B, P) as in Matches, quality (B, P): IoU of the predicted box -> scalar


def ohem_class_loss(logits, labels, quality, negative_ratio=3, min_negatives=8):
    """Cross-entropy over positives and each image's hardest negatives (SSD, section 2.2, "hard negative mining").

    An image mines max(negative_ratio * its positives, min_negatives), so images without objects teach too.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none").view_as(labels)
    positive = labels > 0
    # Mined by their own loss, largest first; what is no negative sorts last and weighs nothing.
    negatives = torch.where(labels == 0, losses, 0).sort(dim=1, descending=True).values
    count = (negative_ratio * positive.sum(dim=1, keepdim=True)).clamp(min=min_negatives)
    rank = torch.arange(labels.shape[1], device=labels.device)
    return torch.where(positive, losses, 0).sum() + torch.where(rank < count, negatives, 0).sum()


def focal_class_loss(logits, labels, quality, gamma=2.0, alpha=0.25):
    """Focal loss over all priors (Lin et al., arXiv:1708.02002, equation 5), with softmax in place of sigmoids.

    -a (1 - p)^gamma log p of the right class; a is alpha for objects and 1 - alpha for background.
    """
    log_p = logits.log_softmax(dim=2).gather(2, labels.clamp(min=0)[..., None])[..., 0]  # (B, P)
    weights = torch.where(labels > 0, alpha, 1 - alpha)
    losses = -weights * (1 - log_p.exp()) ** gamma * log_p
    return torch.where(labels != IGNORED, losses, 0).sum()


def quality_class_loss(logits, labels, quality, beta=2.0):
    """Quality focal loss (Li et al., arXiv:2006.04388, equation 3), with softmax in place of sigmoids.

    An object's score is to be the IoU q of its predicted box, the background's 1 - q: cross-entropy with these shares,
    weighted by |q - p|^beta, p being the score of the right class (of background, where there is no object).
    """
    log_p = logits.log_softmax(dim=2)
    background, own = log_p[..., 0], log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0]  # (B, P)
    positive = labels > 0
    wanted = torch.where(positive, quality, 1.0)
    cross_entropy = -wanted * own - torch.where(positive, (1 - quality) * background, 0)
    losses = (wanted - own.exp()).abs() ** beta * cross_entropy
    return torch.where(labels != IGNORED, losses, 0).sum()


MATCHINGS = ("multibox", "atss")
BOX_LOSSES = {"smooth_l1": smooth_l1_box_loss, "giou": giou_box_loss, "ciou": ciou_box_loss}
CLASS_LOSSES = {"ohem": ohem_class_loss, "focal": focal_class_loss, "quality": quality_class_loss}


# ---------------------------------------------------------------------------------------------------------------------
# Together


class MultiBoxLoss(nn.Module):
    """A matching, a box loss over positive priors, a class loss. Matching and loss are two calls, so that a caller can
    count the positives of several batches and processes before it divides by them."""

    def __init__(
        self,
        priors,
        level_counts=None,
        matching="multibox",
        box_loss="smooth_l1",
        class_loss="ohem",
        min_overlap=0.5,
        negative_ratio=3,
        min_negatives=8,
        difficult_positive=True,
    ):
        super().__init__()
        self.register_buffer("priors", priors.detach().clone(), persistent=False)
        self.rule = partial(overlap_rule, min_overlap=min_overlap)
        if matching == "atss":
            self.rule = partial(atss_rule, level_counts=level_counts)
        self.box_loss = BOX_LOSSES[box_loss]
        self.class_loss = CLASS_LOSSES[class_loss]
        if class_loss == "ohem":
            self.class_loss = partial(ohem_class_loss, negative_ratio=negative_ratio, min_negatives=min_negatives)
        self.difficult_positive = difficult_positive

    def match(self, batch):
        return match(self.priors, batch, self.rule, self.difficult_positive)

    def forward(self, offsets, logits, batch, matches, normaliser):
        """offsets (B, P, 4), logits (B, P, C + 1), a batch and its Matches -> {"box", "class"}: sums / normaliser.

        normaliser: a number or () tensor, usually the positives of all batches of the step, at least 1.
        """
        positive = matches.labels > 0
        boxes_cxcywh = self._boxes_to_meet(batch["boxes_norm"], positive, matches.objects)
        box_losses = torch.where(positive, self.box_loss(offsets, boxes_cxcywh, self.priors), 0)
        class_loss = self.class_loss(logits, matches.labels, self._quality(offsets, boxes_cxcywh))
        return {"box": box_losses.sum() / normaliser, "class": class_loss / normaliser}

    def _boxes_to_meet(self, boxes_norm, positive, objects):
        """(B, P, 4) cxcywh; priors without an object aim at themselves, as padding has no sides."""
        if boxes_norm.shape[1] == 0:
            return self.priors.expand(len(boxes_norm), -1, -1)
        boxes = box_convert(boxes_norm, "xyxy", "cxcywh").gather(1, objects[..., None].expand(-1, -1, 4))
        return torch.where(positive[..., None], boxes, self.priors)

    @torch.no_grad()
    def _quality(self, offsets, boxes_cxcywh):
        """(B, P): IoU of the predicted boxes with those to be met; only the quality loss asks for it."""
        if self.class_loss is not quality_class_loss:
            return None
        return _iou_union_around(_corners(decode_offsets(offsets, self.priors)), _corners(boxes_cxcywh))[0]
