"""Other ways to choose what a layer keeps, as rank plans: what the search is to be compared with.

Two rules take their ranks from a plan and spend them otherwise. Of all W' of rank r, the truncated SVD of W has the
least ||W - W'||_F. The least ||XW - XW'||_F has W' = W V_r V_r^T, where V_r are the first r right singular vectors of
Y = XW: Y V_r V_r^T is the best approximation of Y of rank r (Eckart and Young, 1936), and X W' is that very matrix.
The third rule asks no accuracy: it keeps a share of spectral energy in every layer.

A plan of any rule becomes a network in the same way, `decompose(project_network(model, plan, grams), plan)`:
`project_network` applies k_S and k_T, and `decompose` keeps the `rank` leading singular directions of the result.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from urank.factorize import planned_layers
from urank.layers import matrix_layers, weight_matrix
from urank.plan import LayerRank, RankPlan
from urank.search.bisection import check_grams
from urank.subspaces import dimension_for_energy, layer_spectra, project_weight, utilized_rank

SIDES = ("both", "input", "output")


def weight_svd(model: nn.Module, plan: RankPlan) -> RankPlan:
    """The plan that keeps, at the ranks of `plan`, the leading singular directions of W; it looks at no data.

    Neither side is projected: k_S = d, k_T = m, and the truncation is `decompose`'s.

    Raises:
        ValueError: `plan` is not one of this network.
    """
    entries = [entry for entry, _ in planned_layers(model, plan)]
    return by_rule("weight_svd", [replace(entry, k_s=entry.d, k_t=entry.m, correct=None) for entry in entries])


def output_pca(model: nn.Module, grams: Mapping[str, Tensor], plan: RankPlan) -> RankPlan:
    """The plan that keeps, at the ranks of `plan`, the leading directions of the outputs: W' = W V_r V_r^T.

    Nothing of rank r comes closer to XW on the calibration data. Yu and Wu (AAAI 2023) compress vision transformers in
    this way, about the outputs' mean; here, as everywhere in this package, nothing is centred.

    Args:
        grams: X^T X (d, d) of the unmodified network's layers, as `project_network` will need them.

    Raises:
        ValueError: `plan` is not one of this network, or `grams` lacks one of its layers.
    """
    entries = [entry for entry, _ in planned_layers(model, plan)]
    missing = [entry.layer for entry in entries if entry.layer not in grams]
    if missing:
        raise ValueError(f"the plan speaks of layers for which no Gram matrix is given: {', '.join(missing)}")
    check_grams(model, grams)
    kept = [replace(entry, k_s=entry.d, k_t=max(1, entry.rank), correct=None) for entry in entries]
    return by_rule("output_pca", kept)


def energy_rank(model: nn.Module, grams: Mapping[str, Tensor], energy: float = 0.99, sides: str = "both") -> RankPlan:
    """The plan whose S and T hold the share `energy` of the spectral energy in every layer of `grams`.

    With sides="output" k_T / m is the layer saturation of delve (Shenk et al., arXiv 1907.08589; Richter et al., arXiv
    2006.08679) but for the mean, which saturation subtracts. The bound on each layer's error is `error_bound`'s.

    Args:
        grams: X^T X (d, d) of the unmodified network's layers.
        energy: between 0 and 1, the same for both sides.
        sides: "both", or "input" or "output" to project this one alone.

    Raises:
        ValueError: an energy outside 0..1, other sides, no Gram matrix, or one that does not fit its layer.
        FloatingPointError: a Gram matrix holds NaN or infinity.
    """
    if sides not in SIDES:
        raise ValueError(f"sides is one of {', '.join(map(repr, SIDES))}, got {sides!r}")
    check_grams(model, grams)
    layers = matrix_layers(model)
    entries = [energy_entry(name, weight_matrix(layers[name]), grams[name], energy, sides) for name in grams]
    return by_rule(f"energy_rank({energy}, {sides})", entries)


def energy_entry(name: str, W: Tensor, gram: Tensor, energy: float, sides: str) -> LayerRank:
    """One layer's outcome: k_S and k_T that hold `energy`, and the rank of W' that follows."""
    d, m = W.shape
    inputs, outputs = layer_spectra(gram, W)
    k_s = d if sides == "output" else dimension_for_energy(inputs, energy)
    k_t = m if sides == "input" else dimension_for_energy(outputs, energy)
    rank = utilized_rank(project_weight(W, inputs, outputs, k_s, k_t))
    return LayerRank(name, d, m, utilized_rank(W), k_s, k_t, rank, correct=None)


def by_rule(rule: str, entries: list[LayerRank]) -> RankPlan:
    """A plan that consulted no accuracy."""
    return RankPlan(tuple(entries), tolerance=None, mode=rule, total=0, correct=None)
