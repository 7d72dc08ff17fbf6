"""The same work on several processes: each takes its share of the images, and their sums are added up.

`torchrun` or `accelerate launch` starts them, and `join` brings them together. Every process runs the same code on the
same arguments; what differs is the share. Files are written by the first. For a process alone every
function here changes nothing.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn


def join() -> None:
    """Meet the other processes, where a launcher has started several (it sets WORLD_SIZE); once."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        from accelerate import PartialState  # knows the launchers, and which backend a device needs

        PartialState()


def processes() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    return processes()[0] == 0


def own_device() -> torch.device:
    """The device of this process: its own GPU where there are several, else the first, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def share(items: Iterable) -> Iterator:
    """Every n-th of `items` for each of n processes."""
    number, count = processes()
    return islice(items, number, None, count)


def total(numbers: Tensor) -> Tensor:
    """The sum of `numbers` over all processes."""
    if processes()[1] > 1:
        dist.all_reduce(numbers)
    return numbers


def synchronize(model: nn.Module) -> None:
    """Give every process the first one's parameters and buffers; batch norm's statistics are each process's own."""
    if processes()[1] > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def totals(*numbers: int) -> list[int]:
    """Each of `numbers` summed over all processes."""
    if processes()[1] == 1:
        return list(numbers)
    device = own_device() if dist.get_backend() == "nccl" else torch.device("cpu")
    return total(torch.tensor(numbers, device=device)).tolist()


def wait() -> None:
    """Go on when all processes have come here."""
    totals(0)
