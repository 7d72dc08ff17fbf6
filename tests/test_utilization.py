import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from urank.subspaces import Spectrum, dimension_for_energy, error_bound, output_gram, project_weight, utilized_rank


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
    def test_whatever_the_data_projects_once_and_for_all(self, data, n, d, m, p, q, seed):
        """W' is d x m, of rank at most min(k_S, k_T), no larger than W, and its own projection."""
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
    def test_full_dimensions_leave_every_bit(self, d, m):
        X, W = gaussian(40, d), gaussian(d, m)
        assert torch.equal(project_weight(W, *spectra(X, W), d, m), W)

    @pytest.mark.parametrize(("p", "q"), [(1, 1), (2, 4), (4, 2), (6, 5)])
    def test_the_subspaces_of_the_data_lose_nothing(self, p, q):
        """X has rank p and W rank q, so S has p dimensions, T no more than min(p, q), and W' still maps X to XW."""
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
    def test_of_equal_singular_values_is_their_number(self, d, m):
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

    def test_the_whole_energy_never_asks_for_more_than_there_is(self):
        for _ in range(50):
            diagonal = torch.rand(30, dtype=torch.float64) + 0.1
            diagonal[20:] = 0
            assert utilized_rank(torch.diag(diagonal), 1.0) == 20

    def test_of_nothing_is_zero(self):
        assert utilized_rank(torch.zeros(4, 3)) == 0

    def test_takes_the_decision_in_float64(self):
        """In float32 the squares of 1e-25 are zero."""
        assert utilized_rank(1e-25 * torch.eye(3)) == 3

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_refuses_what_is_not_finite(self, value):
        W = torch.ones(4, 3)
        W[1, 2] = value
        with pytest.raises(FloatingPointError, match=r"\(4, 3\)"):
            utilized_rank(W)


class TestErrorBound:
    @settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @given(shape=st.tuples(st.integers(1, 30), sizes, sizes), ranks=st.tuples(sizes, sizes), e_s=shares, e_t=shares,
           scale=st.integers(-3, 3), seed=seeds)  # fmt: skip
    def test_is_exact_and_never_exceeded(self, shape, ranks, e_s, e_t, scale, seed):
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

    def test_is_met_where_the_data_is_worst(self):
        """One input direction outside S, stretched by all of ||W||_2: the bound is the error."""
        X = torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64))
        W = torch.eye(2, dtype=torch.float64) * 5
        found = error_bound(W, X.T @ X, 1, 2)
        assert (found.output_part, found.input_part, found.bound) == pytest.approx((0, 100, 100))

    def test_of_no_projection_is_zero(self):
        X, W = gaussian(20, 4), gaussian(4, 3)
        found = error_bound(W, X.T @ X, 4, 3)
        assert found.error == pytest.approx(0, abs=1e-20)
        assert found.bound == 0

    def test_takes_float32(self):
        X, W = gaussian(20, 4), gaussian(4, 3)
        single = error_bound(W.float(), (X.T @ X).float(), 2, 2)
        assert single.error == pytest.approx(error_bound(W, X.T @ X, 2, 2).error, rel=1e-4)

    @pytest.mark.parametrize(("k_s", "k_t"), [(5, 1), (1, 4), (-1, 1)])
    def test_refuses_a_dimension_out_of_range(self, k_s, k_t):
        with pytest.raises(ValueError, match="between 0 and"):
            error_bound(gaussian(4, 3), torch.eye(4), k_s, k_t)
