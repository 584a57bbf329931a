"""What a person sees of a running training: a bar or plain lines, TensorBoard, pictures, and why it stopped."""

import contextlib
import importlib.util
import resource
import sys
import time

import numpy as np
import torch
from torch.distributed import DistError
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import distributed
from datasets import DataError, collate, draw_batch, fit_image
from distributed import is_main
from report import draw_curves
from utils import explain

LINE_EVERY = 30  # seconds between lines where there is no terminal
SHOWN_SCORE = 0.25  # of detections in pictures
SHOWN_IMAGES = 8


class Watch:
    """Told of every step that was read, epoch and evaluation; only the main process's says anything."""

    def __init__(self, folder, step, num_steps):
        self.folder, self.shown, self.num_steps = folder, step, num_steps
        self.bar = None
        self.last_line = time.perf_counter()
        self.board = None
        if is_main() and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, and only where it is installed

            self.board = SummaryWriter(folder, purge_step=step)  # what a killed run wrote beyond it is taken back

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
        said |= {"images/s": f"{speed:.1f}", "waiting": f"{waiting:.0%}", "GiB": f"{memory_in_use():.1f}", "left": left}
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
        picture = draw_batch(batch, classes)
        picture.save(self.folder / f"batch_{step}.jpg")
        self._show("batch", picture, step)

    def evaluation(self, row, data_list, detections):
        """After run.write_log: curves, scores, and what is found in the same few images each time."""
        draw_curves(self.folder / "log.csv", self.folder / "curves.png")
        picture = draw_found(data_list, detections, data_list.classes)
        picture.save(self.folder / f"val_{row['epoch']:03}.jpg")
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


def memory_in_use():
    """GiB: the most of the GPU's that tensors have held, or of this process where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def draw_found(data_list, detections, classes, side=300):
    """SHOWN_IMAGES of a list, evenly spaced, with what was found in them, as one PIL image."""
    samples = []
    for index in np.unique(np.linspace(0, len(data_list) - 1, SHOWN_IMAGES).astype(int)).tolist():
        found = {name: tensor[detections[index]["scores"] >= SHOWN_SCORE] for name, tensor in detections[index].items()}
        height, width = data_list.sizes[index].tolist()
        samples.append(
            {
                "image": fit_image(data_list.read_image(index), side),
                "boxes_unit": found["boxes"] / torch.tensor([width, height, width, height]),
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
    samples = [dataset[key] for key in keys]
    draw_batch(collate(samples), run.model.config.classes).save(picture)
    said = ", ".join(f"{name} {value:g}" for name, value in terms.items())
    return (
        f"loss or gradient is not finite at step {step}: {said}, gradient norm {norm:g}, on images "
        f"{[sample['image_id'] for sample in samples]}, drawn in {picture}. That step changed nothing: weights, "
        f"average and optimizer are as before it, and {run.folder} is saved. Look at these images' boxes, or lower "
        "--lr; --resume goes on behind that step"
    )


def describe_out_of_memory(config, error):
    half = max(1, config.batch_size // 2)
    return (
        f"the GPU's memory does not hold a batch of {config.batch_size} images of {config.image_size} pixels in "
        f"{config.precision} precision: --batch-size {half} takes half of it, and two batches a step, so that the run "
        f"stays the same and can be resumed ({str(error).splitlines()[0]})"
    )


def describe_failure_from_outside(error):
    """What is wrong with the data, a loader's worker or another process; None if it is the program's own fault."""
    if isinstance(error, DataError):
        return explain(error)
    text = str(error)
    if "DataLoader worker" in text:
        reason = "a worker is usually killed because the machine's memory ran out: fewer --workers take less"
        return f"{explain(error)}; {reason}"
    if distributed.num_processes() > 1 and (isinstance(error, DistError) or "gloo" in text):
        return f"process {distributed.rank()} lost the others ({explain(error)}): one of them says why"
    return None
