from dataclasses import replace

import pytest
import torch
from torch import nn

from urank import datasets
from urank.deadline import OutOfTime
from urank.training.cuda_graph import CapturedFunction, restored
from urank.training.fitting import fit
from urank.training.recipe import Recipe

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
RECIPE = Recipe(epochs=3, batch_size=50, lr=0.05, crop=2, precision="float32", ema_decay=0.5)


def network():
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(2048, 10))


def assert_close(one, other):
    """Compare up to the difference of two plain fits on a GPU, where the order of cuDNN's sums varies."""
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], tensor, rtol=0.05, atol=0.01)


def test_undone_restores_the_given_tensors():
    kept, other = torch.ones(3), torch.ones(3)
    with restored([kept]):
        kept.add_(1)
        other.add_(1)
    assert kept.tolist() == [1.0] * 3 and other.tolist() == [2.0] * 3


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits10", train=530, test=20)


@on_a_gpu
class TestOnAGpu:
    def test_returns_the_results_of_each_batch(self):
        count = torch.zeros((), device="cuda")
        double = CapturedFunction(lambda x: (2 * x, count.add_(1)), [torch.zeros(3, device="cuda")], [count])
        for value in (1.0, 5.0):
            doubled, _ = double(torch.full((3,), value, device="cuda"))
            assert doubled.tolist() == [2 * value] * 3
        assert count.item() == 2  # the calls before the capture have no effect

    @pytest.mark.parametrize("part", ["", "4"])
    def test_gives_the_same_fit(self, digits, part):
        plain, captured = network(), network()
        options = dict(device="cuda", part=part, progress=False)
        history = fit(plain, digits, RECIPE, **options)
        same = fit(captured, digits, replace(RECIPE, capture=True), **options)
        assert [row["loss"] for row in same] == pytest.approx([row["loss"] for row in history], rel=1e-2)
        assert_close(captured, plain)

    def test_dropout_differs_between_batches(self, digits):
        torch.manual_seed(0)
        drops, ones = nn.Dropout(), torch.ones(1000, device="cuda")
        captured = CapturedFunction(lambda x: (drops(x),), [ones], [])
        assert not torch.equal(captured(ones)[0].clone(), captured(ones)[0])

    def test_resumes_a_fit_that_was_not_captured(self, digits, tmp_path):
        whole, rest = network(), network()
        fit(whole, digits, replace(RECIPE, capture=True), device="cuda", progress=False)
        options = dict(device="cuda", progress=False, checkpoint=tmp_path / "fit.ckpt")
        with pytest.raises(OutOfTime):
            fit(rest, digits, RECIPE, deadline=0.0, **options)
        fit(rest, digits, replace(RECIPE, capture=True), **options)
        assert_close(rest, whole)

    def test_code_that_waits_for_the_gpu_is_refused(self):
        stream = torch.cuda.current_stream()
        with pytest.raises(RuntimeError):
            CapturedFunction(lambda x: (x * x.sum().item(),), [torch.ones(3, device="cuda")], [])
        assert torch.cuda.current_stream() == stream
