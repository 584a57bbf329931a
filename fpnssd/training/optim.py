"""Freezing, the optimizer, the learning rate schedule, the averaged weights (EMA), and fine-tuning.

The learning rate of a step is that of the parameter's group (initial_lr) times lr_factor(step).
"""

import math
import re

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fpnssd.training.config import TrainConfig
from model import FPNSSD
from utils import InputError


def backbone_stages(backbone: nn.Module) -> list[list[nn.Module]]:
    """The modules of a timm backbone as [stem, stage 1, stage 2, ...], found by their names in timm."""
    stem, stages = [], []
    for name, child in backbone.named_children():
        if name in ("blocks", "stages"):
            stages += [[stage] for stage in child]
        elif re.fullmatch(r"(layer|stages?_?|blocks_)\d+", name):
            stages.append([child])
        elif not stages:
            stem.append(child)
    return [stem, *stages]


def freeze(model: FPNSSD, config: TrainConfig) -> None:
    """Freezes the parameters of config.frozen_stages, and with batch_norm "frozen" those of the backbone batch norm.

    Raises:
        InputError: if the backbone has fewer stages, or they are not known.
    """
    stages = backbone_stages(model.backbone)
    if len(stages) == 1 and config.frozen_stages >= 0:
        raise InputError(
            f"the stages of backbone {config.backbone!r} are not known: --set frozen_stages=-1 trains all of it"
        )
    if not -1 <= config.frozen_stages < len(stages):
        raise InputError(
            f"frozen_stages is {config.frozen_stages}; backbone {config.backbone!r} takes -1 (none) to "
            f"{len(stages) - 1}"
        )
    for modules in stages[: config.frozen_stages + 1]:
        for module in modules:
            module.requires_grad_(False)
    if config.batch_norm == "frozen":
        for module in model.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)


def synchronise_batch_norm(model: FPNSSD) -> None:
    """Makes the backbone's batch norm use the images of all processes; parameters and buffers stay the same tensors."""
    model.backbone = convert_sync_batchnorm(model.backbone)


def set_train_mode(model: FPNSSD) -> None:
    """Puts the model into training mode, except frozen batch norm, whose running statistics must not change."""
    model.train()
    for module in model.backbone.modules():
        if isinstance(module, _BatchNorm) and not module.weight.requires_grad:
            module.eval()


def build_optimizer(model: FPNSSD, config: TrainConfig, lr: float) -> torch.optim.Optimizer:
    """AdamW or SGD over the parameters that are not frozen.

    Args:
        model: on its device.
        config: optimizer, backbone_lr_scale, weight_decay, momentum.
        lr: learning rate of all but the backbone, which has backbone_lr_scale times it. Groups keep it as "initial_lr".

    Returns:
        The optimizer, with weight decay for weights, but not for biases and norms.
    """
    groups: dict[tuple[bool, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_backbone, decays = name.startswith("backbone."), parameter.dim() > 1
        group_lr = lr * (config.backbone_lr_scale if in_backbone else 1.0)
        group = {"params": [], "lr": group_lr, "initial_lr": group_lr}
        group["weight_decay"] = config.weight_decay if decays else 0.0
        groups.setdefault((in_backbone, decays), group)["params"].append(parameter)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups.values(), lr=lr, fused=True)
    return torch.optim.SGD(groups.values(), lr=lr, momentum=config.momentum, fused=True)


def lr_factor(step: int, config: TrainConfig, num_steps: int) -> float:
    """The learning rate of a step as a share of its initial value.

    Linear warm-up over warmup_steps, at most a quarter of the training; then a cosine to 0 (Loshchilov and Hutter,
    arXiv:1608.03983), or a tenth after each milestone, as SSD.
    """
    warmup_steps = min(config.warmup_steps, num_steps // 4)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if config.schedule == "steps":
        return 0.1 ** sum(step >= milestone * num_steps for milestone in config.milestones)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class EMA(ModelEmaV3):
    """The exponential moving average of a network's weights and statistics, which is evaluated and saved as "model".

    `ema.update(model, step)` after step number `step`, counted from 0; `ema.module` is the averaged network. The decay
    is min(decay, (1 + step) / (10 + step)), so that the initial weights are soon forgotten.
    """

    def __init__(self, model: FPNSSD, decay: float):
        super().__init__(model, decay)
        self.module.requires_grad_(False)

    def get_decay(self, step: int | None = None) -> float:
        return self.decay if step is None else min(self.decay, (1 + step) / (10 + step))


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning


@torch.no_grad()
def load_weights(model: FPNSSD, other: FPNSSD) -> str:
    """Copies the tensors of another detector that fit into `model`.

    The class heads are copied class by class, by name, so that a detector of other classes keeps those in common.

    Returns:
        A sentence that names what was copied and what was not.
    """
    source, target = other.state_dict(), model.state_dict()
    names = ("background", *model.config.classes)
    rows = [("background", *other.config.classes).index(name) if name in other.config.classes else -1 for name in names]
    rows[0] = 0
    left_out = []
    if other.config.backbone != model.config.backbone:  # its tensors and pixel statistics belong together
        source = {name: tensor for name, tensor in source.items() if not name.startswith(("backbone.", "pixel_"))}
    for name, tensor in target.items():
        loaded = source.get(name)
        if loaded is not None and loaded.shape == tensor.shape and not name.startswith("class_heads."):
            tensor.copy_(loaded)
        elif loaded is not None and name.startswith("class_heads.") and _same_priors(name, model, other):
            _copy_classes(tensor, loaded, rows)
        else:
            left_out.append(name)
    new = [name for name, row in zip(names, rows, strict=True) if row < 0]
    dropped = sorted(set(other.config.classes) - set(model.config.classes))
    summary = f"weights copied to {len(target) - len(left_out)} of {len(target)} tensors"
    common = [name for name, row in zip(names, rows, strict=True) if row >= 0]
    summary += f", in class heads those of {', '.join(common)}" if new else ""
    summary += f"; not copied, missing or of another shape: {', '.join(left_out[:8])}" if left_out else ""
    summary += f"; classes with new weights: {', '.join(new)}" if new else ""
    return summary + (f"; classes that are dropped: {', '.join(dropped)}" if dropped else "")


def _same_priors(name: str, model: FPNSSD, other: FPNSSD) -> bool:
    level = int(name.split(".")[1])
    same = model.config.priors_per_cell[level] == other.config.priors_per_cell[level]
    return same and model.config.fpn_channels == other.config.fpn_channels


def _copy_classes(tensor: torch.Tensor, source: torch.Tensor, rows: list[int]) -> None:
    """Copies the classes of a class head.

    Args:
        tensor: (priors per cell * (C + 1), ...), written to.
        source: the same of the other detector, with its number of classes.
        rows: for each class of `tensor` its index in `source`; -1 leaves the class unchanged.
    """
    kept = torch.tensor([row >= 0 for row in rows])
    target = tensor.view(-1, len(rows), *tensor.shape[1:])
    source_classes = source.view(len(target), -1, *tensor.shape[1:])
    target[:, kept] = source_classes[:, [row for row in rows if row >= 0]]
