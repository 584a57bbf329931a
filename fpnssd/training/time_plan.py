"""The share of a training that is done, in steps or, with a time limit, in time."""

import math
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

# Number of steps over which the pace is measured. The host waits for a GPU only every log_every (20) steps.
RECENT = 20
# Estimated cost of the evaluation and the files after the last step: END_SECONDS, and with an evaluation the time of
# END_IMAGES training images and of EVALUATED_IMAGE per image (lite on 2 cores of an Intel Xeon: 8 s for 72 images,
# 0.14 s per training image).
END_IMAGES, EVALUATED_IMAGE, END_SECONDS = 40, 0.5, 3.0


def process_start() -> float:
    """time.monotonic() at the start of this process; imports take seconds of it.

    Exact on Linux. Elsewhere it is computed from the CPU time so far, a lower bound of the elapsed time.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        since_boot = float(Path("/proc/uptime").read_text().split()[0])
        return time.monotonic() - (since_boot - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.monotonic() - time.process_time()


class TimePlan:
    """The share of a training that is done, for the learning rate and for its end.

    Without a limit it is the share of steps. With one it is the larger of the shares of steps and of time, so that the
    schedule adapts to the speed of the machine and the learning rate still falls to zero.

    Args:
        num_steps: of the whole training; with a limit, the maximum.
        step_images: images of a step, over all processes.
        minutes: limit, from the start of the process to the last file written; 0 for none.
        used: seconds that the training took before a resume.
        started: clock() at the start of the process; None for now.
        end_images: images of the evaluation after the last step; 0 for none.
        stride: steps between two calls of `advance`.
        clock: in seconds.

    Attributes:
        done: the share, in 0..1, as of the last `advance`. Several processes take that of the main one.
    """

    def __init__(
        self,
        num_steps: int,
        step_images: int,
        minutes: float = 0.0,
        used: float = 0.0,
        started: float | None = None,
        end_images: int = 0,
        stride: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.num_steps, self.step_images, self.end_images = num_steps, step_images, end_images
        self.stride, self.clock = stride, clock
        self.limit = 60 * minutes if minutes else math.inf
        self.zero = (clock() if started is None else started) - used
        self.recent: deque[float] = deque(maxlen=RECENT)  # seconds of the recent steps, without the process's first
        self.first = 0.0  # seconds of the process's first step
        self.last_end = self.clock()  # of a step
        self.done = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of the training so far, those before a resume included."""
        return self.clock() - self.zero

    @property
    def out_of_time(self) -> bool:
        """Whether the time limit ends the training here."""
        return self.limit < math.inf and self.done >= 1

    def begin(self, step: int) -> None:
        """Starts an epoch: the evaluation before it is no part of its first step."""
        self.last_end = self.clock()
        self.done = max(self.done, step / self.num_steps, self._share_of_time())

    def advance(self, step: int) -> float:
        """The share that is done after `step` steps, which never decreases; 1 if no further step fits the limit."""
        now = self.clock()
        if self.first:
            self.recent.append(now - self.last_end)
        else:  # compiles, starts workers, takes memory: no measure of the pace
            self.first = now - self.last_end
        self.last_end = now
        next_steps = self.stride * self.step_seconds if self.recent else 0.0
        last = self.elapsed + next_steps > self.limit - self.end_seconds
        self.done = 1.0 if last else max(self.done, step / self.num_steps, self._share_of_time())
        return self.done

    def _share_of_time(self) -> float:
        return min(1.0, self.elapsed / max(1e-9, self.limit - self.end_seconds))

    @property
    def step_seconds(self) -> float:
        """Mean of the recent steps; before there is a second one the first's, or 0."""
        return sum(self.recent) / len(self.recent) if self.recent else self.first

    @property
    def end_seconds(self) -> float:
        """Estimated duration, at the recent pace, of the evaluation and the files after the last step."""
        images = END_IMAGES + EVALUATED_IMAGE * self.end_images if self.end_images and self.recent else 0
        return END_SECONDS + images * self.step_seconds / self.step_images

    def fits_evaluation(self) -> bool:
        """Whether an evaluation fits in before the last one."""
        return self.elapsed + 2 * self.end_seconds < self.limit

    def schedule_steps(self, step: int) -> float:
        """The length of the training, in steps, for the learning rate of step number `step`."""
        return step / self.done if self.done > step / self.num_steps and step else self.num_steps

    def seconds_left(self, step: int) -> float:
        """Estimated remaining seconds of the training, evaluation included."""
        if self.limit < math.inf and self.done > step / self.num_steps:
            return max(0.0, self.limit - self.elapsed)
        return (self.num_steps - step) * self.step_seconds + self.end_seconds

    def format_total(self) -> str:
        """ "/N" for N steps in all, to follow the number of a step; "" under a time limit."""
        return f"/{self.num_steps}" if self.limit == math.inf else ""

    def format_estimate(self, step: int) -> str:
        """How long the training will take, or with a limit how many steps will fit into it."""
        pace = f"at {self.step_seconds:.2f} s for a step of {self.step_images} images"
        if self.limit == math.inf:
            return f"about {math.ceil(self.seconds_left(step) / 60)} min from here {pace}; --minutes sets a limit"
        fitting = (self.limit - self.elapsed - self.end_seconds) / max(self.step_seconds, 1e-9)
        return f"about {min(self.num_steps, step + int(max(0, fitting)))} steps in {self.limit / 60:g} min {pace}"
