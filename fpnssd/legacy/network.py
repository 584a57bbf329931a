"""The feature pyramid and the priors of the original FPN-SSD300 project, for its checkpoint."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fpnssd.model_config import ModelConfig
from model import pad_single_cell


def original_config(classes: tuple[str, ...]) -> ModelConfig:
    """The configuration of the original project's network: 8,532 priors, clamped to 0..1.

    Its third level has 8 x 8 cells, which are placed as if they covered the image.
    """
    three, five = (2.0, 0.5), (2.0, 3.0, 0.5, 0.333)
    scales = (0.2, 0.317, 0.433, 0.55, 0.667, 0.783, 0.9)
    shapes = []
    for level, scale in enumerate(scales):
        larger = math.sqrt(scale * scales[level + 1]) if level < 6 else 1.0
        ratios = five if level in (1, 2, 3) else three
        sides = [(scale, scale), (larger, larger)]
        sides += [(scale * math.sqrt(ratio), scale / math.sqrt(ratio)) for ratio in ratios]
        shapes.append(tuple((min(width, 1.0), min(height, 1.0)) for width, height in sides))
    cells = tuple((side, side) for side in (38, 19, 8, 5, 3, 2, 1))
    return ModelConfig(classes, backbone="resnet50", fpn="original", prior_shapes=tuple(shapes), level_sides=cells)


class OriginalFPN(nn.Module):
    """C3, C4, C5 -> the original project's P3..P9.

    P5 is a convolution of C5 without padding (8x8 of 10x10), P6 one of C5 as well; P7..P9 each are of the normalised
    level before, though the heads see it as it was; P3 has its length over the channels set to a learnt one, as SSD
    does with conv4_3.
    """

    def __init__(self, in_channels: list[int], channels: int) -> None:
        super().__init__()
        self.top = nn.Conv2d(in_channels[2], channels, 3)
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels[:2])
        self.smooths = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        strided = (in_channels[2], channels, channels, channels)
        self.extras = nn.ModuleList(nn.Conv2d(c, channels, 3, stride=2, padding=1) for c in strided)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))
        self.lengths = nn.Parameter(torch.full((1, channels, 1, 1), 20.0))

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        c3, c4, c5 = features
        p5 = self.top(c5)
        p4 = self.laterals[1](c4) + F.interpolate(p5, size=c4.shape[-2:], mode="bilinear", align_corners=False)
        p3 = self.laterals[0](c3) + F.interpolate(p4, size=c3.shape[-2:], mode="bilinear", align_corners=False)
        p4, p3 = self.smooths[1](p4), self.smooths[0](p3)
        p3 = p3 / p3.norm(dim=1, keepdim=True) * self.lengths
        coarser = [self.extras[0](c5)]
        for extra, norm in zip(self.extras[1:], self.norms, strict=True):
            coarser.append(extra(pad_single_cell(F.relu(norm(coarser[-1])))))
        return [p3, p4, p5, *coarser]
