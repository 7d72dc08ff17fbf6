"""Sum the Gram matrices of all layers over a calibration set."""

from collections.abc import Iterable, Sequence
from typing import Any

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
    """Return X^T X (d, d) of every matrix layer, summed over all batches, in the order of the forward pass.

    The network runs in evaluation mode, on its device and in its own precision. The sums are float64 on the same
    device, or on the CPU if the device has no float64. Several processes (see `distributed`) share each batch.

    If a forward pass calls a layer several times, the inputs of all calls are summed. To measure each call separately,
    pass `separate_uses(model, images)`.

    Args:
        batches: batches of images, or of (images, labels), on the model's device.
        layers: names of the layers to measure; default: all of `matrix_layers(model)`.
        progress: show a progress bar.
        product_dtype: precision of the products, torch.float64 or torch.float32; default: `statistics_precision` of the
            device. With float32, singular values below about 1e-4 of the largest are lost.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 10))
    >>> grams = accumulate_grams(network, [torch.randn(16, 3, 8, 8), torch.randn(16, 3, 8, 8)], progress=False)
    >>> {name: tuple(gram.shape) for name, gram in grams.items()}
    {'0': (27, 27), '2': (288, 288)}

    Raises:
        ValueError: there is no batch, a layer name is unknown, the forward pass does not use a layer, or
            `product_dtype` is invalid.
        FloatingPointError: the input of a layer contains NaN, infinity, or numbers whose products overflow.
    """
    if product_dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"product_dtype must be torch.float32 or torch.float64, got {product_dtype}")
    found = matrix_layers(model)
    chosen = {name: found[name] for name in check_names(layers, found)}
    sums: dict[str, _GramSum] = {}
    rank, count = processes()

    def add(name: str, layer: MatrixLayer, inputs: Tensor) -> None:
        sums.setdefault(name, _GramSum(name, product_dtype)).add(layer, inputs)

    with evaluating(model):
        for batch in tqdm(batches, desc="Gram matrices", unit="batch", leave=False, disable=not progress):
            images = images_of(batch)[rank::count]
            if len(images):
                watch_inputs(model, images, chosen, add)
    if not sums:
        raise ValueError(f"no calibration images: each of {count} process(es) needs at least one")
    if unused := [name for name in chosen if name not in sums]:
        raise ValueError(
            f"the forward pass never multiplies by the weight of these layers: {', '.join(unused)}; pass the names of "
            "the other layers as `layers`"
        )
    return {name: total(gram_sum.result()) for name, gram_sum in sums.items()}


def images_of(batch: Any) -> Tensor:
    """Return the images of a batch, which is a tensor of images or a pair (images, anything)."""
    return batch[0] if isinstance(batch, tuple | list) else batch


def check_names(names: Sequence[str] | None, found: dict[str, MatrixLayer]) -> Sequence[str]:
    """Return `names`, or the names of all layers in `found` for None; raise ValueError if a name is unknown."""
    if names is not None and not names:
        raise ValueError("no layer to measure: the list of layers is empty")
    unknown = sorted(set(names or ()) - set(found))
    if unknown:
        raise ValueError(f"no such matrix layer: {', '.join(unknown)} (layers: {', '.join(found)})")
    return list(found) if names is None else names


class _GramSum:
    """X^T X (d, d) of one layer, summed over all its inputs.

    For a convolution the sum runs over its `patch_products`. Assembling the Gram matrix from them can take longer than
    computing them, so this is only done at the end, and when the layer's geometry or the image size changes.
    """

    def __init__(self, name: str, product_dtype: torch.dtype | None):
        self.name, self.product_dtype = name, product_dtype
        self.gram: Tensor | None = None
        self.products: Tensor | None = None  # patch products that are not yet part of `gram`
        self.conv: nn.Conv2d | None = None  # the convolution and the image size (h, w) of these products
        self.size: tuple[int, ...] = ()

    def add(self, layer: MatrixLayer, inputs: Tensor) -> None:
        """Add the inputs of one call of the layer."""
        device, dtype = statistics_precision(inputs.device)
        inputs, dtype = inputs.to(device), self.product_dtype or dtype
        if isinstance(layer, nn.Conv2d):
            self._add_patches(layer, inputs, dtype)
        else:
            self.gram = added(self.gram, self._checked(gram_matrix(input_rows(layer, inputs), dtype)))

    def result(self) -> Tensor:
        """Return the sum of everything that was added."""
        if self.conv is not None and self.products is not None:
            self.gram = added(self.gram, assemble_gram(self.conv, self.size, self.products))
            self.products = None
        assert self.gram is not None, "result() before the first add()"
        return self.gram

    def _add_patches(self, conv: nn.Conv2d, images: Tensor, dtype: torch.dtype) -> None:
        products, size = self._checked(patch_products(conv, images, dtype)), tuple(images.shape[2:])
        if self.products is not None and (size != self.size or repr(conv) != repr(self.conv)):
            self.result()  # the repr of a convolution is its geometry
        self.conv, self.size = conv, size
        self.products = added(self.products, products)

    def _checked(self, products: Tensor) -> Tensor:
        if not torch.isfinite(products.sum()):
            raise FloatingPointError(
                f"layer {self.name!r}: its input contains NaN, infinity, or numbers too large to be multiplied; check "
                "the images and weights"
            )
        return products


def added(total: Tensor | None, term: Tensor) -> Tensor:
    """Return the sum, computed in place in `total` if it is not None."""
    return term if total is None else total.add_(term)
