"""FPN-SSD: a pretrained backbone, a feature pyramid network, and SSD's prior-box heads on seven levels.

    config = ModelConfig(classes=("cat", "dog"))
    model = FPNSSD(config, backbone_weights="imagenet")
    offsets, logits = model(images)  # uint8 (B, 3, 300, 300) -> (B, 8748, 4), (B, 8748, 3)
    detections = postprocess(offsets, logits, model.priors, sizes)  # boxes in pixels of the original images

SSD: Liu et al., arXiv:1512.02325. FPN: Lin et al., arXiv:1612.03144. Class 0 is background, objects are 1..C.
"""

import math
import pkgutil
import re
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, nms

from fpnssd.backbone_weights import WEIGHT_PACKAGES, backbone_state_dict, tagged
from fpnssd.model_config import FORMAT_VERSION, ModelConfig
from fpnssd.safe_load import CheckpointError, load_tensors
from utils import InputError, atomic_write

CENTRE_VARIANCE, SIDE_VARIANCE = 0.1, 0.2  # scaling of (cx, cy) and (w, h) offsets in SSD
MAX_SIDE_OFFSET = math.log(1000 / 16)  # limit before exp, as in torchvision: prevents overflow in an untrained network
FIRST_CANDIDATES = 1024


@dataclass(frozen=True)
class Thresholds:
    """The three numbers that decide which decoded boxes become detections."""

    min_score: float  # score threshold: detections score above it
    max_overlap: float  # NMS IoU threshold: a box that overlaps a better one of its class by more is dropped
    top_k: int  # maximum number of detections per image


EVALUATION = Thresholds(
    min_score=0.01, max_overlap=0.45, top_k=200
)  # as in SSD; average precision needs low scores too
# For display; F1 was highest at 0.4 on 200 photographs (experiments/README.md).
DETECTION = Thresholds(min_score=0.4, max_overlap=0.5, top_k=200)
DEFAULT_CHECKPOINT = str(Path(__file__).parent / "checkpoint" / "fpnssd300_lite_voc.pth.tar")  # the shipped one

# ---------------------------------------------------------------------------------------------------------------------
# Backbone


def build_backbone(name: str, weights: str = "none") -> tuple[Any, tuple[float, ...], tuple[float, ...]]:
    """A timm network that returns C3, C4, C5 (strides 8, 16, 32), and the pixel statistics it was trained with.

    Args:
        name: timm name, weight tag optional.
        weights: "imagenet"; "none" for random ones; or a file with the tensors of this timm backbone.

    Returns:
        The network, and the mean and standard deviation of R, G, B in units of 0..255.

    Raises:
        InputError: for networks that an FPN cannot be built on, and weights that do not fit or are not available.
        FileNotFoundError: if `weights` is a file that does not exist.
    """
    if not timm.is_model(name):
        raise InputError(f"timm {timm.__version__} has no model {name!r}: timm.list_models() returns the names")
    try:
        backbone: Any = timm.create_model(name, features_only=True, pretrained=False, out_indices=(-3, -2, -1))
        strides = backbone.feature_info.reduction()
    except (
        AssertionError,
        IndexError,
        RuntimeError,
        ValueError,
    ):  # raised by timm for networks with fewer than three feature maps
        strides = []
    if strides != [8, 16, 32]:
        raise InputError(f"backbone {name!r} ends in strides {strides}, but an FPN needs 8, 16 and 32")
    expected = backbone.state_dict()
    unsaved = sorted(set(dict(backbone.named_buffers())) - set(expected))
    if unsaved:  # build_model could not restore them
        raise InputError(f"backbone {name!r} has a non-persistent buffer {unsaved[0]!r}, which checkpoints would lack")
    if weights != "none":
        # For some backbones features_only of timm writes stages_0 where the whole network has stages.0.
        weights_by_name = {key.replace(".", "_"): tensor for key, tensor in backbone_state_dict(name, weights).items()}
        state = {key: weights_by_name.get(key.replace(".", "_")) for key in expected}
        absent = sorted(key for key in expected if getattr(state[key], "shape", None) != expected[key].shape)
        if absent:
            raise InputError(
                f"backbone weights {weights!r} do not fit {name!r}: {len(absent)} of its {len(expected)} tensors are "
                f"missing or of another shape, the first {absent[0]!r}"
            )
        backbone.load_state_dict(state)
    if name in WEIGHT_PACKAGES:
        return backbone, (127.0,) * 3, (128.0,) * 3
    config: Any = timm.get_pretrained_cfg(tagged(name)) or timm.get_pretrained_cfg(name)
    return backbone, tuple(255 * m for m in config.mean), tuple(255 * s for s in config.std)


# ---------------------------------------------------------------------------------------------------------------------
# Feature pyramid network


def _norm_conv(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution and group norm: the scale of features differs tenfold between backbones; heads need one scale."""
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    # Sixteen channels per group: the coarsest level is one cell, and a group has to hold several values there too.
    groups = channels // 16 if channels % 16 == 0 else 1
    return nn.Sequential(conv, nn.GroupNorm(groups, channels))


def pad_single_cell(level: Tensor) -> Tensor:
    """Zero-pads a 1x1 map to 2x2, which does not change a padded stride-2 convolution; returns other maps unchanged.

    A workaround for oneDNN (torch 2.14.1) on CPUs with AVX512-BF16: the bf16 gradient of the weights is uninitialised
    memory if the input is 1x1, as in the coarsest levels of small images.
    """
    return F.pad(level, (0, 1, 0, 1)) if level.shape[-2:] == (1, 1) else level


class FPN(nn.Module):
    """Feature pyramid network: C3, C4, C5 -> P3..P9.

    P3..P5 come from lateral connections and a top-down pathway, P6..P9 each from a stride-2 convolution of the level
    before.

    Args:
        in_channels: numbers of channels of C3, C4, C5.
        channels: number of channels of every level.
    """

    def __init__(self, in_channels: list[int], channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(_norm_conv(c, channels, 1) for c in in_channels)
        self.smooths = nn.ModuleList(_norm_conv(channels, channels, 3) for _ in in_channels)
        self.extras = nn.ModuleList(_norm_conv(channels, channels, 3, stride=2) for _ in range(4))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """3 x (B, C, H, W), fine to coarse -> 7 x (B, channels, H, W)."""
        maps = [lateral(feature) for lateral, feature in zip(self.laterals, features, strict=True)]
        for i in (1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[-2:], mode="nearest")
        levels = [F.relu(smooth(level)) for smooth, level in zip(self.smooths, maps, strict=True)]
        for extra in self.extras:
            levels.append(F.relu(extra(pad_single_cell(levels[-1]))))
        return levels


# ---------------------------------------------------------------------------------------------------------------------
# Network

# Names that are imported when needed: only checkpoints of the original project need its network.
FPN_CLASSES = {"fpn": "model:FPN", "original": "fpnssd.legacy.network:OriginalFPN"}


class FPNSSD(nn.Module):
    """The detector: RGB images in, (offsets, logits) out, in training and in evaluation alike.

    Args:
        config: if its level_sides are empty, a forward pass determines them.
        backbone_weights: "imagenet", "none", or a file with the tensors of this timm backbone.

    Attributes:
        config: the configuration, with level_sides.
        priors: (P, 4) float32, cxcywh in 0..1.
        level_counts: (priors, priors per cell) of each level, in the order of `priors`.
    """

    priors: Tensor
    pixel_mean: Tensor  # (3, 1, 1), in units of 0..255
    pixel_std: Tensor

    def __init__(self, config: ModelConfig, backbone_weights: str = "none") -> None:
        super().__init__()
        self.backbone, pixel_mean, pixel_std = build_backbone(config.backbone, backbone_weights)
        fpn_class = pkgutil.resolve_name(FPN_CLASSES[config.fpn])
        self.fpn = fpn_class(self.backbone.feature_info.channels(), config.fpn_channels)
        counts, num_scores = config.priors_per_cell, len(config.classes) + 1
        self.box_heads = nn.ModuleList(nn.Conv2d(config.fpn_channels, n * 4, 3, padding=1) for n in counts)
        self.class_heads = nn.ModuleList(nn.Conv2d(config.fpn_channels, n * num_scores, 3, padding=1) for n in counts)
        for head in (*self.box_heads, *self.class_heads):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        # On the CPU even under torch.device("meta"), where tensors have no values: these constants come from timm's
        # configuration of the backbone.
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean, device="cpu").view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(pixel_std, device="cpu").view(3, 1, 1))
        self.config = config if config.level_sides else replace(config, level_sides=self._level_sides(config))
        self.register_buffer("priors", priors_of(self.config), persistent=False)
        sides = self.config.level_sides
        self.level_counts = [(h * w * count, count) for (h, w), count in zip(sides, counts, strict=True)]
        self.init_class_bias(0.75)

    @torch.no_grad()
    def init_class_bias(self, background: float) -> None:
        """Sets the biases of the class heads for an initial background probability; the classes share the rest equally.

        0.75 is the share of background among the priors that OHEM samples; of all priors, which focal and quality focal
        losses use, nearly all are background (Lin et al., arXiv:1708.02002, section 3.3).

        Args:
            background: initial background probability, in 0..1.
        """
        num_classes = len(self.config.classes)
        start = math.log(background / (1 - background) * num_classes)
        for head in self.class_heads:
            head.get_parameter("bias").view(-1, num_classes + 1)[:, 0] = start

    @torch.no_grad()
    def _level_sides(self, config: ModelConfig) -> tuple[tuple[int, int], ...]:
        """(height, width) of P3..P9, from a forward pass: backbones round half of an odd side up or down."""
        self.eval()  # so that batch norm statistics do not change
        levels = self.fpn(self.backbone(torch.zeros(1, 3, config.image_size, config.image_size)))
        self.train()
        return tuple(tuple(level.shape[-2:]) for level in levels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: (B, 3, S, S) RGB, uint8 or float 0..255 -> offsets (B, P, 4), logits (B, P, C + 1), float32."""
        side = self.config.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"the model takes images (B, 3, {side}, {side}), not {tuple(images.shape)}")
        levels = self.fpn(self.backbone((images.float() - self.pixel_mean) / self.pixel_std))
        batch = images.shape[0]  # len(images) would become a constant in exported files
        offsets, logits = [], []
        for level, box_head, class_head in zip(levels, self.box_heads, self.class_heads, strict=True):
            # (B, A * K, H, W) -> (B, H * W * A, K): the order of the priors
            offsets.append(box_head(level).permute(0, 2, 3, 1).reshape(batch, -1, 4))
            class_scores = class_head(level).permute(0, 2, 3, 1)
            logits.append(class_scores.reshape(batch, -1, len(self.config.classes) + 1))
        return torch.cat(offsets, dim=1).float(), torch.cat(logits, dim=1).float()


# ---------------------------------------------------------------------------------------------------------------------
# Priors and offsets


def make_priors(config: ModelConfig, level_sides: Sequence[tuple[int, int]]) -> Tensor:
    """SSD's default boxes of a network, not clamped to the image.

    Args:
        config: its prior_shapes are used.
        level_sides: (height, width) of each feature map.

    Returns:
        (P, 4) float32, cxcywh as fractions of the image, in the order level, row, column, shape.
    """
    priors = []
    for (height, width), shapes in zip(level_sides, config.prior_shapes, strict=True):
        rows = (torch.arange(height, dtype=torch.float64, device="cpu") + 0.5) / height
        columns = (torch.arange(width, dtype=torch.float64, device="cpu") + 0.5) / width
        y, x = torch.meshgrid(rows, columns, indexing="ij")  # (H, W)
        centres = torch.stack([x, y], dim=-1).reshape(-1, 1, 2).expand(-1, len(shapes), 2)
        sides = torch.tensor(shapes, dtype=torch.float64, device="cpu").expand(len(centres), -1, 2)
        priors.append(torch.cat([centres, sides], dim=-1).reshape(-1, 4))
    return torch.cat(priors).float()


def priors_of(config: ModelConfig) -> Tensor:
    """The priors (P, 4) of a network of this configuration, without its weights."""
    if not config.level_sides:  # version 1
        with torch.device("meta"):
            config = FPNSSD(config).config
    return make_priors(config, config.level_sides)


def encode_boxes(boxes_cxcywh: Tensor, priors: Tensor) -> Tensor:
    """Boxes (..., P, 4) cxcywh in 0..1 -> offsets (..., P, 4) to `priors` (P, 4); SSD, equation 2."""
    centres = (boxes_cxcywh[..., :2] - priors[..., :2]) / priors[..., 2:] / CENTRE_VARIANCE
    sides = torch.log(boxes_cxcywh[..., 2:] / priors[..., 2:]) / SIDE_VARIANCE
    return torch.cat([centres, sides], dim=-1)


def decode_offsets(offsets: Tensor, priors: Tensor) -> Tensor:
    """The inverse of encode_boxes: offsets (..., P, 4) -> boxes_cxcywh (..., P, 4) in 0..1.

    As in torchvision, sides are at most 1000 / 16 times the prior's, so that none is infinite.
    """
    centres = priors[..., :2] + offsets[..., :2] * CENTRE_VARIANCE * priors[..., 2:]
    sides = priors[..., 2:] * torch.exp((offsets[..., 2:] * SIDE_VARIANCE).clamp(max=MAX_SIDE_OFFSET))
    return torch.cat([centres, sides], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def above_score(scores: torch.Tensor, min_score: float) -> torch.Tensor:
    """Whether each score exceeds a score threshold; decoding, metrics, reports and pictures all use this rule.

    Args:
        scores: float32, of any shape.
        min_score: compared as float32, so that 0.4 read from a file and 0.4 written in code are the same.

    Returns:
        bool, of the same shape: score > min_score.
    """
    return scores > torch.tensor(min_score, dtype=scores.dtype, device=scores.device)


@torch.no_grad()
def postprocess(
    offsets: Tensor,
    logits: Tensor,
    priors: Tensor,
    sizes: Sequence[tuple[int, int]],
    min_score: float = EVALUATION.min_score,
    max_overlap: float = EVALUATION.max_overlap,
    top_k: int = EVALUATION.top_k,
) -> list[dict[str, Tensor]]:
    """Decodes a network's outputs: non-maximum suppression within each class, over all pairs of prior and class.

    Args:
        offsets: (B, P, 4).
        logits: (B, P, C + 1).
        priors: (P, 4).
        sizes: B pairs (height, width) of the original images.
        min_score: score threshold.
        max_overlap: NMS IoU threshold: a box that overlaps a better one of its class by more is dropped.
        top_k: maximum number of detections per image.

    Returns:
        For each image boxes (m, 4) xyxy in pixels, clipped to the image, scores (m,), labels (m,), best first; equal
        scores in the order prior, class. No pre-NMS top-k.

    Raises:
        InputError: for thresholds out of bounds, and outputs that are NaN or not of these priors.
    """
    if not (0 <= max_overlap <= 1 and top_k >= 1):
        raise InputError(f"max_overlap is {max_overlap} and top_k {top_k}; they must be in 0..1 and at least 1")
    if not offsets.shape[1] == logits.shape[1] == len(priors):
        raise InputError(f"the network has {logits.shape[1]} outputs for {len(priors)} priors: its file is damaged")
    scores = logits.softmax(dim=-1)[..., 1:].flatten(1)  # (B, P * C)
    if scores.isnan().any() or offsets.isnan().any():
        raise InputError("the network's outputs are NaN: its weights are damaged, or too large for --precision fp16")
    return [
        _decode_image(offsets[i], scores[i], priors, sizes[i], min_score, max_overlap, top_k) for i in range(len(sizes))
    ]


def _decode_image(
    offsets: Tensor,
    scores: Tensor,
    priors: Tensor,
    size: tuple[int, int],
    min_score: float,
    max_overlap: float,
    top_k: int,
) -> dict[str, Tensor]:
    """The detections of one image.

    Greedy hard NMS decides about a box from better-scored boxes alone, so NMS of a prefix of the sorted candidates is a
    prefix of the NMS of all: the best candidates are tried first, more only if fewer than top_k survive. This does not
    hold for soft NMS or for methods that merge boxes.

    Args:
        offsets: (P, 4).
        scores: (P * C,), in the order prior, class.
        priors: (P, 4) cxcywh in 0..1.
        size: (height, width) of the original image in pixels.
        min_score, max_overlap, top_k: see postprocess.

    Returns:
        boxes (m, 4) xyxy in pixels, scores (m,), labels (m,).
    """
    num_classes = len(scores) // len(priors)
    num_candidates = int(above_score(scores, min_score).sum())
    count = min(FIRST_CANDIDATES, num_candidates)
    while True:
        if count < num_candidates:
            last = scores.topk(count).values[-1]
            chosen = (scores >= last).nonzero().squeeze(1)  # with all candidates that tie with the last
        else:
            chosen = above_score(scores, min_score).nonzero().squeeze(1)
        candidate_scores, order = scores[chosen].sort(descending=True, stable=True)
        chosen = chosen[order]
        prior_index, labels = chosen // num_classes, chosen % num_classes + 1
        boxes = boxes_in_pixels(decode_offsets(offsets[prior_index], priors[prior_index]), size)
        not_empty = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # drop boxes fully outside the image
        boxes, candidate_scores, labels = boxes[not_empty], candidate_scores[not_empty], labels[not_empty]
        kept = _suppress_per_class(boxes, candidate_scores, labels, max_overlap)[:top_k]
        if len(kept) >= top_k or len(chosen) >= num_candidates:
            return {"boxes": boxes[kept], "scores": candidate_scores[kept], "labels": labels[kept]}
        count = min(4 * count, num_candidates)


def boxes_in_pixels(boxes_cxcywh: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) cxcywh in 0..1 -> (..., 4) xyxy in pixels of an image of `size` (height, width), clipped to it."""
    height, width = int(size[0]), int(size[1])
    boxes = box_convert(boxes_cxcywh, "cxcywh", "xyxy").clamp(0, 1)
    return boxes * boxes.new_tensor([width, height, width, height])


def _suppress_per_class(boxes: Tensor, scores: Tensor, labels: Tensor, max_overlap: float) -> Tensor:
    """Greedy non-maximum suppression within each class.

    One call of nms per class: batched_nms of torchvision separates classes by offsets, which rounds float32 boxes.

    Args:
        boxes: (n, 4) xyxy, best first.
        scores: (n,), descending.
        labels: (n,) int64.
        max_overlap: IoU threshold.

    Returns:
        int64 (m,): indices of the boxes that are kept, ascending.
    """
    by_label = labels.argsort(stable=True)  # still best first within each label
    counts = labels.bincount().tolist()
    parts = zip(by_label.split(counts), boxes[by_label].split(counts), scores[by_label].split(counts), strict=True)
    kept = [rows[nms(part, part_scores, max_overlap)] for rows, part, part_scores in parts if len(rows)]
    kept.append(by_label[:0])  # so that cat has an argument if there are no boxes
    return torch.cat(kept).sort().values


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


class _ModelPickle:
    """Pickles a model as a call of build_model with a config and tensors, so that the file needs no other code.

    Not FPNSSD.__reduce__: deepcopy also calls it, and would move the copy to the CPU.
    """

    def __init__(self, model: FPNSSD) -> None:
        self.model = model

    def __reduce__(self) -> tuple:
        state = {
            name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.model.state_dict().items()
        }
        return build_model, (asdict(self.model.config), state)


_last_built: weakref.ref | None = None  # the model last loaded in this process; detect() falls back to it


def last_loaded_model() -> FPNSSD | None:
    """The model last loaded from a checkpoint in this process, if it is still alive; else None."""
    return _last_built() if _last_built is not None else None


def build_model(config: Any, state_dict: Any) -> FPNSSD:
    """The model of a checkpoint, in float32 and evaluation mode. torch.load calls this, so a hostile file
    can call it with any arguments.

    ModelConfig validates the config, nothing is downloaded, and the network stays on the meta device, without memory,
    until the dtype, shape and layout of every tensor are checked.

    Args:
        config: a ModelConfig's fields, as builtins.
        state_dict: its tensors, by name.

    Raises:
        InputError: for anything else.
    """
    global _last_built
    if not isinstance(state_dict, dict) or not all(isinstance(name, str) for name in state_dict):
        raise InputError("a model is stored as a config and a dict of tensors")
    model_config = ModelConfig.from_dict(config)
    state_dict = {re.sub(r"^trunk\.", "backbone.", name): tensor for name, tensor in state_dict.items()}  # version 1
    with torch.device("meta"):
        model = FPNSSD(model_config)
    _check_state(state_dict, model.state_dict())
    state = {name: t.float() if t.is_floating_point() else t for name, t in state_dict.items()}
    model.load_state_dict(state, assign=True)
    model.to(next(iter(state.values())).device).requires_grad_(True).eval()
    _last_built = weakref.ref(model)
    return model


torch.serialization.add_safe_globals([build_model])


def _check_state(state: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """Raises InputError unless the state dict has the expected tensors, each dense and with memory of its own.

    Otherwise an expanded view of a single number (stride 0) in a small file would take the memory of a whole tensor
    when it is copied.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    actual = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in state.items()}
    if shapes != actual:
        wrong = sorted(name for name in shapes | actual if shapes.get(name) != actual.get(name))
        raise InputError(f"the tensors do not fit the config: {len(wrong)} differ, the first {wrong[0]!r}")
    for name, tensor in state.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        if not dense or not tensor.is_contiguous():
            raise InputError(f"tensor {name!r} is not a dense, contiguous tensor")
        integer = not expected[name].is_floating_point()
        if tensor.dtype not in ((torch.int64,) if integer else (torch.float16, torch.bfloat16, torch.float32)):
            raise InputError(f"tensor {name!r} is {tensor.dtype}, which is not a supported dtype")
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    if sum(tensor.nbytes for tensor in state.values()) > sum(storages.values()):
        raise InputError("several tensors share memory, which those of a checkpoint never do")


def save_checkpoint(path: str | Path, model: FPNSSD, kind: str | None = None, **extra: Any) -> None:
    """Writes {"model": model, "format_version": ..., **extra} atomically.

    Args:
        path: the file.
        model: on any device; tensors are saved on the CPU, so that the file loads on machines without a GPU.
        kind: "checkpoint" marks the file as an output that commands may replace (see utils.check_outputs); the
            checkpoints of a training are not marked.
        extra: tensors and builtins.
    """
    with atomic_write(path, kind) as temporary:
        content = {"format_version": FORMAT_VERSION, "model": _ModelPickle(model), **_on_cpu(extra)}
        torch.save(content, temporary)


def _on_cpu(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _on_cpu(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_on_cpu(value) for value in tree)
    return tree.cpu() if isinstance(tree, Tensor) else tree


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Returns the dict that save_checkpoint wrote, on the CPU; "model" is an FPNSSD in evaluation mode.

    Raises:
        CheckpointError: for any other file; nothing in it has been run.
        FileNotFoundError: if there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {str(path)!r}: python train.py writes one to runs/NAME/best.pth.tar")
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), FPNSSD):
        raise CheckpointError(f"{path} is not a checkpoint of train.py: it has no FPNSSD under 'model'")
    return checkpoint
