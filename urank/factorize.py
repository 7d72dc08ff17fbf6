"""Turn a rank plan into a compact network: project the weights, then replace each layer by two thin ones.

A linear layer d -> m becomes d -> r -> m. A k x k convolution becomes a k x k convolution to r channels and a 1 x 1
convolution to m; the bias moves to the second layer. Both start from the singular value decomposition of the weight,
with the singular values in the second factor (section 5.4). The two layers have fewer weights if r (d + m) < d m.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from urank.files import read_weights, write_weights
from urank.layers import (
    MatrixLayer,
    count_params,
    evaluating,
    matrix_layers,
    set_weight_matrix,
    weight_matrix,
    with_outputs,
)
from urank.plan import LayerRank, RankPlan
from urank.subspaces import Spectrum, output_gram, project_weight


def project_network(model: nn.Module, plan: RankPlan, grams: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of `model` with W' = P_S W P_T in every layer of `plan`.

    Args:
        grams: X^T X (d, d) of the layers of the unmodified network, from `accumulate_grams`.

    >>> import urank
    >>> network, images = nn.Linear(8, 6), torch.randn(100, 3) @ torch.randn(3, 8)
    >>> grams = urank.accumulate_grams(network, [images], progress=False)
    >>> projected = project_network(network, urank.energy_rank(network, grams, energy=1 - 1e-9), grams)
    >>> urank.utilized_rank(weight_matrix(network)), urank.utilized_rank(weight_matrix(projected))
    (6, 3)

    Raises:
        ValueError: the plan does not match the network, or `grams` lacks one of its layers.
    """
    network = copy.deepcopy(model)
    layers = planned_layers(network, plan)
    check_plan_grams(plan, grams)
    for entry, layer in layers:
        project_layer(layer, grams[entry.layer], entry.k_s, entry.k_t)
    return network


def project_layer(layer: MatrixLayer, gram: Tensor, k_s: int, k_t: int) -> None:
    """Replace W by W' = P_S W P_T in place; `gram` is X^T X (d, d) of this layer in the unmodified network."""
    W = weight_matrix(layer)
    gram = gram.to(W)
    outputs = Spectrum.of(output_gram(gram, W))
    inputs = Spectrum.of(gram) if k_s < len(W) else outputs  # not used if k_s = d, and slow for large d
    set_weight_matrix(layer, project_weight(W, inputs, outputs, k_s, k_t))


def planned_layers(model: nn.Module, plan: RankPlan) -> list[tuple[LayerRank, MatrixLayer]]:
    """Return each entry of `plan` with its layer.

    Raises:
        ValueError: the plan contains a layer that the network does not have, a layer twice, or other shapes or ranks
            than are possible in this network.
    """
    layers, seen = matrix_layers(model), set()
    for entry in plan.layers:
        name = entry.layer
        if name not in layers:
            known = ", ".join(map(repr, layers))
            raise ValueError(f"the plan contains layer {name!r}, which this network does not have (layers: {known})")
        if name in seen:
            raise ValueError(f"the plan contains layer {name!r} twice")
        seen.add(name)
        d, m = weight_matrix(layers[name]).shape
        if (d, m) != (entry.d, entry.m):
            raise ValueError(f"layer {name!r} is {d} x {m} in this network but {entry.d} x {entry.m} in the plan")
        if not 0 <= entry.rank <= min(d, m):
            raise ValueError(f"layer {name!r}: its rank must be between 0 and {min(d, m)}, the plan has {entry.rank}")
    return [(entry, layers[entry.layer]) for entry in plan.layers]


def check_plan_grams(plan: RankPlan, grams: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a layer of the plan has no Gram matrix."""
    missing = [entry.layer for entry in plan.layers if entry.layer not in grams]
    if missing:
        raise ValueError(f"grams has no Gram matrix for these layers of the plan: {', '.join(map(repr, missing))}")


def decompose(model: nn.Module, plan: RankPlan, useful_only: bool = False, balanced: bool = False) -> nn.Module:
    """Return a copy of `model` in which two thin layers replace each layer of `plan`.

    Each pair is the best approximation of the layer's current weight with the rank in the plan. To get the network that
    the search measured, pass `project_network(model, plan, grams)`, whose weights are W'. For the unprojected network
    the result is the truncated SVD of W.

    Args:
        useful_only: replace a layer only if this saves weights; by default all are replaced, as for the paper's
            fine-tuning.
        balanced: give both factors the square roots of the singular values, instead of all to the second one.

    >>> network = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    >>> layer = LayerRank("0", d=8, m=6, weight_rank=6, k_s=8, k_t=6, rank=2, correct=None)
    >>> decompose(network, RankPlan((layer,), tolerance=None, mode="example", total=0, correct=None))[0]
    Factors(
      (0): Linear(in_features=8, out_features=2, bias=False)
      (1): Linear(in_features=2, out_features=6, bias=True)
    )

    Raises:
        ValueError: the plan does not match the network, or a layer has a forward hook or a second reference to it.
    """
    network = copy.deepcopy(model)
    for entry, layer in planned_layers(network, plan):
        if entry.useful or not useful_only:
            if layer._forward_hooks:
                raise ValueError(f"layer {entry.layer!r} has a forward hook: remove it before the layer is replaced")
            network = replace_module(network, entry.layer, split(layer, max(1, entry.rank), balanced))
    return network


def replace_module(network: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Replace the submodule at `path` in place and return the network, or `module` itself if the path is empty.

    Raises:
        ValueError: an attribute other than a submodule, such as a list of layers, also refers to the old module.
    """
    if path == "":
        return module
    old = network.get_submodule(path)
    for name, holder in network.named_modules():
        for attribute, value in vars(holder).items():
            if attribute != "_modules" and any(leaf is old for leaf in tree_leaves(value)):
                where = f"{name}.{attribute}".removeprefix(".")
                raise ValueError(
                    f"layer {path!r} cannot be replaced because {where!r} also refers to it: use only the submodule in "
                    "the network's code"
                )
    network.set_submodule(path, module)
    return network


def factor(W: Tensor, r: int, balanced: bool = False) -> tuple[Tensor, Tensor]:
    """Return A (d, r) and B (r, m): A B is the best rank-r approximation of W (d, m).

    The columns of A are orthonormal, or both factors have the square roots of the singular values if `balanced`.
    """
    U, sigma, Vh = torch.linalg.svd(W.cpu(), full_matrices=False)  # on the CPU, like `singular_values`
    first, second = (sigma.sqrt(), sigma.sqrt()) if balanced else (torch.ones_like(sigma), sigma)
    return (U * first)[:, :r].to(W), (second[:, None] * Vh)[:r].to(W)


class Factors(nn.Sequential):
    """Two thin layers that replace one layer.

    Some networks read the weight of a layer instead of calling it. For them `weight` is the product of both factors:
    this saves parameters but no multiplications.
    """

    @property
    def pair(self) -> tuple[MatrixLayer, MatrixLayer]:
        """Both layers, in the order in which they are called."""
        first, second = self
        return cast(MatrixLayer, first), cast(MatrixLayer, second)

    @property
    def weight(self) -> Tensor:
        """The product of both weights, with the shape of the original layer's weight."""
        first, second = (layer.weight for layer in self.pair)
        return (second.flatten(1) @ first.flatten(1)).view(len(second), *first.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        """The bias of the second layer."""
        return self.pair[1].bias


def split(layer: MatrixLayer, r: int, balanced: bool = False) -> Factors:
    """Return the two layers whose product is the best rank-r approximation of `layer`; r <= min(d, m)."""
    W = weight_matrix(layer)
    A, B = factor(W, r, balanced)
    factors = empty_factors(layer, A.shape[1])
    first, second = factors.pair
    set_weight_matrix(first, A)
    set_weight_matrix(second, B)
    copy_bias(layer, second)
    return factors


def copy_bias(source: MatrixLayer, target: MatrixLayer) -> None:
    """Copy the bias of one layer to another in place, if the layers have one."""
    if source.bias is not None and target.bias is not None:
        target.bias.data.copy_(source.bias.data)


def empty_factors(layer: MatrixLayer, r: int) -> Factors:
    """Return the two layers of rank r with uninitialized weights, on the device and in the precision of `layer`.

    The first is a copy of `layer` with r outputs, so it keeps a custom forward (padding, for example).
    """
    like: dict[str, Any] = dict(bias=layer.bias is not None, device=layer.weight.device, dtype=layer.weight.dtype)
    if isinstance(layer, nn.Linear):
        return Factors(with_outputs(layer, r), nn.Linear(r, layer.out_features, **like))
    return Factors(with_outputs(layer, r), nn.Conv2d(r, layer.out_channels, 1, **like))


def merge_useless(compact: nn.Module, original: nn.Module, plan: RankPlan) -> nn.Module:
    """Return a copy of `compact` in which pairs that save no weights are one layer again, W = A B.

    The outputs stay the same. Savings are reported for this network (section 3).

    Args:
        compact: network from `decompose` with every layer of `plan` replaced, fine-tuned or not.
        original: the network before `decompose`; only the shapes of its layers are used.

    >>> network = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    >>> layer = LayerRank("0", d=8, m=6, weight_rank=6, k_s=8, k_t=6, rank=5, correct=None)
    >>> plan = RankPlan((layer,), tolerance=None, mode="example", total=0, correct=None)
    >>> merge_useless(decompose(network, plan), network, plan)[0]
    Linear(in_features=8, out_features=6, bias=True)

    Raises:
        ValueError: the plan does not match `original`, or a layer of `compact` is not a pair.
    """
    network = copy.deepcopy(compact)
    for entry, layer in planned_layers(original, plan):
        if not entry.useful:
            factors = network.get_submodule(entry.layer)
            if not isinstance(factors, Factors):
                raise ValueError(f"layer {entry.layer!r} is not decomposed, so there is nothing to merge")
            network = replace_module(network, entry.layer, merged(factors, layer))
    return network


def merged(factors: Factors, layer: MatrixLayer) -> MatrixLayer:
    """Return a copy of `layer` with the product of the factors as its weight."""
    first, second = factors.pair
    single = copy.deepcopy(layer).to(first.weight.device)
    set_weight_matrix(single, weight_matrix(first) @ weight_matrix(second))
    copy_bias(second, single)
    return single


@dataclass(frozen=True)
class Cost:
    """Number of parameters of a network and of multiply-accumulate operations (MACs) for one image."""

    params: int
    macs: int


def count_cost(model: nn.Module, image_shape: tuple[int, ...] = (3, 32, 32)) -> Cost:
    """Count all parameters, and the MACs of all matrix products and convolutions, for one image (c, h, w).

    A layer has one MAC per weight and row of X. Attention adds Q K^T and the product with V: 2 n^2 d for n tokens of
    width d. Normalization, activations and biases are not counted.

    >>> count_cost(nn.Conv2d(3, 8, kernel_size=3, padding=1, bias=False))  # 216 weights, 32 x 32 positions
    Cost(params=216, macs=221184)
    """
    image = next(model.parameters()).new_zeros(1, *image_shape)
    with evaluating(model), unfused_attention(), FlopCounterMode(display=False) as counter:
        model(image)
    return Cost(count_params(model), counter.get_total_flops() // 2)


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Compute attention as separate matrix products inside the block: the FLOP counter ignores fused kernels."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def save_compact(model: nn.Module, plan: RankPlan, folder: Path | str) -> None:
    """Write a compact network to `folder`: its weights to `weights.safetensors` and its plan to `plan.json`.

    >>> import tempfile
    >>> network = nn.Sequential(nn.Linear(8, 6))
    >>> layer = LayerRank("0", d=8, m=6, weight_rank=6, k_s=8, k_t=6, rank=2, correct=None)
    >>> plan = RankPlan((layer,), tolerance=None, mode="example", total=0, correct=None)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_compact(decompose(network, plan), plan, folder)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['plan.json', 'weights.safetensors']
    """
    plan.save(Path(folder) / "plan.json")
    write_weights(Path(folder) / "weights.safetensors", model)


def load_compact(model: nn.Module, folder: Path | str) -> nn.Module:
    """Return the compact network that `save_compact` wrote.

    Args:
        model: the network before `decompose`; only its structure is used, not its weights.

    >>> import tempfile
    >>> network = nn.Sequential(nn.Linear(8, 6))
    >>> layer = LayerRank("0", d=8, m=6, weight_rank=6, k_s=8, k_t=6, rank=2, correct=None)
    >>> plan = RankPlan((layer,), tolerance=None, mode="example", total=0, correct=None)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_compact(decompose(network, plan), plan, folder)
    ...     load_compact(network, folder)[0].pair[0]
    Linear(in_features=8, out_features=2, bias=False)

    Raises:
        ValueError: a file is damaged, or the plan or the weights do not match the network.
    """
    plan = RankPlan.load(Path(folder) / "plan.json")
    weights = Path(folder) / "weights.safetensors"
    state = read_weights(weights)
    network = copy.deepcopy(model)
    for entry, layer in planned_layers(network, plan):
        first = state.get(f"{entry.layer}.0.weight".lstrip("."))
        if first is not None:
            network = replace_module(network, entry.layer, empty_factors(layer, first.shape[0]))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{weights}: the weights do not match {type(model).__name__} ({error})") from error
    return network
