import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NETWORKS, in_batches, structured_images
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn

from urank import calibration, subspaces
from urank.calibration import accumulate_grams
from urank.conv_gram import patch_gram
from urank.numerics import statistics_precision
from urank.subspaces import Spectrum, dimension_for_energy, gram_matrix, output_gram, projector


def raising(error):
    """A function that raises `error`, whatever it is given."""

    def fails(_):
        raise error

    return fails


def orthonormal(n, k):
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q


def spectrum(*eigenvalues):
    """The spectrum of a diagonal Gram matrix, without an eigensolver between it and the test."""
    return Spectrum(torch.tensor(eigenvalues, dtype=torch.float64), torch.eye(len(eigenvalues), dtype=torch.float64))


class TestGrams:
    @pytest.mark.parametrize("name", ["cnn", "mlp", "residual"])
    def test_are_the_explicit_products(self, name):
        build, size = NETWORKS[name]
        model = build().double()
        batches = in_batches(*structured_images(20, size), 8)
        grams, expected = accumulate_grams(model, batches, progress=False), naive.grams(model, batches)
        assert list(grams) == list(expected)
        for layer, gram in grams.items():
            assert gram.dtype == torch.float64
            torch.testing.assert_close(gram, torch.from_numpy(expected[layer]), rtol=1e-10, atol=1e-9)

    @pytest.mark.parametrize("size", [1, 7, 20])
    def test_do_not_depend_on_batches(self, size):
        model, (images, labels) = NETWORKS["cnn"][0]().double(), structured_images(20)
        whole = accumulate_grams(model, [images], progress=False)
        split = accumulate_grams(model, in_batches(images, labels, size), progress=False)
        for layer in whole:
            torch.testing.assert_close(split[layer], whole[layer], rtol=1e-10, atol=1e-9)

    def test_write_a_convolutions_matrix_once_while_the_images_keep_their_size(self, monkeypatch):
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
    def test_may_be_sums_of_float32_products(self, name):
        build, size = NETWORKS[name]
        model = build().double()
        batches = in_batches(*structured_images(20, size), 8)
        exact = accumulate_grams(model, batches, progress=False)
        assert all(torch.equal(exact[layer], gram) for layer, gram in grams_with(model, batches, torch.float64).items())
        for layer, gram in grams_with(model, batches, torch.float32).items():
            assert gram.dtype == torch.float64
            assert 0 < (gram - exact[layer]).abs().max() < 1e-5 * exact[layer].abs().max()

    def test_take_float32_products_where_the_device_has_slow_float64(self, monkeypatch):
        layer, x = nn.Sequential(nn.Linear(5, 2)), torch.randn(30, 5)
        slow = lambda device: (device, torch.float32)  # noqa: E731
        monkeypatch.setattr(calibration, "statistics_precision", slow)
        single = accumulate_grams(layer, [x], progress=False)["0"]
        assert torch.equal(single, (x.T @ x).double())
        forced = accumulate_grams(layer, [x], progress=False, product_dtype=torch.float64)["0"]
        assert not torch.equal(forced, single)
        torch.testing.assert_close(forced, x.double().T @ x.double())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
    def test_refuse_products_of_another_precision(self, dtype):
        with pytest.raises(ValueError, match=f"float32 or torch.float64, got {dtype}"):
            grams_with(nn.Sequential(nn.Linear(3, 2)), [torch.randn(4, 3)], dtype)

    def test_come_in_forward_order_of_the_layers_asked_for(self):
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

    def test_are_taken_in_evaluation_mode_and_leave_the_network_alone(self):
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
    def test_hold_singular_values_over_five_decades(self, kind):
        """The layer runs in float32; a product in float32 would lose what is below 1e-4 of the largest."""
        n, d = 200, 6
        sigma = 10.0 ** -torch.arange(d, dtype=torch.float64)
        X = (orthonormal(n, d) * sigma @ orthonormal(d, d).T).float()
        layer = nn.Linear(d, 3) if kind == "linear" else nn.Conv2d(d, 3, 1)
        x = X if kind == "linear" else X.reshape(2, 10, 10, d).permute(0, 3, 1, 2)
        true = torch.linalg.svdvals(X.double())

        measured = Spectrum.of(accumulate_grams(nn.Sequential(layer), [x], progress=False)["0"]).eigenvalues.sqrt()
        torch.testing.assert_close(measured, true, rtol=1e-4, atol=0)
        single = Spectrum.of(X.T @ X).eigenvalues.sqrt()
        assert (single - true).abs()[-1] > 0.5 * true[-1]

    @pytest.mark.parametrize("kind", ["linear", "convolution"])
    def test_hold_singular_values_over_eight_decades(self, kind):
        """The smallest has 1e-14 of the largest one's energy: float64 sees it, sums in float32 end at 1e-7."""
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

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_refuse_a_convolutions_input_that_is_not_finite_and_name_its_layer(self, value):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 3, stride=2))
        images = torch.randn(2, 3, 9, 9)
        with torch.no_grad():
            model[1].bias[0] = value
        with pytest.raises(FloatingPointError, match="layer '2'"):
            accumulate_grams(model, [images], progress=False)
        images[1, 2, 3, 4] = value
        with pytest.raises(FloatingPointError, match="layer '0'"):
            accumulate_grams(model, [images], progress=False)

    def test_refuse_numbers_that_float32_cannot_square(self):
        model, x = nn.Sequential(nn.Linear(2, 2)), torch.tensor([[1e30, 1.0]])
        assert torch.isfinite(accumulate_grams(model, [x], progress=False)["0"]).all()
        with pytest.raises(FloatingPointError, match="layer '0'.*too large"):
            grams_with(model, [x], torch.float32)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_refuse_an_input_that_is_not_finite_and_name_its_layer(self, value):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        with torch.no_grad():
            model[1].bias[0] = value
        with pytest.raises(FloatingPointError, match="layer '2'"):
            accumulate_grams(model, [torch.randn(5, 3)], progress=False)
        assert not any(layer._forward_pre_hooks for layer in model)

    def test_of_a_layer_that_runs_twice_are_of_both_its_inputs(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, x):
                return self.layer(self.layer(x).relu())

        model, x = Twice().double(), torch.randn(4, 3, dtype=torch.float64)
        X = torch.cat([x, model.layer(x).relu()]).detach()
        torch.testing.assert_close(accumulate_grams(model, [x], progress=False)["layer"], X.T @ X)

    def test_of_a_layer_with_a_forward_of_its_own_are_of_what_it_multiplies(self):
        """timm's `Conv2dSame` pads by the size of each image: 9 x 8 by 1 row above, 1 below and 1 column behind."""
        model = nn.Sequential(nn.Conv2d(3, 4, 1), Conv2dSame(4, 5, (3, 2), stride=2, dilation=(1, 2))).double()
        batches = [torch.randn(2, 3, 9, 8, dtype=torch.float64), torch.randn(2, 3, 6, 6, dtype=torch.float64)]
        expected = 0
        for x, border in zip(batches, [(0, 1, 1, 1), (0, 1, 0, 1)]):
            X = F.unfold(F.pad(model[0](x).detach(), border), (3, 2), dilation=(1, 2), stride=2).transpose(1, 2)
            X = X.flatten(0, 1)
            expected = expected + X.T @ X
            assert len(X) == model(x).shape[2:].numel() * len(x)
        torch.testing.assert_close(accumulate_grams(model, batches, progress=False)["1"], expected)

    def test_refuse_a_layer_that_never_runs_unless_it_is_left_out(self):
        class Unused(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

            def forward(self, x):
                return self.used(x)

        with pytest.raises(ValueError, match="never multiplies .*: idle"):
            accumulate_grams(Unused(), [torch.randn(2, 3)], progress=False)
        assert list(accumulate_grams(Unused(), [torch.randn(2, 3)], layers=["used"], progress=False)) == ["used"]

    def test_refuse_an_empty_set_of_batches(self):
        with pytest.raises(ValueError, match="no calibration images"):
            accumulate_grams(nn.Sequential(nn.Linear(3, 3)), [], progress=False)

    def test_refuse_an_unknown_layer(self):
        with pytest.raises(ValueError, match="no such matrix layer: 1, 7 .layers: 0"):
            accumulate_grams(nn.Sequential(nn.Linear(3, 3)), [torch.randn(2, 3)], ["7", "0", "1"], progress=False)

    def test_refuse_an_empty_choice_of_layers_for_what_it_is(self):
        with pytest.raises(ValueError, match="no layer"):
            accumulate_grams(nn.Sequential(nn.Linear(3, 3)), [torch.randn(2, 3)], layers=[], progress=False)

    def test_see_a_layer_that_is_called_by_keyword(self):
        class Keyword(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 2)

            def forward(self, x):
                return self.layer(input=x)

        x = torch.randn(4, 3)
        gram = accumulate_grams(Keyword(), [x], progress=False)["layer"]
        torch.testing.assert_close(gram, x.double().T @ x.double())


def grams_with(model, batches, dtype):
    return accumulate_grams(model, batches, progress=False, product_dtype=dtype)


class TestPrecision:
    @pytest.mark.parametrize(
        ("capability", "dtype"),
        [
            *[((major, 0), torch.float64) for major in (6, 7, 8, 9, 10)],
            *[(capability, torch.float32) for capability in [(6, 1), (7, 5), (8, 6), (8, 9), (10, 3), (12, 0)]],
        ],
    )
    def test_of_products_on_a_gpu_is_that_of_its_capability(self, capability, dtype, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert statistics_precision(torch.device("cuda:1")) == (torch.device("cuda:1"), dtype)

    @pytest.mark.parametrize("device", ["cpu", "mps"])
    def test_elsewhere_is_float64_on_the_cpu(self, device):
        assert statistics_precision(torch.device(device)) == (torch.device("cpu"), torch.float64)

    def test_blocks_of_rows_are_summed_in_float64(self, monkeypatch):
        """2^24 + 1 needs one bit more than float32 has."""
        X = torch.tensor([[2.0**12], [1.0]])
        assert gram_matrix(X, torch.float32).item() == 2**24
        monkeypatch.setattr(subspaces, "ROWS", 1)
        assert gram_matrix(X, torch.float32).item() == 2**24 + 1

    def test_float32_products_of_rows_are_never_tf32_nor_autocast(self, tf32_allowed, monkeypatch):
        X, seen, matmul = torch.randn(20, 6), set(), torch.backends.cuda.matmul
        multiply = torch.Tensor.__matmul__

        def spied(A, B):
            seen.add((A.dtype, matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
            return multiply(A, B)

        with monkeypatch.context() as patched, torch.autocast("cpu", dtype=torch.bfloat16):
            patched.setattr(torch.Tensor, "__matmul__", spied)
            gram_matrix(X, torch.float32)
        assert matmul.fp32_precision == "tf32"
        assert seen == {(torch.float32, "ieee", False)}


class TestSpectrum:
    @pytest.mark.parametrize(("n", "d"), [(50, 8), (3, 8), (1, 5), (1, 1)])
    def test_is_that_of_the_data(self, n, d):
        X = torch.randn(n, d, dtype=torch.float64)
        found = Spectrum.of(X.T @ X)
        squares = F.pad(torch.linalg.svdvals(X).square(), (0, d - min(n, d)))
        torch.testing.assert_close(found.eigenvalues, squares, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(d, dtype=torch.float64))
        torch.testing.assert_close(found.basis * found.eigenvalues @ found.basis.T, X.T @ X)

    @pytest.mark.parametrize("p", [1, 3, 7])
    def test_recovers_a_planted_subspace(self, p):
        d, V = 12, orthonormal(12, p)
        X = torch.randn(100, p, dtype=torch.float64) @ V.T
        found = Spectrum.of(X.T @ X)
        assert (found.eigenvalues >= 0).all()
        assert (found.eigenvalues.diff() <= 0).all()
        assert int((found.eigenvalues > 1e-9 * found.eigenvalues[0]).sum()) == p
        torch.testing.assert_close(projector(found, p), V @ V.T)
        torch.testing.assert_close(found.energy[p - 1 :], torch.ones(d - p + 1, dtype=torch.float64))

    def test_of_a_single_sample_is_one_direction(self):
        x = torch.tensor([[3.0, 0.0, 4.0]], dtype=torch.float64)
        found = Spectrum.of(x.T @ x)
        torch.testing.assert_close(found.eigenvalues, torch.tensor([25.0, 0, 0], dtype=torch.float64))
        torch.testing.assert_close(found.basis[:, 0].abs(), x[0] / 5)

    def test_of_nothing_but_zeros(self):
        found = Spectrum.of(torch.zeros(4, 4, dtype=torch.float64))
        assert torch.equal(found.eigenvalues, torch.zeros(4, dtype=torch.float64))
        assert torch.equal(found.energy, torch.ones(4, dtype=torch.float64))
        assert dimension_for_energy(found, 1.0) == 1

    def test_takes_the_symmetric_part_of_a_float32_matrix_in_float64(self):
        gram = torch.tensor([[2.0, 1.5], [0.5, 2.0]])
        found = Spectrum.of(gram)
        assert found.eigenvalues.dtype == torch.float64
        torch.testing.assert_close(found.eigenvalues, torch.tensor([3.0, 1.0], dtype=torch.float64))

    @pytest.mark.parametrize("error", [torch.linalg.LinAlgError, NotImplementedError])
    def test_says_when_numpy_has_to_do_what_torch_could_not(self, error, monkeypatch):
        X = torch.randn(20, 4, dtype=torch.float64)
        expected = Spectrum.of(X.T @ X)
        monkeypatch.setattr(torch.linalg, "eigh", raising(error("no convergence")))
        with pytest.warns(UserWarning, match=r"eigh of a 4 x 4 matrix failed on cpu.*\(no convergence\)"):
            found = Spectrum.of(X.T @ X)
        torch.testing.assert_close(found.eigenvalues, expected.eigenvalues)
        torch.testing.assert_close(found.basis.abs(), expected.basis.abs())  # an eigenvector's sign is free

    def test_of_features_that_are_mostly_zero(self):
        X = torch.randn(100, 288, dtype=torch.float64)
        X[:, torch.randperm(288)[14:]] = 0
        found = Spectrum.of(X.T @ X)
        torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(288, dtype=torch.float64))
        torch.testing.assert_close((found.basis * found.eigenvalues) @ found.basis.T, X.T @ X)
        assert found.eigenvalues[14:].count_nonzero() == 0 and (found.eigenvalues.diff() <= 0).all()

    def test_of_no_data_at_all(self):
        found = Spectrum.of(torch.zeros(3, 3))
        assert torch.equal(found.eigenvalues, torch.zeros(3).double()) and torch.equal(
            found.basis, torch.eye(3).double()
        )

    def test_that_no_solver_finds_is_an_error(self, monkeypatch):
        monkeypatch.setattr(torch.linalg, "eigh", raising(torch.linalg.LinAlgError("no convergence")))
        monkeypatch.setattr(np.linalg, "eigh", raising(np.linalg.LinAlgError("nor here")))
        with pytest.warns(UserWarning, match="failed"), pytest.raises(np.linalg.LinAlgError, match="nor here"):
            Spectrum.of(torch.eye(3))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_refuses_what_is_not_finite(self, value):
        gram = torch.eye(3)
        gram[0, 1] = value
        with pytest.raises(FloatingPointError, match=r"\(3, 3\)"):
            Spectrum.of(gram)


class TestDimensionForEnergy:
    @pytest.mark.parametrize(
        ("energy", "k"), [(0, 1), (0.1, 1), (0.5, 1), (0.5001, 2), (0.75, 2), (0.8, 3), (0.875, 3), (0.9, 4), (1, 4)]
    )
    def test_is_the_smallest_that_reaches_it(self, energy, k):
        assert dimension_for_energy(spectrum(4, 2, 1, 1), energy) == k

    @pytest.mark.parametrize(("energy", "k"), [(0.25, 1), (0.26, 2), (0.5, 2), (1, 4)])
    def test_ties_count_one_by_one(self, energy, k):
        assert dimension_for_energy(spectrum(1, 1, 1, 1), energy) == k

    def test_all_of_it_needs_no_empty_direction(self):
        assert dimension_for_energy(spectrum(3, 1, 0, 0), 1.0) == 2

    def test_all_of_it_needs_no_empty_direction_whatever_the_rounding(self):
        for _ in range(50):
            values = torch.rand(37, dtype=torch.float64).sort(descending=True).values.tolist()
            found = spectrum(*values, *[0.0] * 63)
            assert dimension_for_energy(found, 1.0) == 37
            assert found.energy[-1].item() == 1

    @pytest.mark.parametrize("energy", [-0.1, 1.0001, 99.99, float("nan")])
    def test_refuses_what_is_no_share(self, energy):
        with pytest.raises(ValueError, match="between 0 and 1"):
            dimension_for_energy(spectrum(1, 1), energy)


class TestProjector:
    @settings(max_examples=50, deadline=None, derandomize=True, database=None)
    @given(data=st.data(), n=st.integers(1, 12), rows=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
    def test_is_orthogonal_whatever_the_data(self, data, n, rows, seed):
        """P^2 = P = P^T, the trace is k, P_i P_j = P_min(i, j), and P and I - P share the energy out."""
        X = torch.randn(rows, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        i, j = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
        found = Spectrum.of(X.T @ X)
        P, Q = projector(found, i), projector(found, j)
        assert P.shape == (n, n)
        torch.testing.assert_close(P @ P, P)
        torch.testing.assert_close(P.T, P)
        torch.testing.assert_close(P @ Q, projector(found, min(i, j)))
        assert P.trace().item() == pytest.approx(i)
        inside, outside = (X @ P).square().sum(), (X - X @ P).square().sum()
        torch.testing.assert_close(inside + outside, X.square().sum())
        torch.testing.assert_close(inside, found.eigenvalues[:i].sum())

    @pytest.mark.parametrize("k", [0, 1, 4, 6])
    def test_is_orthogonal_and_of_rank_k(self, k):
        X = torch.randn(30, 6, dtype=torch.float64)
        found = Spectrum.of(X.T @ X)
        P = projector(found, k)
        torch.testing.assert_close(P @ P, P)
        torch.testing.assert_close(P, P.T)
        assert P.trace().item() == pytest.approx(k)
        torch.testing.assert_close((X @ P).square().sum(), found.eigenvalues[:k].sum())

    @pytest.mark.parametrize("k", [-1, 7])
    def test_refuses_a_dimension_out_of_range(self, k):
        with pytest.raises(ValueError, match="between 0 and 6"):
            projector(Spectrum.of(torch.eye(6)), k)


def test_output_gram_needs_no_second_pass():
    X, W = torch.randn(40, 7, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(output_gram(X.T @ X, W), (X @ W).T @ (X @ W))
