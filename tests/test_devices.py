"""An experiment as on a GPU, where there is none: nothing is on the wrong device. See pretended_gpu.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import finished
from pretended_gpu import NAME, PretendedGpu
from torch import nn

from urank.reproduction.record import Record


def test_an_experiment(tmp_path):
    """Every stage runs there, on batches of 2048, and gives the ranks that the processor gives."""
    script = str(Path(__file__).with_name("pretended_gpu.py"))
    done = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record, expected = Record.load(tmp_path / "record.json"), finished()[1]
    assert record.plan.layers == expected.plan.layers
    assert record.accuracy == expected.accuracy
    assert {stage["device"] for stage in record.made.values()} == {NAME}
    assert {row.device for row in record.throughput} > {NAME}  # and the processor
    assert {row.precision for row in record.throughput if row.device == NAME} == {"float32", "bfloat16"}


REFUSED = {
    "a sum": lambda x: x + torch.ones(3),
    "a product in place": lambda x: x.mul_(torch.ones(3)),
    "a layer on the processor": nn.Linear(3, 2),
    "a concatenation": lambda x: torch.cat([x, torch.ones(1)]),
    "an index on the GPU": lambda x: torch.ones(3)[x > 0],
    "an assignment": lambda x: x.__setitem__(torch.tensor([0]), torch.ones(1)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_two_devices_are_refused(what):
    with PretendedGpu(), pytest.raises(RuntimeError, match="same device"):
        REFUSED[what](torch.ones(3, device="cuda"))


def test_numpy_is_refused():
    with PretendedGpu():
        x = torch.ones(3, device="cuda")
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert x.cpu().numpy().sum() == 3


def test_what_a_layer_computes_is_where_it_is():
    with PretendedGpu():
        layer = nn.Linear(3, 2).to("cuda")
        x = torch.ones(4, 3).to("cuda")
        output = layer(x * torch.tensor(2.0))  # a number may be anywhere
        output.sum().backward()
        places = [output, layer.weight.grad, x[torch.tensor([0])], torch.zeros_like(x), layer.state_dict()["weight"]]
        assert all(tensor.is_cuda for tensor in places)
        assert not x.to("cpu").is_cuda
