import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from urank import subspaces
from urank.numerics import statistics_precision
from urank.subspaces import (
    Spectrum,
    dimension_for_energy,
    error_bound,
    gram_matrix,
    output_gram,
    project_weight,
    projector,
    share_outside_span,
    utilized_rank,
)


def raising(error):
    """A function that raises `error` for every argument."""

    def fails(_):
        raise error

    return fails


def orthonormal(n, k):
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q


def spectrum(*eigenvalues):
    """The spectrum of a diagonal Gram matrix, made without an eigensolver."""
    return Spectrum(torch.tensor(eigenvalues, dtype=torch.float64), torch.eye(len(eigenvalues), dtype=torch.float64))


class TestPrecision:
    @pytest.mark.parametrize(
        ("capability", "dtype"),
        [
            *[((major, 0), torch.float64) for major in (6, 7, 8, 9, 10)],
            *[(capability, torch.float32) for capability in [(6, 1), (7, 5), (8, 6), (8, 9), (10, 3), (12, 0)]],
        ],
    )
    def test_of_products_on_a_gpu_depends_on_its_capability(self, capability, dtype, monkeypatch):
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
    def test_equals_the_squared_singular_values_of_the_data(self, n, d):
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

    def test_of_a_single_sample_has_one_direction(self):
        x = torch.tensor([[3.0, 0.0, 4.0]], dtype=torch.float64)
        found = Spectrum.of(x.T @ x)
        torch.testing.assert_close(found.eigenvalues, torch.tensor([25.0, 0, 0], dtype=torch.float64))
        torch.testing.assert_close(found.basis[:, 0].abs(), x[0] / 5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_of_zeros(self, dtype):
        found = Spectrum.of(torch.zeros(4, 4, dtype=dtype))
        assert torch.equal(found.eigenvalues, torch.zeros(4, dtype=torch.float64))
        assert torch.equal(found.basis, torch.eye(4, dtype=torch.float64))
        assert torch.equal(found.energy, torch.ones(4, dtype=torch.float64))
        assert dimension_for_energy(found, 1.0) == 1

    def test_uses_the_symmetric_part_in_float64(self):
        gram = torch.tensor([[2.0, 1.5], [0.5, 2.0]])
        found = Spectrum.of(gram)
        assert found.eigenvalues.dtype == torch.float64
        torch.testing.assert_close(found.eigenvalues, torch.tensor([3.0, 1.0], dtype=torch.float64))

    @pytest.mark.parametrize("error", [torch.linalg.LinAlgError, NotImplementedError])
    def test_falls_back_to_numpy_with_a_warning(self, error, monkeypatch):
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

    def test_raises_if_every_solver_fails(self, monkeypatch):
        monkeypatch.setattr(torch.linalg, "eigh", raising(torch.linalg.LinAlgError("no convergence")))
        monkeypatch.setattr(np.linalg, "eigh", raising(np.linalg.LinAlgError("nor here")))
        with pytest.warns(UserWarning, match="failed"), pytest.raises(np.linalg.LinAlgError, match="nor here"):
            Spectrum.of(torch.eye(3))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_refuses_numbers_that_are_not_finite(self, value):
        gram = torch.eye(3)
        gram[0, 1] = value
        with pytest.raises(FloatingPointError, match=r"\(3, 3\)"):
            Spectrum.of(gram)


class TestDimensionForEnergy:
    @pytest.mark.parametrize(
        ("energy", "k"), [(0, 1), (0.1, 1), (0.5, 1), (0.5001, 2), (0.75, 2), (0.8, 3), (0.875, 3), (0.9, 4), (1, 4)]
    )
    def test_is_the_smallest_dimension_that_holds_the_energy(self, energy, k):
        assert dimension_for_energy(spectrum(4, 2, 1, 1), energy) == k

    @pytest.mark.parametrize(("energy", "k"), [(0.25, 1), (0.26, 2), (0.5, 2), (1, 4)])
    def test_counts_equal_directions_one_by_one(self, energy, k):
        assert dimension_for_energy(spectrum(1, 1, 1, 1), energy) == k

    def test_the_whole_energy_needs_no_empty_direction(self):
        assert dimension_for_energy(spectrum(3, 1, 0, 0), 1.0) == 2

    def test_the_whole_energy_needs_no_empty_direction_after_rounding(self):
        for _ in range(50):
            values = torch.rand(37, dtype=torch.float64).sort(descending=True).values.tolist()
            found = spectrum(*values, *[0.0] * 63)
            assert dimension_for_energy(found, 1.0) == 37
            assert found.energy[-1].item() == 1

    @pytest.mark.parametrize("energy", [-0.1, 1.0001, 99.99, float("nan")])
    def test_refuses_an_energy_outside_0_to_1(self, energy):
        with pytest.raises(ValueError, match="between 0 and 1"):
            dimension_for_energy(spectrum(1, 1), energy)


class TestProjector:
    @settings(max_examples=50, deadline=None, derandomize=True, database=None)
    @given(data=st.data(), n=st.integers(1, 12), rows=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
    def test_is_an_orthogonal_projection(self, data, n, rows, seed):
        """P^2 = P = P^T, trace P_k = k, P_i P_j = P_min(i, j); P and I - P split the energy."""
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

    @pytest.mark.parametrize("k", [-1, 7])
    def test_refuses_a_dimension_out_of_range(self, k):
        with pytest.raises(ValueError, match="between 0 and 6"):
            projector(Spectrum.of(torch.eye(6)), k)


def test_output_gram_needs_no_second_pass():
    X, W = torch.randn(40, 7, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(output_gram(X.T @ X, W), (X @ W).T @ (X @ W))


def gaussian(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def of_rank(n, d, p):
    """A random (n, d) matrix of rank p."""
    return gaussian(n, p) @ gaussian(p, d)


def spectra(X, W):
    gram = X.T @ X
    return Spectrum.of(gram), Spectrum.of(output_gram(gram, W))


sizes = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)
shares = st.floats(0, 1)


class TestProjectWeight:
    @settings(max_examples=50, deadline=None, derandomize=True, database=None)
    @given(data=st.data(), n=st.integers(1, 30), d=sizes, m=sizes, p=sizes, q=sizes, seed=seeds)
    def test_is_idempotent(self, data, n, d, m, p, q, seed):
        """W' is d x m, has rank at most min(k_S, k_T), is no larger than W, and equals its own projection."""
        torch.manual_seed(seed)
        X, W = of_rank(n, d, p), of_rank(d, m, q)
        k_s, k_t = data.draw(st.integers(1, d)), data.draw(st.integers(1, m))
        sides = spectra(X, W)
        projected = project_weight(W, *sides, k_s, k_t)
        assert projected.shape == (d, m)
        assert utilized_rank(projected, 1 - 1e-12) <= min(k_s, k_t, utilized_rank(W, 1 - 1e-12))
        assert torch.linalg.matrix_norm(projected) <= torch.linalg.matrix_norm(W) * (1 + 1e-12)
        torch.testing.assert_close(project_weight(projected, *sides, k_s, k_t), projected)
        torch.testing.assert_close(project_weight(projected, *sides, d, m), projected)

    @pytest.mark.parametrize(("d", "m"), [(5, 3), (3, 5), (1, 1)])
    def test_full_dimensions_leave_the_weight_bit_for_bit(self, d, m):
        X, W = gaussian(40, d), gaussian(d, m)
        assert torch.equal(project_weight(W, *spectra(X, W), d, m), W)

    @pytest.mark.parametrize(("p", "q"), [(1, 1), (2, 4), (4, 2), (6, 5)])
    def test_the_subspaces_of_the_data_keep_the_outputs(self, p, q):
        """If X has rank p and W rank q, then k_S = p and k_T = min(p, q) leave XW unchanged."""
        d, m = 9, 7
        X, W = of_rank(60, d, p), of_rank(d, m, q)
        projected = project_weight(W, *spectra(X, W), p, min(p, q))
        torch.testing.assert_close(X @ projected, X @ W)
        assert utilized_rank(projected, 1 - 1e-12) == min(p, q)
        assert not torch.allclose(projected, W)

    @pytest.mark.parametrize(("k_s", "k_t"), [(1, 7), (9, 1), (4, 3), (2, 5)])
    def test_is_the_product_of_projectors(self, k_s, k_t):
        X, W = gaussian(60, 9), gaussian(9, 7)
        projected = project_weight(W, *spectra(X, W), k_s, k_t)
        expected = naive.project(W.numpy(), (X.T @ X).numpy(), k_s, k_t)
        torch.testing.assert_close(projected, torch.from_numpy(expected))
        assert torch.linalg.matrix_rank(projected) == min(k_s, k_t)

    def test_leaves_its_argument_alone(self):
        X, W = gaussian(60, 5), gaussian(5, 4)
        before = W.clone()
        project_weight(W, *spectra(X, W), 2, 2)
        assert torch.equal(W, before)

    @pytest.mark.parametrize(("k_s", "k_t"), [(0, 1), (1, 0), (6, 1), (1, 5), (-1, 1)])
    def test_refuses_a_dimension_out_of_range(self, k_s, k_t):
        X, W = gaussian(60, 5), gaussian(5, 4)
        with pytest.raises(ValueError, match=f"5 x 4.*got {k_s} and {k_t}"):
            project_weight(W, *spectra(X, W), k_s, k_t)


class TestUtilizedRank:
    @pytest.mark.parametrize(("d", "m"), [(8, 5), (5, 8), (1, 4)])
    def test_counts_equal_singular_values(self, d, m):
        for r in range(1, min(d, m) + 1):
            U, V = torch.linalg.qr(gaussian(d, d)).Q[:, :r], torch.linalg.qr(gaussian(m, m)).Q[:, :r]
            assert utilized_rank(U @ V.T) == r
            assert utilized_rank(1e-30 * U @ V.T) == r

    @pytest.mark.parametrize(("share", "rank"), [(0.99e-4, 1), (1.01e-4, 2)])
    def test_counts_up_to_99_99_percent_of_the_energy(self, share, rank):
        sigma = torch.tensor([1 - share, share], dtype=torch.float64).sqrt()
        assert utilized_rank(torch.diag(sigma)) == rank
        assert utilized_rank(torch.diag(sigma).flip(0)) == rank

    @pytest.mark.parametrize(("energy", "rank"), [(0.0, 1), (0.5, 1), (0.51, 2), (0.9, 4)])
    def test_other_energies(self, energy, rank):
        assert utilized_rank(torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]).sqrt()), energy) == rank

    def test_the_whole_energy_counts_only_nonzero_singular_values(self):
        for _ in range(50):
            diagonal = torch.rand(30, dtype=torch.float64) + 0.1
            diagonal[20:] = 0
            assert utilized_rank(torch.diag(diagonal), 1.0) == 20

    def test_of_zeros_is_zero(self):
        assert utilized_rank(torch.zeros(4, 3)) == 0

    def test_is_computed_in_float64(self):
        """In float32 the square of 1e-25 is zero."""
        assert utilized_rank(1e-25 * torch.eye(3)) == 3

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_refuses_numbers_that_are_not_finite(self, value):
        W = torch.ones(4, 3)
        W[1, 2] = value
        with pytest.raises(FloatingPointError, match=r"\(4, 3\)"):
            utilized_rank(W)


class TestErrorBound:
    @settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @given(shape=st.tuples(st.integers(1, 30), sizes, sizes), ranks=st.tuples(sizes, sizes), e_s=shares, e_t=shares,
           scale=st.integers(-3, 3), seed=seeds)  # fmt: skip
    def test_equals_the_error_and_is_never_exceeded(self, shape, ranks, e_s, e_t, scale, seed):
        torch.manual_seed(seed)
        (n, d, m), (p, q) = shape, ranks
        X, W = of_rank(n, d, p) * 10.0**scale, of_rank(d, m, q)
        gram, Y = X.T @ X, X @ W
        inputs, outputs = spectra(X, W)
        k_s, k_t = dimension_for_energy(inputs, e_s), dimension_for_energy(outputs, e_t)
        found = error_bound(W, gram, k_s, k_t)

        error = (Y - X @ project_weight(W, inputs, outputs, k_s, k_t)).square().sum().item()
        total = X.square().sum().item() * torch.linalg.matrix_norm(W, 2).item() ** 2  # at least ||Y||^2
        rounding = 1e-9 * total
        assert found.error == found.output_part + found.input_part
        assert found.error == pytest.approx(error, abs=rounding)
        assert found.error <= found.bound + rounding
        assert found.bound <= (1 - e_t) * Y.square().sum().item() + (1 - e_s) * total + rounding
        reference = naive.bound(X.numpy(), W.numpy(), k_s, k_t)
        for name, value in reference.items():
            assert getattr(found, name) == pytest.approx(value, abs=rounding), name

    def test_is_reached_in_the_worst_case(self):
        """One input direction outside S, scaled by ||W||_2: the bound equals the error."""
        X = torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64))
        W = torch.eye(2, dtype=torch.float64) * 5
        found = error_bound(W, X.T @ X, 1, 2)
        assert (found.output_part, found.input_part, found.bound) == pytest.approx((0, 100, 100))

    def test_of_no_projection_is_zero(self):
        X, W = gaussian(20, 4), gaussian(4, 3)
        found = error_bound(W, X.T @ X, 4, 3)
        assert found.error == pytest.approx(0, abs=1e-20)
        assert found.bound == 0

    def test_accepts_float32(self):
        X, W = gaussian(20, 4), gaussian(4, 3)
        single = error_bound(W.float(), (X.T @ X).float(), 2, 2)
        assert single.error == pytest.approx(error_bound(W, X.T @ X, 2, 2).error, rel=1e-4)

    @pytest.mark.parametrize(("k_s", "k_t"), [(5, 1), (1, 4), (-1, 1)])
    def test_refuses_a_dimension_out_of_range(self, k_s, k_t):
        with pytest.raises(ValueError, match="between 0 and"):
            error_bound(gaussian(4, 3), torch.eye(4), k_s, k_t)


class TestShareOutsideSpan:
    @pytest.mark.parametrize(("d", "m"), [(4, 16), (4, 4), (9, 4)])
    def test_the_identity_stays_inside(self, d, m):
        X, W = torch.randn(50, d, dtype=torch.float64), torch.randn(d, m, dtype=torch.float64)
        assert share_outside_span(X @ W, W) < 1e-12

    @pytest.mark.parametrize(("d", "m"), [(4, 4), (9, 4)])
    def test_nothing_leaves_the_span_of_a_square_or_narrowing_matrix(self, d, m):
        X, W = torch.randn(50, d), torch.randn(d, m)
        assert share_outside_span((X @ W).relu(), W) < 1e-6

    def test_of_a_relu_behind_a_random_widening_matrix(self):
        """relu(z) = (z + |z|) / 2, and |z| is independent of z apart from its size: half the energy is outside."""
        X, W = torch.randn(2000, 64, dtype=torch.float64), torch.randn(64, 6400, dtype=torch.float64)
        assert share_outside_span((X @ W).relu(), W) == pytest.approx(0.5, abs=0.01)

    def test_a_matrix_of_lower_rank_spans_less(self):
        W = torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
        H = torch.randn(1000, 6, dtype=torch.float64)
        assert share_outside_span(H, W) == pytest.approx(4 / 6, abs=0.05)
