from dataclasses import replace

import pytest
import torch
from conftest import Residual, briefly_trained, in_batches, small_cnn, structured_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from urank.baselines import energy_rank, output_pca, weight_svd
from urank.calibration import accumulate_grams
from urank.factorize import count_cost, decompose, project_network
from urank.layers import input_rows, matrix_layers, weight_matrix
from urank.plan import LayerRank, RankPlan
from urank.search.bisection import search_ranks
from urank.search.validation import Validation, evaluate
from urank.subspaces import Spectrum, dimension_for_energy, output_gram, utilized_rank


@pytest.fixture(scope="module")
def measured():
    """(network, grams, validation, plan) of a small network whose ranks were searched."""
    torch.manual_seed(0)
    network = briefly_trained(small_cnn())
    grams = accumulate_grams(network, in_batches(*structured_images(128, seed=2), 64), progress=False)
    validation = Validation(in_batches(*structured_images(150, seed=3), 64))
    return network, grams, validation, search_ranks(network, grams, validation, tolerance=3, progress=False)


def rules(network, grams, plan):
    """A plan of every rule."""
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
    def test_say_which_rule_made_them_and_that_no_accuracy_was_asked(self, measured):
        network, grams, _, plan = measured
        made = rules(network, grams, plan)
        made.pop("two-sided")
        for rule, found in made.items():
            assert found.mode == rule
            assert (found.tolerance, found.total, found.correct, found.probes) == (None, 0, None, ())
            assert [entry.layer for entry in found.layers] == list(grams)
            assert found.to_frame()["correct"].isna().all()

    def test_come_back_from_json_as_the_same_network(self, measured, tmp_path):
        network, grams, _, plan = measured
        for found in rules(network, grams, plan).values():
            found.save(tmp_path / "plan.json")
            again = RankPlan.load(tmp_path / "plan.json")
            assert again == found
            one, other = (network_of(network, grams, each).state_dict() for each in (found, again))
            assert all(torch.equal(one[name], other[name]) for name in one)

    def test_at_the_ranks_of_a_plan_cost_the_same(self, measured):
        network, grams, _, plan = measured
        costs = {
            rule: count_cost(network_of(network, grams, found).float(), (3, 8, 8))
            for rule, found in rules(network, grams, plan).items()
            if "energy" not in rule
        }
        assert len(costs) == 3
        assert len(set(costs.values())) == 1

    def test_become_networks_whose_layers_have_their_ranks(self, measured):
        network, grams, validation, plan = measured
        for found in rules(network, grams, plan).values():
            compact = network_of(network, grams, found)
            for entry in found.layers:
                assert torch.linalg.matrix_rank(factors_product(compact, entry.layer)) == entry.rank
            assert 25 < evaluate(compact, validation) <= 100


class TestWeightSVD:
    def test_is_the_best_approximation_of_the_weights(self, measured):
        network, grams, _, plan = measured
        compact = network_of(network, grams, weight_svd(network, plan))
        for entry in plan.layers:
            W = weight_matrix(network.get_submodule(entry.layer))
            error = (W - factors_product(compact, entry.layer)).square().sum()
            torch.testing.assert_close(
                error, torch.linalg.svdvals(W)[entry.rank :].square().sum(), rtol=1e-9, atol=1e-18
            )

    def test_is_the_decomposition_of_the_unaltered_network(self, measured):
        network, grams, _, plan = measured
        one = network_of(network, grams, weight_svd(network, plan)).state_dict()
        other = decompose(network, plan).state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)


def plan_of(model, r, k=None):
    """A plan that gives every layer the rank r, and k_S = k_T = k."""
    entries = []
    for name, layer in matrix_layers(model).items():
        d, m = weight_matrix(layer).shape
        entries.append(LayerRank(name, d, m, min(d, m), k or d, k or m, r, correct=None))
    return RankPlan(tuple(entries), None, "given", 0, None)


class TestOutputPCA:
    @settings(max_examples=50, deadline=None, derandomize=True, database=None)
    @given(data=st.data(), d=st.integers(1, 8), m=st.integers(1, 8), rows=st.integers(1, 30), decay=st.integers(0, 2),
           seed=st.integers(0, 2**32 - 1))  # fmt: skip
    def test_no_plan_of_the_same_rank_comes_closer(self, data, d, m, rows, decay, seed):
        """||XW - XW'||^2 is what Eckart and Young leave of Y = XW, and two-sided projections leave no less."""
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
    def test_of_a_convolution_counts_its_patches(self, r):
        conv = nn.Conv2d(3, 10, 3, stride=2, padding=1).double()
        images, network = torch.randn(6, 3, 9, 9, dtype=torch.float64), nn.Sequential(conv)
        grams = accumulate_grams(network, [images], progress=False)
        compact = network_of(network, grams, output_pca(network, grams, plan_of(network, r)))
        with torch.no_grad():
            error = (network(images) - compact(images)).square().sum()
        Y = input_rows(conv, images) @ weight_matrix(conv)
        torch.testing.assert_close(error, torch.linalg.svdvals(Y)[r:].square().sum(), rtol=1e-9, atol=1e-18)

    def test_comes_closer_than_the_search_did_in_every_first_layer(self, measured):
        network, grams, _, plan = measured
        name, gram = next(iter(grams.items()))
        W = weight_matrix(network.get_submodule(name))
        errors = {}
        for rule, found in rules(network, grams, plan).items():
            lost = W - factors_product(network_of(network, grams, found), name)
            errors[rule] = (lost * (gram @ lost)).sum().item()
        assert errors["output_pca"] < errors["two-sided"]
        assert errors["output_pca"] < errors["weight_svd"]

    def test_of_a_layer_of_rank_zero_keeps_one_direction(self):
        network, x = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(9, 4, dtype=torch.float64)
        nn.init.zeros_(network[0].weight)
        grams = accumulate_grams(network, [x], progress=False)
        for plan in (weight_svd(network, plan_of(network, 0)), output_pca(network, grams, plan_of(network, 0))):
            assert plan.layers[0].rank == 0
            torch.testing.assert_close(network_of(network, grams, plan)(x), network(x))


class TestEnergyRank:
    @pytest.mark.parametrize("sides", SIDES)
    @pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
    def test_holds_the_share_on_the_sides_asked_for(self, measured, energy, sides):
        network, grams, _, _ = measured
        plan = energy_rank(network, grams, energy, sides)
        projected = project_network(network, plan, grams)
        for entry in plan.layers:
            W = weight_matrix(network.get_submodule(entry.layer))
            inputs, outputs = Spectrum.of(grams[entry.layer]), Spectrum.of(output_gram(grams[entry.layer], W))
            assert entry.k_s == (entry.d if sides == "output" else dimension_for_energy(inputs, energy))
            assert entry.k_t == (entry.m if sides == "input" else dimension_for_energy(outputs, energy))
            assert entry.rank == utilized_rank(weight_matrix(projected.get_submodule(entry.layer)))
            assert entry.weight_rank == utilized_rank(W)

    def test_of_the_outputs_is_layer_saturation_on_centred_data(self):
        """The share of directions with 99 % of the outputs' variance, where these have no mean."""
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

    def test_of_less_energy_is_no_larger(self, measured):
        network, grams, _, _ = measured
        plans = [energy_rank(network, grams, energy) for energy in (0, 0.3, 0.6, 0.9, 0.99, 1)]
        for less, more in zip(plans, plans[1:]):
            assert all(a.k_s <= b.k_s and a.k_t <= b.k_t for a, b in zip(less.layers, more.layers))
        assert all((entry.k_s, entry.k_t) == (1, 1) for entry in plans[0].layers)

    def test_chooses_the_layers_it_has_grams_of(self, measured):
        network, grams, _, _ = measured
        assert [entry.layer for entry in energy_rank(network, {"6": grams["6"]}).layers] == ["6"]


class TestErrors:
    def test_a_plan_of_another_network(self, measured):
        network, grams, _, plan = measured
        other = replace(plan, layers=(replace(plan.layers[0], m=9), *plan.layers[1:]))
        for use in (lambda plan: weight_svd(network, plan), lambda plan: output_pca(network, grams, plan)):
            with pytest.raises(ValueError, match="'0' is 27 x 8 in this network but 27 x 9 in the plan"):
                use(other)
        with pytest.raises(ValueError, match="does not have"):
            weight_svd(Residual(), plan)

    def test_a_missing_gram(self, measured):
        network, grams, _, plan = measured
        some = {name: gram for name, gram in grams.items() if name not in ("3", "9")}
        with pytest.raises(ValueError, match="no Gram matrix for these layers of the plan: '3', '9'"):
            output_pca(network, some, plan)

    def test_a_gram_of_another_layer(self, measured):
        network, grams, _, plan = measured
        wrong = grams | {"0": torch.eye(5)}
        for use in (lambda: output_pca(network, wrong, plan), lambda: energy_rank(network, wrong)):
            with pytest.raises(ValueError, match=r"'0' has 27 input features.*\(5, 5\)"):
                use()

    def test_no_gram(self, measured):
        with pytest.raises(ValueError, match="empty"):
            energy_rank(measured[0], {})

    def test_other_sides(self, measured):
        with pytest.raises(ValueError, match="'both', 'input', 'output', got 'left'"):
            energy_rank(*measured[:2], sides="left")

    @pytest.mark.parametrize("energy", [-0.1, 99, float("nan")])
    def test_what_is_no_share(self, measured, energy):
        with pytest.raises(ValueError, match="between 0 and 1"):
            energy_rank(*measured[:2], energy)
