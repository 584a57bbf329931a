"""A training run's state, and its way to and from runs/NAME/: checkpoints, log.csv, config.json.

last.pth.tar holds everything that training needs to go on; previous.pth.tar is the one before it, and next.pth.tar
there for the moment between. best.pth.tar holds the averaged weights alone.
"""

import csv
import json
import os
import platform
import sys
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import timm
import torch

from fpnssd.training.distributed import is_main
from model import load_checkpoint, save_checkpoint
from utils import InputError, atomic_write, hash_file

LAST, PREVIOUS, NEXT, BEST = (f"{name}.pth.tar" for name in ("last", "previous", "next", "best"))
# What a resumed run may have otherwise without a word, and what it cannot: shapes, and which samples a step sees.
FREE = {
    "device", "workers", "images", "eval_every", "cache", "log_every", "save_minutes", "compile", "tf32",
    "batch_size", "weights",
}  # fmt: skip
FIXED = {
    "backbone", "image_size", "fpn_channels", "optimizer", "nominal_batch", "data", "train_split",
    "seed", "frozen_stages", "batch_norm", "class_balance",
}  # fmt: skip


class Run:
    """Everything that changes while training."""

    def __init__(self, config, model, ema, optimizer, scaler, train_list, step_images):
        """train_list: its number of images and content go into the checkpoint, to be compared when resuming."""
        self.config, self.folder = config, Path("runs") / config.name
        self.model, self.ema, self.optimizer, self.scaler = model, ema, optimizer, scaler
        self.num_images, self.step_images = len(train_list), step_images
        self.list_hash = hash_file(train_list.path)
        self.step = 0
        self.best = None
        self.stale = 0  # evaluations since the best one
        self.sums = {}  # of the running epoch's loss terms
        self.seconds = 0.0  # that it took so far
        self.log = []  # a dict an epoch
        self.unsaved = None  # why the last attempt to save failed

    def state(self):
        cuda = {"cuda_rng": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
        return {
            "raw_model": self.model.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "best": self.best,
            "stale": self.stale,
            "sums": self.sums,
            "seconds": self.seconds,
            "log": self.log,
            "train_config": as_builtins(self.config),
            "num_images": self.num_images,
            "step_images": self.step_images,
            "list_hash": self.list_hash,
            "torch_rng": torch.get_rng_state(),
            "versions": versions(),
            **cuda,
        }

    def save(self):
        """Writes last.pth.tar and keeps the one before; True if that went well.

        A full disk is said and not raised: what is there stays, and training goes on to the next attempt.
        """
        if not is_main():
            return True
        try:
            save_checkpoint(self.folder / NEXT, self.ema.module, **self.state())
            if (self.folder / LAST).exists():
                self._keep_last()
            os.replace(self.folder / NEXT, self.folder / LAST)
            self.unsaved = None
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where a disk is full
            self.unsaved = str(error).splitlines()[0]
            print(
                f"warning: step {self.step} could not be saved in {self.folder} ({self.unsaved}). Checkpoints that are "
                "there stay as they are; training goes on and tries again. Is the disk full?",
                file=sys.stderr,
            )
        return self.unsaved is None

    def _keep_last(self):
        """Gives the last checkpoint a second name, so that who reads last.pth.tar meanwhile finds it at any moment."""
        last, previous = self.folder / LAST, self.folder / PREVIOUS
        previous.unlink(missing_ok=True)
        try:
            os.link(last, previous)
        except OSError:  # a file system without hard links: there is a moment without last.pth.tar
            os.replace(last, previous)

    def save_best(self, score):
        """Writes best.pth.tar; True if that went well."""
        with warn_if_unwritable(self.folder / BEST) as attempt:
            about = {"step": self.step, "best": score, "train_config": as_builtins(self.config)}
            save_checkpoint(self.folder / BEST, self.ema.module, **about)
        return attempt.went_well

    def load(self):
        """Goes on from the newest checkpoint that is whole; says which one, and what is new in the configuration."""
        path, checkpoint = newest_checkpoint(self.folder)
        if "train_config" not in checkpoint or "optimizer" not in checkpoint:
            raise InputError(f"{path} holds a model, but no run that could be resumed")
        changes = self._check_same_run(checkpoint, path)
        self.ema.module.load_state_dict(checkpoint["model"].state_dict())
        self.ema.updates.copy_(checkpoint["ema_updates"])
        self.model.load_state_dict(checkpoint["raw_model"])
        kept = ("initial_lr", "weight_decay", "momentum")  # those of the configuration as it is now
        settings = [{name: group[name] for name in kept if name in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        if checkpoint["scaler"]:  # empty but for fp16
            self.scaler.load_state_dict(checkpoint["scaler"])
        for name in ("step", "best", "stale", "sums", "log"):
            setattr(self, name, checkpoint[name])
        self.seconds = checkpoint.get("seconds", 0.0)
        torch.set_rng_state(checkpoint["torch_rng"])
        if "cuda_rng" in checkpoint and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        if is_main():
            print(f"goes on with {path}, step {self.step}")
            for change in changes:
                print(f"  now {change}")

    def _check_same_run(self, checkpoint, path):
        """["field old -> new", ...]; InputError where the run could not go on as it was."""
        if checkpoint["model"].config != self.model.config:
            raise InputError(f"{path} was trained on other classes or shapes than {self.config.data} and the flags say")
        if checkpoint["num_images"] != self.num_images:
            counts = f"{checkpoint['num_images']} images, {self.config.data} has {self.num_images} now"
            raise InputError(f"{path} was trained on {counts}: its epochs would differ; start another run (--name)")
        if checkpoint["step_images"] != self.step_images:
            raise InputError(
                f"{path} was trained with {checkpoint['step_images']} images a step (batch x processes x "
                f"accumulation), not {self.step_images}: its epochs would differ; --batch-size can keep the product"
            )
        saved, now = checkpoint["train_config"], as_builtins(self.config)
        changed = {name for name in now if name not in FREE and saved.get(name) != now[name]}
        changes = [f"{name} {saved.get(name)!r} -> {now[name]!r}" for name in sorted(changed)]
        if changed & FIXED:
            refused = [change for change in changes if change.split()[0] in FIXED]
            raise InputError(f"{path} cannot be resumed with another {'; '.join(refused)}: start another run (--name)")
        if checkpoint["list_hash"] != self.list_hash:
            changes.append("the training list has another content")
        before, here = checkpoint["versions"], versions()
        return changes + [
            f"{name} {before.get(name)} -> {here[name]}" for name in here if before.get(name) != here[name]
        ]

    def means(self):
        """{name: mean} of the running epoch's loss terms."""
        return {name: total / self.sums["steps"] for name, total in self.sums.items() if name != "steps"}

    def write_log(self):
        """log.csv, a row an epoch, always as long as the checkpoint knows."""
        if not self.log:
            return
        columns = list(dict.fromkeys(name for row in self.log for name in row))
        with atomic_write(self.folder / "log.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.log)


class warn_if_unwritable:
    """A block whose failure to write is said and not raised: a full disk costs no training."""

    def __init__(self, what):
        self.what, self.went_well = what, False

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.went_well = error is None
        if isinstance(error, (OSError, RuntimeError)):  # torch.save raises RuntimeError where a disk is full
            print(f"warning: {self.what} could not be written ({error}); training goes on", file=sys.stderr)
            return True
        return False


def holds_a_run(folder):
    return any((folder / name).exists() for name in (NEXT, LAST, PREVIOUS, BEST))


def newest_checkpoint(folder):
    """(path, content) of the newest checkpoint in a run's folder that is whole; damaged ones are named on the way."""
    there = [folder / name for name in (NEXT, LAST, PREVIOUS) if (folder / name).exists()]
    if not there:
        raise InputError(f"nothing to resume: no checkpoint {str(folder / LAST)!r}")
    for path in there:
        try:
            damaged = zipfile.ZipFile(path).testzip()  # compares checksums, which torch.load does not
            if damaged is None:
                return path, load_checkpoint(path)
            reason = f"{damaged} in it is damaged"
        except Exception as error:  # a damaged zip file makes its reader raise nearly anything
            reason = str(error) or type(error).__name__
        if is_main():
            print(f"warning: {path} is passed over: {reason}", file=sys.stderr)
    raise InputError(f"no checkpoint in {folder} is whole; {BEST} still serves for --weights, if it is there")


def as_builtins(config):
    """A configuration as a checkpoint or JSON file holds it: tuples become lists."""
    return json.loads(json.dumps(asdict(config)))


def from_builtins(kind, values):
    """The opposite: a dataclass of `kind`, with the dataclasses inside of it."""
    known = {field.name: field.type for field in fields(kind)}
    read = {}
    for name, value in values.items():
        if isinstance(value, dict):
            value = from_builtins(known[name], value)
        read[name] = tuple(value) if isinstance(value, list) else value
    return kind(**read)


def saved_config(name, kind):
    """The configuration of runs/NAME, or None where there is none."""
    path = Path("runs") / name / "config.json"
    if not path.is_file():
        return None
    try:
        return from_builtins(kind, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is no configuration of this version's: {error}") from error


def versions():
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "numpy": np.__version__,
    }
