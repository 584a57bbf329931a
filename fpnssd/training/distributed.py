"""Several processes as one training: what torchrun starts, and the few things they tell each other.

    torchrun --nproc-per-node 8 train.py

Without torchrun there is one process, and each function here answers for it at once.
"""

import contextlib
import os

import torch
import torch.distributed as dist

from utils import InputError


@contextlib.contextmanager
def init_distributed(device):
    """Joins the processes that torchrun started, if it did; yields this process's device.

    device: what the user asked for; of several GPUs each process takes the one of its local rank.
    """
    if "RANK" not in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        yield device
        return
    if device.type == "cuda":
        number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= there:
            raise InputError(f"process {number} has no GPU: this machine has {there}; --nproc-per-node {there}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield device
    # Only after all went well: a process that failed must end at once, so that torchrun ends the others.
    dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def sum_over_processes(tensor):
    """The sum of every process's tensor, on its device and without waiting for it."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gather(thing):
    """Every process's thing in a list, in the main process; None in the others."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * num_processes() if is_main() else None
    dist.gather_object(thing, things)
    return things


def broadcast(thing):
    """The main process's thing, in every process."""
    if not dist.is_initialized():
        return thing
    box = [thing]
    dist.broadcast_object_list(box)
    return box[0]


def copy_from_main(tensors):
    """Overwrites every process's tensors with the main one's."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
