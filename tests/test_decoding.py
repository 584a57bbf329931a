"""The compared ways to suppress overlapping detections, by hand."""

import math

import torch

from experiments.decoding import hard_nms, soft_nms, suppress, voted_nms

# IoU of the first two: 80 / 120; the third is alone.
BOXES = torch.tensor([[0.0, 0.0, 10.0, 10.0], [2.0, 0.0, 12.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
SCORES = torch.tensor([0.9, 0.6, 0.5])


def test_hard_nms_within_each_class():
    labels = torch.tensor([1, 2, 2])
    found = suppress((BOXES, SCORES, labels), lambda boxes, scores: hard_nms(boxes, scores, 0.45))
    assert found["labels"].tolist() == [1, 2, 2]  # the second box is of another class than the first
    found = suppress((BOXES, SCORES, torch.ones(3, dtype=torch.int64)), lambda b, s: hard_nms(b, s, 0.45))
    assert found["boxes"].tolist() == BOXES[[0, 2]].tolist()
    assert suppress((BOXES[:0], SCORES[:0], labels[:0]), hard_nms)["boxes"].shape == (0, 4)


def test_soft_nms_lowers_scores():
    boxes, scores = soft_nms(BOXES, SCORES, 0.5)
    assert boxes.tolist() == BOXES.tolist()
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.6 * math.exp(-((2 / 3) ** 2) / 0.5), 0.5]))


def test_voted_boxes_are_weighted_means():
    boxes, scores = voted_nms(BOXES, SCORES, 0.45, 0.1)
    weight = 0.6 * math.exp(-((1 / 3) ** 2) / 0.1)
    shift = 2 * weight / (0.9 + weight)
    torch.testing.assert_close(boxes, torch.tensor([[shift, 0.0, 10 + shift, 10.0], [50.0, 50.0, 60.0, 60.0]]))
    assert scores.tolist() == SCORES[[0, 2]].tolist()
