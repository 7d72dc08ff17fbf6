"""A layer seen as a matrix W (d x m) that acts on rows: Y = X W.

A linear layer's rows are its input vectors. A convolution's rows are its flattened input patches, one an output
position, with d = c_in * k_h * k_w features in the order of `torch.nn.functional.unfold`, and m = c_out. The bias is
no part of W.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MatrixLayer = nn.Linear | nn.Conv2d


def matrix_layers(model: nn.Module) -> dict[str, MatrixLayer]:
    """The layers of `model` that are matrices, by their `named_modules()` path, in order of registration.

    Raises:
        ValueError: there is none, or a layer's weight has another user, which a projection would change as well.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MatrixLayer) and skip_reason(module) is None
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer to measure: no nn.Linear and no ungrouped nn.Conv2d")
    paths: dict[nn.Parameter, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(parameter, []).append(repr(path.rpartition(".")[0]))
    for layer in layers.values():
        if len(paths[layer.weight]) > 1:
            raise ValueError(f"{' and '.join(paths[layer.weight])} share one weight: untie them to measure the layer")
    return layers


def skip_reason(module: nn.Module) -> str | None:
    """Why a module that holds a weight is not one matrix; None where it is one or holds no weight of its own."""
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"grouped convolution ({module.groups} groups): a stack of matrices, not one"
    if isinstance(module, MatrixLayer):
        stored = isinstance(module.weight, nn.Parameter)
        return None if stored else "its weight is computed (a parametrization): nothing can be put in its place"
    if not isinstance(getattr(module, "weight", None), nn.Parameter):
        return None
    return None if module.weight.ndim < 2 else f"{type(module).__name__} is not a linear layer or a 2-d convolution"


def skipped_layers(model: nn.Module) -> dict[str, str]:
    """The modules with a weight matrix that `matrix_layers` leaves out, each with its reason."""
    reasons = {name: skip_reason(module) for name, module in model.named_modules()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def weight_matrix(layer: MatrixLayer) -> Tensor:
    """W of `layer`, (d, m), in float64; a copy."""
    return layer.weight.detach().flatten(1).T.to(torch.float64, copy=True)


@torch.no_grad()
def set_weight_matrix(layer: MatrixLayer, W: Tensor) -> None:
    """Put W (d, m) into `layer`, rounded to the layer's own precision.

    Raises:
        ValueError: W has another shape than the layer's matrix.
    """
    m, *features = layer.weight.shape
    if W.shape != (math.prod(features), m):
        raise ValueError(f"the layer's matrix is {math.prod(features)} x {m}, got one of shape {tuple(W.shape)}")
    layer.weight.copy_(W.T.reshape(layer.weight.shape))


def input_rows(layer: MatrixLayer, inputs: Tensor) -> Tensor:
    """The rows of X (rows, d) that `layer` multiplies when it is called on `inputs`.

    Args:
        inputs: (..., d) for a linear layer, (n, c_in, h, w) for a convolution.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, layer.in_features)
    patches = F.unfold(pad(layer, inputs), layer.kernel_size, layer.dilation, stride=layer.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def pad(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """`images` (n, c, h, w) with the border that `conv` would add ("same" and every padding mode included)."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(images, conv._reversed_padding_repeated_twice, mode=mode)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; every module's own mode comes back after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
