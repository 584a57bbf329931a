"""A training step, beside the same step in eager fp32 with contiguous tensors; and what of an epoch is waiting.

    python -m benchmarks.train --data data/vocreal                     # a CPU: ResNet-50, batch 16
    python -m benchmarks.train --data data/vocreal --gpu               # batches 32 to 256, with and without compile

Both steps do the same work on the same images, in turns, in one run. On a GPU, steps that do not log run with
torch.cuda.set_sync_debug_mode("error"), so that one which waits for the device fails.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import train as train_module
from fpnssd.training.config import PRESETS
from fpnssd.training.cpu_memory import keep_freed_memory
from fpnssd.training.failures import StopOnSignal
from fpnssd.training.setup import load_lists, to_device
from train import Trainer

H100_BF16_FLOPS = 989e12  # dense, by its data sheet


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="data/vocreal", help="folder of data lists")
    parser.add_argument("--preset", default="voc2012", choices=PRESETS)
    parser.add_argument("--batch-size", type=int, default=16, help="on a CPU (16)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (3)")
    parser.add_argument("--steps", type=int, default=8, help="with the loader, for the share that waits (8)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args(argv)
    args.data = str(Path(args.data).resolve())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory() as folder, moved_to(folder):
        (measure_gpu if args.gpu else measure_cpu)(args)


@contextlib.contextmanager
def moved_to(folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def set_up(args, name, **changes):
    """A Trainer that has not begun, quiet, with a few of its batches."""
    config = replace(PRESETS[args.preset](), name=name, data=args.data, backbone_weights="none", workers=args.workers)
    with contextlib.redirect_stdout(None):
        config = replace(config, **changes)
        Path("runs", name).mkdir(parents=True)
        trainer = Trainer(config, load_lists(config), pick(args), StopOnSignal())
    for group in trainer.state.optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    return trainer


def pick(args):
    return torch.device("cuda" if args.gpu else "cpu")


def measure_cpu(args):
    sizes = {"batch_size": args.batch_size, "nominal_batch": args.batch_size}
    ours = set_up(args, "ours", **sizes)
    plain = set_up(args, "plain", precision="fp32", **sizes)
    plain.state.model.to(memory_format=torch.contiguous_format)
    batch = next(iter(ours.loader))
    times = {"ours": [], "fetched": [], "plain": []}
    for turn in range(args.rounds + 1):  # the first of each warms up
        for name, training in (("ours", ours), ("fetched", ours), ("plain", plain)):
            images = contiguous_images() if name == "plain" else contextlib.nullcontext()
            memory = keep_freed_memory(training.device) if name == "ours" else contextlib.nullcontext()
            with images, memory:
                start = time.perf_counter()
                training.train_step([batch])
                times[name] += [time.perf_counter() - start] * (turn > 0)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratio, speed = seconds["plain"] / seconds["ours"], args.batch_size / seconds["ours"]
    print(
        f"{ours.config.backbone}, batch {args.batch_size}: a step takes {seconds['ours']:.2f} s in "
        f"{ours.config.precision} ({speed:.1f} images/s), {seconds['plain']:.2f} s in eager fp32 with contiguous "
        f"tensors: {ratio:.2f} times as long"
    )
    print(f"giving memory back after each use: {seconds['fetched'] / seconds['ours']:.2f} times as long")
    share = time_criterion(ours, batch, args.rounds) / seconds["ours"]
    print(f"matching and losses, forward and backward: {share:.1%} of the step")
    with keep_freed_memory(ours.device):
        print_waiting(ours, args.steps)


@contextlib.contextmanager
def contiguous_images():
    def plain_to_device(batch, device):
        moved = to_device(batch, device)
        return {**moved, "image": moved["image"].contiguous()}

    train_module.setup.to_device = plain_to_device
    try:
        yield
    finally:
        train_module.setup.to_device = to_device


def time_criterion(training, batch, rounds):
    """Seconds of matching and both losses with their gradients."""
    batch = to_device(batch, training.device)
    with torch.no_grad():
        offsets, logits = training.forward(batch["image"])
    times = []
    for _ in range(rounds + 1):
        offsets, logits = (tensor.detach().requires_grad_() for tensor in (offsets, logits))
        start = time.perf_counter()
        matches = training.criterion.match(batch)
        terms = training.criterion(offsets, logits, batch, matches, matches.num_positives.clamp(min=1))
        (terms["box"] + terms["class"]).backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def print_waiting(training, steps):
    """Steps as in training, batches out of the loader."""
    batches, waited = iter(training.loader), 0.0
    training.train_step([next(batches)])
    start = time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        training.train_step([batch])
    if training.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    print(
        f"with the loader ({training.config.workers} workers, {steps} steps): "
        f"{steps * training.batch_size / seconds:.1f} images/s, {waited / seconds:.1%} of the time waiting for data"
    )


def measure_gpu(args):
    flops = None
    for compiled in (False, True):
        for batch_size in (32, 64, 128, 256):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            sizes = {"batch_size": batch_size, "nominal_batch": batch_size, "compile": compiled, "cache": "disk"}
            training = set_up(args, f"gpu_{batch_size}_{compiled}", **sizes)
            batch = next(iter(training.loader))
            if flops is None:
                with FlopCounterMode(display=False) as counter:
                    training.train_step([batch])
                flops = counter.get_total_flops() / batch_size
            for _ in range(5):
                training.train_step([batch])
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            start = time.perf_counter()
            for _ in range(20):
                training.train_step([batch])
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            speed = 20 * batch_size / (time.perf_counter() - start)
            print(
                f"batch {batch_size:3}{', compiled' if compiled else '':10}: {speed:7.1f} images/s, "
                f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, "
                f"{speed * flops / H100_BF16_FLOPS:.1%} of an H100's bf16 peak"
            )
            print_waiting(training, max(1, min(50, len(training.loader) - 2)))


if __name__ == "__main__":
    main()
