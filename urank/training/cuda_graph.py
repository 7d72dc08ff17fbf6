"""Capture a computation as a CUDA graph, to launch hundreds of GPU kernels at once.

The kernels of a thin network are shorter than the time that Python needs to launch them, so the GPU waits. A CUDA graph
records all kernels and their memory addresses and is launched as a whole.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # before the capture, so that libraries choose their algorithms and allocate their memory


class CapturedFunction:
    """`compute(*inputs)` as a CUDA graph, for inputs of fixed shapes and types.

    Results and gradients always have the same memory addresses: the next call overwrites them. Do not reset the `grad`
    of a parameter to None between calls.

    Args:
        compute: function that maps tensors to tensors and launches the same kernels in every call. It may use torch's
            random generator but must not wait for the GPU (`item()`, a print, a branch on a tensor). It is called
            `WARM_UP_CALLS` + 1 times here.
        inputs: the first batch.
        changed: tensors that `compute` changes in place, such as running statistics; their current values are restored.

    Raises:
        RuntimeError: `compute` cannot be captured.
    """

    def __init__(self, compute: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], changed: Iterable[Tensor]):
        self._inputs, self._graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
        with side_stream(inputs[0].device) as stream:
            with restored(changed), torch.random.fork_rng([inputs[0].device]):
                for _ in range(WARM_UP_CALLS):
                    compute(*self._inputs)
            with torch.cuda.graph(self._graph, stream=stream):  # records the kernels without running them
                self._results = compute(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._results


@contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values of the tensors, in place, after the block."""
    before = [(tensor, tensor.clone()) for tensor in tensors]
    yield
    for tensor, value in before:
        tensor.copy_(value)


@contextmanager
def side_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Use another stream of `device` inside the block: the default stream does not support capturing."""
    stream = stream_of(device)
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield stream
        torch.cuda.current_stream().wait_stream(stream)


@cache  # libraries keep memory for every stream that they have used
def stream_of(device: torch.device) -> torch.cuda.Stream:
    """Return the side stream of a device, always the same one."""
    return torch.cuda.Stream(device)
