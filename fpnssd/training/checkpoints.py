"""The state of a training and its folder: runs/NAME with checkpoints, config.json and log.csv.

last.pth.tar holds everything that --resume needs; best.pth.tar holds the averaged weights of the best evaluation.
"""

import csv
import io
import json
import math
import platform
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from fpnssd.data.data_list import DataList
from fpnssd.training.config import FIXED, FREE, TrainConfig, as_builtins, old_run
from fpnssd.training.distributed import is_main
from fpnssd.training.optim import EMA
from model import FPNSSD, load_checkpoint, save_checkpoint
from utils import InputError, write_text

LAST, BEST = "last.pth.tar", "best.pth.tar"
VERSIONS = {"python": platform.python_version()} | {m.__name__: str(m.__version__) for m in (torch, timm, np)}
TRAINING_FIELDS = ("step", "best", "stale", "sums", "seconds", "elapsed", "ended_minutes", "log")  # of TrainState
MAX_SKIPPED = 20  # consecutive steps that fp16's gradient scaler may skip before the training counts as diverged


class NotFiniteError(RuntimeError):
    """A loss, gradient or weight that is infinite or not a number."""

    def __init__(self, step: int, terms: dict[str, float], keys: list[tuple[int, int, int]]):
        super().__init__(f"not finite at step {step}: " + ", ".join(f"{name} {v:g}" for name, v in terms.items()))
        self.step, self.keys = step, keys


@dataclass
class TrainState:
    """Everything that changes during a training, and is saved in a checkpoint."""

    model: FPNSSD
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of fp16; disabled otherwise
    step: int = 0  # optimizer steps done
    best: float | None = None  # VOC2007 AP50 of best.pth.tar
    stale: int = 0  # evaluations since the best one
    sums: dict[str, float] = field(default_factory=dict)  # of the loss terms of this epoch, and how many "steps"
    seconds: float = 0.0  # duration of this epoch so far
    elapsed: float = 0.0  # seconds of the training at the last save, from the start of its process on
    ended_minutes: float = 0.0  # the limit that ended the training, while it has not been continued
    log: list[dict] = field(default_factory=list)  # a row for each epoch, and for the part of one that a limit ended
    # Not in a checkpoint: of each step since read_losses its number, the keys of its samples (epoch, index, occurrence)
    # and on the device box loss, class loss and norm of the gradient (3,); how many steps in a row fp16 skipped.
    unread: list[tuple[int, list, torch.Tensor]] = field(default_factory=list)
    skipped: int = 0

    def read_losses(self) -> None:
        """Adds the unread losses to the epoch's sums. The one place where the host waits for the device.

        Raises:
            NotFiniteError: for the first step whose loss or gradient is not finite. With fp16 an infinite gradient is
                normal, as the scaler skips the step and halves its scale: MAX_SKIPPED in a row are not.
        """
        unread, self.unread = self.unread, []
        for step, keys, losses in unread:
            box, class_, norm = losses.tolist()
            self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
            diverged = self.skipped >= (MAX_SKIPPED if self.scaler.is_enabled() else 1)
            if diverged or not math.isfinite(box + class_):
                raise NotFiniteError(step, {"box": box, "class": class_, "gradient norm": norm}, keys)
            if not self.skipped:
                for name, value in (("steps", 1), ("box", box), ("class", class_)):
                    self.sums[name] = self.sums.get(name, 0) + value

    def means(self) -> dict[str, float]:
        """The mean of each loss term over this epoch's steps."""
        return {name: total / self.sums["steps"] for name, total in self.sums.items() if name != "steps"}

    def state_dict(self) -> dict:
        """What save_checkpoint stores beside "model", the averaged network.

        Raises:
            NotFiniteError: if a loss, gradient or weight is not finite: such a state is never saved.
        """
        self.read_losses()
        weights = self.model.state_dict()
        for name, tensor in weights.items():
            if not tensor.isfinite().all():
                raise NotFiniteError(self.step, {name: math.nan}, [])
        cuda = {"cuda_rng": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
        return {
            "raw_model": weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **{name: getattr(self, name) for name in TRAINING_FIELDS},
            "torch_rng": torch.get_rng_state(),
            **cuda,
        }

    def load_state_dict(self, checkpoint: dict) -> None:
        """The inverse, of a whole checkpoint; learning rates and weight decay stay those of the optimizer."""
        self.ema.module.load_state_dict(checkpoint["model"].state_dict())
        self.model.load_state_dict(checkpoint["raw_model"])
        settings = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group |= {name: setting[name] for name in ("initial_lr", "weight_decay", "momentum") if name in setting}
        if checkpoint["scaler"]:  # empty but for fp16
            self.scaler.load_state_dict(checkpoint["scaler"])
        before_limits = {"elapsed": 0.0, "ended_minutes": 0.0}  # what older files lack
        for name in TRAINING_FIELDS:
            setattr(self, name, (before_limits | checkpoint)[name])
        torch.set_rng_state(checkpoint["torch_rng"])
        if "cuda_rng" in checkpoint and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])


class RunFolder:
    """runs/NAME of a training. All processes call its methods; the main one writes.

    Args:
        config: of the training.
        lists: training and evaluation list (None without evaluation); their content is compared on --resume.
        step_images: images of a step, over all processes.
    """

    def __init__(self, config: TrainConfig, lists: tuple[DataList, DataList | None], step_images: int):
        self.config, self.path = config, Path("runs") / config.name
        self.list_path = lists[0].path
        self.identity = {
            "train_config": as_builtins(config),
            "content_hash": lists[0].content_hash,
            "val_hash": lists[1].content_hash if lists[1] is not None else None,
            "step_images": step_images,
            "versions": VERSIONS,
        }
        self.saved = True  # whether the last attempt to save succeeded

    def prepare(self) -> None:
        """Writes config.json, and removes unfinished files of a killed process."""
        if is_main():
            for left_over in self.path.glob(".*.pth.tar.*"):
                left_over.unlink()
            write_text(self.path / "config.json", json.dumps(self.identity["train_config"], indent=2))

    def save(self, state: TrainState) -> bool:
        """Replaces last.pth.tar; returns whether it could be written.

        Raises:
            NotFiniteError: see TrainState.state_dict; nothing is written.
        """
        content = {**state.state_dict(), **self.identity}
        write = partial(save_checkpoint, self.path / LAST, state.ema.module, **content)
        self.saved = not is_main() or try_to_save(f"step {state.step} of {self.path}", write)
        return self.saved

    def save_best(self, state: TrainState, score: float | None) -> bool:
        """Replaces best.pth.tar, which has no optimizer state; returns whether it could be written."""
        content = {"step": state.step, "best": score, "train_config": self.identity["train_config"]}
        path = self.path / BEST
        return try_to_save(path, lambda: save_checkpoint(path, state.ema.module, **content))

    def write_log(self, state: TrainState) -> None:
        """Writes log.csv from the state, so without epochs that were lost when a process was killed."""
        if state.log and is_main():
            columns = dict.fromkeys(name for row in state.log for name in row)
            writer = csv.DictWriter(text := io.StringIO(), columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(state.log)
            try_to_save(self.path / "log.csv", lambda: write_text(self.path / "log.csv", text.getvalue()))

    def load(self, state: TrainState) -> None:
        """Loads last.pth.tar into a state of the same shapes, and prints changes of the configuration.

        Raises:
            InputError: if it is missing or damaged, or belongs to another training.
        """
        path = self.path / LAST
        try:
            damaged = zipfile.ZipFile(path).testzip()  # compares checksums, which torch.load does not
            if damaged is not None:
                raise InputError(f"checksum of {damaged}")
            checkpoint = load_checkpoint(path)
        except Exception as error:  # readers of a damaged zip file may raise nearly any exception
            reason = f"{path} is damaged and cannot be resumed ({str(error) or type(error).__name__})"
            raise InputError(f"{reason}; --weights {self.path / BEST} starts another run (--name)") from error
        changes = self._compare(checkpoint, state)
        state.load_state_dict(checkpoint)
        if self.identity["val_hash"] is None:  # without evaluation the best score stays that of the list before
            self.identity["val_hash"] = checkpoint.get("val_hash")
        elif checkpoint.get("val_hash") != self.identity["val_hash"]:
            state.best, state.stale = None, 0  # scores on another list say nothing
        if is_main():
            print(f"resuming {path} at step {state.step}")
            for change in changes:
                print(f"  changed: {change}")

    def _compare(self, checkpoint: dict, state: TrainState) -> list[str]:
        """Notes such as "lr 0.001 -> 0.01"; raises an InputError if the training cannot continue."""
        path, identity = self.path / LAST, self.identity
        if "train_config" not in checkpoint or "optimizer" not in checkpoint:
            raise InputError(f"{path} has a model, but not the state of a training")
        saved, now = checkpoint["train_config"], identity["train_config"]
        if "trunk" in saved:
            raise InputError(old_run(self.path))
        if checkpoint["model"].config != state.model.config:
            raise InputError(
                f"{path} was trained with other classes or shapes than those of {self.config.data} and the flags"
            )
        if checkpoint.get("content_hash") != identity["content_hash"]:
            raise InputError(
                f"{path} was trained on a different list than {self.list_path}: images, boxes or flags differ; start "
                "another run (--name)"
            )
        if checkpoint["step_images"] != identity["step_images"]:
            raise InputError(
                f"{path} was trained with {checkpoint['step_images']} images per step (batch x processes x "
                f"accumulation), not {identity['step_images']}: its epochs would differ; "
                "--batch-size can keep the product"
            )
        changed = sorted(name for name in now if name not in FREE and saved.get(name) != now[name])
        changes = {name: f"{name} {saved.get(name)!r} -> {now[name]!r}" for name in changed}
        refused = [change for name, change in changes.items() if name in FIXED]
        if refused:
            raise InputError(f"{path} cannot be resumed with changed {'; '.join(refused)}: start another run (--name)")
        notes = list(changes.values())
        if checkpoint.get("val_hash") != identity["val_hash"]:
            notes.append("the content of the evaluation list")
        before = checkpoint["versions"]
        return notes + [f"{name} {before.get(name)} -> {v}" for name, v in VERSIONS.items() if before.get(name) != v]


def try_to_save(what: str | Path, write: Callable[[], Any]) -> bool:
    """Calls `write`; a failure, such as a full disk, only prints a warning. Returns whether it succeeded."""
    try:
        write()
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where a disk is full
        reason = f"{what} could not be saved ({str(error).splitlines()[0]}), an earlier file is kept"
        print(f"warning: {reason}; training continues. Is the disk full?", file=sys.stderr)
        return False
    return True
