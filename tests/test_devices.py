"""Tensors are created on the device of their data.

Inside `with torch.device("meta")` a tensor that is created without a device holds no data. A function that creates such
a tensor for data on the CPU fails there, as it would fail for data on a GPU.
"""

import pytest
import torch
from conftest import NETWORKS, TINY, finished, in_batches, structured_images
from torch import nn
from torchvision.models import VisionTransformer

import urank
from urank import conv_gram, datasets
from urank.reproduction.runner import run

BUILDERS = {name: NETWORKS[name][0] for name in ("cnn", "mlp", "residual")} | {
    "attention": lambda: urank.explicit_attention(VisionTransformer(8, 4, 1, 2, 12, 20, num_classes=4)),
}


@pytest.fixture(params=BUILDERS)
def network(request):
    return BUILDERS[request.param]().double().eval()


@pytest.fixture
def batches():
    return in_batches(*structured_images(40), 16)


@pytest.fixture(autouse=True)
def window_tables_on_the_cpu(monkeypatch):
    """Small tables that a convolution's Gram matrix needs are created on the CPU and then moved."""
    create = conv_gram.Distance.membership

    def create_on_the_cpu(distance):
        with torch.device("cpu"):
            return create(distance)

    monkeypatch.setattr(conv_gram.Distance, "membership", create_on_the_cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_matrices(network, batches, dtype):
    expected = urank.accumulate_grams(network, batches, product_dtype=dtype, progress=False)
    with torch.device("meta"):
        grams = urank.accumulate_grams(network, batches, product_dtype=dtype, progress=False)
    assert all(torch.equal(grams[name], gram) for name, gram in expected.items())


def test_rank_search(network, batches):
    grams = urank.accumulate_grams(network, batches, progress=False)
    expected = urank.search_ranks(network, grams, batches, tolerance=5, progress=False)
    with torch.device("meta"):
        assert urank.search_ranks(network, grams, batches, tolerance=5, progress=False) == expected


def test_compact_networks(network, batches, tmp_path):
    grams = urank.accumulate_grams(network, batches, progress=False)
    with torch.device("meta"):
        searched = urank.energy_rank(network, grams, 0.9)
        for plan in (searched, urank.weight_svd(network, searched), urank.output_pca(network, grams, searched)):
            compact = urank.decompose(urank.project_network(network, plan, grams), plan).eval()
            urank.save_compact(compact, plan, tmp_path)
            loaded, merged = urank.load_compact(network, tmp_path), urank.merge_useless(compact, network, plan)
            assert urank.evaluate(loaded, batches) == urank.evaluate(compact, batches)
            assert {tensor.device.type for tensor in merged.state_dict().values()} == {"cpu"}


def test_cost_coverage_and_separate_uses(network, batches):
    images = batches[0][0]
    with torch.device("meta"):
        assert urank.count_cost(network, images.shape[1:]).params == sum(p.numel() for p in network.parameters())
        assert urank.coverage(network, images).measured.any()
        separate = urank.separate_uses(network, images)
    assert torch.equal(separate(images), network(images))


def test_error_bound():
    X, W = torch.randn(20, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    expected = urank.error_bound(W, X.T @ X, 3, 2)
    with torch.device("meta"):
        assert urank.error_bound(W, X.T @ X, 3, 2) == expected


@pytest.mark.parametrize("options", [dict(ema_decay=0.5), dict(crop=0, flip=False, schedule="multistep")], ids=str)
def test_training(options):
    digits, recipe = datasets.load("digits10", train=60, test=20), urank.Recipe(epochs=2, batch_size=20, **options)
    layers = nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    network = nn.Sequential(*layers)
    with torch.device("meta"):
        history = urank.fit(network, digits, recipe, device="cpu", progress=False)
        assert 0 <= urank.evaluate(network, digits.batches(digits.test)) <= 100
    assert len(history) == 2 and {parameter.device.type for parameter in network.parameters()} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_experiment_on_a_gpu_finds_the_ranks_of_the_cpu(tmp_path):
    record, expected = run(TINY, tmp_path, "cuda", progress=False), finished()[1]
    assert record.plan.layers == expected.plan.layers
