"""From a rank plan to a compact network: W' into the layers, then two thin layers for one.

A linear layer becomes d -> r -> m, a convolution k x k to r channels and 1 x 1 to m; the bias stays with the second.
Both start as the singular value decomposition of the weight, singular values folded into the second factor
(section 5.4). Two factors are smaller than W where r (d + m) < d m.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from urank.files import read_weights, write_weights
from urank.layers import MatrixLayer, evaluating, matrix_layers, set_weight_matrix, thin, weight_matrix
from urank.plan import LayerRank, RankPlan
from urank.subspaces import layer_spectra, project_weight


def project_network(model: nn.Module, plan: RankPlan, grams: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with W' = P_S W P_T in every layer of `plan`.

    Args:
        grams: X^T X (d, d) of the unmodified network's layers.

    Raises:
        ValueError: the plan is not one of this network.
    """
    network = copy.deepcopy(model)
    for entry, layer in planned_layers(network, plan):
        if entry.layer not in grams:
            raise ValueError(f"the plan speaks of layer {entry.layer!r}, for which no Gram matrix is given")
        project_layer(layer, grams[entry.layer], entry.k_s, entry.k_t)
    return network


def planned_layers(model: nn.Module, plan: RankPlan) -> list[tuple[LayerRank, MatrixLayer]]:
    """Each entry of `plan` with the layer it speaks of; a plan of another network is refused."""
    layers, seen = matrix_layers(model), set()
    for entry in plan.layers:
        if entry.layer not in layers:
            raise ValueError(f"the plan speaks of a layer {entry.layer!r} that the network does not have")
        if entry.layer in seen:
            raise ValueError(f"the plan speaks of layer {entry.layer!r} twice")
        seen.add(entry.layer)
        d, m = weight_matrix(layers[entry.layer]).shape
        if (d, m) != (entry.d, entry.m):
            raise ValueError(f"layer {entry.layer!r} is {d} x {m}, in the plan {entry.d} x {entry.m}")
        if not 0 <= entry.rank <= min(d, m):
            raise ValueError(f"layer {entry.layer!r} is {d} x {m}: its rank cannot be {entry.rank}, as the plan says")
    return [(entry, layers[entry.layer]) for entry in plan.layers]


def put(network: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """`network` with `module` in the place of what is at `path`; `module` itself where that is all of the network.

    Raises:
        ValueError: an attribute that is no submodule (a list of layers, say) would go on using what was there.
    """
    if path == "":
        return module
    old = network.get_submodule(path)
    for name, holder in network.named_modules():
        for attribute, value in vars(holder).items():
            if attribute != "_modules" and any(leaf is old for leaf in tree_leaves(value)):
                where = f"{name}.{attribute}".removeprefix(".")
                raise ValueError(f"{path} is also in {where}, which would go on using it: look it up by its path there")
    network.set_submodule(path, module)
    return network


def decompose(model: nn.Module, plan: RankPlan, useful_only: bool = False) -> nn.Module:
    """A copy of `model` in which each layer of `plan` is two thin ones of the plan's rank.

    The layers are factored as they are: to keep what the search measured, pass `project_network(...)`, whose weights
    are W'. On the unaltered network the same call is the plain truncated SVD of W.

    Args:
        useful_only: split only the layers whose two factors hold fewer weights than the one; default all of them, as
            in the paper's fine-tuning.

    Raises:
        ValueError: the plan is not one of this network, or a layer has a forward hook: it would run between the two.
    """
    network = copy.deepcopy(model)
    for entry, layer in planned_layers(network, plan):
        if entry.useful or not useful_only:
            if layer._forward_hooks:
                raise ValueError(f"layer {entry.layer!r} has a forward hook, made for what it returns: remove it first")
            network = put(network, entry.layer, split(layer, max(1, entry.rank)))
    return network


def factor(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (d, r) with orthonormal columns and B (r, m) such that A B is the best rank-r approximation of W (d, m)."""
    U, sigma, Vh = torch.linalg.svd(W.cpu(), full_matrices=False)  # on the processor, as `singular_values`
    return U[:, :r].to(W), (sigma[:r, None] * Vh[:r]).to(W)


class Factors(nn.Sequential):
    """Two thin layers in place of one, without anything between them.

    Some networks read a layer's weight instead of calling it, for its dtype or to multiply by it themselves: they get
    the product, which saves weights but no multiplication.
    """

    @property
    def weight(self) -> Tensor:
        first, second = (layer.weight for layer in self)
        return (second.flatten(1) @ first.flatten(1)).view(len(second), *first.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        return self[1].bias


def split(layer: MatrixLayer, r: int) -> Factors:
    """Two layers of rank r, without anything between them, in place of `layer`; r is at most min(d, m)."""
    W = weight_matrix(layer)
    A, B = factor(W, r)
    first, second = empty_split(layer, A.shape[1])
    set_weight_matrix(first, A)
    set_weight_matrix(second, B)
    if layer.bias is not None:
        second.bias.data.copy_(layer.bias.data)
    return Factors(first, second)


def empty_split(layer: MatrixLayer, r: int) -> Factors:
    """The two layers of `split` before they have weights, on the device and in the precision of `layer`.

    The first is a copy of `layer`, so that what its own forward does (padding, say) is still done; the second is
    torch's plain linear layer or 1 x 1 convolution.
    """
    like = dict(bias=layer.bias is not None, device=layer.weight.device, dtype=layer.weight.dtype)
    if isinstance(layer, nn.Linear):
        return Factors(thin(layer, r), nn.Linear(r, layer.out_features, **like))
    return Factors(thin(layer, r), nn.Conv2d(r, layer.out_channels, 1, **like))


def merge_useless(compact: nn.Module, original: nn.Module, plan: RankPlan) -> nn.Module:
    """A copy of `compact` where the pairs that save nothing are one layer again, W = A B.

    It computes what `compact` computes and is what savings are reported on (section 3).

    Args:
        compact: a network that `decompose` split in every layer, fine-tuned or not.
        original: the network before that; only its layers' shapes are used.
    """
    network = copy.deepcopy(compact)
    for entry, layer in planned_layers(original, plan):
        if not entry.useful:
            pair = network.get_submodule(entry.layer)
            if not isinstance(pair, nn.Sequential):
                raise ValueError(f"layer {entry.layer!r} is not split: there is nothing to merge")
            first, second = pair
            merged = copy.deepcopy(layer).to(first.weight.device)
            set_weight_matrix(merged, weight_matrix(first) @ weight_matrix(second))
            if merged.bias is not None:
                merged.bias.data.copy_(second.bias.data)
            network = put(network, entry.layer, merged)
    return network


@dataclass(frozen=True)
class Cost:
    """Parameters of a network, and the multiply-accumulate operations its products take for one image."""

    params: int
    macs: int


def count_cost(model: nn.Module, image_shape: tuple[int, ...] = (3, 32, 32)) -> Cost:
    """Count all parameters, and the MACs of all matrix products and convolutions for one image (c, h, w).

    A layer costs one MAC for each weight and each row it multiplies; attention also Q K^T and the product with V,
    2 n^2 d for n tokens of width d. Norms, activations and biases are not counted.
    """
    image = next(model.parameters()).new_zeros(1, *image_shape)
    with evaluating(model), products_in_sight(), FlopCounterMode(display=False) as counter:
        model(image)
    return Cost(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2)


@contextmanager
def products_in_sight() -> Iterator[None]:
    """Inside the block attention is computed by single products: the flop counter does not see into fused kernels."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def save_compact(model: nn.Module, plan: RankPlan, folder: Path | str) -> None:
    """Write a compact network as `weights.safetensors` and its plan as `plan.json` into `folder`."""
    plan.save(Path(folder) / "plan.json")
    write_weights(Path(folder) / "weights.safetensors", model)


def load_compact(model: nn.Module, folder: Path | str) -> nn.Module:
    """Rebuild what `save_compact` wrote on a copy of `model`, the network before it was split (weights not used).

    Raises:
        ValueError: a damaged file, or a plan or weights of another network.
    """
    plan = RankPlan.load(Path(folder) / "plan.json")
    weights = Path(folder) / "weights.safetensors"
    state = read_weights(weights)
    network = copy.deepcopy(model)
    for entry, layer in planned_layers(network, plan):
        first = state.get(f"{entry.layer}.0.weight".lstrip("."))
        if first is not None:
            network = put(network, entry.layer, empty_split(layer, first.shape[0]))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{weights}: weights of another network than {type(model).__name__}: {error}") from error
    return network


def project_layer(layer: MatrixLayer, gram: Tensor, k_s: int, k_t: int) -> None:
    """Put W' in the place of the layer's W; `gram` is X^T X (d, d) of the unmodified network's layer."""
    W = weight_matrix(layer)
    set_weight_matrix(layer, project_weight(W, *layer_spectra(gram, W), k_s, k_t))
