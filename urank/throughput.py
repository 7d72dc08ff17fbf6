"""Measure and compare the inference throughput of networks on one device."""

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer  # synchronizes with the GPU before it reads the clock

from urank.layers import evaluating

MIN_PASSES = 3  # forward passes per network, even if they exceed the time limit


def images_per_second(networks: Mapping[str, nn.Module], images: Tensor, seconds: float = 0.5) -> dict[str, float]:
    """Return the throughput of each network in images/s, from the median time of a forward pass.

    The networks take turns, so that other load on the machine slows all of them equally and their ratio stays fair.
    The first pass of each network is a warm-up and is not counted.

    Args:
        networks: networks by name, on the device of `images`.
        images: one batch (n, c, h, w).
        seconds: measuring time per network; longer if three passes take longer.

    >>> images, thin, wide = torch.randn(64, 8), nn.Linear(8, 2), nn.Linear(8, 4096)
    >>> rates = images_per_second({"thin": thin, "wide": wide}, images, seconds=0.05)
    >>> rates["thin"] > rates["wide"]
    True
    """
    times: dict[str, list[float]] = {name: [] for name in networks}
    for network in networks.values():
        timed_pass(network, images)
    until = time.monotonic() + seconds * len(networks)
    while time.monotonic() < until or len(times[next(iter(times))]) < MIN_PASSES:
        for name, network in networks.items():
            times[name].append(timed_pass(network, images))
    return {name: len(images) / statistics.median(passes) for name, passes in times.items()}


def timed_pass(network: nn.Module, images: Tensor) -> float:
    """Return the duration of one forward pass in evaluation mode, in seconds."""
    with evaluating(network), torch.inference_mode():
        start = timer()
        network(images)
        return timer() - start
