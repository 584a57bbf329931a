"""The progress of a training: a bar or lines of text, TensorBoard, pictures and curves of the log."""

import importlib.util
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from datasets import draw_batch
from fpnssd.data.data_list import DataList
from fpnssd.training.checkpoints import TrainState, try_to_save
from fpnssd.training.cpu_memory import memory_in_use
from fpnssd.training.distributed import is_main
from fpnssd.training.pictures import SHEET_IMAGES, draw_curves, draw_detections
from fpnssd.training.time_plan import TimePlan

LINE_SECONDS = 30  # between lines if stderr is not a terminal


class ProgressLogger:
    """Prints and draws the progress of a training. Silent in all but the main process.

    Args:
        folder: runs/NAME.
        device: where the network is.
        step_images: images of a step, over all processes.
        step: steps done.
        plan: of the training.
    """

    def __init__(self, folder: Path, device: torch.device, step_images: int, step: int, plan: TimePlan):
        self.folder, self.device, self.step_images, self.begun_at, self.plan = folder, device, step_images, step, plan
        self.estimated = False  # whether the length of the training was printed
        self.last_line = time.perf_counter()
        self.board = None
        if is_main() and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

            self.board = SummaryWriter(folder, purge_step=step + 1)  # drops later steps of a killed process

    def steps(self, batches: Iterable[Any], state: TrainState, epoch: int, total: int, done: int) -> Iterator[Any]:
        """Yields the batches of an epoch, with a progress bar, and measures the time spent waiting for them.

        Args:
            batches: those that are left of the epoch.
            state: its step and seconds at the start of the epoch.
            epoch: its number, from 1.
            total: steps of an epoch.
            done: number of these that were done before a resume.
        """
        self.started, self.waited, self.seconds = time.perf_counter(), 0.0, state.seconds
        self.first_step = self.shown = state.step
        title = f"epoch {epoch}"
        hidden = None if is_main() else True  # None: hidden if stderr is not a terminal
        with tqdm(total=total, initial=done, desc=title, leave=False, disable=hidden) as self.bar:
            iterator = iter(batches)
            while True:
                before = time.perf_counter()
                batch = next(iterator, None)
                self.waited += time.perf_counter() - before
                if batch is None:
                    return
                yield batch

    def pace(self, state: TrainState) -> dict[str, float]:
        """images_per_s and share_waiting of this epoch since the start or a resume, and all of its seconds."""
        elapsed = time.perf_counter() - self.started
        return {
            "images_per_s": (state.step - self.first_step) * self.step_images / elapsed,
            "seconds": self.seconds + elapsed,
            "share_waiting": self.waited / elapsed,
        }

    def log(self, state: TrainState) -> None:
        """Shows the epoch's mean losses, the pace and the remaining time."""
        if not is_main():
            return
        losses, pace = state.means(), self.pace(state)
        left = self.plan.seconds_left(state.step)
        shown = {name: f"{value:.3f}" for name, value in losses.items()} | {
            "images/s": f"{pace['images_per_s']:.1f}",
            "waiting": f"{pace['share_waiting']:.0%}",
            "GiB": f"{memory_in_use(self.device):.1f}",
            "left": tqdm.format_interval(left),
        }
        self.bar.update(state.step - self.shown)
        self.shown = state.step
        self.bar.set_postfix(shown)
        if self.bar.disable and time.perf_counter() - self.last_line > LINE_SECONDS:
            self.last_line = time.perf_counter()
            text = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {state.step}{self.plan.format_total()}: {text}", flush=True)
        if not self.estimated:
            self.estimated = True
            tqdm.write(self.plan.format_estimate(state.step))
        values = {f"loss/{name}": value for name, value in losses.items()}
        values["lr"] = state.optimizer.param_groups[-1]["lr"]
        self._add_scalars(values | {name: pace[name] for name in ("images_per_s", "share_waiting")}, state.step)

    def draw_batch(self, batch: dict[str, Any], classes: tuple[str, ...], step: int) -> None:
        """batch_STEP.jpg: augmented images with their ground truth."""
        if is_main():
            self._add_picture("batch", f"batch_{step}.jpg", draw_batch(batch, classes), step)

    def draw_curves(self) -> None:
        """curves.png of log.csv."""
        path = self.folder / "curves.png"
        try_to_save(path, lambda: draw_curves(self.folder / "log.csv", path))

    def log_evaluation(self, row: dict, data_list: DataList, detections: list[dict[str, torch.Tensor]]) -> None:
        """val_EPOCH.jpg of the same images each time, val.jpg of many more, and the scores.

        Both pictures have detections and missed objects; val.jpg those at the score threshold of the highest F1.
        """
        if len(data_list):
            self._add_picture("val", f"val_{row['epoch']:03}.jpg", draw_detections(data_list, detections), row["step"])
            if row["best_min_score"] is not None:
                sheet = draw_detections(data_list, detections, row["best_min_score"], SHEET_IMAGES)
                try_to_save(self.folder / "val.jpg", lambda: sheet.save(self.folder / "val.jpg"))
        scores = {name: value for name, value in row.items() if name.startswith(("voc", "coco")) and value is not None}
        self._add_scalars({f"val/{name}": value for name, value in scores.items()}, row["step"])

    def _add_picture(self, tag: str, name: str, picture: Image.Image, step: int) -> None:
        try_to_save(self.folder / name, lambda: picture.save(self.folder / name))
        if self.board:
            self.board.add_image(tag, pil_to_tensor(picture), step)

    def _add_scalars(self, values: dict[str, float], step: int) -> None:
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def close(self) -> None:
        if self.board:
            self.board.close()
