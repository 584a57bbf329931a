"""How a training ends early: stop signals, and messages for failures."""

import math
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from torch.distributed import DistError
from tqdm import tqdm

from datasets import DetectionDataset, collate, draw_batch
from fpnssd.data.images import DataError
from fpnssd.training import distributed
from fpnssd.training.checkpoints import NotFiniteError, try_to_save
from fpnssd.training.config import TrainConfig, batch_sizes
from utils import error_message

LOST_WORKER = (EOFError, ConnectionError)  # raised where a loader's worker ends while it hands a batch over


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what is kept."""


class StopOnSignal:
    """Turns Ctrl-C and SIGTERM into a request, `requested`: the loop ends after a whole step. A second Ctrl-C raises.

    All handlers are restored at the end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():  # signals can be handled nowhere else
            self._before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested:  # schedulers may send it twice: to the process group and through torchrun
            return
        self.requested = True
        # A second SIGTERM to the process group ends the workers (datasets.py); torch's handler of SIGCHLD would raise
        # in the middle of a save. Not SIG_DFL: if that worker ends right now, Python prints that it lost a handler.
        if hasattr(signal, "SIGCHLD"):  # Windows has none
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        tqdm.write("stopping after this step and saving; Ctrl-C once more to stop at once", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: it was not installed by Python
                signal.signal(number, handler)  # type: ignore[arg-type]


def describe_failure(error: BaseException, config: TrainConfig, dataset: DetectionDataset, folder: Path) -> str | None:
    """What went wrong in a training; None if the error is the program's own.

    Args:
        error: a number that is not finite, the GPU's memory, the data, a loader's worker, or another process.
        config: of the training.
        dataset: of the training.
        folder: runs/NAME, where the images of a step that is not finite are drawn.
    """
    text = str(error)
    if isinstance(error, NotFiniteError):
        return _describe_not_finite(error, dataset, folder)
    if isinstance(error, torch.OutOfMemoryError):
        return _describe_out_of_memory(config, len(dataset), text)
    if isinstance(error, DataError):
        return error_message(error)
    if isinstance(error, LOST_WORKER) or "DataLoader worker" in text or "Pin memory thread" in text:
        reason = "usually the system ends it because memory ran out: fewer --workers take less"
        return f"a worker that loads data was lost ({error_message(error)}); {reason}"
    if distributed.num_processes() > 1 and (isinstance(error, DistError) or "gloo" in text):
        return f"process {distributed.rank()} lost the others ({error_message(error)}): one of them says why"
    return None


def _describe_not_finite(error: NotFiniteError, dataset: DetectionDataset, folder: Path) -> str:
    """With the images of the step, which are made again and drawn."""
    images = ""
    if error.keys:
        samples = [dataset[tuple(key)] for key in error.keys]
        path = folder / f"not_finite_{error.step}_rank{distributed.rank()}.jpg"
        picture = draw_batch(collate(samples), dataset.data_list.classes)
        try_to_save(path, lambda: picture.save(path))
        images = f" on images {[sample['image_id'] for sample in samples]}, drawn in {path}"
    return f"{error}{images}. Look at the boxes of these images, or lower --lr"


def _describe_out_of_memory(config: TrainConfig, num_images: int, text: str) -> str:
    """Names what takes less memory: a batch size that keeps the images per step, if there is one."""
    batch_size, accumulate = batch_sizes(config, num_images)
    smaller = [
        size
        for size in range(batch_size - 1, 0, -1)
        if math.prod(batch_sizes(replace(config, batch_size=size), num_images)) == batch_size * accumulate
    ]
    advice = "a smaller backbone, fpn_channels or image_size takes less"
    if config.batch_size > 1:
        advice = f"another run with --batch-size {config.batch_size // 2} takes half of it"
    if smaller:
        advice = f"--batch-size {smaller[0]} takes less, keeps the images per step, and can be used with --resume"
    return (
        f"the GPU's memory does not hold a batch of {config.batch_size} images of {config.image_size} pixels in "
        f"{config.precision} precision: {advice} ({text.splitlines()[0]})"
    )
