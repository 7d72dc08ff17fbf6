"""Distribute the images over several processes and add up the results.

Start the processes with `torchrun` or `accelerate launch` and call `join` in each. All processes run the same code with
the same arguments; each one processes its share of the images. Only the first process writes files. With a single
process the functions in this module have no effect.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Item = TypeVar("Item")


def join() -> None:
    """Initialize the process group if a launcher started several processes (it sets WORLD_SIZE)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # Imported here because it is slow to import and only needed with several processes. It supports all launchers
        # and chooses the backend for the device.
        from accelerate import PartialState

        PartialState()


def processes() -> tuple[int, int]:
    """Return the rank of this process, from 0, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Return True in the process that writes files and shows progress."""
    return processes()[0] == 0


def own_device() -> torch.device:
    """Return the device of this process: the GPU with its local rank, or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def share(items: Iterable[Item]) -> Iterator[Item]:
    """Return every n-th item, starting at this process's rank, where n is the number of processes."""
    rank, count = processes()
    return islice(items, rank, None, count)


def total(numbers: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if processes()[1] > 1:
        dist.all_reduce(numbers)
    return numbers


def totals(*numbers: int) -> list[int]:
    """Return the sum of each number over all processes."""
    if processes()[1] == 1:
        return list(numbers)
    device = own_device() if dist.get_backend() == "nccl" else torch.device("cpu")
    return total(torch.tensor(numbers, device=device)).tolist()


def synchronize(model: nn.Module) -> None:
    """Copy the parameters and buffers of the first process to all others.

    Parameters are already equal after a fit, but each process has its own batch-norm statistics.
    """
    if processes()[1] > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def wait() -> None:
    """Block until all processes have called this function."""
    totals(0)
