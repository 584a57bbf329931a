"""Distributed training: joins the processes that torchrun starts, and exchanges values between them.

    torchrun --nproc-per-node 8 train.py

Without torchrun there is one process, and each function here returns at once.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from utils import InputError

T = TypeVar("T")


@contextlib.contextmanager
def init_distributed(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did.

    Args:
        device: the device that the user chose.

    Yields:
        The device of this process: with several GPUs that of its local rank.

    Raises:
        InputError: if torchrun started more processes than this machine has GPUs.
    """
    if "RANK" not in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        yield device
        return
    if device.type == "cuda":
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise InputError(f"process {number} has no GPU: this machine has {count}; --nproc-per-node {count}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    threading.Thread(target=_end_with_agent, args=(os.getppid(),), daemon=True).start()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield device
    # Only if no exception was raised: a process that fails must end at once, so that torchrun ends the others.
    dist.destroy_process_group()


def _end_with_agent(agent: int) -> None:
    """Ends this process when its parent, torchrun, has died.

    A killed torchrun leaves its processes running: those of other machines would continue with them, and a restarted
    training would find runs/NAME locked.
    """
    while os.getppid() == agent:
        time.sleep(2)
    print(f"train: process {rank()} exits, as the torchrun that started it was killed", file=sys.stderr, flush=True)
    os._exit(1)


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", rank())) if dist.is_initialized() else 0


def num_processes() -> int:
    """The number of processes of the training, on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the tensors of all processes, on the device and without waiting for it."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gather(value: T) -> list[T] | None:
    """The values of all processes, by rank; None in all but the main process."""
    if not dist.is_initialized():
        return [value]
    values: list | None = [None] * num_processes() if is_main() else None
    dist.gather_object(value, values)
    return values


def broadcast(value: T) -> T:
    """The main process's value, in every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def copy_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrites the tensors of every process with those of the main one."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
