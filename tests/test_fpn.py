"""The pyramid against torchvision's, what reaches which level, and gradients in bf16."""

import math
from functools import partial

import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

from model import FPN


def test_the_top_down_path_is_torchvisions():
    """P3, P4, P5 are those of torchvision's FPN with the same layers, here with sides that halve unevenly."""
    torch.manual_seed(0)
    ours = FPN([4, 6, 8], 32)
    theirs = FeaturePyramidNetwork([4, 6, 8], 32, norm_layer=partial(nn.GroupNorm, 2))
    for mine, yours in ((ours.laterals, theirs.inner_blocks), (ours.smooths, theirs.layer_blocks)):
        yours.load_state_dict(mine.state_dict())
    features = [torch.randn(2, c, h, w) for c, h, w in ((4, 15, 11), (6, 8, 6), (8, 4, 3))]
    wanted = theirs({str(number): one for number, one in enumerate(features)})
    levels = ours(features)
    for level, one in zip(levels, wanted.values(), strict=False):
        torch.testing.assert_close(level, one.relu())
    assert [tuple(level.shape[-2:]) for level in levels[3:]] == [(2, 2), (1, 1), (1, 1), (1, 1)]


def test_coarse_maps_reach_fine_levels():
    """A change of C5 reaches P3 and P4, through the top-down path alone."""
    torch.manual_seed(0)
    features = [torch.randn(1, c, side, side) for c, side in ((4, 12), (6, 6), (8, 3))]
    others = [*features[:2], features[2] + 1]
    fpn = FPN([4, 6, 8], 16)
    assert not any(torch.equal(a, b) for a, b in zip(fpn(features), fpn(others), strict=True))


def test_bf16_gradients_are_those_of_fp32():
    """P6..P9 are one cell each here, where torch's own gradient can be memory that nobody wrote."""
    torch.manual_seed(0)
    fpn = FPN([128, 256, 512], 128).to(memory_format=torch.channels_last)
    features = [torch.randn(4, c, s, s) for c, s in ((128, 8), (256, 4), (512, 2))]
    weights = [torch.randn(4, 128, s, s) for s in (8, 4, 2, 1, 1, 1, 1)]
    gradients = []
    for in_bf16 in (False, True):
        fpn.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            levels = fpn(features)
        garbage = [torch.full((2**k,), math.nan) for k in range(6, 22) for _ in range(4)]
        del garbage  # its memory is what gradients are made in
        sum((level.float() * weight).sum() for level, weight in zip(levels, weights, strict=True)).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in fpn.parameters()]))
    wanted, given = gradients
    assert (given - wanted).norm() < 0.1 * wanted.norm()
