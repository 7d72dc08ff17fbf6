from itertools import product

import pytest
import torch
from conftest import Residual
from torch import nn

from urank.allocation import CHOICES, Curve, allocate_ranks, retained_energy
from urank.baselines import output_pca
from urank.calibration import accumulate_grams
from urank.factorize import count_cost, decompose, project_network
from urank.layers import matrix_layers, weight_matrix

SHAPE = (3, 8, 8)


def three_layers():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 10)).double()


@pytest.fixture
def small():
    network = three_layers()
    images = torch.randn(60, 4).double() @ torch.randn(4, 9).double() + 0.1 * torch.randn(60, 9).double()
    return network, accumulate_grams(network, [images], progress=False)


@pytest.fixture
def residual():
    torch.manual_seed(0)
    network = Residual().eval()
    dtype = next(network.parameters()).dtype
    return network, accumulate_grams(network, [torch.randn(40, *SHAPE, dtype=dtype)], progress=False)


def by_brute_force(network, grams, choice, budget):
    """The largest sum of energies of all combinations of ranks whose weights fit into the budget."""
    options = []
    for name, layer in matrix_layers(network).items():
        W = weight_matrix(layer)
        d, m = W.shape
        energies = retained_energy(W, grams[name], choice).tolist()
        smaller = [(r * (d + m), energies[r - 1]) for r in range(1, min(d, m) + 1) if r * (d + m) < d * m]
        options.append([*smaller, (d * m, 1.0)])
    sums = [tuple(map(sum, zip(*combination))) for combination in product(*options)]
    return max((energy for cost, energy in sums if cost <= budget), default=None)


def energy_of(network, grams, choice, plan):
    """Sum of energies and weights of the layers of a plan."""
    energy = cost = 0
    for entry in plan.layers:
        whole = entry.rank == min(entry.d, entry.m)
        kept = retained_energy(weight_matrix(matrix_layers(network)[entry.layer]), grams[entry.layer], choice)
        energy += 1 if whole else kept[entry.rank - 1].item()
        cost += entry.d * entry.m if whole else entry.rank * (entry.d + entry.m)
    return energy, cost


@pytest.mark.parametrize("choice", CHOICES)
def test_no_other_ranks_keep_more_energy(small, choice):
    """Exact at the cost it uses when all steps fit; else the last step leaves at most its own energy."""
    network, grams = small
    biases, exact = 25, 0
    total = count_cost(network, (9,)).params
    for keep in torch.linspace(0.35, 1, 40).tolist():
        plan = allocate_ranks(network, grams, keep, choice=choice, image_shape=(9,))
        energy, cost = energy_of(network, grams, choice, plan)
        assert cost <= keep * total - biases
        best = by_brute_force(network, grams, choice, int(keep * total) - biases)
        largest_step = 0.12  # of energy, between neighbouring possibilities of a layer that are still open here
        assert best - largest_step <= energy <= best + 1e-12
        exact += energy > best - 1e-12
    assert exact >= 20


@pytest.mark.parametrize("choice", CHOICES)
def test_energy_is_that_of_the_network_that_is_built(small, choice):
    network, grams = small
    plan = allocate_ranks(network, grams, 0.6, choice=choice, image_shape=(9,))
    compact = decompose(project_network(network, plan, grams), plan, useful_only=True)
    for entry in plan.layers:
        if entry.useful:
            first, second = compact.get_submodule(entry.layer).pair
            W, product_ = (
                weight_matrix(network.get_submodule(entry.layer)),
                weight_matrix(first) @ weight_matrix(second),
            )
            gram = torch.eye(len(W)).double() if choice == "weights" else grams[entry.layer]
            kept = (product_ * (gram @ product_)).sum() / (W * (gram @ W)).sum()
            expected = retained_energy(W, grams[entry.layer], choice)[entry.rank - 1]
            torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("measure", ["params", "macs"])
@pytest.mark.parametrize("keep", [0.3, 0.55, 0.8, 1.0])
def test_the_compact_network_has_the_size_that_was_asked_for(residual, measure, keep):
    network, grams = residual
    plan = allocate_ranks(network, grams, keep, measure, image_shape=SHAPE)
    compact = decompose(project_network(network, plan, grams), plan, useful_only=True)
    share = getattr(count_cost(compact, SHAPE), measure) / getattr(count_cost(network, SHAPE), measure)
    assert keep - 0.08 < share <= keep


def test_a_whole_network_loses_nothing(residual):
    network, grams = residual
    plan = allocate_ranks(network, grams, 1.0, image_shape=SHAPE)
    images = torch.randn(5, *SHAPE, dtype=next(network.parameters()).dtype)
    projected = project_network(network, plan, grams)
    torch.testing.assert_close(projected(images), network(images))


def test_the_output_choice_is_output_pca(small):
    network, grams = small
    plan = allocate_ranks(network, grams, 0.5, image_shape=(9,))
    split = [entry for entry in plan.layers if entry.useful]
    assert split
    for entry in split:
        pca = output_pca(network, grams, plan)[entry.layer]
        assert (entry.k_s, entry.k_t) == (pca.k_s, pca.k_t)


def test_hull_leaves_out_points_below_a_line():
    curve = Curve([1, 2, 3, 6], [10, 20, 30, 40], [0.5, 0.6, 0.65, 1.0])
    assert curve.corners() == [0, 3]
    assert Curve([1, 2, 3, 6], [10, 20, 30, 40], [0.5, 0.8, 0.95, 1.0]).corners() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep=0), "above 0"),
        (dict(keep=1.5), "above 0"),
        (dict(keep=0.05), "with rank 1 in every layer"),
        (dict(measure="bytes"), "'params', 'macs'"),
        (dict(choice="inputs"), "'output', 'weights', 'two-sided'"),
    ],
)
def test_bad_input_is_named(small, options, message):
    with pytest.raises(ValueError, match=message):
        allocate_ranks(*small, image_shape=(9,), **options)
