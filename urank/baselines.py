"""Baselines for the search: other rules that choose the rank plan of a network.

`weight_svd` and `output_pca` keep the ranks of an existing plan but choose other directions. Among all W' of rank r,
the truncated SVD of W minimizes ||W - W'||_F. With the first r right singular vectors V_r of Y = XW, W' = W V_r V_r^T
minimizes ||XW - XW'||_F: X W' = Y V_r V_r^T is the best rank-r approximation of Y (Eckart and Young, 1936).
`energy_rank` measures no accuracy and keeps the same share of the spectral energy in every layer.

Every plan becomes a network in the same way, `decompose(project_network(model, plan, grams), plan)`: `project_network`
applies k_S and k_T, and `decompose` keeps the first `rank` singular directions of the result.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from urank.factorize import check_plan_grams, planned_layers
from urank.layers import matrix_layers, weight_matrix
from urank.plan import LayerRank, RankPlan
from urank.search.bisection import check_grams
from urank.search.protocol import check_sides
from urank.subspaces import dimension_for_energy, layer_spectra, project_weight, utilized_rank


def weight_svd(model: nn.Module, plan: RankPlan) -> RankPlan:
    """Return the plan that keeps the leading singular directions of W at the ranks of `plan`; it uses no data.

    Neither side is projected (k_S = d, k_T = m), so `decompose` computes the truncated SVD of W.

    >>> import torch
    >>> network = nn.Linear(8, 6)
    >>> plan = energy_rank(network, {"": torch.eye(8)}, energy=0.5)
    >>> [(layer.rank, layer.k_s, layer.k_t) for layer in weight_svd(network, plan).layers] == [(plan[""].rank, 8, 6)]
    True

    Raises:
        ValueError: the plan does not match the network.
    """
    entries = [entry for entry, _ in planned_layers(model, plan)]
    return plan_without_accuracy("weight_svd", [replace(entry, k_s=entry.d, k_t=entry.m) for entry in entries])


def output_pca(model: nn.Module, grams: Mapping[str, Tensor], plan: RankPlan) -> RankPlan:
    """Return the plan that keeps the leading directions of the outputs at the ranks of `plan`: W' = W V_r V_r^T.

    No other W' of rank r is closer to XW on the calibration data. Yu and Wu (AAAI 2023) compress vision transformers
    like this, but subtract the mean of the outputs; this package never subtracts the mean.

    Args:
        grams: X^T X (d, d) of the layers of the unmodified network, from `accumulate_grams`.

    >>> import torch
    >>> network, grams = nn.Linear(8, 6), {"": torch.eye(8)}
    >>> plan = energy_rank(network, grams, energy=0.5)
    >>> [(layer.k_s, layer.k_t) for layer in output_pca(network, grams, plan).layers] == [(8, plan[""].rank)]
    True

    Raises:
        ValueError: the plan does not match the network, or `grams` lacks one of its layers.
    """
    entries = [entry for entry, _ in planned_layers(model, plan)]
    check_plan_grams(plan, grams)
    check_grams(model, grams)
    kept = [replace(entry, k_s=entry.d, k_t=max(1, entry.rank)) for entry in entries]
    return plan_without_accuracy("output_pca", kept)


def energy_rank(model: nn.Module, grams: Mapping[str, Tensor], energy: float = 0.99, sides: str = "both") -> RankPlan:
    """Return the plan in which S and T hold the share `energy` of the spectral energy of every layer in `grams`.

    With sides="output", k_T / m is the layer saturation of delve (Shenk et al., arXiv 1907.08589; Richter et al., arXiv
    2006.08679), except that saturation subtracts the mean. `error_bound` bounds the error of each layer.

    Args:
        grams: X^T X (d, d) of the layers of the unmodified network, from `accumulate_grams`.
        energy: share between 0 and 1, the same for both sides.
        sides: "both", or "input" or "output" to project only this side.

    >>> import torch
    >>> gram = torch.diag(torch.tensor([6.0, 3.0, 1.0]))
    >>> energy_rank(nn.Linear(3, 5), {"": gram}, energy=0.8, sides="input")[""].k_s
    2

    Raises:
        ValueError: `energy` or `sides` is invalid, `grams` is empty, or a Gram matrix does not match its layer.
        FloatingPointError: a Gram matrix contains NaN or infinity.
    """
    check_sides(sides)
    check_grams(model, grams)
    layers = matrix_layers(model)
    entries = [energy_entry(name, weight_matrix(layers[name]), grams[name], energy, sides) for name in grams]
    return plan_without_accuracy(f"energy_rank({energy}, {sides})", entries)


def energy_entry(name: str, W: Tensor, gram: Tensor, energy: float, sides: str) -> LayerRank:
    """Return one layer's k_S and k_T, which hold the share `energy`, and the rank of its W'."""
    d, m = W.shape
    inputs, outputs = layer_spectra(gram, W)
    k_s = d if sides == "output" else dimension_for_energy(inputs, energy)
    k_t = m if sides == "input" else dimension_for_energy(outputs, energy)
    rank = utilized_rank(project_weight(W, inputs, outputs, k_s, k_t))
    return LayerRank(name, d, m, utilized_rank(W), k_s, k_t, rank, correct=None)


def plan_without_accuracy(rule: str, entries: list[LayerRank]) -> RankPlan:
    """Return a plan chosen by `rule`, for which no accuracy was measured."""
    layers = tuple(replace(entry, correct=None) for entry in entries)
    return RankPlan(layers, tolerance=None, mode=rule, total=0, correct=None)
