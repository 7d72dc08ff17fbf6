import copy
from dataclasses import replace

import naive
import pytest
import timm
import torch
from conftest import NETWORKS, small_cnn
from timm.layers import Conv2dSame, Linear
from torch import nn
from torch.nn.utils import parameters_to_vector
from torchvision.models import (
    ResNet50_Weights,
    SwinTransformer,
    ViT_B_16_Weights,
    resnet50,
    vit_b_16,
)

from urank.attention import explicit_attention
from urank.calibration import accumulate_grams
from urank.factorize import (
    Cost,
    count_cost,
    decompose,
    factor,
    load_compact,
    merge_useless,
    project_network,
    save_compact,
    split,
)
from urank.layers import matrix_layers, weight_matrix
from urank.models import create
from urank.models.vgg import STAGES
from urank.plan import LayerRank, RankPlan
from urank.subspaces import utilized_rank

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "wide linear": (lambda: nn.Linear(3, 8, bias=False), (2, 3)),
    "one output": (lambda: nn.Linear(3, 1), (3,)),
    "conv": (lambda: nn.Conv2d(3, 5, 3), (3, 8, 7)),
    "stride and padding": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2), bias=False), (3, 8, 7)),
    "same": (lambda: nn.Conv2d(2, 30, (2, 4), padding="same"), (2, 8, 7)),
    "dilation": (lambda: nn.Conv2d(3, 5, 3, dilation=(1, 2)), (3, 8, 7)),
    "reflect": (lambda: nn.Conv2d(3, 5, 3, padding=2, padding_mode="reflect"), (3, 8, 7)),
    "circular": (lambda: nn.Conv2d(3, 5, (2, 3), padding="same", padding_mode="circular"), (3, 8, 7)),
    "one by one": (lambda: nn.Conv2d(6, 4, 1, stride=2), (6, 8, 7)),
    "padded by its forward": (lambda: Conv2dSame(3, 5, (3, 2), stride=2, dilation=(1, 2)), (3, 8, 7)),
    "of another class": (lambda: Linear(6, 5), (6,)),
}


def plan_of(model, ranks, k=None):
    """A plan with one of `ranks` per layer; None is the full rank."""
    entries = []
    for (name, layer), rank in zip(matrix_layers(model).items(), ranks, strict=True):
        d, m = weight_matrix(layer).shape
        rank = min(d, m) if rank is None else rank
        entries.append(LayerRank(name, d, m, min(d, m), k_s=d, k_t=m, rank=rank, correct=0))
    return RankPlan(tuple(entries), None, "given", 0, 0)


def full_plan(model):
    return plan_of(model, [None] * len(matrix_layers(model)))


def images_like(shape, count=4):
    return torch.randn(count, *shape, dtype=torch.float64)


class TestSplit:
    @pytest.mark.filterwarnings("ignore:Using padding='same'")
    @pytest.mark.parametrize("name", LAYERS)
    @pytest.mark.parametrize("r", [1, 2, 99])
    def test_has_r_times_d_plus_m_weights_and_at_full_rank_the_same_outputs(self, name, r):
        build, shape = LAYERS[name]
        layer, x = build().double(), images_like(shape)
        d, m = weight_matrix(layer).shape
        r = min(r, d, m)
        pair = split(layer, r)
        if r == min(d, m):
            with torch.no_grad():
                torch.testing.assert_close(pair(x), layer(x))
        assert sum(p.numel() for p in pair.parameters()) == r * (d + m) + (m if layer.bias is not None else 0)
        assert type(pair[0]) is type(layer)
        assert type(pair[1]) is (nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d)
        widths = {getattr(pair[0], name, r) for name in ("out_features", "out_channels")}
        assert widths == {r} and pair[0].weight.requires_grad

    @pytest.mark.parametrize("name", ["linear", "stride and padding"])
    def test_of_a_layer_of_lower_rank_is_exact(self, name):
        build, shape = LAYERS[name]
        layer, x = build().double(), images_like(shape)
        with torch.no_grad():
            layer.weight[1:] = 0
            layer.weight[2] = layer.weight[0].flip(0)
            r = int(torch.linalg.matrix_rank(weight_matrix(layer)))
            torch.testing.assert_close(split(layer, r)(x), layer(x))

    def test_keeps_the_precision(self):
        assert {p.dtype for p in split(nn.Conv2d(3, 4, 3).bfloat16(), 2).parameters()} == {torch.bfloat16}

    def test_leaves_the_layer_alone(self):
        layer = Conv2dSame(3, 5, 3)
        before = copy.deepcopy(layer)
        with torch.no_grad():
            for parameter in split(layer, 2).parameters():
                parameter.zero_()
        assert repr(layer) == repr(before)
        assert torch.equal(layer.weight, before.weight) and torch.equal(layer.bias, before.bias)

    @pytest.mark.parametrize(("d", "m"), [(7, 4), (4, 7)])
    def test_factor_is_the_best_approximation(self, d, m):
        W = torch.randn(d, m, dtype=torch.float64)
        sigma = torch.linalg.svdvals(W)
        for r in range(1, 5):
            A, B = factor(W, r)
            assert A.shape == (d, r) and B.shape == (r, m)
            torch.testing.assert_close(A.T @ A, torch.eye(r, dtype=torch.float64))
            torch.testing.assert_close((W - A @ B).square().sum(), sigma[r:].square().sum())
            first, second = factor(W, r, balanced=True)
            torch.testing.assert_close(first @ second, A @ B)
            torch.testing.assert_close(first.T @ first, second @ second.T)


class TestDecompose:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_full_rank_leaves_the_outputs(self, name):
        build, size = NETWORKS[name]
        network = build().double().eval()
        images = images_like((3, size, size))
        compact = decompose(network, full_plan(network))
        assert len(matrix_layers(compact)) == 2 * len(matrix_layers(network))
        with torch.no_grad():
            torch.testing.assert_close(compact.eval()(images), network(images))

    def test_leaves_the_network_alone(self):
        network = small_cnn()
        before = copy.deepcopy(network)
        decompose(network, plan_of(network, [2, 3, 2, 1]))
        assert repr(network) == repr(before)
        assert torch.equal(parameters_to_vector(network.parameters()), parameters_to_vector(before.parameters()))

    def test_a_rank_of_zero_keeps_one_direction(self):
        network = nn.Sequential(nn.Linear(3, 2))
        nn.init.zeros_(network[0].weight)
        compact = decompose(network, plan_of(network, [0]))
        assert compact[0][0].out_features == 1
        torch.testing.assert_close(compact(torch.randn(4, 3)), network[0].bias.expand(4, 2))

    @pytest.mark.parametrize("ranks", [(2, 3, 2, 1), (8, 10, 8, 4), (1, 10, 3, 4)])
    def test_useful_only_splits_only_layers_that_get_smaller(self, ranks):
        network = small_cnn()
        plan = plan_of(network, ranks)
        compact = decompose(network, plan, useful_only=True)
        for entry in plan.layers:
            layer, found = network.get_submodule(entry.layer), compact.get_submodule(entry.layer)
            if entry.rank * (entry.d + entry.m) < entry.d * entry.m:
                assert isinstance(found, nn.Sequential)
            else:
                assert type(found) is type(layer)
                assert torch.equal(found.weight, layer.weight)
        saved = sum(max(0, e.d * e.m - e.rank * (e.d + e.m)) for e in plan.layers)
        assert params(compact) == params(network) - saved

    def test_factors_equal_w_prime_up_to_the_cut_energy(self, searched):
        """A B is W' but for the 0.01 % of its energy that the rank leaves out."""
        network, grams, _, plan = searched
        projected = project_network(network, plan, grams)
        compact = decompose(projected, plan)
        for entry in plan.layers:
            W = weight_matrix(projected.get_submodule(entry.layer))
            A, B = (weight_matrix(layer) for layer in compact.get_submodule(entry.layer))
            assert A.shape[1] == entry.rank == utilized_rank(W)
            tail = torch.linalg.svdvals(W)[entry.rank :].square().sum()
            torch.testing.assert_close((W - A @ B).square().sum(), tail, rtol=1e-6, atol=1e-20)
            assert tail <= 1e-4 * W.square().sum()

    def test_project_network_writes_w_prime_into_every_layer(self, searched):
        network, grams, _, plan = searched
        projected = project_network(network, plan, grams)
        for entry in plan.layers:
            W = naive.weight_matrix(network.get_submodule(entry.layer))
            expected = naive.project(W, grams[entry.layer].numpy(), entry.k_s, entry.k_t)
            found = weight_matrix(projected.get_submodule(entry.layer))
            torch.testing.assert_close(found, torch.from_numpy(expected))
        assert torch.equal(projected[9].bias, network[9].bias)

    @pytest.mark.parametrize("use", [decompose, lambda net, plan: project_network(net, plan, {})])
    def test_a_plan_of_another_network_is_refused(self, use):
        with pytest.raises(ValueError, match="'0' is 27 x 8 in this network but 27 x 9 in the plan"):
            plan = full_plan(small_cnn())
            use(small_cnn(), replace(plan, layers=(replace(plan.layers[0], m=9), *plan.layers[1:])))
        with pytest.raises(ValueError, match="'features.0', which this network does not have"):
            use(small_cnn(), full_plan(create("vgg11", width=0.125)))

    @pytest.mark.parametrize("rank", [-1, 9])
    def test_an_impossible_rank_is_refused(self, rank):
        with pytest.raises(ValueError, match=f"'0': its rank must be between 0 and 8, the plan has {rank}"):
            decompose(small_cnn(), plan_of(small_cnn(), [rank, 1, 1, 1]))

    def test_a_layer_listed_twice_is_refused(self):
        plan = plan_of(small_cnn(), [1, 2, 3, 4])
        with pytest.raises(ValueError, match="layer '3' twice"):
            decompose(small_cnn(), replace(plan, layers=(*plan.layers, plan.layers[1])))

    def test_a_network_that_is_one_layer_is_split_merged_and_saved(self, tmp_path):
        network, x = nn.Linear(6, 5).double(), images_like((6,))
        grams = accumulate_grams(network, [x], progress=False)
        assert list(grams) == [""]
        plan = plan_of(network, [5])
        compact = decompose(project_network(network, plan, grams), plan)
        assert isinstance(compact, nn.Sequential) and isinstance(network, nn.Linear)
        save_compact(compact, plan, tmp_path)
        merged, loaded = merge_useless(compact, network, plan), load_compact(network, tmp_path)
        assert type(merged) is nn.Linear
        with torch.no_grad():
            for found in (compact, merged, loaded):
                torch.testing.assert_close(found(x), network(x))

    def test_a_missing_gram_is_named(self, searched):
        network, grams, _, plan = searched
        with pytest.raises(ValueError, match="'9'"):
            project_network(network, plan, {name: gram for name, gram in grams.items() if name != "9"})


def params(model):
    return sum(parameter.numel() for parameter in model.parameters())


class TestMergeUseless:
    @pytest.mark.parametrize("ranks", [(2, 3, 2, 1), (8, 10, 8, 4), (1, 10, 3, 4)])
    def test_keeps_the_outputs_at_the_cost_of_useful_only(self, ranks):
        network = small_cnn().double().eval()
        plan = plan_of(network, ranks)
        compact = decompose(network, plan)
        for parameter in compact.parameters():  # as if it had been fine-tuned
            parameter.data += 0.1 * torch.randn_like(parameter)
        before = parameters_to_vector(compact.parameters()).detach().clone()
        merged = merge_useless(compact, network, plan)
        images = images_like((3, 8, 8))
        with torch.no_grad():
            torch.testing.assert_close(merged(images), compact.eval()(images))
        useful_only = decompose(network, plan, useful_only=True)
        assert cost(merged) == cost(useful_only)
        assert cost(merged).params <= min(cost(compact).params, cost(network).params)
        assert torch.equal(parameters_to_vector(compact.parameters()), before)

    def test_a_partly_factored_network_is_refused(self):
        network = small_cnn()
        plan = full_plan(network)
        with pytest.raises(ValueError, match="'0'"):
            merge_useless(decompose(network, plan, useful_only=True), network, plan)

    def test_a_plan_of_another_network_is_refused(self):
        network = small_cnn()
        with pytest.raises(ValueError, match="does not have"):
            merge_useless(decompose(network, full_plan(network)), network, full_plan(create("vgg11", width=0.125)))


def cost(model, shape=(3, 8, 8)):
    return count_cost(copy.deepcopy(model).float(), shape)


class TestCost:
    def test_equals_a_count_by_hand(self):
        """3 -> 8 channels at 4 x 4 positions, 8 -> 10 at 4 x 4, 10 -> 8 (2 x 3) at 3 x 2, then 48 -> 4."""
        macs = 16 * 27 * 8 + 16 * 72 * 10 + 6 * 60 * 8 + 48 * 4
        weights = 27 * 8 + 8 + 72 * 10 + 60 * 8 + 8 + 48 * 4 + 4
        assert count_cost(small_cnn(), (3, 8, 8)) == Cost(weights + 2 * (8 + 10), macs)

    def test_counts_every_row_and_the_weights_of_groups(self):
        tokens = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
        assert count_cost(tokens, (6, 5)) == Cost(5 * 7 + 7 + 7 * 2 + 2, 6 * (35 + 14))
        assert count_cost(nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False)), (4, 5, 5)) == Cost(72, 72 * 9)

    def test_of_two_factors(self):
        network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False))
        compact = decompose(network, plan_of(network, [5]))
        assert count_cost(compact, (3, 9, 9)) == Cost(5 * (27 + 8), 16 * 5 * (27 + 8))

    @pytest.mark.parametrize(("name", "millions"), list(zip(STAGES, [9.23, 9.42, 14.73, 20.04])))
    def test_of_the_papers_networks(self, name, millions):
        side, channels, weights, macs = 32, 3, 0, 0
        for stage in STAGES[name]:
            if stage == "M":
                side //= 2
            else:
                weights += 9 * channels * stage + 3 * stage  # bias, and scale and shift of the norm
                macs += side**2 * 9 * channels * stage
                channels = stage
        found = count_cost(create(name))
        assert found == Cost(weights + 512 * 10 + 10, macs + 512 * 10)
        assert round(found.params / 1e6, 2) == millions

    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_of_attention(self, need_weights, batch_first):
        """n tokens of width d: 4 n d^2, and n^2 d for Q K^T and as much for the product with V."""

        class Attend(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.MultiheadAttention(d, 2, batch_first=batch_first)

            def forward(self, x):
                x = x if batch_first else x.transpose(0, 1)
                return self.attention(x, x, x, need_weights=need_weights)[0]

        n, d = 7, 6
        expected = Cost(4 * d * d + 4 * d, 4 * n * d * d + 2 * n * n * d)
        network = Attend()
        assert count_cost(network, (n, d)) == count_cost(explicit_attention(network), (n, d)) == expected

    @pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
    def test_of_torchs_encoder_includes_its_fused_kernels(self):
        n, d, hidden = 7, 6, 10
        network = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 2, hidden, batch_first=True), 3)
        macs = 3 * (4 * n * d * d + 2 * n * n * d + 2 * n * d * hidden)
        assert count_cost(network, (n, d)).macs == count_cost(explicit_attention(network), (n, d)).macs == macs
        assert torch.backends.mha.get_fastpath_enabled() and torch.backends.cuda.flash_sdp_enabled()

    @pytest.mark.parametrize(
        ("build", "weights"), [(resnet50, ResNet50_Weights.IMAGENET1K_V1), (vit_b_16, ViT_B_16_Weights.IMAGENET1K_V1)]
    )
    def test_equals_what_torchvision_documents(self, build, weights):
        with torch.device("meta"):
            network = explicit_attention(build())
        found = count_cost(network, (3, 224, 224))
        assert round(found.macs / 1e9, 2) == pytest.approx(weights.meta["_ops"], abs=0.006)
        assert found.params == weights.meta["num_params"]

    def test_leaves_the_network_alone(self):
        network = small_cnn().train()
        before = copy.deepcopy(network.state_dict())
        count_cost(network, (3, 8, 8))
        assert network.training
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert not any(module._forward_hooks for module in network.modules())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_does_not_depend_on_the_precision(self, dtype):
        assert count_cost(small_cnn().to(dtype), (3, 8, 8)) == count_cost(small_cnn(), (3, 8, 8))


def test_a_layer_with_a_forward_hook_is_not_split():
    """It would run on what the first of the two layers returns."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    handle = network[1].register_forward_hook(lambda layer, inputs, output: output.relu())
    with pytest.raises(ValueError, match="layer '1' has a forward hook"):
        decompose(network, plan_of(network, [2, 2]))
    handle.remove()
    assert decompose(network, plan_of(network, [2, 2]))(torch.zeros(1, 4)).shape == (1, 4)


class Stepping(nn.Module):
    """Keeps its layers in a list as well."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.steps = [self.first, dict(last=self.last)]

    def forward(self, x):
        return self.steps[1]["last"](self.steps[0](x))


def test_a_layer_with_a_second_reference_is_not_split():
    """The network would go on using what was replaced."""
    network = Stepping()
    with pytest.raises(ValueError, match="'first' cannot be replaced because 'steps' also refers to it"):
        decompose(network, plan_of(network, [2, 2]))
    with pytest.raises(ValueError, match="'body.first' .* because 'body.steps' also refers to it"):
        whole = nn.Sequential()
        whole.body = Stepping()
        decompose(whole, plan_of(whole, [2, 2]))


class TestFiles:
    @pytest.mark.parametrize("kind", ["factored", "useful only", "merged"])
    def test_come_back_as_the_same_network(self, searched, tmp_path, kind):
        network, grams, _, plan = searched
        compact = decompose(project_network(network, plan, grams), plan, useful_only=kind == "useful only").eval()
        compact = merge_useless(compact, network, plan) if kind == "merged" else compact
        save_compact(compact, plan, tmp_path / "compact")
        fresh = small_cnn().double().eval()
        loaded = load_compact(fresh, str(tmp_path / "compact"))
        images = images_like((3, 8, 8))
        with torch.no_grad():
            assert torch.equal(loaded(images), compact(images))
            assert not torch.equal(fresh(images), compact(images))
        assert repr(loaded) == repr(compact)

    @pytest.fixture
    def saved(self, tmp_path):
        network = small_cnn()
        plan = plan_of(network, [2, 3, 2, 1])
        save_compact(decompose(network, plan), plan, tmp_path)
        return tmp_path

    @pytest.mark.parametrize("name", ["weights.safetensors", "plan.json"])
    def test_a_truncated_file_is_named(self, saved, name):
        path = saved / name
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match=name):
            load_compact(small_cnn(), saved)

    def test_another_network_is_refused(self, saved):
        with pytest.raises(ValueError, match="does not have"):
            load_compact(create("vgg11", width=0.125), saved)
        with pytest.raises(ValueError, match="but 48 x 4 in the plan"):
            load_compact(small_cnn(classes=5), saved)

    def test_weights_of_another_network_are_named(self, saved):
        other = small_cnn()
        other[8] = nn.BatchNorm2d(3)
        with pytest.raises(ValueError, match=r"weights\.safetensors"):
            load_compact(nn.Sequential(*other, nn.LayerNorm(4)), saved)


def test_a_compact_network_of_timm_accepts_another_image_size():
    """Its strided convolutions pad by the size of the image, also as factors."""
    network = timm.create_model("tf_efficientnet_lite0", num_classes=4).double().eval()
    names = [name for name, layer in matrix_layers(network).items() if type(layer) is Conv2dSame]
    assert names == ["conv_stem"]  # its other strided convolutions are depthwise
    grams = accumulate_grams(network, [images_like((3, 32, 32), 2)], layers=names, progress=False)
    plan = replace(full_plan(network), layers=tuple(full_plan(network)[name] for name in names))
    compact = decompose(project_network(network, plan, grams), plan)
    for size in (32, 33):
        x = images_like((3, size, size), 1)
        with torch.no_grad():
            torch.testing.assert_close(compact(x), network(x))


def test_a_network_that_reads_the_weight_of_a_factored_layer():
    """torchvision's Swin transformer reads the weights and biases of `qkv` and `proj`."""
    model = SwinTransformer([4, 4], 8, [2], [2], [2, 2], num_classes=3).double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    compact = decompose(model, full_plan(model))
    assert isinstance(compact.get_submodule("features.1.0.attn.qkv"), nn.Sequential)
    with torch.no_grad():
        torch.testing.assert_close(compact(images), model(images))


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(3, 5, (2, 3), stride=2)])
def test_the_weight_of_two_factors_is_their_product(layer):
    pair = split(layer.double(), 5)
    torch.testing.assert_close(pair.weight, layer.weight)
    assert pair.bias is pair[1].bias
