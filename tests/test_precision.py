import pytest
import torch
from torch import nn

from urank.layers import evaluating
from urank.precision import full_precision, ieee_float32

SETTINGS = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]


def precisions():
    return [setting.fp32_precision for setting in SETTINGS]


@pytest.fixture
def tf32():
    before = precisions()
    for setting in SETTINGS:
        setting.fp32_precision = "tf32"
    yield
    for setting, precision in zip(SETTINGS, before):
        setting.fp32_precision = precision


@pytest.mark.parametrize(
    "block", [ieee_float32, lambda: full_precision(torch.device("cpu")), lambda: evaluating(nn.Linear(2, 2))]
)
def test_float32_is_float32_inside_and_as_it_was_after(tf32, block):
    with block():
        assert precisions() == ["ieee"] * 3
    assert precisions() == ["tf32"] * 3
    with pytest.raises(KeyError), block():
        raise KeyError
    assert precisions() == ["tf32"] * 3


def test_full_precision_switches_autocast_off():
    with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
