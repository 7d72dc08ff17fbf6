import pytest
import torch
from torch import nn

from urank import numerics
from urank.layers import evaluating
from urank.numerics import full_precision, has_fast_bfloat16, ieee_float32

CUDA = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
CPU = [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn]
SETTINGS, FAST = [*CUDA, *CPU], ["tf32"] * 3 + ["bf16"] * 3


def precisions():
    return [setting.fp32_precision for setting in SETTINGS]


@pytest.fixture
def fast():
    before = precisions()
    for setting, precision in zip(SETTINGS, FAST):
        setting.fp32_precision = precision
    yield
    for setting, precision in zip(SETTINGS, before):
        setting.fp32_precision = precision


@pytest.mark.parametrize(
    "block", [ieee_float32, lambda: full_precision(torch.device("cpu")), lambda: evaluating(nn.Linear(2, 2))]
)
def test_float32_is_exact_inside_and_restored_after(fast, block):
    with block():
        assert precisions() == ["ieee"] * 6
    assert precisions() == FAST
    with pytest.raises(KeyError), block():
        raise KeyError
    assert precisions() == FAST


@pytest.mark.parametrize("block", [lambda: full_precision(torch.device("cpu")), lambda: evaluating(nn.Linear(2, 2))])
def test_autocast_is_off_inside(block):
    with torch.autocast("cpu", torch.bfloat16), block():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    "known, fast",
    [
        ({}, False),  # older versions of torch report nothing
        (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=False), False),
        (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=True), True),
        (dict(cpu_name="AMD EPYC", avx512_bf16=True, amx_bf16=False), True),
        (dict(cpu_name="AMD EPYC", avx512_bf16=False, amx_bf16=False), False),
    ],
)
def test_processors_with_fast_bfloat16(known, fast, monkeypatch):
    monkeypatch.setattr(numerics, "processor", lambda: known)
    assert has_fast_bfloat16(torch.device("cpu")) is fast
    assert not has_fast_bfloat16(torch.device("meta"))
