import copy
import math

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from urank import models
from urank.attention import ExplicitAttention, explicit_attention, unfused_attention
from urank.layers import matrix_layers, skipped_layers, weight_matrix

N, L, S, D, HEADS = 3, 4, 5, 6, 2


def attention(**options):
    """An attention module with random parameters; torch initializes its biases with zeros."""
    module = nn.MultiheadAttention(D, HEADS, **options).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def sequence(length, batch_first=True, batch=N):
    x = torch.randn(batch, length, D, dtype=torch.float64)
    return x if batch_first else x.transpose(0, 1)


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(found[1], expected[1])


def boolean(*shape):
    """A random mask that never masks the first key."""
    mask = torch.rand(shape) < 0.5
    mask[..., 0] = False
    return mask


MASKS = {
    "none": lambda: {},
    "boolean": lambda: dict(attn_mask=boolean(L, S)),
    "float": lambda: dict(attn_mask=torch.randn(L, S, dtype=torch.float64)),
    "boolean, a mask a head": lambda: dict(attn_mask=boolean(N * HEADS, L, S)),
    "float, a mask a head": lambda: dict(attn_mask=torch.randn(N * HEADS, L, S, dtype=torch.float64)),
    "padding": lambda: dict(key_padding_mask=boolean(N, S)),
    "float padding": lambda: dict(key_padding_mask=torch.randn(N, S, dtype=torch.float64)),
    "both": lambda: dict(attn_mask=boolean(N * HEADS, L, S), key_padding_mask=boolean(N, S)),
    "both, float": lambda: dict(
        attn_mask=torch.randn(L, S, dtype=torch.float64), key_padding_mask=torch.randn(N, S, dtype=torch.float64)
    ),
}
WEIGHTS = [
    dict(need_weights=False),
    dict(need_weights=True),
    dict(need_weights=True, average_attn_weights=False),
]


class TestTheSameOutputs:
    @pytest.mark.parametrize("weights", WEIGHTS)
    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    @pytest.mark.parametrize("batch_first", [True, False])
    def test_of_different_queries_keys_and_values(self, mask, weights, batch_first):
        module, arguments = attention(batch_first=batch_first), mask() | weights
        inputs = [sequence(length, batch_first) for length in (L, S, S)]
        assert_same(explicit_attention(module)(*inputs, **arguments), module(*inputs, **arguments))

    @pytest.mark.parametrize("grad", [True, False])  # without gradients torch uses its fused kernel
    @pytest.mark.parametrize("weights", WEIGHTS)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("batch_first", [True, False])
    def test_of_self_attention(self, grad, weights, bias, batch_first):
        module = attention(batch_first=batch_first, bias=bias)
        x, mask = sequence(L, batch_first), boolean(L, L)
        with torch.set_grad_enabled(grad):
            assert_same(
                explicit_attention(module)(x, x, x, attn_mask=mask, **weights),
                module(x, x, x, attn_mask=mask, **weights),
            )

    @pytest.mark.parametrize("weights", WEIGHTS)
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("padding", [None, boolean(S)])
    def test_of_a_single_sequence(self, weights, batch_first, padding):
        module = attention(batch_first=batch_first)
        inputs = [sequence(length, batch=1)[0] for length in (L, S, S)]
        arguments = weights | dict(attn_mask=boolean(HEADS, L, S), key_padding_mask=padding)
        assert_same(explicit_attention(module)(*inputs, **arguments), module(*inputs, **arguments))

    @pytest.mark.parametrize("weights", WEIGHTS)
    @pytest.mark.parametrize("padding", [None, boolean(N, L)])
    def test_of_a_causal_mask(self, weights, padding):
        module, x = attention(batch_first=True), sequence(L)
        causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
        if padding is not None:
            padding = torch.zeros(N, L, dtype=torch.float64).masked_fill(padding, -math.inf)
        arguments = weights | dict(attn_mask=causal, key_padding_mask=padding, is_causal=True)
        assert_same(explicit_attention(module)(x, x, x, **arguments), module(x, x, x, **arguments))

    @pytest.mark.parametrize("weights", WEIGHTS)
    def test_of_dropout_in_training(self, weights):
        module, x = attention(batch_first=True, dropout=0.5), sequence(L)
        explicit = explicit_attention(module)
        assert_same(explicit(x, x, x, **weights), explicit(x, x, x, **weights))
        outputs = []
        for each in (explicit.train(), module.train()):
            torch.manual_seed(1)
            outputs.append(each(x, x, x, **weights))
        assert_same(*outputs)
        assert not torch.allclose(outputs[0][0], explicit.eval()(x, x, x, **weights)[0])

    def test_of_gradients(self):
        module, x = attention(batch_first=True), sequence(L)
        explicit = explicit_attention(module)
        for each in (module, explicit):
            each(x, x, x)[0].square().sum().backward()
        torch.testing.assert_close(explicit.in_proj.weight.grad, module.in_proj_weight.grad)
        torch.testing.assert_close(explicit.out_proj.bias.grad, module.out_proj.bias.grad)


class TestArguments:
    def test_is_causal_needs_a_mask(self):
        x = sequence(L)
        with pytest.raises(ValueError, match="pass attn_mask"):
            explicit_attention(attention())(x, x, x, is_causal=True)

    def test_an_integer_mask_is_refused(self):
        x = sequence(L)
        with pytest.raises(ValueError, match="int64"):
            explicit_attention(attention(batch_first=True))(x, x, x, attn_mask=torch.zeros(L, L, dtype=torch.int64))

    def test_self_attention_projects_once_cross_attention_three_times(self):
        explicit, calls = explicit_attention(attention(batch_first=True)), []
        explicit.in_proj.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
        x, memory = sequence(L), sequence(S)
        explicit(x, x, x)
        assert len(calls) == 1
        explicit(x, memory, memory)
        assert [call is expected for call, expected in zip(calls[1:], (x, memory, memory), strict=True)] == [True] * 3


def tiny_vit(classes=4):
    return VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=20, num_classes=classes
    )


class TestNetworks:
    def test_a_vision_transformer_keeps_its_weights_and_outputs(self):
        model = tiny_vit().double().eval()
        nn.init.normal_(model.heads.head.weight)  # torchvision initializes it with zeros
        explicit = explicit_attention(model)
        images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(explicit(images), model(images))
        for name in ("encoder_layer_0", "encoder_layer_1"):
            old, new = (network.encoder.layers.get_submodule(name).self_attention for network in (model, explicit))
            assert type(old) is nn.MultiheadAttention and type(new) is ExplicitAttention
            assert type(new.in_proj) is type(new.out_proj) is nn.Linear
            assert torch.equal(weight_matrix(new.in_proj), old.in_proj_weight.T)
            assert torch.equal(new.in_proj.bias, old.in_proj_bias)
            assert torch.equal(new.out_proj.weight, old.out_proj.weight)
            assert new.in_proj.weight.data_ptr() != old.in_proj_weight.data_ptr()
        attention = "encoder.layers.encoder_layer_0.self_attention"
        assert {f"{attention}.in_proj", f"{attention}.out_proj"} <= set(matrix_layers(explicit))
        assert attention in skipped_layers(model) and attention not in skipped_layers(explicit)

    @pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_torchs_encoder_does_not_use_its_fused_kernels(self, norm_first, training):
        layer = nn.TransformerEncoderLayer(
            D, HEADS, 7, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64
        )
        model = nn.TransformerEncoder(layer, 2).train(training)
        explicit, x = explicit_attention(model), sequence(L)
        assert isinstance(explicit.layers[1].self_attn, ExplicitAttention)
        assert explicit.training == explicit.layers[0].self_attn.training == training
        padding = torch.arange(L)[None] >= torch.tensor([[4], [2], [3]])
        calls = []
        explicit.layers[0].self_attn.in_proj.register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            torch.testing.assert_close(explicit(x), model(x))
            causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
            torch.testing.assert_close(explicit(x, mask=causal), model(x, mask=causal))
            found, expected = (network(x, src_key_padding_mask=padding) for network in (explicit, model))
            torch.testing.assert_close(found[~padding], expected[~padding])
        assert len(calls) == 3

    @pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
    def test_an_encoder_can_be_made_of_an_explicit_layer(self):
        layer = nn.TransformerEncoderLayer(D, HEADS, 7, batch_first=True, dtype=torch.float64).eval()
        x = sequence(L)
        with torch.no_grad():
            expected = nn.TransformerEncoder(layer, 2).eval()(x)
            torch.testing.assert_close(nn.TransformerEncoder(explicit_attention(layer), 2).eval()(x), expected)

    def test_torchs_decoder_keeps_its_outputs(self):
        model = nn.TransformerDecoderLayer(D, HEADS, 7, dropout=0.0, dtype=torch.float64)
        x, memory = sequence(L, batch_first=False), sequence(S, batch_first=False)
        torch.testing.assert_close(explicit_attention(model)(x, memory), model(x, memory))

    def test_one_attention_at_two_places_stays_shared(self):
        shared = attention()
        explicit = explicit_attention(nn.ModuleDict(dict(a=shared, b=shared)))
        assert isinstance(explicit["a"], ExplicitAttention)
        assert explicit["a"] is explicit["b"]

    def test_without_attention_returns_an_equal_copy(self):
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        found = explicit_attention(model)
        assert repr(found) == repr(model) and found is not model
        state = found.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert found[0].weight.data_ptr() != model[0].weight.data_ptr()

    def test_leaves_the_network_and_the_random_state(self):
        model = tiny_vit()
        before, state = copy.deepcopy(model), torch.get_rng_state()
        explicit_attention(model)
        assert repr(model) == repr(before)
        assert torch.equal(torch.get_rng_state(), state)


def hooked(register):
    module = attention()
    getattr(module, register)(lambda *_: None)
    return module


class Doubled(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        outputs, weights = super().forward(*args, **kwargs)
        return 2 * outputs, weights


def parametrized():
    module = attention()
    nn.utils.parametrizations.orthogonal(module, "in_proj_weight")
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (attention(kdim=4), "widths 4 and 6"),
        (attention(vdim=4), "widths 6 and 4"),
        (attention(add_bias_kv=True), "add_bias_kv"),
        (attention(add_zero_attn=True), "add_zero_attn"),
        (Doubled(D, HEADS), "overrides forward"),
        (parametrized(), "parametrization"),
        (hooked("register_forward_hook"), "has forward hooks"),
        (hooked("register_forward_pre_hook"), "has forward hooks"),
    ],
)
def test_unsupported_attention_is_kept_and_reported(module, reason):
    model = nn.ModuleDict(dict(attention=module, linear=nn.Linear(2, 2)))
    explicit = explicit_attention(model)
    assert type(explicit["attention"]) is type(module)
    assert list(matrix_layers(explicit)) == ["linear"]
    assert list(skipped_layers(explicit)) == ["attention"]
    assert reason in skipped_layers(explicit)["attention"]


def test_unfused_attention_gives_the_same_logits_without_the_fused_product(monkeypatch):
    network, images = models.create("vit", width=0.34).eval(), torch.randn(2, 3, 32, 32)
    fused = nn.functional.scaled_dot_product_attention
    calls = []
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *args, **kw: calls.append(args) or fused(*args, **kw)
    )
    expected = network(images)
    with unfused_attention(network):
        torch.testing.assert_close(network(images), expected)
    assert len(calls) == 6  # one per block, outside the context manager


def test_unfused_attention_is_undone_after_an_error():
    network = models.create("vit", width=0.34)
    with pytest.raises(RuntimeError, match="stop"), unfused_attention(network):
        raise RuntimeError("stop")
    assert network.blocks[0].attn.fused_attn
