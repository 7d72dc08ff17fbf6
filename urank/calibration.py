"""Gram matrices of every layer, summed over a calibration set."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from urank.conv_gram import assemble_gram, patch_products
from urank.distributed import processes, total
from urank.layers import MatrixLayer, evaluating, input_rows, matrix_layers, watch_inputs
from urank.numerics import statistics_precision
from urank.subspaces import gram_matrix


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
        products = patch_products(layer, inputs, dtype) if convolves else gram_matrix(input_rows(layer, inputs), dtype)
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
