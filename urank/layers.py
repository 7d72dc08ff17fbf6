"""A layer seen as a matrix W (d x m) that acts on rows: Y = X W.

A linear layer's rows are its input vectors. A convolution's rows are its flattened input patches, one an output
position, with d = c_in * k_h * k_w features in the order of `torch.nn.functional.unfold`, and m = c_out. The bias is
no part of W.

A subclass of `nn.Linear` or `nn.Conv2d` may do anything in its forward. Whether it is a matrix is found out by running
it, without data, and watching which products it computes (`watch_products`).
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from urank.attention import obstacle
from urank.numerics import full_precision

MatrixLayer = nn.Linear | nn.Conv2d


def matrix_layers(model: nn.Module) -> dict[str, MatrixLayer]:
    """The layers of `model` that are matrices, by their `named_modules()` path, in order of registration.

    Left out, among others (see `skipped_layers`), are grouped convolutions. One with g groups is g matrices; a
    depthwise one has a matrix k^2 x 1 in every group, the rank of which is always 1: there is nothing to measure.

    Raises:
        ValueError: there is none, or a layer's weight has another user, which a projection would change as well.
    """
    layers = {name: module for name, module in weight_holders(model).items() if skip_reason(module) is None}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer to measure: no nn.Linear and no ungrouped nn.Conv2d")
    paths: dict[nn.Parameter, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(parameter, []).append(repr(path.rpartition(".")[0]))
    for layer in layers.values():
        if len(paths[layer.weight]) > 1:
            raise ValueError(
                f"{' and '.join(paths[layer.weight])} share one weight: measure separate_uses(model, images), in which "
                "each has its own"
            )
    return layers


def skipped_layers(model: nn.Module) -> dict[str, str]:
    """The modules with a weight matrix that `matrix_layers` leaves out, each with its reason."""
    reasons = {name: skip_reason(module) for name, module in weight_holders(model).items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def coverage(model: nn.Module, images: Tensor | None = None) -> pd.DataFrame:
    """What of `model` is measured: a row for each module with a weight matrix, in order of registration.

    Columns: layer (path), type, params (all that the module holds; those it shares count where they come first),
    share (of the parameters of the network, 0 to 1; what is missing from their sum are norms and lone biases),
    measured, reason (why not, else empty).

    Layers that share one weight count as measured: each has its own in `separate_uses(model, images)`.

    Args:
        images: run once, if given, to find out which layers' weights a forward pass does not multiply by.

    Raises:
        ValueError: with `images`, for a network that `matrix_layers` refuses.
    """
    holders, total, counted, rows = weight_holders(model), sum(p.numel() for p in model.parameters()), set(), []
    used = holders if images is None else used_layers(model, images)
    for name, module in holders.items():
        own = set(held_parameters(module)) - counted
        counted |= own
        params, reason = sum(parameter.numel() for parameter in own), skip_reason(module)
        if reason is None and name not in used:
            reason = "the forward pass never multiplies by its weight"
        rows.append((name, type(module).__name__, params, params / total, reason is None, reason or ""))
    return pd.DataFrame(rows, columns=["layer", "type", "params", "share", "measured", "reason"])


def used_layers(model: nn.Module, images: Tensor) -> list[str]:
    """The matrix layers by whose weights one forward pass multiplies, in that order, once a product."""
    used: list[str] = []
    with evaluating(model):
        watch_inputs(model, images, matrix_layers(model), lambda name, *_: used.append(name))
    return used


def weight_holders(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold a parameter of two or more dimensions; what is below a `whole` one belongs to it."""
    found, below = {}, set()
    for name, module in model.named_modules():
        if module not in below and any(parameter.ndim > 1 for parameter in held_parameters(module)):
            found[name] = module
            below |= set(module.modules()) if whole(module) else set()
    return found


def whole(module: nn.Module) -> bool:
    """True for a module that uses all that is below it: a layer, or an attention, whose `out_proj` nobody calls."""
    return isinstance(module, MatrixLayer | nn.MultiheadAttention)


def held_parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=whole(module)))


def skip_reason(module: nn.Module) -> str | None:
    """Why a module that holds a weight is not one matrix; None where it is one."""
    if isinstance(module, MatrixLayer):
        return layer_skip_reason(module)
    if isinstance(module, nn.MultiheadAttention):
        names = " and ".join(name for name, parameter in module.named_parameters() if parameter.ndim > 1)
        why = obstacle(module)
        remedy = "use explicit_attention(model)" if why is None else f"explicit_attention leaves it as it is: {why}"
        return f"attention that reads {names} and calls no layer ({remedy})"
    names = ", ".join(name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim > 1)
    return f"{type(module).__name__} ({names}) is not a linear layer or a 2-d convolution"


def layer_skip_reason(layer: MatrixLayer) -> str | None:
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return f"grouped convolution ({layer.groups} groups): a stack of matrices, not one"
    if not isinstance(layer.weight, nn.Parameter):
        return "its weight is computed (a parametrization): nothing can be put in its place"
    if layer.weight.is_complex():
        return "its weight is complex"
    if is_plain(layer):
        return None
    try:  # as it is, and as the first of two factors
        return differs_from_a_matrix(layer) or differs_from_a_matrix(thin(on_meta(layer), 1))
    except Exception as error:  # a forward may raise anything; what it raised is the reason
        return f"the forward of {type(layer).__name__} cannot be tried out on the meta device: {error}"


def is_plain(layer: MatrixLayer) -> bool:
    """True where the layer's forward is torch's own."""
    torchs = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    methods = ("forward",) if torchs is nn.Linear else ("forward", "_conv_forward")
    return all(getattr(getattr(layer, name), "__func__", None) is getattr(torchs, name) for name in methods)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of `module` without data, made without copying any."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def thin(layer: MatrixLayer, r: int) -> MatrixLayer:
    """A copy of `layer`, whatever its forward does, with r outputs, no bias, and a weight that is not set yet."""
    weight = nn.Parameter(layer.weight.new_empty(r, *layer.weight.shape[1:]))
    copied = copy.deepcopy(layer, {id(layer.weight): weight, id(layer.bias): None})
    setattr(copied, "out_features" if isinstance(layer, nn.Linear) else "out_channels", r)
    return copied


class Product(NamedTuple):
    """A call of `F.linear` or `F.conv2d`: its arguments by name, what it returned, and that tensor's version."""

    operands: dict
    output: Tensor
    version: int


class _Watch(TorchFunctionMode):
    """Inside, `see` is told of every product as it is made."""

    def __init__(self, see: Callable[[Product], None]):
        super().__init__()
        self.see = see

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d):
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            self.see(Product(dict(zip(names, args)) | (kwargs or {}), output, output._version))
        return output


@torch.no_grad()
def watch_products(layer: MatrixLayer, *args, **kwargs) -> tuple[list[Product], Tensor]:
    """The products that the forward of `layer`, called with these arguments, computes, and what it returns."""
    products: list[Product] = []
    with _Watch(products.append):
        output = layer.forward(*args, **kwargs)
    return products, output


def differs_from_a_matrix(layer: MatrixLayer) -> str | None:
    """What a forward other than torch's does that a matrix does not; None where it only prepares the operand."""
    name = f"the forward of {type(layer).__name__}"
    layer = on_meta(layer).eval()
    inputs = torch.empty(sample_shape(layer), dtype=layer.weight.dtype, device="meta")
    products, output = watch_products(layer, inputs)
    if len(products) != 1:
        return f"{name} makes {len(products)} calls of F.linear and F.conv2d, not one"
    (product,) = products
    if product.operands["weight"] is not layer.weight:
        return f"{name} computes the weight: nothing can be put in its place"
    if product.operands.get("bias") is not layer.bias:
        return f"{name} computes the bias"
    if product.operands.get("groups", 1) != 1:
        return f"{name} multiplies in groups"
    unchanged = output is product.output and output._version == product.version and inputs._version == 0
    return None if unchanged else f"{name} does more than multiply"


def sample_shape(layer: MatrixLayer) -> tuple[int, ...]:
    """A small input: two vectors, or an image a little larger than the kernel."""
    if isinstance(layer, nn.Linear):
        return 2, layer.in_features
    return 1, layer.in_channels, *(dilation * k + 1 for dilation, k in zip(layer.dilation, layer.kernel_size))


def plain_layer(layer: MatrixLayer, operands: dict) -> MatrixLayer:
    """A layer of torch's own, without numbers (on the meta device), that makes the product `layer` makes."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, device="meta")
    geometry = {name: operands[name] for name in ("stride", "padding", "dilation") if name in operands}
    m, c, *kernel = layer.weight.shape
    return nn.Conv2d(c, m, kernel, **geometry, device="meta")


def watch_inputs(
    model: nn.Module, images: Tensor, layers: dict[str, MatrixLayer], see: Callable[[str, MatrixLayer, Tensor], None]
) -> None:
    """Run the network on `images`; see(name, layer, inputs) is told of every product with a weight of `layers`.

    `inputs` are what is multiplied, an image as padded by a forward of its own say, and `layer` is the `plain_layer`
    that would do it. Who makes the product, the layer or a module that reads its weight, makes no difference.
    """
    names = {id(layer.weight): name for name, layer in layers.items()}

    def told(product: Product) -> None:
        name = names.get(id(product.operands["weight"]))
        if name is not None:
            see(name, plain_layer(layers[name], product.operands), product.operands["input"])

    with _Watch(told):
        model(images)


def weight_matrix(layer: MatrixLayer) -> Tensor:
    """W of `layer`, (d, m), in float64; a copy, on the CPU where the device has no float64 (MPS)."""
    weight = layer.weight.detach().flatten(1).T
    return (weight.cpu() if weight.device.type == "mps" else weight).to(torch.float64, copy=True)


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
    """Evaluation mode inside the block, without gradients, in the model's own precision: no autocast, no TF32.

    Every module's own mode comes back after it.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters()} or {torch.device("cpu")}
    model.eval()
    try:
        with torch.no_grad(), ExitStack() as stack:
            for device in devices:
                stack.enter_context(full_precision(device))
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
