"""What the data spans: Gram matrices, their spectra, and projectors onto the leading directions.

Activations are never stored. X^T X (d x d) is summed over batches; with X = U Sigma V^T it is V Sigma^2 V^T, so its
eigenvectors are a basis of the input subspace S and its eigenvalues the squared singular values of X. The output's
follow without a further pass: Y^T Y = W^T (X^T X) W. (Sections 2.1 and 5.2 of the paper.)
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from urank.distributed import processes, total
from urank.layers import MatrixLayer, evaluating, input_rows, matrix_layers, watch_inputs
from urank.patches import assemble_gram, patch_products
from urank.precision import full_precision

FAST_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))  # CUDA compute capabilities: P100, V100, A100, H100, B200
ROWS = 4096  # rows multiplied at once: the rounding of float32 products grows with their number


def accumulate_grams(
    model: nn.Module,
    batches: Iterable,
    layers: Sequence[str] | None = None,
    progress: bool = True,
    product_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """X^T X (d, d) in float64 of every matrix layer, summed over `batches`, in the order of the forward pass.

    The network runs in evaluation mode, on its device and in its own precision. The sums are float64 and lie on that
    device, or on the CPU where the device has no float64. Several processes (see `distributed`) share each batch.

    A layer that one forward pass calls several times is measured on the inputs of all its uses together, as one W has
    to serve them all; to tell them apart, measure `separate_uses(model, images)`.

    Args:
        batches: batches of images, or of (images, labels), on the model's device.
        layers: measure only these; default all of `matrix_layers(model)`.
        product_dtype: torch.float64 or torch.float32, the precision of the products that are summed; default what
            `statistics_precision` says of the device. float32 loses singular values below some 1e-4 of the largest.

    Raises:
        ValueError: no batch, an unknown layer name, a layer that never runs, or another `product_dtype`.
        FloatingPointError: an input of a layer holds NaN or infinity, or numbers too large to be multiplied.
    """
    if product_dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"products are torch.float32 or torch.float64, got {product_dtype}")
    found = matrix_layers(model)
    chosen = {name: found[name] for name in check_names(layers, found)}
    sums: dict[str, _GramSum] = {}
    number, count = processes()

    def add(name: str, layer: MatrixLayer, inputs: Tensor) -> None:
        sums.setdefault(name, _GramSum(name, product_dtype)).add(layer, inputs)

    with evaluating(model):
        for batch in tqdm(batches, desc="Gram matrices", unit="batch", leave=False, disable=not progress):
            images = images_of(batch)[number::count]
            if len(images):
                watch_inputs(model, images, chosen, add)
    if not sums:
        raise ValueError(f"no calibration images: Gram matrices need at least one for each of {count} process(es)")
    unused = [name for name in chosen if name not in sums]
    if unused:
        raise ValueError(
            f"layers by whose weight the forward pass never multiplies: {', '.join(unused)}; leave them out with "
            "`layers`"
        )
    return {name: total(gram.write()) for name, gram in sums.items()}


def images_of(batch) -> Tensor:
    """The images of a batch that is either these alone or a pair (images, anything)."""
    return batch[0] if isinstance(batch, tuple | list) else batch


def check_names(names: Sequence[str] | None, found: dict[str, MatrixLayer]) -> Sequence[str]:
    if names is not None and not names:
        raise ValueError("no layer to measure: the choice of layers is empty")
    unknown = sorted(set(names or ()) - set(found))
    if unknown:
        raise ValueError(f"no such matrix layer: {', '.join(unknown)}; the network has {', '.join(found)}")
    return list(found) if names is None else names


class _GramSum:
    """X^T X of one layer, summed over the inputs it is called on.

    Writing a convolution's matrix can take longer than computing it, so it is its `patch_products` that are summed.
    The matrix is written at the end, and when the geometry or the size of the images changes.
    """

    def __init__(self, name: str, product_dtype: torch.dtype | None):
        self.name, self.product_dtype = name, product_dtype
        self.gram: Tensor | None = None
        self.products: Tensor | None = None
        self.layer: MatrixLayer | None = None  # with `size`, (h, w) of the images: what `products` come from
        self.size: tuple[int, ...] = ()

    def add(self, layer: MatrixLayer, inputs: Tensor) -> None:
        device, dtype = statistics_precision(inputs.device)
        inputs, dtype = inputs.to(device), self.product_dtype or dtype
        convolves = isinstance(layer, nn.Conv2d)
        products = patch_products(layer, inputs, dtype) if convolves else row_gram(input_rows(layer, inputs), dtype)
        if not torch.isfinite(products.sum()):
            raise FloatingPointError(
                f"layer {self.name!r}: its input holds NaN or infinity, or numbers too large to be multiplied; "
                "check the images and weights"
            )
        size = tuple(inputs.shape[2:]) if convolves else ()
        if size != self.size or repr(layer) != repr(self.layer):  # a convolution's repr is its geometry
            self.write()
            self.layer, self.size = layer, size
        self.products = products if self.products is None else self.products.add_(products)

    def write(self) -> Tensor:
        """X^T X (d, d) of all that was added."""
        if self.products is not None:
            gram = assemble_gram(self.layer, self.size, self.products) if self.size else self.products
            self.gram = gram if self.gram is None else self.gram.add_(gram)
            self.products = None
        return self.gram


def statistics_precision(device: torch.device) -> tuple[torch.device, torch.dtype]:
    """Where the statistics of data on `device` are summed, always in float64, and the precision of their products.

    Products are float64 as well where that is fast: on the CPU, and on CUDA GPUs of the compute capabilities in
    `FAST_FLOAT64`, which do half as many float64 operations a second as float32 ones. Other CUDA GPUs do 1/32 or 1/64
    as many: products are float32 there (never TF32). Apple's MPS has no float64 at all: its data goes to the CPU.
    """
    if device.type == "mps":
        return torch.device("cpu"), torch.float64
    slow = device.type == "cuda" and torch.cuda.get_device_capability(device) not in FAST_FLOAT64
    return device, torch.float32 if slow else torch.float64


def row_gram(X: Tensor, product_dtype: torch.dtype = torch.float64) -> Tensor:
    """X^T X (d, d) of rows X (rows, d): a float64 sum over blocks of rows, each multiplied in `product_dtype`."""
    gram = X.new_zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    with full_precision(X.device):
        for rows in X.split(ROWS):
            rows = rows.to(product_dtype)
            gram += rows.T @ rows
    return gram


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n) of a symmetric matrix; see `Spectrum.of` for failures."""
    try:
        return torch.linalg.eigh(matrix)
    except RuntimeError as error:  # LinAlgError and NotImplementedError are; cuSOLVER fails as itself
        n, device = len(matrix), matrix.device
        warnings.warn(f"eigh of a {n} x {n} matrix failed on {device}: trying NumPy's ({error})", stacklevel=3)
        # Another LAPACK: MKL's in torch, on two threads, does not converge on some matrices that are zero in most rows.
        return tuple(torch.from_numpy(part).to(device) for part in np.linalg.eigh(matrix.cpu().numpy()))


def singular_values(W: Tensor) -> Tensor:
    """The singular values of W (d, m) in float64, the largest first, on the processor.

    One algorithm for all devices, at little cost: 0.05 s for 4608 x 512 on 16 cores, 0.04 s on an H100.
    """
    return torch.linalg.svdvals(W.cpu().double())


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues (n,) and eigenvectors (n, n), as columns, of a Gram matrix, the largest first.

    The eigenvalues are squared singular values of the data, in the data's units squared, never negative.
    """

    eigenvalues: Tensor
    basis: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> "Spectrum":
        """The spectrum of a Gram matrix (n, n), computed in float64; on the CPU if its device has no float64.

        Warns:
            UserWarning: torch's eigensolver failed on the device, and NumPy's did the work on the CPU.

        Raises:
            FloatingPointError: the matrix holds NaN or infinity.
            numpy.linalg.LinAlgError: NumPy's failed, too.
        """
        if not torch.isfinite(gram).all():
            raise FloatingPointError(f"a Gram matrix of shape {tuple(gram.shape)} holds NaN or infinity")
        device, _ = statistics_precision(gram.device)
        gram = gram.to(device).double()
        gram = (gram + gram.T) / 2
        # A feature that is always 0 is an eigenvector of eigenvalue 0: the solver is asked for the others alone.
        alive = gram.any(dim=1)
        k, eigenvalues, basis = int(alive.sum()), gram.new_zeros(len(gram)), torch.zeros_like(gram)
        values, vectors = eigh(gram[alive][:, alive])
        # A Gram matrix has no negative eigenvalue; what rounding makes of a zero is a zero.
        eigenvalues[:k], basis[alive, :k] = values.flip(0).clamp_min(0), vectors.flip(1)
        basis[~alive, k:] = torch.eye(len(gram) - k, dtype=gram.dtype, device=gram.device)
        return cls(eigenvalues, basis)

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
    return int((spectrum.energy < energy).sum()) + 1


def output_gram(gram: Tensor, W: Tensor) -> Tensor:
    """Y^T Y = W^T (X^T X) W, (m, m), from X^T X (d, d) and W (d, m)."""
    return W.T @ gram @ W


def layer_spectra(gram: Tensor, W: Tensor) -> tuple[Spectrum, Spectrum]:
    """The spectra of X^T X and of Y^T Y, from X^T X (d, d) and W (d, m), in W's precision and where W is."""
    gram = gram.to(W)
    return Spectrum.of(gram), Spectrum.of(output_gram(gram, W))


def projector(spectrum: Spectrum, k: int) -> Tensor:
    """P = V_k V_k^T (n, n), the orthogonal projector onto the first k directions (eqs. 3-5).

    Raises:
        ValueError: k is not between 0 and n.
    """
    if not 0 <= k <= len(spectrum.eigenvalues):
        raise ValueError(f"k must lie between 0 and {len(spectrum.eigenvalues)}, got {k}")
    V = spectrum.basis[:, :k]
    return V @ V.T
