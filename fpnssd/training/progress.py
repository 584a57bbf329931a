"""What a person sees of a training (a bar or lines, TensorBoard, pictures), the wish to stop, and why it stopped."""

import contextlib
import importlib.util
import math
import signal
import sys
import threading
import time

import torch
from torch.distributed import DistError
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from datasets import collate, draw_batch
from fpnssd.data.data_list import evenly_spaced
from fpnssd.data.images import DataError, fit_image
from fpnssd.evaluation.report import draw_curves
from fpnssd.training import distributed
from fpnssd.training.checkpoints import warn_if_unwritable
from fpnssd.training.distributed import is_main
from utils import error_message

try:
    import resource
except ImportError:  # Windows
    resource = None

LINE_EVERY = 30  # seconds between lines where there is no terminal
SHOWN_IMAGES = 8
LOST_WORKER = (EOFError, ConnectionError)  # raised where a worker ends while it hands a batch over
SHOWN_SCORE = 0.25  # lower than to look at a finished detector: what is coming shows earlier


class Watch:
    """Told of every step that was read, epoch and evaluation; only the main process's says anything."""

    def __init__(self, folder, device, step, num_steps):
        self.device = device
        self.folder, self.shown, self.num_steps = folder, step, num_steps
        self.bar = None
        self.last_line = time.perf_counter()
        self.board = None
        if is_main() and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, and only where it is installed

            self.board = SummaryWriter(folder, purge_step=step + 1)  # what a killed run wrote beyond it is taken back

    @contextlib.contextmanager
    def epoch(self, epoch, steps, done):
        with tqdm(
            total=steps, initial=done, desc=f"epoch {epoch + 1}", leave=False, disable=None if is_main() else True
        ) as self.bar:
            yield

    def steps(self, run, pace):
        """After some more steps of a Run; pace: images_per_s, seconds and share_waiting of this epoch."""
        if not is_main():
            return
        terms, speed, waiting = run.means(), pace["images_per_s"], pace["share_waiting"]
        left = tqdm.format_interval((self.num_steps - run.step) * run.step_images / max(speed, 1e-9))
        said = {name: f"{value:.3f}" for name, value in terms.items()}
        said |= {
            "images/s": f"{speed:.1f}",
            "waiting": f"{waiting:.0%}",
            "GiB": f"{memory_in_use(self.device):.1f}",
            "left": left,
        }
        self.bar.update(run.step - self.shown)
        self.bar.set_postfix(said)
        self.shown = run.step
        if self.bar.disable and time.perf_counter() - self.last_line > LINE_EVERY:
            self.last_line = time.perf_counter()
            print(f"step {run.step}/{self.num_steps}: " + ", ".join(f"{k} {v}" for k, v in said.items()), flush=True)
        if self.board:
            values = {f"loss/{name}": value for name, value in terms.items()}
            values |= {"lr": run.optimizer.param_groups[-1]["lr"], "images_per_s": speed, "share_waiting": waiting}
            for name, value in values.items():
                self.board.add_scalar(name, value, run.step)

    def first_batches(self, batch, classes, step):
        with warn_if_unwritable(self.folder / f"batch_{step}.jpg") as attempt:
            picture = draw_batch(batch, classes)
            picture.save(attempt.what)
            self._show("batch", picture, step)

    def evaluation(self, row, data_list, detections):
        """After run.write_log: curves, scores, and what is found in the same few images each time."""
        with warn_if_unwritable(self.folder / "curves.png") as attempt:
            draw_curves(self.folder / "log.csv", attempt.what)
        if len(data_list):
            with warn_if_unwritable(self.folder / f"val_{row['epoch']:03}.jpg") as attempt:
                picture = draw_found(data_list, detections, data_list.classes)
                picture.save(attempt.what)
                self._show("val", picture, row["step"])
        if self.board:
            for name, value in row.items():
                if name.startswith(("voc", "coco")) and value is not None:
                    self.board.add_scalar(f"val/{name}", value, row["step"])
            self.board.flush()

    def _show(self, name, picture, step):
        if self.board:
            self.board.add_image(name, pil_to_tensor(picture), step)

    def close(self):
        if self.board:
            self.board.close()


class Clock:
    """How fast an epoch goes, and how much of it is waiting for data."""

    def __init__(self, run):
        self.start, self.first, self.waited = time.perf_counter(), run.step, 0.0
        self.earlier = run.seconds  # of this epoch, before the run was resumed

    @contextlib.contextmanager
    def waiting(self):
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    def read(self, run):
        """The pace so far; the run is told how long its epoch has taken."""
        seconds = time.perf_counter() - self.start
        speed = (run.step - self.first) * run.step_images / seconds
        run.seconds = self.earlier + seconds
        return {"images_per_s": speed, "seconds": run.seconds, "share_waiting": self.waited / seconds}


def describe_epoch(row, epochs):
    text = f"epoch {row['epoch']}/{epochs}: " + ", ".join(
        f"{name.removeprefix('loss_')} {value:.3f}" for name, value in row.items() if name.startswith("loss_")
    )
    text += f", {row['images_per_s']:.1f} images/s, {row['share_waiting']:.0%} of the time waiting for data"
    if "voc2007_ap50" in row:
        scores = {name: row[name] for name in ("voc2007_ap50", "voc2010_ap50", "coco_ap", "coco_ap50")}
        text += "; " + ", ".join(f"{n} {'none' if v is None else f'{v:.3f}'}" for n, v in scores.items())
    return text


def memory_in_use(device):
    """GiB: the most of the GPU's that tensors have held, or of this process where none is used (NaN on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class StopOnSignal:
    """Ctrl-C or SIGTERM as a wish: `wanted` becomes true, and the loop stops where nothing is half done.

    A second Ctrl-C raises.
    """

    def __init__(self):
        self.wanted = False
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # signals can be caught nowhere else
            self._before = {number: signal.signal(number, self._wish) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _wish(self, signum, frame):
        if self.wanted and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.wanted:  # schedulers may send it twice: to the group and through torchrun
            return
        self.wanted = True
        # A scheduler's signal ends a worker that has only begun to start: that must not raise in the middle of saving.
        # Not SIG_DFL: where its end came in the same moment, Python would print that it lost a signal's handler.
        if hasattr(signal, "SIGCHLD"):  # Windows has none
            signal.signal(signal.SIGCHLD, lambda *_: None)
        tqdm.write("stopping after this step and saving; Ctrl-C once more to stop at once", file=sys.stderr)

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def draw_found(data_list, detections, classes, side=300):
    """SHOWN_IMAGES of a list, evenly spaced, with what was found in them, as one PIL image."""
    samples = []
    for index in evenly_spaced(len(data_list), SHOWN_IMAGES):
        found = {name: tensor[detections[index]["scores"] >= SHOWN_SCORE] for name, tensor in detections[index].items()}
        height, width = data_list.sizes[index].tolist()
        samples.append(
            {
                "image": fit_image(data_list.read_image(index), side),
                "boxes_norm": found["boxes"] / torch.tensor([width, height, width, height]),
                "labels": found["labels"],
                "difficult": torch.zeros(len(found["labels"]), dtype=torch.bool),
                "crowd": torch.zeros(len(found["labels"]), dtype=torch.bool),
                "image_id": data_list.image_id(index),
                "size": (height, width),
                "key": (0, index, 0),
            }
        )
    return draw_batch(collate(samples), classes)


def describe_not_finite(run, dataset, step, terms, norm, keys):
    """What a step without a finite loss or gradient saw; its batch is drawn again and saved."""
    picture = run.folder / f"not_finite_{step}_rank{distributed.rank()}.jpg"
    samples = [dataset[tuple(key)] for key in keys]
    with warn_if_unwritable(picture):
        draw_batch(collate(samples), run.model.config.classes).save(picture)
    said = ", ".join(f"{name} {value:g}" for name, value in terms.items())
    return (
        f"loss or gradient is not finite at step {step}: {said}, gradient norm {norm:g}, on images "
        f"{[sample['image_id'] for sample in samples]}, drawn in {picture}. That step changed nothing: weights, "
        "average and optimizer are as before it. Look at these images' boxes, or lower --lr; --resume goes on behind it"
    )


def describe_out_of_memory(config, smaller, error):
    """smaller: the batch sizes with which a step still has as many images."""
    means = "a smaller backbone, fpn_channels or image_size takes less"
    if config.batch_size > 1:
        means = f"another run with --batch-size {config.batch_size // 2} takes half of it"
    if smaller:
        means = f"--batch-size {smaller[0]} takes less, accumulates the same images a step, and may be used to --resume"
    return (
        f"the GPU's memory does not hold a batch of {config.batch_size} images of {config.image_size} pixels in "
        f"{config.precision} precision: {means} ({str(error).splitlines()[0]})"
    )


def describe_failure_from_outside(error):
    """What is wrong with the data, a loader's worker or another process; None if it is the program's own fault."""
    if isinstance(error, DataError):
        return error_message(error)
    text = str(error)
    if isinstance(error, LOST_WORKER) or "DataLoader worker" in text or "Pin memory thread" in text:
        reason = "it is usually killed because the machine's memory ran out: fewer --workers take less"
        return f"a worker that loads data was lost ({error_message(error)}); {reason}"
    if distributed.num_processes() > 1 and (isinstance(error, DistError) or "gloo" in text):
        return f"process {distributed.rank()} lost the others ({error_message(error)}): one of them says why"
    return None
