"""What of a network trains, how fast, and the running mean of its weights.

The learning rate of a step is that of the parameter's group times lr_factor(step).
"""

import copy
import math
import re

import torch
from timm.layers import convert_sync_batchnorm
from torch.nn.modules.batchnorm import _BatchNorm

from utils import InputError


def backbone_stages(backbone):
    """The backbone's modules as [stem, stage 1, stage 2, ...]; knows the names that timm's families give them."""
    stem, stages = [], []
    for name, child in backbone.named_children():
        if name in ("blocks", "stages"):
            stages += [[stage] for stage in child]
        elif re.fullmatch(r"(layer|stages?_?|blocks_)\d+", name):
            stages.append([child])
        elif not stages:
            stem.append(child)
    return [stem, *stages]


def freeze(model, config):
    """Takes frozen stages and batch norm out of training, for good; set_train_mode keeps them in evaluation mode."""
    stages = backbone_stages(model.backbone)
    if len(stages) == 1 and (config.frozen_stages >= 0 or config.backbone_lr_decay != 1):
        raise InputError(
            f"the stages of backbone {config.backbone!r} are not known: --set frozen_stages=-1 backbone_lr_decay=1.0 "
            "treats all of it alike"
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


def synchronise_batch_norm(model):
    """Batch norm over all processes' images in place of each one's own."""
    model.backbone = convert_sync_batchnorm(model.backbone)


def set_train_mode(model):
    """Training mode but for batch norm whose factors are frozen: its statistics stay too."""
    model.train()
    for module in model.backbone.modules():
        if isinstance(module, _BatchNorm) and not module.weight.requires_grad:
            module.eval()


def build_optimizer(model, config, lr):
    """AdamW or SGD; lr is that of everything but the backbone.

    The backbone's is config.backbone_lr_scale times it, and config.backbone_lr_decay times less for each stage further
    down. Weights decay; biases and norms do not. Fused: its kernels skip a step on the device (see train.train_step).
    """
    stages = backbone_stages(model.backbone)
    depth_of = {id(p): k for k, modules in enumerate(stages[::-1]) for m in modules for p in m.parameters()}
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, depth = 1.0, None
        if name.startswith("backbone."):
            depth = depth_of.get(id(parameter), 0)
            factor = config.backbone_lr_scale * config.backbone_lr_decay**depth
        decays = parameter.dim() > 1
        group = {"params": [], "lr": lr * factor, "initial_lr": lr * factor}
        group["weight_decay"] = config.weight_decay if decays else 0.0
        groups.setdefault((depth, decays), group)["params"].append(parameter)  # the same groups for all rates
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups.values(), lr=lr, fused=True)
    optimizer = torch.optim.SGD(groups.values(), lr=lr, momentum=config.momentum, fused=True)
    if config.momentum:
        for group in optimizer.param_groups:
            for parameter in group["params"]:  # a first step that is skipped would leave these without values
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def lr_factor(step, config, num_steps):
    """Of the learning rate at a step: linear from near 0 to 1; then a cosine to 0, or SSD's steps by ten.

    A training that is short beside warmup_steps warms up for a quarter of its steps.
    """
    warmup_steps = min(config.warmup_steps, num_steps // 4)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if config.schedule == "steps":
        return 0.1 ** sum(step >= milestone * num_steps for milestone in config.milestones)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class EMA:
    """The exponential moving average of a network's weights; what is evaluated and saved as "model".

    Its decay is min(decay, (1 + n) / (10 + n)) after n updates, so that the start is soon forgotten.
    """

    def __init__(self, model, decay):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = torch.zeros((), device=next(model.parameters()).device)
        self.pairs = None

    @torch.no_grad()
    def update(self, model, good):
        """good: () tensor, 1.0 or 0.0; with 0 nothing changes. The device is not waited for."""
        weight = (1 - ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)) * good
        if self.pairs is None:  # the tensors stay where they are: looked up once
            pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
            self.pairs = [[pair for pair in pairs if pair[0].is_floating_point() == floats] for floats in (True, False)]
        ours, theirs = (list(tensors) for tensors in zip(*self.pairs[0], strict=True))
        # As torch's optimizers do it: a few launches for all tensors together.
        moved = torch._foreach_sub(theirs, ours)
        torch._foreach_mul_(moved, weight)
        torch._foreach_add_(ours, moved)
        for counter, theirs in self.pairs[1]:  # of batch norm
            counter.copy_(theirs)
        self.updates += good


def batch_norm_buffers(model):
    """The running statistics that a training forward pass changes."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training
        for buffer in module.buffers()
    ]


def load_weights(model, other):
    """Copies what fits of another FPNSSD into `model`; returns a sentence on what did not.

    Class heads are taken class by class, by name, so that a detector of other classes keeps what it knows.
    """
    given, wanted = other.state_dict(), model.state_dict()
    names = ("background", *model.config.classes)
    rows = [("background", *other.config.classes).index(name) if name in other.config.classes else -1 for name in names]
    rows[0] = 0
    left_out = []
    if other.config.backbone != model.config.backbone:  # its tensors and pixel statistics go together
        given = {name: tensor for name, tensor in given.items() if not name.startswith(("backbone.", "pixel_"))}
    for name, tensor in wanted.items():
        source = given.get(name)
        if source is not None and source.shape == tensor.shape and not name.startswith("class_heads."):
            tensor.copy_(source)
        elif source is not None and name.startswith("class_heads.") and _same_priors(name, model, other):
            _copy_classes(tensor, source, rows)
        else:
            left_out.append(name)
    new = [name for name, row in zip(names, rows, strict=True) if row < 0]
    dropped = sorted(set(other.config.classes) - set(model.config.classes))
    said = f"{len(wanted) - len(left_out)} of {len(wanted)} tensors taken"
    said += f"; left out, not there or of another shape: {', '.join(left_out[:8])}" if left_out else ""
    said += f"; new classes, learnt from scratch: {', '.join(new)}" if new else ""
    return said + (f"; classes no longer asked for: {', '.join(dropped)}" if dropped else "")


def _same_priors(name, model, other):
    level = int(name.split(".")[1])
    same = model.config.priors_per_cell[level] == other.config.priors_per_cell[level]
    return same and model.config.fpn_channels == other.config.fpn_channels


def _copy_classes(tensor, source, rows):
    """A class head's (priors a cell * (C + 1), ...) with the classes of `rows`; -1 leaves the new one's own values."""
    kept = torch.tensor([row >= 0 for row in rows])
    ours = tensor.view(-1, len(rows), *tensor.shape[1:])
    theirs = source.view(len(ours), -1, *tensor.shape[1:])
    ours[:, kept] = theirs[:, [row for row in rows if row >= 0]]
