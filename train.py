"""Trains FPN-SSD: data lists in, runs/NAME/ with last.pth.tar, best.pth.tar, config.json, log.csv and curves.png out.

    python train.py                                   # preset voc2012: data/voc2012, resnet50
    python train.py --data data/vocreal --trunk tf_efficientnet_lite0 --epochs 12 --name lite
    python train.py --preset lite --data data/vocreal --name small --set trunk_lr_scale=0.1
    python train.py --name small --resume             # goes on where runs/small/last.pth.tar stopped

Ctrl-C saves last.pth.tar after the running step and ends; a second one ends at once.
"""

import argparse
import csv
import json
import math
import re
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from augment import NO_AUGMENTATION, AugmentConfig
from datasets import (
    DataError,
    DataList,
    DetectionDataset,
    EpochSampler,
    balanced_weights,
    draw_batch,
    make_loader,
)
from eval import Predictor, check_same_classes, evaluate, format_table
from loss import MultiBoxLoss
from model import FPNSSD, ModelConfig, load_checkpoint, save_checkpoint
from pixel_cache import PixelCache
from report import draw_curves
from utils import InputError, autocast, explain, pick_device, pick_precision, set_fields, written_whole


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. Each field is reachable as --set field=value; the usual ones have a flag of their own."""

    name: str = "voc2012"  # results go to runs/NAME
    data: str = "data/voc2012"  # folder of data lists
    train_split: str = "train"
    val_split: str = "val"
    images: str = ""  # folder of the photographs, if not where the data lists say

    trunk: str = "resnet50"
    trunk_weights: str = "imagenet"  # or none, or a file
    image_size: int = 300
    fpn_channels: int = 256
    frozen_stages: int = 1  # trunk stages that do not train: -1 none, 0 the stem, k the stem and k stages
    freeze_bn: bool = True  # the trunk's batch norm keeps its ImageNet statistics and factors

    epochs: int = 60
    batch_size: int = 32
    optimizer: str = "adamw"  # or sgd
    lr: float = 1e-3  # of everything but the trunk
    trunk_lr_scale: float = 0.2  # pretrained trunks forget: theirs is so much of lr
    momentum: float = 0.9  # of sgd
    weight_decay: float = 1e-4  # of weights; biases and norms have none
    warmup_steps: int = 100  # linear; then a cosine to 0
    clip_norm: float = 10.0
    ema_decay: float = 0.999  # warmed up as (1 + step) / (10 + step)
    box_weight: float = 1.0  # of the box loss beside the class loss
    negative_ratio: int = 3
    min_negatives: int = 8
    difficult_positive: bool = True  # whether difficult objects are learnt

    augment: AugmentConfig = AugmentConfig()  # noqa: RUF009 (frozen); its fields as --set augment.mosaic=0.5
    class_balance: float = 0.0  # 0 draws images alike, 1 classes; 0.5 lies between (datasets.balanced_weights)
    cache: str = "off"  # or disk: decoded images of the training list in one file beside it
    cache_side: int = 0  # shorter side of images in the cache; 0 keeps them whole
    eval_every: int = 4  # epochs; the last one is always evaluated
    workers: int = 2
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"  # fp32, bf16, or bf16 where the machine is fast at it


PRESETS = {
    "voc2012": TrainConfig(),
    # The small detector: trains in minutes to hours on a CPU, from weights that an installable package carries.
    "lite": TrainConfig(
        name="lite",
        trunk="tf_efficientnet_lite0",
        fpn_channels=128,
        frozen_stages=3,
        epochs=36,
        batch_size=16,
        warmup_steps=50,
        workers=1,
    ),
    # make demo: shapes that synthetic.py draws, learnt in minutes on two cores.
    "demo": TrainConfig(
        name="demo", data="data/synthetic", trunk="tf_efficientnet_lite0", fpn_channels=128, frozen_stages=3,
        trunk_lr_scale=1.0, epochs=8, batch_size=8, augment=NO_AUGMENTATION, warmup_steps=30, ema_decay=0.98, workers=1,
    ),
}  # fmt: skip
FLAGS = (
    "name", "data", "images", "cache", "trunk", "trunk_weights", "epochs", "batch_size", "lr", "workers", "seed",
    "device", "precision",
)  # fmt: skip


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what is kept."""


def main(argv=None):
    try:
        args = parse_args(argv)
        metrics = train(make_config(args), resume=args.resume)
    except (InputError, TrainingStopped, OSError) as error:
        sys.exit(f"train: {explain(error)}")
    return metrics


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="fields for --set: " + ", ".join(f.name for f in fields(TrainConfig)),
    )
    parser.add_argument("--preset", default="voc2012", choices=PRESETS, help="where the values come from (voc2012)")
    for name in FLAGS:
        default = getattr(PRESETS["voc2012"], name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), help=f"voc2012: {default!r}")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="any field")
    parser.add_argument("--resume", action="store_true", help="go on with runs/NAME")
    return parser.parse_args(argv)


def make_config(args):
    """The preset (to resume, the run's own config), with what the command line says instead."""
    changes = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    config = PRESETS[args.preset]
    if args.resume:
        config = saved_config(changes.get("name", config.name)) or config
    config = set_fields(replace(config, **changes), args.set)
    if not re.fullmatch(r"[\w.-]+", config.name) or config.name.startswith("."):
        raise InputError(f"run name {config.name!r} has to be a plain folder name")
    for name, least in (("epochs", 1), ("batch_size", 1), ("eval_every", 1), ("workers", 0), ("seed", 0)):
        if getattr(config, name) < least:
            raise InputError(f"{name} is {getattr(config, name)}; it must be at least {least}")
    if config.optimizer not in ("adamw", "sgd"):
        raise InputError(f"optimizer {config.optimizer!r} is neither adamw nor sgd")
    if config.cache not in ("off", "disk"):
        raise InputError(f"cache {config.cache!r} is neither off nor disk")
    return config


def saved_config(name):
    """The TrainConfig of runs/NAME, or None where there is none."""
    path = Path("runs") / name / "config.json"
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        ranges = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.pop("augment").items()}
        return TrainConfig(**saved, augment=AugmentConfig(**ranges))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is no configuration of this version's: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a run


def build_optimizer(model, config):
    """AdamW or SGD over four groups: trunk or not, decayed or not."""
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_trunk, decays = name.startswith("trunk."), parameter.dim() > 1
        group = {
            "params": [],
            "lr": config.lr * (config.trunk_lr_scale if in_trunk else 1),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        groups.setdefault((in_trunk, decays), group)["params"].append(parameter)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups.values(), lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups.values(), lr=config.lr)


def lr_factor(step, warmup_steps, num_steps):
    """Of the learning rate at a step: linear from near 0 to 1, then a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def trunk_stages(trunk):
    """The trunk's modules as [stem, stage 1, stage 2, ...]; knows the names that timm's families give them."""
    stem, stages = [], []
    for name, child in trunk.named_children():
        if name in ("blocks", "stages"):
            stages += [[stage] for stage in child]
        elif re.fullmatch(r"(layer|stages?_?|blocks_)\d+", name):
            stages.append([child])
        elif not stages:
            stem.append(child)
    return [stem, *stages]


def freeze(model, config):
    """Takes frozen stages and batch norm out of training, for good; set_train_mode keeps them in evaluation mode."""
    stages = trunk_stages(model.trunk)
    if len(stages) == 1 and config.frozen_stages >= 0:
        raise InputError(f"the stages of trunk {config.trunk!r} are not known: --set frozen_stages=-1 trains all of it")
    if not -1 <= config.frozen_stages < len(stages):
        raise InputError(
            f"frozen_stages is {config.frozen_stages}; trunk {config.trunk!r} takes -1 (none) to {len(stages) - 1}"
        )
    for modules in stages[: config.frozen_stages + 1]:
        for module in modules:
            module.requires_grad_(False)
    if config.freeze_bn:
        for module in model.trunk.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)


def set_train_mode(model):
    """Training mode but for batch norm whose factors are frozen: its statistics stay too."""
    model.train()
    for module in model.trunk.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
            module.eval()


def warmed_up_ema(decay):
    """AveragedModel's update rule: decay min(decay, (1 + n) / (10 + n)), so that the start is soon forgotten."""

    def update(averaged, current, num_averaged):
        n = int(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, num_averaged)

    return update


class StopOnSignal:
    """Ctrl-C as a wish: `wanted` becomes true, and the loop stops where nothing is half done. The second one raises."""

    def __init__(self):
        self.wanted = False

    def __enter__(self):
        self._main_thread = threading.current_thread() is threading.main_thread()
        if self._main_thread:  # signals can be caught nowhere else
            self._before = signal.signal(signal.SIGINT, self._wish)
        return self

    def _wish(self, signum, frame):
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        tqdm.write("stopping after this step and saving; Ctrl-C again to stop at once", file=sys.stderr)

    def __exit__(self, *_):
        if self._main_thread:
            signal.signal(signal.SIGINT, self._before)


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Run:
    """Everything that changes while training, and its way to and from runs/NAME/last.pth.tar."""

    def __init__(self, config, train_list, device, trunk_weights):
        self.config = config
        self.num_images = len(train_list)
        self.folder = Path("runs") / config.name
        torch.manual_seed(config.seed)
        model_config = ModelConfig(
            classes=train_list.classes,
            trunk=config.trunk,
            image_size=config.image_size,
            fpn_channels=config.fpn_channels,
        )
        self.model = FPNSSD(model_config, trunk_weights).to(device, memory_format=torch.channels_last)
        freeze(self.model, config)
        self.ema = AveragedModel(self.model, multi_avg_fn=warmed_up_ema(config.ema_decay))
        self.optimizer = build_optimizer(self.model, config)
        self.step = 0
        self.best = None
        self.log = []  # a dict an epoch

    def save(self, file_name):
        save_checkpoint(
            self.folder / file_name,
            self.ema.module,
            raw_model=self.model.state_dict(),
            ema_updates=int(self.ema.n_averaged),
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            best=self.best,
            log=self.log,
            train_config=asdict(self.config),
            torch_rng=torch.get_rng_state(),
            num_images=self.num_images,
        )

    def load(self, file_name="last.pth.tar"):
        path = self.folder / file_name
        checkpoint = load_checkpoint(path)
        if "train_config" not in checkpoint:
            raise InputError(f"{path} holds a model, but no run that could be resumed")
        check_same_run(self.config, checkpoint["train_config"], path)
        if checkpoint["model"].config != self.model.config:
            raise InputError(f"{path} was trained on other classes than {self.config.data} has now")
        if checkpoint["num_images"] != self.num_images:
            counts = f"{checkpoint['num_images']} images, {self.config.data} has {self.num_images} now"
            raise InputError(f"{path} was trained on {counts}: its epochs would differ; start another run (--name)")
        self.ema.module.load_state_dict(checkpoint["model"].state_dict())
        self.ema.n_averaged.fill_(checkpoint["ema_updates"])
        self.model.load_state_dict(checkpoint["raw_model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.best, self.log = checkpoint["step"], checkpoint["best"], checkpoint["log"]
        torch.set_rng_state(checkpoint["torch_rng"])

    def write_log(self):
        columns = list(dict.fromkeys(name for row in self.log for name in row))
        with written_whole(self.folder / "log.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.log)


def check_same_run(config, saved, path):
    """Refuses to resume with another recipe; where it runs may change."""
    free = {"device", "workers", "images", "precision", "eval_every", "cache"}
    changed = [
        f"{name} {saved.get(name)!r} -> {value!r}"
        for name, value in asdict(config).items()
        if name not in free and saved.get(name) != value
    ]
    if changed:
        raise InputError(f"{path} was trained with another recipe, so it cannot be resumed: {'; '.join(changed)}")


def train(config, resume=False):
    """Trains to the end of config.epochs, or until Ctrl-C; returns the last evaluation's metrics (None if none)."""
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    folder = Path("runs") / config.name
    if not resume and (folder / "last.pth.tar").exists():
        raise InputError(f"{folder} has a run already: --resume goes on with it, --name starts another")
    data, images = Path(config.data), config.images or None
    train_list = DataList.load(data / f"{config.train_split}.json", images)
    val_list = DataList.load(data / f"{config.val_split}.json", images)
    check_same_classes(train_list.classes, val_list, train_list.path)
    if len(train_list) == 0:
        raise DataError(f"{train_list.path} has no images to train on")

    cache = PixelCache.build(train_list, config.cache_side) if config.cache == "disk" else None
    dataset = DetectionDataset(train_list, config.image_size, config.augment, config.seed, cache, config.epochs)
    batch_size = min(config.batch_size, len(dataset))
    weights = balanced_weights(train_list, config.class_balance) if config.class_balance else None
    sampler = EpochSampler(len(dataset), config.seed, weights)
    loader = make_loader(dataset, batch_size, sampler, config.workers, pin_memory=device.type == "cuda")
    steps_per_epoch = len(dataset) // batch_size

    # A run that goes on has its weights: it needs no download.
    run = Run(config, train_list, device, "none" if resume else config.trunk_weights)
    if resume:
        run.load()
    with written_whole(folder / "config.json") as temporary:
        Path(temporary).write_text(json.dumps(asdict(config), indent=2), encoding="utf-8")
    multibox_loss = MultiBoxLoss(
        run.model.priors,
        negative_ratio=config.negative_ratio,
        min_negatives=config.min_negatives,
        difficult_positive=config.difficult_positive,
    )
    num_parameters = sum(p.numel() for p in run.model.parameters())
    print(
        f"{folder}: {config.trunk}, {num_parameters / 1e6:.1f} M parameters, {len(train_list)} images for training, "
        f"{len(val_list)} for evaluation, {len(train_list.classes)} classes; {device.type}, {precision}; "
        f"{config.epochs} epochs of {steps_per_epoch} steps of {batch_size}, {config.optimizer}, lr {config.lr:g}"
        + (f"; resumed after step {run.step}" if resume else "")
    )

    metrics = None
    if run.step >= config.epochs * steps_per_epoch:
        print(f"nothing left to do: all {config.epochs} epochs of {folder} are trained")
    with StopOnSignal() as stop:
        for epoch in range(run.step // steps_per_epoch, config.epochs):
            sampler.epoch = epoch
            sampler.start = run.step % steps_per_epoch * batch_size
            row = train_epoch(run, loader, multibox_loss, precision, epoch, steps_per_epoch, stop)
            if stop.wanted and run.step < (epoch + 1) * steps_per_epoch:
                run.save("last.pth.tar")
                break
            is_last = epoch + 1 == config.epochs
            if (epoch + 1) % config.eval_every == 0 or is_last:
                predict_fn = Predictor(run.ema.module, device, precision)
                metrics = evaluate(predict_fn, val_list, config.image_size, workers=config.workers)
                row |= {name: value for name, value in metrics.items() if name.startswith(("voc", "coco"))}
            run.log.append(row)
            print(describe_epoch(row, config.epochs))
            score = row.get("voc2007_ap50")
            if score is not None and (run.best is None or score > run.best):
                run.best = score
                run.save("best.pth.tar")
            run.save("last.pth.tar")
            run.write_log()
            if "coco_ap" in row:
                draw_curves(folder / "log.csv", folder / "curves.png")
            if stop.wanted:
                break
    if stop.wanted:
        print(f"stopped after step {run.step}; go on with --name {config.name} --resume")
    if metrics:
        print(format_table(metrics))
    return metrics


def train_epoch(run, loader, multibox_loss, precision, epoch, steps_per_epoch, stop):
    """One epoch, or what is left of it; returns its row of the log."""
    config, device = run.config, multibox_loss.priors.device
    set_train_mode(run.model)
    num_steps = config.epochs * steps_per_epoch
    sums, images, start = {}, 0, time.perf_counter()
    first = run.step % steps_per_epoch
    with tqdm(total=steps_per_epoch, initial=first, desc=f"epoch {epoch + 1}", leave=False, disable=None) as progress:
        for done, batch in enumerate(loader, start=1):
            if run.step < 3:
                draw_batch(batch, run.model.config.classes).save(run.folder / f"batch_{run.step}.jpg")
            factor = lr_factor(run.step, config.warmup_steps, num_steps)
            terms = train_step(run, batch, multibox_loss, device, precision, factor)
            run.step += 1
            images += len(batch["image"])
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value
            means = {name: total / done for name, total in sums.items()}
            speed = images / (time.perf_counter() - start)
            progress.set_postfix(
                {**{n: f"{m:.3f}" for n, m in means.items()}, "images/s": f"{speed:.1f}"}, refresh=False
            )
            progress.update()
            if stop.wanted:
                break
    return {
        "epoch": epoch + 1,
        "step": run.step,
        "lr": config.lr * factor,
        **{f"loss_{name}": mean for name, mean in means.items()},
        "images_per_s": speed,
        "seconds": time.perf_counter() - start,
    }


def train_step(run, batch, multibox_loss, device, precision, factor):
    """Forward, loss, backward, update; returns the loss terms. TrainingStopped if they are not finite."""
    config, model, optimizer = run.config, run.model, run.optimizer
    images = batch["image"].to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    objects = {k: batch[k].to(device, non_blocking=True) for k in ("boxes_unit", "labels", "difficult", "crowd")}
    with autocast(device, precision):
        offsets, logits = model(images)
    terms = multibox_loss(offsets, logits, objects)
    total = config.box_weight * terms["box"] + terms["class"]
    optimizer.zero_grad()
    total.backward()
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    terms = {name: term.item() for name, term in terms.items()}
    if not math.isfinite(total.item() + gradient_norm.item()):  # before the weights are touched
        said = ", ".join(f"{name} {value:g}" for name, value in terms.items())
        raise TrainingStopped(
            f"loss or gradient is not finite at step {run.step}: {said}, gradient norm {gradient_norm:g}, on images "
            f"{batch['image_id']}. The weights are those of the step before; {run.folder} keeps what was saved. "
            "Look at these images' boxes, or lower --lr"
        )
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
    optimizer.step()
    run.ema.update_parameters(model)
    return terms


def describe_epoch(row, epochs):
    text = f"epoch {row['epoch']}/{epochs}: " + ", ".join(
        f"{name.removeprefix('loss_')} {value:.3f}" for name, value in row.items() if name.startswith("loss_")
    )
    text += f", {row['images_per_s']:.1f} images/s"
    if "voc2007_ap50" in row:
        scores = {name: row[name] for name in ("voc2007_ap50", "voc2010_ap50", "coco_ap", "coco_ap50")}
        text += "; " + ", ".join(f"{n} {'none' if v is None else f'{v:.3f}'}" for n, v in scores.items())
    return text


if __name__ == "__main__":
    main()
