"""Train FPN-SSD: data lists in; runs/NAME/ with checkpoints, config.json, log.csv, curves.png and pictures out.

    python train.py                                   # preset voc2012: data/voc2012, resnet50, 280 epochs
    python train.py --preset lite --data data/vocreal --name small --set backbone_lr_scale=0.1
    python train.py --preset finetune --data data/mine --minutes 20 --name mine   # fine-tunes the shipped checkpoint
    python train.py --name small --resume             # continues runs/small
    torchrun --nproc-per-node 8 train.py              # eight GPUs; docs/training.md shows several machines

Ctrl-C, or a scheduler's SIGTERM, saves and stops after the current step; a second Ctrl-C stops immediately.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fpnssd.data.images import DataError
from fpnssd.evaluation.metrics import compute_metrics
from fpnssd.evaluation.predict import Predictor, predict
from fpnssd.evaluation.tables import format_table
from fpnssd.inference.detector import torch_detector
from fpnssd.training import distributed, finetune, setup
from fpnssd.training.checkpoints import NotFiniteError, RunFolder, TrainState
from fpnssd.training.config import FLAGS, PRESETS, TrainConfig, batch_sizes, make_config, refuse_old_flags, scaled_lr
from fpnssd.training.cpu_memory import keep_freed_memory
from fpnssd.training.failures import LOST_WORKER, StopOnSignal, TrainingStopped, describe_failure
from fpnssd.training.lock import lock_run
from fpnssd.training.optim import EMA, build_optimizer, freeze, lr_factor, set_train_mode, synchronise_batch_norm
from fpnssd.training.progress import ProgressLogger
from fpnssd.training.time_plan import TimePlan, process_start
from utils import InputError, autocast, error_message, escape_unprintable, fast_products, pick_device, pick_precision

FIRST_STEPS = 5  # after which the length of the training is estimated


def main(argv: Sequence[str] | None = None, started: float | None = None) -> dict | None:
    escape_unprintable()
    try:
        args = parse_args(argv)
        config = make_config(args)
        if args.preset == "finetune" and not args.resume:
            choices = finetune.choose(partial(make_config, args))
            config = make_config(args, [choice.assignment for choice in choices])
            print(finetune.format_choices(choices, config))
        return train(config, args.resume, started)
    except (InputError, TrainingStopped, OSError) as error:
        sys.exit(f"train: {error_message(error)}")
    except KeyboardInterrupt:
        sys.exit("train: stopped immediately; --resume continues from the last checkpoint")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__.split("\n\n")[0],
        epilog="fields for --set: " + ", ".join(f.name for f in fields(TrainConfig)),
    )
    refuse_old_flags(sys.argv[1:] if argv is None else argv)
    parser.add_argument("--preset", default="voc2012", help=f"{', '.join(PRESETS)} (default: voc2012)")
    for name, text in FLAGS.items():
        default = getattr(TrainConfig(), name)
        shown = "" if default is False or default == "" else f" (voc2012: {default})"
        kind = {"action": "store_const", "const": True} if isinstance(default, bool) else {"type": type(default)}
        parser.add_argument(f"--{name.replace('_', '-')}", help=text + shown, **kind)
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="any field of the configuration"
    )
    parser.add_argument("--resume", action="store_true", help="continue runs/NAME")
    return parser.parse_args(argv)


def train(config: TrainConfig, resume: bool = False, started: float | None = None) -> dict | None:
    """Trains until config.epochs are done, config.minutes are over or a signal comes, in runs/NAME.

    Args:
        config: see fpnssd.training.config.
        resume: continue the existing run.
        started: time.monotonic() from which config.minutes count; None for now.

    Returns:
        The metrics of the last evaluation (fpnssd.evaluation.metrics), or None if there was none.

    Raises:
        InputError: if the configuration, the lists or the run cannot be used; nothing was trained.
        TrainingStopped: if the training could not continue.
    """
    started = time.monotonic() if started is None else started
    with (
        distributed.init_distributed(pick_device(config.device)) as device,
        StopOnSignal() as stop,
        keep_freed_memory(device),
        fast_products(device, config.tf32),
    ):
        lists = setup.load_lists(config)
        with lock_run(config.name, resume):
            return Trainer(config, lists, device, stop, resume, started).run()


class Trainer:
    """Builds the parts of a training in order, then runs its loop (train_epochs)."""

    def __init__(
        self,
        config: TrainConfig,
        lists: setup.Lists,
        device: torch.device,
        stop: StopOnSignal,
        resume: bool = False,
        started: float | None = None,
    ):
        self.config = config = replace(config, precision=pick_precision(config.precision, device, training=True))
        self.device, self.stop = device, stop
        train_list, self.val_list = lists
        torch.backends.cudnn.benchmark = True

        # A step is `accumulate` batches of `batch_size` images in each process.
        self.batch_size, self.accumulate = batch_sizes(config, len(train_list) * config.repeats)
        self.step_images = self.batch_size * self.accumulate * distributed.num_processes()
        self.steps_per_epoch = len(train_list) * config.repeats // self.step_images
        epoch_images = self.steps_per_epoch * self.step_images
        self.loader = setup.make_train_loader(config, train_list, self.batch_size, epoch_images, device.type == "cuda")

        model = setup.make_model(config, train_list, resume).to(device, memory_format=torch.channels_last)
        freeze(model, config)
        ema = EMA(model, config.ema_decay)
        if config.batch_norm == "sync" and distributed.num_processes() > 1:
            if device.type != "cuda":
                raise InputError("batch_norm sync needs GPUs; frozen works everywhere")
            synchronise_batch_norm(model)
        optimizer = build_optimizer(model, config, scaled_lr(config, self.step_images))
        scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.state = TrainState(model, ema, optimizer, scaler)
        self.folder = RunFolder(config, lists, self.step_images)
        if distributed.is_main():
            print(setup.format_settings(config, device, model, lists, (self.batch_size, self.accumulate)))
        if resume:
            self.folder.load(self.state)
        self.folder.prepare()
        self.folder.write_log(self.state)
        out_of_time = 0 < config.minutes <= self.state.ended_minutes  # a larger limit continues
        self.finished = self.epochs_done >= config.epochs or out_of_time

        self.criterion = setup.make_loss(config, model)
        self.parallel: nn.Module = model
        if distributed.num_processes() > 1:
            self.parallel = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
        self.forward = torch.compile(self.parallel) if config.compile else self.parallel
        self.plan = TimePlan(
            config.epochs * self.steps_per_epoch, self.step_images, config.minutes, self.state.elapsed, started,
            end_images=len(self.val_list or ()), stride=1 if distributed.num_processes() == 1 else config.log_every,
        )  # fmt: skip
        self.progress = ProgressLogger(self.folder.path, device, self.step_images, self.state.step, self.plan)
        self.in_step = False  # whether a step has begun but not ended
        self.stopping = False  # whether all processes have agreed to stop
        self.last_save = time.monotonic()

    @property
    def epochs_done(self) -> int:
        """Rows of the log that are of whole epochs: a training that runs out of time gets a row within an epoch."""
        return sum(row["step"] % self.steps_per_epoch == 0 for row in self.state.log)

    def train_epochs(self) -> dict | None:
        """Trains the epochs that are left; returns the metrics of the last evaluation."""
        config, state, metrics = self.config, self.state, None
        if state.step == 0:
            self.save()
        for epoch in range(self.epochs_done, config.epochs):
            if self.finished or self.out_of_patience():
                break
            done = state.step - epoch * self.steps_per_epoch  # more than 0 in an epoch that is resumed
            self.loader.sampler.set_epoch(epoch, start=done * self.step_images)
            set_train_mode(state.model)
            self.plan.begin(state.step)
            self.plan.done = distributed.broadcast(self.plan.done)
            batches = setup.grouped(self.loader, self.accumulate) if done < self.steps_per_epoch else []
            for step_batches in self.progress.steps(batches, state, epoch + 1, self.steps_per_epoch, done):
                if state.step < 3:
                    self.progress.draw_batch(step_batches[0], state.model.config.classes, state.step)
                for group in state.optimizer.param_groups:
                    factor = lr_factor(state.step, config, self.plan.schedule_steps(state.step))
                    group["lr"] = group["initial_lr"] * factor
                self.in_step = True
                losses = self.train_step(step_batches)
                state.ema.update(state.model, state.step)
                state.unread.append((state.step, [key for batch in step_batches for key in batch["key"]], losses))
                state.step += 1
                self.in_step = False
                if self.log_save_or_stop(is_last=state.step == (epoch + 1) * self.steps_per_epoch):
                    return metrics
                if self.plan.out_of_time:
                    break
            row = {"epoch": epoch + 1, "step": state.step, "lr": state.optimizer.param_groups[-1]["lr"]}
            row |= {f"loss_{name}": mean for name, mean in state.means().items()} | self.progress.pace(state)
            detections = None
            self.finished = epoch + 1 == config.epochs or self.plan.out_of_time
            if self.finished or ((epoch + 1) % config.eval_every == 0 and self.fits_evaluation()):
                self.save()
                metrics, detections = self.evaluate(row)
            self.end_epoch(row, detections)
            if self.stopping:
                break
        return metrics

    def fits_evaluation(self) -> bool:
        """Whether the time limit leaves room for an evaluation here, as the main process sees it."""
        return distributed.broadcast(self.plan.fits_evaluation())

    def train_step(self, batches: list[dict]) -> torch.Tensor:
        """Forward, loss, backward and update for one step. No synchronisation with the device.

        Returns:
            (3,) on the device: box loss, class loss and norm of the gradient, over all processes.
        """
        config, state = self.config, self.state
        batches = [setup.to_device(batch, self.device) for batch in batches]
        # The loss of a step is a sum over its images divided by its number of positives, so these are counted first.
        matches = [self.criterion.match(batch) for batch in batches]
        positives = distributed.sum_over_processes(sum(matched.num_positives for matched in matches))
        normaliser = positives.clamp(min=1) / distributed.num_processes()  # DDP takes the mean over processes
        state.optimizer.zero_grad()
        losses = torch.zeros(2, device=self.device)
        for number, (batch, matched) in enumerate(zip(batches, matches, strict=True), start=1):
            is_last = number == len(batches)  # DDP sums gradients over processes only in the last backward
            with contextlib.nullcontext() if is_last or self.parallel is state.model else self.parallel.no_sync():
                with autocast(self.device, config.precision):
                    offsets, logits = self.forward(batch["image"])
                terms = self.criterion(offsets, logits, batch, matched, normaliser)
                state.scaler.scale(config.box_weight * terms["box"] + terms["class"]).backward()
            losses += torch.stack([terms["box"], terms["class"]]).detach()
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)
        state.scaler.step(state.optimizer)  # with fp16 a step with an infinite gradient is skipped
        state.scaler.update()
        return torch.cat([distributed.sum_over_processes(losses) / distributed.num_processes(), norm[None]])

    def log_save_or_stop(self, is_last: bool) -> bool:
        """Logs, saves and checks for a stop request after a step.

        Args:
            is_last: whether it is the last step of the epoch, which ends with a checkpoint anyway.

        Returns:
            Whether to stop here.
        """
        state, alone = self.state, distributed.num_processes() == 1
        first_steps = state.step == self.progress.begun_at + FIRST_STEPS
        logs = state.step % self.config.log_every == 0 or is_last or first_steps
        if logs:
            state.read_losses()  # waits for the device, so that the pace is not that of launching its work
        done_before = self.plan.done
        self.plan.advance(state.step)
        if logs or alone:
            agreed = distributed.broadcast((self.stop.requested, self.plan.done))
            self.stopping, self.plan.done = agreed
        else:  # several processes have to stop at the same step, with the same learning rates until then
            self.plan.done = done_before
        logs = logs or self.plan.out_of_time
        due = time.monotonic() - self.last_save > 60 * self.config.save_minutes
        if logs or due or (alone and self.stop.requested):
            state.read_losses()
            state.seconds = self.progress.pace(state)["seconds"]
            self.progress.log(state)
        if self.stopping or (due and not is_last):
            self.save()
        return self.stopping

    def evaluate(self, row: dict) -> tuple[dict | None, list[dict] | None]:
        """(metrics, detections) of the averaged network, None in all but the main process; adds the scores to `row`."""
        if self.val_list is None:
            return None, None
        model = self.state.ema.module
        distributed.copy_from_main(list(model.buffers()))  # each process has batch norm statistics of its own images
        predictor = Predictor(torch_detector(model, self.config.precision))
        detections, _ = predict(predictor, self.val_list, self.config.image_size, workers=self.config.workers)
        metrics = None if detections is None else compute_metrics(self.val_list, detections)
        if metrics:
            row |= {name: value for name, value in metrics.items() if name.startswith(("voc", "coco"))}
            row["best_min_score"] = (metrics["best_f1"] or {}).get("min_score")
        return metrics, detections

    def end_epoch(self, row: dict, detections: list[dict] | None) -> None:
        """Writes best.pth.tar, last.pth.tar, log.csv and pictures."""
        state, best, stale = self.state, self.state.best, self.state.stale
        if detections is not None:
            score = row["voc2007_ap50"]  # None if the list has no objects: then the latest is the best
            is_best = score is None or best is None or score > best
            stale = 0 if is_best else stale + 1
            if is_best and self.folder.save_best(state, score):
                best = score  # if saving failed, the next evaluation may replace it
        state.best, state.stale, self.stopping = distributed.broadcast((best, stale, self.stop.requested))
        state.sums, state.seconds, state.log = {}, 0.0, [*state.log, row]
        ended_by_time = self.plan.out_of_time and self.epochs_done < self.config.epochs
        state.ended_minutes = self.config.minutes if ended_by_time else 0.0
        self.save()
        self.folder.write_log(state)
        if distributed.is_main():
            print(setup.format_epoch(row, None if self.config.minutes else self.config.epochs), flush=True)
            if detections is not None or self.finished:
                self.progress.draw_curves()
            if detections is not None:
                self.progress.log_evaluation(row, self.val_list, detections)

    def save(self) -> bool:
        """Saves last.pth.tar; after a failure the next attempt is a minute later."""
        self.state.elapsed = self.plan.elapsed
        saved = self.folder.save(self.state)
        self.last_save = time.monotonic() - (0 if saved else 60 * (self.config.save_minutes - 1))
        return saved

    def run(self) -> dict | None:
        """Runs train_epochs, turns failures into TrainingStopped, and prints a summary."""
        config, state, folder, metrics = self.config, self.state, self.folder, None
        if self.finished and distributed.is_main():
            over = f"the {state.ended_minutes:g} minutes of {folder.path} are over (a larger --minutes continues)"
            complete = f"all {config.epochs} epochs of {folder.path} are done"
            print(f"nothing left to do: {over if self.epochs_done < config.epochs else complete}")
        try:
            metrics = self.train_epochs()
        except (DataError, RuntimeError, *LOST_WORKER) as error:
            reason = describe_failure(error, config, self.loader.dataset, folder.path)
            if reason is None:
                raise
            # torch may report a dead worker at any point: an incomplete step is not saved.
            saved = not (self.in_step or isinstance(error, NotFiniteError)) and self.save()
            self.stopping = self.stop.requested and saved  # a second SIGTERM ended a worker
            if not self.stopping:
                kept = f"Step {state.step} of {folder.path} is saved" if saved else f"{folder.path} stays as last saved"
                raise TrainingStopped(f"{reason}. {kept}: fix it, then --resume") from error
        finally:
            self.progress.close()
        if distributed.is_main():
            if metrics:
                print(format_table(metrics))
            if self.stopping and not self.finished:
                print(f"stopped after step {state.step}; continue with --name {config.name} --resume")
            elif self.out_of_patience():
                print(f"stopped after {state.stale} evaluations without improvement; the best AP50 is {state.best:.3f}")
            print(setup.format_end(config, folder.path, state.best, state.log))
        if not folder.saved:
            raise TrainingStopped(f"step {state.step} is not saved: make room on the disk, then --resume")
        return metrics

    def out_of_patience(self) -> bool:
        """Whether the last config.patience evaluations brought no improvement."""
        return 0 < self.config.patience <= self.state.stale


if __name__ == "__main__":
    main(started=process_start())
