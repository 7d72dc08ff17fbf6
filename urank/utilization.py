"""W' = P_S W P_T and what follows from it: the utilized rank, its error and the mean layer utilization.

With P' = I - P, the transformation moves a layer's output by

    XW - XW' = X W P_T' + X P_S' W P_T,

two terms that are orthogonal, because P_T' P_T = 0. Their squared Frobenius norms therefore add up. The first is the
output energy outside T, (1 - e_T) ||Y||^2. The second is at most (1 - e_S) ||X||^2 ||W||_2^2, because X P_S' holds the
input energy outside S and multiplication by W P_T stretches it by no more than W's largest singular value.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from urank.layers import MatrixLayer, set_weight_matrix, weight_matrix
from urank.subspaces import Spectrum, cumulative_energy, layer_spectra, projector, singular_values

RANK_ENERGY = 0.9999  # the paper's cut-off against singular values that are numerical noise (section 3)


def project_weight(W: Tensor, inputs: Spectrum, outputs: Spectrum, k_s: int, k_t: int) -> Tensor:
    """W' = P_S W P_T (d, m); a side whose k is its full dimension is left as it is (eq. 9).

    Args:
        W: (d, m), float64.
        inputs, outputs: spectra of X^T X (d, d) and of Y^T Y (m, m).
        k_s, k_t: dimensions of S (1..d) and of T (1..m).

    Raises:
        ValueError: a dimension out of its range.
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


def project_layer(layer: MatrixLayer, gram: Tensor, k_s: int, k_t: int) -> None:
    """Put W' in the place of the layer's W; `gram` is X^T X (d, d) of the unmodified network's layer."""
    W = weight_matrix(layer)
    set_weight_matrix(layer, project_weight(W, *layer_spectra(gram, W), k_s, k_t))


def utilized_rank(W: Tensor, energy: float = RANK_ENERGY) -> int:
    """How many singular values of W (d, m) hold the share `energy` of its spectral energy; 0 for W = 0.

    Of W' this is the layer's utilized rank, of the unaltered W the rank that the paper draws beside it.

    Raises:
        FloatingPointError: W holds NaN or infinity.
    """
    if not torch.isfinite(W).all():
        raise FloatingPointError(f"a weight matrix of shape {tuple(W.shape)} holds NaN or infinity")
    squares = singular_values(W).square()
    if squares.sum() == 0:
        return 0
    return int((cumulative_energy(squares) < energy).sum()) + 1


@dataclass(frozen=True)
class ErrorBound:
    """Squared Frobenius norms of the error XW - XW', in the units of Y squared.

    `output_part` is ||Y P_T'||^2, `input_part` is ||X P_S' W P_T||^2; `bound` is at least their sum.
    """

    output_part: float
    input_part: float
    bound: float

    @property
    def error(self) -> float:
        """||XW - XW'||_F^2, exactly."""
        return self.output_part + self.input_part


def error_bound(W: Tensor, gram: Tensor, k_s: int, k_t: int) -> ErrorBound:
    """The exact error of W' = P_S W P_T on the data behind `gram` and its bound (eqs. 10-30, with ||W||_2).

    Args:
        W: (d, m).
        gram: X^T X, (d, d).
        k_s, k_t: dimensions of S (1..d) and of T (1..m).
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
