"""One small network of each family, from its layers to a compact network on disk."""

import copy
import warnings

import pytest
import torch
from conftest import in_batches
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torchvision.models import RegNet, VisionTransformer
from torchvision.models.regnet import BlockParams

import urank
from urank.models import create
from urank.plan import LayerRank, RankPlan
from urank.reproduction.paper_networks import PAPER

IMAGES = 8

# Small networks of the libraries' own classes, for 32 x 32 images and four classes.
FAMILIES = {
    "ViT (torchvision)": lambda: VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=4
    ),
    "ViT (timm)": lambda: create("vit", 4, width=0.17),
    "DeiT": lambda: create(
        "timm/deit_tiny_patch16_224", 4, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    ),
    "Swin": lambda: SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(1, 2), num_classes=4
    ),
    "ResNet": lambda: create("resnet18", 4, width=0.25),
    "ResNet (bottlenecks)": lambda: create("timm/resnet26", 4, layers=(1, 1, 1, 1), channels=(4, 8, 12, 16)),
    "WRN": lambda: create("timm/wide_resnet50_2", 4, layers=(1, 1, 1, 1), channels=(4, 8, 12, 16)),
    "VGG": lambda: create("vgg11", 4, width=0.0625),
    "ConvNeXt": lambda: create("timm/convnext_tiny", 4, depths=(1, 1, 1, 1), dims=(8, 12, 16, 24)),
    "EfficientNet": lambda: create("timm/test_efficientnet", 4),
    "MLP-Mixer": lambda: MlpMixer(img_size=32, patch_size=8, embed_dim=32, num_blocks=2, num_classes=4),
    "RegNet": lambda: RegNet(BlockParams.from_init_params(4, 16, 12, 2, 8, se_ratio=0.25), num_classes=4),
    "DenseNet": lambda: create("timm/densenet121", 4, growth_rate=8, block_config=(1, 1, 1, 1)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def measured(request):
    """A network with explicit attention in float64 and evaluation mode, its images and its Gram matrices."""
    torch.manual_seed(0)
    model = without_zeros(FAMILIES[request.param]()).double().eval()
    images, labels = torch.randn(IMAGES, 3, 32, 32, dtype=torch.float64), torch.arange(IMAGES) % 4
    batches = in_batches(images, labels, 4)
    explicit = urank.explicit_attention(copy.deepcopy(model))
    assert torch.allclose(logits(explicit, batches), logits(model, batches), rtol=1e-9, atol=1e-12)
    return explicit, batches, urank.accumulate_grams(explicit, batches, progress=False)


@torch.no_grad()
def without_zeros(model):
    """Add noise to every parameter: a classifier, bias or layer scale of zero would hide errors."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def logits(model, batches):
    with torch.no_grad():
        return torch.cat([model(images) for images, _ in batches])


def plan_by_energy(model, grams, energy):
    """A plan with dimensions that hold a share of the energy, and the upper bound min(k_S, k_T) as rank."""
    entries, layers = [], urank.matrix_layers(model)
    for name, gram in grams.items():
        W = urank.weight_matrix(layers[name])
        k_s, k_t = (
            urank.dimension_for_energy(urank.Spectrum.of(G), energy) for G in (gram, urank.output_gram(gram, W))
        )
        entries.append(LayerRank(name, *W.shape, urank.utilized_rank(W), k_s, k_t, min(k_s, k_t), IMAGES))
    return RankPlan(tuple(entries), None, "energy", 0, 0)


def test_every_layer_has_a_gram_matrix(measured):
    model, _, grams = measured
    sizes = {name: len(gram) for name, gram in grams.items()}
    assert sizes == {name: urank.weight_matrix(layer).shape[0] for name, layer in urank.matrix_layers(model).items()}
    assert all(torch.linalg.eigvalsh(gram)[-1] > 0 for gram in grams.values())


def test_the_whole_energy_keeps_the_outputs(measured):
    """A projection onto the span of the inputs and outputs keeps the outputs for these images."""
    model, batches, grams = measured
    plan = plan_by_energy(model, grams, 1 - 1e-13)
    projected = urank.project_network(model, plan, grams)
    assert any(entry.k_s < entry.d for entry in plan.layers) or any(entry.k_t < entry.m for entry in plan.layers)
    assert torch.allclose(logits(projected, batches), logits(model, batches), rtol=1e-4, atol=1e-6)


def test_search_replays_the_network(measured):
    """With a tolerance of 100 points every probe passes, down to one dimension."""
    model, batches, grams = measured
    names = list(grams)
    chosen = {name: grams[name] for name in (names[0], names[len(names) // 2], names[-1])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the search warns if a replay does not reproduce the network
        plan = urank.search_ranks(model, chosen, batches, tolerance=100, progress=False)
    assert [(entry.layer, entry.k_s, entry.k_t) for entry in plan.layers] == [(name, 1, 1) for name in chosen]
    assert all(probe.passed for probe in plan.probes) and plan.total == IMAGES


def test_the_compact_network_equals_the_projected_one_also_after_loading(measured, tmp_path):
    model, batches, grams = measured
    before, plan = logits(model, batches), plan_by_energy(model, grams, 0.9)
    projected = urank.project_network(model, plan, grams)
    compact = urank.decompose(projected, plan, useful_only=True)
    expected = logits(projected, batches)
    assert torch.allclose(logits(compact, batches), expected, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(expected, before, rtol=1e-3)
    useful = sum(entry.d * entry.m - entry.rank * (entry.d + entry.m) for entry in plan.layers if entry.useful)
    assert useful > 0 and count(model) - count(compact) == useful
    urank.save_compact(compact, plan, tmp_path)
    loaded = urank.load_compact(model, tmp_path).eval()
    assert torch.equal(logits(loaded, batches), logits(compact, batches))
    assert torch.equal(logits(model, batches), before)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("printed", "blocks"), [("ViTB16", 12), ("ViTB32", 12), ("ViTL16", 24), ("ViTL32", 24)])
def test_a_torchvision_vit_has_the_paper_s_layers(printed, blocks):
    """About 50 linear layers in a ViT-B (section 5.2): Q, K and V count as one."""
    with torch.device("meta"):
        model = urank.explicit_attention(create(PAPER[printed, "ImageNet-1k"].name, 1000))
    layers = urank.matrix_layers(model).values()
    linear = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
    width = model.hidden_dim
    assert len(layers) == len(linear) + 1 == 4 * blocks + 2  # the embedding of the patches is a convolution
    assert linear.count((width, 3 * width)) == linear.count((width, width)) == blocks
