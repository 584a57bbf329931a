"""The feature pyramid: C3, C4, C5 of a trunk -> P3..P9, seven maps of one depth that the heads look at.

    levels = FPN(in_channels=(512, 1024, 2048), channels=256)([c3, c4, c5])  # 7 x (B, 256, side, side)

FPN: Lin et al., arXiv:1612.03144.
"""

import torch
import torch.nn.functional as F
from torch import nn


def _norm_conv(in_channels, channels, kernel, stride=1):
    """A convolution and group norm: trunks differ tenfold in the size of their features, and heads must not."""
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    # Sixteen channels a group: the coarsest level is one cell, and a group has to hold several values there too.
    groups = channels // 16 if channels % 16 == 0 else 1
    return nn.Sequential(conv, nn.GroupNorm(groups, channels))


def _more_than_a_cell(level):
    """The map, a single cell with zeros beside it: to a padded convolution of stride 2 that is the same.

    Of a single cell (small images have several such levels) torch's bf16 gradient of the weights is memory that nobody
    wrote, on CPUs with AVX512-BF16 (oneDNN in torch 2.14.1).
    """
    return F.pad(level, (0, 1, 0, 1)) if level.shape[-2:] == (1, 1) else level


class FPN(nn.Module):
    """C3, C4, C5 -> P3..P9: lateral and top-down for three levels, strided convolutions for four more."""

    def __init__(self, in_channels, channels):
        super().__init__()
        self.laterals = nn.ModuleList(_norm_conv(c, channels, 1) for c in in_channels)
        self.smooths = nn.ModuleList(_norm_conv(channels, channels, 3) for _ in in_channels)
        self.extras = nn.ModuleList(_norm_conv(channels, channels, 3, stride=2) for _ in range(4))

    def forward(self, features):
        maps = [lateral(feature) for lateral, feature in zip(self.laterals, features, strict=True)]
        self.top_down(maps)
        levels = [F.relu(smooth(level)) for smooth, level in zip(self.smooths, maps, strict=True)]
        for extra in self.extras:
            levels.append(F.relu(extra(_more_than_a_cell(levels[-1]))))
        return levels  # 7 x (B, channels, side, side)

    def top_down(self, maps):
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[-2:], mode="nearest")


class SSDNeck(FPN):
    """The same layers without the top-down path, to see what it is worth: finer levels know nothing of coarser ones."""

    def top_down(self, maps):
        pass


class OriginalFPN(nn.Module):
    """C3, C4, C5 -> the original project's P3..P9, kept for its checkpoint.

    P5 comes of C5 without padding (8x8 of 10x10), P6 of C5 as well; P7..P9 each of the normalised level before, though
    the heads see it as it was; P3 has its length over the channels set to a learnt one, as SSD does with conv4_3.
    """

    def __init__(self, in_channels, channels):
        super().__init__()
        self.top = nn.Conv2d(in_channels[2], channels, 3)
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels[:2])
        self.smooths = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        strided = (in_channels[2], channels, channels, channels)
        self.extras = nn.ModuleList(nn.Conv2d(c, channels, 3, stride=2, padding=1) for c in strided)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))
        self.lengths = nn.Parameter(torch.full((1, channels, 1, 1), 20.0))

    def forward(self, features):
        c3, c4, c5 = features
        p5 = self.top(c5)
        p4 = self.laterals[1](c4) + F.interpolate(p5, size=c4.shape[-2:], mode="bilinear", align_corners=False)
        p3 = self.laterals[0](c3) + F.interpolate(p4, size=c3.shape[-2:], mode="bilinear", align_corners=False)
        p4, p3 = self.smooths[1](p4), self.smooths[0](p3)
        p3 = p3 / p3.norm(dim=1, keepdim=True) * self.lengths
        coarser = [self.extras[0](c5)]
        for extra, norm in zip(self.extras[1:], self.norms, strict=True):
            coarser.append(extra(_more_than_a_cell(F.relu(norm(coarser[-1])))))
        return [p3, p4, p5, *coarser]


NECKS = {"fpn": FPN, "ssd": SSDNeck, "original": OriginalFPN}
