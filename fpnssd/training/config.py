"""The configuration of a training: every field, the presets, and how the command line changes them.

A preset is a function that returns a TrainConfig; a new one is a few lines here.
"""

import argparse
import ast
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from fpnssd.data.augment import NO_AUGMENTATION, AugmentConfig
from fpnssd.model_config import SCALES
from fpnssd.training.distributed import num_processes
from fpnssd.training.loss import BoxLoss, ClassLoss, Matching
from model import DEFAULT_CHECKPOINT
from utils import InputError

T = TypeVar("T")

MINIMUM = {
    "epochs": 1, "batch_size": 1, "nominal_batch": 1, "eval_every": 1, "log_every": 1, "workers": 0, "seed": 0,
    "patience": 0, "save_minutes": 0, "ema_decay": 0, "cache_side": 0, "warmup_steps": 0, "weight_decay": 0,
    "box_weight": 0, "minutes": 0, "repeats": 1,
}  # fmt: skip
# Fields that may differ on --resume without a note, and fields that must not: shapes, and the samples of each step.
FREE = {
    "device", "workers", "data", "train_split", "images", "eval_every", "cache", "log_every", "save_minutes", "compile",
    "tf32", "batch_size", "weights",
}  # fmt: skip
FIXED = {
    "backbone", "image_size", "fpn_channels", "optimizer", "nominal_batch", "seed", "frozen_stages", "batch_norm",
    "class_balance", "repeats",
}  # fmt: skip
# Fields of earlier versions, and their new names.
RENAMED = {"trunk": "backbone", "trunk_weights": "backbone_weights", "trunk_lr_scale": "backbone_lr_scale"}
# Flags, fields and values of earlier versions, and what became of them.
OLD_WORDS = {name: f"is called {new} now" for name, new in RENAMED.items()} | {
    "trunk_lr_decay": "was removed: backbone_lr_scale is for the whole backbone",
    "backbone_lr_decay": "was removed: backbone_lr_scale is for the whole backbone",
    "neck": "was removed: the neck is always an FPN",
    "ciou": "was removed: giou is the IoU loss",
    "train": "was removed: frozen works everywhere, sync on GPUs",
    "voc280": "is called voc2012 now, which trains for 280 epochs",
}


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a training. Each field is `--set field=value`; the usual ones have a flag of their own.

    Raises:
        InputError: for a value out of its range or choices, when it is made.
    """

    name: str = "voc2012"  # results go to runs/NAME
    data: str = "data/voc2012"  # folder of data lists
    train_split: str = "train"
    val_split: str = "val"  # empty: no evaluation
    images: str = ""  # folder of the images, if not that of the data lists

    backbone: str = "resnet50"  # a timm name
    backbone_weights: str = "imagenet"  # or none, or a file
    weights: str = ""  # a checkpoint to start from; its classes may differ: the tensors that fit are copied
    image_size: int = 300
    fpn_channels: int = 256
    scales: tuple = SCALES  # of the priors, one per level
    frozen_stages: int = 1  # backbone stages that are not trained: -1 none, 0 the stem, k the stem and k stages
    # Of the backbone: frozen keeps the ImageNet statistics and factors, sync trains them over the images of all GPUs.
    batch_norm: Literal["frozen", "sync"] = "frozen"

    epochs: int = 280
    repeats: int = 1  # how often an epoch goes through the training list: small lists have too few steps otherwise
    # Time limit of the training, from the start of the process to the last file written; 0: none. The schedule follows
    # the clock (time_plan.py), so a resumed training differs from an uninterrupted one.
    minutes: float = 0.0
    batch_size: int = 32  # images of one forward pass of a process
    nominal_batch: int = 32  # images per step, to which batches are accumulated, rounded to whole batches
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3  # of all but the backbone, at nominal_batch images per step; larger steps scale it (scaled_lr)
    backbone_lr_scale: float = 0.2  # the backbone's learning rate as a share of lr: pretrained features are soon lost
    momentum: float = 0.9  # of sgd
    weight_decay: float = 1e-4  # of weights; biases and norms have none
    schedule: Literal["cosine", "steps"] = "cosine"  # cosine falls to 0, steps to a tenth after each milestone
    milestones: tuple = (0.667, 0.833)  # shares of all steps: SSD's 80,000 and 100,000 of 120,000
    warmup_steps: int = 100  # linear; at most a quarter of the training
    clip_norm: float = 10.0  # largest norm of the gradient
    ema_decay: float = 0.999  # of the averaged weights; warmed up as (1 + step) / (10 + step)

    matching: Matching = "multibox"
    box_loss: BoxLoss = "smooth_l1"
    class_loss: ClassLoss = "ohem"
    box_weight: float = 1.0  # of the box loss, relative to the class loss
    negative_ratio: int = 3  # of ohem
    min_negatives: int = 8  # of ohem, for each image
    difficult_positive: bool = True  # whether difficult objects are positives, or ignored

    augment: AugmentConfig = AugmentConfig()  # noqa: RUF009 (frozen); its fields as --set augment.mosaic=0.5
    class_balance: float = 0.0  # 0 draws images equally often, 1 classes; 0.5 lies between (datasets.balanced_weights)
    cache: Literal["off", "disk"] = "off"  # disk: decoded images of the training list in one file beside it
    cache_side: int = 0  # shorter side of the cached images; 0 keeps their size

    eval_every: int = 10  # epochs; the last one is always evaluated
    patience: int = 0  # evaluations without a better one after which the training ends; 0: never
    save_minutes: float = 10.0  # between checkpoints within an epoch; each epoch ends with one
    log_every: int = 20  # steps between readings of the loss; each reading synchronises with the GPU
    workers: int = 2
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: the fastest that is safe (utils.pick_precision)
    # fp32 convolutions and matrix products multiply in tf32 on GPUs (10 bits of mantissa), in bf16 on CPUs that have
    # instructions for it (7 bits; a step took 0.77 of the time), and add in fp32.
    tf32: bool = True
    compile: bool = False  # torch.compile: minutes at the start, faster steps afterwards

    def __post_init__(self):
        for name, minimum in MINIMUM.items():
            if not getattr(self, name) >= minimum:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        for name, hint in (("lr", ""), ("clip_norm", "; 1e9 clips nothing")):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0{hint}")
        for name in ("scales", "milestones"):
            if not all(isinstance(value, (int, float)) for value in getattr(self, name)):
                raise InputError(f"{name} are {getattr(self, name)}; they must be numbers")
        if len(self.scales) != len(SCALES) or min(self.scales) <= 0:
            raise InputError(f"scales are {self.scales}; they must be {len(SCALES)} numbers above 0")
        if not all(0 <= milestone <= 1 for milestone in self.milestones):
            raise InputError(f"milestones are {self.milestones}; they are shares of the training, in 0..1")
        for field in fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                reason = f": {value} {OLD_WORDS[value]}" if value in OLD_WORDS else ""
                raise InputError(f"{field.name} {value!r} is not one of {', '.join(get_args(field.type))}{reason}")


# ---------------------------------------------------------------------------------------------------------------------
# Presets

# Instead of SSD's matching and losses, which are TrainConfig's defaults: the best ones of docs/results.md.
ATSS_QFL = {"matching": "atss", "box_loss": "giou", "box_weight": 2.0, "class_loss": "quality"}


def voc2012() -> TrainConfig:
    """ResNet-50-FPN and SSD's MultiBox loss on VOC2012 train, evaluated on val."""
    return TrainConfig()


def voc2012_atss() -> TrainConfig:
    """The same network and lists with ATSS matching, GIoU and quality focal loss."""
    return TrainConfig(name="voc2012_atss", epochs=60, eval_every=4, **ATSS_QFL)


def voc0712() -> TrainConfig:
    """The usual benchmark: VOC2007 and VOC2012 trainval, evaluated on VOC2007 test; SSD's MultiBox loss."""
    lists = {"data": "data/voc0712", "train_split": "trainval", "val_split": "test"}
    return TrainConfig(name="voc0712", **lists, epochs=80, eval_every=4)


def voc0712_atss() -> TrainConfig:
    """The same benchmark with ATSS matching, GIoU and quality focal loss."""
    return replace(voc0712(), name="voc0712_atss", **ATSS_QFL)


def lite() -> TrainConfig:
    """The small detector: trains in hours on a CPU; its ImageNet weights come with a Python package."""
    return TrainConfig(
        name="lite", backbone="tf_efficientnet_lite2", fpn_channels=128, frozen_stages=3, epochs=36, batch_size=16,
        nominal_batch=16, warmup_steps=50, workers=1, augment=AugmentConfig(copy_paste=0.5, close_epochs=3),
        class_balance=0.5, eval_every=4, **ATSS_QFL,
    )  # fmt: skip


def finetune() -> TrainConfig:
    """Fine-tunes the shipped checkpoint on your own data; fpnssd/training/finetune.py adapts settings to the data.

    Fewer images per step and a higher rate than lite: docs/training.md has the comparison. Copy-paste stays on to the
    end, as with a limit of time: large lists have few epochs.
    """
    return replace(
        lite(), name="finetune", weights=DEFAULT_CHECKPOINT, batch_size=8, nominal_batch=8, lr=2e-3,
        augment=replace(lite().augment, close_epochs=0),
    )  # fmt: skip


def demo() -> TrainConfig:
    """make demo: the shapes that fpnssd.data.synthetic draws; takes four minutes on one core."""
    return TrainConfig(
        name="demo", data="data/synthetic", backbone="tf_efficientnet_lite0", image_size=256, fpn_channels=128,
        frozen_stages=3, backbone_lr_scale=1.0, epochs=7, batch_size=8, nominal_batch=8, augment=NO_AUGMENTATION,
        warmup_steps=30, ema_decay=0.98, workers=1, eval_every=7, **ATSS_QFL,
    )  # fmt: skip


PRESETS = {preset.__name__: preset for preset in (voc2012, voc2012_atss, voc0712, voc0712_atss, lite, finetune, demo)}


# ---------------------------------------------------------------------------------------------------------------------
# From the command line

FLAGS = {  # the fields with a flag of their own, and the flag's help
    "name": "name of the run: results are written to runs/NAME",
    "data": "folder of the data lists",
    "images": "folder of the images, if not that of the data lists",
    "cache": "off, or disk: keep decoded images in a file beside the training list",
    "backbone": "timm name of the backbone",
    "backbone_weights": "initial weights of the backbone: imagenet, none or a file",
    "weights": "checkpoint of a detector to start from; its classes may differ",
    "epochs": "number of epochs",
    "minutes": "time limit, evaluation included; the learning rate schedule follows the clock",
    "batch_size": "images per forward pass and process; smaller batches are accumulated, so the step stays the same",
    "lr": "learning rate of all but the backbone",
    "workers": "processes that load images",
    "seed": "random seed of weights, order and augmentation",
    "device": "auto, cpu, cuda or mps",
    "precision": "auto, fp32, bf16 or fp16",
    "compile": "use torch.compile: minutes at the start, faster steps afterwards",
}


def make_config(args: argparse.Namespace, chosen: Iterable[str] = ()) -> TrainConfig:
    """Makes the configuration that a command line describes.

    Args:
        args: of train.parse_args: `preset`, `resume`, `set` and one attribute for each of FLAGS, None if not given.
        chosen: "field=value" texts that change the preset; the command line overrides them.

    Returns:
        The preset, or with `resume` the configuration of the run, changed by the command line.

    Raises:
        InputError: for an unknown preset, field or value.
    """
    if args.preset not in PRESETS:
        reason = OLD_WORDS.get(args.preset, f"is not one of {', '.join(PRESETS)}")
        raise InputError(f"preset {args.preset!r} {reason}")
    changes = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    config = set_fields(PRESETS[args.preset](), chosen)
    if args.resume:
        name = set_fields(replace(config, **changes), [text for text in args.set if text.startswith("name=")]).name
        if not any((Path("runs") / name / file).exists() for file in ("config.json", "last.pth.tar")):
            raise InputError(f"nothing to resume: there is no run {Path('runs') / name} in {Path.cwd()}")
        config = saved_config(name) or config
    config = set_fields(replace(config, **changes), args.set)
    if not re.fullmatch(r"[\w.-]+", config.name) or config.name.startswith("."):
        raise InputError(f"run name {config.name!r} must be a plain folder name")
    return config


def refuse_old_flags(arguments: Iterable[str]) -> None:
    """Raises InputError for a flag of an earlier version, such as --trunk; the message has its new name."""
    for argument in arguments:
        flag = argument.split("=")[0]
        word = flag.removeprefix("--").replace("-", "_")
        if argument.startswith("--") and word in OLD_WORDS:
            new = RENAMED.get(word)
            if new is not None and new in FLAGS:
                raise InputError(f"{flag} is called --{new.replace('_', '-')} now")
            raise InputError(f"{flag} {OLD_WORDS[word]}")


def set_fields(config: T, assignments: Iterable[str]) -> T:
    """A copy of a dataclass with some fields changed.

    Args:
        config: the dataclass.
        assignments: "field=value" texts; "part.field=value" reaches a dataclass within it.

    Raises:
        InputError: for a field that does not exist, or a value of another type than the field's.
    """
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        config = _set_field(config, name.split("."), text, assignment)
    return config


def _set_field(config: Any, names: list[str], text: str, assignment: str) -> Any:
    types = {field.name: field.type for field in fields(config)}
    if names[0] not in types:
        if names[0] in OLD_WORDS:
            raise InputError(f"--set {assignment}: {names[0]} {OLD_WORDS[names[0]]}")
        kind = type(config).__name__
        raise InputError(f"--set {assignment}: {kind} has no field {names[0]!r}; it has {', '.join(types)}")
    old = getattr(config, names[0])
    expected = str if get_origin(types[names[0]]) is Literal else types[names[0]]
    if is_dataclass(old) and len(names) > 1:
        return replace(config, **{names[0]: _set_field(old, names[1:], text, assignment)})
    try:
        value = text if expected is str else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected or len(names) > 1:
        hint = f"; it has fields of its own, such as {names[0]}.{fields(old)[0].name}" if is_dataclass(old) else ""
        raise InputError(f"--set {assignment}: {text!r} is not of type {expected.__name__}{hint}")
    return replace(config, **{names[0]: value})


# ---------------------------------------------------------------------------------------------------------------------
# As JSON


def as_builtins(config: Any) -> dict:
    """A configuration as builtins, for checkpoints and JSON: tuples become lists."""
    return json.loads(json.dumps(asdict(config)))


def from_builtins(kind: type[T], values: dict) -> T:
    """The inverse of as_builtins: a dataclass of type `kind`, with the dataclasses within it."""
    known = {field.name: field.type for field in fields(kind)}
    read = {}
    for name, value in values.items():
        if isinstance(value, dict):
            value = from_builtins(known[name], value)
        read[name] = tuple(value) if isinstance(value, list) else value
    return kind(**read)


def saved_config(name: str) -> TrainConfig | None:
    """The configuration in runs/NAME/config.json, or None where there is no such file.

    Raises:
        InputError: if it was written by another version, or is damaged.
    """
    path = Path("runs") / name / "config.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "trunk" in values:
            raise InputError(old_run(path.parent))
        return from_builtins(TrainConfig, values)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not a configuration of this version: {error}") from error


def old_run(folder: Path) -> str:
    """Why a run whose model has format version 1 is not resumed."""
    return (
        f"{folder} is a run of format version 1 and cannot be resumed; --weights {folder / 'best.pth.tar'} "
        "starts another run (--name) from its weights"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Derived values


def batch_sizes(config: TrainConfig, num_images: int) -> tuple[int, int]:
    """How the images of a step are divided.

    Returns:
        (images of one forward pass of a process, passes per step): config.nominal_batch images, rounded to whole
        batches, over all processes and passes, and no more than num_images.
    """
    count = num_processes()
    batch_size = min(config.batch_size, num_images // count)
    accumulate = max(1, round(config.nominal_batch / (batch_size * count)))
    return batch_size, min(accumulate, num_images // (batch_size * count))


def scaled_lr(config: TrainConfig, step_images: int) -> float:
    """config.lr for a step of step_images images.

    Steps larger than nominal_batch scale it linearly for SGD (Goyal et al., arXiv:1706.02677) and by the square root
    for AdamW (Malladi et al., arXiv:2205.10287); smaller ones do not change it.
    """
    ratio = max(1.0, step_images / config.nominal_batch)
    return config.lr * (ratio if config.optimizer == "sgd" else math.sqrt(ratio))
