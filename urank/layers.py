"""View a layer as a matrix W (d, m) that acts on rows: Y = X W.

A linear layer has one row of X per input vector. A convolution has one row per output position: the flattened input
patch, with d = c_in * k_h * k_w features in the order of `torch.nn.functional.unfold`, and m = c_out. The bias is not
part of W.

A subclass of `nn.Linear` or `nn.Conv2d` may override `forward`. To find out whether it still is a plain matrix product,
we run it on the meta device and observe its calls of `F.linear` and `F.conv2d`.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from urank.attention import unsupported_reason
from urank.numerics import full_precision

if TYPE_CHECKING:
    import pandas as pd

MatrixLayer = nn.Linear | nn.Conv2d


def matrix_layers(model: nn.Module) -> dict[str, MatrixLayer]:
    """Return the layers of `model` that can be measured, by their `named_modules()` path, in order of registration.

    These are linear layers and ungrouped convolutions; `skipped_layers` gives the reasons for all others. A convolution
    with g groups is g separate matrices. In a depthwise convolution each of them is k^2 x 1 and has rank 1.

    >>> list(matrix_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2))))
    ['0', '3']

    Raises:
        ValueError: the network has no such layer, or two modules share the weight of one.
    """
    holders = weight_holders(model).items()
    layers = {name: module for name, module in holders if isinstance(module, MatrixLayer) and not skip_reason(module)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer to measure: no nn.Linear and no ungrouped nn.Conv2d")
    paths: dict[Tensor, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(parameter, []).append(repr(path.rpartition(".")[0]))
    for layer in layers.values():
        if len(paths[layer.weight]) > 1:
            raise ValueError(
                f"{' and '.join(paths[layer.weight])} share one weight: measure separate_uses(model, images), where "
                "each module has its own copy"
            )
    return layers


def skipped_layers(model: nn.Module) -> dict[str, str]:
    """Return the modules with a weight matrix that `matrix_layers` skips, with the reason for each.

    >>> skipped_layers(nn.Sequential(nn.Linear(8, 8), nn.Embedding(5, 8)))
    {'1': 'Embedding (weight) is not a linear layer or a 2-d convolution'}
    """
    reasons = {name: skip_reason(module) for name, module in weight_holders(model).items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def coverage(model: nn.Module, images: Tensor | None = None) -> "pd.DataFrame":
    """Return a table of the parts of `model` that are measured: one row per module with a weight matrix.

    Columns: layer (path), type, params (parameters of the module; shared parameters count at their first module),
    share (of all parameters of the network, 0 to 1), measured (bool), reason (why it is skipped, or empty). Shares add
    up to less than 1 because normalization layers have no row. Rows are in order of registration.

    Layers that share a weight count as measured because `separate_uses(model, images)` gives each its own.

    Args:
        images: batch for one forward pass, to find the layers that it does not use; default: not checked.

    >>> coverage(nn.Sequential(nn.Linear(8, 8), nn.Embedding(5, 8)))[["layer", "type", "params", "measured"]]
      layer       type  params  measured
    0     0     Linear      72      True
    1     1  Embedding      40     False

    Raises:
        ValueError: `images` are given and `matrix_layers` rejects the network.
    """
    import pandas as pd  # slow to import, and only needed for this table

    holders = weight_holders(model)
    used = holders if images is None else used_layers(model, images)
    total, rows = count_params(model), []
    counted: set[nn.Parameter] = set()
    for name, module in holders.items():
        own = set(held_parameters(module)) - counted
        counted |= own
        params, reason = sum(parameter.numel() for parameter in own), skip_reason(module)
        if reason is None and name not in used:
            reason = "the forward pass never multiplies by its weight"
        rows.append((name, type(module).__name__, params, params / total, reason is None, reason or ""))
    return pd.DataFrame(rows, columns=["layer", "type", "params", "share", "measured", "reason"])


def count_params(model: nn.Module) -> int:
    """Return the number of parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def used_layers(model: nn.Module, images: Tensor) -> list[str]:
    """Return the layers used in one forward pass, in call order; a layer that is called twice is listed twice."""
    used: list[str] = []
    with evaluating(model):
        watch_inputs(model, images, matrix_layers(model), lambda name, *_: used.append(name))
    return used


def weight_holders(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold a parameter with two or more dimensions, by path.

    Submodules of a layer or an attention module are not listed separately; see `owns_submodules`.
    """
    found: dict[str, nn.Module] = {}
    owned: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in owned and any(parameter.ndim > 1 for parameter in held_parameters(module)):
            found[name] = module
            owned |= set(module.modules()) if owns_submodules(module) else set()
    return found


def owns_submodules(module: nn.Module) -> bool:
    """Return True if the parameters of submodules belong to this module.

    `nn.MultiheadAttention` reads the weight of its `out_proj` without calling it, so `out_proj` is not a layer.
    """
    return isinstance(module, MatrixLayer | nn.MultiheadAttention)


def held_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module, including those of its submodules if it owns them."""
    return list(module.parameters(recurse=owns_submodules(module)))


def skip_reason(module: nn.Module) -> str | None:
    """Return why a module that holds a weight is not a single matrix, or None if it is."""
    if isinstance(module, MatrixLayer):
        return layer_skip_reason(module)
    if isinstance(module, nn.MultiheadAttention):
        names = " and ".join(name for name, parameter in module.named_parameters() if parameter.ndim > 1)
        why = unsupported_reason(module)
        remedy = "use explicit_attention(model)" if why is None else f"explicit_attention cannot convert it: {why}"
        return f"attention that multiplies by {names} without calling a layer ({remedy})"
    names = ", ".join(name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim > 1)
    return f"{type(module).__name__} ({names}) is not a linear layer or a 2-d convolution"


def layer_skip_reason(layer: MatrixLayer) -> str | None:
    """Return why a linear layer or convolution is not a single matrix, or None if it is."""
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return f"grouped convolution ({layer.groups} groups): a stack of matrices, not one"
    if not isinstance(layer.weight, nn.Parameter):
        return "its weight is computed (a parametrization) and cannot be replaced"
    if layer.weight.is_complex():
        return "its weight is complex"
    if has_standard_forward(layer):
        return None
    try:  # the layer itself, and the copy that becomes the first of two factors
        return custom_forward_reason(layer) or custom_forward_reason(with_outputs(meta_copy(layer), 1))
    except Exception as error:  # a custom forward may raise anything; the error becomes the reason
        return f"the forward of {type(layer).__name__} does not run on the meta device: {error}"


def has_standard_forward(layer: MatrixLayer) -> bool:
    """Return True if the layer's forward is that of `nn.Linear` or `nn.Conv2d`."""
    standard = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    methods = ("forward",) if standard is nn.Linear else ("forward", "_conv_forward")
    return all(getattr(getattr(layer, name), "__func__", None) is getattr(standard, name) for name in methods)


def meta_copy(layer: MatrixLayer) -> MatrixLayer:
    """Return a copy of a layer on the meta device; no data are copied."""
    memo: dict[int, Tensor] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in layer.buffers()}
    for parameter in layer.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copy.deepcopy(layer, memo)


def with_outputs(layer: MatrixLayer, r: int) -> MatrixLayer:
    """Return a copy of a layer with r outputs, the same forward, no bias and an uninitialized weight."""
    weight = nn.Parameter(layer.weight.new_empty(r, *layer.weight.shape[1:]))
    copied = copy.deepcopy(layer, {id(layer.weight): weight, id(layer.bias): None})
    setattr(copied, "out_features" if isinstance(layer, nn.Linear) else "out_channels", r)
    return copied


class Product(NamedTuple):
    """One call of `F.linear` or `F.conv2d`.

    Attributes:
        operands: the arguments by name.
        output: the result.
        version: version counter of `output` after the call; an in-place operation increments it.
    """

    operands: dict[str, Any]
    output: Tensor
    version: int


class _ProductWatcher(TorchFunctionMode):
    """Pass every product inside the block to `callback`."""

    def __init__(self, callback: Callable[[Product], None]):
        super().__init__()
        self.callback = callback

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d):
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            self.callback(Product(dict(zip(names, args)) | (kwargs or {}), output, output._version))
        return output


def custom_forward_reason(layer: MatrixLayer) -> str | None:
    """Return why a custom `forward` is not a plain matrix product, or None if it only prepares the input."""
    name = f"the forward of {type(layer).__name__}"
    layer = meta_copy(layer).eval()
    inputs = torch.empty(sample_shape(layer), dtype=layer.weight.dtype, device="meta")
    products: list[Product] = []
    with torch.no_grad(), _ProductWatcher(products.append):
        output = layer.forward(inputs)
    if len(products) != 1:
        return f"{name} makes {len(products)} calls of F.linear or F.conv2d instead of one"
    [product] = products
    if product.operands["weight"] is not layer.weight:
        return f"{name} computes the weight: nothing can be put in its place"
    if product.operands.get("bias") is not layer.bias:
        return f"{name} computes the bias"
    if product.operands.get("groups", 1) != 1:
        return f"{name} multiplies in groups"
    unchanged = output is product.output and output._version == product.version and inputs._version == 0
    return None if unchanged else f"{name} does more than multiply"


def sample_shape(layer: MatrixLayer) -> tuple[int, ...]:
    """Return the shape of a small input: two vectors, or one image slightly larger than the kernel."""
    if isinstance(layer, nn.Linear):
        return 2, layer.in_features
    return 1, layer.in_channels, *(dilation * k + 1 for dilation, k in zip(layer.dilation, layer.kernel_size))


def standard_layer(layer: MatrixLayer, operands: dict[str, Any]) -> MatrixLayer:
    """Return an `nn.Linear` or `nn.Conv2d` on the meta device that computes the product with these operands."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, device="meta")
    geometry = {name: operands[name] for name in ("stride", "padding", "dilation") if name in operands}
    m, c, height, width = layer.weight.shape
    return nn.Conv2d(c, m, (height, width), **geometry, device="meta")


def watch_inputs(
    model: nn.Module,
    images: Tensor,
    layers: dict[str, MatrixLayer],
    callback: Callable[[str, MatrixLayer, Tensor], None],
) -> None:
    """Run the network and call `callback(name, layer, inputs)` for every product with a weight of `layers`.

    `inputs` is the tensor that is multiplied, for example an image that a custom forward has padded. `layer` is the
    `standard_layer` for this product. The product is observed even if another module reads the weight and computes it.
    """
    names = {id(layer.weight): name for name, layer in layers.items()}

    def on_product(product: Product) -> None:
        name = names.get(id(product.operands["weight"]))
        if name is not None:
            callback(name, standard_layer(layers[name], product.operands), product.operands["input"])

    with _ProductWatcher(on_product):
        model(images)


def weight_matrix(layer: MatrixLayer) -> Tensor:
    """Return a float64 copy of W (d, m) of a layer, on the layer's device (on the CPU for MPS, which has no float64).

    >>> weight_matrix(nn.Conv2d(3, 8, kernel_size=5)).shape
    torch.Size([75, 8])
    """
    weight = layer.weight.detach().flatten(1).T
    return (weight.cpu() if weight.device.type == "mps" else weight).to(torch.float64, copy=True)


@torch.no_grad()
def set_weight_matrix(layer: MatrixLayer, W: Tensor) -> None:
    """Write W (d, m) into a layer in place, rounded to the layer's precision.

    >>> layer = nn.Linear(3, 2)
    >>> set_weight_matrix(layer, torch.ones(3, 2))
    >>> layer.weight.sum().item()
    6.0

    Raises:
        ValueError: W does not have the shape of the layer's matrix.
    """
    m, *features = layer.weight.shape
    if W.shape != (math.prod(features), m):
        raise ValueError(f"W must be {math.prod(features)} x {m} for this layer, got shape {tuple(W.shape)}")
    layer.weight.copy_(W.T.reshape(layer.weight.shape))


def input_rows(layer: MatrixLayer, inputs: Tensor) -> Tensor:
    """Return the rows X (rows, d) that `layer` multiplies by W.

    Args:
        inputs: (..., d) for a linear layer, (n, c_in, h, w) for a convolution.

    >>> input_rows(nn.Conv2d(3, 8, kernel_size=5), torch.randn(2, 3, 32, 32)).shape
    torch.Size([1568, 75])
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, layer.in_features)
    patches = F.unfold(pad(layer, inputs), layer.kernel_size, layer.dilation, stride=layer.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def pad(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """Pad images (n, c, h, w) as `conv` does, with any padding mode and size, including "same"."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(images, conv._reversed_padding_repeated_twice, mode=mode)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Use evaluation mode inside the block, without gradients, autocast or TF32; then restore every module's mode."""
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
