"""The settings that `train.py --preset finetune` derives from the data, each with its reason.

The reasons name what was measured: docs/training.md has the table, experiments/own_data.csv the rows.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

from datasets import images_per_class
from fpnssd.data.data_list import DataList
from fpnssd.model_config import ModelConfig, ssd_prior_shapes
from fpnssd.training.config import TrainConfig
from fpnssd.training.optim import backbone_stages
from fpnssd.training.setup import load_lists
from model import load_checkpoint, priors_of
from utils import InputError

EPOCH_IMAGES = 320  # smaller lists are repeated up to this, as each epoch ends with a checkpoint of 100 MB
IMAGES_SEEN = 9600  # in a training without a time limit
MANY_EPOCHS = 100_000  # more than fit into any time limit
UNBALANCED = 3.0  # images of the commonest class / images of the rarest class
SMALLER_SCALES = (0.06, 0.14, 0.28, 0.44, 0.6, 0.76, 0.9)
FEW_MATCHED = 0.75  # share of the objects that have a prior with an IoU of 0.5
TINY_SIDE, MANY_TINY, LARGER_SIZE = 16.0, 0.25, 384  # pixels; share of the objects; pixels


@dataclass(frozen=True)
class Choice:
    """A field of TrainConfig, the value chosen for it, and why."""

    field: str
    value: Any
    reason: str

    @property
    def assignment(self) -> str:
        """The choice as an argument of --set."""
        return f"{self.field}={self.value}"


def choose(configure: Callable[[Iterable[str]], TrainConfig]) -> list[Choice]:
    """All choices of the preset, in the order in which they are made.

    Args:
        configure: returns the configuration of the preset, changed by "field=value" texts, which the command line
            overrides.

    Raises:
        InputError: if the lists or the checkpoint config.weights cannot be used.
    """
    config, choices = configure([]), []
    if config.val_split and not (Path(config.data) / f"{config.val_split}.json").is_file():
        choices.append(Choice("val_split", "", f"no list {config.val_split}.json: no evaluation"))
        config = replace(config, val_split="")
    train_list, _ = load_lists(config)
    if config.weights:
        choices += follow_checkpoint(config)
    for rule in (choose_repeats, choose_epochs, choose_evaluations, choose_balance, choose_priors, choose_image_size):
        choices += rule(train_list, configure([choice.assignment for choice in choices]))
    return list({choice.field: choice for choice in choices}.values())  # a later choice replaces an earlier one


def follow_checkpoint(config: TrainConfig) -> list[Choice]:
    """The shapes of the detector to fine-tune, and the number of its frozen stages."""
    model = load_checkpoint(config.weights)["model"]
    scales = tuple(shapes[0][0] for shapes in model.config.prior_shapes)
    if ssd_prior_shapes(scales) != model.config.prior_shapes:
        raise InputError(
            f"{config.weights} does not have SSD's priors: --preset lite --weights copies the tensors that fit"
        )
    reason = "as in the checkpoint"
    choices = [Choice(name, getattr(model.config, name), reason) for name in ("backbone", "image_size", "fpn_channels")]
    choices.append(Choice("scales", scales, reason))
    frozen = (len(backbone_stages(model.backbone)) - 1) // 2
    return [*choices, Choice("frozen_stages", frozen, "stages up to C3; see docs/training.md")]


def choose_repeats(train_list: DataList, config: TrainConfig) -> list[Choice]:
    """How often an epoch repeats the list."""
    images = len(train_list)
    repeats = math.ceil(EPOCH_IMAGES / images)
    return [Choice("repeats", repeats, f"{images} photographs: {images * repeats} samples in an epoch")]


def choose_epochs(train_list: DataList, config: TrainConfig) -> list[Choice]:
    """As many as a number of samples or the limit of time needs."""
    if config.minutes:
        return [Choice("epochs", MANY_EPOCHS, f"limited by {config.minutes:g} minutes")]
    epochs = math.ceil(IMAGES_SEEN / (len(train_list) * config.repeats))
    return [Choice("epochs", epochs, f"{IMAGES_SEEN} samples in total")]


def choose_evaluations(train_list: DataList, config: TrainConfig) -> list[Choice]:
    """Epochs between evaluations."""
    if config.minutes:
        return [Choice("eval_every", MANY_EPOCHS, "one evaluation, at the end")]
    return [Choice("eval_every", math.ceil(config.epochs / 4), "four evaluations")]


def choose_balance(train_list: DataList, config: TrainConfig) -> list[Choice]:
    """Whether images of rare classes are drawn more often."""
    counts = images_per_class(train_list)
    ratio = counts.max() / counts[counts > 0].min()
    reason = f"the commonest class is in {ratio:.1f} times as many photographs as the rarest"
    return [Choice("class_balance", 0.5 if ratio >= UNBALANCED else 0.0, reason)]


def choose_priors(train_list: DataList, config: TrainConfig) -> list[Choice]:
    """Smaller priors if few objects match a prior."""
    matched = share_matched(normalised_boxes(train_list), config)
    if matched >= FEW_MATCHED:
        return []
    usual = str(config.scales).replace(" ", "")
    reason = (
        f"{matched:.0%} of the objects have a prior with an IoU of 0.5; --set 'scales={usual}' keeps the usual ones"
    )
    return [Choice("scales", SMALLER_SCALES, reason)]


def choose_image_size(train_list: DataList, config: TrainConfig) -> list[Choice]:
    """Larger images if many objects are tiny."""
    boxes = normalised_boxes(train_list)
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)) * config.image_size
    tiny, cost = float((sides < TINY_SIDE).mean()), (LARGER_SIZE / config.image_size) ** 2
    if tiny <= MANY_TINY or cost <= 1:
        return []
    reason = f"{tiny:.0%} of the objects are under {TINY_SIDE:g} px at {config.image_size}; a step takes {cost:.1f} x"
    return [Choice("image_size", LARGER_SIZE, reason)]


def normalised_boxes(data_list: DataList) -> np.ndarray:
    """(n, 4) float32, xyxy in 0..1 of the image: the objects of a list except crowds."""
    heights, widths = data_list.sizes[data_list.object_images].T
    boxes = data_list.boxes / np.stack([widths, heights, widths, heights], axis=1)
    return boxes[~data_list.crowd].astype(np.float32)


def share_matched(boxes: np.ndarray, config: TrainConfig) -> float:
    """The share of boxes (n, 4), xyxy in 0..1, that have an IoU of 0.5 or more with a prior of the network."""
    shape = ModelConfig(("a",), config.backbone, config.image_size, 16, prior_shapes=ssd_prior_shapes(config.scales))
    priors = box_convert(priors_of(shape), "cxcywh", "xyxy")
    best = [box_iou(part, priors).amax(dim=1) for part in torch.from_numpy(boxes).split(256)]
    return float((torch.cat(best) >= 0.5).float().mean())


def format_choices(choices: list[Choice], config: TrainConfig) -> str:
    """The choices as a table, with the values of the configuration, which the command line may have overridden."""
    rows = []
    for choice in choices:
        value = getattr(config, choice.field)
        reason = choice.reason if value == choice.value else f"given, instead of {choice.value}"
        rows.append((choice.field, "no limit" if value == MANY_EPOCHS else str(value) or "none", reason))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:{widths[0]}}  {value:{widths[1]}}  {reason}" for name, value, reason in rows)
