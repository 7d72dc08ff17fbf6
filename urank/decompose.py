"""From a rank plan to a compact network: W' into the layers, then two thin layers for one.

A linear layer becomes d -> r -> m, a convolution k x k to r channels and 1 x 1 to m; the bias stays with the second.
Both start as the singular value decomposition of the weight, singular values folded into the second factor
(section 5.4). Two factors are smaller than W where r (d + m) < d m.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from urank.files import read_weights, write_weights
from urank.layers import MatrixLayer, evaluating, matrix_layers, set_weight_matrix, weight_matrix
from urank.plan import LayerRank, RankPlan
from urank.subspaces import Spectrum, output_gram
from urank.utilization import project_weight


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
        W = weight_matrix(layer)
        inputs, outputs = Spectrum.of(grams[entry.layer]), Spectrum.of(output_gram(grams[entry.layer], W))
        set_weight_matrix(layer, project_weight(W, inputs, outputs, entry.k_s, entry.k_t))
    return network


def planned_layers(model: nn.Module, plan: RankPlan) -> list[tuple[LayerRank, MatrixLayer]]:
    """Each entry of `plan` with the layer it speaks of; a plan of another network is refused."""
    layers = matrix_layers(model)
    for entry in plan.layers:
        if entry.layer not in layers:
            raise ValueError(f"the plan speaks of a layer {entry.layer!r} that the network does not have")
        shape = tuple(weight_matrix(layers[entry.layer]).shape)
        if shape != (entry.d, entry.m):
            raise ValueError(f"layer {entry.layer!r} is {shape[0]} x {shape[1]}, in the plan {entry.d} x {entry.m}")
    return [(entry, layers[entry.layer]) for entry in plan.layers]


def decompose(model: nn.Module, plan: RankPlan, useful_only: bool = False) -> nn.Module:
    """A copy of `model` in which each layer of `plan` is two thin ones of the plan's rank.

    The layers are factored as they are: to keep what the search measured, pass `project_network(...)`, whose weights
    are W'. On the unaltered network the same call is the plain truncated SVD of W.

    Args:
        useful_only: split only the layers whose two factors hold fewer weights than the one; default all of them, as
            in the paper's fine-tuning.
    """
    network = copy.deepcopy(model)
    for entry, layer in planned_layers(network, plan):
        if entry.useful or not useful_only:
            network.set_submodule(entry.layer, split(layer, max(1, entry.rank)))
    return network


def factor(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (d, r) with orthonormal columns and B (r, m) such that A B is the best rank-r approximation of W (d, m)."""
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r], sigma[:r, None] * Vh[:r]


def split(layer: MatrixLayer, r: int) -> nn.Sequential:
    """Two layers of rank r, without anything between them, in place of `layer`; r is at most min(d, m)."""
    W = weight_matrix(layer)
    A, B = factor(W, r)
    first, second = empty_split(layer, A.shape[1])
    set_weight_matrix(first, A)
    set_weight_matrix(second, B)
    if layer.bias is not None:
        second.bias.data.copy_(layer.bias.data)
    return nn.Sequential(first, second)


def empty_split(layer: MatrixLayer, r: int) -> nn.Sequential:
    """The two layers of `split` before they have weights, on the device and in the precision of `layer`."""
    like = dict(device=layer.weight.device, dtype=layer.weight.dtype)
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Sequential(
            nn.Linear(layer.in_features, r, bias=False, **like), nn.Linear(r, layer.out_features, bias, **like)
        )
    geometry = dict(
        stride=layer.stride, padding=layer.padding, dilation=layer.dilation, padding_mode=layer.padding_mode
    )
    return nn.Sequential(
        nn.Conv2d(layer.in_channels, r, layer.kernel_size, bias=False, **geometry, **like),
        nn.Conv2d(r, layer.out_channels, 1, bias=bias, **like),
    )


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
            network.set_submodule(entry.layer, merged)
    return network


@dataclass(frozen=True)
class Cost:
    """Parameters of a network, and the multiply-accumulate operations its matrices take for one image."""

    params: int
    macs: int


def count_cost(model: nn.Module, image_shape: tuple[int, ...] = (3, 32, 32)) -> Cost:
    """Count all parameters, and the MACs of linear layers and convolutions for one image (c, h, w).

    A layer costs one MAC for each weight and each row it multiplies. Norms, activations and biases are not counted.
    """
    macs = 0

    def count(layer: nn.Module, _, output: Tensor) -> None:
        nonlocal macs
        macs += layer.weight.numel() * (output.numel() // layer.weight.shape[0])

    layers = [module for module in model.modules() if isinstance(module, MatrixLayer)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with evaluating(model):
            model(next(model.parameters()).new_zeros(1, *image_shape))
    finally:
        for handle in handles:
            handle.remove()
    return Cost(sum(parameter.numel() for parameter in model.parameters()), macs)


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
        first = state.get(f"{entry.layer}.0.weight")
        if first is not None:
            network.set_submodule(entry.layer, empty_split(layer, first.shape[0]))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{weights}: weights of another network than {type(model).__name__}: {error}") from error
    return network
