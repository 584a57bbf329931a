"""The recipe of a training: every knob, the presets, and what of the command line becomes of them.

A preset is a function that returns a TrainConfig; a new one is a few lines here.
"""

import ast
import math
import re
from dataclasses import dataclass, fields, is_dataclass, replace

from fpnssd.data.augment import NO_AUGMENTATION, AugmentConfig
from fpnssd.model_config import SCALES
from fpnssd.training.checkpoints import saved_config
from fpnssd.training.distributed import num_processes
from fpnssd.training.loss import BOX_LOSSES, CLASS_LOSSES, MATCHINGS
from utils import InputError


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. Each field is reachable as --set field=value; the usual ones have a flag of their own."""

    name: str = "voc2012"  # results go to runs/NAME
    data: str = "data/voc2012"  # folder of data lists
    train_split: str = "train"
    val_split: str = "val"
    images: str = ""  # folder of the photographs, if not where the data lists say

    backbone: str = "resnet50"
    backbone_weights: str = "imagenet"  # or none, or a file
    weights: str = ""  # a checkpoint to start from, of any classes: what fits is taken
    image_size: int = 300
    fpn_channels: int = 256
    scales: tuple = SCALES  # of the priors, a level each
    frozen_stages: int = 1  # backbone stages that do not train: -1 none, 0 the stem, k the stem and k stages
    batch_norm: str = "frozen"  # the backbone's keeps its ImageNet statistics and factors; or train; or sync: over GPUs

    epochs: int = 60
    batch_size: int = 32  # images a process takes at a time
    nominal_batch: int = 32  # images a step, about: so many batches are accumulated as come nearest to it
    optimizer: str = "adamw"  # or sgd
    lr: float = 1e-3  # of all but the backbone, for nominal_batch; larger steps scale it (see scaled_lr)
    backbone_lr_scale: float = 0.2  # pretrained backbones forget: theirs is so much of lr
    backbone_lr_decay: float = 1.0  # and so much less for each stage further from the heads
    momentum: float = 0.9  # of sgd
    weight_decay: float = 1e-4  # of weights; biases and norms have none
    schedule: str = "cosine"  # to 0; or steps: a tenth after each milestone
    milestones: tuple = (0.667, 0.833)  # of all steps: SSD's 80,000 and 100,000 of 120,000
    warmup_steps: int = 100  # linear; of a short training at most a quarter
    clip_norm: float = 10.0
    ema_decay: float = 0.999  # warmed up as (1 + step) / (10 + step)

    matching: str = "multibox"  # or atss
    box_loss: str = "smooth_l1"  # or giou, ciou
    class_loss: str = "ohem"  # or focal, quality
    box_weight: float = 1.0  # of the box loss beside the class loss
    negative_ratio: int = 3  # of ohem
    min_negatives: int = 8  # of ohem, an image
    difficult_positive: bool = True  # whether difficult objects are learnt

    augment: AugmentConfig = AugmentConfig()  # noqa: RUF009 (frozen); its fields as --set augment.mosaic=0.5
    class_balance: float = 0.0  # 0 draws images alike, 1 classes; 0.5 lies between (datasets.balanced_weights)
    cache: str = "off"  # or disk: decoded images of the training list in one file beside it
    cache_side: int = 0  # shorter side of images in the cache; 0 keeps them whole

    eval_every: int = 4  # epochs; the last one is always evaluated
    patience: int = 0  # evaluations without a better one that end the training; 0: never
    save_minutes: float = 10.0  # between checkpoints inside of an epoch; after each epoch there is one anyway
    log_every: int = 20  # steps between looks at the loss: each makes the host wait for the device
    workers: int = 2
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"  # fp32, bf16, fp16, or bf16 where the machine is fast at it
    tf32: bool = True  # matrix products of what stays fp32 on the GPU's tensor cores: 10 bits of mantissa
    compile: bool = False  # torch.compile: minutes at the start, faster steps after


# In place of SSD's own matching and losses, which are TrainConfig's defaults: what README.md, "Results", found better.
ATSS_QFL = {"matching": "atss", "box_loss": "giou", "box_weight": 2.0, "class_loss": "quality"}


def voc2012():
    """ResNet-50 on VOC2012 train, evaluated on val."""
    return TrainConfig(**ATSS_QFL)


def voc0712():
    """The usual benchmark: VOC2007 and VOC2012 trainval, evaluated on VOC2007 test."""
    return TrainConfig(
        name="voc0712", data="data/voc0712", train_split="trainval", val_split="test", epochs=80, **ATSS_QFL
    )


def voc280():
    """SSD's own recipe for 280 epochs: its losses, and SGD, a tenth of the rate after two thirds and five sixths."""
    return TrainConfig(
        name="voc280", epochs=280, optimizer="sgd", lr=2e-3, backbone_lr_scale=1.0, weight_decay=5e-4, schedule="steps",
        warmup_steps=500, eval_every=10,
    )  # fmt: skip


def lite():
    """The small detector: trains in minutes to hours on a CPU, from weights that an installable package carries."""
    return TrainConfig(
        name="lite", backbone="tf_efficientnet_lite2", fpn_channels=128, frozen_stages=3, epochs=36, batch_size=16,
        nominal_batch=16, warmup_steps=50, workers=1, augment=AugmentConfig(copy_paste=0.5, close_epochs=3),
        class_balance=0.5, **ATSS_QFL,
    )  # fmt: skip


def demo():
    """make demo: shapes that synthetic.py draws, learnt in minutes on two cores."""
    return TrainConfig(
        name="demo", data="data/synthetic", backbone="tf_efficientnet_lite0", fpn_channels=128, frozen_stages=3,
        backbone_lr_scale=1.0, epochs=8, batch_size=8, nominal_batch=8, augment=NO_AUGMENTATION, warmup_steps=30,
        ema_decay=0.98, workers=1,
    )  # fmt: skip


PRESETS = {preset.__name__: preset for preset in (voc2012, voc0712, voc280, lite, demo)}
FLAGS = (
    "name", "data", "images", "cache", "backbone", "backbone_weights", "weights", "epochs", "batch_size", "lr",
    "workers", "seed", "device", "precision", "compile",
)  # fmt: skip
CHOICES = {
    "optimizer": ("adamw", "sgd"),
    "schedule": ("cosine", "steps"),
    "batch_norm": ("frozen", "train", "sync"),
    "cache": ("off", "disk"),
    "matching": MATCHINGS,
    "box_loss": tuple(BOX_LOSSES),
    "class_loss": tuple(CLASS_LOSSES),
}
LEAST = {
    "epochs": 1, "batch_size": 1, "nominal_batch": 1, "eval_every": 1, "log_every": 1, "workers": 0, "seed": 0,
    "patience": 0, "save_minutes": 0, "ema_decay": 0, "cache_side": 0, "warmup_steps": 0, "weight_decay": 0,
    "box_weight": 0,
}  # fmt: skip


def make_config(args):
    """The preset (to resume, the run's own config), with what the command line says instead."""
    changes = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    config = PRESETS[args.preset]()
    if args.resume:
        name = set_fields(replace(config, **changes), [one for one in args.set if one.startswith("name=")]).name
        config = saved_config(name, TrainConfig) or config
    config = set_fields(replace(config, **changes), args.set)
    if not re.fullmatch(r"[\w.-]+", config.name) or config.name.startswith("."):
        raise InputError(f"run name {config.name!r} has to be a plain folder name")
    for name, least in LEAST.items():
        if getattr(config, name) < least:
            raise InputError(f"{name} is {getattr(config, name)}; it must be at least {least}")
    for name in ("lr", "clip_norm"):
        if not getattr(config, name) > 0:
            hint = "; 1e9 clips nothing" if name == "clip_norm" else ""
            raise InputError(f"{name} is {getattr(config, name)}; it must be above 0{hint}")
    if not all(0 <= milestone <= 1 for milestone in config.milestones):
        raise InputError(f"milestones are {config.milestones}; they are shares of the training, in 0..1")
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            raise InputError(f"{name} {getattr(config, name)!r} is none of {', '.join(known)}")
    return config


def set_fields(config, assignments):
    """A copy of a dataclass with fields set from "field=value" texts; "part.field=value" reaches a dataclass inside.

    InputError for a field it has not, or a value that is not of the field's type.
    """
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        config = _set_field(config, name.split("."), text, assignment)
    return config


def _set_field(config, names, text, assignment):
    types = {field.name: field.type for field in fields(config)}
    if names[0] not in types:
        kind = type(config).__name__
        raise InputError(f"--set {assignment}: {kind} has no field {names[0]!r}; it has {', '.join(types)}")
    expected, old = types[names[0]], getattr(config, names[0])
    if is_dataclass(old) and len(names) > 1:
        return replace(config, **{names[0]: _set_field(old, names[1:], text, assignment)})
    try:
        value = text if expected is str else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected or len(names) > 1:
        hint = f"; it has fields of its own, as {names[0]}.{fields(old)[0].name}" if is_dataclass(old) else ""
        raise InputError(f"--set {assignment}: {text!r} is no {expected.__name__}{hint}")
    return replace(config, **{names[0]: value})


def batch_sizes(config, num_images):
    """(images a process takes at a time, batches a step): together about config.nominal_batch, at most num_images."""
    count = num_processes()
    batch_size = min(config.batch_size, num_images // count)
    accumulate = max(1, round(config.nominal_batch / (batch_size * count)))
    return batch_size, min(accumulate, num_images // (batch_size * count))


def scaled_lr(config, step_images):
    """config.lr for steps of another size than nominal_batch: linear for SGD (Goyal et al., arXiv:1706.02677), by the
    square root for AdamW (Malladi et al., arXiv:2205.10287); smaller steps than that keep it."""
    ratio = max(1.0, step_images / config.nominal_batch)
    return config.lr * (ratio if config.optimizer == "sgd" else math.sqrt(ratio))
