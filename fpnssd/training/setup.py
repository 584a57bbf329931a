"""Builds the data lists, loader, network and loss of a training, and formats the text it prints."""

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from datasets import DetectionDataset, EpochSampler, balanced_weights, make_loader
from fpnssd.data.data_list import DataList
from fpnssd.data.images import DataError
from fpnssd.data.pixel_cache import PixelCache
from fpnssd.evaluation.predict import check_same_classes
from fpnssd.model_config import ModelConfig, ssd_prior_shapes
from fpnssd.training import distributed
from fpnssd.training.checkpoints import BEST, LAST
from fpnssd.training.config import PRESETS, TrainConfig, scaled_lr
from fpnssd.training.loss import MultiBoxLoss
from fpnssd.training.optim import load_weights
from model import FPNSSD, load_checkpoint
from utils import has_fast_bf16

Lists = tuple[DataList, DataList | None]  # training and evaluation list, None without evaluation


def load_lists(config: TrainConfig) -> Lists:
    """The training list and the evaluation list, which is None if config.val_split is empty.

    Raises:
        DataError: if their classes differ, or the training list has too few images or no objects.
    """
    data, images = Path(config.data), config.images or None
    train_list = DataList.load(data / f"{config.train_split}.json", images)
    val_list = DataList.load(data / f"{config.val_split}.json", images) if config.val_split else None
    if val_list is not None:
        check_same_classes(train_list.classes, val_list, train_list.path)
    if len(train_list) < distributed.num_processes():
        raise DataError(f"{train_list.path} has {len(train_list)} images, too few to train on")
    if train_list.crowd.all():
        raise DataError(f"{train_list.path} has no objects to train on; those with iscrowd 1 do not count")
    return train_list, val_list


def make_train_loader(
    config: TrainConfig, train_list: DataList, batch_size: int, epoch_images: int, pin_memory: bool
) -> DataLoader:
    """Augmented batches of this process; an epoch has epoch_images images over all processes."""
    cache = None
    if config.cache == "disk":  # the first process of each machine makes it
        cache = PixelCache.build(train_list, config.cache_side, wait=distributed.local_rank() > 0)
    if not config.difficult_positive:  # as the loss does, augmentation treats difficult objects as crowds
        train_list = copy.copy(train_list)
        train_list.crowd, train_list.arrays_file = train_list.crowd | train_list.difficult, None
    dataset = DetectionDataset(train_list, config.image_size, config.augment, config.seed, cache, config.epochs)
    weights = balanced_weights(train_list, config.class_balance) if config.class_balance else None
    rank, count = distributed.rank(), distributed.num_processes()
    sampler = EpochSampler(len(dataset), config.seed, weights, rank, count, epoch_images, config.repeats)
    return make_loader(dataset, batch_size, sampler, config.workers, pin_memory)


def make_model(config: TrainConfig, train_list: DataList, resume: bool) -> FPNSSD:
    """The network with its initial weights: pretrained backbone weights, or those of the detector config.weights."""
    torch.manual_seed(config.seed)
    # A resumed run has weights already, and so has a run that starts from a detector with the same backbone.
    other = load_checkpoint(config.weights)["model"] if config.weights and not resume else None
    has_backbone = resume or (other is not None and other.config.backbone == config.backbone)
    shape = {
        "fpn_channels": config.fpn_channels,
        "prior_shapes": ssd_prior_shapes(config.scales),
        "category_ids": tuple(train_list.category_ids),
    }
    model_config = ModelConfig(train_list.classes, config.backbone, config.image_size, **shape)
    model = FPNSSD(model_config, "none" if has_backbone else config.backbone_weights)
    if config.class_loss != "ohem":
        model.init_class_bias(0.99)
    if not has_backbone and config.backbone_weights == "none" and distributed.is_main():
        fixed = [f"frozen_stages={config.frozen_stages}"] if config.frozen_stages >= 0 else []
        fixed += ["batch_norm=frozen"] if config.batch_norm == "frozen" else []
        if fixed:
            print(f"note: {' '.join(fixed)} keeps random weights of the backbone as they are: --set frozen_stages=-1 "
                  "batch_norm=sync trains all of them")  # fmt: skip
    if other is not None:
        summary = load_weights(model, other)
        if distributed.is_main():
            print(f"{config.weights}: {summary}")
    return model


def make_loss(config: TrainConfig, model: FPNSSD) -> MultiBoxLoss:
    """Matching and losses of a configuration, for the priors of a network."""
    return MultiBoxLoss(
        model.priors, model.level_counts, config.matching, config.box_loss, config.class_loss,
        negative_ratio=config.negative_ratio, min_negatives=config.min_negatives,
        difficult_positive=config.difficult_positive,
    )  # fmt: skip


def format_settings(
    config: TrainConfig, device: torch.device, model: FPNSSD, lists: Lists, sizes: tuple[int, int]
) -> str:
    """The text printed at the start of a training: data, network, batches, and the fields that differ from a preset.

    Args:
        lists: training and evaluation list.
        sizes: images of one forward pass of a process, and passes per step.
    """
    count, step_images = distributed.num_processes(), math.prod(sizes) * distributed.num_processes()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    fast = "tf32" if device.type == "cuda" else "bf16" if has_fast_bf16(device) else ""
    products = f" with {fast} products" if config.tf32 and config.precision == "fp32" and fast else ""
    num_val = "none" if lists[1] is None else len(lists[1])
    epochs = f"{config.epochs} epochs" if not config.minutes else f"{config.minutes:g} minutes, epochs"
    lr = scaled_lr(config, step_images)
    scaled = f" (scaled from {config.lr:g} for {config.nominal_batch} images per step)" if lr != config.lr else ""
    lines = [
        f"runs/{config.name}: {config.backbone}, {num_parameters / 1e6:.1f} M parameters, {len(lists[0])} images for "
        f"training, {num_val} for evaluation, {len(lists[0].classes)} classes; {count} x {device.type}, "
        f"{config.precision}{products}",
        f"{epochs} of {len(lists[0]) * config.repeats // step_images} steps of {step_images} images ({sizes[0]} x "
        f"{count} processes x {sizes[1]} accumulated), lr {lr:g}{scaled}",
        *_changed_fields(config),
    ]
    augment = config.augment
    if (augment.mosaic or augment.copy_paste) and augment.close_epochs >= config.epochs:
        lines.append(
            f"note: no mosaic and no copy-paste: the last {augment.close_epochs} epochs (close_epochs) have none"
        )
    return "\n".join(lines)


def _changed_fields(config: TrainConfig) -> list[str]:
    """The fields that differ from the nearest preset, one per line."""
    values = _flat(asdict(config))
    changed = {
        name: {key: value for key, value in values.items() if value != preset[key]}
        for name, preset in ((name, _flat(asdict(make()))) for name, make in PRESETS.items())
    }
    nearest = min(changed, key=lambda name: len(changed[name]))
    end = f"; all fields: runs/{config.name}/config.json"
    if not changed[nearest]:
        return [f"preset {nearest}{end}"]
    return [f"preset {nearest} with{end}", *(f"  {name} {value}" for name, value in changed[nearest].items())]


def _flat(values: dict) -> dict:
    """A configuration as a flat dict, with dotted names for the fields of nested dataclasses, as in --set."""
    nested = {
        f"{name}.{key}": entry for name, part in values.items() if isinstance(part, dict) for key, entry in part.items()
    }
    return {name: value for name, value in values.items() if not isinstance(value, dict)} | nested


def format_end(config: TrainConfig, folder: Path, best: float | None, log: list[dict]) -> str:
    """The checkpoint of the best evaluation, or the last one, and commands that use it."""
    path = folder / BEST
    if not path.exists():
        return f"next: python detect.py FOLDER --checkpoint {folder / LAST}"
    row = next((row for row in log if best is not None and row.get("voc2007_ap50") == best), {})
    score = f" (epoch {row['epoch']}, AP50 {100 * best:.1f})" if row and best is not None else ""
    threshold = row.get("best_min_score")  # the score threshold of the highest F1
    threshold = f" --min-score {threshold:.4g}" if threshold is not None else ""
    split = "" if config.val_split == "val" else f" --split {config.val_split}"
    return (
        f"best: {path}{score}\nnext: python eval.py {path} --data {config.data}{split} --report report.html\n"
        f"      python detect.py FOLDER --checkpoint {path}{threshold}"
    )


def format_epoch(row: dict, epochs: int | None) -> str:
    """One line for an epoch's row of the log; `epochs` is their number, None under a time limit."""
    losses = [f"{name.removeprefix('loss_')} {value:.3f}" for name, value in row.items() if name.startswith("loss_")]
    of = f"/{epochs}" if epochs is not None else ""
    text = f"epoch {row['epoch']}{of}: {', '.join(losses)}, {row['images_per_s']:.1f} images/s, "
    text += f"{row['share_waiting']:.0%} of the time waiting for data"
    if "voc2007_ap50" in row:
        scores = {name: row[name] for name in ("voc2007_ap50", "voc2010_ap50", "coco_ap", "coco_ap50")}
        text += "; " + ", ".join(f"{n} {'none' if v is None else f'{v:.3f}'}" for n, v in scores.items())
    return text


def grouped(batches: Iterable[dict], count: int) -> Iterator[list[dict]]:
    """The batches in lists of `count`."""
    iterator = iter(batches)
    while group := list(islice(iterator, count)):
        yield group


def to_device(batch: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a batch that a step needs, copied to the device without synchronisation."""
    tensors = {k: batch[k].to(device, non_blocking=True) for k in ("boxes_norm", "labels", "difficult", "crowd")}
    image = batch["image"].to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return {**tensors, "image": image}
