"""Every formula of arXiv 2407.04797, in the order of the paper.

Row vectors throughout: X (samples, d) holds a layer's inputs, W (d, m) its weight, Y = X W its outputs.

    Gram matrix            X^T X,  Y^T Y = W^T (X^T X) W                 gram_matrix, output_gram   sections 2.1, 5.2
    spectrum               X^T X = V diag(sigma^2) V^T                   Spectrum                   section 2.1
    spectral energy        e_k = sum_{i<=k} sigma_i^2 / sum sigma_i^2    spectral_energy            section 2.1
    dimension for energy   min {k : e_k >= e}                            dimension_for_energy       section 2.1
    projector              P = V_k V_k^T                                 projector                  eqs. 3-5
    projected weight       W' = P_S W P_T                                project_weight             eqs. 6-9
    error bound            ||XW - XW'||_F^2 <= ...                       error_bound                eqs. 10-30
    utilized rank          r = min {k : e_k(W') >= 0.9999}               utilized_rank              sections 2.3, 3
    utilization            u = r / min(d, m)                             utilization                section 2.3
    MLU                    mean of u over all layers                     mean_layer_utilization     section 2.3
    tied matrix            W' = P_{S_1 + T_2} W P_{T_1 + S_2}            project_tied_weight        ours
    share outside span     1 - ||H P||_F^2 / ||H||_F^2                   share_outside_span         ours

Activations are never stored. With X = U Sigma V^T the Gram matrix X^T X is V Sigma^2 V^T: its eigenvectors are a basis
of the input subspace S, and its eigenvalues are the squared singular values of X.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from urank.numerics import eigh, full_precision, singular_values, statistics_precision

RANK_ENERGY = 0.9999  # share of the spectral energy that counts towards a rank; the rest is numerical noise (section 3)
ROWS = 4096  # rows multiplied at a time: the floating-point error of float32 products grows with their number


def gram_matrix(X: Tensor, product_dtype: torch.dtype = torch.float64) -> Tensor:
    """Return X^T X (d, d) of rows X (samples, d) in float64.

    Args:
        product_dtype: precision of the products; their sum over blocks of rows is always float64.

    >>> gram_matrix(torch.tensor([[1.0, 2.0], [2.0, 3.0]])).tolist()
    [[5.0, 8.0], [8.0, 13.0]]
    """
    gram = X.new_zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    with full_precision(X.device):
        for rows in X.split(ROWS):
            rows = rows.to(product_dtype)
            gram += rows.T @ rows
    return gram


def output_gram(gram: Tensor, W: Tensor) -> Tensor:
    """Return Y^T Y = W^T (X^T X) W, (m, m), from X^T X (d, d) and W (d, m) (section 5.2).

    >>> X, W = torch.randn(50, 4), torch.randn(4, 3)
    >>> torch.allclose(output_gram(X.T @ X, W), (X @ W).T @ (X @ W), rtol=1e-4)
    True
    """
    return W.T @ gram @ W


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues (n,) and eigenvectors (n, n) of a Gram matrix, in descending order.

    Attributes:
        eigenvalues: squared singular values of the data, in the squared units of the data; never negative.
        basis: eigenvectors as columns.

    >>> Spectrum.of(torch.diag(torch.tensor([1.0, 3.0]))).energy.tolist()
    [0.75, 1.0]
    """

    eigenvalues: Tensor
    basis: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> "Spectrum":
        """Decompose a Gram matrix (n, n) in float64, on the CPU if its device has no float64.

        Warns:
            UserWarning: torch's eigensolver failed on the device; NumPy's result on the CPU was used.

        Raises:
            FloatingPointError: the matrix contains NaN or infinity.
            numpy.linalg.LinAlgError: NumPy's eigensolver failed as well.
        """
        if not torch.isfinite(gram).all():
            raise FloatingPointError(f"a Gram matrix of shape {tuple(gram.shape)} contains NaN or infinity")
        device, _ = statistics_precision(gram.device)
        gram = gram.to(device).double()
        gram = (gram + gram.T) / 2
        # A feature that is always 0 is an eigenvector with eigenvalue 0: solve for the other features only.
        alive = gram.any(dim=1)
        k, eigenvalues, basis = int(alive.sum()), gram.new_zeros(len(gram)), torch.zeros_like(gram)
        values, vectors = eigh(gram[alive][:, alive])
        # A Gram matrix has no negative eigenvalues: a negative result is a rounded zero.
        eigenvalues[:k], basis[alive, :k] = values.flip(0).clamp_min(0), vectors.flip(1)
        basis[~alive, k:] = torch.eye(len(gram) - k, dtype=gram.dtype, device=gram.device)
        return cls(eigenvalues, basis)

    @property
    def energy(self) -> Tensor:
        """Share (n,) of the spectral energy in the first k = 1..n directions; all ones if the data are all zero."""
        return spectral_energy(self.eigenvalues)


def layer_spectra(gram: Tensor, W: Tensor) -> tuple[Spectrum, Spectrum]:
    """Return the spectra of X^T X and Y^T Y from X^T X (d, d) and W (d, m), in W's precision and on W's device."""
    gram = gram.to(W)
    return Spectrum.of(gram), Spectrum.of(output_gram(gram, W))


def spectral_energy(squares: Tensor) -> Tensor:
    """Return e_k (n,), k = 1..n: cumulative sum over total of squared singular values in descending order.

    All ones if the total is 0.

    >>> spectral_energy(torch.tensor([3.0, 1.0])).tolist()
    [0.75, 1.0]
    """
    sums = squares.cumsum(0)
    return sums / sums[-1] if sums[-1] > 0 else torch.ones_like(squares)


def dimension_for_energy(spectrum: Spectrum, energy: float) -> int:
    """Return the smallest number of leading directions that hold the share `energy` of the spectral energy.

    >>> dimension_for_energy(Spectrum.of(torch.diag(torch.tensor([1.0, 3.0]))), 0.7)
    1

    Raises:
        ValueError: `energy` is not between 0 and 1.
    """
    if not 0 <= energy <= 1:
        raise ValueError(f"energy must be between 0 and 1, got {energy}")
    return int((spectrum.energy < energy).sum()) + 1


def projector(spectrum: Spectrum, k: int) -> Tensor:
    """Return P = V_k V_k^T (n, n), the orthogonal projector onto the first k directions (eqs. 3-5).

    >>> projector(Spectrum.of(torch.diag(torch.tensor([1.0, 3.0]))), 1).tolist()
    [[0.0, 0.0], [0.0, 1.0]]

    Raises:
        ValueError: k is not between 0 and n.
    """
    if not 0 <= k <= len(spectrum.eigenvalues):
        raise ValueError(f"k must be between 0 and {len(spectrum.eigenvalues)}, got {k}")
    V = spectrum.basis[:, :k]
    return V @ V.T


def project_weight(W: Tensor, inputs: Spectrum, outputs: Spectrum, k_s: int, k_t: int) -> Tensor:
    """Return W' = P_S W P_T (d, m) (eqs. 6-9); a side with its full dimension is not projected.

    Args:
        W: (d, m), float64.
        inputs, outputs: spectra of X^T X (d, d) and of Y^T Y (m, m).
        k_s, k_t: dimensions of S (1..d) and of T (1..m).

    >>> X, W = torch.randn(50, 4), torch.randn(4, 3, dtype=torch.float64)
    >>> inputs, outputs = layer_spectra(gram_matrix(X), W)
    >>> project_weight(W, inputs, outputs, k_s=4, k_t=1).shape
    torch.Size([4, 3])

    Raises:
        ValueError: a dimension is out of range.
    """
    d, m = W.shape
    if not (1 <= k_s <= d and 1 <= k_t <= m):
        raise ValueError(f"W is {d} x {m}: needs 1 <= k_S <= {d} and 1 <= k_T <= {m}, got {k_s} and {k_t}")
    if k_s < d:
        V = inputs.basis[:, :k_s]
        W = V @ (V.T @ W)
    if k_t < m:
        V = outputs.basis[:, :k_t]
        W = (W @ V) @ V.T
    return W


def project_tied_weight(W: Tensor, S_1: Tensor, T_1: Tensor, S_2: Tensor, T_2: Tensor) -> Tensor:
    """Return one W' (d, m) for a matrix that is used twice, Y_1 = X_1 W and Y_2 = X_2 W^T (ours, for arXiv 2401.16438).

    The second use has its inputs where the first has its outputs. W' = P_S W P_T with the sums of subspaces
    S = S_1 + T_2 and T = T_1 + S_2 keeps what both uses need: P_S and P_T contain the projectors of either use, so the
    `error_bound` of each use holds with its own dimensions. If W' = A B has rank r, the two uses are X_1 A B and
    X_2 B^T A^T: the matrix is factored without untying, and that saves weights if r (d + m) < d m.

    Args:
        W: (d, m).
        S_1, T_2: orthonormal bases (d, k) of the inputs of the first and the outputs of the second use.
        T_1, S_2: orthonormal bases (m, k) of the outputs of the first and the inputs of the second use.

    >>> W, I = torch.randn(4, 3), torch.eye(4)
    >>> project_tied_weight(W, I[:, :1], I[:3, :2], I[:3, :1], I[:, 1:2])[:, 2].tolist()  # outside T_1 + S_2
    [0.0, 0.0, 0.0, 0.0]
    """
    S, T = sum_of_subspaces(S_1, T_2), sum_of_subspaces(T_1, S_2)
    return S @ (S.T @ W @ T) @ T.T


def sum_of_subspaces(*bases: Tensor) -> Tensor:
    """Return an orthonormal basis (n, k) of the sum of the subspaces with these orthonormal bases (n, k_i).

    A direction of one subspace counts as part of another if the angle between them is below about 1e-6.

    >>> I = torch.eye(3)
    >>> sum_of_subspaces(I[:, :2], I[:, 1:2]).shape
    torch.Size([3, 2])
    """
    U, sigma, _ = torch.linalg.svd(torch.cat(bases, 1), full_matrices=False)
    return U[:, sigma > 1e-6]


def share_outside_span(H: Tensor, W: Tensor) -> float:
    """Return the share of ||H||_F^2 outside the span of the outputs of W (d, m), between 0 and 1.

    H (samples, m) is a function of outputs, H = F(X W). The span of all outputs X W is the row space of W. If it is all
    of R^m, which needs m <= d, the share is 0 whatever F is.

    >>> W = torch.tensor([[1.0, 1.0]])
    >>> round(share_outside_span(torch.tensor([[3.0, 3.0], [0.0, 2.0]]), W), 3)  # (0, 2) = (1, 1) + (-1, 1)
    0.091
    """
    _, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    span = Vh[sigma > sigma[0] * max(W.shape) * torch.finfo(torch.float64).eps]
    H = H.double()
    return (1 - (H @ span.T).square().sum() / H.square().sum()).clamp_min(0).item()


@dataclass(frozen=True)
class ErrorBound:
    """Squared Frobenius norms of the error XW - XW', in the squared units of Y.

    Attributes:
        output_part: ||Y P_T'||_F^2, the error outside T.
        input_part: ||X P_S' W P_T||_F^2, the error outside S.
        bound: upper bound of their sum.
    """

    output_part: float
    input_part: float
    bound: float

    @property
    def error(self) -> float:
        """||XW - XW'||_F^2: the two parts are orthogonal, so they add up."""
        return self.output_part + self.input_part


def error_bound(W: Tensor, gram: Tensor, k_s: int, k_t: int) -> ErrorBound:
    """Return the exact error of W' = P_S W P_T on the calibration data and its bound (eqs. 10-30).

    With P' = I - P,

        XW - XW' = X W P_T' + X P_S' W P_T.

    The rows of the first term are orthogonal to T and those of the second lie in T, so the squared norms add up. The
    first is the output energy outside T, (1 - e_T) ||Y||_F^2. The second is at most (1 - e_S) ||X||_F^2 ||W||_2^2,
    because X P_S' has the input energy outside S and W P_T stretches no row by more than ||W||_2. The paper bounds it
    with Frobenius norms; the spectral norm is never larger.

    Args:
        W: (d, m).
        gram: X^T X, (d, d).
        k_s, k_t: dimensions of S (1..d) and of T (1..m).

    >>> X, W = torch.randn(50, 4), torch.randn(4, 3)
    >>> bound = error_bound(W, X.T @ X, k_s=3, k_t=2)
    >>> bound.error <= bound.bound
    True
    """
    W, gram = W.double(), gram.double()
    inputs, outputs = layer_spectra(gram, W)
    outside_s = torch.eye(len(gram), dtype=W.dtype, device=gram.device) - projector(inputs, k_s)
    lost = outside_s @ W @ projector(outputs, k_t)
    output_loss = outputs.eigenvalues[k_t:].sum()  # (1 - e_T) ||Y||^2
    input_loss = inputs.eigenvalues[k_s:].sum()  # (1 - e_S) ||X||^2
    stretch = torch.linalg.matrix_norm(W, 2).square()
    return ErrorBound(
        output_part=output_loss.item(),
        input_part=(lost * (gram @ lost)).sum().clamp_min(0).item(),
        bound=(output_loss + input_loss * stretch).item(),
    )


def utilized_rank(W: Tensor, energy: float = RANK_ENERGY) -> int:
    """Return how many singular values of W (d, m) hold the share `energy` of its spectral energy; 0 if W = 0.

    For W' this is the utilized rank of the layer. For the trained W it is the rank that the paper compares it with.

    >>> utilized_rank(torch.diag(torch.tensor([1.0, 1.0, 1e-3])))
    2

    Raises:
        FloatingPointError: W contains NaN or infinity.
    """
    if not torch.isfinite(W).all():
        raise FloatingPointError(f"a weight matrix of shape {tuple(W.shape)} contains NaN or infinity")
    squares = singular_values(W).square()
    if squares.sum() == 0:
        return 0
    return int((spectral_energy(squares) < energy).sum()) + 1


def utilization(rank: int, d: int, m: int) -> float:
    """Return rank / min(d, m), the share of a layer's possible rank that is used (section 2.3).

    >>> utilization(12, d=27, m=64)
    0.4444444444444444
    """
    return rank / min(d, m)


def mean_layer_utilization(utilizations: Iterable[float]) -> float:
    """Return the MLU: the plain mean of the utilization over all measured layers (section 2.3).

    >>> mean_layer_utilization([0.25, 0.75])
    0.5

    Raises:
        ValueError: no layer.
    """
    shares = list(utilizations)
    if not shares:
        raise ValueError("the mean layer utilization of no layers is undefined")
    return sum(shares) / len(shares)
