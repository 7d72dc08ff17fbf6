"""What the data spans: Gram matrices, their spectra, and projectors onto the leading directions.

Activations are never stored. X^T X (d x d) is summed over batches; with X = U Sigma V^T it is V Sigma^2 V^T, so its
eigenvectors are a basis of the input subspace S and its eigenvalues the squared singular values of X. The output's
follow without a further pass: Y^T Y = W^T (X^T X) W. (Sections 2.1 and 5.2 of the paper.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from urank.layers import MatrixLayer, evaluating, input_rows, matrix_layers, operand
from urank.patches import patch_gram


def accumulate_grams(
    model: nn.Module, batches: Iterable, layers: Sequence[str] | None = None, progress: bool = True
) -> dict[str, Tensor]:
    """X^T X (d, d) in float64 of every matrix layer, summed over `batches`, in the order of the forward pass.

    The network runs in evaluation mode and in its own precision; the products are float64. A layer that one forward
    pass calls several times is measured on the inputs of all its uses together, as one W has to serve them all; to
    tell them apart, measure `separate_uses(model, images)`.

    Args:
        batches: batches of images, or of (images, labels), on the model's device.
        layers: measure only these; default all of `matrix_layers(model)`.

    Raises:
        ValueError: no batch, an unknown layer name, or a layer that never runs.
        FloatingPointError: an input of a layer holds NaN or infinity.
    """
    found = matrix_layers(model)
    chosen = {name: found[name] for name in check_names(layers, found)}
    grams: dict[str, Tensor] = {}
    batches = tqdm(batches, desc="Gram matrices", unit="batch", leave=False, disable=not progress)
    with evaluating(model):
        for batch in batches:
            images = batch[0] if isinstance(batch, tuple | list) else batch
            for name, gram in batch_grams(model, images, chosen).items():
                grams[name] = gram if name not in grams else grams[name].add_(gram)
    if not grams:
        raise ValueError("no calibration images: the batches to accumulate Gram matrices from are empty")
    return grams


def check_names(names: Sequence[str] | None, found: dict[str, MatrixLayer]) -> Sequence[str]:
    if names is not None and not names:
        raise ValueError("no layer to measure: the choice of layers is empty")
    unknown = sorted(set(names or ()) - set(found))
    if unknown:
        raise ValueError(f"no such matrix layer: {', '.join(unknown)}; the network has {', '.join(found)}")
    return list(found) if names is None else names


def batch_grams(model: nn.Module, images: Tensor, layers: dict[str, MatrixLayer]) -> dict[str, Tensor]:
    """X^T X of one batch for each of `layers`, keyed in the order in which the forward pass calls them."""
    grams: dict[str, Tensor] = {}

    def measure(name: str):
        def hook(layer: MatrixLayer, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            gram = gram_of(*operand(layer, args, kwargs))
            grams[name] = gram if name not in grams else grams[name].add_(gram)
            if not torch.isfinite(gram).all():
                raise FloatingPointError(
                    f"layer {name!r}: its input holds NaN or infinity; check the images and weights"
                )

        return hook

    handles = [layer.register_forward_pre_hook(measure(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in layers if name not in grams]
    if missing:
        raise ValueError(
            f"layers that the forward pass never calls: {', '.join(missing)}; leave them out with `layers`"
        )
    return grams


def gram_of(layer: MatrixLayer, inputs: Tensor) -> Tensor:
    """X^T X (d, d) in float64 for the rows that `layer` multiplies when called on `inputs`."""
    if isinstance(layer, nn.Conv2d):
        return patch_gram(layer, inputs)
    X = input_rows(layer, inputs).double()
    return X.T @ X


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues (n,) and eigenvectors (n, n), as columns, of a Gram matrix, the largest first.

    The eigenvalues are squared singular values of the data, in the data's units squared, never negative.
    """

    eigenvalues: Tensor
    basis: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> "Spectrum":
        """The spectrum of a Gram matrix (n, n), computed in float64.

        Raises:
            FloatingPointError: the matrix holds NaN or infinity.
        """
        if not torch.isfinite(gram).all():
            raise FloatingPointError(f"a Gram matrix of shape {tuple(gram.shape)} holds NaN or infinity")
        eigenvalues, basis = torch.linalg.eigh((gram.double() + gram.double().T) / 2)
        # A Gram matrix has no negative eigenvalue; what rounding makes of a zero is a zero.
        return cls(eigenvalues.flip(0).clamp_min(0), basis.flip(1))

    @property
    def energy(self) -> Tensor:
        """Share (n,) of the spectral energy that the first k = 1..n directions hold; all ones for all-zero data."""
        return cumulative_energy(self.eigenvalues)


def cumulative_energy(squares: Tensor) -> Tensor:
    """Cumulative sum over total of squared singular values (n,), the largest first; ones where the total is 0."""
    sums = squares.cumsum(0)
    return sums / sums[-1] if sums[-1] > 0 else torch.ones_like(squares)


def dimension_for_energy(spectrum: Spectrum, energy: float) -> int:
    """The smallest number of leading directions that hold the share `energy` (0 to 1) of the spectral energy.

    Raises:
        ValueError: `energy` is not between 0 and 1.
    """
    if not 0 <= energy <= 1:
        raise ValueError(f"spectral energy is a share between 0 and 1, got {energy}")
    reached = spectrum.energy >= energy
    return int(reached.int().argmax()) + 1 if reached.any() else len(spectrum.energy)


def output_gram(gram: Tensor, W: Tensor) -> Tensor:
    """Y^T Y = W^T (X^T X) W, (m, m), from X^T X (d, d) and W (d, m)."""
    return W.T @ gram @ W


def projector(spectrum: Spectrum, k: int) -> Tensor:
    """P = V_k V_k^T (n, n), the orthogonal projector onto the first k directions (eqs. 3-5).

    Raises:
        ValueError: k is not between 0 and n.
    """
    if not 0 <= k <= len(spectrum.eigenvalues):
        raise ValueError(f"k must lie between 0 and {len(spectrum.eigenvalues)}, got {k}")
    V = spectrum.basis[:, :k]
    return V @ V.T
