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

LOST_WORKER = (EOFError, ConnectionError)  # raised if a DataLoader worker dies while it sends a batch


class TrainingStopped(RuntimeError):
    """Training cannot continue; the message says why and what is saved."""


class StopOnSignal:
    """Records Ctrl-C and SIGTERM in `requested`: the loop then ends after a complete step. A second Ctrl-C raises.

    The previous handlers are restored at the end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():  # handlers can be set nowhere else
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
        tqdm.write("saving and stopping after this step; press Ctrl-C again to stop immediately", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: it was not installed by Python
                signal.signal(number, handler)  # type: ignore[arg-type]


def describe_failure(error: BaseException, config: TrainConfig, dataset: DetectionDataset, folder: Path) -> str | None:
    """The message for an error that ends a training; None for an error of the program itself.

    Args:
        error: of a value that is not finite, GPU memory, the data, a DataLoader worker, or another process.
        config: of the training.
        dataset: of the training.
        folder: runs/NAME, in which the images of a step that is not finite are drawn.
    """
    text = str(error)
    if isinstance(error, NotFiniteError):
        return _describe_not_finite(error, dataset, folder)
    if isinstance(error, torch.OutOfMemoryError):
        return _describe_out_of_memory(config, len(dataset) * config.repeats, text)
    if isinstance(error, DataError):
        return error_message(error)
    if isinstance(error, LOST_WORKER) or "DataLoader worker" in text or "Pin memory thread" in text:
        reason = "usually the system kills it because memory ran out: fewer --workers need less"
        return f"a data loading worker died ({error_message(error)}); {reason}"
    if distributed.num_processes() > 1 and (isinstance(error, DistError) or "gloo" in text):
        return f"process {distributed.rank()} lost the others ({error_message(error)}): one of them prints the reason"
    return None


def _describe_not_finite(error: NotFiniteError, dataset: DetectionDataset, folder: Path) -> str:
    """Names the images of the step, which are loaded again and drawn."""
    images = ""
    if error.keys:
        samples = [dataset[tuple(key)] for key in error.keys]
        path = folder / f"not_finite_{error.step}_rank{distributed.rank()}.jpg"
        picture = draw_batch(collate(samples), dataset.data_list.classes)
        try_to_save(path, lambda: picture.save(path))
        images = f" on images {[sample['image_id'] for sample in samples]}, drawn in {path}"
    return f"{error}{images}. Look at the boxes of these images, or lower --lr"


def _describe_out_of_memory(config: TrainConfig, num_images: int, text: str) -> str:
    """Advises how to save memory: by a batch size that keeps the images per step, if there is one."""
    batch_size, accumulate = batch_sizes(config, num_images)
    smaller = [
        size
        for size in range(batch_size - 1, 0, -1)
        if math.prod(batch_sizes(replace(config, batch_size=size), num_images)) == batch_size * accumulate
    ]
    advice = "a smaller backbone, fpn_channels or image_size needs less"
    if config.batch_size > 1:
        advice = f"a new run with --batch-size {config.batch_size // 2} needs half of it"
    if smaller:
        advice = f"--batch-size {smaller[0]} needs less, keeps the images per step, and can be used with --resume"
    return (
        f"GPU memory is too small for a batch of {config.batch_size} images of {config.image_size} pixels in "
        f"{config.precision} precision: {advice} ({text.splitlines()[0]})"
    )
