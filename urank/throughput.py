"""How many images a second networks classify, side by side on one device."""

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer  # waits until a GPU has done what it was told, then reads the clock

from urank.layers import evaluating

LEAST = 3  # passes of each network, however slow


def images_per_second(networks: Mapping[str, nn.Module], images: Tensor, seconds: float = 0.5) -> dict[str, float]:
    """Images a second of each network on one batch of `images` (n, c, h, w), from the median time of a pass.

    The networks take turns, so that what else slows the machine slows all of them, and their ratio is fair. The first
    pass of each is not counted.

    Args:
        seconds: how long each network is measured; longer where three passes take longer.
    """
    times: dict[str, list[float]] = {name: [] for name in networks}
    for network in networks.values():
        timed_pass(network, images)
    until = time.monotonic() + seconds * len(networks)
    while time.monotonic() < until or len(times[next(iter(times))]) < LEAST:
        for name, network in networks.items():
            times[name].append(timed_pass(network, images))
    return {name: len(images) / statistics.median(passes) for name, passes in times.items()}


def timed_pass(network: nn.Module, images: Tensor) -> float:
    """Seconds of one forward pass in evaluation mode."""
    with evaluating(network), torch.inference_mode():
        start = timer()
        network(images)
        return timer() - start
