"""One launch in place of hundreds: what a GPU computes for every batch alike, captured once as a CUDA graph.

Most kernels of a thin network end sooner than Python launches the next one, so the GPU waits. A graph holds them all,
with the addresses of what they read and write, and is launched as a whole.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture: libraries choose their algorithms and allocate what they need


class Captured:
    """`compute(*inputs)` for tensors of the shapes and types of these, on a GPU.

    Its results, and the gradients it leaves, lie in the same memory each time: the next call overwrites them. While it
    is used, no parameter may lose its `grad`.

    Args:
        compute: maps tensors to tensors by the same kernels at every call; it may draw from torch's generator, and must
            not wait for the GPU (`item()`, a print, a branch on a tensor). It is called `WARM_UP` + 1 times here.
        inputs: the first batch.
        changed: the tensors that `compute` changes in place (running statistics, say); they end as they are now.

    Raises:
        RuntimeError: `compute` cannot be captured.
    """

    def __init__(self, compute: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], changed: Iterable[Tensor]):
        self._inputs, self._graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
        with beside_current(inputs[0].device) as stream:
            with undone(changed), torch.random.fork_rng([inputs[0].device]):
                for _ in range(WARM_UP):
                    compute(*self._inputs)
            with torch.cuda.graph(self._graph, stream=stream):  # notes the kernels, runs none
                self._results = compute(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._results


@contextmanager
def undone(changed: Iterable[Tensor]) -> Iterator[None]:
    """After the block the tensors in `changed` are what they were before it."""
    before = [(tensor, tensor.clone()) for tensor in changed]
    yield
    for tensor, value in before:
        tensor.copy_(value)


@contextmanager
def beside_current(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Inside the block another stream of `device` is the current one: a graph cannot be captured in the default one."""
    stream = side_stream(device)
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield stream
        torch.cuda.current_stream().wait_stream(stream)


@cache  # libraries hold memory for each stream that they have seen
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
