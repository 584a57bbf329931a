"""Memory: settings of glibc's malloc for CPU training and DataLoader workers, and the memory in use."""

import contextlib
import ctypes
import math
import platform
import sys
from collections.abc import Iterator

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MALLOC_OPTIONS = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}  # the numbers of glibc's malloc.h
MALLOC_DEFAULTS = {"trim_threshold": 128 * 2**10, "mmap_threshold": 128 * 2**10, "mmap_max": 65536}


def tune_malloc(**options: int) -> None:
    """Sets options of glibc's malloc in this process (man mallopt); does nothing with another C library.

    Args:
        options: names of MALLOC_OPTIONS and their values; sizes in bytes.
    """
    if platform.libc_ver()[0] == "glibc":
        for name, value in options.items():
            ctypes.CDLL(None).mallopt(MALLOC_OPTIONS[name], value)


@contextlib.contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """Stops glibc from returning freed memory to the system while the block runs, if `device` is the CPU.

    A training step frees and allocates every activation; the page faults of new memory made it 1.3 times as long
    (benchmarks/train.py).
    """
    if device.type != "cpu":
        yield
        return
    tune_malloc(mmap_max=0, trim_threshold=-1)
    try:
        yield
    finally:
        tune_malloc(**MALLOC_DEFAULTS)


def memory_in_use(device: torch.device) -> float:
    """Peak memory in GiB: of tensors on the GPU, or else of this process (NaN on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
