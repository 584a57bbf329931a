"""The configuration of a network, which checkpoints and exported files hold beside the tensors."""

import math
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from utils import InputError

FORMAT_VERSION = 2
# One entry for each level, P3..P9. A scale is the side of the square prior as a fraction of the image's; an aspect
# ratio r stands for r and 1/r.
SCALES = (0.1, 0.2, 0.34, 0.48, 0.62, 0.76, 0.9)
ASPECT_RATIOS: tuple[tuple[float, ...], ...] = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,), (2,))

Shapes = tuple[tuple[tuple[float, float], ...], ...]


def ssd_prior_shapes(
    scales: Sequence[float] = SCALES, aspect_ratios: Sequence[Sequence[float]] = ASPECT_RATIOS
) -> Shapes:
    """SSD's default boxes: (width, height) of each level's priors, as fractions of the image (SSD, section 2.2).

    For each level the square, the larger square of side sqrt(s * s_next), then each ratio r as r (wide) and 1/r (tall).
    """
    shapes = []
    for scale, next_scale, ratios in zip(scales, (*scales[1:], 1.0), aspect_ratios, strict=True):
        larger = math.sqrt(scale * next_scale)
        level = [(scale, scale), (larger, larger)]
        for ratio in ratios:
            long, short = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
            level += [(long, short), (short, long)]
        shapes.append(tuple(level))
    return tuple(shapes)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the shapes of a network, as builtins, as checkpoints contain it.

    Raises:
        InputError: for values out of bounds. A config may come from an untrusted file: every value that determines
            memory, names code or could cause a download is checked here.
    """

    classes: tuple[str, ...] = ()  # names of labels 1..C, in order
    backbone: str = "resnet50"  # a timm name, weight tag optional
    image_size: int = 300  # side of the square input, in pixels
    fpn_channels: int = 256
    fpn: str = "fpn"  # or original: the FPN of the original project (fpnssd/legacy/network.py)
    prior_shapes: Shapes = ssd_prior_shapes()  # (width, height) of the priors of a cell, for each of P3..P9
    level_sides: tuple[tuple[int, int], ...] = ()  # (height, width) of P3..P9; (): FPNSSD fills them in
    category_ids: tuple[int, ...] = ()  # of the classes in the training list, for COCO results; (): 1..C
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            shown = reprlib.repr(self.format_version)
            raise InputError(f"model format version {shown}: this code reads 1 and {FORMAT_VERSION}: update the code")
        if not (isinstance(self.backbone, str) and re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)?", self.backbone)):
            shown = reprlib.repr(self.backbone)
            raise InputError(
                f"backbone {shown} is not a plain timm name such as resnet50 (hub addresses are not allowed)"
            )
        if self.fpn not in ("fpn", "original"):
            raise InputError(f"fpn {reprlib.repr(self.fpn)} is not one of fpn, original")
        for name, low, high in (("image_size", 64, 2048), ("fpn_channels", 2, 2048)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise InputError(f"{name} is {reprlib.repr(value)}; it must be a whole number from {low} to {high}")
        self._check_classes()
        self._check_priors()

    def _set(self, name: str, value: tuple) -> None:
        object.__setattr__(self, name, value)  # JSON turns tuples into lists

    def _check_classes(self) -> None:
        names = self.classes
        if not isinstance(names, (list, tuple)) or not 1 <= len(names) <= 10_000:
            raise InputError(f"classes must be 1 to 10000 names, not {reprlib.repr(names)}")
        if not all(isinstance(name, str) and name for name in names):
            raise InputError(f"classes must be names, not {reprlib.repr(names)}")
        if len(set(names)) != len(names):
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise InputError(f"classes named twice: {', '.join(repeated)}")
        self._set("classes", tuple(names))
        ids = self.category_ids or tuple(range(1, len(names) + 1))
        if not isinstance(ids, (list, tuple)) or not all(type(number) is int and 0 <= number < 2**63 for number in ids):
            raise InputError(f"category_ids must be whole numbers from 0, not {reprlib.repr(ids)}")
        if not len(set(ids)) == len(ids) == len(names):
            raise InputError(f"category_ids must be {len(names)} different numbers, one for each class")
        self._set("category_ids", tuple(ids))

    def _check_priors(self) -> None:
        shapes, sides = self.prior_shapes, self.level_sides
        if not isinstance(shapes, (list, tuple)) or len(shapes) != 7:
            raise InputError(f"prior_shapes needs one entry for each of the 7 levels, not {reprlib.repr(shapes)}")
        self._set("prior_shapes", tuple(_pairs("prior_shapes", level, (int, float), 16) for level in shapes))
        if sides not in ((), []):
            sides = _pairs("level_sides", sides, (int,), self.image_size // 8 + 2)
            if len(sides) != 7:
                raise InputError(f"level_sides needs one entry for each of the 7 levels, not {sides}")
        self._set("level_sides", tuple(sides))

    @classmethod
    def from_dict(cls, content: Any) -> "ModelConfig":
        """Makes a ModelConfig from the content of a checkpoint or exported file of format version 1 or 2.

        Args:
            content: field names -> values, as from dataclasses.asdict.

        Raises:
            InputError: for fields or values that this code does not know.
        """
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise InputError("a model is stored as a config and a dict of tensors")
        version = content.get("format_version", 1)
        if version == 1 or (version == FORMAT_VERSION and OLD_FIELDS & set(content)):
            content = _from_version1(content)
        unknown = sorted(set(content) - {field.name for field in fields(cls)})
        if unknown:
            raise InputError(f"model config has unknown fields {unknown}; update the code")
        return cls(**content)

    @property
    def priors_per_cell(self) -> tuple[int, ...]:
        return tuple(len(shapes) for shapes in self.prior_shapes)


OLD_FIELDS = {"trunk", "scales", "aspect_ratios", "neck", "single_ratios", "clamp_priors", "last_square"}


def _from_version1(content: dict[str, Any]) -> dict[str, Any]:
    """Converts a config of version 1, which has a trunk, a neck, scales and aspect ratios, to version 2."""
    old = {name: content[name] for name in OLD_FIELDS & set(content)}
    scales, aspect_ratios = old.get("scales", SCALES), old.get("aspect_ratios", ASPECT_RATIOS)
    last_square, neck = old.get("last_square", 0.0), old.get("neck", "fpn")
    lists = all(isinstance(part, (list, tuple)) and len(part) == 7 for part in (scales, aspect_ratios))
    if not lists or not all(isinstance(level, (list, tuple)) and len(level) <= 7 for level in aspect_ratios):
        raise InputError("scales and aspect ratios need one entry for each of the 7 levels, at most 7 ratios in each")
    numbers = [*scales, last_square or 1.0, *(ratio for level in aspect_ratios for ratio in level)]
    if not all(isinstance(number, (int, float)) and 0 < number <= 16 for number in numbers):
        raise InputError(f"scales and aspect ratios must be numbers in (0, 16], not {reprlib.repr(numbers)}")
    if neck not in ("fpn", "original"):
        raise InputError(f"neck {reprlib.repr(neck)} was removed: the network always has an FPN")
    shapes = list(ssd_prior_shapes(scales, aspect_ratios))
    if old.get("single_ratios"):  # each ratio alone, without its inverse
        shapes = [level[:2] + level[2::2] for level in shapes]
    if last_square:
        shapes[-1] = (shapes[-1][0], (last_square, last_square), *shapes[-1][2:])
    if old.get("clamp_priors"):
        shapes = [tuple((min(width, 1.0), min(height, 1.0)) for width, height in level) for level in shapes]
    new = {name: value for name, value in content.items() if name not in OLD_FIELDS}
    backbone = {"backbone": old["trunk"]} if "trunk" in old else {}
    return {**new, **backbone, "fpn": neck, "prior_shapes": tuple(shapes), "format_version": FORMAT_VERSION}


def _pairs(name: str, value: Any, types: tuple[type, ...], largest: float) -> tuple[tuple[Any, Any], ...]:
    """Converts a field's list of pairs of numbers to tuples. Raises an InputError if it is anything else."""
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 16:
        raise InputError(f"{name} must be lists of up to 16 pairs of numbers, not {reprlib.repr(value)}")
    for pair in value:
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not is_pair or not all(type(number) in types and 0 < number <= largest for number in pair):
            raise InputError(f"{name} must be pairs of numbers in (0, {largest}], not {reprlib.repr(pair)}")
    return tuple((first, second) for first, second in value)
