"""Networks that use a matrix as W and as W^T: their sizes, their formulas, and the measurement of both uses."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from urank import models
from urank.calibration import accumulate_grams
from urank.factorize import count_cost
from urank.layers import matrix_layers, weight_matrix
from urank.measure import measure
from urank.models.parameter_efficient import TiedAttention, TiedMlp, resnet50_pe, tied_stage, vit_pe_224
from urank.shared_layers import Transposed, separate_uses
from urank.subspaces import Spectrum, layer_spectra, project_tied_weight, utilized_rank

PAIRS = {"vit_pe": "vit", "resnet29_pe1": "resnet29", "resnet29_pe2": "resnet29"}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def randomized(module):
    """The module with random biases and norms as well, in float64."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


class TestSizes:
    @pytest.mark.parametrize(("features", "twin"), [(192, "tiny"), (384, "small"), (768, "base")])
    def test_a_vit_saves_two_of_four_and_one_of_two_matrices(self, features, twin):
        with torch.device("meta"):
            tied, full = vit_pe_224(features), timm.create_model(f"deit_{twin}_patch16_224")
        assert count(full) - count(tied) == 12 * (2 + 4) * features**2
        assert f"{count(tied) / 1e6:.2f}" == {192: "3.06", 384: "11.43", 768: "44.10"}[features]

    def test_the_resnet50_has_the_size_of_the_authors_code(self):
        with torch.device("meta"):
            network = resnet50_pe()
        assert f"{count(network) / 1e6:.2f}" == "15.52"
        assert f"{(count(network) - count(network.fc)) / 1e6:.2f}" == "13.47"

    @pytest.mark.parametrize(("tied", "full"), PAIRS.items())
    def test_tying_saves_parameters_and_no_multiplications(self, tied, full):
        less, more = count_cost(models.create(tied)), count_cost(models.create(full))
        assert less.params < 0.7 * more.params and less.macs >= more.macs

    def test_a_network_for_224_pixels_saves_no_multiplications(self):
        tied, full = count_cost(resnet50_pe(), (3, 64, 64)), count_cost(torchvision.models.resnet50(), (3, 64, 64))
        assert tied.params < 0.61 * full.params and tied.macs > full.macs

    @pytest.mark.parametrize("network", ["vit", "vit_pe"])
    def test_options_reach_the_transformer(self, network):
        model = models.create(network, class_token=False, global_pool="avg")
        assert model.cls_token is None and model.pos_embed.shape[1] == 64


class TestFormulas:
    def test_feed_forward(self):
        mlp, x = randomized(TiedMlp(4, 16)), torch.randn(5, 3, 4).double()
        W, b_1, b_2 = mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.bias
        assert torch.allclose(mlp(x), F.gelu(x @ W.T + b_1) @ W + b_2)

    def test_attention(self):
        attention, x = randomized(TiedAttention(8, 2, qkv_bias=True, proj_bias=True)), torch.randn(5, 3, 8).double()
        W_q, W_kv = attention.qkv.q.weight, attention.qkv.k.weight
        q, k = x @ W_q.T + attention.qkv.q.bias, x @ W_kv.T + attention.qkv.k.bias
        v = x @ W_kv + attention.qkv.v.bias
        heads = [(q[..., h] @ k[..., h].mT / 2).softmax(-1) @ v[..., h] for h in (slice(0, 4), slice(4, 8))]
        assert torch.allclose(attention(x), torch.cat(heads, -1) @ W_q + attention.proj.bias)
        assert count(attention) == 2 * 8**2 + 4 * 8

    def test_bottlenecks_of_a_stage_share_one_matrix(self):
        stage, x = randomized(tied_stage(3, 2, stride=2)), torch.randn(2, 4, 6, 6).double()
        block, W = stage[2], stage[1].conv1.weight.flatten(1)
        grown = torch.cat([stage[0].new(x), x], 1)
        halved = stage[1](grown)
        inner = F.relu(block.bn1(torch.einsum("rc,nchw->nrhw", W, halved)))
        inner = F.relu(block.bn2(block.conv2(inner)))
        expected = F.relu(block.bn3(torch.einsum("rc,nrhw->nchw", W, inner)) + halved)
        assert halved.shape == (2, 8, 3, 3)
        assert torch.allclose(block(halved), expected)
        assert len({parameter for parameter in stage.parameters() if parameter.shape[2:] == (1, 1)}) == 1


class TestTransposed:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("layer", [nn.Linear(3, 5), nn.Conv2d(3, 5, 1)], ids=["linear", "convolution"])
    def test_multiplies_by_the_transposed_matrix_and_trains_with_it(self, layer, bias):
        transposed = Transposed(layer, bias)
        x = torch.randn(2, 5, 4, 4) if layer.weight.ndim == 4 else torch.randn(7, 5)
        rows = x.movedim(1, -1) if x.ndim == 4 else x
        expected = rows @ weight_matrix(layer).T.float() + (transposed.bias if bias else 0)
        assert torch.allclose(transposed(x), expected.movedim(-1, 1) if x.ndim == 4 else expected, atol=1e-6)
        assert torch.allclose(transposed.separate()(x), transposed(x))
        transposed(x).sum().backward()
        assert layer.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("options", [dict(kernel_size=3), dict(kernel_size=1, stride=2)])
    def test_refuses_a_convolution_that_is_not_a_matrix_per_pixel(self, options):
        with pytest.raises(ValueError, match="only a 1 x 1 convolution"):
            Transposed(nn.Conv2d(4, 4, **options))

    @pytest.mark.parametrize("name", PAIRS)
    def test_separate_uses_keeps_the_outputs_and_unties(self, name):
        network, images = models.create(name, width=0.34).eval(), torch.randn(2, 3, 32, 32)
        with pytest.raises(ValueError, match="share one weight: measure separate_uses"):
            matrix_layers(network)
        separate = separate_uses(network, images)
        with torch.no_grad():
            assert torch.allclose(separate(images), network(images), atol=1e-5)
            for parameter in separate.parameters():
                parameter.zero_()
            assert network(images).abs().sum() > 0
        assert not any(isinstance(module, Transposed) for module in separate.modules())


class Planted(nn.Module):
    """FFN(x) = F(x W) W^T, whose inputs and hidden activations lie in planted subspaces."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(12, 20, bias=False)
        self.down = Transposed(self.up, bias=False)
        self.hidden = nn.Parameter(torch.linalg.qr(torch.randn(20, 4))[0] @ torch.randn(4, 3), requires_grad=False)

    def forward(self, x):
        a = self.up(x)
        return self.down(a[:, :3].tanh() @ self.hidden.T)  # rank 3, anywhere in the 20 dimensions


class TestMeasurement:
    def planted(self):
        torch.manual_seed(0)
        return Planted().double(), torch.randn(300, 2).double() @ torch.randn(2, 12).double()

    def test_every_use_has_its_own_rank(self):
        network, images = self.planted()
        measured = measure(network, [images], [images], tolerance=0, progress=False)
        ranks = {layer.layer: (layer.weight_rank, layer.rank) for layer in measured.plan.layers}
        grams = accumulate_grams(measured.network, [images], progress=False)
        layers = matrix_layers(measured.network)
        for name, rank in (("up", 2), ("down", 3)):
            spectrum = Spectrum.of(grams[name])
            assert (spectrum.eigenvalues > 1e-9 * spectrum.eigenvalues[0]).sum() == rank
            assert ranks[name][0] == utilized_rank(weight_matrix(layers[name])) == 12
            assert ranks[name][1] <= rank

    def test_one_projected_matrix_serves_both_uses(self):
        network, images = self.planted()
        separate = separate_uses(network, images)
        grams = accumulate_grams(separate, [images], progress=False)
        W = weight_matrix(network.up)
        (S_1, T_1), (S_2, T_2) = (
            [spectrum.basis[:, :k] for spectrum in layer_spectra(grams[name], matrix)]
            for name, matrix, k in (("up", W, 2), ("down", W.T, 3))
        )
        projected = project_tied_weight(W, S_1, T_1, S_2, T_2)
        assert utilized_rank(projected, energy=1 - 1e-12) == 2 + 3
        with torch.no_grad():
            before = network(images)
            network.up.weight.copy_(projected.T)  # and with it the transposed use
            assert torch.allclose(network(images), before)
        U, sigma, Vh = torch.linalg.svd(projected)
        A, B = U[:, :5], sigma[:5, None] * Vh[:5]
        hidden = (images @ A @ B)[:, :3].tanh() @ network.hidden.T
        assert torch.allclose(hidden @ B.T @ A.T, before)  # factored, and still tied
