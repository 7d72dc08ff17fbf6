import naive
import pytest
import torch
import torch.nn.functional as F
from conftest import NETWORKS, in_batches, structured_images
from timm.layers import Conv2dSame
from torch import nn

from urank import calibration
from urank.calibration import accumulate_grams
from urank.conv_gram import patch_gram
from urank.subspaces import Spectrum


def orthonormal(n, k):
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q


def grams_with(model, batches, dtype):
    return accumulate_grams(model, batches, progress=False, product_dtype=dtype)


class TestAccumulateGrams:
    @pytest.mark.parametrize("name", ["cnn", "mlp", "residual"])
    def test_equals_the_explicit_products(self, name):
        build, size = NETWORKS[name]
        model = build().double()
        batches = in_batches(*structured_images(20, size), 8)
        grams, expected = accumulate_grams(model, batches, progress=False), naive.grams(model, batches)
        assert list(grams) == list(expected)
        for layer, gram in grams.items():
            assert gram.dtype == torch.float64
            torch.testing.assert_close(gram, torch.from_numpy(expected[layer]), rtol=1e-10, atol=1e-9)

    @pytest.mark.parametrize("size", [1, 7, 20])
    def test_does_not_depend_on_the_batch_size(self, size):
        model, (images, labels) = NETWORKS["cnn"][0]().double(), structured_images(20)
        whole = accumulate_grams(model, [images], progress=False)
        split = accumulate_grams(model, in_batches(images, labels, size), progress=False)
        for layer in whole:
            torch.testing.assert_close(split[layer], whole[layer], rtol=1e-10, atol=1e-9)

    def test_assembles_a_convolution_once_per_image_size(self, monkeypatch):
        written = []
        assemble = calibration.assemble_gram
        monkeypatch.setattr(calibration, "assemble_gram", lambda *args: (written.append(args[1]), assemble(*args))[1])
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
        sizes = [(6, 6), (6, 6), (6, 6), (5, 7), (5, 7), (6, 6)]
        batches = [torch.randn(2, 3, *size) for size in sizes]
        grams = accumulate_grams(model, batches, progress=False)
        assert written == [(6, 6), (5, 7), (6, 6)]
        expected = sum(patch_gram(model[0], images) for images in batches)
        torch.testing.assert_close(grams["0"], expected, rtol=1e-13, atol=1e-12)

    @pytest.mark.parametrize("name", ["cnn", "mlp"])
    def test_accepts_float32_products(self, name):
        build, size = NETWORKS[name]
        model = build().double()
        batches = in_batches(*structured_images(20, size), 8)
        exact = accumulate_grams(model, batches, progress=False)
        assert all(torch.equal(exact[layer], gram) for layer, gram in grams_with(model, batches, torch.float64).items())
        for layer, gram in grams_with(model, batches, torch.float32).items():
            assert gram.dtype == torch.float64
            assert 0 < (gram - exact[layer]).abs().max() < 1e-5 * exact[layer].abs().max()

    def test_uses_float32_products_on_devices_with_slow_float64(self, monkeypatch):
        layer, x = nn.Sequential(nn.Linear(5, 2)), torch.randn(30, 5)
        slow = lambda device: (device, torch.float32)  # noqa: E731
        monkeypatch.setattr(calibration, "statistics_precision", slow)
        single = accumulate_grams(layer, [x], progress=False)["0"]
        assert torch.equal(single, (x.T @ x).double())
        forced = accumulate_grams(layer, [x], progress=False, product_dtype=torch.float64)["0"]
        assert not torch.equal(forced, single)
        torch.testing.assert_close(forced, x.double().T @ x.double())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
    def test_refuses_products_of_another_precision(self, dtype):
        with pytest.raises(ValueError, match=f"float32 or torch.float64, got {dtype}"):
            grams_with(nn.Sequential(nn.Linear(3, 2)), [torch.randn(4, 3)], dtype)

    def test_returns_the_chosen_layers_in_forward_order(self):
        class Backwards(nn.Module):
            def __init__(self):
                super().__init__()
                self.last, self.middle, self.first = nn.Linear(4, 2), nn.Linear(5, 4), nn.Linear(3, 5)

            def forward(self, x):
                return self.last(self.middle(self.first(x)))

        model, x = Backwards(), torch.randn(6, 3)
        grams = accumulate_grams(model, [x], progress=False)
        assert list(grams) == ["first", "middle", "last"]
        some = accumulate_grams(model, [x], layers=["last", "first"], progress=False)
        assert list(some) == ["first", "last"]
        assert torch.equal(some["last"], grams["last"])

    def test_uses_evaluation_mode_and_leaves_the_network(self):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9), nn.Linear(3, 2)).train()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        x = torch.randn(10, 3) + 5
        X = x.double() / (1 + model[0].eps) ** 0.5  # the running statistics are still 0 and 1
        gram = accumulate_grams(model, [x], progress=False)["2"]
        torch.testing.assert_close(gram, X.T @ X, rtol=1e-5, atol=0)
        assert all(module.training for module in model.modules())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert not model[2]._forward_pre_hooks

    @pytest.mark.parametrize("kind", ["linear", "convolution"])
    def test_resolves_singular_values_over_eight_decades(self, kind):
        """The smallest has 1e-14 of the largest energy: float64 resolves it, float32 only 1e-7."""
        n, d = 200, 8
        sigma = 10.0 ** -torch.arange(d, dtype=torch.float64)
        X = orthonormal(n, d) * sigma @ orthonormal(d, d).T
        layer = nn.Linear(d, 3) if kind == "linear" else nn.Conv2d(d, 3, 1)
        x = X if kind == "linear" else X.reshape(2, 10, 10, d).permute(0, 3, 1, 2)
        model, batches = nn.Sequential(layer).double(), x.chunk(2)
        measured = Spectrum.of(accumulate_grams(model, batches, progress=False)["0"]).eigenvalues.sqrt()
        torch.testing.assert_close(measured, sigma, rtol=0.01, atol=0)
        single = Spectrum.of(sum(rows.float().T @ rows.float() for rows in X.chunk(2))).eigenvalues.sqrt()
        assert (single / sigma)[-1] > 10 or single[-1] == 0

    def test_refuses_numbers_whose_squares_overflow(self):
        model, x = nn.Sequential(nn.Linear(2, 2)), torch.tensor([[1e30, 1.0]])
        assert torch.isfinite(accumulate_grams(model, [x], progress=False)["0"]).all()
        with pytest.raises(FloatingPointError, match="layer '0'.*too large"):
            grams_with(model, [x], torch.float32)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("layer, shape", [(nn.Linear, (5, 3)), (lambda d, m: nn.Conv2d(d, m, 3), (2, 3, 9, 9))])
    def test_names_the_layer_whose_input_is_not_finite(self, layer, shape, value):
        model, x = nn.Sequential(layer(3, 4), layer(4, 4), layer(4, 2)), torch.randn(shape)
        with torch.no_grad():
            model[1].bias[0] = value
        with pytest.raises(FloatingPointError, match="layer '2'"):
            accumulate_grams(model, [x], progress=False)
        x.view(-1)[0] = value
        with pytest.raises(FloatingPointError, match="layer '0'"):
            accumulate_grams(model, [x], progress=False)
        assert not any(layer._forward_pre_hooks for layer in model)

    def test_sums_the_inputs_of_a_layer_that_runs_twice(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, x):
                return self.layer(self.layer(x).relu())

        model, x = Twice().double(), torch.randn(4, 3, dtype=torch.float64)
        X = torch.cat([x, model.layer(x).relu()]).detach()
        torch.testing.assert_close(accumulate_grams(model, [x], progress=False)["layer"], X.T @ X)

    def test_uses_the_padded_input_of_a_custom_forward(self):
        """timm's `Conv2dSame` pads by the image size: 9 x 8 gets 1 row above, 1 row below, 1 column on the right."""
        model = nn.Sequential(nn.Conv2d(3, 4, 1), Conv2dSame(4, 5, (3, 2), stride=2, dilation=(1, 2))).double()
        batches = [torch.randn(2, 3, 9, 8, dtype=torch.float64), torch.randn(2, 3, 6, 6, dtype=torch.float64)]
        expected = 0
        for x, border in zip(batches, [(0, 1, 1, 1), (0, 1, 0, 1)]):
            X = F.unfold(F.pad(model[0](x).detach(), border), (3, 2), dilation=(1, 2), stride=2).transpose(1, 2)
            X = X.flatten(0, 1)
            expected = expected + X.T @ X
            assert len(X) == model(x).shape[2:].numel() * len(x)
        torch.testing.assert_close(accumulate_grams(model, batches, progress=False)["1"], expected)

    def test_refuses_a_layer_that_never_runs(self):
        class Unused(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

            def forward(self, x):
                return self.used(x)

        with pytest.raises(ValueError, match="never multiplies .*: idle"):
            accumulate_grams(Unused(), [torch.randn(2, 3)], progress=False)
        assert list(accumulate_grams(Unused(), [torch.randn(2, 3)], layers=["used"], progress=False)) == ["used"]

    def test_refuses_an_empty_calibration_set(self):
        with pytest.raises(ValueError, match="no calibration images"):
            accumulate_grams(nn.Sequential(nn.Linear(3, 3)), [], progress=False)

    def test_refuses_an_unknown_layer(self):
        with pytest.raises(ValueError, match="no such matrix layer: 1, 7 .layers: 0"):
            accumulate_grams(nn.Sequential(nn.Linear(3, 3)), [torch.randn(2, 3)], ["7", "0", "1"], progress=False)

    def test_refuses_an_empty_choice_of_layers(self):
        with pytest.raises(ValueError, match="no layer"):
            accumulate_grams(nn.Sequential(nn.Linear(3, 3)), [torch.randn(2, 3)], layers=[], progress=False)

    def test_sees_a_layer_that_is_called_by_keyword(self):
        class Keyword(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 2)

            def forward(self, x):
                return self.layer(input=x)

        x = torch.randn(4, 3)
        gram = accumulate_grams(Keyword(), [x], progress=False)["layer"]
        torch.testing.assert_close(gram, x.double().T @ x.double())
