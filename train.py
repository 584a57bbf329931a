"""Trains FPN-SSD: data lists in; runs/NAME/ with checkpoints, config.json, log.csv, curves.png and pictures out.

    python train.py                                   # preset voc2012: data/voc2012, resnet50
    python train.py --preset lite --data data/vocreal --name small --set trunk_lr_scale=0.1
    python train.py --data data/mine --weights runs/small/best.pth.tar --name mine      # fine-tuning
    python train.py --name small --resume             # goes on where runs/small stopped
    torchrun --nproc-per-node 8 train.py              # eight GPUs; see README.md for several machines

Ctrl-C, or a scheduler's SIGTERM, saves after the running step and ends; a second one ends at once.
"""

import argparse
import contextlib
import json
import math
import signal
import sys
import threading
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distributed
from datasets import DataError, DataList, DetectionDataset, EpochSampler, balanced_weights, make_loader
from eval import Predictor, check_same_classes, format_table, predict
from loss import MultiBoxLoss
from metrics import compute_metrics
from model import FPNSSD, ModelConfig, load_checkpoint
from optimizer import (
    EMA,
    batch_norm_buffers,
    build_optimizer,
    count_parameters,
    freeze,
    load_weights,
    lr_factor,
    set_train_mode,
    synchronise_batch_norm,
)
from pixel_cache import PixelCache
from recipe import FLAGS, PRESETS, TrainConfig, make_config
from run import Run, as_builtins
from utils import InputError, autocast, explain, pick_device, pick_precision, written_whole
from watch import Watch, describe_failure_from_outside, describe_not_finite, describe_out_of_memory


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what is kept."""


def main(argv=None):
    try:
        args = parse_args(argv)
        metrics = train(make_config(args), resume=args.resume)
    except (InputError, TrainingStopped, OSError) as error:
        sys.exit(f"train: {explain(error)}")
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
    folder = Path("runs") / config.name
    if not resume and (folder / "config.json").exists():
        raise InputError(f"{folder} has a run already: --resume goes on with it, --name starts another")
    with distributed.joined(pick_device(config.device)) as device, StopOnSignal() as stop:
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
            with written_whole(self.run.folder / "config.json") as temporary:
                Path(temporary).write_text(json.dumps(as_builtins(config), indent=2), encoding="utf-8")
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
        self.unread = []  # (step, keys of its samples, numbers on the device), until the host looks
        self.last_save = time.monotonic()

    def set_up_model(self, classes, resume):
        """(model, EMA of it) on the device, with what it starts from, and what does not train frozen."""
        config = self.config
        torch.manual_seed(config.seed)
        # A run that goes on has its weights: it needs no download.
        trunk_weights = "none" if resume or config.weights else config.trunk_weights
        model = FPNSSD(ModelConfig(classes, config.trunk, config.image_size, config.fpn_channels), trunk_weights)
        if config.weights and not resume:
            said = load_weights(model, load_checkpoint(config.weights)["model"])
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
        config, model = self.config, self.run.model
        print(
            f"{self.run.folder}: {config.trunk}, {count_parameters(model) / 1e6:.1f} M parameters, {len(train_list)} "
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

    def go(self):
        run, config = self.run, self.config
        metrics = None
        if run.step >= self.num_steps and distributed.is_main():
            print(f"nothing left to do: all {config.epochs} epochs of {run.folder} are trained")
        self.watch = Watch(run.folder, run.step, self.num_steps)
        try:
            for epoch in range(len(run.log), config.epochs):
                row = self.train_epoch(epoch)
                if self.stop.wanted and run.step < (epoch + 1) * self.steps_per_epoch:
                    break
                detections = None
                if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
                    metrics, detections = self.evaluate(row)
                self.end_epoch(row, detections)
                if self.stop.wanted or (config.patience and run.stale >= config.patience):
                    break
        except torch.OutOfMemoryError as error:
            raise TrainingStopped(describe_out_of_memory(config, error)) from error
        except (DataError, RuntimeError) as error:
            said = describe_failure_from_outside(error)
            if said is None:
                raise
            # A worker's end raises anywhere: half a step is not to be kept. And only the main process saves.
            if self.in_step or not distributed.is_main():
                raise TrainingStopped(f"{said}. {run.folder} stays as last saved: mend it, then --resume") from error
            self.save()
            saved = f"Step {run.step} of {run.folder} is saved: mend it, then --resume"
            raise TrainingStopped(f"{said}. {saved}") from error
        finally:
            self.watch.close()
        self.say_how_it_ended(metrics)
        return metrics

    def say_how_it_ended(self, metrics):
        run, config = self.run, self.config
        if not distributed.is_main():
            return
        if metrics:
            print(format_table(metrics))
        if run.step < self.num_steps and self.stop.wanted:
            print(f"stopped after step {run.step}; go on with --name {config.name} --resume")
        elif config.patience and run.stale >= config.patience:
            print(f"stopped after {run.stale} evaluations without a better one; the best is {run.best:.3f}")
        if run.unsaved:
            raise TrainingStopped(f"step {run.step} is not saved ({run.unsaved}): make room, then --resume")

    # ------------------------------------------------------------------------------------------------------------------
    # An epoch

    def train_epoch(self, epoch):
        """One epoch, or what is left of it (nothing, if only its evaluation failed); returns its row of the log."""
        run, first = self.run, self.run.step - epoch * self.steps_per_epoch
        self.sampler.epoch = epoch
        self.sampler.start = first * run.step_images
        set_train_mode(run.model)
        clock = Clock(run.step)
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
                if self.look(clock, is_last=number + 1 == self.steps_per_epoch):
                    break
        row = {"epoch": epoch + 1, "step": run.step, "lr": run.optimizer.param_groups[-1]["lr"]}  # of the heads
        row |= {f"loss_{name}": mean for name, mean in run.means().items()}
        return row | clock.read(run)

    def look(self, clock, is_last):
        """After a step: every log_every steps, and when it is time to save, the host looks; True to stop here."""
        run, config = self.run, self.config
        looks = run.step % config.log_every == 0 or is_last
        stops = self.stop.wanted and distributed.num_processes() == 1
        due = time.monotonic() - self.last_save > 60 * config.save_minutes
        if looks or stops or due:
            self.read_steps()
            self.watch.steps(run, clock.read(run))
        if looks and distributed.num_processes() > 1:  # they have to stop at the same step
            stops = self.stop.wanted = distributed.from_main(self.stop.wanted)
        if (stops or due) and not is_last:  # the end of an epoch saves anyway
            self.save()
        return stops

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
                run.scaler.scale(self.config.box_weight * terms["box"] + terms["class"]).backward()
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
        run = self.run
        if not self.unread:
            return
        numbers = torch.stack([numbers for _, _, numbers in self.unread]).tolist()  # the host waits here
        bad = []
        for (step, keys, _), (box, class_, norm) in zip(self.unread, numbers, strict=True):
            terms = {"box": box, "class": class_}
            if not math.isfinite(box + class_ + norm):
                bad.append((step, terms, norm, keys))
                continue
            run.sums["steps"] = run.sums.get("steps", 0) + 1
            for name, value in terms.items():
                run.sums[name] = run.sums.get(name, 0.0) + value
        tried, self.unread = len(self.unread), []
        if run.scaler.is_enabled():
            # Gradients beyond fp16 are everyday: the scale is halved and the step left out. Losses are not.
            bad = [one for one in bad if not math.isfinite(sum(one[1].values())) or len(bad) == tried > 4]
        if bad:
            self.save()
            raise TrainingStopped(describe_not_finite(run, self.loader.dataset, *bad[0]))

    def evaluate(self, row):
        """(metrics, detections) on the evaluation list, scores into the row; (None, None) but in the main process."""
        predict_fn = Predictor(self.run.ema.module, self.device, self.config.precision)
        detections, _ = predict(predict_fn, self.val_list, self.config.image_size, workers=self.config.workers)
        metrics = compute_metrics(self.val_list, detections) if distributed.is_main() else None
        if metrics:
            row |= {name: value for name, value in metrics.items() if name.startswith(("voc", "coco"))}
        return metrics, detections

    def end_epoch(self, row, detections):
        """Log, best and last checkpoint, pictures."""
        run, score = self.run, row.get("voc2007_ap50")
        run.log.append(row)
        run.sums = {}
        is_best = detections is not None and (run.best is None or (score or 0) > run.best)
        if detections is not None:
            run.stale = 0 if is_best else run.stale + 1
            run.best = (score or 0) if is_best else run.best
        run.best, run.stale = distributed.from_main((run.best, run.stale))
        self.stop.wanted = distributed.from_main(self.stop.wanted)
        if is_best:
            run.save_best()
        self.save()
        if distributed.is_main():
            print(describe_epoch(row, self.config.epochs), flush=True)
            run.write_log()
            if detections is not None:
                self.watch.evaluation(row, self.val_list, detections)

    def save(self):
        """Nothing is saved that was not looked at; after an attempt that failed, the next one is a minute away."""
        self.read_steps()
        saved = self.run.save()
        self.last_save = time.monotonic() - (0 if saved else 60 * (self.config.save_minutes - 1))


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
    return train_list, val_list


def batch_sizes(config, num_images):
    """(images a process takes at a time, batches a step): together about config.nominal_batch, at most num_images."""
    count = distributed.num_processes()
    batch_size = min(config.batch_size, num_images // count)
    accumulate = max(1, round(config.nominal_batch / (batch_size * count)))
    return batch_size, min(accumulate, num_images // (batch_size * count))


def scaled_lr(config, step_images):
    """config.lr for steps of another size than nominal_batch: linear for SGD (Goyal et al., arXiv:1706.02677), by the
    square root for AdamW (Malladi et al., arXiv:2205.10287); smaller steps than that, from a tiny list, keep it."""
    ratio = max(1.0, step_images / config.nominal_batch)
    return config.lr * (ratio if config.optimizer == "sgd" else math.sqrt(ratio))


def to_device(batch, device):
    """What a step needs of a batch, without waiting for the copies."""
    tensors = {k: batch[k].to(device, non_blocking=True) for k in ("boxes_unit", "labels", "difficult", "crowd")}
    image = batch["image"].to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return {**tensors, "image": image}


class Clock:
    """How fast an epoch goes, and how much of it is waiting for data."""

    def __init__(self, step):
        self.start, self.first, self.waited = time.perf_counter(), step, 0.0

    @contextlib.contextmanager
    def waiting(self):
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    def read(self, run):
        seconds = time.perf_counter() - self.start
        speed = (run.step - self.first) * run.step_images / seconds
        return {"images_per_s": speed, "seconds": seconds, "share_waiting": self.waited / seconds}


class StopOnSignal:
    """Ctrl-C or SIGTERM as a wish: `wanted` becomes true, and the loop stops where nothing is half done.

    The second one raises.
    """

    def __init__(self):
        self.wanted = False
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # signals can be caught nowhere else
            self._before = {number: signal.signal(number, self._wish) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _wish(self, signum, frame):
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        # A scheduler's signal ends the loader's workers as well: that must not raise in the middle of saving.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        tqdm.write("stopping after this step and saving; once more to stop at once", file=sys.stderr)

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def describe_epoch(row, epochs):
    text = f"epoch {row['epoch']}/{epochs}: " + ", ".join(
        f"{name.removeprefix('loss_')} {value:.3f}" for name, value in row.items() if name.startswith("loss_")
    )
    text += f", {row['images_per_s']:.1f} images/s, {row['share_waiting']:.0%} of the time waiting for data"
    if "voc2007_ap50" in row:
        scores = {name: row[name] for name in ("voc2007_ap50", "voc2010_ap50", "coco_ap", "coco_ap50")}
        text += "; " + ", ".join(f"{n} {'none' if v is None else f'{v:.3f}'}" for n, v in scores.items())
    return text


if __name__ == "__main__":
    main()
