"""Choose all ranks at once under a budget of parameters or MACs, from the calibration set alone.

A layer of rank r keeps the share e(r) of an energy and costs r (d + m) weights instead of d m. The sum of e over the
layers is maximized under the budget. With a Lagrange multiplier l >= 0 each layer maximizes e(r) - l cost(r) by itself:
its r is a corner of the upper concave hull of its points (cost, e). As l falls, the
layers move from corner to corner, in the order of the slopes between corners. Sorting all these steps by slope solves
the problem for every budget. BALF (arXiv 2509.25136) allocates ranks by the same idea.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor, nn

from urank.baselines import plan_without_accuracy
from urank.factorize import count_cost
from urank.layers import MatrixLayer, evaluating, input_rows, matrix_layers, watch_inputs, weight_matrix
from urank.numerics import singular_values
from urank.plan import LayerRank, RankPlan
from urank.search.bisection import check_grams
from urank.subspaces import Spectrum, layer_spectra, output_gram, spectral_energy, utilized_rank

CHOICES = ("output", "weights", "two-sided")
MEASURES = ("params", "macs")
ROUNDING = 1e-6  # of a parameter: a share that was computed from a number of parameters gives this number again


def allocate_ranks(
    model: nn.Module,
    grams: Mapping[str, Tensor],
    keep: float = 0.5,
    measure: str = "params",
    choice: str = "output",
    image_shape: tuple[int, ...] = (3, 32, 32),
) -> RankPlan:
    """Return the ranks that keep most energy, summed over the layers, in a network of `keep` times the size.

    It needs no validation image and no search. Layers that would not become smaller stay whole (rank min(d, m)). The
    sum is the largest possible, up to what one step between corners of the hull gains.

    Args:
        grams: X^T X (d, d) of the layers that may be split, from `accumulate_grams` on the unmodified network.
        keep: largest size of the whole compact network, as a share of the unmodified one, between 0 and 1.
        measure: what size means: "params" (parameters) or "macs" (multiply-accumulate operations of one image).
        choice: which W' of rank r is meant, and which share of energy it keeps: "output" the best one for the outputs
            (see `output_pca`) and ||XW'||^2 / ||XW||^2; "weights" the truncated SVD of W and ||W'||^2 / ||W||^2;
            "two-sided" W' = P_S W P_T with k_S = k_T = r and ||XW'||^2 / ||XW||^2.
        image_shape: (c, h, w) of an image.

    >>> from urank import accumulate_grams
    >>> _ = torch.manual_seed(0)
    >>> network = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    >>> images = torch.randn(100, 3) @ torch.randn(3, 16)  # the first layer needs 3 directions, the second one more
    >>> plan = allocate_ranks(network, accumulate_grams(network, [images], progress=False), 0.6, image_shape=(16,))
    >>> [layer.rank for layer in plan.layers]
    [3, 6]

    Raises:
        ValueError: `keep` is not between 0 and 1, or is too small even for rank 1; an unknown `measure` or `choice`; a
            Gram matrix that does not match its layer.
        FloatingPointError: a Gram matrix contains NaN or infinity.
    """
    for value, known in ((measure, MEASURES), (choice, CHOICES)):
        if value not in known:
            raise ValueError(f"expected one of {', '.join(map(repr, known))}, got {value!r}")
    check_keep(keep)
    check_grams(model, grams)
    layers = {name: layer for name, layer in matrix_layers(model).items() if name in grams}
    uses = rows_per_image(model, layers, image_shape) if measure == "macs" else dict.fromkeys(layers, 1)
    curves = {name: Curve.of(weight_matrix(layers[name]), grams[name], choice, uses[name]) for name in grams}
    total = getattr(count_cost(model, image_shape), measure)
    fixed = total - sum(curve.costs[-1] for curve in curves.values())
    ranks = best_ranks(curves, floor(keep * total + ROUNDING) - fixed)
    if ranks is None:
        least = (fixed + sum(curve.costs[0] for curve in curves.values())) / total
        raise ValueError(
            f"keep={keep:g} is too small: with rank 1 in every layer, {least:.3f} of the {measure} are left"
        )
    entries = [entry(name, weight_matrix(layers[name]), ranks[name], choice) for name in grams]
    return plan_without_accuracy(f"allocate_ranks({keep:g}, {measure}, {choice})", entries)


def check_keep(keep: float) -> None:
    """Raise a ValueError for a share that is not above 0 and at most 1."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, got {keep}")


@dataclass(frozen=True)
class Curve:
    """What a layer may cost and the energy it then keeps: rank 1, 2, ... while it is smaller, then the whole layer.

    Attributes:
        ranks, costs, energies: of every possibility (n,), all increasing; the rank of the whole layer is min(d, m).
    """

    ranks: list[int]
    costs: list[int]
    energies: list[float]

    @classmethod
    def of(cls, W: Tensor, gram: Tensor, choice: str, uses: int) -> "Curve":
        """Return the curve of a layer whose weights are multiplied `uses` times per image (1 to count parameters)."""
        d, m = W.shape
        ranks = list(range(1, (d * m - 1) // (d + m) + 1))
        energies = retained_energy(W, gram, choice)[: len(ranks)].tolist()
        costs = [uses * r * (d + m) for r in ranks] + [uses * d * m]
        return cls([*ranks, min(d, m)], costs, [*energies, 1.0])

    def corners(self) -> list[int]:
        """Return the indices of the corners of the upper concave hull of (costs, energies), from the first point on."""
        hull: list[int] = []
        for point in range(len(self.costs)):
            while len(hull) > 1 and self.slope(hull[-1], point) >= self.slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append(point)
        return hull

    def slope(self, first: int, second: int) -> float:
        """Return the energy gained per cost from one point to another."""
        return (self.energies[second] - self.energies[first]) / (self.costs[second] - self.costs[first])


def retained_energy(W: Tensor, gram: Tensor, choice: str) -> Tensor:
    """Return the share of energy that is kept at rank 1, 2, ..., min(d, m) of `choice`; see `allocate_ranks`."""
    if choice == "weights":
        return spectral_energy(singular_values(W).square())
    if choice == "output":
        return Spectrum.of(output_gram(gram.to(W), W)).energy[: min(W.shape)]
    inputs, outputs = layer_spectra(gram, W)
    # ||X P_S W P_T||^2 is the sum of lambda_i A_ij^2 over i <= k_S, j <= k_T, with A = V_S^T W V_T.
    A = inputs.basis.T @ W @ outputs.basis
    energy = (inputs.eigenvalues[:, None] * A.square()).cumsum(0).cumsum(1)
    return energy.diagonal() / energy[-1, -1] if energy[-1, -1] > 0 else torch.ones(min(W.shape))


def best_ranks(curves: Mapping[str, Curve], budget: int) -> dict[str, int] | None:
    """Return the rank of each layer that maximizes the sum of energies at a cost of at most `budget`.

    A step that does not fit is taken as far as it does, and its layer is finished. None if rank 1 costs too much.
    """
    at = dict.fromkeys(curves, 0)
    left = budget - sum(curve.costs[0] for curve in curves.values())
    if left < 0:
        return None
    finished = set()
    for name, corner in steps(curves):
        curve = curves[name]
        if name in finished:
            continue
        while (cost := curve.costs[corner] - curve.costs[at[name]]) > left:
            corner -= 1
            finished.add(name)
        at[name], left = corner, left - cost
    return {name: curve.ranks[at[name]] for name, curve in curves.items()}


def steps(curves: Mapping[str, Curve]) -> Iterator[tuple[str, int]]:
    """Yield (layer, next corner), most energy gained per cost first; in one layer it falls from corner to corner."""
    found = []
    for name, curve in curves.items():
        corners = curve.corners()
        found += [(curve.slope(*pair), name, pair[1]) for pair in zip(corners, corners[1:])]
    for _, name, corner in sorted(found, key=lambda step: -step[0]):
        yield name, corner


def entry(name: str, W: Tensor, rank: int, choice: str) -> LayerRank:
    """Return one layer of the plan; a whole layer is not projected."""
    d, m = W.shape
    whole = rank == min(d, m)
    k_s = rank if choice == "two-sided" and not whole else d
    k_t = rank if choice != "weights" and not whole else m
    return LayerRank(name, d, m, utilized_rank(W), k_s, k_t, rank, correct=None)


def rows_per_image(model: nn.Module, layers: Mapping[str, MatrixLayer], image_shape: tuple[int, ...]) -> dict[str, int]:
    """Return how many rows of X one image (c, h, w) gives each layer: its positions or tokens, over all calls."""
    rows = dict.fromkeys(layers, 0)

    def count(name: str, layer: MatrixLayer, inputs: Tensor) -> None:
        rows[name] += len(input_rows(layer, inputs))

    image = next(model.parameters()).new_zeros(1, *image_shape)
    with evaluating(model):
        watch_inputs(model, image, dict(layers), count)
    return rows
