import time

import torch
from torch import nn

from urank.throughput import MIN_PASSES, images_per_second


class Slow(nn.Module):
    """A network whose forward pass takes `seconds` and appends its name to `passes`."""

    def __init__(self, name, seconds, passes):
        super().__init__()
        self.name, self.seconds, self.passes = name, seconds, passes

    def forward(self, images):
        assert not self.training and torch.is_inference_mode_enabled()
        self.passes.append(self.name)
        time.sleep(self.seconds)
        return images


def test_is_images_per_second():
    networks = dict(one=Slow("one", 0.01, []), three=Slow("three", 0.03, []))
    speeds = images_per_second(networks, torch.zeros(4, 3, 8, 8), seconds=0.2)
    assert 4 / 0.1 < speeds["one"] <= 4 / 0.01  # a sleep is never shorter, on a busy machine longer
    assert 1.5 < speeds["one"] / speeds["three"] <= 3.2


def test_networks_alternate():
    passes = []
    images_per_second({name: Slow(name, 0.001, passes) for name in "ab"}, torch.zeros(1, 1), seconds=0.05)
    assert passes == ["a", "b"] * (len(passes) // 2) and len(passes) > 10


def test_a_slow_network_runs_a_minimum_number_of_times():
    passes = []
    images_per_second({"a": Slow("a", 0.05, passes)}, torch.zeros(1, 1), seconds=0.0)
    assert len(passes) == 1 + MIN_PASSES
