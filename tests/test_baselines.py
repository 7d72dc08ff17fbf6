from dataclasses import replace

import pytest
import torch
from conftest import Residual
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from urank.baselines import energy_rank, output_pca, weight_svd
from urank.calibration import accumulate_grams
from urank.factorize import count_cost, decompose, project_network
from urank.layers import input_rows, matrix_layers, weight_matrix
from urank.plan import LayerRank, RankPlan
from urank.search.validation import evaluate
from urank.subspaces import Spectrum, dimension_for_energy, output_gram, utilized_rank


def rules(network, grams, plan):
    """The plan of every rule, by its name."""
    return {
        "two-sided": plan,
        "weight_svd": weight_svd(network, plan),
        "output_pca": output_pca(network, grams, plan),
        **{f"energy_rank(0.9, {sides})": energy_rank(network, grams, 0.9, sides) for sides in SIDES},
    }


SIDES = ("both", "input", "output")


def network_of(network, grams, plan):
    return decompose(project_network(network, plan, grams), plan)


def factors_product(compact, name):
    first, second = compact.get_submodule(name)
    return weight_matrix(first) @ weight_matrix(second)


class TestPlans:
    def test_contain_their_rule_and_no_accuracy(self, searched):
        network, grams, _, plan = searched
        made = rules(network, grams, plan)
        made.pop("two-sided")
        for rule, found in made.items():
            assert found.mode == rule
            assert (found.tolerance, found.total, found.correct, found.probes) == (None, 0, None, ())
            assert [entry.layer for entry in found.layers] == list(grams)
            assert found.to_frame()["correct"].isna().all()

    def test_of_equal_ranks_have_equal_costs(self, searched):
        network, grams, _, plan = searched
        costs = {
            rule: count_cost(network_of(network, grams, found).float(), (3, 8, 8))
            for rule, found in rules(network, grams, plan).items()
            if "energy" not in rule
        }
        assert len(costs) == 3
        assert len(set(costs.values())) == 1

    def test_give_compact_networks_of_their_ranks(self, searched):
        network, grams, validation, plan = searched
        for found in rules(network, grams, plan).values():
            compact = network_of(network, grams, found)
            for entry in found.layers:
                assert torch.linalg.matrix_rank(factors_product(compact, entry.layer)) == entry.rank
            assert 25 < evaluate(compact, validation) <= 100


class TestWeightSVD:
    def test_is_the_best_approximation_of_the_weights(self, searched):
        network, grams, _, plan = searched
        compact = network_of(network, grams, weight_svd(network, plan))
        for entry in plan.layers:
            W = weight_matrix(network.get_submodule(entry.layer))
            error = (W - factors_product(compact, entry.layer)).square().sum()
            torch.testing.assert_close(
                error, torch.linalg.svdvals(W)[entry.rank :].square().sum(), rtol=1e-9, atol=1e-18
            )

    def test_equals_the_decomposition_of_the_original_network(self, searched):
        network, grams, _, plan = searched
        one = network_of(network, grams, weight_svd(network, plan)).state_dict()
        other = decompose(network, plan).state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)


def plan_of(model, r, k=None):
    """A plan in which every layer has rank r and dimensions k_S = k_T = k."""
    entries = []
    for name, layer in matrix_layers(model).items():
        d, m = weight_matrix(layer).shape
        entries.append(LayerRank(name, d, m, min(d, m), k or d, k or m, r, correct=None))
    return RankPlan(tuple(entries), None, "given", 0, None)


class TestOutputPCA:
    @settings(max_examples=50, deadline=None, derandomize=True, database=None)
    @given(data=st.data(), d=st.integers(1, 8), m=st.integers(1, 8), rows=st.integers(1, 30), decay=st.integers(0, 2),
           seed=st.integers(0, 2**32 - 1))  # fmt: skip
    def test_has_the_smallest_error_of_all_plans_of_its_rank(self, data, d, m, rows, decay, seed):
        """||XW - XW'||^2 equals the Eckart-Young error of Y = XW; two-sided projections cannot be closer."""
        r = data.draw(st.integers(1, min(d, m)))
        torch.manual_seed(seed)
        X = torch.randn(rows, d, dtype=torch.float64) * 10.0 ** (-decay * torch.arange(d) / d)
        network = nn.Sequential(nn.Linear(d, m, bias=False)).double()
        grams = accumulate_grams(network, [X], progress=False)

        def error(plan):
            with torch.no_grad():
                return (network(X) - network_of(network, grams, plan)(X)).square().sum().item()

        Y = X @ weight_matrix(network[0])
        least = torch.linalg.svdvals(Y)[r:].square().sum().item()
        rounding = 1e-12 * Y.square().sum().item() + 1e-24
        two_sided = plan_of(network, r, k=r)
        found = output_pca(network, grams, two_sided)
        assert error(found) == pytest.approx(least, abs=rounding)
        assert error(found) <= error(two_sided) + rounding
        assert error(found) <= error(weight_svd(network, two_sided)) + rounding

    @pytest.mark.parametrize("r", [1, 4, 9])
    def test_minimizes_the_error_of_a_convolution_over_patches(self, r):
        conv = nn.Conv2d(3, 10, 3, stride=2, padding=1).double()
        images, network = torch.randn(6, 3, 9, 9, dtype=torch.float64), nn.Sequential(conv)
        grams = accumulate_grams(network, [images], progress=False)
        compact = network_of(network, grams, output_pca(network, grams, plan_of(network, r)))
        with torch.no_grad():
            error = (network(images) - compact(images)).square().sum()
        Y = input_rows(conv, images) @ weight_matrix(conv)
        torch.testing.assert_close(error, torch.linalg.svdvals(Y)[r:].square().sum(), rtol=1e-9, atol=1e-18)

    def test_has_a_smaller_error_than_the_search_in_the_first_layer(self, searched):
        network, grams, _, plan = searched
        name, gram = next(iter(grams.items()))
        W = weight_matrix(network.get_submodule(name))
        errors = {}
        for rule, found in rules(network, grams, plan).items():
            lost = W - factors_product(network_of(network, grams, found), name)
            errors[rule] = (lost * (gram @ lost)).sum().item()
        assert errors["output_pca"] < errors["two-sided"]
        assert errors["output_pca"] < errors["weight_svd"]

    def test_keeps_one_direction_of_a_zero_layer(self):
        network, x = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(9, 4, dtype=torch.float64)
        nn.init.zeros_(network[0].weight)
        grams = accumulate_grams(network, [x], progress=False)
        for plan in (weight_svd(network, plan_of(network, 0)), output_pca(network, grams, plan_of(network, 0))):
            assert plan.layers[0].rank == 0
            torch.testing.assert_close(network_of(network, grams, plan)(x), network(x))


class TestEnergyRank:
    @pytest.mark.parametrize("sides", SIDES)
    @pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
    def test_holds_the_energy_on_the_chosen_sides(self, searched, energy, sides):
        network, grams, _, _ = searched
        plan = energy_rank(network, grams, energy, sides)
        projected = project_network(network, plan, grams)
        for entry in plan.layers:
            W = weight_matrix(network.get_submodule(entry.layer))
            inputs, outputs = Spectrum.of(grams[entry.layer]), Spectrum.of(output_gram(grams[entry.layer], W))
            assert entry.k_s == (entry.d if sides == "output" else dimension_for_energy(inputs, energy))
            assert entry.k_t == (entry.m if sides == "input" else dimension_for_energy(outputs, energy))
            assert entry.rank == utilized_rank(weight_matrix(projected.get_submodule(entry.layer)))
            assert entry.weight_rank == utilized_rank(W)

    def test_of_centred_outputs_equals_layer_saturation(self):
        """On centred outputs, k_T / m is the share of directions that hold 99 % of the variance."""
        layer = nn.Linear(20, 12, bias=False).double()
        X = torch.randn(300, 20, dtype=torch.float64) * 0.6 ** torch.arange(20)
        X -= X.mean(0)
        plan = energy_rank(
            nn.Sequential(layer), accumulate_grams(nn.Sequential(layer), [X], progress=False), 0.99, "output"
        )
        variances = torch.linalg.eigvalsh(torch.cov((X @ weight_matrix(layer)).T)).flip(0)
        directions = int((variances.cumsum(0) / variances.sum() < 0.99).sum()) + 1
        assert 1 < directions < 12
        assert plan.layers[0].k_t / plan.layers[0].m == directions / 12

    def test_grows_with_the_energy(self, searched):
        network, grams, _, _ = searched
        plans = [energy_rank(network, grams, energy) for energy in (0, 0.3, 0.6, 0.9, 0.99, 1)]
        for less, more in zip(plans, plans[1:]):
            assert all(a.k_s <= b.k_s and a.k_t <= b.k_t for a, b in zip(less.layers, more.layers))
        assert all((entry.k_s, entry.k_t) == (1, 1) for entry in plans[0].layers)

    def test_contains_the_layers_of_the_gram_matrices(self, searched):
        network, grams, _, _ = searched
        assert [entry.layer for entry in energy_rank(network, {"6": grams["6"]}).layers] == ["6"]


class TestErrors:
    def test_a_plan_of_another_network(self, searched):
        network, grams, _, plan = searched
        other = replace(plan, layers=(replace(plan.layers[0], m=9), *plan.layers[1:]))
        for use in (lambda plan: weight_svd(network, plan), lambda plan: output_pca(network, grams, plan)):
            with pytest.raises(ValueError, match="'0' is 27 x 8 in this network but 27 x 9 in the plan"):
                use(other)
        with pytest.raises(ValueError, match="does not have"):
            weight_svd(Residual(), plan)

    def test_a_missing_gram(self, searched):
        network, grams, _, plan = searched
        some = {name: gram for name, gram in grams.items() if name not in ("3", "9")}
        with pytest.raises(ValueError, match="no Gram matrix for these layers of the plan: '3', '9'"):
            output_pca(network, some, plan)

    def test_a_gram_of_another_layer(self, searched):
        network, grams, _, plan = searched
        wrong = grams | {"0": torch.eye(5)}
        for use in (lambda: output_pca(network, wrong, plan), lambda: energy_rank(network, wrong)):
            with pytest.raises(ValueError, match=r"'0' has 27 input features.*\(5, 5\)"):
                use()

    def test_no_gram(self, searched):
        with pytest.raises(ValueError, match="empty"):
            energy_rank(searched[0], {})

    def test_unknown_sides(self, searched):
        with pytest.raises(ValueError, match="'both', 'input', 'output', got 'left'"):
            energy_rank(*searched[:2], sides="left")

    @pytest.mark.parametrize("energy", [-0.1, 99, float("nan")])
    def test_an_energy_outside_0_to_1(self, searched, energy):
        with pytest.raises(ValueError, match="between 0 and 1"):
            energy_rank(*searched[:2], energy)
