"""The whole method on data for which mathematics predicts the result."""

import pytest
import torch
import torch.nn.functional as F
from conftest import small_cnn, small_mlp
from torch import nn

from urank import datasets
from urank.baselines import energy_rank
from urank.calibration import accumulate_grams
from urank.factorize import decompose, project_network
from urank.layers import input_rows, weight_matrix
from urank.models import create
from urank.plan import allowed_loss
from urank.search.bisection import search_ranks
from urank.search.validation import Validation
from urank.subspaces import Spectrum, error_bound, output_gram, project_weight
from urank.training.fitting import fit
from urank.training.recipe import Recipe


def orthonormal(n, k):
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q


def planted_codes(V, count=200):
    """Samples (count, d) near the columns of V (d, p), and the column of each as its label."""
    p = V.shape[1]
    labels = torch.arange(count) % p
    codes = F.one_hot(labels, p) * (10.0 - labels[:, None]) + 0.01 * torch.randn(count, p)
    return codes.double() @ V.T, labels


def reading(V, m):
    """A weight (m, d) whose first outputs are the coordinates along V (d, p); the other rows are small noise."""
    return torch.cat([V.T, 0.1 * torch.randn(m - V.shape[1], len(V), dtype=torch.float64)])


def linear_case(p):
    V = orthonormal(12, p)
    layer = nn.Linear(12, 8, bias=False).double()
    layer.weight.data.copy_(reading(V, 8))
    return nn.Sequential(layer), *planted_codes(V)


def convolution_case(p):
    """Images of four equal patches that do not overlap."""
    V = orthonormal(3 * 2 * 2, p)
    layer = nn.Conv2d(3, 8, 2, stride=2, bias=False).double()
    layer.weight.data.copy_(reading(V, 8).reshape(8, 3, 2, 2))
    patches, labels = planted_codes(V)
    images = F.fold(patches[:, :, None].expand(-1, -1, 4), (4, 4), 2, stride=2)
    return nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten()), images, labels


CASES = {"linear": linear_case, "convolution": convolution_case}


class TestPlantedSubspaces:
    @pytest.mark.parametrize("p", [1, 2, 3, 5])
    @pytest.mark.parametrize("case", CASES)
    def test_are_found_by_the_search(self, case, p):
        """With fewer than p dimensions a class is lost; with p, none."""
        network, images, labels = CASES[case](p)
        grams = accumulate_grams(network, [images], progress=False)
        [layer] = search_ranks(network, grams, [(images, labels)], tolerance=0, progress=False).layers
        assert (layer.k_s, layer.k_t, layer.rank, layer.correct) == (p, p, p, len(labels))
        assert layer.weight_rank > p

    @pytest.mark.parametrize("p", [1, 2, 5])
    @pytest.mark.parametrize("case", CASES)
    def test_are_found_by_their_energy(self, case, p):
        network, images, _ = CASES[case](p)
        grams = accumulate_grams(network, images.split(64), progress=False)
        [layer] = energy_rank(network, grams, 1 - 1e-10).layers
        assert (layer.k_s, layer.k_t, layer.rank) == (p, p, p)

    @pytest.mark.parametrize("p", [1, 2])
    def test_of_channels_count_once_per_kernel_position(self, p):
        """Pixels in p dimensions give 3 x 3 patches in 9 p dimensions, which W' maps as W does."""
        network = nn.Sequential(nn.Conv2d(6, 40, 3, padding=1)).double()
        pixels = torch.randn(8, 7, 7, p, dtype=torch.float64) @ orthonormal(6, p).T
        images = pixels.permute(0, 3, 1, 2)
        grams = accumulate_grams(network, images.split(3), progress=False)
        plan = energy_rank(network, grams, 1 - 1e-10, sides="input")
        assert (plan.layers[0].k_s, plan.layers[0].rank) == (9 * p, 9 * p)
        compact = decompose(project_network(network, plan, grams), plan)
        with torch.no_grad():
            torch.testing.assert_close(compact(images), network(images))


IMAGES = {
    "all zero": torch.zeros(6, 3, 8, 8),
    "constant": torch.full((6, 3, 8, 8), 0.7),
    "a single sample": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
    "the same sample": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).expand(6, -1, -1, -1),
    "rank-deficient": torch.einsum(
        "nr,rchw->nchw",
        torch.randn(20, 2, generator=torch.Generator().manual_seed(2)),
        torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)),
    ),
}


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("build", [small_cnn, small_mlp])
class TestDegenerateImages:
    def test_keep_their_classes(self, build, images):
        network = build().double().eval()
        images = images.double()
        grams = accumulate_grams(network, [images], progress=False)
        answers = Validation.agreement(network, [images])
        plan = search_ranks(network, grams, answers, tolerance=0, progress=False)
        assert plan.correct == plan.layers[-1].correct == len(images)
        assert all(0 <= layer.rank <= min(layer.k_s, layer.k_t) for layer in plan.layers)
        projected = project_network(network, plan, grams)
        assert answers.count_correct(projected) == len(images)
        with torch.no_grad():
            assert torch.isfinite(decompose(projected, plan)(images)).all()


@pytest.fixture(scope="module")
def digits():
    """(network, grams, validation) of a narrow VGG11 that was trained on digits, in float32."""
    torch.manual_seed(0)
    dataset = datasets.load("digits10", train=400, test=100)
    network = create("vgg11", width=0.125)
    fit(network, dataset, Recipe(epochs=8, batch_size=20, lr=0.03, crop=2, flip=False, precision="float32"))
    grams = accumulate_grams(network, dataset.batches(dataset.train.take(200)), progress=False)
    return network.eval(), grams, Validation(dataset.batches(dataset.test))


class TestOnDigits:
    @pytest.mark.parametrize("tolerance", [0, 1, 5])
    def test_a_joint_search_loses_at_most_two_tolerances_per_layer(self, digits, tolerance):
        network, grams, validation = digits
        plan = search_ranks(network, grams, validation, tolerance, progress=False)
        lost = plan.correct - validation.count_correct(project_network(network, plan, grams))
        assert plan.correct > 0.5 * plan.total
        assert lost <= 2 * len(plan.layers) * allowed_loss(tolerance, plan.total)
        assert plan.mlu < plan.weight_mlu

    def test_the_error_of_a_layer_is_the_predicted_one(self, digits):
        """||XW - XW'||^2 is computed from the patches, not from the Gram matrix."""
        network, grams, validation = digits
        name = "features.4"
        layer, rows = network.get_submodule(name), []
        handle = layer.register_forward_pre_hook(lambda layer, args: rows.append(input_rows(layer, args[0]).double()))
        validation.count_correct(network)
        handle.remove()
        gram = accumulate_grams(network, validation, layers=[name], progress=False)[name]
        [entry], W = energy_rank(network, {name: gram}, 0.9).layers, weight_matrix(layer)
        inputs, outputs = Spectrum.of(gram), Spectrum.of(output_gram(gram, W))
        projected = project_weight(W, inputs, outputs, entry.k_s, entry.k_t)
        error = sum((X @ (W - projected)).square().sum() for X in rows).item()
        found = error_bound(W, gram, entry.k_s, entry.k_t)
        assert found.error == pytest.approx(error, rel=1e-6)
        assert 0 < error <= found.bound
