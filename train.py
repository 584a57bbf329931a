"""Trains FPN-SSD: data lists in; runs/NAME/ with checkpoints, config.json, log.csv, curves.png and pictures out.

    python train.py                                   # preset voc2012: data/voc2012, resnet50
    python train.py --preset lite --data data/vocreal --name small --set backbone_lr_scale=0.1
    python train.py --data data/mine --weights runs/small/best.pth.tar --name mine      # fine-tuning
    python train.py --name small --resume             # goes on where runs/small stopped
    torchrun --nproc-per-node 8 train.py              # eight GPUs; see README.md for several machines

Ctrl-C, or a scheduler's SIGTERM, saves after the running step and ends; a second Ctrl-C ends at once.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from datasets import DetectionDataset, EpochSampler, balanced_weights, make_loader
from eval import format_table
from fpnssd.data.data_list import DataList
from fpnssd.data.images import DataError
from fpnssd.data.pixel_cache import PixelCache
from fpnssd.evaluation.metrics import compute_metrics
from fpnssd.evaluation.predict import Predictor, check_same_classes, predict
from fpnssd.inference.detector import torch_detector
from fpnssd.model_config import ssd_prior_shapes
from fpnssd.training import distributed
from fpnssd.training.checkpoints import Run, as_builtins, holds_a_run, warn_if_unwritable
from fpnssd.training.config import FLAGS, PRESETS, TrainConfig, batch_sizes, make_config, scaled_lr
from fpnssd.training.cpu_memory import keep_freed_memory
from fpnssd.training.loss import MultiBoxLoss
from fpnssd.training.optim import (
    EMA,
    batch_norm_buffers,
    build_optimizer,
    freeze,
    load_weights,
    lr_factor,
    set_train_mode,
    synchronise_batch_norm,
)
from fpnssd.training.progress import (
    LOST_WORKER,
    Clock,
    StopOnSignal,
    Watch,
    describe_epoch,
    describe_failure_from_outside,
    describe_not_finite,
    describe_out_of_memory,
)
from model import FPNSSD, ModelConfig, load_checkpoint
from utils import InputError, autocast, error_message, pick_device, pick_precision, write_text

MOST_SKIPPED = 20  # steps in a row, in fp16: then it is not the scale


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what is kept."""


def main(argv=None):
    try:
        args = parse_args(argv)
        metrics = train(make_config(args), resume=args.resume)
    except (InputError, TrainingStopped, OSError) as error:
        sys.exit(f"train: {error_message(error)}")
    except KeyboardInterrupt:
        sys.exit("train: stopped at once; --resume goes on with what was saved before")
    return metrics


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="fields for --set: " + ", ".join(f.name for f in fields(TrainConfig)),
    )
    parser.add_argument("--preset", default="voc2012", choices=PRESETS, help="where the values come from (voc2012)")
    for name in FLAGS:
        default = getattr(TrainConfig(), name)
        how = {"action": "store_const", "const": True} if isinstance(default, bool) else {"type": type(default)}
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"voc2012: {default!r}", **how)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="any field")
    parser.add_argument("--resume", action="store_true", help="go on with runs/NAME")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# A run


def train(config, resume=False):
    """Trains to the end of config.epochs, or until a signal; returns the last evaluation's metrics (None if none)."""
    with (
        distributed.init_distributed(pick_device(config.device)) as device,
        StopOnSignal() as stop,
        keep_freed_memory(device),
    ):
        folder = Path("runs") / config.name
        if distributed.broadcast(not resume and holds_a_run(folder)):
            raise InputError(f"{folder} has a run already: --resume goes on with it, --name starts another")
        return Training(config, device, stop, resume).go()


class Training:
    """The parts of a run that stay, and its loop."""

    def __init__(self, config, device, stop, resume):
        precision = pick_precision(config.precision, device)
        self.config = config = replace(config, precision=precision)
        self.device, self.stop = device, stop
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
            torch.backends.cudnn.benchmark = True
        train_list, self.val_list = load_lists(config)
        self.batch_size, self.accumulate = batch_sizes(config, len(train_list))
        step_images = self.batch_size * self.accumulate * distributed.num_processes()
        self.steps_per_epoch = len(train_list) // step_images
        self.num_steps = config.epochs * self.steps_per_epoch
        self.set_up_data(train_list)

        model, ema = self.set_up_model(train_list.classes, resume)
        optimizer = build_optimizer(model, config, scaled_lr(config, step_images))
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.run = Run(config, model, ema, optimizer, scaler, train_list, step_images)
        self.say_what_runs(train_list, step_images)
        if resume:
            self.run.load()
        if distributed.is_main():
            for left_over in self.run.folder.glob(".*.pth.tar.*"):  # half written when a run was killed
                left_over.unlink()
            self.run.write_log()  # a kill may have come before the last row
            write_text(self.run.folder / "config.json", json.dumps(as_builtins(config), indent=2))
        self.criterion = MultiBoxLoss(
            model.priors, model.level_counts, config.matching, config.box_loss, config.class_loss,
            negative_ratio=config.negative_ratio, min_negatives=config.min_negatives,
            difficult_positive=config.difficult_positive,
        )  # fmt: skip
        self.parallel = model
        if distributed.num_processes() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(model, ids)
        self.forward = torch.compile(self.parallel) if config.compile else self.parallel
        self.in_step = False
        self.stopping = False  # all processes know that they are to stop
        self.skipped = 0  # steps in a row whose gradients were beyond fp16
        self.unread = []  # (step, keys of its samples, numbers on the device), until the host looks
        self.last_save = time.monotonic()

    def set_up_model(self, classes, resume):
        """(model, EMA of it) on the device, with what it starts from, and what does not train frozen."""
        config = self.config
        torch.manual_seed(config.seed)
        # A run that goes on has its weights, and so has one that takes another's: no download is needed.
        other = load_checkpoint(config.weights)["model"] if config.weights and not resume else None
        has_backbone = resume or (other is not None and other.config.backbone == config.backbone)
        shape = {"fpn_channels": config.fpn_channels, "prior_shapes": ssd_prior_shapes(config.scales)}
        model_config = ModelConfig(classes, config.backbone, config.image_size, **shape)
        model = FPNSSD(model_config, "none" if has_backbone else config.backbone_weights)
        if config.class_loss != "ohem":
            model.init_class_bias(0.99)
        if other is not None:
            said = load_weights(model, other)
            if distributed.is_main():
                print(f"{config.weights}: {said}")
        model = model.to(self.device, memory_format=torch.channels_last)
        freeze(model, config)
        ema = EMA(model, config.ema_decay)
        if config.batch_norm == "sync" and distributed.num_processes() > 1:
            if self.device.type != "cuda":
                raise InputError("batch_norm sync needs GPUs; frozen and train work everywhere")
            synchronise_batch_norm(model)
        return model, ema

    def set_up_data(self, train_list):
        config = self.config
        cache = PixelCache.build(train_list, config.cache_side) if config.cache == "disk" else None
        dataset = DetectionDataset(train_list, config.image_size, config.augment, config.seed, cache, config.epochs)
        self.sampler = EpochSampler(
            len(dataset),
            config.seed,
            balanced_weights(train_list, config.class_balance) if config.class_balance else None,
            distributed.rank(),
            distributed.num_processes(),
            limit=self.steps_per_epoch * self.batch_size * self.accumulate * distributed.num_processes(),
        )
        pinned = self.device.type == "cuda"
        self.loader = make_loader(dataset, self.batch_size, self.sampler, config.workers, pin_memory=pinned)

    def say_what_runs(self, train_list, step_images):
        if not distributed.is_main():
            return
        config, num_parameters = self.config, sum(p.numel() for p in self.run.model.parameters())
        print(
            f"{self.run.folder}: {config.backbone}, {num_parameters / 1e6:.1f} M parameters, {len(train_list)} "
            f"images for training, {len(self.val_list)} for evaluation, {len(train_list.classes)} classes; "
            f"{distributed.num_processes()} x {self.device.type}, {config.precision}"
            + (", tf32 where it is fp32" if self.device.type == "cuda" and config.tf32 else "")
        )
        print(
            f"{config.epochs} epochs of {self.steps_per_epoch} steps of {step_images} images ({self.batch_size} x "
            f"{distributed.num_processes()} processes x {self.accumulate} accumulated), lr "
            f"{scaled_lr(config, step_images):g} (lr {config.lr:g} is for {config.nominal_batch})"
        )
        print("; ".join(f"{name} {value}" for name, value in asdict(config).items()))
        augment = config.augment
        if (augment.mosaic or augment.copy_paste) and augment.close_epochs >= config.epochs:
            print(f"note: no mosaic, no copy-paste: the last {augment.close_epochs} epochs (close_epochs) go without")

    def go(self):
        run, config = self.run, self.config
        metrics = None
        if len(run.log) >= config.epochs and distributed.is_main():
            print(f"nothing left to do: all {config.epochs} epochs of {run.folder} are trained")
        self.watch = Watch(run.folder, self.device, run.step, self.num_steps)
        try:
            if run.step == 0:
                self.save()  # so that there is a way back from the first step on
            while len(run.log) < config.epochs and not self.stopping and not self.out_of_patience():
                epoch = len(run.log)
                row = self.train_epoch(epoch)
                if self.stopping:
                    break
                detections = None
                if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
                    self.save()  # evaluation takes a while too
                    metrics, detections = self.evaluate(row)
                self.end_epoch(row, detections)
        except torch.OutOfMemoryError as error:
            raise TrainingStopped(describe_out_of_memory(config, self.smaller_batches(), error)) from error
        except (DataError, RuntimeError, *LOST_WORKER) as error:
            said = describe_failure_from_outside(error)
            if said is None:
                raise
            # A worker's end raises anywhere: half a step is not to be kept.
            saved = not self.in_step and self.save()
            self.stopping = self.stop.wanted and saved  # the signal ended a worker that had only begun to start
            if not self.stopping:
                raise TrainingStopped(f"{said}. {self.kept(saved)}: mend it, then --resume") from error
        finally:
            self.watch.close()
        self.say_how_it_ended(metrics)
        return metrics

    def out_of_patience(self):
        return 0 < self.config.patience <= self.run.stale

    def kept(self, saved):
        if saved and distributed.is_main():
            return f"Step {self.run.step} of {self.run.folder} is saved"
        return f"{self.run.folder} stays as last saved"

    def smaller_batches(self):
        """Batch sizes below this one with which a step has as many images."""
        count, images = self.run.num_images, self.batch_size * self.accumulate
        smaller = range(self.batch_size - 1, 0, -1)
        return [b for b in smaller if math.prod(batch_sizes(replace(self.config, batch_size=b), count)) == images]

    def say_how_it_ended(self, metrics):
        run, config = self.run, self.config
        if not distributed.is_main():
            return
        if metrics:
            print(format_table(metrics))
        if len(run.log) < config.epochs and self.stopping:
            print(f"stopped after step {run.step}; go on with --name {config.name} --resume")
        elif self.out_of_patience():
            print(f"stopped after {run.stale} evaluations without a better one; the best is {run.best:.3f}")
        if run.unsaved:
            raise TrainingStopped(f"step {run.step} is not saved ({run.unsaved}): make room, then --resume")

    # ------------------------------------------------------------------------------------------------------------------
    # An epoch

    def train_epoch(self, epoch):
        """One epoch, or what is left of it (nothing, if only its evaluation failed); returns its row of the log."""
        run, first = self.run, self.run.step - epoch * self.steps_per_epoch
        self.sampler.set_epoch(epoch, start=first * run.step_images)
        set_train_mode(run.model)
        clock = Clock(run)
        batches = iter(self.loader) if first < self.steps_per_epoch else None
        with self.watch.epoch(epoch, self.steps_per_epoch, first):
            for number in range(first, self.steps_per_epoch):
                with clock.waiting():
                    step_batches = [next(batches) for _ in range(self.accumulate)]
                if run.step < 3 and distributed.is_main():
                    self.watch.first_batches(step_batches[0], run.model.config.classes, run.step)
                factor = lr_factor(run.step, self.config, self.num_steps)
                self.in_step = True
                self.unread.append((run.step, *self.train_step(step_batches, factor)))
                run.step += 1
                self.in_step = False
                if self.after_step(clock, is_last=number + 1 == self.steps_per_epoch):
                    break
        row = {"epoch": epoch + 1, "step": run.step, "lr": run.optimizer.param_groups[-1]["lr"]}  # of the heads
        row |= {f"loss_{name}": mean for name, mean in run.means().items()}
        return row | clock.read(run)

    def after_step(self, clock, is_last):
        """Reads steps every log_every of them and before saving, saves when it is time; True to stop here."""
        run, config = self.run, self.config
        looks = run.step % config.log_every == 0 or is_last
        alone = distributed.num_processes() == 1
        due = time.monotonic() - self.last_save > 60 * config.save_minutes
        if looks or due or (alone and self.stop.wanted):
            self.read_steps()
            self.watch.steps(run, clock.read(run))
        if looks or alone:  # several processes have to stop at the same step
            self.stopping = distributed.broadcast(self.stop.wanted)
        if self.stopping or (due and not is_last):  # the end of an epoch saves anyway
            self.save()
        return self.stopping

    def train_step(self, batches, factor):
        """Forward, loss, backward, update; nothing here waits for the device.

        Returns the samples' keys, and loss terms and gradient norm as one tensor on the device. If they are not finite
        the step changes nothing: fused optimizers skip a step whose found_inf is not 0, as for GradScaler.
        """
        run, device = self.run, self.device
        inputs = [to_device(batch, device) for batch in batches]
        matches = [self.criterion.match(batch) for batch in inputs]
        positives = distributed.sum_over_processes(sum(m.num_positives for m in matches))
        # DDP takes the mean over processes of what each says of its own images.
        normaliser = positives.clamp(min=1) / distributed.num_processes()
        statistics = batch_norm_buffers(run.model)
        before = [buffer.clone() for buffer in statistics]
        run.optimizer.zero_grad()
        sums = 0
        for number, (batch, matched) in enumerate(zip(inputs, matches, strict=True)):
            is_last = number + 1 == len(inputs)
            with contextlib.nullcontext() if is_last or self.parallel is run.model else self.parallel.no_sync():
                with autocast(device, self.config.precision):
                    offsets, logits = self.forward(batch["image"])
                terms = self.criterion(offsets, logits, batch, matched, normaliser)
                total = self.config.box_weight * terms["box"] + terms["class"]
                if run.scaler.is_enabled():  # it looks at gradients alone, and an infinite loss may have finite ones
                    total = total * torch.where(total.isfinite(), 1.0, math.nan)
                run.scaler.scale(total).backward()
            sums = sums + torch.stack([terms["box"], terms["class"]]).detach()
        run.scaler.unscale_(run.optimizer)
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), self.config.clip_norm)
        sums = distributed.sum_over_processes(sums) / distributed.num_processes()
        good = (norm + sums.sum()).isfinite().float()

        for group in run.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if run.scaler.is_enabled():  # finds infinities itself, and takes a smaller scale then
            run.scaler.step(run.optimizer)
            run.scaler.update()
        else:
            run.optimizer.grad_scale, run.optimizer.found_inf = None, 1 - good
            run.optimizer.step()
        for buffer, old in zip(statistics, before, strict=True):
            buffer.copy_(torch.where(good > 0, buffer, old))
        run.ema.update(run.model, good)
        keys = [key for batch in batches for key in batch["key"]]
        return keys, torch.cat([sums, norm[None]])

    def read_steps(self):
        """Takes what unread steps left on the device into the epoch's sums; TrainingStopped if one was not finite."""
        run, sums, bad = self.run, dict(self.run.sums), None
        if not self.unread:
            return
        numbers = torch.stack([numbers for _, _, numbers in self.unread]).tolist()  # the host waits here
        for (step, keys, _), (box, class_, norm) in zip(self.unread, numbers, strict=True):
            terms = {"box": box, "class": class_}
            if math.isfinite(box + class_ + norm):
                self.skipped = 0
                sums["steps"] = sums.get("steps", 0) + 1
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value
                continue
            self.skipped += 1
            # Gradients beyond fp16 are everyday: the scale is halved and the step left out. Losses are not.
            everyday = run.scaler.is_enabled() and math.isfinite(box + class_) and self.skipped < MOST_SKIPPED
            if not everyday and bad is None:
                bad = (step, terms, norm, keys)
        run.sums, self.unread = sums, []
        if bad:
            saved = self.save()
            raise TrainingStopped(f"{describe_not_finite(run, self.loader.dataset, *bad)}. {self.kept(saved)}")

    def evaluate(self, row):
        """(metrics, detections) on the evaluation list, scores into the row; (None, None) but in the main process."""
        model = self.run.ema.module
        distributed.copy_from_main(list(model.buffers()))  # batch norm's statistics are each process's own
        predict_fn = Predictor(torch_detector(model, self.config.precision))
        detections, _ = predict(predict_fn, self.val_list, self.config.image_size, workers=self.config.workers)
        metrics = compute_metrics(self.val_list, detections) if distributed.is_main() else None
        if metrics:
            row |= {name: value for name, value in metrics.items() if name.startswith(("voc", "coco"))}
        return metrics, detections

    def end_epoch(self, row, detections):
        """Log, best and last checkpoint, pictures."""
        run, best, stale = self.run, self.run.best, self.run.stale
        if detections is not None:
            score = row["voc2007_ap50"]  # None where the list has no object: then the latest is the best
            is_best = score is None or best is None or score > best
            stale = 0 if is_best else stale + 1
            if is_best and run.save_best(score):
                best = score  # if it could not be written, the next one may be
        best, stale, wanted = distributed.broadcast((best, stale, self.stop.wanted))
        run.best, run.stale, run.sums, run.seconds, run.log = best, stale, {}, 0.0, [*run.log, row]
        self.stopping = wanted
        self.save()
        if distributed.is_main():
            print(describe_epoch(row, self.config.epochs), flush=True)
            with warn_if_unwritable(run.folder / "log.csv"):
                run.write_log()
            if detections is not None:
                self.watch.evaluation(row, self.val_list, detections)

    def save(self):
        """Nothing is saved that was not looked at; after an attempt that failed, the next one is a minute away."""
        self.read_steps()
        saved = self.run.save()
        self.last_save = time.monotonic() - (0 if saved else 60 * (self.config.save_minutes - 1))
        return saved


# ---------------------------------------------------------------------------------------------------------------------
# Parts of it


def load_lists(config):
    """(training list, evaluation list), of the same classes."""
    data, images = Path(config.data), config.images or None
    train_list = DataList.load(data / f"{config.train_split}.json", images)
    val_list = DataList.load(data / f"{config.val_split}.json", images)
    check_same_classes(train_list.classes, val_list, train_list.path)
    if len(train_list) < distributed.num_processes():
        raise DataError(f"{train_list.path} has {len(train_list)} images, too few to train on")
    if train_list.crowd.all():
        raise DataError(f"{train_list.path} has no objects but crowds: a network would learn background alone from it")
    return train_list, val_list


def to_device(batch, device):
    """What a step needs of a batch, without waiting for the copies."""
    tensors = {k: batch[k].to(device, non_blocking=True) for k in ("boxes_norm", "labels", "difficult", "crowd")}
    image = batch["image"].to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return {**tensors, "image": image}


if __name__ == "__main__":
    main()
